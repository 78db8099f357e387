"""The comparison against loops written out here: what it measures, counts, chooses, draws and refuses."""

from __future__ import annotations

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
from dssolver_search.measure.baselines import ALIGNED, FLOW, VP, aligned_times, runs
from dssolver_search.measure.compare import Comparison, compare
from dssolver_search.measure.pictures import as_uint8
from dssolver_search.measure.results import Result, details, interval, results_of_record, table
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.settings import CompareConfig
from tests.search.test_search import both, make_path, make_pipe, make_sampler, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # its schedulers that fail on a spacing
]
FAMILIES = ("flow", "vp")
SAMPLES, NFE, STEPS = 4, 3, 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family: a folder with a saved pipeline, and one with a solver for it."""
    root = tmp_path_factory.mktemp("compare")
    for family in FAMILIES:
        pipe = make_pipe(family)
        pipe.save_pretrained(root / family)
        path = make_path(family)
        spec = classical(uniform_nodes(NFE, path), path)
        config = {k: v for k, v in pipe.scheduler.config.items() if k != "solvers"}
        DSSolverScheduler.from_config(config, solvers={str(NFE): spec.to_dict()}).save_pretrained(
            root / f"ours-{family}"
        )
    return root


def settings(folders, family, **changes):
    values = {
        "pretrained_model_name_or_path": str(folders / family),
        "output_dir": str(folders / f"out-{family}"),
        "nfe": [NFE],
        "guidance_scale": 1.5,
        "solver": [str(folders / f"ours-{family}")],
        "num_samples": SAMPLES,
        "reference_steps": STEPS,
        "batch_size": 3,  # one batch is not full
        "num_pictures": 2,
    }
    return CompareConfig(**{**values, **changes})


def words(config):
    given = ["compare"]
    for key in ("pretrained_model_name_or_path", "output_dir", "nfe", "guidance_scale", "solver", "num_samples",
                "reference_steps", "batch_size", "num_pictures"):  # fmt: skip
        value = getattr(config, key)
        given += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return given


@pytest.fixture(scope="module")
def outputs(folders):
    """By family: the folder that the command wrote."""
    for family in FAMILIES:
        main(words(settings(folders, family)))
    return {family: folders / f"out-{family}" for family in FAMILIES}


def results_of(folder):
    return {r["scheduler"]: r for r in json.loads((folder / "comparison.json").read_text())["results"]}


@torch.no_grad()
def by_hand(folders, family, steps):
    """Euler or DDIM on uniform nodes from the comparison's own noise and classes: final states."""
    pipe = load_pipeline(str(folders / family))
    sampler = make_sampler(pipe)
    noise = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in sampler.generators(range(SAMPLES), "test")])
    labels = torch.tensor([i % 3 for i in range(SAMPLES)])
    path = make_path(family)
    nodes = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alpha, sigma = (f.tolist() for f in path.alpha_sigma(nodes))
    x = noise
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


@torch.no_grad()
def converged(folders, family):
    """The comparison's reference, by the plain pipeline in one batch."""
    pipe = load_pipeline(str(folders / family))
    pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers="classical")
    return make_sampler(pipe)(range(SAMPLES), "test", STEPS, output_type="latent")[0]


@both
def test_every_scheduler_is_measured_with_the_calls_asked_for(family, folders, outputs):
    record = json.loads((outputs[family] / "comparison.json").read_text())
    found = results_of(outputs[family])
    assert list(found) == [f"ours-{family}", "unipc", "dpmpp_2m", "dpmpp_3m", "deis", "heun", "euler"]
    assert len(record["results"]) == len(found)
    for name, result in found.items():
        assert result["mse"] > 0 and not math.isnan(result["mse"])
        assert result["nfe"] == NFE and result["calls"] == (2 * 2 - 1 if name == "heun" else NFE)
        assert result["searched"] == (name == f"ours-{family}")
        assert "pictures" not in result
    assert found[f"ours-{family}"]["spacing"] == "searched"
    assert sum(math.isfinite(r["mse"]) for r in found.values()) >= 5
    assert record["reference"]["steps"] == STEPS and 0 < record["reference"]["mse_against_half_the_steps"] < 0.1
    assert record["settings"]["num_samples"] == SAMPLES and record["settings"]["guidance_scale"] == 1.5


@both
def test_mse_equals_one_worked_out_by_hand(family, folders):
    """First order on uniform nodes, as diffusers has it and as a table of ours; both in batches of 3 and 1."""
    steps = 4  # of which diffusers' whole timesteps are the uniform ones exactly
    comparison = Comparison(settings(folders, family))
    wanted = converged(folders, family)
    expected = (by_hand(folders, family, steps) - wanted).square().mean().item()
    path = make_path(family)
    spec = classical(uniform_nodes(steps, path), path, 1)
    model = comparison.model_config
    ours = DSSolverScheduler.from_config(model, solvers={str(steps): spec.to_dict()})
    if family == "flow":
        stock = FlowMatchEulerDiscreteScheduler()
    else:
        stock = DDIMScheduler.from_config(model, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    reference = comparison.reference()[0]
    torch.testing.assert_close(reference, wanted, rtol=1e-4, atol=1e-4)
    for scheduler in (ours, stock):
        made = comparison.sample(scheduler, steps)
        assert (made.final - reference).square().mean().item() == pytest.approx(expected, rel=1e-3)
        assert made.evaluations == 2 * steps and made.images.shape == (SAMPLES, 4, 4, 1)


def test_reported_mse_of_euler_is_the_one_by_hand(folders, outputs):
    candidates = {"uniform": (by_hand(folders, "flow", NFE) - converged(folders, "flow")).square().mean().item()}
    euler = results_of(outputs["flow"])["euler"]
    if euler["spacing"] == "uniform":
        assert euler["mse"] == pytest.approx(candidates["uniform"], rel=1e-3)
    else:
        assert euler["mse"] < candidates["uniform"]


@both
def test_best_spacing_is_the_best_of_all(family, folders, outputs):
    comparison = Comparison(settings(folders, family))
    wanted = comparison.reference()[0]
    tried = {}
    for run in comparison.candidates(NFE):
        mse = (comparison.sample(run.scheduler, run.steps).final - wanted).square().mean().item()
        tried.setdefault(run.name, {})[run.spacing] = mse if math.isfinite(mse) else math.inf
    stock = FLOW if family == "flow" else VP
    for name, result in results_of(outputs[family]).items():
        if name in stock:
            assert list(tried[name]) == list(stock[name].spacings)
        assert result["mse"] == pytest.approx(min(tried[name].values()), rel=1e-4)
        assert result["spacing"] == min(tried[name], key=tried[name].get)
    assert sum(len(set(spacings.values())) > 1 for spacings in tried.values()) >= 4


@both
def test_final_state_is_recorded_and_the_scheduler_left_as_it_was(family, folders):
    comparison = Comparison(settings(folders, family))
    own = comparison.sampler.pipe.scheduler
    for run in comparison.candidates(NFE):
        before = run.scheduler.step
        assert comparison.sample(run.scheduler, run.steps).final.shape == (SAMPLES, 1, 4, 4), run.name
        assert "step" not in vars(run.scheduler) and run.scheduler.step == before
    assert comparison.sampler.pipe.scheduler is own

    def breaks(*args, **kwargs):
        raise RuntimeError("out of memory")

    scheduler = next(iter(comparison.ours.values()))
    comparison.sampler.pipe.transformer.forward = breaks
    with pytest.raises(RuntimeError, match="out of memory"):
        comparison.sample(scheduler, NFE)
    assert "step" not in vars(scheduler) and comparison.sampler.pipe.scheduler is own


def test_test_samples_are_none_of_the_search(folders):
    comparison = Comparison(settings(folders, "flow"))
    seen, draw = [], comparison.sampler.generators
    comparison.sampler.generators = lambda indices, split: seen.append((list(indices), split)) or draw(indices, split)
    comparison.sample(classical_scheduler(comparison), NFE)
    assert seen == [([0, 1, 2], "test"), ([3], "test")]


def classical_scheduler(comparison):
    return DSSolverScheduler.from_config(comparison.model_config, solvers="classical")


@both
def test_unguided_calls_are_counted_alike(family, folders):
    comparison = Comparison(settings(folders, family, guidance_scale=1.0, schedulers=["euler", "heun"]))
    found = {r.scheduler: r.calls for r in comparison.run()[0]}
    assert found == {f"ours-{family}": NFE, "euler": NFE, "heun": 2 * 2 - 1}


def test_step_count_without_a_table_is_called_derived(folders):
    comparison = Comparison(settings(folders, "flow", nfe=[NFE, 4], schedulers=[]))
    results, _, _ = comparison.run()
    assert [(r.nfe, r.spacing, r.calls, r.searched) for r in results] == [
        (3, "searched", 3, True),
        (4, "derived", 4, True),
    ]


def test_infinite_results_are_kept_as_such(folders, tmp_path, monkeypatch):
    config = settings(folders, "flow", schedulers=["euler"], output_dir=str(tmp_path))
    sample = Comparison.sample

    def spoilt(self, scheduler, steps, *rest, **call):
        made = sample(self, scheduler, steps, *rest, **call)
        broken = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        return replace(made, final=made.final * float("nan")) if broken else made

    monkeypatch.setattr(Comparison, "sample", spoilt)
    compare(config)
    record = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert {r["scheduler"]: r["mse"] is None for r in record["results"]} == {"ours-flow": False, "euler": True}
    found = {r.scheduler: r for r in results_of_record(record)}
    assert found["euler"].mse == math.inf and found["euler"].psnr == -math.inf
    assert math.isfinite(found["ours-flow"].mse)


@both
def test_psnr_is_that_of_the_mse(family, folders, outputs):
    wanted = converged(folders, family)
    span = (wanted.max() - wanted.min()).item()
    for result in results_of(outputs[family]).values():
        if math.isfinite(result["mse"]):
            assert result["psnr"] == pytest.approx(10 * math.log10(span**2 / result["mse"]), abs=1e-2)


@both
def test_pictures_are_images(family, outputs):
    for name, least in (("comparison.png", (600, 800)), ("error.png", (700, 400))):
        with Image.open(outputs[family] / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        assert least[0] <= width <= 4000 and least[1] <= height <= 8000
        assert (pixels == 255).all(-1).mean() < 0.99  # something is drawn
        assert (pixels[:3] == 255).all()  # on white
    names = {p.name for p in outputs[family].iterdir()}
    assert names == {"comparison.json", "comparison.png", "error.png", "pictures", "cache"}
    for result in results_of(outputs[family]).values():
        with Image.open(outputs[family] / result["picture"]) as image:
            assert image.size == (2 * 4, 4)


def test_table_names_spacing_calls_and_the_best(folders):
    config = settings(folders, "flow", nfe=[3, 4])
    rows = [
        ("ours", 3, "searched", 3, 0.01, True), ("ours", 4, "derived", 4, 0.03, True),
        ("euler", 3, "karras", 3, 0.04, False), ("euler", 4, "uniform", 4, 0.02, False),
        ("heun", 3, "uniform", 3, 0.05, False), ("heun", 4, "uniform", 3, 0.06, False),
    ]  # fmt: skip
    results = [Result(n, nfe, s, calls, mse, 1.0, 0.1, searched) for n, nfe, s, calls, mse, searched in rows]
    lines = table(results, config, 2e-5).splitlines()
    cells = {line.split("  ")[0].strip(): line for line in lines if line}
    assert "0.04 (karras)*" in cells["euler"] and "0.02 (uniform)*" in cells["euler"]
    assert "0.05 (uniform) " in cells["heun"] and "0.06 (uniform, 3 calls)" in cells["heun"]
    assert "0.01 (searched)" in cells["ours"] and "0.03 (derived)" in cells["ours"]
    assert cells["ours / best *"].split()[-2:] == ["0.25", "1.50"]
    assert "2e-05" in lines[-1] and f"{STEPS} steps, {SAMPLES} test samples" in lines[1]


@both
def test_command_prints_the_table(family, folders, tmp_path, capsys):
    config = settings(folders, family, output_dir=str(tmp_path / "out"))
    main(words(config))
    text = capsys.readouterr().out
    for name, result in results_of(tmp_path / "out").items():
        [line] = [row for row in text.splitlines() if row.startswith(name + " ") and "/ best" not in row]
        assert f"({result['spacing']}" in line and f"{result['mse']:.3g}" in line


# --- images, intervals, other schedulers ------------------------------------------------------------------------------


@both
def test_images_and_intervals_by_hand(family, folders, outputs):
    """Of the 8-bit images that the plain pipeline returns, in [0, 1]; a mean of errors lies in its interval."""
    pipe = load_pipeline(str(folders / family))
    images = []
    for solvers, steps in (("classical", STEPS), (str(folders / f"ours-{family}"), NFE)):
        pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers=solvers)
        made = make_sampler(pipe)(range(SAMPLES), "test", steps)[0]
        images.append(np.stack([np.asarray(image, dtype=np.float64) / 255 for image in made]))
    expected = ((images[0] - images[1]) ** 2).mean()
    result = results_of(outputs[family])[f"ours-{family}"]
    assert result["image_mse"] == pytest.approx(expected, rel=0.02)  # a rounding of an image may fall the other way
    assert result["image_psnr"] == pytest.approx(-10 * math.log10(expected), abs=0.1)
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


def test_feature_distance(folders, tmp_path):
    """In the images themselves scaled to unit length: 2 - 2 cosine of the two pictures."""
    config = settings(folders, "flow", schedulers=[], output_dir=str(tmp_path), feature_network="torch.nn:Flatten")
    comparison = Comparison(config)
    results, _, _ = comparison.run()
    pairs = comparison.sample(next(iter(comparison.ours.values())), NFE).images, comparison.reference()[1]
    a, b = (images.double().flatten(1) for images in pairs)
    expected = (2 - 2 * torch.cosine_similarity(a, b)).mean().item()
    assert results[0].feature_distance == pytest.approx(expected, rel=1e-3)
    assert "features" in details(results)


def test_align_your_steps_where_diffusers_ships_it(folders):
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


def test_a_scheduler_that_cannot_run_is_left_out_with_its_reason(folders, tmp_path, capsys, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError("not in this pipeline")

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "set_timesteps", refuse)
    config = settings(folders, "flow", schedulers=["euler", "unipc"], output_dir=str(tmp_path))
    compare(config)
    assert list(results_of(tmp_path)) == ["ours-flow", "unipc"]
    assert "euler (uniform) cannot run at 3 calls and is left out: not in this pipeline" in capsys.readouterr().err
    begin = DSSolverScheduler.set_timesteps

    def refuse_few(self, steps, *rest, **more):
        return refuse(self) if steps == NFE else begin(self, steps, *rest, **more)

    monkeypatch.setattr(DSSolverScheduler, "set_timesteps", refuse_few)  # ours must run
    with pytest.raises(ValueError, match="not in this pipeline"):
        Comparison(settings(folders, "flow", output_dir=str(tmp_path / "other"))).run()


def test_the_solver_of_this_guidance_is_taken(folders, tmp_path, capsys):
    path = make_path("flow")
    low, high = ({str(NFE): classical(uniform_nodes(NFE, path), path, order).to_dict()} for order in (1, 2))
    by_scale = {"1": low, "2": high}
    DSSolverScheduler(prediction_type="flow_prediction", solvers=low, guidance_solvers=by_scale).save_pretrained(
        tmp_path
    )
    for guidance, expected in ((2.0, high), (1.0, low)):
        comparison = Comparison(settings(folders, "flow", guidance_scale=guidance, solver=[str(tmp_path)]))
        assert comparison.ours[tmp_path.name].solvers[NFE].to_dict() == expected[str(NFE)]
    provenance = {"call": {"guidance_scale": 4.0}}
    DSSolverScheduler(prediction_type="flow_prediction", solvers=low, provenance=provenance).save_pretrained(tmp_path)
    Comparison(settings(folders, "flow", solver=[str(tmp_path)]))
    assert "was searched at guidance scale 4.0, this run is at 1.5" in capsys.readouterr().err


@both
def test_a_reference_may_end_early(family, folders, tmp_path, capsys):
    """Against a loop: many steps to the end, then the data that the network predicts there; kept apart from others."""
    changes = {"reference_steps": 60, "schedulers": ["euler"], "output_dir": str(tmp_path)}
    whole = Comparison(settings(folders, family, **changes)).reference()
    config = settings(folders, family, **changes, reference_end=0.25)
    comparison = Comparison(config)
    final, _, uncertainty = comparison.reference()
    assert uncertainty < 0.1 * (final - whole[0]).square().mean()
    nodes = [*torch.linspace(1, 0.25, 600, dtype=torch.float64).tolist(), 0.0]
    euler = classical(nodes, make_path(family), 1)
    many = DSSolverScheduler.from_config(comparison.model_config, solvers={"600": euler.to_dict()})
    assert (comparison.sample(many, 600).final - final).square().mean() < 2e-5 * final.var()
    results = comparison.run()[0]
    [ours] = [r for r in results if r.searched]
    made = comparison.sample(comparison.ours[f"ours-{family}"], NFE).final
    assert ours.mse == pytest.approx((made - final).square().mean().item(), rel=1e-5)
    compare(config)
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["reference"]["end"] == record["settings"]["reference_end"] == 0.25
    assert "final-state mse against 60 steps, the last from 0.25 to the data, 4 test samples" in capsys.readouterr().out


def test_a_solver_searched_towards_another_end_is_told(folders, tmp_path, capsys):
    scheduler = DSSolverScheduler.from_pretrained(
        folders / "ours-flow", provenance={"teacher": {"steps": 9, "end": 0.1}}
    )
    scheduler.save_pretrained(tmp_path)
    Comparison(settings(folders, "flow", solver=[str(tmp_path)], reference_end=0.1))
    assert "teacher_end" not in capsys.readouterr().err
    Comparison(settings(folders, "flow", solver=[str(tmp_path)]))
    assert f"{tmp_path} was searched with teacher_end 0.1, this reference_end is 0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "provenance",
    [["flow"], "flow", 3, {"call": ["guidance_scale"]}, {"call": "guidance_scale"}, {"teacher": "x", "call": 3}],
)
def test_a_provenance_of_any_kind_says_nothing_of_guidance(provenance, folders, tmp_path, capsys):
    scheduler = DSSolverScheduler.from_pretrained(folders / "ours-flow")
    scheduler.save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"provenance": provenance}))
    comparison = Comparison(settings(folders, "flow", solver=[str(tmp_path)]))
    assert comparison.ours[tmp_path.name].tables == scheduler.tables
    assert "searched at guidance" not in capsys.readouterr().err


# --- never lost -------------------------------------------------------------------------------------------------------


def test_a_killed_comparison_goes_on(folders, tmp_path, monkeypatch, capsys):
    """Nothing that is on disk is run again; what is damaged there is."""
    config = settings(folders, "flow", schedulers=["euler", "deis"], output_dir=str(tmp_path / "a"))
    whole = settings(folders, "flow", schedulers=["euler", "deis"], output_dir=str(tmp_path / "b"))
    sample, calls = Comparison.sample, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Comparison, "sample", counted)
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


def test_other_settings_are_other_files(folders, tmp_path):
    """A comparison in the same folder with other samples, guidance or reference takes nothing from the last one."""
    first = settings(folders, "flow", schedulers=[], output_dir=str(tmp_path))
    compare(first)
    known = {file.name for file in (tmp_path / "cache").iterdir()}
    expected = {"guidance_scale": 6, "seed": 6, "reference_steps": 6, "num_samples": 3, "num_pictures": 2}
    changed = {"guidance_scale": 3.0, "seed": 1, "reference_steps": STEPS + 2, "num_samples": 2, "num_pictures": 1}
    for name, count in expected.items():  # two references and a run of two batches, one of two samples
        compare(replace(first, **{name: changed[name]}))
        now = {file.name for file in (tmp_path / "cache").iterdir()}
        assert len(now - known) == count, name
        known = now


