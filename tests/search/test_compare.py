"""The comparison against loops written out here: what it measures, counts, chooses, draws and refuses.

Everything runs in float64: equal numbers differ by rounding alone, some 1e-15 a step, and are compared to 1e-9.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import AysSchedules
from PIL import Image

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import classical, uniform_nodes
from dssolver_search.cli import main
from dssolver_search.measure import compare as compare_module
from dssolver_search.measure.baselines import ALIGNED, FLOW, VP, aligned_times, runs
from dssolver_search.measure.compare import Comparison, compare
from dssolver_search.measure.lineup import Lineup
from dssolver_search.measure.pictures import as_uint8
from dssolver_search.measure.results import Result, details, interval, results_of_record, table
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.settings import CompareConfig
from tests.families import both, make_path, make_sampler, make_scheduler
from tests.searches import arguments, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # its schedulers that fail on a spacing
]
FAMILIES = ("flow", "vp")
SAMPLES, NFE, STEPS = 4, 3, 20


def make_solver(family, folder, order=3, **options):
    """A folder with a solver."""
    path = make_path(family)
    solvers = {str(NFE): classical(uniform_nodes(NFE, path), path, order).to_dict()}
    config = make_scheduler(family).config
    DSSolverScheduler.from_config(config, solvers=solvers, **options).save_pretrained(folder)
    return solvers


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Folder of a solver, by family."""
    root = tmp_path_factory.mktemp("compare")
    for name in FAMILIES:
        make_solver(name, root / f"ours-{name}")
    return {name: root / f"ours-{name}" for name in FAMILIES}


@pytest.fixture(scope="module")
def settings(models, ours):
    """Settings of a comparison; of its batches one is not full."""

    def given(family="flow", output="none", **changes):
        return {
            "pretrained_model_name_or_path": str(models[family]), "output_dir": str(output), "nfe": [NFE],
            "guidance_scale": 1.5, "dtype": "float64", "solver": [str(ours[family])], "num_samples": SAMPLES,
            "reference_steps": STEPS, "batch_size": 3, "num_pictures": 2, **changes,
        }  # fmt: skip

    return given


@pytest.fixture(scope="module")
def comparison_of(settings, tmp_path_factory):
    """A comparison with these settings, in a folder of its own unless one is given."""

    def made(family="flow", output=None, **changes):
        return Comparison(CompareConfig(**settings(family, output or tmp_path_factory.mktemp("runs"), **changes)))

    return made


@pytest.fixture(scope="module")
def outputs(settings, tmp_path_factory):
    """By family: the folder that the command wrote, and what it printed."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("outputs") / family
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(["compare", *arguments(settings(family, folder))])
        found[family] = folder, printed.getvalue()
    return found


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures of whole comparisons cost more than these comparisons."""
    for name in ("comparison_picture", "error_curves"):
        monkeypatch.setattr(compare_module, name, lambda *args: None)


def results_of(folder):
    return {r["scheduler"]: r for r in json.loads((folder / "comparison.json").read_text())["results"]}


@pytest.fixture(scope="module")
def pipes(models):
    """The plain pipelines, in float64."""
    return {family: load_pipeline(str(folder), "float64") for family, folder in models.items()}


@torch.no_grad()
def by_hand(pipe, family, steps):
    """Euler or DDIM on uniform nodes from the comparison's own noise and classes: final states."""
    sampler = make_sampler(pipe)
    generators = sampler.generators(range(SAMPLES), "test")
    x = torch.cat([torch.randn(1, 1, 4, 4, generator=g, dtype=torch.float64) for g in generators])
    labels = torch.tensor([i % 3 for i in range(SAMPLES)])
    path = make_path(family)
    nodes = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alpha, sigma = (f.tolist() for f in path.alpha_sigma(nodes))
    for i, t in enumerate(path.timestep(nodes[:-1]).float()):
        both_labels = torch.cat([labels, torch.full_like(labels, 3)])
        output = pipe.transformer(torch.cat([x, x]), timestep=t.repeat(2 * SAMPLES), class_labels=both_labels).sample
        with_class, without = output.chunk(2)
        guided = without + 1.5 * (with_class - without)
        if family == "flow":
            x = x + (sigma[i + 1] - sigma[i]) * guided
        else:
            denoised = (x - sigma[i] * guided) / alpha[i]
            x = alpha[i + 1] * denoised + sigma[i + 1] * guided
    return x


