"""Noise levels that pipelines of diffusers pass to `set_timesteps` when their user asked for a step count only.

Only its numbers tell such a default from a user's own grid. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 1e-4


def default_grids(n: int, num_train_timesteps: int = 1000) -> dict[str, list[float]]:
    """Default grids of n flow sigmas, noisiest first, by name; in brackets some of the pipelines that pass them.

    - uniform: 1 .. 1/n (FLUX, Lumina2, Qwen-Image, ...), also written as 1 .. 0 without its end (HunyuanVideo);
    - below one: .999 .. 0 without its end (Helios);
    - linear-quadratic: half of the steps take 2.5 % of the way, the rest grow quadratically (Mochi, LTX-condition);
    - integer: whole timesteps from T to 1, both ends included (CogView4, GLM-Image);
    - trained: levels of training, from T/T to 1/T, both ends included (BRIA).
    """
    count = num_train_timesteps
    span = max(n - 1, 1)
    return {
        "uniform": [(n - i) / n for i in range(n)],
        "below one": [0.999 * (n - i) / n for i in range(n)],
        "linear-quadratic": _linear_quadratic(n),
        "integer": [int(count - i * (count - 1) / span) / count for i in range(n)],
        "trained": [(count - int(i * (count - 1) / span)) / count for i in range(n)],
    }


def default_name(sigmas: Sequence[float], num_train_timesteps: int = 1000) -> str | None:
    """Name of the default grid that these flow sigmas are, for their number; None for a grid of the user's own."""
    for name, grid in default_grids(len(sigmas), num_train_timesteps).items():
        tolerances = [TOLERANCE] * len(grid)
        if name in ("integer", "trained"):  # rounding decides between two whole numbers, except at the ends
            tolerances[1:-1] = [TOLERANCE + 1 / num_train_timesteps] * len(grid[1:-1])
        if all(abs(a - b) <= c for a, b, c in zip(sigmas, grid, tolerances, strict=True)):  # false for NaN
            return name
    return None


def _linear_quadratic(n: int, linear_way: float = 0.025) -> list[float]:
    """n//2 equal steps from 1 over `linear_way`, then a parabola that continues their slope and reaches 0."""
    linear = n // 2
    if linear == 0:
        return [1.0]
    slope, rest = linear_way / linear, n - linear
    curvature = (1 - linear_way - slope * rest) / rest**2
    gone = [slope * i + curvature * max(i - linear, 0) ** 2 for i in range(n)]
    return [1 - g for g in gone]
