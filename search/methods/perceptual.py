"""The objective on decoded images: how far a pipeline's pictures are from the teacher's, in the features of a network.

    loss = mean over layers of |f_l(images) - f_l(teacher's images)|^2,
           f_l scaled to unit length over channels, the mean taken over samples, frames and places

Images come from the pipeline's own call, which goes on to its end after the last step with gradients on; the teacher's
from the same call with the last step's result replaced by the teacher's final state. No pipeline is known by name: one
whose call does not carry the gradient through is refused before the search.

Source: Zhang et al., arXiv 1801.03924, eq. 1, without learned weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import ModelMixin
from torch import Tensor

from diffusers_dssolver.paths import as_float64

from ..console import one_line
from ..images.networks import FeatureNetwork, described, distance
from ..pipeline.plan import Plan, nodes_from_logits
from ..pipeline.student import Student, Trajectory
from ..teacher.ends import even_nodes
from .preflight import REPEATED, SPLIT
from .problem import Problem, Samples

OTHERWISE = "use objective terminal"
MOST_CALLS = 6  # with more, the pictures are next to the teacher's


class Perceptual:
    """Images of runs, and their distance from the teacher's.

    Args:
        network: of the features, on the pipeline's device.
        student: the pipeline.
    """

    def __init__(self, network: FeatureNetwork, student: Student) -> None:
        self.network, self.student = network, student
        self._steps = 1  # of the call that decodes a state: the fewest that the pipeline takes
        self._wanted: dict[tuple[str, int], list[Tensor]] = {}
        for module in student.sampler.pipe.components.values():  # recompute a decoder block by block, as the networks
            if isinstance(module, ModelMixin) and hasattr(module, "decode") and module._supports_gradient_checkpointing:
                module.enable_gradient_checkpointing()

    def run(self, plan: Plan, indices: Sequence[int], split: str, final: Tensor | None = None) -> Trajectory:
        """A run whose output is its images (B, C, H, W), or frames (B, F, C, H, W), in [0, 1].

        Args:
            final: states (B, ...) to decode in place of the run's own.

        Raises:
            ValueError: the output holds no images.
        """
        with self._for_images():
            run = self.student.run(plan, indices, split, decode=True, final=final)
        images = run.output[0]
        if not isinstance(images, Tensor):
            raise self._refusal(f"the output is {described(images)}, not a tensor")
        if images.ndim not in (4, 5) or len(images) != len(indices) or images.shape[-3] not in (1, 3):
            raise ValueError(
                f"{self.student.name} gives {described(images)} for {len(indices)} samples, which is no batch of "
                f"images with 1 or 3 channels; {OTHERWISE}"
            )
        return replace(run, output=images)

    def check(self, samples: int = 2) -> str:
        """Try all of it on a few samples, uncounted, before anything is spent; what was found, in a sentence.

        Raises:
            ValueError: one line saying why the pipeline's images or the feature network cannot be used.
        """
        name = self.student.name
        if "output_type" not in self.student.sampler.accepted:
            raise ValueError(f"{name} takes no output_type, so no images can be asked for; {OTHERWISE}")
        with self.student.sampler.uncounted():
            logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            run = self._tried(Plan(nodes_from_logits(logits)), range(samples))
            images = run.output
            if not images.requires_grad:
                raise self._refusal("the output has no graph")
            features = self.network(images)
            if not all(f.requires_grad for f in features):
                raise ValueError(f"feature_network {self.network.name!r} gives features without a gradient")
            try:
                (slope,) = torch.autograd.grad(distance(features, [f.detach().roll(1, 0) for f in features]), logits)
            except RuntimeError as error:  # what autograd raises, also for want of memory
                raise self._refusal(one_line(error)) from error
            if not torch.isfinite(slope).all():
                raise self._refusal("it is not finite")
            again = self._decoded_in_fewest_steps(range(samples), run.final.detach())
            change = as_float64(again - images).norm() / as_float64(images).norm().clamp(min=1e-30)
            if not change <= REPEATED:
                raise ValueError(
                    f"{name} decodes the same final state to other images in a call of {self._steps} steps (relative "
                    f"change {change:.2g}), so the teacher's cannot be made; {OTHERWISE}"
                )
        shape = " x ".join(map(str, images.shape[1:]))
        return f"Objective perceptual: images of {shape}, {len(features)} layers of features."

    def remember(self, problem: Problem, samples: Samples, advance: Callable[[], object] = lambda: None) -> None:
        """Keep the features of these samples' teacher images on the CPU. Costs one evaluation a sample, or two with
        pipelines that do not take one step.

        Args:
            advance: called after each batch.
        """
        for batch in problem.batches(samples):
            indices = batch.samples.indices
            images = self._decoded(indices, samples.split, batch.teacher.final)
            with torch.no_grad():
                layers = [layer.cpu() for layer in self.network(images)]
            for k, index in enumerate(indices):
                self._wanted[samples.split, index] = [layer[k].clone() for layer in layers]
            advance()

    def loss(self, images: Tensor, samples: Samples) -> Tensor:
        """Mean over these samples, which `remember` has seen."""
        features = self.network(images)
        kept = zip(*(self._wanted[samples.split, index] for index in samples.indices), strict=True)
        return distance(features, [torch.stack(layer).to(images.device) for layer in kept])

    def held_out(self, problem: Problem, plan: Plan) -> tuple[float, float]:
        """(perceptual loss, final-state mse) of a solver on every process's validation samples."""
        total, count, errors = torch.zeros((), dtype=torch.float64), 0.0, []
        with torch.no_grad():
            for batch in problem.batches(problem.validation):
                run = self.run(plan, batch.samples.indices, batch.samples.split)
                total += len(batch) * as_float64(self.loss(run.output, batch.samples))
                count += len(batch)
                errors.append(batch.off(run))
        summed = problem.reduce(torch.stack([total, torch.tensor(count, dtype=torch.float64)]))
        return float(summed[0] / summed[1]), problem.mean_square(torch.cat(errors))

    def _decoded(self, indices: Sequence[int], split: str, final: Tensor) -> Tensor:
        """Images of final states (B, ...)."""
        return self.run(Plan(even_nodes(self._steps)), indices, split, final).output

    def _decoded_in_fewest_steps(self, indices: Sequence[int], final: Tensor) -> Tensor:
        """Images of final states by a call of one step, or of two if the pipeline fails with one."""
        self._steps = 1
        try:
            return self._decoded(indices, SPLIT, final)
        except Exception:  # whatever a grid of one step makes a pipeline raise
            self._steps = 2
            return self._decoded(indices, SPLIT, final)

    def _tried(self, plan: Plan, indices: Sequence[int]) -> Trajectory:
        try:
            return self.run(plan, indices, SPLIT)
        except Exception as error:  # whatever a pipeline raises
            if isinstance(error, ValueError) and self.student.name in str(error):
                raise
            raise self._refusal(one_line(error)) from error

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"{self.student.name}'s images carry no gradient ({reason}); {OTHERWISE}")

    @contextmanager
    def _for_images(self) -> Iterator[None]:
        """Ask the call for tensors, and leave out a safety checker, which would look at pictures outside the graph."""
        sampler, parts = self.student.sampler, vars(self.student.sampler.pipe)
        call, checker = sampler.call, parts.get("safety_checker")
        sampler.call = {**call, "output_type": "pt"}
        if checker is not None:
            parts["safety_checker"] = None
        try:
            yield
        finally:
            sampler.call = call
            if checker is not None:
                parts["safety_checker"] = checker
