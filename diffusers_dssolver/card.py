"""Model cards: a solver's configuration and its figures as Markdown with the Hub's metadata, through one template.

Everything in a card is rendered from `scheduler_config.json` and `eval.json`. What these files say stands in the text
as JSON in code spans, so that none of it is read as Markdown, and without the paths of the machine it comes from.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import diffusers
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from . import pipelines
from .config import is_flow
from .figures import METRICS, metric_name, told_end
from .published import cards_folder

if TYPE_CHECKING:
    from .scheduler import DSSolverScheduler

CARD, EVAL, TEMPLATE = "README.md", "eval.json", "card.md.jinja"
PICTURES = {
    "comparison.png": "the same samples through this solver and diffusers' schedulers at equal network calls",
    "error.png": "final-state mse against network calls",
    "nodes.png": "nodes by step count",
    "coefficients.png": "coefficients by step count",
}
# of the Hub, by the mapping of diffusers that names the pipeline; class-conditional ones have none (nor has DiT's card)
TASKS = {
    "text-to-image": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "text-to-video": "AUTO_TEXT2VIDEO_PIPELINES_MAPPING",
    "image-to-video": "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING",
    "image-to-image": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "text-to-audio": "AUTO_TEXT2AUDIO_PIPELINES_MAPPING",
}
CONDITIONS = {"class_labels": [0], "prompt": "a lighthouse at dusk"}  # what a pipeline's call needs, by its signature
OWN_TASK = "image-generation"  # a model-index cannot do without
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def render(
    config: Mapping[str, Any],
    source: str,
    figures: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    pictures: Collection[str] = (),
    license: str = "apache-2.0",
) -> str:
    """The README.md of a solver.

    Args:
        config: a `scheduler_config.json`.
        source: what loads it: a Hub id or a published name.
        figures: an `eval.json`: {"comparison", "evaluation", "reported"}, each of them null if there is none.
        name: of this solver in the figures; the last part of `source` by default.
        pictures: names of files beside the card.
        license: of the solver, unless its provenance names one.
    """
    figures, facts = without_paths(_mapping(figures)), without_paths(_mapping(config.get("provenance")))
    title = source.split("/")[-1]
    name = name or title
    counts = sorted(map(int, _mapping(config.get("solvers"))))
    comparison, evaluation = _mapping(figures.get("comparison")), _mapping(figures.get("evaluation"))
    model, task = str(facts.get("base_model") or facts.get("model")), _task(facts.get("pipeline"))
    results = [*_mse_results(comparison, name, task), *_metric_results(evaluation, name, task)]
    data = ModelCardData(
        library_name="diffusers",
        license=str(facts["license"]).split(",")[0].lower() if "license" in facts else license,
        pipeline_tag=task,
        base_model=model if HUB_ID.fullmatch(model) else None,
        tags=["diffusers", "dssolver", "scheduler", "arxiv:2505.21114"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(cards_folder() / TEMPLATE),
        title=title,
        counts=_listed(counts),
        snippet=_snippet(config, facts, source, counts),
        searched=_searched(facts),
        schedule=schedule(config),
        measured_on=[_conditions(m["settings"]) for m in (comparison, evaluation) if m],
        comparison=_comparison_table(comparison, name),
        comparison_facts=_comparison_facts(comparison),
        evaluation=_evaluation_table(evaluation, name),
        evaluation_facts=_evaluation_facts(evaluation),
        reported=_mapping(figures.get("reported")),
        reported_tables=[_reported_table(t) for t in _mapping(figures.get("reported")).get("tables", [])],
        pictures={file: text for file, text in PICTURES.items() if file in pictures},
        provenance=_table([["field", "value"], *([_code(k, plain=True), _code(v)] for k, v in _leaves(facts))]),
        upstream=facts.get("kind") == "upstream",
        complete="settings" in facts,
        commands=commands(facts, comparison, evaluation),
    )
    return str(card)


def push(scheduler: DSSolverScheduler, repo_id: str, private: bool | None, token: str | None, **commit: Any) -> str:
    """The scheduler and its card to the Hub in one commit; no card into a subfolder, or for one without tables."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        if scheduler.tables and not commit["path_in_repo"]:
            Path(folder, CARD).write_text(render(scheduler.config, repo_id), encoding="utf-8")
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))


