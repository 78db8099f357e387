"""The Python interface on tiny pipelines: it finds what the command finds, and leaves the pipeline as it was."""

from __future__ import annotations

import functools
import json
import signal

import numpy as np
import pytest
from torch import nn

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search import search
from tests.families import make_pipe
from tests.search.forks import NEVER, Forks
from tests.searches import CLOSED_FORM, without_clock

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torchvision.*", "ignore:__array:DeprecationWarning", "ignore:invalid value:RuntimeWarning",
    "ignore:.*FluxPosEmbed.*:FutureWarning",
)  # fmt: skip
SMALL = {
    "nfe": [2, 3], "fill_nfe": [], "trials": 2, "starts": 1, "polish": 0, "num_train_samples": 4,
    "num_trial_samples": 3, "num_validation_samples": 3, "teacher_steps": 10, "progress": False,
}  # fmt: skip
ONE = {**SMALL, "nfe": 2}


def state_of(pipe):
    """All of a pipeline that a search might leave changed."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    modules = [module for network in networks.values() for module in network.modules()]
    hooks = [
        [list(d) for d in (m._forward_pre_hooks, m._forward_hooks, m._forward_pre_hooks_with_kwargs)] for m in modules
    ]
    return {
        "own": {k: v for k, v in vars(pipe).items() if k not in networks and not k.startswith("_guidance")},
        "config": dict(pipe.config),
        "scheduler": (pipe.scheduler, dict(pipe.scheduler.config)) if hasattr(pipe, "scheduler") else None,
        "networks": {name: id(part) for name, part in networks.items()},
        "modules": [{k: v for k, v in vars(m).items() if k[0] != "_" or k == "_hf_hook"} for m in modules],
        "hooks": hooks,
        "gradients": [p.requires_grad for m in modules for p in m.parameters(recurse=False)],
    }


def live_pipe(family="flow"):
    """A pipeline as a user may hold it: partly in training, with gradients and a progress bar."""
    pipe = make_pipe(family)
    pipe.transformer.requires_grad_(True).train()
    pipe.transformer.transformer_blocks[0].eval()
    pipe.transformer.pos_embed.requires_grad_(False)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    pipe._num_timesteps = pipe._interrupt = None  # what any call of the pipeline sets
    return pipe


@pytest.fixture
def pipe():
    made = live_pipe()
    before = state_of(made)
    yield made
    after = state_of(made)
    for state in (before, after):
        for name in ("_num_timesteps", "_interrupt"):
            state["own"].pop(name)
    assert after == before


@functools.cache
def found_small():
    return search(live_pipe(), **SMALL, guidance_scale=2.0)


# --- one engine -------------------------------------------------------------------------------------------------------


def test_it_finds_what_the_command_finds(models, results):
    pipe = SiTPipeline.from_pretrained(models["flow"])
    found = search(pipe, **CLOSED_FORM, progress=False)
    wanted = DSSolverScheduler.from_pretrained(results["flow"]).config
    assert found.scheduler.config.solvers == wanted.solvers and found.nfe == [3, 4]
    told, expected = found.scheduler.config.provenance, wanted.provenance
    for key in ("results", "call", "guidance_scale", "teacher", "samples", "network_evaluations", "settings"):
        assert without_clock(told[key]) == without_clock(expected[key]), key
    assert told["model"] == expected["model"] == "flow"


def test_the_pipeline_stays_as_it_was_and_nothing_is_written(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stages = []
    found = search(pipe, **{**SMALL, "polish": 1}, callback=stages.append)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "") and not list(tmp_path.iterdir())
    assert [(s.get("nfe"), s["stage"]) for s in stages] == [
        (None, "teacher"), *((n, stage) for n in (2, 3) for stage in ("closed_form", "polish", "searched")),
    ]  # fmt: skip
    counts = [s["network_evaluations"] for s in stages]
    assert counts == sorted(counts) and counts[-1] == found.scheduler.config.provenance["network_evaluations"]
    assert repr(found) == found.table and "2 searched" in found.table
    assert found.compare(schedulers=["euler"], num_samples=2, reference_steps=8).results
    assert found.picture().size == (4 * 4 * 24, 4 * 24) and "data:image/png" in found._repr_html_()
    assert not list(tmp_path.iterdir())


def test_arguments_reach_the_call(pipe):
    seen, call = [], type(pipe).__call__

    def spied(self, *args, **kwargs):
        seen.append(kwargs)
        return call(self, *args, **kwargs)

    class Spied(type(pipe)):
        __call__ = functools.wraps(call)(spied)

    pipe.__class__, plain = Spied, type(pipe)
    try:
        found = search(pipe, **ONE, guidance_scale=2, guidance_channels=1, output_type="latent")
    finally:
        pipe.__class__ = plain
    assert {(k["guidance_scale"], k["guidance_channels"], k["output_type"]) for k in seen} == {(2.0, 1, "latent")}
    assert found.scheduler.config.provenance["call"] == {
        "guidance_scale": 2.0, "guidance_channels": 1, "output_type": "latent",
    }  # fmt: skip


# --- interrupted, killed ----------------------------------------------------------------------------------------------


class Failing:
    """A callback that raises at the end of a stage."""

    def __init__(self, error, stage="searched", nfe=2):
        self.error, self.at = error, (stage, nfe)

    def __call__(self, facts):
        if (facts["stage"], facts.get("nfe")) == self.at:
            raise self.error


def test_ctrl_c_returns_what_is_finished_and_the_rest_follows(pipe, tmp_path, capsys):
    whole = search(pipe, **SMALL)
    found = search(pipe, **SMALL, output_dir=tmp_path, callback=Failing(KeyboardInterrupt))
    assert found.scheduler.tables == (2,) and found.nfe == [2]
    assert "interrupted; solvers for 2 calls are finished" in capsys.readouterr().err
    assert DSSolverScheduler.from_pretrained(tmp_path).tables == (2,)
    resumed = search(pipe, **SMALL, output_dir=tmp_path)
    assert resumed.scheduler.config.solvers == whole.scheduler.config.solvers and resumed.folder == tmp_path
    with pytest.raises(KeyboardInterrupt):
        search(pipe, **SMALL, callback=Failing(KeyboardInterrupt, "teacher", None))


def test_an_error_of_any_kind_leaves_the_pipeline_as_it_was(pipe):
    with pytest.raises(ZeroDivisionError):
        search(pipe, **SMALL, callback=Failing(ZeroDivisionError))


def test_killed_and_gone_on_with_to_the_bit(tmp_path):
    """kill -9 in the teacher, in a fit and while a file is renamed."""
    forks = Forks(tmp_path)

    def job(folder):
        return lambda: search(live_pipe(), **SMALL, batch_size=2, output_dir=folder)

    [code], [log] = forks.run((job(tmp_path / "whole"), NEVER, {}))
    assert code == 0, log
    steps = forks.counts()["step"]
    for moment in (("step", round(0.5 * steps)), ("step", round(0.2 * steps)), ("before rename", 2), NEVER):
        [code], [log] = forks.run((job(tmp_path / "killed"), moment, {}))
        assert code == (0 if moment is NEVER else -signal.SIGKILL), log
    whole, killed = (
        json.loads((tmp_path / name / "scheduler_config.json").read_text()) for name in ("whole", "killed")
    )
    assert without_clock(killed) == without_clock(whole)


def test_several_processes_share_the_work(tmp_path):
    """Each has a pipeline of its own, as a script under `accelerate launch`."""

    def job():
        found = search(live_pipe(), **SMALL)
        compared = found.compare(schedulers=["euler"], num_samples=4, reference_steps=8)
        assert [r.scheduler for r in compared.results] == ["searched", "euler"] * 2
        found.save(tmp_path / "several")

    codes, logs = Forks(tmp_path).group(2, job)
    assert codes == [0, 0], logs
    solvers = DSSolverScheduler.from_pretrained(tmp_path / "several").solvers
    single = search(live_pipe(), **SMALL).scheduler.solvers
    for nfe in (2, 3):
        np.testing.assert_allclose(solvers[nfe].nodes, single[nfe].nodes, rtol=1e-3)
