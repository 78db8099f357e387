"""Gauss-Newton polish of a solver, forward evaluations only.

Closed-form rows look one node ahead; here every number of the solver (step sizes, coefficients, model times) moves at
once towards the smallest *final* error. The numbers are few and the residuals many, so the Jacobian is taken by forward
differences through the pipeline's own call, batch by batch; network calls that a number does not reach are replayed,
which leaves less than half of them. The damping of a step is the one that is best on held-out samples. No
back-propagation: no memory wall, any dtype of weights.

Source: Levenberg 1944, Marquardt 1963 (damped Gauss-Newton); the decoupled network time of LD3, arXiv 2405.15506.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from diffusers_dssolver.paths import as_float64

from ..pipeline.plan import Plan
from ..settings import GROUPS, SearchConfig
from .log import Log
from .parameters import PARAMETRISATIONS, Parametrisation, current
from .problem import DECIMALS, Candidate, Problem, Samples, comparable

# of a logit or a weight, by the dtype of final states: smaller differences drown in its roundings
DIFFERENCES = {torch.float64: 3e-3, torch.float32: 3e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
DAMPINGS = (1e-3, 1e-2, 1e-1)  # all are tried
IN_TURN = (1e-2, 1e-1, 1.0)  # of a quick polish: until one lowers the held-out error
WORTH = 0.9  # of the error that an iteration began with: it goes on where less is left


def parametrised(
    problem: Problem, candidate: Candidate, free: Collection[str] = GROUPS, name: str = "corrections"
) -> Parametrisation:
    """Numbers around a candidate."""
    return PARAMETRISATIONS[name](candidate.plan, problem.student.slopes, free)


class Polish:
    """Damped Gauss-Newton around one candidate.

    Attributes:
        numbers: that move.
        samples: training samples that the Jacobian is taken on; None: all.
        count: of them.
        shared_calls: by number, as the parametrisation tells them.
    """

    def __init__(
        self, problem: Problem, candidate: Candidate, numbers: Parametrisation, samples: Samples | None = None
    ) -> None:
        self.problem, self.candidate, self.numbers = problem, candidate, numbers
        self.samples = samples or problem.train
        self.count, self.shared_calls = numbers.count, numbers.shared_calls

    @property
    def cost(self) -> int:
        """Network evaluations of an iteration, over all processes."""
        nfe, problem = self.candidate.nfe, self.problem
        moved = sum(nfe - shared for shared in self.shared_calls)
        return problem.cost(self.samples, nfe + moved) + problem.cost(problem.validation, nfe * len(DAMPINGS))

    def plan(self, parameters: Tensor) -> Plan:
        """The solver of parameters (count,)."""
        vector_to_parameters(parameters, self.numbers.parameters())
        return current(self.numbers)

    def errors(self, samples: Samples, parameters: Tensor) -> Tensor:
        """Final states (B, ...) minus the teacher's."""
        return self.problem.errors(samples, self.plan(parameters))

    def steps(
        self,
        parameters: Tensor,
        on_call: Callable[[], object] = lambda: None,
        dampings: Sequence[float] = DAMPINGS,
    ) -> list[Tensor]:
        """The parameters (count,) after a damped Gauss-Newton step from here, one per damping; `on_call` after each of
        the `count` differences of a batch."""
        gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        right = torch.zeros(self.count, dtype=torch.float64)
        plan = self.plan(parameters)
        for batch in self.problem.batches(self.samples, plan, keep=True):
            run = batch.run(plan, shared_calls=1)
            difference = DIFFERENCES[run.final.dtype]
            here = batch.off(run).flatten()
            device, precision, here = here.device, torch.promote_types(here.dtype, torch.float32), as_float64(here)
            columns = []
            for k in range(self.count):
                moved = parameters.clone()
                moved[k] += difference
                there = batch.errors(self.plan(moved), self.shared_calls[k]).flatten()
                columns.append(((as_float64(there) - here) / difference).to(precision).to(device))
                on_call()
            jacobian = torch.stack(columns)
            gram += as_float64(jacobian @ jacobian.T)
            right += as_float64(jacobian @ here.to(precision).to(device))
        gram, right = self.problem.reduce(gram), self.problem.reduce(right)
        scale = gram.diagonal().clamp(min=1e-9 * float(gram.diagonal().max()))
        steps = [torch.linalg.solve(gram + mu * torch.diag(scale), right) for mu in dampings]
        return [(parameters - step).round(decimals=DECIMALS) for step in steps]


def polish(
    problem: Problem,
    candidate: Candidate,
    numbers: Parametrisation,
    iterations: int,
    on_call: Callable[[], object] = lambda: None,
    samples: Samples | None = None,
    quick: bool = False,
    affords: Callable[[int], bool] = lambda evaluations: True,
) -> Candidate:
    """The candidate after so many Gauss-Newton steps, each kept only if it lowers the validation error; the last one
    is the first that does not, or that leaves more than `WORTH` of it to a quick polish.

    Args:
        candidate: a validated one.
        numbers: around it.
        on_call: as in `Polish.steps`.
        samples: as in `Polish`.
        quick: try dampings in turn.
        affords: whether so many evaluations are to be had for an iteration.
    """
    if candidate.nfe == 1 or not numbers.count:
        return candidate  # one step has no freedom but its time, and nothing to compare it with
    newton = Polish(problem, candidate, numbers, samples)
    parameters, best = torch.zeros(newton.count, dtype=torch.float64), candidate
    for _ in range(iterations):
        if not affords(newton.cost):
            break
        before = best
        for tried in newton.steps(parameters, on_call, IN_TURN if quick else DAMPINGS):
            plan = newton.plan(tried)
            try:
                errors = problem.each(problem.validation, plan)
                spec = problem.student.spec(plan)
            except ValueError:  # nodes or times that no longer fall: too long a step
                continue
            error = float(errors.mean())
            if comparable(error) < comparable(best.validation_mse):
                best = replace(candidate, plan=plan, spec=spec, validation_mse=error, errors=errors)
                parameters = tried
                if quick:
                    break
        if best is before or (quick and best.validation_mse > WORTH * before.validation_mse):
            break
    if best is candidate:
        return candidate
    return replace(best, train_mse=float(problem.each(newton.samples, best.plan).mean()))


def polished(problem: Problem, candidate: Candidate, settings: SearchConfig, log: Log) -> Candidate:
    """`polish` with the iterations, parametrisation and free groups of the settings."""
    numbers = parametrised(problem, candidate, settings.search_over, settings.parametrisation)
    samples = problem.train.below(settings.num_polish_samples)
    batches = -(-len(samples) // problem.batch_size)
    differences = settings.polish * batches * numbers.count
    with log.progress(f"polish, {candidate.nfe} calls", "difference", differences) as advance:
        quick = not settings.starts
        return polish(problem, candidate, numbers, settings.polish, advance, samples, quick, log.affords)
