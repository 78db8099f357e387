"""Every step count from 3 to 20: the default search and the all-steps recipe beside the best of diffusers' schedulers.

    python -m dssolver_search compare --pretrained_model_name_or_path search/demo/F --guidance_scale 1.5 \
        --nfe 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 --num_samples 32 --reference_steps 200 \
        --solver runs/steps/F/default runs/steps/F/all-steps --output_dir runs/steps/F/compare
    python -m tests.bench.steps [--folder runs/steps] [--update]

for F = flow and vp, after both searches of both models: `default` is the search on top of search/docs/results.md,
`all-steps` that of search/recipes/all-steps.toml. `--update` puts the table into that document, its figures into
search/results/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import documents
from tests.bench import search as bench_search
from tests.bench.cost_model import table

SOLVERS = ("default", "all-steps")
FILE = bench_search.RESULTS / "steps.json"
Steps = dict[str, dict[str, Any]]  # by NFE: mse of each of SOLVERS, mse and name of the best stock scheduler


def steps_of(results: Sequence[Mapping[str, Any]]) -> Steps:
    """From what `compare` wrote."""
    found: Steps = {}
    for nfe in sorted({r["nfe"] for r in results}):
        here = [r for r in results if r["nfe"] == nfe]
        best = min((r for r in here if r["scheduler"] not in SOLVERS), key=lambda r: r["mse"])
        ours = {r["scheduler"]: r["mse"] for r in here if r["scheduler"] in SOLVERS}
        found[str(nfe)] = {**ours, "mse": best["mse"], "scheduler": f"{best['scheduler']} ({best['spacing']})"}
    return found


def steps_table(record: Mapping[str, Steps]) -> str:
    """A row for each NFE; each error of ours with its ratio to the best stock one."""
    head = [f"{family}: {name}" for family in record for name in ("best of diffusers", *SOLVERS)]
    lines: list[tuple[Any, ...]] = [("calls", *head)]
    for nfe in next(iter(record.values())):
        cells = []
        for at in (steps[nfe] for steps in record.values()):
            cells += [f"{at['mse']:.3g} {at['scheduler']}"]
            cells += [f"{at[name]:.3g} ({at[name] / at['mse']:.2f})" for name in SOLVERS]
        lines.append((nfe, *cells))
    return table(*lines).rstrip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/steps"))
    parser.add_argument("--update", action="store_true")
    given = parser.parse_args(argv)
    record = {}
    for family in bench_search.FAMILIES:
        written = (given.folder / family / "compare" / "comparison.json").read_text(encoding="utf-8")
        record[family] = steps_of(json.loads(written)["results"])
    print(steps_table(record))
    if given.update:
        FILE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        documents.put("steps", steps_table(record))


if __name__ == "__main__":
    main()
