"""Reference trajectories: many steps of a high-order classical solver with the run's own guidance, made once, kept on
disk, and read off at any node. One reference serves every NFE and every method. How far it is from converged is
estimated by twice the steps on samples of its own.

A reference may end early: from a time `end` on, in one step of first order, at the data that the network predicts
there, which is the better end where the network is weak at little noise. Schedules with a `shift_terminal` (LTX-Video,
Qwen-Image) end so by themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.choose import SolverSet
from diffusers_dssolver.derive import first_order_end
from diffusers_dssolver.solver import MAX_NFE, SolverSpec

from ..console import say, told_end
from ..pipeline.probe import ProbeScheduler, run
from ..pipeline.sampler import Sampler
from ..pipeline.stock import record, takes, teacher_scheduler
from ..storage import Damaged, read_tensors, write_tensors

Sample = tuple[Tensor, Tensor, float]  # angles (L+1,), states (L+1, ...), network evaluations; see `Reference`
EULER = "euler"
FIRST_STEPS = 25  # that are tried where they are to be chosen
INSIDE = 4  # states on the line to the data of a reference that ends early
CONVERGENCE_SAMPLES = 4


@dataclass(frozen=True)
class Teacher:
    """What makes references.

    Attributes:
        steps: L; 0: to be chosen by `convergence`.
        order: of our own multistep.
        scheduler: of diffusers, in its place.
        end: where the last of the steps begins; 0: where an even grid puts it.
    """

    steps: int
    order: int = 3
    scheduler: Any = None
    end: float = 0.0

    @classmethod
    def named(
        cls, name: str, steps: int, order: int, sampler: Sampler, probe: ProbeScheduler, end: float = 0.0
    ) -> Teacher:
        """Ours of this order (""), of order 1 ("euler") or a scheduler of diffusers by class name.

        Raises:
            ValueError: one line, for a scheduler that cannot serve, or not with so many steps, or an end for a model
                whose schedule has one.
        """
        if name in ("", EULER):
            check_end("teacher_end", end, probe.config)
            return cls(steps, 1 if name == EULER else order, end=end)
        config = sampler.pipe.scheduler.config
        found = cls(steps, 1, teacher_scheduler(name, config, probe.path, probe.config.prediction_type))
        if steps and not found.takes(steps, probe):
            raise ValueError(
                f"teacher_steps is {steps}; {name} cannot take so many; give 100, 200 or another scheduler"
            )
        return found

    def takes(self, steps: int, probe: ProbeScheduler) -> bool:
        """Whether it can take so many steps."""
        return steps <= MAX_NFE and (self.scheduler is None or takes(self.scheduler, probe.path, steps))

    def facts(self) -> dict[str, Any]:
        """Plain data, for the record."""
        kind = {"scheduler": type(self.scheduler).__name__} if self.scheduler else {"order": self.order}
        return {"steps": self.steps, **kind, **({"end": self.end} if self.end else {})}

    def __str__(self) -> str:
        how = f"{type(self.scheduler).__name__}" if self.scheduler else f"order {self.order}"
        return f"{self.steps} steps of {how}{told_end(self.end)}"


@dataclass(frozen=True)
class Convergence:
    """How far a teacher is from converged.

    Attributes:
        steps: the teacher's, given or chosen.
        estimated_mse: mean squared difference of its final states and those of `against` steps.
        relative: that, over the variance of the final states.
        against: twice the steps; half, where the solver cannot take twice as many.
        samples: it was estimated on.
    """

    steps: int
    estimated_mse: float
    relative: float
    against: int
    samples: int = CONVERGENCE_SAMPLES

    def line(self, teacher: Teacher, tolerance: float) -> str:
        """For the user."""
        measured = f"against {self.against} steps, {self.samples} samples"
        missed = f"; {self.relative:.1g} of the variance misses teacher_tolerance {tolerance:g}"
        told = missed if self.relative > tolerance else ""
        return f"teacher: {teacher}; estimated mse {self.estimated_mse:.1g} ({measured}){told}"


@dataclass(frozen=True)
class Reference:
    """States of a batch at L+1 nodes; at `INSIDE` more where an end was asked for.

    Attributes:
        angles: (L+1,) float64, falling; `paths.Path.angle` of the nodes, the coordinate of interpolation.
        states: (L+1, B, ...) in the order of the angles.
        network_evaluations: what these samples took, whether made now or found in a cache.
    """

    angles: Tensor
    states: Tensor
    network_evaluations: int = 0

    @property
    def final(self) -> Tensor:
        return self.states[-1]

    def at(self, angle: Tensor) -> Tensor:
        """The states at one angle (0-dim): the cubic through the four nearest nodes."""
        count = len(self.angles)
        right = int(torch.searchsorted(-self.angles, -angle.detach()))
        first = min(max(right - 2, 0), max(count - 4, 0))
        points = self.angles[first : first + 4]
        weights = [
            torch.prod(torch.stack([(angle - q) / (p - q) for k, q in enumerate(points) if k != j]))
            for j, p in enumerate(points)
        ]
        return torch.einsum("p,p...->...", torch.stack(weights).to(self.states.dtype), self.states[first : first + 4])

    def nearest(self, node: Tensor) -> Tensor:
        """The states at the nearest of the L+1 times (Alg. 1 of the paper), which are uniform before any shift, as
        `node` (0-dim) is."""
        return self.states[round((1 - float(node.detach())) * (len(self.states) - 1))]


def check_end(name: str, end: float, model_config: Mapping[str, Any]) -> None:
    """Raise ValueError if an end is given for a model whose schedule has one."""
    if end and (terminal := model_config.get("shift_terminal")):
        raise ValueError(
            f"{name} is {end:g}, but this model's schedule ends at its shift_terminal, {terminal:g}; leave {name} out"
        )


def raw_nodes(steps: int, end: float = 0.0) -> Tensor:
    """(steps + 1,) float64, even from 1 to 0, or to `end` and then 0; before any shift."""
    if not end:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    even = torch.linspace(1, end, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)
    return torch.cat([even, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class EndedSteps(SolverSet):
    """Classical steps whose last one begins at `end`."""

    end: float = 0.0

    def classical(self, nodes: Sequence[float]) -> SolverSpec:
        moved = nodes[0] * raw_nodes(len(nodes) - 1, self.end)
        return first_order_end(super().classical(moved.tolist()))


class EndedScheduler(DSSolverScheduler):
    """Classical steps as a reference takes them that ends early; for runs that stand for the model itself. Made by
    `model_itself`."""

    def _solver_set(self) -> SolverSet:
        return EndedSteps(**vars(super()._solver_set()), end=self.config.reference_end)


def model_itself(model_config: Mapping[str, Any], end: float = 0.0) -> DSSolverScheduler:
    """Classical steps for this model, the last one from `end`; with many of them what the model itself gives.

    Raises:
        ValueError: an end for a model whose schedule has one.
    """
    if not end:
        return DSSolverScheduler.from_config(model_config, solvers="classical")
    check_end("reference_end", end, model_config)
    made = EndedScheduler.from_config(model_config, solvers="classical")
    made.register_to_config(reference_end=end)
    return made


def reference(
    sampler: Sampler,
    probe: ProbeScheduler,
    indices: Sequence[int],
    split: str,
    steps: int,
    order: int,
    batch_size: int,
    cache: Path | None = None,
    progress: bool = True,
    scheduler: Any = None,
    end: float = 0.0,
) -> Reference:
    """Reference trajectories of these samples, in the precision of the run but at least float32.

    Args:
        steps, order, end: of the classical solver (Adams-Bashforth or DPM-Solver++), see `Teacher`; order 1 is the
            paper's Euler or DDIM.
        scheduler: of diffusers (`stock.teacher_scheduler`), in that solver's place; on its own nodes.
        batch_size: samples per pipeline call.
        cache: a folder with one file per sample, under a name made of everything that its trajectory depends on; what
            lies there is read, what is missing or damaged is made and put there. A batch lacking any sample is run
            whole, so that a resumed run computes what the killed one would have.
    """
    teacher = Teacher(steps, order, scheduler, end)
    key = {**sampler.fingerprint(indices), **_setting(sampler, probe, split, teacher)} if cache else {}
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    angles, states, evaluations = torch.empty(0), [], 0.0
    for batch in tqdm(batches, desc=f"reference, {split}", unit="batch", disable=not progress):
        files = [_file(cache, key, index) for index in batch]
        stored = [_stored(file) for file in files]
        if not all(stored):
            before = sampler.network_evaluations
            made, angles = _made(sampler, probe, teacher, batch, split)
            dtype = torch.promote_types(made[0].dtype, torch.float32)
            whole = torch.stack([s[: len(batch)].to("cpu", dtype) for s in made])
            cost = (sampler.network_evaluations - before) / len(batch)
            for k, file in enumerate(files):
                if not stored[k]:
                    stored[k] = (angles, whole[:, k], cost)
                    _store(file, angles, whole[:, k], cost)
        found = [sample for sample in stored if sample]
        angles = found[0][0]
        states.append(torch.stack([trajectory for _, trajectory, _ in found], dim=1))
        evaluations += sum(cost for _, _, cost in found)
    return Reference(angles, torch.cat(states, dim=1), round(evaluations))


def convergence(
    sampler: Sampler, probe: ProbeScheduler, teacher: Teacher, tolerance: float, above: int, batch_size: int
) -> Convergence:
    """How far the teacher is from converged, and with steps = 0 how many it shall take: 25, 50, 100, .. until twice as
    many change the final states by a mean square of at most `tolerance` times their variance. If none does, or the
    solver cannot take twice as many, it is the most that were tried, and the estimate is the change from half of them.

    Args:
        above: a chosen step count is larger than this one.
        batch_size: samples per pipeline call.

    Raises:
        ValueError: if the final states are not finite, or no step count can be chosen.
    """
    finals: dict[int, Tensor] = {}

    def final(steps: int) -> Tensor:
        if steps not in finals:
            trying, parts = replace(teacher, steps=steps), []
            for first in range(0, CONVERGENCE_SAMPLES, batch_size):
                batch = range(first, min(first + batch_size, CONVERGENCE_SAMPLES))
                parts.append(_made(sampler, probe, trying, batch, "convergence")[0][-1][: len(batch)].double().cpu())
            finals[steps] = torch.cat(parts)
        return finals[steps]

    def compared(steps: int, against: int) -> Convergence:
        mse = float((final(steps) - final(against)).square().mean())
        return Convergence(steps, mse, mse / float(final(max(steps, against)).var()), against)

    steps, chosen = teacher.steps or FIRST_STEPS, teacher.steps == 0
    while chosen and steps <= above:
        steps *= 2
    if not teacher.takes(steps, probe):
        raise ValueError(f"teacher_steps = 0 finds none above {above} calls; give teacher_steps")
    while True:
        finer = teacher.takes(2 * steps, probe)
        found = compared(steps, 2 * steps if finer else max(steps // 2, 1))
        if not (chosen and finer) or found.relative <= tolerance:
            break
        steps *= 2
    if not math.isfinite(found.relative):
        raise ValueError(f"the final states of {steps} teacher steps are not finite; give more teacher_steps")
    return found


def _made(
    sampler: Sampler, probe: ProbeScheduler, teacher: Teacher, batch: Sequence[int], split: str
) -> tuple[list[Tensor], Tensor]:
    """One pipeline call: the states at all nodes, with the rows that guidance doubles, and their angles."""
    if teacher.scheduler is not None:
        return record(sampler, teacher.scheduler, probe.path, batch, split, teacher.steps)
    raw = raw_nodes(teacher.steps, teacher.end)
    probe.prepare(raw, order=teacher.order, exact=True, ended=bool(_ended(teacher, probe)))
    states, nodes = run(sampler, probe, batch, split, teacher.steps), probe.nodes
    if not teacher.end:  # no solver has nodes after a terminal shift
        return states, probe.angle(nodes)
    inside = nodes[-2] * torch.linspace(1, 0, INSIDE + 2, dtype=nodes.dtype)[1:-1]
    angles = probe.angle(torch.cat([nodes[:-1], inside, nodes[-1:]]))
    return [*states[:-1], *_on_the_line(probe, nodes[-2], inside, *states[-2:]), states[-1]], angles


def _ended(teacher: Teacher, probe: ProbeScheduler) -> float:
    """Where the last step begins that is of first order; 0: it is like the others."""
    return teacher.end or probe.config.shift_terminal or 0.0


def _on_the_line(probe: ProbeScheduler, node: Tensor, inside: Tensor, state: Tensor, data: Tensor) -> list[Tensor]:
    """The states at nodes inside the step of first order that leads from `state` at `node` to `data`: that data with
    the noise of that state."""
    alpha, sigma = (float(factor) for factor in probe.path.alpha_sigma(node))
    noise = (state - alpha * data) / sigma
    return [float(a) * data + float(s) * noise for a, s in zip(*probe.path.alpha_sigma(inside), strict=True)]


def _setting(sampler: Sampler, probe: ProbeScheduler, split: str, teacher: Teacher) -> dict[str, Any]:
    """What a trajectory depends on beside the sampler's own fingerprint."""
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    dtype = str(sampler.pipe.dtype)
    setting = {"split": split, "steps": teacher.steps, "order": teacher.order, "dtype": dtype, "versions": versions}
    if teacher.scheduler is not None:
        config = {k: v for k, v in teacher.scheduler.config.items() if not k.startswith("_")}
        name = type(teacher.scheduler).__name__
        return setting | {"scheduler": name, "config": json.dumps(config, sort_keys=True, default=str)}
    return setting | ({"end": ended} if (ended := _ended(teacher, probe)) else {})


def _file(cache: Path | None, key: dict[str, Any], index: int) -> Path | None:
    if cache is None:
        return None
    name = hashlib.sha256(json.dumps({**key, "index": index}, sort_keys=True).encode()).hexdigest()[:32]
    return cache / f"reference-{name}.safetensors"


def _stored(file: Path | None) -> Sample | None:
    if file is None or not file.exists():
        return None
    try:
        tensors, metadata = read_tensors(file)
        return tensors["angles"], tensors["states"], float(metadata["network_evaluations"])
    except Damaged as error:
        say(f"{file} is damaged and left out: {error}; its reference is made anew")
        return None


def _store(file: Path | None, angles: Tensor, states: Tensor, cost: float) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {"angles": angles, "states": states}, {"network_evaluations": repr(cost)})
