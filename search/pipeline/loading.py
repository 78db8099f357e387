"""Pipelines loaded, frozen and in their precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn

from diffusers_dssolver import pipelines

from ..console import one_line

DENOISER_NAMES = ("transformer", "unet", "prior", "dit")
SAVED_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float32"}  # in safetensors: to run in


def load_pipeline(name_or_path: str, dtype: str = "auto", device: Any = "cpu", revision: str | None = None) -> Any:
    """Any pipeline by Hub id or folder, ours (`diffusers_dssolver.pipelines`) included, frozen, on a device.

    Args:
        dtype: a name of torch's; auto: `saved_dtype`.

    Raises:
        ValueError: one line that names what could not be loaded.
    """
    try:
        cls_name = DiffusionPipeline.load_config(name_or_path, revision=revision).get("_class_name")
        cls = getattr(pipelines, cls_name, DiffusionPipeline) if isinstance(cls_name, str) else DiffusionPipeline
        folder = name_or_path if Path(name_or_path).is_dir() else cls.download(name_or_path, revision=revision)
        chosen = saved_dtype(Path(folder)) if dtype == "auto" else dtype
        pipe = cls.from_pretrained(folder, dtype=getattr(torch, chosen))
    except (OSError, AttributeError, ValueError, ImportError) as error:
        raise ValueError(f"no pipeline could be loaded from {name_or_path!r}: {one_line(error)}") from error
    return freeze(pipe).to(device)


def saved_dtype(folder: Path) -> str:
    """Precision of the denoiser's weights in a pipeline's folder: bfloat16, float64, else float32. float16 weights give
    float32 too: they may be small files of a float32 model, and float16 is no precision to search in."""
    for file in sorted(file for name in DENOISER_NAMES for file in folder.glob(f"{name}*/*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no dictionary)
                if (kind := tensors.get_slice(key).get_dtype()) in SAVED_DTYPES:
                    return SAVED_DTYPES[kind]
    return "float32"


def freeze(pipe: Any) -> Any:
    """Turn off gradients of the networks, training mode and progress bars; returns the pipeline itself."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
