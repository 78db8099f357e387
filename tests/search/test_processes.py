"""Several processes find the same solver as one, and none of them hangs.

They are forked and given what a launcher would give them (`forks`), because starting Python takes longer than the
searches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dssolver_search.methods.closed_form import comparable
from dssolver_search.storage import read_record
from tests.search.forks import Forks, free_port
from tests.searches import arguments, without_clock

COMMON = {
    "effort": "full",
    "guidance_scale": 1.5,
    "dtype": "float64",
    "num_validation_samples": 5,
    "teacher_steps": 6,
    "seed": 1,
}
# no number of samples is a multiple of the number of processes; one update leaves a process idle; every process has
# training samples that are no trial samples, else it would save their first calls
SEARCHES = {
    "closed_form": {
        **COMMON, "nfe": [2, 3], "trials": 4, "starts": 2, "polish": 1, "num_train_samples": 8, "num_trial_samples": 4,
        "fill_nfe": [4, 4],
    },
    "paper": {
        **COMMON, "method": "paper", "nfe": [3], "num_generated_samples": 8, "train_batch_size": 2,
        "reference_steps": 5, "validation_steps": 2,
    },
}  # fmt: skip
SEVERAL = 3
TOLERANCE = 1e-12
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


def search_arguments(model, output, method, **changes):
    settings = {"pretrained_model_name_or_path": model, "output_dir": output, **SEARCHES[method], **changes}
    return ["search", *arguments(settings)]


def launch(processes, *command):
    """The end of `accelerate launch`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    launcher += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]  # with --cpu it starts one
    launcher += ["--main_process_port", free_port(), *command]
    run = subprocess.run(list(map(str, launcher)), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    return Forks(tmp_path_factory.mktemp("forks"))


@pytest.fixture(scope="module")
def runs(model, forks, tmp_path_factory):
    """Folder of the results, METHOD-PROCESSES."""
    folder = tmp_path_factory.mktemp("runs")
    for method in SEARCHES:
        for processes in (1, SEVERAL):
            output = folder / f"{method}-{processes}"
            codes, logs = forks.group(processes, search_arguments(model, output, method))
            assert codes == [0] * processes, logs
            (output / "counts").write_text(json.dumps(forks.counts()))
    return folder


def result(folder):
    return json.loads((folder / "scheduler_config.json").read_text())


def farthest(found, wanted):
    """The largest difference of two lists of numbers, relative to the largest of them."""
    assert len(found) == len(wanted)
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / max(map(abs, wanted))


@pytest.mark.parametrize("method", SEARCHES)
def test_several_processes_find_the_same_solver(method, runs):
    one, several = (result(runs / f"{method}-{n}") for n in (1, SEVERAL))
    facts = one["provenance"], several["provenance"]
    assert [f["processes"] for f in facts] == [1, SEVERAL]
    assert facts[0]["network_evaluations"] == facts[1]["network_evaluations"]
    assert facts[0]["results"].keys() == facts[1]["results"].keys() == set("234" if method == "closed_form" else "3")
    for nfe, wanted in facts[0]["results"].items():
        found = facts[1]["results"][nfe]
        assert [found.get(k) for k in ("kind", "warp", "ridge")] == [wanted.get(k) for k in ("kind", "warp", "ridge")]
        for key in ("validation_mse", "classical_mse"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-10)
    for nfe, wanted in one["solvers"].items():
        found = several["solvers"][nfe]
        assert farthest(found["nodes"], wanted["nodes"]) < TOLERANCE
        assert found.keys() == wanted.keys()
        if "timesteps" in wanted:
            assert farthest(found["timesteps"], wanted["timesteps"]) < TOLERANCE
        for row, wanted_row in zip(found["coefficients"], wanted["coefficients"], strict=True):
            assert farthest(row, wanted_row) < TOLERANCE
    if method == "closed_form":
        assert any("timesteps" in solver for solver in one["solvers"].values())  # polished


def test_equals_are_told_apart_by_no_rounding():
    for error in (1.23456789, 4e-7, 3e5):
        assert comparable(error * (1 + 1e-13)) == comparable(error) < comparable(error * (1 + 1e-8))
    assert comparable(float("inf")) == float("inf") and comparable(float("nan")) != comparable(float("nan"))


def test_shares_are_made_once_whatever_the_number_of_processes(runs):
    for method, samples in (("closed_form", 8 + 5), ("paper", 5)):
        names = [sorted(p.name for p in (runs / f"{method}-{n}" / "cache").iterdir()) for n in (1, SEVERAL)]
        assert names[0] == names[1] and len(names[0]) == samples


def test_killed_processes_go_on_to_the_same_bits(model, forks, runs, tmp_path):
    """On the same machine, with the same number of processes and of threads."""
    steps = json.loads((runs / f"closed_form-{SEVERAL}" / "counts").read_text())["step"]
    argv = search_arguments(model, tmp_path, "closed_form")
    codes, _ = forks.group(SEVERAL, argv, ("step", round(0.6 * steps)))
    assert codes[0] == -signal.SIGKILL
    assert not {0, -signal.SIGKILL} & set(codes[1:])  # the others do not wait for ever
    assert list(read_record(tmp_path / "search_state.json")["solvers"]) == ["2"]
    codes, logs = forks.group(SEVERAL, argv)
    assert codes == [0] * SEVERAL, logs
    assert without_clock(result(tmp_path)) == without_clock(result(runs / f"closed_form-{SEVERAL}"))


def test_the_launcher_gives_what_the_forks_are_given():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    printed = launch(2, "--no_python", "sh", "-c", "echo " + " ".join(f"${name}" for name in names))
    ranks = sorted(line.split() for line in printed.splitlines())
    assert [rank[:4] for rank in ranks] == [[str(k), str(k), "2", "127.0.0.1"] for k in range(2)]
    assert len({rank[4] for rank in ranks}) == 1


@pytest.mark.slow
def test_search_under_the_launcher(model, tmp_path):
    launch(2, "-m", "dssolver_search", *search_arguments(model, tmp_path, "paper"))
    assert result(tmp_path)["provenance"]["processes"] == 2


def test_interrupted_processes_end(model, forks, tmp_path):
    """Ctrl-C reaches all of them, at work or waiting for each other: one line, status 130, nobody waits."""

    def interrupt():
        began = time.time()
        while not (tmp_path / "out" / "trials.jsonl").exists() and time.time() - began < 120:
            time.sleep(0.01)
        for pid in forks.pids(2):
            os.kill(pid, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    argv = search_arguments(model, tmp_path / "out", "closed_form", trials=100_000, nfe=[10], teacher_steps=11)
    codes, logs = forks.group(2, argv)
    assert codes == [130, 130], logs
    lines = [line for log in logs for line in log.splitlines() if "interrupted; " in line]
    assert len(lines) == 1 and "the same command goes on" in lines[0]
    assert not any("Traceback" in log for log in logs)
    assert read_record(tmp_path / "out" / "search_state.json")["solvers"] == {}


def test_a_process_without_samples_is_refused(model, forks, tmp_path):
    """In every process alike, so that none waits for the others."""
    argv = search_arguments(model, tmp_path / "out", "closed_form", num_trial_samples=1)
    codes, logs = forks.group(2, argv)
    assert codes == [2, 2] and not (tmp_path / "out").exists()
    assert all("error: 1 trial samples for 2 processes; each needs one" in log for log in logs)


def test_another_search_in_the_folder_is_refused_by_all(model, forks, runs):
    argv = search_arguments(model, runs / f"closed_form-{SEVERAL}", "closed_form", seed=7)
    codes, logs = forks.group(2, argv)
    assert codes == [2, 2] and all("holds another search" in log for log in logs)


@pytest.fixture(scope="module")
def comparisons(model, runs, forks, tmp_path_factory):
    """By number of processes, the folder of a comparison of what was searched."""
    folder = tmp_path_factory.mktemp("comparisons")
    settings = {
        "pretrained_model_name_or_path": model, "guidance_scale": 1.5, "dtype": "float64", "nfe": [2, 3],
        "solver": [runs / "closed_form-1"], "schedulers": ["unipc", "euler"], "num_samples": 7, "reference_steps": 10,
    }  # fmt: skip
    for processes in (1, SEVERAL):
        argv = ["compare", *arguments({**settings, "output_dir": folder / str(processes)})]
        codes, logs = forks.group(processes, argv)
        assert codes == [0] * processes, logs
        assert forks.counts()["after rename"] in (22, 23)  # 22 runs of its batch; and the JSON
    return {n: json.loads((folder / str(n) / "comparison.json").read_text()) for n in (1, SEVERAL)}


def test_several_processes_measure_the_same(comparisons):
    one, several = comparisons[1]["results"], comparisons[SEVERAL]["results"]
    assert len(one) == len(several) == 2 * 3
    for wanted, found in zip(one, several, strict=True):
        assert found["mse"] == pytest.approx(wanted["mse"], rel=1e-4)  # states are kept in float32
        changed = {"seconds", "mse", "psnr", "mse_interval", "image_mse", "image_psnr"}
        assert {k: v for k, v in found.items() if k not in changed} == {
            k: v for k, v in wanted.items() if k not in changed
        }
