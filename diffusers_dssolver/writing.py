"""A schedule that users write to: what is written is followed, or refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .carry import Course
from .derive import classical
from .history import History
from .loading import LoadableScheduler
from .paths import as_float64

NEAR = 1e-6  # relative; the schedule is float32


class WritableSchedule(LoadableScheduler):
    """`timesteps` and `sigmas` as attributes that may be replaced, sliced or written into.

    A contiguous part of the schedule is run with its own rows, up to the node behind its last step. Anything else is a
    grid of the user's own, with classical rows. Writing is noticed at the next step, so that both lists may be written
    one after the other.
    """

    num_inference_steps: int | None
    _history: History
    _step_index: int | None
    _begin_index: int | None
    _course: Course  # in use
    _timesteps: Tensor
    _sigma_list: Tensor
    _seen: list[int | None]  # versions of both lists when they were last looked at; -1 after one was replaced

    def _install(self, course: Course, device: str | torch.device | None = None) -> None:
        raise NotImplementedError

    @property
    def timesteps(self) -> Tensor:
        """(N,) what the network is fed, on the device of the run."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor | Sequence[float]) -> None:
        self._timesteps, self._seen[0] = _listed("timesteps", value), -1

    @property
    def sigmas(self) -> Tensor:
        """(N+1,) noise levels on the CPU: the flow's sigmas, or sigma/alpha of a vp model."""
        return self._sigma_list

    @sigmas.setter
    def sigmas(self, value: Tensor | Sequence[float]) -> None:
        self._sigma_list, self._seen[1] = _listed("sigmas", value), -1

    def __getstate__(self) -> dict[str, Any]:
        shown = self._timesteps, self._sigma_list
        return {**vars(self), "_seen": [a == _version(b) for a, b in zip(self._seen, shown, strict=True)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's tensors count their writes anew."""
        vars(self).update(state)
        shown = self._timesteps, self._sigma_list
        self._seen = [_version(b) if same else -1 for same, b in zip(state["_seen"], shown, strict=True)]

    def _publish(self, times: Tensor, sigmas: Tensor) -> None:
        """Show the schedule that is in use."""
        self._timesteps, self._sigma_list = times, sigmas
        self._seen = [_version(times), _version(sigmas)]

    def _follow(self) -> None:
        """Take over what was written since the last call; nothing is read where nothing was written.

        Raises:
            ValueError: for lists that do not belong together, or do not fall.
        """
        shown = self._timesteps, self._sigma_list
        if torch.compiler.is_compiling() or self._seen == [_version(tensor) for tensor in shown]:
            return
        times, levels = as_float64(shown[0]), as_float64(shown[1])
        nodes, known = self._course.nodes, self._course.times
        n, first = len(times), _place(times, known.detach())
        known_levels = self._path.level(nodes.detach())
        unwritten = self._seen[1] == _version(shown[1]) or _same(levels, known_levels)
        if not unwritten and len(levels) not in (n, n + 1):
            raise ValueError(
                f"sigmas was written with {len(levels)} entries for {n} timesteps; write both lists, sigmas with one "
                "entry more, or call set_timesteps"
            )
        if first is not None and (unwritten or _same(levels, known_levels[first : first + len(levels)])):
            if n < len(known):
                self._take(first, n)
        else:
            self._take_grid(times, None if unwritten else levels)
        self._publish(*shown)

    def _take(self, first: int, n: int) -> None:
        """Run n steps of the present schedule from step `first` on; a run that goes on keeps its history."""
        history, index = self._history, self._step_index
        self._reinstall(self._course.part(first, first + n))
        if index is not None and index >= first:
            self._step_index = index - first
            self._history.outputs, self._history.means = history.outputs, history.means
            self._history.last_index = history.last_index - first

    def _take_grid(self, times: Tensor, levels: Tensor | None) -> None:
        """Run classical rows on levels of the user's own, or on the nodes of the times if no levels are given."""
        nodes = self._path.node(times) if levels is None else self._path.node_at(levels)
        if nodes[-1] != 0:
            nodes = torch.cat([nodes, torch.zeros(1, dtype=torch.float64)])
        try:
            spec = classical(nodes.tolist(), self._path)
        except ValueError as error:
            raise ValueError(f"the schedule that was written cannot be run: {error}") from None
        self._reinstall(Course(nodes[: len(times) + 1], times, spec.coefficients[: len(times)]))

    def _reinstall(self, course: Course) -> None:
        begin, n = self._begin_index, len(course.times)
        self._install(course)
        self.num_inference_steps = n
        self._begin_index = begin if begin is None or begin < n else None


def _listed(name: str, value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float32)
    if tensor.ndim != 1 or len(tensor) == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be a list with at least one entry")
    return tensor


def _version(tensor: Tensor) -> int | None:
    """A count of the writes into a tensor, known without reading it."""
    return None if tensor.is_inference() else tensor._version


def _same(a: Tensor, b: Tensor) -> bool:
    return len(a) == len(b) and bool(((a - b).abs() <= NEAR * b.abs().clamp(min=NEAR)).all())


def _place(part: Tensor, whole: Tensor) -> int | None:
    """Where one list stands in another, entry after entry."""
    return next((k for k in range(len(whole) - len(part) + 1) if _same(part, whole[k : k + len(part)])), None)
