"""The search: its formulas against numpy and hand-written loops, its runs against interruption, its command end to end.

The models are random one-layer transformers made slow in time, so that a few dozen steps converge as on a real model.
"""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.cli import main
from dssolver_search.methods import closed_form
from dssolver_search.methods import fill as fill_module
from dssolver_search.methods.paper import Loop
from dssolver_search.pipeline import model as model_module
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.pipeline.sampler import Sampler
from tests.families import (
    CLASSES,
    both,
    make_pipe,
    make_sampler,
    make_student,
    trajectory_of,
)
from tests.searches import CLOSED_FORM, PAPER, Killed, lines_of, refused, search

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


# --- fit --------------------------------------------------------------------------------------------------------------


class Bowl(torch.nn.Module):
    """A quadratic loss whose target changes with the iteration."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

    def loss(self, iteration):
        target = torch.randn(3, generator=torch.Generator().manual_seed(iteration), dtype=torch.float64)
        return (self.a - 0.3 * target).square().sum() + (self.b.sum() - target[0]).square()


def fit_bowl(bowl, iterations, validate=None, loss_of=None, every=2, lr=0.01, **kwargs):
    validate = validate or (lambda: bowl.loss(1000).item())
    return Loop(bowl, loss_of or bowl.loss, validate, Accelerator(), iterations, lr, every, **kwargs).run()


def test_first_lion_step_is_the_sign_of_the_gradient():
    bowl = Bowl()
    before = {name: p.detach().clone() for name, p in bowl.named_parameters()}
    bowl.loss(0).backward()
    signs = {name: p.grad.sign() for name, p in bowl.named_parameters()}
    fit_bowl(bowl, 1, lr=0.125)
    for name, p in bowl.named_parameters():
        assert torch.equal(p.detach(), before[name] - 0.125 * signs[name]) and signs[name].abs().min() == 1


@pytest.mark.parametrize("killed_at", [1, 4, 7])
def test_killed_fit_goes_on_to_the_same_result(killed_at, tmp_path):
    whole, bowl, file = Bowl(), Bowl(), tmp_path / "fit.safetensors"
    records = []
    best = fit_bowl(whole, 11, log=records.append, checkpoint=tmp_path / "whole.safetensors")

    def dies(iteration):
        if iteration == killed_at:
            raise Killed
        return bowl.loss(iteration)

    with pytest.raises(Killed):
        fit_bowl(bowl, 11, loss_of=dies, checkpoint=file)
    bowl, later = Bowl(), []
    assert fit_bowl(bowl, 11, checkpoint=file, log=later.append) == best
    assert later == [r for r in records if r["iteration"] > killed_at // 2 * 2]
    assert [r["iteration"] for r in records] == [2, 4, 6, 8, 10, 11]
    for name, p in whole.named_parameters():
        assert torch.equal(p, bowl.get_parameter(name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.safetensors", "whole.safetensors"]

    bowl = Bowl()  # and once more, when there is nothing left to do
    assert fit_bowl(bowl, 11, checkpoint=file, loss_of=dies) == best
    assert all(torch.equal(p, bowl.get_parameter(name)) for name, p in whole.named_parameters())


def test_best_validation_is_put_in_place():
    bowl, seen = Bowl(), []
    errors = iter([5.0, 2.0, 3.0, float("nan"), 2.0])

    def validate():
        seen.append(bowl.a.detach().clone())
        return next(errors)

    assert fit_bowl(bowl, 10, validate) == 2.0
    assert torch.equal(bowl.a, seen[1]) and len({tuple(a.tolist()) for a in seen[:4]}) == 4
    assert (seen[4] - seen[1]).abs().max() < 0.021  # two updates away from the best: rolled back after the NaN


# --- the command ------------------------------------------------------------------------------------------------------


def held_out_mse(model, folder, nfe, wanted, settings, by_config):
    """The solver in the pipeline's plain call on the validation samples."""
    pipe = load_pipeline(str(model))
    if by_config:
        pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers=str(folder))
    else:
        pipe.scheduler = DSSolverScheduler.from_pretrained(folder)
    sampler = make_sampler(pipe, settings["guidance_scale"], settings.get("seed", 0))
    output = sampler(range(len(wanted)), "validation", nfe, output_type="latent")
    return (output[0] - wanted).double().square().mean().item()


