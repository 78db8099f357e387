"""Devices that run out of memory: fewer samples are then run together."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ..console import warn

T = TypeVar("T")

LEVERS = "offload what is not running (pipe.enable_model_cpu_offload()), use bfloat16, or make smaller images"
SIGNS = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the computer, had no memory left."""
    known = isinstance(error, torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS))


def fitting(work: Callable[[int], T], samples: int, processes: int = 1) -> T:
    """What some work gives that runs so many samples together; begun anew with half of them wherever they do not fit.

    Raises:
        ValueError: a single sample does not fit, or several processes would no longer do the same.
    """
    while True:
        try:
            return work(samples)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if samples < 2:
            raise ValueError(f"a single sample does not fit into memory; {LEVERS}")
        if processes > 1:
            raise ValueError(f"{samples} samples do not fit into the memory of a process; give a smaller batch_size")
        warn(f"{samples} samples do not fit into memory; {samples // 2} run together from here on")
        samples //= 2
