"""`publish` against a small server on this machine that speaks the Hub's protocol (`local_hub.py`), through the real
clients: what is sent, to whom it is refused, and what a broken connection leaves."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from PIL import Image

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.card import render
from dssolver_search.artefacts import publish as publish_module
from dssolver_search.artefacts.figures import card
from dssolver_search.cli import main
from dssolver_search.settings import PublishConfig, parse
from tests.hub.conftest import TOKEN
from tests.hub.local_hub import Dropped, HubError, Repo

FLOW = json.loads((Path(__file__).parents[2] / "search" / "results" / "comparison-flow.json").read_text())
REPO = "user/solver"
CALL = {"guidance_scale": 1.5}
FILES = {"scheduler_config.json", "README.md", "eval.json", "comparison.png", "error.png", "nodes.png"}
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(publish_module, "PAUSE", 0.01)


def make_artefact(folder, middle=0.5, name="closed_form"):
    """A solver's folder as `search` leaves it, with a picture, and a comparison's folder beside it."""
    tables = {
        "2": SolverSpec.euler([1.0, middle, 0.0]).to_dict(),
        "3": SolverSpec.euler([1.0, 0.7, 0.3, 0.0]).to_dict(),
    }
    facts = {"kind": "searched", "model": "flow", "pipeline": "SiTPipeline", "call": CALL, "seed": 0}
    scheduler = DSSolverScheduler(prediction_type="flow_prediction", solvers=tables, provenance=facts)
    scheduler.save_pretrained(folder / name)
    comparison = folder / "comparison"
    comparison.mkdir(exist_ok=True)
    record = {**FLOW, "settings": {**FLOW["settings"], "output_dir": str(comparison)}}
    (comparison / "comparison.json").write_text(json.dumps(record))
    pictures = ("comparison/comparison.png", "comparison/error.png", f"{name}/nodes.png")
    for picture, colour in zip(pictures, ("red", "green", "blue"), strict=True):
        Image.new("RGB", (32, 32), colour).save(folder / picture)
    return folder / name


@pytest.fixture
def artefact(tmp_path):
    return make_artefact(tmp_path)


def publish(artefact, *words, repo_id=REPO):
    comparison = str(artefact.parent / "comparison")
    main(["publish", "--solver", str(artefact), "--repo_id", repo_id, "--comparison", comparison, *words])


def refused(capsys, *args, **kwargs):
    """The one line that a command ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        publish(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "torchvision" not in line][-1]


def repo_of(hub, repo_id=REPO) -> Repo:
    return hub.repos["model", repo_id]


def tree(hub, revision="main"):
    repo = repo_of(hub)
    return {name: file["data"] for name, file in repo.commits[repo.resolve(revision)]["tree"].items()}


def writes(hub):
    return [path for command, path in hub.log if command == "POST" and "/commit/" in path]


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_one_commit_holds_all(hub, artefact, capsys):
    publish(artefact, "--tag", "v1")
    sent = tree(hub)
    assert set(sent) == FILES and len(writes(hub)) == 1
    assert len(repo_of(hub).commits) == 2  # the first one is empty, the Hub's own
    assert sent["scheduler_config.json"] == (artefact / "scheduler_config.json").read_bytes()
    assert sent["nodes.png"] == (artefact / "nodes.png").read_bytes()
    assert repo_of(hub).commits[repo_of(hub).resolve("main")]["tree"]["nodes.png"]["sha256"]  # by large-file storage
    assert tree(hub, "v1") == sent and not repo_of(hub).private
    figures = json.loads(sent["eval.json"])
    assert figures["comparison"]["results"] == FLOW["results"]
    config = json.loads(sent["scheduler_config.json"])
    pictures = {"comparison.png", "error.png", "nodes.png"}
    assert sent["README.md"].decode() == card(config, REPO, figures, name="closed_form", pictures=pictures)
    assert f"{REPO} holds this solver and its card at commit {repo_of(hub).resolve('main')}" in capsys.readouterr().out


def test_no_path_of_this_machine_and_no_token_is_sent_or_printed_or_kept(hub, artefact, capsys):
    publish(artefact, "--private", "--tag", "v1")
    assert repo_of(hub).private
    refused(capsys, artefact, "--tag", "v1", repo_id="user/other/third")
    hub.fault = lambda when, command, path: fail(500, f"Bearer? {path}")
    printed = capsys.readouterr()
    refused(capsys, artefact)
    told = [*printed, *(file.read_text(errors="ignore") for file in artefact.parent.rglob("*") if file.is_file())]
    assert not any(TOKEN in text for text in told)
    for data in tree(hub).values():
        assert TOKEN.encode() not in data and str(artefact.parent).encode() not in data


def fail(status, message, *args):
    raise HubError(status, message, *args)


