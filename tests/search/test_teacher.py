"""Teachers: trajectories read off at any node, how far they are from converged, chosen step counts, early ends."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_dssolver.paths import FlowPath
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.methods import search as run_module
from dssolver_search.methods import setup as search_setup
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.storage import read_record
from dssolver_search.teacher import trajectories
from dssolver_search.teacher.convergence import Convergence, convergence
from dssolver_search.teacher.ends import model_itself
from dssolver_search.teacher.trajectories import Teacher, TeacherTrajectory
from tests.families import (
    GaussianModel,
    Recording,
    both,
    make_path,
    make_pipe,
    make_scheduler,
    make_student,
    trajectory_of,
)
from tests.searches import CLOSED_FORM, PAPER, lines_of, refused, search, without_clock

SHORT = {**CLOSED_FORM, "nfe": [3], "fill_nfe": [], "trials": 1, "polish": 0}
STATE = "search_state.json"
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


def solvable(family):
    """A student of the exact network of Gaussian data, in float64, with guidance 2."""
    pipe = SiTPipeline(GaussianModel(family).double(), make_scheduler(family))
    pipe.set_progress_bar_config(disable=True)
    return make_student(pipe, 2.0)


def estimated(student, taught, tolerance=1e-5, above=3, batch_size=4):
    return convergence(student, taught, tolerance, above, batch_size)


def finals(student, steps, order=3):
    """Final states of the four samples of the estimate, by an ordinary trajectory."""
    return trajectory_of(student, split="convergence", steps=steps, order=order).final


# --- trajectories -----------------------------------------------------------------------------------------------------


def test_trajectory_reads_cubics_exactly():
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(9, generator=generator, dtype=torch.float64).sort(descending=True).values * 1.5
    factors = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)

    def cubic(angle):
        return sum(factors[k] * angle**k for k in range(4))

    known = TeacherTrajectory(angles, torch.stack([cubic(a) for a in angles]))
    between = (angles[1:] + angles[:-1]) / 2
    for angle in [*angles, *between]:
        torch.testing.assert_close(known.at(angle), cubic(angle), rtol=0, atol=1e-10)
    assert torch.equal(known.final, known.states[-1])


def test_trajectory_at_uses_the_four_nearest_nodes():
    """A kink in one place must not be felt on the other side of a node two away."""
    angles = torch.linspace(1, 0, 11, dtype=torch.float64)
    states = torch.zeros(11, 1, dtype=torch.float64)
    states[2] = 1.0
    known = TeacherTrajectory(angles, states)
    felt = [abs(known.at(torch.tensor(1 - (k + 0.5) / 10, dtype=torch.float64)).item()) > 1e-9 for k in range(10)]
    assert felt == [True] * 4 + [False] * 6


def test_nearest_state():
    known = TeacherTrajectory(torch.tensor([1.0, 0.7, 0.3, 0.0]), torch.arange(4.0)[:, None])
    nodes = [1.0, 0.84, 0.83, 0.51, 0.49, 0.17, 0.16, 0.0]  # the times are uniform, whatever the angles
    assert [known.nearest(torch.tensor(n)).item() for n in nodes] == [0, 0, 1, 1, 2, 2, 3, 3]


@both
def test_third_order_trajectory_has_converged(family):
    student = make_student(make_pipe(family))
    coarse, fine, euler = (trajectory_of(student, steps=n, order=k) for n, k in ((100, 3), (200, 3), (100, 1)))
    error = (coarse.final - fine.final).square().mean()
    assert coarse.states.shape == (101, 4, 1, 4, 4) and coarse.angles.shape == (101,)
    assert error < 1e-5 * fine.final.square().mean()
    assert error < 0.01 * (euler.final - fine.final).square().mean()


@both
def test_trajectory_of_a_solvable_model_is_the_solution(family):
    """With guidance 2: it acts on the mean alone, which is then 2 m_class - m_null."""
    student = solvable(family)
    network = student.sampler.pipe.transformer
    found = trajectory_of(student, steps=200)
    problem = network.problem(2 * network.means[[0, 1, 2, 0]] - network.means[3])
    path = make_path(family)
    points = [tuple(map(float, path.alpha_sigma(torch.tensor(n).double()))) for n in np.linspace(1, 0, 201)]
    torch.testing.assert_close(found.angles, torch.tensor([np.arctan2(s, a) for a, s in points]).double())
    start = found.states[0].double()
    for i in (1, 20, 100, 150, 200):
        exact = problem.exact(start, points[0], points[i])
        assert (found.states[i] - exact).abs().max() < (1e-4 if family == "flow" else 3e-3)
    assert (found.final - start).abs().mean() > 0.3


@both
def test_trajectory_is_cached_under_all_that_it_depends_on(family, tmp_path):
    student = make_student(make_pipe(family))
    first = trajectory_of(student, cache=tmp_path)
    spent = student.sampler.network_evaluations
    assert spent == first.network_evaluations == 2 * 4 * 20
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4  # one a sample
    again = trajectory_of(student, cache=tmp_path)
    assert student.sampler.network_evaluations == again.network_evaluations == spent
    assert torch.equal(first.angles, again.angles) and torch.equal(first.states, again.states)
    part = trajectory_of(student, [3, 1], cache=tmp_path)  # whatever the batch or the process
    assert torch.equal(part.states, first.states[:, [3, 1]]) and part.network_evaluations == spent / 2
    assert sorted(tmp_path.iterdir()) == files

    pipe = student.sampler.pipe
    others = [make_student(pipe, 1.6), make_student(pipe, seed=1), make_student(make_pipe(family, 1))]
    others.append(make_student(make_pipe(family, dtype=torch.float64)))
    for count, other in enumerate(others, 2):
        trajectory_of(other, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 4 * count
    for count, change in enumerate(
        ({"steps": 21}, {"order": 2}, {"split": "validation"}, {"indices": range(4, 8)}), len(others) + 2
    ):
        trajectory_of(student, **change, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 4 * count

    whole = files[0].read_bytes()
    files[0].unlink()
    (tmp_path / f"{files[0].name}.1.tmp").write_bytes(whole[:100])  # what a killed process leaves
    spent = student.sampler.network_evaluations
    assert torch.equal(trajectory_of(student, cache=tmp_path).states, first.states)
    assert student.sampler.network_evaluations == spent + 2 * 4 * 20  # its batch is run whole
    assert files[0].read_bytes() == whole


@pytest.mark.parametrize("library", ["torch", "diffusers"])
def test_trajectory_of_another_library_version_is_made_anew(library, tmp_path, monkeypatch):
    student = make_student(make_pipe("flow"))
    trajectory_of(student, cache=tmp_path)
    monkeypatch.setattr(f"{library}.__version__", "0.0.1")
    trajectory_of(student, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("dtype, kept", [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
def test_trajectory_has_the_precision_of_the_run(dtype, kept):
    student = make_student(make_pipe("flow", dtype=getattr(torch, dtype)))
    assert trajectory_of(student, steps=4).states.dtype == getattr(torch, kept)


# --- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, order, power", [("flow", 1, 2), ("flow", 2, 4), ("vp", 1, 2)])
def test_estimate_falls_as_the_order_says(family, order, power):
    student = solvable(family)
    mse = [estimated(student, Teacher(steps, order)).estimated_mse for steps in (50, 100)]
    assert math.log2(mse[0] / mse[1]) == pytest.approx(power, abs=0.35)


@both
def test_estimate_is_that_of_the_true_error(family):
    """Of first order, half the steps double the error: the change is as large as what is left at the finer one."""
    student = solvable(family)
    exact = finals(student, 800)
    found = estimated(student, Teacher(25, 1))
    assert found.against == 50 and found.samples == 4
    left = (finals(student, 50, 1) - exact).square().mean().item()
    assert found.estimated_mse == pytest.approx(left, rel=0.35)
    assert found.relative == pytest.approx(found.estimated_mse / finals(student, 50, 1).double().var().item(), rel=1e-6)


def test_estimate_does_not_depend_on_the_batch_and_counts_what_it_spends():
    student = make_student(make_pipe("flow"))
    whole = estimated(student, Teacher(10))
    assert student.sampler.network_evaluations == 2 * 4 * (10 + 20)
    parts = estimated(student, Teacher(10), batch_size=3)
    assert parts.estimated_mse == pytest.approx(whole.estimated_mse, rel=1e-3)


def test_estimate_against_half_where_twice_is_too_many(monkeypatch):
    monkeypatch.setattr(trajectories, "MAX_NFE", 70)
    student = make_student(make_pipe("flow"))
    found = estimated(student, Teacher(60))
    assert (found.steps, found.against) == (60, 30)
    chosen = estimated(student, Teacher(0), tolerance=1e-30)  # never met: the most that can be taken
    assert (chosen.steps, chosen.against) == (50, 25)
    assert "misses teacher_tolerance 1e-30" in chosen.line(Teacher(50), 1e-30)
    with pytest.raises(ValueError, match="finds none above 60 calls; give teacher_steps"):
        estimated(student, Teacher(0), above=60)


def test_states_that_are_not_finite_are_refused():
    student = make_student(make_pipe("flow"))
    student.sampler.pipe.transformer.proj_out_2.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="final states of 10 teacher steps are not finite"):
        estimated(student, Teacher(10))


def test_what_the_user_is_told():
    found = Convergence(200, 3.1e-8, 2e-8, 400)
    line = "teacher: 200 steps of order 3; estimated mse 3e-08 (against 400 steps, 4 samples)"
    assert found.line(Teacher(200), 1e-5) == line


# --- chosen step counts -----------------------------------------------------------------------------------------------


def by_hand(student, tolerance, steps=25):
    while True:
        coarse, fine = finals(student, steps), finals(student, 2 * steps)
        mse = (coarse.double() - fine.double()).square().mean().item()
        if mse <= tolerance * fine.double().var().item():
            return steps, mse
        steps *= 2


@both
def test_chosen_steps_are_those_of_a_loop_by_hand(family):
    tolerance = 1e-5
    student = make_student(make_pipe(family))
    found = estimated(student, Teacher(0), tolerance)
    steps, mse = by_hand(make_student(make_pipe(family)), tolerance)
    assert found.steps == steps and found.against == 2 * steps and found.estimated_mse == pytest.approx(mse, rel=1e-6)
    tried = [25 * 2**k for k in range(int(math.log2(steps // 25)) + 2)]  # each once
    assert student.sampler.network_evaluations == 2 * 4 * sum(tried)


def test_chosen_steps_are_more_than_the_calls_searched_for():
    found = estimated(make_student(make_pipe("flow")), Teacher(0), tolerance=10.0, above=30)
    assert found.steps == 50


def test_chosen_steps_serve_the_search_and_are_neither_chosen_nor_counted_again(models, tmp_path, monkeypatch, capsys):
    settings = {**SHORT, "teacher_steps": 0, "teacher_tolerance": 1e-4}
    search(models["flow"], tmp_path / "whole", settings)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teacher: ")]
    seed = make_student(make_pipe("flow"), seed=5)
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
        patch.setattr(search_setup, "teacher_trajectory", killed)
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


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_steps": 1001}, "teacher_steps is 1001; it must be more than the largest NFE, at most 1000, or 0"),
        ({"teacher_steps": -1}, "teacher_steps is -1"),
        ({"teacher_tolerance": 0}, "teacher_tolerance is 0.0; it must be above 0"),
        ({"teacher_end": 0.6}, "teacher_end is 0.6; it must be from 0 to 0.5"),
        ({"teacher_end": -0.1}, "teacher_end is -0.1; it must be from 0 to 0.5"),
        ({"teacher_end": math.nan}, "teacher_end is nan; it must be from 0 to 0.5"),
        ({"teacher_end": 0.1, "method": "paper"}, "teacher_end is 0.1, but method paper has an end of its own"),
    ],
)
def test_bad_settings_end_in_one_line_and_write_nothing(changes, message, models, tmp_path, capsys):
    line = refused(capsys, lambda: search(models["vp"], tmp_path / "out", SHORT, **changes))
    assert message in line and not list(tmp_path.iterdir())


# --- an early end -----------------------------------------------------------------------------------------------------

END = 0.2


def predicted(student, states, node):
    """The data that the guided network predicts of the first four samples' states (4, ...) at a node."""
    labels = student.sampler.conditions(range(4))["class_labels"]
    with Recording(student.sampler.pipe, 2.0) as seen, torch.no_grad():
        null = student.sampler.pipe.transformer.config.num_embeds_ada_norm
        classes = torch.tensor([*labels, *[null] * 4])
        path = student.path
        student.sampler.pipe.transformer(
            torch.cat([states, states]), timestep=path.timestep(node).expand(8), class_labels=classes
        )
    [output], (alpha, sigma) = seen.outputs, path.alpha_sigma(node)
    return states - sigma * output if isinstance(path, FlowPath) else (states - sigma * output) / alpha


