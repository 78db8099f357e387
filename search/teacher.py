"""Reference trajectories: many steps of a high-order classical solver with the run's own guidance, made once, kept on
disk, and read off at any node. One reference serves every NFE and every method.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .probe import ProbeScheduler, run
from .sampling import Sampler


@dataclass(frozen=True)
class Reference:
    """States of a batch at L+1 nodes.

    Attributes:
        angles: (L+1,) float64, falling; `paths.Path.angle` of the nodes, the coordinate of interpolation.
        states: (L+1, B, ...) in the order of the angles.
    """

    angles: Tensor
    states: Tensor

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
    """Reference trajectories of these samples, from `cache` (a folder) if the very same ones lie there.

    Args:
        steps, order: of the classical solver (Adams-Bashforth or DPM-Solver++) on uniform nodes; order 1 is the
            paper's Euler or DDIM.
        batch_size: samples per pipeline call.
    """
    key = {**sampler.fingerprint(), "split": split, "indices": list(indices), "steps": steps, "order": order}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache / f"reference-{name}.safetensors" if cache else None
    if file and file.is_file():
        stored = load_file(file)
        return Reference(stored["angles"], stored["states"])
    nodes = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    parts = []
    for batch in tqdm(batches, desc=f"reference, {split}", unit="batch", disable=not progress):
        probe.prepare(nodes, order=order)
        states = run(sampler, probe, batch, split, steps)
        parts.append(torch.stack([s[: len(batch)].float().cpu() for s in states]))
    found = Reference(probe.angle(probe.nodes), torch.cat(parts, dim=1))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({"angles": found.angles, "states": found.states.contiguous()}, partial)
        os.replace(partial, file)
    return found