@both
def test_solver_does_in_the_pipeline_what_its_provenance_says(family, models, results):
    folder = results[family]
    config = json.loads((folder / "scheduler_config.json").read_text())
    facts = config["provenance"]
    assert facts["method"] == "closed_form" and facts["model"] == family and facts["call"] == {"guidance_scale": 1.5}
    assert set(facts["results"]) == {"3", "4", "5"} and {"3", "4"} <= set(config["solvers"])
    assert [facts["results"][n]["kind"] for n in "34"] == ["searched"] * 2
    assert facts["results"]["5"]["kind"] == "filled" and set(config["solvers"]) == {"3", "4", "5"}
    student = make_student(load_pipeline(str(models[family])), seed=5)
    wanted = trajectory_of(student, range(3), "validation").final
    for nfe in config["solvers"]:
        claimed = facts["results"][nfe]["validation_mse"]
        for by_config in (False, True):
            found = held_out_mse(models[family], folder, int(nfe), wanted, CLOSED_FORM, by_config)
            assert found == pytest.approx(claimed, rel=1e-3)
        assert claimed < facts["results"][nfe]["classical_mse"]


@both
def test_files_and_evaluations_of_a_search(family, results):
    folder, records = results[family], lines_of(results[family])
    assert {p.name for p in folder.iterdir()} == {
        "scheduler_config.json", "search_state.json", "search_state.previous.json", "metrics.jsonl", "cache",
    }  # fmt: skip
    assert len(list((folder / "cache").iterdir())) == 4 + 3
    # trials on three samples: three from each of four starts, three more from the best one; on all four samples: the
    # best of each start, four more of the best one's and two more ridges, seven of these held out; polish: where it
    # stands and what every difference moves, three dampings held out, where it ends, both with a first time of their
    # own; three classical orders; each set of samples has its first call in common; all guided
    trials = [r for r in records if "train_mse" in r]
    kept = {r["nfe"]: r for r in records if "kind" in r}
    assert [r["nfe"] for r in trials] == [3] * 25 + [4] * 25 + [5]
    solvers = json.loads((folder / "scheduler_config.json").read_text())["solvers"]
    # step sizes (n - 1 calls each), corrections, times
    differences = {3: 2 * 2 + 1 + (3 + 2 + 1), 4: 3 * 3 + (2 + 2) + (4 + 3 + 2 + 1)}
    first = 4 + 3  # of the train and the validation samples
    by_nfe = {5: 2 * (first + 4 * 4 + 3 * 4 + 3 * 5 + 3 * 3 * 4)}  # the fit, a derived solver, three classical ones
    for n, moved in differences.items():
        polish_rows = 4 * (n - 1 + moved) + 3 * 3 * n + 4 * n * ("timesteps" in solvers[str(n)])
        by_nfe[n] = 2 * (3 + first + (n - 1) * (3 * (4 * 3 + 3) + 4 * (4 + 4 + 2) + 3 * 7 + 3 * 3) + polish_rows)
    assert {n: r["network_evaluations"] for n, r in kept.items()} == by_nfe
    estimate = 2 * 4 * (20 + 40)  # of the teacher's error, by twice its steps on four samples
    teacher = 2 * 20 * (4 + 3) + estimate
    state = json.loads((folder / "search_state.json").read_text())
    assert state["network_evaluations"] == teacher + sum(by_nfe.values())
    totals = [r.get("total_network_evaluations", r["network_evaluations"]) for r in records]
    assert totals == sorted(totals) and totals[-1] == state["network_evaluations"]
    assert totals[:2] == [estimate, teacher + 2 * 3 * 3]


@both
def test_filled_tables_are_the_best_of_three(family, results):
    facts = json.loads((results[family] / "scheduler_config.json").read_text())["provenance"]["results"]["5"]
    others = {"closed_form", "derived", "classical"} - {facts["source"]}
    assert set(facts["rejected"]) == others
    assert all(facts["validation_mse"] <= error for error in facts["rejected"].values())
    known = facts["rejected"] | {facts["source"]: facts["validation_mse"]}
    assert facts["classical_mse"] == known["classical"]


@pytest.mark.parametrize("best", ["classical", "derived", "closed_form"])
def test_a_fill_takes_whatever_is_best_on_held_out_samples(best, models, tmp_path, monkeypatch, capsys):
    """Each of the three made the best in turn, by what it is said to reach."""
    made = {}
    for name, function in (("classical", "classical"), ("derived", "derived"), ("closed_form", "entry_of")):
        real = getattr(fill_module, function)

        def measured(*args, name=name, real=real):
            found = real(*args)
            entry = found[0] if name == "classical" else found
            made[name] = entry | {"validation_mse": 1e-9 if name == best else 1.0}
            return (made[name], found[1]) if name == "classical" else made[name]

        monkeypatch.setattr(fill_module, function, measured)
    search(models["flow"], tmp_path, nfe=[3], fill_nfe=[5, 5], trials=1, polish=0)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["provenance"]["results"]["5"]["source"] == best
    assert config["solvers"]["5"]["coefficients"] == [list(row) for row in made[best]["coefficients"]]
    assert f"filled, {best}" in capsys.readouterr().out