@pytest.fixture(scope="module")
def converged(pipes):
    """The comparison's converged states, by the plain pipeline in one batch."""

    @functools.cache
    def made(family):
        itself = DSSolverScheduler.from_config(make_scheduler(family).config, solvers="classical")
        sampler = make_sampler(pipes[family])
        with torch.no_grad(), sampler.using(itself):
            return sampler(range(SAMPLES), "test", STEPS, output_type="latent")[0]

    return made


def mse(a, b):
    return (a.double() - b.double()).square().mean().item()


@both
def test_every_scheduler_is_measured_with_the_calls_asked_for(family, outputs):
    folder, text = outputs[family]
    record, found = json.loads((folder / "comparison.json").read_text()), results_of(folder)
    assert list(found) == [f"ours-{family}", "unipc", "dpmpp_2m", "dpmpp_3m", "deis", "heun", "euler"]
    assert len(record["results"]) == len(found)
    for name, result in found.items():
        assert result["mse"] > 0 and not math.isnan(result["mse"])
        assert result["nfe"] == NFE and result["calls"] == (2 * 2 - 1 if name == "heun" else NFE)
        assert result["searched"] == (name == f"ours-{family}")
        assert "pictures" not in result
        [line] = [row for row in text.splitlines() if row.startswith(name + " ") and "/ best" not in row]
        assert f"({result['spacing']}" in line and f"{result['mse']:.3g}" in line
    assert found[f"ours-{family}"]["spacing"] == "searched"
    assert sum(math.isfinite(r["mse"]) for r in found.values()) >= 5
    assert record["reference"]["steps"] == STEPS and 0 < record["reference"]["mse_against_half_the_steps"] < 0.1
    assert record["settings"]["num_samples"] == SAMPLES and record["settings"]["guidance_scale"] == 1.5


