"""Solvers and measured results read back from folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers_dssolver import DSSolverScheduler

from ..console import one_line, say

NUMBER = float | int


def load_artefact(solver: str) -> dict[str, Any]:
    """A solver's full configuration, checked by the scheduler itself.

    Raises:
        ValueError: one line that names the solver.
    """
    return DSSolverScheduler._load_artefact(solver)


def read_results(folder: str, name: str) -> dict[str, Any]:
    """The "comparison" or "evaluation" that a folder holds, checked as far as it is shown.

    Raises:
        ValueError: one line that names the folder.
    """
    command, whole, each = RESULTS[name]
    try:
        record = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
        checks = [(record, whole), *((result, each) for result in record["results"])]
        wrong = [key for part, kinds in checks for key, kind in kinds.items() if not isinstance(part[key], kind)]
        if wrong or len(checks) == 1:
            raise ValueError(f"{(wrong or ['results'])[0]} is not what it must be")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {name} could be read from {folder!r} ({one_line(error)})"
        raise ValueError(f"{reason}; make it anew with {command}") from None
    return record


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a line that is none, such as a torn last one, is named and left out."""
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            say(f"{file}, line {number} is damaged and left out")
    return records


# by file: the command that writes it, what the file must hold to be shown, and what each of its results
RESULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "comparison": (
        "compare",
        {"settings": dict, "reference": dict, "versions": dict},
        {"scheduler": str, "nfe": int, "spacing": str, "calls": int, "mse": NUMBER, "searched": bool},
    ),
    "evaluation": (
        "evaluate",
        {"settings": dict, "extractor": str, "data": dict, "versions": dict},
        {"scheduler": str, "nfe": int, "n": int, "seconds_per_image": NUMBER, "metrics": dict},
    ),
}
