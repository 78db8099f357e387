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
from ..teacher.convergence import CONVERGENCE_SAMPLES, Convergence, convergence
from .budget import fit_cost, search_cost
from .check import Entry, classical
from .closed_form import closed_form
from .fill import entry_of, fill, judged
from .gradient import gradient
from .log import Log
from .paper import paper
from .perceptual import MOST_CALLS
from .preflight import preflight
from .problem import Candidate, Problem
from .record import Record, how_to_go_on
from .setup import Setup

Method = Callable[[Problem, int, SearchConfig, Log], Candidate | dict[str, Any]]
METHODS: dict[str, Method] = {"closed_form": closed_form, "gradient": gradient, "paper": paper}
SEARCHED, FILLED = "searched", "filled"  # kinds of entries


def search(settings: SearchConfig) -> Record:
    """The command: the pipeline that the settings name is loaded and searched.

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
    """The search of a pipeline that is loaded for it, in every process alike."""
    record = Record(Setup(settings, accelerator))
    carry_out(record)
    return record


def carry_out(record: Record) -> None:
    """The search, in every process alike; what it found stands in the record and its folder."""
    setup, log = record.setup, record.log
    missing = sorted(set(setup.settings.nfe) - set(record.entries(SEARCHED)))
    if missing:
        _try_out(setup, record)
    elif setup.budget.text:
        setup.shrink(1, record.state.get("shrunk", {}))
    setup.fitting(lambda: _settle_teacher(setup, record), CONVERGENCE_SAMPLES)
    problem, settings = setup.problem(), setup.settings
    problem.known = record.state["solvers"]
    method = METHODS[settings.method]
    if problem.perceptual and missing:
        for samples in (problem.train, problem.validation):
            batches = -(-len(samples) // setup.batch_size)
            with log.progress(f"teacher's images, {samples.split}", "batch", batches) as advance:
                problem.perceptual.remember(problem, samples, advance)
    costs = [search_cost(settings, nfe, record.state.get("per_call", 1)) for nfe in missing]
    for place, nfe in enumerate(missing):
        setup.reserved = 0.0
        if place and not setup.affords(costs[place]):
            setup.left_out.append(f"{', '.join(map(str, missing[place:]))} calls")
            break
        setup.reserved = sum(costs[place + 1 :])  # what is optional must leave enough for the next step counts
        _find(problem, record, nfe, SEARCHED, lambda n: method(problem, n, settings, log))
    setup.reserved = 0.0
    if settings.method != "paper" and settings.fill_nfe:
        _fill(problem, record)
    if not record.is_whole():  # somebody took or spoiled it
        record.write()
    log.journal.clear()  # of what was killed between the state and this
    if setup.left_out:
        setup.warn(setup.told_budget())


def _fill(problem: Problem, record: Record) -> None:
    """Find solvers for the step counts that were not searched."""
    setup, settings = record.setup, record.setup.settings
    first, last = settings.fill_nfe
    others = [n for n in range(first, last + 1) if str(n) not in record.state["solvers"]]
    searched = record.entries(SEARCHED)
    for place, nfe in enumerate(tqdm(others, desc="filling other step counts", disable=not setup.shows)):
        if not setup.affords(fit_cost(settings, nfe, record.state.get("per_call", 1))):
            setup.left_out.append(f"tables for {len(others) - place} other step counts")
            break
        _find(problem, record, nfe, FILLED, lambda n: fill(problem, n, settings, searched, record.log))


def _try_out(setup: Setup, record: Record) -> None:
    """Run the pipeline on a few samples before anything is spent on it; not counted. Then the settings shrink to the
    budget."""
    gradients = setup.settings.method != "closed_form"
    found = setup.fitting(lambda: preflight(setup.student, samples=min(2, setup.batch_size), gradients=gradients), 2)
    setup.say(str(found))
    setup.note(found)
    if setup.perceptual:
        setup.say(setup.perceptual.check())
    if setup.budget.text:
        record.state["per_call"] = found.evaluations_per_sample
        setup.budget.speed = found.evaluations_per_second * setup.accelerator.num_processes
        record.state["shrunk"] = setup.shrink(found.evaluations_per_sample, record.state.get("shrunk"))


def _settle_teacher(setup: Setup, record: Record) -> None:
    """Estimate how far the teacher is from converged, and choose its steps if that is asked for; once in a search.
    Every process runs the same samples, which count once, and takes what the main one finds."""
    settings, sampler, most = setup.settings, setup.sampler, max(setup.settings.nfe)
    if "teacher" not in record.state:
        before = sampler.network_evaluations
        found = convergence(setup.student, setup.teacher, settings.teacher_tolerance, most, setup.batch_size)
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
    before, began = record.log.evaluations(), time.time()

    def work() -> Entry:
        record.log.begin()
        problem.run_together(record.setup.batch_size)
        found = make(nfe)
        if isinstance(found, Candidate):
            seen = problem.perceptual and kind == SEARCHED and nfe <= MOST_CALLS  # judged by its images, not its states
            entry = entry_of(found) if seen else judged(problem, found, record.setup.settings)
        else:
            entry = found
        if "classical_mse" not in entry:
            entry["classical_mse"] = classical(problem, nfe)[0]["validation_mse"]
        return entry

    entry = record.setup.fitting(work)
    record.keep(nfe, entry, kind, time.time() - began, before)
