"""One solver for several guidance scales (samples take them in turn, and calls never mix them), and one file with a
solver for each: read, blended, merged, refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from dssolver_search.cli import main
from dssolver_search.methods.closed_form import ClosedForm, warped_nodes
from dssolver_search.methods.gauss_newton import Polish
from dssolver_search.methods.preflight import preflight
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.pipeline.probe import run
from dssolver_search.pipeline.replay import Replay
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.pipeline.stock import record
from tests.search.test_search import CLOSED_FORM, WARP, alone, both, make_pipe, make_probe, quiet_reference, search

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")
SCALES = [1.0, 2.5, 4.0]
ROWS = [[1.0], [-0.3, 1.3], [0.2, -0.5, 1.3]]


def at(pipe, scale):
    return Sampler(pipe, {"guidance_scale": scale})


def states_of(sampler, indices, replay=None, unchanged=0):
    probe = make_probe(sampler.pipe)
    probe.prepare(warped_nodes(WARP, 3), ROWS)
    return run(sampler, probe, indices, "train", 3, replay, unchanged)


@both
def test_samples_take_the_scales_in_turn(family):
    pipe = make_pipe(family)
    sampler = Sampler(pipe, guidance_scales=SCALES)
    indices = [4, 0, 5, 1, 3]
    states = states_of(sampler, indices)
    alone_at = {scale: states_of(at(pipe, scale), indices) for scale in SCALES}
    assert len(states) == 4
    for k, index in enumerate(indices):
        for mine, its in zip(states, alone_at[SCALES[index % 3]], strict=True):
            torch.testing.assert_close(mine[k], its[k], rtol=1e-4, atol=1e-5)
    assert (states[-1][0] - alone_at[SCALES[0]][-1][0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="several guidance scales"):
        sampler([0, 1], "train", 3)


def test_one_scale_or_several():
    with pytest.raises(ValueError, match="both given; give one"):
        Sampler(make_pipe("flow"), {"guidance_scale": 1.5}, guidance_scales=SCALES)


def test_replays_of_several_calls():
    sampler = Sampler(make_pipe("flow"), guidance_scales=SCALES)
    replay = Replay()
    whole = states_of(sampler, range(5), replay)
    before = sampler.network_evaluations
    again = states_of(sampler, range(5), replay, unchanged=3)
    copied = states_of(sampler, range(5), Replay(replay), unchanged=3)
    assert sampler.network_evaluations == before
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, again, copied, strict=True))


@both
def test_batches_hold_one_scale_and_rows_are_fitted_to_all(family):
    pipe = make_pipe(family)
    sampler = Sampler(pipe, guidance_scales=SCALES[:2])
    train, validation = (quiet_reference(sampler, range(6), split, 40) for split in ("train", "validation"))
    form = ClosedForm(sampler, make_probe(pipe), (range(6), train), (range(6), validation), 6, alone, batch_size=2)
    batches = list(form.batches(form.train))
    assert [list(indices) for indices, _ in batches] == [[0, 2], [4], [1, 3], [5]]
    for indices, reference in batches:
        assert torch.equal(reference.states, train.states[:, list(indices)])
        its = quiet_reference(at(pipe, SCALES[indices[0] % 2]), indices, steps=40)
        torch.testing.assert_close(reference.states, its.states, rtol=1e-3, atol=1e-4)
    found = form.fit(3, WARP, 1e-6)
    rows = [list(row) for row in found.spec.coefficients]

    def error(last):
        return form.mean_square(form.errors("train", found.raw, [*rows[:-1], last]))

    assert error(rows[-1]) == pytest.approx(found.train_mse, rel=1e-5)
    for change in ([0.02, 0.0, -0.02], [-0.02, 0.02, 0.0], [0.0, -0.02, 0.02]):
        assert error([w + c for w, c in zip(rows[-1], change, strict=True)]) > found.train_mse
    steps = Polish(form, found).step(torch.zeros(Polish(form, found).count, dtype=torch.float64), lambda: None)
    whole = dataclasses.replace(form, batch_size=6)
    for mine, its in zip(steps, Polish(whole, found).step(torch.zeros_like(steps[0]), lambda: None), strict=True):
        assert (mine - its).norm() < 0.2 * its.norm()  # float32


def test_stock_teachers_take_several_scales():
    from diffusers import UniPCMultistepScheduler

    pipe = make_pipe("vp")
    sampler = Sampler(pipe, guidance_scales=SCALES[:2])
    scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    states, angles = record(sampler, scheduler, make_probe(pipe).path, range(3), "train", 8)
    assert len(states) == len(angles) == 9
    for k in range(3):
        alone_at, _ = record(at(pipe, SCALES[k % 2]), scheduler, make_probe(pipe).path, [k], "train", 8)
        torch.testing.assert_close(states[-1][k], alone_at[-1][0], rtol=1e-3, atol=1e-4)


def test_the_preflight_counts_calls_of_one_scale():
    sampler = Sampler(make_pipe("flow"), guidance_scales=SCALES[1:])
    found = preflight(sampler, make_probe(sampler.pipe))
    assert found.calls_per_step == 1 and found.guidance == "one call" and found.verdict == "full"


def test_other_scales_have_other_references():
    pipe = make_pipe("flow")
    prints = [Sampler(pipe, guidance_scales=s).fingerprint()["key"] for s in ([], [1.0], [1.0, 2.0], [2.0, 1.0])]
    assert len(set(prints)) == 4


def test_a_search_over_several_scales(tmp_path):
    make_pipe("flow").save_pretrained(tmp_path / "model")
    settings = {k: v for k, v in CLOSED_FORM.items() if k != "guidance_scale"}
    folder = tmp_path / "out"
    search(tmp_path / "model", folder, {**settings, "nfe": [3], "fill_nfe": [], "guidance_scales": [1.0, 3.0]})
    facts = json.loads((folder / "scheduler_config.json").read_text())["provenance"]
    assert facts["call"] == {"guidance_scale": [1.0, 3.0]}
    pipe = load_pipeline(str(tmp_path / "model"))
    mixed = Sampler(pipe, seed=5, guidance_scales=[1.0, 3.0])
    wanted = quiet_reference(mixed, range(3), "validation").final
    pipe.scheduler = DSSolverScheduler.from_pretrained(folder)
    errors = []
    for k in range(3):  # as a user would run it
        output = Sampler(pipe, {"guidance_scale": [1.0, 3.0][k % 2]}, seed=5)(
            [k], "validation", 3, output_type="latent"
        )
        errors.append((output[0] - wanted[k : k + 1]).double().square().mean().item())
    assert sum(errors) / 3 == pytest.approx(facts["results"]["3"]["validation_mse"], rel=1e-3)


# --- a solver for each ------------------------------------------------------------------------------------------------

LOW = {"2": {"nodes": [1.0, 0.5, 0.0], "coefficients": [[1.0], [0.0, 1.0]]}}
ONE = {"1": {"nodes": [1.0, 0.0], "coefficients": [[1.0]]}}
HIGH = {"2": {"nodes": [1.0, 0.3, 0.0], "timesteps": [900.0, 200.0], "coefficients": [[1.0], [-0.4, 1.4]]}}


def guided(**changes):
    given = {"prediction_type": "flow_prediction", "solvers": LOW, "guidance_solvers": {"4": HIGH, "2": LOW}}
    return DSSolverScheduler(**{**given, **changes})


def table(scheduler):
    return {str(n): spec.to_dict() for n, spec in scheduler.solvers.items()}


def test_tables_of_a_scale_between_and_beyond():
    assert table(guided()) == LOW  # nobody says which
    assert [table(guided(guidance_scale=w)) for w in (2, 4, 1.0, 7.5)] == [LOW, HIGH, LOW, HIGH]
    between = guided(guidance_scale=2.5)  # a quarter of the way; LOW is fed 1000 times its nodes
    expected = SolverSpec((1.0, 0.45, 0.0), ((1.0,), (-0.1, 1.1)), (975.0, 425.0))
    for mine, its in zip(
        [*between.solvers[2].nodes, *between.solvers[2].coefficients[1], *between.solvers[2].timesteps],
        [*expected.nodes, *expected.coefficients[1], *expected.timesteps],
        strict=True,
    ):
        assert mine == pytest.approx(its, abs=1e-12)
    between.set_timesteps(2)
    assert between.timesteps.tolist() == pytest.approx([975.0, 425.0])
    without = guided(guidance_solvers={"2": LOW, "4": LOW}, guidance_scale=3)
    assert without.solvers[2].timesteps is None and table(without) == LOW


def test_a_file_answers_any_scale(tmp_path):
    guided().save_pretrained(tmp_path)
    assert table(DSSolverScheduler.from_pretrained(tmp_path)) == LOW
    assert table(DSSolverScheduler.from_pretrained(tmp_path, guidance_scale=4.0)) == HIGH
    by_model = DSSolverScheduler.from_config({"shift": 1.0}, solvers=str(tmp_path), guidance_scale=4.0)
    assert table(by_model) == HIGH
    assert table(DSSolverScheduler.from_config(by_model.config, guidance_scale=2.0)) == LOW  # still holds all
    by_model.save_pretrained(tmp_path / "chosen")
    assert table(DSSolverScheduler.from_pretrained(tmp_path / "chosen")) == HIGH


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"guidance_solvers": None, "guidance_scale": 3.0}, "no tables by guidance"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"guidance_scale": True}, "guidance_scale is True"),
        ({"guidance_solvers": {"2": LOW, "4": {"3": LOW["2"]}}}, r"\['4'\]: .*key and solver must agree"),
        ({"guidance_solvers": {"2": LOW, "4": LOW | ONE}}, "same step counts"),
        ({"guidance_solvers": {"2": LOW, "2.0": LOW}}, "each one once"),
        ({"guidance_solvers": {"nan": LOW}}, "must be a guidance scale"),
        ({"guidance_solvers": {"1e99": LOW}}, "must be a guidance scale"),
        ({"guidance_solvers": {"2": "classical"}}, "dict from step counts"),
        ({"guidance_solvers": {}}, "1 to 100 guidance scales"),
        ({"guidance_solvers": [LOW]}, "1 to 100 guidance scales"),
    ],
)  # fmt: skip
def test_bad_tables_by_guidance(changes, told):
    with pytest.raises(ValueError, match=told):
        guided(**changes)


def test_a_table_with_times_of_its_own_fixes_the_direction_of_time(tmp_path):
    """As for `solvers`: what the network is fed would be wrong where its time rises."""
    guided().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="invert_sigmas"):
        DSSolverScheduler.from_config({"shift": 1.0, "invert_sigmas": True}, solvers=str(tmp_path))


def artefact(folder, scale, solvers, **changes):
    call = {"guidance_scale": scale, "height": 8}
    facts = {"model": "a/model", "revision": None, "pipeline": "APipeline", "call": call, "seed": 3}
    facts |= changes.pop("facts", {})
    given = {"prediction_type": "flow_prediction", "solvers": solvers, "provenance": facts}
    DSSolverScheduler(**{**given, **changes}).save_pretrained(folder)
    return str(folder)


def test_merge(tmp_path, capsys):
    three = {"3": SolverSpec.euler([1.0, 0.6, 0.2, 0.0]).to_dict()}
    sources = [artefact(tmp_path / "4", 4.0, HIGH | three), artefact(tmp_path / "2", 2, LOW)]
    main(["merge", "--solver", *sources, "--output_dir", str(tmp_path / "all")])
    said = capsys.readouterr()
    assert "guidance scales 2.0, 4.0 (4.0 by default), 1 step counts" in said.out and "left out" in said.err
    merged = DSSolverScheduler.from_pretrained(tmp_path / "all")
    assert table(merged) == HIGH
    assert merged.config.provenance["call"] == {"guidance_scale": [2.0, 4.0], "height": 8}
    assert merged.config.provenance["by_guidance_scale"]["2.0"]["seed"] == 3
    chosen = DSSolverScheduler.from_pretrained(tmp_path / "all", guidance_scale=2.0)
    assert table(chosen) == LOW
    main(["merge", "--solver", *sources, "--output_dir", str(tmp_path / "low"), "--guidance_scale", "2"])
    assert table(DSSolverScheduler.from_pretrained(tmp_path / "low")) == LOW


@pytest.mark.parametrize(
    "other, told",
    [
        ({"scale": 4.0}, "as another one was"),
        ({"scale": [1.0, 3.0]}, "does not say one guidance scale"),
        ({"facts": {"model": "b/model"}}, "has model 'b/model'"),
        ({"facts": {"call": {"guidance_scale": 2.0}}}, "was searched with {}"),
        ({"shift": 3.0, "searched_shift": {"factor": 3.0, "terminal": None}}, "was searched at shift"),
        ({"num_train_timesteps": 500}, "num_train_timesteps"),
        ({"mean_decay": 0.5}, "has mean_decay 0.5"),
        ({"solvers": {"3": SolverSpec.euler([1.0, 0.6, 0.2, 0.0]).to_dict()}}, "no step count in common"),
    ],
)
def test_what_cannot_be_merged(other, told, tmp_path, capsys):
    first = artefact(tmp_path / "first", 4.0, HIGH)
    second = artefact(tmp_path / "second", other.pop("scale", 2.0), other.pop("solvers", LOW), **other)
    with pytest.raises(SystemExit):
        main(["merge", "--solver", first, second, "--output_dir", str(tmp_path / "all")])
    assert told in capsys.readouterr().err and not (tmp_path / "all").exists()


def test_merge_overwrites_nothing(tmp_path, capsys):
    sources = [artefact(tmp_path / "4", 4.0, HIGH), artefact(tmp_path / "2", 2.0, LOW)]
    for arguments, told in (
        (["--solver", *sources, "--output_dir", sources[0]], "holds a solver"),
        (["--solver", *sources, "--output_dir", str(tmp_path / "x"), "--guidance_scale", "3"], "one of 2.0, 4.0"),
        (["--solver", sources[0], "--output_dir", str(tmp_path / "x")], "two or more"),
        (["--solver", *sources], "output_dir is missing"),
    ):
        with pytest.raises(SystemExit):
            main(["merge", *arguments])
        assert told in capsys.readouterr().err