def test_a_dry_run_shows_all_and_speaks_to_nobody(hub, artefact, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    publish(artefact, "--dry_run")
    printed = capsys.readouterr().out
    assert all(f"bytes  {name}\n" in printed for name in FILES)
    assert printed.endswith(f"{publish_module.contents(settings(artefact))['README.md'].decode()}\n")
    assert hub.log == [] and not (artefact / "published.json").exists()


def settings(artefact, **changed):
    comparison = str(artefact.parent / "comparison")
    return PublishConfig(**{"solver": str(artefact), "repo_id": REPO, "comparison": comparison, **changed})


def test_flags_need_no_value():
    words = ["--solver", "a", "--repo_id", "b/c"]
    assert parse(PublishConfig, [*words, "--private"], "prog") == PublishConfig("a", "b/c", private=True)
    assert parse(PublishConfig, [*words, "--force", "false"], "prog").force is False
    with pytest.raises(ValueError, match="--private maybe"):
        parse(PublishConfig, [*words, "--private", "maybe"], "prog")
    with pytest.raises(ValueError, match="private is 1; it must be bool"):
        parse(PublishConfig, [*words, "--private", "1"], "prog")


def test_the_same_again_sends_nothing(hub, artefact):
    publish(artefact)
    publish(artefact, "--tag", "v1")
    assert len(writes(hub)) == 1 and tree(hub, "v1") == tree(hub)
    publish(artefact, "--tag", "v1")
    (artefact / "nodes.png").write_bytes((artefact.parent / "comparison" / "error.png").read_bytes())
    publish(artefact)
    assert len(writes(hub)) == 2 and tree(hub)["nodes.png"] == tree(hub)["error.png"]


def test_a_solver_follows_its_ancestor_and_no_other(hub, artefact, tmp_path, capsys):
    publish(artefact)
    make_artefact(tmp_path, middle=0.4)  # the search went on
    publish(artefact)
    ours = tree(hub)
    assert ours["scheduler_config.json"] == (artefact / "scheduler_config.json").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    stranger = make_artefact(tmp_path / "elsewhere", middle=0.3)
    error = refused(capsys, stranger)
    assert f"{REPO} holds a solver that was not published from '{stranger}'" in error and "--force" in error
    assert tree(hub) == ours and not (stranger / "published.json").exists()
    publish(stranger, "--force")
    assert tree(hub)["scheduler_config.json"] == (stranger / "scheduler_config.json").read_bytes()
    assert "was not published from" in refused(capsys, artefact)


def test_figures_and_pictures_of_an_earlier_publication_do_not_stay(hub, artefact):
    publish(artefact)
    hub.log.clear()
    main(["publish", "--solver", str(artefact), "--repo_id", REPO])
    assert set(tree(hub)) == {"scheduler_config.json", "README.md", "nodes.png"} and len(writes(hub)) == 1
    assert b"Not measured by this project." in tree(hub)["README.md"]


def test_a_damaged_record_makes_a_stranger(hub, artefact, tmp_path, capsys):
    publish(artefact)
    (artefact / "published.json").write_text("{}")
    publish(artefact)  # the very same solver
    (artefact / "published.json").write_text("{}")
    make_artefact(tmp_path, middle=0.4)
    assert "was not published from" in refused(capsys, artefact)


def test_a_push_sends_the_solver_with_a_card_that_knows_no_figures(hub, artefact):
    scheduler = DSSolverScheduler.from_pretrained(artefact)
    scheduler.push_to_hub(REPO)
    sent = tree(hub)
    assert set(sent) == {"scheduler_config.json", "README.md"} and len(writes(hub)) == 1
    assert sent["README.md"].decode() == render(json.loads(sent["scheduler_config.json"]), REPO)
    scheduler.push_to_hub(REPO, subfolder="scheduler", commit_message="as a part")
    assert set(tree(hub)) == {*sent, "scheduler/scheduler_config.json"}
    assert [commit["title"] for commit in repo_of(hub).commits.values()][1:] == ["Upload scheduler", "as a part"]
    DSSolverScheduler(solvers="classical").push_to_hub("user/classical")
    assert set(repo_of(hub, "user/classical").commits[repo_of(hub, "user/classical").resolve("main")]["tree"]) == {
        "scheduler_config.json"
    }


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["solver", "a/b/c", "user/so lver", "user/-x"])
def test_names_of_repositories(hub, artefact, repo_id, capsys):
    assert f"repo_id is '{repo_id}'" in refused(capsys, artefact, repo_id=repo_id)
    assert hub.log == []


def test_folders_that_cannot_be_published(artefact, tmp_path):
    def contents(**changed):
        return publish_module.contents(settings(artefact, **changed))

    with pytest.raises(ValueError, match=r"holds no scheduler_config.json; give the folder"):
        contents(solver=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"no evaluation could be read from '.*absent'"):
        contents(evaluation=str(tmp_path / "absent"))
    record = tmp_path / "comparison" / "comparison.json"
    for text, message in (
        ("[1]", "no comparison could be read"),
        ("{", "no comparison could be read"),
        (json.dumps({**FLOW, "results": FLOW["results"][1:2]}), "has results of unipc, not of 'closed_form'"),
    ):
        record.write_text(text)
        with pytest.raises(ValueError, match=message):
            contents()
    for text, message in (
        ("[1]", "holds a list, not a JSON object"),
        ("{", "could not be read"),
        ('{"comparison": {"results": [{}]}}', r"not as compare and evaluate write them \(KeyError"),
    ):
        (artefact / "eval.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            contents(comparison=None)
    (artefact / "eval.json").unlink()
    DSSolverScheduler(solvers="classical").save_pretrained(tmp_path / "classical")
    with pytest.raises(ValueError, match="has no tables"):
        contents(solver=str(tmp_path / "classical"), comparison=None)
    for text, message in (('{"solvers": {}}', "has no tables"), ("{", "no solver could be read")):
        (artefact / "scheduler_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            contents(comparison=None)


def test_no_token(hub, artefact, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(artefact / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(artefact / "no-tokens"))
    assert refused(capsys, artefact).endswith("no token was found; log in with `hf auth login` or set HF_TOKEN")


def test_offline(hub, artefact, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it to publish" in refused(capsys, artefact)


def test_a_token_that_is_not_accepted(hub, artefact, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the Hub does not accept the token" in refused(capsys, artefact)


@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/"])
def test_no_right_to_write(hub, artefact, capsys, path):
    hub.fault = lambda when, command, url: path in url and fail(403, "Forbidden: you don't have the rights")
    assert f"the token has no right to write to {REPO}" in refused(capsys, artefact)
    assert not hub.repos or set(tree(hub)) == set()


def test_a_name_that_a_hidden_repository_has(hub, artefact, capsys):
    hub.repos["model", REPO] = Repo("model", REPO, False)

    def hide(when, command, path):
        if path.startswith(f"/api/models/{REPO}"):
            fail(404, "Repository not found", "RepoNotFound")

    hub.fault = hide
    assert f"the name {REPO} is taken by a repository that the token may not see" in refused(capsys, artefact)


def test_a_repository_that_vanishes(hub, artefact, capsys):
    hub.fault = lambda when, command, path: "/preupload/" in path and fail(404, "Repository not found", "RepoNotFound")
    assert f"{REPO} was not found, or the token may not see it" in refused(capsys, artefact)


def test_a_public_repository_does_not_become_private_unseen(hub, artefact, capsys):
    publish(artefact)
    assert f"{REPO} is public" in refused(capsys, artefact, "--private")


def test_a_tag_of_another_state(hub, artefact, tmp_path, capsys):
    publish(artefact, "--tag", "v1")
    before, commits = tree(hub), len(writes(hub))
    make_artefact(tmp_path, middle=0.4)
    error = refused(capsys, artefact, "--tag", "v1")
    assert error.endswith(f"tag 'v1' of {REPO} names another state; choose another --tag")
    assert (tree(hub), len(writes(hub))) == (before, commits)
    publish(artefact, "--tag", "v2")
    assert tree(hub, "v1") == before != tree(hub, "v2")
    assert "names another state" in refused(capsys, artefact, "--tag", "v1")  # nothing to send, but not that commit


def test_a_tag_that_comes_in_between(hub, artefact, capsys):
    def sooner(when, command, path):
        if "/tag/" in path and when == "before":
            repo_of(hub).tags["v1"] = next(iter(repo_of(hub).commits))

    hub.fault = sooner
    assert "something of user/solver is taken: tag v1 exists already" in refused(capsys, artefact, "--tag", "v1")


def intrude(hub, files):
    """Another commit, just before the first one that comes."""

    def fault(when, command, path):
        if when == "before" and "/commit/" in path and hub.fault is fault:
            hub.fault = lambda *args: None
            repo_of(hub).commit("main", {**repo_of(hub).commits[repo_of(hub).resolve("main")]["tree"], **files}, "", "")

    hub.fault = fault


def test_a_parent_that_moved(hub, artefact, tmp_path, capsys):
    publish(artefact)
    make_artefact(tmp_path, middle=0.4)
    intrude(hub, {})
    publish(artefact)  # looked again: still the ancestor
    make_artefact(tmp_path, middle=0.3)
    other = {"scheduler_config.json": {"data": b"{}", "oid": "0", "size": 2, "sha256": None}}
    intrude(hub, other)
    assert "was not published from" in refused(capsys, artefact)
    assert tree(hub)["scheduler_config.json"] == b"{}"
    intrude(hub, other)
    error = refused(capsys, artefact, "--force")  # what came in between was never seen
    assert f"{REPO} has moved: another commit came first, and this one was not made" in error
    assert tree(hub)["scheduler_config.json"] == b"{}"


# --- broken connections -----------------------------------------------------------------------------------------------


class DropOne:
    """Breaks the connection at one request, which was served or not."""

    def __init__(self, index, when):
        self.index, self.when, self.count = index, when, 0

    def __call__(self, when, command, path):
        if when == self.when:
            self.count += 1
            if self.count == self.index:
                raise Dropped


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_that_breaks_at_any_request(hub, artefact, when, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    publish(artefact, "--tag", "v1", repo_id="user/whole")
    requests = len(hub.log)
    assert requests > 8
    expected = repo_of(hub, "user/whole")
    for index in range(1, requests + 1):
        hub.repos.clear()
        hub.objects.clear()
        hub.fault = DropOne(index, when)
        publish(artefact, "--tag", "v1")
        repo = repo_of(hub)
        assert len(repo.commits) == 2  # never twice
        assert repo.tags == {"v1": repo.branches["main"]}
        assert set(tree(hub)) == FILES
        assert tree(hub)["nodes.png"] == expected.commits[expected.resolve("main")]["tree"]["nodes.png"]["data"]


def test_a_hub_that_stays_away_leaves_all_or_nothing(hub, artefact, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)

    def gone(when, command, path):
        if "/commit/" in path:
            raise Dropped

    hub.fault = gone
    error = refused(capsys, artefact)
    assert "the Hub could not be reached" in error and "the same command goes on" in error
    assert tree(hub) == {} and len(writes(hub)) == publish_module.ATTEMPTS
    hub.fault = lambda when, command, path: "/commit/" in path and fail(503, "down for maintenance")
    assert "the Hub refused (503): down for maintenance" in refused(capsys, artefact)
    hub.fault = lambda *args: None
    publish(artefact)
    assert set(tree(hub)) == FILES


def test_a_hub_that_is_busy_is_asked_again(hub, artefact):
    def once(when, command, path):
        if "/commit/" in path:
            hub.fault = lambda *args: None
            fail(503, "busy")

    hub.fault = once
    publish(artefact)
    assert set(tree(hub)) == FILES and len(writes(hub)) == 2


def test_two_publishers_at_once(hub, artefact, tmp_path):
    """Both look at an empty repository; the commit of one of them comes second."""
    (tmp_path / "elsewhere").mkdir()
    artefacts, met, errors = [artefact, make_artefact(tmp_path / "elsewhere", middle=0.3)], threading.Barrier(2), []

    def meet(when, command, path):
        if when == "before" and "/commit/" in path:
            met.wait(timeout=20)

    def send(folder):
        try:
            publish_module.publish(settings(folder))
        except ValueError as error:
            errors.append(str(error))

    hub.fault = meet
    threads = [threading.Thread(target=send, args=[folder]) for folder in artefacts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(errors) == 1 and "was not published from" in errors[0]
    assert len(repo_of(hub).commits) == 2
    winner = next(folder for folder in artefacts if str(folder) not in errors[0])
    assert tree(hub)["scheduler_config.json"] == (winner / "scheduler_config.json").read_bytes()


# --- what a user does with it ----------------------------------------------------------------------------------------


def test_what_was_published_is_used(hub, artefact, models, tmp_path, monkeypatch):
    publish(artefact, "--tag", "v1")
    published = DSSolverScheduler.from_pretrained(artefact).solvers
    for revision in (None, "v1", HfApi().list_repo_refs(REPO).branches[0].target_commit):
        assert DSSolverScheduler.from_pretrained(REPO, revision=revision).solvers == published
    card = ModelCard.load(REPO)
    results = {r.metric_args["nfe"]: r.metric_value for r in card.data.eval_results}
    assert results == {r["nfe"]: r["mse"] for r in FLOW["results"] if r["scheduler"] == "closed_form"}
    assert card.data.library_name == "diffusers" and HfApi().model_info(REPO).card_data.license == "apache-2.0"
    copy = Path(snapshot_download(REPO, revision="v1", local_dir=tmp_path / "copy"))
    assert {file.name for file in copy.iterdir() if file.is_file()} == FILES
    assert DSSolverScheduler.from_pretrained(copy).solvers == published
    (tmp_path / "flow").symlink_to(models["flow"])
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(card.text.split("```python\n")[1].split("```")[0], scope)
    assert scope["pipe"].scheduler.tables == (2, 3) and len(scope["output"].images) == 1
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert DSSolverScheduler.from_pretrained(REPO).solvers == published  # from the cache
    assert hub.log == []
