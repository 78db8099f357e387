"""The exact network of a kernel density: data are pictures with Gaussian noise of standard deviation h around them. Its
denoiser is a softmax over the pictures, so that it has no training error at any level of noise.
"""

from __future__ import annotations

import io

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from diffusers_dssolver.paths import FlowPath, VPPath, make_betas
from diffusers_dssolver.pipelines import SiTPipeline

BANDWIDTH = 0.25


class KernelDensity(ModelMixin, ConfigMixin):
    """The network of `count` pictures, the class of picture k being k modulo the number of classes; the label after
    them is that of no class. Predicts velocity on flow paths, noise on vp paths.

    Args:
        kind: "flow" or "vp".
        bandwidth: h.
    """

    @register_to_config
    def __init__(
        self,
        kind: str = "flow",
        count: int = 30,
        in_channels: int = 3,
        sample_size: int = 4,
        num_embeds_ada_norm: int = 3,
        bandwidth: float = BANDWIDTH,
    ) -> None:
        super().__init__()
        self.pictures = torch.nn.Parameter(torch.zeros(count, in_channels * sample_size**2))
        self.path = FlowPath() if kind == "flow" else VPPath(make_betas(1000, 1e-4, 0.02, "linear", None, False))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        node = self.path.node(torch.as_tensor(timestep).flatten())
        alpha, sigma = (f.to(x.dtype).reshape(-1, 1) for f in self.path.alpha_sigma(node))
        state, classes = x.flatten(1), self.config.num_embeds_ada_norm
        variance = (alpha * self.config.bandwidth) ** 2 + sigma**2
        distances = (alpha * self.pictures.norm(dim=1)) ** 2 - 2 * alpha * (state @ self.pictures.T)
        label, of = class_labels[:, None], torch.arange(len(self.pictures), device=x.device) % classes
        others = (label != of) & (label != classes)
        weights = torch.softmax((-distances / (2 * variance)).masked_fill(others, -torch.inf), dim=1)
        kept = alpha * self.config.bandwidth**2 / variance
        denoised = kept * state + (1 - alpha * kept) * (weights @ self.pictures)
        return (((state - (1 if self.config.kind == "flow" else alpha) * denoised) / sigma).view_as(x),)


def pipeline_of(pictures: Tensor, kind: str, classes: int) -> SiTPipeline:
    """A pipeline for pictures (n, channels, size, size) in [-1, 1]."""
    count, channels, size, _ = pictures.shape
    network = KernelDensity(kind, count, channels, size, classes)
    network.pictures.data.copy_(pictures.flatten(1))
    scheduler = FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDIMScheduler()
    pipe = SiTPipeline(network.eval().requires_grad_(False), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def synthetic(count: int = 30, size: int = 4, seed: int = 0) -> Tensor:
    """Smooth random pictures (count, 3, size, size)."""
    coarse = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=True))


def from_parquet(file: str, count: int = 1500, size: int = 16, column: str = "img", classes: int = 10) -> Tensor:
    """The first pictures of a data set, scaled down; as many of each class, in turn."""
    import pandas as pd
    from PIL import Image

    frame = pd.read_parquet(file)
    labels = frame[next(c for c in frame.columns if "label" in c)]
    groups = [frame[labels == k][column].iloc[: count // classes] for k in range(classes)]
    found = []
    for row in zip(*groups, strict=True):
        for entry in row:
            picture = Image.open(io.BytesIO(entry["bytes"])).convert("RGB").resize((size, size), Image.Resampling.BOX)
            found.append(torch.tensor(list(picture.tobytes())).view(size, size, 3).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(found)
