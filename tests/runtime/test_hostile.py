"""Real solver files, mutated without mercy: a ValueError that names the fault, or a scheduler that works."""

from __future__ import annotations

import copy
import json
import math
import resource
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffusers_dssolver import DSSolverScheduler, published_solvers
from diffusers_dssolver.published import published_config

MEGABYTE = 2**20
SMALL = {"5": published_config("sit-xl-2-256")["solvers"]["5"], "6": published_config("sit-xl-2-256")["solvers"]["6"]}
EVERYTHING = {
    "_class_name": "DSSolverScheduler",
    "_diffusers_version": "0.42.1",
    "_use_default_values": ["beta_end"],
    "prediction_type": "flow_prediction",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": 0.1,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "searched_shift": {"factor": 2.0, "terminal": None},
    "interpolate_corrections": True,
    "history_length": 3,
    "provenance": {"seed": 0, "results": {"5": {"mse": 0.1}}},
    "solvers": {n: {**table, "timesteps": [1000 * t for t in table["nodes"][:-1]]} for n, table in SMALL.items()},
}
VP = {
    "_class_name": "DSSolverScheduler",
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 2.0,
    "variance_type": "learned_range",
    "solvers": SMALL,
}
STATIC = {**EVERYTHING, "use_dynamic_shifting": False}
FILES = [EVERYTHING, STATIC, VP, {**VP, "trained_betas": [0.01 * (i + 1) for i in range(20)]}]
FILES += [published_config(name) for name in published_solvers()]

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 1e-320, 1e308, -1e308, 10**30, math.nan, math.inf, -math.inf, 0.5, 1 + 1e-7]),
    st.floats(),
    st.integers(-(10**40), 10**40),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "classical", "NaN", "1e3", "\u0665", "5 ", "05", "\x00", "\u202e", "{}", "__class__", "\ud800"]
    ),
    st.text(max_size=8),
)
LEAVES = st.one_of(NUMBERS, TEXTS, st.none(), st.booleans())
VALUES = st.one_of(
    LEAVES,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
        max_leaves=8,
    ),
    st.sampled_from([[], {}, [[]], [0.0] * 2000, list(range(1500)), {str(i): 0 for i in range(2000)}]),
).map(copy.deepcopy)  # a second fault may change what the first put in


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths to every entry of a JSON tree, the longest lists sampled at their ends."""
    found = [path] if path else []
    if isinstance(tree, dict):
        for key in tree:
            found += places(tree[key], (*path, key))
    elif isinstance(tree, list):
        for i in {0, 1, len(tree) // 2, len(tree) - 1} & set(range(len(tree))):
            found += places(tree[i], (*path, i))
    return found


@st.composite
def mutated(draw) -> str:
    """The text of a solver file with one to three faults."""
    tree = copy.deepcopy(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 3))):
        spots = places(tree)
        path = draw(st.sampled_from(spots))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        action = draw(st.sampled_from(["replace", "replace", "nudge", "remove", "double", "rename", "swap"]))
        if action == "remove":
            del parent[key]
        elif action == "nudge" and isinstance(parent[key], (int, float)):
            parent[key] = parent[key] * draw(st.sampled_from([-1, 1 + 1e-9, 1.01, 2, 1e12]))
        elif action == "double" and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif action == "rename" and isinstance(parent, dict):
            parent[draw(TEXTS)] = parent.pop(key)
        elif action == "swap" and isinstance(parent, list):
            parent[0], parent[key] = parent[key], parent[0]
        else:
            parent[key] = draw(VALUES)
        if not places(tree):
            break
    text = json.dumps(tree)
    if draw(st.integers(0, 9)) == 0:  # a key twice: the last one counts in JSON
        key = draw(st.sampled_from(["solvers", "shift", "prediction_type"]))
        text = text[:-1] + f', "{key}": {json.dumps(draw(VALUES))}}}'
    return text


def load(text: str | bytes) -> DSSolverScheduler:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scheduler_config.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return DSSolverScheduler.from_pretrained(folder)


def use(scheduler: DSSolverScheduler, nfe: int) -> None:
    """A whole run, with the numbers that such a scheduler promises."""
    scheduler.set_timesteps(nfe, mu=0.5 if scheduler.config["use_flow_sigmas"] else None)
    assert len(scheduler.timesteps) == nfe
    assert scheduler.timesteps.isfinite().all()
    assert scheduler.sigmas.isfinite().all()
    x = torch.ones(1, 2, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
    assert x.shape == (1, 2, 2, 2)


def check(text: str | bytes) -> DSSolverScheduler | None:
    """Load and use; the process must not grow by 100 MB, and a ValueError must say what is wrong."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        scheduler = load(text)
        for nfe in (1, 5, 7):
            use(scheduler, nfe)
        told = None
    except ValueError as error:
        scheduler, told = None, str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # in kilobytes
    assert told is None or 10 < len(told) < 2000
    return scheduler


