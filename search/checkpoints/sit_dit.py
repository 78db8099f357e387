"""Official checkpoints of SiT and DiT as diffusers' models.

SiT (github.com/willisma/SiT, arXiv 2401.08740) runs a time t from 0 (noise) to 1 (data) and predicts data - noise;
diffusers feeds 1000 sigma, sigma = 1 - t, and wants noise - data. Both are put into the weights of a plain
`DiTTransformer2DModel`: the velocity half of the last layer changes its sign, and the first layer of the time
embedding takes in the linear map from diffusers' sines and cosines to SiT's (`time_map`).

DiT (github.com/facebookresearch/DiT, arXiv 2212.09748) becomes an `OfficialDiTTransformer2DModel`: diffusers' own class
has other frequencies than the network was trained with, and no weights can mend that over 1000 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_dssolver import OfficialDiTTransformer2DModel

from .weights import check_keys, weights

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # number of heads by width: the official sizes S, B, L, XL
FREQUENCIES = 128  # of the sines and cosines in the time embedding
TIME = "t_embedder.mlp.0"
# Names in `DiTTransformer2DModel` by official name: in a block, in the embeddings of each block, outside of blocks.
OWN_NAMES = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
SHARED_NAMES = {TIME: "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
OUTER_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
CLASSES = "y_embedder.embedding_table.weight"
State = Mapping[str, Tensor]


def official_shapes(
    width: int, channels: int, patch: int, tokens: int, rows: int, labels: int, depth: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of the official DiT and SiT classes (`models.py` of either repository).

    Args:
        rows: outputs of the last layer for each token, patch^2 * output channels.
        labels: class embeddings, the null class included.
    """
    layers = {
        "x_embedder.proj": (width, channels, patch, patch),
        TIME: (width, 2 * FREQUENCIES), "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (rows, width), "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    for i in range(depth):
        layers |= {
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width), f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width), f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
        }  # fmt: skip
    shapes = {f"{name}.{kind}": shape[:n] for name, shape in layers.items() for kind, n in (("weight", 4), ("bias", 1))}
    return {**shapes, "pos_embed": (1, tokens, width), CLASSES: (labels, width)}


