"""Memory and time of one FlowDCN call by resolution, DiT's beside it: `python -m tests.bench.flowdcn [--repeats 3]`.

Random weights, a batch of one, float32 on one CPU thread. "sampling" is a forward pass without gradients; "search" is
a forward and a backward pass to the latents (weights frozen), as a gradient through the solver takes, without and with
gradient checkpointing. MB: the most in tensors that are alive at once, weights and what single kernels use inside left
out. Seconds: CPU time of the fastest of the repeats.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from diffusers import DiTTransformer2DModel
from torch.multiprocessing.reductions import StorageWeakRef

from diffusers_dssolver import FlowDCNTransformer2DModel
from tests.runtime.test_contract import Allocations

SIDES = {256: 32, 512: 64}  # of the latents, by pixels
MODELS = {
    "FlowDCN-S/2": lambda side: FlowDCNTransformer2DModel(hidden_size=384, num_groups=6),
    "FlowDCN-B/2": lambda side: FlowDCNTransformer2DModel(),
    "DiT-B/2": lambda side: DiTTransformer2DModel(12, 64, num_layers=12, sample_size=side, out_channels=4),
}
KINDS = {"sampling": (False, False), "search": (True, False), "checkpointed": (True, True)}


class Activations(Allocations):
    """Bytes in tensors made within, views of a model's weights left out."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.weights = [StorageWeakRef(tensor.untyped_storage()) for tensor in model.state_dict().values()]

    def now(self) -> int:
        for storage in self.weights:
            self.made.pop(storage, None)
        return super().now()


def once(model: torch.nn.Module, side: int, gradients: bool) -> float:
    """CPU seconds of one call, and of the way back."""
    start = time.process_time()
    x = torch.zeros(1, 4, side, side, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        out = model(x, timestep=torch.full((1,), 500.0), class_labels=torch.zeros(1, dtype=torch.long)).sample
    if gradients:
        out.sum().backward()
    return time.process_time() - start


def measure(model: torch.nn.Module, side: int, kind: str, repeats: int) -> tuple[float, float]:
    """MB and seconds."""
    gradients, checkpointing = KINDS[kind]
    (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
    seconds = min(once(model, side, gradients) for _ in range(repeats))
    with Activations(model) as allocations:
        once(model, side, gradients)
    return allocations.peak / 1e6, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, load {os.getloadavg()[0]:.1f}; MB and seconds")
    print(f"{'':12} pixels tokens" + "".join(f"{kind:>20}" for kind in KINDS))
    for name, make in MODELS.items():
        found = {}
        for pixels, side in SIDES.items():
            model = make(side).requires_grad_(False)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            found[pixels] = [measure(model, side, kind, repeats) for kind in KINDS]
            told = "".join(f"{megabytes:12.1f} {seconds:7.3f}" for megabytes, seconds in found[pixels])
            print(f"{name:12} {pixels:6} {(side // 2) ** 2:6}{told}", flush=True)
        told = "".join(f"{m[0] / f[0]:12.2f} {m[1] / f[1]:7.2f}" for f, m in zip(*found.values(), strict=True))
        print(f"{'':12} {'4 x tokens':>13}{told}")


if __name__ == "__main__":
    main()
