"""Step warps that searches of other models ended with: where a cheap search begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusers_dssolver.paths import FlowPath, Path

from ..teacher.trajectories import WARPS as TEACHER_WARPS
from .problem import StepWarp

# by path, model and calls; clothes: search/demo, digits: models of 8 x 8 pixels
WARPS: dict[str, dict[str, dict[int, StepWarp]]] = {
    "flow": {
        "clothes": {5: (0.2, -0.1, 0.2), 8: (0.3, -1.0, 0.4)},
        "digits": {5: (-0.8, 0.0, 0.3), 8: (0.5, -1.6, 0.2)},
    },
    "vp": {
        "clothes": {5: (-1.0, -0.7, 0.9), 8: (-1.2, -0.4, 0.4)},
        "digits": {5: (-1.0, -0.7, 0.9), 8: (-0.9, -1.0, -0.4)},
    },
}


def interpolated(warps: Mapping[int, StepWarp], nfe: int) -> StepWarp:
    """Between step counts, each number linearly; beyond them that of the last one."""
    counts = sorted(warps)
    a, b, c = (float(np.interp(nfe, counts, [warps[n][k] for n in counts])) for k in range(3))
    return a, b, c


def starts(path: Path, nfe: int, known: Mapping[str, Any]) -> list[StepWarp]:
    """Warps to begin with, the first one as it is if nothing can be tried: that of the nearest step count, each other
    model's, and that of the teacher.

    Args:
        known: entries of this search's solvers by step count.
    """
    kind = "flow" if isinstance(path, FlowPath) else "vp"
    found = [interpolated(warps, nfe) for warps in WARPS[kind].values()] + [TEACHER_WARPS[kind]]
    if there := [int(n) for n, entry in known.items() if "warp" in entry]:
        a, b, c = known[str(min(there, key=lambda n: (abs(n - nfe), n)))]["warp"]
        found.insert(0, (a, b, c))
    return list(dict.fromkeys(found))
