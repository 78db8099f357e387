"""Tables inside documents are what the commands and benchmarks print for the JSON in search/results/."""

from __future__ import annotations

import json
from functools import partial

import pytest

from dssolver_search.images.features import load_extractor
from tests import documents
from tests.bench import search as bench_search
from tests.bench import steps as bench_steps
from tests.families import make_pipe

ELSEWHERE = ("cost", "conformance", "study-")  # compared by the tests of their own


@pytest.mark.parametrize("name", [name for name in documents.FILES if not name.startswith(ELSEWHERE)])
def test_the_tables_are_the_measured_ones(name):
    assert documents.block(name) == documents.MAKERS[name]()


@pytest.mark.parametrize("family", ["flow", "vp", "flow-end", "cifar-end"])
def test_the_distances_are_of_equal_numbers_of_images(family):
    record = documents.record(f"evaluation-{family}")
    assert {r["n"] for r in record["results"]} == {record["settings"]["num_images"]}
    if not family.startswith("cifar"):  # whose classifier is made by `make study`
        classifier = load_extractor("dssolver_search.demo.classifier:load")
        assert (record["extractor"], record["extractor_sha256"]) == (classifier.name, classifier.sha256)


@pytest.mark.parametrize("family", ["flow", "vp", "flow-end"])
def test_the_measurement_is_converged_and_on_equal_terms(family):
    record = documents.record(f"comparison-{family}")
    best = min(r["mse"] for r in record["results"])
    assert record["reference"]["mse_against_half_the_steps"] < 0.1 * best
    assert all(r["calls"] <= r["nfe"] for r in record["results"])
    assert record["settings"]["num_samples"] >= 64


def test_the_measurements_are_whole():
    costs = [(row["family"], row["nfe"]) for row in documents.record("bench-search")["rows"]]
    assert costs == [(family, nfe) for family in bench_search.FAMILIES for nfe in bench_search.NFES]
    assert set(documents.record("ablation")) <= set(bench_search.SETTINGS)
    steps = documents.record("steps")
    assert all(list(found) == [str(n) for n in range(3, 21)] for found in steps.values())
    assert set(steps) == set(documents.record("guidance")) == set(bench_search.FAMILIES)


def test_steps_by_hand(tmp_path, capsys):
    """The best of diffusers is the one with the least error, ours set aside; step counts rise."""
    names = ("default", "all-steps", "deis", "unipc", "euler")
    errors = {10: (0.25, 0.125, 3, 0.5, 0.75), 3: (1, 8, 2, 4, 6)}
    results = [
        {"scheduler": name, "spacing": f"{name}'s", "nfe": nfe, "mse": mse}
        for nfe, row in errors.items()
        for name, mse in zip(names, row, strict=True)
    ]
    for family in bench_search.FAMILIES:
        (tmp_path / family / "compare").mkdir(parents=True)
        (tmp_path / family / "compare" / "comparison.json").write_text(json.dumps({"results": results}))
    bench_steps.main(["--folder", str(tmp_path)])
    ours = {3: "2 deis (deis's) | 1 (0.50) | 8 (4.00)", 10: "0.5 unipc (unipc's) | 0.25 (0.50) | 0.125 (0.25)"}
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [f"| {nfe} | {cells} | {cells} |" for nfe, cells in ours.items()]


def test_summary_and_table_by_hand():
    def point(nfe, stage, evaluations, error):
        return {"nfe": nfe, "stage": stage, "network_evaluations": evaluations, "test_mse": error, "seconds": 60.0}

    def run(method, seed, points):
        return {"family": "vp", "method": method, "seed": seed, "points": points, "teacher": 100}

    runs = []
    for seed, factor in enumerate((1.0, 3.0, 2.0)):
        ours, paper = [], []
        for nfe in bench_search.NFES:
            ours += [point(nfe, "closed_form", 1000, 0.5), point(nfe, "polish", 2000, 0.1 * factor)]
            paper += [point(nfe, "paper", 600, 0.5), point(nfe, "paper", 612, 0.4)]
        runs += [run("closed_form", seed, ours), run("paper", seed, paper)]
    runs += [run("gradient", 0, [point(nfe, "gradient", 9000, 0.05) for nfe in bench_search.NFES])]
    stock = {"vp": {str(n): {"mse": 1.0, "scheduler": "unipc (karras)"} for n in bench_search.NFES}}
    row = bench_search.summary(runs, stock)[0]
    assert row["closed_form"] == pytest.approx([0.1, 0.3, 0.2]) and row["gradient"] == [0.05]
    assert row["paper evaluations, 50 000 samples"] == 100 + 512 * 50_000 / 512
    assert row["evaluations until as good as paper"] == 2000
    text = bench_search.table([row])
    assert "0.2 (0.1 to 0.3)" in text and "| 0.50 | 0.20 |" in text and "| 0.0399 |" in text
    assert "geometric mean 0.20" in text and "`closed_form` 1.0 min" in text
    assert "seeds: `paper` 3, `closed_form` 3, `gradient` 1" in text
    without = bench_search.summary(runs[:-1], stock)
    assert "| - | 2 k | 0.0399 |" in bench_search.table(without) and "gradient" not in without[0]["seconds"]


