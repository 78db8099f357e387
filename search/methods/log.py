"""What a method reports while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .problem import Candidate


class Log:
    """Keeps nothing. The search's own log writes files, draws progress bars and remembers fits of a killed run."""

    def evaluations(self) -> int:
        """Network evaluations so far, over all processes."""
        return 0

    def trial(self, candidate: Candidate) -> None:
        """A fit that was made."""

    def call(self, **figures: Any) -> None:
        """An evaluation of loss and gradient."""

    def stage(self, name: str, candidate: Candidate, **figures: float) -> None:
        """The end of a stage of a method."""

    def recall(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """What `remember` was told of this task by an earlier, killed run; its network evaluations count then."""

    def remember(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep the result of a task, `network_evaluations` among it, until the solver that it serves is kept."""

    def checkpoint(self, name: str) -> tuple[Path | None, str]:
        """File for a method's own checkpoint, and the key of the search that must stand in it."""
        return None, ""

    def recalled(self, evaluations: int) -> None:
        """Count evaluations of a killed run whose results are kept."""

    def affords(self, evaluations: int) -> bool:
        """Whether so many more network evaluations, over all processes, fit into the budget of the search. A method
        asks before whatever it can do without."""
        return True

    @contextmanager
    def progress(self, description: str, unit: str, total: int) -> Iterator[Callable[..., None]]:
        """Gives a function to call after every unit of work, with figures to show."""
        yield lambda **figures: None

    def say(self, line: str) -> None:
        """One line to the user."""
