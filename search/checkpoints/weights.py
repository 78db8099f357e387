"""Weights of checkpoint files. Files are untrusted: nothing in them is run, and errors are one line."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..console import one_line


def read(file: Path) -> Mapping[str, Any]:
    """Contents of a checkpoint: tensors, plain data, and the settings (argparse) of official training runs."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {str(file)!r} is damaged, or holds more than weights and plain data, none of which is run; "
            "save its state dict alone"
        ) from error
    except Exception as error:  # loaders raise anything for other files
        raise ValueError(f"checkpoint {str(file)!r} could not be read: {one_line(error)}") from error
    if not isinstance(held, Mapping):
        raise ValueError(f"checkpoint {str(file)!r} holds a {type(held).__name__}; give a state dict")
    return held


def check_keys(found: Collection[str], wanted: Collection[str], what: str) -> None:
    """Raise a ValueError with the first five missing and unexpected keys of `what`, if there are any."""
    told = []
    for kind, keys in (("missing", set(wanted) - set(found)), ("unexpected", set(found) - set(wanted))):
        if keys:
            some = ", ".join(f"{key!r:.80}" for key in sorted(keys, key=str)[:5])
            told.append(f"{len(keys)} {kind} ({some}{', ...' if len(keys) > 5 else ''})")
    if told:
        raise ValueError(f"{what} has other keys than it should: {', '.join(told)}")


def weights(held: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """State dict of a checkpoint in float32: averaged weights of a training run, else its weights, else all it holds.

    Raises:
        ValueError: a weight is no tensor of finite floats.
    """
    state = next((held[key] for key in ("ema", "model") if key in held), held)
    if not isinstance(state, Mapping):
        raise ValueError(f"{what} holds a {type(state).__name__} as its weights; give a state dict")
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{what} holds no finite floats under {key!r:.80}; give a state dict of weights")
    return {str(key): value.float() for key, value in state.items()}
