"""Killed, interrupted, damaged, run twice at a time: the search ends with what an undisturbed run finds, to the bit
on the same machine with the same number of threads and processes.

Real signals, in forked processes (`forks`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from diffusers_dssolver import DSSolverScheduler
from dssolver_search import storage
from dssolver_search.cli import main
from dssolver_search.methods import paper as paper_module
from dssolver_search.methods.paper import MAX_ROLLBACKS
from dssolver_search.methods.setup import GONE
from dssolver_search.settings import REMOVED
from dssolver_search.storage import Damaged, kept_all, read_record, read_tensors, write_record, write_tensors
from tests.search.forks import NEVER, Forks
from tests.search.test_search import Bowl, fit_bowl
from tests.searches import Killed, arguments, without_clock

STATE, PREVIOUS = "search_state.json", "search_state.previous.json"
COMMON = {
    "num_validation_samples": 3, "teacher_steps": 5, "guidance_scale": 1.5, "batch_size": 2, "seed": 5,
}  # fmt: skip
SETTINGS = {
    "closed_form": {
        **COMMON, "nfe": [2, 3], "fill_nfe": [4, 4], "num_train_samples": 4, "num_trial_samples": 3, "trials": 2,
        "starts": 1, "polish": 1, "fill_polish_nfe": 3,
    },
    "paper": {
        **COMMON, "method": "paper", "nfe": [3], "num_generated_samples": 16, "train_batch_size": 4,
        "reference_steps": 4, "validation_steps": 1,
    },
}  # fmt: skip
METHODS = tuple(SETTINGS)
ESTIMATE = 2 * (5 + 10)  # steps for the teacher's error: two batches of two samples, and twice the steps
TEACHER = 5 * (2 + 2)  # four training and three validation samples, in batches of two
# three trial samples are two batches: the first call of each is made once, then a trial takes two steps up to the
# second row and two to the end
START, TRIAL = 2, 2 * (2 + 2)
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


class Searches(Forks):
    """Searches with one model, each (method, output, (moment, number))."""

    def __init__(self, model, folder):
        super().__init__(folder)
        self.model = model

    def __call__(self, *runs):
        model = {"pretrained_model_name_or_path": self.model}
        argvs = [["search", *arguments({**model, "output_dir": o, **SETTINGS[m]})] for m, o, _ in runs]
        return self.run(*[(argv, end, {}) for argv, (_, _, end) in zip(argvs, runs, strict=True)])

    def finish(self, method, output):
        """What it prints until it ends well."""
        [code], [log] = self((method, output, NEVER))
        assert code == 0 and "Traceback" not in log, log
        return log


@pytest.fixture(scope="module")
def searches(model, tmp_path_factory):
    return Searches(model, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def whole(searches, tmp_path_factory):
    """method -> (result of an undisturbed run, what it counted, its folder)."""
    found = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp("whole") / method
        searches.finish(method, folder)
        found[method] = result(folder), searches.counts(), folder
    return found


def result(folder):
    """All of the result but the clock: solvers, errors and evaluations."""
    state = read_record(folder / STATE)
    config = json.loads((folder / "scheduler_config.json").read_text())
    return without_clock(config), without_clock(state)


def same(folder, whole, method):
    assert result(folder) == whole[method][0]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert not (folder / "trials.jsonl").exists()


def search(model, output, method="closed_form", **changes):
    settings = {"pretrained_model_name_or_path": model, "output_dir": output, **SETTINGS[method], **changes}
    main(["search", *arguments(settings)])


# --- killed -----------------------------------------------------------------------------------------------------------

# a run is killed after so many of each, the next one after twice as many, and so on; below 1: a share of all
MOMENTS = {"step": 0.12, "before rename": 2, "after rename": 2, "half written": 2, "torn line": 2}


@pytest.mark.parametrize(
    "method, moment", [(m, moment) for m in METHODS for moment in MOMENTS if (m, moment) != ("paper", "torn line")]
)
def test_killed_again_and_again(method, moment, searches, whole, tmp_path):
    """In the teacher, the search or while saving: the same result, evaluations included."""
    every = MOMENTS[moment]
    every = round(every * whole[method][1][moment]) if every < 1 else every
    codes = []
    while 0 not in codes and len(codes) < 12:
        codes += searches((method, tmp_path, (moment, every * (len(codes) + 1))))[0]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0] and len(codes) >= 3
    same(tmp_path, whole, method)


@pytest.mark.parametrize("moment", ["before rename", "half written"])
def test_killed_at_the_first_write(moment, searches, whole, tmp_path):
    [code], _ = searches(("closed_form", tmp_path, (moment, 1)))
    assert code == -signal.SIGKILL
    searches.finish("closed_form", tmp_path)
    same(tmp_path, whole, "closed_form")


def test_killed_teacher_loses_at_most_one_batch(searches, whole, tmp_path):
    """Five steps a batch: killed in the first step of the second batch, the first is not run again."""
    searches(("closed_form", tmp_path, ("step", ESTIMATE + 5 + 1)))
    assert len(list((tmp_path / "cache").glob("reference-*.safetensors"))) == 2
    searches.finish("closed_form", tmp_path)
    assert searches.counts()["step"] == whole["closed_form"][1]["step"] - ESTIMATE - 5
    same(tmp_path, whole, "closed_form")


def killed_in_a_trial(searches, folder, before):
    """So many trials of the first step count are finished, the next one is not."""
    searches(("closed_form", folder, ("step", ESTIMATE + TEACHER + START + TRIAL * before + 2)))
    assert len((folder / "trials.jsonl").read_text().splitlines()) == before


def test_killed_search_replays_its_trials(searches, whole, tmp_path):
    """Only what follows the last finished trial is run, and the first calls."""
    killed_in_a_trial(searches, tmp_path, 2)
    searches.finish("closed_form", tmp_path)
    assert searches.counts()["step"] == whole["closed_form"][1]["step"] - ESTIMATE - TEACHER - TRIAL * 2
    same(tmp_path, whole, "closed_form")


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, finished", [(0.02, "no"), (0.7, "2")])
def test_interrupt_leaves_a_usable_folder(part, finished, searches, whole, tmp_path):
    number = round(part * whole["closed_form"][1]["step"])
    [code], [log] = searches(("closed_form", tmp_path, ("interrupt", number)))
    line = f"interrupted; {tmp_path} holds solvers for {finished} calls; the same command goes on from there"
    assert code == 130 and log.splitlines()[-1] == f"dssolver_search search: {line}" and "Traceback" not in log
    assert not list(tmp_path.rglob("*.tmp"))
    if finished == "2":
        assert DSSolverScheduler.from_pretrained(tmp_path).tables == (2,)
    said = searches.finish("closed_form", tmp_path)
    assert ("going on" in said) == (finished == "2")
    same(tmp_path, whole, "closed_form")


# --- two at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_two_searches_in_one_folder(method, searches, whole, tmp_path):
    codes, logs = searches(*[(method, tmp_path, NEVER)] * 2)
    assert codes == [0, 0], logs
    assert result(tmp_path)[0]["solvers"] == whole[method][0][0]["solvers"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_writers_of_one_file_never_show_half_of_it(tmp_path):
    """Two threads write different contents, one reads all the time."""
    file, done, seen = tmp_path / "x.safetensors", threading.Event(), set()

    def write(value):
        for _ in range(30):
            write_tensors(file, {"x": torch.full((20_000,), value)}, {"of": str(value)})

    def read():
        while not done.is_set():
            tensors, metadata = read_tensors(file)
            assert set(tensors["x"].tolist()) == {float(metadata["of"])}
            seen.add(metadata["of"])

    write(0.0)
    errors = []
    threading.excepthook, before = lambda args: errors.append(args.exc_value), threading.excepthook
    try:
        threads = [threading.Thread(target=write, args=(v,)) for v in (1.0, 2.0)]
        reader = threading.Thread(target=read)
        for thread in [*threads, reader]:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        reader.join()
    finally:
        threading.excepthook = before
    assert not errors and len(seen) >= 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# --- damaged ----------------------------------------------------------------------------------------------------------


def flip(data, at=-5):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def other_digit(data):
    at = data.index(b'"validation_mse"') + 24
    return data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "flipped": flip,
    "zeros": lambda data: bytes(len(data)),
    "no text": lambda data: b"\xff\xfe" + data,
    "other JSON": lambda data: b"[1, 2]",
    "no keys": lambda data: b"{}",
    "nested": lambda data: b"[" * 100_000,
}


def spoil(file, damage="truncated"):
    file.write_bytes(DAMAGES[damage](file.read_bytes()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(damage, tmp_path):
    record, tensors = tmp_path / "x.json", tmp_path / "x.safetensors"
    write_record(record, {"a": 1.5})
    write_tensors(tensors, {"x": torch.ones(3)}, {"of": "x"})
    for file, read in ((record, read_record), (tensors, read_tensors)):
        spoil(file, damage)
        with pytest.raises(Damaged):
            read(file)


def test_what_is_damaged_or_missing_is_made_anew(tmp_path, capsys):
    """All at once; what is whole is not touched."""
    files, calls = [tmp_path / "cache" / name for name in "abc"], []

    def make():
        calls.append(0)
        return [({"x": torch.full((2,), float(k))}, {"call": str(len(calls))}) for k in range(3)]

    def values(found):
        return [(tensors["x"].tolist(), facts["call"]) for tensors, facts in found]

    first = kept_all(files, make)
    assert values(kept_all(files, make)) == values(first) == [([k, k], "1") for k in range(3)] and len(calls) == 1
    spoil(files[1])
    files[2].unlink()
    again = kept_all(files, make)
    assert values(again) == [([0, 0], "1"), ([1, 1], "2"), ([2, 2], "2")] == values(kept_all(files, make))
    assert len(calls) == 2 and capsys.readouterr().err.count(f"{files[1]} is damaged and made anew: ") == 1
    assert values(kept_all([None] * 3, make)) == [([k, k], "3") for k in range(3)]


def copied(whole, tmp_path, method="closed_form"):
    return Path(shutil.copytree(whole[method][2], tmp_path / "out"))


def test_damaged_reference_is_made_anew(model, whole, tmp_path, capsys):
    file = sorted((copied(whole, tmp_path) / "cache").iterdir())[2]
    before = read_tensors(file)[0]["states"]
    spoil(file, "flipped")
    search(model, tmp_path / "out")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert str(file) in line and "made anew" in line
    torch.testing.assert_close(read_tensors(file)[0]["states"], before)


def test_damaged_state_is_left_out_for_the_one_before(searches, whole, tmp_path):
    file = copied(whole, tmp_path) / STATE
    file.write_bytes(other_digit(file.read_bytes()))
    log = searches.finish("closed_form", tmp_path / "out")
    assert sum("damaged and left out" in line and str(file) in line for line in log.splitlines()) == 1
    assert "going on in" in log and "solvers for 2, 3" in log
    same(tmp_path / "out", whole, "closed_form")


def test_without_any_state_the_search_starts_over_from_its_references(searches, whole, tmp_path):
    for name in (STATE, PREVIOUS):
        (copied(whole, tmp_path) if name == STATE else tmp_path / "out").joinpath(name).write_text("{")
    log = searches.finish("closed_form", tmp_path / "out")
    assert log.count("damaged and left out") == 2 and "starts over from its references" in log
    assert searches.counts()["step"] == whole["closed_form"][1]["step"] - TEACHER
    same(tmp_path / "out", whole, "closed_form")


def test_spoilt_result_is_written_again(model, whole, tmp_path):
    file = copied(whole, tmp_path) / "scheduler_config.json"
    for spoilt in (lambda: file.unlink(), lambda: file.write_text('{"solvers": ')):
        spoilt()
        search(model, tmp_path / "out")
        same(tmp_path / "out", whole, "closed_form")


def test_damaged_checkpoint_is_left_out(searches, whole, tmp_path):
    """Killed after some updates; its checkpoint then spoilt: the fit starts over."""
    searches(("paper", tmp_path, ("step", round(0.8 * whole["paper"][1]["step"]))))
    spoil(tmp_path / "paper-3.safetensors")
    log = searches.finish("paper", tmp_path)
    assert f"{tmp_path / 'paper-3.safetensors'} is damaged and left out" in log
    same(tmp_path, whole, "paper")


@pytest.mark.parametrize("damage", ["empty", "flipped", "foreign"])
def test_damaged_or_foreign_checkpoint_is_no_start(damage, tmp_path, capsys):
    bowl, file = Bowl(), tmp_path / "fit.safetensors"
    best = fit_bowl(Bowl(), 6, checkpoint=file, key="a search")
    if damage != "foreign":
        spoil(file, damage)
    key = "another search" if damage == "foreign" else "a search"
    updates = []
    assert fit_bowl(bowl, 6, loss_of=lambda i: updates.append(i) or bowl.loss(i), checkpoint=file, key=key) == best
    assert updates == list(range(6))
    assert (f"{file} is damaged and left out" in capsys.readouterr().err) == (damage != "foreign")


def test_damaged_line_of_the_journal_is_left_out(searches, whole, tmp_path):
    killed_in_a_trial(searches, tmp_path, 2)
    file = tmp_path / "trials.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + flip(lines[1], 40) + b"\xff\n" + b"[]\n")
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"nfe": 3, "warp"')
    log = searches.finish("closed_form", tmp_path)
    assert log.count("trials.jsonl, line") == 3 == log.count("damaged and left out")
    assert searches.counts()["step"] == whole["closed_form"][1]["step"] - ESTIMATE - TEACHER - TRIAL
    same(tmp_path, whole, "closed_form")


def test_record_round_trip(tmp_path):
    record = {"a": 0.1 + 0.2, "b": [1e-300, float("inf")], "c": {"d": None}}
    write_record(tmp_path / "x.json", record)
    assert read_record(tmp_path / "x.json") == record
    tensors = {"x": torch.randn(3, dtype=torch.float64), "y": torch.randn(2, 2).bfloat16(), "z": torch.tensor(1)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"of": "x"})
    found, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"of": "x"} and all(torch.equal(found[k], v) for k, v in tensors.items())
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in tensors.items()}


def test_old_partial_files_are_removed(model, tmp_path):
    (tmp_path / "cache").mkdir()
    old, young = tmp_path / "cache" / "x.1.aa.tmp", tmp_path / "y.2.bb.tmp"
    for file in (old, young):
        file.write_text("half")
    os.utime(old, (0, 0))
    search(model, tmp_path, nfe=[2], fill_nfe=[], trials=1, polish=0)
    assert not old.exists() and young.exists()  # this one may belong to a living writer


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resume_from_checkpoint(model, whole, tmp_path, capsys):
    copied(whole, tmp_path)
    with pytest.raises(SystemExit) as stop:
        search(model, tmp_path / "out", resume_from_checkpoint="none")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "holds a search" in line and "--output_dir" in line
    search(model, tmp_path / "out", resume_from_checkpoint="latest")
    assert "going on in" in capsys.readouterr().err
    same(tmp_path / "out", whole, "closed_form")
    search(model, tmp_path / "new", nfe=[2], fill_nfe=[], trials=1, polish=0, resume_from_checkpoint="latest")
    assert DSSolverScheduler.from_pretrained(tmp_path / "new").tables == (2,)


def test_state_of_an_earlier_version_is_gone_on_with(model, whole, tmp_path, capsys):
    """It has the settings and figures of what was removed since."""
    assert GONE.keys() == REMOVED.keys()  # at their defaults they are part of its key
    folder = copied(whole, tmp_path)
    state = read_record(folder / STATE)
    write_record(folder / STATE, {**state, "derived": {}, "derived_network_evaluations": 8})
    search(model, folder)
    assert "going on in" in capsys.readouterr().err
    assert read_record(folder / STATE)["solvers"] == state["solvers"]


# --- NaN and divergence -----------------------------------------------------------------------------------------------


def spoilt(bowl, at, how):
    """Its loss, spoilt at these iterations: in its value, or in its gradient alone."""

    def loss_of(iteration):
        if iteration not in at:
            return bowl.loss(iteration)
        if how == "gradient":
            return bowl.loss(iteration) + 0.0 * (bowl.a - bowl.a.detach()).abs().sqrt().sum()  # 0 * inf
        return bowl.loss(iteration) * float(how)

    return loss_of


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_nan_rolls_back_to_the_best(how, capsys):
    bowl, reference, records = Bowl(), Bowl(), []
    assert bowl.loss(4).isfinite()
    fit_bowl(reference, 4)
    best = fit_bowl(bowl, 5, loss_of=spoilt(bowl, {4}, how), log=records.append)  # ends with the roll-back
    for name, p in reference.named_parameters():
        assert torch.equal(p, bowl.get_parameter(name))
    assert best == bowl.loss(1000).item()
    assert "rolled back to the best (1)" in capsys.readouterr().err
    assert "rolled_back" in records[-1] and records[-1]["iteration"] == 5
    json.dumps(records, allow_nan=False)
    bowl = Bowl()
    assert fit_bowl(bowl, 40, loss_of=spoilt(bowl, {4, 9, 20}, how)) < 0.8 * best  # and goes on


def test_momentum_is_rolled_back_too(tmp_path):
    """After it, the loop moves as one that stopped at the best and was given the later batches."""
    bowl, other = Bowl(), Bowl()
    files = tmp_path / "rolled back", tmp_path / "wanted"
    fit_bowl(bowl, 10, loss_of=spoilt(bowl, {5}, "nan"), checkpoint=files[0])
    batches = [0, 1, 2, 3, 6, 7, 8, 9]  # what batch 4 did is forgotten
    fit_bowl(other, 8, loss_of=lambda i: other.loss(batches[i]), checkpoint=files[1])
    found, wanted = (read_tensors(file)[0] for file in files)
    assert {"now.momentum.a", "now.parameter.b", "best.momentum.b"} <= found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_divergence_rolls_back_and_ends_after_three(capsys):
    bowl = Bowl()
    errors = iter([5.0, 4.0, 1e5, float("inf"), 6e3, 1.0])
    assert fit_bowl(bowl, 100, lambda: next(errors)) == 4.0
    err = capsys.readouterr().err
    assert [f"({k})" in err for k in (1, 2, 3, 4)] == [True] * MAX_ROLLBACKS + [False]
    assert "ended after 3 roll-backs" in err and next(errors) == 1.0
    errors = iter([5.0, 1e5, 1e5, 4.0, 1e5, 1e5, 3.0, 1e5, 1e5, 1e5])  # better ones between
    assert fit_bowl(Bowl(), 100, lambda: next(errors)) == 3.0


def test_nothing_finite_is_an_error():
    with pytest.raises(ValueError, match="smaller learning_rate"):
        fit_bowl(Bowl(), 10, lambda: float("nan"))


@pytest.mark.parametrize("killed_at", [5, 7, 12])
def test_killed_fit_with_roll_backs_goes_on_to_the_same_result(killed_at, tmp_path):
    undisturbed, bowl, file = Bowl(), Bowl(), tmp_path / "fit.safetensors"
    best = fit_bowl(undisturbed, 15, loss_of=spoilt(undisturbed, {5, 11}, "nan"))

    def dies(iteration):
        if iteration == killed_at:
            raise Killed
        return spoilt(bowl, {5, 11}, "nan")(iteration)

    with pytest.raises(Killed):
        fit_bowl(bowl, 15, loss_of=dies, checkpoint=file)
    bowl = Bowl()
    assert fit_bowl(bowl, 15, loss_of=spoilt(bowl, {5, 11}, "nan"), checkpoint=file) == best
    assert all(torch.equal(p, bowl.get_parameter(name)) for name, p in undisturbed.named_parameters())


def test_paper_search_survives_a_nan(model, tmp_path, monkeypatch, capsys):
    loss, updates = paper_module.paper_loss, []

    def spoils_the_third(*args):
        updates.append(args)
        return loss(*args) * (float("nan") if len(updates) == 3 else 1.0)

    monkeypatch.setattr(paper_module, "paper_loss", spoils_the_third)
    search(model, tmp_path, "paper")
    assert "update 3: the loss or its gradient is nan; rolled back to the best (1)" in capsys.readouterr().err
    assert DSSolverScheduler.from_pretrained(tmp_path).tables == (3,) and len(updates) == 4


def test_paper_search_survives_steps_that_vanish(model, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        search(model, tmp_path, "paper", learning_rate=500.0, num_generated_samples=40)
    err = capsys.readouterr().err
    assert "rolled back to the best (3)" in err and "Traceback" not in err
    assert stop.value.code == 2 and "choose a smaller learning_rate" in err.splitlines()[-1]


def test_storage_pickles_nothing():
    assert "pickle" not in Path(storage.__file__).read_text() + Path(paper_module.__file__).read_text()