SMALL = {
    "num_train_samples": 4, "num_trial_samples": 4, "num_validation_samples": 3, "teacher_steps": 20, "trials": 2,
    "polish": 1, "gradient_calls": 2, "reference_steps": 10,
}  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The benchmark on a tiny model, with few of everything."""
    make_pipe("flow").save_pretrained(tmp_path / "flow")
    monkeypatch.setattr(bench_search, "model", lambda family: tmp_path / family)
    real = bench_search.SearchConfig
    monkeypatch.setattr(bench_search, "SearchConfig", lambda **settings: real(**(SMALL | settings)))
    paper = {"num_generated_samples": 8, "train_batch_size": 4, "validation_steps": 1}
    changes = {"NFES": (3, 4), "PAPER": paper, "TEST_SAMPLES": 4, "REFERENCE_STEPS": 30, "ABLATED": (("flow", 3),)}
    for name, value in changes.items():
        monkeypatch.setattr(bench_search, name, value)
    monkeypatch.setattr(bench_search.paper, "teacher_trajectory", bench_search.paper.teacher_trajectory)  # put back
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_the_benchmark_runs_and_goes_on(small, capsys, monkeypatch):
    bench = partial(bench_search.bench, small, families=["flow"], gradient_seeds=1, paper_seeds=1, update=False)
    bench(seeds=[0])
    first = json.loads((small / "bench_search.json").read_text())
    assert [(run["method"], run["seed"]) for run in first["runs"]] == [
        (method, 0) for method in ("closed_form", "gradient", "paper")
    ]
    assert [row["nfe"] for row in first["rows"]] == [3, 4]
    for row in first["rows"]:
        ours, _, paper = ([p for p in run["points"] if p["nfe"] == row["nfe"]] for run in first["runs"])
        # teacher and its estimate: (4 + 3) samples of 20 steps, 4 of 20 and 40; the paper's has no training samples
        assert [first["runs"][k]["teacher"] for k in (0, 2)] == [2 * (7 * 20 + 4 * 60), 2 * (3 * 20 + 4 * 60)]
        assert ours[0]["network_evaluations"] == first["runs"][0]["teacher"] + 2 * 4 * row["nfe"]  # one trial
        per_sample = 2 * (10 + 3 * row["nfe"])
        held_out = 2 * 3 * (1 + 2 * (row["nfe"] - 1))
        assert paper[-1]["network_evaluations"] == first["runs"][2]["teacher"] + 8 * per_sample + held_out
        assert row["closed_form"][0] == next(p for p in ours if p["stage"] == "polish")["test_mse"]
    monkeypatch.setattr(bench_search.Watched, "__call__", None)  # nothing is run again
    bench(seeds=[0])
    assert json.loads((small / "bench_search.json").read_text()) == first
    assert (small / "curves.png").stat().st_size > 1000
    assert bench_search.table(first["rows"]) in capsys.readouterr().out


def test_a_gradient_begins_with_the_closed_form(small):
    """So that one run measures both."""
    test = bench_search.Test("flow", small)
    runs = {m: bench_search.searched("flow", test, small / m, (3, 4), method=m) for m in ("closed_form", "gradient")}
    ours, before = runs["closed_form"], bench_search.before_gradient(runs["gradient"])
    points = [[{**p, "seconds": 0} for p in run["points"]] for run in (ours, before)]
    assert points[0] == points[1] and before["teacher"] == ours["teacher"]
    assert {p["stage"] for p in runs["gradient"]["points"]} == {"closed_form", "polish", "gradient"}


def test_the_ablation_runs(small, capsys, monkeypatch):
    names = ("one start", "no polish", "nodes: Karras", "gradient without polish")
    monkeypatch.setattr(bench_search, "SETTINGS", {name: bench_search.SETTINGS[name] for name in names})
    bench_search.ablation(small, [0], ["flow"], False, False)
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[-4:]] == list(names)
    next(small.glob("ablation-*Karras.json")).unlink()
    monkeypatch.setattr(bench_search.Watched, "__call__", None)  # nothing is run
    bench_search.ablation(small, [0], ["flow"], False, True)
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[-3:]] == [*names[:2], names[3]]
    assert bench_search.ablation_table({"a": {"x": [0.2, 5e3], "y": [1.0, 0.0]}, "b": {"y": [2.0, 1e3]}}).endswith(
        "| a | 0.2 (1.00), 5 k | 1 (1.00), 0 k |\n| b | - | 2 (2.00), 1 k |"
    )


@pytest.mark.parametrize("family", ["flow", "vp"])
@pytest.mark.parametrize("start", ["log-SNR", "karras", "quadratic", "cosine"])
def test_families_of_nodes(start, family):
    nodes = bench_search.nodes_of(start, family, 8)
    assert nodes[0] == pytest.approx(1, abs=1e-12) and nodes[-1] == 0 and (nodes.diff() < 0).all()
    if start == "log-SNR":
        path = bench_search.DSSolverScheduler.from_config(bench_search.load_config(family), solvers="classical").path
        steps = path.lambdas(nodes[1:-1]).diff()
        assert (steps / steps[0] - 1).abs().max() < 0.02
