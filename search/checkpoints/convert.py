"""The `convert` command: a checkpoint of official code becomes the folder of a diffusers pipeline."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import AutoencoderKL, DiTPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_dssolver.pipelines import SiTPipeline

from ..console import one_line
from ..settings import ConvertConfig
from .flowdcn import flowdcn
from .sit_dit import dit, sit
from .weights import read

TYPES: dict[str, Callable[..., tuple[ModelMixin, SchedulerMixin]]] = {"sit": sit, "dit": dit, "flowdcn": flowdcn}
NULL_CLASS = 1000  # the only null class that diffusers' DiTPipeline knows


def convert(config: ConvertConfig) -> None:
    """Write the pipeline.

    Raises:
        ValueError: the checkpoint, the VAE, the labels or the folder is at fault; nothing is written.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty; choose another --output_dir")
    vae = load_vae(config.vae)
    given = {name: value for name in ("num_heads", "sample_size") if (value := getattr(config, name)) is not None}
    transformer, scheduler = TYPES[config.type](read(Path(config.checkpoint)), **given)
    size = transformer.config
    if vae.config.latent_channels != size.in_channels:
        raise ValueError(
            f"vae {config.vae!r} makes latents of {vae.config.latent_channels} channels, the checkpoint takes "
            f"{size.in_channels}; give the VAE it was trained with"
        )
    id2label = read_labels(config.id2label, size.num_embeds_ada_norm)
    known = config.type == "dit" and size.num_embeds_ada_norm == NULL_CLASS
    pipeline, home = (DiTPipeline, "diffusers") if known else (SiTPipeline, "diffusers_dssolver.pipelines")
    pipe = pipeline(transformer=transformer, scheduler=scheduler, vae=vae, id2label=id2label)
    pipe.register_to_config(id2label=id2label)
    with replacing_folder(folder) as partial:
        pipe.save_pretrained(partial)
    millions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e6
    print(
        f"{config.type}: {millions:.0f}M parameters, {size.num_embeds_ada_norm} classes, latents "
        f"({size.in_channels}, {size.sample_size}, {size.sample_size})\n"
        f"written to {folder} with a {type(scheduler).__name__}; to load it, and to sample with a searched solver:\n"
        f"    from {home} import {pipeline.__name__}; from diffusers_dssolver import DSSolverScheduler\n"
        f"    pipe = {pipeline.__name__}.from_pretrained({str(folder)!r})\n"
        f"    pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config)"
    )


def load_vae(name: str) -> AutoencoderKL:
    """The autoencoder, without its origin, which `save_pretrained` would write."""
    try:
        vae = AutoencoderKL.from_pretrained(name)
    except Exception as error:  # loaders raise anything for bad files, configurations and weights
        raise ValueError(f"no AutoencoderKL could be loaded from {name!r}: {one_line(error)}") from error
    vae.register_to_config(_name_or_path="")
    return vae


def read_labels(file: str | None, classes: int) -> dict[str, str] | None:
    """Names of classes by id, from a JSON file."""
    if file is None:
        return None
    try:
        id2label = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"id2label {file!r} could not be read: {one_line(error)}") from error
    if not isinstance(id2label, dict) or not all(isinstance(label, str) for label in id2label.values()):
        raise ValueError(f"id2label {file!r} is no JSON object of class ids and names")
    for key in id2label:
        if not key.isdecimal() or int(key) >= classes:
            raise ValueError(f"id2label {file!r} has the key {key!r:.60}; use class ids, 0 to {classes - 1}")
    return id2label


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to. It takes the place of `folder`, absent or empty, if the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
