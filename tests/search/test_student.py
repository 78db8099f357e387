"""A pipeline as a function of a solver: samples in any batch, counted calls, gradients in the solver's numbers, states
recorded and handed on."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.config import OWN_KEYS
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.methods.objective import paper_loss
from dssolver_search.methods.parameters import PaperParameters
from dssolver_search.pipeline.plan import Plan
from dssolver_search.pipeline.recorder import Recorder
from dssolver_search.teacher.ends import even_nodes
from tests.families import both, make_pipe, make_sampler, make_scheduler, make_student

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


@both
def test_a_sample_is_the_same_in_any_batch(family):
    student, plan = make_student(make_pipe(family, dtype=torch.float64)), Plan(even_nodes(3))

    def states(indices, split="train", student=student):
        return student.run(plan, indices, split).states

    whole, part, other = states(range(5)), states([4, 2]), states(range(5), "test")
    assert torch.equal(whole[0][[4, 2]], part[0])
    torch.testing.assert_close(whole[-1][[4, 2]], part[-1], rtol=0, atol=1e-9)
    assert (whole[0] - other[0]).abs().mean() > 0.3
    assert len({tuple(x.flatten().tolist()) for x in [*whole[0], *other[0]]}) == 10
    assert 0.5 < whole[0].std() < 1.5
    another_seed = make_student(student.sampler.pipe, seed=1)
    assert not torch.equal(states(range(5), student=another_seed)[0], whole[0])


def test_classes_are_balanced():
    sampler = make_sampler(make_pipe("flow"))
    assert np.bincount(sampler.conditions(range(9))["class_labels"]).tolist() == [3, 3, 3]
    assert sampler.conditions([4, 2])["class_labels"] == [1, 2]


@both
@pytest.mark.parametrize("guidance_scale, factor", [(1.5, 2), (1.0, 1)], ids=["guided", "unguided"])
def test_network_evaluations_are_counted(family, guidance_scale, factor):
    student = make_student(make_pipe(family), guidance_scale)
    student.run(Plan(even_nodes(5)), range(3), "train")
    assert student.sampler.network_evaluations == factor * 5 * 3
    with student.sampler.uncounted():
        student.run(Plan(even_nodes(2)), range(3), "train")
        assert student.sampler.network_evaluations == factor * 2 * 3
    assert student.sampler.network_evaluations == factor * 5 * 3 and student.sampler.network_calls == 5


def test_pipeline_gets_its_scheduler_back():
    student = make_student(make_pipe("flow"))
    pipe = student.sampler.pipe
    own = pipe.scheduler
    run = student.run(Plan(even_nodes(2)), range(1), "train")
    assert pipe.scheduler is own and len(run.states) == 3
    pipe.transformer.forward = None
    with pytest.raises(TypeError):
        student.run(Plan(even_nodes(2)), range(1), "train")
    del pipe.transformer.forward
    assert pipe.scheduler is own and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@both
def test_what_a_trajectory_tells_is_the_solver_that_ran(family):
    """Published and run again as a whole it gives the same states."""
    student = make_student(make_pipe(family, dtype=torch.float64))
    offsets = torch.tensor([0.0, -0.01, -0.02], dtype=torch.float64)
    plan = Plan(torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64), [[1.0], [-0.2, 1.2]], offsets, order=3)
    run = student.run(plan, range(2), "train")
    assert run.spec == student.spec(plan) and run.spec.coefficients[:2] == ((1.0,), (-0.2, 1.2))
    assert run.spec.timesteps is not None and torch.equal(run.nodes, student.nodes(plan.unshifted_nodes))
    again = student.run(Plan.of(run.spec), range(2), "train")
    torch.testing.assert_close(again.final, run.final, rtol=0, atol=1e-12)
    ended = student.run(plan, range(2), "train", until=2)
    assert len(ended.states) == 3 and torch.equal(ended.final, run.states[2])


@both
def test_a_solver_of_another_path_runs_as_the_scheduler_runs_it(family):
    student = make_student(make_pipe(family, dtype=torch.float64))
    other = make_scheduler("vp" if family == "flow" else "flow")
    rows = [[1.0], [-0.4, 1.4], [0.2, -0.7, 1.5]]
    spec = SolverSpec([1.0, 0.6, 0.3, 0.0], rows)
    home = DSSolverScheduler.from_config(other.config, solvers="classical")
    run = student.run(Plan.of(spec, home.path), range(2), "train")
    assert run.spec == spec and run.nodes.tolist() != [*spec.nodes]
    origin = {"source": "there", **{key: home.config[key] for key in OWN_KEYS}}
    config = student.sampler.pipe.scheduler.config
    scheduler = DSSolverScheduler.from_config(config, solvers={"3": spec.to_dict()}, carried_from=origin)
    recorder = Recorder()
    with student.sampler.using(scheduler), recorder.watching(scheduler):
        student.sampler(range(2), "train", 3)
    torch.testing.assert_close(run.final, recorder.states[-1], rtol=0, atol=1e-9)
    assert (student.run(Plan.of(spec), range(2), "train").final - run.final).abs().max() > 1e-3


class ShiftingPipeline(SiTPipeline):
    """Its resolution shift depends on the step count, as FLUX.2's does."""

    def _set_timesteps(self, num_inference_steps, device):
        self.scheduler.set_timesteps(num_inference_steps, device=device, mu=0.1 * num_inference_steps)
        return self.scheduler.timesteps


