"""The tables of search/README.md are what `compare` and `bench_search` print for the JSON beside the models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import bench_search
import pytest

from dssolver_search.compare import Result, table

SEARCH = Path(__file__).resolve().parent.parent / "search"


def measured(family):
    return json.loads((SEARCH / "demo" / f"comparison-{family}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["flow", "vp"])
def test_the_tables_are_the_measured_ones(family):
    record = measured(family)
    results = [Result(**r) for r in record["results"]]
    text = table(results, SimpleNamespace(**record["settings"]), record["reference"]["mse_against_half_the_steps"])
    block = "\n".join(("    " + line).rstrip() for line in text.strip().splitlines())
    readme = (SEARCH / "README.md").read_text(encoding="utf-8")
    assert block in readme, f"put this into search/README.md:\n{block}"


@pytest.mark.parametrize("family", ["flow", "vp"])
def test_the_measurement_is_converged_and_on_equal_terms(family):
    record = measured(family)
    best = min(r["mse"] for r in record["results"])
    assert record["reference"]["mse_against_half_the_steps"] < 0.1 * best
    assert all(r["calls"] <= r["nfe"] for r in record["results"])
    assert record["settings"]["num_samples"] >= 64


def block(name):
    readme = (SEARCH / "README.md").read_text(encoding="utf-8")
    return readme.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_the_costs_are_the_measured_ones():
    record = json.loads((SEARCH / "demo" / "bench-search.json").read_text(encoding="utf-8"))
    assert block("bench") == bench_search.table(record["rows"])
    assert {(row["family"], row["nfe"]) for row in record["rows"]} == {
        (f, n) for f in ("flow", "vp") for n in (5, 6, 8, 10)
    }


def test_the_ablation_is_the_measured_one():
    record = json.loads((SEARCH / "demo" / "ablation.json").read_text(encoding="utf-8"))
    assert block("ablation") == bench_search.ablation_table(record)
    assert set(record) <= set(bench_search.SETTINGS)


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
            if seed == 0:
                ours += [point(nfe, "gradient", 9000, 0.05)]
        runs += [run("gradient" if seed == 0 else "closed_form", seed, ours), run("paper", seed, paper)]
    stock = {"vp": {str(n): {"mse": 1.0, "scheduler": "unipc (karras)"} for n in bench_search.NFES}}
    row = bench_search.summary(runs, stock)[0]
    assert row["closed_form"] == pytest.approx([0.1, 0.3, 0.2]) and row["gradient"] == [0.05]
    assert row["paper evaluations, 50 000 samples"] == 100 + 512 * 50_000 / 512
    assert row["evaluations until as good as paper"] == 2000
    text = bench_search.table([row])
    assert "0.2 (0.1 to 0.3)" in text and "| 0.50 | 0.20 |" in text and "| 0.0399 |" in text
    assert "geometric mean 0.20" in text and "`closed_form` 1.0 min" in text
    assert "seeds: `paper` 3, `closed_form` 3, `gradient` 1" in text
