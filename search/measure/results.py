"""Measured results: errors of one solver at one step count, their intervals, tables and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..console import told_end
from ..settings import CompareConfig

RESAMPLES = 1000  # of the bootstrap


ERRORS = ("mse", "image_mse", "feature_distance")  # of each sample


@dataclass
class Result:
    """One scheduler at one NFE on the test samples, against the converged reference.

    Attributes:
        spacing: of its nodes, and its variant; of ours, whether the table was searched or derived.
        calls: of the network for one sample, a guided step counting one.
        mse, psnr: of final states (latents), over their range in the reference, dB; infinite where it breaks down.
        mse_interval: 95 %, by bootstrap over samples.
        image_mse, image_psnr: of the images in [0, 1].
        feature_distance: of the images in a feature network, if one was named (`perceptual.distance`).
        seconds: per image, decoding included.
        configuration: class and options, for people.
        picture: file with the first images side by side, below the folder of the comparison.
    """

    scheduler: str
    nfe: int
    spacing: str
    calls: int
    mse: float
    psnr: float
    seconds: float
    searched: bool
    mse_interval: list[float] | None = None
    image_mse: float | None = None
    image_psnr: float | None = None
    feature_distance: float | None = None
    configuration: str = ""
    picture: str | None = None
    pictures: list[Any] = field(repr=False, default_factory=list)


def results_of_record(record: dict[str, Any]) -> list[Result]:
    """The results in a `comparison.json`."""
    return [
        Result(**{**r, "mse": math.inf, "psnr": -math.inf} if r["mse"] is None else r) for r in record["results"]
    ]  # fmt: skip


def _plain(result: Result) -> dict[str, Any]:
    """For JSON: no pictures, and null for what is not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(result).items()
        if key != "pictures"
    }


def details(results: Sequence[Result]) -> str:
    """Everything measured, a line per scheduler and NFE; the columns that were not measured left out."""
    columns: dict[str, Callable[[Result], Any]] = {
        "calls": lambda r: r.calls,
        "mse": lambda r: _short(r.mse),
        "95 %": lambda r: " to ".join(map(_short, r.mse_interval)) if r.mse_interval else "",
        "PSNR": lambda r: f"{r.psnr:.1f}",
        "image mse": lambda r: _short(r.image_mse),
        "PSNR ": lambda r: "" if r.image_psnr is None else f"{r.image_psnr:.1f}",
        "features": lambda r: _short(r.feature_distance),
        "s/image": lambda r: _short(r.seconds),
        "": lambda r: f"{r.spacing}: {r.configuration}" if r.configuration else r.spacing,
    }
    shown = {name: cell for name, cell in columns.items() if any(str(cell(r)) for r in results)}
    rows = [["NFE", "scheduler", *shown]]
    rows += [[f"{r.nfe}", r.scheduler, *(str(cell(r)) for cell in shown.values())] for r in sorted_by_nfe(results)]
    return "\n".join(["", "of final states (mse, PSNR) and images, against the reference", "", *aligned(rows, 2, -1)])


def table(results: Sequence[Result], config: CompareConfig, uncertainty: float) -> str:
    """Final-state mse by scheduler (rows) and NFE (columns), the best stock one marked, and ours over it."""
    by = {(r.scheduler, r.nfe): r for r in results}
    names = list(dict.fromkeys(r.scheduler for r in results))
    best = {
        n: min((r for r in results if r.nfe == n and not r.searched), key=lambda r: r.mse, default=None)
        for n in config.nfe
    }
    rows = [["", *(f"NFE {n}" for n in config.nfe)]]
    for name in names:
        cells = []
        for n in config.nfe:
            r = by.get((name, n))
            calls = "" if r is None or r.calls == n else f", {r.calls} calls"
            cells.append("- " if r is None else f"{r.mse:.3g} ({r.spacing}{calls})" + ("*" if r is best[n] else " "))
        rows.append([name, *cells])
    for name in dict.fromkeys(r.scheduler for r in results if r.searched):
        ratios = [f"{by[name, n].mse / b.mse:.2f} " if (b := best[n]) else "- " for n in config.nfe]
        rows.append([f"{name} / best *", *ratios])
    return "\n".join(
        [
            "",
            f"final-state mse against {config.reference_steps} steps{told_end(config.reference_end)}, "
            f"{config.num_samples} test samples",
            "",
            *aligned(rows, 1),
            "",
            "in brackets each scheduler's best node spacing; mse of the reference against half of them: "
            f"{uncertainty:.1g}",
        ]
    )


def sorted_by_nfe(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda r: r.nfe)


def aligned(rows: Sequence[Sequence[str]], left: int, *also: int) -> list[str]:
    """Lines with the first columns, and those of these numbers, flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush = {*range(left), *(len(widths) + k for k in also)}
    return [
        "  ".join(
            cell.ljust(width) if k in flush else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def interval(samples: Tensor) -> list[float]:
    """95 % of the mean of (n,) errors, by bootstrap with a fixed seed."""
    drawn = np.random.default_rng(0).integers(len(samples), size=(RESAMPLES, len(samples)))
    return np.percentile(samples.numpy()[drawn].mean(1), [2.5, 97.5]).tolist()


def psnr(mse: float, span: float) -> float:
    """Peak signal-to-noise ratio in dB, for values that range over `span`."""
    return 10 * math.log10(span**2 / mse) if 0 < mse < math.inf else math.inf if mse == 0 else -math.inf


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _name(source: str) -> str:
    """How a solver is called in tables: the name of its folder or repository."""
    return Path(source).resolve().name if Path(source).is_dir() else source
