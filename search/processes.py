"""The processes of one command: how they start and end, and what they tell each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

T = TypeVar("T")


@contextmanager
def launched(how_to_go_on: Callable[[], str], *handlers: Any) -> Iterator[Accelerator]:
    """The accelerator of a command, for as long as the command runs.

    A ValueError is raised by every process alike, so the process group can be closed before it goes on. Ctrl-C may
    have ended the other processes, so nothing more is agreed with them. Without a closed group, a process aborts now
    and then while it exits.

    Args:
        how_to_go_on: called after Ctrl-C; the end of the line that the user reads.
        handlers: `kwargs_handlers` of the accelerator.

    Raises:
        KeyboardInterrupt: Ctrl-C, with that line.
    """
    accelerator = Accelerator(kwargs_handlers=list(handlers))
    try:
        yield accelerator
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {how_to_go_on()}") from None
    except ValueError:
        accelerator.end_training()
        raise
    accelerator.end_training()


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
    """The sum over all processes, in every one and on the tensor's device. Bytes are sent, since some devices have no
    float64, and summed in the order of the processes."""
    if accelerator.num_processes == 1:
        return tensor
    mine = tensor.detach().cpu().contiguous().view(-1)
    every = accelerator.gather(mine.view(torch.uint8).to(accelerator.device)).cpu()
    return every.view(tensor.dtype).view(-1, *tensor.shape).sum(0).to(tensor.device)
