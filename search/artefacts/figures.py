"""What cards and reports say of measured results, from the JSON that `compare`, `evaluate` and `search` write.

An `eval.json` holds {"comparison": what `compare` wrote, "evaluation": what `evaluate` wrote, "reported": figures of a
paper}, each of them null if there is none. Like every file it is untrusted text.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult

from diffusers_dssolver.card import code, listed, mapping, render, table, task, without_paths

from ..console import METRICS, metric_name, told_end

KINDS = ("comparison", "evaluation", "reported")
PICTURES = {
    "comparison.png": "the same samples through this solver and diffusers' schedulers at equal network calls",
    "error.png": "final-state mse against network calls",
    "nodes.png": "nodes by step count",
    "coefficients.png": "coefficients by step count",
}
OWN_TASK = "image-generation"  # for pipelines without a task of the Hub, since a model-index needs one
RELEASE = (
    "The numbers are those of the release that the provenance names, converted as it says. A search by the paper's "
    "recipe on\nanother model is `python -m dssolver_search search --method paper`."
)
INCOMPLETE = "Settings of the search that its provenance does not record are left out."


def card(
    config: Mapping[str, Any],
    source: str,
    figures: Mapping[str, Any],
    *,
    name: str = "",
    pictures: Collection[str] = (),
    license: str = "apache-2.0",
) -> str:
    """The README.md of a solver with its figures; arguments as in `card.render` and `sections`.

    Args:
        name: of this solver in the figures; the last part of `source` by default.
    """
    name = name or source.split("/")[-1]
    told, measured = sections(config, figures, name, pictures), results(config, figures, name)
    return render(config, source, told, results=measured, license=license)


# --- sections of a card ----------------------------------------------------------------------------------------------


def sections(
    config: Mapping[str, Any], figures: Mapping[str, Any], name: str, pictures: Collection[str] = ()
) -> list[tuple[str, str]]:
    """The sections "Figures" and "Reproduce" of a card.

    Args:
        config: a `scheduler_config.json`.
        figures: an `eval.json`.
        name: of this solver in the figures.
        pictures: names of files beside the card.
    """
    comparison, evaluation, reported = (mapping(without_paths(figures.get(kind))) for kind in KINDS)
    measured = [_conditions(m["settings"]) for m in (comparison, evaluation) if m]
    shown = ["\n".join(f"- Measured on {conditions}." for conditions in measured)] if measured else []
    shown += [
        *(_comparison(comparison, name) if comparison else []),
        *(_evaluation(evaluation, name) if evaluation else []),
        *(_reported(reported) if reported else []),
        *(f"![{text}]({file})" for file, text in PICTURES.items() if file in pictures),
    ]
    shown = shown if measured or reported else ["Not measured by this project.", *shown]
    facts = without_paths(mapping(config.get("provenance")))
    again = [RELEASE] if facts.get("kind") == "upstream" else []
    if lines := commands(facts, comparison, evaluation):
        again.append("\n".join(["```bash", 'pip install "diffusers-dssolver[search]"', *lines, "```"]))
        if "settings" not in facts:
            again.append(INCOMPLETE)
    return [("Figures", "\n\n".join(shown)), ("Reproduce", "\n\n".join(again or ["The provenance does not say how."]))]


def _conditions(settings: Mapping[str, Any]) -> str:
    """What a measurement was made on."""
    call = _call(settings)
    with_call = f" called with {code(call)}" if call else ""
    return f"{code(settings['pretrained_model_name_or_path'])}{with_call}, at {listed(settings['nfe'])} network calls"


def _call(settings: Mapping[str, Any]) -> dict[str, Any]:
    guidance = settings.get("guidance_scale")
    return ({} if guidance is None else {"guidance_scale": guidance}) | dict(mapping(settings.get("call")))


def _of(measured: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """Results of one scheduler."""
    return (r for r in measured.get("results", []) if r["scheduler"] == name)


def _comparison(comparison: Mapping[str, Any], name: str) -> Iterator[str]:
    """The mse of this solver and of diffusers' best scheduler, by NFE, and how it was measured."""
    rows = []
    for ours in _of(comparison, name):
        stock = [r for r in comparison["results"] if r["nfe"] == ours["nfe"] and not r["searched"]]
        best = min(stock, key=lambda r: r["mse"], default=None)
        theirs = [f"{best['mse']:.3g}", f"{best['scheduler']} ({best['spacing']})"] if best else ["-", "-"]
        ratio = f"{ours['mse'] / best['mse']:.2f}" if best else "-"
        rows.append([str(ours["nfe"]), f"{ours['mse']:.3g} ({ours['spacing']})", *theirs, ratio])
    if rows:
        yield table([["network calls", "this solver", "diffusers' best", "which (spacing)", "ratio"], *rows])
    settings, error = comparison["settings"], comparison["reference"]["mse_against_half_the_steps"]
    yield (
        f"Final-state mse against {steps(comparison)} (the mse between these and half as many: {error:.1g}), "
        f"{settings['num_samples']} test samples that no search has seen, seed {settings['seed']}, "
        f"{_versions(comparison)}."
    )


def steps(comparison: Mapping[str, Any]) -> str:
    """The reference of a comparison: "400 steps"."""
    reference = comparison["reference"]
    return f"{reference.get('steps')} steps{told_end(reference.get('end'))}"


