"""The solver for a run: from a step count, or from noise levels or times that a user or a pipeline gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch

from .derive import Shift, classical, from_neighbours, reshifted, uniform_nodes, warp
from .grids import TOLERANCE, is_default
from .paths import FlowPath, Path
from .solver import MAX_NFE, SolverSpec

Choice = tuple[SolverSpec, str | None]


@dataclass(frozen=True)
class SolverSet:
    """The tables of a scheduler and the model that they run on.

    Args:
        path: of the model.
        tables: searched solvers by step count.
        shift: resolution shift of the coming run (flow).
        searched_shift: shift contained in the nodes of the tables; None: the nodes are final.
        strict: whether a step count without a table is an error.
    """

    path: Path
    tables: Mapping[int, SolverSpec] = field(default_factory=dict)
    shift: Shift = Shift()
    searched_shift: Shift | None = None
    strict: bool = False

    def choose(
        self,
        nfe: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Choice:
        """The solver for what `set_timesteps` was given, and what the user should be told about it.

        Args:
            nfe: N.
            timesteps: N times of the network, noisiest first.
            sigmas: N noise levels before the resolution shift, noisiest first. With both, the network is fed the
                times as they are.

        Raises:
            ValueError: for arguments that contradict each other, grids that do not fall, or with `strict` a step
                count without a table.
        """
        for name, grid in (("timesteps", timesteps), ("sigmas", sigmas)):
            if grid is not None and not 1 <= len(grid) <= MAX_NFE:
                raise ValueError(f"{name} has {len(grid)} entries; 1 to {MAX_NFE} expected")
        if timesteps is not None and sigmas is not None:
            spec, message = self._for_both(timesteps, sigmas)
        elif timesteps is not None:
            spec, message = self._for_timesteps(timesteps)
        elif sigmas is not None:
            spec, message = self._for_sigmas(sigmas)
        else:
            spec, message = self._for_count(nfe)
        if nfe is not None and nfe != spec.nfe:
            raise ValueError(f"num_inference_steps is {nfe}, but the schedule given has {spec.nfe} entries")
        return spec, message

    def classical(self, nodes: Sequence[float]) -> SolverSpec:
        """Classical rows of second order on N+1 nodes before the resolution shift."""
        if isinstance(self.path, FlowPath):
            nodes = self.shift(nodes)
        return classical(nodes, self.path, stretched=bool(self.shift.terminal))

    def times(self, spec: SolverSpec) -> list[float]:
        """The N times that the network is fed."""
        if spec.timesteps is not None:
            return list(spec.timesteps)
        return self.path.timestep(torch.tensor(spec.nodes[:-1], dtype=torch.float64)).tolist()

    def _for_count(self, nfe: int | None) -> Choice:
        if isinstance(nfe, bool) or not isinstance(nfe, Integral) or not 1 <= int(nfe) <= MAX_NFE:
            raise ValueError(f"num_inference_steps is {nfe!r}; it must be a whole number from 1 to {MAX_NFE}")
        nfe = int(nfe)
        if not self.tables and not self.strict:
            return self.classical(uniform_nodes(nfe, self.path)), None
        spec, message = self.tables.get(nfe), None
        if spec is None:
            known = ", ".join(str(n) for n in sorted(self.tables)) or "none"
            reason = f"no table for {nfe} steps (there are tables for: {known})"
            if self.strict:
                raise ValueError(f"{reason}; use one of them or strict=False")
            message = f"{reason}: using a solver derived from them"
            spec = from_neighbours(self.tables, nfe, self.path)
        if self.searched_shift is not None and isinstance(self.path, FlowPath):
            spec = reshifted(spec, self.searched_shift, self.shift, self.path)
        return spec, message

    def _for_sigmas(self, sigmas: Sequence[float]) -> Choice:
        if is_default(sigmas, self.path.num_train_timesteps):
            return self._for_count(len(sigmas))
        if sigmas[0] < sigmas[-1]:
            raise ValueError(
                f"sigmas rise from {sigmas[0]} to {sigmas[-1]}: a ramp of EDM noise levels (Cosmos 2), which are "
                "neither flow nor vp; keep the pipeline's own scheduler"
            )
        return self.classical(_ended("sigmas", sigmas)), self._told(len(sigmas))

    def _for_timesteps(self, timesteps: Sequence[float]) -> Choice:
        nodes = self.path.node(torch.tensor(timesteps, dtype=torch.float64)).tolist()
        if isinstance(self.path, FlowPath) and is_default(nodes, self.path.num_train_timesteps):
            return self._for_count(len(nodes))
        if len(timesteps) in self.tables:
            own, message = self._for_count(len(timesteps))
            tolerance = TOLERANCE * self.path.num_train_timesteps
            if all(abs(a - b) <= tolerance for a, b in zip(timesteps, self.times(own), strict=True)):
                return own, message
        return classical(_ended("timesteps", nodes), self.path), self._told(len(timesteps))

    def _for_both(self, timesteps: Sequence[float], sigmas: Sequence[float]) -> Choice:
        """CogView4 and GLM-Image: sigmas are shifted, the times that the network is fed are not."""
        if len(timesteps) != len(sigmas):
            raise ValueError(
                f"timesteps has {len(timesteps)} entries, sigmas {len(sigmas)}; given together they must be as many"
            )
        spec, message = self._for_sigmas(sigmas)
        if is_default(sigmas, self.path.num_train_timesteps):
            unshifted = warp(torch.tensor(spec.nodes[:-1], dtype=torch.float64), 1 / self.shift.factor)
            timesteps = self.path.timestep(unshifted).tolist()
        return SolverSpec(spec.nodes, spec.coefficients, tuple(timesteps)), message

    def _told(self, nfe: int) -> str | None:
        if not self.tables:
            return None
        return (
            f"the {nfe} noise levels given are no default of a pipeline: using classical rows on them; for a searched "
            "solver pass num_inference_steps only"
        )


def _ended(name: str, nodes: Sequence[float]) -> tuple[float, ...]:
    if nodes[-1] == 0:
        raise ValueError(f"{name} ends at clean data, where no network call is made; leave that last entry out")
    return (*nodes, 0.0)
