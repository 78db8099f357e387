"""`make bench`: time of one scheduler step, ours over diffusers' own, both measured in turns within this run.

Prints the median over repetitions of the time for a whole schedule, per step, and the ratio to each stock scheduler.
The network is left out: what is timed is what a scheduler adds to it.
"""

from __future__ import annotations

import statistics
import time

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_dssolver import DSSolverScheduler

SHAPES = {
    "SDXL latents, batch 2": (2, 4, 128, 128),
    "FLUX tokens": (1, 4096, 64),
    "video latents": (1, 16, 21, 60, 104),
}
REPETITIONS = 15


def seconds_per_step(scheduler, nfe: int, output: torch.Tensor, start: torch.Tensor) -> float:
    """One run through the schedule with a fixed model output."""
    scheduler.set_timesteps(nfe)
    sample = start
    began = time.perf_counter()
    for t in scheduler.timesteps:
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
    return (time.perf_counter() - began) / nfe


def main(nfe: int = 10) -> None:
    torch.manual_seed(0)
    schedulers = {
        "ours, dit-xl-2-256 (full table)": DSSolverScheduler.from_published("dit-xl-2-256"),
        "ours, classical 2M": DSSolverScheduler(),
        "DPMSolverMultistep 2M": DPMSolverMultistepScheduler(),
        "UniPC": UniPCMultistepScheduler(),
        "ours, flowdcn-b-2-256 (full table)": DSSolverScheduler.from_published("flowdcn-b-2-256"),
        "FlowMatchEuler": FlowMatchEulerDiscreteScheduler(),
    }
    for name, shape in SHAPES.items():
        output, start = torch.randn(shape), torch.randn(shape)
        times: dict[str, list[float]] = {key: [] for key in schedulers}
        for _ in range(REPETITIONS):  # in turns, so that a busy machine slows all alike
            for key, scheduler in schedulers.items():
                times[key].append(seconds_per_step(scheduler, nfe, output, start))
        medians = {key: statistics.median(values) for key, values in times.items()}
        print(f"\n{name}, {nfe} steps, float32, CPU, {torch.get_num_threads()} threads")
        for key, value in medians.items():
            print(f"  {key:36} {value * 1e3:8.3f} ms/step   {value / medians['UniPC']:5.2f} x UniPC")


if __name__ == "__main__":
    main()
