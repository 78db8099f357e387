"""Half precision: the dtype that a search runs in, and references whose roundings do not add up."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dssolver_search.methods.closed_form import ClosedForm
from dssolver_search.methods.gauss_newton import polish
from dssolver_search.methods.setup import Setup
from dssolver_search.pipeline.loading import load_pipeline, saved_dtype
from dssolver_search.pipeline.probe import run
from dssolver_search.settings import SearchConfig
from dssolver_search.teacher.trajectories import reference
from tests.search.test_search import (
    CLOSED_FORM,
    alone,
    both,
    make_pipe,
    make_probe,
    make_sampler,
    quiet_reference,
    search,
)

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
def test_carried_states_are_a_float32_solver_around_the_networks_of_the_run(family):
    """Against a loop by hand: the network sees the rounded state, the solver its own."""
    pipe = make_pipe(family).to(torch.bfloat16)
    sampler = make_sampler(pipe, guidance_scale=1.0)
    probe = make_probe(pipe)
    nodes = torch.linspace(1, 0, 41, dtype=torch.float64)
    probe.prepare(nodes, order=1, exact=True)
    states = run(sampler, probe, range(2), "train", 40)
    assert states[0].dtype == torch.bfloat16 and states[-1].dtype == torch.float32
    x = states[0].float()
    alpha, sigma = probe.path.alpha_sigma(nodes)
    labels = torch.tensor([0, 1])
    for i, t in enumerate(probe.timesteps):
        given = x.to(torch.bfloat16)
        with torch.no_grad():
            output = pipe.transformer(given, timestep=t.expand(2), class_labels=labels, return_dict=False)[0].float()
        if family == "flow":
            x = x + (sigma[i + 1] - sigma[i]).float() * output
        else:
            data = (x - sigma[i].float() * output) / alpha[i].float()
            x = (alpha[i + 1] * data + sigma[i + 1] / sigma[i] * (x - alpha[i] * data)).float()
        torch.testing.assert_close(states[i + 1], x, rtol=1e-4, atol=1e-4)


@both
def test_roundings_of_a_reference_do_not_add_up(family):
    pipe = make_pipe(family).to(torch.bfloat16)
    sampler, probe = make_sampler(pipe), make_probe(pipe)
    nodes = torch.linspace(1, 0, 401, dtype=torch.float64)
    finals = []
    for exact in (False, True):
        probe.prepare(nodes, order=3, exact=exact)
        finals.append(run(sampler, probe, range(4), "train", 400)[-1].float())
    made = reference(sampler, probe, range(4), "train", 400, 3, 4, progress=False)
    assert torch.equal(made.final, finals[1])  # references are made that way
    half = reference(sampler, probe, range(4), "train", 200, 3, 4, progress=False).final
    rounded, carried = (float((final - half).square().mean()) for final in finals)
    assert carried < 0.1 * rounded


def test_a_state_that_the_pipeline_changed_is_taken_as_it_is():
    pipe = make_pipe("flow").to(torch.bfloat16)
    sampler, probe = make_sampler(pipe), make_probe(pipe)
    nodes = torch.linspace(1, 0, 5, dtype=torch.float64)

    def final(exact, change):
        probe.prepare(nodes, exact=exact)
        step, probe.step = probe.step, None

        def changing(output, t, sample, **kwargs):
            return step(output, t, sample + change * (sample > 0), **kwargs)

        probe.step = changing
        try:
            return run(sampler, probe, range(2), "train", 4)[-1].float()
        finally:
            del probe.step

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
    pipe = make_pipe(family).to(torch.bfloat16)
    sampler = make_sampler(pipe)
    train, validation = (quiet_reference(sampler, range(16), split, 100) for split in ("train", "validation"))
    form = ClosedForm(sampler, make_probe(pipe), (range(16), train), (range(16), validation), 16, alone)
    found = form.validated(form.fit(4, (0.0, 0.0, 0.0), 1e-4))
    assert form.errors("train", found.raw, found.spec.coefficients).dtype == torch.float32
    assert form.probe.states[-1].dtype == torch.bfloat16
    better = polish(form, found, 1)
    assert better.validation_mse < 0.9 * found.validation_mse, (better.validation_mse, found.validation_mse)
