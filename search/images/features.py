"""Extractors: networks that describe each image by one vector of features, for metrics of sets of images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..console import one_line
from ..storage import weights_digest
from .networks import blamed, from_factory, is_factory

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
BLANK = np.zeros((64, 64, 3), np.uint8)
Images = Sequence[np.ndarray]
Describe = Callable[[Images], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Extractor:
    """Features of images.

    Attributes:
        name: shown beside the metrics.
        sha256: digest of the weights.
        describe: images (H, W, 3) uint8 -> features (n, D), and logits (n, K) of a classifier.
        dimension: D.
    """

    name: str
    sha256: str
    describe: Describe
    dimension: int

    def __call__(self, images: Images) -> dict[str, Tensor]:
        """`features`, and `logits` of a classifier, float32 on the CPU.

        Raises:
            ValueError: the network fails on these images, or its features are not finite.
        """
        shapes = " and ".join(sorted({" x ".join(map(str, image.shape[:2])) for image in images}))
        with blamed(f"extractor {self.name!r} cannot take images of {shapes} pixels"):
            features, logits = self.describe(images)
        found = {"features": features} if logits is None else {"features": features, "logits": logits}
        if not all(x.isfinite().all() for x in found.values()):
            raise ValueError(f"extractor {self.name!r} gives features that are not finite; use another extractor")
        return {name: x.float().cpu() for name, x in found.items()}


def load_extractor(given: str, device: Any = "cpu", progress: bool = True) -> Extractor:
    """An extractor by name: `inception`; `clip:` and a Hub id or folder; or `package.module:factory`, whose network
    maps images (B, 3, H, W) in [0, 1] to features (B, D), alone or with logits (B, K). The network's `name`, if it has
    one, is shown in the place of the factory's.

    Raises:
        ValueError: one line that names what could not be loaded.
    """
    with blamed(f"extractor {given!r} cannot be used"):
        if given == "inception":
            return _inception(device, progress)
        if given.startswith("clip:"):
            clip = Clip(given.removeprefix("clip:"), device)
            return _tried(f"clip:{clip.name}", clip.sha256, clip.describe)
        if is_factory(given):
            return of_network(from_factory(given), given, device)
        raise ValueError("give inception, clip:ID or package.module:factory")


def of_network(network: nn.Module, name: str, device: Any = "cpu") -> Extractor:
    """An extractor of a network as `load_extractor` takes it from a factory."""
    network = network.to(device).eval()

    @torch.no_grad()
    def describe(images: Images) -> tuple[Tensor, Tensor | None]:
        batch = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255
        output = network(batch)
        return (output, None) if isinstance(output, Tensor) else output

    shown = str(getattr(network, "name", name))
    if shown == "inception":
        raise ValueError("the name inception is that of clean-fid's network; give yours another")
    return _tried(shown, weights_digest(network), describe)


def _tried(name: str, sha256: str, describe: Describe) -> Extractor:
    """An extractor that was tried on a blank image, which tells its dimension."""
    features, _ = describe([BLANK])
    if not (isinstance(features, Tensor) and features.ndim == 2 and len(features) == 1):
        raise ValueError("it must give features (images, D), alone or with logits")
    return Extractor(name, sha256, describe, features.shape[1])


def _inception(device: Any, progress: bool) -> Extractor:
    """The Inception of clean-fid: its resizing and its TorchScript file, which is downloaded if absent and checked."""
    try:
        from cleanfid.downloads_helper import inception_url
        from cleanfid.features import InceptionV3W
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise ValueError(
            f'clean-fid is missing ({one_line(error)}); pip install "diffusers-dssolver[evaluate]"'
        ) from error
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / INCEPTION_FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(inception_url, str(file), INCEPTION_SHA256, progress)
        except (OSError, RuntimeError) as error:  # no network, another checksum
            raise ValueError(f"{inception_url} could not be fetched ({one_line(error)}); put it at {file}") from error
    if hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION_SHA256:
        raise ValueError(f"{file} is not the file that clean-fid uses (its sha256 is another); remove it")
    network = InceptionV3W(str(folder), download=False).to(device).eval()
    resize = build_resizer("clean")

    @torch.no_grad()
    def describe(images: Images) -> tuple[Tensor, Tensor]:
        resized = np.stack([resize(image) for image in images]).transpose(0, 3, 1, 2)
        features = network(torch.from_numpy(resized).to(device))
        return features, features @ network.base.output.weight.T  # without bias, as in the score's definition

    return _tried("inception", INCEPTION_SHA256, describe)


class Clip:
    """A CLIP model of transformers with its own processor.

    Args:
        name: Hub id or folder; safetensors only.

    Raises:
        ValueError: one line that names what could not be loaded.
    """

    def __init__(self, name: str, device: Any = "cpu") -> None:
        from transformers import AutoProcessor, CLIPModel  # slow to import

        with blamed(f"no CLIP model could be loaded from {name!r}"):
            self.model = CLIPModel.from_pretrained(name, use_safetensors=True).to(device).eval()
            self.processor = AutoProcessor.from_pretrained(name)
        self.name = Path(name).resolve().name if Path(name).is_dir() else name
        self.sha256 = weights_digest(self.model)

    def describe(self, images: Images) -> tuple[Tensor, None]:
        """Projected features (n, D) of images (H, W, 3) uint8; there are no logits."""
        return self._projected(self.model.get_image_features, images=list(images)), None

    def scores(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """100 max(cos, 0) of each image and its prompt, (n,) float32 on the CPU.

        Source: Hessel et al., arXiv 2104.08718, with 100 in the place of 2.5.
        """
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": length}
        texts = self._projected(self.model.get_text_features, text=list(prompts), **options)
        cosines = torch.cosine_similarity(self.describe(images)[0], texts)
        return 100 * cosines.clamp(min=0).float().cpu()

    @torch.no_grad()
    def _projected(self, network: Callable, **inputs: Any) -> Tensor:
        output = network(**self.processor(return_tensors="pt", **inputs).to(self.model.device))
        return output if isinstance(output, Tensor) else output.pooler_output  # transformers 5
