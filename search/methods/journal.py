"""What a search writes while it works: progress for people, and finished fits for a search that was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_dssolver.solver import SolverSpec

from ..console import say
from ..pipeline.replay import uncounted
from ..processes import from_main
from ..storage import Damaged, drop_torn_line, from_line, to_line, write_text
from .closed_form import Candidate, ClosedForm, Samples, warped_nodes
from .log import Log
from .setup import Setup

METRICS, JOURNAL = "metrics.jsonl", "trials.jsonl"


class Journal:
    """Results of tasks, one line each as soon as they are known. A killed process leaves at most the last line torn,
    which is then left out.

    Args:
        file: JSON lines; the main process writes and reads it, the others are sent what it reads.
        key: of the search; lines with another key are not its own.
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
        """The result of a task, if a killed run found it."""
        return self._known.get(json.dumps(task, sort_keys=True))

    def add(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        if self.writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(to_line({"key": self.key, "task": task, "result": result}) + "\n")

    def clear(self) -> None:
        """Forget all results: what they led to is kept elsewhere."""
        self._known = {}
        if self.writes:
            self.file.unlink(missing_ok=True)


class SearchLog(Log):
    """The log of a search in every process; the main one writes and shows.

    Attributes:
        stages: of the step count at hand, as the result tells them.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.file, self.started = setup, setup.folder / METRICS, time.time()
        self.journal = Journal(setup.folder / JOURNAL, setup.key, setup.accelerator)
        if setup.main:
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
        if self.setup.main:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "seconds_since_start": round(time.time() - self.started, 2)}) + "\n")

    def trial(self, candidate: Candidate) -> None:
        tried = {"nfe": candidate.spec.nfe, "warp": list(candidate.warp), "ridge": candidate.ridge}
        self.write(**tried, train_mse=candidate.train_mse, network_evaluations=self.evaluations())

    def call(self, **figures: Any) -> None:
        self.write(**figures)

    def stage(self, name: str, candidate: Candidate, **figures: float) -> None:
        total = self.evaluations()
        reached = {"stage": name, "validation_mse": candidate.validation_mse, **figures}
        self.write(nfe=candidate.spec.nfe, **reached, network_evaluations=total)
        self.stages.append({**reached, "network_evaluations": total - self.spent})
        self.spent = total

    def recall(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        if known := self.journal.get(task):
            self.setup.add_evaluations(known["network_evaluations"])
        return known

    def remember(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.journal.add(task, result)

    @contextmanager
    def progress(self, description: str, unit: str, total: int) -> Iterator[Callable[..., None]]:
        with tqdm(desc=description, unit=unit, total=total, disable=not self.setup.main) as bar:

            def advance(**figures: Any) -> None:
                bar.set_postfix(figures, refresh=False)
                bar.update()

            yield advance

    def say(self, line: str) -> None:
        self.setup.say(line)


@dataclass
class ResumableForm(ClosedForm):
    """A closed form whose finished fits are kept, so that a search killed inside one step count replays them."""

    log: Log = field(default_factory=Log)

    def fit(self, nfe: int, warp: Sequence[float], ridge: float, samples: Samples | None = None) -> Candidate:
        a, b, c = map(float, warp)
        task = {"nfe": nfe, "warp": [a, b, c], "ridge": ridge, "samples": "trial" if samples else "train"}
        if known := self.log.recall(task):
            spec = SolverSpec.from_dict(known["spec"])
            self.start_again("train", samples or self.train, nfe)
            return Candidate((a, b, c), ridge, warped_nodes(warp, nfe), spec, known["train_mse"])
        before = self.log.evaluations()
        found = super().fit(nfe, warp, ridge, samples)
        self.log.trial(found)
        result = {"spec": found.spec.to_dict(), "train_mse": found.train_mse}
        self.log.remember(task, {**result, "network_evaluations": self.log.evaluations() - before})
        return found

    def start_again(self, split: str, samples: Samples, nfe: int) -> None:
        """Repeat the first network calls, which the killed run has counted already."""
        with uncounted(self.sampler):
            for indices, _ in self.batches(samples):
                self.start(split, indices, nfe)
