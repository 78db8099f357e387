"""What guidance does to a solver: searched at one scale and run at others; and one file with a solver for each scale
(`merge`), whose tables are blended for the scales between.

    python -m tests.bench.guidance [--output runs/bench-guidance] [--update]

On the embedded models at 5 calls: searches at 1.5, 3 and 5, test errors there and at 2.25 and 4, final-state mse on 32
samples against 200 steps. Every step of it is a command of the package; killed, it goes on. `--update` puts the tables
into search/docs/guidance.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dssolver_search.artefacts.merge import merge
from dssolver_search.measure.compare import Comparison
from dssolver_search.methods.search import search
from dssolver_search.settings import CompareConfig, MergeConfig, SearchConfig
from tests import documents
from tests.bench.search import FAMILIES, RESULTS, model

SCALES, BETWEEN = (1.5, 3.0, 5.0), (2.25, 4.0)
NFE, SAMPLES, REFERENCE_STEPS, TEACHER_STEPS = 5, 32, 200, 100
MERGED = "each, merged"


def measured(family: str, folder: Path) -> dict[str, dict[str, float]]:
    """Test mse by solver and guidance scale of the run, the best of UniPC and DPM-Solver++(2M) among them."""
    base = SearchConfig(
        pretrained_model_name_or_path=str(model(family)), output_dir=str(folder), nfe=[NFE], fill_nfe=[],
        teacher_steps=TEACHER_STEPS, starts=1, effort="full",
    )  # fmt: skip
    single = {f"{scale:g}": folder / f"{family}-{scale:g}" for scale in SCALES}
    for scale, output in single.items():
        search(replace(base, guidance_scale=float(scale), output_dir=str(output)))
    merged = folder / f"{family}-merged"
    if not merged.exists():
        merge(MergeConfig(solver=list(map(str, single.values())), output_dir=str(merged)))
    solvers = {**{output.name: scale for scale, output in single.items()}, merged.name: MERGED}
    found: dict[str, dict[str, float]] = {name: {} for name in (*solvers.values(), "best of diffusers")}
    for scale in sorted((*SCALES, *BETWEEN)):
        config = CompareConfig(
            pretrained_model_name_or_path=str(model(family)), output_dir=str(folder / f"{family}-at-{scale:g}"),
            nfe=[NFE], guidance_scale=scale, num_samples=SAMPLES, reference_steps=REFERENCE_STEPS,
            solver=[str(folder / name) for name in solvers], schedulers=["unipc", "dpmpp_2m"],
        )  # fmt: skip
        results = Comparison(config).run().results
        for result in results:
            if result.searched:
                found[solvers[result.scheduler]][f"{scale:g}"] = result.mse
        found["best of diffusers"][f"{scale:g}"] = min(r.mse for r in results if not r.searched)
    return found


def table(by_family: dict[str, dict[str, dict[str, float]]]) -> str:
    """Rows: what the solver was searched at; columns: the guidance scale it is run at."""
    lines = []
    for family, rows in by_family.items():
        scales = list(next(iter(rows.values())))
        lines += [f"| {family}, searched at | " + " | ".join(f"run at {s}" for s in scales) + " |"]
        lines += ["|---" * (len(scales) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(f"{cells[s]:.3g}" for s in scales) + " |" for name, cells in rows.items()]
        lines += [""]
    return "\n".join(lines[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-guidance"))
    parser.add_argument("--update", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {family: measured(family, given.output) for family in FAMILIES}
    print(table(found))
    if given.update:
        (RESULTS / "guidance.json").write_text(json.dumps(found, indent=1) + "\n")
        documents.put("guidance", table(found))


if __name__ == "__main__":
    main()
