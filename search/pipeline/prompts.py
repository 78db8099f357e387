"""Prompts from files and data sets, and their embeddings made once."""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..console import one_line
from ..settings import ModelConfig
from ..storage import DATA_FILES
from .copies import restored, stored, stored_bytes
from .loading import offload

PROMPT = re.compile(r"(negative_)?prompt(_\d+)?")
MEMO_BYTES = 2**31  # of prompt embeddings held on the CPU


class PromptMemo:
    """Makes each call of a pipeline's `encode_prompt` once.

    Results are kept on the CPU under all arguments of the call and given out as fresh copies, so that no run can change
    them and a batch gets the very embeddings of an ordinary call. Calls with tensors or pictures among their arguments
    go through. Text encoders run without gradients.

    Args:
        pipe: the pipeline; nothing is kept of one without an `encode_prompt`.
        limit: most bytes that are kept; the least recently used results go first.
    """

    def __init__(self, pipe: Any, limit: int = MEMO_BYTES) -> None:
        self.pipe, self.limit, self.held = pipe, limit, 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    @contextmanager
    def used(self, extra: Mapping[str, Any]) -> Iterator[None]:
        """Put the memo in place of the pipeline's method. `extra`: further arguments of this call, part of the key."""
        if not callable(getattr(self.pipe, "encode_prompt", None)):
            yield
            return
        before = vars(self.pipe).get("encode_prompt")
        encode = self.pipe.encode_prompt

        @functools.wraps(encode)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                try:
                    key = _plain((args, kwargs, dict(extra)))
                except TypeError:
                    return encode(*args, **kwargs)
                if key not in self._kept:
                    offload(self.pipe)  # the last call ended early: its denoiser may still lie on the device
                    self._keep(key, encode(*args, **kwargs))
                return self._copy(key)

        self.pipe.encode_prompt = remembered
        try:
            yield
        finally:
            del self.pipe.encode_prompt
            if before is not None:
                self.pipe.encode_prompt = before

    def _keep(self, key: Any, result: Any) -> None:
        kept = stored(result)
        size = stored_bytes(kept)
        self._kept[key] = kept, size
        self.held += size
        while self.held > self.limit and len(self._kept) > 1:
            self.held -= self._kept.popitem(last=False)[1][1]

    def _copy(self, key: Any) -> Any:
        self._kept.move_to_end(key)
        return restored(self._kept[key][0])


def prompts_of(config: ModelConfig) -> list[str]:
    """Prompts from the file or the data set of the settings; none without either."""
    if config.prompts_dataset is None:
        return read_prompts(config.prompts_file)
    column, split, limit = config.prompts_column, config.prompts_split, config.num_prompts
    return prompts_from_dataset(config.prompts_dataset, column, split, limit)


def read_prompts(path: str | None) -> list[str]:
    """Prompts from a text file, one per line, blank lines left out."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts_file {path!r} could not be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts_file {path!r} holds no prompt")
    return prompts


def prompts_from_dataset(name_or_path: str, column: str = "text", split: str = "train", limit: int = 1000) -> list[str]:
    """The first `limit` non-blank texts of one column, read as a stream: no more is fetched than is used.

    Args:
        name_or_path: dataset by Hub id or folder, or a json, jsonl, csv, tsv, parquet or txt file.
        column: of text; the lines of a txt file are in "text".
        split: of the dataset; files have "train" only.

    Raises:
        ValueError: one line that names the dataset, and the column or the file at fault.
    """
    from datasets import load_dataset  # slow to import, and only this needs it

    kind = DATA_FILES.get(Path(name_or_path).suffix.lower())
    options: dict[str, Any] = {"data_files": str(name_or_path)} if kind else {}
    if Path(name_or_path).suffix.lower() == ".tsv":
        options["sep"] = "\t"
    prompts: list[str] = []
    try:
        rows = load_dataset(kind or str(name_or_path), split=split, streaming=True, **options)
        for row in rows:
            if column not in row:
                raise ValueError(f"it has no column {column!r}; its columns: {', '.join(row)}")
            if not isinstance(row[column], str | None):
                raise ValueError(f"column {column!r} holds {type(row[column]).__name__}, not text")
            if row[column] and row[column].strip():
                prompts.append(row[column].strip())
            if len(prompts) == limit:
                break
    except Exception as error:  # whatever a reader of files, archives or web pages raises
        raise ValueError(f"prompts_dataset {str(name_or_path)!r} could not be read: {one_line(error)}") from error
    if not prompts:
        raise ValueError(f"prompts_dataset {str(name_or_path)!r} holds no text in column {column!r}")
    return prompts


def _plain(value: Any) -> Any:
    """A hashable copy of texts, numbers, devices, dtypes and containers of them. Raises TypeError for others."""
    if value is None or isinstance(value, (str, bool, int, float, torch.device, torch.dtype)):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return tuple((str(k), _plain(v)) for k, v in sorted(value.items()))
    raise TypeError(f"{type(value).__name__} is no key")
