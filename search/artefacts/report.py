"""The `report` command: one HTML file with all that is known of a solver, which needs neither network nor server.

Text of solvers, comparisons and evaluations is untrusted: it is escaped, pictures are decoded and encoded anew, and a
content security policy lets nothing run or load that this module did not write.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.card import leaves, schedule, without_paths

from ..console import one_line
from ..measure.pictures import Drawing, positive, rendered
from ..settings import ReportConfig
from ..storage import write_text
from .figures import columns, commands, steps
from .plots import drawings
from .read import load_solver, read_results

TEMPLATE, REPORT = "report.html.jinja", "report.html"
# Titles of the comparison's errors; those that were measured get a table.
ERRORS = {
    "mse": "Final-state mse", "image_mse": "Mse of the images", "feature_distance": "Distance in features of",
}  # fmt: skip
WIDEST = 1600  # pixels of a strip in the page
LARGEST = 16383  # pixels of a side that WebP can hold
SMALL = 128  # pixels of height below which a picture is enlarged without smoothing


def report(config: ReportConfig) -> None:
    """Write report.html.

    Raises:
        ValueError: the solver, a folder or a file is at fault; nothing is written.
    """
    html = page(config)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / REPORT, html)
    print(f"written to {folder}: {REPORT}")


def page(config: ReportConfig) -> str:
    """The HTML."""
    pictures = drawings(config.solver, config.comparison, config.nfe)
    comparison = read_results(config.comparison, "comparison")
    comparison["settings"] = without_paths(comparison["settings"])
    evaluation = without_paths(read_results(config.evaluation, "evaluation")) if config.evaluation else {}
    scheduler = load_solver(config.solver)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["digest"] = _digest
    return environment.get_template(TEMPLATE).render(
        name=Path(config.solver).resolve().name if Path(config.solver).is_dir() else config.solver,
        measured=_measured(comparison),
        counts=_counts(comparison),
        tables=list(_tables(comparison)),
        plots={name: [_svg(draw, dark) for dark in (False, True)] for name, draw in pictures.items()},
        evaluation=evaluation and _evaluation(evaluation, comparison),
        **_provenance(config.solver, scheduler, comparison, evaluation),
        **_pictures(Path(config.comparison), comparison),
    )


def _measured(comparison: Mapping[str, Any]) -> str:
    settings, reference = comparison["settings"], comparison["reference"]
    samples, model = _text(settings.get("num_samples")), _text(settings.get("pretrained_model_name_or_path"))
    error = _text(reference.get("mse_against_half_the_steps"), 2)
    return (
        f"On {samples} test samples of {model} that no search has seen, against a reference of {steps(comparison)}; "
        f"the mse between it and one of half as many is {error}. In small print the node spacing, the network calls "
        "where they are not as many as asked for, and 95 % intervals. The lowest of each column is underlined."
    )


def _counts(comparison: Mapping[str, Any]) -> list[int]:
    return sorted({r["nfe"] for r in comparison["results"]})


def _by_scheduler(comparison: Mapping[str, Any]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Results by scheduler, in the file's order, and NFE."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for result in comparison["results"]:
        found.setdefault(result["scheduler"], {})[result["nfe"]] = result
    return found


def _tables(comparison: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A table for each kind of error, and one of searched solvers over the best other: a row per scheduler, a column
    per NFE."""
    by, counts = _by_scheduler(comparison), _counts(comparison)
    for key, title in ERRORS.items():
        if not any(positive(r.get(key)) for r in comparison["results"]):
            continue
        if key == "feature_distance":
            title = f"{title} {_text(comparison['settings'].get('feature_network'))}"
        lowest = {n: _lowest(comparison["results"], n, key) for n in counts}
        yield {
            "title": title,
            "rows": [
                {
                    "name": name,
                    "ours": any(r["searched"] for r in line.values()),
                    "cells": [_error_cell(line.get(n), key, lowest[n]) for n in counts],
                }
                for name, line in by.items()
            ],
        }
    stock = [r for r in comparison["results"] if not r["searched"]]
    ours = {name: line for name, line in by.items() if any(r["searched"] for r in line.values())}
    if stock and ours:
        best = {n: _lowest(stock, n, "mse") for n in counts}
        rows = [
            {"name": name, "ours": True, "cells": [_ratio_cell(line.get(n), best[n]) for n in counts]}
            for name, line in ours.items()
        ]
        yield {"title": "Final-state mse over the best that was not searched", "rows": rows}


def _lowest(results: Iterable[Mapping[str, Any]], nfe: int, key: str) -> float:
    return min((r[key] for r in results if r["nfe"] == nfe and positive(r.get(key))), default=math.nan)


def _error_cell(result: Mapping[str, Any] | None, key: str, lowest: float) -> dict[str, Any]:
    if result is None or result.get(key) is None:
        return {"text": "-", "notes": [], "best": False}
    calls = "" if result["calls"] == result["nfe"] else f", {result['calls']} calls"
    notes = [f"{result['spacing']}{calls}"] * (key == "mse") + _interval(result.get(f"{key}_interval"), 3)
    return {"text": _text(result[key], 3), "notes": notes, "best": result[key] == lowest}


def _ratio_cell(result: Mapping[str, Any] | None, best: float) -> dict[str, Any]:
    ratio = result["mse"] / best if result else math.nan
    return {"text": f"{ratio:.2f}" if math.isfinite(ratio) else "-", "notes": [], "best": False}