@both
def test_mse_equals_one_worked_out_by_hand(family, comparison_of, pipes, converged):
    """First order on uniform nodes, as diffusers has it and as a table of ours; both in batches of 3 and 1. Diffusers
    keeps its levels and times in float32, which moves states by some 1e-7."""
    steps = 4  # of which diffusers' whole timesteps are the uniform ones exactly
    comparison, wanted = comparison_of(family), converged(family)
    expected = mse(by_hand(pipes[family], family, steps), wanted)
    path = make_path(family)
    spec = classical(uniform_nodes(steps, path), path, 1)
    model = comparison.lineup.model_config
    ours = DSSolverScheduler.from_config(model, solvers={str(steps): spec.to_dict()})
    if family == "flow":
        stock = FlowMatchEulerDiscreteScheduler()
    else:
        stock = DDIMScheduler.from_config(model, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    found = comparison.converged()[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for scheduler in (ours, stock):
        made = comparison.sample(scheduler, steps)
        assert mse(made.final, found) == pytest.approx(expected, rel=1e-5)
        assert made.calls == steps and made.images.shape == (SAMPLES, 4, 4, 1)


@both
def test_best_spacing_is_the_best_of_all_and_schedulers_stay_as_they_were(family, comparison_of, outputs, converged):
    comparison, tried = comparison_of(family), {}
    own = comparison.lineup.sampler.pipe.scheduler
    for run in comparison.lineup.runs(NFE):
        before = run.scheduler.step
        final = comparison.sample(run.scheduler, run.steps).final
        assert final.shape == (SAMPLES, 1, 4, 4), run.name
        assert "step" not in vars(run.scheduler) and run.scheduler.step == before
        error = mse(final, converged(family))
        tried.setdefault(run.name, {})[run.spacing] = error if math.isfinite(error) else math.inf
    assert comparison.lineup.sampler.pipe.scheduler is own
    stock, span = FLOW if family == "flow" else VP, float(converged(family).max() - converged(family).min())
    for name, result in results_of(outputs[family][0]).items():
        if name in stock:
            assert list(tried[name]) == list(stock[name].spacings)
        least = min(tried[name].values())
        assert result["mse"] == pytest.approx(least, rel=1e-6) and tried[name][result["spacing"]] <= least * (1 + 1e-6)
        if math.isfinite(result["mse"]):
            assert result["psnr"] == pytest.approx(10 * math.log10(span**2 / result["mse"]), rel=1e-6)
    assert sum(len(set(spacings.values())) > 1 for spacings in tried.values()) >= 4


def test_a_scheduler_that_breaks_is_left_as_it_was(comparison_of):
    comparison = comparison_of()
    [scheduler], pipe = comparison.lineup.searched.values(), comparison.lineup.sampler.pipe
    own = pipe.scheduler

    def breaks(*args, **kwargs):
        raise RuntimeError("out of memory")

    pipe.transformer.forward = breaks
    with pytest.raises(RuntimeError, match="out of memory"):
        comparison.sample(scheduler, NFE)
    assert "step" not in vars(scheduler) and pipe.scheduler is own


def test_test_samples_are_none_of_the_search(comparison_of):
    comparison = comparison_of()
    [scheduler], sampler = comparison.lineup.searched.values(), comparison.lineup.sampler
    seen, draw = [], sampler.generators
    sampler.generators = lambda indices, split: seen.append((list(indices), split)) or draw(indices, split)
    comparison.sample(scheduler, NFE)
    assert seen == [([0, 1, 2], "test"), ([0, 1, 2], "test"), ([3], "test")]  # the first one counts and warms up


def test_unguided_calls_are_counted_alike(comparison_of):
    comparison = comparison_of(guidance_scale=1.0, schedulers=["euler", "heun"])
    found = {r.scheduler: r.calls for r in comparison.run().results}
    assert found == {"ours-flow": NFE, "euler": NFE, "heun": 2 * 2 - 1}


def test_step_count_without_a_table_is_called_derived(comparison_of):
    results = comparison_of(nfe=[NFE, 4], schedulers=[]).run().results
    assert [(r.nfe, r.spacing, r.calls, r.searched) for r in results] == [
        (3, "searched", 3, True),
        (4, "derived", 4, True),
    ]


def test_infinite_results_are_kept_as_such(settings, tmp_path, monkeypatch, undrawn):
    sample = Lineup.sample

    def spoilt(self, scheduler, *args, **call):
        made = sample(self, scheduler, *args, **call)
        broken = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        return replace(made, final=made.final * float("nan")) if broken else made

    monkeypatch.setattr(Lineup, "sample", spoilt)
    compare(CompareConfig(**settings(output=tmp_path, schedulers=["euler"])))
    record = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert {r["scheduler"]: r["mse"] is None for r in record["results"]} == {"ours-flow": False, "euler": True}
    found = {r.scheduler: r for r in results_of_record(record)}
    assert found["euler"].mse == math.inf and found["euler"].psnr == -math.inf
    assert math.isfinite(found["ours-flow"].mse)


def test_pictures_are_images(outputs):
    folder, _ = outputs["flow"]
    for name, least in (("comparison.png", (600, 800)), ("error.png", (700, 400))):
        with Image.open(folder / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        assert least[0] <= width <= 4000 and least[1] <= height <= 8000
        assert (pixels == 255).all(-1).mean() < 0.99  # something is drawn
        assert (pixels[:3] == 255).all()  # on white
    names = {p.name for p in folder.iterdir()}
    assert names == {"comparison.json", "comparison.png", "error.png", "pictures", "cache"}
    for result in results_of(folder).values():
        with Image.open(folder / result["picture"]) as image:
            assert image.size == (2 * 4, 4)


def test_table_names_spacing_calls_and_the_best(settings):
    rows = [
        ("ours", 3, "searched", 3, 0.01, True), ("ours", 4, "derived", 4, 0.03, True),
        ("euler", 3, "karras", 3, 0.04, False), ("euler", 4, "uniform", 4, 0.02, False),
        ("heun", 3, "uniform", 3, 0.05, False), ("heun", 4, "uniform", 3, 0.06, False),
    ]  # fmt: skip
    results = [Result(n, nfe, s, calls, mse, 1.0, 0.1, searched) for n, nfe, s, calls, mse, searched in rows]
    lines = table(results, CompareConfig(**settings(nfe=[3, 4])), 2e-5).splitlines()
    cells = {line.split("  ")[0].strip(): line for line in lines if line}
    assert "0.04 (karras)*" in cells["euler"] and "0.02 (uniform)*" in cells["euler"]
    assert "0.05 (uniform) " in cells["heun"] and "0.06 (uniform, 3 calls)" in cells["heun"]
    assert "0.01 (searched)" in cells["ours"] and "0.03 (derived)" in cells["ours"]
    assert cells["ours / best *"].split()[-2:] == ["0.25", "1.50"]
    assert "2e-05" in lines[-1] and f"{STEPS} steps, {SAMPLES} test samples" in lines[1]


# --- images, intervals, other schedulers ------------------------------------------------------------------------------


def test_images_and_intervals_by_hand(pipes, ours, outputs):
    """Of the 8-bit images that the plain pipeline returns, in [0, 1]; a mean of errors lies in its interval."""
    pipe, images = pipes["flow"], []
    sampler = make_sampler(pipe)
    for solvers, steps in (("classical", STEPS), (str(ours["flow"]), NFE)):
        with sampler.using(DSSolverScheduler.from_config(pipe.scheduler.config, solvers=solvers)):
            made = sampler(range(SAMPLES), "test", steps)[0]
        images.append(np.stack([np.asarray(image, dtype=np.float64) / 255 for image in made]))
    expected = ((images[0] - images[1]) ** 2).mean()
    result = results_of(outputs["flow"][0])["ours-flow"]
    assert result["image_mse"] == pytest.approx(expected, rel=1e-12)
    assert result["image_psnr"] == pytest.approx(-10 * math.log10(expected), rel=1e-12)
    low, high = result["mse_interval"]
    assert low < result["mse"] < high


def test_interval_is_that_of_a_mean():
    errors = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double() + 3
    low, high = interval(errors)
    assert (low + high) / 2 == pytest.approx(errors.mean().item(), abs=0.004)
    assert high - low == pytest.approx(2 * 1.96 * errors.std().item() / math.sqrt(4000), rel=0.1)


def test_as_uint8():
    grey = Image.fromarray(np.array([[0, 128], [255, 7]], dtype=np.uint8))
    assert as_uint8(grey).tolist() == [[[0], [128]], [[255], [7]]]
    assert as_uint8(grey.convert("RGBA")).shape == (2, 2, 3)
    assert as_uint8(np.array([[[0.0], [1.0]], [[0.5], [1.7]]])).flatten().tolist() == [0, 255, 128, 255]
    assert as_uint8([grey, grey]).shape == (2, 2, 2, 1)  # frames


def test_feature_distance(comparison_of):
    """In the images themselves scaled to unit length: 2 - 2 cosine of the two pictures. Features are in float32, so
    their difference, of length above 0.01, is wrong by some 1e-7 and its square by some 2e-5 of itself."""
    comparison = comparison_of(schedulers=[], feature_network="torch.nn:Flatten")
    results = comparison.run().results
    [scheduler] = comparison.lineup.searched.values()
    pairs = comparison.sample(scheduler, NFE).images, comparison.converged()[1]
    a, b = (images.double().flatten(1) for images in pairs)
    expected = (2 - 2 * torch.cosine_similarity(a, b)).mean().item()
    assert expected > 1e-4 and results[0].feature_distance == pytest.approx(expected, rel=1e-4)
    assert "features" in details(results)


def test_align_your_steps_where_diffusers_ships_it():
    config = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    large, small = type("StableDiffusionXLPipeline", (), {})(), type("StableDiffusionPipeline", (), {})()
    assert aligned_times(large, config) == AysSchedules["StableDiffusionXLTimesteps"]
    assert aligned_times(small, config) == AysSchedules["StableDiffusionTimesteps"]
    assert not aligned_times(small, {**config, "beta_end": 0.02})
    found = list(runs("dpmpp_2m", VP["dpmpp_2m"], 10, config, large, {"timesteps"}))
    assert [r.spacing for r in found] == [*VP["dpmpp_2m"].spacings, ALIGNED]
    found[-1].scheduler.set_timesteps(**found[-1].call)
    assert found[-1].scheduler.timesteps.tolist() == AysSchedules["StableDiffusionXLTimesteps"]
    for nfe, name, accepted in ((9, "dpmpp_2m", {"timesteps"}), (10, "dpmpp_2m", set()), (10, "unipc", {"timesteps"})):
        assert ALIGNED not in [r.spacing for r in runs(name, VP[name], nfe, config, large, accepted)]


def test_variants_of_unipc_are_what_they_are_called():
    found = {r.spacing: r.scheduler.config for r in runs("unipc", VP["unipc"], 5, {}, None, ())}
    assert found["karras, bh1"].solver_type == "bh1" and found["karras, bh1"].use_karras_sigmas
    assert found["trailing, order 3"].solver_order == 3 and found["trailing"].solver_order == 2
    assert len(found) == 12


def test_a_scheduler_that_cannot_run_is_left_out_with_its_reason(settings, tmp_path, capsys, monkeypatch, undrawn):
    def refuse(self, *args, **kwargs):
        raise ValueError("not in this pipeline")

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "set_timesteps", refuse)
    given = settings(output=tmp_path, schedulers=["euler", "deis"])
    compare(CompareConfig(**given))
    assert list(results_of(tmp_path)) == ["ours-flow", "deis"]
    assert "euler (uniform) cannot run at 3 calls and is left out: not in this pipeline" in capsys.readouterr().err
    begin = DSSolverScheduler.set_timesteps

    def refuse_few(self, steps, *rest, **more):
        return refuse(self) if steps == NFE else begin(self, steps, *rest, **more)

    monkeypatch.setattr(DSSolverScheduler, "set_timesteps", refuse_few)  # ours must run
    with pytest.raises(ValueError, match="not in this pipeline"):
        Comparison(CompareConfig(**given | {"output_dir": str(tmp_path / "other"), "schedulers": []})).run()


def test_the_solver_of_this_guidance_is_taken(comparison_of, tmp_path, capsys):
    low, high = (make_solver("flow", tmp_path, order) for order in (1, 2))
    make_solver("flow", tmp_path, 1, guidance_solvers={"1": low, "2": high})
    for guidance, expected in ((2.0, high), (1.0, low)):
        comparison = comparison_of(guidance_scale=guidance, solver=[str(tmp_path)])
        assert comparison.lineup.searched[tmp_path.name].solvers[NFE].to_dict() == expected[str(NFE)]
    make_solver("flow", tmp_path, provenance={"call": {"guidance_scale": 4.0}})
    comparison_of(solver=[str(tmp_path)])
    assert "was searched at guidance scale 4.0, this run is at 1.5" in capsys.readouterr().err


@both
def test_converged_runs_may_end_early(family, comparison_of, pipes):
    """Many steps to the end, then the data that the network predicts there, in one step of first order."""
    comparison = comparison_of(family, schedulers=[], reference_end=0.25)
    final = comparison.converged()[0]
    nodes = [*torch.linspace(1, 0.25, STEPS, dtype=torch.float64).tolist(), 0.0]
    spec = classical(nodes, make_path(family)).to_dict()
    spec["coefficients"][-1] = [0.0] * (STEPS - 1) + [1.0]
    [ours], config = comparison.lineup.searched.values(), comparison.lineup.model_config
    many = DSSolverScheduler.from_config(config, solvers={str(STEPS): spec})
    torch.testing.assert_close(comparison.sample(many, STEPS).final, final, rtol=1e-9, atol=1e-9)
    [result] = comparison.run().results
    assert result.mse == pytest.approx(mse(comparison.sample(ours, NFE).final, final), rel=1e-9)


def test_the_end_of_converged_runs_is_told(settings, tmp_path, capsys, undrawn):
    compare(CompareConfig(**settings(output=tmp_path, schedulers=[], reference_end=0.25)))
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["reference"]["end"] == record["settings"]["reference_end"] == 0.25
    line = f"final-state mse against {STEPS} steps, the last from 0.25 to the data, {SAMPLES} test samples"
    assert line in capsys.readouterr().out


def test_a_solver_searched_towards_another_end_is_told(comparison_of, tmp_path, capsys):
    make_solver("flow", tmp_path, provenance={"teacher": {"steps": 9, "end": 0.1}})
    comparison_of(solver=[str(tmp_path)], reference_end=0.1)
    assert "teacher_end" not in capsys.readouterr().err
    comparison_of(solver=[str(tmp_path)])
    assert f"{tmp_path} was searched with teacher_end 0.1, this reference_end is 0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "provenance", [["flow"], 3, {"call": ["guidance_scale"]}, {"teacher": "x", "call": "guidance_scale"}]
)
def test_a_provenance_of_any_kind_says_nothing_of_guidance(provenance, comparison_of, tmp_path, capsys):
    make_solver("flow", tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"provenance": provenance}))
    comparison = comparison_of(solver=[str(tmp_path)])
    assert comparison.lineup.searched[tmp_path.name].tables == (NFE,)
    assert "searched at guidance" not in capsys.readouterr().err


