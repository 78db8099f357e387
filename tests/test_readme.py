"""Every block of the README is executed: Python as it stands, commands with smaller settings appended."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file

from diffusers_dssolver import DSSolverScheduler, published_solvers
from diffusers_dssolver.pipelines import SiTPipeline
from diffusers_dssolver.published import published_config
from dssolver_search.cli import main
from tests import documents
from tests.pipelines import conformance
from tests.pipelines.zoo import ZOO, make_dit, make_vae

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "search": "--nfe 5 8 --trials 2 --starts 1 --polish 0 --num_train_samples 2 --num_trial_samples 2 "
    "--num_validation_samples 2 --teacher_steps 9 --fill_nfe",
    "compare": "--nfe 5 8 --num_samples 2 --reference_steps 8 --schedulers euler",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_block_is_known():
    """A new kind of block needs a way to be executed."""
    assert README.count("```") == 2 * (len(blocks("python")) + len(blocks("bash")))
    assert len(README.splitlines()) <= 120
    assert len(blocks("python")) == 3
    assert len(blocks("bash")) == 5


def test_a_published_solver_as_written(monkeypatch):
    pipe = make_dit()
    monkeypatch.setattr(DiTPipeline, "from_pretrained", classmethod(lambda cls, name, **kwargs: pipe))
    scope: dict = {}
    exec(blocks("python")[1], scope)
    assert pipe.scheduler.config.provenance["model"] == "DiT-XL/2, ImageNet 256x256"
    assert pipe.scheduler.num_inference_steps in pipe.scheduler.tables
    assert scope["image"].size[0] > 0


def test_search_compare_and_use_as_written(tmp_path, monkeypatch, capsys):
    """The three blocks on the embedded model, one after the other, in a folder that looks like a checkout."""
    (tmp_path / "search").mkdir()
    shutil.copytree(ROOT / "search" / "demo" / "flow", tmp_path / "search" / "demo" / "flow")
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(block) for block in blocks("bash") if "dssolver_search" in block]
    assert [command[command.index("dssolver_search") + 1] for command in commands] == ["search", "compare", "convert"]
    for command in commands[:2]:
        name, *arguments = command[command.index("dssolver_search") + 1 :]
        main([name, *arguments, *SMALLER[name].split()])
    printed = capsys.readouterr().out
    assert "network evaluations" in printed
    assert "runs/flow / best *" in printed or "flow / best *" in printed
    assert (tmp_path / "runs" / "compare" / "comparison.png").is_file()
    scope: dict = {}
    exec(blocks("python")[2], scope)
    assert len(scope["images"]) == 2
    assert scope["pipe"].scheduler.tables == (5, 8)


def test_search_from_python_as_written(tmp_path, monkeypatch):
    """On a budget of evaluations in place of minutes."""
    (tmp_path / "search").mkdir()
    shutil.copytree(ROOT / "search" / "demo" / "flow", tmp_path / "search" / "demo" / "flow")
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[0].replace('"5min"', "2500").replace("num_samples=8", "num_samples=2, reference_steps=9")
    scope: dict = {}
    exec(code, scope)
    assert len(scope["images"]) == 2 and 5 in scope["pipe"].scheduler.tables
    assert (tmp_path / "comparison.png").is_file()


def test_convert_as_written(tmp_path, monkeypatch):
    """A tiny checkpoint of the official class under the file's name, a tiny VAE in place of the Hub's."""
    monkeypatch.chdir(tmp_path)
    [command] = [shlex.split(block) for block in blocks("bash") if "convert" in block]
    golden = load_file(ROOT / "tests" / "data" / "golden_sit.safetensors")
    state = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    torch.save(state, command[command.index("--checkpoint") + 1])
    make_vae().save_pretrained("vae")
    main([*command[command.index("convert") :], "--num_heads", "3", "--vae", "vae"])
    pipe = SiTPipeline.from_pretrained("sit")
    pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config)
    assert len(pipe([1, 2], num_inference_steps=5, guidance_channels=3).images) == 2


def test_make_targets_and_install_line_exist():
    given = re.findall(r"^make (.*)$", "".join(blocks("bash")), flags=re.M)
    targets = " ".join(given).split() + re.findall(r"`make ([\w-]+)", README)
    assert {"demo", "test", "lint", "bench"} <= set(targets)
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in set(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
    assert 'name = "diffusers-dssolver"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_table_of_solvers_is_the_truth():
    rows = []
    for name in published_solvers():
        config = published_config(name)
        counts = ", ".join(str(n) for n in sorted(map(int, config["solvers"])))
        rows.append(f"| `{name}` | {config['provenance']['model']} | {counts} |")
    assert README.split("<!-- solvers -->\n")[1].split("\n<!-- /solvers -->")[0].splitlines()[2:] == rows


def test_table_of_pipelines_is_the_last_run():
    results = json.loads(conformance.RESULTS.read_text(encoding="utf-8"))
    assert documents.block("conformance") == conformance.render(results)
    assert list(results["pipelines"]) == list(ZOO)
    assert f"[{len(ZOO)} pipelines](tests/pipelines/README.md)" in README
    assert f"Tested with diffusers {results['diffusers']}." in " ".join(README.split())
    table = (ROOT / documents.FILES["conformance"]).read_text(encoding="utf-8")
    assert f"{len(ZOO)} pipelines of diffusers {results['diffusers']}" in " ".join(table.split())
    assert all(f"| {check} | " in table for check in conformance.CHECKS.values())
