"""Exported solvers against the scheduler itself, on networks whose every answer is known."""

from __future__ import annotations

import ast

import pytest
import torch

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.published import published_config
from dssolver_search.artefacts.export import levels, source
from dssolver_search.artefacts.read import load_solver
from dssolver_search.cli import main

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ROWS = [[1.0], [-0.4, 1.4], [0.2, -0.7, 1.5]]
KINDS = {
    "flow": {"prediction_type": "flow_prediction"},
    "epsilon": {"prediction_type": "epsilon", **VP},
    "v_prediction": {"prediction_type": "v_prediction", **VP},
    "sample": {"prediction_type": "sample", **VP},
}


def artefact(kind, folder, **changes):
    """Tables of 3 calls, which feeds times of its own, and of 1."""
    three = {"nodes": [1.0, 0.7, 0.25, 0.0], "timesteps": [990.0, 640.0, 290.0], "coefficients": ROWS}
    one = {"nodes": [0.9, 0.0], "coefficients": [[1.0]]}
    scheduler = DSSolverScheduler(**KINDS[kind], solvers={"3": three, "1": one}, **changes)
    scheduler.save_pretrained(folder)
    return scheduler


def network(state, node):
    """What a network says of a state (B, 4) at a node: nothing linear, and nothing without the node."""
    return torch.sin(1.7 * state + node) + 0.3 * node * state.flip(-1)


def by_scheduler(scheduler, noise, steps, first=0):
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(first)
    x = noise
    for t in scheduler.timesteps[first:]:
        node = scheduler.path.node(t.double()).float()
        x = scheduler.step(network(x, node), t, x, return_dict=False)[0]
    return x


def wrapper(kind, scheduler, seen):
    """The same network as k-diffusion has it: x and sigma in, denoised data out."""
    path = scheduler.path
    nodes = torch.linspace(1e-4, 1, 200_001, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(nodes)
    known = sigma if kind == "flow" else sigma / alpha

    def model(x, sigma):
        seen.append(sigma)
        assert sigma.shape == (len(x),)
        place = torch.searchsorted(known, sigma[0].double()).clamp(1, len(nodes) - 1)
        share = (sigma[0].double() - known[place - 1]) / (known[place] - known[place - 1])
        node = torch.lerp(nodes[place - 1], nodes[place], share).float()
        s = float(sigma[0])
        if kind == "flow":
            return x - s * network(x, node)
        scale = (1 + s * s) ** -0.5  # alpha
        output = network(x * scale, node)
        if kind == "epsilon":
            return x - s * output
        return output if kind == "sample" else scale * (x * scale) - s * scale * output

    return model


def exported(scheduler, nfe=()):
    scope = {}
    exec(compile(source(scheduler, list(nfe)), "sample_dssolver.py", "exec"), scope)
    return scope


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [3, 1])
def test_the_file_samples_what_the_scheduler_samples(kind, steps, tmp_path):
    scheduler, seen, told = artefact(kind, tmp_path), [], []
    scope = exported(load_solver(str(tmp_path)))
    sigmas = scope["sigmas_for"](steps)
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # of vp the file's state is data + sigma noise: the scheduler's over alpha
    alpha = 1.0 if kind == "flow" else (1 + float(sigmas[0]) ** 2) ** -0.5
    wanted = by_scheduler(scheduler, start, steps)
    found = scope["sample_dssolver"](wrapper(kind, scheduler, seen), start / alpha, sigmas, callback=told.append)
    torch.testing.assert_close(found, wanted.double(), rtol=2e-5, atol=2e-5)
    assert len(seen) == steps and [t["i"] for t in told] == list(range(steps))
    if kind == "flow" and steps == 3:
        assert [float(s[0]) for s in seen] == pytest.approx([0.99, 0.64, 0.29])  # the times of the table


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_a_late_start_is_folded_as_the_scheduler_folds_it(kind, tmp_path):
    scheduler = artefact(kind, tmp_path)
    scope = exported(scheduler, [3])
    sigmas = scope["sigmas_for"](3)[1:]
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha = 1.0 if kind == "flow" else (1 + float(sigmas[0]) ** 2) ** -0.5
    wanted = by_scheduler(scheduler, start, 3, first=1)
    found = scope["sample_dssolver"](wrapper(kind, scheduler, []), start / alpha, sigmas)
    torch.testing.assert_close(found, wanted.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first, last", [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
def test_any_part_of_the_sigmas_is_the_schedulers_part(kind, first, last, tmp_path):
    """KSampler Advanced (start_at_step, end_at_step) and models of two experts, each with a sampler of its own."""
    scheduler = artefact(kind, tmp_path)
    scope = exported(scheduler)
    whole = scope["sigmas_for"](3)
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scales = [1.0 if kind == "flow" else (1 + float(s) ** 2) ** -0.5 for s in whole]
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(first)
    wanted = start
    for t in scheduler.timesteps[first:last]:
        node = scheduler.path.node(t.double()).float()
        wanted = scheduler.step(network(wanted, node), t, wanted, return_dict=False)[0]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        part = whole[first : last + 1].to(dtype)
        found = scope["sample_dssolver"](wrapper(kind, scheduler, []), start / scales[first], part)
        torch.testing.assert_close(found * scales[last], wanted, rtol=2e-5, atol=2e-5)
        x = (start / scales[first]).to(dtype)
        assert scope["sample_dssolver"](lambda x, sigma: 0.5 * x, x, part).dtype == dtype


@pytest.mark.parametrize(
    "own, kind", [("flow", "epsilon"), ("sample", "flow"), ("v_prediction", "linear"), (3.0, "flow")]
)
@pytest.mark.parametrize("first, last", [(0, 3), (1, 3), (0, 2)])
def test_a_solver_that_is_carried_over_is_exported_as_it_runs(own, kind, first, last, tmp_path):
    """From a flow to vp and back, between betas, and from a resolution shift of 3."""
    shifted = {"searched_shift": {"factor": own, "terminal": None}} if own == 3.0 else {}
    artefact("flow" if own == 3.0 else own, tmp_path / "own", **shifted)
    model = DSSolverScheduler(**KINDS.get(kind, {"prediction_type": "epsilon"}))
    scheduler = DSSolverScheduler.from_config(model.config, solvers=str(tmp_path / "own"))
    scheduler.save_pretrained(tmp_path / "carried")
    scope = exported(load_solver(str(tmp_path / "carried")))
    sigmas = scope["sigmas_for"](3)[first : last + 1]
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = [1.0 if kind == "flow" else (1 + float(s) ** 2) ** -0.5 for s in scope["SOLVER"]["tables"][3]["sigmas"]]
    scheduler.set_timesteps(3)
    assert scheduler.course(3).change is not None
    scheduler.set_begin_index(first)
    wanted = start
    for t in scheduler.timesteps[first:last]:
        node = scheduler.path.node(t.double()).float()
        wanted = scheduler.step(network(wanted, node), t, wanted, return_dict=False)[0]
    denoise = wrapper("flow" if kind == "flow" else "epsilon", scheduler, [])
    found = scope["sample_dssolver"](denoise, start / scales[first], sigmas)
    torch.testing.assert_close(found * scales[last], wanted, rtol=3e-5, atol=3e-5)
    cut = sigmas.clone()
    cut[-1] = 0  # KSampler Advanced without leftover noise: ends at the data
    told = []
    ended = scope["sample_dssolver"](denoise, start / scales[first], cut, callback=told.append)
    if last < 3:
        torch.testing.assert_close(ended, told[-1]["denoised"].double())


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_a_part_that_is_to_end_without_noise_ends_in_the_predicted_data(kind, tmp_path):
    """KSampler Advanced without leftover noise puts 0 in the place of the part's last sigma."""
    scheduler = artefact(kind, tmp_path)
    scope, told = exported(scheduler, [3]), []
    sigmas = scope["sigmas_for"](3)[:3].clone()
    sigmas[-1] = 0
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * float(sigmas[0])
    found = scope["sample_dssolver"](wrapper(kind, scheduler, []), start, sigmas, callback=told.append)
    assert len(told) == 2
    torch.testing.assert_close(found, told[-1]["denoised"].double())


@pytest.mark.parametrize("name", ["flowdcn-b-2-256", "dit-xl-2-256"])
def test_published_solvers_keep_their_tables(name):
    scheduler = load_solver(name)
    scope = exported(scheduler)
    tables = scope["SOLVER"]["tables"]
    assert {str(n): t["coefficients"] for n, t in tables.items()} == {
        n: t["coefficients"] for n, t in published_config(name)["solvers"].items()
    }
    for n, table in tables.items():
        assert len(table["sigmas"]) == n + 1 and len(table["fed"]) == n
        assert table["sigmas"] == sorted(table["sigmas"], reverse=True)


def test_sigmas_on_the_command_line(capsys, tmp_path):
    artefact("flow", tmp_path)
    main(["export", "--solver", str(tmp_path), "--format", "sigmas", "--nfe", "3"])
    said = capsys.readouterr()
    assert said.out.strip() == "1, 0.7, 0.25, 0" and "weights" in said.err and "lost" in said.err
    scheduler = artefact("epsilon", tmp_path)
    main(["export", "--solver", str(tmp_path), "--format", "sigmas", "--nfe", "3"])
    found = [float(text) for text in capsys.readouterr().out.split(",")]
    ratio = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()  # diffusers' own sigmas
    assert found[:3] == pytest.approx([float(ratio[k]) for k in (999, 699, 249)], rel=1e-5) and found[3] == 0


def test_the_file_needs_torch_only(tmp_path, capsys):
    artefact("flow", tmp_path)
    file = tmp_path / "solver.py"
    for _ in range(2):  # its own file may be written anew
        main(["export", "--solver", str(tmp_path), "--nfe", "3", "--output_file", str(file)])
    assert "written to" in capsys.readouterr().out
    tree = ast.parse(file.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [alias.name for node in imports for alias in node.names] == ["torch"]
    scope: dict = {}
    exec(compile(tree, str(file), "exec"), scope)
    sigmas = scope["sigmas_for"](3)
    x = scope["sample_dssolver"](lambda x, sigma, gain: gain * x, torch.ones(1, 2), sigmas, {"gain": 0.5})
    assert x.shape == (1, 2) and x.isfinite().all()


def test_guidance_chooses_the_tables(tmp_path):
    other = {"1": {"nodes": [0.5, 0.0], "coefficients": [[1.0]]}}
    one = {"1": {"nodes": [0.9, 0.0], "coefficients": [[1.0]]}}
    DSSolverScheduler(**KINDS["flow"], solvers=one, guidance_solvers={"1": one, "3": other}).save_pretrained(tmp_path)
    for guidance, node in ((None, 0.9), (3.0, 0.5), (2.0, 0.7)):
        scheduler = load_solver(str(tmp_path), guidance_scale=guidance)
        assert levels(scheduler, scheduler.solvers[1])["sigmas"] == pytest.approx([node, 0.0])


@pytest.mark.parametrize(
    "words, told",
    [
        (["--nfe", "4"], "no table for 4 steps; there are tables for 1, 3"),
        (["--format", "sigmas"], "one step count"),
        (["--format", "onnx"], "must be sigmas or kdiffusion"),
        (["--guidance_scale", "2"], "no tables by guidance"),
        (["--output_file", "mine.py"], "was not written by export"),
    ],
)
def test_bad_words_write_nothing(words, told, tmp_path, monkeypatch, capsys):
    artefact("flow", tmp_path / "solver")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("mine\n")
    with pytest.raises(SystemExit) as stop:
        main(["export", "--solver", "solver", *words])
    assert stop.value.code == 2 and told in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.py", "solver"]
    assert (tmp_path / "mine.py").read_text() == "mine\n"


def test_sigmas_of_no_table_are_refused(tmp_path):
    scope = exported(artefact("flow", tmp_path))
    for sigmas in ([1.0, 0.5, 0.0], [0.7], [0.0], [2.0, 1.0, 0.7, 0.25, 0.0]):
        with pytest.raises(ValueError, match=r"use sigmas_for\(1 or 3\)"):
            scope["sample_dssolver"](None, torch.ones(1, 2), torch.tensor(sigmas))
    with pytest.raises(ValueError, match="no table for 2 steps"):
        scope["sigmas_for"](2)
