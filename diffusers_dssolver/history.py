"""The model quantities of a run and the rows that weigh them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .solver import fold
from .step import Scalar, decayed_mean, split_mean


class History:
    """Quantities d_j of the steps taken so far, newest last.

    Args:
        rows: N rows of weights, row i for the quantities d_0 .. d_i.
        length: number of quantities held at most; longer rows are folded. None: all that the rows need.
        mean_decay: decay per step of the means that are kept apart (`step.decayed_mean`). None: none are.

    Attributes:
        outputs: the quantities held. Entries may be replaced from outside.
        means: the mean of every quantity since the history began, with `mean_decay` only.
        needed: number of quantities to hold at each step, for it and the steps after it.
    """

    def __init__(
        self, rows: Sequence[Sequence[Scalar]] = (), length: int | None = None, mean_decay: float | None = None
    ) -> None:
        self.mean_decay = mean_decay
        self.rows = [fold(row, min(length or len(row), len(row))) for row in map(_without_leading_zeros, rows)]
        self.needed = [len(row) for row in self.rows]
        for i in reversed(range(len(self.needed) - 1)):
            self.needed[i] = max(self.needed[i], self.needed[i + 1] - 1)
        self.outputs: list[Tensor] = []
        self.means: list[Tensor] = []
        self.last_index = 0

    def add(self, index: int, d: Tensor) -> None:
        """Append the quantity of step `index` and drop what no later row uses.

        A jump, another shape or another device starts a new history. The same index again replaces the last entry.
        """
        if self.outputs:
            newest = self.outputs[-1]
            follows = index in (self.last_index, self.last_index + 1)
            if not follows or newest.shape != d.shape or newest.device != d.device:
                self.outputs.clear()
                self.means.clear()
            elif index == self.last_index:
                self.outputs.pop()
                del self.means[-1:]
        if self.mean_decay is not None:
            d, mean = split_mean(d)
            self.means.append(mean)
        self.outputs.append(d)
        del self.outputs[: -self.needed[index]]
        self.last_index = index

    def row(self, index: int) -> Sequence[Scalar]:
        """Weights of the newest quantities at step `index`, folded where fewer are held than the row expects."""
        row = self.rows[index]
        return row if len(row) <= len(self.outputs) else fold(row, len(self.outputs))

    def terms(self, row: Sequence[Scalar]) -> tuple[list[Tensor], Sequence[Scalar]]:
        """The newest quantities and their weights, as `step.step` takes them; last the average of the means, if any."""
        newest = self.outputs[-len(row) :]
        if self.mean_decay is None:
            return newest, row
        return [*newest, decayed_mean(self.means, self.mean_decay)], [*row, 1.0]

    def copy(self) -> History:
        """The same rows and tensors in lists of its own."""
        twin = History()
        twin.__dict__.update({key: v.copy() if isinstance(v, list) else v for key, v in vars(self).items()})
        return twin


def _without_leading_zeros(row: Sequence[Scalar]) -> Sequence[Scalar]:
    start = next((j for j, weight in enumerate(row) if isinstance(weight, Tensor) or weight != 0.0), len(row) - 1)
    return row[start:]
