"""What processes of one run tell each other."""

from __future__ import annotations

import json
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

T = TypeVar("T")


def from_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value in every process: plain data, sent as JSON."""
    if accelerator.num_processes == 1:
        return value
    data = json.dumps(value if accelerator.is_main_process else None).encode()
    length = broadcast(torch.tensor([len(data)], device=accelerator.device))
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=accelerator.device)
    if accelerator.is_main_process:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return json.loads(bytes(broadcast(buffer).cpu().tolist()))


def reduced(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum over all processes, in every one and where the tensor was."""
    if accelerator.num_processes == 1:
        return tensor
    return accelerator.reduce(tensor.to(accelerator.device), "sum").to(tensor.device)
