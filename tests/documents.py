"""Tables inside documents, between the lines `<!-- NAME -->` and `<!-- /NAME -->`: which document holds which, and how
each is made from the measurements that are committed.

    python -m tests.documents [NAME ...]

writes all of them anew, or those that are named. Nothing is measured, but for `cost`, which counts the operations of
large networks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("search", "results")
FINDINGS = range(1, 8)
_HELD_BY = {
    "tests/pipelines/README.md": ["conformance"],
    "search/README.md": ["flow", "vp"],
    "search/docs/results.md": [
        "evaluation-flow", "evaluation-vp", "flow-end", "evaluation-flow-end", "evaluation-cifar-end", "steps",
    ],
    "search/docs/guidance.md": ["guidance"],
    "search/docs/costs.md": ["bench", "ablation", "cost"],
    "search/docs/study.md": ["study-models", *(f"study-{number}" for number in FINDINGS)],
}  # fmt: skip
FILES = {name: file for file, names in _HELD_BY.items() for name in names}


# --- blocks inside files ----------------------------------------------------------------------------------------------


def check(names: Iterable[str]) -> None:
    """Raises ValueError where a document lacks the markers of one of these blocks."""
    for name in names:
        text = (ROOT / FILES[name]).read_text(encoding="utf-8")
        for marker in (f"<!-- {name} -->", f"<!-- /{name} -->"):
            if (count := text.count(f"{marker}\n")) != 1:
                raise ValueError(f"{FILES[name]} has {count} lines {marker}; put one where it belongs")


def _parts(name: str) -> tuple[str, str, str]:
    """The text before a block, the block, and the text after it."""
    check([name])
    before, rest = (ROOT / FILES[name]).read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    inside, after = rest.split(f"\n<!-- /{name} -->")
    return before, inside, after


def block(name: str) -> str:
    """What a document says between the markers."""
    return _parts(name)[1]


def put(name: str, text: str) -> None:
    """Replace a block by this text."""
    before, _, after = _parts(name)
    file = ROOT / FILES[name]
    file.write_text(f"{before}<!-- {name} -->\n{text.rstrip()}\n<!-- /{name} -->{after}", encoding="utf-8")


# --- what is committed, as text ---------------------------------------------------------------------------------------


def record(name: str) -> Any:
    """A measurement in search/results/."""
    return json.loads((ROOT / RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _indented(text: str) -> str:
    return "\n".join(("    " + line).rstrip() for line in text.strip().splitlines())


def _comparison(name: str) -> str:
    from dssolver_search.measure.results import results_of_record, table

    found = record(f"comparison-{name}")
    uncertainty = found["reference"]["mse_against_half_the_steps"]
    return _indented(table(results_of_record(found), SimpleNamespace(**found["settings"]), uncertainty))


def _evaluation(name: str) -> str:
    from dssolver_search.measure import evaluate

    return _indented(evaluate.table(record(name)))


def _bench() -> str:
    from tests.bench import search

    return search.table(record("bench-search")["rows"])


def _ablation() -> str:
    from tests.bench import search

    return search.ablation_table(record("ablation"))


def _guidance() -> str:
    from tests.bench import guidance

    return guidance.table(record("guidance"))


def _steps() -> str:
    from tests.bench import steps

    return steps.steps_table(record("steps"))


def _cost() -> str:
    from tests.bench import cost_model

    return cost_model.report()


def _study(name: str) -> str:
    from tests.study import study

    return study.blocks(record("study"))[name]


def _conformance() -> str:
    from tests.pipelines import conformance

    return conformance.render(json.loads(conformance.RESULTS.read_text(encoding="utf-8")))


MAKERS: dict[str, Callable[[], str]] = {
    "conformance": _conformance, "bench": _bench, "ablation": _ablation, "cost": _cost, "guidance": _guidance,
    "steps": _steps,
    **{name: partial(_comparison, name) for name in ("flow", "vp", "flow-end")},
    **{name: partial(_evaluation, name) for name in FILES if name.startswith("evaluation-")},
    **{name: partial(_study, name) for name in FILES if name.startswith("study-")},
}  # fmt: skip


def main(names: list[str]) -> None:
    for name in names or FILES:
        put(name, MAKERS[name]())


if __name__ == "__main__":
    main(sys.argv[1:])
