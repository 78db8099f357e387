"""Teacher trajectories: many steps of a high-order classical solver with the run's own guidance, made once, kept on
disk and read off at any node. One trajectory serves every NFE and every method.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_dssolver.paths import FlowPath
from diffusers_dssolver.paths import Path as NoisePath
from diffusers_dssolver.solver import MAX_NFE

from ..console import told_end, warn
from ..pipeline.plan import Plan, warped_nodes
from ..pipeline.student import Student
from ..storage import Damaged, read_tensors, write_tensors
from .ends import even_nodes, on_the_line

Sample = tuple[Tensor, Tensor, float]  # angles (L+1,), states (L+1, ...), network evaluations; see `TeacherTrajectory`
INSIDE = 4  # states on the line to the data of a trajectory that ends early
# Step warps by path. At 50 steps of order 3 they leave 1.5e-5 (flow) and 2e-5 (vp) of mse on the embedded models, where
# even steps leave 4e-4 and 1.4e-4.
WARPS = {"flow": (0.5, -1.3, -0.2), "vp": (-0.5, -1.5, -0.2)}


@dataclass(frozen=True)
class Teacher:
    """The solver of teacher trajectories: Adams-Bashforth on flow models, DPM-Solver++ on vp models.

    Attributes:
        steps: L; 0: to be chosen by `convergence`.
        order: of the solver; 1 is the paper's Euler or DDIM.
        end: time at which the last step begins (`ends`); 0: where the grid puts it.
        warped: take small steps where models need them (`WARPS`); False: even ones.
    """

    steps: int
    order: int = 3
    end: float = 0.0
    warped: bool = False

    def takes(self, steps: int) -> bool:
        """Whether it can take so many steps."""
        return steps <= MAX_NFE

    def facts(self) -> dict[str, Any]:
        """Plain data, for the record."""
        grid = {"warped": True} if self.warped else {}
        return {"steps": self.steps, "order": self.order, **({"end": self.end} if self.end else {}), **grid}

    def nodes(self, path: NoisePath) -> Tensor:
        """(steps + 1,) unshifted."""
        if not self.warped:
            return even_nodes(self.steps, self.end)
        warp = WARPS["flow" if isinstance(path, FlowPath) else "vp"]
        if not self.end:
            return warped_nodes(warp, self.steps)
        before = self.end + (1 - self.end) * warped_nodes(warp, max(self.steps - 1, 1))[: self.steps]
        return torch.cat([before, torch.zeros(1, dtype=torch.float64)])

    def __str__(self) -> str:
        return f"{self.steps} steps of order {self.order}{told_end(self.end)}"


@dataclass(frozen=True, eq=False)
class TeacherTrajectory:
    """States of a batch at L+1 nodes; at `INSIDE` more where an end was asked for.

    Attributes:
        angles: (L+1,) float64, falling: `paths.Path.angle` of the nodes, the coordinate of interpolation.
        states: (L+1, B, ...) in the order of the angles.
        network_evaluations: what these samples took, whether made now or found in a cache.
    """

    angles: Tensor
    states: Tensor
    network_evaluations: int = 0

    @property
    def final(self) -> Tensor:
        """The last states (B, ...)."""
        return self.states[-1]

    def part(self, where: slice) -> TeacherTrajectory:
        """That of some of the samples; a view."""
        return TeacherTrajectory(self.angles, self.states[:, where])

    def at(self, angle: Tensor) -> Tensor:
        """The states (B, ...) at one angle (0-dim): the cubic through the four nearest nodes."""
        count = len(self.angles)
        right = int(torch.searchsorted(-self.angles, -angle.detach()))
        first = min(max(right - 2, 0), max(count - 4, 0))
        points = self.angles[first : first + 4]
        weights = [
            torch.prod(torch.stack([(angle - q) / (p - q) for k, q in enumerate(points) if k != j]))
            for j, p in enumerate(points)
        ]
        return torch.einsum("p,p...->...", torch.stack(weights).to(self.states.dtype), self.states[first : first + 4])

    def nearest(self, unshifted_node: Tensor) -> Tensor:
        """The states (B, ...) at the nearest of the L+1 times, which are uniform before any shift (Alg. 1 of the
        paper)."""
        return self.states[round((1 - float(unshifted_node.detach())) * (len(self.states) - 1))]


def teacher_trajectory(
    student: Student,
    teacher: Teacher,
    indices: Sequence[int],
    split: str,
    batch_size: int,
    cache: Path | None = None,
    progress: bool = True,
) -> TeacherTrajectory:
    """The trajectories of these samples, in the precision of the run but at least float32.

    Args:
        batch_size: samples per pipeline call.
        cache: folder with one file per sample, named after everything that its trajectory depends on. What is missing
            or damaged is made and put there. A batch lacking any sample is run whole, so that a resumed run computes
            what the killed one would have.
    """
    key = {**student.sampler.fingerprint(indices), **_setting(student, teacher, split)} if cache else {}
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    angles, states, evaluations = torch.empty(0), [], 0.0
    for batch in tqdm(batches, desc=f"teacher, {split}", unit="batch", disable=not progress):
        files = [_file(cache, key, index) for index in batch]
        stored = [_stored(file) for file in files]
        if not all(stored):
            before = student.sampler.network_evaluations
            made, angles = taught(student, teacher, batch, split)
            dtype = torch.promote_types(made[0].dtype, torch.float32)
            whole = torch.stack([state.to("cpu", dtype) for state in made])
            cost = (student.sampler.network_evaluations - before) / len(batch)
            for k, file in enumerate(files):
                if not stored[k]:
                    stored[k] = (angles, whole[:, k], cost)
                    _store(file, angles, whole[:, k], cost)
        found = [sample for sample in stored if sample]
        angles = found[0][0]
        states.append(torch.stack([trajectory for _, trajectory, _ in found], dim=1))
        evaluations += sum(cost for _, _, cost in found)
    return TeacherTrajectory(angles, torch.cat(states, dim=1), round(evaluations))


def taught(student: Student, teacher: Teacher, batch: Sequence[int], split: str) -> tuple[Sequence[Tensor], Tensor]:
    """One pipeline call: the states (B, ...) of the samples at all nodes, and their angles."""
    nodes = teacher.nodes(student.path)
    ended = bool(_end(student, teacher))
    run = student.run(Plan(nodes, order=teacher.order, first_order_end=ended, float32_states=True), batch, split)
    if not teacher.end:  # no solver has nodes after a terminal shift
        return run.states, student.path.angle(run.nodes)
    node = run.nodes[-2]
    inside = node * torch.linspace(1, 0, INSIDE + 2, dtype=node.dtype)[1:-1]
    angles = student.path.angle(torch.cat([run.nodes[:-1], inside, run.nodes[-1:]]))
    line = on_the_line(student.path, node, inside, run.states[-2], run.final)
    return [*run.states[:-1], *line, run.final], angles


def _end(student: Student, teacher: Teacher) -> float:
    """Time at which a last step of first order begins; 0: the last step is like the others."""
    return teacher.end or student.scheduler.config.shift_terminal or 0.0


def _setting(student: Student, teacher: Teacher, split: str) -> dict[str, Any]:
    """What a trajectory depends on beside the sampler's own fingerprint."""
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    dtype = str(student.sampler.pipe.dtype)
    setting = {"split": split, "steps": teacher.steps, "order": teacher.order, "dtype": dtype, "versions": versions}
    setting |= {"warp": WARPS} if teacher.warped else {}
    return setting | ({"end": end} if (end := _end(student, teacher)) else {})


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
        warn(f"{file} is damaged and left out: {error}; its trajectory is made anew")
        return None


def _store(file: Path | None, angles: Tensor, states: Tensor, cost: float) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {"angles": angles, "states": states}, {"network_evaluations": repr(cost)})
