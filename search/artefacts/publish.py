"""The `publish` command: a solver, its card, figures and pictures to the Hub in one commit; and `cards`, which renders
those that ship with the package.

Publishing is one sequence that may be repeated from its start: it looks at what the repository holds, commits onto that
very state, and tags it. Where a connection breaks, even after a commit arrived, the sequence is repeated. The Hub's own
client finds the token and leaves out files that have not changed.
"""

from __future__ import annotations

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
from huggingface_hub.utils.sha import git_hash

from diffusers_dssolver.card import CARD, schedule, without_paths
from diffusers_dssolver.published import CONFIG_NAME

from ..console import warn
from ..settings import CardsConfig, PublishConfig
from ..storage import Damaged, read_record, write_record, write_text
from .figures import KINDS, PICTURES, card
from .read import load_solver, read_json, read_results

EVAL = "eval.json"
RECORD = "published.json"  # in the solver's folder: by repository, the git objects of the solvers sent there
ATTEMPTS, PAUSE = 5, 1.0  # seconds, doubled each time
BUSY, MOVED = (429, 500, 502, 503, 504), 412
INDEX = ("<!-- solvers -->", "<!-- /solvers -->")


def publish(config: PublishConfig) -> None:
    """The command: `sent`, and what it says printed."""
    print(sent(config))


