"""The two paths from noise to data, x_t = alpha x_data + sigma noise, and the model quantity integrated along each.

    flow   alpha = 1 - sigma           node = sigma                      d = velocity = noise - data
    vp     alpha^2 + sigma^2 = 1       node = (timestep + 1) / T         d = denoised = the predicted data

With d in hand, one step from a node to the next is  x' = A x + B * (combination of d):

    flow   A = 1                       B = sigma' - sigma                (paper, Eq. 16)
    vp     A = sigma' / sigma          B = alpha' - A alpha              (Eq. 19: sigma' (w' - w), w = alpha/sigma)

Node 0 is the data. A vp node of k/T is DDPM's own index k = 1..T, so a uniform grid of nodes is what diffusers calls
"trailing" spacing. Everything here is float64 and on the CPU, and differentiable in the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Scalar = float | Tensor
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MAX_TRAIN_TIMESTEPS = 100_000


def as_float64(values: Any) -> Tensor:
    """Numbers of any kind as float64 on the CPU, moved before they are converted: Apple's MPS has no float64."""
    if isinstance(values, Tensor):
        return values.detach().cpu().double()
    return torch.as_tensor(values, dtype=torch.float64)


class Path:
    """Interface of both paths. Nodes, alphas and sigmas are float64 tensors of the same shape (...)."""

    num_train_timesteps: int
    first_node: float = 1.0

    def alpha_sigma(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at nodes in [0, 1]."""
        raise NotImplementedError

    def timestep(self, node: Tensor) -> Tensor:
        """The time that the network is fed at a node."""
        return node * self.num_train_timesteps

    def node(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`, clamped to the path."""
        return (timestep.double() / self.num_train_timesteps).clamp(0, 1)

    def level(self, node: Tensor) -> Tensor:
        """What diffusers' schedulers list in `sigmas`: sigma/alpha (vp) or the flow's sigma, reversed if inverted."""
        raise NotImplementedError

    def node_at(self, level: Tensor) -> Tensor:
        """The inverse of `level`."""
        raise NotImplementedError

    def transition(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (A_i, B_i), each (N,), of the N steps between N+1 nodes with these alphas and sigmas."""
        raise NotImplementedError

    def quantity_weights(self, alpha: Scalar, sigma: Scalar, prediction: str) -> tuple[Scalar, Scalar]:
        """(p, q) with d = p x + q output: the model quantity from the network's output at state x."""
        raise NotImplementedError

    def denoised_weights(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        """(p, q) with data = p x + q d: the data that quantity d at state x predicts."""
        raise NotImplementedError

    def lambdas(self, node: Tensor) -> Tensor:
        """log(alpha / sigma), half the log-SNR; infinite where there is no noise."""
        alpha, sigma = self.alpha_sigma(node)
        return torch.log(alpha) - torch.log(sigma)

    def angle(self, node: Tensor) -> Tensor:
        """arctan(sigma / alpha): a coordinate in which trajectories are smooth at both ends of either path."""
        alpha, sigma = self.alpha_sigma(node)
        return torch.atan2(sigma, alpha)

    def node_of_angle(self, angle: Tensor) -> Tensor:
        """The inverse of `angle`, clamped to the path."""
        return self.node_at(torch.tan(angle))


@dataclass(frozen=True)
class FlowPath(Path):
    """Rectified flow. Source: Liu et al., arXiv 2209.03003; signs and times as diffusers' FlowMatch schedulers."""

    num_train_timesteps: int = 1000
    inverted: bool = False  # `invert_sigmas` of diffusers: times rise with 1 - sigma, velocity = data - noise (Mochi)

    def alpha_sigma(self, node: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - node, node

    def timestep(self, node: Tensor) -> Tensor:
        return Path.timestep(self, 1 - node if self.inverted else node)

    def node(self, timestep: Tensor) -> Tensor:
        node = Path.node(self, timestep)
        return 1 - node if self.inverted else node

    def level(self, node: Tensor) -> Tensor:
        return 1 - node if self.inverted else node

    def node_at(self, level: Tensor) -> Tensor:
        return self.level(level)

    def node_of_angle(self, angle: Tensor) -> Tensor:
        return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))

    def transition(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma[1:]), sigma[1:] - sigma[:-1]

    def quantity_weights(self, alpha: Scalar, sigma: Scalar, prediction: str) -> tuple[Scalar, Scalar]:
        if prediction != "flow_prediction":
            raise ValueError(f"prediction_type {prediction!r} on a flow path; flow models give 'flow_prediction'")
        return 0.0, -1.0 if self.inverted else 1.0

    def denoised_weights(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        return 1.0, -sigma


@dataclass(frozen=True)
class VPPath(Path):
    """DDPM with discrete betas, at fractional times: log(sigma/alpha) is interpolated linearly between timesteps, and
    sigma/alpha runs linearly to 0 below timestep 0.

    Args:
        betas: T numbers in (0, 1), one per timestep 0..T-1 (`make_betas`).
    """

    betas: tuple[float, ...]
    log_ratio: Tensor = field(init=False, repr=False, compare=False)  # log(sigma/alpha) at nodes 1/T, 2/T .. 1

    def __post_init__(self) -> None:
        alphas_cumprod = torch.cumprod(1 - torch.tensor(self.betas, dtype=torch.float64), 0)
        if alphas_cumprod[-1] == 0:  # zero terminal SNR, and only there: the floor of diffusers' DPMSolver
            alphas_cumprod = alphas_cumprod.clamp(min=2.0**-24)
        object.__setattr__(self, "log_ratio", 0.5 * (torch.log1p(-alphas_cumprod) - torch.log(alphas_cumprod)))

    @property
    def num_train_timesteps(self) -> int:  # type: ignore[override]
        return len(self.betas)

    def timestep(self, node: Tensor) -> Tensor:
        return (node * self.num_train_timesteps - 1).clamp(min=0)

    def node(self, timestep: Tensor) -> Tensor:
        return ((timestep.double() + 1) / self.num_train_timesteps).clamp(0, 1)

    def alpha_sigma(self, node: Tensor) -> tuple[Tensor, Tensor]:
        k = (node * self.num_train_timesteps - 1).clamp(0, self.num_train_timesteps - 1)
        low = k.detach().floor().long().clamp(max=max(self.num_train_timesteps - 2, 0))
        high = (low + 1).clamp(max=self.num_train_timesteps - 1)
        log_ratio = self.log_ratio[low] + (k - low) * (self.log_ratio[high] - self.log_ratio[low])
        ratio = torch.exp(log_ratio) * (node * self.num_train_timesteps).clamp(max=1)
        alpha = torch.rsqrt(1 + ratio * ratio)
        return alpha, ratio * alpha

    def level(self, node: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(node)
        return sigma / alpha

    def node_at(self, level: Tensor) -> Tensor:
        """Exact between timesteps too; levels above the path's own are put at its first node."""
        log_level = torch.log(level)
        high = torch.searchsorted(self.log_ratio, log_level).clamp(1, self.num_train_timesteps - 1)
        low_ratio, high_ratio = self.log_ratio[high - 1], self.log_ratio[high]
        k = high - 1 + (log_level - low_ratio) / (high_ratio - low_ratio).clamp(min=1e-12)
        below = level / torch.exp(self.log_ratio[0])  # linear, below timestep 0
        return (torch.where(below < 1, below, k + 1) / self.num_train_timesteps).clamp(0, 1)

    def transition(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a = sigma[1:] / sigma[:-1]
        return a, alpha[1:] - a * alpha[:-1]

    def quantity_weights(self, alpha: Scalar, sigma: Scalar, prediction: str) -> tuple[Scalar, Scalar]:
        if prediction == "epsilon":
            return 1 / alpha, -sigma / alpha
        if prediction == "v_prediction":
            return alpha, -sigma
        if prediction == "sample":
            return 0.0, 1.0
        raise ValueError(f"prediction_type {prediction!r} on a vp path; known there: {', '.join(PREDICTION_TYPES[:3])}")

    def denoised_weights(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        return 0.0, 1.0


@dataclass(frozen=True)
class ContinuousVPPath(VPPath):
    """The continuous VP formula with which the published DiT tables were searched.

    node = t, the network is fed t T, alpha = exp(-t^2 (b1 - b0)/4 - t b0/2) with b = T beta. t starts at 0.999 and is
    clamped to [0.001, 1].

    Source: Song et al., arXiv 2011.13456, Eq. (32); paper Sec. 6 and its official release.
    """

    first_node = 0.999

    def timestep(self, node: Tensor) -> Tensor:
        return Path.timestep(self, node)

    def node(self, timestep: Tensor) -> Tensor:
        return Path.node(self, timestep)

    def node_at(self, level: Tensor) -> Tensor:
        """The positive root of t^2 (b1 - b0)/4 + t b0/2 = log(1 + level^2)/2."""
        b0, b1 = self.betas[0] * self.num_train_timesteps, self.betas[-1] * self.num_train_timesteps
        c = 0.5 * torch.log1p(level * level)
        t = 2 * c / (0.5 * b0 + torch.sqrt(0.25 * b0 * b0 + (b1 - b0) * c))
        return torch.where(level > 0, t, 0.0).clamp(0, 1)

    def alpha_sigma(self, node: Tensor) -> tuple[Tensor, Tensor]:
        t = node.clamp(0.001, 1)
        b0, b1 = self.betas[0] * self.num_train_timesteps, self.betas[-1] * self.num_train_timesteps
        log_alpha = -0.25 * t * t * (b1 - b0) - 0.5 * t * b0
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))


def make_betas(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    trained_betas: Sequence[float] | None,
    rescale_betas_zero_snr: bool,
    snr_shift_scale: float = 1.0,
) -> tuple[float, ...]:
    """The T betas that diffusers' schedulers make from the same keys, or `trained_betas`, of any number.

    Sources: Ho et al., arXiv 2006.11239 (linear); Rombach et al., arXiv 2112.10752 (scaled_linear); Nichol and
    Dhariwal, arXiv 2102.09672 (squaredcos_cap_v2); Lin et al., arXiv 2305.08891, Alg. 1 (zero terminal SNR); Yang et
    al., arXiv 2408.06072 (snr_shift_scale: the SNR is divided by it).

    Raises:
        ValueError: naming the key, its value and what is accepted.
    """
    if trained_betas is not None:
        betas = torch.tensor([_number("trained_betas", b) for b in trained_betas], dtype=torch.float64)
    elif beta_schedule == "linear":
        betas = torch.linspace(
            _number("beta_start", beta_start), _number("beta_end", beta_end), num_train_timesteps, dtype=torch.float64
        )
    elif beta_schedule == "scaled_linear":
        ends = [math.sqrt(max(_number(k, v), 0)) for k, v in (("beta_start", beta_start), ("beta_end", beta_end))]
        betas = torch.linspace(ends[0], ends[1], num_train_timesteps, dtype=torch.float64) ** 2
    elif beta_schedule == "squaredcos_cap_v2":
        t = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(
            f"beta_schedule is {beta_schedule!r}; known: {', '.join(BETA_SCHEDULES)}, or give trained_betas"
        )
    inside = (betas > 0) & (betas < 1)
    if trained_betas is not None:
        inside[-1] |= betas[-1] == 1  # zero terminal SNR
    if not inside.all():
        keys = "beta_start and beta_end" if trained_betas is None else "trained_betas"
        raise ValueError(
            f"{keys} give betas from {betas.min():.4g} to {betas.max():.4g}; every beta must lie between 0 and 1"
        )
    if rescale_betas_zero_snr or snr_shift_scale != 1:
        bar = torch.cumprod(1 - betas, 0)
        bar = bar / (snr_shift_scale + (1 - snr_shift_scale) * bar)
        if rescale_betas_zero_snr:
            root = bar.sqrt()
            bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
    return tuple(betas.tolist())


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        raise ValueError(f"{key} is {value!r}; it must be a finite number")
    return float(value)
