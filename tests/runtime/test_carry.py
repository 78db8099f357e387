"""Solvers of one path on models of another: the same numbers, seen through a scale."""

from __future__ import annotations

import functools
import itertools
import logging
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.carry import carried
from diffusers_dssolver.config import OWN_KEYS
from diffusers_dssolver.derive import classical, warp
from diffusers_dssolver.paths import FlowPath, make_betas
from tests.runtime.test_scheduler import SD_CONFIG, assert_close, make_solvers, make_table, noise, run

FLOW = {"prediction_type": "flow_prediction"}
KINDS = {
    "flow": FLOW,
    "flow, shift 3": {**FLOW, "shift": 3.0},
    "inverted flow": {**FLOW, "invert_sigmas": True, "num_train_timesteps": 500},
    "linear": {},
    "scaled-linear": {**SD_CONFIG, "prediction_type": "v_prediction"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "zero snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "continuous": {"continuous_time": True},
    "trained betas": {"trained_betas": list(make_betas(300, 0.001, 0.05, "linear", None, False))},
}
PAIRS = list(itertools.product(KINDS, KINDS))
LEVELS = [6.0, 2.5, 1.1, 0.6, 0.2]  # sigma/alpha that every path has
FIELDS = {  # predicted data by x/sigma and alpha/sigma
    "constant": lambda x, w: torch.full_like(x, 0.7),
    "linear": lambda x, w: (0.3 + 0.36 * x * w) / (1 + 0.36 * w**2),  # Gaussian data
    "curved": lambda x, w: torch.tanh(x * w / (1 + w)) + 0.1 * w / (1 + w),
}


@functools.cache
def path_of(kind):
    return DSSolverScheduler(**KINDS[kind]).path


@functools.cache
def home(kind):
    """`carried_from` of tables that were searched on this kind of model."""
    config = DSSolverScheduler(**KINDS[kind]).config
    return {"source": "somewhere", **{key: config[key] for key in OWN_KEYS}}


def shift_of(kind):
    return KINDS[kind].get("shift", 1.0)


@functools.cache
def table_of(kind, start=False):
    """Uneven rows on nodes of these levels, from the path's own first node with `start`; the network is fed times of
    its own, a little beside the nodes'."""
    path = path_of(kind)
    nodes = path.node_of_angle(torch.tensor([*map(math.atan, LEVELS), 0.0], dtype=torch.float64))
    fed = path.node_of_angle(torch.tensor([math.atan(0.97 * s) for s in LEVELS], dtype=torch.float64))
    if start:
        nodes[0] = fed[0] = path.first_node
    rows = make_table(len(LEVELS))["coefficients"]
    return {"nodes": nodes.tolist(), "timesteps": path.timestep(fed).tolist(), "coefficients": rows}


def native(kind, table, **more):
    return DSSolverScheduler(**KINDS[kind], solvers={str(len(table["coefficients"])): table}, **more)


def moved(own, model, table, **more):
    """The table of one kind of model on another kind, and e."""
    flow = [kind.startswith(("flow", "inverted")) for kind in (own, model)]
    factor = shift_of(model) / shift_of(own) if all(flow) else 1.0
    record = {"factor": shift_of(own), "terminal": None} if flow[0] else None
    solvers = {str(len(table["coefficients"])): table}
    options = {"solvers": solvers, "carried_from": home(own), "searched_shift": record}
    return DSSolverScheduler(**KINDS[model], **options, **more), factor


def trace(scheduler, field, x, nfe, first=0, factor=1.0, offset=0.0):
    """States of a run on a model that predicts `field`. With a factor and an offset the same model is seen from a
    solver's own world: w_m = w / e + c, and data over e."""
    scheduler.set_timesteps(nfe)
    scheduler.set_begin_index(first)
    alpha, sigma = scheduler.path.alpha_sigma(scheduler._course.nodes)
    states = [x]
    for i, t in enumerate(scheduler.timesteps[first:], first):
        a, s, x = alpha[i], sigma[i], states[-1].double()
        data = field(x / s, a / s / factor + offset) / factor
        e = (x - a * data) / s
        answers = {"epsilon": e, "v_prediction": a * e - s * data, "sample": data}
        answers["flow_prediction"] = data - e if scheduler.config.invert_sigmas else e - data
        result = scheduler.step(answers[scheduler.config.prediction_type].to(states[-1].dtype), t, states[-1])
        assert result.prev_sample.dtype == states[-1].dtype
        states.append(result.prev_sample)
    return states


def compare(own, model, fields=("curved",), first=0, table=None, **more):
    """Runs on the solver's own path and the same runs carried over: the same states through r."""
    table = table or table_of(own)
    n = len(table["coefficients"])
    there, factor = moved(own, model, table, **more)
    there.set_timesteps(n)
    change = there._course.change
    offset = change.offset if change else 0.0
    here = native(own, table, **more)
    here.set_timesteps(n)
    a, s = here.path.alpha_sigma(here._course.nodes)
    alpha, sigma = there.path.alpha_sigma(there._course.nodes)
    r = torch.hypot(a, s) / torch.hypot(factor * (alpha - offset * sigma), sigma)
    r[-1] = 1 / factor  # the data
    for field in fields:
        wanted = trace(here, FIELDS[field], noise(), n, first, factor, offset)
        got = trace(there, FIELDS[field], noise() / r[first], n, first)
        for i, (state, wanted_state) in enumerate(zip(got, wanted, strict=True), first):
            assert_close(r[i] * state, wanted_state, 1e-9)
    assert_close((alpha / sigma)[:-1], (a / s)[:-1] / factor + offset, 1e-9)
    return there


@pytest.mark.parametrize("own, model", PAIRS, ids=str)
def test_the_same_run_on_another_path_gives_the_same_numbers(own, model):
    there = compare(own, model, FIELDS)
    factor = shift_of(model) / shift_of(own) if "flow" in own and "flow" in model else 1.0
    levels = there.path.angle(there._course.nodes[:-1]).tan()
    assert_close(levels, factor * torch.tensor(LEVELS, dtype=torch.float64), 1e-9)
    assert there._course.nodes[-1] == 0
    there = compare(own, model, FIELDS, table=table_of(own, start=True))  # from each path's own first node
    assert there._course.nodes[0] == there.path.first_node and len(there._course.times) == 5


@pytest.mark.parametrize("own, model", PAIRS, ids=str)
def test_from_pure_noise_a_constant_field_ends_at_the_data(own, model):
    """Also where a solver's first nodes are noisier than anything that the model knows."""
    path = path_of(own)
    nodes = [path.first_node * s for s in (1.0, 0.995, 0.99, 0.97, 0.9, 0.5, 0.2)]
    table = {**make_table(7), "nodes": [*nodes, 0.0]}
    there, _ = moved(own, model, table)
    x = noise()
    end = path.alpha_sigma(torch.zeros((), dtype=torch.float64))[1].item()  # of the continuous path .01
    assert_close(trace(there, FIELDS["constant"], x, 7)[-1], torch.full_like(x, 0.7), 1e-9 + 2 * end * x.abs().max())
    assert there._course.nodes[0] == there.path.first_node and (there._course.nodes.diff() < 0).all()
    times = there.timesteps.diff()
    assert (times > 0).all() if model == "inverted flow" else (times < 0).all()


AWAY = [("flow", "scaled-linear"), ("continuous", "flow"), ("flow", "flow, shift 3"), ("cosine", "linear")]


@pytest.mark.parametrize("own, model", AWAY, ids=str)
def test_what_a_run_may_meet_is_carried_too(own, model):
    for first in (1, 3):  # image-to-image
        compare(own, model, first=first)
    compare(own, model, history_length=2)
    compare(own, model, first=2, history_length=1)
    there = compare(own, model, table={k: v for k, v in table_of(own).items() if k != "timesteps"})
    # a part that is written is run as the announced part is
    x = noise()
    there.set_timesteps(5)
    there.timesteps, there.sigmas = there.timesteps[2:], there.sigmas[2:]
    there.add_noise(x, x, there.timesteps[:1])
    alpha, sigma = there.path.alpha_sigma(there._course.nodes)
    assert len(alpha) == 4 and there._course.change.nodes.shape == alpha.shape
    e = noise(seed=4)
    assert_close(there.add_noise(x, e, there.timesteps[1:2]), alpha[1] * x + sigma[1] * e, 1e-12)
    # in half precision, the same to its rounding
    full = trace(there, FIELDS["curved"], noise(), 5)[-1]
    assert_close(trace(there, FIELDS["curved"], noise().bfloat16(), 5)[-1], full, 0.05)
    assert_close(trace(there, FIELDS["curved"], noise().float(), 5)[-1], full, 1e-4)


@pytest.mark.parametrize("own, model", PAIRS, ids=str)
def test_there_and_back_nodes_are_what_they_were(own, model):
    paths = [path_of(kind) for kind in (own, model)]
    for start in (False, True):
        spec = SolverSpec.from_dict(table_of(own, start))
        there = carried(spec, *paths, 1.7)
        fed, own_fed = paths[1].node(there.times), paths[0].node(torch.tensor(spec.timesteps, dtype=torch.float64))
        wanted = 1 / paths[0].angle(own_fed).tan() / 1.7 + there.change.offset
        assert_close(1 / paths[1].angle(fed).tan(), wanted, 1e-9)
        spec_there = SolverSpec(there.nodes.tolist(), spec.coefficients, there.times.tolist())
        back = carried(spec_there, *reversed(paths), 1 / 1.7)
        angle, node = paths[0].angle, paths[0].node  # the path to zero terminal SNR stands still at its beginning
        assert_close(angle(back.nodes), angle(torch.tensor(spec.nodes, dtype=torch.float64)), 1e-12)
        assert_close(angle(node(back.times)), angle(node(torch.tensor(spec.timesteps, dtype=torch.float64))), 1e-12)


def test_the_data_that_a_step_predicts_are_the_models():
    for own, model in AWAY:
        there, _ = moved(own, model, table_of(own))
        x = noise()
        there.set_timesteps(5)
        alpha, sigma = there.path.alpha_sigma(there._course.nodes)
        for i, t in enumerate(there.timesteps):
            data = torch.tanh(x)
            e = (x - alpha[i] * data) / sigma[i]
            answer = {"epsilon": e, "v_prediction": alpha[i] * e - sigma[i] * data, "flow_prediction": e - data}
            x, predicted = there.step(answer[there.config.prediction_type], t, x, return_dict=False)
            assert_close(predicted, data, 1e-10)


def test_a_model_that_thresholds_its_data_does_so_under_a_flow_solver():
    there, _ = moved("flow", "linear", table_of("flow"), thresholding=True)
    for x in (3 * noise(2, 3, 4, 4), 0.1 * noise(2, 3, 4, 4)):
        there.set_timesteps(5)
        data = there.step(torch.zeros_like(x), there.timesteps[0], x).pred_original_sample
        alpha = there.path.alpha_sigma(there._course.nodes)[0][0]
        s = torch.quantile((x / alpha).flatten(1).abs(), 0.995, dim=1).clamp(1, 1)[:, None, None, None]
        assert_close(data, (x / alpha).clamp(-s, s) / s, 1e-9)


def test_a_shift_is_the_ratio_in_the_same_rule():
    table = make_table(6)
    for target in (1.0, 2.0, 5.0):
        ours = DSSolverScheduler(
            **FLOW, shift=target, solvers={"6": table}, searched_shift={"factor": 2.0, "terminal": None}
        )
        ours.set_timesteps(6)
        wanted = warp(torch.tensor(table["nodes"], dtype=torch.float64), target / 2)
        assert_close(ours._course.nodes, wanted, 1e-14)
        assert ours._course.rows == SolverSpec.from_dict(table).coefficients  # what was searched stays


# --- who gets what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs, name, words",
    [
        (DDIMScheduler(**SD_CONFIG), "dit-xl-2-256", ("linear betas 0.0001 to 0.02", "scaled_linear betas 0.00085")),
        (DDIMScheduler(**SD_CONFIG), "sit-xl-2-256", ("(flow, shift 1)", "scaled_linear betas 0.00085 to 0.012")),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "dit-xl-2-256", ("vp, linear betas", "(flow, shift 3)")),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "dit-xl-2-256", ("vp,", "(flow, dynamic shift)")),
    ],
    ids=["sd, vp", "sd, flow", "sd3", "flux"],
)
def test_an_artefact_is_carried_over_with_one_line(theirs, name, words, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "diffusers_dssolver"):
        ours = DSSolverScheduler.from_config(theirs.config, solvers=name)
    [line] = [r.message for r in caplog.records]
    assert line.startswith(f"solver {name!r} was searched on another noise schedule") and "\n" not in line
    assert "carried over by noise level, which nobody measured here" in line
    assert all(word in line for word in words)
    published = DSSolverScheduler.from_published(name)
    assert ours.config.carried_from["source"] == name
    assert ours.solvers == published.solvers and ours.path != published.path
    assert ours.config.continuous_time is False
    for n in (5, 7, 12):  # no table: 12
        x = noise(dtype=torch.float32)
        assert torch.isfinite(run(ours, x, n)).all() and len(ours.timesteps) == n
    ours.save_pretrained(tmp_path / "carried")
    caplog.clear()
    loaded = DSSolverScheduler.from_pretrained(tmp_path / "carried")
    assert torch.equal(run(loaded, noise(), 8), run(ours, noise(), 8)) and not caplog.records
    back = DSSolverScheduler.from_config(published.config, solvers=str(tmp_path / "carried"))  # there and back
    assert torch.equal(run(back, noise(), 8), run(published, noise(), 8)) and back.config.carried_from is None
    on = DSSolverScheduler.from_config(DDIMScheduler(beta_end=0.01).config, solvers=str(tmp_path / "carried"))
    assert on.config.carried_from == ours.config.carried_from  # further on, from where it was searched
    published.save_pretrained(tmp_path / "kept")
    from_file = DSSolverScheduler.from_config(theirs.config, solvers=str(tmp_path / "kept"))
    assert from_file.config.carried_from == {**ours.config.carried_from, "source": "kept"}  # no path of this machine
    with pytest.raises(ValueError, match=rf"solver '{name}' .*strict out to carry it over"):
        DSSolverScheduler.from_config(theirs.config, solvers=name, strict=True)


def test_without_a_name_nothing_is_carried_over():
    """Three ways on are named."""
    with pytest.raises(ValueError, match=r"search one for this model \(.*carry one over by noise level.*\"classical\""):
        DSSolverScheduler.from_config(DDIMScheduler(**SD_CONFIG).config)


def test_other_tables_belong_to_the_model_again():
    ours = DSSolverScheduler.from_config(DDIMScheduler(**SD_CONFIG).config, solvers="sit-xl-2-256")
    ours.register_to_config(beta_end=0.02)  # a carried solver follows
    ours.set_timesteps(5)
    for again in (
        DSSolverScheduler.from_config(ours.config, solvers=make_solvers(4)),
        DSSolverScheduler.from_config(ours.config, solvers="classical"),
    ):
        assert again.config.carried_from is None
    ours.register_to_config(solvers=make_solvers(4))
    assert ours.config.carried_from is None and ours.tables == (4,)


@pytest.mark.parametrize(
    "value, reason",
    [
        (3, "it must have source and prediction_type"),
        ({"source": "x"}, "it must have source and prediction_type"),
        ({"source": "x", "prediction_type": "epsilon", "solvers": {}}, "it must have source and prediction_type"),
        ({"source": "x", "prediction_type": "none"}, "prediction_type is 'none'"),
        ({"source": "x", "prediction_type": "epsilon", "continuous_time": 1}, "carried_from: continuous_time is 1"),
        ({"source": "x", "prediction_type": "epsilon", "beta_end": 2}, "every beta must lie between 0 and 1"),
    ],
)
def test_a_senseless_origin_is_refused(value, reason):
    with pytest.raises(ValueError, match=reason):
        DSSolverScheduler(carried_from=value, solvers=make_solvers(4))


def test_nodes_that_fall_together_are_refused():
    nodes = [1.0, 0.0009, 0.0004, 0.0]  # below the continuous path's end
    table = {**make_table(3), "nodes": nodes}
    there = DSSolverScheduler(**KINDS["linear"], solvers={"3": table}, carried_from=home("continuous"))
    with pytest.raises(ValueError, match="nodes of the table for 3 steps fall together on this model"):
        there.set_timesteps(3)


def test_a_table_is_shown_at_the_shift_that_it_was_searched_at():
    """Of a model whose shift is not known before a run."""
    spec = classical([1.0, 0.9, 0.6, 0.0], FlowPath())
    options = {"prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    scheduler = DSSolverScheduler(
        **options, solvers={"3": spec.to_dict()}, searched_shift={"factor": 3.0, "terminal": None}
    )
    torch.testing.assert_close(scheduler.course(3).nodes, torch.tensor(spec.nodes, dtype=torch.float64))
    scheduler.set_timesteps(3, mu=1.0)  # a run has its own
    assert scheduler.sigmas[1] < 0.9
