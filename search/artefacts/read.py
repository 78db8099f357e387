"""Solvers and measured results, read back and checked. Every file is untrusted: errors are one line that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_dssolver import DSSolverScheduler, published_solvers
from diffusers_dssolver.published import published_config

from ..console import one_line, warn

NUMBER = float | int
# By file: the command that writes it, the fields that are shown of the file, and those of each of its results.
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


def load_solver(source: str, **choices: Any) -> DSSolverScheduler:
    """The solver of a folder, Hub id or published name.

    Args:
        choices: entries of its configuration to replace, such as `guidance_scale`.

    Raises:
        ValueError: there is no solver that the scheduler accepts.
    """
    held = published_config(source) if source in published_solvers() else DSSolverScheduler.load_config(source)
    if not isinstance(held.get("solvers"), Mapping) or not held["solvers"]:
        raise ValueError(f"{source!r} has no tables; search a solver first")
    return DSSolverScheduler.from_config(held, **choices)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} could not be read: {one_line(error)}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(file)!r} holds a {type(record).__name__}, not a JSON object")
    return record


def read_results(folder: str, name: str) -> dict[str, Any]:
    """The "comparison" or "evaluation" in a folder, checked as far as it is shown."""
    command, whole, each = RESULTS[name]
    try:
        record = read_json(Path(folder) / f"{name}.json")
        checks = [(record, whole), *((result, each) for result in record["results"])]
        wrong = [key for part, kinds in checks for key, kind in kinds.items() if not isinstance(part[key], kind)]
        if wrong or len(checks) == 1:
            raise ValueError(f"{(wrong or ['results'])[0]} is not what it must be")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {name} could be read from {folder!r} ({one_line(error)})"
        raise ValueError(f"{reason}; make it anew with {command}") from None
    return record


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl. A line that holds none, such as a torn last one, is named and left out."""
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            warn(f"{file}, line {number} is damaged and left out")
    return records
