"""Step warps that searches of other models ended with: where a cheap search begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusers_dssolver.paths import FlowPath, Path

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


def prior(path: Path, nfe: int, known: Mapping[str, Any]) -> StepWarp:
    """A warp to begin with: the mean of the models', moved as far as the nearest known step count is away from it.

    Args:
        known: entries of this search's solvers by step count.
    """
    models = WARPS["flow" if isinstance(path, FlowPath) else "vp"].values()

    def mean(n: int) -> np.ndarray:
        return np.mean([interpolated(warps, n) for warps in models], axis=0)

    warp = mean(nfe)
    if there := [int(n) for n, entry in known.items() if "warp" in entry]:
        nearest = min(there, key=lambda n: (abs(n - nfe), n))
        warp += known[str(nearest)]["warp"] - mean(nearest)
    a, b, c = warp.round(3).tolist()
    return a, b, c