def test_fewer_calls_than_any_searched_are_searched(models, tmp_path, monkeypatch):
    """Not fitted on the warp of more calls: the solver is that of a search which asks for them, before any polish."""
    settings = {"trials": 4, "starts": 2, "polish": 0}
    search(models["flow"], tmp_path / "asked", nfe=[3], fill_nfe=[], **settings)
    searched, find = [], closed_form.search_step_warp
    monkeypatch.setattr(
        closed_form, "search_step_warp", lambda fits, *rest: searched.append(fits.nfe) or find(fits, *rest)
    )
    search(models["flow"], tmp_path / "filled", nfe=[4], fill_nfe=[3, 5], **settings)
    assert searched == [4, 3]
    asked, filled = (DSSolverScheduler.from_pretrained(tmp_path / name).config for name in ("asked", "filled"))
    told = filled["provenance"]["results"]
    wanted = asked["provenance"]["results"]["3"]["validation_mse"]
    assert told["3"]["kind"] == "filled"
    assert (told["3"]["rejected"] | {told["3"]["source"]: told["3"]["validation_mse"]})["closed_form"] == wanted
    assert told["5"]["kind"] == "filled"


def test_few_calls_are_polished_when_they_are_filled(models, tmp_path):
    def filled(folder, **settings):
        search(models["flow"], tmp_path / folder, nfe=[4], fill_nfe=[3, 3], trials=2, starts=1, **settings)
        return json.loads((tmp_path / folder / "scheduler_config.json").read_text())

    plain, polished = filled("plain", fill_polish_nfe=2), filled("polished", fill_polish_nfe=3)
    assert "timesteps" not in plain["solvers"]["3"] and "timesteps" in polished["solvers"]["3"]
    errors = [c["provenance"]["results"]["3"]["validation_mse"] for c in (polished, plain)]
    assert errors[0] < errors[1]
    never = filled("never", polish_nfe=3, fill_polish_nfe=0)
    assert all("timesteps" not in table for table in never["solvers"].values())
    assert [s["stage"] for s in never["provenance"]["results"]["4"]["stages"]] == ["closed_form"]


def test_finished_search_is_not_done_again(models, results, capsys):
    folder = results["flow"]
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    calls = []
    count = Sampler._count

    def counting(self, *args):
        calls.append(self)
        return count(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "_count", counting)
        search(models["flow"], folder)
    assert not calls
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    out = capsys.readouterr().out
    assert "searched" in out and str(folder) in out


@pytest.mark.parametrize("change", [{"seed": 6}, {"ridge": 1e-3}, {"guidance_scale": 2.0}, {"trials": 7}])
def test_another_search_in_the_same_folder_is_refused(change, models, results, capsys):
    before = {p.name: p.read_bytes() for p in results["flow"].iterdir() if p.is_file()}
    line = refused(capsys, lambda: search(models["flow"], results["flow"], **change))
    assert "holds another search" in line and "--output_dir" in line
    assert {p.name: p.read_bytes() for p in results["flow"].iterdir() if p.is_file()} == before


def test_more_step_counts_are_added_to_a_finished_search(models, results, tmp_path):
    search(models["flow"], tmp_path, nfe=[3], fill_nfe=[])
    only = DSSolverScheduler.from_pretrained(tmp_path)
    assert only.tables == (3,)
    search(models["flow"], tmp_path)
    both_tables = DSSolverScheduler.from_pretrained(tmp_path)
    whole = DSSolverScheduler.from_pretrained(results["flow"])
    assert both_tables.config.solvers == whole.config.solvers
    assert both_tables.config.solvers["3"] == only.config.solvers["3"]


