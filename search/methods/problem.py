"""What a solver is searched for: samples with the trajectories that their teacher gives them."""

from __future__ import annotations

from dataclasses import dataclass

from .journal import ResumableForm
from .log import Log
from .perceptual import Perceptual
from .setup import Setup, splits


@dataclass
class Problem:
    """What every method is given.

    Attributes:
        setup: model, processes and folder.
        form: training and validation samples, and the closed form on them.
        free: groups of a solver's numbers that gradients may move.
        perceptual: the objective on images, if the search has it.
    """

    setup: Setup
    form: ResumableForm
    free: list[str]
    perceptual: Perceptual | None

    @classmethod
    def of(cls, setup: Setup, log: Log) -> Problem:
        """Make or read the teacher's trajectories."""
        settings = setup.settings
        samples = {split: setup.samples(split, count) for split, count in splits(settings).items()}
        form = ResumableForm(
            setup.sampler, setup.probe, samples.get("train", samples["validation"]), samples["validation"],
            len(setup.share(range(settings.num_trial_samples))), setup.reduce, batch_size=settings.batch_size, log=log,
        )  # fmt: skip
        return cls(setup, form, setup.free, setup.perceptual)
