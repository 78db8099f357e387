"""Digests of what the result of a run depends on: weights, arguments of a call, conditions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (str, bool, int, float, type(None))


def weights(name: str, network: nn.Module) -> str:
    """SHA-256 of a component's weights: its parameters, what a quantised layer keeps in their place, and how strongly
    adapters (LoRA) act."""
    found, seen = hashlib.sha256(name.encode()), set[int]()
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                for part in _stored(module, parameter):
                    found.update(tensor_bytes(part))
    for path, module in network.named_modules():
        if extra := _beside_parameters(module):
            found.update(f"{path} {extra}".encode())
    return found.hexdigest()


def _stored(module: nn.Module, parameter: Tensor) -> Iterator[Tensor]:
    """A parameter as plain tensors: of a quantised one its parts, of one that is offloaded what its hook keeps."""
    if parameter.is_meta:
        name = next(name for name, p in module.named_parameters(recurse=False) if p is parameter)
        held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if held is not None:
            yield from _stored(module, held[name])
    elif hasattr(parameter, "__tensor_flatten__"):
        names, _ = parameter.__tensor_flatten__()
        for name in names:
            yield from _stored(module, getattr(parameter, name))
    else:
        yield parameter


def _beside_parameters(module: nn.Module) -> list[Any]:
    """What a layer computes with that is no parameter: packed integer weights, and scales of active adapters."""
    found: list[Any] = []
    packed = getattr(module, "_weight_bias", None)
    if callable(packed):
        found += [None if part is None else digest(part.int_repr() if part.is_quantized else part) for part in packed()]
    scaling = getattr(module, "scaling", None)
    if isinstance(scaling, Mapping):
        found += [[name, scaling.get(name)] for name in module.active_adapters]
    return found


def digest(value: Any) -> str:
    """SHA-256 of nested containers of tensors, arrays, pictures, texts, numbers and functions."""
    if isinstance(value, Mapping):
        parts = [part for k, v in sorted(value.items()) for part in (str(k), digest(v))]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()
    if isinstance(value, (list, tuple)):
        return hashlib.sha256("/".join(map(digest, value)).encode()).hexdigest()
    if isinstance(value, Tensor):
        data = tensor_bytes(value)
    elif isinstance(value, np.ndarray) or hasattr(value, "tobytes"):  # arrays and pictures
        data = value.tobytes()
    elif isinstance(value, Callable):
        data = getattr(value, "__qualname__", type(value).__qualname__).encode()
    else:
        data = repr(value).encode()
    shape = tuple(getattr(value, "shape", getattr(value, "size", ())) or ())
    return hashlib.sha256(f"{type(value).__name__}{shape}".encode() + data).hexdigest()


def is_plain(value: Any) -> bool:
    """Whether a value can stand in JSON as it is."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    return isinstance(value, PLAIN)


def tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
