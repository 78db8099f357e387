"""Where a trajectory of the model ends.

It may end early: from a time `end` on, in one step of first order, at the data that the network predicts there. That
is the better end where the network is weak at little noise. Schedules with a `shift_terminal` (LTX-Video, Qwen-Image)
end so by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.choose import SolverSet
from diffusers_dssolver.derive import first_order_end
from diffusers_dssolver.paths import Path
from diffusers_dssolver.solver import SolverSpec


def check_end(name: str, end: float, model_config: Mapping[str, Any]) -> None:
    """Raise ValueError where an end is given for a model whose schedule has one; `name` of the setting."""
    if end and (terminal := model_config.get("shift_terminal")):
        raise ValueError(
            f"{name} is {end:g}, but this model's schedule ends at its shift_terminal, {terminal:g}; leave {name} out"
        )


def even_nodes(steps: int, end: float = 0.0) -> Tensor:
    """(steps + 1,) float64, even from 1 to 0, or from 1 to `end` and then 0; before any shift."""
    if not end:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    even = torch.linspace(1, end, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)
    return torch.cat([even, torch.zeros(1, dtype=torch.float64)])


def on_the_line(path: Path, node: Tensor, inside: Tensor, state: Tensor, data: Tensor) -> list[Tensor]:
    """States inside the step of first order from `state` at `node` to `data`, at the nodes `inside` (k,): that data
    with the noise of that state."""
    alpha, sigma = (float(factor) for factor in path.alpha_sigma(node))
    noise = (state - alpha * data) / sigma
    return [float(a) * data + float(s) * noise for a, s in zip(*path.alpha_sigma(inside), strict=True)]


@dataclass(frozen=True)
class _EndedSet(SolverSet):
    """Classical solvers whose last step begins at `end`."""

    end: float = 0.0

    def classical(self, nodes: Sequence[float]) -> SolverSpec:
        moved = nodes[0] * even_nodes(len(nodes) - 1, self.end)
        return first_order_end(super().classical(moved.tolist()))


class EndedScheduler(DSSolverScheduler):
    """Takes classical steps, the last one from `config.reference_end`; made by `model_itself`."""

    def _solver_set(self) -> SolverSet:
        return _EndedSet(**vars(super()._solver_set()), end=self.config.reference_end)


def model_itself(model_config: Mapping[str, Any], end: float = 0.0) -> DSSolverScheduler:
    """A scheduler of classical steps, the last one from `end`; with many of them it gives what the model itself gives.

    Raises:
        ValueError: an end for a model whose schedule has one.
    """
    if not end:
        return DSSolverScheduler.from_config(model_config, solvers="classical")
    check_end("reference_end", end, model_config)
    made = EndedScheduler.from_config(model_config, solvers="classical")
    made.register_to_config(reference_end=end)
    return made
