"""The `search` command: references, then one solver per NFE, then the other step counts; a folder that
`DSSolverScheduler.from_pretrained` reads stands complete after every NFE, and a killed run goes on after the last one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.solver import SolverSpec

from .closed_form import FINAL_FITS, IDENTITY, Candidate, ClosedForm, warped_nodes
from .config import SearchConfig
from .fit import fit
from .objective import paper_loss
from .parameters import PaperParameters
from .polish import Polish, polish
from .probe import ProbeScheduler, run
from .sampling import Sampler, load_pipeline, read_prompts
from .teacher import Reference, reference

SOLVER_KEYS = ("nodes", "timesteps", "coefficients")
# of a solver that the pipeline already had
OWN_KEYS = ("solvers", "provenance", "strict", "history_length", "searched_shift", "interpolate_corrections")
DERIVED = ("validation_mse_classical", "validation_mse_corrections")
STATE, METRICS = "search_state.json", "metrics.jsonl"


class Search:
    """One run of the command, in every process alike; only the main one writes."""

    def __init__(self, config: SearchConfig) -> None:
        self.config, self.accelerator = config, Accelerator()
        self.folder = Path(config.output_dir)
        pipe = load_pipeline(
            config.pretrained_model_name_or_path, config.dtype, self.accelerator.device, config.revision
        )
        self.sampler = Sampler(pipe, config.call_arguments, read_prompts(config.prompts_file), config.seed)
        self.probe = ProbeScheduler.from_config(
            pipe.scheduler.config, solvers="classical", strict=False, history_length=None
        )
        self.started = time.time()
        self.state = self._open_state()

    # --- command ---------------------------------------------------------------------------------------------------

    def __call__(self) -> None:
        splits = {"train": self.config.num_train_samples, "validation": self.config.num_validation_samples}
        if self.config.method == "paper":
            del splits["train"]  # it generates its own
        references = {name: self._reference(name, range(count)) for name, count in splits.items()}
        form = ClosedForm(
            self.sampler,
            self.probe,
            references.get("train", references["validation"]),
            references["validation"],
            -(-self.config.num_trial_samples // self.accelerator.num_processes),
            self._reduce,
            self._log_trial,
        )
        for nfe in sorted(set(self.config.nfe)):
            if self.state["solvers"].get(str(nfe), {}).get("kind") != "searched":
                began = self._evaluations(), time.time()
                entry = self._paper(form, nfe) if self.config.method == "paper" else self._closed_form(form, nfe)
                self._keep(form, nfe, entry, "searched", began)
        if self.config.method == "closed_form" and self.config.fill_nfe:
            first, last = self.config.fill_nfe
            missing = [n for n in range(first, last + 1) if str(n) not in self.state["solvers"]]
            for nfe in tqdm(missing, desc="filling other step counts", disable=not self.accelerator.is_main_process):
                began = self._evaluations(), time.time()
                self._keep(form, nfe, self._filled(form, nfe), "filled", began)
        self._measure_derived(form)
        if self.accelerator.is_main_process:
            print(self.table())
        self.accelerator.end_training()  # without it, a process aborts now and then in the middle of its exit

    def _closed_form(self, form: ClosedForm, nfe: int) -> dict[str, Any]:
        quiet = not self.accelerator.is_main_process
        fits = self.config.trials + FINAL_FITS
        with tqdm(desc=f"closed form, {nfe} calls", unit="fit", total=fits, disable=quiet) as bar:

            def on_trial(candidate: Candidate) -> None:
                bar.set_postfix(mse=f"{candidate.train_mse:.3g}", refresh=False)
                bar.update()
                self._log_trial(candidate)

            found = replace(form, on_trial=on_trial).search(nfe, self.config.trials, self.config.ridge)
        record = {"nfe": nfe, "closed_form_validation_mse": found.validation_mse}
        self._log({**record, "network_evaluations": self._evaluations()})
        differences = self.config.polish * Polish(form, found).count
        with tqdm(desc=f"polish, {nfe} calls", unit="difference", total=differences, disable=quiet) as bar:
            found = polish(form, found, self.config.polish, bar.update)
        return _entry(found)

    def _filled(self, form: ClosedForm, nfe: int) -> dict[str, Any]:
        """Closed-form rows on warps interpolated between the searched ones: one pass."""
        known = {int(n): e for n, e in self.state["solvers"].items() if e["kind"] == "searched"}
        counts = sorted(known)
        warp = [float(np.interp(nfe, counts, [known[n]["warp"][k] for n in counts])) for k in range(3)]
        ridge = known[min(counts, key=lambda n: abs(n - nfe))]["ridge"]
        return _entry(form.validated(form.fit(nfe, warp, ridge)))

    def _measure_derived(self, form: ClosedForm) -> None:
        """Whether step counts between two tables gain from what both learned beside their nodes, measured at a few."""
        solvers = {int(n): SolverSpec.from_dict(table) for n, table in self._tables().items()}
        gaps = [n for n in range(min(solvers), max(solvers)) if n not in solvers]
        chosen = [gaps[i] for i in sorted({round(k * (len(gaps) - 1) / 3) for k in range(4)})] if gaps else []
        if [str(n) for n in chosen] == list(self.state.get("derived", {})):
            return
        self.state["derived"] = {}
        for nfe in chosen:
            scores = [form.score_spec(self.probe.derived(solvers, nfe, learned)) for learned in (False, True)]
            self.state["derived"][str(nfe)] = dict(zip(DERIVED, scores, strict=True))
            self._log({"nfe": nfe, "derived": self.state["derived"][str(nfe)]})
        self.state["network_evaluations"] = self._evaluations()
        if self.accelerator.is_main_process:
            self.write()

    def _corrections_help(self) -> bool:
        """In the geometric mean over the step counts measured; no if none was."""
        measured = self.state.get("derived", {}).values()
        return bool(measured) and math.prod(m[DERIVED[1]] / m[DERIVED[0]] for m in measured) < 1

    def _paper(self, form: ClosedForm, nfe: int) -> dict[str, Any]:
        """Algorithm 1 and 2: gradients through the pipeline's call, fresh samples for every update."""
        config, rank, processes = self.config, self.accelerator.process_index, self.accelerator.num_processes
        parameters = PaperParameters(nfe)
        iterations = -(-config.num_generated_samples // config.train_batch_size)

        def loss_of(iteration: int) -> Tensor:
            first = iteration * config.train_batch_size
            batch = range(first, first + config.train_batch_size)[rank::processes]
            if not batch:
                return 0.0 * (parameters.r.sum() + parameters.c.sum())
            euler = reference(
                self.sampler, self.probe, batch, "train", config.reference_steps, 1, len(batch), progress=False
            )
            nodes = parameters.nodes()
            self.probe.prepare(nodes, parameters.rows())
            before = self.sampler.network_evaluations
            states = run(self.sampler, self.probe, batch, "train", nfe)
            self.sampler.network_evaluations += 2 * (self.sampler.network_evaluations - before)  # the backward pass
            wanted = [euler.nearest(node).to(states[0].device) for node in nodes]
            return paper_loss([s[: len(batch)] for s in states], wanted) * len(batch) / config.train_batch_size

        def validate() -> float:
            rows = [[w.item() for w in row] for row in parameters.rows()]
            return form.score(parameters.nodes().detach(), rows)

        def log(record: dict[str, Any]) -> None:
            self._log({"nfe": nfe, **record, "network_evaluations": self._evaluations()})
            self._save_count()

        checkpoint = self.folder / f"paper-{nfe}.safetensors"
        best = fit(
            parameters,
            loss_of,
            iterations,
            config.learning_rate,
            self.accelerator,
            validate,
            config.validation_steps,
            checkpoint,
            log,
            f"paper, {nfe} calls",
        )
        nodes = self.probe.final_nodes(parameters.nodes().detach())
        rows = [[w.item() for w in row] for row in parameters.rows()]
        return {**SolverSpec(nodes.tolist(), rows).to_dict(), "parameters": parameters.count, "validation_mse": best}

    # --- keeping ---------------------------------------------------------------------------------------------------

    def _keep(self, form: ClosedForm, nfe: int, entry: dict[str, Any], kind: str, began: tuple[int, float]) -> None:
        """Add one solver to the state and write the whole result anew."""
        uniform = warped_nodes(IDENTITY, nfe)
        classical = min(form.score(uniform, None, order) for order in (1, 2, 3))
        entry |= {
            "kind": kind,
            "classical_mse": classical,
            "network_evaluations": self._evaluations() - began[0],
            "seconds": round(time.time() - began[1], 1),
        }
        if kind == "filled" and not entry["validation_mse"] < classical:
            entry["kind"] = "dropped"  # a derived solver serves this count
        self.state["solvers"][str(nfe)] = entry
        self.state["network_evaluations"] = self._evaluations()
        self._log(
            {
                "nfe": nfe,
                **{k: v for k, v in entry.items() if k not in SOLVER_KEYS},
                "total_network_evaluations": self._evaluations(),
            }
        )
        if self.accelerator.is_main_process:
            self.write()

    def write(self) -> None:
        """`scheduler_config.json` and the state, each renamed into place."""
        config = {k: v for k, v in self.sampler.pipe.scheduler.config.items() if k not in OWN_KEYS}
        scheduler = DSSolverScheduler.from_config(
            config,
            solvers=self._tables(),
            provenance=self.provenance(),
            searched_shift=self.probe.searched_shift(),
            interpolate_corrections=self._corrections_help(),
        )
        with tempfile.TemporaryDirectory(dir=self.folder) as partial:
            scheduler.save_pretrained(partial)
            os.replace(Path(partial) / "scheduler_config.json", self.folder / "scheduler_config.json")
        _write_text(self.folder / STATE, json.dumps(self.state, indent=1))

    def _tables(self) -> dict[str, dict[str, Any]]:
        kept = {n: e for n, e in self.state["solvers"].items() if e["kind"] != "dropped"}
        return {n: {k: e[k] for k in SOLVER_KEYS if k in e} for n, e in kept.items()}

    def provenance(self) -> dict[str, Any]:
        config = self.config
        facts: dict[str, Any] = {
            "kind": "searched",
            "method": config.method,
            "model": Path(config.pretrained_model_name_or_path).name
            if Path(config.pretrained_model_name_or_path).exists()
            else config.pretrained_model_name_or_path,
            "revision": config.revision,
            "pipeline": type(self.sampler.pipe).__name__,
            "call": config.call_arguments,
            "teacher": {"steps": config.teacher_steps, "order": config.teacher_order},
            "samples": {
                "train": config.num_train_samples if config.method == "closed_form" else config.num_generated_samples,
                "validation": config.num_validation_samples,
            },
            "seed": config.seed,
            "processes": self.accelerator.num_processes,
            "network_evaluations": self.state["network_evaluations"],
            "results": {
                n: {
                    k: e[k]
                    for k in ("kind", "validation_mse", "classical_mse", "warp", "ridge", "parameters")
                    if k in e
                }
                for n, e in self.state["solvers"].items()
            },
            "derived": self.state.get("derived", {}),
            "versions": {name: _version(name) for name in ("diffusers-dssolver", "diffusers", "torch")},
        }
        return facts

    def table(self) -> str:
        """What was found, by step count: held-out final-state mse of the best classical solver and of ours."""
        lines = [
            "",
            f"{'NFE':>4} {'kind':9} {'classical':>10} {'ours':>10} {'ratio':>6} {'evaluations':>12} {'seconds':>8}",
        ]
        for n, e in sorted(self.state["solvers"].items(), key=lambda item: int(item[0])):
            ratio = e["validation_mse"] / e["classical_mse"]
            note = "  worse than classical" if ratio >= 1 else ""
            lines.append(
                f"{n:>4} {e['kind']:9} {e['classical_mse']:10.3g} {e['validation_mse']:10.3g} {ratio:6.2f} "
                f"{e['network_evaluations']:12,} {e['seconds']:8.1f}{note}"
            )
        lines.append(
            f"held-out final-state mse; {self.state['network_evaluations']:,} network evaluations, teacher included"
        )
        return "\n".join([*lines, f"solver written to {self.folder}"])

    def _reference(self, split: str, indices: range) -> tuple[range, Reference]:
        share = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        if not share:
            raise ValueError(
                f"{len(indices)} {split} samples for {self.accelerator.num_processes} processes; each needs one"
            )
        config = self.config
        found = reference(
            self.sampler, self.probe, share, split, config.teacher_steps, config.teacher_order, config.batch_size,
            cache=self.folder / "cache", progress=self.accelerator.is_main_process,
        )  # fmt: skip
        self._save_count()
        return share, found

    def _open_state(self) -> dict[str, Any]:
        """The state of an earlier, killed run of the very same search, or a new one."""
        resumable = {
            k: v for k, v in asdict(self.config).items() if k not in ("nfe", "output_dir", "batch_size", "fill_nfe")
        }
        key = hashlib.sha256(json.dumps([resumable, self.sampler.fingerprint()], sort_keys=True).encode()).hexdigest()
        file = self.folder / STATE
        if file.is_file():
            state = json.loads(file.read_text(encoding="utf-8"))
            if state.get("key") != key:
                raise ValueError(
                    f"{self.folder} holds another search (other model or settings); choose another --output_dir"
                )
            self.sampler.network_evaluations = state["network_evaluations"] // self.accelerator.num_processes
            return state
        if (self.folder / "scheduler_config.json").exists():
            raise ValueError(f"{self.folder} holds a solver that this search did not make; choose another --output_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        return {"key": key, "network_evaluations": 0, "solvers": {}}

    def _log_trial(self, candidate: Candidate) -> None:
        tried = {"nfe": candidate.spec.nfe, "warp": list(candidate.warp), "ridge": candidate.ridge}
        self._log({**tried, "train_mse": candidate.train_mse, "network_evaluations": self._evaluations()})

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "seconds_since_start": round(time.time() - self.started, 2)}) + "\n")

    def _save_count(self) -> None:
        """The evaluations so far into the state on disk, so that a killed run goes on counting from there."""
        total = self._evaluations()
        if total != self.state["network_evaluations"]:
            self.state["network_evaluations"] = total
            if self.accelerator.is_main_process:
                _write_text(self.folder / STATE, json.dumps(self.state, indent=1))

    def _evaluations(self) -> int:
        return int(
            self._reduce(
                torch.tensor(self.sampler.network_evaluations, dtype=torch.float64, device=self.accelerator.device)
            )
        )

    def _reduce(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")


def _entry(found: Candidate) -> dict[str, Any]:
    """A fitted solver as it stands in the state."""
    how = {"warp": list(found.warp), "ridge": found.ridge, "validation_mse": found.validation_mse}
    return {**found.spec.to_dict(), **how}


def _write_text(file: Path, text: str) -> None:
    partial = file.with_suffix(".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
