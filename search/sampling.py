"""A diffusers pipeline as the search and the comparison see it: samples in, states out, network calls counted.

A sample is an index; its noise comes from a generator of its own and its condition from its index, so that neither
the batch nor the number of processes it is run in changes it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_dssolver import pipelines

DENOISER_NAMES = ("transformer", "unet", "prior", "dit")


def load_pipeline(name_or_path: str, dtype: str = "float32", device: Any = "cpu", revision: str | None = None) -> Any:
    """Any pipeline by Hub id or folder, ours (`diffusers_dssolver.pipelines`) included, frozen, on a device.

    Raises:
        ValueError: one line that names what could not be loaded.
    """
    try:
        cls_name = DiffusionPipeline.load_config(name_or_path, revision=revision).get("_class_name")
        cls = getattr(pipelines, cls_name, DiffusionPipeline) if isinstance(cls_name, str) else DiffusionPipeline
        pipe = cls.from_pretrained(name_or_path, dtype=getattr(torch, dtype), revision=revision)
    except (OSError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no pipeline could be loaded from {name_or_path!r}: {reason}") from error
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class Sampler:
    """Runs a pipeline's own call on chosen samples with a chosen scheduler.

    Args:
        pipe: the pipeline.
        call: further arguments of its call (`guidance_scale`, `height`, ...), the same for every run.
        prompts: for pipelines that take a prompt; sample i gets prompt i modulo their number.
        seed: of all noise.

    Attributes:
        network_evaluations: samples that went through the denoiser so far, a guided call counting its doubled batch.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any] | None = None, prompts: Sequence[str] = (), seed: int = 0):
        self.pipe, self.call, self.prompts, self.seed = pipe, dict(call or {}), list(prompts), seed
        self.network_evaluations = 0
        self.accepted = inspect.signature(pipe.__call__).parameters
        if unknown := sorted(set(self.call) - set(self.accepted)):
            raise ValueError(
                f"{type(pipe).__name__} takes no argument {unknown[0]!r}; it takes: {', '.join(self.accepted)}"
            )
        if "prompt" in self.accepted and not self.prompts:
            raise ValueError(f"{type(pipe).__name__} takes prompts; give a text file with one per line as prompts_file")
        denoisers = [
            module
            for name, module in pipe.components.items()
            if isinstance(module, nn.Module) and name.startswith(DENOISER_NAMES)
        ]
        if not denoisers:
            raise ValueError(
                f"{type(pipe).__name__} has no denoiser among its components ({', '.join(pipe.components)})"
            )
        for module in denoisers:
            module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        self.network_evaluations += first.shape[0]

    def conditions(self, indices: Sequence[int]) -> dict[str, Any]:
        """The call arguments that belong to these samples."""
        if "class_labels" in self.accepted:
            config = self.pipe.transformer.config
            return {"class_labels": [i % config.num_embeds_ada_norm for i in indices]}
        if "prompt" in self.accepted:
            return {"prompt": [self.prompts[i % len(self.prompts)] for i in indices]}
        return {"batch_size": len(indices)}

    def generators(self, indices: Sequence[int], split: str) -> list[torch.Generator]:
        """One generator a sample, keyed by (seed, split, index)."""
        keys = [f"{self.seed}/{split}/{i}".encode() for i in indices]
        seeds = [int.from_bytes(hashlib.sha256(key).digest()[:7], "big") for key in keys]
        return [torch.Generator("cpu").manual_seed(s) for s in seeds]

    @contextmanager
    def using(self, scheduler: Any) -> Iterator[None]:
        """The pipeline with another scheduler, its own put back afterwards."""
        before, self.pipe.scheduler = self.pipe.scheduler, scheduler
        try:
            yield
        finally:
            self.pipe.scheduler = before

    def __call__(self, indices: Sequence[int], split: str, num_inference_steps: int, **extra: Any) -> Any:
        """One call of the pipeline on these samples."""
        arguments = {**self.call, **self.conditions(indices), **extra}
        return self.pipe(
            num_inference_steps=num_inference_steps, generator=self.generators(indices, split), **arguments
        )

    def fingerprint(self) -> dict[str, Any]:
        """What a reference trajectory depends on: weights, noise schedule, call, prompts, seed; plain data."""
        digests = []
        for name, module in self.pipe.components.items():
            if isinstance(module, nn.Module):
                digest = hashlib.sha256(name.encode())
                for parameter in module.parameters():
                    digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                digests.append(digest.hexdigest())
        scheduler = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")}
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        text = json.dumps([digests, scheduler, self.call, prompts, self.seed], sort_keys=True, default=str)
        return {"pipeline": type(self.pipe).__name__, "key": hashlib.sha256(text.encode()).hexdigest()[:16]}


def read_prompts(path: str | None) -> list[str]:
    """Prompts from a text file, one per line, blank lines left out."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts_file {path!r} could not be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts_file {path!r} holds no prompt")
    return prompts
