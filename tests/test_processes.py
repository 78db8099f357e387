"""The README's `accelerate launch` with two real processes finds what one process finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from test_search import arguments, make_pipe

SETTINGS = {
    "guidance_scale": 1.5, "nfe": [3], "trials": 5, "num_train_samples": 5, "num_trial_samples": 4,
    "num_validation_samples": 3, "teacher_steps": 20, "fill_nfe": [4, 4],
}  # fmt: skip


def launch(processes, model, output):
    several = ["--multi_gpu"] if processes > 1 else []  # with --cpu accelerate starts one process, whatever the number
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "dssolver_search"]
    settings = {"pretrained_model_name_or_path": model, "output_dir": output, **SETTINGS}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "search", *arguments(settings)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((output / "scheduler_config.json").read_text())


def test_two_processes_find_what_one_finds(tmp_path):
    make_pipe("flow").save_pretrained(tmp_path / "model")
    one, two = (launch(n, tmp_path / "model", tmp_path / f"by{n}") for n in (1, 2))
    facts = one["provenance"], two["provenance"]
    assert [f["processes"] for f in facts] == [1, 2]
    assert facts[0]["network_evaluations"] == facts[1]["network_evaluations"]
    for nfe, result in facts[0]["results"].items():
        assert facts[1]["results"][nfe]["validation_mse"] == pytest.approx(result["validation_mse"], rel=1e-3)
    for nfe, solver in one["solvers"].items():
        assert two["solvers"][nfe]["nodes"] == pytest.approx(solver["nodes"], abs=1e-3)
        for a, b in zip(two["solvers"][nfe]["coefficients"], solver["coefficients"], strict=True):
            assert a == pytest.approx(b, abs=1e-2)
