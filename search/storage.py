"""Files that survive a kill at any moment.

A file is written under another name, flushed to the disk and renamed into place: readers and other writers see the old
file or the new one. Every file carries the SHA-256 of its contents. Formats: JSON and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from .console import warn

CHECKSUM, RECORD = "sha256", "record"
STALE_SECONDS = 3600  # age of a partial file whose writer is taken for dead
Kept = tuple[dict[str, Tensor], dict[str, str]]  # contents of a file: tensors, facts


class Damaged(ValueError):
    """A file whose contents are not what was written."""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to, renamed to `file` if the block ends without an error."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
        _sync_folder(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Delete partial files of killed writers; younger ones may belong to living writers."""
    for partial in folder.glob("*.tmp"):
        if partial.is_file() and time.time() - partial.stat().st_mtime > STALE_SECONDS:
            partial.unlink(missing_ok=True)


def drop_torn_line(file: Path) -> None:
    """Cut off an unfinished last line, as a killed process leaves it in a file that is appended to."""
    if file.exists():
        whole = file.read_bytes()
        if not whole.endswith(b"\n"):
            os.truncate(file, whole.rfind(b"\n") + 1)


def write_text(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def to_line(record: Mapping[str, Any]) -> str:
    """JSON on one line, with a checksum."""
    return json.dumps({**record, CHECKSUM: _text_digest(record)})


def from_line(text: str) -> dict[str, Any]:
    """What `to_line` or `write_record` wrote. Raises Damaged."""
    try:
        record = json.loads(text)
        if record.pop(CHECKSUM) == _text_digest(record):
            return record
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"no record of a search ({type(error).__name__})") from None
    raise Damaged("its checksum does not fit")


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """JSON with a checksum."""
    write_text(file, json.dumps({CHECKSUM: _text_digest(record), **record}, indent=1))


def read_record(file: Path) -> dict[str, Any]:
    """What `write_record` wrote. Raises Damaged."""
    try:
        return from_line(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from None


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with a checksum of its tensors and metadata."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as partial:
        record = {**metadata, CHECKSUM: _tensor_digest(held, metadata)}
        save_file(held, partial, metadata={RECORD: json.dumps(record)})  # one key: safetensors does not order them


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote. Raises Damaged."""
    try:
        data = file.read_bytes()  # not mapped: a mapped file may change or shrink while it is read
        tensors = load(data)
        metadata = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][RECORD])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from None
    if not isinstance(metadata, dict) or metadata.pop(CHECKSUM, None) != _tensor_digest(tensors, metadata):
        raise Damaged("its checksum does not fit")
    return tensors, metadata


def kept_all(files: Sequence[Path | None], make: Callable[[], Sequence[Kept]]) -> list[Kept]:
    """What `write_tensors` wrote to these files. If any is absent or damaged, all are made at once, and the missing
    ones written; the others keep what they hold.

    Args:
        files: None: kept nowhere.
        make: the contents of all files, in their order.
    """
    found = [_found(file) for file in files]
    if all(found):
        return [one for one in found if one]
    made, contents = make(), []
    for file, one, new in zip(files, found, made, strict=True):
        if file is not None and one is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, *new)
        contents.append(one or new)
    return contents


def kept(file: Path, make: Callable[[], Kept]) -> Kept:
    """What `write_tensors` wrote to this file; made and written if it is absent or damaged."""
    return kept_all([file], lambda: [make()])[0]


def _found(file: Path | None) -> Kept | None:
    if file is None or not file.exists():
        return None
    try:
        return read_tensors(file)
    except Damaged as error:
        warn(f"{file} is damaged and made anew: {error}")
        return None


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a rename needs no such help
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _text_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _tensor_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    _add_tensors(digest, tensors)
    return digest.hexdigest()


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers."""
    digest = hashlib.sha256()
    _add_tensors(digest, {name: t for name, t in network.state_dict().items() if isinstance(t, Tensor)})
    return digest.hexdigest()


def _add_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


# builder of `datasets` by file name extension
DATA_FILES = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip
