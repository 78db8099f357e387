"""Half precision: the dtype that a search runs in, and references whose roundings do not add up."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dssolver_search.methods.closed_form import fit, validated
from dssolver_search.methods.gauss_newton import parametrised, polish
from dssolver_search.methods.setup import Setup
from dssolver_search.pipeline.loading import load_pipeline, saved_dtype
from dssolver_search.pipeline.plan import Plan
from dssolver_search.settings import SearchConfig
from dssolver_search.teacher.ends import even_nodes
from tests.families import both, make_pipe, make_student, problem_of, trajectory_of
from tests.searches import CLOSED_FORM, search

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64, "float32": torch.float32}


@pytest.mark.parametrize("name", DTYPES)
def test_auto_is_bfloat16_where_the_weights_are_and_never_float16(name, tmp_path):
    make_pipe("flow").to(DTYPES[name]).save_pretrained(tmp_path)
    wanted = "float32" if name == "float16" else name
    assert saved_dtype(tmp_path) == wanted
    assert load_pipeline(str(tmp_path)).transformer.dtype == DTYPES[wanted]
    assert load_pipeline(str(tmp_path), "float16").transformer.dtype == torch.float16


def test_auto_looks_at_floating_weights_of_the_denoiser_only(tmp_path):
    make_pipe("flow").to(torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    save_file({"w": torch.zeros(2, dtype=torch.float64)}, tmp_path / "text_encoder" / "model.safetensors")
    save_file({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "transformer" / "a.safetensors")
    assert saved_dtype(tmp_path) == "bfloat16"
    [weights] = (tmp_path / "transformer").glob("diff*.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert saved_dtype(tmp_path) == "float32"


def test_float16_is_warned_about(tmp_path, capsys):
    make_pipe("flow").to(torch.float16).save_pretrained(tmp_path / "model")
    settings = {"pretrained_model_name_or_path": str(tmp_path / "model"), "nfe": [3], "fill_nfe": []}

    def opened(dtype):
        Setup(SearchConfig(**settings, output_dir=str(tmp_path / dtype), dtype=dtype), Accelerator())
        captured = capsys.readouterr()
        return "float16 overflows" in captured.out + captured.err

    assert opened("float16") and not opened("auto") and not opened("bfloat16")


@both
def test_float32_states_are_a_float32_solver_around_the_networks_of_the_run(family):
    """Against a loop by hand: the network sees the rounded state, the solver its own."""
    student = make_student(make_pipe(family, dtype=torch.bfloat16), guidance_scale=1.0)
    transformer, nodes = student.sampler.pipe.transformer, even_nodes(40)
    run = student.run(Plan(nodes, order=1, float32_states=True), range(2), "train")
    states = run.states
    assert states[0].dtype == torch.bfloat16 and states[-1].dtype == torch.float32
    x = states[0].float()
    alpha, sigma = student.path.alpha_sigma(nodes)
    labels = torch.tensor([0, 1])
    for i, t in enumerate(student.scheduler.timesteps):
        given = x.to(torch.bfloat16)
        with torch.no_grad():
            output = transformer(given, timestep=t.expand(2), class_labels=labels, return_dict=False)[0].float()
        if family == "flow":
            x = x + (sigma[i + 1] - sigma[i]).float() * output
        else:
            data = (x - sigma[i].float() * output) / alpha[i].float()
            x = (alpha[i + 1] * data + sigma[i + 1] / sigma[i] * (x - alpha[i] * data)).float()
        torch.testing.assert_close(states[i + 1], x, rtol=1e-4, atol=1e-4)


@both
def test_roundings_of_a_teacher_do_not_add_up(family):
    student = make_student(make_pipe(family, dtype=torch.bfloat16))
    plans = [Plan(even_nodes(100), order=3, float32_states=kept) for kept in (False, True)]
    rounded, kept = (student.run(plan, range(4), "train").final.float() for plan in plans)
    made = trajectory_of(student, steps=100)
    assert torch.equal(made.final, kept)  # trajectories are made that way
    half = trajectory_of(student, steps=50).final
    assert (kept - half).square().mean() < 0.1 * (rounded - half).square().mean()


def test_a_state_that_the_pipeline_changed_is_taken_as_it_is():
    student = make_student(make_pipe("flow", dtype=torch.bfloat16))
    scheduler = student.scheduler

    def final(kept, change):
        step = scheduler.step

        def changing(output, t, sample, **kwargs):
            return step(output, t, sample + change * (sample > 0), **kwargs)

        scheduler.step = changing
        try:
            return student.run(Plan(even_nodes(4), float32_states=kept), range(2), "train").final.float()
        finally:
            del scheduler.step

    kept, changed = final(True, 0.0), final(True, 0.5)
    assert (changed - kept).abs().max() > 0.1
    torch.testing.assert_close(changed, final(False, 0.5), rtol=0.05, atol=0.05)


def test_a_search_in_bfloat16_runs_in_it(tmp_path):
    make_pipe("flow").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    folder = tmp_path / "out"
    search(tmp_path / "model", folder, {**CLOSED_FORM, "nfe": [3], "fill_nfe": [], "trials": 2})
    scheduler_config = (folder / "scheduler_config.json").read_text()
    assert '"dtype": "bfloat16"' in scheduler_config
    states = [load_file(file)["states"] for file in (folder / "cache").iterdir()]
    assert {s.dtype for s in states} == {torch.float32}
    assert not all(torch.equal(s[-1], s[-1].to(torch.bfloat16).float()) for s in states)


@both
def test_polish_gains_in_bfloat16(family):
    """Differences that drown in its roundings would give noise for a Jacobian."""
    problem = problem_of(make_student(make_pipe(family, dtype=torch.bfloat16)), 16, steps=50, batch_size=16)
    found = validated(problem, fit(problem, 4, (0.0, 0.0, 0.0), 1e-4, problem.train))
    [batch] = problem.batches(problem.train)
    run = batch.run(found.plan)
    assert run.final.dtype == torch.bfloat16 and batch.off(run).dtype == torch.float32
    better = polish(problem, found, parametrised(problem, found), 1)
    assert better.validation_mse < 0.9 * found.validation_mse, (better.validation_mse, found.validation_mse)
