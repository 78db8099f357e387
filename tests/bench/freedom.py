"""What more numbers would bring: `python -m tests.bench.freedom --family vp --nfe 5`.

A solver of ours has rows that sum to 1 and feeds the network its state as it is. Every state of every solver that is
linear in network outputs is a x_init + sum_j c_ij output_j: two more numbers a row, the sum of the row and a scale of
what the network is fed. Here the polish moves these as well, from the same start, on the search's own samples; nothing
of it is in the product, where rows that sum to 1 keep constant fields exact and every state at its noise level.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dssolver_search.methods.closed_form import fitted
from dssolver_search.methods.gauss_newton import Polish, parametrised
from dssolver_search.methods.log import Log
from dssolver_search.methods.problem import Candidate, Problem
from dssolver_search.methods.setup import Setup
from dssolver_search.pipeline.plan import Plan
from dssolver_search.pipeline.replay import Replay
from dssolver_search.settings import SearchConfig
from tests.bench.search import FAMILIES, GUIDANCE, model

UNIT = 0.1  # of a scale or a sum, per unit of its parameter


class Freer(Polish):
    """The polish with scales of the network's input, or free sums of rows, or both."""

    def __init__(self, problem: Problem, candidate: Candidate, scales: bool, sums: bool) -> None:
        super().__init__(problem, candidate, parametrised(problem, candidate))
        n = candidate.nfe
        self.own, self.scales, self.sums = self.count, scales, sums
        more = [*(range(n) if scales else ()), *(range(1, n + 1) if sums else ())]
        self.shared_calls += more
        self.count += len(more)
        self.factors = [1.0] * n

    def plan(self, parameters: Tensor) -> Plan:
        plan = super().plan(parameters[: self.own])
        n, more = plan.nfe, (UNIT * parameters[self.own :]).tolist()
        self.factors = [1 + more.pop(0) for _ in range(n)] if self.scales else [1.0] * n
        if not self.sums:
            return plan
        return replace(plan, rows=[[*r[:-1], r[-1] + change] for r, change in zip(plan.rows or (), more, strict=True)])

    def scaled(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the network's forward."""
        taken = self.problem.student.scheduler.recorder.steps_taken
        factor = self.factors[min(taken, len(self.factors) - 1)]
        if args:
            return (args[0] * factor, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * factor}

    def run(self, iterations: int) -> tuple[float, float]:
        """Held-out and training mse after so many iterations, each kept only if it is better held out."""
        network = self.problem.student.sampler.pipe.transformer
        hook = network.register_forward_pre_hook(self.scaled, with_kwargs=True)
        first_call = self.problem.first_call
        # known only where the network's first input is the noise itself
        self.problem.first_call = lambda *a: first_call(*a) if self.factors[0] == 1 else Replay(frozen=True)  # type: ignore
        best, where = self.candidate.validation_mse, torch.zeros(self.count, dtype=torch.float64)
        try:
            for _ in range(iterations):
                for tried in self.steps(where):
                    try:
                        error = self.problem.mean_square(self.errors(self.problem.validation, tried))
                    except ValueError:  # nodes or times that no longer fall
                        continue
                    if error < best:
                        best, where = error, tried
            return best, self.problem.mean_square(self.errors(self.problem.train, where))
        finally:
            hook.remove()
            self.problem.first_call = first_call  # type: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="vp")
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--settings", nargs="*", default=[], help="of the search, key=number")
    given = parser.parse_args()
    more = {key: int(value) for key, value in (pair.split("=") for pair in given.settings)}
    with tempfile.TemporaryDirectory() as output:
        config = SearchConfig(
            pretrained_model_name_or_path=str(model(given.family)), output_dir=output, nfe=[given.nfe],
            guidance_scale=GUIDANCE, effort="full", **more,
        )  # fmt: skip
        setup = Setup(config, Accelerator())
        problem = setup.problem()
        found = fitted(problem, given.nfe, config, Log())
        print(
            f"{given.family}, {given.nfe} calls, {given.iterations} iterations of the polish, held-out mse (training)"
        )
        for scales, sums in ((False, False), (True, False), (False, True), (True, True)):
            more_free = [name for name, free in (("scales", scales), ("sums", sums)) if free]
            freer = Freer(problem, found, scales, sums)
            held_out, train = freer.run(given.iterations)
            name = " and ".join(more_free) or "as searched"
            print(f"  {name:16} {freer.count:3} numbers   {held_out:.3g} ({train:.3g})", flush=True)


if __name__ == "__main__":
    main()