@pytest.mark.parametrize("config", FILES, ids=range(len(FILES)))
def test_the_files_that_are_mutated_work(config):
    assert check(json.dumps(config)) is not None


@settings(deadline=10_000, max_examples=400, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_a_mutated_file_is_refused_or_works(text):
    check(text)


@settings(deadline=10_000, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(FILES), st.data())
def test_damaged_text_is_refused_or_works(config, data):
    text = json.dumps(config).encode()
    start = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 40))
    check(text[:start] + data.draw(st.binary(max_size=12)) + text[start + length :])


@settings(deadline=10_000, max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(STATIC | VP)), VALUES)
@example("_class_name", ["a", 1])
@example("shift", -1.0)
@example("_class_name", "configuration_utils")
@example("_use_default_values", 5)
@example("solvers", "dit-xl-2-256")  # a file cannot have another one loaded
def test_a_refusal_names_the_key(key, value):
    told = key
    try:
        load(json.dumps({**(STATIC if key in STATIC else VP), key: value}))
    except ValueError as error:
        told = str(error)
    assert key in told or key == "prediction_type"  # which decides what other keys may say


MANY = 200_000
HUGE = {
    "a million steps": json.dumps({**EVERYTHING, "solvers": {"1000000": {"nodes": [1, 0], "coefficients": [[1]]}}}),
    "many nodes": '{"solvers": {"8": {"nodes": [' + "0.5," * MANY + '0], "coefficients": []}}}',
    "many rows": '{"solvers": {"8": {"nodes": [1, 0], "coefficients": [' + "[]," * MANY + "[]]}}}",
    "a long row": '{"solvers": {"1": {"nodes": [1, 0], "coefficients": [[' + "0," * MANY + "1]]}}}",
    "a million timesteps": json.dumps({**EVERYTHING, "num_train_timesteps": 10**6}),
    "many betas": '{"trained_betas": [' + "0.1," * MANY + "0.1]}",
    "two thousand tables": json.dumps({**VP, "solvers": {str(i): SMALL["5"] for i in range(2_000)}}),
    "deep lists": '{"solvers": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep dicts": '{"solvers": ' + '{"5":' * 50_000 + "1" + "}" * 50_000 + "}",
    "deep provenance": '{"provenance": ' + "[" * 900 + "]" * 900 + ', "solvers": {"5": {}}}',
    "a number of a million digits": '{"shift": ' + "9" * 10**6 + "}",
    "an exponent": '{"prediction_type": "flow_prediction", "solvers": "classical", "shift": 1e999999}',
    "a list": "[1, 2]",
    "nothing": "",
    "a number": "5",
    "null": "null",
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_and_deep_files_are_refused_in_bounded_memory(name):
    """17 bytes for a byte of text, most of which json takes for the parsed numbers."""
    assert len(HUGE[name]) < 1.2 * MEGABYTE
    tracemalloc.start()
    try:
        assert check(HUGE[name]) is None
        assert tracemalloc.get_traced_memory()[1] < 20 * MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shift", [0, -1.0, math.inf, 1e300, "3", None, True])
def test_a_senseless_shift_is_refused(shift):
    with pytest.raises(ValueError, match="shift is"):
        load(json.dumps({**STATIC, "shift": shift}))


def test_a_key_twice_is_its_last_value():
    text = json.dumps(EVERYTHING)[:-1] + ', "shift": 2.0}'
    assert load(text).config.shift == 2.0


def test_noise_schedule_of_a_hostile_artefact_is_checked_before_it_is_compared(tmp_path):
    model = DSSolverScheduler(prediction_type="flow_prediction").config
    for fault in ({"solvers": {"5": 3}}, {"solvers": 7}, {"searched_shift": "x"}, {"solvers": "classical"}):
        (tmp_path / "scheduler_config.json").write_text(json.dumps({**EVERYTHING, **fault}))
        with pytest.raises(ValueError, match=next(iter(fault))):
            DSSolverScheduler.from_config(model, solvers=str(tmp_path))
