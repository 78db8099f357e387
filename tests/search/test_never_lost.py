"""Killed, interrupted, damaged, run twice at a time: the search ends with what an undisturbed run finds, to the bit.

Real processes and real signals: a server (this file run as a script) imports everything once and forks a child for
every run; each child may be told at which step of the solver, renaming or flush to the disk it dies.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch

from diffusers_dssolver import DSSolverScheduler
from dssolver_search import storage as state_module
from dssolver_search.cli import main
from dssolver_search.methods import paper as fit_module
from dssolver_search.methods import search as run_module
from dssolver_search.methods.paper import MAX_ROLLBACKS
from dssolver_search.methods.record import Journal
from dssolver_search.pipeline.probe import ProbeScheduler
from dssolver_search.storage import Damaged, read_record, read_tensors, write_record, write_tensors
from tests.search.test_search import CLOSED_FORM, PAPER, Bowl, Killed, arguments, fit_bowl, without_clock

STATE, PREVIOUS = "search_state.json", "search_state.previous.json"
SETTINGS = {
    "closed_form": {**CLOSED_FORM, "batch_size": 2},
    "paper": {**PAPER, "num_generated_samples": 16, "batch_size": 2},
}
METHODS = tuple(SETTINGS)
ESTIMATE = 2 * (20 + 40)  # steps for the teacher's error: two batches of two samples, and twice the steps
pytestmark = [pytest.mark.filterwarnings("ignore:.*torchvision.*"), pytest.mark.xdist_group("processes")]


# --- the server -------------------------------------------------------------------------------------------------------


def arm(kind, number, counts):
    """Make this process die, or interrupt it, when something is done for the number-th time; count what is done. The
    steps of the preflight, which writes nothing, do not count."""
    trying = []

    def reached(what):
        if trying:
            return False
        counts[what] = counts.get(what, 0) + 1
        return kind == what and counts[what] == number

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    step, replace, fsync, add = ProbeScheduler.step, os.replace, os.fsync, Journal.add

    def preflight(*args, **kwargs):
        trying.append(0)
        found = plain_preflight(*args, **kwargs)
        trying.clear()
        return found

    plain_preflight, run_module.preflight = run_module.preflight, preflight

    def dying_step(self, *args, **kwargs):
        if reached("step"):
            die()
        if reached("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    def dying_replace(source, target):
        if reached("before rename"):
            die()
        replace(source, target)
        if reached("after rename"):
            die()

    def dying_fsync(handle):
        if reached("half written"):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            die()
        fsync(handle)

    def dying_add(self, task, result):
        if reached("torn line"):
            with self.file.open("a") as file:
                file.write('{"key": "torn')
            die()
        add(self, task, result)

    ProbeScheduler.step, Journal.add = dying_step, dying_add
    os.replace = dying_replace
    os.fsync = lambda handle: dying_fsync(handle) if not os.path.isdir(f"/proc/self/fd/{handle}") else fsync(handle)


def child(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    counts, status = {}, 0
    Path(job["log"]).with_suffix(".pid").write_text(str(os.getpid()))
    arm(*job["end"], counts)
    try:
        main(job["argv"])
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    Path(job["log"]).with_suffix(".counts").write_text(json.dumps(counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve():
    torch.set_num_threads(1)
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            pid = os.fork()
            if pid == 0:
                child(job)
            children.append(pid)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)


class Forks:
    """The server, seen from a test."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *jobs):
        """Commands at the same time, each (arguments, (kind, number), environment); exit codes and what they print."""
        described = []
        for argv, end, environment in jobs:
            self.count += 1
            log = str(self.folder / f"{self.count}.log")
            described.append({"argv": argv, "end": end, "environment": environment, "log": log})
        self.process.stdin.write(json.dumps(described) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        return codes, [Path(job["log"]).read_text() for job in described]

    def counts(self):
        """What the last command did, by kind."""
        return json.loads((self.folder / f"{self.count}.counts").read_text())

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


class Server(Forks):
    """Searches with one model, each (method, output, (kind, number))."""

    def __init__(self, model, folder):
        super().__init__(folder)
        self.model = model

    def __call__(self, *runs):
        model = {"pretrained_model_name_or_path": self.model}
        argvs = [["search", *arguments({**model, "output_dir": o, **SETTINGS[m]})] for m, o, _ in runs]
        return self.run(*[(argv, end, {}) for argv, (_, _, end) in zip(argvs, runs, strict=True)])

    def finish(self, method, output):
        """What it prints until it ends well."""
        [code], [log] = self((method, output, (None, 0)))
        assert code == 0 and "Traceback" not in log, log
        return log


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    server = Server(model, tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """method -> (result of an undisturbed run, what it counted, its folder)."""
    found = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp("whole") / method
        server.finish(method, folder)
        found[method] = result(folder), server.counts(), folder
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


# --- killed -----------------------------------------------------------------------------------------------------------


def test_two_runs_agree_to_the_bit(server, whole, tmp_path):
    for method in METHODS:
        server.finish(method, tmp_path / method)
        same(tmp_path / method, whole, method)


# of everything of a kind that an undisturbed run does: the first, the last and some between
MOMENTS = [(kind, part) for kind in ("step", "before rename", "after rename", "half written") for part in (0, 0.35, 1)]
MOMENTS += [("step", part) for part in (0.1, 0.2, 0.6, 0.8)] + [("after rename", part) for part in (0.15, 0.6, 0.85)]


@pytest.mark.parametrize(
    "method, kind, part",
    [(m, *moment) for m in METHODS for moment in MOMENTS] + [("closed_form", "torn line", p) for p in (0, 0.5, 1)],
)
def test_killed_at_any_moment(method, kind, part, server, whole, tmp_path):
    """In the teacher, the search, the evaluation or while saving: the same result, evaluations included."""
    number = 1 + round(part * (whole[method][1][kind] - 1))
    [code], _ = server((method, tmp_path, (kind, number)))
    assert code == -signal.SIGKILL
    server.finish(method, tmp_path)
    same(tmp_path, whole, method)


def test_killed_again_and_again(server, whole, tmp_path):
    steps, codes = whole["closed_form"][1]["step"], [-signal.SIGKILL]
    while codes[-1] and len(codes) < 30:
        [code], _ = server(("closed_form", tmp_path, ("step", steps // 3)))
        codes.append(code)
    assert codes[-1] == 0 and len(codes) >= 4
    same(tmp_path, whole, "closed_form")


@pytest.mark.parametrize("method, spent", [("closed_form", 2 * 2 * 20), ("paper", 2 * 2 * 20)])
def test_killed_teacher_loses_at_most_one_batch(method, spent, server, whole, tmp_path):
    """20 steps a batch: killed in the first step of the second batch, the first is not run again."""
    server((method, tmp_path, ("step", ESTIMATE + 21)))
    assert len(list((tmp_path / "cache").glob("reference-*.safetensors"))) == 2
    server.finish(method, tmp_path)
    assert server.counts()["step"] == whole[method][1]["step"] - ESTIMATE - 20
    same(tmp_path, whole, method)


def test_killed_search_replays_its_trials(server, whole, tmp_path):
    """Only what follows the last finished trial is run."""
    teacher = 20 * (2 + 2) + ESTIMATE  # batches of two
    # three samples are two batches: the first call of each, then a trial of three steps up to each row and to the end
    start, trial, before = 2, 2 * (2 + 3 + 3), 5
    server(("closed_form", tmp_path, ("step", teacher + start + trial * before + 2)))
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == before
    server.finish("closed_form", tmp_path)
    assert (
        server.counts()["step"] == whole["closed_form"][1]["step"] - teacher - trial * before
    )  # the start is made anew
    same(tmp_path, whole, "closed_form")


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, finished", [(0.02, "no"), (0.7, "3")])
def test_interrupt_leaves_a_usable_folder(part, finished, server, whole, tmp_path):
    number = round(part * whole["closed_form"][1]["step"])
    [code], [log] = server(("closed_form", tmp_path, ("interrupt", number)))
    line = f"interrupted; {tmp_path} holds solvers for {finished} calls; the same command goes on from there"
    assert code == 130 and log.splitlines()[-1] == f"dssolver_search search: {line}" and "Traceback" not in log
    assert not list(tmp_path.rglob("*.tmp"))
    if finished == "3":
        assert DSSolverScheduler.from_pretrained(tmp_path).tables == (3,)
    assert finished == "no" or "going on" in server.finish("closed_form", tmp_path)
    server.finish("closed_form", tmp_path)
    same(tmp_path, whole, "closed_form")


# --- two at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_two_searches_in_one_folder(method, server, whole, tmp_path):
    codes, logs = server(*[(method, tmp_path, (None, 0))] * 2)
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
damaged = pytest.mark.parametrize("damage", DAMAGES)


def search(model, output, method="closed_form", **changes):
    settings = {"pretrained_model_name_or_path": model, "output_dir": output, **SETTINGS[method], **changes}
    main(["search", *arguments(settings)])


def lines_about_damage(capsys):
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return [line for line in captured.splitlines() if "damaged and left out" in line]


@damaged
def test_damaged_reference_is_made_anew(damage, model, whole, tmp_path, capsys):
    _, _, folder = whole["closed_form"]
    shutil.copytree(folder / "cache", tmp_path / "cache")
    file = sorted((tmp_path / "cache").iterdir())[2]
    before = read_tensors(file)[0]["states"]
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    search(model, tmp_path, nfe=[3], fill_nfe=[], trials=1, polish=0)
    [line] = lines_about_damage(capsys)
    assert str(file) in line and "made anew" in line
    torch.testing.assert_close(read_tensors(file)[0]["states"], before)


@pytest.mark.parametrize("damage", [*DAMAGES, "other digit"])
def test_damaged_state_is_left_out_for_the_one_before(damage, server, whole, tmp_path):
    _, _, folder = whole["closed_form"]
    shutil.copytree(folder, tmp_path / "out")
    file = tmp_path / "out" / STATE
    file.write_bytes((other_digit if damage == "other digit" else DAMAGES[damage])(file.read_bytes()))
    with pytest.raises(Damaged):
        read_record(file)
    log = server.finish("closed_form", tmp_path / "out")
    assert sum("damaged and left out" in line and str(file) in line for line in log.splitlines()) == 1
    assert "going on in" in log and "solvers for 3, 4" in log
    same(tmp_path / "out", whole, "closed_form")


def test_without_any_state_the_search_starts_over_from_its_references(server, whole, tmp_path):
    _, counts, folder = whole["closed_form"]
    shutil.copytree(folder, tmp_path / "out")
    for name in (STATE, PREVIOUS):
        (tmp_path / "out" / name).write_text("{")
    log = server.finish("closed_form", tmp_path / "out")
    assert log.count("damaged and left out") == 2 and "starts over from its references" in log
    assert server.counts()["step"] == counts["step"] - 20 * (2 + 2)
    same(tmp_path / "out", whole, "closed_form")


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_text('{"solvers": ')])
def test_spoilt_result_is_written_again(spoil, server, whole, tmp_path):
    shutil.copytree(whole["closed_form"][2], tmp_path / "out")
    spoil(tmp_path / "out" / "scheduler_config.json")
    server.finish("closed_form", tmp_path / "out")
    same(tmp_path / "out", whole, "closed_form")


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "zeros", "no keys", "foreign"])
def test_damaged_or_foreign_checkpoint_is_left_out(damage, server, whole, tmp_path):
    """Killed after some updates; its checkpoint then spoilt: the fit starts over."""
    server(("paper", tmp_path, ("step", round(0.8 * whole["paper"][1]["step"]))))
    file = tmp_path / "paper-3.safetensors"
    tensors, metadata = read_tensors(file)
    if damage == "foreign":
        write_tensors(file, {k: v + 1 for k, v in tensors.items()}, {**metadata, "key": "of another search"})
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    log = server.finish("paper", tmp_path)
    assert (f"{file} is damaged and left out" in log) == (damage != "foreign")
    same(tmp_path, whole, "paper")


def test_damaged_line_of_the_journal_is_left_out(server, whole, tmp_path):
    before, trial = ESTIMATE + 20 * (2 + 2), 2 * (2 + 3 + 3)
    server(("closed_form", tmp_path, ("step", before + 2 + trial * 5 + 2)))
    file = tmp_path / "trials.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + flip(lines[1], 40) + b"\xff\n" + lines[2] + b"[]\n")
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"nfe": 3, "warp"')
    log = server.finish("closed_form", tmp_path)
    assert log.count("trials.jsonl, line") == 3 == log.count("damaged and left out")
    assert server.counts()["step"] == whole["closed_form"][1]["step"] - before - trial * 2
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
    search(model, tmp_path, nfe=[3], fill_nfe=[], trials=1, polish=0)
    assert not old.exists() and young.exists()  # this one may belong to a living writer


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resume_from_checkpoint(model, whole, tmp_path, capsys):
    shutil.copytree(whole["closed_form"][2], tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        search(model, tmp_path / "out", resume_from_checkpoint="none")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "holds a search" in line and "--output_dir" in line
    search(model, tmp_path / "out", resume_from_checkpoint="latest")
    assert "going on in" in capsys.readouterr().err
    same(tmp_path / "out", whole, "closed_form")
    search(model, tmp_path / "new", nfe=[3], fill_nfe=[], trials=1, polish=0, resume_from_checkpoint="latest")
    assert DSSolverScheduler.from_pretrained(tmp_path / "new").tables == (3,)
    with pytest.raises(SystemExit):
        search(model, tmp_path / "new", resume_from_checkpoint="checkpoint-7")
    assert "resume_from_checkpoint is 'checkpoint-7'" in capsys.readouterr().err


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
    update, updates = fit_module._update, []

    def spoils_the_third(parameters, optimizer, loss_of, *args):
        updates.append(args)
        spoil = float("nan") if len(updates) == 3 else 1.0
        return update(parameters, optimizer, lambda i: loss_of(i) * spoil, *args)

    monkeypatch.setattr(fit_module, "_update", spoils_the_third)
    search(model, tmp_path, "paper")
    assert "update 3: the loss or its gradient is nan; rolled back to the best (1)" in capsys.readouterr().err
    assert DSSolverScheduler.from_pretrained(tmp_path).tables == (3,) and len(updates) == 4


def test_paper_search_survives_steps_that_vanish(model, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        search(model, tmp_path, "paper", learning_rate=500.0, num_generated_samples=40)
    err = capsys.readouterr().err
    assert "rolled back to the best (3)" in err and "Traceback" not in err
    assert stop.value.code == 2 and "choose a smaller learning_rate" in err.splitlines()[-1]


def test_state_module_pickles_nothing():
    assert "pickle" not in Path(state_module.__file__).read_text() + Path(fit_module.__file__).read_text()


if __name__ == "__main__":
    serve()
