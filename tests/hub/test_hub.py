"""Solvers on a Hub: pushed, tagged, loaded by name. The Hub is a small server on this machine (`local_hub.py`)."""

from __future__ import annotations

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, snapshot_download

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from tests.pipelines.zoo import make_dit

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


def euler(nodes):
    return DSSolverScheduler(prediction_type="flow_prediction", solvers={"3": SolverSpec.euler(nodes).to_dict()})


def test_push_tag_load(hub):
    first, second = euler([1.0, 0.7, 1 / 3, 0.0]), euler([1.0, 0.6, 0.1, 0.0])
    first.push_to_hub("user/solver")
    HfApi().create_tag("user/solver", tag="v1")
    second.push_to_hub("user/solver")
    assert set(HfApi().list_repo_files("user/solver")) <= {".gitattributes", "README.md", "scheduler_config.json"}
    for revision, pushed in (("main", second), ("v1", first), (None, second)):
        assert DSSolverScheduler.from_pretrained("user/solver", revision=revision).solvers == pushed.solvers
    by_name = DSSolverScheduler.from_config({"shift": 1.0}, solvers="user/solver")
    assert by_name.solvers == second.solvers and by_name.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    "load",
    [
        lambda: DSSolverScheduler.from_pretrained("user/absent"),
        lambda: DSSolverScheduler.from_config({"shift": 1.0}, solvers="user/absent"),
    ],
)
def test_what_is_not_there(hub, load):
    with pytest.raises(ValueError, match=r"^no solver could be read from 'user/absent'.*not a") as told:
        load()
    assert isinstance(told.value, OSError) and "\n" not in str(told.value)


def test_a_saved_pipeline_comes_back_from_the_hub(hub, tmp_path):
    """In the two ways that the README names; by its Hub id diffusers refuses any scheduler from another package."""
    pipe = make_dit()
    pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.push_to_hub("user/solver")
    pipe.save_pretrained(tmp_path)
    HfApi().create_repo("user/pipeline")
    HfApi().upload_folder(folder_path=tmp_path, repo_id="user/pipeline")
    pipe = DiffusionPipeline.from_pretrained(snapshot_download("user/pipeline"))
    for scheduler in (pipe.scheduler, DSSolverScheduler.from_pretrained("user/solver")):
        assert type(scheduler) is DSSolverScheduler and scheduler.tables == (5, 6, 7, 8, 9, 10)
