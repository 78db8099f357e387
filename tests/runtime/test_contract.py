"""What diffusers' pipelines demand of a scheduler beyond a plain run: their default grids, resolution shifts, private
names and habits. Every expectation comes from diffusers itself or from the equation written out."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas
from diffusers.pipelines.cogview4 import pipeline_cogview4
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.ltx import pipeline_ltx_condition
from diffusers.pipelines.mochi import pipeline_mochi
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import Shift, classical, warp
from diffusers_dssolver.grids import default_name
from diffusers_dssolver.paths import FlowPath, VPPath, make_betas
from tests.problems import DoubleTorch
from tests.runtime.test_scheduler import (
    EPS,
    SD_CONFIG,
    assert_close,
    make_any,
    make_flow,
    make_solvers,
    make_table,
    network,
    noise,
    run,
    states_of,
)

LOGGER = "diffusers_dssolver.scheduler"
FLOW, VP = FlowPath(), VPPath(make_betas(1000, 0.0001, 0.02, "linear", None, False))

# --- 3.1 grids -------------------------------------------------------------------------------------------------------

# as the pipelines compute them
GRIDS = {
    "uniform": lambda n: np.linspace(1.0, 1 / n, n),
    "from 1 to 0": lambda n: np.linspace(1.0, 0.0, n + 1)[:-1],
    "tensor": lambda n: torch.linspace(1.0, 1.0 / n, n, dtype=torch.float32),
    "list": lambda n: np.linspace(1.0, 1 / n, n).tolist(),
    "Helios": lambda n: np.linspace(0.999, 0.0, n + 1)[:-1],
    "Mochi": lambda n: np.array(pipeline_mochi.linear_quadratic_schedule(n, 0.025)) if n > 1 else np.ones(1),
    "LTX-condition": pipeline_ltx_condition.linear_quadratic_schedule,
    "CogView4": lambda n: np.linspace(1000, 1.0, n).astype(np.int64).astype(np.float32) / 1000,
    "BRIA": lambda n: get_original_sigmas(1000, n),
}


@pytest.mark.parametrize("n", [1, 2, 3, 8, 28, 124])
@pytest.mark.parametrize("name", GRIDS)
def test_of_a_pipelines_default_grid_only_the_length_counts(name, n):
    scheduler = make_flow(solvers=make_solvers(n, first=0.98))
    scheduler.set_timesteps(n)
    wanted = scheduler.timesteps
    grid = GRIDS[name](n)
    scheduler.set_timesteps(sigmas=grid)
    assert torch.equal(scheduler.timesteps, wanted)
    scheduler.set_timesteps(timesteps=grid * 1000 if not isinstance(grid, list) else [1000 * s for s in grid])
    assert torch.equal(scheduler.timesteps, wanted)


@pytest.mark.parametrize("n", [2, 5, 20])
@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_that_is_nearly_a_default_is_the_users_own(name, n, caplog):
    grid = torch.as_tensor(np.array(GRIDS[name](n))).double()
    grid[-1] += 0.004
    assert default_name(grid.tolist()) is None
    scheduler = make_flow(solvers=make_solvers(n))
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(2):
            scheduler.set_timesteps(sigmas=grid)
    assert_close(scheduler.sigmas[:-1], grid, 1e-6)
    assert len(caplog.records) == 1  # said once
    assert "no default of a pipeline" in caplog.text


def test_only_the_scale_of_training_makes_integers_a_default():
    grid = np.linspace(500, 1.0, 7).astype(np.int64) / 500
    assert default_name(grid.tolist(), 500) == "integer"
    assert default_name(grid.tolist(), 1000) is None


@pytest.mark.parametrize("mu", [None, 0.7])
def test_times_and_sigmas_given_together_are_flow_match_eulers(mu):
    """Sigmas are shifted, the network is fed the times as they are."""
    config = {"use_dynamic_shifting": True} if mu else {"shift": 3.0}
    theirs, ours = FlowMatchEulerDiscreteScheduler(**config), make_flow(**config)
    grid = np.array([1.0, 0.8, 0.55, 0.2])
    for scheduler in (theirs, ours):
        got, n = pipeline_cogview4.retrieve_timesteps(scheduler, 4, "cpu", (1000 * grid).tolist(), grid, mu=mu)
        assert n == 4
    assert_close(got, theirs.timesteps, 1e-6)
    assert_close(ours.sigmas, theirs.sigmas, 1e-6)
    with pytest.raises(ValueError, match="timesteps has 4 entries, sigmas 3"):
        ours.set_timesteps(timesteps=[1000, 800, 550, 200], sigmas=[1, 0.8, 0.55])


def test_the_default_of_cogview4_feeds_unshifted_times():
    ours = make_flow(
        use_dynamic_shifting=True, solvers=make_solvers(6), searched_shift={"factor": 2.0, "terminal": None}
    )
    times = np.linspace(1000, 1.0, 6).astype(np.int64).astype(np.float32)
    ours.set_timesteps(timesteps=times, sigmas=times / 1000, mu=1.0)
    fed, sigmas = ours.timesteps.double() / 1000, ours.sigmas[:-1].double()
    assert_close(math.e * fed / (1 + (math.e - 1) * fed), sigmas, 1e-6)
    ours.set_timesteps(6, mu=1.0)
    assert_close(ours.sigmas[:-1], sigmas, 1e-6)
    assert (ours.timesteps / 1000 - fed).abs().max() > 0.05


def test_a_rising_ramp_is_refused_with_its_reason():
    with pytest.raises(ValueError, match=r"sigmas rise from 0\.0 to 1\.0: a ramp of EDM"):
        make_flow().set_timesteps(sigmas=torch.linspace(0, 1, 5, dtype=torch.float64))


# --- 3.2 shifts ------------------------------------------------------------------------------------------------------

SHIFTS = {
    "none": ({}, None),
    "static 3": ({"shift": 3.0}, None),
    "static .5": ({"shift": 0.5}, None),
    "exponential": ({"use_dynamic_shifting": True, "time_shift_type": "exponential"}, 0.8),
    "linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
    "terminal": ({"shift": 2.0, "shift_terminal": 0.1}, None),
    "exponential, terminal": ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 1.15),
}


def golden(name, nfe):
    """FlowMatchEuler's own sigmas of the uniform grid, (N+1,), and its shift as a configuration records it."""
    config, mu = SHIFTS[name]
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / nfe, nfe), mu=mu)
    factor = {"exponential": math.exp(mu or 0), "linear": mu}[config.get("time_shift_type", "exponential")]
    factor = factor if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
    return theirs.sigmas.double(), {"factor": factor, "terminal": config.get("shift_terminal")}


