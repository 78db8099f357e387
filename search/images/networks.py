"""Networks that images are seen through: how they are loaded, and their layers as differentiable features."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
SHORT = 1e-10  # squared length below which a feature is not scaled up to length 1


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Whatever a loader, a factory or a network raises, as a ValueError of one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def is_factory(name: str) -> bool:
    return FACTORY.fullmatch(name) is not None and not Path(name).exists()


def from_factory(name: str) -> nn.Module:
    """The network that `package.module:factory` returns, a callable without arguments.

    Raises:
        ValueError: it returns something else; or whatever the factory raises.
    """
    module, _, factory = name.partition(":")
    network = getattr(importlib.import_module(module), factory)()
    if not isinstance(network, nn.Module):
        raise ValueError(f"it returns {described(network)}; it must return a torch.nn.Module")
    return network


def from_transformers(name: str) -> VisionModel:
    """A vision model of transformers, Hub id or folder, safetensors only; of a pair such as CLIP the vision part.

    Raises:
        ValueError: it takes no images; or whatever the loader raises.
    """
    from transformers import AutoModel  # slow to import
    from transformers.image_processing_base import ImageProcessingMixin  # reads settings without a processor's parts

    model = AutoModel.from_pretrained(name, use_safetensors=True)
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:  # it has none
        settings = {}
    if getattr(model, "main_input_name", None) != "pixel_values":
        model = getattr(model, "vision_model", model)
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ValueError(f"{type(model).__name__} takes no pixel_values; give a vision model")
    return VisionModel(model, Preparation.of(settings, getattr(model.config, "image_size", None)))


@dataclass(frozen=True)
class Preparation:
    """The steps of an image processor as differentiable operations on images in [0, 1].

    Attributes:
        size: (H, W), or one number for the shorter side; None: as they are.
        crop: (H, W) cut out of the middle; None: nothing is cut.
        mode: interpolation, with antialiasing.
        mean, std: per channel.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], image_size: Any = None) -> Preparation:
        """From a `preprocessor_config.json`; defaults are ImageNet's mean and std, and the model's own size.

        Raises:
            ValueError: the size has another form.
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
        """(B, 3, H, W) in [0, 1] -> the model's input (B, 3, H', W')."""
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
    """A vision model of transformers with its preparation: images (B, 3, H, W) in [0, 1] -> hidden states."""

    def __init__(self, model: nn.Module, preparation: Preparation) -> None:
        super().__init__()
        self.model, self.preparation = model, preparation

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        return self.model(pixel_values=self.preparation(images), output_hidden_states=True).hidden_states


class FeatureNetwork(nn.Module):
    """The layers of a frozen float32 network, for distances between images.

    Args:
        network: images (B, 3, H, W) in [0, 1] -> a layer or several, (B, C), (B, tokens, C) or (B, C, ...).
        name: for messages.

    Attributes:
        digest: of its weights and preparation.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network.float(), name
        self.eval().requires_grad_(False)
        facts = repr(getattr(network, "preparation", None)) + weights_digest(network)
        self.digest = hashlib.sha256(facts.encode()).hexdigest()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) or frames (B, F, C, H, W) in [0, 1], of 1 or 3 channels -> features (B, places, C) of
        unit length.

        Raises:
            ValueError: the network fails on them, or gives something else.
        """
        pictures = images.float().flatten(0, -4).expand(-1, 3, -1, -1)
        with blamed(f"feature_network {self.name!r} cannot take images of shape {tuple(pictures.shape)}"):
            given = self.network(pictures)
        layers = [given] if isinstance(given, Tensor) else given
        if not (isinstance(layers, (list, tuple)) and layers and all(_is_layer(x, len(pictures)) for x in layers)):
            raise ValueError(
                f"feature_network {self.name!r} gives {described(given)}; it must give a tensor or a sequence of "
                "tensors, samples first"
            )
        return [_unit(x).unflatten(0, images.shape[:-3]).flatten(1, -2) for x in layers]


def load_feature_network(name: str, device: Any = "cpu") -> FeatureNetwork:
    """A network by its factory (`from_factory`), or a vision model of transformers by Hub id or folder.

    Raises:
        ValueError: one line that names what could not be loaded.
    """
    made, done = (from_factory, "made") if is_factory(name) else (from_transformers, "loaded")
    with blamed(f"feature_network {name!r} could not be {done}"):
        network = made(name)
    return FeatureNetwork(network, name).to(device)


def distance(features: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Squared distance of features (B, places, C) summed over channels; mean over samples, places and layers.

    Source: Zhang et al., arXiv 1801.03924, eq. 1, without learned weights.
    """
    return torch.stack([(f - w).square().sum(-1).mean() for f, w in zip(features, wanted, strict=True)]).mean()


def _unit(layer: Tensor) -> Tensor:
    """A layer (B, C), (B, tokens, C) or (B, C, ...) -> (B, places, C), scaled to length 1 over channels."""
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


def described(value: Any) -> str:
    """Type of a value, and its shape if it has one, for messages."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
