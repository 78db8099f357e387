"""Problems with a closed solution on both paths. Each counts its evaluations, so a test can also check their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dssolver import SolverSpec
from diffusers_dssolver.step import Scalar, step


@dataclass
class GaussianProblem:
    """Data from N(mean, std^2), independent per entry: x_t is N(alpha mean, V) with V = alpha^2 std^2 + sigma^2, so the
    exact denoiser is linear and the probability flow keeps (x - alpha mean) / sqrt(V) constant.

    `kind` says which quantity is integrated: "flow" (velocity = noise - data) or "vp" (denoised).
    """

    kind: str
    mean: Tensor = field(default_factory=lambda: torch.tensor([0.8, -0.3, 0.1], dtype=torch.float64))
    std: Tensor = field(default_factory=lambda: torch.tensor([0.6, 0.45, 0.9], dtype=torch.float64))
    evaluations: int = 0

    def start(self) -> Tensor:
        return torch.tensor([1.3, -0.7, 0.4], dtype=torch.float64)

    def variance(self, alpha: float, sigma: float) -> Tensor:
        return alpha**2 * self.std**2 + sigma**2

    def exact(self, x: Tensor, before: tuple[float, float], after: tuple[float, float]) -> Tensor:
        """The state at (alpha, sigma) = `after` of the trajectory that is at x at `before`."""
        ratio = torch.sqrt(self.variance(*after) / self.variance(*before))
        return after[0] * self.mean + ratio * (x - before[0] * self.mean)

    def denoised(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return self.mean + alpha * self.std**2 / self.variance(alpha, sigma) * (x - alpha * self.mean)

    def quantity(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        self.evaluations += 1
        denoised = self.denoised(x, alpha, sigma)
        return (x - denoised) / sigma if self.kind == "flow" else denoised


def quantity(path, output, x: Tensor, alpha, sigma, prediction: str) -> Tensor:
    """The model quantity on a path, from the network's output at x."""
    p, q = path.quantity_weights(alpha, sigma, prediction)
    return p * x + q * output


def denoised(path, d: Tensor, x: Tensor, alpha, sigma) -> Tensor:
    """The predicted data on a path, from the model quantity at x."""
    p, q = path.denoised_weights(alpha, sigma)
    return p * x + q * d


def integrate(problem, alphas, sigmas, transition, rows, x: Tensor, seeded: int = 0) -> Tensor:
    """The last state of a run through `step` alone. With `seeded` = k the run begins at node k, with the exact state
    there and the exact quantities of nodes 0..k-1 as its history, so that no start-up error is left."""
    points = list(zip(alphas.tolist(), sigmas.tolist(), strict=True))
    states = [problem.exact(x, points[0], points[j]) for j in range(seeded + 1)]
    history = [problem.quantity(states[j], *points[j]) for j in range(seeded)]
    x, (a, b) = states[seeded], transition
    for i in range(seeded, len(rows)):
        history.append(problem.quantity(x, *points[i]))
        x = step(x, history, rows[i], a[i].item(), b[i].item())
    return x


def rollout(
    evaluate: Callable[[Tensor, Scalar], Tensor],
    x: Tensor,
    timesteps: Sequence[Scalar],
    transitions: Iterable[tuple[Scalar, Scalar]],
    coefficients: Sequence[Sequence[Scalar]],
) -> list[Tensor]:
    """All N+1 states of one run.

    Args:
        evaluate: (x, timestep) -> d, the model quantity that is integrated; called N times.
        x: state at the first node.
        timesteps: N times to evaluate at.
        transitions: N pairs (A_i, B_i).
        coefficients: N rows, row i of i+1 weights.
    """
    states, history = [x], []
    for t, (a, b), row in zip(timesteps, transitions, coefficients, strict=True):
        history.append(evaluate(states[-1], t))
        states.append(step(states[-1], history, row, a, b))
    return states


