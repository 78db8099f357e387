"""Teachers: how far they are from converged, step counts chosen by it, and diffusers' schedulers as teachers."""

from __future__ import annotations

import copy
import json
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_dssolver.paths import FlowPath
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.methods import search as run_module
from dssolver_search.methods import setup as search_setup
from dssolver_search.pipeline import stock
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.storage import read_record
from dssolver_search.teacher import trajectories as teacher
from dssolver_search.teacher.trajectories import Convergence, Teacher, convergence, model_itself, reference
from tests.search.test_search import (
    CLOSED_FORM,
    PAPER,
    GaussianModel,
    Recording,
    both,
    lines_of,
    make_pipe,
    make_probe,
    make_sampler,
    make_scheduler,
    refused,
    search,
    without_clock,
)

UNIPC, FLOW_EULER, DDIM = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"
SHORT = {**CLOSED_FORM, "nfe": [3], "fill_nfe": [], "trials": 1, "polish": 0}
STATE = "search_state.json"
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


def solvable(family):
    """A sampler of the exact network of Gaussian data, in float64."""
    pipe = SiTPipeline(GaussianModel(family).double(), make_scheduler(family))
    pipe.set_progress_bar_config(disable=True)
    return make_sampler(pipe, 2.0)


def estimated(sampler, taught, tolerance=1e-5, above=3, batch_size=4):
    return convergence(sampler, make_probe(sampler.pipe), taught, tolerance, above, batch_size)


def named(name, sampler, steps=20, order=3):
    return Teacher.named(name, steps, order, sampler, make_probe(sampler.pipe))


def taught(sampler, scheduler="", steps=20, indices=range(4), split="train", **kwargs):
    found = named(scheduler, sampler, steps)
    probe = make_probe(sampler.pipe)
    return reference(
        sampler, probe, indices, split, steps, found.order, 4, progress=False, scheduler=found.scheduler, **kwargs
    )


def finals(sampler, steps, order=3):
    """Final states of the four samples of the estimate, by an ordinary reference."""
    return reference(sampler, make_probe(sampler.pipe), range(4), "convergence", steps, order, 4, progress=False).final


# --- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, order, power", [("flow", 1, 2), ("flow", 2, 4), ("vp", 1, 2)])
def test_estimate_falls_as_the_order_says(family, order, power):
    sampler = solvable(family)
    mse = [estimated(sampler, Teacher(steps, order)).estimated_mse for steps in (50, 100)]
    assert math.log2(mse[0] / mse[1]) == pytest.approx(power, abs=0.35)


@both
def test_estimate_is_that_of_the_true_error(family):
    """Of first order, half the steps double the error: the change is as large as what is left at the finer one."""
    sampler = solvable(family)
    exact = finals(sampler, 800)
    found = estimated(sampler, Teacher(25, 1))
    assert found.against == 50 and found.samples == 4
    left = (finals(sampler, 50, 1) - exact).square().mean().item()
    assert found.estimated_mse == pytest.approx(left, rel=0.35)
    assert found.relative == pytest.approx(found.estimated_mse / finals(sampler, 50, 1).double().var().item(), rel=1e-6)


def test_estimate_does_not_depend_on_the_batch_and_counts_what_it_spends():
    sampler = make_sampler(make_pipe("flow"))
    whole = estimated(sampler, Teacher(10))
    assert sampler.network_evaluations == 2 * 4 * (10 + 20)
    parts = estimated(sampler, Teacher(10), batch_size=3)
    assert parts.estimated_mse == pytest.approx(whole.estimated_mse, rel=1e-3)


def test_estimate_against_half_where_twice_is_too_many(monkeypatch):
    monkeypatch.setattr(teacher, "MAX_NFE", 70)
    sampler = make_sampler(make_pipe("flow"))
    found = estimated(sampler, Teacher(60))
    assert (found.steps, found.against) == (60, 30)
    chosen = estimated(sampler, Teacher(0), tolerance=1e-30)  # never met: the most that can be taken
    assert (chosen.steps, chosen.against) == (50, 25)
    assert "misses teacher_tolerance 1e-30" in chosen.line(Teacher(50), 1e-30)
    with pytest.raises(ValueError, match="finds none above 60 calls; give teacher_steps"):
        estimated(sampler, Teacher(0), above=60)


