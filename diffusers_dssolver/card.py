"""Model cards: a solver's configuration as Markdown with the Hub's metadata, through one template.

A configuration is untrusted text. It stands in the card as JSON in code spans, so that none of it is read as Markdown,
and of paths of the machine that it comes from only the last part is left. What was measured of a solver is none of this
module's business: whoever measured it adds sections and results.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import diffusers
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from . import pipelines
from .artefacts import schedule
from .published import cards_folder

CARD, TEMPLATE = "README.md", "card.md.jinja"
# The Hub's tasks and the mapping of diffusers that lists their pipelines. Class-conditional pipelines have no task.
TASKS = {
    "text-to-image": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "text-to-video": "AUTO_TEXT2VIDEO_PIPELINES_MAPPING",
    "image-to-video": "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING",
    "image-to-image": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "text-to-audio": "AUTO_TEXT2AUDIO_PIPELINES_MAPPING",
}
CONDITIONS = {"class_labels": [0], "prompt": "a lighthouse at dusk"}  # passed to pipelines that take such an argument
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def render(
    config: Mapping[str, Any],
    source: str,
    sections: Iterable[tuple[str, str]] = (),
    *,
    results: Sequence[EvalResult] = (),
    license: str = "apache-2.0",
) -> str:
    """The README.md of a solver.

    Args:
        config: a `scheduler_config.json`.
        source: what loads it: a Hub id or a published name.
        sections: titles and Markdown of further sections.
        results: entries of the Hub's model-index.
        license: of the solver, unless its provenance names one.
    """
    facts = without_paths(mapping(config.get("provenance")))
    title = source.split("/")[-1]
    counts = sorted(map(int, mapping(config.get("solvers"))))
    model = str(facts.get("base_model") or facts.get("model"))
    data = ModelCardData(
        library_name="diffusers",
        license=str(facts["license"]).split(",")[0].lower() if "license" in facts else license,
        pipeline_tag=task(facts.get("pipeline")),
        base_model=model if HUB_ID.fullmatch(model) else None,
        tags=["diffusers", "dssolver", "scheduler", "arxiv:2505.21114"],
        model_name=title if results else None,
        eval_results=list(results) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(cards_folder() / TEMPLATE),
        title=title,
        counts=listed(counts),
        snippet=_snippet(config, facts, source, counts),
        searched=_searched(facts),
        schedule=schedule(config),
        sections=list(sections),
        provenance=table([["field", "value"], *([code(k, plain=True), code(v)] for k, v in leaves(facts))]),
    )
    return str(card)


def push(scheduler: Any, repo_id: str, private: bool | None, token: str | None, **commit: Any) -> str:
    """Commit a `DSSolverScheduler` to the Hub, with its card unless it goes into a subfolder or has no tables."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        if scheduler.tables and not commit["path_in_repo"]:
            Path(folder, CARD).write_text(render(scheduler.config, repo_id), encoding="utf-8")
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))


def without_paths(value: Any) -> Any:
    """JSON data in which only the last part of every local path is left."""
    if isinstance(value, Mapping):
        return {key: without_paths(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(v) for v in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_path(value) else value


def task(pipeline: Any) -> str | None:
    """The Hub's task of a pipeline class, by diffusers' own mappings."""
    cls = _class(pipeline)
    if cls is None or "prompt" not in inspect.signature(cls.__call__).parameters:
        return None
    try:
        from diffusers.pipelines import auto_pipeline  # slow: it loads every pipeline
    except (ImportError, RuntimeError):  # a library that one of them needs is missing
        return None
    names = {task: {c.__name__ for c in getattr(auto_pipeline, m).values()} for task, m in TASKS.items()}
    return next((task for task, known in names.items() if pipeline in known), None)


# --- Markdown --------------------------------------------------------------------------------------------------------


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or an empty one in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def code(value: Any, plain: bool = False) -> str:
    """A code span of JSON, or of a bare word; nothing in it ends the span or the cell of a table."""
    text = json.dumps(value)
    text = text[1:-1] if plain or isinstance(value, str) else text
    return f"`{text.replace('`', chr(92) + 'u0060').replace('|', chr(92) + 'u007c')}`"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def listed(counts: Sequence[int]) -> str:
    """Numbers in a sentence: "5, 6 and 8"."""
    *most, last = map(str, counts)
    return f"{', '.join(most)} and {last}" if most else last


def leaves(
    value: Mapping[str, Any], whole: Callable[[Any], bool] = lambda inner: False, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Every field of nested data by its dotted name; mappings that are `whole` are not opened."""
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner and not whole(inner):
            yield from leaves(inner, whole, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _is_path(text: str) -> bool:
    if text.startswith(("/", "~", "./", "../", "file:")) or PureWindowsPath(text).is_absolute():
        return True
    deep = text.count("/") > 1 and "://" not in text and not re.search(r"\s", text)  # a Hub id has one
    return deep or ("/" in text and os.path.exists(text))


def _class(pipeline: Any) -> type | None:
    """A pipeline class of this package or of diffusers, by its name."""
    if not isinstance(pipeline, str) or not pipeline.endswith("Pipeline"):
        return None
    return getattr(pipelines, pipeline, None) or getattr(diffusers, pipeline, None)


def _snippet(config: Mapping[str, Any], facts: Mapping[str, Any], source: str, counts: Sequence[int]) -> str:
    """Code that runs the solver with the pipeline and the arguments it was searched for, as far as they are known."""
    cls = _class(facts.get("pipeline"))
    known = inspect.signature(cls.__call__).parameters if cls else {}
    cls = cls or diffusers.DiffusionPipeline
    package = pipelines.__name__ if cls.__module__.startswith(pipelines.__name__) else "diffusers"
    model = facts.get("base_model") or ("MODEL" if facts.get("kind") == "upstream" else facts.get("model", "MODEL"))
    call = {key: v[0] if isinstance(v, list) and v else v for key, v in mapping(facts.get("call")).items()}
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
    words = [f"{key} {code(facts[key])}" for key in ("revision", "pipeline", "call", "dtype") if facts.get(key)]
    if facts.get("guidance_scale") is not None:
        words.append(f"guidance scale {code(facts['guidance_scale'])}")
    return ", ".join([code(facts.get("model", "not recorded")), *words])
