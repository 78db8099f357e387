"""The method `paper`: Algorithms 1 and 2, gradients through the pipeline's call with fresh samples for every update.

Source: arXiv 2505.21114, Algorithms 1 and 2 and Sec. 5; Chen et al., arXiv 2302.06675 (Lion).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lion_pytorch import Lion
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dssolver.paths import as_float64

from ..console import say
from ..pipeline.plan import Plan
from ..processes import from_main, reduced
from ..settings import SearchConfig
from ..storage import Damaged, read_tensors, write_tensors
from ..teacher.ends import even_nodes
from ..teacher.trajectories import Teacher, teacher_trajectory
from .log import Log
from .objective import paper_loss
from .parameters import PaperParameters, current
from .problem import Problem

DIVERGED = 100.0  # times the best held-out error
MAX_ROLLBACKS = 3  # in a row, without a better held-out error


def paper(problem: Problem, nfe: int, settings: SearchConfig, log: Log) -> dict[str, Any]:
    """Step sizes and coefficients by Lion, from uniform Euler: the solver as it stands in the state."""
    solver, before = _Solver(problem, PaperParameters(nfe), settings), log.evaluations()
    checkpoint, key = log.checkpoint(f"paper-{nfe}")

    def on_resume(evaluations: int) -> None:
        log.recalled(evaluations)
        with problem.student.sampler.uncounted():  # first network calls that the killed run has counted
            list(problem.batches(problem.validation, Plan(even_nodes(nfe))))

    loop = Loop(
        solver.parameters, solver.loss, solver.error, problem.accelerator,
        iterations=-(-settings.num_generated_samples // settings.train_batch_size),
        learning_rate=settings.learning_rate, validation_steps=settings.validation_steps,
        checkpoint=checkpoint, key=key, name=f"paper, {nfe} calls",
        log=lambda facts: log.call(nfe=nfe, **facts, network_evaluations=log.evaluations()),
        count=lambda: log.evaluations() - before, on_resume=on_resume,
    )  # fmt: skip
    best = loop.run()
    found = problem.student.spec(current(solver.parameters))
    return {**found.to_dict(), "parameters": solver.parameters.count, "validation_mse": best}


@dataclass
class _Solver:
    """The solver that is trained, its loss and its held-out error."""

    problem: Problem
    parameters: PaperParameters
    settings: SearchConfig

    def collapsed(self) -> bool:
        """Whether step sizes have vanished, in every process alike; the loop then rolls back."""
        nodes = self.problem.student.nodes(current(self.parameters).unshifted_nodes)
        return not bool((nodes.diff() < 0).all())

    def loss(self, iteration: int) -> Tensor:
        """This process's share of the loss over an update's own samples, and of the evaluations: a backward pass counts
        as two."""
        settings, student = self.settings, self.problem.student
        nothing = self.parameters.r.sum() + self.parameters.c.sum()
        first, size = iteration * settings.train_batch_size, settings.train_batch_size
        batch = self.problem.share(range(first, first + size))
        if not batch:
            return 0.0 * nothing
        euler = Teacher(settings.reference_steps, 1)
        taught = teacher_trajectory(student, euler, batch, "train", len(batch), progress=False)
        if self.collapsed():
            return math.nan * nothing
        plan, before = self.parameters.plan(), student.sampler.network_evaluations
        run = student.run(plan, batch, "train")
        student.sampler.network_evaluations += 2 * (student.sampler.network_evaluations - before)
        wanted = [taught.nearest(node).to(run.final.device) for node in plan.unshifted_nodes]
        return paper_loss(run.states, wanted) * len(batch) / size

    def error(self) -> float:
        """Held-out final-state mse; NaN if step sizes have vanished."""
        if self.collapsed():
            return math.nan
        return self.problem.score(current(self.parameters))


@dataclass
class Progress:
    """Where a loop stands.

    Attributes:
        done: updates, those that were rolled back included.
        best: held-out error.
        rollbacks: since the best was found.
        evaluations: network evaluations, as `Loop.count` gives them.
    """

    done: int = 0
    best: float = math.inf
    rollbacks: int = 0
    evaluations: int = 0


@dataclass
class Loop:
    """Lion at a constant learning rate, no weight decay; the parameters of the best held-out error are kept.

    Every process holds the parameters and adds its share of the loss; gradients are summed by hand, because the
    parameters are read past a wrapper's forward. Where a loss, a gradient or a held-out error is not finite, or the
    error is more than `DIVERGED` times the best, the best parameters and their momentum are put back, and the next
    updates go on from there with new samples; after `MAX_ROLLBACKS` of these the loop ends. A killed loop goes on
    to the same result, to the bit on the same machine with the same number of threads and processes.

    Args:
        loss: iteration -> this process's share of the loss; shares sum to the loss of the whole batch.
        error: the held-out error of the parameters as they are.
        validation_steps: updates between two held-out errors; the last update has one too.
        checkpoint: a safetensors file, written after every held-out error and every roll-back, and resumed from.
        key: of the search; a checkpoint with another key is replaced.
        count: network evaluations of this loop so far, over all processes; kept with the checkpoint.
        on_resume: given that count when a checkpoint was loaded.
    """

    parameters: nn.Module
    loss: Callable[[int], Tensor]
    error: Callable[[], float]
    accelerator: Accelerator
    iterations: int
    learning_rate: float
    validation_steps: int
    checkpoint: Path | None = None
    key: str = ""
    name: str = "search"
    log: Callable[[dict[str, Any]], None] = lambda facts: None
    count: Callable[[], int] = lambda: 0
    on_resume: Callable[[int], None] = lambda evaluations: None
    progress: Progress = field(default_factory=Progress, init=False)

    def __post_init__(self) -> None:
        self.optimizer = Lion(self.parameters.parameters(), lr=self.learning_rate, weight_decay=0.0)
        self.best = self._snapshot()

    def run(self) -> float:
        """The best held-out error; its parameters are put in place.

        Raises:
            ValueError: no held-out error was finite.
        """
        self._resume()
        progress, main = self.progress, self.accelerator.is_main_process
        with tqdm(desc=self.name, initial=progress.done, total=self.iterations, disable=not main) as bar:
            while progress.done < self.iterations and progress.rollbacks < MAX_ROLLBACKS:
                loss = self._once()
                bar.update()
                bar.set_postfix(loss=f"{loss:.4g}", best=f"{progress.best:.3g}")
        if not math.isfinite(progress.best):
            raise ValueError(f"{self.name}: no update gave a finite held-out error; choose a smaller learning_rate")
        if progress.done < self.iterations and main:
            say(f"{self.name}: ended after {MAX_ROLLBACKS} roll-backs without progress; the best is kept")
        self._restore(self.best)
        return progress.best

    def _once(self) -> float:
        """One update, judged if it is time; its loss."""
        progress, fault, error = self.progress, "", None
        loss = self._update()
        progress.done += 1
        if not math.isfinite(loss):
            fault = f"the loss or its gradient is {loss}"
        elif progress.done % self.validation_steps == 0 or progress.done == self.iterations:
            error = self.error()
            if not error <= DIVERGED * progress.best or not math.isfinite(error):
                fault = f"the held-out error is {error:.3g} after {progress.best:.3g}"
            elif error < progress.best:
                progress.best, progress.rollbacks, self.best = error, 0, self._snapshot()
        if fault:
            progress.rollbacks += 1
            self._restore(self.best)
            if self.accelerator.is_main_process:
                told = f"{self.name}, update {progress.done}: {fault}"
                say(f"{told}; rolled back to the best ({progress.rollbacks})")
        if fault or error is not None:
            facts = {"iteration": progress.done, "loss": loss, "validation_mse": error}
            facts |= {"best_validation_mse": progress.best} | ({"rolled_back": fault} if fault else {})
            progress.evaluations = self.count()
            self._save()
            self.log({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in facts.items()})
        return loss

    def _update(self) -> float:
        """One step of Lion, unless the loss or its gradient is not finite; the loss over all processes, NaN if a
        gradient is."""
        self.optimizer.zero_grad()
        loss = self.loss(self.progress.done)
        loss.backward()
        moved = [p for p in self.parameters.parameters() if p.grad is not None]
        parts = [loss.detach().reshape(1), *(p.grad.flatten() for p in moved if p.grad is not None)]
        summed = reduced(self.accelerator, torch.cat([as_float64(part) for part in parts]))
        total, *gradients = summed.split([len(part) for part in parts])
        if not all(g.isfinite().all() for g in gradients):
            return math.nan if math.isfinite(total) else float(total)
        if total.isfinite():
            for p, gradient in zip(moved, gradients, strict=True):
                p.grad = gradient.view_as(p).to(p.dtype)
            self.optimizer.step()
        return float(total)

    def _snapshot(self) -> dict[str, Tensor]:
        """Parameters and momentum, copied."""
        tensors = {f"parameter.{name}": value.clone() for name, value in self.parameters.state_dict().items()}
        for name, p in self.parameters.named_parameters():
            if "exp_avg" in self.optimizer.state[p]:
                tensors[f"momentum.{name}"] = self.optimizer.state[p]["exp_avg"].clone()
        return tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        names = self.parameters.state_dict()
        self.parameters.load_state_dict({name: tensors[f"parameter.{name}"] for name in names})
        for name, p in self.parameters.named_parameters():
            self.optimizer.state[p].clear()
            if f"momentum.{name}" in tensors:
                self.optimizer.state[p]["exp_avg"] = tensors[f"momentum.{name}"].to(p.device).clone()

    def _save(self) -> None:
        if self.checkpoint and self.accelerator.is_main_process:
            snapshots = {"now": self._snapshot(), "best": self.best}
            tensors = {f"{which}.{name}": t for which, parts in snapshots.items() for name, t in parts.items()}
            write_tensors(self.checkpoint, tensors, {"key": self.key, "progress": json.dumps(asdict(self.progress))})

    def _resume(self) -> None:
        """Go on from the main process's checkpoint, if there is one of this search."""
        stored = from_main(self.accelerator, self._stored() if self.accelerator.is_main_process else None)
        if stored:
            self.progress = Progress(**stored["progress"])
            self.best = _tensors(stored["best"])
            self._restore(_tensors(stored["now"]))
            self.on_resume(self.progress.evaluations)

    def _stored(self) -> dict[str, Any] | None:
        """The checkpoint as plain data, which every process can be sent."""
        if not self.checkpoint or not self.checkpoint.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.checkpoint)
            if metadata["key"] != self.key:
                return None
            plain: dict[str, Any] = {"progress": json.loads(metadata["progress"]), "now": {}, "best": {}}
            for name, t in tensors.items():
                which, _, rest = name.partition(".")
                plain[which][rest] = [t.flatten().tolist(), list(t.shape), str(t.dtype).removeprefix("torch.")]
            return plain
        except (Damaged, KeyError) as error:
            say(f"{self.checkpoint} is damaged and left out: {error}; this fit starts over")
            return None


def _tensors(plain: dict[str, Any]) -> dict[str, Tensor]:
    return {n: torch.tensor(v, dtype=getattr(torch, dtype)).view(shape) for n, (v, shape, dtype) in plain.items()}
