"""Replayed network calls: runs that begin alike, batches of one fit, differences that cost only what they move."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dssolver_search.methods.closed_form import IDENTITY, fit, validated, warped_nodes
from dssolver_search.methods.gauss_newton import Polish, parametrised
from dssolver_search.methods.parameters import CorrectionParameters
from dssolver_search.pipeline.plan import Plan
from dssolver_search.pipeline.replay import Replay
from tests.families import WARP, both, make_pipe, make_student, searched
from tests.zoo_students import cases, student_of

STEPS, SAMPLES = 4, 2
ROWS = [[1.0], [-0.3, 1.3], [0.2, -0.5, 1.3], [0.1, -0.2, -0.4, 1.5]]
COVERING = ("SDXL", "FLUX", "Wan", "DDPM", "ControlNet", "LTX")  # one call and two, none guided, a second network

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


def final_of(student, rows, replay=None, shared_calls=0, warp=WARP):
    """Final states and the network evaluations that they took."""
    before = student.sampler.network_evaluations
    plan = Plan(warped_nodes(warp, len(rows)), rows)
    run = student.run(plan, range(SAMPLES), "train", replay=replay, shared_calls=shared_calls)
    return run.final, student.sampler.network_evaluations - before


@cases(short=COVERING)
def test_a_replayed_run_is_the_run(name):
    student = student_of(name, torch.float32)
    replay = Replay()
    plain, whole = final_of(student, ROWS)
    kept, recorded = final_of(student, ROWS, replay)
    assert torch.equal(plain, kept) and recorded == whole
    again, nothing = final_of(student, ROWS, replay, STEPS)
    assert torch.equal(plain, again) and nothing == 0
    changed = [*ROWS[:2], [0.4, -0.7, 1.3], ROWS[3]]  # the call of step 3 is the first that it reaches
    replayed, spent = final_of(student, changed, replay, 3)
    other, _ = final_of(student, changed)
    assert torch.equal(replayed, other) and not torch.equal(replayed, plain)
    assert spent * STEPS == whole
    assert all("forward" not in vars(module) for module in student.sampler.timed.values())


def test_what_is_given_out_is_a_copy_and_what_is_kept_stays():
    student = make_student(make_pipe("flow"))
    sampler, replay = student.sampler, Replay()
    first, _ = final_of(student, ROWS, replay)
    with replay.around(sampler, lambda: 0, STEPS):
        sampler.pipe.transformer(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1))[0].zero_()
    final_of(student, ROWS[:3], replay, 1, warp=(0.0, 0.0, 0.0))  # other calls of steps that are kept already
    again, spent = final_of(student, ROWS, replay, STEPS)
    assert torch.equal(first, again) and spent == 0


def test_frozen_and_continued_replays():
    student = make_student(make_pipe("vp"))
    frozen = Replay(frozen=True)
    _, whole = final_of(student, ROWS, frozen)
    assert final_of(student, ROWS, frozen, STEPS)[1] == whole  # nothing was kept
    kept = Replay()
    final_of(student, ROWS, kept)
    assert final_of(student, ROWS, Replay(kept), STEPS)[1] == 0


def polish_of(problem, found, free=("nodes", "coefficients", "times")):
    return Polish(problem, found, parametrised(problem, found, free))


@both
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_find_the_solver_of_the_whole(family, batch_size):
    problem = searched(family)
    parts, sizes = dataclasses.replace(problem, batch_size=batch_size), []
    transformer = problem.student.sampler.pipe.transformer
    hook = transformer.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[0]))
    found = validated(parts, fit(parts, 4, WARP, 1e-4, parts.train))
    hook.remove()
    assert max(sizes) == 2 * batch_size  # guided
    whole = validated(problem, fit(problem, 4, WARP, 1e-4, problem.train))
    for mine, its in zip(found.spec.coefficients, whole.spec.coefficients, strict=True):
        assert mine == pytest.approx(its, abs=1e-6)  # a last digit of what is rounded
    assert (found.train_mse, found.validation_mse) == pytest.approx((whole.train_mse, whole.validation_mse), rel=1e-5)
    start = torch.zeros(polish_of(problem, whole).count, dtype=torch.float64)
    for mine, its in zip(*(polish_of(p, whole).steps(start) for p in (parts, problem)), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_a_fit_calls_the_network_once_a_step_and_shares_the_first_call(family, nfe):
    problem = dataclasses.replace(searched(family), batch_size=3)
    sampler = problem.student.sampler

    def spent(function, *args):
        before = sampler.network_evaluations
        function(*args)
        return sampler.network_evaluations - before

    guided, nodes = 2, warped_nodes(WARP, nfe)
    assert spent(fit, problem, nfe, WARP, 1e-4, problem.train) == guided * 4 * nfe
    assert spent(fit, problem, nfe, IDENTITY, 1e-2, problem.train) == guided * 4 * (nfe - 1)
    assert spent(problem.score, Plan(nodes)) == guided * 4 * nfe  # other samples
    assert spent(problem.score, Plan(warped_nodes(IDENTITY, nfe))) == guided * 4 * (nfe - 1)
    lower = torch.full((nfe,), -0.05, dtype=torch.float64)
    assert spent(problem.score, Plan(nodes, offsets=lower)) == guided * 4 * nfe
    assert spent(problem.score, Plan.of(problem.student.spec(Plan(nodes)))) == guided * 4 * nfe
    assert spent(fit, problem, nfe + 1, WARP, 1e-4, problem.train) == guided * 4 * (nfe + 1)  # another start


@both
@pytest.mark.parametrize("free", [("coefficients",), ("nodes", "coefficients", "times")])
def test_shared_calls_are_those_that_a_number_does_not_reach(family, free):
    problem = searched(family)
    student = problem.student
    newton = polish_of(problem, fit(problem, 4, WARP, 1e-4, problem.train), free)
    offset = torch.full((newton.count,), 0.05, dtype=torch.float64)

    def inputs(parameters):
        seen, times = [], []

        def see(module, args, kwargs):
            seen.append(args[0].clone())
            times.append(float(kwargs["timestep"][0]))

        hook = student.sampler.pipe.transformer.register_forward_pre_hook(see, with_kwargs=True)
        student.run(newton.plan(parameters), problem.train.indices, "train")
        hook.remove()
        return seen, times

    before = inputs(offset)
    assert len(newton.numbers.shared_calls) == newton.count
    for k, shared in enumerate(newton.numbers.shared_calls):
        moved = offset.clone()
        moved[k] += 0.1
        after = inputs(moved)
        same = [
            torch.equal(a, b) and s == t for a, b, s, t in zip(before[0], after[0], before[1], after[1], strict=True)
        ]
        assert same == [True] * shared + [False] * (4 - shared), (k, shared, same)


@both
def test_a_polish_iteration_costs_what_its_numbers_move(family):
    problem = searched(family)
    sampler = problem.student.sampler
    newton = polish_of(problem, fit(problem, 4, WARP, 1e-4, problem.train))
    before = sampler.network_evaluations
    newton.steps(torch.zeros(newton.count, dtype=torch.float64))
    nodes, coefficients, times = 3 * 3, (1 * 2 + 2 * 1 + 3 * 0), 4 + 3 + 2 + 1
    assert sampler.network_evaluations - before == 2 * 4 * (3 + nodes + coefficients + times)  # 3: the first is known


def test_differences_are_those_of_whole_runs(monkeypatch):
    problem = searched("flow")
    found = fit(problem, 4, WARP, 1e-4, problem.train)
    start = torch.zeros(polish_of(problem, found).count, dtype=torch.float64)
    replayed = polish_of(problem, found).steps(start)
    monkeypatch.setattr(CorrectionParameters, "shared_calls", [0] * len(start))
    for mine, its in zip(replayed, polish_of(problem, found).steps(start), strict=True):
        assert torch.equal(mine, its)


def test_shared_calls_by_number():
    student = make_student(make_pipe("flow"))
    start = Plan(warped_nodes(WARP, 3), [[1.0], [0.0, 1.0], [0.0, 0.0, 1.0]])
    parameters = CorrectionParameters(start, student.slopes)
    assert parameters.shared_calls == [1, 1, 2, 3, 3, 0, 1, 2]
    assert [name for name, _ in parameters.named_parameters()] == ["free_nodes", "free_coefficients", "free_times"]
