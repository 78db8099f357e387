"""The `search` command as tests run it: inside the process, with small settings."""

from __future__ import annotations

import json

import pytest

from dssolver_search.cli import main


class Killed(Exception):
    """Stands for the end of a process."""


CLOSED_FORM = {
    "effort": "full", "nfe": [3, 4], "fill_nfe": [3, 5], "trials": 6, "num_train_samples": 4,
    "num_validation_samples": 3, "num_trial_samples": 3, "teacher_steps": 20, "guidance_scale": 1.5, "batch_size": 4,
    "seed": 5, "polish": 1,
    "fill_polish_nfe": 4,
}  # fmt: skip


PAPER = {
    "method": "paper", "nfe": [3], "num_generated_samples": 8, "train_batch_size": 4, "reference_steps": 10,
    "num_validation_samples": 3, "teacher_steps": 20, "guidance_scale": 1.5, "validation_steps": 1,
}  # fmt: skip


def arguments(settings):
    words = []
    for key, value in settings.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def search(model, output, settings=CLOSED_FORM, **changes):
    model_and_output = {"pretrained_model_name_or_path": model, "output_dir": output}
    main(["search", *arguments({**model_and_output, **settings, **changes})])


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(value):
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not k.startswith("seconds")}
    return value


def refused(capsys, command):
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command()
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    [line] = [line for line in captured.err.splitlines() if "error:" in line]
    assert captured.err.splitlines()[-1] == line and "Traceback" not in captured.err
    return line
