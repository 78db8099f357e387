"""What a search can do with a pipeline, tried out on the pipeline itself before anything is spent.

Each group of a solver's numbers (coefficients, model times, nodes) is moved along a random direction v. With central
differences D = (x(h v) - x(-h v)) / 2h of the final states x and a cotangent w, which is D of one size h scaled to unit
length, <w, dx/dv> by autograd must be <w, D>. Zero beside a non-zero difference is the signature of a pipeline that
takes its time out of the graph. No list of pipelines: whatever runs is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from diffusers_dssolver.paths import as_float64

from ..console import one_line
from ..pipeline.plan import Plan, nodes_from_logits
from ..pipeline.student import Student, Trajectory
from ..settings import GROUPS

VERDICTS = ("full", "coefficients", "forward_only")
SPLIT = "preflight"  # its noise is no other split's
STEPS = 3
ROUNDINGS = 16  # of a state in one run; more of them in a network, and the differences of two
REPEATED = 1e-2  # relative change of a run that is made again: no more than the summation order of a device


@dataclass(frozen=True)
class Precision:
    """How finely differences can be taken: sizes h, largest first, and the relative error allowed to the best."""

    sizes: tuple[float, ...]
    tolerance: float


PRECISIONS = {
    torch.float64: Precision((1e-1, 1e-2, 1e-3, 1e-4), 0.01),
    torch.float32: Precision((1e-1, 3e-2, 1e-2, 3e-3), 0.02),
    torch.bfloat16: Precision((0.5, 0.25, 0.1), 0.3),
    torch.float16: Precision((0.3, 0.1, 0.05), 0.2),
}


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Attributes:
        pipeline: its class.
        calls_per_step: of the denoiser.
        guidance: "none", "one call" (of a larger batch), "two calls", or how many.
        evaluations_per_sample: by the denoiser in one step, guidance included.
        agreement: slopes by autograd and by differences of each group; empty where gradients were not tried.
        weight_bytes: of all networks.
        activation_bytes: of one sample in one denoiser call that is differentiated.
        state_bytes: of one sample and step of a run with gradients whose denoiser is recomputed.
        verdict: "full", "coefficients" (nodes and times stay fixed) or "forward_only" (closed form needs no more).
        reason: why not "full"; empty there.
    """

    pipeline: str
    calls_per_step: float
    guidance: str
    evaluations_per_sample: float
    agreement: Mapping[str, tuple[float, float]]
    weight_bytes: int
    activation_bytes: int
    state_bytes: int
    verdict: str
    reason: str

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The groups that get gradients."""
        return {"full": GROUPS, "coefficients": ("coefficients",), "forward_only": ()}[self.verdict]

    def gradient_bytes(self, nfe: int, samples: int) -> int:
        """Estimated peak of one gradient step: the networks, one differentiated call, and nfe steps' states."""
        return self.weight_bytes + samples * (self.activation_bytes + nfe * self.state_bytes)

    def __str__(self) -> str:
        slopes = ", ".join(f"{group} {a:.4g} against {d:.4g}" for group, (a, d) in self.agreement.items())
        sentences = [
            f"{self.pipeline}: {self.calls_per_step:g} network calls a step, guidance: {self.guidance} "
            f"({self.evaluations_per_sample:g} evaluations per sample and step)",
            f"slopes by autograd against differences: {slopes}" if slopes else "gradients were not tried",
            f"a gradient step of 8 calls on 8 samples takes about {_human(self.gradient_bytes(8, 8))}"
            if self.activation_bytes
            else "",
            {
                "full": "everything can be searched by gradients",
                "coefficients": f"coefficients only can be searched by gradients: {self.reason}",
                "forward_only": f"forward evaluations only: {self.reason}" if self.agreement else "",
            }[self.verdict],
        ]
        return ". ".join(s for s in sentences if s) + "."


def preflight(student: Student, nfe: int = STEPS, samples: int = 2, gradients: bool = True) -> Preflight:
    """Run the pipeline on a few samples of its own, forwards and, if asked, with gradients.

    Args:
        nfe: steps of these runs; at least two, for one step has no coefficients.
        samples: how many run together; with two, guidance can be told from a batch.
        gradients: False: no backward pass is tried, and the verdict is "forward_only".

    Raises:
        ValueError: one line saying why no search can use this pipeline: it raises, takes another number of steps or
            another scheduler, gives values that are not finite, or another result each time.
    """
    if nfe < 2 or samples < 1:
        raise ValueError(f"nfe is {nfe} and samples {samples}; 2 and 1 are the least")
    with student.sampler.uncounted():
        trial = _Trial(student, nfe, samples)
        found = trial.forwards()
        if not gradients:
            return Preflight(**found, **_verdict({}, {"": "gradients were not tried"}))
        agreement, failures = trial.gradients()
        sizes = {} if "coefficients" in failures else trial.bytes()
    return Preflight(**{**found, **sizes}, **_verdict(agreement, failures))