@pytest.mark.parametrize("target", SHIFTS)
@pytest.mark.parametrize("searched", SHIFTS)
def test_a_table_of_one_shift_at_another_is_diffusers_grid_of_that_shift(searched, target):
    """diffusers computes in float32, hence 5e-6. A terminal is the searched grid's own: noise levels are multiplied."""
    nfe = 2 if searched == target else 7
    before, record = golden(searched, nfe)
    wanted, to = golden(target, nfe)
    if searched != target and (record["terminal"] or to["terminal"]):
        wanted = warp(before, to["factor"] / record["factor"])
    table = {"nodes": before.tolist(), "coefficients": make_table(nfe)["coefficients"]}
    config, mu = SHIFTS[target]
    ours = make_flow(**config, solvers={str(nfe): table}, searched_shift=record)
    ours.set_timesteps(sigmas=np.linspace(1, 1 / nfe, nfe), mu=mu)
    assert_close(ours.sigmas, wanted, 5e-6)
    assert_close(ours.timesteps, 1000 * wanted[:-1], 5e-6)
    if searched == target:
        assert torch.equal(ours.sigmas, before.float())  # nothing is recomputed


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6000])
def test_a_shift_that_depends_on_the_step_count_is_that_of_each_table(tokens):
    """FLUX.2: tables whose nodes before the shift are uniform, searched with 1024 tokens, are diffusers' own grids with
    any number of tokens and any step count, those between tables too."""
    counts = (4, 8)
    shifts = {n: math.exp(compute_empirical_mu(1024, n)) for n in counts}
    tables, record = {}, {str(n): {"factor": shifts[n], "terminal": None} for n in counts}
    for n in counts:
        nodes = Shift(shifts[n])([1 - i / n for i in range(n + 1)])
        tables[str(n)] = classical(nodes, FLOW).to_dict()
    ours = make_flow(use_dynamic_shifting=True, solvers=tables, searched_shift=record)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for n in (3, 4, 6, 8, 12):
        mu, sigmas = compute_empirical_mu(tokens, n), np.linspace(1, 1 / n, n)
        for schedule in ({"sigmas": sigmas, "mu": mu}, {"num_inference_steps": n, "mu": mu}):
            ours.set_timesteps(**schedule)
            theirs.set_timesteps(sigmas=sigmas, mu=mu)
            assert_close(ours.sigmas, theirs.sigmas, 1e-6)
        if tokens == 1024 and n in counts:
            assert ours._course.nodes.tolist() == tables[str(n)]["nodes"]  # to the bit
    back = DSSolverScheduler.from_config(ours.config)
    assert back.config.searched_shift == record
    with pytest.raises(ValueError, match="searched_shift has no entry for 8 steps"):
        make_flow(solvers=tables, searched_shift={"4": record["4"]})
    with pytest.raises(ValueError, match=r"searched_shift\['five'\]: the key must be a step count"):
        make_flow(solvers=tables, searched_shift={**record, "five": record["4"]})


