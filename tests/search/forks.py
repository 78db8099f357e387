"""Commands in forked processes, which start with everything imported. Each may be told when it dies by a real signal.
They have one thread each: those of the process that is forked do not live on, and a call that waits for them hangs.

Moments: "step" of the solver, "interrupt" (SIGINT in a step), "before rename", "after rename", "half written" (a file,
at its flush to the disk), "torn line" (of the journal). The steps of the preflight, which writes nothing, do not count.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tqdm.auto import tqdm

from dssolver_search.cli import main
from dssolver_search.methods import search as run_module
from dssolver_search.methods.journal import Journal
from dssolver_search.pipeline.probe import ProbeScheduler

NEVER = (None, 0)
tqdm.monitor_interval = 0  # no thread of this process may hold a lock when it is forked


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind, number, counts):
    """End this process when something is done for the number-th time; count what is done."""
    trying = []

    def reached(what):
        if trying:
            return False
        counts[what] = counts.get(what, 0) + 1
        return kind == what and counts[what] == number

    plain_preflight, step, add = run_module.preflight, ProbeScheduler.step, Journal.add
    replace, fsync = os.replace, os.fsync

    def preflight(*args, **kwargs):
        trying.append(0)
        found = plain_preflight(*args, **kwargs)
        trying.clear()
        return found

    def dying_step(self, *args, **kwargs):
        if reached("step"):
            die()
        if reached("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    def dying_replace(source, target):
        if reached("before rename"):
            die()
        replace(source, target)
        if reached("after rename"):
            die()

    def dying_fsync(handle):
        if not os.path.isdir(f"/proc/self/fd/{handle}") and reached("half written"):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            die()
        fsync(handle)

    def dying_add(self, task, result):
        if reached("torn line"):
            with self.file.open("a") as file:
                file.write('{"key": "torn')
            die()
        add(self, task, result)

    run_module.preflight, ProbeScheduler.step, Journal.add = preflight, dying_step, dying_add
    os.replace, os.fsync = dying_replace, dying_fsync


def child(argv, end, environment, log):
    """One command, or a function that is called; never returns."""
    status, counts = 1, {}
    try:
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        os.environ.update({"ACCELERATE_USE_CPU": "true", **environment})
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        arm(*end, counts)
        log.with_suffix(".pid").write_text(str(os.getpid()))
        argv() if callable(argv) else main(argv)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        log.with_suffix(".counts").write_text(json.dumps(counts))
        sys.stdout.flush()
        os._exit(status)


class Forks:
    """Runs commands; their logs, process ids and counts lie in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0

    def run(self, *jobs):
        """Commands at the same time, each (arguments, (moment, number), environment): exit codes, what they print."""
        pids, logs = [], []
        for argv, end, environment in jobs:
            self.count += 1
            logs.append(self.folder / f"{self.count}.log")
            pid = os.fork()
            if pid == 0:
                child(argv, end, environment, logs[-1])
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        return codes, [log.read_text() for log in logs]

    def group(self, processes, argv, end=NEVER):
        """One command in so many processes; `end` is the main one's alone."""
        several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{**several, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(processes)]
        return self.run(*[(argv, NEVER if k else end, rank) for k, rank in enumerate(ranks)])

    def counts(self):
        """What the last command did, by moment."""
        return json.loads((self.folder / f"{self.count}.counts").read_text())

    def pids(self, number):
        """Of the last so many commands."""
        return [int((self.folder / f"{self.count - k}.pid").read_text()) for k in range(number)]


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
