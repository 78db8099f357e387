"""Calls a diffusers pipeline on chosen samples and counts its network calls.

A sample is an index: its noise comes from a generator of its own and its condition from its index, so that neither the
batch nor the number of processes changes it. No pipeline is known by name: conditions follow from the signature of its
call, the denoiser from the components that take a time.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .fingerprint import digest, is_plain, weights
from .loading import DENOISER_NAMES
from .prompts import PROMPT, PromptMemo

SIDE_NAMES = ("controlnet", "adapter", "motion_adapter")  # networks that take a time and help another denoise
NOT_TIMED = ("encoder", "vae", "movq")  # parts of names of components that are not called once a step
INPUT_NAMES = ("hidden_states", "sample", "x")  # of a denoiser's noisy input
CLASS_COUNTS = ("num_embeds_ada_norm", "num_classes", "num_class_embeds")  # keys of a denoiser's configuration
DISTILLED = ("LCMScheduler", "TCDScheduler")
OUTPUTS = ("images", "videos", "image", "video", "frames")  # of a modular pipeline's blocks
OWN_ARGUMENTS = ("generator", "num_inference_steps")
Conditions = Callable[[Sequence[int]], Mapping[str, Any]] | Mapping[str, Sequence[Any]]
FINGERPRINTED = 16  # samples whose conditions count where none are named


def spread_classes(count: int, indices: Sequence[int]) -> list[int]:
    """Class of each sample, in strides of a 32nd of the classes: all `count` classes come equally often, and few
    samples are of classes from all over their list, which may be sorted by kind."""
    stride = next(k for k in range(max(count // 32, 1), count + 1) if math.gcd(k, count) == 1)
    return [i * stride % count for i in indices]


def arguments_of(pipe: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call, with their defaults; those of a modular pipeline are the inputs of its blocks."""
    if blocks := getattr(pipe, "blocks", None):
        return {entry.name: entry.default for entry in blocks.inputs if entry.name}
    parameters = inspect.signature(pipe.__call__).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def own_guidance(pipe: Any) -> float | None:
    """The guidance scale of a pipeline that is called without one: the default of its call, or its guider's."""
    scale = arguments_of(pipe).get("guidance_scale")
    if scale is None:
        scale = getattr(getattr(pipe, "guider", None), "guidance_scale", None)
    return float(scale) if isinstance(scale, (int, float)) else None