def test_without_a_record_nodes_are_final():
    scheduler = make_flow(use_dynamic_shifting=True, solvers=make_solvers(5))
    for mu in (None, 0.3, 2.0):
        scheduler.set_timesteps(5, mu=mu)
        assert_close(scheduler.sigmas, torch.tensor(make_table(5)["nodes"]), 1e-6)


def test_from_config_records_the_shift_of_an_artefact(tmp_path):
    """A solver searched on a model of shift 3 reaches one of dynamic shifting; of which mu it was, is in the file."""
    make_flow(shift=3.0, solvers=make_solvers(5)).save_pretrained(tmp_path / "static")
    record = {"factor": 2.0, "terminal": None}
    dynamic = make_flow(use_dynamic_shifting=True, solvers=make_solvers(5), searched_shift=record)
    dynamic.save_pretrained(tmp_path / "dynamic")
    model = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    s = torch.tensor(make_table(5)["nodes"])
    for name, factor in (("static", 3.0), ("dynamic", 2.0)):
        ours = DSSolverScheduler.from_config(model, solvers=str(tmp_path / name))
        assert ours.config.searched_shift == {"factor": factor, "terminal": None}
        ours.set_timesteps(5, mu=math.log(4.0))
        ratio = 4.0 / factor
        assert_close(ours.sigmas, ratio * s / (1 + (ratio - 1) * s), 1e-6)
    unknown = make_flow(use_dynamic_shifting=True, solvers=make_solvers(5))
    unknown.save_pretrained(tmp_path / "unknown")
    config = FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(
        ValueError, match=r"use_dynamic_shifting = True, this model has False.*'sit-xl-2-256', which fits"
    ):
        DSSolverScheduler.from_config(config, solvers=str(tmp_path / "unknown"), strict=True)
    ours = DSSolverScheduler.from_config(config, solvers=str(tmp_path / "unknown"))  # its nodes are final
    ours.set_timesteps(5)
    assert_close(ours.sigmas, s, 1e-6)


@pytest.mark.parametrize("mu", [math.nan, math.inf, 1000.0, -1000.0])
def test_a_senseless_mu_is_refused_and_forgotten(mu):
    scheduler = make_flow(use_dynamic_shifting=True)
    scheduler.set_timesteps(5, mu=0.5)
    before = scheduler.timesteps
    with pytest.raises(ValueError, match="mu is"):
        scheduler.set_timesteps(5, mu=mu)
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize("fed", [False, True])
def test_inverted_models_take_the_same_noise_levels(fed):
    """Mochi: times rise, the velocity is data minus noise; the states are those of the ordinary model."""
    table = make_table(5)
    inverted = dict(table)
    if fed:
        table["timesteps"] = [970 * s for s in table["nodes"][:-1]]
        inverted["timesteps"] = [1000 - t for t in table["timesteps"]]
    plain = make_flow(solvers={"5": table})
    ours = make_flow(solvers={"5": inverted}, invert_sigmas=True)
    x = noise()
    wanted = run(plain, x, 5)
    got = run(ours, x, 5, model=lambda y, t: -network(y, 1000 - float(t)))
    assert_close(got, wanted, 1e-4)  # times are float32
    assert (ours.timesteps.diff() > 0).all()
    theirs = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    theirs.set_timesteps(sigmas=np.linspace(1, 0.2, 5))
    ours = make_flow(invert_sigmas=True)
    ours.set_timesteps(sigmas=np.linspace(1, 0.2, 5))
    assert_close(ours.sigmas, theirs.sigmas, 1e-6)
    assert_close(ours.timesteps, theirs.timesteps, 1e-6)


