"""What a run keeps on disk, so that a kill at any moment loses little and spoils nothing.

Every file is written aside under a name of its own, flushed to the disk and renamed into place, so that readers and
other writers see the old file or the new one. Every file carries the SHA-256 of what it holds; a damaged one is named
in one line and left out. JSON and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from .console import say
from .processes import from_main

CHECKSUM, RECORD = "sha256", "record"
STALE_SECONDS = 3600  # a partial file this old belongs to no living writer
T = TypeVar("T")
Kept = tuple[dict[str, Tensor], dict[str, str]]  # of a file: tensors, facts


class Damaged(ValueError):
    """A file that is not what was written."""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to; what was written there takes the place of `file` if the block ends well."""
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
    """What killed writers left behind; younger files may belong to living ones."""
    for partial in folder.glob("*.tmp"):
        if partial.is_file() and time.time() - partial.stat().st_mtime > STALE_SECONDS:
            partial.unlink(missing_ok=True)


def drop_torn_line(file: Path) -> None:
    """Cut off what a killed process left after the last line end of a file that is appended to."""
    if file.exists():
        whole = file.read_bytes()
        if not whole.endswith(b"\n"):
            os.truncate(file, whole.rfind(b"\n") + 1)


def write_text(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def to_line(record: Mapping[str, Any]) -> str:
    """JSON on one line, its checksum in it."""
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
        data = file.read_bytes()  # whole: a file mapped into memory could still change or shrink
        tensors = load(data)
        metadata = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][RECORD])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from None
    if not isinstance(metadata, dict) or metadata.pop(CHECKSUM, None) != _tensor_digest(tensors, metadata):
        raise Damaged("its checksum does not fit")
    return tensors, metadata


def kept(file: Path, make: Callable[[], Kept]) -> Kept:
    """What `write_tensors` wrote there; where there is nothing, or it is damaged, it is made first."""
    try:
        return read_tensors(file)
    except Damaged as error:
        if file.exists():
            say(f"{file} is damaged and made anew: {error}")
    made = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, *made)
    return made


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
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers."""
    told = hashlib.sha256()
    tensors = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    for name, value in sorted(tensors.items()):
        told.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        told.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return told.hexdigest()


class Journal:
    """Results of tasks on disk, one line each as soon as it is known, so that a resumed run need not do them again.

    Lines are appended: a killed process leaves at most the last one torn, and that one is left out.

    Args:
        file: JSON lines; written by the main process, read by it and sent to the others.
        key: of the run; lines with another key are not its own.
    """

    def __init__(self, file: Path, key: str, accelerator: Accelerator) -> None:
        self.file, self.key, self.writes = file, key, accelerator.is_main_process
        self._known: dict[str, Any] = from_main(accelerator, self._read() if self.writes else {})

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {}
        kept, known = [], {}
        lines = self.file.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                record = from_line(line.decode())
            except (Damaged, UnicodeDecodeError) as error:
                say(f"{self.file}, line {number} is damaged and left out: {error}")
                continue
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            if record.get("key") == self.key:
                known[json.dumps(record["task"], sort_keys=True)] = record["result"]
        if kept != lines:
            write_text(self.file, b"".join(kept).decode())
        return known

    def get(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result that an earlier, killed run found."""
        return self._known.get(json.dumps(task, sort_keys=True))

    def add(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        if self.writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(to_line({"key": self.key, "task": task, "result": result}) + "\n")

    def clear(self) -> None:
        """Forget them: what they served is kept elsewhere."""
        self._known = {}
        if self.writes:
            self.file.unlink(missing_ok=True)


DATA_FILES = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip
