"""Feature networks that images are compared in, differentiable in the images."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..console import one_line
from ..storage import weights_digest

FACTORY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")


IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


RESAMPLING = {2: "bilinear", 3: "bicubic"}  # as numbered by Pillow


SHORT = 1e-10  # squared length of a feature that is not scaled up to 1


OTHERWISE = "use objective terminal"


@dataclass(frozen=True)
class Preparation:
    """What an image processor does to images in [0, 1], as differentiable torch.

    Attributes:
        size: (H, W), or one number for the shorter side; None: as they are.
        crop: (H, W) cut out of the middle; None: all.
        mode: of the interpolation, with antialiasing.
        mean, std: of each of three channels.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], image_size: Any = None) -> Preparation:
        """From a `preprocessor_config.json`; what it does not say is ImageNet's, and the model's own size.

        Raises:
            ValueError: a size of another form.
        """
        cropped = bool(settings.get("do_center_crop", False))
        size = settings.get("size") or image_size
        wanted = None if size is None or not settings.get("do_resize", True) else _size(size, shorter=cropped)
        crop = settings.get("crop_size", size) if cropped else None
        edges = None if crop is None else _size(crop, shorter=False)
        mean, std = settings.get("image_mean") or IMAGENET_MEAN, settings.get("image_std") or IMAGENET_STD
        if not settings.get("do_normalize", True):
            mean, std = (0.0,), (1.0,)
        mode = RESAMPLING.get(settings.get("resample", 3), "bicubic")
        crop_edges = (edges, edges) if isinstance(edges, int) else edges
        return cls(wanted, crop_edges, mode, tuple(mean), tuple(std))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> what the model takes, (B, 3, H', W')."""
        if self.size is not None:
            height, width = images.shape[-2:]
            short = min(height, width)
            size = self.size
            edges = (size * height // short, size * width // short) if isinstance(size, int) else size
            if edges != (height, width):
                images = F.interpolate(images, edges, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        if self.crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], self.crop, strict=True))
            images = images[..., max(top, 0) :, max(left, 0) :][..., : self.crop[0], : self.crop[1]]
        mean, std = (images.new_tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class VisionModel(nn.Module):
    """A vision model of transformers behind its preparation: images (B, 3, H, W) in [0, 1] -> its hidden states."""

    def __init__(self, model: nn.Module, preparation: Preparation) -> None:
        super().__init__()
        self.model, self.preparation = model, preparation

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        return self.model(pixel_values=self.preparation(images), output_hidden_states=True).hidden_states


class FeatureNetwork(nn.Module):
    """A network as the objective sees it: frozen, in evaluation mode, in float32.

    Args:
        network: images (B, 3, H, W) in [0, 1] -> a tensor or several, (B, C), (B, tokens, C) or (B, C, ...).
        name: for messages.

    Attributes:
        digest: of its weights and preparation.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network.float(), name
        self.eval().requires_grad_(False)
        told = hashlib.sha256(repr(getattr(network, "preparation", None)).encode())
        told.update(weights_digest(network).encode())
        self.digest = told.hexdigest()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) or frames (B, F, C, H, W) in [0, 1], of 1 or 3 channels -> features (B, places, C) of
        unit length.

        Raises:
            ValueError: the network fails on them, or gives something else.
        """
        pictures = images.float().flatten(0, -4)
        pictures = pictures.expand(-1, 3, -1, -1)
        try:
            given = self.network(pictures)
        except Exception as error:  # whatever a network raises
            shape = tuple(pictures.shape)
            raise ValueError(
                f"feature_network {self.name!r} cannot take images of shape {shape}: {one_line(error)}"
            ) from error
        layers = [given] if isinstance(given, Tensor) else given
        if not (isinstance(layers, (list, tuple)) and layers and all(_is_layer(x, len(pictures)) for x in layers)):
            raise ValueError(
                f"feature_network {self.name!r} gives {_described(given)}; it must give a tensor or a sequence of "
                "tensors, samples first"
            )
        return [_unit(x).unflatten(0, images.shape[:-3]).flatten(1, -2) for x in layers]


def load_feature_network(name: str, device: Any = "cpu") -> FeatureNetwork:
    """By Hub id or folder of a vision model of transformers (safetensors only), or by `package.module:factory`, a
    callable without arguments that returns a module as `FeatureNetwork` takes it.

    Raises:
        ValueError: one line that names what could not be loaded.
    """
    made = _from_factory if FACTORY.fullmatch(name) and not Path(name).exists() else _from_transformers
    return FeatureNetwork(made(name), name).to(device)


def _from_factory(name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    try:
        network = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # whatever a module or a factory raises
        raise ValueError(f"feature_network {name!r} could not be made: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"feature_network {name!r} returns {_described(network)}; it must return a torch.nn.Module")
    return network


def _from_transformers(name: str) -> nn.Module:
    from transformers import AutoModel  # slow to import, and only this needs it
    from transformers.image_processing_base import ImageProcessingMixin  # reads settings without a processor's parts

    try:
        model = AutoModel.from_pretrained(name, use_safetensors=True)
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except OSError:  # it has none
            settings = {}
        if getattr(model, "main_input_name", None) != "pixel_values":
            model = getattr(model, "vision_model", model)  # of a pair, such as CLIP
        if getattr(model, "main_input_name", None) != "pixel_values":
            raise ValueError(f"{type(model).__name__} takes no pixel_values; give a vision model")
        return VisionModel(model, Preparation.of(settings, getattr(model.config, "image_size", None)))
    except Exception as error:  # whatever a loader raises for files, configurations and weights
        raise ValueError(f"feature_network {name!r} could not be loaded: {one_line(error)}") from error


def distance(features: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Of features (B, places, C) by layer: squared, summed over channels, mean over the rest and over layers."""
    return torch.stack([(f - w).square().sum(-1).mean() for f, w in zip(features, wanted, strict=True)]).mean()


def _unit(layer: Tensor) -> Tensor:
    """(B, C), (B, tokens, C) or (B, C, ...) -> (B, places, C) of unit length over channels."""
    places = layer if layer.ndim == 3 else layer.reshape(*layer.shape[:2], -1).transpose(1, 2)
    return places * torch.rsqrt(places.square().sum(-1, keepdim=True) + SHORT)


def _is_layer(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and len(value) == samples and value.is_floating_point()


def _size(value: Any, shorter: bool) -> tuple[int, int] | int:
    """A processor's size as (H, W), or as the shorter side, which a bare number is if `shorter`."""
    if isinstance(value, Mapping) and value.get("height") and value.get("width"):
        return int(value["height"]), int(value["width"])
    if isinstance(value, Mapping) and value.get("shortest_edge"):
        return int(value["shortest_edge"])
    if isinstance(value, int):
        return value if shorter else (value, value)
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise ValueError(f"its image processor's size is {value!r}; it must be height and width, or shortest_edge")


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
