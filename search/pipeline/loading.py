"""Pipelines loaded, frozen and in their precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn

from diffusers_dssolver import pipelines

from ..console import one_line

DENOISER_NAMES = ("transformer", "unet", "prior", "dit")
MODES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")  # attributes of a module
ABSENT = object()
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
    for bar in _bars(pipe):
        bar.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def borrowed(pipe: Any) -> Iterator[Any]:
    """A pipeline in somebody's hands, frozen. However the block ends, scheduler, training modes, gradients and progress
    bars are put back, and networks that are offloaded between calls are so again."""
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    changed = [(module, name) for network in networks for module in network.modules() for name in MODES]
    changed += [(bar, "_progress_bar_config") for bar in _bars(pipe)] + [(pipe, "scheduler"), (pipe, "guider")]
    before = [vars(holder).get(name, ABSENT) for holder, name in changed]
    live = [p for network in networks for p in network.parameters() if p.requires_grad]
    try:
        yield freeze(pipe)
    finally:
        for (holder, name), value in zip(changed, before, strict=True):
            if vars(holder).get(name, ABSENT) is not value:
                delattr(holder, name) if value is ABSENT else setattr(holder, name, value)
        for parameter in live:
            parameter.requires_grad_(True)
        offload(pipe)


def offload(pipe: Any) -> None:
    """Send networks away that `enable_model_cpu_offload` would have sent away, had the last call gone to its end."""
    for hook in getattr(pipe, "_all_hooks", []):
        hook.offload()


def _bars(pipe: Any) -> list[Any]:
    """What has a progress bar: a pipeline, and loops of a modular one."""
    found, blocks = [pipe], [getattr(pipe, "_blocks", None)]
    while blocks:
        block = blocks.pop()
        found += [block] if hasattr(block, "set_progress_bar_config") else []
        blocks += getattr(block, "sub_blocks", {}).values()
    return found
