"""The objective on decoded images: how far a pipeline's pictures are from the teacher's, in the features of a network.

    loss = mean over layers of |f_l(images) - f_l(teacher's images)|^2,
           f_l scaled to unit length over channels, the mean taken over samples, frames and places

Images come from the pipeline's own call, which goes on to its end after the last step with gradients on; the teacher's
from the same call with the last step's result replaced by the teacher's final state. No pipeline is known by name: one
whose call does not carry the gradient through is refused before the search.

Source: Zhang et al., arXiv 1801.03924, eq. 1, without learned weights.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .closed_form import Candidate, ClosedForm, Samples
from .gradient import Descent
from .objective import terminal_loss
from .parameters import CorrectionParameters, nodes_from_logits
from .preflight import REPEATED, SPLIT
from .probe import ProbeScheduler, run
from .replay import uncounted
from .sampling import Sampler, one_line
from .state import weights_digest
from .teacher import Reference

MOST_CALLS = 6  # with more, the pictures are next to the teacher's
FACTORY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # as numbered by Pillow
SHORT = 1e-10  # squared length of a feature that is not scaled up to 1
OTHERWISE = "use objective terminal"


# --- feature networks -------------------------------------------------------------------------------------------------


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


# --- objective --------------------------------------------------------------------------------------------------------


class Perceptual:
    """Images of prepared runs, and their distance from the teacher's.

    Args:
        network: of the features, on the pipeline's device.
        sampler, probe: the pipeline and the scheduler that runs in it.
    """

    def __init__(self, network: FeatureNetwork, sampler: Sampler, probe: ProbeScheduler) -> None:
        self.network, self.sampler, self.probe = network, sampler, probe
        self.name = type(sampler.pipe).__name__
        self._steps = 1  # of the call that decodes a state: the fewest that the pipeline takes
        self._wanted: dict[tuple[str, int], list[Tensor]] = {}
        for module in sampler.pipe.components.values():  # a decoder recomputed block by block in the backward pass
            if isinstance(module, ModelMixin) and hasattr(module, "decode") and module._supports_gradient_checkpointing:
                module.enable_gradient_checkpointing()

    def images(self, indices: Sequence[int], split: str, nfe: int) -> tuple[list[Tensor], Tensor]:
        """One run prepared with `decode`: its N+1 states and its images (B, C, H, W), or frames (B, F, C, H, W), in
        [0, 1].

        Raises:
            ValueError: the output holds no images.
        """
        with self._for_images():
            states = run(self.sampler, self.probe, indices, split, nfe)
        output, self.probe.output = self.probe.output, None
        images = output[0]
        if not isinstance(images, Tensor):
            raise self._refusal(f"the output is {_described(images)}, not a tensor")
        if images.ndim not in (4, 5) or len(images) != len(indices) or images.shape[-3] not in (1, 3):
            raise ValueError(
                f"{self.name} gives {_described(images)} for {len(indices)} samples, which is no batch of images with "
                f"1 or 3 channels; {OTHERWISE}"
            )
        return states, images

    def check(self, samples: int = 2) -> str:
        """Try all of it on a few samples, uncounted, before anything is spent; what was found, in a sentence.

        Raises:
            ValueError: one line saying why the pipeline's images or the feature network cannot be used.
        """
        if "output_type" not in self.sampler.accepted:
            raise ValueError(f"{self.name} takes no output_type, so no images can be asked for; {OTHERWISE}")
        with uncounted(self.sampler):
            logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            self.probe.prepare(nodes_from_logits(logits), decode=True)
            states, images = self._tried(range(samples), 2)
            if not images.requires_grad:
                raise self._refusal("the output has no graph")
            features = self.network(images)
            if not all(f.requires_grad for f in features):
                raise ValueError(f"feature_network {self.network.name!r} gives features without a gradient")
            try:
                (slope,) = torch.autograd.grad(distance(features, [f.detach().roll(1, 0) for f in features]), logits)
            except RuntimeError as error:  # what autograd raises, also for want of memory
                raise self._refusal(one_line(error)) from error
            if not torch.isfinite(slope).all():
                raise self._refusal("it is not finite")
            again = self._fewest_steps(range(samples), states[-1][:samples].detach())
            change = (again - images.detach()).double().norm() / images.detach().double().norm().clamp(min=1e-30)
            if not change <= REPEATED:
                raise ValueError(
                    f"{self.name} decodes the same final state to other images in a call of {self._steps} steps "
                    f"(relative change {change:.2g}), so the teacher's cannot be made; {OTHERWISE}"
                )
        shape = " x ".join(map(str, images.shape[1:]))
        return f"Objective perceptual: images of {shape}, {len(features)} layers of features."

    def remember(self, split: str, batches: Sequence[Samples], progress: bool = False) -> None:
        """Keep the features of these samples' teacher images on the CPU: one evaluation a sample, or two of pipelines
        that do not take one step."""
        for indices, reference in tqdm(batches, desc=f"reference images, {split}", unit="batch", disable=not progress):
            images = self._decoded(indices, split, reference.final)
            with torch.no_grad():
                layers = [layer.cpu() for layer in self.network(images)]
            for k, index in enumerate(indices):
                self._wanted[split, index] = [layer[k].clone() for layer in layers]

    def loss(self, images: Tensor, split: str, indices: Sequence[int]) -> Tensor:
        """Mean over these samples, which `remember` has seen."""
        features = self.network(images)
        kept = zip(*(self._wanted[split, index] for index in indices), strict=True)
        return distance(features, [torch.stack(layer).to(images.device) for layer in kept])

    def held_out(
        self, form: ClosedForm, raw: Tensor, rows: Sequence[Sequence[float]], offsets: Tensor | None
    ) -> tuple[float, float]:
        """(perceptual loss, final-state mse) of a solver on every process's validation samples."""
        total, count, errors = torch.zeros((), dtype=torch.float64), 0.0, []
        with torch.no_grad():
            for indices, reference in form.batches(form.validation):
                self.probe.prepare(raw, rows, offsets=offsets, decode=True)
                states, images = self.images(indices, "validation", len(raw) - 1)
                total += len(indices) * self.loss(images, "validation", indices).double().cpu()
                count += len(indices)
                errors.append(states[-1][: len(indices)] - reference.final.to(states[-1].device))
        summed = form.reduce(torch.stack([total, torch.tensor(count, dtype=torch.float64)]))
        return float(summed[0] / summed[1]), form.mean_square(torch.cat(errors))

    def _decoded(self, indices: Sequence[int], split: str, final: Tensor) -> Tensor:
        """Images of final states (B, ...)."""
        nodes = torch.linspace(1, 0, self._steps + 1, dtype=torch.float64)
        self.probe.prepare(nodes, final=final, decode=True)
        return self.images(indices, split, self._steps)[1]

    def _fewest_steps(self, indices: Sequence[int], final: Tensor) -> Tensor:
        """Images of final states by a call of one step, or of two if the pipeline fails with one."""
        self._steps = 1
        try:
            return self._decoded(indices, SPLIT, final)
        except Exception:  # whatever a grid of one step makes a pipeline raise
            self._steps = 2
            return self._decoded(indices, SPLIT, final)

    def _tried(self, indices: Sequence[int], nfe: int) -> tuple[list[Tensor], Tensor]:
        try:
            return self.images(indices, SPLIT, nfe)
        except Exception as error:  # whatever a pipeline raises
            if isinstance(error, ValueError) and self.name in str(error):
                raise
            raise self._refusal(one_line(error)) from error

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"{self.name}'s images carry no gradient ({reason}); {OTHERWISE}")

    @contextmanager
    def _for_images(self) -> Iterator[None]:
        """The call asked for tensors, and without a safety checker, which would look at pictures outside the graph."""
        sampler, parts = self.sampler, vars(self.sampler.pipe)
        call, checker = sampler.call, parts.get("safety_checker")
        sampler.call = {**call, "output_type": "pt"}
        if checker is not None:
            parts["safety_checker"] = None
        try:
            yield
        finally:
            sampler.call = call
            if checker is not None:
                parts["safety_checker"] = checker


class PerceptualDescent(Descent):
    """A descent in the perceptual loss, which also decides on held-out samples.

    Args:
        perceptual: has seen the training and validation samples of the form.

    Attributes:
        before, reached: held-out perceptual loss of the candidate, and of the best.
    """

    def __init__(
        self,
        form: ClosedForm,
        candidate: Candidate,
        parameters: CorrectionParameters,
        perceptual: Perceptual,
        on_call: Callable[[float, float], object] = lambda loss, best: None,
    ) -> None:
        super().__init__(form, candidate, parameters, terminal_loss, on_call)
        self.perceptual = perceptual
        rows = candidate.spec.coefficients
        self.before, _ = perceptual.held_out(form, candidate.raw, rows, candidate.offsets)
        self.reached = self.before if math.isfinite(self.before) else math.inf

    def _batch_loss(self, indices: Sequence[int], reference: Reference) -> Tensor:
        with self._prepared(decode=True):
            _, images = self.perceptual.images(indices, "train", self.parameters.nfe)
        return self.perceptual.loss(images, "train", indices)

    def _held_out(self, raw: Tensor, rows: Sequence[Sequence[float]], offsets: Tensor | None) -> tuple[float, float]:
        return self.perceptual.held_out(self.form, raw, rows, offsets)
