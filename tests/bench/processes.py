"""Throughput of 2 processes over 1, one CPU thread each: `python -m tests.bench.processes [--repeats 5]`.

The embedded flow model; references, and the search of one NFE with trials and polish. Starting Python and loading are
left out. Runs with 1 and with 2 processes alternate and medians are printed. "clock" is what a user sees and means
something on an idle machine only; "CPU" compares the processor time of the single process with that of the busier of
the two: what the division of work allows, however busy the machine is, waiting for each other left out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

MODEL = Path(__file__).resolve().parents[2] / "search" / "demo" / "flow"
SETTINGS = {
    "guidance_scale": 1.5, "num_train_samples": 64, "num_trial_samples": 32, "num_validation_samples": 32,
    "teacher_steps": 10, "trials": 4, "polish": 1,
}  # fmt: skip
PARTS, CLOCKS = ("teacher", "search"), ("clock", "CPU")


def worker(output: str) -> None:
    """One run in this process, one of several perhaps; the main one prints the seconds of each part, and of the CPU."""
    import torch

    from dssolver_search.methods import search as run_module
    from dssolver_search.methods import setup as search_setup
    from dssolver_search.processes import launched
    from dssolver_search.settings import SearchConfig

    spent = {part: [0.0, 0.0] for part in PARTS}
    with launched(str) as accelerator:

        def timed(part, function):
            def run(*args, **kwargs):
                accelerator.wait_for_everyone()
                before = time.perf_counter(), time.process_time()
                found = function(*args, **kwargs)
                cpu = accelerator.gather(torch.tensor([time.process_time() - before[1]]))
                spent[part][0] += time.perf_counter() - before[0]
                spent[part][1] += float(cpu.max())
                return found

            return run

        search_setup.teacher_trajectory = timed("teacher", search_setup.teacher_trajectory)
        run_module.METHODS["closed_form"] = timed("search", run_module.METHODS["closed_form"])
        model = {"pretrained_model_name_or_path": str(MODEL), "output_dir": output}
        run_module.run(SearchConfig(**model, nfe=[3], fill_nfe=[], effort="full", **SETTINGS), accelerator)
        if accelerator.is_main_process:
            print(json.dumps({"processes": accelerator.num_processes, "seconds": spent}))


def measure(processes: int) -> dict[str, list[float]]:
    """Seconds of each part by the clock and of the CPU."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as output:
        free.bind(("", 0))
        several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        environment = {**os.environ, **several, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.bench.processes", "--worker", output]
        running = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(processes)
        ]  # fmt: skip
        printed = [process.communicate()[0] for process in running]
    record = json.loads(printed[0].splitlines()[-1])
    if record["processes"] != processes:
        raise RuntimeError(f"{record['processes']} processes ran, {processes} were asked for")
    return record["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seconds with 1 and 2 processes of one thread each")
    pairs = []
    for _ in range(given.repeats):
        pairs.append((measure(1), measure(2)))
        shown = {p: [f"{a / b:.2f}" for a, b in zip(pairs[-1][0][p], pairs[-1][1][p], strict=True)] for p in PARTS}
        print(f"  1 over 2, {' and '.join(CLOCKS)}: {shown}; load {os.getloadavg()[0]:.1f}", flush=True)
    for part in PARTS:
        for k, clock in enumerate(CLOCKS):
            one, two = ([run[part][k] for run in runs] for runs in zip(*pairs, strict=True))
            ratios = sorted(a / b for a, b in zip(one, two, strict=True))
            print(
                f"{part:8} {clock:5} {median(one):6.2f} {median(two):6.2f}   throughput of 2 over 1: "
                f"{median(one) / median(two):.2f} (pairs {', '.join(f'{r:.2f}' for r in ratios)})"
            )
    print(f"load afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
