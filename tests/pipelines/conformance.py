"""Every check of `test_conformance.py`, slow ones too, and the table of outcomes: `make test-pipelines`.

Writes `conformance.json` and the table of README.md beside this file, a row per pipeline. Ends with 1 if a check fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests import documents

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "conformance.json"
CHECKS = {
    "test_runs": "runs",
    "test_repeats": "repeats",
    "test_other_step_counts_between": "other step counts between",
    "test_half_precision": "bfloat16",
    "test_batch_is_its_samples": "batches",
    "test_interrupted_then_again": "interruption",
    "test_saved_and_loaded": "saving and loading",
    "test_strengths": "strengths",
    "test_many_steps_agree_with_stock": "same limit as stock",
}
CELLS = {"passed": "yes", "failed": "fails", "skipped": "-"}
SEVERITY = ["skipped", "passed", "failed"]


class Outcomes:
    """A pytest plugin: {pipeline: {check: outcome}}, the worst over the solvers tried."""

    def __init__(self) -> None:
        self.pipelines: dict[str, dict[str, str]] = {}
        self.names: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.names[item.nodeid] = (item.callspec.params["entry"].name, CHECKS[item.originalname])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        pipeline, check = self.names[report.nodeid]
        checks = self.pipelines.setdefault(pipeline, {})
        checks[check] = max(report.outcome, checks.get(check, "skipped"), key=SEVERITY.index)


def by_outcome(checks: dict[str, str]) -> dict[str, list[str]]:
    return {outcome: [c for c in CHECKS.values() if checks.get(c, "skipped") == outcome] for outcome in CELLS}


def render(results: dict[str, Any]) -> str:
    """The Markdown table of `conformance.json`'s content."""
    lines = ["| pipeline | " + " | ".join(CHECKS.values()) + " |", "|---|" + ":-:|" * len(CHECKS)]
    for pipeline, checks in results["pipelines"].items():
        outcome_of = {check: outcome for outcome, names in checks.items() for check in names}
        cells = [CELLS[outcome_of.get(check, "skipped")] for check in CHECKS.values()]
        lines.append(f"| {pipeline} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    outcomes = Outcomes()
    arguments = [str(HERE / "test_conformance.py"), "--run-slow", "-q", "--tb=line", "-p", "no:cacheprovider"]
    status = pytest.main(arguments, plugins=[outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    pipelines = {pipeline: by_outcome(checks) for pipeline, checks in outcomes.pipelines.items()}
    results = {"diffusers": diffusers.__version__, "pipelines": pipelines}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table := render(results))
    documents.put("conformance", table)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
