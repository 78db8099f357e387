"""Devices that run out of memory: fewer samples are then run together."""

from __future__ import annotations

import gc

import torch

LEVERS = "offload what is not running (pipe.enable_model_cpu_offload()), use bfloat16, or make smaller images"
SIGNS = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the computer, had no memory left."""
    known = isinstance(error, torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS))


def halved(samples: int, processes: int = 1) -> int:
    """Half of the samples that did not fit; memory that is no longer used is given back.

    Raises:
        ValueError: a single one did not fit, or several processes would no longer do the same.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if samples < 2:
        raise ValueError(f"a single sample does not fit into memory; {LEVERS}")
    if processes > 1:
        raise ValueError(f"{samples} samples do not fit into the memory of a process; give a smaller batch_size")
    return samples // 2