class Sampler:
    """Runs a pipeline's own call on chosen samples with a chosen scheduler.

    Args:
        pipe: the pipeline.
        call: further arguments of its call (`guidance_scale`, `height`, ...), the same for every run.
        prompts: for pipelines that take a prompt; sample i gets prompt i modulo their number.
        seed: of all noise.
        conditions: what else is chosen sample by sample: a function, indices -> call arguments of these samples, in
            place of class labels and prompts; or lists by argument, such as pictures or embeddings, beside them; sample
            i gets entry i modulo their number.

    Attributes:
        network_evaluations: samples that went through the denoiser so far, a guided call counting its doubled batch.
        network_calls: calls of the denoiser so far.
        denoisers: the networks that are counted.
        timed: every network that takes a time, by name: the denoisers, and helpers such as a ControlNet.
        accepted: arguments of the call, with their defaults.
        is_answered: tells of a denoiser being called whether its output is known, so that the call does not count.

    Raises:
        ValueError: for arguments that the call does not take, or where nothing tells the conditions.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any] | None = None,
        prompts: Sequence[str] = (),
        seed: int = 0,
        conditions: Conditions | None = None,
    ):
        self.pipe, self.call, self.prompts, self.seed = pipe, dict(call or {}), list(prompts), seed
        self._given = conditions if callable(conditions) else None
        self._lists: dict[str, Any] = {} if conditions is None or self._given else dict(conditions)
        self.network_evaluations = self.network_calls = 0
        self.is_answered: Callable[[nn.Module], bool] = lambda module: False
        self.accepted = arguments_of(pipe)
        self._guider = self._made_guider()
        self.timed = _timed_networks(pipe)
        self.denoisers = [m for name, m in self.timed.items() if not name.startswith(SIDE_NAMES)]
        self._check()
        self._encoded = PromptMemo(pipe)
        self._hooks = [m.register_forward_pre_hook(self._count, with_kwargs=True) for m in self.denoisers]

    def close(self) -> None:
        """Take the counters from the denoisers."""
        for hook in self._hooks:
            hook.remove()

    def _made_guider(self) -> Any:
        """That of a modular pipeline, at the scale of the call; None where the call itself takes one."""
        guider, scale = getattr(self.pipe, "guider", None), self.call.get("guidance_scale")
        if scale is None or guider is None or "guidance_scale" in self.accepted:
            return None
        return guider.new(guidance_scale=scale)

    @property
    def guidance_scale(self) -> float | None:
        """Of these runs: the call's, or the pipeline's own."""
        return self.call.get("guidance_scale", own_guidance(self.pipe))

    def _check(self) -> None:
        name = type(self.pipe).__name__
        scheduler = vars(self.pipe).get("scheduler")  # diffusers answers for an absent one with its configuration
        if scheduler is None:
            raise ValueError(f"{name} has no scheduler, so there is nothing for a solver to take the place of")
        if type(scheduler).__name__ in DISTILLED or scheduler.config.get("stochastic_sampling"):
            raise ValueError(
                f"{name} is sampled by {type(scheduler).__name__}, which draws noise between the few levels that a "
                "distilled model was trained for; no solver can be searched for it, so keep its own scheduler"
            )
        given, guided = {*self.call, *self._lists}, {"guidance_scale"} if self._guider else set()
        if unknown := sorted(given - set(self.accepted) - guided):
            raise ValueError(f"{name} takes no argument {unknown[0]!r}; it takes: {', '.join(self.accepted)}")
        if not self.denoisers:
            raise ValueError(f"{name} has no denoiser among its components ({', '.join(self.pipe.components)})")
        chosen = set() if self._given else {"class_labels", "prompt", "batch_size", *self._lists}
        if taken := sorted(set(self.call) & {*OWN_ARGUMENTS, *chosen}):
            raise ValueError(f"{taken[0]!r} is chosen sample by sample; leave it out of the call's arguments")
        if empty := [key for key, values in self._lists.items() if not len(values)]:
            raise ValueError(f"conditions[{empty[0]!r}] is empty; give one entry a sample")
        if self._given or self._lists or "class_labels" in self.accepted:
            return
        if "prompt" in self.accepted and not self.prompts:
            raise ValueError(f"{name} takes prompts; give some: prompts, or of a command prompts_file")
        if not {"prompt", "batch_size"} & set(self.accepted):
            raise ValueError(f"{name} takes neither class_labels nor prompt nor batch_size; give it conditions")

    def _count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.is_answered(module):
            self.network_calls += 1
            self.network_evaluations += _batch_size(args, kwargs)

    def conditions(self, indices: Sequence[int]) -> dict[str, Any]:
        """The call arguments that belong to these samples."""
        if self._given is not None:
            return dict(self._given(indices))
        found = {key: _entries(values, indices) for key, values in self._lists.items()}
        if "class_labels" in self.accepted:
            return {"class_labels": spread_classes(self._classes(), indices), **found}
        if self.prompts:
            one_for_all = {k: [v] * len(indices) for k, v in self.call.items() if _is_text(k, v)}
            return {**one_for_all, "prompt": _entries(self.prompts, indices), **found}
        return found or {"batch_size": len(indices)}

    def _classes(self) -> int:
        if isinstance(count := getattr(self.pipe, "num_classes", None), int):
            return count
        for module in self.denoisers:
            for key in CLASS_COUNTS:
                if count := getattr(getattr(module, "config", None), key, None):
                    return count
        raise ValueError(
            f"no denoiser of {type(self.pipe).__name__} says how many classes there are ({', '.join(CLASS_COUNTS)} in "
            "its configuration); give it conditions"
        )

    def generators(self, indices: Sequence[int], split: str) -> list[torch.Generator]:
        """One generator a sample, keyed by (seed, split, index)."""
        keys = [f"{self.seed}/{split}/{i}".encode() for i in indices]
        seeds = [int.from_bytes(hashlib.sha256(key).digest()[:7], "big") for key in keys]
        return [torch.Generator("cpu").manual_seed(s) for s in seeds]

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count from 0, and go on afterwards as if nothing had been counted."""
        before = self.network_evaluations, self.network_calls
        self.network_evaluations = self.network_calls = 0
        try:
            yield
        finally:
            self.network_evaluations, self.network_calls = before

    @contextmanager
    def using(self, scheduler: Any) -> Iterator[None]:
        """Give the pipeline another scheduler; its own is put back afterwards."""
        before, self.pipe.scheduler = self.pipe.scheduler, scheduler
        try:
            yield
        finally:
            self.pipe.scheduler = before

    def __call__(self, indices: Sequence[int], split: str, num_inference_steps: int, **extra: Any) -> Any:
        """One call of the pipeline on these samples."""
        arguments = {**self.call, **self.conditions(indices), **extra}
        arguments |= {"num_inference_steps": num_inference_steps, "generator": self.generators(indices, split)}
        with self._encoded.used(extra):
            if blocks := getattr(self.pipe, "blocks", None):
                return self._modular(blocks, arguments)
            return self.pipe(**arguments)

    def _modular(self, blocks: Any, arguments: dict[str, Any]) -> tuple[Any]:
        """A call of a modular pipeline, whose output is like that of others."""
        before, names = getattr(self.pipe, "guider", None), [output.name for output in blocks.outputs]
        if self._guider is not None:
            self.pipe.guider = self._guider
            del arguments["guidance_scale"]
        try:
            return (self.pipe(**arguments, output=next((name for name in OUTPUTS if name in names), "latents")),)
        finally:
            if self._guider is not None:
                self.pipe.guider = before

    @functools.cached_property
    def _weights(self) -> list[str]:
        """Digests of all networks, which nothing changes while a sampler lives."""
        return [weights(name, m) for name, m in self.pipe.components.items() if isinstance(m, nn.Module)]

    def fingerprint(self, indices: Sequence[int] = range(FINGERPRINTED)) -> dict[str, Any]:
        """Plain data that tells runs on these samples apart: weights, noise schedule, call, conditions, seed."""
        scheduler = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")}
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        given = digest(self.conditions(indices)) if self._given or self._lists else None
        call = {k: v if is_plain(v) else digest(v) for k, v in self.call.items()}
        facts = [self._weights, scheduler, call, prompts, given, self.seed]
        text = json.dumps(facts, sort_keys=True, default=str)
        return {"pipeline": type(self.pipe).__name__, "key": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _timed_networks(pipe: Any) -> dict[str, nn.Module]:
    """Components that are called once a step, by name: their forward takes a time, or their name is a denoiser's."""

    def takes_time(name: str, module: nn.Module) -> bool:
        if any(part in name for part in NOT_TIMED):
            return False
        return name.startswith(DENOISER_NAMES) or any(
            p.startswith("timestep") for p in inspect.signature(module.forward).parameters
        )

    networks = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    return {name: m for name, m in networks.items() if takes_time(name, m)}


def _batch_size(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Samples in one call of a denoiser, which takes a tensor (B, ...) or a list of B tensors."""
    for value in (*(kwargs[name] for name in INPUT_NAMES if name in kwargs), *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0]
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
            return len(value)
    return 1


def _entries(values: Any, indices: Sequence[int]) -> Any:
    """The entry of each sample: a batch of tensors, or a list."""
    found = [values[i % len(values)] for i in indices]
    return torch.stack(found) if found and all(isinstance(entry, Tensor) for entry in found) else found


def _is_text(name: str, value: Any) -> bool:
    """Whether a call argument is a prompt for all samples, which pipelines want once a sample."""
    return isinstance(value, str) and PROMPT.fullmatch(name) is not None
