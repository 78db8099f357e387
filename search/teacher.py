"""Reference trajectories: many steps of a high-order classical solver with the run's own guidance, made once, kept on
disk, and read off at any node. One reference serves every NFE and every method.
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

from .probe import ProbeScheduler, run
from .sampling import Sampler
from .state import Damaged, read_tensors, say, write_tensors

Sample = tuple[Tensor, Tensor, float]  # angles (L+1,), states (L+1, ...), network evaluations


@dataclass(frozen=True)
class Reference:
    """States of a batch at L+1 nodes.

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
) -> Reference:
    """Reference trajectories of these samples, in the precision of the run but at least float32.

    Args:
        steps, order: of the classical solver (Adams-Bashforth or DPM-Solver++) on uniform nodes; order 1 is the
            paper's Euler or DDIM.
        batch_size: samples per pipeline call.
        cache: a folder with one file per sample, under a name made of everything that its trajectory depends on; what
            lies there is read, what is missing or damaged is made and put there. A batch lacking any sample is run
            whole, so that a resumed run computes what the killed one would have.
    """
    key = {**sampler.fingerprint(indices), **_setting(sampler, split, steps, order)} if cache else {}
    nodes = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    angles, states, evaluations = torch.empty(0), [], 0.0
    for batch in tqdm(batches, desc=f"reference, {split}", unit="batch", disable=not progress):
        files = [_file(cache, key, index) for index in batch]
        stored = [_stored(file) for file in files]
        if not all(stored):
            before = sampler.network_evaluations
            probe.prepare(nodes, order=order)
            made = run(sampler, probe, batch, split, steps)
            dtype = torch.promote_types(made[0].dtype, torch.float32)
            whole = torch.stack([s[: len(batch)].to("cpu", dtype) for s in made])
            cost = (sampler.network_evaluations - before) / len(batch)
            angles = probe.angle(probe.nodes)
            for k, file in enumerate(files):
                if not stored[k]:
                    stored[k] = (angles, whole[:, k], cost)
                    _store(file, angles, whole[:, k], cost)
        found = [sample for sample in stored if sample]
        angles = found[0][0]
        states.append(torch.stack([trajectory for _, trajectory, _ in found], dim=1))
        evaluations += sum(cost for _, _, cost in found)
    return Reference(angles, torch.cat(states, dim=1), round(evaluations))


def _setting(sampler: Sampler, split: str, steps: int, order: int) -> dict[str, Any]:
    """What a trajectory depends on beside the sampler's own fingerprint."""
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"split": split, "steps": steps, "order": order, "dtype": str(sampler.pipe.dtype), "versions": versions}


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
