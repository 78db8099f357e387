"""Pictures of solvers, searches and comparisons, and the `plot` command.

Colour-blind safe (Okabe-Ito, viridis), readable at the width of a card (8 inches for 800 pixels), light and dark.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.config import is_flow

from .config import PlotConfig
from .sampling import one_line
from .state import replacing, say

if TYPE_CHECKING:
    from .compare import Result
    from .config import CompareConfig

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
# the paper's fits, t = 0 at noise and 1 at data over i/N: highest power first, no constant; (20) flow, (21) vp
EQ_20 = (-1.96, 3.51, -0.97, 0.43, 0)
EQ_21 = (-2.73, 6.30, -4.744, 2.17, 0)
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "dssolver",
}  # fmt: skip
WIDTH = 8.0
MOST_TABLES = 24  # in one picture
MOST_NUMBERED = 6  # calls of a table whose cells hold their number
BRIGHT = 0.55  # share of the colour map from which black is easier to read on it than white
NUMBER = float | int
# by file: the command that writes it, what the file must hold to be shown, and what each of its results
RESULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "comparison": (
        "compare",
        {"settings": dict, "reference": dict, "versions": dict},
        {"scheduler": str, "nfe": int, "spacing": str, "calls": int, "mse": NUMBER, "searched": bool},
    ),
    "evaluation": (
        "evaluate",
        {"settings": dict, "extractor": str, "data": dict, "versions": dict},
        {"scheduler": str, "nfe": int, "n": int, "seconds_per_image": NUMBER, "metrics": dict},
    ),
}
Drawing = Callable[[bool], Figure]  # of the dark variant, or the light one


def comparison_picture(results: Sequence[Result], config: CompareConfig, reference: Sequence[Any], file: Path) -> None:
    """Schedulers by rows, NFE by columns, the same samples in every cell; the converged reference on top."""
    names = list(dict.fromkeys(r.scheduler for r in results))
    by = {(r.scheduler, r.nfe): r for r in results}
    strips = {key: strip(r.pictures) for key, r in by.items()}
    top = strip(reference)
    height, width = top.shape[:2]
    columns = len(config.nfe)
    figure = Figure(figsize=(2.2 + 4.2 * columns, (len(names) + 1) * (4.2 * height / width + 0.32) + 0.3), dpi=140)
    axes = figure.subplots(len(names) + 1, columns, squeeze=False)
    for column, nfe in enumerate(config.nfe):
        for row, name in enumerate([None, *names]):
            axis = axes[row][column]
            axis.imshow(
                top if name is None else strips[name, nfe], cmap="gray", vmin=0, vmax=255, interpolation="nearest"
            )
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if name is None:
                axis.set_title(f"NFE {nfe}", fontsize=12, fontweight="bold")
            else:
                axis.set_xlabel(f"mse {by[name, nfe].mse:.2g}", fontsize=9, labelpad=2)
            if column == 0:
                text = f"reference\n{config.reference_steps} steps" if name is None else name
                weight = "bold" if name and by[name, nfe].searched else "normal"
                axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=11, fontweight=weight)
    figure.tight_layout(h_pad=0.4)
    figure.savefig(file, facecolor="white")


def error_curves(results: Sequence[Result], file: Path) -> None:
    """`error_figure`, light, in a file."""
    file.write_bytes(rendered(functools.partial(error_figure, [vars(r) for r in results])))


def plot(config: PlotConfig) -> None:
    """The command: every picture that there is data for, as PNG and SVG, each light and dark.

    Raises:
        ValueError: the solver, the comparison or a setting is at fault; nothing is written.
    """
    found = drawings(config.solver, config.comparison, config.nfe)
    variants = [(dark, kind) for dark in (False, True) for kind in ("png", "svg")]
    files = {
        f"{name}{'-dark' if dark else ''}.{kind}": rendered(draw, dark, kind)
        for name, draw in found.items() for dark, kind in variants
    }  # fmt: skip
    folder = Path(config.output_dir or config.solver)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with replacing(folder / name) as partial:
            partial.write_bytes(data)
    print(f"written to {folder}: {', '.join(found)} (.png, .svg, -dark.png, -dark.svg)")


def drawings(solver: str, comparison: str | None = None, nfe: Sequence[int] = ()) -> dict[str, Drawing]:
    """By name, what can be drawn of a solver (folder, Hub id or published name) and a folder that `compare` wrote.

    Args:
        nfe: step counts whose tables are drawn; none: all.

    Raises:
        ValueError: one line that names the file, or the step count, at fault.
    """
    artefact = load_artefact(solver)
    tables = {int(n): SolverSpec.from_dict(table) for n, table in artefact["solvers"].items()}
    if missing := sorted(set(nfe) - set(tables)):
        known = ", ".join(map(str, sorted(tables)))
        raise ValueError(f"{solver!r} has no table for {missing[0]} steps; it has them for {known}")
    specs = [tables[n] for n in sorted(nfe or tables)]
    if len(specs) > MOST_TABLES:
        raise ValueError(f"{solver!r} has {len(specs)} tables; choose at most {MOST_TABLES} with --nfe")
    found: dict[str, Drawing] = {
        "nodes": functools.partial(nodes_figure, specs, is_flow(artefact)),
        "coefficients": functools.partial(coefficients_figure, specs),
    }
    if (Path(solver) / "metrics.jsonl").is_file():
        found["search"] = functools.partial(search_figure, read_metrics(Path(solver) / "metrics.jsonl"))
    if comparison is not None:
        found["error"] = functools.partial(error_figure, read_results(comparison, "comparison")["results"])
    return found


def rendered(draw: Drawing, dark: bool = False, kind: str = "png") -> bytes:
    """One variant of a picture as a "png" or "svg" file; the same bytes from the same data."""
    text, faint, background = ("#e6edf3", "#3d444d", "#0d1117") if dark else ("#1f2328", "#d1d9e0", "#ffffff")
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text)
    style |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), background)
    file = io.BytesIO()
    with matplotlib.rc_context({**style, "grid.color": faint, **STYLE}):
        draw(dark).savefig(file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def nodes_figure(specs: Sequence[SolverSpec], flow: bool, dark: bool = False) -> Figure:
    """Where the nodes lie, one row per NFE, and how far each solver has come after i of its N steps, beside the paper's
    fitted curve for the family.

    Paper: Eq. (20) flow, (21) vp, arXiv 2505.21114.
    """
    figure = Figure(figsize=(WIDTH, max(3.6, 1 + 0.19 * len(specs))), layout="constrained")
    rows, curves = figure.subplots(1, 2)
    for position, (spec, colour) in enumerate(zip(specs, _shades(len(specs), dark), strict=True)):
        rows.plot(spec.nodes, [position] * (spec.nfe + 1), color=colour, marker="o", markersize=4, linewidth=0.8)
        curves.plot(np.linspace(0, 1, spec.nfe + 1), spec.nodes, color=colour, marker="o", markersize=3, linewidth=1.1)
    rows.set_yticks(range(len(specs)), [str(spec.nfe) for spec in specs])
    rows.invert_xaxis()
    rows.set(title="nodes", xlabel="time (1: noise, 0: data)", ylabel="network calls (NFE)")
    share = np.linspace(0, 1, 101)
    fit, label = (EQ_20, "paper's fit, Eq. 20") if flow else (EQ_21, "paper's fit, Eq. 21")
    ink = matplotlib.rcParams["text.color"]
    curves.plot(share, 1 - np.polyval(fit, share), color=ink, linestyle="--", linewidth=1.6, label=label)
    curves.plot([0, 1], [1, 0], color=ink, linestyle=":", linewidth=1.0, label="uniform")
    curves.set(title="nodes over steps taken", xlabel="steps taken, i / N", ylabel="time")
    curves.legend(frameon=False)
    return figure


def coefficients_figure(specs: Sequence[SolverSpec], dark: bool = False) -> Figure:
    """|c_ij| of each table, step i by rows, network call j by columns; negative ones carry a minus sign."""
    columns = min(3, len(specs))
    lines, size = math.ceil(len(specs) / columns), 2.6
    figure = Figure(figsize=(WIDTH, size * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    top = max(abs(c) for spec in specs for row in spec.coefficients for c in row)
    for axis, spec in zip(axes, specs, strict=False):
        table = np.full((spec.nfe, spec.nfe), np.nan)
        for i, row in enumerate(spec.coefficients):
            table[i, : i + 1] = row
        image = axis.imshow(np.abs(table), cmap="viridis", vmin=0, vmax=top)
        i, j = np.nonzero(table < 0 if spec.nfe > MOST_NUMBERED else np.isfinite(table))
        inks = np.where(np.abs(table[i, j]) > BRIGHT * top, "black", "white")
        if spec.nfe > MOST_NUMBERED:
            axis.scatter(j, i, (36 * size / spec.nfe) ** 2, inks, marker="_", linewidths=1)  # half a cell wide
        else:
            for y, x, ink in zip(i, j, inks, strict=True):
                number = f"{table[y, x]:.2f}".replace("-", "\N{MINUS SIGN}")
                axis.text(x, y, number, ha="center", va="center", color=ink, fontsize=8)
        axis.set_title(f"NFE {spec.nfe}")
        axis.spines[:].set_visible(False)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axis in axes[len(specs) :]:
        axis.set_axis_off()
    label = "$|c_{ij}|$ of step i (rows) and network call j (columns); a minus sign where $c_{ij}$ is negative"
    figure.colorbar(image, ax=list(axes), label=label, location="bottom", shrink=0.7, aspect=50, pad=0.02)
    return figure


def search_figure(records: Sequence[Mapping[str, Any]], dark: bool = False) -> Figure:
    """Training loss and held-out error over the network evaluations of the run, a line per searched NFE.

    Args:
        records: lines of a metrics.jsonl, see `run`.
    """
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    training, held_out = figure.subplots(1, 2, sharex=True)
    spent = _evaluations(records)
    tried: dict[int, list[tuple[float, float]]] = {}
    errors: dict[int, list[tuple[float, float]]] = {}
    classical: dict[int, float] = {}
    for x, record in zip(spent, records, strict=True):
        nfe = record.get("nfe")
        if not isinstance(nfe, int):
            continue
        for found, names in ((tried, ("train_mse", "loss")), (errors, ("best_validation_mse", "validation_mse"))):
            if values := [record[name] for name in names if positive(record.get(name))]:
                found.setdefault(nfe, []).append((x, values[0]))
        if positive(record.get("classical_mse")):
            classical[nfe] = record["classical_mse"]
    searched = sorted(nfe for nfe, points in tried.items() if len(points) > 1)
    for nfe, colour, marker in zip(searched, _shades(len(searched), dark), itertools.cycle(MARKERS), strict=False):
        x, y = np.transpose(tried[nfe])
        training.plot(x, y, marker, color=colour, markersize=3, alpha=0.5)
        training.plot(x, np.minimum.accumulate(y), color=colour, linewidth=1.6)
        if points := errors.get(nfe):
            held_out.plot(*np.transpose(points), color=colour, marker=marker, markersize=4, label=f"NFE {nfe}")
            if nfe in classical:
                held_out.hlines(classical[nfe], x[0], points[-1][0], color=colour, linestyle=":", linewidth=1.4)
    training.set(title="training loss, best so far", ylabel="loss")
    held_out.set(title="held-out error after each stage", ylabel="final-state mse (dotted: best classical)")
    for axis in (training, held_out):
        axis.set_yscale("log")
        axis.set_xlabel("network evaluations so far")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(True)
    figure.legend(handles=held_out.lines, loc="outside right upper", frameon=False)
    return figure


def error_figure(results: Iterable[Mapping[str, Any]], dark: bool = False) -> Figure:
    """Final-state mse against NFE, logarithmic; searched solvers drawn strong.

    Args:
        results: of a comparison.json.
    """
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        lines.setdefault(result["scheduler"], []).append(result)
    for i, (name, line) in enumerate(lines.items()):
        points = sorted((r["nfe"], r["mse"]) for r in line if positive(r["mse"]))
        strong = any(r["searched"] for r in line)
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(
            [nfe for nfe, _ in points], [mse for _, mse in points],
            label=name.replace("$", r"\$"),  # no formula
            color=matplotlib.rcParams["text.color"] if colour == "#000000" else colour,
            marker=MARKERS[i % len(MARKERS)], linewidth=2.6 if strong else 1.3, linestyle="-" if strong else "--",
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("network calls (NFE)")
    axis.set_ylabel("final-state mse")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(True, which="both", alpha=0.5)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def load_artefact(solver: str) -> dict[str, Any]:
    """A solver's full configuration, checked by the scheduler itself.

    Raises:
        ValueError: one line that names the solver.
    """
    return DSSolverScheduler._load_artefact(solver)


def read_results(folder: str, name: str) -> dict[str, Any]:
    """The "comparison" or "evaluation" that a folder holds, checked as far as it is shown.

    Raises:
        ValueError: one line that names the folder.
    """
    command, whole, each = RESULTS[name]
    try:
        record = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
        checks = [(record, whole), *((result, each) for result in record["results"])]
        wrong = [key for part, kinds in checks for key, kind in kinds.items() if not isinstance(part[key], kind)]
        if wrong or len(checks) == 1:
            raise ValueError(f"{(wrong or ['results'])[0]} is not what it must be")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {name} could be read from {folder!r} ({one_line(error)})"
        raise ValueError(f"{reason}; make it anew with {command}") from None
    return record


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a line that is none, such as a torn last one, is named and left out."""
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            say(f"{file}, line {number} is damaged and left out")
    return records


def _evaluations(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Network evaluations of the run at each record; calls of a descent, which do not say, lie evenly between."""
    known = {
        i: value for i, r in enumerate(records)
        if positive(value := r.get("total_network_evaluations", r.get("network_evaluations")))
    }  # fmt: skip
    return list(np.interp(range(len(records)), list(known), list(known.values()))) if known else [0.0] * len(records)


def positive(value: Any) -> bool:
    """Whether it is a number that a logarithmic axis can show."""
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < math.inf


def _shades(count: int, dark: bool) -> np.ndarray:
    """Colours (count, 4) from few calls to many, without those that the background swallows."""
    return matplotlib.colormaps["viridis"](np.linspace(*((0.3, 1.0) if dark else (0.0, 0.8)), count))


def strip(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Images (H, W, C) uint8 side by side, (H, sum of W, 3); of a video (F, H, W, C) its middle frame."""
    images = [p[len(p) // 2] if p.ndim == 4 else p for p in pictures]
    whole = np.concatenate(images, axis=1)
    return np.broadcast_to(whole, (*whole.shape[:2], 3))
