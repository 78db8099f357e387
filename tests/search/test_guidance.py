"""One file with a solver for each of several guidance scales: read, blended, merged, refused."""

from __future__ import annotations

import pytest

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from dssolver_search.cli import main

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
    """As for `solvers`: where the network's time rises, the table is carried over, and its times with it."""
    fed = guided()
    fed.save_pretrained(tmp_path)
    inverted = {"shift": 1.0, "invert_sigmas": True}
    with pytest.raises(ValueError, match="invert_sigmas"):
        DSSolverScheduler.from_config(inverted, solvers=str(tmp_path), strict=True)
    turned = DSSolverScheduler.from_config(inverted, solvers=str(tmp_path))
    for scheduler in (fed, turned):
        scheduler.set_timesteps(scheduler.tables[0])
    assert turned.timesteps.tolist() == pytest.approx([1000 - t for t in fed.timesteps.tolist()])


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
