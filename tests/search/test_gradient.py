"""The gradient polish: its parameters against the classical rows of the package, its gradient against differences, its
optimisers against closed solutions, and what it keeps.
"""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import classical
from dssolver_search.methods import search as run_module
from dssolver_search.methods.closed_form import ClosedForm, warped_nodes
from dssolver_search.methods.gauss_newton import around
from dssolver_search.methods.gradient import CLIP, DECAY, PATIENCE, Descent
from dssolver_search.methods.objective import OBJECTIVES, mixed_loss, terminal_loss, trajectory_loss
from dssolver_search.methods.parameters import CorrectionParameters
from dssolver_search.methods.preflight import Preflight
from dssolver_search.pipeline.probe import run
from dssolver_search.settings import GROUPS, OPTIMIZERS
from dssolver_search.settings import OBJECTIVES as NAMED
from tests.search.test_search import (
    CLOSED_FORM,
    WARP,
    alone,
    both,
    lines_of,
    make_pipe,
    make_probe,
    make_sampler,
    quiet_reference,
    search,
    searched,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


@pytest.fixture
def double(family, monkeypatch):
    """A form in float64, its references too; `Tensor.float` inside diffusers would cut off the gradient's digits."""
    pipe = make_pipe(family)
    pipe.to(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    sampler = make_sampler(pipe)
    train, validation = (quiet_reference(sampler, range(4), split, 30) for split in ("train", "validation"))
    train, validation = (dataclasses.replace(r, states=r.states.double()) for r in (train, validation))
    return ClosedForm(sampler, make_probe(pipe), (range(4), train), (range(4), validation), 4, alone)


# --- parameters ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("nfe", [1, 2, 5, 16])
def test_corrections_stand_on_the_classical_rows_of_the_nodes_as_they_are(family, nfe):
    probe = make_probe(make_pipe(family))
    raw = warped_nodes(WARP, nfe)
    rows = [[float(i == j) for j in range(i + 1)] for i in range(nfe)]  # Euler, far from the classical rows
    parameters = CorrectionParameters(raw, rows, probe.slopes)
    torch.testing.assert_close(parameters.nodes(), raw, rtol=0, atol=1e-13)
    assert [pytest.approx(row, abs=1e-12) for row in rows] == parameters.numbers()[1]
    torch.manual_seed(0)
    for p in parameters.parameters():
        torch.nn.init.normal_(p, std=0.3)
    nodes, moved, offsets = parameters.numbers()

    def base(at):
        final = probe.final_nodes(at).tolist()
        return classical(final, probe.path).coefficients

    start = 0
    for i, row in enumerate(moved):
        part = parameters.free_coefficients[start : start + i].tolist()
        start += i
        parts = zip(base(nodes)[i], rows[i], base(raw)[i], [*part, -sum(part)], strict=True)
        wanted = [now + r - before + moved for now, r, before, moved in parts]
        assert row == pytest.approx(wanted, abs=1e-10)
        assert sum(row) == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(offsets, -0.1 * parameters.free_times.detach())
    assert nodes[0] == 1 and nodes[-1] == 0 and (nodes.diff() < 0).all()


@pytest.mark.parametrize("free", [("coefficients",), ("nodes", "times"), GROUPS])
def test_only_what_is_free_is_a_parameter(free):
    probe = make_probe(make_pipe("flow"))
    rows = [[1.0 / (i + 1)] * (i + 1) for i in range(5)]
    parameters = CorrectionParameters(warped_nodes(WARP, 5), rows, probe.slopes, free=free)
    sizes = {"nodes": 4, "coefficients": 10, "times": 5}
    assert parameters.count == sum(sizes[group] for group in free)
    assert {name for name, _ in parameters.named_parameters()} == {f"free_{group}" for group in free}
    assert (parameters.offsets() is None) == ("times" not in free)
    (parameters.nodes()[2] + parameters.rows()[3][1]).backward()


# --- objectives ------------------------------------------------------------------------------------------------------


def test_objectives_by_hand():
    assert tuple(OBJECTIVES) == NAMED  # those that the settings offer
    torch.manual_seed(0)
    states, references = [torch.randn(2, 3) for _ in range(4)], [torch.randn(2, 3) for _ in range(4)]
    errors = [((x - y) ** 2).mean() for x, y in zip(states, references, strict=True)]
    assert terminal_loss(states, references) == pytest.approx(errors[3])
    assert trajectory_loss(states, references) == pytest.approx(sum(errors[1:]) / 3)
    assert mixed_loss(states, references) == pytest.approx(errors[3] + sum(errors[1:]) / 3)
    for loss in OBJECTIVES.values():  # the mean of the halves is the whole: batches may be summed
        halves = [loss([s[i : i + 1] for s in states], [r[i : i + 1] for r in references]) for i in (0, 1)]
        assert loss(states, references) == pytest.approx(sum(halves) / 2)
        assert loss([s.bfloat16() for s in states], references).dtype == torch.float32


# --- gradient --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("objective", "batch_size"), list(zip(OBJECTIVES, [1, 3, 4, 3], strict=True)))
def test_gradient_is_the_central_difference(family, objective, batch_size, double):
    form = dataclasses.replace(double, batch_size=batch_size)
    found = form.fit(4, WARP, 1e-4)
    parameters = around(form, found)
    torch.manual_seed(0)
    start = 0.05 * torch.randn(parameters.count, dtype=torch.float64)
    vector_to_parameters(start, parameters.parameters())
    descent = Descent(form, found, parameters, OBJECTIVES[objective])
    value = descent.value()
    gradient = torch.cat([p.grad.flatten() for p in parameters.parameters()])
    indices, reference = form.train

    def loss(vector):
        vector_to_parameters(vector, parameters.parameters())
        raw, rows, offsets = parameters.numbers()
        form.probe.prepare(raw, rows, offsets=offsets)
        states = run(form.sampler, form.probe, indices, "train", 4)
        wanted = [reference.at(angle) for angle in form.probe.angle(form.probe.final_nodes(raw))]
        return float(OBJECTIVES[objective](states, wanted))

    assert value == pytest.approx(loss(start), rel=1e-10)
    at = 0
    for group in GROUPS:  # one direction each
        size = getattr(parameters, f"free_{group}").numel()
        way = torch.zeros_like(start)
        way[at : at + size] = torch.randn(size, dtype=torch.float64)
        difference = (loss(start + 1e-3 * way) - loss(start - 1e-3 * way)) / 2e-3
        assert float(gradient @ way) == pytest.approx(difference, rel=5e-4), group
        assert abs(difference) > 1e-6, group
        at += size


@both
@pytest.mark.parametrize(("again", "factor"), [(True, 4), (False, 3)])
def test_backward_passes_and_recomputation_are_counted(family, again, factor, monkeypatch):
    form, sampler = searched(family)
    monkeypatch.setattr(form.probe, "checkpointed", again)
    found = form.validated(form.fit(3, WARP, 1e-4))
    before = sampler.network_evaluations
    Descent(form, found, around(form, found), terminal_loss).value()
    assert sampler.network_evaluations - before == factor * (4 * 2 * 3)


def test_gradients_of_two_processes_are_those_of_one():
    form, _ = searched("flow")
    found = form.fit(3, WARP, 1e-4)
    whole = Descent(form, found, around(form, found), mixed_loss)
    total = whole.value()
    indices, reference = form.train
    summed, values = 0, 0.0
    for part in (slice(0, 3), slice(3, 4)):
        share = indices[part], dataclasses.replace(reference, states=reference.states[:, part])
        half = Descent(dataclasses.replace(form, train=share), found, around(form, found), mixed_loss)
        half.samples = 4.0  # what the sum over both gives
        values += half.value()
        summed = summed + torch.cat([p.grad for p in half.parameters.parameters()])
    assert values == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(summed, torch.cat([p.grad for p in whole.parameters.parameters()]), rtol=1e-4, atol=2e-6)


def test_every_process_gets_the_sum_over_all():
    """Two processes with the same samples are one with each sample twice: the same mean."""
    form, _ = searched("flow")
    found = form.fit(3, WARP, 1e-4)
    single = Descent(form, found, around(form, found), mixed_loss)
    of_two = Descent(dataclasses.replace(form, reduce=lambda t: 2 * t), found, around(form, found), mixed_loss)
    assert of_two.value() == pytest.approx(single.value(), rel=1e-6)
    for p, q in zip(of_two.parameters.parameters(), single.parameters.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# --- optimisers ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_descent_lowers_the_held_out_error_and_keeps_its_best(family, optimizer):
    form, _ = searched(family)
    found = form.validated(form.fit(4, (0.0, 0.0, 0.0), 1e-4))
    seen = []
    descent = Descent(form, found, around(form, found), terminal_loss, lambda *both: seen.append(both))
    better = descent.run(optimizer, 12, 1e-2)
    assert 3 <= len(seen) <= 13
    assert better.validation_mse < 0.97 * found.validation_mse
    assert better.validation_mse == min(best for _, best in seen)
    again = form.mean_square(form.errors("validation", better.raw, better.spec.coefficients, offsets=better.offsets))
    assert again == pytest.approx(better.validation_mse, rel=1e-5)
    assert form.score_spec(better.spec) == pytest.approx(better.validation_mse, rel=1e-4)


class Parabola(torch.nn.Module):
    """Stands for solver parameters: sum of squares, weighted."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def on_parabola(monkeypatch, weights=(1.0, 10.0, 100.0)):
    form, _ = searched("flow")
    found = form.validated(form.fit(3, WARP, 1e-4))
    descent = Descent(form, found, Parabola(), terminal_loss)
    trace = []

    def value():
        x = descent.parameters.x
        x.grad = torch.tensor(weights, dtype=torch.float64) * x.detach()
        return float(0.5 * (x.detach() * x.grad).sum())

    monkeypatch.setattr(descent, "value", value)
    monkeypatch.setattr(descent, "judge", lambda loss: trace.append((loss, descent.parameters.x.detach().clone())))
    return descent, trace


def test_lbfgs_ends_at_the_minimum_of_a_parabola(monkeypatch):
    descent, trace = on_parabola(monkeypatch)
    descent.run("lbfgs", 40, 1.0)
    assert descent.parameters.x.abs().max() < 1e-5
    assert min(loss for loss, _ in trace) < 1e-10


@pytest.mark.parametrize("optimizer", ["adam", "lion"])
def test_first_steps_have_the_size_of_the_learning_rate_and_are_averaged(optimizer, monkeypatch):
    """Both begin with lr * sign(gradient), whatever the gradient's size; what is judged moves by 1 - DECAY of it."""
    descent, trace = on_parabola(monkeypatch)
    start = descent.parameters.x.detach().clone()
    descent.run(optimizer, 1, 0.01)
    torch.testing.assert_close(descent.parameters.x.detach(), start - 0.01 * start.sign(), rtol=0, atol=1e-6)
    torch.testing.assert_close(trace[0][1], start - (1 - DECAY) * 0.01 * start.sign(), rtol=0, atol=1e-6)
    assert descent.parameters.x.grad.norm() <= CLIP + 1e-6


def test_learning_rate_falls_to_zero(monkeypatch):
    descent, _ = on_parabola(monkeypatch)
    places = []
    monkeypatch.setattr(descent, "judge", lambda loss: None)
    value = descent.value
    monkeypatch.setattr(descent, "value", lambda: places.append(descent.parameters.x.detach().clone()) or value())
    descent.run("lion", 20, 0.01)
    steps = [(b - a).abs().max().item() for a, b in pairwise(places)]
    assert steps[0] == pytest.approx(0.01, abs=1e-9)
    assert steps[-1] < 0.001


def test_a_descent_that_does_not_help_ends_and_leaves_the_candidate(monkeypatch):
    form, _ = searched("flow")
    found = dataclasses.replace(form.fit(3, WARP, 1e-4), validation_mse=0.0)
    seen = []
    descent = Descent(form, found, around(form, found), terminal_loss, lambda *both: seen.append(both))
    assert descent.run("adam", 100, 1e-2) is found
    assert len(seen) == PATIENCE
    monkeypatch.setattr(descent, "value", lambda: float("nan"))
    assert descent.run("lbfgs", 100, 1e-2) is found
    assert len(seen) == PATIENCE + 1


def test_a_step_that_crosses_nodes_is_not_kept():
    form, _ = searched("flow")
    found = form.validated(form.fit(3, WARP, 1e-4))
    descent = Descent(form, found, around(form, found), terminal_loss)
    with torch.no_grad():
        descent.parameters.free_times[1] = -9.0  # fed a later time than the node before it
    descent.judge(1.0)
    assert descent.best is found


def test_vectors_and_parameters_are_one():
    form, _ = searched("flow")
    found = form.fit(3, WARP, 1e-4)
    parameters = around(form, found)
    vector = torch.arange(1.0, 9.0, dtype=torch.float64) / 100
    vector_to_parameters(vector, parameters.parameters())
    assert torch.equal(parameters_to_vector(parameters.parameters()), vector)
    assert torch.equal(parameters.free_nodes, vector[:2])


# --- command ----------------------------------------------------------------------------------------------------------

GRADIENT = {**CLOSED_FORM, "method": "gradient", "nfe": [3], "fill_nfe": [], "gradient_calls": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_pipe("vp").save_pretrained(folder)
    return folder


def test_command_keeps_each_stage_only_if_it_is_better_and_says_what_it_cost(model, tmp_path, capsys):
    search(model, tmp_path, GRADIENT)
    printed = capsys.readouterr()
    facts = json.loads((tmp_path / "scheduler_config.json").read_text())["provenance"]
    result = facts["results"]["3"]
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert list(stages) == ["closed_form", "polish", "gradient"]
    errors = [stage["validation_mse"] for stage in stages.values()]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0]
    assert result["validation_mse"] == errors[2]
    calls = sum("loss" in line for line in lines_of(tmp_path))
    assert calls >= 3
    train, held_out, guided = GRADIENT["num_train_samples"], GRADIENT["num_validation_samples"], 2
    per_call = 3 * guided * (4 * train + held_out)
    first = 3 * guided * 4 * train  # for the scale
    known = guided * held_out if errors[1] == errors[0] else 0  # where it starts feeds the first node itself
    assert stages["gradient"]["network_evaluations"] == first + calls * per_call - known
    assert "everything can be searched by gradients" in printed.err + printed.out
    for name, stage in stages.items():
        assert re.search(rf"{name} +{stage['validation_mse']:.3g} +{stage['network_evaluations']:,}", printed.out)
    assert DSSolverScheduler.from_pretrained(tmp_path).tables == (3,)


def told(verdict):
    def preflight(sampler, probe, gradients):
        return Preflight("P", 1, "none", 1, {}, 0, 0, 0, verdict, "the reason")

    return preflight


def test_what_gets_no_gradient_stays(model, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "preflight", told("coefficients"))
    seen = []
    plain = run_module.around
    monkeypatch.setattr(run_module, "around", lambda *args: seen.append(args[2]) or plain(*args))
    search(model, tmp_path, GRADIENT, polish=0, gradient_calls=1)
    assert seen == [["coefficients"]]


@pytest.mark.parametrize(
    ("method", "verdict"), [("gradient", "forward_only"), ("paper", "forward_only"), ("paper", "coefficients")]
)
def test_methods_without_their_gradients_are_refused(method, verdict, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "preflight", told(verdict))
    with pytest.raises(SystemExit):
        search(model, tmp_path, GRADIENT, method=method)
    assert re.search(rf"error: method {method} .*the reason.*closed_form", capsys.readouterr().err)
    assert not (tmp_path / "scheduler_config.json").exists()


def test_search_over_limits_the_polish_too(model, tmp_path, monkeypatch):
    seen = []
    plain = run_module.polish
    monkeypatch.setattr(run_module, "polish", lambda *args: seen.append(args[4]) or plain(*args))
    search(model, tmp_path, GRADIENT, search_over=["coefficients"])
    assert seen == [["coefficients"]]
    table = json.loads((tmp_path / "scheduler_config.json").read_text())["solvers"]["3"]
    assert "timesteps" not in table
