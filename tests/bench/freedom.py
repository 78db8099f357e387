"""What more numbers would bring: `python -m tests.bench.freedom --family vp --nfe 5`.

A solver of ours has rows that sum to 1 and feeds the network its state as it is. Every state of every solver that is
linear in network outputs is a x_init + sum_j c_ij output_j: two more numbers a row, the sum of the row and a scale of
what the network is fed. Here the polish moves these as well, from the same start, on the search's own samples; nothing
of it is in the product, where rows that sum to 1 keep constant fields exact and every state at its noise level.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dssolver_search.methods.closed_form import Candidate, ClosedForm
from dssolver_search.methods.gauss_newton import Polish
from dssolver_search.methods.setup import Setup, splits
from dssolver_search.pipeline.replay import Replay
from dssolver_search.settings import STARTS, SearchConfig
from tests.bench.search import FAMILIES, GUIDANCE, model

UNIT = 0.1  # of a scale or a sum, per unit of its parameter


class Freer(Polish):
    """The polish with scales of what the network is fed, or free sums of rows, or both."""

    def __init__(self, form: ClosedForm, candidate: Candidate, scales: bool, sums: bool) -> None:
        super().__init__(form, candidate)
        n = self.numbers.nfe
        self.own, self.scales, self.sums = self.count, scales, sums
        self.unchanged += [*(range(n) if scales else ()), *(range(1, n + 1) if sums else ())]
        self.count = len(self.unchanged)
        self.fed = [1.0] * n

    def solver(self, parameters: Tensor) -> tuple[Tensor, list[list[float]], Tensor | None]:
        raw, rows, offsets = super().solver(parameters[: self.own])
        n, more = len(rows), (UNIT * parameters[self.own :]).tolist()
        self.fed = [1 + more.pop(0) for _ in range(n)] if self.scales else [1.0] * n
        if self.sums:
            rows = [[*row[:-1], row[-1] + change] for row, change in zip(rows, more, strict=True)]
        return raw, rows, offsets

    def scaled(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the network's forward."""
        factor = self.fed[min(self.form.probe.steps_taken, len(self.fed) - 1)]
        if args:
            return (args[0] * factor, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * factor}

    def run(self, iterations: int) -> tuple[float, float]:
        """Held-out and training mse after so many iterations, each kept only if it is better held out."""
        network = self.form.sampler.pipe.transformer
        hook = network.register_forward_pre_hook(self.scaled, with_kwargs=True)
        first_call = self.form.start
        # known only where the first call is fed the noise itself
        self.form.start = lambda *a: first_call(*a) if self.fed[0] == 1 else Replay(frozen=True)  # type: ignore
        best, where = self.candidate.validation_mse, torch.zeros(self.count, dtype=torch.float64)
        try:
            for _ in range(iterations):
                for tried in self.step(where, int):
                    try:
                        error = self.form.mean_square(self.errors("validation", tried))
                    except ValueError:  # nodes or times that no longer fall
                        continue
                    if error < best:
                        best, where = error, tried
            return best, self.form.mean_square(self.errors("train", where))
        finally:
            hook.remove()
            self.form.start = first_call  # type: ignore


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
            guidance_scale=GUIDANCE, **more,
        )  # fmt: skip
        setup = Setup(config, Accelerator())
        samples = [setup.samples(name, count) for name, count in splits(config).items()]
        form = ClosedForm(setup.sampler, setup.probe, *samples, config.num_trial_samples, lambda t: t)
        found = form.search(given.nfe, config.trials, config.ridge, STARTS[: config.starts])
        print(
            f"{given.family}, {given.nfe} calls, {given.iterations} iterations of the polish, held-out mse (training)"
        )
        for scales, sums in ((False, False), (True, False), (False, True), (True, True)):
            more_free = [name for name, free in (("scales", scales), ("sums", sums)) if free]
            problem = Freer(form, found, scales, sums)
            held_out, train = problem.run(given.iterations)
            name = " and ".join(more_free) or "as searched"
            print(f"  {name:16} {problem.count:3} numbers   {held_out:.3g} ({train:.3g})", flush=True)


if __name__ == "__main__":
    main()
