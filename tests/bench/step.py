"""`make bench`: time of one scheduler step, ours over diffusers' own, all measured in turns within this run.

The network is left out: what is timed is what a scheduler adds to it. "copies" is that time over the time to copy as
many bytes as the step cannot avoid moving: it reads the sample, the network's output and every earlier quantity that
its row uses, and writes a new quantity, the next state and the predicted data.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import classical, uniform_nodes
from diffusers_dssolver.paths import FlowPath, Path, VPPath, make_betas

SHAPES = {
    "latents 4x4x128x128": (4, 4, 128, 128),
    "latents 1x16x128x128": (1, 16, 128, 128),
    "FLUX tokens 1x4096x64": (1, 4096, 64),
    "video 1x16x21x60x104": (1, 16, 21, 60, 104),
}
STEPS = (5, 10, 20)
REPETITIONS = 15
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def full_table(nfe: int, path: Path) -> dict:
    """A solver whose every row uses the whole history."""
    spec = classical(uniform_nodes(nfe, path), path)
    rows = [[0.9 * c + 0.1 / len(row) for c in row] for row in spec.coefficients]
    return {"nodes": list(spec.nodes), "coefficients": rows}


def schedulers(family: str) -> dict[str, object]:
    """What is timed, by name; full tables of ours first."""
    path = FlowPath() if family == "flow" else VPPath(make_betas(1000, 0.0001, 0.02, "linear", None, False))
    own = {"prediction_type": "flow_prediction" if family == "flow" else "epsilon"}
    options = FLOW if family == "flow" else {}
    found: dict[str, object] = {
        "ours, full table": DSSolverScheduler(**own, solvers={str(n): full_table(n, path) for n in STEPS}),
        "ours, classical order 2": DSSolverScheduler(**own),
        "UniPC": UniPCMultistepScheduler(**options),
        "DPM-Solver++ 2M": DPMSolverMultistepScheduler(**options),
        "DPM-Solver++ 3M": DPMSolverMultistepScheduler(solver_order=3, **options),
        "DEIS": DEISMultistepScheduler(**options),
    }
    if family == "flow":
        found["FlowMatchEuler"] = FlowMatchEulerDiscreteScheduler()
    return found


def seconds_per_step(scheduler, nfe: int, output: torch.Tensor, start: torch.Tensor) -> float:
    """One run through the schedule with a fixed model output."""
    scheduler.set_timesteps(nfe, device=start.device)
    sample = start
    began = clock(start)
    for t in scheduler.timesteps:
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
    return (clock(start) - began) / nfe


def seconds_per_copy(states: float, buffers: list[torch.Tensor]) -> float:
    """Copying so many float32 states (read and written), one after the other through the buffers."""
    began = clock(buffers[0])
    for i in range(round(states)):
        buffers[(2 * i + 1) % len(buffers)].copy_(buffers[2 * i % len(buffers)])
    return (clock(buffers[0]) - began) * states / round(states)


def least_states(nfe: int, row: Callable[[int], int], width: float) -> float:
    """Traffic per step in float32 states, of which a copy makes two; `width` of the model's dtype over float32's."""
    return sum((row(i) - 1) + 1 + 4 * width for i in range(nfe)) / nfe


def clock(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(shape: tuple[int, ...], dtype: torch.dtype, family: str, device: str) -> None:
    """Print one table: schedulers by step count."""
    torch.manual_seed(0)
    output, start = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)
    buffers = [torch.randn(shape, device=device) for _ in range(12)]
    timed = schedulers(family)
    rows = {"ours, full table": lambda i: i + 1, "ours, classical order 2": lambda i: min(i + 1, 2)}
    medians: dict[tuple[str, int], float] = {}
    copies: dict[tuple[str, int], float] = {}
    for nfe in STEPS:
        times: dict[str, list[float]] = {name: [] for name in [*timed, *(f"copy {name}" for name in rows)]}
        for _ in range(REPETITIONS):  # in turns, so that a busy machine slows all alike
            for name, scheduler in timed.items():
                times[name].append(seconds_per_step(scheduler, nfe, output, start))
            for name, row in rows.items():
                states = least_states(nfe, row, dtype.itemsize / 4) / 2
                times[f"copy {name}"].append(seconds_per_copy(states * 4, buffers) / 4)
        for name in timed:
            medians[name, nfe] = statistics.median(times[name])
        for name in rows:
            copies[name, nfe] = medians[name, nfe] / statistics.median(times[f"copy {name}"])
    print(f"| {'':24} |" + "".join(f" {n:>2} steps, ms |  / UniPC |  / 2M | copies |" for n in STEPS))
    print("|---" * (1 + 4 * len(STEPS)) + "|")
    for name in timed:
        cells = ""
        for n in STEPS:
            t = medians[name, n]
            copied = f"{copies[name, n]:6.2f}" if (name, n) in copies else "      "
            cells += f" {t * 1e3:12.3f} | {t / medians['UniPC', n]:8.2f} |"
            cells += f" {t / medians['DPM-Solver++ 2M', n]:5.2f} | {copied} |"
        print(f"| {name:24} |{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), help="beginnings of the names of shapes")
    parser.add_argument("--family", nargs="*", default=["flow", "vp"])
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    threads = "" if arguments.device == "cuda" else f", {torch.get_num_threads()} threads"
    for name, shape in SHAPES.items():
        if any(name.startswith(s) for s in arguments.shape):
            for family in arguments.family:
                for dtype in arguments.dtype:
                    gc.collect()
                    print(f"\n{name}, {family}, {dtype}, {arguments.device}{threads}\n")
                    measure(shape, getattr(torch, dtype), family, arguments.device)


if __name__ == "__main__":
    main()