def test_times_that_run_against_the_network_are_refused():
    table = make_table(5, fed=True)
    with pytest.raises(ValueError, match=r"solvers\['5'\]: timesteps must rise"):
        make_flow(solvers={"5": table}, invert_sigmas=True)
    table["timesteps"].reverse()
    for prediction_type in ("flow_prediction", "epsilon"):
        with pytest.raises(ValueError, match=r"solvers\['5'\]: timesteps must fall"):
            make_any(prediction_type, solvers={"5": table})


# --- history ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_history_length_caps_what_is_held_and_folds_the_rows(length):
    table = make_table(8)
    rows = [
        row
        if len(row) <= length
        else [*[0.0] * (len(row) - length), sum(row[: 1 - length or None]), *row[1 - length :]]
        if length > 1
        else [*[0.0] * (len(row) - 1), 1.0]
        for row in table["coefficients"]
    ]
    capped = make_flow(solvers={"8": table}, history_length=length)
    by_hand = make_flow(solvers={"8": {**table, "coefficients": rows}})
    held = []

    def watching(x, t):
        held.append(len(capped.model_outputs))
        return network(x, t)

    got = run(capped, noise(), 8, model=watching)
    assert_close(got, run(by_hand, noise(), 8), 1e-12)
    assert max(held) <= length
    assert len(capped.model_outputs) <= length


@pytest.mark.parametrize("length", [0, -1, True, 2.0, "3"])
def test_a_senseless_history_length_is_refused(length):
    with pytest.raises(ValueError, match="history_length is"):
        make_flow(history_length=length)


def test_frames_cut_out_of_sample_and_history_alike_go_on_with_the_history():
    """ChronoEdit keeps the first and last frame from some step on; the rest is a run of these frames alone."""
    scheduler = make_flow(solvers=make_solvers(6))
    full = noise(1, 2, 5, 3)
    wanted = run(copy.deepcopy(scheduler), full[:, :, [0, -1]], 6)
    scheduler.set_timesteps(6)
    x = full
    for i, t in enumerate(scheduler.timesteps):
        if i == 3:
            x = x[:, :, [0, -1]]
            for j in range(len(scheduler.model_outputs)):
                if scheduler.model_outputs[j] is not None:
                    scheduler.model_outputs[j] = scheduler.model_outputs[j][:, :, [0, -1]]
            if scheduler.last_sample is not None:
                scheduler.last_sample = scheduler.last_sample[:, :, [0, -1]]
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    assert_close(x, wanted, 1e-12)


def test_a_network_that_reuses_its_output_buffer_does_not_change_the_past():
    """As CUDA graphs do."""
    x, buffer = noise(dtype=torch.float32), torch.empty(2, 4, 3, 3)
    for prediction_type in ("flow_prediction", "sample"):
        scheduler = make_any(prediction_type, solvers=make_solvers(6))
        wanted = run(scheduler, x, 6)
        assert torch.equal(run(scheduler, x, 6, model=lambda y, t: buffer.copy_(network(y, t))), wanted)


# --- what single pipelines ask for -----------------------------------------------------------------------------------


