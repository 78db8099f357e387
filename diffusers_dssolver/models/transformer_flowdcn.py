"""FlowDCN: class-conditional images by deformable convolution (Wang et al., NeurIPS 2024, arXiv 2410.22655).

The model that the paper's solvers were searched on. Each block is DiT's, with attention replaced by a sum over K points
that every token p chooses for each of G groups of channels. All operations act per token or on those points: time and
memory are linear in the number of tokens, and as there is no positional embedding, any resolution goes.

    s_k(p) = 6 sigmoid((W_s x_p)_k + s_g)                  reach in tokens; s_g spreads the scales of the groups
    o_k(p) = ((W_o x_p + b_o)_k + prior_k) s_k(p)          the prior is the 3 x 3 grid of [-1, 1]^2
    out(p) = sum_k (W_w x_p + b_w)_k v(p + o_k(p))         bilinear, weights without softmax

Conventions are diffusers': the model is fed 1000 sigma (1000 noise, 0 data) and answers noise - data. The authors' code
(github.com/MCG-NJU/FlowDCN) runs t from 0 (noise) to 1 (data) with the opposite velocity; t = 1 - timestep / 1000 is
formed here, the sign is in the weights (`python -m dssolver_search convert`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

FREQUENCIES = 128
MAX_PERIOD = 10000.0
MAX_REACH = 6.0  # tokens


def aggregate(values: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of `values` at K points around each token, bilinear between the four tokens about a point.

    A gather into (tokens, 4 K, channels) is never made: `embedding_bag` sums as it reads, forward and backward.

    The cell of a point is found by rounding towards zero, as the kernels of the authors do: inside the image and past
    its far edges this is bilinear interpolation with zeros outside (`grid_sample`, align_corners=True), but up to two
    tokens before the near edges a line through v_0 and v_1 for x in (-1, 0), and (1 + x) v_0 for x in (-2, -1). The
    released weights were trained with that.

    Args:
        values: shape (B, H, W, G, C).
        offsets: x, y from the token, in tokens, shape (B, H, W, G, K, 2).
        weights: shape (B, H, W, G, K).

    Returns:
        Shape (B, H, W, G, C).
    """
    batch, height, width, groups, channels = values.shape

    def steps(length: int, dim: int) -> Tensor:
        shape = [length if i == dim else 1 for i in range(7)]
        return torch.arange(length, dtype=torch.int32, device=values.device).view(shape)

    # half precision has no room for a position and its fraction
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))[..., None, None, :]
    columns, across = _corners(offsets[..., 0] + steps(width, 2), width, -1)  # (B, H, W, G, K, 1, 2)
    rows, down = _corners(offsets[..., 1] + steps(height, 1), height, -2)  # (B, H, W, G, K, 2, 1)
    index = (steps(batch, 0) * height + rows) * (width * groups) + (columns * groups + steps(groups, 3))
    shares = (weights[..., None, None] * down * across).to(values.dtype)
    bags = batch * height * width * groups
    return F.embedding_bag(
        index.reshape(bags, -1),
        values.reshape(bags, channels),
        mode="sum",
        per_sample_weights=shares.reshape(bags, -1),
    ).view(values.shape)


