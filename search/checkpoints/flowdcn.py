"""Checkpoints of the authors' FlowDCN (github.com/MCG-NJU/FlowDCN, arXiv 2410.22655) as a `FlowDCNTransformer2DModel`.

Names of weights are theirs but for three that lose a level. Their network predicts data - noise: the last layer changes
its sign. The second half of its outputs ("learned sigma"), which their forward cuts off untrained, is left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_dssolver.models import FlowDCNTransformer2DModel

from .weights import check_keys, weights

WHAT = "the FlowDCN checkpoint"
OWN_NAMES = {
    "x_embedder.proj.": "x_embedder.",
    "t_embedder.mlp.": "t_embedder.",
    "y_embedder.embedding_table.": "y_embedder.",
}
LAST = "final_layer.linear"


def flowdcn(held: Mapping[str, Any], **sizes: int) -> tuple[FlowDCNTransformer2DModel, SchedulerMixin]:
    """The network and the flow scheduler of an official checkpoint; `sizes` as in `convert_flowdcn`."""
    return convert_flowdcn(denoiser_weights(held), **sizes), FlowMatchEulerDiscreteScheduler()


def denoiser_weights(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's weights by their official names, averaged ones where there are any.

    Args:
        raw: a state dict, or a checkpoint of their Lightning code. Its "state_dict" has the prefix "denoiser." before
            the network's keys, and in later code "ema_denoiser." before those of the averages. In earlier code
            "optimizer_states" has the averages as a list, in the order of the state dict.

    Raises:
        ValueError: it holds no network, or averages of other shapes.
    """
    if "state_dict" not in raw:
        return dict(raw)
    held = raw["state_dict"] if isinstance(raw["state_dict"], Mapping) else {}
    for prefix in ("ema_denoiser.", "denoiser."):
        state = {str(k).removeprefix(prefix): v for k, v in held.items() if str(k).startswith(prefix)}
        if state:
            break
    else:
        raise ValueError(f"{WHAT} has no key that starts with 'denoiser.' in its state_dict; give the network's own")
    optimizers = raw.get("optimizer_states")
    optimizer = optimizers[0] if isinstance(optimizers, list) and optimizers else {}
    if prefix == "ema_denoiser." or "ema" not in optimizer:
        return state
    averages = list(optimizer["ema"])
    if [getattr(v, "shape", None) for v in averages] != [getattr(v, "shape", None) for v in state.values()]:
        raise ValueError(f"{WHAT} has averaged weights of other shapes than its weights; give a state dict of either")
    return dict(zip(state, averages, strict=True))


def convert_flowdcn(state: Mapping[str, Tensor], sample_size: int = 32) -> FlowDCNTransformer2DModel:
    """The model with official weights; their shapes tell all sizes but one.

    Args:
        state: see `denoiser_weights`.
        sample_size: default side of the latents to draw: 32 for 256 pixels, 64 for 512.

    Raises:
        ValueError: keys or shapes are not those of the official network, or weights are no finite floats.
    """
    depth = sum(str(key).endswith(".norm1.weight") for key in state)
    with init_empty_weights():
        named = FlowDCNTransformer2DModel(num_layers=max(depth, 1), hidden_size=1, num_groups=1, num_points=1)
    official = {_official(key): key for key in named.state_dict()}
    check_keys(state, official, WHAT)
    state = weights(state, WHAT)

    def size(key: str, dim: int) -> int:
        return (*state[key].shape, *[0] * 6)[dim] if state[key].numel() else 0

    patch, channels = size("x_embedder.proj.weight", 2), size("x_embedder.proj.weight", 1)
    outputs = size(f"{LAST}.weight", 0) // max(patch, 1) ** 2
    if channels == 0 or outputs not in (channels, 2 * channels):
        raise ValueError(f"{WHAT} has {channels} channels in and {outputs} out; it must be as many, or twice as many")
    sizes = {
        "patch_size": patch, "in_channels": channels, "out_channels": outputs, "num_layers": depth,
        "hidden_size": size("x_embedder.proj.weight", 0), "inner_size": size("blocks.0.mlp.w1.weight", 0),
        "num_groups": size("blocks.0.attn.deformables_scale", 3), "sample_size": sample_size,
        "num_points": size("blocks.0.attn.deformables_prior", 4),
        "num_embeds_ada_norm": size("y_embedder.embedding_table.weight", 0) - 1,
    }  # fmt: skip
    if empty := [name for name, value in sizes.items() if value < 1]:
        raise ValueError(f"{WHAT} has {empty[0]} {sizes[empty[0]]}; give one of the official network")
    with init_empty_weights():
        wanted = FlowDCNTransformer2DModel(**sizes).state_dict()
        model = FlowDCNTransformer2DModel(**{**sizes, "out_channels": channels})
    for key, name in official.items():
        if state[key].shape != wanted[name].shape:
            found, right = tuple(state[key].shape), tuple(wanted[name].shape)
            raise ValueError(f"{WHAT} has {key} of shape {found}; a network of this kind has {right}")
    for key in (f"{LAST}.weight", f"{LAST}.bias"):  # rows: patch x patch x outputs, outputs innermost
        kept = state[key].unflatten(0, (-1, outputs))[:, :channels]
        state[key] = -kept.flatten(0, 1)
    model.load_state_dict({name: state[key] for key, name in official.items()}, assign=True)
    return model.eval()


def _official(name: str) -> str:
    """Official name of a key of `FlowDCNTransformer2DModel`."""
    for theirs, ours in OWN_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