# --- never lost -------------------------------------------------------------------------------------------------------


def test_a_killed_comparison_goes_on(settings, tmp_path, monkeypatch, capsys, undrawn):
    """Nothing that is on disk is run again; what is damaged there is."""
    config, whole = (
        CompareConfig(**settings(output=tmp_path / name, schedulers=["euler", "deis"])) for name in ("a", "b")
    )
    sample, calls = Lineup.sample, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Lineup, "sample", counted)
    killed_at = 9
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        compare(config)
    killed_at, before = None, len(calls)
    compare(config)
    resumed = len(calls) - before
    calls.clear()
    compare(whole)
    assert resumed == len(calls) - (before - 1)
    measured = [results_of(tmp_path / name) for name in "ab"]
    for name, result in measured[1].items():
        assert {**measured[0][name], "seconds": 0} == {**result, "seconds": 0}
    calls.clear()
    damaged = sorted((tmp_path / "b" / "cache").iterdir())[3]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    compare(whole)
    assert len(calls) == 1 and "is damaged and made anew" in capsys.readouterr().err


def test_other_settings_are_other_files(comparison_of, tmp_path):
    """A comparison in the same folder with other samples, guidance or steps takes nothing from the last one."""
    changed = {
        "guidance_scale": (3.0, 6), "seed": (1, 6), "reference_steps": (STEPS + 2, 6), "num_samples": (2, 3),
        "num_pictures": (1, 2), "reference_end": (0.1, 6),
    }  # fmt: skip
    known = set()
    for name, (value, count) in {"batch_size": (3, 6), **changed}.items():  # two converged runs and one, two batches
        comparison_of(output=tmp_path, schedulers=[], **{name: value}).run()
        now = {file.name for file in (tmp_path / "cache").iterdir()}
        assert len(now - known) == count, name
        known = now