def _evaluation(evaluation: Mapping[str, Any], comparison: Mapping[str, Any]) -> dict[str, Any]:
    """A row per scheduler and NFE, a column per metric, which is named with its network."""
    results = evaluation["results"]
    titles = columns(evaluation)
    data = evaluation["data"]
    searched = {r["scheduler"] for r in comparison["results"] if r["searched"]}
    return {
        "measured": f"Features of {evaluation['extractor']}, against {_text(data.get('n'))} images of "
        f"{_text(data.get('name'))}; n: images generated. In small print 95 % intervals.",
        "head": ["scheduler", "calls", "n", *titles.values(), "seconds per image"],
        "rows": [
            {
                "name": r["scheduler"],
                "ours": r["scheduler"] in searched,
                "spacing": r.get("spacing") or "",
                "cells": [
                    *({"text": str(r[key]), "notes": []} for key in ("nfe", "n")),
                    *(_metric_cell(r["metrics"].get(m)) for m in titles),
                    {"text": _text(r["seconds_per_image"], 3), "notes": []},
                ],
            }
            for r in results
        ],
    }  # fmt: skip


def _metric_cell(measured: Any) -> dict[str, Any]:
    if not isinstance(measured, Mapping):
        return {"text": "-", "notes": []}
    return {"text": _text(measured.get("value"), 4), "notes": _interval(measured.get("interval"), 4)}


def _interval(ends: Any, digits: int) -> list[str]:
    return [" to ".join(_text(end, digits) for end in ends)] if isinstance(ends, list) else []


# --- provenance ---------------------------------------------------------------------------------------------------


def _provenance(
    solver: str, scheduler: DSSolverScheduler, comparison: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """What the artefact says of itself, by section of the page.

    Returns:
        summary: names and values of the most important fields.
        facts: dotted name and value of every field but the records.
        records: dotted name, columns and rows of every field that holds records of one kind.
        commands: command lines that make all this again.
    """
    try:
        provenance = without_paths(scheduler.config.provenance or {})
        fields = list(leaves(provenance, whole=_are_records))
        return {
            "summary": list(_summary(scheduler, provenance, comparison)),
            "facts": [(key, _text(value)) for key, value in fields if not _are_records(value)],
            "records": [(key, *_table(value)) for key, value in fields if _are_records(value)],
            "commands": commands(provenance, comparison, evaluation),
        }
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        reason = f"the provenance of {solver!r} is not what search writes ({one_line(error)})"
        raise ValueError(f"{reason}; remove it") from None


def _summary(
    scheduler: DSSolverScheduler, provenance: Mapping[str, Any], comparison: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    for key in ("model", "pipeline", "method", "call", "source"):
        if provenance.get(key):
            yield key, _text(provenance[key])
    yield "noise schedule", schedule(scheduler.config)
    yield "tables for", ", ".join(map(str, scheduler.tables)) + " network calls"
    yield "measured with", _text(comparison["versions"])


def _are_records(value: Any) -> bool:
    """Whether a value is a mapping of records: mappings that hold no records themselves."""
    inner = list(value.values()) if isinstance(value, Mapping) else []
    return bool(inner) and all(
        isinstance(record, Mapping) and not any(map(_are_records, record.values())) for record in inner
    )


def _table(records: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns, and rows in the order of their names, 9 before 10."""
    columns = list(dict.fromkeys(column for record in records.values() for column in record))
    rows = [(name, [_text(r[c]) if c in r else "" for c in columns]) for name, r in records.items()]
    return columns, sorted(rows, key=lambda row: (len(row[0]), row[0]))


def _text(value: Any, digits: int = 6) -> str:
    """JSON data as plain text, numbers rounded."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(v, digits)}" for key, v in value.items()) or "-"
    if isinstance(value, list):
        between = "; " if any(isinstance(v, Mapping) for v in value) else ", "
        return between.join(_text(v, digits) for v in value) or "-"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "-" if value is None else str(value)


# --- what is embedded ---------------------------------------------------------------------------------------------


def _pictures(folder: Path, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Strips of samples by NFE and scheduler, else the comparison's single picture, else none."""
    found: dict[str, Any] = {"panels": [], "reference": None, "whole": None, "reference_note": steps(comparison)}
    for nfe in _counts(comparison):
        rows = [
            {
                "name": r["scheduler"],
                "ours": r["searched"],
                "note": f"mse {_text(r['mse'], 3)}",
                "picture": _picture(folder, r["picture"]),
            }
            for r in comparison["results"]
            if r["nfe"] == nfe and r.get("picture")
        ]
        if rows:
            found["panels"].append({"nfe": nfe, "rows": rows})
    if found["panels"] and (folder / "pictures" / "reference.png").is_file():
        found["reference"] = _picture(folder, "pictures/reference.png")
    elif not found["panels"] and (folder / "comparison.png").is_file():
        found["whole"] = _picture(folder, "comparison.png", LARGEST)
    return found


def _picture(folder: Path, name: Any, widest: int = WIDEST) -> dict[str, Any]:
    """A PNG file in the folder, encoded anew: small pictures without loss, large ones made to fit."""
    try:
        file = (folder / name).resolve(strict=True)
        if not file.is_relative_to(folder.resolve()):
            raise ValueError("it is not in the folder")
        with Image.open(file, formats=["PNG"]) as image:
            picture = image.convert("RGB")
    except (OSError, TypeError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"the picture {name!r} of {str(folder)!r} cannot be used ({one_line(error)}); make it anew with compare"
        ) from None
    small = picture.height < SMALL
    picture.thumbnail((widest, LARGEST))
    data = io.BytesIO()
    picture.save(data, "WEBP", lossless=small, quality=90)
    uri = _uri("image/webp", data.getvalue())
    return {"uri": uri, "width": picture.width, "height": picture.height, "small": small}


def _svg(draw: Drawing, dark: bool) -> str:
    return _uri("image/svg+xml", rendered(draw, dark, "svg"))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _digest(text: str) -> str:
    """Name of a style or script in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