def test_states_that_are_not_finite_are_refused():
    sampler = make_sampler(make_pipe("flow"))
    sampler.pipe.transformer.proj_out_2.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="final states of 10 teacher steps are not finite"):
        estimated(sampler, Teacher(10))


def test_what_the_user_is_told():
    found = Convergence(200, 3.1e-8, 2e-8, 400)
    line = "teacher: 200 steps of order 3; estimated mse 3e-08 (against 400 steps, 4 samples)"
    assert found.line(Teacher(200), 1e-5) == line


# --- chosen step counts -----------------------------------------------------------------------------------------------


def by_hand(sampler, tolerance, steps=25):
    while True:
        coarse, fine = finals(sampler, steps), finals(sampler, 2 * steps)
        mse = (coarse.double() - fine.double()).square().mean().item()
        if mse <= tolerance * fine.double().var().item():
            return steps, mse
        steps *= 2


@both
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_chosen_steps_are_those_of_a_loop_by_hand(family, tolerance):
    sampler = make_sampler(make_pipe(family))
    found = estimated(sampler, Teacher(0), tolerance)
    steps, mse = by_hand(make_sampler(make_pipe(family)), tolerance)
    assert found.steps == steps and found.against == 2 * steps and found.estimated_mse == pytest.approx(mse, rel=1e-6)
    tried = [25 * 2**k for k in range(int(math.log2(steps // 25)) + 2)]  # each once
    assert sampler.network_evaluations == 2 * 4 * sum(tried)


def test_chosen_steps_are_more_than_the_calls_searched_for():
    found = estimated(make_sampler(make_pipe("flow")), Teacher(0), tolerance=10.0, above=30)
    assert found.steps == 50


def test_chosen_steps_serve_the_search_and_are_neither_chosen_nor_counted_again(models, tmp_path, monkeypatch, capsys):
    settings = {**SHORT, "teacher_steps": 0, "teacher_tolerance": 1e-4}
    search(models["flow"], tmp_path / "whole", settings)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teacher: ")]
    seed = make_sampler(make_pipe("flow"), seed=5)
    steps, mse = by_hand(seed, 1e-4)
    assert told == [
        f"teacher: {steps} steps of order 3; estimated mse {mse:.1g} (against {2 * steps} steps, 4 samples)"
    ]
    facts = json.loads((tmp_path / "whole" / "scheduler_config.json").read_text())["provenance"]["teacher"]
    assert facts == {"steps": steps, "order": 3, "estimated_mse": pytest.approx(mse, rel=1e-6)}
    state = read_record(tmp_path / "whole" / STATE)
    estimate = state["teacher"]["network_evaluations"]
    solvers = sum(entry["network_evaluations"] for entry in state["solvers"].values())
    assert state["network_evaluations"] == estimate + 2 * steps * (4 + 3) + solvers
    [line] = [r for r in lines_of(tmp_path / "whole") if "teacher" in r]
    assert line["teacher"] == state["teacher"] and line["network_evaluations"] == estimate

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search_setup, "reference", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            search(models["flow"], tmp_path / "killed", settings)
    assert read_record(tmp_path / "killed" / STATE)["teacher"] == state["teacher"]
    monkeypatch.setattr(run_module, "convergence", None)  # not called again
    search(models["flow"], tmp_path / "killed", settings)
    assert "teacher: " in capsys.readouterr().err
    both_states = [without_clock(read_record(tmp_path / n / STATE)) for n in ("whole", "killed")]
    assert both_states[0] == both_states[1]
    with pytest.raises(SystemExit):
        search(models["flow"], tmp_path / "killed", settings, nfe=[3, steps])
    assert (
        f"nfe asks for {steps} calls, but the teacher chosen in this folder takes {steps} steps"
        in capsys.readouterr().err
    )


def test_paper_tells_of_the_teacher_of_its_held_out_samples(models, tmp_path, capsys):
    search(models["flow"], tmp_path, PAPER, num_generated_samples=4)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teacher: ")]
    assert line.startswith("teacher: 20 steps of order 3; ")


# --- diffusers' schedulers --------------------------------------------------------------------------------------------

USABLE = [("flow", UNIPC), ("flow", FLOW_EULER), ("flow", "DPMSolverMultistepScheduler")]
USABLE += [("vp", name) for name in (UNIPC, DDIM, "DPMSolverMultistepScheduler", "DEISMultistepScheduler")]


@pytest.mark.parametrize("family, name", USABLE)
def test_states_are_those_of_an_ordinary_call(family, name):
    pipe = make_pipe(family)
    sampler = make_sampler(pipe)
    before = pipe.scheduler
    found = taught(sampler, name, 20)
    assert pipe.scheduler is before and sampler.network_evaluations == 2 * 4 * 20
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name != FLOW_EULER else {}
    options = flow if family == "flow" else {"timestep_spacing": "trailing"}
    options |= {"clip_sample": False} if name == DDIM else {}
    pipe.scheduler = getattr(diffusers, name).from_config(before.config, **options)
    states = []

    def keep(pipe, i, t, tensors):
        states.append(tensors["latents"].clone())
        return tensors

    last = sampler(range(4), "train", 20, callback_on_step_end=keep, output_type="latent")[0]
    assert found.states.shape == (21, 4, 1, 4, 4)
    assert (found.states[1:] - torch.stack(states)).abs().max() < 1e-6
    assert (found.final - last).abs().max() < 1e-6
    start = torch.stack([torch.randn(1, 4, 4, generator=g) for g in sampler.generators(range(4), "train")])
    assert (found.states[0] - start).abs().max() < 1e-6


@both
@pytest.mark.parametrize("name", [UNIPC, "euler"])
def test_unipc_and_ours_agree_at_every_angle(family, name):
    """UniPC takes whole times and float32 levels: it differs by them, far less than by a step of its nodes."""
    sampler = make_sampler(make_pipe(family))
    ours, other = taught(sampler, "", 200), taught(sampler, name, 100)
    assert (other.angles.diff() < 0).all() and other.angles[-1] == 0
    assert other.angles[0].item() == pytest.approx(ours.angles[0].item(), abs=1e-5)
    for k in (0, 10, 50, 90, 99, 100):
        wanted = ours.at(other.angles[k])
        beside = ours.at(other.angles[max(k - 1, 0)]) - wanted
        error = (other.states[k] - wanted).square().mean()
        size = wanted.square().mean()
        assert error < (3e-5 if name == UNIPC else 3e-3) * size
        assert k in (0, 100) or name != UNIPC or error < 0.3 * beside.square().mean()


@pytest.mark.parametrize("family, name", [("flow", FLOW_EULER), ("vp", DDIM)])
def test_first_order_of_diffusers_is_euler(family, name):
    sampler = make_sampler(make_pipe(family))
    theirs, ours = taught(sampler, name, 100), taught(sampler, "euler", 100)
    torch.testing.assert_close(theirs.angles, ours.angles, rtol=0, atol=1e-5)
    assert (theirs.states - ours.states).abs().max() < 1e-3
    assert named("euler", sampler) == Teacher(20, 1) and named("", sampler) == Teacher(20, 3)


def test_shift_of_the_model_moves_the_nodes():
    pipe = make_pipe("flow")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = make_sampler(pipe)
    assert named(UNIPC, sampler).scheduler.config.flow_shift == 3.0
    torch.testing.assert_close(taught(sampler, UNIPC, 100).angles, taught(sampler, "", 100).angles, rtol=0, atol=1e-5)
    assert (taught(sampler, UNIPC, 100).final - taught(sampler, "", 200).final).square().mean() < 1e-4


def test_model_is_not_clipped_by_its_teacher():
    assert make_scheduler("vp").config.clip_sample  # of the model: what is searched does not clip
    assert not named(DDIM, make_sampler(make_pipe("vp"))).scheduler.config.clip_sample


def test_second_scheduler_of_a_pipeline_is_not_recorded():
    """A pipeline may copy its scheduler, for sound, and step both."""

    class Doubling(SiTPipeline):
        def _set_timesteps(self, count, device):
            second = copy.deepcopy(self.scheduler)
            second.set_timesteps(5)
            sample = torch.ones(1, 1, 4, 4)
            for t in second.timesteps:
                sample = second.step(torch.zeros_like(sample), t, sample, return_dict=False)[0]
            return super()._set_timesteps(count, device)

    plain = make_pipe("vp")
    pipe = Doubling(plain.transformer, plain.scheduler)
    pipe.set_progress_bar_config(disable=True)
    found, wanted = (taught(make_sampler(p), UNIPC, 20) for p in (pipe, plain))
    assert torch.equal(found.states, wanted.states)


@pytest.mark.parametrize(
    "family, name, reason",
    [
        ("vp", "NoSuchScheduler", "is no scheduler class of the diffusers that is installed"),
        ("vp", "UNet2DModel", "is no scheduler class"),
        ("vp", "os; import", "is no scheduler class"),
        ("vp", FLOW_EULER, "does not serve vp models, which this one is"),
        ("flow", DDIM, "does not serve flow models, which this one is"),
        ("vp", "EulerDiscreteScheduler", "keeps its states on another scale than the model's own (init_noise_sigma"),
        ("vp", "LMSDiscreteScheduler", "keeps its states on another scale"),
        ("vp", "HeunDiscreteScheduler", "makes 199 network calls in 100 steps"),
        ("flow", "FlowMatchHeunDiscreteScheduler", "makes 199 network calls in 100 steps"),
        ("vp", "PNDMScheduler", "makes 109 network calls in 100 steps"),
        ("vp", "DDPMScheduler", "is stochastic"),
        ("vp", "SASolverScheduler", "is stochastic"),
        ("flow", "FlowMatchLCMScheduler", "is stochastic"),
        ("vp", "EulerAncestralDiscreteScheduler", "keeps its states on another scale"),
        ("flow", "DEISMultistepScheduler", "repeats nodes in 100 steps"),
        ("vp", "CogVideoXDDIMScheduler", "has another noise schedule than the model"),
        ("vp", "LCMScheduler", "cannot be run on this model"),
    ],
)
def test_schedulers_that_cannot_serve_are_refused(family, name, reason):
    with pytest.raises(ValueError, match="teacher_scheduler") as error:
        named(name, make_sampler(make_pipe(family)))
    line = str(error.value)
    assert line.startswith(f"teacher_scheduler {name!r} {reason}") and "\n" not in line
    assert line.endswith(f"; give {UNIPC}, or leave it empty for our own multistep")


def test_stochastic_options_of_the_model_are_refused():
    pipe = make_pipe("flow")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="is stochastic"):
        named(FLOW_EULER, make_sampler(pipe))


def test_trajectories_off_the_model_are_refused(monkeypatch):
    step = DDIMScheduler.step

    def short(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        return (0.97 * found[0], *found[1:])

    monkeypatch.setattr(DDIMScheduler, "step", short)
    with pytest.raises(ValueError, match="leaves the model's trajectories"):
        named(DDIM, make_sampler(make_pipe("vp")))


def test_inverted_times_need_a_scheduler_that_knows_them():
    pipe = make_pipe("flow")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="does not know invert_sigmas"):
        named(UNIPC, make_sampler(pipe))
    found = named(FLOW_EULER, make_sampler(pipe)).scheduler
    angles = stock.angles_of(found, make_probe(pipe).path)
    assert angles[0] > angles[-1] == 0


def test_steps_that_a_scheduler_cannot_take_are_refused_and_left_out_of_the_estimate():
    """DDIM takes whole times: 200 steps, but not 400."""
    sampler = make_sampler(make_pipe("vp"))
    with pytest.raises(ValueError, match="teacher_steps is 400; DDIMScheduler cannot take so many"):
        named(DDIM, sampler, 400)
    found = estimated(sampler, named(DDIM, sampler, 200))
    assert (found.steps, found.against) == (200, 100)


def test_pipeline_that_takes_other_steps_is_refused():
    class Half(SiTPipeline):
        def _set_timesteps(self, count, device):
            return super()._set_timesteps(count // 2, device)

    plain = make_pipe("vp")
    pipe = Half(plain.transformer, plain.scheduler)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(
        ValueError, match="Half with UniPCMultistepScheduler took 10 steps, not the 20 of teacher_steps"
    ):
        taught(make_sampler(pipe), UNIPC)
    assert pipe.scheduler is plain.scheduler


def test_scheduler_and_its_configuration_name_the_cached_file(tmp_path):
    sampler = make_sampler(make_pipe("vp"))
    first = taught(sampler, UNIPC, cache=tmp_path)
    files, spent = sorted(tmp_path.iterdir()), sampler.network_evaluations
    again = taught(sampler, UNIPC, cache=tmp_path)
    assert sampler.network_evaluations == spent == again.network_evaluations
    assert torch.equal(first.states, again.states) and torch.equal(first.angles, again.angles)
    assert sorted(tmp_path.iterdir()) == files and len(files) == 4
    taught(sampler, "", cache=tmp_path)
    taught(sampler, "DPMSolverMultistepScheduler", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 12
    found = named(UNIPC, sampler).scheduler
    found = type(found).from_config(found.config, solver_order=3)
    probe = make_probe(sampler.pipe)
    reference(sampler, probe, range(4), "train", 20, 1, 4, tmp_path, False, scheduler=found)
    assert len(list(tmp_path.iterdir())) == 16


def test_search_with_a_scheduler_as_teacher(models, tmp_path, capsys):
    search(models["vp"], tmp_path, SHORT, teacher_scheduler=UNIPC)
    assert f"teacher: 20 steps of {UNIPC}; estimated mse " in capsys.readouterr().err
    facts = json.loads((tmp_path / "scheduler_config.json").read_text())["provenance"]
    assert facts["teacher"].keys() == {"steps", "scheduler", "estimated_mse"}
    assert (facts["teacher"]["scheduler"], facts["teacher"]["steps"]) == (UNIPC, 20)
    [result] = facts["results"].values()
    assert result["validation_mse"] < result["classical_mse"]
    sampler = make_sampler(load_pipeline(str(models["vp"])), seed=5)
    for split, count in (("train", 4), ("validation", 3)):  # its trajectories are what was fitted to
        taught(sampler, UNIPC, 20, range(count), split, cache=tmp_path / "cache")
    assert sampler.network_evaluations == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_scheduler": "HeunDiscreteScheduler"}, "makes 199 network calls in 100 steps"),
        ({"teacher_steps": 1001}, "teacher_steps is 1001; it must be more than the largest NFE, at most 1000, or 0"),
        ({"teacher_steps": -1}, "teacher_steps is -1"),
        ({"teacher_tolerance": 0}, "teacher_tolerance is 0.0; it must be above 0"),
        ({"teacher_end": 0.6}, "teacher_end is 0.6; it must be from 0 to 0.5"),
        ({"teacher_end": -0.1}, "teacher_end is -0.1; it must be from 0 to 0.5"),
        ({"teacher_end": math.nan}, "teacher_end is nan; it must be from 0 to 0.5"),
        ({"teacher_end": 0.1, "teacher_scheduler": UNIPC}, f"teacher_end is 0.1, but {UNIPC} has an end of its own"),
        ({"teacher_end": 0.1, "method": "paper"}, "teacher_end is 0.1, but method paper has an end of its own"),
    ],
)
def test_bad_settings_end_in_one_line_and_write_nothing(changes, message, models, tmp_path, capsys):
    line = refused(capsys, lambda: search(models["vp"], tmp_path / "out", SHORT, **changes))
    assert message in line and not list(tmp_path.iterdir())


# --- an early end -----------------------------------------------------------------------------------------------------

END = 0.2


def predicted(sampler, states, node):
    """The data that the guided network predicts of the first four samples' states (4, ...) at a node."""
    labels = sampler.conditions(range(4))["class_labels"]
    with Recording(sampler.pipe, 2.0) as seen, torch.no_grad():
        null = sampler.pipe.transformer.config.num_embeds_ada_norm
        classes = torch.tensor([*labels, *[null] * 4])
        path = make_probe(sampler.pipe).path
        sampler.pipe.transformer(
            torch.cat([states, states]), timestep=path.timestep(node).expand(8), class_labels=classes
        )
    [output], (alpha, sigma) = seen.outputs, path.alpha_sigma(node)
    return states - sigma * output if isinstance(path, FlowPath) else (states - sigma * output) / alpha


@both
def test_from_its_end_a_reference_goes_to_the_data_that_is_predicted_there(family):
    sampler = solvable(family)
    probe = make_probe(sampler.pipe)
    whole, node = taught(sampler, steps=800), torch.tensor(END, dtype=torch.float64) * probe.path.first_node
    before = sampler.network_evaluations
    found = taught(sampler, steps=100, end=END)
    assert sampler.network_evaluations - before == 2 * 4 * 100  # as many as without
    state = whole.at(probe.angle(node))
    torch.testing.assert_close(found.final, predicted(sampler, state, node), rtol=0, atol=1e-5)
    assert (found.final - whole.final).abs().max() > 1e-3
    torch.testing.assert_close(found.at(probe.angle(node)), state, rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("share", [0.9, 0.5, 0.13])
def test_between_its_end_and_the_data_the_noise_of_a_reference_is_that_at_its_end(family, share):
    sampler = solvable(family)
    probe = make_probe(sampler.pipe)
    found = taught(sampler, steps=100, end=END)
    end, between = (torch.tensor(END * s, dtype=torch.float64) * probe.path.first_node for s in (1, share))
    (alpha, sigma), (a, s) = (probe.path.alpha_sigma(node) for node in (end, between))
    noise = (found.at(probe.angle(end)) - alpha * found.final) / sigma
    torch.testing.assert_close(found.at(probe.angle(between)), a * found.final + s * noise, rtol=0, atol=3e-4)


def test_order_of_an_early_end_is_that_of_the_steps_before_it():
    sampler = solvable("flow")
    finals = [taught(sampler, steps=steps, end=END).final for steps in (40, 80, 400)]
    errors = [(final - finals[2]).square().mean().item() for final in finals[:2]]
    # of mse, second order at least: the last step has no error of its own
    assert math.log2(errors[0] / errors[1]) > 3.65


@pytest.mark.parametrize("name, steps", [("euler", 300), ("", 60), ("", 200)])
def test_schedules_with_a_terminal_shift_end_as_their_own_scheduler_does(name, steps):
    """Of any order: not at the end of the whole trajectory, which an extrapolation over the long last step leads to."""
    sampler = solvable("flow")
    sampler.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    theirs = sampler(range(4), "train", 900, output_type="latent")[0]
    torch.testing.assert_close(sampler.pipe.scheduler.sigmas[-2:], torch.tensor([0.1, 0.0]))
    found = taught(sampler, name, steps)
    assert (found.final - theirs).square().mean() < 3e-6
    assert len(found.states) == steps + 1  # as `Reference.nearest` takes them to be
    assert (taught(solvable("flow"), name, steps).final - theirs).square().mean() > 1e-4


@both
def test_the_model_itself_is_what_a_teacher_converges_to(family):
    sampler = make_sampler(make_pipe(family))
    for end in (0.0, END):
        with sampler.using(model_itself(sampler.pipe.scheduler.config, end)):
            theirs = sampler(range(4), "train", 200, output_type="latent")[0]
        assert (taught(sampler, steps=200, end=end).final - theirs).square().mean() < 1e-6 * theirs.var()
    assert (taught(sampler, steps=200).final - theirs).square().mean() > 1e-5 * theirs.var()


@both
def test_search_with_an_early_end(family, models, tmp_path, capsys):
    search(models[family], tmp_path, SHORT, teacher_end=END)
    assert "teacher: 20 steps of order 3, the last from 0.2 to the data; estimated mse " in capsys.readouterr().err
    facts = json.loads((tmp_path / "scheduler_config.json").read_text())["provenance"]
    assert facts["teacher"]["end"] == END and facts["settings"]["teacher_end"] == END
    sampler = make_sampler(load_pipeline(str(models[family])), seed=5)
    for split, count in (("train", 4), ("validation", 3)):  # its trajectories are what was fitted to
        taught(sampler, "", 20, range(count), split, cache=tmp_path / "cache", end=END)
    assert sampler.network_evaluations == 0
    assert taught(sampler, "", 20, range(4), cache=tmp_path / "cache").network_evaluations > 0
    assert sampler.network_evaluations == 2 * 4 * 20  # of another end
    [result] = facts["results"].values()
    assert result["validation_mse"] < result["classical_mse"]


def test_an_early_end_of_a_schedule_that_has_one_is_refused(models, tmp_path, capsys):
    folder = tmp_path / "model"
    pipe = load_pipeline(str(models["flow"]))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    pipe.save_pretrained(folder)
    line = refused(capsys, lambda: search(folder, tmp_path / "out", SHORT, teacher_end=END))
    assert (
        "teacher_end is 0.2, but this model's schedule ends at its shift_terminal, 0.1; leave teacher_end out" in line
    )
    with pytest.raises(ValueError, match=r"reference_end is 0\.2, but this model's schedule ends"):
        model_itself(pipe.scheduler.config, END)
    assert not (tmp_path / "out").exists()


def test_runs_leave_the_global_random_numbers_alone():
    sampler = make_sampler(make_pipe("vp"))
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    named(UNIPC, sampler)
    assert torch.equal(torch.rand(1), wanted) and isinstance(sampler, Sampler)
