"""The noise schedule as training scripts and image-to-image pipelines use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .paths import FlowPath, Path, Scalar, VPPath, as_float64


class NoiseSchedule:
    """Noising at any time, and the tables of vp models.

    Attributes:
        config: with `trained_betas`.
    """

    config: Any
    timesteps: Tensor
    _path: Path
    _alphas: Sequence[Scalar]
    _sigmas: Sequence[Scalar]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | float | Tensor) -> Tensor:
        """alpha x + sigma noise, shapes (B, ...), at the given times: one, or one per sample.

        At an element of the current schedule alpha and sigma are those of its node, whatever time the network is fed
        there; at any other time those of the path.
        """
        alpha, sigma = self._levels_for(original_samples, timesteps)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: int | float | Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of the flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | float | Tensor) -> Tensor:
        """What a network of "v_prediction" (vp) or "flow_prediction" learns, for data `sample`; shapes (B, ...)."""
        if isinstance(self._path, FlowPath):
            return sample - noise if self._path.inverted else noise - sample
        alpha, sigma = self._levels_for(sample, timesteps)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    @property
    def betas(self) -> Tensor:
        """(T,) float32, of vp models only, or `trained_betas`."""
        given = self.config.trained_betas
        return torch.tensor(given or self._vp_path("betas").betas, dtype=torch.float32)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32, of vp models only."""
        path = self._vp_path("alphas_cumprod")
        alpha, _ = path.alpha_sigma(path.node(torch.arange(path.num_train_timesteps)))
        return alpha.square().to(torch.float32)

    def _levels_for(self, samples: Tensor, timesteps: int | float | Tensor) -> list[Tensor]:
        """alpha and sigma at the given times, to be broadcast over samples (B, ...), at least float32."""
        times = as_float64(timesteps).reshape(-1)
        known = self.timesteps.detach().cpu()
        if isinstance(timesteps, Tensor) and timesteps.is_floating_point():
            known = known.to(timesteps.dtype)  # pipelines round times to the dtype of the network
        found = times[:, None] == known.double()
        at, index = found.any(1), found.int().argmax(1)
        dtype = torch.promote_types(samples.dtype, torch.float32)
        levels = []
        off = self._path.alpha_sigma(self._path.node(times))
        for own, level in zip((self._alphas, self._sigmas), off, strict=True):
            level = torch.where(at, torch.tensor([float(v) for v in own], dtype=torch.float64)[index], level)
            levels.append(level.to(dtype).to(samples.device).reshape(-1, *[1] * (samples.ndim - 1)))
        return levels

    def _vp_path(self, name: str) -> VPPath:
        if not isinstance(self._path, VPPath):
            raise AttributeError(f"'{type(self).__name__}' object of a flow model has no attribute '{name}'")
        return self._path