class _Trial:
    """The runs of one preflight: around a solver near the classical one, with all of its numbers in general position.

    A group moves by amount * its direction, whose entries lie in [-1, 1]: weights by that much with each row's sum
    kept, logits of step sizes by that much, and model times by a tenth of the step, never past a node.

    Attributes:
        dtype, size: of the final states of the last run, and their root mean square.
    """

    def __init__(self, student: Student, nfe: int, samples: int) -> None:
        self.student, self.sampler, self.nfe, self.samples = student, student.sampler, nfe, samples
        self.dtype, self.size = torch.float32, 0.0
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1

        self.logits = 0.3 * random(nfe)
        self.directions = {"coefficients": random(nfe, nfe).tril(-1), "times": random(nfe), "nodes": random(nfe)}
        self.rows = torch.eye(nfe, dtype=torch.float64)
        self.tenths = torch.zeros(nfe, dtype=torch.float64)

    def plan(self, group: str = "", amount: float | Tensor = 0.0, nfe: int | None = None) -> Plan:
        """The solver with one group moved; of its first `nfe` steps alone, if given."""
        nfe = nfe or self.nfe
        by = {g: amount if g == group else 0.0 for g in GROUPS}
        change = by["coefficients"] * self.directions["coefficients"]
        rows = self.rows + change - torch.diag(change.sum(1))
        logits = self.logits + by["nodes"] * self.directions["nodes"]
        tenths = self.tenths * (1 - by["times"] * self.directions["times"])
        weights = [[w if isinstance(amount, Tensor) else w.item() for w in row[: i + 1]] for i, row in enumerate(rows)]
        return Plan(nodes_from_logits(logits[:nfe]), weights[:nfe], -tenths[:nfe])

    def run(self, plan: Plan, **options: Any) -> Trajectory:
        made = self.student.run(plan, range(self.samples), SPLIT, **options)
        self.dtype, self.size = made.final.dtype, float(as_float64(made.final).square().mean().sqrt())
        return made

    def final(self, group: str = "", amount: float | Tensor = 0.0) -> Tensor:
        """Final states (samples, ...) with one group moved."""
        return self.run(self.plan(group, amount)).final

    def forwards(self) -> dict[str, Any]:
        """Counts of calls; makes the base solver, once a resolution shift is known."""
        first = self._refusing()
        per_step = self.sampler.network_calls / self.nfe
        evaluations = self.sampler.network_evaluations / self.nfe / self.samples
        if not torch.isfinite(first).all():
            raise ValueError(
                f"{self.student.name} gives values that are not finite; try it with another dtype or guidance"
            )
        change = as_float64(self._refusing() - first).norm() / as_float64(first).norm()
        if change > REPEATED:
            raise ValueError(
                f"{self.student.name} gives another result each time (relative change {change:.2g}): it draws noise "
                "without the generators that it is given, so no reference belongs to a sample"
            )
        classical = Plan(nodes_from_logits(self.logits))
        nodes = self.student.nodes(classical.unshifted_nodes)
        self.tenths = 0.1 * (nodes[:-1] - nodes[1:])
        for i, row in enumerate(self.student.spec(classical).coefficients):
            self.rows[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
        networks = [m for m in self.sampler.pipe.components.values() if isinstance(m, torch.nn.Module)]
        weights = {p.data_ptr(): p.nbytes for m in networks for p in m.parameters()}
        return {
            "pipeline": self.student.name,
            "calls_per_step": per_step,
            "guidance": _guidance(per_step, evaluations),
            "evaluations_per_sample": evaluations,
            "weight_bytes": sum(weights.values()),
            "activation_bytes": 0,
            "state_bytes": 0,
        }

    def _refusing(self) -> Tensor:
        try:
            return self.final()
        except Exception as error:  # whatever a pipeline raises
            if isinstance(error, ValueError) and self.student.name in str(error):
                raise
            raise ValueError(f"{self.student.name} cannot be run: {one_line(error)}") from error

    def gradients(self) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
        """By group: slopes by autograd and by the difference nearest to it; what is wrong with them, if anything."""
        agreement, failures = {}, {}
        for group in GROUPS:
            differences = self._differences(group)
            w = next((d for d in (differences[1], *differences) if d.any()), differences[0])
            w = w / w.norm().clamp(min=torch.finfo(w.dtype).tiny)
            slopes = [float((w * d).sum()) for d in differences]
            try:
                slope = self._slope(group, w)
            except RuntimeError as error:  # what autograd raises, also for want of memory
                agreement[group], failures[group] = (math.nan, slopes[1]), f"{group}: {one_line(error)}"
                continue
            moved = [s for s in slopes if s != 0.0]
            nearest = min(moved or [0.0], key=lambda s: abs(s - slope))
            agreement[group] = slope, nearest
            if not abs(slope - nearest) <= self._precision().tolerance * abs(nearest) + self._noise():
                failures[group] = f"the gradient of {group} is {slope:.4g} where differences give {nearest:.4g}"
                if self._precision().tolerance > PRECISIONS[torch.float32].tolerance:
                    failures[group] += " (coarse in half precision; float32 tells more)"
        return agreement, failures

    def _precision(self) -> Precision:
        """That of the coarsest dtype on the way."""
        dtypes = {p.dtype for m in self.sampler.denoisers for p in m.parameters()} | {self.dtype}
        known = [PRECISIONS[d] for d in dtypes if d in PRECISIONS]
        return max(known, key=lambda p: p.tolerance, default=PRECISIONS[torch.float32])

    def _noise(self) -> float:
        """What rounding makes of a slope by differences, where the effect itself is next to nothing."""
        return ROUNDINGS * torch.finfo(self.dtype).eps * self.size / self._precision().sizes[0]

    def _differences(self, group: str) -> list[Tensor]:
        sizes = self._precision().sizes
        return [(as_float64(self.final(group, h)) - as_float64(self.final(group, -h))) / (2 * h) for h in sizes]

    def _slope(self, group: str, w: Tensor) -> float:
        """<w, dx/d amount> by autograd."""
        amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
        final = self.final(group, amount)
        if not final.requires_grad:
            return 0.0
        (slope,) = torch.autograd.grad((final.cpu().double() * w).sum(), amount, allow_unused=True)
        return 0.0 if slope is None else slope.item()

    def bytes(self) -> dict[str, int]:
        """What autograd keeps, of one sample."""
        before = self.sampler.network_calls
        all_kept = self._kept(recompute=False)
        calls = (self.sampler.network_calls - before) / 2
        return {
            "activation_bytes": round(all_kept / max(calls, 1) / self.samples),
            "state_bytes": round(self._kept(recompute=True) / self.samples),
        }

    def _kept(self, recompute: bool) -> int:
        """Bytes that autograd keeps of a step of two; of the larger one. Nothing is kept while it is counted, so that
        this needs no more memory than a run without gradients."""
        amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
        networks, scheduler = self.sampler.timed.values(), self.student.scheduler
        weights = {StorageWeakRef(p.untyped_storage()) for m in networks for p in m.parameters()}
        kept: list[dict[StorageWeakRef, int]] = [{}, {}]

        def keep(tensor: Tensor) -> None:
            storage = StorageWeakRef(tensor.untyped_storage())  # known apart even when its memory is used again
            if storage not in weights:
                kept[min(scheduler.step_index or 0, 1)][storage] = tensor.untyped_storage().nbytes()

        def inputs(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    keep(leaf)

        hooks = [m.register_forward_pre_hook(inputs, with_kwargs=True) for m in networks]
        try:
            with saved_tensors_hooks(keep, lambda nothing: nothing):
                self.run(self.plan("nodes", amount, nfe=2), recompute=recompute)
        finally:
            for hook in hooks:
                hook.remove()
        return max(sum(sizes.values()) for sizes in kept)


def _verdict(agreement: Mapping[str, tuple[float, float]], failures: Mapping[str, str]) -> dict[str, Any]:
    if not failures:
        verdict = "full"
    elif agreement and "coefficients" not in failures:
        verdict = "coefficients"
    else:
        verdict = "forward_only"
    return {"agreement": dict(agreement), "verdict": verdict, "reason": "; ".join(failures.values())}


def _guidance(calls: float, evaluations: float) -> str:
    if round(calls) > 1:
        return "two calls" if round(calls) == 2 else f"{calls:g} calls"
    return "one call" if evaluations > 1 else "none"


def _human(size: float) -> str:
    """1.5 GiB"""
    power = min(int(math.log2(size) // 10), 3) if size >= 1 else 0
    return f"{size / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
