"""The objective on decoded images: how far a pipeline's pictures are from the teacher's, in the features of a network.

    loss = mean over layers of |f_l(images) - f_l(teacher's images)|^2,
           f_l scaled to unit length over channels, the mean taken over samples, frames and places

Images come from the pipeline's own call, which goes on to its end after the last step with gradients on; the teacher's
from the same call with the last step's result replaced by the teacher's final state. No pipeline is known by name: one
whose call does not carry the gradient through is refused before the search.

Source: Zhang et al., arXiv 1801.03924, eq. 1, without learned weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import Tensor
from tqdm.auto import tqdm

from ..console import one_line
from ..images.networks import FeatureNetwork, described, distance
from ..pipeline.probe import ProbeScheduler, run
from ..pipeline.replay import uncounted
from ..pipeline.sampler import Sampler
from ..teacher.trajectories import Reference
from .closed_form import Candidate, ClosedForm, Samples
from .gradient import Descent
from .objective import terminal_loss
from .parameters import CorrectionParameters, nodes_from_logits
from .preflight import REPEATED, SPLIT

OTHERWISE = "use objective terminal"
MOST_CALLS = 6  # with more, the pictures are next to the teacher's


# --- feature networks -------------------------------------------------------------------------------------------------


# --- objective --------------------------------------------------------------------------------------------------------


class Perceptual:
    """Images of prepared runs, and their distance from the teacher's.

    Args:
        network: of the features, on the pipeline's device.
        sampler, probe: the pipeline and the scheduler that runs in it.
    """

    def __init__(self, network: FeatureNetwork, sampler: Sampler, probe: ProbeScheduler) -> None:
        self.network, self.sampler, self.probe = network, sampler, probe
        self.name = type(sampler.pipe).__name__
        self._steps = 1  # of the call that decodes a state: the fewest that the pipeline takes
        self._wanted: dict[tuple[str, int], list[Tensor]] = {}
        for module in sampler.pipe.components.values():  # a decoder recomputed block by block in the backward pass
            if isinstance(module, ModelMixin) and hasattr(module, "decode") and module._supports_gradient_checkpointing:
                module.enable_gradient_checkpointing()

    def images(self, indices: Sequence[int], split: str, nfe: int) -> tuple[list[Tensor], Tensor]:
        """One run prepared with `decode`: its N+1 states and its images (B, C, H, W), or frames (B, F, C, H, W), in
        [0, 1].

        Raises:
            ValueError: the output holds no images.
        """
        with self._for_images():
            states = run(self.sampler, self.probe, indices, split, nfe)
        output, self.probe.output = self.probe.output, None
        images = output[0]
        if not isinstance(images, Tensor):
            raise self._refusal(f"the output is {described(images)}, not a tensor")
        if images.ndim not in (4, 5) or len(images) != len(indices) or images.shape[-3] not in (1, 3):
            raise ValueError(
                f"{self.name} gives {described(images)} for {len(indices)} samples, which is no batch of images with "
                f"1 or 3 channels; {OTHERWISE}"
            )
        return states, images

    def check(self, samples: int = 2) -> str:
        """Try all of it on a few samples, uncounted, before anything is spent; what was found, in a sentence.

        Raises:
            ValueError: one line saying why the pipeline's images or the feature network cannot be used.
        """
        if "output_type" not in self.sampler.accepted:
            raise ValueError(f"{self.name} takes no output_type, so no images can be asked for; {OTHERWISE}")
        with uncounted(self.sampler):
            logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            self.probe.prepare(nodes_from_logits(logits), decode=True)
            states, images = self._tried(range(samples), 2)
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
            again = self._fewest_steps(range(samples), states[-1][:samples].detach())
            change = (again - images.detach()).double().norm() / images.detach().double().norm().clamp(min=1e-30)
            if not change <= REPEATED:
                raise ValueError(
                    f"{self.name} decodes the same final state to other images in a call of {self._steps} steps "
                    f"(relative change {change:.2g}), so the teacher's cannot be made; {OTHERWISE}"
                )
        shape = " x ".join(map(str, images.shape[1:]))
        return f"Objective perceptual: images of {shape}, {len(features)} layers of features."

    def remember(self, split: str, batches: Sequence[Samples], progress: bool = False) -> None:
        """Keep the features of these samples' teacher images on the CPU: one evaluation a sample, or two of pipelines
        that do not take one step."""
        for indices, reference in tqdm(batches, desc=f"reference images, {split}", unit="batch", disable=not progress):
            images = self._decoded(indices, split, reference.final)
            with torch.no_grad():
                layers = [layer.cpu() for layer in self.network(images)]
            for k, index in enumerate(indices):
                self._wanted[split, index] = [layer[k].clone() for layer in layers]

    def loss(self, images: Tensor, split: str, indices: Sequence[int]) -> Tensor:
        """Mean over these samples, which `remember` has seen."""
        features = self.network(images)
        kept = zip(*(self._wanted[split, index] for index in indices), strict=True)
        return distance(features, [torch.stack(layer).to(images.device) for layer in kept])

    def held_out(
        self, form: ClosedForm, raw: Tensor, rows: Sequence[Sequence[float]], offsets: Tensor | None
    ) -> tuple[float, float]:
        """(perceptual loss, final-state mse) of a solver on every process's validation samples."""
        total, count, errors = torch.zeros((), dtype=torch.float64), 0.0, []
        with torch.no_grad():
            for indices, reference in form.batches(form.validation):
                self.probe.prepare(raw, rows, offsets=offsets, decode=True)
                states, images = self.images(indices, "validation", len(raw) - 1)
                total += len(indices) * self.loss(images, "validation", indices).double().cpu()
                count += len(indices)
                errors.append(states[-1][: len(indices)] - reference.final.to(states[-1].device))
        summed = form.reduce(torch.stack([total, torch.tensor(count, dtype=torch.float64)]))
        return float(summed[0] / summed[1]), form.mean_square(torch.cat(errors))

    def _decoded(self, indices: Sequence[int], split: str, final: Tensor) -> Tensor:
        """Images of final states (B, ...)."""
        nodes = torch.linspace(1, 0, self._steps + 1, dtype=torch.float64)
        self.probe.prepare(nodes, final=final, decode=True)
        return self.images(indices, split, self._steps)[1]

    def _fewest_steps(self, indices: Sequence[int], final: Tensor) -> Tensor:
        """Images of final states by a call of one step, or of two if the pipeline fails with one."""
        self._steps = 1
        try:
            return self._decoded(indices, SPLIT, final)
        except Exception:  # whatever a grid of one step makes a pipeline raise
            self._steps = 2
            return self._decoded(indices, SPLIT, final)

    def _tried(self, indices: Sequence[int], nfe: int) -> tuple[list[Tensor], Tensor]:
        try:
            return self.images(indices, SPLIT, nfe)
        except Exception as error:  # whatever a pipeline raises
            if isinstance(error, ValueError) and self.name in str(error):
                raise
            raise self._refusal(one_line(error)) from error

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"{self.name}'s images carry no gradient ({reason}); {OTHERWISE}")

    @contextmanager
    def _for_images(self) -> Iterator[None]:
        """The call asked for tensors, and without a safety checker, which would look at pictures outside the graph."""
        sampler, parts = self.sampler, vars(self.sampler.pipe)
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


class PerceptualDescent(Descent):
    """A descent in the perceptual loss, which also decides on held-out samples.

    Args:
        perceptual: has seen the training and validation samples of the form.

    Attributes:
        before, reached: held-out perceptual loss of the candidate, and of the best.
    """

    def __init__(
        self,
        form: ClosedForm,
        candidate: Candidate,
        parameters: CorrectionParameters,
        perceptual: Perceptual,
        on_call: Callable[[float, float], object] = lambda loss, best: None,
    ) -> None:
        super().__init__(form, candidate, parameters, terminal_loss, on_call)
        self.perceptual = perceptual
        rows = candidate.spec.coefficients
        self.before, _ = perceptual.held_out(form, candidate.raw, rows, candidate.offsets)
        self.reached = self.before if math.isfinite(self.before) else math.inf

    def _batch_loss(self, indices: Sequence[int], reference: Reference) -> Tensor:
        with self._prepared(decode=True):
            _, images = self.perceptual.images(indices, "train", self.parameters.nfe)
        return self.perceptual.loss(images, "train", indices)

    def _held_out(self, raw: Tensor, rows: Sequence[Sequence[float]], offsets: Tensor | None) -> tuple[float, float]:
        return self.perceptual.held_out(self.form, raw, rows, offsets)