def _corners(x: Tensor, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the two tokens about each x, 0 for those outside, and their shares, 0 for those outside."""
    first = x.detach().trunc()
    tokens = torch.cat([first, first + 1], dim)
    inside = (tokens >= 0) & (tokens < size)
    shares = torch.cat([first + 1 - x, x - first], dim) * inside
    return torch.where(inside, tokens, 0).int(), shares


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x of shape (B, H, W, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


class RMSNorm(nn.RMSNorm):
    """The weight applied apart: under autocast it is float32 and the input is not, which `rms_norm` warns about."""

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape."""
        return F.rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight


class DeformableAggregation(nn.Module):
    """Values, points and weights of each token, and their sum (the paper's MultiScale DCN)."""

    def __init__(self, hidden_size: int, groups: int, points: int):
        super().__init__()
        self.groups, self.points = groups, points
        self.v = nn.Linear(hidden_size, hidden_size)
        self.qk_deformables = nn.Linear(hidden_size, groups * points * 2)
        self.qk_scales = nn.Linear(hidden_size, groups * points, bias=False)
        self.qk_weights = nn.Linear(hidden_size, groups * points)
        self.out = nn.Linear(hidden_size, hidden_size)
        for tensor in (self.qk_deformables.weight, self.qk_deformables.bias, self.qk_scales.weight):
            nn.init.zeros_(tensor)
        for tensor in (self.qk_weights.weight, self.v.bias, self.out.bias):
            nn.init.zeros_(tensor)
        line = torch.linspace(-1, 1, math.isqrt(points))
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
        self.register_buffer("deformables_prior", grid.reshape(1, 1, 1, 1, points, 2))
        reach = torch.arange(1, groups + 1) / groups - 1e-4
        self.deformables_scale = nn.Parameter(reach.logit().view(1, 1, 1, groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x and result of shape (B, H, W, D)."""
        shape = (*x.shape[:3], self.groups, self.points)
        reach = (self.qk_scales(x).view(*shape, 1) + self.deformables_scale).sigmoid() * MAX_REACH
        offsets = (self.qk_deformables(x).view(*shape, 2) + self.deformables_prior) * reach
        values = self.v(x).view(*shape[:4], -1)
        return self.out(aggregate(values, offsets, self.qk_weights(x).view(shape)).flatten(3))


class SwiGLU(nn.Module):
    """Gated feed-forward of width `inner_size`, without biases."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, inner_size, bias=False)
        self.w2 = nn.Linear(inner_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, inner_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FlowDCNBlock(nn.Module):
    """A block of DiT (adaLN, gated residuals) with `DeformableAggregation` for attention."""

    def __init__(self, hidden_size: int, groups: int, points: int, inner_size: int):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size, eps=1e-6)
        self.attn = DeformableAggregation(hidden_size, groups, points)
        self.norm2 = RMSNorm(hidden_size, eps=1e-6)
        self.mlp = SwiGLU(hidden_size, inner_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x of shape (B, H, W, D), condition (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Patches of the output from tokens."""

    def __init__(self, hidden_size: int, patch_values: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, patch_values)
        for tensor in (*self.adaLN_modulation[1].parameters(), *self.linear.parameters()):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x of shape (B, H, W, D), condition (B, D)."""
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(condition).chunk(2, dim=1)))


class FlowDCNTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both name config_name
    """FlowDCN, to be used as `DiTTransformer2DModel` is, by `SiTPipeline` among others.

    Official sizes, patch 2 (hidden_size, num_layers, num_groups): S 384, 12, 6; B 768, 12, 12; L 1024, 24, 16;
    XL 1152, 28, 16.

    Args:
        sample_size: side of the latents that a pipeline draws (32: 256 pixels); the model itself takes any.
        patch_size: side of a token.
        in_channels: channels of the input.
        out_channels: channels of the output; None: in_channels.
        hidden_size: width D of a token, a multiple of num_groups.
        num_layers: blocks.
        num_groups: groups G of channels with points of their own.
        num_points: points K of a group, a square.
        inner_size: width of the feed-forward; None: 8 D / 3 rounded down.
        num_embeds_ada_norm: classes, and the id of the null class.

    Raises:
        ValueError: hidden_size is no multiple of num_groups, or num_points no square.
    """

    _supports_gradient_checkpointing = True
    # Any: diffusers declares None
    _no_split_modules: Any = ["FlowDCNBlock"]
    _skip_layerwise_casting_patterns: Any = ["norm"]
    _gradient_checkpointing_func: Any

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_groups: int = 12,
        num_points: int = 9,
        inner_size: int | None = None,
        num_embeds_ada_norm: int = 1000,
    ):
        super().__init__()
        if hidden_size % num_groups:
            raise ValueError(f"hidden_size is {hidden_size}; it must be a multiple of num_groups, {num_groups}.")
        if math.isqrt(num_points) ** 2 != num_points:
            raise ValueError(f"num_points is {num_points}; it must be a square, as 9 is.")
        self.gradient_checkpointing = False
        self.out_channels = out_channels or in_channels
        inner_size = inner_size or 8 * hidden_size // 3
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        first, last = nn.Linear(2 * FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.t_embedder = nn.Sequential(first, nn.SiLU(), last)
        self.y_embedder = nn.Embedding(num_embeds_ada_norm + 1, hidden_size)
        self.blocks = nn.ModuleList(
            FlowDCNBlock(hidden_size, num_groups, num_points, inner_size) for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        nn.init.xavier_uniform_(self.x_embedder.weight.view(hidden_size, -1))
        nn.init.zeros_(self.x_embedder.bias)  # type: ignore[arg-type]
        for weight in (self.y_embedder.weight, first.weight, last.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """What the model says of `hidden_states`: noise - data.

        Args:
            hidden_states: shape (B, in_channels, H, W), H and W multiples of patch_size, otherwise any.
            timestep: 1000 sigma, shape (B,) or one for all.
            class_labels: class ids, num_embeds_ada_norm for none, shape (B,).
            return_dict: False returns a tuple of one element.

        Returns:
            `sample` of shape (B, out_channels, H, W).

        Raises:
            ValueError: H or W is no multiple of patch_size.
        """
        batch, _, height, width = hidden_states.shape
        patch = self.config["patch_size"]
        if height % patch or width % patch:
            raise ValueError(f"hidden_states are {height} x {width}; both must be multiples of patch_size, {patch}.")
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)
        condition = self.t_embedder(_sinusoids(timestep).to(hidden_states.dtype))
        condition = condition + self.y_embedder(class_labels)
        x = self.x_embedder(hidden_states).permute(0, 2, 3, 1)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, condition)
            else:
                x = block(x, condition)
        x = self.final_layer(x, condition).unflatten(3, (patch, patch, self.out_channels))
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def _sinusoids(timestep: Tensor) -> Tensor:
    """cos and sin of the authors' t (0 noise, 1 data) times falling frequencies, shape (B, 256), float32 or better."""
    dtype = torch.promote_types(timestep.dtype, torch.float32)
    exponents = torch.arange(FREQUENCIES, dtype=dtype, device=timestep.device) / FREQUENCIES
    time = 1 - timestep.to(dtype) / 1000
    angles = time[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# Saved pipelines record this name; loading them then looks in the package, not in a file that may move.
FlowDCNTransformer2DModel.__module__ = __name__.partition(".")[0]
