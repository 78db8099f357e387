"""The noise schedule as training scripts and image-to-image pipelines use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .derive import warp
from .paths import FlowPath, Scalar, VPPath, as_float64
from .writing import WritableSchedule


class NoiseSchedule(WritableSchedule):
    """Noising at any time, and the tables of vp models."""

    _moved: dict[str, Tensor]  # tables of the noise schedule that were moved or cast
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
        """(T,) float32, of vp models only, or `trained_betas`. May be moved, or replaced by another noise schedule."""
        given = self.config.trained_betas
        return self._table("betas", lambda: torch.tensor(given or self._vp_path("betas").betas))

    @betas.setter
    def betas(self, value: Tensor) -> None:
        self._write_table("betas", value, as_float64(value))

    @property
    def alphas(self) -> Tensor:
        """(T,) float32: 1 - beta, of vp models only."""
        return self._table("alphas", lambda: 1 - torch.tensor(self._vp_path("alphas").betas))

    @alphas.setter
    def alphas(self, value: Tensor) -> None:
        self._write_table("alphas", value, 1 - as_float64(value))

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32: alpha^2 at every timestep, of vp models only. May be moved or replaced, as `betas`."""

        def squares() -> Tensor:
            path = self._vp_path("alphas_cumprod")
            alpha, _ = path.alpha_sigma(path.node(torch.arange(path.num_train_timesteps)))
            return alpha.square()

        return self._table("alphas_cumprod", squares)

    @alphas_cumprod.setter
    def alphas_cumprod(self, value: Tensor) -> None:
        bar = as_float64(value)
        self._write_table("alphas_cumprod", value, 1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]]))

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """alpha^2 where the last step of a vp model ends: 1, the data."""
        self._vp_path("final_alpha_cumprod")
        return torch.tensor(1.0)

    @property
    def sigma_max(self) -> float:
        """The highest noise level of the training schedule, after a static shift (flow), or sigma/alpha (vp)."""
        return self._training_level(1.0)

    @property
    def sigma_min(self) -> float:
        """The lowest noise level of the training schedule, as `sigma_max`."""
        return self._training_level(1 / self._path.num_train_timesteps)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of the nearest entry of `schedule_timesteps`, by default of the current schedule."""
        known = as_float64(self.timesteps if schedule_timesteps is None else schedule_timesteps)
        return int((known - as_float64(timestep).reshape(-1)[0]).abs().argmin())

    def previous_timestep(self, timestep: float | Tensor) -> Tensor:
        """The entry of the current schedule after the one nearest to `timestep`; -1 after the last, as in DDPM."""
        index = self.index_for_timestep(timestep) + 1
        return self.timesteps[index] if index < len(self.timesteps) else torch.tensor(-1)

    def _init_step_index(self, timestep: float | Tensor) -> None:
        """Start the run at the announced index, else at `timestep` (DemoFusion)."""
        begin = self._begin_index
        self._step_index = self.index_for_timestep(timestep) if begin is None else begin

    def _sigma_to_t(self, sigma: float | Tensor, log_sigmas: object = None) -> Tensor:
        """The network's time at entries of `sigmas`, float32 of the same shape."""
        return self._path.timestep(self._path.node_at(as_float64(sigma))).to(torch.float32)

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at an entry of `sigmas`."""
        alpha, level = self._path.alpha_sigma(self._path.node_at(as_float64(sigma)))
        return alpha.to(torch.float32), level.to(torch.float32)

    def _training_level(self, node: float) -> float:
        factor = self.config.shift if isinstance(self._path, FlowPath) and not self.config.use_dynamic_shifting else 1.0
        return self._path.level(torch.tensor(warp(node, factor), dtype=torch.float64)).item()

    def _levels_for(self, samples: Tensor, timesteps: int | float | Tensor) -> list[Tensor]:
        """alpha and sigma at the given times, to be broadcast over samples (B, ...), at least float32."""
        self._follow()
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
            at_nodes = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in own])  # keeps a search's graph
            level = torch.where(at, at_nodes[index], level)
            levels.append(level.to(dtype).to(samples.device).reshape(-1, *[1] * (samples.ndim - 1)))
        return levels

    def _table(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A table of the noise schedule, where it was moved to."""
        return self._moved[name] if name in self._moved else compute().to(torch.float32)

    def _write_table(self, name: str, value: Tensor, betas: Tensor) -> None:
        """Keep a table that was only moved or cast; with any other the noise schedule changes, and the run ends."""
        known = getattr(self, name)
        if known.shape == value.shape and torch.equal(known.cpu().to(value.dtype), value.cpu()):
            self._moved[name] = value
            return
        self.register_to_config(trained_betas=betas.tolist())
        self._reset()

    def _reset(self) -> None:
        raise NotImplementedError

    def _vp_path(self, name: str) -> VPPath:
        if not isinstance(self._path, VPPath):
            raise AttributeError(f"'{type(self).__name__}' object of a flow model has no attribute '{name}'")
        return self._path