def test_per_token_times_change_the_sign_and_keep_the_samples_dtype():
    """LTX-condition hands the negated velocity; tokens at the common time step as ever (its others are put back)."""
    scheduler, theirs = make_flow(), FlowMatchEulerDiscreteScheduler()
    x = noise(1, 6, 4, dtype=torch.float32)
    for s in (scheduler, theirs):
        s.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    v = network(x, 1000.0).bfloat16()
    times = torch.full((1, 6), 1000.0)
    ours = scheduler.step(-v, scheduler.timesteps[0], x, per_token_timesteps=times, return_dict=False)[0]
    wanted = theirs.step(-v.float(), theirs.timesteps[0], x, per_token_timesteps=times, return_dict=False)[0]
    assert ours.dtype == torch.float32
    assert_close(ours, wanted, 1e-6)
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    assert torch.equal(scheduler.step(v.float(), scheduler.timesteps[0], x, return_dict=False)[0], ours)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_variances_behind_the_prediction_are_left_aside(variance_type):
    """DeepFloyd IF does not split them off when the scheduler's configuration has learned variances."""
    x = noise(2, 3, 4, 4)
    wanted = run(DSSolverScheduler(), x, 5)
    ours = DSSolverScheduler(variance_type=variance_type)
    got = run(ours, x, 5, model=lambda y, t: torch.cat([network(y, t), torch.full_like(y, 7.0)], 1))
    assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="must be equal"):
        run(DSSolverScheduler(), x, 5, model=lambda y, t: torch.cat([y, y], 1))


@pytest.mark.parametrize("ratio", [0.6, 0.995])
@pytest.mark.parametrize("limit", [1.0, 1.7])
def test_dynamic_thresholding_is_diffusers(ratio, limit):
    options = {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": limit}
    theirs = DPMSolverMultistepScheduler(timestep_spacing="trailing", final_sigmas_type="zero", **options)
    ours = DSSolverScheduler.from_config(theirs.config, solvers="classical")
    for scale in (0.3, 3.0):  # below and above 1, where s is clamped
        x = scale * noise(2, 3, 4, 4)
        assert_close(run(ours, x, 8), run(theirs, x, 8), 1e-5)
    assert (run(ours, x, 8) - run(DSSolverScheduler(), x, 8)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="thresholding is for vp models"):
        make_flow(thresholding=True)


@pytest.mark.parametrize("config", [{}, SD_CONFIG, {"beta_schedule": "squaredcos_cap_v2"}])
def test_betas_and_alphas_cumprod_are_ddims(config, monkeypatch):
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.torch", DoubleTorch())
    theirs, ours = DDIMScheduler(**config), DSSolverScheduler(**config)
    assert_close(ours.betas, theirs.betas, EPS)  # ours are rounded to float32
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, EPS)
    assert ours.betas.shape == ours.alphas_cumprod.shape == (1000,)


def test_a_flow_model_has_no_betas():
    """Stable Cascade asks with hasattr."""
    for name in ("betas", "alphas_cumprod"):
        assert not hasattr(make_flow(), name)
    assert_close(make_flow(trained_betas=[0.25, 0.5]).betas, torch.tensor([0.25, 0.5]), 0)  # unless it was given some


def test_trained_betas_may_be_fewer_than_the_training_steps():
    betas = np.array([0.1, 0.3])
    ours, theirs = DSSolverScheduler(trained_betas=betas), DDIMScheduler(trained_betas=betas)
    assert_close(ours.betas, theirs.betas, 1e-6)
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, 1e-6)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [UniPCMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize("serialised", [False, True])
def test_a_visit_to_another_class_does_not_print_the_table(other, serialised, caplog, capfd):
    ours = DSSolverScheduler.from_published("dit-xl-2-256")
    if serialised:
        repr(ours)  # puts _class_name into the live configuration
    with caplog.at_level(logging.DEBUG):
        back = DSSolverScheduler.from_config(other.from_config(ours.config).config)
    printed = caplog.text + "".join(capfd.readouterr())
    assert len(printed) < 2500
    assert "0.999" not in printed
    assert back.solvers == ours.solvers
    assert back.config.solvers == ours.config.solvers


def test_the_refusal_names_the_shipped_solver_that_fits():
    with pytest.raises(ValueError, match=r"use 'flowdcn-b-2-256' or 'sit-xl-2-256', which fits, search one"):
        DSSolverScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, solvers="dit-xl-2-256", strict=True)


def test_other_classes_are_told_the_noise_schedule():
    """LCM's own default is another; diffusers would not pass on what is at our default."""
    told = LCMScheduler.from_config(DSSolverScheduler().config).config
    assert (told.beta_start, told.beta_schedule) == (0.0001, "linear")


