"""Offline, one thread, strict: what must hold before any test module is imported; and who runs what, of two workers."""

from __future__ import annotations

import os
import sys
from importlib.util import spec_from_file_location
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: a second thread only waits for the first

ROOT = Path(__file__).resolve().parent.parent


class SearchFromCheckout:
    """Finds `dssolver_search` in `search/`, as the package-dir mapping of an installation does."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        init = ROOT / "search" / "__init__.py"
        if name != "dssolver_search" or not init.is_file():
            return None
        return spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])


sys.path.insert(0, str(ROOT))
sys.meta_path.insert(0, SearchFromCheckout)  # the checkout, whatever is installed

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("repository", deadline=None, database=None, max_examples=60, derandomize=True)
settings.load_profile("repository")

# Files that take longest, the longest first: the second worker then does not wait for the last of them.
LONGEST = (
    "test_processes", "test_never_lost", "test_study", "test_search", "test_conformance", "test_readme",
    "test_evaluate", "test_results",
)  # fmt: skip
SEVERAL_PROCESSES = ("test_processes", "test_never_lost")  # one worker's: more processes at a time only wait


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow (or set RUN_SLOW=1)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes long; runs only with --run-slow or RUN_SLOW=1")
    for package in ("diffusers_dssolver", "dssolver_search"):  # a prefix: submodules too
        config.addinivalue_line("filterwarnings", f"error:::{package}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--run-slow") or os.environ.get("RUN_SLOW") == "1"
    for item in items:
        if "slow" in item.keywords and not slow:
            item.add_marker(pytest.mark.skip(reason="slow; run with --run-slow"))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file is one worker's, which makes once what its tests share."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.split("::")[0]).stem
            return "several processes" if file in SEVERAL_PROCESSES else file

    return ByFile(config, log)


@pytest.fixture
def exact(monkeypatch):
    """float64 where pipelines and networks ask for float32: times are embedded, guidance added up in it."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of a saved pipeline by family, tiny ones of random weights; to be read only."""
    from tests.families import FAMILIES, make_pipe

    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_pipe(family).save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def model(models):
    """That of the flow model."""
    return models["flow"]


@pytest.fixture(scope="session")
def results(models, tmp_path_factory):
    """Folder of a finished closed-form search by family, to be read."""
    from tests.searches import search

    folder = tmp_path_factory.mktemp("results")
    for family, model in models.items():
        search(model, folder / family)
    return {family: folder / family for family in models}
