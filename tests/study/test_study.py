"""`make study` in miniature: every finding on tiny random models, kills, shares, the rules of its sentences, and, once
it was run, its tables in search/docs/study.md.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from diffusers import DDIMScheduler
from PIL import Image
from scipy.linalg import sqrtm
from torch.utils.flop_counter import FlopCounterMode

from dssolver_search.demo import classifier, train
from dssolver_search.images.features import of_network
from dssolver_search.images.real_images import Statistics
from dssolver_search.methods import closed_form
from dssolver_search.methods import search as run_module
from dssolver_search.storage import write_tensors
from tests import documents
from tests.families import make_pipe
from tests.search.test_gradient import told
from tests.study import findings as study_findings
from tests.study import models as study_models
from tests.study import study as bench_study
from tests.study import units as study_units
from tests.study.findings import SEARCHED
from tests.study.units import Budget, Retimed, Study, error_of, on_schedule

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")
TINY = {
    "num_train_samples": 4, "num_trial_samples": 4, "num_validation_samples": 2, "trials": 2, "starts": 1, "polish": 1
}  # fmt: skip
SEARCH = {**TINY, "teacher_steps": 12, "reference_steps": 6}
BUDGET = Budget(
    nfe=(2, 3), few=(2, 3), stock=("unipc", "heun"), adams=(2,), test_samples=3, reference_steps=24, images=8,
    sizes=("small", "large"), subsets=2, lean=SEARCH, teachers=(6, 12), orders=(1, 2), samples=(2, 4), samples_nfe=2,
    sampled={**SEARCH, "polish": 0, "num_trial_samples": 2}, scales=(1.0, 3.0), scales_nfe=2, generated=4, descent=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of all models with random weights, as `study_models` would leave it."""
    folder = tmp_path_factory.mktemp("study-models")
    facts = {"steps": 1, "minutes": 2.5, "device": "cpu", "loss": 0.25, "parameters": 1234}
    for seed, name in enumerate(study_models.names()):
        make_pipe(name.split("-")[1], seed).save_pretrained(study_models.folder(folder, name))
        (study_models.folder(folder, name) / "training.json").write_text(json.dumps(facts))
    home = study_models.folder(folder, study_models.CLASSIFIER)
    home.mkdir()
    torch.manual_seed(0)
    network = classifier.Classifier(study_models.NAME, 1, 4).eval()
    write_tensors(home / classifier.WEIGHTS, network.state_dict(), {"name": study_models.NAME, "size": "4"})
    extractor = of_network(network, "")
    noise = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3), dtype=np.uint8)
    Statistics.of(extractor(list(noise))["features"], "noise").write(home / "reference.safetensors", extractor)
    facts = {"epochs": 3, "minutes": 1.5, "device": "cpu", "test_accuracy": 0.75, "parameters": 99}
    (home / "training.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """(output of the whole study with one seed, arguments that lead to it)."""
    output = tmp_path_factory.mktemp("study")
    arguments = ["--models", str(models), "--output", str(output), "--seeds", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "preflight", told("full"))  # 42 searches of six models
        bench_study.main(arguments, BUDGET)
    return output, arguments


@pytest.fixture
def counted(monkeypatch):
    """Names of the units that are measured."""
    names, measure = [], Study._measure

    def counting(self, unit):
        names.append(unit.name)
        measure(self, unit)

    monkeypatch.setattr(Study, "_measure", counting)
    return names


def recorded(output):
    return json.loads((output / "study.json").read_text())


def study_on(models, output, budget=BUDGET):
    return Study(models, output, budget, [0])


def measured(study, *units):
    for unit in units:
        study.of(unit)
    assert study.work() == 0
    return [study.known(unit) for unit in units]


# --- the whole --------------------------------------------------------------------------------------------------------


def test_every_finding_is_measured(whole):
    output, _ = whole
    record = recorded(output)
    assert list(record["findings"]) == [str(n) for n in study_findings.FINDINGS] and len(record["findings"]) == 7
    found = record["findings"]["1"]
    assert set(found["errors"]) == {"small-flow", "small-vp", "large-flow", "large-vp"}
    for model, rows in found["errors"].items():
        adams = ["adams-2"] if model.endswith("flow") else []
        assert list(rows) == [SEARCHED, *adams, "unipc", "heun"]
        assert all(list(row) == ["2", "3"] and row["2"][0]["error"] > 0 for row in rows.values())
    assert set(found["distances"]["large-vp"]) == {SEARCHED, "unipc", "heun", "reference"}
    transfers = record["findings"]["2"]["errors"]["large-flow"]
    assert transfers["large-flow"]["3"] == found["errors"]["large-flow"][SEARCHED]["3"]
    assert transfers["small-flow"]["3"] != transfers["medium-flow"]["3"] != transfers["large-flow"]["3"]
    assert list(record["findings"]["3"]["errors"]["small-vp"]) == [
        f"order {order}, {steps} steps" for order in (1, 2) for steps in (6, 12)
    ]
    assert list(record["findings"]["4"]["errors"]["small-flow"]) == ["2", "4"]
    assert list(record["findings"]["5"]["errors"]["small-vp"]) == ["1", "3", "unipc", "heun"]
    refusal = record["findings"]["6"]["refusals"][0]
    assert refusal["refused"] and "'SOLVER' was searched with beta_" in refusal["line"]
    assert set(record["findings"]["7"]["errors"]["small-vp"]) == set(study_findings.VARIANTS)
    assert list(record["findings"]["7"]["distances"]["small-vp"]["perceptual"]) == ["2"]
    assert {file.name for file in output.glob("*.png")} == {f"study-{n}.png" for n in (1, 3, 4, 5)}
    assert all(Image.open(file).width == 1600 for file in output.glob("*.png"))


def test_longer_teachers_are_nearer_to_the_converged_run(whole):
    for rows in recorded(whole[0])["findings"]["3"]["errors"].values():
        teacher = {name: row["teacher"][0]["error"] for name, row in rows.items()}
        assert teacher["order 1, 12 steps"] < teacher["order 1, 6 steps"]
        assert teacher["order 2, 12 steps"] < teacher["order 1, 12 steps"]


def test_only_results_are_left(whole):
    output, _ = whole
    assert not list((output / "searches").iterdir()) and not list((output / "caches").iterdir())


def test_a_second_run_measures_nothing_and_prints_the_same(whole, counted, capsys):
    output, arguments = whole
    before = recorded(output)
    bench_study.main(arguments, BUDGET)
    assert recorded(output) == before and not counted
    text = capsys.readouterr().out
    assert all(block in text for block in bench_study.blocks(before).values())


def test_update_puts_tables_into_the_document(whole, counted, tmp_path, monkeypatch):
    _, arguments = whole
    for folder in ("results", "docs"):
        (tmp_path / "search" / folder).mkdir(parents=True)
    document = tmp_path / "search" / "docs" / "study.md"
    names = ("models", 4, 6)
    document.write_text("".join(f"{n}\n<!-- study-{n} -->\nold\n<!-- /study-{n} -->\n" for n in names) + "end\n")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    update = [*arguments, "--update", "--findings"]
    bench_study.main([*update, "4"], BUDGET)
    assert document.read_text().count("old") == 1  # of 6
    bench_study.main([*update, "6"], BUDGET)
    record = recorded(tmp_path / "search" / "results")
    assert list(record["findings"]) == ["4", "6"] and (tmp_path / "search" / "results" / "study-4.png").exists()
    text = document.read_text()
    for name, block in bench_study.blocks(record).items():
        assert f"<!-- {name} -->\n{block}\n<!-- /{name} -->\n" in text
    assert "old" not in text and text.endswith("end\n")
    with pytest.raises(
        SystemExit, match=r"^search/docs/study.md has 0 lines <!-- study-5 -->; put one where it belongs$"
    ):
        bench_study.main([*update, "5"], BUDGET)
    with pytest.raises(SystemExit, match=r"^study.json holds findings with other budget; give all of --findings$"):
        bench_study.main([*update, "6"], dataclasses.replace(BUDGET, images=9))
    bench_study.main([*update, "4", "6"], dataclasses.replace(BUDGET, images=9))  # nothing is kept of the other
    assert not counted and recorded(tmp_path / "search" / "results")["budget"]["images"] == 9


def test_what_is_at_fault_is_said_in_one_line(models, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"lacks small-flow, .*, classifier; run `python -m tests.study.models`$"):
        bench_study.main(["--models", str(tmp_path)])
    for share in ("2/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            bench_study.main(["--models", str(models), "--share", share])
        assert f"invalid share value: '{share}'" in capsys.readouterr().err


# --- units ------------------------------------------------------------------------------------------------------------


def test_a_killed_study_goes_on(models, tmp_path, counted, monkeypatch):
    arguments = ["--models", str(models), "--output", str(tmp_path), "--seeds", "0", "--findings", "6"]
    write, fit = study_units.write_record, closed_form.fit

    def killed(file, record):
        if file.name.startswith("search-") or len(counted) == 6:
            raise KeyboardInterrupt
        write(file, record)

    monkeypatch.setattr(study_units, "write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        bench_study.main(arguments, BUDGET)
    assert [name.split("-")[0] for name in counted] == ["search"] and any((tmp_path / "searches").iterdir())
    # the search was over but for its record: what it found is taken, not fitted again
    monkeypatch.setattr(study_units, "write_record", lambda *a: killed(*a) if len(counted) == 6 else write(*a))
    monkeypatch.setattr(closed_form, "fit", None)
    with pytest.raises(KeyboardInterrupt):
        bench_study.main(arguments, BUDGET)
    monkeypatch.setattr(study_units, "write_record", write)
    done = {file.stem for file in (tmp_path / "units").glob("*.json")}
    assert done == set(counted[1:5])
    (tmp_path / "units" / f"{counted[2]}.json").write_text("{}")  # damaged
    before = len(counted)
    bench_study.main(arguments, BUDGET)
    again = counted[before:]
    assert counted[2] in again and not set(again) & (done - {counted[2]}) and len(again) == len(set(again))
    monkeypatch.setattr(closed_form, "fit", fit)
    bench_study.main(arguments, BUDGET)
    assert len(counted) == before + len(again)


def test_shares_measure_every_unit_once(models, tmp_path, counted, capsys):
    arguments = ["--models", str(models), "--output", str(tmp_path), "--seeds", "0", "--findings", "6"]
    study = study_on(models, tmp_path)
    bench_study.plan(study, [6])
    wanted = list(study.wanted)
    for k in (1, 0, 2, 1, 0):
        before = len(counted)
        bench_study.main([*arguments, "--share", f"{k}/3"], BUDGET)
        assert {wanted.index(name) % 3 for name in counted[before:]} <= {k}
    assert sorted(counted) == sorted(wanted) and not (tmp_path / "study.json").exists()
    assert "units wait for others" in capsys.readouterr().out
    bench_study.main(arguments, BUDGET)
    assert len(counted) == len(wanted) and (tmp_path / "study.json").exists()


def test_the_variants_of_finding_7_are_searches_of_their_own(models, tmp_path):
    study = study_on(models, tmp_path)
    study_findings.record_7(study)
    made = [unit.facts for unit in study.wanted.values() if unit.kind == "search" and unit.facts["model"] == "small-vp"]
    assert [facts["settings"].get("method", "closed_form") for facts in made] == (
        ["paper"] + ["closed_form"] * 4 + ["gradient"] * 5
    )
    assert [facts["settings"].get("objective") for facts in made][5:] == [
        "terminal", "trajectory", "mixed", "paper", "perceptual"
    ]  # fmt: skip
    assert [facts["settings"]["polish"] for facts in made][1:3] == [0, 1] and made[0]["settings"]["trials"] == 2
    assert made[0]["settings"]["num_generated_samples"] == 4 and made[-1]["settings"]["gradient_calls"] == 1
    assert [facts["nfe"] for facts in made] == [[2, 3]] * 9 + [[2]]


def test_units_are_named_after_all_that_they_depend_on(models, tmp_path):
    study = study_on(models, tmp_path)
    search = study.search("small-flow", 0, [2], {})
    others = [
        study.search("large-flow", 0, [2], {}), study.search("small-flow", 1, [2], {}),
        study.search("small-flow", 0, [3], {}), study.search("small-flow", 0, [2], {"trials": 3}),
        study.search("small-flow", 0, [2], {}, 2.0), study.search("small-flow", 0, [2], {}, (1.5,)),
    ]  # fmt: skip
    assert len({unit.name for unit in (search, *others)}) == 7
    more = study_on(models, tmp_path, dataclasses.replace(BUDGET, test_samples=5))
    finer = study_on(models, tmp_path, dataclasses.replace(BUDGET, reference_steps=25))
    runs = [s.run("small-flow", "unipc", 2) for s in (study, more, finer)]
    runs += [study.run("small-flow", s, 2, guidance=w) for s, w in (("heun", None), ("unipc", 2.0), (search, None))]
    runs += [study.run("small-flow", others[1], 2), study.run("small-flow", "unipc", 3)]
    assert len({unit.name for unit in runs}) == 8
    copy = shutil.copytree(models, tmp_path / "models")
    (copy / "small-flow" / "pipeline" / "training.json").write_text("{}")
    assert study_on(copy, tmp_path).search("small-flow", 0, [2], {}).name != search.name
    assert study_on(copy, tmp_path).search("small-vp", 0, [2], {}).name == study.search("small-vp", 0, [2], {}).name


def test_errors_are_over_the_variance_of_the_reference(models, tmp_path):
    study = study_on(models, tmp_path)
    itself, coarse = (study.run("small-flow", "classical", n) for n in (24, 2))
    found = measured(study, itself, coarse, study.converged("small-flow", BUDGET.guidance))
    comparison, wanted, _ = study.comparisons["small-flow", BUDGET.guidance, None]
    final = comparison.sample(study._runs(comparison, "classical", 2)[0].scheduler, 2).final
    assert found[0]["error"] < 1e-12
    assert found[1]["error"] == pytest.approx(float(((final - wanted) ** 2).mean() / wanted.var()), rel=1e-6)
    assert found[2]["variance"] == pytest.approx(float(wanted.var()), rel=1e-6)
    assert 0 < found[2]["error"] < found[1]["error"]


def test_the_error_of_what_diverges_is_none():
    wanted = torch.zeros(3, 2)
    made = torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    assert error_of(made, wanted, 2.0)["error"] == pytest.approx((1 + 2 + 0) / 3 / 2)
    assert error_of(made / 0, wanted, 2.0) == {"error": None, "interval": None}


def test_calls_are_those_that_are_made(models, tmp_path):
    study = study_on(models, tmp_path)
    runs = [study.run("small-vp", s, 3) for s in ("unipc", "classical")]
    (to,) = measured(study, study.converged("small-vp", BUDGET.guidance))
    sampler = study.comparisons["small-vp", BUDGET.guidance, None][0].lineup.sampler
    assert sampler.network_evaluations == 2 * study.converged("small-vp", BUDGET.guidance).calls and to
    for unit in runs:
        before = sampler.network_evaluations
        measured(study, unit)
        assert sampler.network_evaluations - before == 2 * unit.calls  # guided ones are two
    search = study.search("small-vp", 0, [3], SEARCH)
    (found,) = measured(study, search)
    assert found["network_evaluations"] <= 2 * search.calls < 1.2 * found["network_evaluations"]


def test_adams_and_the_best_spacing(models, tmp_path):
    study = study_on(models, tmp_path)
    adams, stock = (study.run("small-flow", s, 3) for s in ("adams-2", "unipc"))
    found = measured(study, adams, stock)[1]
    comparison, wanted, variance = study.comparisons["small-flow", BUDGET.guidance, None]
    (run,) = study._runs(comparison, "adams-2", 3)
    rows = [w for row in run.scheduler.config.solvers["3"]["coefficients"] for w in row]
    assert rows == pytest.approx([1, -0.5, 1.5, 0, -0.5, 1.5])
    errors = {
        r.spacing: error_of(comparison.sample(r.scheduler, r.steps).final, wanted, variance)["error"]
        for r in comparison.lineup.runs(3)
        if r.name == "unipc"
    }
    best = min((spacing for spacing in errors if errors[spacing] is not None), key=lambda spacing: errors[spacing])
    assert len(errors) > 1 and (found["spacing"], found["error"]) == (best, errors[best])


def test_distances_are_of_images_in_the_features_of_the_classifier(models, tmp_path):
    study = study_on(models, tmp_path)
    (found,) = measured(study, study.distance("small-vp", "classical", 3))
    comparison = study.comparisons["small-vp", BUDGET.guidance, None][0]
    scheduler = study._runs(comparison, "classical", 3)[0].scheduler
    images = comparison.sample(scheduler, 3, range(BUDGET.images)).images
    with torch.no_grad():
        features = study_models.classifier()(images.expand(-1, -1, -1, 3).permute(0, 3, 1, 2) / 255)[0].double().numpy()
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3), dtype=np.uint8))
    real = study_models.classifier()(noise.permute(0, 3, 1, 2) / 255)[0].double().numpy()
    a, b = np.cov(features.T), np.cov(real.T)
    expected = ((features.mean(0) - real.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert found["value"] == pytest.approx(expected, rel=1e-3) and found["name"] == "cifar-classifier"


def test_on_another_schedule_the_network_is_told_the_time_of_equal_noise(models, tmp_path):
    own = DDIMScheduler()
    other = on_schedule(own, "Stable Diffusion")
    retimed, times = Retimed(own, other), torch.tensor([999.0, 500.25, 10.0])
    _, kwargs = retimed(None, (), {"timestep": times, "class_labels": 1})
    assert kwargs["class_labels"] == 1 and kwargs["timestep"].dtype == torch.float32
    for scheduler, t in ((other, times), (own, kwargs["timestep"])):
        alphas = torch.cumprod(1 - scheduler.betas.double(), 0)
        log_ratio = 0.5 * (torch.log1p(-alphas) - alphas.log())
        levels = np.interp(t.numpy(), np.arange(1000), log_ratio.numpy())
        if scheduler is other:
            expected = levels
    np.testing.assert_allclose(levels, expected, atol=1e-4)
    assert (kwargs["timestep"] < times).tolist() == [True, True, False]  # its noise is less at first, then more
    study = study_on(models, tmp_path)
    there = study.run("small-vp", "classical", 2, schedule="Stable Diffusion")
    seen = []
    here, _ = measured(study, study.run("small-vp", "classical", 2), there)
    comparison = study.comparisons["small-vp", BUDGET.guidance, "Stable Diffusion"][0]
    comparison.lineup.sampler.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    scheduler = study._runs(comparison, "classical", 2)[0].scheduler
    comparison.sample(scheduler, 2)
    retimed = Retimed(make_pipe("vp").scheduler, scheduler)
    assert seen == pytest.approx(retimed(None, (), {"timestep": scheduler.timesteps})[1]["timestep"].tolist())
    assert abs(seen[1] - float(scheduler.timesteps[1])) > 10
    assert here != study.known(there)


# --- the rules of the sentences ---------------------------------------------------------------------------------------


def seeds(*values, key="error"):
    return [{key: value, "interval": [0.9, 1.1], "name": "net"} for value in values]


def test_cells():
    assert study_findings.cell([]) == "-"
    assert study_findings.cell(seeds(1.0)) == "1 +- 0.1"
    assert study_findings.cell(seeds(1.0, 2.0, 6.0)) == "3 (1 to 6)"
    assert study_findings.cell(seeds(1.0, None)) == "diverges"


def test_agreement_and_means():
    assert [study_findings.agreement(c) for c in ([True] * 2, [True, False], [False])] == [
        "agrees", "agrees in part", "disagrees"
    ]  # fmt: skip
    assert study_findings.geometric([1, 4]) == pytest.approx(2) and study_findings.geometric([0, 4]) == 0
    assert study_findings.ratio(seeds(1.0, 3.0), seeds(4.0)) == 0.5
    assert study_findings.ratio(seeds(1.0), seeds(None)) == 0


@pytest.mark.parametrize(
    "errors, distances, said",
    [
        ((0.5, 0.5), (2.0, 2.5), "in 2 of 2 cases. Its images are nearer to real ones than the nearest of the others' "
         "in 2 of 2: 1.00 to 1.25 times as far as the model's own in 50 calls, those of the others 1.50 to 2.00 times. "
         "The paper's solvers are ahead at every step count: this agrees in error and agrees in distance."),
        ((0.5, 1.0), (2.0, 9.0), "in 1 of 2 cases. Its images are nearer to real ones than the nearest of the others' "
         "in 1 of 2: 1.00 to 4.50 times as far as the model's own in 50 calls, those of the others 1.50 to 2.00 times. "
         "The paper's solvers are ahead at every step count: this agrees in part in error and agrees in part in "
         "distance."),
        ((2.0, 1.0), (3.0, 4.0), "in 0 of 2 cases. Its images are nearer to real ones than the nearest of the others' "
         "in 0 of 2: 1.50 to 2.00 times as far as the model's own in 50 calls, those of the others 1.50 to 2.00 times. "
         "The paper's solvers are ahead at every step count: this disagrees in error and disagrees in distance."),
    ],
)  # fmt: skip
def test_sentence_1(errors, distances, said):
    def columns(few, many, key="error"):
        return {"5": seeds(few, key=key), "8": seeds(many, key=key)}

    stock = {"unipc": columns(1.0, 1.0), "heun": columns(2.0, None)}
    images = {"unipc": columns(3.0, 4.0, "value"), "reference": {"50": seeds(2.0, key="value")}}
    record = {
        "errors": {"small-flow": {SEARCHED: columns(*errors), **stock}},
        "distances": {"small-flow": {SEARCHED: columns(*distances, "value"), **images}},
        "converged": {"small-flow": {"error": 1e-7}},
    }  # fmt: skip
    sentence = study_findings.sentence_1(record)
    assert sentence.endswith(said)
    low, high = sorted(errors)
    assert (
        f"has {(low * high) ** 0.5:.2g} times the error of the best of the others (geometric mean; from {low:.2g} to"
        in sentence
    )
    assert "| unipc | 1 +- 0.1 | 1 +- 0.1 |" in study_findings.table_1(record)
    assert "| small-flow, NFE, Frechet distance (net) | 5 | 8 | 50 |" in study_findings.table_1(record)
    assert "half of their steps: 1e-07 to 1e-07" in study_findings.table_1(record)


@pytest.mark.parametrize(
    "up, down, distance, said",
    [
        (1.0, 2.0, 1.2, "1.00 times the error and 1.20 times the distance of one searched there; the other way round "
         "2.00 times the error. The paper's are as good or better from small to large: this agrees in error and "
         "disagrees in distance"),
        (1.04, 0.5, 1.04, "the other way round 0.50 times the error. The paper's are as good or better from small to "
         "large: this agrees in error and agrees in distance"),
        (1.06, 1.0, 0.5, "this disagrees in error and agrees in distance"),
    ],
)  # fmt: skip
def test_sentence_2(up, down, distance, said):
    def rows(small, medium, large, key="error"):
        return {
            f"{s}-vp": {"5": seeds(v, key=key)} for s, v in zip(study_models.SIZES, (small, medium, large), strict=True)
        }

    record = {
        "errors": {"small-vp": rows(2.0, 7.0, 2.0 * down), "medium-vp": rows(9.0, 9.0, 9.0),
                   "large-vp": rows(3.0 * up, 7.0, 3.0)},
        "distances": {"large-vp": rows(distance, 1.0, 1.0, "value")},
    }  # fmt: skip
    assert said in study_findings.sentence_2(record)
    assert "| searched on, by rows; run on large-vp, NFE | 5 |" in study_findings.table_2(record)


@pytest.mark.parametrize(
    "few, many, said",
    [(1.0, 3.0, "agrees."), (2.0, 3.0, "agrees in part."), (1.0, 1.0, "agrees in part."), (2.0, 1.0, "disagrees.")],
)
def test_sentence_3(few, many, said):
    def row(*errors):
        return {"teacher": seeds(0.1), "5": seeds(errors[0]), "8": seeds(errors[1])}

    record = {"errors": {"small-vp": {
        "order 1, 25 steps": row(few, many), "order 1, 50 steps": row(7.0, 7.0), "order 1, 200 steps": row(1.0, 1.0),
        "order 3, 25 steps": row(1.5, 2.5), "order 3, 50 steps": row(7.0, 7.0), "order 3, 200 steps": row(1.0, 1.0),
    }}}  # fmt: skip
    sentence = study_findings.sentence_3(record)
    assert sentence.endswith(f"this {said}")
    assert sentence.startswith("From 25 to 200 steps of the teacher the error falls by these factors at 5 and 8 calls:")
    assert f"order 1: {few:.2f} and {many:.2f}, order 3: 1.50 and 2.50." in sentence
    assert bench_study.by_teacher(record)["small-vp, 8 calls"]["order 1"] == [(25, [many]), (50, [7.0]), (200, [1.0])]


@pytest.mark.parametrize(
    "errors, said",
    [
        ((4.0, 1.04, 1.0), "the error is 0.25 times that with 32, and with 512 it is within 5% of the best. The "
         "paper's search saturates, near 20 000 to 30 000 samples: this agrees, with far fewer."),
        ((4.0, 2.0, 1.0), "0.25 times that with 32, and it is still falling. The paper's search saturates, near 20 000 "
         "to 30 000 samples: this disagrees."),
        ((1.0, 3.0, 2.0), "2.00 times that with 32, and with 32 it is"),
    ],
)  # fmt: skip
def test_sentence_4(errors, said):
    rows = {k: {"8": seeds(e)} for k, e in zip(("32", "512", "4096"), errors, strict=True)}
    record = {
        "errors": {"small-flow": rows, "small-vp": {k: {"8": seeds(2 * e)} for k, e in zip(rows, errors, strict=True)}}
    }
    assert said in study_findings.sentence_4(record)
    assert bench_study.by_row(record)["small-vp, 8 calls"][SEARCHED][2] == (4096.0, [2 * errors[2]])


@pytest.mark.parametrize("away, said", [(3.0, "agrees."), (1.0, "disagrees.")])
def test_sentence_5(away, said):
    rows = {"1": {"1": seeds(1.0), "5": seeds(6.0 * away)}, "5": {"1": seeds(2.5), "5": seeds(6.0)},
            "unipc": {"1": seeds(9.0), "5": seeds(9.0)}}  # fmt: skip
    sentence = study_findings.sentence_5({"nfe": 5, "errors": {"small-vp": rows}})
    assert (
        sentence.endswith(said) and f"has {away:.2f} times the error of one searched there, and 2.50 times" in sentence
    )
    assert "at guidance 1 and run at 5" in sentence


@pytest.mark.parametrize(
    "other, refused, said", [(1.5, True, "agrees."), (0.5, True, "disagrees."), (1.0, False, "agrees.")]
)
def test_sentence_6(other, refused, said):
    def rows(error):
        return {SEARCHED: {"5": seeds(error, error)}, "classical": {"5": seeds(1.0)}, "unipc": {"5": seeds(0.5)}}

    refusals = [{"refused": refused, "line": "no" if refused else ""}, {"refused": True, "line": "no"}]
    record = {"model": "small-vp", "errors": {"its own": rows(0.25), "scaled": rows(other)}, "refusals": refusals}
    sentence = study_findings.sentence_6(record)
    assert sentence.endswith(f"this {said}") and f"refused {1 + refused} of 2" in sentence
    assert "has 0.25 times the error of classical rows and 0.5 times that of the best of the others." in sentence
    assert f"onto the other schedule by hand it has {other:.2g} and {2 * other:.2g} times;" in sentence
    text = study_findings.table_6(record)
    assert "| small-vp on its own betas, NFE | 5 |" in text and text.endswith("\nThe loader: `no`\n")


@pytest.mark.parametrize(
    "polish, mixed, said",
    [
        (2.0, 1.0, "agrees in parametrisation and agrees in objective"),
        (0.96, 0.96, "agrees in parametrisation and agrees in objective"),
        (0.5, 2.0, "disagrees in parametrisation and agrees in objective"),
        (2.0, 0.5, "agrees in parametrisation and disagrees in objective"),
    ],
)
def test_sentence_7(polish, mixed, said):
    values = dict.fromkeys(study_findings.VARIANTS, 3.0) | {
        "recipe": 1.0, "polish": polish, "paper": 2.0, "mixed": 2 * mixed, "terminal": 8.0, "trajectory": 6.0
    }  # fmt: skip
    rows = {name: {"5": seeds(v)} | ({} if name == "perceptual" else {"8": seeds(v)}) for name, v in values.items()}
    images = {name: {n: seeds(2 * f[0]["error"], key="value") for n, f in row.items()} for name, row in rows.items()}
    record = {"generated": 512, "errors": {"small-vp": rows}, "distances": {"small-vp": images}}
    sentence = study_findings.sentence_7(record)
    assert said in sentence and f"have {polish:.2f} times the error" in sentence and "(512 of its 50 000" in sentence
    assert f"(`mixed`), at {mixed:.2f} times the error that the paper's" in sentence
    assert "at 5 calls by `perceptual` at 0.38 times the error and 0.38 times the distance of `terminal`" in sentence
    assert "| closed form, polish | " in study_findings.table_7(record)


def test_curves_leave_out_what_diverges():
    record = {"errors": {"small-vp": {SEARCHED: {"5": seeds(1.0, 2.0), "8": seeds(0.5, 0.25)},
                                      "heun": {"5": seeds(None), "8": seeds(3.0)}}}}  # fmt: skip
    figure = bench_study.curves(bench_study.by_column(record), "x", False)
    searched, heun = figure.axes[0].lines
    assert list(searched.get_ydata()) == [1.5, 0.375] and list(heun.get_xdata()) == [8.0]
    assert figure.axes[0].get_yscale() == "log" and searched.get_linewidth() > heun.get_linewidth()


def test_curves_over_guidance_say_what_was_searched_where():
    row = {"1": seeds(1.0), "5": seeds(2.0)}
    record = {"nfe": 5, "errors": {"small-vp": {"1": row, "5": row, "unipc": row}}}
    [lines] = bench_study.by_guidance(record).values()
    assert list(lines) == ["searched at 1", "searched at 5", "unipc"]
    lines = {SEARCHED: lines["unipc"], **lines}
    widths = [line.get_linewidth() for line in bench_study.curves({"a": lines}, "x", False).axes[0].lines]
    assert widths[0] > widths[1] == widths[2] == widths[3]


@pytest.mark.parametrize("name", ["scheduler", "searched at guidance", "s"])
def test_curves_have_labels_that_can_be_read(name):
    """However many and long they are, none is cut off; an axis over less than a decade has more than one number."""
    panels = {"a": {f"{name} {k}": [(5.0, [6.6e-3]), (8.0, [1.7e-2])] for k in range(9)}}
    figure = bench_study.curves(panels, "x", False)
    figure.draw_without_rendering()
    (width, height), (legend,) = figure.canvas.get_width_height(), figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= width and box.y1 <= height
    axis, (low, high) = figure.axes[0].yaxis, figure.axes[0].get_ylim()
    ticks = [t for t in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if low <= t.get_loc() <= high]
    assert sum(bool(tick.label1.get_text()) for tick in ticks) > 1


# --- the models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", study_models.SIZES)
def test_flops_are_as_told(size):
    width, depth, heads = study_models.SIZES[size]
    args = ["--path", "flow", "--dataset_name", "x", "--output_dir", "x", "--num_channels", str(study_models.CHANNELS)]
    args += ["--width", str(width), "--depth", str(depth), "--num_heads", str(heads), "--patch_size", "4"]
    args += ["--resolution", str(study_models.RESOLUTION)]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = train.build_network(train.parse_args(args), 10)
        network(torch.zeros(1, 3, 16, 16), timestep=torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.long))
    assert counter.get_total_flops() / 1e6 == pytest.approx(study_models.MFLOP[size], rel=0.01)
    assert f"{study_models.MFLOP[size]:g}" in study_models.__doc__


def test_training_makes_all_that_the_study_takes(tmp_path, monkeypatch):
    """Of colour images in parquet files, of which the classifier sees the colour."""
    features = Features({"img": ImageColumn(), "label": ClassLabel(names=[str(k) for k in range(10)])})
    for split, count in (("train", 60), ("test", 40)):
        arrays = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        rows = {"img": [Image.fromarray(a) for a in arrays], "label": [k % 10 for k in range(count)]}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    monkeypatch.setattr(study_models, "SIZES", {"small": (16, 1, 2), "large": (32, 1, 2)})
    classify = classifier.main
    monkeypatch.setattr(classifier, "main", lambda argv: classify([*argv, "--epochs", "1", "--train_batch_size", "30"]))
    models = tmp_path / "models"
    arguments = ["--models", str(models), "--dataset_name", "parquet", "--data_files", str(tmp_path / "train.parquet")]
    arguments += ["--test_files", str(tmp_path / "test.parquet"), "--max_train_steps", "2", "--train_batch_size", "4"]
    assert len(study_models.missing(models)) == 5
    study_models.main([*arguments, "--only", "large-vp", "classifier"])
    assert study_models.missing(models) == ["small-flow", "small-vp", "large-flow"]
    study_models.main(arguments)
    assert not study_models.missing(models)
    assert (models / "large-vp" / "samples.png").exists()
    with pytest.raises(SystemExit):
        classifier.parse_args(["--output_dir", "somewhere"])  # of no data
    facts = study_models.facts(models)
    assert facts["large-vp"]["steps"] == 2 and facts["large-vp"]["path"] == "vp" and facts["classifier"]["epochs"] == 1
    config = json.loads((models / "large-vp" / "pipeline" / "transformer" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"], config["patch_size"], config["num_layers"]) == (3, 16, 4, 1)
    monkeypatch.setattr(train, "main", None)
    monkeypatch.setattr(classifier, "main", None)
    study_models.main(arguments)  # all is there
    monkeypatch.setenv(study_models.WHERE, str(models))
    network = study_models.classifier()
    assert (network.name, network.channels, network.size) == ("cifar-classifier", 3, 16)
    red, blue = torch.zeros(2, 1, 3, 16, 16)
    red[:, 0], blue[:, 2] = 1, 1
    assert not torch.allclose(network(red)[0], network(blue)[0])
    study = study_on(models, tmp_path / "out")
    assert measured(study, study.distance("small-flow", "classical", 2))[0]["value"] > 0
    with pytest.raises(SystemExit):
        study_models.main([*arguments[:6]])


# --- the measured ones ------------------------------------------------------------------------------------------------


def test_the_tables_are_the_measured_ones():
    """Each finding stands in its document as study.json has it, made with the budget and seeds of `make study`."""
    record = documents.record("study")
    assert list(record["findings"]) == [str(n) for n in study_findings.FINDINGS] and record["seeds"] == [0, 1, 2]
    for name, block in bench_study.blocks(record).items():
        assert documents.block(name) == block
    assert record["budget"] == json.loads(json.dumps(dataclasses.asdict(Budget())))
    text = (documents.ROOT / "search" / "docs" / "study.md").read_text(encoding="utf-8")
    assert all(f"(../results/study-{n}.png)" in text for n in bench_study.PLOTS)