def test_facts_of_a_run_are_the_same_in_every_process():
    """diffusers lists defaults in the order of a set, which another process may have otherwise."""
    [run, *_] = runs("unipc", FLOW["unipc"], NFE, make_scheduler("flow").config, None, ())
    before = json.dumps(run.facts)
    defaults = run.scheduler.config["_use_default_values"]
    run.scheduler.register_to_config(_use_default_values=defaults[::-1])
    assert json.dumps(run.facts) == before and run.scheduler.config["_use_default_values"] == defaults[::-1]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_solver_of_the_other_family_is_carried_over(settings, ours, tmp_path, caplog):
    given = settings("flow", tmp_path / "out", solver=[str(ours["vp"])])
    main(["compare", *arguments(given)])
    assert "is carried over by noise level" in caplog.text
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())["results"]
    assert all(math.isfinite(r["mse"]) for r in results if r["searched"])
    assert any(r["searched"] for r in results)


@pytest.mark.parametrize("spoil", ["truncated", "list", "empty", "no rows"])
def test_spoilt_solver_is_refused(spoil, settings, ours, tmp_path, capsys):
    text = (ours["flow"] / "scheduler_config.json").read_text()
    config = json.loads(text)
    config["solvers"]["3"]["coefficients"] = []
    spoilt = {"truncated": text[: len(text) // 2], "list": "[1]", "empty": "", "no rows": json.dumps(config)}[spoil]
    (tmp_path / "scheduler_config.json").write_text(spoilt)
    given = settings(output=tmp_path / "out", solver=[str(tmp_path)])
    line = refused(capsys, lambda: main(["compare", *arguments(given)]))
    assert ("solvers['3']" if spoil == "no rows" else tmp_path.name) in line
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]


def test_absent_solver_and_unknown_scheduler_are_refused(settings, tmp_path, capsys):
    for changes, message in (
        ({"solver": [str(tmp_path / "absent")]}, "absent"),
        ({"solver": [], "schedulers": ["euler", "leapfrog"]}, "'leapfrog' is unknown; known: unipc, "),
        ({"reference_end": 0.6}, "reference_end is 0.6; it must be from 0 to 0.5"),
    ):
        given = settings(output=tmp_path / "out", **changes)
        assert message in refused(capsys, lambda given=given: main(["compare", *arguments(given)]))
    assert not list(tmp_path.iterdir())
