"""The noise schedule as training scripts and image-to-image pipelines use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .paths import Path, VPPath, as_float64


class NoiseSchedule:
    """Noising at any time, and the tables of vp models.

    Attributes:
        config: with `trained_betas`.
    """

    config: Any
    _path: Path

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | float | Tensor) -> Tensor:
        """alpha x + sigma noise at the given times (one, or one per sample), on or off the schedule; shapes (B, ..)."""
        times = as_float64(timesteps).reshape(-1)
        factors = self._path.alpha_sigma(self._path.node(times))
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        alpha, sigma = (
            f.to(dtype).to(original_samples.device).reshape(-1, *[1] * (original_samples.ndim - 1)) for f in factors
        )
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: int | float | Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of the flow pipelines."""
        return self.add_noise(sample, noise, timestep)

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

    def _vp_path(self, name: str) -> VPPath:
        if not isinstance(self._path, VPPath):
            raise AttributeError(f"'{type(self).__name__}' object of a flow model has no attribute '{name}'")
        return self._path