def columns(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Titles of the metrics that were measured, each with its network."""
    found = {m for r in evaluation.get("results", []) for m in r["metrics"] if m.isidentifier()}
    measured = [*(m for m in METRICS if m in found), *sorted(found - METRICS.keys())]
    return {m: metric_name(m, network(evaluation, m)) for m in measured}


def network(evaluation: Mapping[str, Any], metric: str) -> str:
    """The network whose features a metric compares."""
    return str(evaluation.get("clip" if metric == "clip_score" else "extractor"))


def _evaluation(evaluation: Mapping[str, Any], name: str) -> Iterator[str]:
    """All results, those of this solver in bold, and how they were measured."""
    titles = columns(evaluation)
    rows = []
    for r in evaluation.get("results", []):
        bold = "**" if r["scheduler"] == name else ""
        spacing = f" ({r['spacing']})" if r.get("spacing") else ""
        cells = [_with_interval(r["metrics"].get(m)) for m in titles]
        rows.append([f"{bold}{r['scheduler']}{bold}{spacing}", str(r["nfe"]), str(r["n"]), *cells])
    if rows:
        yield table([["scheduler", "network calls", "n", *titles.values()], *rows])
    data = evaluation["data"]
    yield (
        f"Against {data['n']} images of {code(data['name'])}, in the features of {code(evaluation['extractor'])}; n "
        f"is the number of generated images, in brackets are 95 % intervals, {_versions(evaluation)}."
    )


def _with_interval(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "-"
    interval = measured.get("interval")
    return f"{measured['value']:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def _versions(measured: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in measured["versions"].items())


def _reported(reported: Mapping[str, Any]) -> Iterator[str]:
    """Figures of a paper, marked as such."""
    yield f"Reported in [{reported['source']}]({reported['url']}), not measured by this project:"
    for entry in reported.get("tables", []):
        counts = sorted({n for figures in entry["figures"].values() for n in figures}, key=int)
        rows = [[who, *(str(figures.get(n, "-")) for n in counts)] for who, figures in entry["figures"].items()]
        yield from (entry["title"], table([["network calls", *counts], *rows]))
    if reported.get("note"):
        yield reported["note"]


# --- how to do it again ----------------------------------------------------------------------------------------------


def commands(facts: Mapping[str, Any], *measured: Mapping[str, Any]) -> list[str]:
    """Command lines of search, comparison and evaluation.

    Args:
        facts: the provenance of a solver.
        measured: its comparison and its evaluation, either of them empty if there is none.
    """
    searches = [facts] if facts.get("kind") == "searched" else list(mapping(facts.get("by_guidance_scale")).values())
    folders = [f"searched-{i}" for i in range(1, len(searches) + 1)]
    lines = [
        _command("search", _search_settings(search) | {"output_dir": folder})
        for search, folder in zip(searches, folders, strict=True)
    ]
    if len(lines) > 1:
        scale = facts.get("default_guidance_scale")
        lines.append(_command("merge", {"solver": folders, "guidance_scale": scale, "output_dir": "merged"}))
    names = ("compare", "evaluate")
    return lines + [_command(n, m["settings"]) for n, m in zip(names, measured, strict=True) if m]


def _search_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as recorded, or what the other fields tell of them."""
    if "settings" in facts:
        return dict(facts["settings"])
    call, teacher, samples = dict(mapping(facts.get("call"))), mapping(facts.get("teacher")), facts.get("samples", {})
    guidance, results = call.pop("guidance_scale", None), mapping(facts.get("results"))
    train = "num_generated_samples" if facts.get("method") == "paper" else "num_train_samples"
    return {
        "pretrained_model_name_or_path": facts.get("model"), "revision": facts.get("revision"),
        "guidance_scale": guidance, "call": call, "method": facts.get("method"), "dtype": facts.get("dtype"),
        "nfe": sorted(int(n) for n, r in results.items() if r.get("kind") == "searched"), "seed": facts.get("seed"),
        "teacher_steps": teacher.get("steps"), "teacher_order": teacher.get("order"), "teacher_end": teacher.get("end"),
        train: samples.get("train"), "num_validation_samples": samples.get("validation"),
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


# --- the Hub's model-index -------------------------------------------------------------------------------------------


def results(config: Mapping[str, Any], figures: Mapping[str, Any], name: str) -> list[EvalResult]:
    """What was measured of this solver; arguments as in `sections`."""
    comparison, evaluation, _ = (mapping(without_paths(figures.get(kind))) for kind in KINDS)
    kind = task(mapping(config.get("provenance")).get("pipeline")) or OWN_TASK
    return [*_errors(comparison, name, kind), *_metrics(evaluation, name, kind)]


def _errors(comparison: Mapping[str, Any], name: str, kind: str) -> Iterator[EvalResult]:
    reference = mapping(comparison.get("reference"))
    for r in _of(comparison, name):
        settings = comparison["settings"]
        model, seed = settings["pretrained_model_name_or_path"], settings["seed"]
        yield EvalResult(
            task_type=kind, dataset_type="generated", dataset_name=f"samples of {model}, seed {seed}",
            metric_type="mse", metric_name="final-state mse", metric_value=r["mse"],
            metric_args={
                "nfe": r["nfe"], "guidance": _call(settings).get("guidance_scale"), "n": settings["num_samples"],
                **{f"reference_{key}": reference[key] for key in ("steps", "end") if key in reference},
            },
        )  # fmt: skip


def _metrics(evaluation: Mapping[str, Any], name: str, kind: str) -> Iterator[EvalResult]:
    titles = columns(evaluation)
    for r in _of(evaluation, name):
        guidance, data = _call(evaluation["settings"]).get("guidance_scale"), evaluation["data"]["name"]
        for metric, measured in ((m, r["metrics"][m]) for m in titles if m in r["metrics"]):
            args = {"nfe": r["nfe"], "guidance": guidance, "n": r["n"], "extractor": network(evaluation, metric)}
            if interval := measured.get("interval"):
                args["interval"] = list(interval)
            yield EvalResult(
                task_type=kind, dataset_type=data, dataset_name=data, metric_type=metric, metric_args=args,
                metric_name=titles[metric], metric_value=measured["value"],
            )  # fmt: skip