def without_paths(value: Any) -> Any:
    """JSON data in which of every local path only the last part is left."""
    if isinstance(value, Mapping):
        return {key: without_paths(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(v) for v in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_path(value) else value


def schedule(config: Mapping[str, Any]) -> str:
    """The noise schedule in words."""
    if is_flow(config):
        return (
            "flow, dynamic shift" if config.get("use_dynamic_shifting") else f"flow, shift {config.get('shift', 1):g}"
        )
    if config.get("trained_betas") is not None:
        return "vp, betas of its own"
    betas = f"{config.get('beta_start', 1e-4):g} to {config.get('beta_end', 0.02):g}"
    return f"vp, {config.get('beta_schedule', 'linear')} betas {betas}"


def _is_path(text: str) -> bool:
    if text.startswith(("/", "~", "./", "../", "file:")) or PureWindowsPath(text).is_absolute():
        return True
    deep = text.count("/") > 1 and "://" not in text and not re.search(r"\s", text)  # a Hub id has one
    return deep or ("/" in text and os.path.exists(text))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _code(value: Any, plain: bool = False) -> str:
    """A code span of JSON, or of a bare word; nothing in it ends the span or the table's cell."""
    text = json.dumps(value)
    text = text[1:-1] if plain or isinstance(value, str) else text
    return f"`{text.replace('`', chr(92) + 'u0060').replace('|', chr(92) + 'u007c')}`"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def _listed(counts: Sequence[int]) -> str:
    *most, last = map(str, counts)
    return f"{', '.join(most)} and {last}" if most else last


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of nested data, by its dotted name."""
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _class(pipeline: Any) -> type | None:
    """A pipeline of ours or of diffusers by the name of its class."""
    if not isinstance(pipeline, str) or not pipeline.endswith("Pipeline"):
        return None
    return getattr(pipelines, pipeline, None) or getattr(diffusers, pipeline, None)


def _task(pipeline: Any) -> str | None:
    """The Hub's name for what a pipeline of diffusers does, by diffusers' own mappings."""
    cls = _class(pipeline)
    if cls is None or "prompt" not in inspect.signature(cls.__call__).parameters:
        return None
    try:
        from diffusers.pipelines import auto_pipeline  # slow: it loads every pipeline
    except (ImportError, RuntimeError):  # one of them misses a library
        return None
    names = {task: {c.__name__ for c in getattr(auto_pipeline, m).values()} for task, m in TASKS.items()}
    return next((task for task, known in names.items() if pipeline in known), None)


# --- text ------------------------------------------------------------------------------------------------------------


def _snippet(config: Mapping[str, Any], facts: Mapping[str, Any], source: str, counts: Sequence[int]) -> str:
    """Code that runs: the pipeline and the call that the solver was searched for, as far as they are known."""
    cls = _class(facts.get("pipeline"))
    known = inspect.signature(cls.__call__).parameters if cls else {}
    cls = cls or diffusers.DiffusionPipeline
    package = pipelines.__name__ if cls.__module__.startswith(pipelines.__name__) else "diffusers"
    model = facts.get("base_model") or ("MODEL" if facts.get("kind") == "upstream" else facts.get("model", "MODEL"))
    call = {key: v[0] if isinstance(v, list) and v else v for key, v in _mapping(facts.get("call")).items()}
    scale = f", guidance_scale={call['guidance_scale']}" if config.get("guidance_solvers") else ""
    steps = {"num_inference_steps": counts[len(counts) // 2]}
    arguments = {k: v for k, v in CONDITIONS.items() if k in known} | steps | call
    given = ", ".join(f"{key}={_python(value)}" for key, value in arguments.items() if key.isidentifier())
    return f"""from {package} import {cls.__name__}
from diffusers_dssolver import DSSolverScheduler

pipe = {cls.__name__}.from_pretrained({_python(str(model))})
pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers={_python(source)}{scale})
output = pipe({given})"""


def _python(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _searched(facts: Mapping[str, Any]) -> str:
    words = [f"{key} {_code(facts[key])}" for key in ("revision", "pipeline", "call", "dtype") if facts.get(key)]
    if facts.get("guidance_scale") is not None:
        words.append(f"guidance scale {_code(facts['guidance_scale'])}")
    return ", ".join([_code(facts.get("model", "not recorded")), *words])


def _conditions(settings: Mapping[str, Any]) -> str:
    """What a measurement was made on."""
    call = _call(settings)
    with_call = f" called with {_code(call)}" if call else ""
    return f"{_code(settings['pretrained_model_name_or_path'])}{with_call}, at {_listed(settings['nfe'])} network calls"


def _call(settings: Mapping[str, Any]) -> dict[str, Any]:
    guidance = settings.get("guidance_scale")
    return ({} if guidance is None else {"guidance_scale": guidance}) | dict(_mapping(settings.get("call")))


def _comparison_table(comparison: Mapping[str, Any], name: str) -> str:
    """This solver's mse beside that of diffusers' best scheduler, by NFE."""
    rows = []
    for ours in (r for r in comparison.get("results", []) if r["scheduler"] == name):
        stock = [r for r in comparison["results"] if r["nfe"] == ours["nfe"] and not r["searched"]]
        best = min(stock, key=lambda r: r["mse"], default=None)
        theirs = [f"{best['mse']:.3g}", f"{best['scheduler']} ({best['spacing']})"] if best else ["-", "-"]
        ratio = f"{ours['mse'] / best['mse']:.2f}" if best else "-"
        rows.append([str(ours["nfe"]), f"{ours['mse']:.3g} ({ours['spacing']})", *theirs, ratio])
    return (
        _table([["network calls", "this solver", "diffusers' best", "which (spacing)", "ratio"], *rows]) if rows else ""
    )


def _comparison_facts(comparison: Mapping[str, Any]) -> str:
    if not comparison:
        return ""
    settings, reference = comparison["settings"], comparison["reference"]
    end = told_end(reference.get("end"))
    return (
        f"Final-state mse against {reference['steps']} steps{end} (the mse between these and half as many: "
        f"{reference['mse_against_half_the_steps']:.1g}), {settings['num_samples']} test samples that no search has "
        f"seen, seed {settings['seed']}, {_versions(comparison)}"
    )


def _evaluation_table(evaluation: Mapping[str, Any], name: str) -> str:
    """Every result, this solver's in bold, with intervals where there are any."""
    results = evaluation.get("results", [])
    metrics = [m for m in METRICS if any(m in r["metrics"] for r in results)]
    rows = []
    for r in results:
        bold = "**" if r["scheduler"] == name else ""
        spacing = f" ({r['spacing']})" if r.get("spacing") else ""
        cells = [_with_interval(r["metrics"].get(m)) for m in metrics]
        rows.append([f"{bold}{r['scheduler']}{bold}{spacing}", str(r["nfe"]), str(r["n"]), *cells])
    head = ["scheduler", "network calls", "n", *(metric_name(m, _network(evaluation, m)) for m in metrics)]
    return _table([head, *rows]) if rows else ""


def _network(evaluation: Mapping[str, Any], metric: str) -> str:
    """What the metric sees images through."""
    return str(evaluation["clip" if metric == "clip_score" else "extractor"])


def _with_interval(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "-"
    interval = measured.get("interval")
    return f"{measured['value']:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def _evaluation_facts(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return ""
    data = evaluation["data"]
    return (
        f"Against {data['n']} images of {_code(data['name'])}, in the features of {_code(evaluation['extractor'])}; n "
        f"is the number of generated images, in brackets are 95 % intervals, {_versions(evaluation)}"
    )


def _versions(measured: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in measured["versions"].items())


def _reported_table(table: Mapping[str, Any]) -> dict[str, str]:
    counts = sorted({n for figures in table["figures"].values() for n in figures}, key=int)
    rows = [[who, *(str(figures.get(n, "-")) for n in counts)] for who, figures in table["figures"].items()]
    return {"title": table["title"], "table": _table([["network calls", *counts], *rows])}


# --- how to do it again ----------------------------------------------------------------------------------------------


def commands(facts: Mapping[str, Any], *measurements: Mapping[str, Any]) -> list[str]:
    """The commands of search, comparison and evaluation."""
    searches = [facts] if facts.get("kind") == "searched" else list(_mapping(facts.get("by_guidance_scale")).values())
    folders = [f"searched-{i}" for i in range(1, len(searches) + 1)]
    lines = [
        _command("search", _search_settings(search) | {"output_dir": folder})
        for search, folder in zip(searches, folders, strict=True)
    ]
    if len(lines) > 1:
        scale = facts.get("default_guidance_scale")
        lines.append(_command("merge", {"solver": folders, "guidance_scale": scale, "output_dir": "merged"}))
    names = ("compare", "evaluate")
    return lines + [_command(n, m["settings"]) for n, m in zip(names, measurements, strict=True) if m]


def _search_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as recorded, or what the other fields tell of them."""
    if "settings" in facts:
        return dict(facts["settings"])
    call, teacher, samples = dict(_mapping(facts.get("call"))), _mapping(facts.get("teacher")), facts.get("samples", {})
    guidance = call.pop("guidance_scale", None)
    results = _mapping(facts.get("results"))
    train = "num_generated_samples" if facts.get("method") == "paper" else "num_train_samples"
    return {
        "pretrained_model_name_or_path": facts.get("model"), "revision": facts.get("revision"),
        "guidance_scales" if isinstance(guidance, list) else "guidance_scale": guidance, "call": call,
        "nfe": sorted(int(n) for n, r in results.items() if r.get("kind") == "searched"),
        "method": facts.get("method"), "dtype": facts.get("dtype"), "seed": facts.get("seed"),
        "teacher_steps": teacher.get("steps"), "teacher_order": teacher.get("order"),
        "teacher_scheduler": teacher.get("scheduler"), "teacher_end": teacher.get("end"), train: samples.get("train"),
        "num_validation_samples": samples.get("validation"),
    }  # fmt: skip


def _command(name: str, settings: Mapping[str, Any]) -> str:
    """The command line that gives these settings."""
    words = ["python", "-m", "dssolver_search", name]
    for key, value in settings.items():
        if value is None or value in ({}, ""):
            continue
        values = value if isinstance(value, list) else [value]
        texts = [json.dumps(v) if isinstance(v, (bool, dict)) else str(v) for v in values]
        words += [f"--{key}", *map(shlex.quote, texts)]
    return " ".join(words)


# --- model-index -----------------------------------------------------------------------------------------------------


def _mse_results(comparison: Mapping[str, Any], name: str, task: str | None) -> Iterator[EvalResult]:
    reference = _mapping(comparison.get("reference"))
    for r in (r for r in comparison.get("results", []) if r["scheduler"] == name):
        settings = comparison["settings"]
        model, seed, n = settings["pretrained_model_name_or_path"], settings["seed"], settings["num_samples"]
        yield EvalResult(
            task_type=task or OWN_TASK, dataset_type="generated", dataset_name=f"samples of {model}, seed {seed}",
            metric_type="mse", metric_name="final-state mse", metric_value=r["mse"],
            metric_args={
                "nfe": r["nfe"], "guidance": _call(settings).get("guidance_scale"), "n": n,
                **{f"reference_{key}": reference[key] for key in ("steps", "end") if key in reference},
            },
        )  # fmt: skip


def _metric_results(evaluation: Mapping[str, Any], name: str, task: str | None) -> Iterator[EvalResult]:
    for r in (r for r in evaluation.get("results", []) if r["scheduler"] == name):
        guidance = _call(evaluation["settings"]).get("guidance_scale")
        for metric in (m for m in METRICS if m in r["metrics"]):
            args = {"nfe": r["nfe"], "guidance": guidance, "n": r["n"], "extractor": _network(evaluation, metric)}
            if interval := r["metrics"][metric].get("interval"):
                args["interval"] = list(interval)
            yield EvalResult(
                task_type=task or OWN_TASK, dataset_type=evaluation["data"]["name"],
                dataset_name=evaluation["data"]["name"], metric_type=metric, metric_args=args,
                metric_name=metric_name(metric, args["extractor"]), metric_value=r["metrics"][metric]["value"],
            )  # fmt: skip
