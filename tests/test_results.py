"""The tables of search/README.md are what `compare` prints for the measured JSON beside the models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

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