# --- bad input --------------------------------------------------------------------------------------------------------


@both
def test_solver_of_the_other_family_is_refused(family, folders, tmp_path, capsys):
    other = "vp" if family == "flow" else "flow"
    config = settings(folders, family, solver=[str(folders / f"ours-{other}")], output_dir=str(tmp_path / "out"))
    line = refused(capsys, lambda: main(words(config)))
    assert line.startswith("dssolver_search compare: error: ") and f"is for {other} models" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoil", ["truncated", "list", "empty", "no rows"])
def test_spoilt_solver_is_refused(spoil, folders, tmp_path, capsys):
    text = (folders / "ours-flow" / "scheduler_config.json").read_text()
    config = json.loads(text)
    config["solvers"]["3"]["coefficients"] = []
    spoilt = {"truncated": text[: len(text) // 2], "list": "[1]", "empty": "", "no rows": json.dumps(config)}[spoil]
    (tmp_path / "scheduler_config.json").write_text(spoilt)
    line = refused(
        capsys,
        lambda: main(words(settings(folders, "flow", solver=[str(tmp_path)], output_dir=str(tmp_path / "out")))),
    )
    assert ("solvers['3']" if spoil == "no rows" else tmp_path.name) in line
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]


def test_absent_solver_and_unknown_scheduler_are_refused(folders, tmp_path, capsys):
    config = settings(folders, "flow", solver=[str(tmp_path / "absent")], output_dir=str(tmp_path / "out"))
    assert "absent" in refused(capsys, lambda: main(words(config)))
    config = settings(folders, "flow", solver=[], output_dir=str(tmp_path / "out"))
    line = refused(capsys, lambda: main([*words(config), "--schedulers", "euler", "leapfrog"]))
    assert "'leapfrog' is unknown; known: unipc, " in line
    line = refused(capsys, lambda: main([*words(config), "--reference_end", "0.6"]))
    assert "reference_end is 0.6; it must be from 0 to 0.5" in line
    assert not list(tmp_path.iterdir())
