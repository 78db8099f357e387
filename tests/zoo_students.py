"""The pipelines of the zoo as students."""

from __future__ import annotations

import functools

import pytest
import torch

from dssolver_search.pipeline.loading import freeze
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.pipeline.student import Student
from tests.pipelines.zoo import ZOO

NAMES = (
    "Stable Diffusion", "SDXL", "PixArt-Sigma", "Stable Diffusion 3", "FLUX", "Sana", "Lumina 2", "AuraFlow", "Wan",
    "LTX", "CogVideoX", "DDPM", "DiT", "Qwen-Image", "HunyuanVideo", "Mochi", "Chroma", "CogView4",
)  # fmt: skip
LEFT_OUT = (
    "SDXL base",  # takes a part of the times
    "Stable Diffusion 3 ControlNet",  # draws noise of no generator
    "HiDream",  # no gradient passes its experts
    "Qwen-Image Edit Plus",  # takes one prompt at a time
    "LTX-2 sound",  # the run of LTX-2
    "SkyReels-V2 diffusion forcing",  # steps copies of the scheduler
    "Kandinsky 5",  # writes into its states, which gradients need as they were
)
OTHERS = tuple(name for name in ZOO if name not in (*NAMES, *LEFT_OUT))


def cases(short):
    """A test parameter for each pipeline; those not in `short` are marked slow."""
    marks = {True: [], False: [pytest.mark.slow]}
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=marks[n in short], id=n.replace(" ", "_")) for n in (*NAMES, *OTHERS)]
    )


@functools.cache
def student_of(name, dtype=torch.float64):
    """A pipeline of the zoo with its embeddings as conditions. All in one dtype: a mask of another one than the
    queries' gives torch's attention on the CPU a wrong gradient."""
    entry = ZOO[name]
    pipe = freeze(entry.make()).to(dtype)
    if "SDXL" in name:
        pipe.vae.register_to_config(force_upcast=False)  # to float32, where pictures are float64

    def conditions(indices):
        arguments = entry.arguments(pipe, indices) | ({"strength": 1.0} if entry.strength else {})
        tensors = {k: v.to(dtype) for k, v in arguments.items() if torch.is_tensor(v) and v.is_floating_point()}
        stateless = {"use_kv_cache": False} if name == "Qwen-Image 2.1" else {}  # as calls that are replayed must be
        return arguments | tensors | stateless

    return Student(Sampler(pipe, conditions=conditions))