@both
def test_paper_search_writes_a_solver_that_loads(family, models, tmp_path):
    search(models[family], tmp_path, PAPER)
    scheduler = DSSolverScheduler.from_pretrained(tmp_path)
    assert scheduler.tables == (3,)
    settings = scheduler.config.provenance["settings"]  # for the same command, without a path of this machine
    assert settings["method"] == "paper" and settings["pretrained_model_name_or_path"] == family
    assert "output_dir" not in settings and str(tmp_path) not in str(settings)
    facts = scheduler.config.provenance["results"]["3"]
    # c of the last two rows: one each; two Lion steps of 0.01 leave each parameter within 0.02 of its start
    assert facts["parameters"] == 3 + 2
    rows = scheduler.config.solvers["3"]["coefficients"]
    student = make_student(load_pipeline(str(models[family])))
    wanted = trajectory_of(student, range(3), "validation").final
    found = held_out_mse(models[family], tmp_path, 3, wanted, PAPER, by_config=False)
    assert found == pytest.approx(facts["validation_mse"], rel=1e-3)
    assert all(abs(w) <= 0.02 + 1e-9 for row in rows for w in row[:-1])
    assert any(w != 0 for row in rows for w in row[:-1])
    records = [r for r in lines_of(tmp_path) if "iteration" in r]
    assert [r["iteration"] for r in records] == [1, 2]
    assert facts["validation_mse"] == min(r["validation_mse"] for r in records)


def test_paper_counts_a_backward_pass_as_two(models, tmp_path):
    search(models["flow"], tmp_path, PAPER, num_generated_samples=4)
    guided = 2
    teacher = guided * (20 * 3 + 4 * (20 + 40))  # of the three held-out samples, and how far it is from converged
    update = guided * 4 * (10 + 3 * 3)  # Euler's ten steps, then three forward and backward
    validation = guided * 3 * (1 + (1 + 3) * 2)  # the first call, then the paper's solver and three classical ones
    state = json.loads((tmp_path / "search_state.json").read_text())
    assert state["network_evaluations"] == teacher + update + validation


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nfe": [0]}, "nfe is [0]"),
        ({"nfe": ["many"]}, "--nfe many"),
        ({"nfe": [1001]}, "nfe is [1001]"),
        ({"nfe": []}, "nfe is []"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"flavour": "sweet"}, "--flavour"),
        ({"teacher_steps": 4}, "teacher_steps is 4"),
        ({"fill_nfe": [5, 3]}, "fill_nfe is [5, 3]"),
        ({"call": '{"prompt": "a cat"}'}, "'prompt'"),
        ({"call": "{"}, "--call {"),
        ({"call": "[1]"}, "call is [1]"),
        ({"prompts_file": "absent.txt"}, "absent.txt"),
        ({"config": "absent.toml"}, "absent.toml"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"pretrained_model_name_or_path": "absent/folder/of-mine"}, "absent/folder/of-mine"),
        ({"output_dir": ""}, "output_dir is missing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_end_in_one_line_and_write_nothing(changes, message, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, lambda: search(models["flow"], tmp_path / "out", **changes))
    assert message in line and line.startswith("dssolver_search search: error: ")
    assert not list(tmp_path.iterdir())


class PromptPipeline(SiTPipeline):
    """Stands for a pipeline that takes text."""

    def __call__(self, prompt, guidance_scale=1.5, **kwargs):
        return super().__call__([len(p) % CLASSES for p in prompt], guidance_scale, **kwargs)


def test_pipeline_with_prompts_needs_some(models, tmp_path, capsys, monkeypatch):
    source = make_pipe("flow")
    pipe = PromptPipeline(source.transformer, source.scheduler)
    monkeypatch.setattr(model_module, "load_pipeline", lambda *args: pipe)
    line = refused(capsys, lambda: search(models["flow"], tmp_path / "out"))
    assert "prompts_file" in line
    (tmp_path / "empty.txt").write_text("\n \n")
    line = refused(capsys, lambda: search(models["flow"], tmp_path / "out", prompts_file=tmp_path / "empty.txt"))
    assert "empty.txt" in line and "holds no prompt" in line
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def test_folder_with_a_foreign_solver_is_refused(models, tmp_path, capsys):
    DSSolverScheduler().save_pretrained(tmp_path)
    before = (tmp_path / "scheduler_config.json").read_bytes()
    line = refused(capsys, lambda: search(models["flow"], tmp_path))
    assert "holds a solver that this search did not make" in line
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    assert (tmp_path / "scheduler_config.json").read_bytes() == before


@pytest.mark.parametrize("spoil", ["model_index.json", "transformer/config.json"])
def test_truncated_pipeline_is_refused(spoil, tmp_path, capsys):
    make_pipe("flow").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / spoil
    file.write_text(file.read_text()[:40])
    line = refused(capsys, lambda: search(tmp_path / "model", tmp_path / "out"))
    assert "no pipeline could be loaded" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["polish"]])
def test_unknown_command_shows_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage:")


@pytest.mark.parametrize("command", [["--help"], ["search", "--help"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert "usage:" in captured.out + captured.err
