"""Pictures of solvers, searches and comparisons, and the `plot` command.

Colour-blind safe (Okabe-Ito, viridis), readable at the width of a card (8 inches for 800 pixels), light and dark.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from diffusers_dssolver import SolverSpec
from diffusers_dssolver.config import is_flow

from ..measure.pictures import MARKERS, WIDTH, Drawing, error_figure, positive, rendered, shades
from ..settings import PlotConfig
from ..storage import replacing
from .read import load_solver, read_metrics, read_results

# The paper's fits of time (0 at noise, 1 at data) over i/N, highest power first: Eq. (20) flow, Eq. (21) vp.
EQ_20 = (-1.96, 3.51, -0.97, 0.43, 0)
EQ_21 = (-2.73, 6.30, -4.744, 2.17, 0)
MOST_TABLES = 24  # in one picture
MOST_NUMBERED = 6  # calls of a table whose cells hold their number
BRIGHT = 0.55  # share of the colour map from which black is easier to read on it than white


def plot(config: PlotConfig) -> None:
    """Write every picture that there is data for, as PNG and SVG, each light and dark.

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
    """Pictures by name, as far as there is data for them.

    Args:
        solver: folder, Hub id or published name.
        comparison: folder that `compare` wrote.
        nfe: step counts whose tables are drawn; none: all.

    Raises:
        ValueError: the file or the step count is at fault.
    """
    scheduler = load_solver(solver)
    tables = scheduler.solvers
    if missing := sorted(set(nfe) - set(tables)):
        known = ", ".join(map(str, sorted(tables)))
        raise ValueError(f"{solver!r} has no table for {missing[0]} steps; it has them for {known}")
    specs = [tables[n] for n in sorted(nfe or tables)]
    if len(specs) > MOST_TABLES:
        raise ValueError(f"{solver!r} has {len(specs)} tables; choose at most {MOST_TABLES} with --nfe")
    found: dict[str, Drawing] = {
        "nodes": functools.partial(nodes_figure, specs, is_flow(scheduler.config)),
        "coefficients": functools.partial(coefficients_figure, specs),
    }
    if (Path(solver) / "metrics.jsonl").is_file():
        found["search"] = functools.partial(search_figure, read_metrics(Path(solver) / "metrics.jsonl"))
    if comparison is not None:
        found["error"] = functools.partial(error_figure, read_results(comparison, "comparison")["results"])
    return found


def nodes_figure(specs: Sequence[SolverSpec], flow: bool, dark: bool = False) -> Figure:
    """Nodes of each solver in a row, and over the share i/N of steps taken, beside the paper's fit.

    Paper: Eq. (20) flow, (21) vp, arXiv 2505.21114.
    """
    figure = Figure(figsize=(WIDTH, max(3.6, 1 + 0.19 * len(specs))), layout="constrained")
    rows, curves = figure.subplots(1, 2)
    for position, (spec, colour) in enumerate(zip(specs, shades(len(specs), dark), strict=True)):
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
    """|c_ij| of each table, step i by rows, network call j by columns; a minus sign marks negative ones."""
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
    """Training loss and held-out error over the network evaluations of a search, a line per searched NFE.

    Args:
        records: lines of its metrics.jsonl.
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
    for nfe, colour, marker in zip(searched, shades(len(searched), dark), itertools.cycle(MARKERS), strict=False):
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


def _evaluations(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Network evaluations of the search at each record; interpolated for records of a descent, which have none."""
    known = {
        i: value for i, r in enumerate(records)
        if positive(value := r.get("total_network_evaluations", r.get("network_evaluations")))
    }  # fmt: skip
    return list(np.interp(range(len(records)), list(known), list(known.values()))) if known else [0.0] * len(records)
