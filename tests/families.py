"""Tiny models of either family, and what is run on them: random one-layer transformers made slow in time, so that a few
dozen steps converge as on a real model.
"""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from diffusers_dssolver.paths import FlowPath, VPPath, make_betas
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.methods.problem import Problem, Samples
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.pipeline.student import Student
from dssolver_search.teacher.trajectories import Teacher, teacher_trajectory
from tests.problems import GaussianProblem

FAMILIES = ("flow", "vp")
CLASSES = 3
BETA_END = 0.006  # a first alpha of 0.2: a random network's errors stay of the size of its data
WARP = (0.5, -0.3, 0.2)
both = pytest.mark.parametrize("family", FAMILIES)


def make_scheduler(family):
    return FlowMatchEulerDiscreteScheduler() if family == "flow" else DDIMScheduler(beta_end=BETA_END)


def make_path(family):
    return FlowPath() if family == "flow" else VPPath(make_betas(1000, 1e-4, BETA_END, "linear", None, False))


def make_pipe(family, seed=0, dtype=torch.float32):
    """A random class-conditional model of 4 x 4 pixels whose output changes slowly with time."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_num_groups=1,
    )
    for name, parameter in transformer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.25)
        if name.endswith("timestep_embedder.linear_1.weight"):  # 128 frequencies, twice: without the fast ones
            parameter.data[:, (torch.arange(256) % 128) < 80] = 0
    pipe = SiTPipeline(transformer.eval().requires_grad_(False).to(dtype), make_scheduler(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sampler(pipe, guidance_scale=1.5, seed=0):
    return Sampler(pipe, {"guidance_scale": guidance_scale}, seed=seed)


def make_student(pipe, guidance_scale=1.5, seed=0, **options):
    return Student(make_sampler(pipe, guidance_scale, seed), **options)


def trajectory_of(student, indices=range(4), split="train", steps=20, order=3, end=0.0, **options):
    """A teacher trajectory without a progress bar."""
    return teacher_trajectory(student, Teacher(steps, order, end), indices, split, 16, progress=False, **options)


def problem_of(student, samples=4, steps=60, **options):
    """So many train and so many other samples, with converged trajectories."""
    indices = range(samples)
    parts = [Samples(name, indices, trajectory_of(student, indices, name, steps)) for name in ("train", "validation")]
    return Problem(student, *parts, **{"num_trial_samples": samples, **options})


@functools.cache
def searched(family):
    """A problem of four samples in float64."""
    return problem_of(make_student(make_pipe(family, dtype=torch.float64)))


class Recording:
    """The states and guided outputs that pass through a pipeline's transformer, one entry per call."""

    def __init__(self, pipe, guidance_scale=1.5):
        self.pipe, self.scale, self.states, self.outputs, self.times = pipe, guidance_scale, [], [], []

    def __enter__(self):
        self.handle = self.pipe.transformer.register_forward_hook(self.hook, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.handle.remove()

    def hook(self, module, args, kwargs, result):
        with_class, without = result[0].chunk(2)
        self.outputs.append(without + self.scale * (with_class - without))
        self.states.append(args[0].chunk(2)[0])
        self.times.append(float(kwargs["timestep"][0]))


class GaussianModel(ModelMixin, ConfigMixin):
    """The exact network of Gaussian data whose mean hangs on the class: its flow is linear and solvable."""

    @register_to_config
    def __init__(self, kind="flow", in_channels=1, sample_size=2, num_embeds_ada_norm=CLASSES):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor([0.8, -0.3, 0.1, 0.4]))  # the last is that of no class
        self.path = make_path(kind)

    def forward(self, x, timestep, class_labels, return_dict=False):
        alpha, sigma = (f.item() for f in self.path.alpha_sigma(self.path.node(timestep[0])))
        problem = self.problem(self.means[class_labels])
        denoised = problem.denoised(x.double(), alpha, sigma)
        flow = self.config["kind"] == "flow"
        return (((x - (1 if flow else alpha) * denoised) / sigma).to(x.dtype),)

    def problem(self, means):
        return GaussianProblem("flow", means.detach().double().reshape(-1, 1, 1, 1), torch.tensor(0.5).double())
