"""Gradients through whole pipelines against finite differences, in float64, and what preflight makes of pipelines that
break them. The pipelines are those of the zoo."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.methods.preflight import preflight
from dssolver_search.pipeline.gradients import differentiable
from dssolver_search.pipeline.loading import freeze
from dssolver_search.pipeline.plan import Plan, nodes_from_logits
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.pipeline.student import Student
from tests.allocations import Allocations
from tests.families import make_pipe, make_student, trajectory_of
from tests.pipelines.zoo import ZOO, network_of
from tests.zoo_students import NAMES, cases, student_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torchvision.*", "ignore:.*FluxPosEmbed.*:FutureWarning", "ignore:Converting a tensor.*"
)
COVERING = ("SDXL", "AuraFlow", "Wan", "DDPM")  # vp, a time that is rebuilt, two calls, no guidance
UNGUIDED = (  # the scale is an input of the network
    "FLUX", "FLUX img2img", "FLUX inpaint", "FLUX Fill", "FLUX Kontext", "FLUX ControlNet", "FLUX.2", "HunyuanVideo",
    "DDPM",
)  # fmt: skip
EVALUATIONS = {"Stable Diffusion PAG": 3, "SDXL PAG": 3, "InstructPix2Pix": 3, "LTX-2": 4}
STEPS, SAMPLES = 3, 2


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Numbers:
    """All that a search can move, as one vector per group: classical 2-step rows, uneven steps, times below nodes."""

    GROUPS = ("coefficients", "times", "nodes")

    def __init__(self, student, steps=STEPS, recompute=True):
        self.student, self.steps, self.recompute = student, steps, recompute
        self.start = {
            "coefficients": torch.full((steps * (steps - 1) // 2,), -0.1, dtype=torch.float64),
            "times": torch.full((steps,), -0.02, dtype=torch.float64),
            "nodes": 0.2 * random(steps),
        }
        self.directions = {
            "coefficients": random(len(self.start["coefficients"]), seed=1),
            "times": 0.01 * random(steps, seed=2).clamp(-1, 1),  # no time past its node
            "nodes": random(steps, seed=3),
        }

    def final(self, **numbers):
        """Final states with these groups in place of the start."""
        now = self.start | numbers
        lower = iter(now["coefficients"].unbind())
        rows = [[next(lower) for _ in range(i)] for i in range(self.steps)]
        rows = [[*row, 1 - sum(row)] for row in rows]
        plan = Plan(nodes_from_logits(now["nodes"]), rows, now["times"])
        return self.student.run(plan, range(SAMPLES), "train", recompute=self.recompute).final

    def moved(self, group, amount):
        return self.final(**{group: self.start[group] + amount * self.directions[group]})

    def difference(self, group, size):
        """Of fourth order, (SAMPLES, ...)."""
        one, two = (self.moved(group, size * k).double() - self.moved(group, -size * k).double() for k in (1, 2))
        return (8 * one - two) / (12 * size)

    def slope(self, group, cotangent):
        amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
        final = self.moved(group, amount)
        return torch.autograd.grad((final.double() * cotangent).sum(), amount)[0].item()


# --- gradients --------------------------------------------------------------------------------------------------------

# Final states are smooth in the weights. Times reach the network as float32, and a vp path's log(sigma/alpha) has a
# kink at each of them: differences of several sizes are taken, and the nearest counts.
SIZES = {"coefficients": (1e-2, 1e-3, 1e-4), "times": (1.0, 0.3, 0.1, 0.03), "nodes": (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)}
TOLERANCES = {"coefficients": 1e-4, "times": 1e-2, "nodes": 5e-3}


@cases(short=(*NAMES, "Stable Diffusion inpaint"))
def test_gradients_through_any_pipeline_equal_central_differences(name, exact):
    numbers = Numbers(student_of(name))
    for group in Numbers.GROUPS:
        differences = [numbers.difference(group, size) for size in SIZES[group]]
        for seed in (4, 5):
            generator = torch.Generator().manual_seed(seed)
            # a random half of what the differences are made of: no orthogonal cotangent, which would compare noise
            part = torch.rand(differences[0].shape, generator=generator).double()
            cotangent = part * differences[-1] / differences[-1].norm()
            wanted = [(d * cotangent).sum().item() for d in differences]
            found = numbers.slope(group, cotangent)
            assert found != 0.0
            assert min(abs(found / w - 1) for w in wanted) < TOLERANCES[group], (group, found, wanted)


@cases(short=NAMES)
def test_a_few_iterations_lower_the_final_error(name, exact):
    """L-BFGS on every group together, against a teacher of 30 steps."""
    numbers = Numbers(student_of(name))
    wanted = trajectory_of(numbers.student, range(SAMPLES), steps=30).final.double()
    scales = {"coefficients": 1.0, "times": 0.01, "nodes": 1.0}
    parameters = {g: torch.zeros_like(v, requires_grad=True) for g, v in numbers.start.items()}
    optimizer = torch.optim.LBFGS(parameters.values(), max_iter=4, line_search_fn="strong_wolfe")
    losses = []

    def loss():
        optimizer.zero_grad()
        start = numbers.start
        final = numbers.final(**{g: start[g] + scales[g] * p.clamp(-1, 1) for g, p in parameters.items()})
        value = (final.double() - wanted).square().mean() / scale
        value.backward()
        losses.append(value.item())
        return value

    scale = (numbers.final().double() - wanted).square().mean()
    optimizer.step(loss)
    assert losses[0] == pytest.approx(1) and min(losses) < 0.9
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())


@cases(short=COVERING)
def test_recomputing_the_network_changes_no_gradient(name, exact):
    slopes = []
    for recompute in (True, False):
        numbers = Numbers(student_of(name), recompute=recompute)
        slopes.append([numbers.slope(group, 1.0) for group in Numbers.GROUPS])
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-9)


@pytest.mark.parametrize("group", Numbers.GROUPS)
def test_each_group_alone_gets_gradients(group, exact):
    numbers = Numbers(student_of("Stable Diffusion 3"))
    alone = numbers.slope(group, 1.0)
    together = {g: v.clone().requires_grad_() for g, v in numbers.start.items()}
    gradient = torch.autograd.grad(numbers.final(**together).double().sum(), together[group])[0]
    assert alone == pytest.approx((gradient * numbers.directions[group]).sum().item(), rel=1e-6)


def test_a_run_without_gradients_has_none_and_leaves_the_mode(exact):
    numbers = Numbers(student_of("FLUX"))
    assert not numbers.final().requires_grad and torch.is_grad_enabled()
    live = numbers.start["nodes"].clone().requires_grad_()
    assert numbers.final(nodes=live).requires_grad and torch.is_grad_enabled()
    times = numbers.start["times"].clone().requires_grad_()
    with torch.no_grad():
        assert not numbers.final(nodes=live, times=times).requires_grad and not torch.is_grad_enabled()
    assert "forward" not in vars(numbers.student.sampler.pipe.transformer)


# --- times that pipelines rebuild, tensors that they write into -------------------------------------------------------


@pytest.mark.parametrize("p, q", [(0, 1), (0, 1e-3), (1, -1e-3), (1000, -1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rebuilt_time_gets_the_slope_of_its_map(p, q, dtype):
    """Also at a node where t/1000 and 1 - t/1000 are one number: an earlier step tells."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, timestep):
            seen.append(timestep)
            return x

    network, amount = Network(), torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    times = (1000 * (torch.tensor([1.0, 0.5]).double() + amount * torch.tensor([0.0, 1.0]))).to(torch.float32)
    now = []
    with differentiable([network], lambda: now[-1], 1000):
        for t in times:
            now.append(t)
            rebuilt = torch.tensor([p + q * t.item()] * 2).to(dtype)
            network(torch.ones(2), timestep=rebuilt)
            network(torch.ones(2), rebuilt * 1.3 + 400)  # no time of this step: left alone
            assert torch.equal(seen[-2].detach(), rebuilt) and not seen[-1].requires_grad
    slope = torch.autograd.grad(seen[-2].double().sum(), amount)[0]
    assert slope.item() == pytest.approx(2 * q * 1000, rel=1e-2)


@pytest.mark.parametrize("name", ["Stable Diffusion", "FLUX"])
def test_pipelines_may_write_into_what_they_passed(name, exact):
    """The previous state is overwritten after every step, as by pipelines that keep their latents in one place: a vp
    step multiplies it by a live number, and an unguided network is fed that very tensor."""
    kept = []

    def overwrite(pipe, index, t, values):
        kept.append(values["latents"])
        if index > 0:
            kept[index - 1].detach().zero_()
        return values

    plain = student_of(name)
    sampler = plain.sampler
    writing = Student(Sampler(sampler.pipe, {"callback_on_step_end": overwrite}, conditions=sampler.conditions))
    slopes = []
    for student in (plain, writing):
        slopes.append([])
        for group in Numbers.GROUPS:
            kept.clear()
            slopes[-1].append(Numbers(student).slope(group, 1.0))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-9)


def test_a_live_scheduler_can_be_copied_deeply(exact):
    """As pipelines do for a second scheduler of sound: it steps beside the first and does not end the run."""
    numbers = Numbers(student_of("FLUX"))
    twins = []

    def beside(pipe, index, t, values):
        if not twins:
            twins.append(copy.deepcopy(pipe.scheduler))
        twins[0].step(values["latents"], t, values["latents"])
        return values

    sampler = numbers.student.sampler
    student = Student(Sampler(sampler.pipe, {"callback_on_step_end": beside}, conditions=sampler.conditions))
    other = Numbers(student)
    assert other.slope("nodes", 1.0) == pytest.approx(numbers.slope("nodes", 1.0), rel=1e-9)
    [twin] = twins
    assert twin is not student.scheduler and twin.timesteps.requires_grad
    # the callback follows each step but the last, which ends the run
    assert twin.recorder.steps_taken == STEPS - 1 and student.scheduler.recorder.steps_taken == STEPS