def convergence_order(errors: dict[int, float]) -> float:
    """Slope of log error on log step by least squares, from errors by step count."""
    h = [-math.log(n) for n in errors]
    e = [math.log(v) for v in errors.values()]
    mean_h, mean_e = sum(h) / len(h), sum(e) / len(e)
    return sum((a - mean_h) * (b - mean_e) for a, b in zip(h, e, strict=True)) / sum((a - mean_h) ** 2 for a in h)


def nonlinear_model(x: Tensor, t: float | Tensor) -> Tensor:
    """A smooth, bounded, nonlinear stand-in for a network; t is the network's own time, in 0..1000."""
    s = t / 1000
    return torch.tanh(1.3 * x + torch.roll(x, 1, -1) * s) + 0.4 * torch.sin(2 * x - 3 * s) + 0.1 * s


@st.composite
def specs(draw: st.DrawFn, max_nfe: int = 10) -> SolverSpec:
    """Any valid solver: falling nodes that end at 0, rows of signed weights that sum to 1, with or without times."""
    nfe = draw(st.integers(1, max_nfe))
    inner = st.floats(1e-4, 1.0, allow_subnormal=False)
    nodes = sorted(draw(st.lists(inner, min_size=nfe, max_size=nfe, unique=True)), reverse=True)
    rows = []
    for i in range(nfe):
        row = draw(st.lists(st.floats(-5, 5), min_size=i, max_size=i))
        rows.append([*row, 1 - math.fsum(row)])
    times = None
    if draw(st.booleans()):
        times = sorted(draw(st.lists(st.floats(0, 999), min_size=nfe, max_size=nfe, unique=True)), reverse=True)
    return SolverSpec([*nodes, 0.0], rows, times)


class Metal(TorchDispatchMode):
    """A device on the CPU that has no float64, as Apple's MPS has none: what would be float64 there, or is converted to
    float64 before it has left, is a TypeError. It goes by the name "meta", which every build of torch knows."""

    device = torch.device("meta")

    class Array(Tensor):
        """A tensor on it."""

        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

        @staticmethod
        def __new__(cls, inner: Tensor):
            layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=Metal.device, **layout)

        def __init__(self, inner: Tensor):
            self.inner = inner

        def data_ptr(self) -> int:
            return self.inner.data_ptr()

        def tolist(self) -> list:
            return self.inner.tolist()

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return Metal.compute(function, args, kwargs or {})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.compute(function, args, kwargs or {})

    def __enter__(self):
        self.makers = mock.patch.multiple(torch, tensor=moved(torch.tensor), as_tensor=moved(torch.as_tensor))
        self.makers.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.makers.stop()
        return super().__exit__(*error)

    @classmethod
    def compute(cls, function, args, kwargs):
        arrays = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls.Array)]
        target = torch.device(kwargs["device"]) if kwargs.get("device") else None
        there = bool(arrays) if target is None else target.type == cls.device.type
        if arrays and kwargs.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        args, kwargs = pytree.tree_map_only(cls.Array, lambda a: a.inner, (args, kwargs))
        if target is not None and there:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default or not there:
            return result
        if any(isinstance(r, Tensor) and r.dtype == torch.float64 for r in pytree.tree_leaves(result)):
            raise TypeError(f"{function} makes a float64 tensor on MPS")
        return pytree.tree_map_only(Tensor, cls.Array, result)


def moved(maker: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` or `torch.as_tensor`, which put numbers on a device out of a mode's sight."""

    def made(data, *args, device=None, **options):
        there = device is not None and not isinstance(data, Tensor)
        return maker(data, *args, **options).to(device) if there else maker(data, *args, device=device, **options)

    return made


class DoubleTorch:
    """`torch` with float64 for float32. Put in the place of `torch` in a scheduler module of diffusers, it takes the
    rounding out of its arithmetic, so that formulas can be compared and not roundings."""

    def __getattr__(self, name: str):
        return getattr(torch, "float64" if name == "float32" else name)