@both
def test_from_its_end_a_trajectory_goes_to_the_data_that_is_predicted_there(family):
    student = solvable(family)
    whole, node = trajectory_of(student, steps=800), torch.tensor(END, dtype=torch.float64) * student.path.first_node
    before = student.sampler.network_evaluations
    found = trajectory_of(student, steps=100, end=END)
    assert student.sampler.network_evaluations - before == 2 * 4 * 100  # as many as without
    state = whole.at(student.path.angle(node))
    torch.testing.assert_close(found.final, predicted(student, state, node), rtol=0, atol=1e-5)
    assert (found.final - whole.final).abs().max() > 1e-3
    torch.testing.assert_close(found.at(student.path.angle(node)), state, rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("share", [0.9, 0.5, 0.13])
def test_between_its_end_and_the_data_the_noise_of_a_trajectory_is_that_at_its_end(family, share):
    student = solvable(family)
    found = trajectory_of(student, steps=100, end=END)
    end, between = (torch.tensor(END * s, dtype=torch.float64) * student.path.first_node for s in (1, share))
    (alpha, sigma), (a, s) = (student.path.alpha_sigma(node) for node in (end, between))
    noise = (found.at(student.path.angle(end)) - alpha * found.final) / sigma
    torch.testing.assert_close(found.at(student.path.angle(between)), a * found.final + s * noise, rtol=0, atol=3e-4)


def test_order_of_an_early_end_is_that_of_the_steps_before_it():
    student = solvable("flow")
    finals = [trajectory_of(student, steps=steps, end=END).final for steps in (40, 80, 400)]
    errors = [(final - finals[2]).square().mean().item() for final in finals[:2]]
    # of mse, second order at least: the last step has no error of its own
    assert math.log2(errors[0] / errors[1]) > 3.65


@pytest.mark.parametrize("order, steps", [(1, 300), (3, 60), (3, 200)])
def test_schedules_with_a_terminal_shift_end_as_their_own_scheduler_does(order, steps):
    """Of any order: not at the end of the whole trajectory, which an extrapolation over the long last step leads to."""
    pipe = solvable("flow").sampler.pipe
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    student = make_student(pipe, 2.0)
    theirs = student.sampler(range(4), "train", 900, output_type="latent")[0]
    torch.testing.assert_close(student.sampler.pipe.scheduler.sigmas[-2:], torch.tensor([0.1, 0.0]))
    found = trajectory_of(student, steps=steps, order=order)
    assert (found.final - theirs).square().mean() < 3e-6
    assert len(found.states) == steps + 1  # as `nearest` takes them to be
    assert (trajectory_of(solvable("flow"), steps=steps, order=order).final - theirs).square().mean() > 1e-4


@both
def test_the_model_itself_is_what_a_teacher_converges_to(family):
    student = make_student(make_pipe(family))
    for end in (0.0, END):
        with student.sampler.using(model_itself(student.sampler.pipe.scheduler.config, end)):
            theirs = student.sampler(range(4), "train", 60, output_type="latent")[0]
        assert (trajectory_of(student, steps=60, end=end).final - theirs).square().mean() < 1e-6 * theirs.var()
    assert (trajectory_of(student, steps=60).final - theirs).square().mean() > 1e-5 * theirs.var()


@both
def test_search_with_an_early_end(family, models, tmp_path, capsys):
    search(models[family], tmp_path, SHORT, teacher_end=END)
    assert "teacher: 20 steps of order 3, the last from 0.2 to the data; estimated mse " in capsys.readouterr().err
    facts = json.loads((tmp_path / "scheduler_config.json").read_text())["provenance"]
    assert facts["teacher"]["end"] == END and facts["settings"]["teacher_end"] == END
    student = make_student(load_pipeline(str(models[family])), seed=5)
    for split, count in (("train", 4), ("validation", 3)):  # its trajectories are what was fitted to
        trajectory_of(student, range(count), split, 20, cache=tmp_path / "cache", end=END)
    assert student.sampler.network_evaluations == 0
    assert trajectory_of(student, range(4), steps=20, cache=tmp_path / "cache").network_evaluations > 0
    assert student.sampler.network_evaluations == 2 * 4 * 20  # of another end
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
