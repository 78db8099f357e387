"""A whole small search on a device without float64, as Apple's MPS has none, finds what it finds on the CPU."""

from __future__ import annotations

import json
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from dssolver_search.cli import main
from dssolver_search.pipeline import model
from dssolver_search.pipeline.loading import freeze
from tests.families import make_pipe
from tests.problems import Metal
from tests.searches import CLOSED_FORM, PAPER, arguments, search, without_clock

SMALL = {
    **CLOSED_FORM, "nfe": [2], "fill_nfe": [2, 3], "trials": 1, "starts": 1, "num_train_samples": 2,
    "num_validation_samples": 1, "num_trial_samples": 2, "teacher_steps": 6,
}  # fmt: skip
METHODS = {
    "closed_form": SMALL,
    "gradient": {**SMALL, "method": "gradient", "gradient_calls": 2, "polish": 0, "fill_nfe": []},
    "paper": {**PAPER, "nfe": [2], "num_generated_samples": 4, "reference_steps": 4, "teacher_steps": 6},
}


@contextmanager
def on(device):
    """Processes of the commands are on this device, and so is the model that they load."""
    pipe = freeze(make_pipe("vp")).to(device)
    with (
        mock.patch.object(Accelerator, "device", torch.device(device)),
        mock.patch.object(model, "load_pipeline", return_value=pipe),
        sdpa_kernel(SDPBackend.MATH),  # of which no device has one of its own
    ):
        yield


def searched(folder, settings):
    search("vp", folder, settings)
    return without_clock(json.loads((folder / "search_state.json").read_text()))["solvers"]


@pytest.mark.parametrize("method", METHODS)
def test_a_search_needs_no_float64_on_its_device(method, tmp_path):
    with on("cpu"):
        wanted = searched(tmp_path / "cpu", METHODS[method])
    with Metal(), on(Metal.device):
        assert searched(tmp_path / "metal", METHODS[method]) == wanted


def test_a_comparison_needs_no_float64_on_its_device(tmp_path):
    def compared(folder):
        options = {"nfe": [2], "num_samples": 2, "reference_steps": 6, "schedulers": ["dpmpp_2m"], "num_pictures": 1}
        main(["compare", *arguments({"pretrained_model_name_or_path": "vp", "output_dir": folder, **options})])
        results = json.loads((folder / "comparison.json").read_text())["results"]
        return [{key: value for key, value in result.items() if "second" not in key} for result in results]

    with on("cpu"):
        wanted = compared(tmp_path / "cpu")
    with Metal(), on(Metal.device):
        assert compared(tmp_path / "metal") == wanted