# --- memory -----------------------------------------------------------------------------------------------------------


def held(student, steps, recompute=True, groups=Numbers.GROUPS):
    """(bytes that a forward run leaves for the backward pass, most bytes at any time in both)."""
    numbers = Numbers(student, steps, recompute)
    live = {g: numbers.start[g].clone().requires_grad_() for g in groups}
    with Allocations() as used:
        loss = numbers.final(**live).double().square().sum()
        left = used.now()
        loss.backward()
    return left, used.peak


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "Wan", "FLUX"])
def test_a_gradient_step_holds_states_and_one_call(name):
    """A step more costs some ten states (what the network was given, its outputs, the history, what autograd keeps of
    the solver's sums), however large the network is."""
    student = student_of(name, torch.float32)
    sampler = student.sampler
    evaluations = sampler.network_evaluations
    run = student.run(Plan(torch.linspace(1, 0, 2, dtype=torch.float64)), range(SAMPLES), "train")
    state = run.states[0].nbytes * (sampler.network_evaluations - evaluations) / SAMPLES
    left, peaks = zip(*(held(student, steps) for steps in (3, 5, 9)), strict=True)
    without, _ = zip(*(held(student, steps, recompute=False) for steps in (3, 5)), strict=True)
    activations = (without[1] - without[0]) / 2
    for sizes in (left, peaks):
        a_step = (sizes[2] - sizes[1]) / 4
        assert a_step < 6 * state and a_step < 0.5 * activations
        assert a_step == pytest.approx((sizes[1] - sizes[0]) / 2, rel=0.5)


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "FLUX"])
def test_memory_estimate(name):
    """Beside what does not depend on the number of steps at all, such as embeddings and masks."""
    student = student_of(name, torch.float32)
    found = preflight(student, samples=SAMPLES)
    assert found.weight_bytes > 0
    few, many = 3, 9
    estimates = [found.gradient_bytes(steps, SAMPLES) - found.weight_bytes for steps in (few, many)]
    _, peaks = zip(*(held(student, steps) for steps in (few, many)), strict=True)
    with_all, _ = held(student, few, recompute=False)
    with_states, _ = held(student, few)
    assert found.activation_bytes == pytest.approx((with_all - with_states) / few / SAMPLES, rel=0.1)
    assert 0.4 * peaks[0] < estimates[0] < 2 * peaks[0]
    assert 0.5 * (peaks[1] - peaks[0]) < estimates[1] - estimates[0] < 2 * (peaks[1] - peaks[0])


# --- preflight --------------------------------------------------------------------------------------------------------


@cases(short=NAMES)
def test_preflight_finds_every_pipeline_searchable(name):
    """In float32, as a search runs: its differences are coarser."""
    student = student_of(name, torch.float32)
    sampler = student.sampler
    sampler.network_evaluations = sampler.network_calls = 7
    found = preflight(student)
    calls = ZOO[name].calls
    assert (found.verdict, found.reason) == ("full", "")
    evaluations = 1 if name in UNGUIDED else EVALUATIONS.get(name, 2)
    assert found.calls_per_step == calls and found.evaluations_per_sample == evaluations
    guidance = {1: "one call", 2: "two calls", 3: "3 calls"}
    assert found.guidance == ("none" if name in UNGUIDED else guidance[calls])
    assert set(found.agreement) == {"coefficients", "times", "nodes"}
    for autograd, difference in found.agreement.values():
        assert autograd == pytest.approx(difference, rel=0.01, abs=5e-5) and difference != 0  # abs: rounding
    assert found.activation_bytes > found.state_bytes > 0
    assert type(sampler.pipe).__name__ in str(found) and "everything can be searched" in str(found)
    assert sampler.network_evaluations == sampler.network_calls == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HiDream", "Kandinsky 5"])
def test_preflight_leaves_coefficients_where_no_gradient_passes(name):
    found = preflight(student_of(name, torch.float32))
    assert found.verdict == "coefficients" and found.reason


@pytest.fixture
def small():
    """(pipeline, its transformer's forward), to be broken."""
    pipe = freeze(make_pipe("flow"))
    return pipe, pipe.transformer.forward


def flight(pipe, **kwargs):
    return preflight(make_student(pipe), **kwargs)


