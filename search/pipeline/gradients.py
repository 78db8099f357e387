"""What a run through a pipeline needs to be differentiated in the numbers of its solver.

While it lasts, the forward of every network that takes a time is wrapped: it is recomputed in the backward pass instead
of stored, and a time that the pipeline rebuilt from numbers gets the gradient of the node that it came from.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from diffusers_dssolver.paths import as_float64

from .replay import patched

TIME_NAMES = ("timestep", "timesteps", "timestep_ratio", "t", "sigma", "sigmas")  # of a network's time argument
Maps = list[tuple[float, float]]


@contextmanager
def differentiable(
    networks: Iterable[nn.Module], time: Callable[[], Tensor], num_train_timesteps: int, recompute: bool = True
) -> Iterator[None]:
    """Run these networks' forwards with live times.

    Args:
        time: gives the 0-dim live time of the step that is being taken.
        num_train_timesteps: the model's number T of times.
        recompute: compute each network call again in the backward pass, which then holds the activations of one call
            at a time, and states otherwise; False: keep those of all calls.
    """
    wrapped = list(networks)
    with patched(wrapped, [_live(m.forward, time, float(num_train_timesteps), recompute) for m in wrapped]):
        yield


def _live(forward: Callable[..., Any], time: Callable[[], Tensor], total: float, recompute: bool) -> Callable[..., Any]:
    names = list(inspect.signature(forward).parameters)
    place = next((i for i, name in enumerate(names) if name in TIME_NAMES), 1)
    # what a pipeline may make of a time t: p + q t. Where several fit one step, another step tells which it is.
    maps: Maps = [(0.0, 1.0), (0.0, 1 / total), (1.0, -1 / total), (total, -1.0)]

    @functools.wraps(forward)
    def live(*args: Any, **kwargs: Any) -> Any:
        if place < len(args):
            args = (*args[:place], _attached(args[place], time(), maps), *args[place + 1 :])
        elif place < len(names) and names[place] in kwargs:
            kwargs = {**kwargs, names[place]: _attached(kwargs[names[place]], time(), maps)}
        # copies: the recomputation must not see what the pipeline wrote into its tensors since
        args, kwargs = pytree.tree_map_only(Tensor, lambda a: a.clone() if a.requires_grad else a, (args, kwargs))
        if not recompute:
            return forward(*args, **kwargs)
        return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False)

    return live


def _attached(value: Any, t: Tensor, maps: Maps) -> Any:
    """A network's time with the graph of this step's time t. A value that has a graph stays as it is; one that is
    p + q t for one of the maps (p, q) gets the slope q; any other value stays as it is."""
    if not t.requires_grad or not isinstance(value, (float, Tensor)):
        return value
    numbers = torch.as_tensor(value, device=t.device)
    if numbers.requires_grad or not numbers.is_floating_point():
        return value
    near = 4 * max(torch.finfo(numbers.dtype).eps, torch.finfo(t.dtype).eps)

    def made_by(p: float, q: float) -> bool:
        made = p + q * as_float64(t)
        return bool(((as_float64(numbers) - made).abs() <= near * made.abs().clamp(min=abs(p))).all())

    fitting = [(p, q) for p, q in maps if made_by(p, q)]
    if not fitting:
        return value
    maps[:] = fitting
    return numbers + (maps[0][1] * (t - t.detach())).to(numbers.dtype)