def sent(config: PublishConfig) -> str:
    """Send the solver, or tell what would be sent; in words.

    Raises:
        ValueError: the folder has no usable solver or figures, the repository holds another solver, the tag is taken,
            or the Hub refuses. Nothing has been committed then.
    """
    try:
        validate_repo_id(config.repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id is {config.repo_id!r}: {error}") from None
    if config.repo_id.count("/") != 1:
        raise ValueError(f"repo_id is {config.repo_id!r}; it must be org/name")
    files = contents(config)
    if config.dry_run:
        listed = [f"{len(data):>9,} bytes  {name}" for name, data in files.items()]
        return "\n".join([*listed, f"would be sent to {config.repo_id}\n\n{files[CARD].decode()}"])
    commit = _persistently(config, files)
    at = f", tagged {config.tag}" if config.tag else ""
    return f"{config.repo_id} holds this solver and its card at commit {commit}{at}"


def contents(config: PublishConfig) -> dict[str, bytes]:
    """The files of the repository, by name."""
    folder = Path(config.solver)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{config.solver!r} holds no {CONFIG_NAME}; give the folder that search wrote")
    load_solver(config.solver)  # refuses what no scheduler takes
    data = (folder / CONFIG_NAME).read_bytes()
    name, figures = folder.resolve().name, _figures(folder)
    measured = {k: v for k, v in (("comparison", config.comparison), ("evaluation", config.evaluation)) if v}
    figures = without_paths(figures | {what: _measured(name, what, source) for what, source in measured.items()})
    folders = [*map(Path, measured.values()), folder]
    pictures = {name: next((f / name for f in folders if (f / name).is_file()), None) for name in PICTURES}
    files = {name: file.read_bytes() for name, file in pictures.items() if file is not None}
    try:
        text = card(json.loads(data), config.repo_id, figures, name=name, pictures=files, license=config.license)
    except (KeyError, TypeError, AttributeError) as error:
        wrong = f"its figures are not as compare and evaluate write them ({type(error).__name__}: {error})"
        raise ValueError(f"no card could be made for {config.solver!r}: {wrong}; measure it anew") from error
    if any(figures.values()):
        files[EVAL] = (json.dumps(figures, indent=1) + "\n").encode()
    return {CONFIG_NAME: data, CARD: text.encode(), **files}


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
        name, config, figures = artefact.name, read_json(artefact / CONFIG_NAME), _figures(artefact)
        pictures = [picture for picture in PICTURES if (artefact / picture).is_file()]
        texts[artefact / CARD] = card(config, name, figures, pictures=pictures)
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
    none = dict.fromkeys(KINDS)
    return none | read_json(folder / EVAL) if (folder / EVAL).exists() else none


def _measured(name: str, what: str, folder: str) -> dict[str, Any]:
    """The comparison or evaluation in a folder, which must have results of this solver."""
    record = read_results(folder, what)
    names = {r["scheduler"] for r in record["results"]}
    if name not in names:
        others = f"has results of {', '.join(sorted(names))}, not of {name!r}"
        raise ValueError(f"the {what} in {folder!r} {others}; measure this solver")
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
            # With --force a commit that came in between was never compared with ours: it is not overwritten.
            again = status in (None, *BUSY) or (status == MOVED and not config.force)
            if not again or attempt == ATTEMPTS:
                raise ValueError(_in_words(error, status, config.repo_id)) from None
            warn(f"the Hub {f'answered {status}' if status else 'could not be reached'}; trying again")
            time.sleep(PAUSE * 2 ** (attempt - 1))


def _send(api: HfApi, config: PublishConfig, files: Mapping[str, bytes]) -> str:
    """Once through the sequence; the commit that holds the files."""
    head = _head(api, config)
    there = _there(api, config.repo_id, [*{*files, EVAL, *PICTURES}], head)
    _check_ancestor(config, files[CONFIG_NAME], there.get(CONFIG_NAME))
    added = {name: CommitOperationAdd(name, data) for name, data in files.items()}
    gone = [CommitOperationDelete(name) for name in there if name not in files]
    changed = gone or not all(_holds(there.get(name), add) for name, add in added.items())
    tagged = _tagged(api, config)
    if tagged is not None and (changed or tagged != head.sha):
        raise ValueError(f"tag {config.tag!r} of {config.repo_id} names another state; choose another --tag")
    _remember(config, files[CONFIG_NAME])  # before it is sent: a kill in between must not make the solver a stranger's
    commit = head.sha
    if changed:
        operations, message = [*added.values(), *gone], f"Publish {Path(config.solver).resolve().name}"
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


def _there(api: HfApi, repo_id: str, names: list[str], head: ModelInfo) -> dict[str, RepoFile]:
    """Those of the files that the repository holds."""
    found = api.get_paths_info(repo_id, names, revision=head.sha)
    return {file.path: file for file in found if isinstance(file, RepoFile)}


def _holds(file: RepoFile | None, add: CommitOperationAdd) -> bool:
    """Whether a file is there with this very content. Large-file storage names files by SHA-256, git by its own."""
    if file is None:
        return False
    if file.lfs:
        return file.lfs.sha256 == add.upload_info.sha256.hex()
    with add.as_file() as data:
        return file.blob_id == git_hash(data.read())


def _check_ancestor(config: PublishConfig, solver: bytes, there: RepoFile | None) -> None:
    """Refuse to replace a solver, unless it is this one or one that was sent from this folder before."""
    ours = {git_hash(solver), *_remembered(config).get(config.repo_id, [])}
    if there is not None and there.blob_id not in ours and not config.force:
        stranger = f"{config.repo_id} holds a solver that was not published from {config.solver!r}"
        raise ValueError(f"{stranger}; choose another --repo_id, or --force to take its place")


def _tagged(api: HfApi, config: PublishConfig) -> str | None:
    """The commit that the tag names, if there is one."""
    tags = api.list_repo_refs(config.repo_id).tags if config.tag else []
    return next((ref.target_commit for ref in tags if ref.name == config.tag), None)


def _remembered(config: PublishConfig) -> dict[str, list[str]]:
    try:
        return read_record(Path(config.solver) / RECORD)
    except Damaged as error:
        if (Path(config.solver) / RECORD).exists():
            warn(f"{Path(config.solver) / RECORD} is damaged and left out: {error}")
        return {}


def _remember(config: PublishConfig, solver: bytes) -> None:
    known, ours = _remembered(config), git_hash(solver)
    if ours not in known.get(config.repo_id, []):
        sent = [*known.get(config.repo_id, []), ours]
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
