"""The `search` command: the teacher, a solver for each step count that is asked for, then the other step counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..processes import from_main, launched
from ..settings import SearchConfig
from ..teacher.convergence import Convergence, convergence
from .check import classical
from .closed_form import closed_form
from .fill import fill, judged
from .gradient import gradient
from .log import Log
from .paper import paper
from .preflight import preflight
from .problem import Candidate, Problem
from .record import Record, how_to_go_on
from .setup import Setup

Method = Callable[[Problem, int, SearchConfig, Log], Candidate | dict[str, Any]]
METHODS: dict[str, Method] = {"closed_form": closed_form, "gradient": gradient, "paper": paper}
SEARCHED, FILLED = "searched", "filled"  # kinds of entries


def search(settings: SearchConfig) -> Record:
    """The command.

    Raises:
        ValueError: a setting, the model or the folder is at fault; one line.
        KeyboardInterrupt: Ctrl-C, with a line that says how to go on.
    """
    with launched(lambda: how_to_go_on(Path(settings.output_dir))) as accelerator:
        record = run(settings, accelerator)
        if accelerator.is_main_process:
            print(record.table())
    return record


def run(settings: SearchConfig, accelerator: Accelerator) -> Record:
    """The search, in every process alike; what it found stands in the record and its folder."""
    setup = Setup(settings, accelerator)
    record = Record(setup)
    missing = sorted(set(settings.nfe) - set(record.entries(SEARCHED)))
    if missing:
        _try_out(setup)
    _settle_teacher(setup, record)
    problem, method = setup.problem(), METHODS[settings.method]
    problem.known = record.state["solvers"]
    if problem.perceptual and missing:
        for samples in (problem.train, problem.validation):
            batches = -(-len(samples) // settings.batch_size)
            with record.log.progress(f"teacher's images, {samples.split}", "batch", batches) as advance:
                problem.perceptual.remember(problem, samples, advance)
    for nfe in missing:
        _find(problem, record, nfe, SEARCHED, lambda n: method(problem, n, settings, record.log))
    if settings.method != "paper" and settings.fill_nfe:
        first, last = settings.fill_nfe
        others = [n for n in range(first, last + 1) if str(n) not in record.state["solvers"]]
        searched = record.entries(SEARCHED)
        for nfe in tqdm(others, desc="filling other step counts", disable=not setup.main):
            _find(problem, record, nfe, FILLED, lambda n: fill(problem, n, settings, searched, record.log))
    if not record.is_whole():  # somebody took or spoiled it
        record.write()
    record.log.journal.clear()  # of what was killed between the state and this
    return record


def _try_out(setup: Setup) -> None:
    """Run the pipeline on a few samples before anything is spent on it; not counted."""
    found = preflight(setup.student, gradients=setup.settings.method != "closed_form")
    setup.say(str(found))
    setup.note(found)
    if setup.perceptual:
        setup.say(setup.perceptual.check())


def _settle_teacher(setup: Setup, record: Record) -> None:
    """Estimate how far the teacher is from converged, and choose its steps if that is asked for; once in a search.
    Every process runs the same samples, which count once, and takes what the main one finds."""
    settings, sampler, most = setup.settings, setup.sampler, max(setup.settings.nfe)
    if "teacher" not in record.state:
        before = sampler.network_evaluations
        found = convergence(setup.student, setup.teacher, settings.teacher_tolerance, most, settings.batch_size)
        spent = sampler.network_evaluations - before
        if not setup.main:
            sampler.network_evaluations = before
        record.keep_teacher(from_main(setup.accelerator, {**asdict(found), "network_evaluations": spent}))
    known = Convergence(**{k: v for k, v in record.state["teacher"].items() if k != "network_evaluations"})
    setup.teacher = replace(setup.teacher, steps=known.steps)
    setup.say(known.line(setup.teacher, settings.teacher_tolerance))
    if known.steps <= most:
        raise ValueError(
            f"nfe asks for {most} calls, but the teacher chosen in this folder takes {known.steps} steps; ask for "
            "fewer, or choose another --output_dir"
        )


def _find(
    problem: Problem, record: Record, nfe: int, kind: str, make: Callable[[int], Candidate | dict[str, Any]]
) -> None:
    """Find one solver, compare it with the classical ones, and keep it."""
    record.log.begin()
    before, began = record.log.evaluations(), time.time()
    found = make(nfe)
    entry = judged(problem, found, record.setup.settings) if isinstance(found, Candidate) else found
    if "classical_mse" not in entry:
        entry["classical_mse"] = classical(problem, nfe)[0]["validation_mse"]
    record.keep(nfe, entry, kind, time.time() - began, before)