def test_nodes_have_the_shift_of_their_step_count():
    pipe = make_pipe("flow")
    pipe = ShiftingPipeline(pipe.transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    pipe.set_progress_bar_config(disable=True)
    student = make_student(pipe)
    student.run(Plan(even_nodes(20)), range(1), "train")  # a teacher's run
    spent = student.sampler.network_calls
    even = even_nodes(5)
    assert student.nodes(even).tolist() == pytest.approx([e * 1.648721 / (1 + 0.648721 * e) for e in even.tolist()])
    plan = Plan(even)
    assert student.spec(plan).nodes == tuple(student.nodes(even).tolist())
    assert student.searched_shift([20]) == {"factor": math.exp(2), "terminal": None}
    record = student.searched_shift([5, 3])
    assert record == {n: {"factor": math.exp(0.1 * int(n)), "terminal": None} for n in ("5", "3")}
    assert student.sampler.network_calls == spent  # asking costs no network call
    assert student.run(plan, range(1), "train").spec == student.spec(plan)


@pytest.mark.parametrize(
    "family, options, tolerance",
    [
        ("flow", {}, 1e-5),
        # log(sigma/alpha) of vp has a kink at each timestep: the slope within a cell is not that across
        ("vp", {}, 1e-2),
        ("vp", {"continuous_time": True}, 1e-5),
    ],
    ids=["flow", "vp", "continuous"],
)
def test_gradients_through_the_pipeline_equal_finite_differences(family, options, tolerance, exact):
    """Of the nodes' and the coefficients' parameters, along random directions, by differences of fourth order."""
    pipe = make_pipe(family, dtype=torch.float64)
    student = make_student(pipe, **options)
    parameters = PaperParameters(4)
    generator = torch.Generator().manual_seed(1)
    for p in parameters.parameters():
        p.data = p.data + 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    start = {name: p.detach().clone() for name, p in parameters.named_parameters()}

    def states():
        return student.run(parameters.plan(), range(2), "train").states

    with torch.no_grad():  # a teacher too far away for an error to change its sign
        wanted = [s + 1 + torch.rand(s.shape, generator=generator, dtype=s.dtype) for s in states()]
    loss = paper_loss(states(), wanted)
    gradients = dict(zip(start, torch.autograd.grad(loss, list(parameters.parameters())), strict=True))
    assert torch.is_grad_enabled() and pipe.transformer.dtype == torch.float64
    for name in start:
        for _ in range(2):
            direction = torch.randn(start[name].shape, generator=generator, dtype=torch.float64)

            def moved(amount, name=name, direction=direction):
                getattr(parameters, name).data = start[name] + amount * direction
                value = paper_loss(states(), wanted).item()
                getattr(parameters, name).data = start[name].clone()
                return value

            h = 2e-2
            difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
            slope = (gradients[name] * direction).sum().item()
            assert slope == pytest.approx(difference, rel=tolerance)


def test_steps_of_any_scheduler_are_recorded_but_not_those_of_its_copies():
    """A pipeline may copy its scheduler, for sound, and step both."""
    scheduler = make_scheduler("flow")
    recorder, latest, start = Recorder(), Recorder(all_states=False), torch.zeros(2, 1, 4, 4)
    for one in (recorder, latest):
        scheduler.set_timesteps(3)
        states = [start]
        with one.watching(scheduler):
            twin = copy.deepcopy(scheduler)
            for t in scheduler.timesteps:
                twin.step(torch.ones_like(start), t, start)
                made = scheduler.step(torch.ones_like(start), t, states[-1], return_dict=bool(t < 500))
                states.append(made[0])
        assert one.steps_taken == 3 and "step" not in vars(scheduler) and "step" not in vars(twin)
    assert len(recorder.states) == 4 and all(map(torch.equal, recorder.states, states))
    assert len(latest.states) == 1 and torch.equal(latest.states[0], states[-1])
