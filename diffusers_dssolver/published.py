"""The solvers that ship with the package, the folders of `hub_cards/`. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_NAME = "scheduler_config.json"


def cards_folder() -> Path:
    """`hub_cards/` inside the installed package, or beside the package in a checkout."""
    installed = Path(__file__).parent / "hub_cards"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "hub_cards"


def published_solvers() -> tuple[str, ...]:
    """Names for `DSSolverScheduler.from_published`, in the order in which `from_config` tries them."""
    return tuple(sorted(path.parent.name for path in cards_folder().glob(f"*/{CONFIG_NAME}")))


def published_config(name: str) -> dict[str, Any]:
    """The configuration of one shipped solver.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in published_solvers():
        raise ValueError(f"no published solver is named {name!r}; there are: {', '.join(published_solvers())}")
    return json.loads((cards_folder() / name / CONFIG_NAME).read_text(encoding="utf-8"))
