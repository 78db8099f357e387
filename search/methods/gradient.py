"""Gradient polish of a fitted solver: the pipeline's own call, differentiated, on the cached samples all at once.

The objective over a full batch is smooth and has few parameters, so a quasi-Newton method with a line search is at
home; Adam and Lion are there for objectives that are not. Whatever the optimiser does, the solver that is kept is the
best on held-out samples, and the search ends when that has not moved for `PATIENCE` calls.

Source: Nocedal and Wright, Numerical Optimization, ch. 7 (L-BFGS) and 3 (strong Wolfe line search); Kingma and Ba,
arXiv 1412.6980 (Adam); Chen et al., arXiv 2302.06675 (Lion).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from ..pipeline.probe import run
from ..teacher.trajectories import Reference
from .closed_form import Candidate, ClosedForm, comparable
from .objective import Loss
from .parameters import CorrectionParameters

HISTORY = 30  # of L-BFGS
CLIP = 1.0  # norm of the gradient, first-order methods
DECAY = 0.8  # of their running average of the parameters, which is what is judged
PATIENCE = 15  # calls without a better held-out error


class NoProgress(Exception):
    """Private: ends an optimiser from within its closure."""


class Descent:
    """One descent from one candidate.

    Args:
        form: samples, references, pipeline, reduction over processes.
        candidate: a validated one.
        parameters: around it.
        loss: of a batch, a mean over its samples.
        on_call: called with (training loss, best held-out error) after each evaluation of loss and gradient.
    """

    def __init__(
        self,
        form: ClosedForm,
        candidate: Candidate,
        parameters: CorrectionParameters,
        loss: Loss,
        on_call: Callable[[float, float], object] = lambda loss, best: None,
    ) -> None:
        self.form, self.best, self.parameters = form, candidate, parameters
        self.loss, self.on_call = loss, on_call
        self.reached, self.since_best = candidate.validation_mse, 0  # the held-out error that is kept lowest
        indices, _ = form.train
        self.samples = float(form.reduce(torch.tensor(float(len(indices)), dtype=torch.float64)))

    def run(self, optimizer: str, calls: int, learning_rate: float) -> Candidate:
        """The best candidate on held-out samples after at most so many evaluations of loss and gradient."""
        try:
            if optimizer == "lbfgs":
                self._lbfgs(calls)
            else:
                self._first_order(optimizer, calls, learning_rate)
        except NoProgress:
            pass
        return self.best

    def value(self) -> float:
        """The loss over every process's samples; its gradient is put into the parameters, the same in each."""
        for p in self.parameters.parameters():
            p.grad = None
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.form.batches(self.form.train):
            loss = self._batch_loss(*batch) * len(batch[0]) / self.samples
            loss.backward()
            total += loss.detach().double().cpu()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.parameters()]
        summed = self.form.reduce(torch.cat([*(g.flatten() for g in grads), total[None]]))
        at = 0
        for p in self.parameters.parameters():
            p.grad = summed[at : at + p.numel()].view_as(p).clone()
            at += p.numel()
        return float(summed[-1])

    def _batch_loss(self, indices: Sequence[int], reference: Reference) -> Tensor:
        with self._prepared():
            states = run(self.form.sampler, self.form.probe, indices, "train", self.parameters.nfe)
        angles = self.form.probe.angle(self.form.probe.final_nodes(self.parameters.nodes()))
        wanted = [reference.at(angle).to(states[0].device) for angle in angles]
        return self.loss([s[: len(indices)] for s in states], wanted)

    @contextmanager
    def _prepared(self, decode: bool = False) -> Iterator[None]:
        """The probe prepared for one run of the parameters' solver, whose backward pass is counted too."""
        form = self.form
        numbers = self.parameters.nodes(), self.parameters.rows()
        form.probe.prepare(*numbers, offsets=self.parameters.offsets(), decode=decode)
        before = form.sampler.network_evaluations
        yield
        backward = 3 if form.probe.checkpointed else 2  # it counts two, and one more if it computes all again
        form.sampler.network_evaluations += backward * (form.sampler.network_evaluations - before)

    def _held_out(self, raw: Tensor, rows: Sequence[Sequence[float]], offsets: Tensor | None) -> tuple[float, float]:
        """(error by which the best is kept, final-state mse) of these numbers on held-out samples."""
        error = self.form.mean_square(self.form.errors("validation", raw, rows, offsets=offsets))
        return error, error

    def judge(self, loss: float) -> None:
        """Keep the solver of the parameters as they are if it is the best on held-out samples."""
        raw, rows, offsets = self.parameters.numbers()
        self.since_best += 1
        try:
            error, mse = self._held_out(raw, rows, offsets)
            if math.isfinite(error) and comparable(error) < comparable(self.reached):
                spec = self.form.probe.spec()
                self.best = replace(self.best, raw=raw, spec=spec, offsets=offsets, validation_mse=mse)
                self.reached, self.since_best = error, 0
        except ValueError:
            pass  # nodes or times that no longer fall: too long a step
        self.on_call(loss, self.reached)
        if self.since_best >= PATIENCE or not math.isfinite(loss):
            raise NoProgress

    def _lbfgs(self, calls: int) -> None:
        method = torch.optim.LBFGS(
            self.parameters.parameters(),
            max_iter=calls,
            max_eval=calls,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-12,
            tolerance_change=1e-14,
        )
        scale = 1.0 / max(self.value(), 1e-30)  # a loss near 1: the first step is of the size of its inverse gradient

        def closure() -> float:
            loss = self.value()
            self.judge(loss)
            for p in self.parameters.parameters():
                p.grad = None if p.grad is None else p.grad * scale
            return loss * scale

        method.step(closure)

    def _first_order(self, optimizer: str, calls: int, learning_rate: float) -> None:
        tensors = list(self.parameters.parameters())
        make = {"adam": torch.optim.Adam, "lion": Lion}[optimizer]
        method = make(tensors, lr=learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(method, calls)
        mean = parameters_to_vector(tensors).detach()
        for _ in range(calls):
            loss = self.value()
            clip_grad_norm_(tensors, CLIP)
            method.step()
            decay.step()
            now = parameters_to_vector(tensors).detach()
            mean = torch.lerp(now, mean, DECAY)
            vector_to_parameters(mean, tensors)
            self.judge(loss)
            vector_to_parameters(now, tensors)
