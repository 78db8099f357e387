"""The folder of a search: complete for `DSSolverScheduler.from_pretrained` after every step count, and resumable.

A search killed at any moment goes on to the same solver as an undisturbed one, to the bit on the same machine with the
same number of threads and processes.

    scheduler_config.json         the solvers and their provenance
    search_state.json             what is known, with a checksum; search_state.previous.json: the one before
    trials.jsonl                  fits of the step count that is being searched
    metrics.jsonl                 progress, for people
    cache/                        the teacher's trajectories
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.card import without_paths

from ..console import say, warn
from ..images.networks import described
from ..processes import from_main
from ..storage import Damaged, read_record, remove_partial_files, write_record, write_text
from .fill import SOLVER_KEYS, Entry, solver_of
from .journal import SearchLog
from .setup import Setup

SCHEDULER, STATE, PREVIOUS = "scheduler_config.json", "search_state.json", "search_state.previous.json"
# of a solver that the pipeline already had
OWN_KEYS = (
    "solvers", "guidance_solvers", "guidance_scale", "provenance", "strict", "history_length", "searched_shift",
    "interpolate_corrections",
)  # fmt: skip
# of each entry, in the provenance
RECORDED = (
    "kind", "source", "validation_mse", "validation_tail", "classical_mse", "classical_tail", "held_out", "ratio",
    "rejected", "warp", "ridge", "parameters", "stages",
)  # fmt: skip


class Record:
    """What one search knows and keeps. Every process has one; the main process reads and writes.

    Attributes:
        state: plain data: `key`, `network_evaluations`, `solvers` by step count (text), `teacher`, `searched_shift`.
        log: progress, and finished fits.

    Raises:
        ValueError: the folder holds something else; nothing was written.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.folder = setup, setup.folder
        found = from_main(setup.accelerator, self._found() if setup.main else {})
        if "error" in found:
            raise ValueError(found["error"])
        self.state: dict[str, Any] = found
        parts = [*self.state["solvers"].values(), self.state.get("teacher", {})]
        known = sum(part.get("network_evaluations", 0) for part in parts)
        setup.add_evaluations(known + self.state.get("derived_network_evaluations", 0))  # of earlier versions
        self.log = SearchLog(setup)

    def _found(self) -> dict[str, Any]:
        """The state of a killed run of this very search, or a new one; or an `error`."""
        new: dict[str, Any] = {"key": self.setup.key, "network_evaluations": 0, "solvers": {}}
        if self.folder is None:
            return new
        files = [file for file in (self.folder / STATE, self.folder / PREVIOUS) if file.exists()]
        if files and self.setup.settings.resume_from_checkpoint == "none":
            return {"error": f"{self.folder} holds a search; choose another --output_dir, or go on with latest"}
        for file in files:
            try:
                state = read_record(file)
            except Damaged as error:
                warn(f"{file} is damaged and left out: {error}")
                continue
            if state.get("key") != self.setup.key:
                other = f"{self.folder} holds another search (other model or settings)"
                return {"error": f"{other}; choose another --output_dir"}
            if state["solvers"]:
                say(f"going on in {self.folder}: solvers for {', '.join(state['solvers'])} calls are there")
            return state
        if files:
            warn(f"no state of {self.folder} could be read; the search starts over from its references")
        elif (self.folder / SCHEDULER).exists():
            other = f"{self.folder} holds a solver that this search did not make"
            return {"error": f"{other}; choose another --output_dir"}
        (self.folder / "cache").mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / "cache"):
            remove_partial_files(folder)
        self._write_state(new)
        return new

    def entries(self, kind: str) -> dict[int, Entry]:
        """By step count, those that were searched, or filled."""
        return {int(n): entry for n, entry in self.state["solvers"].items() if entry["kind"] == kind}

    def keep_teacher(self, facts: dict[str, Any]) -> None:
        """Add how far the teacher is from converged."""
        self.state["teacher"] = facts
        total = self.log.evaluations()
        self.log.write(teacher=facts, network_evaluations=total)
        self.log.tell({"stage": "teacher", **facts, "network_evaluations": total})
        if self.setup.main:
            self._write_state(self.state)

    def keep(self, nfe: int, entry: Entry, kind: str, seconds: float, before: int) -> None:
        """Add one solver and write the result anew; `before`: network evaluations when it was begun."""
        stages = {"stages": self.log.stages} if self.log.stages else {}
        total = self.state["network_evaluations"] = self.log.evaluations()
        spent = {"kind": kind, "network_evaluations": total - before, "seconds": round(seconds, 1)}
        entry = self.state["solvers"][str(nfe)] = {**entry, **stages, **spent}
        self.state["searched_shift"] = self.setup.student.searched_shift(map(int, self.state["solvers"]))
        told = {k: v for k, v in entry.items() if k not in SOLVER_KEYS}
        self.log.write(nfe=nfe, **told, total_network_evaluations=total)
        self.write()
        reached = {"stage": kind, "validation_mse": entry["validation_mse"], "network_evaluations": total}
        self.log.tell({"nfe": nfe, **reached})

    def write(self) -> None:
        """Write the result and the state; what the journal holds is then in them."""
        if self.folder and self.setup.main:
            write_text(self.folder / SCHEDULER, self.scheduler().to_json_string())
            self._write_state(self.state)
        self.log.journal.clear()

    def scheduler(self) -> DSSolverScheduler:
        """The result."""
        config = self.setup.sampler.pipe.scheduler.config
        return DSSolverScheduler.from_config(
            {k: v for k, v in config.items() if k not in OWN_KEYS},
            solvers={n: solver_of(entry) for n, entry in self.state["solvers"].items()},
            provenance=self.provenance(),
            searched_shift=self.state.get("searched_shift"),
        )

    def _write_state(self, state: dict[str, Any]) -> None:
        if self.folder is None:
            return
        with suppress(FileNotFoundError):
            os.replace(self.folder / STATE, self.folder / PREVIOUS)
        write_record(self.folder / STATE, state)

    def is_whole(self) -> bool:
        """Whether the result is there and can be read, in the main process's eyes."""
        if self.folder is None:
            return True
        return from_main(self.setup.accelerator, _is_json(self.folder / SCHEDULER))

    def provenance(self) -> dict[str, Any]:
        """Where the solvers come from, as the result tells it."""
        settings, pipe = self.setup.settings, self.setup.sampler.pipe
        guidance = self.setup.sampler.guidance_scale
        model = settings.pretrained_model_name_or_path
        train = settings.num_generated_samples if settings.method == "paper" else settings.num_train_samples
        return {
            "kind": "searched",
            "method": settings.method,
            "model": Path(model).name if Path(model).exists() else model,
            "revision": settings.revision,
            "pipeline": type(pipe).__name__,
            "call": settings.call_arguments | {k: described(v) for k, v in self.setup.model.call.items()},
            **({} if guidance is None else {"guidance_scale": guidance}),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "teacher": {**self.setup.teacher.facts(), "estimated_mse": self.state["teacher"]["estimated_mse"]},
            "samples": {"train": train, "validation": settings.num_validation_samples},
            "seed": settings.seed,
            "settings": without_paths(settings.changed()),
            "processes": self.setup.accelerator.num_processes,
            "network_evaluations": self.state["network_evaluations"],
            "results": {n: {k: e[k] for k in RECORDED if k in e} for n, e in self.state["solvers"].items()},
            "versions": {name: _version(name) for name in ("diffusers-dssolver", "diffusers", "torch")},
        }

    def table(self) -> str:
        """By step count: held-out final-state mse of the best classical solver and of the one found."""
        lines = [
            "",
            f"{'NFE':>4} {'kind':20} {'classical':>10} {'ours':>10} {'ratio':>6} {'evaluations':>12} {'seconds':>8}",
        ]
        for n, e in sorted(self.state["solvers"].items(), key=lambda item: int(item[0])):
            ratio = e.get("ratio", e["validation_mse"] / e["classical_mse"])
            note = "  worse than classical" if ratio > 1 else ""
            kind = e["kind"] + (f", {e['source']}" if "source" in e else "")
            lines.append(
                f"{n:>4} {kind:20} {e['classical_mse']:10.3g} {e['validation_mse']:10.3g} {ratio:6.2f} "
                f"{e['network_evaluations']:12,} {e['seconds']:8.1f}{note}"
            )
            lines += [
                f"{'':4}   {s['stage']:29} {s['validation_mse']:10.3g} {'':6} {s['network_evaluations']:12,}"
                for s in e.get("stages", [])
            ]
        total = f"{self.state['network_evaluations']:,} network evaluations, teacher included"
        lines += [f"held-out final-state mse; {total}"]
        lines += [self.setup.told_budget()] if self.setup.left_out else []
        return "\n".join([*lines, f"solver written to {self.folder}"] if self.folder else lines)


def how_to_go_on(folder: Path) -> str:
    """For the user who has interrupted a search: what its folder holds."""
    finished: dict[str, Any] = {}
    for file in (folder / PREVIOUS, folder / STATE):
        with suppress(Damaged):
            finished = read_record(file)["solvers"]
    solvers = ", ".join(sorted(finished, key=int)) or "no"
    return f"{folder} holds solvers for {solvers} calls; the same command goes on from there"


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
