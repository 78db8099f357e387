"""The `publish` command: a solver, its card, figures and pictures to the Hub in one commit; and `cards`, which renders
those that ship with the package.

Publishing is one sequence that may be repeated from its start: it looks at what the repository holds, sends what
differs in one commit onto that very state, and tags it. When a connection breaks, even after a commit arrived, it is
repeated. No token is read here: the Hub's own client finds it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import validate_repo_id

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.card import CARD, EVAL, PICTURES, render, schedule, without_paths
from diffusers_dssolver.published import CONFIG_NAME

from ..console import say
from ..settings import CardsConfig, PublishConfig
from ..storage import Damaged, read_record, write_record, write_text
from .read import read_results

RECORD = "published.json"  # in the solver's folder: by repository, the git objects of the solvers sent there
ATTEMPTS, PAUSE = 5, 1.0  # seconds, doubled each time
BUSY, MOVED = (429, 500, 502, 503, 504), 412
INDEX = ("<!-- solvers -->", "<!-- /solvers -->")


def publish(config: PublishConfig) -> None:
    """Send the solver, or print what would be sent.

    Raises:
        ValueError: for a folder without a usable solver or figures, for a repository that holds another solver, a tag
            that is taken, and for what the Hub refuses; nothing has been committed then.
    """
    try:
        validate_repo_id(config.repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id is {config.repo_id!r}: {error}") from None
    if config.repo_id.count("/") != 1:
        raise ValueError(f"repo_id is {config.repo_id!r}; it must be org/name")
    files = contents(config)
    if config.dry_run:
        print("\n".join(f"{len(data):>9,} bytes  {name}" for name, data in files.items()))
        print(f"would be sent to {config.repo_id}\n\n{files[CARD].decode()}")
        return
    commit = _persistently(config, files)
    at = f", tagged {config.tag}" if config.tag else ""
    print(f"{config.repo_id} holds this solver and its card at commit {commit}{at}")


def contents(config: PublishConfig) -> dict[str, bytes]:
    """The files of the repository, by name."""
    folder = Path(config.solver)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{config.solver!r} holds no {CONFIG_NAME}; give the folder that search wrote")
    if not DSSolverScheduler.from_pretrained(folder).tables:
        raise ValueError(f"{config.solver!r} has no tables; search a solver first")
    data = (folder / CONFIG_NAME).read_bytes()
    name, figures = folder.resolve().name, _figures(folder)
    measured = {k: v for k, v in (("comparison", config.comparison), ("evaluation", config.evaluation)) if v}
    figures = without_paths(figures | {what: _measured(name, what, source) for what, source in measured.items()})
    folders = [*map(Path, measured.values()), folder]
    pictures = {name: next((f / name for f in folders if (f / name).is_file()), None) for name in PICTURES}
    files = {name: file.read_bytes() for name, file in pictures.items() if file is not None}
    try:
        card = render(json.loads(data), config.repo_id, figures, name=name, pictures=files, license=config.license)
    except (KeyError, TypeError, AttributeError) as error:
        wrong = f"its figures are not as compare and evaluate write them ({type(error).__name__}: {error})"
        raise ValueError(f"no card could be made for {config.solver!r}: {wrong}") from error
    if any(figures.values()):
        files[EVAL] = (json.dumps(figures, indent=1) + "\n").encode()
    return {CONFIG_NAME: data, CARD: card.encode(), **files}


def cards(config: CardsConfig) -> None:
    """Render the README.md of every artefact in the folder, and their index in the folder's own."""
    folder = Path(config.folder)
    for file, text in rendered(folder).items():
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)
            print(f"rendered {file}")


def rendered(folder: Path) -> dict[Path, str]:
    """What the cards and the index should say, by file."""
    head = "| solver | searched on | noise schedule | network calls with a table | figures |"
    texts, rows = {}, [head, "|---|---|---|---|---|"]
    for artefact in sorted(file.parent for file in folder.glob(f"*/{CONFIG_NAME}")):
        name, config, figures = artefact.name, _read(artefact / CONFIG_NAME), _figures(artefact)
        pictures = [picture for picture in PICTURES if (artefact / picture).is_file()]
        texts[artefact / CARD] = render(config, name, figures, pictures=pictures)
        counts = ", ".join(map(str, sorted(map(int, config["solvers"]))))
        told = ("measured" if what != "reported" else "reported" for what in figures if figures[what])
        model = config["provenance"]["model"]
        rows.append(f"| [{name}]({name}/{CARD}) | {model} | {schedule(config)} | {counts} | {next(told, 'none')} |")
    index = folder / CARD
    before, _, rest = index.read_text(encoding="utf-8").partition(INDEX[0])
    texts[index] = "\n".join([before + INDEX[0], *rows, INDEX[1]]) + rest.partition(INDEX[1])[2]
    return texts


def _figures(folder: Path) -> dict[str, Any]:
    """The `eval.json` of an artefact."""
    none = dict.fromkeys(("comparison", "evaluation", "reported"))
    return none | _read(folder / EVAL) if (folder / EVAL).exists() else none


