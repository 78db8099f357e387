"""The solver for a run: from a step count, or from noise levels or times that a user or a pipeline gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch

from .carry import Course, carried
from .derive import Shift, classical, from_neighbours, uniform_nodes, warp
from .grids import TOLERANCE, default_name
from .paths import FlowPath, Path
from .solver import MAX_NFE, SolverSpec

Choice = tuple[Course, str | None]


@dataclass(frozen=True)
class SolverSet:
    """The tables of a scheduler and the model that they run on.

    Args:
        path: of the model.
        tables: searched solvers by step count.
        shift: resolution shift of the coming run (flow).
        own: path that the tables belong to; None: the model's.
        searched_shifts: shift contained in the nodes of the tables, by step count, or under None one for all. Without
            one the nodes are final.
        strict: whether a step count without a table is an error.
    """

    path: Path
    tables: Mapping[int, SolverSpec] = field(default_factory=dict)
    shift: Shift = Shift()
    searched_shifts: Mapping[int | None, Shift] = field(default_factory=dict)
    strict: bool = False
    own: Path | None = None

    def choose(
        self,
        nfe: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Choice:
        """What to run for what `set_timesteps` was given, and what the user should be told about it.

        A grid is used as it is, unless it is recognisably what a pipeline passes by default and there are tables.

        Args:
            nfe: N.
            timesteps: N times of the network, noisiest first.
            sigmas: N noise levels, noisiest first: of a flow model sigmas before the resolution shift, of a vp model
                sigma/alpha. With both, the network is fed the times as they are.
                A last entry that is clean data makes no step of the solver, which then has N - 1.

        Raises:
            ValueError: for arguments that contradict each other, grids that do not fall, or with `strict` a step
                count without a table.
        """
        given = timesteps if sigmas is None else sigmas
        for name, grid in (("timesteps", timesteps), ("sigmas", sigmas)):
            if grid is not None and not 1 <= len(grid) <= MAX_NFE:
                raise ValueError(f"{name} has {len(grid)} entries; 1 to {MAX_NFE} expected")
        if given is None:
            return self._for_count(nfe)
        if timesteps is not None and len(timesteps) != len(given):
            raise ValueError(
                f"timesteps has {len(timesteps)} entries, sigmas {len(given)}; given together they must be as many"
            )
        chosen, message = self._for_times(given) if sigmas is None else self._for_sigmas(given, timesteps)
        if nfe is not None and nfe not in (len(given), len(chosen.times)):
            raise ValueError(f"num_inference_steps is {nfe}, but the schedule given has {len(given)} entries")
        return chosen, message

    def classical(self, nodes: Sequence[float]) -> SolverSpec:
        """Classical rows of second order on N+1 nodes before the resolution shift."""
        if isinstance(self.path, FlowPath):
            nodes = self.shift(nodes)
        return classical(nodes, self.path, stretched=bool(self.shift.terminal))

    def carry(self, spec: SolverSpec, searched: Shift | None) -> Course:
        """A solver of the tables' path, searched at a shift, on the model's path at the shift of the run."""
        own, factor = self.own or self.path, 1.0
        if searched is not None and isinstance(own, FlowPath) and isinstance(self.path, FlowPath):
            factor = self.shift.factor / searched.factor
        return carried(spec, own, self.path, factor)

    def _plain(self, spec: SolverSpec) -> Course:
        """A solver of the model's own path."""
        return carried(spec, self.path, self.path)

    def _for_count(self, nfe: int | None) -> Choice:
        if isinstance(nfe, bool) or not isinstance(nfe, Integral) or not 1 <= int(nfe) <= MAX_NFE:
            raise ValueError(f"num_inference_steps is {nfe!r}; it must be a whole number from 1 to {MAX_NFE}")
        nfe = int(nfe)
        if not self.tables and not self.strict:
            return self._plain(self.classical(uniform_nodes(nfe, self.path))), None
        spec, message = self.tables.get(nfe), None
        searched = self.searched_shifts.get(nfe, self.searched_shifts.get(None))
        if spec is None:
            known = ", ".join(str(n) for n in sorted(self.tables)) or "none"
            reason = f"no table for {nfe} steps (there are tables for: {known})"
            if self.strict:
                raise ValueError(f"{reason}; use one of them or strict=False")
            message = f"{reason}: using a solver derived from them"
            tables, searched = self._at_one_shift()
            spec = from_neighbours(tables, nfe, self.own or self.path)
        return self.carry(spec, searched), message

    def _at_one_shift(self) -> tuple[Mapping[int, SolverSpec], Shift | None]:
        """The tables with nodes of one shift, and that shift; without any where they were searched at several."""
        shifts = self.searched_shifts
        if len({*shifts.values()}) <= 1:
            return self.tables, next(iter(shifts.values()), None)
        unshifted = {
            n: replace(spec, nodes=tuple(warp(node, 1 / shifts[n].factor) for node in spec.nodes))
            for n, spec in self.tables.items()
        }
        return unshifted, Shift()

    def _for_sigmas(self, sigmas: Sequence[float], times: Sequence[float] | None) -> Choice:
        """CogView4 and GLM-Image give both: sigmas are shifted, the times that the network is fed are not."""
        if sigmas[0] < sigmas[-1]:
            raise ValueError(
                f"sigmas rise from {sigmas[0]} to {sigmas[-1]}: a ramp of EDM noise levels (Cosmos 2), which are "
                "neither flow nor vp; keep the pipeline's own scheduler"
            )
        nodes = sigmas if isinstance(self.path, FlowPath) else self._nodes_at(sigmas)
        if self._replaceable(nodes):
            chosen, message = self._for_count(len(nodes))
            if times is not None:
                chosen = replace(chosen, times=self.path.timestep(warp(chosen.nodes[:-1], 1 / self.shift.factor)))
            return chosen, message
        spec = self.classical(_ended("sigmas", nodes))
        if times is not None:
            spec = replace(spec, timesteps=tuple(times[: spec.nfe]))
        return self._plain(spec), self._told(len(sigmas))

    def _for_times(self, times: Sequence[float]) -> Choice:
        nodes = self.path.node(torch.tensor(times, dtype=torch.float64)).tolist()
        if self._replaceable(nodes):
            return self._for_count(len(nodes))
        if len(times) in self.tables:
            own, message = self._for_count(len(times))
            tolerance = TOLERANCE * self.path.num_train_timesteps
            if all(abs(a - b) <= tolerance for a, b in zip(times, own.times.tolist(), strict=True)):
                return own, message
        return self._plain(classical(_ended("timesteps", nodes), self.path)), self._told(len(times))

    def _replaceable(self, nodes: Sequence[float]) -> bool:
        """Whether these noise levels are a pipeline's default that tables replace.

        The linear-quadratic grid of 8 steps is also the list of the distilled LTX-2. Hence only a table for just as
        many steps replaces such a grid, never a derived solver.
        """
        if not isinstance(self.path, FlowPath) or not (self.tables or self.strict):
            return False
        name = default_name(nodes, self.path.num_train_timesteps)
        return name is not None and (name != "linear-quadratic" or self.strict or len(nodes) in self.tables)

    def _nodes_at(self, levels: Sequence[float]) -> list[float]:
        """Nodes of noise levels sigma/alpha."""
        highest = self.path.level(torch.tensor(self.path.first_node, dtype=torch.float64)).item()
        if not levels[0] <= 1.01 * highest:
            raise ValueError(f"sigmas[0] is {levels[0]}; sigma/alpha of this model is {highest:.6g} at most")
        return self.path.node_at(torch.tensor(levels, dtype=torch.float64)).tolist()

    def _told(self, nfe: int) -> str | None:
        if not self.tables:
            return None
        return (
            f"the {nfe} noise levels given are no default of a pipeline: using classical rows on them; for a searched "
            "solver pass num_inference_steps only"
        )


def _ended(name: str, nodes: Sequence[float]) -> tuple[float, ...]:
    """Nodes with an end at clean data, which is there already or appended."""
    if nodes[0] == 0:
        raise ValueError(f"{name} has nothing but clean data; give noise levels, noisiest first")
    return (*nodes,) if nodes[-1] == 0 else (*nodes, 0.0)
