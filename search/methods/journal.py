"""What a search writes while it works: progress for people, and finished fits for a search that was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..console import warn
from ..processes import from_main
from ..storage import Damaged, drop_torn_line, from_line, to_line, write_text
from .log import Log
from .problem import Candidate
from .setup import Setup

METRICS, JOURNAL = "metrics.jsonl", "trials.jsonl"


class Journal:
    """Results of tasks, one line each as soon as they are known. A killed process leaves at most the last line torn,
    which is then left out.

    Args:
        file: JSON lines; the main process writes and reads it, the others are sent what it reads. None: results are
            kept in memory alone.
        key: of the search; lines with another key are not its own.
    """

    def __init__(self, file: Path | None, key: str, accelerator: Accelerator) -> None:
        self.file, self.key = file, key
        self.writes = file is not None and accelerator.is_main_process
        self._known: dict[str, Any] = from_main(accelerator, self._read() if self.writes else {})

    def _read(self) -> dict[str, Any]:
        if self.file is None or not self.file.exists():
            return {}
        kept, known = [], {}
        lines = self.file.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                record = from_line(line.decode())
            except (Damaged, UnicodeDecodeError) as error:
                warn(f"{self.file}, line {number} is damaged and left out: {error}")
                continue
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            if record.get("key") == self.key:
                known[json.dumps(record["task"], sort_keys=True)] = record["result"]
        if kept != lines:
            write_text(self.file, b"".join(kept).decode())
        return known

    def get(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a task, if a killed run found it."""
        return self._known.get(json.dumps(task, sort_keys=True))

    def add(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self._known[json.dumps(task, sort_keys=True)] = dict(result)
        if self.file is not None and self.writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(to_line({"key": self.key, "task": task, "result": result}) + "\n")

    def clear(self) -> None:
        """Forget all results: what they led to is kept elsewhere."""
        self._known = {}
        if self.file is not None and self.writes:
            self.file.unlink(missing_ok=True)


class SearchLog(Log):
    """The log of a search in every process; the main one writes and shows.

    Attributes:
        stages: of the step count at hand, as the result tells them.
    """

    def __init__(self, setup: Setup) -> None:
        folder = setup.folder
        self.setup, self.file, self.started = setup, folder / METRICS if folder else None, time.time()
        self.journal = Journal(folder / JOURNAL if folder else None, setup.key, setup.accelerator)
        if self.file and setup.main:
            drop_torn_line(self.file)
        self.begin()

    def begin(self) -> None:
        """A step count is begun."""
        self.stages: list[dict[str, Any]] = []
        self.spent = self.evaluations()

    def evaluations(self) -> int:
        return self.setup.evaluations()

    def write(self, **facts: Any) -> None:
        """One line of metrics.jsonl, the clock added."""
        if self.file and self.setup.main:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "seconds_since_start": round(time.time() - self.started, 2)}) + "\n")

    def tell(self, facts: dict[str, Any]) -> None:
        """Give the user's callback the end of a stage."""
        if self.setup.callback and self.setup.main:
            self.setup.callback(facts)

    def trial(self, candidate: Candidate) -> None:
        tried = {"nfe": candidate.nfe, "warp": list(candidate.step_warp), "ridge": candidate.ridge}
        self.write(**tried, train_mse=candidate.train_mse, network_evaluations=self.evaluations())

    def call(self, **figures: Any) -> None:
        self.write(**figures)

    def stage(self, name: str, candidate: Candidate, **figures: float) -> None:
        total = self.evaluations()
        reached = {"stage": name, "validation_mse": candidate.validation_mse, **figures}
        self.write(nfe=candidate.nfe, **reached, network_evaluations=total)
        self.tell({"nfe": candidate.nfe, **reached, "network_evaluations": total})
        self.stages.append({**reached, "network_evaluations": total - self.spent})
        self.spent = total

    def recall(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        if known := self.journal.get(task):
            self.recalled(known["network_evaluations"])
        return known

    def remember(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.journal.add(task, result)

    def checkpoint(self, name: str) -> tuple[Path | None, str]:
        return self.setup.folder / f"{name}.safetensors" if self.setup.folder else None, self.setup.key

    def recalled(self, evaluations: int) -> None:
        self.setup.add_evaluations(evaluations)

    def affords(self, evaluations: int) -> bool:
        fits = self.setup.affords(evaluations)
        if not fits and (told := "optional stages") not in self.setup.left_out:
            self.setup.left_out.append(told)
        return fits

    @contextmanager
    def progress(self, description: str, unit: str, total: int) -> Iterator[Callable[..., None]]:
        with tqdm(desc=description, unit=unit, total=total, disable=not self.setup.shows) as bar:

            def advance(**figures: Any) -> None:
                bar.set_postfix(figures, refresh=False)
                bar.update()

            yield advance

    def say(self, line: str) -> None:
        self.setup.say(line)