def _measured(name: str, what: str, folder: str) -> dict[str, Any]:
    """The comparison or evaluation in a folder, which must have this solver in it."""
    record = read_results(folder, what)
    names = {r["scheduler"] for r in record["results"]}
    if name not in names:
        others = f"has results of {', '.join(sorted(names))}, not of {name!r}"
        raise ValueError(f"the {what} in {folder!r} {others}; measure this solver")
    return record


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} could not be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(file)!r} holds a {type(record).__name__}, not a JSON object")
    return record


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _persistently(config: PublishConfig, files: Mapping[str, bytes]) -> str:
    """The commit that holds the files; the sequence is repeated where the connection breaks or the Hub is busy."""
    api = HfApi(token=True)  # a token is required, and found by the client
    for attempt in itertools.count(1):
        try:
            return _send(api, config, files)
        except OfflineModeIsEnabled:
            raise ValueError("HF_HUB_OFFLINE is set; unset it to publish") from None
        except LocalTokenNotFoundError:
            raise ValueError("no token was found; log in with `hf auth login` or set HF_TOKEN") from None
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            # with --force nothing is taken for granted about what came in between
            again = status in (None, *BUSY) or (status == MOVED and not config.force)
            if not again or attempt == ATTEMPTS:
                raise ValueError(_in_words(error, status, config.repo_id)) from None
            say(f"the Hub {f'answered {status}' if status else 'could not be reached'}; trying again")
            time.sleep(PAUSE * 2 ** (attempt - 1))


def _send(api: HfApi, config: PublishConfig, files: Mapping[str, bytes]) -> str:
    """Once through the sequence; the commit that holds the files."""
    head = _head(api, config)
    _check_ancestor(api, config, files[CONFIG_NAME], head)
    tagged = _tagged(api, config)
    changed = _changed(api, config.repo_id, files, head)
    if tagged is not None and (changed or tagged != head.sha):
        raise ValueError(f"tag {config.tag!r} of {config.repo_id} names another state; choose another --tag")
    _remember(config, files[CONFIG_NAME])  # before it is sent: a kill in between must not make the solver a stranger's
    commit = head.sha
    if changed:
        operations = [CommitOperationAdd(n, files[n]) if n in files else CommitOperationDelete(n) for n in changed]
        message = f"Publish {', '.join(changed)}"
        commit = api.create_commit(config.repo_id, operations, commit_message=message, parent_commit=head.sha).oid
    if config.tag and tagged is None:
        api.create_tag(config.repo_id, tag=config.tag, revision=commit)
    return commit


def _head(api: HfApi, config: PublishConfig) -> ModelInfo:
    """The repository as it is; made if there is none."""
    try:
        head = api.model_info(config.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(config.repo_id, private=config.private or None, exist_ok=True)
        try:
            head = api.model_info(config.repo_id)
        except RepositoryNotFoundError:
            taken = f"the name {config.repo_id} is taken by a repository that the token may not see"
            raise ValueError(f"{taken}; choose another --repo_id") from None
    if config.private and not head.private:
        raise ValueError(f"{config.repo_id} is public; make it private on the Hub first, or leave --private out")
    return head


def _check_ancestor(api: HfApi, config: PublishConfig, solver: bytes, head: ModelInfo) -> None:
    """A solver that is there must be this one, or one that was sent from this folder before."""
    there = _blobs(api, config.repo_id, [CONFIG_NAME], head)
    ours = {_blob(solver), *_remembered(config).get(config.repo_id, [])}
    if there and there[CONFIG_NAME] not in ours and not config.force:
        stranger = f"{config.repo_id} holds a solver that was not published from {config.solver!r}"
        raise ValueError(f"{stranger}; choose another --repo_id, or --force to take its place")


def _tagged(api: HfApi, config: PublishConfig) -> str | None:
    """The commit that the tag names, if there is one."""
    tags = api.list_repo_refs(config.repo_id).tags if config.tag else []
    return next((ref.target_commit for ref in tags if ref.name == config.tag), None)


def _changed(api: HfApi, repo_id: str, files: Mapping[str, bytes], head: ModelInfo) -> list[str]:
    """Names of the files that are not there, that differ, or that only an earlier publication had."""
    there = _blobs(api, repo_id, [*{*files, EVAL, *PICTURES}], head)
    gone = [name for name in there if name not in files]
    return [name for name, data in files.items() if there.get(name) not in (_blob(data), _sha256(data))] + gone


def _blobs(api: HfApi, repo_id: str, names: list[str], head: ModelInfo) -> dict[str, str]:
    """What identifies the files that are there: a git object, or the SHA-256 of one in large-file storage."""
    found = api.get_paths_info(repo_id, names, revision=head.sha)
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in found if isinstance(f, RepoFile)}


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _remembered(config: PublishConfig) -> dict[str, list[str]]:
    try:
        return read_record(Path(config.solver) / RECORD)
    except Damaged as error:
        if (Path(config.solver) / RECORD).exists():
            say(f"{Path(config.solver) / RECORD} is damaged and left out: {error}")
        return {}


def _remember(config: PublishConfig, solver: bytes) -> None:
    known = _remembered(config)
    if _blob(solver) not in known.get(config.repo_id, []):
        sent = [*known.get(config.repo_id, []), _blob(solver)]
        write_record(Path(config.solver) / RECORD, {**known, config.repo_id: sent})


def _in_words(error: HTTPError, status: int | None, repo_id: str) -> str:
    """What went wrong and what to do about it."""
    told = " ".join((getattr(error, "server_message", None) or "").split())
    words = {
        None: f"the Hub could not be reached ({type(error).__name__}); the same command goes on from what arrived",
        401: "the Hub does not accept the token; log in again with `hf auth login` or set another HF_TOKEN",
        403: f"the token has no right to write to {repo_id}; use one that has, or another --repo_id",
        404: f"{repo_id} was not found, or the token may not see it",
        409: f"the Hub says that something of {repo_id} is taken: {told}; choose another name or tag",
        MOVED: f"{repo_id} has moved: another commit came first, and this one was not made; look at it and try again",
    }
    return words.get(status, f"the Hub refused ({status}): {told}; try again later")
