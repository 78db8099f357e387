"""Solvers on a Hub: pushed, tagged, loaded by name. The Hub is a small server on this machine (`local_hub.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import diffusers_dssolver
from tests.hub.local_hub import LocalHub

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
loaded = {name: DSSolverScheduler.from_pretrained("user/solver", revision=name).solvers for name in ("main", "v1")}
assert loaded == {"main": second.solvers, "v1": first.solvers}, loaded
assert DSSolverScheduler.from_pretrained("user/solver").solvers == second.solvers
by_name = DSSolverScheduler.from_config({"shift": 1.0}, solvers="user/solver")
assert by_name.solvers == second.solvers and by_name.config.prediction_type == "flow_prediction"
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


SAVE_A_PIPELINE = """
from huggingface_hub import HfApi
from tests.pipelines.zoo import make_dit
from diffusers_dssolver import DSSolverScheduler

pipe = make_dit()
pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config)
pipe.scheduler.push_to_hub("user/solver")
pipe.save_pretrained("pipeline")
HfApi().create_repo("user/pipeline")
HfApi().upload_folder(folder_path="pipeline", repo_id="user/pipeline")
"""

LOAD_IT_ELSEWHERE = """
from diffusers import DiffusionPipeline
from diffusers_dssolver import DSSolverScheduler
from huggingface_hub import snapshot_download

pipe = DiffusionPipeline.from_pretrained(snapshot_download("user/pipeline"))
print(type(pipe.scheduler).__name__, pipe.scheduler.tables)
pipe.scheduler = DSSolverScheduler.from_pretrained("user/solver")
print(type(pipe.scheduler).__name__, pipe.scheduler.tables)
"""


def fresh(code: str, hub: LocalHub, folder: Path) -> str:
    """What this code prints in a fresh process, because the Hub's environment variables are read at import."""
    paths = [Path(diffusers_dssolver.__file__).parent.parent, Path(__file__).parent]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **hub.env(folder), "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_push_tag_load_and_what_is_not_there(tmp_path):
    with LocalHub() as hub:
        pushed, *absent = fresh(PUSH_AND_LOAD + LOAD_WHAT_IS_NOT_THERE, hub, tmp_path).strip().splitlines()
    assert pushed == "all equal"
    assert len(absent) == 2  # one line for each way of asking
    for line in absent:
        assert line.startswith("no solver could be read from 'user/absent'")
        assert "not a" in line


def test_a_saved_pipeline_comes_back_from_the_hub(tmp_path):
    """In the two ways that the README names; by its Hub id diffusers refuses any scheduler from another package."""
    with LocalHub() as hub:
        fresh(SAVE_A_PIPELINE, hub, tmp_path)
        printed = fresh(LOAD_IT_ELSEWHERE, hub, tmp_path)
    assert printed.splitlines() == ["DSSolverScheduler (5, 6, 7, 8, 9, 10)"] * 2
