"""Replayed network calls: runs that begin alike, batches of one fit, differences that cost only what they move."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dssolver_search.methods.closed_form import IDENTITY, warped_nodes
from dssolver_search.methods.gauss_newton import Polish
from dssolver_search.methods.parameters import CorrectionParameters
from dssolver_search.pipeline.probe import run
from dssolver_search.pipeline.replay import Replay
from tests.search.test_gradient import double  # noqa: F401 (a fixture)
from tests.search.test_preflight import cases, make_probe, sampler_of
from tests.search.test_search import WARP, both, make_pipe, make_sampler, searched

STEPS, SAMPLES = 4, 2
ROWS = [[1.0], [-0.3, 1.3], [0.2, -0.5, 1.3], [0.1, -0.2, -0.4, 1.5]]
COVERING = ("SDXL", "FLUX", "Wan", "DDPM", "ControlNet", "LTX")  # one call and two, none guided, a second network

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


def final_of(sampler, probe, rows, replay=None, unchanged=0, warp=WARP):
    """Final states and the network evaluations that they took."""
    before = sampler.network_evaluations
    probe.prepare(warped_nodes(warp, len(rows)), rows)
    states = run(sampler, probe, range(SAMPLES), "train", len(rows), replay, unchanged)
    return states[-1], sampler.network_evaluations - before


@cases(short=COVERING)
def test_a_replayed_run_is_the_run(name):
    sampler = sampler_of(name, torch.float32)
    probe = make_probe(sampler)
    replay = Replay()
    plain, whole = final_of(sampler, probe, ROWS)
    kept, recorded = final_of(sampler, probe, ROWS, replay)
    assert torch.equal(plain, kept) and recorded == whole
    again, nothing = final_of(sampler, probe, ROWS, replay, unchanged=STEPS)
    assert torch.equal(plain, again) and nothing == 0
    changed = [*ROWS[:2], [0.4, -0.7, 1.3], ROWS[3]]  # the call of step 3 is the first that it reaches
    replayed, spent = final_of(sampler, probe, changed, replay, unchanged=3)
    other, _ = final_of(sampler, probe, changed)
    assert torch.equal(replayed, other) and not torch.equal(replayed, plain)
    assert spent * STEPS == whole
    assert all("forward" not in vars(module) for module in sampler.timed.values())


def test_what_is_given_out_is_a_copy_and_what_is_kept_stays():
    sampler = make_sampler(make_pipe("flow"))
    probe = make_probe(sampler)
    replay = Replay()
    first, _ = final_of(sampler, probe, ROWS, replay)
    with sampler.using(probe), replay.around(sampler, probe, STEPS):
        probe.states = ()
        sampler.pipe.transformer(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1))[0].zero_()
    final_of(sampler, probe, ROWS[:3], replay, 1, warp=(0.0, 0.0, 0.0))  # other calls of steps that are kept already
    again, spent = final_of(sampler, probe, ROWS, replay, STEPS)
    assert torch.equal(first, again) and spent == 0


def test_frozen_and_continued_replays():
    sampler = make_sampler(make_pipe("vp"))
    probe = make_probe(sampler)
    frozen = Replay(frozen=True)
    _, whole = final_of(sampler, probe, ROWS, frozen)
    assert final_of(sampler, probe, ROWS, frozen, STEPS)[1] == whole  # nothing was kept
    kept = Replay()
    final_of(sampler, probe, ROWS, kept)
    assert final_of(sampler, probe, ROWS, Replay(kept), STEPS)[1] == 0


@both
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_find_the_solver_of_the_whole(family, batch_size, double):  # noqa: F811
    form, parts = double, dataclasses.replace(double, batch_size=batch_size)
    sizes = []
    transformer = form.sampler.pipe.transformer
    hook = transformer.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[0]))
    found = parts.validated(parts.fit(4, WARP, 1e-4))
    hook.remove()
    assert max(sizes) == 2 * batch_size  # guided
    whole = form.validated(form.fit(4, WARP, 1e-4))
    for mine, its in zip(found.spec.coefficients, whole.spec.coefficients, strict=True):
        assert mine == pytest.approx(its, abs=1e-9)
    assert (found.train_mse, found.validation_mse) == pytest.approx((whole.train_mse, whole.validation_mse), rel=1e-9)
    start = torch.zeros(Polish(form, whole).count, dtype=torch.float64)
    for mine, its in zip(*(Polish(f, whole).step(start, lambda: None) for f in (parts, form)), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-8)


@both
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_a_fit_calls_the_network_once_a_step_and_shares_the_first_call(family, nfe):
    form, sampler = searched(family)
    form = dataclasses.replace(form, batch_size=3)

    def spent(function, *args):
        before = sampler.network_evaluations
        function(*args)
        return sampler.network_evaluations - before

    guided = 2
    assert spent(form.fit, nfe, WARP, 1e-4) == guided * 4 * nfe
    assert spent(form.fit, nfe, IDENTITY, 1e-2) == guided * 4 * (nfe - 1)
    assert spent(form.score, warped_nodes(WARP, nfe), None) == guided * 4 * nfe  # other samples
    assert spent(form.score, warped_nodes(IDENTITY, nfe), None) == guided * 4 * (nfe - 1)
    lower = torch.full((nfe,), -0.05, dtype=torch.float64)
    assert spent(lambda: form.errors("validation", warped_nodes(WARP, nfe), None, offsets=lower)) == guided * 4 * nfe
    assert spent(form.fit, nfe + 1, WARP, 1e-4) == guided * 4 * (nfe + 1)  # another step count, another start


@both
@pytest.mark.parametrize("free", [("coefficients",), ("nodes", "times"), ("nodes", "coefficients", "times")])
def test_unchanged_calls_are_those_that_a_number_does_not_reach(family, free):
    form, sampler = searched(family)
    found = form.fit(4, WARP, 1e-4)
    problem = Polish(form, found, free)
    offset = torch.full((problem.count,), 0.05, dtype=torch.float64)

    def inputs(parameters):
        raw, rows, offsets = problem.solver(parameters)
        form.probe.prepare(raw, rows, offsets=offsets)
        seen, times = [], []

        def see(module, args, kwargs):
            seen.append(args[0].clone())
            times.append(float(kwargs["timestep"][0]))

        hook = sampler.pipe.transformer.register_forward_pre_hook(see, with_kwargs=True)
        run(sampler, form.probe, form.train[0], "train", 4)
        hook.remove()
        return seen, times

    before = inputs(offset)
    assert len(problem.numbers.unchanged) == problem.count
    for k, unchanged in enumerate(problem.numbers.unchanged):
        moved = offset.clone()
        moved[k] += 0.1
        after = inputs(moved)
        same = [
            torch.equal(a, b) and s == t for a, b, s, t in zip(before[0], after[0], before[1], after[1], strict=True)
        ]
        assert same == [True] * unchanged + [False] * (4 - unchanged), (k, unchanged, same)


@both
def test_a_polish_iteration_costs_what_its_numbers_move(family):
    form, sampler = searched(family)
    found = form.validated(form.fit(4, WARP, 1e-4))
    problem = Polish(form, found)
    before = sampler.network_evaluations
    problem.step(torch.zeros(problem.count, dtype=torch.float64), lambda: None)
    nodes, coefficients, times = 3 * 3, (1 * 2 + 2 * 1 + 3 * 0), 4 + 3 + 2 + 1
    assert sampler.network_evaluations - before == 2 * 4 * (3 + nodes + coefficients + times)  # 3: the first is known


def test_differences_are_those_of_whole_runs():
    form, _ = searched("flow")
    found = form.validated(form.fit(4, WARP, 1e-4))

    class Plain(Polish):
        def _batch_errors(self, batch, parameters, replay, unchanged=0):
            return super()._batch_errors(batch, parameters, Replay(), 0)

    start = torch.zeros(Polish(form, found).count, dtype=torch.float64)
    for mine, its in zip(*(kind(form, found).step(start, lambda: None) for kind in (Polish, Plain)), strict=True):
        assert torch.equal(mine, its)


def test_numbers_of_unchanged_calls():
    raw = warped_nodes(WARP, 3)
    probe = make_probe(make_sampler(make_pipe("flow")))
    parameters = CorrectionParameters(raw, [[1.0], [0.0, 1.0], [0.0, 0.0, 1.0]], probe.slopes)
    assert parameters.unchanged == [1, 1, 2, 3, 3, 0, 1, 2]
    assert [name for name, _ in parameters.named_parameters()] == ["free_nodes", "free_coefficients", "free_times"]
