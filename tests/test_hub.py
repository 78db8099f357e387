"""Solvers on a Hub: pushed, tagged, loaded by name. The Hub is a small server on this machine (`local_hub.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from local_hub import LocalHub

import diffusers_dssolver

PUSH_AND_LOAD = """
from huggingface_hub import HfApi
from diffusers_dssolver import DSSolverScheduler, SolverSpec

def euler(nodes):
    return DSSolverScheduler(prediction_type="flow_prediction", solvers={"3": SolverSpec.euler(nodes).to_dict()})

first, second = euler([1.0, 0.7, 1 / 3, 0.0]), euler([1.0, 0.6, 0.1, 0.0])
first.push_to_hub("user/solver")
HfApi().create_tag("user/solver", tag="v1")
second.push_to_hub("user/solver")
assert set(HfApi().list_repo_files("user/solver")) <= {".gitattributes", "README.md", "scheduler_config.json"}
loaded = {name: DSSolverScheduler.from_pretrained("user/solver", revision=name)._solvers for name in ("main", "v1")}
assert loaded == {"main": second._solvers, "v1": first._solvers}, loaded
assert DSSolverScheduler.from_pretrained("user/solver")._solvers == second._solvers
by_name = DSSolverScheduler.from_config({"shift": 1.0}, solvers="user/solver")
assert by_name._solvers == second._solvers and by_name.config.prediction_type == "flow_prediction"
print("all equal")
"""

LOAD_WHAT_IS_NOT_THERE = """
for load in (
    lambda: DSSolverScheduler.from_pretrained("user/absent"),
    lambda: DSSolverScheduler.from_config({"shift": 1.0}, solvers="user/absent"),
):
    try:
        load()
    except ValueError as error:
        assert isinstance(error, OSError), type(error)
        print(error)
"""


def test_push_tag_load_and_what_is_not_there(tmp_path):
    """In a fresh process, because the Hub's environment variables are read at import."""
    with LocalHub() as hub:
        folder = str(Path(diffusers_dssolver.__file__).parent.parent)
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PUSH_AND_LOAD + LOAD_WHAT_IS_NOT_THERE],
            env={**os.environ, **hub.env(tmp_path), "HF_HUB_OFFLINE": "0", "PYTHONPATH": folder},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr
    pushed, *absent = result.stdout.strip().splitlines()
    assert pushed == "all equal"
    assert len(absent) == 2, result.stdout  # one line for each way of asking
    for line in absent:
        assert line.startswith("no solver could be read from 'user/absent'")
        assert "not a" in line