def architecture(state: State, what: str, num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of a `DiTTransformer2DModel` with these official weights, read off their shapes.

    Raises:
        ValueError: other keys or shapes than the official classes have, or a width of no official size without
            `num_heads`.
    """
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    check_keys(state, official_shapes(0, 0, 0, 0, 0, 0, max(depth, 1)), what)
    shape = {key: tuple(tensor.shape) for key, tensor in state.items()}
    first, place, last = shape["x_embedder.proj.weight"], shape["pos_embed"], shape["final_layer.linear.weight"]
    width, channels, patch = (*first, 0, 0, 0)[:3]
    tokens, rows = (*place, 0, 0)[1], (*last, 0)[0]
    wanted = official_shapes(width, channels, patch, tokens, rows, (*shape[CLASSES], 0)[0], depth)
    for key, size in wanted.items():
        if shape[key] != size or 0 in size:
            raise ValueError(f"{what} has {key} of shape {shape[key]}, which does not fit its other weights")
    grid, outputs = math.isqrt(tokens), rows // patch**2
    if grid**2 != tokens:
        raise ValueError(f"{what} has {tokens} positions, which fill no square")
    if rows != outputs * patch**2 or outputs not in (channels, 2 * channels):
        raise ValueError(f"{what} gives {rows} numbers for each patch of {patch}x{patch}x{channels}; once or twice it")
    heads = num_heads or HEADS.get(width)
    if heads is None:
        raise ValueError(f"{what} has width {width}, which is no official size; give its --num_heads")
    if width % heads:
        raise ValueError(f"num_heads is {heads}; it must divide the width {width} of {what}")
    return {
        "num_attention_heads": heads, "attention_head_dim": width // heads, "num_layers": depth,
        "in_channels": channels, "out_channels": outputs, "patch_size": patch, "sample_size": grid * patch,
        "num_embeds_ada_norm": shape[CLASSES][0] - 1, "norm_eps": 1e-6,
    }  # fmt: skip


def diffusers_state(state: State) -> dict[str, Tensor]:
    """Official weights by their names in `DiTTransformer2DModel`, each block with time and class embeddings of its own:
    copies of the one pair that the official blocks share."""
    renamed = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        block, _, layer = name.removeprefix("blocks.").partition(".")
        if name in OUTER_NAMES:
            renamed[f"{OUTER_NAMES[name]}.{kind}"] = tensor
        elif layer == "attn.qkv":
            for which, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"transformer_blocks.{block}.attn1.to_{which}.{kind}"] = rows.clone()
        elif layer in OWN_NAMES:
            renamed[f"transformer_blocks.{block}.{OWN_NAMES[layer]}.{kind}"] = tensor
            if layer == "attn.proj" and kind == "weight":
                embeddings = f"transformer_blocks.{block}.norm1.emb"
                renamed[f"{embeddings}.class_embedder.embedding_table.weight"] = state[CLASSES].clone()
                for shared, own in SHARED_NAMES.items():
                    for part in ("weight", "bias"):
                        renamed[f"{embeddings}.{own}.{part}"] = state[f"{shared}.{part}"].clone()
    return renamed


def loaded(cls: type[DiTTransformer2DModel], sizes: dict[str, Any], state: State, what: str) -> DiTTransformer2DModel:
    """The network with official weights.

    Raises:
        ValueError: the positions are not the fixed table of sines, the only one that diffusers' class has.
    """
    with init_empty_weights():
        model = cls(**sizes)
    if (model.pos_embed.pos_embed - state["pos_embed"]).abs().max() > 5e-3:  # more than bfloat16 rounds
        raise ValueError(f"{what} has a pos_embed that is not the fixed table of sines; diffusers' class has no other")
    model.load_state_dict(diffusers_state(state), assign=True)
    return model.eval()


# --- SiT --------------------------------------------------------------------------------------------------------------


@cache
def time_map() -> Tensor:
    """M (257, 256), float64, with [diffusers' features of 1000 sigma, 1] @ M = SiT's features of t = 1 - sigma.

    SiT's features cos(f t), sin(f t), f = 10000^(-i/128) <= 1, are all but polynomials on [0, 1], and diffusers', with
    angular frequencies 1000 * 10000^(-i/127), from 0.1 to 1000, span those many times over: least squares with a ridge
    finds M of norm 1.7, and an error of 3e-8 (the rounding of float32 makes it 4e-7).
    """
    sigma = (1 - torch.cos(torch.linspace(0, math.pi, 2001, dtype=torch.float64))) / 2
    features = [
        torch.cat([torch.cos(phase), torch.sin(phase)], dim=1)
        for time, spacing in ((1000 * sigma, FREQUENCIES - 1), (1 - sigma, FREQUENCIES))
        for phase in [time[:, None] * 10000 ** (-torch.arange(FREQUENCIES, dtype=torch.float64) / spacing)]
    ]
    theirs = torch.cat([features[0], torch.ones_like(sigma)[:, None]], dim=1)
    ridge = 1e-12 * len(sigma) * torch.eye(theirs.shape[1], dtype=torch.float64)
    return torch.linalg.solve(theirs.T @ theirs + ridge, theirs.T @ features[1])


def in_diffusers_convention(state: State, channels: int, outputs: int) -> dict[str, Tensor]:
    """SiT's weights for a network that is fed 1000 sigma and predicts noise - data."""
    weight, bias, to_sit = state[f"{TIME}.weight"].double(), state[f"{TIME}.bias"].double(), time_map()
    changed = {f"{TIME}.weight": (weight @ to_sit[:-1].T).float(), f"{TIME}.bias": (bias + weight @ to_sit[-1]).float()}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        velocity = torch.arange(len(state[key])) % outputs < channels  # the others are the learned sigma
        changed[key] = torch.where(velocity.view(-1, *[1] * (state[key].ndim - 1)), -state[key], state[key])
    return {**state, **changed}


def sit(held: Mapping[str, Any], num_heads: int | None = None) -> tuple[ModelMixin, SchedulerMixin]:
    """A `DiTTransformer2DModel` of a flow, from an official SiT checkpoint."""
    what = "the SiT checkpoint"
    for name, only in (("path_type", "Linear"), ("prediction", "velocity")):
        if (given := getattr(held.get("args"), name, only)) != only:
            raise ValueError(f"{what} was trained with {name} {given!r:.60}; only {only} makes the flow of diffusers")
    state = weights(held, what)
    sizes = architecture(state, what, num_heads)
    state = in_diffusers_convention(state, sizes["in_channels"], sizes["out_channels"])
    return loaded(DiTTransformer2DModel, sizes, state, what), FlowMatchEulerDiscreteScheduler()


# --- DiT --------------------------------------------------------------------------------------------------------------


def dit(held: Mapping[str, Any], num_heads: int | None = None) -> tuple[ModelMixin, SchedulerMixin]:
    """An `OfficialDiTTransformer2DModel`, which predicts the noise, from an official DiT checkpoint."""
    what = "the DiT checkpoint"
    state = weights(held, what)
    model = loaded(OfficialDiTTransformer2DModel, architecture(state, what, num_heads), state, what)
    return model, DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