def test_edm_is_not_offered_as_compatible():
    offered = {cls.__name__ for cls in DSSolverScheduler().compatibles}
    assert {"UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"} <= offered
    assert "EDMEulerScheduler" not in offered


def test_of_what_ddim_pipelines_pass_noise_is_refused():
    scheduler, x = make_any("epsilon"), noise()
    scheduler.set_timesteps(3)
    t = scheduler.timesteps[0]
    wanted = scheduler.step(x, t, x, return_dict=False)[0]
    got = scheduler.step(x, t, x, eta=0.0, use_clipped_model_output=True, return_dict=False)[0]
    assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match=r"eta is 0\.5; this solver is deterministic"):
        scheduler.step(x, t, x, eta=0.5)
    with pytest.raises(TypeError, match="no argument 'variance_noise'"):
        scheduler.step(x, t, x, variance_noise=x)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon", "v_prediction"])
def test_torch_compile_takes_a_whole_run_and_a_step_without_a_graph_break(prediction_type):
    scheduler = make_any(prediction_type, solvers=make_solvers(4))
    x = noise(dtype=torch.float32)

    def model(y, t):
        return torch.tanh(1.3 * y) - t / 1000 * y

    def sample(y):
        for t in scheduler.timesteps:
            y = scheduler.step(model(y, t), t, y, return_dict=False)[0]
        return y

    wanted = run(scheduler, x, 4, model=model)
    torch._dynamo.reset()
    scheduler.set_timesteps(4)
    assert_close(torch.compile(sample, fullgraph=True, backend="eager")(x), wanted, 1e-6)
    torch._dynamo.reset()
    scheduler.set_timesteps(4)
    compiled, y = torch.compile(scheduler.step, fullgraph=True, backend="eager"), x
    for t in scheduler.timesteps:
        y = compiled(model(y, t), t, y, return_dict=False)[0]
    assert_close(y, wanted, 1e-6)
    torch._dynamo.reset()


def test_a_compiled_start_in_the_middle_must_be_announced():
    scheduler = make_flow(solvers=make_solvers(4))
    x = noise(dtype=torch.float32)
    torch._dynamo.reset()
    step = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError, match="set_begin_index"):
        step(x, scheduler.timesteps[2], x)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    got = step(x, scheduler.timesteps[2], x, return_dict=False)[0]
    scheduler.set_timesteps(4)
    assert_close(got, scheduler.step(x, scheduler.timesteps[2], x, return_dict=False)[0], 1e-6)
    torch._dynamo.reset()


# --- memory ----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes in tensors made within: those alive now, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def now(self):
        self.made = {storage: size for storage, size in self.made.items() if not storage.expired()}
        return sum(self.made.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now())
        return result


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("length", [None, 2])
def test_a_run_takes_its_history_and_two_states(prediction_type, length):
    """Both results of a step, for the caller holds the sample and the network's output."""
    scheduler, nfe = make_any(prediction_type, solvers=make_solvers(6), history_length=length), 6
    x = noise(dtype=torch.float32)
    scheduler.set_timesteps(nfe)
    with Allocations() as used:
        for t in scheduler.timesteps:
            x = scheduler.step(x.clone(), t, x, return_dict=False)[0]
    kept, given, made = length or nfe, 2, 2
    assert used.peak // x.nbytes == kept + given + made
    del x
    assert used.now() // noise(dtype=torch.float32).nbytes == kept


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon", "v_prediction", "sample"])
def test_gradients_reach_state_and_output(prediction_type):
    """In-place accumulation must not spoil anyone's backward pass."""
    scheduler = make_any(prediction_type, solvers=make_solvers(4))
    x = noise().requires_grad_()
    states_of(scheduler, x, 4)[-1].square().sum().backward()
    eps, base = 1e-6, x.detach()
    direction = noise(seed=11)
    ends = [run(scheduler, base + s * eps * direction, 4).square().sum() for s in (1, -1)]
    assert torch.sum(x.grad * direction).item() == pytest.approx(((ends[0] - ends[1]) / (2 * eps)).item(), rel=1e-6)
