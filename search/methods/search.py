"""The `search` command: references, then one solver per NFE, then the other step counts; a folder that
`DSSolverScheduler.from_pretrained` reads stands complete after every NFE, and a killed run goes on after the last one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.card import without_paths
from diffusers_dssolver.solver import SolverSpec

from ..console import say
from ..images.networks import load_feature_network
from ..pipeline.loading import load_pipeline
from ..pipeline.probe import ProbeScheduler, run
from ..pipeline.prompts import prompts_of
from ..pipeline.replay import uncounted
from ..pipeline.sampler import Sampler
from ..processes import from_main, reduced
from ..settings import PERCEPTUAL, STARTS, SearchConfig
from ..storage import Damaged, drop_torn_line, read_record, remove_partial_files, write_record, write_text
from ..teacher.trajectories import Convergence, Reference, Teacher, convergence, reference
from .closed_form import IDENTITY, Candidate, ClosedForm, Samples, comparable, fits_of, warped_nodes
from .gauss_newton import Polish, around, polish
from .gradient import Descent
from .objective import OBJECTIVES, paper_loss
from .paper import fit
from .parameters import PaperParameters
from .perceptual import MOST_CALLS, Perceptual, PerceptualDescent
from .preflight import preflight
from .record import Journal

SOLVER_KEYS = ("nodes", "timesteps", "coefficients")
# of a solver that the pipeline already had
OWN_KEYS = (
    "solvers", "guidance_solvers", "guidance_scale", "provenance", "strict", "history_length", "searched_shift",
)  # fmt: skip
# of each solver, in the provenance
RECORDED = (
    "kind", "source", "validation_mse", "classical_mse", "rejected", "warp", "ridge", "parameters", "stages"
)  # fmt: skip
SCHEDULER, METRICS = "scheduler_config.json", "metrics.jsonl"
STATE, PREVIOUS, JOURNAL = "search_state.json", "search_state.previous.json", "trials.jsonl"
# neither what a solver is fitted to nor how
NOT_IN_KEY = ("nfe", "output_dir", "batch_size", "fill_nfe", "resume_from_checkpoint")


@dataclass
class ResumableForm(ClosedForm):
    """A closed form whose finished fits are kept, so that the search inside one NFE is replayed, not done again.

    Args:
        journal: where they are kept.
        count: network evaluations so far, over all processes.
        on_known: called in place of `on_trial`, with a kept candidate and the evaluations that it took.
    """

    journal: Journal | None = None
    count: Callable[[], int] = field(default=lambda: 0)
    on_known: Callable[[Candidate, int], None] = field(default=lambda candidate, evaluations: None)

    def fit(self, nfe: int, warp: Sequence[float], ridge: float, samples: Samples | None = None) -> Candidate:
        if self.journal is None:
            return super().fit(nfe, warp, ridge, samples)
        a, b, c = map(float, warp)
        task = {"nfe": nfe, "warp": [a, b, c], "ridge": ridge, "samples": "trial" if samples else "train"}
        if known := self.journal.get(task):
            spec = SolverSpec.from_dict(known["spec"])
            found = Candidate((a, b, c), ridge, warped_nodes(warp, nfe), spec, known["train_mse"])
            self.on_known(found, known["network_evaluations"])
            self.start_again("train", samples or self.train, nfe)
            return found
        before = self.count()
        found = super().fit(nfe, warp, ridge, samples)
        result = {"spec": found.spec.to_dict(), "train_mse": found.train_mse}
        self.journal.add(task, {**result, "network_evaluations": self.count() - before})
        return found

    def start_again(self, split: str, samples: Samples, nfe: int) -> None:
        """First calls that an earlier, killed run made and counted."""
        with uncounted(self.sampler):
            for indices, _ in self.batches(samples):
                self.start(split, indices, nfe)


class Search:
    """One run of the command, in every process alike; only the main one writes."""

    def __init__(self, config: SearchConfig) -> None:
        self.config, self.accelerator = config, Accelerator()
        self.folder, self.started = Path(config.output_dir), time.time()
        try:
            self._open()
        except ValueError:
            self.accelerator.end_training()  # every process raises it
            raise

    def _open(self) -> None:
        """Load the model, then look at the folder; nothing is written if anything is at fault."""
        config = self.config
        pipe = load_pipeline(
            config.pretrained_model_name_or_path, config.dtype, self.accelerator.device, config.revision
        )
        if pipe.dtype == torch.float16 and self.accelerator.is_main_process:
            say("float16 overflows at 65 504, and gradients of times are several per cent off; safer: --dtype bfloat16")
        self.sampler = Sampler(
            pipe, config.call_arguments, prompts_of(config), config.seed, guidance_scales=config.guidance_scales
        )
        self.probe = ProbeScheduler.from_config(
            pipe.scheduler.config, solvers="classical", strict=False, history_length=None
        )
        self.teacher = Teacher.named(
            config.teacher_scheduler, config.teacher_steps, config.teacher_order, self.sampler, self.probe,
            config.teacher_end,
        )  # fmt: skip
        self.descending = config.search_over
        self.perceptual = self._perceptual()
        self.splits = {"train": config.num_train_samples, "validation": config.num_validation_samples}
        if config.method == "paper":
            del self.splits["train"]  # it generates its own
        self._check_shares()
        self.state = self._open_state()
        if self.accelerator.is_main_process:  # every process counts its own, this one also what was kept
            kept = [entry["network_evaluations"] for entry in self.state["solvers"].values()]
            kept += [self.state.get("teacher", {}).get("network_evaluations", 0)]
            self.sampler.network_evaluations = sum(kept)
            drop_torn_line(self.folder / METRICS)
        self.journal = Journal(self.folder / JOURNAL, self.state["key"], self.accelerator)

    def _perceptual(self) -> Perceptual | None:
        """The objective on images, if any step count of this search is for it."""
        config = self.config
        wanted = config.method == "gradient" and config.objective == PERCEPTUAL and min(config.nfe) <= MOST_CALLS
        if not wanted or config.feature_network is None:
            return None
        network = load_feature_network(config.feature_network, self.accelerator.device)
        return Perceptual(network, self.sampler, self.probe)

    # --- command ---------------------------------------------------------------------------------------------------

    def __call__(self) -> None:
        """The whole run.

        Raises:
            ValueError: a setting, the model or the folder is at fault; one line.
            KeyboardInterrupt: Ctrl-C, with a line that says how to go on.
        """
        try:
            self._run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._how_to_go_on()) from None  # no farewell to processes that may be gone
        except ValueError:
            self.accelerator.end_training()  # every process raises it
            raise
        self.accelerator.end_training()  # without it, a process aborts now and then in the middle of its exit

    def _run(self) -> None:
        if not all(self._has(nfe) for nfe in self.config.nfe):
            self._preflight()
        config = self.config
        self._settle_teacher()
        references = {name: self._reference(name, range(count)) for name, count in self.splits.items()}
        form = ResumableForm(
            self.sampler,
            self.probe,
            references.get("train", references["validation"]),
            references["validation"],
            len(self._share(range(self.config.num_trial_samples))),
            self._reduce,
            self._log_trial,
            config.batch_size,
            journal=self.journal,
            count=self._evaluations,
            on_known=self._on_known,
        )
        if self.perceptual and not all(self._has(nfe) for nfe in self.config.nfe):
            for split, samples in (("train", form.train), ("validation", form.validation)):
                self.perceptual.remember(split, list(form.batches(samples)), self.accelerator.is_main_process)
        for nfe in sorted(set(self.config.nfe)):
            if not self._has(nfe):
                began = self._evaluations(), time.time()
                entry = self._paper(form, nfe) if self.config.method == "paper" else self._closed_form(form, nfe)
                self._keep(form, nfe, entry, "searched", began)
        if self.config.method != "paper" and self.config.fill_nfe:
            first, last = self.config.fill_nfe
            missing = [n for n in range(first, last + 1) if str(n) not in self.state["solvers"]]
            for nfe in tqdm(missing, desc="filling other step counts", disable=not self.accelerator.is_main_process):
                began = self._evaluations(), time.time()
                self._keep(form, nfe, self._filled(form, nfe), "filled", began)
        self._mend(form)
        self.journal.clear()  # of what was killed between the state and this
        if self.accelerator.is_main_process:
            print(self.table())

    def _has(self, nfe: int) -> bool:
        return bool(self.state["solvers"].get(str(nfe), {}).get("kind") == "searched")

    def _preflight(self) -> None:
        """Try the pipeline before anything is spent on it, and take out of a descent what gets no gradient. The same in
        every process, and not counted."""
        config = self.config
        found = preflight(self.sampler, self.probe, gradients=config.method != "closed_form")
        if self.accelerator.is_main_process:
            say(str(found))
        if config.method != "closed_form" and found.verdict == "forward_only":
            raise ValueError(f"method {config.method} needs gradients ({found.reason}); closed_form does without")
        if config.method == "paper" and found.verdict == "coefficients":
            raise ValueError(f"method paper moves nodes ({found.reason}); closed_form and gradient do without")
        if found.verdict == "coefficients":
            self.descending = [group for group in config.search_over if group == "coefficients"]
        if self.perceptual:
            sentence = self.perceptual.check()
            if self.accelerator.is_main_process:
                say(sentence)

    def _closed_form(self, form: ResumableForm, nfe: int) -> dict[str, Any]:
        config, quiet = self.config, not self.accelerator.is_main_process
        stages: list[dict[str, Any]] = []
        began = self._evaluations()
        starts = STARTS[: config.starts]
        fits = sum(fits_of(config.trials, len(starts)))
        with tqdm(desc=f"closed form, {nfe} calls", unit="fit", total=fits, disable=quiet) as bar:

            def on_trial(candidate: Candidate) -> None:
                bar.set_postfix(mse=f"{candidate.train_mse:.3g}", refresh=False)
                bar.update()
                self._log_trial(candidate)

            def on_known(candidate: Candidate, evaluations: int) -> None:
                bar.update()
                self._found_done(evaluations)

            form.on_trial, form.on_known = on_trial, on_known
            found = form.search(nfe, config.trials, config.ridge, starts)
            form.on_trial, form.on_known = self._log_trial, self._on_known
        stages.append(self._ended("closed_form", found, began))
        if config.polish and nfe <= config.polish_nfe:
            began = self._evaluations()
            batches = len(list(form.batches(form.train)))
            differences = config.polish * batches * Polish(form, found, config.search_over).count
            with tqdm(desc=f"polish, {nfe} calls", unit="difference", total=differences, disable=quiet) as bar:
                found = polish(form, found, config.polish, bar.update, config.search_over)
            stages.append(self._ended("polish", found, began))
        if config.method == "gradient":
            began = self._evaluations()
            found, images = self._descended(form, found)
            stages.append(self._ended("gradient", found, began, **images))
        return {**_entry(found), "stages": stages}

    def _ended(self, stage: str, found: Candidate, began: int, **more: float) -> dict[str, Any]:
        """What a stage reached and cost."""
        spent = self._evaluations()
        reached = {"stage": stage, "validation_mse": found.validation_mse, **more}
        self._log({"nfe": found.spec.nfe, **reached, "network_evaluations": spent})
        return {**reached, "network_evaluations": spent - began}

    def _descended(self, form: ClosedForm, found: Candidate) -> tuple[Candidate, dict[str, float]]:
        """The candidate after `method gradient`'s own stage, and what it did to held-out images if they were judged."""
        config, nfe = self.config, found.spec.nfe
        parameters = around(form, found, self.descending)
        if not parameters.count:
            return found, {}
        quiet = not self.accelerator.is_main_process
        on_images = self.perceptual if nfe <= MOST_CALLS else None
        if config.objective == PERCEPTUAL and not on_images and not quiet:
            say(f"objective {PERCEPTUAL} is for up to {MOST_CALLS} calls; terminal takes its place at {nfe}")
        with tqdm(desc=f"gradient, {nfe} calls", unit="call", total=config.gradient_calls, disable=quiet) as bar:

            def on_call(loss: float, best: float) -> None:
                bar.set_postfix(loss=f"{loss:.4g}", best=f"{best:.3g}", refresh=False)
                bar.update()
                named = {"best_validation_perceptual": best} if on_images else {}
                mse = descent.best.validation_mse
                self._log({"nfe": nfe, "loss": loss, **named, "best_validation_mse": mse})

            descent: Descent
            if on_images:
                descent = PerceptualDescent(form, found, parameters, on_images, on_call)
            else:
                loss = OBJECTIVES["terminal" if config.objective == PERCEPTUAL else config.objective]
                descent = Descent(form, found, parameters, loss, on_call)
            better = descent.run(config.optimizer, config.gradient_calls, config.learning_rate)
        if not isinstance(descent, PerceptualDescent):
            return better, {}
        if not quiet:
            say(
                f"held out at {nfe} calls: perceptual loss {descent.before:.4g} -> {descent.reached:.4g}, final-state "
                f"mse {found.validation_mse:.4g} -> {better.validation_mse:.4g}"
            )
        return better, {"validation_perceptual": descent.reached, "validation_perceptual_before": descent.before}

    def _filled(self, form: ClosedForm, nfe: int) -> dict[str, Any]:
        """The best on held-out samples of closed-form rows on a warp interpolated between the searched ones, polished
        if few calls make that cheap, the derived solvers, and the classical ones. Below the fewest calls searched the
        warp is searched: fits are cheap there and warps differ most."""
        known = {int(n): e for n, e in self.state["solvers"].items() if e["kind"] == "searched"}
        counts = sorted(known)
        if nfe < counts[0]:
            found = form.search(nfe, self.config.trials, self.config.ridge, STARTS[: self.config.starts])
        else:
            warp = [float(np.interp(nfe, counts, [known[n]["warp"][k] for n in counts])) for k in range(3)]
            ridge = known[min(counts, key=lambda n: abs(n - nfe))]["ridge"]
            found = form.validated(form.fit(nfe, warp, ridge))
        if nfe <= self.config.fill_polish_nfe:
            found = polish(form, found, self.config.polish, free=self.config.search_over)
        searched = {n: SolverSpec.from_dict(_table(e)) for n, e in known.items()}
        choices = {
            "closed_form": _entry(found),
            "derived": _measured(form, self.probe.derived(searched, nfe)),
            "classical": _classical(form, nfe),
        }
        source = min(choices, key=lambda name: _error(choices[name]))
        rejected = {name: entry["validation_mse"] for name, entry in choices.items() if name != source}
        reached = {"source": source, "rejected": rejected, "classical_mse": choices["classical"]["validation_mse"]}
        return {**choices[source], **reached}

    def _mend(self, form: ClosedForm) -> None:
        """Write the result again if somebody took or spoiled it."""
        if not from_main(self.accelerator, _is_json(self.folder / SCHEDULER)):
            form.score(warped_nodes(IDENTITY, min(self.config.nfe)), None)  # tells the probe the model's shift
            if self.accelerator.is_main_process:
                self.write()

    def _paper(self, form: ResumableForm, nfe: int) -> dict[str, Any]:
        """Algorithm 1 and 2: gradients through the pipeline's call, fresh samples for every update."""
        config, began = self.config, self._evaluations()
        parameters = PaperParameters(nfe)
        iterations = -(-config.num_generated_samples // config.train_batch_size)

        def collapsed() -> bool:
            """Whether step sizes vanished, in every process alike: no solver, and for `fit` a reason to roll back."""
            return not bool((self.probe.final_nodes(parameters.nodes().detach()).diff() < 0).all())

        def loss_of(iteration: int) -> Tensor:
            first = iteration * config.train_batch_size
            batch = self._share(range(first, first + config.train_batch_size))
            if not batch:
                return 0.0 * (parameters.r.sum() + parameters.c.sum())
            euler = reference(
                self.sampler, self.probe, batch, "train", config.reference_steps, 1, len(batch), progress=False
            )
            if collapsed():
                return math.nan * (parameters.r.sum() + parameters.c.sum())
            nodes = parameters.nodes()
            self.probe.prepare(nodes, parameters.rows())
            before = self.sampler.network_evaluations
            states = run(self.sampler, self.probe, batch, "train", nfe)
            self.sampler.network_evaluations += 2 * (self.sampler.network_evaluations - before)  # the backward pass
            wanted = [euler.nearest(node).to(states[0].device) for node in nodes]
            return paper_loss([s[: len(batch)] for s in states], wanted) * len(batch) / config.train_batch_size

        def validate() -> float:
            if collapsed():
                return math.nan
            rows = [[w.item() for w in row] for row in parameters.rows()]
            return form.score(parameters.nodes().detach(), rows)

        def log(record: dict[str, Any]) -> None:
            self._log({"nfe": nfe, **record, "network_evaluations": self._evaluations()})

        def on_resume(evaluations: int) -> None:
            self._found_done(evaluations)
            form.start_again("validation", form.validation, nfe)

        best = fit(
            parameters,
            loss_of,
            iterations,
            config.learning_rate,
            self.accelerator,
            validate,
            config.validation_steps,
            self.folder / f"paper-{nfe}.safetensors",
            log,
            f"paper, {nfe} calls",
            self.state["key"],
            lambda: self._evaluations() - began,
            on_resume,
        )
        nodes = self.probe.final_nodes(parameters.nodes().detach())
        rows = [[w.item() for w in row] for row in parameters.rows()]
        return {**SolverSpec(nodes.tolist(), rows).to_dict(), "parameters": parameters.count, "validation_mse": best}

    # --- keeping ---------------------------------------------------------------------------------------------------

    def _keep(self, form: ClosedForm, nfe: int, entry: dict[str, Any], kind: str, began: tuple[int, float]) -> None:
        """Add one solver to the state and write the whole result anew."""
        if "classical_mse" not in entry:
            entry["classical_mse"] = _classical(form, nfe)["validation_mse"]
        entry |= {
            "kind": kind,
            "network_evaluations": self._evaluations() - began[0],
            "seconds": round(time.time() - began[1], 1),
        }
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
        )
        write_text(self.folder / SCHEDULER, scheduler.to_json_string())
        self._write_state(self.state)
        self.journal.clear()

    def _write_state(self, state: dict[str, Any]) -> None:
        """The state, the one before it kept beside it."""
        with suppress(FileNotFoundError):
            os.replace(self.folder / STATE, self.folder / PREVIOUS)
        write_record(self.folder / STATE, state)

    def _tables(self) -> dict[str, dict[str, Any]]:
        return {n: _table(e) for n, e in self.state["solvers"].items()}

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
            "call": config.call_arguments
            | ({"guidance_scale": config.guidance_scales} if config.guidance_scales else {}),
            "dtype": str(self.sampler.pipe.dtype).removeprefix("torch."),
            "teacher": {**self.teacher.facts(), "estimated_mse": self.state["teacher"]["estimated_mse"]},
            "samples": {
                "train": config.num_generated_samples if config.method == "paper" else config.num_train_samples,
                "validation": config.num_validation_samples,
            },
            "seed": config.seed,
            "settings": without_paths(config.changed()),
            "processes": self.accelerator.num_processes,
            "network_evaluations": self.state["network_evaluations"],
            "results": {n: {k: e[k] for k in RECORDED if k in e} for n, e in self.state["solvers"].items()},
            "versions": {name: _version(name) for name in ("diffusers-dssolver", "diffusers", "torch")},
        }
        return facts

    def table(self) -> str:
        """What was found, by step count: held-out final-state mse of the best classical solver and of ours."""
        lines = [
            "",
            f"{'NFE':>4} {'kind':20} {'classical':>10} {'ours':>10} {'ratio':>6} {'evaluations':>12} {'seconds':>8}",
        ]
        for n, e in sorted(self.state["solvers"].items(), key=lambda item: int(item[0])):
            ratio = e["validation_mse"] / e["classical_mse"]
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
        lines.append(
            f"held-out final-state mse; {self.state['network_evaluations']:,} network evaluations, teacher included"
        )
        return "\n".join([*lines, f"solver written to {self.folder}"])

    def _share(self, indices: range) -> range:
        """Those of these global sample indices that this process runs."""
        return indices[self.accelerator.process_index :: self.accelerator.num_processes]

    def _check_shares(self) -> None:
        processes = self.accelerator.num_processes
        counts = dict(self.splits)
        if self.config.method != "paper":
            counts["trial"] = min(self.config.num_trial_samples, self.config.num_train_samples)
        for name, count in counts.items():
            if count < processes:
                raise ValueError(f"{count} {name} samples for {processes} processes; each needs one")

    def _settle_teacher(self) -> None:
        """How far the teacher is from converged, and its step count if that is to be chosen: once in a search. Every
        process runs the same samples, which count once, and takes what the main one finds."""
        config, main = self.config, self.accelerator.is_main_process
        if "teacher" not in self.state:
            before = self.sampler.network_evaluations
            found = convergence(
                self.sampler, self.probe, self.teacher, config.teacher_tolerance, max(config.nfe), config.batch_size
            )
            spent = {"network_evaluations": self.sampler.network_evaluations - before}
            if not main:
                self.sampler.network_evaluations = before
            self.state["teacher"] = from_main(self.accelerator, {**asdict(found), **spent})
            self._log({"teacher": self.state["teacher"], "network_evaluations": self._evaluations()})
            if main:
                self._write_state(self.state)
        known = {k: v for k, v in self.state["teacher"].items() if k != "network_evaluations"}
        self.teacher = replace(self.teacher, steps=known["steps"])
        if main:
            say(Convergence(**known).line(self.teacher, config.teacher_tolerance))
        if known["steps"] <= max(config.nfe):
            raise ValueError(
                f"nfe asks for {max(config.nfe)} calls, but the teacher chosen in this folder takes {known['steps']} "
                "steps; ask for fewer, or choose another --output_dir"
            )

    def _reference(self, split: str, indices: range) -> tuple[range, Reference]:
        share, config, before = self._share(indices), self.config, self.sampler.network_evaluations
        found = reference(
            self.sampler, self.probe, share, split, self.teacher.steps, self.teacher.order, config.batch_size,
            cache=self.folder / "cache", progress=self.accelerator.is_main_process, scheduler=self.teacher.scheduler,
            end=self.teacher.end,
        )  # fmt: skip
        self.sampler.network_evaluations = before + found.network_evaluations  # those of an earlier, killed run too
        return share, found

    def _open_state(self) -> dict[str, Any]:
        """The state of an earlier, killed run of the very same search, or a new one; what the main process finds."""
        found = from_main(self.accelerator, self._found_state() if self.accelerator.is_main_process else {})
        if "error" in found:
            raise ValueError(found["error"])
        return found

    def _found_state(self) -> dict[str, Any]:
        resumable = {k: v for k, v in asdict(self.config).items() if k not in NOT_IN_KEY}
        made_of = [resumable, self.sampler.fingerprint()]
        if self.perceptual:
            made_of.append(self.perceptual.network.digest)
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        files = [file for file in (self.folder / STATE, self.folder / PREVIOUS) if file.exists()]
        if files and self.config.resume_from_checkpoint == "none":
            return {"error": f"{self.folder} holds a search; choose another --output_dir, or go on with latest"}
        for file in files:
            try:
                state = read_record(file)
            except Damaged as error:
                say(f"{file} is damaged and left out: {error}")
                continue
            if state.get("key") != key:
                other = f"{self.folder} holds another search (other model or settings)"
                return {"error": f"{other}; choose another --output_dir"}
            if state["solvers"]:
                say(f"going on in {self.folder}: solvers for {', '.join(state['solvers'])} calls are there")
            return state
        if files:
            say(f"no state of {self.folder} could be read; the search starts over from its references")
        elif (self.folder / SCHEDULER).exists():
            other = f"{self.folder} holds a solver that this search did not make"
            return {"error": f"{other}; choose another --output_dir"}
        (self.folder / "cache").mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / "cache"):
            remove_partial_files(folder)
        state = {"key": key, "network_evaluations": 0, "solvers": {}}
        self._write_state(state)
        return state

    def _how_to_go_on(self) -> str:
        finished = ", ".join(sorted(self.state["solvers"], key=int)) or "no"
        return f"interrupted; {self.folder} holds solvers for {finished} calls; the same command goes on from there"

    def _log_trial(self, candidate: Candidate) -> None:
        tried = {"nfe": candidate.spec.nfe, "warp": list(candidate.warp), "ridge": candidate.ridge}
        self._log({**tried, "train_mse": candidate.train_mse, "network_evaluations": self._evaluations()})

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "seconds_since_start": round(time.time() - self.started, 2)}) + "\n")

    def _on_known(self, candidate: Candidate, evaluations: int) -> None:
        self._found_done(evaluations)

    def _found_done(self, evaluations: int) -> None:
        """Count what an earlier, killed run did and kept; work that was lost with it is not counted."""
        if self.accelerator.is_main_process:
            self.sampler.network_evaluations += evaluations

    def _evaluations(self) -> int:
        return int(self._reduce(torch.tensor(self.sampler.network_evaluations)))

    def _reduce(self, tensor: Tensor) -> Tensor:
        return reduced(self.accelerator, tensor)


def search(config: SearchConfig) -> None:
    """The command."""
    Search(config)()


def _entry(found: Candidate) -> dict[str, Any]:
    """A fitted solver as it stands in the state."""
    how = {"warp": list(found.warp), "ridge": found.ridge, "validation_mse": found.validation_mse}
    return {**found.spec.to_dict(), **how}


def _table(entry: dict[str, Any]) -> dict[str, Any]:
    """The solver alone, as it is published."""
    return {k: entry[k] for k in SOLVER_KEYS if k in entry}


def _measured(form: ClosedForm, spec: SolverSpec) -> dict[str, Any]:
    return {**spec.to_dict(), "validation_mse": form.score_spec(spec)}


def _classical(form: ClosedForm, nfe: int) -> dict[str, Any]:
    """The best classical solver on uniform nodes, of order 1 to 3."""
    tried = []
    for order in (1, 2, 3):
        error = form.score(warped_nodes(IDENTITY, nfe), None, order)
        tried.append({**form.probe.spec().to_dict(), "validation_mse": error})
    return min(tried, key=_error)


def _error(entry: dict[str, Any]) -> float:
    return comparable(entry["validation_mse"])


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
