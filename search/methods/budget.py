"""What a search may spend, and how its settings shrink to that.

Costs are estimated in network evaluations, roughly: enough to choose sizes by. What is optional is decided while the
search goes on, by what was spent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ..settings import SearchConfig, budget_of
from ..teacher.convergence import CONVERGENCE_SAMPLES

ASSUMED_STEPS = 50  # of a teacher that chooses its own
# settings shrink to these, one entry after the other, until the search fits: what costs least in quality goes first
LADDER: tuple[dict[str, int], ...] = (
    {"teacher_steps": 50},
    {"starts": 1, "trials": 12, "gradient_calls": 10},
    {"num_train_samples": 16, "num_validation_samples": 16, "num_trial_samples": 8},
    {"teacher_steps": 25, "trials": 6, "gradient_calls": 5},
    {"num_train_samples": 8, "num_validation_samples": 8},
    {"num_train_samples": 4, "num_validation_samples": 4, "num_trial_samples": 4},
)


class Budget:
    """The most that a search may spend.

    Attributes:
        text: as the user gave it; empty: no limit.
        speed: network evaluations a second, as far as it is known.
    """

    def __init__(self, text: str) -> None:
        self.text, self.began, self.speed = text, time.monotonic(), 0.0
        self.evaluations, self.seconds = budget_of(text)

    def left(self, spent: int, recalled: int = 0) -> float:
        """Network evaluations that are left.

        Args:
            spent: so far.
            recalled: so many of them by an earlier, killed run.
        """
        if self.seconds is None:
            return self.evaluations - spent
        passed = time.monotonic() - self.began
        speed = max(self.speed, (spent - recalled) / passed if passed else 0.0)
        return speed * (self.seconds - passed)


def teacher_cost(settings: SearchConfig, per_call: float) -> float:
    """Network evaluations of the teacher's trajectories and of the estimate of its error."""
    samples = settings.num_train_samples + settings.num_validation_samples
    return per_call * (settings.teacher_steps or ASSUMED_STEPS) * (samples + 3 * CONVERGENCE_SAMPLES)


def fit_cost(settings: SearchConfig, nfe: int, per_call: float) -> float:
    """Network evaluations of a closed-form fit and of judging it."""
    return per_call * nfe * (settings.num_train_samples + 4 * settings.num_validation_samples)


def search_cost(settings: SearchConfig, nfe: int, per_call: float) -> float:
    """Network evaluations of one step count, without what is optional."""
    trials = per_call * nfe * settings.num_trial_samples * settings.trials * (1 + max(settings.starts, 1)) / 2
    descent = 4 * nfe * settings.num_train_samples * settings.gradient_calls if settings.method == "gradient" else 0
    return trials + 3 * fit_cost(settings, nfe, per_call) + per_call * descent


def shrunk(settings: SearchConfig, affordable: float, per_call: float) -> dict[str, int]:
    """Settings that change so that a search fits.

    Args:
        affordable: network evaluations.
        per_call: network evaluations of a sample in one step, guidance included.

    Raises:
        ValueError: not even the first step count fits.
    """

    def cost(now: SearchConfig, counts: Sequence[int]) -> float:
        return teacher_cost(now, per_call) + sum(search_cost(now, nfe, per_call) for nfe in counts)

    changed: dict[str, int] = {}
    for rung in LADDER:
        if cost(replace(settings, **changed), settings.nfe) <= affordable:
            return changed
        for name, most in rung.items():
            most = max(most, 2 * max(settings.nfe)) if name == "teacher_steps" else most
            used = name != "gradient_calls" or settings.method == "gradient"
            if used and getattr(settings, name) > most:
                changed[name] = most
    least = cost(replace(settings, **changed), settings.nfe[:1])
    if least > affordable:
        raise ValueError(
            f"budget is {settings.budget}, about {max(affordable, 0):,.0f} network evaluations of this pipeline; the "
            f"least that {settings.nfe[0]} calls can be searched with is about {least:,.0f}"
        )
    return changed