def test_preflight_of_a_pipeline_that_detaches_its_time(small):
    pipe, forward = small
    pipe.transformer.forward = lambda x, timestep, **kwargs: forward(x, timestep=timestep.detach(), **kwargs)
    found = flight(pipe)
    assert found.verdict == "coefficients"
    assert found.agreement["times"][0] == 0 and found.agreement["times"][1] != 0
    assert found.agreement["coefficients"][0] == pytest.approx(found.agreement["coefficients"][1], rel=0.01)
    assert "the gradient of times is 0" in found.reason
    assert "coefficients only" in str(found) and found.reason in str(found)


def test_preflight_of_a_pipeline_that_rounds_its_time(small):
    pipe, forward = small
    pipe.transformer.forward = lambda x, timestep, **kwargs: forward(x, timestep=4 * (timestep / 4).round(), **kwargs)
    found = flight(pipe)
    assert found.verdict == "coefficients" and "the gradient of times is 0 where" in found.reason


def test_preflight_of_a_network_that_ignores_its_time(small):
    """Nothing is wrong with a gradient of zero beside a difference of zero."""
    pipe, forward = small
    pipe.transformer.forward = lambda x, timestep, **kwargs: forward(x, timestep=0 * timestep, **kwargs)
    found = flight(pipe)
    assert found.verdict == "full" and found.agreement["times"] == (0, 0)


class Irreversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no backward pass\nfor this kernel")


def test_preflight_of_a_pipeline_without_a_backward_pass(small):
    pipe, forward = small
    pipe.transformer.forward = lambda x, **kwargs: forward(Irreversible.apply(x), **kwargs)
    found = flight(pipe)
    assert found.verdict == "forward_only" and "no backward pass for this kernel" in found.reason
    assert found.calls_per_step == 1 and "forward evaluations only" in str(found)


def test_preflight_of_a_network_that_runs_without_gradients(small):
    pipe, forward = small
    pipe.transformer.forward = torch.no_grad()(forward)
    found = flight(pipe)
    assert found.verdict == "forward_only" and "the gradient of coefficients" in found.reason


def test_preflight_without_gradients_makes_no_backward_pass(small):
    pipe, forward = small
    pipe.transformer.forward = lambda x, **kwargs: forward(Irreversible.apply(x), **kwargs)
    found = flight(pipe, gradients=False)
    assert (found.verdict, found.agreement, found.activation_bytes) == ("forward_only", {}, 0)
    assert found.reason == "gradients were not tried" and found.evaluations_per_sample == 2
    assert found.weight_bytes == sum(p.nbytes for p in pipe.transformer.parameters())


class Replacing(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, **kwargs):
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        return super().__call__(class_labels, guidance_scale, **kwargs)


class Shorter(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, num_inference_steps=5, **kwargs):
        return super().__call__(class_labels, guidance_scale, num_inference_steps=num_inference_steps - 1, **kwargs)


class Stopping(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, **kwargs):
        def stop(pipe, index, t, values):
            pipe._interrupt = index == 1
            return values

        return super().__call__(class_labels, guidance_scale, callback_on_step_end=stop, **kwargs)


class Careless(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, generator=None, **kwargs):
        return super().__call__(class_labels, guidance_scale, **kwargs)


class Raising(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, **kwargs):
        raise KeyError("a key\nof its own")


@pytest.mark.parametrize(
    "cls, reason",
    [
        (Replacing, "puts a FlowMatchEulerDiscreteScheduler of its own in the scheduler's place"),
        (Shorter, "the pipeline takes 2 steps where 3 are asked for; a distilled"),
        (Stopping, "ended its loop without taking all 3 steps, but 2"),
        (Careless, "gives another result each time"),
        (Raising, "cannot be run: 'a key\\nof its own'"),
    ],
)
def test_preflight_refuses_what_no_solver_can_reach(cls, reason):
    source = make_pipe("flow")
    pipe = freeze(cls(source.transformer, source.scheduler))
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        flight(pipe)
    assert "\n" not in str(refused.value) and cls.__name__ in str(refused.value)
    assert pipe.scheduler is source.scheduler


def test_preflight_refuses_values_that_are_not_finite(small):
    pipe, forward = small
    pipe.transformer.forward = lambda x, **kwargs: (forward(x, **kwargs)[0] / 0,)
    with pytest.raises(ValueError, match="not finite"):
        flight(pipe)


def test_preflight_of_too_few_steps_or_samples(small):
    for changes in ({"nfe": 1}, {"samples": 0}):
        with pytest.raises(ValueError, match="are the least"):
            flight(small[0], **changes)


def test_half_precision_is_compared_coarsely():
    student = student_of("FLUX", torch.bfloat16)
    found = preflight(student)
    assert found.agreement["coefficients"][0] == pytest.approx(found.agreement["coefficients"][1], rel=0.05)
    assert found.verdict == "full" and network_of(student.sampler.pipe).dtype == torch.bfloat16
