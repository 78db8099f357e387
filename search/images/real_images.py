"""Real images from a folder or a data set, and statistics of their features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..console import one_line
from ..settings import FEWEST_IMAGES, EvaluateConfig
from ..storage import DATA_FILES, read_tensors, write_tensors
from .features import Extractor
from .metrics import moments

KEPT_FEATURES = 10_000  # for metrics that compare images one by one
Opener = Callable[[], np.ndarray]  # returns an image (H, W, 3) uint8


@dataclass(frozen=True)
class Statistics:
    """Statistics of the features of real images.

    Attributes:
        name: of the folder or data set.
        n: number of images; None if a file does not say.
        mean, covariance: (D,) and (D, D), float64.
        features: of some of the images in random order, (m, D) float32; None if a file has none.
    """

    name: str
    n: int | None
    mean: Tensor
    covariance: Tensor
    features: Tensor | None

    @classmethod
    def of(cls, features: Tensor, name: str) -> Statistics:
        """From features (n, D)."""
        drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:KEPT_FEATURES]
        return cls(name, len(features), *moments(features), features[drawn])

    def write(self, file: Path, extractor: Extractor, dtype: torch.dtype = torch.float32) -> None:
        """Write a safetensors file that other evaluations can compare with; `dtype` is that of the features."""
        tensors = {"mu": self.mean, "sigma": self.covariance}
        if self.features is not None:
            tensors["features"] = self.features.to(dtype)
        facts = {"data": self.name, "n": str(self.n), "extractor": extractor.name, "extractor_sha256": extractor.sha256}
        write_tensors(file, tensors, facts)


def read_statistics(file: Path, extractor: Extractor) -> Statistics:
    """Read what `Statistics.write` wrote, or a .npz of clean-fid with `mu` and `sigma`, of Inception's features.

    Raises:
        ValueError: one line that names the file and what is wrong with it, such as another extractor.
    """
    try:
        read = _read_npz if file.suffix == ".npz" else _read_safetensors
        found = read(file, extractor)
        size = extractor.dimension
        fine = found.mean.shape == (size,) and found.covariance.shape == (size, size)
        if not fine or (found.features is not None and found.features.shape[1:] != (size,)):
            raise ValueError(f"its shapes are not those of {size} features")
        tensors = [found.mean, found.covariance] + ([] if found.features is None else [found.features])
        if not all(t.is_floating_point() and t.isfinite().all() for t in tensors):
            raise ValueError("it holds what is not a finite number")
        if found.features is not None and len(found.features) < FEWEST_IMAGES:
            raise ValueError(f"it holds the features of {len(found.features)} images, fewer than {FEWEST_IMAGES}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"reference {str(file)!r} cannot be used: {one_line(error)}") from error
    return found


def _read_safetensors(file: Path, extractor: Extractor) -> Statistics:
    tensors, facts = read_tensors(file)
    if facts["extractor_sha256"] != extractor.sha256:
        theirs = f"{facts['extractor']} {facts['extractor_sha256'][:8]}"
        raise ValueError(f"it is of extractor {theirs}, not of {extractor.name} {extractor.sha256[:8]}")
    features = tensors["features"].float() if "features" in tensors else None
    return Statistics(facts["data"], int(facts["n"]), tensors["mu"].double(), tensors["sigma"].double(), features)


def _read_npz(file: Path, extractor: Extractor) -> Statistics:
    if extractor.name != "inception":
        raise ValueError(f"a .npz is of Inception's features, not of {extractor.name}'s")
    with np.load(file, allow_pickle=False) as arrays:
        mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
    return Statistics(file.stem, None, mean, covariance, None)


@dataclass(frozen=True)
class RealImages:
    """Images in a fixed order, opened one by one when they are needed.

    Attributes:
        name: of the folder or data set.
        key: digest of what the images are, for names of files made from them.
        openers: an iterator with an opener for each image.
    """

    name: str
    key: str
    openers: Callable[[], Iterator[Opener]]

    def batches(self, size: int) -> Iterator[list[Opener]]:
        openers = self.openers()
        while batch := list(islice(openers, size)):
            yield batch


def open_real_images(config: EvaluateConfig, extractor: Extractor) -> Statistics | RealImages:
    """What `config.reference` names: a statistics file, a folder of images (with its folders), or a data set.

    Raises:
        ValueError: one line that names it and says why it cannot be used.
    """
    path = Path(config.reference)
    if path.suffix in (".safetensors", ".npz"):
        return read_statistics(path, extractor)
    if path.is_dir() and (files := _image_files(path)):
        return _folder(path, files[: config.num_reference_images])
    return _dataset(config)


def _image_files(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())


def _pixels(name: str, opened: Callable[[], Image.Image]) -> np.ndarray:
    """(H, W, 3) uint8. Raises a ValueError that names the image."""
    try:
        return np.array(opened().convert("RGB"))
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {one_line(error)}") from error


def _folder(folder: Path, files: list[Path]) -> RealImages:
    openers = [partial(_pixels, f"reference image {str(file)!r}", partial(Image.open, file)) for file in files]
    return RealImages(folder.resolve().name, _key([_state_of(file) for file in files]), lambda: iter(openers))


def _dataset(config: EvaluateConfig) -> RealImages:
    from datasets import Image as ImageColumn
    from datasets import load_dataset  # slow to import

    given, column, split = config.reference, config.reference_column, config.reference_split
    path = Path(given)
    kind = DATA_FILES.get(path.suffix.lower())
    options: dict[str, Any] = {"data_files": given} if kind else {}
    decode = ImageColumn().decode_example

    def openers() -> Iterator[Opener]:
        try:
            rows = load_dataset(kind or given, split=split, streaming=True, **options)
            rows = rows.cast_column(column, ImageColumn(decode=False))
            for row in islice(rows, config.num_reference_images):
                if row[column] is None:
                    raise ValueError(f"column {column!r} holds no image; its columns: {', '.join(row)}")
                yield partial(_pixels, f"an image of reference {given!r}", partial(decode, row[column]))
        except Exception as error:  # readers of files, archives and web pages raise anything
            raise ValueError(f"reference {given!r} could not be read: {one_line(error)}") from error

    if next(openers(), None) is None:
        raise ValueError(f"reference {given!r} holds no image")
    facts = [given, column, split, config.num_reference_images, _state_of(path) if path.is_file() else None]
    return RealImages(path.name if path.exists() else f"{given} ({split})", _key(facts), openers)


def _state_of(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def _key(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
