"""Results of `compare`: errors per scheduler and NFE, their intervals, as tables and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..console import told_end
from ..settings import CompareConfig

RESAMPLES = 1000  # of the bootstrap
ERRORS = ("mse", "image_mse", "feature_distance")  # measured per sample


@dataclass
class Result:
    """Errors of one scheduler at one NFE on the test samples, against converged runs.

    Attributes:
        spacing: node spacing and variant; of a searched solver, whether its table was searched or derived.
        calls: network calls per sample; a guided pair counts as one.
        mse, psnr: of final states (latents), the PSNR in dB over the range of converged states; infinite where the
            scheduler breaks down.
        mse_interval: 95 %, by bootstrap over samples.
        image_mse, image_psnr: of images in [0, 1].
        feature_distance: of images in the features of a network (`images.networks.distance`), if one was named.
        seconds: per image, decoding included.
        configuration: class and options, for the reader of a table.
        picture: file with the first images side by side, below the folder of the comparison.
        pictures: these images, (H, W, C) or (F, H, W, C) uint8; not part of the JSON.
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

    def plain(self) -> dict[str, Any]:
        """For JSON: without pictures, and null for what is not finite."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
            if key != "pictures"
        }


def results_of_record(record: dict[str, Any]) -> list[Result]:
    """Results in a `comparison.json`; a scheduler that broke down has no mse there."""
    broken = {"mse": math.inf, "psnr": -math.inf}
    return [Result(**(r | broken if r["mse"] is None else r)) for r in record["results"]]


def details(results: Sequence[Result]) -> str:
    """Everything measured, a line per scheduler and NFE; columns that were not measured are left out."""
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
    rows += [
        [f"{r.nfe}", r.scheduler, *(str(cell(r)) for cell in shown.values())]
        for r in sorted(results, key=lambda r: r.nfe)
    ]
    return "\n".join(["", "of final states (mse, PSNR) and images, against the reference", "", *aligned(rows, 2, -1)])


def table(results: Sequence[Result], config: CompareConfig, uncertainty: float) -> str:
    """Final-state mse by scheduler (rows) and NFE (columns); the best stock scheduler is marked, and the ratio to it
    printed for searched solvers.

    Args:
        uncertainty: mse between converged runs and half as many steps.
    """
    by = {(r.scheduler, r.nfe): r for r in results}
    stock = {n: [r for r in results if r.nfe == n and not r.searched] for n in config.nfe}
    best = {n: min(found, key=lambda r: r.mse, default=None) for n, found in stock.items()}

    def cell(name: str, n: int) -> str:
        if (r := by.get((name, n))) is None:
            return "- "
        calls = "" if r.calls == n else f", {r.calls} calls"
        return f"{r.mse:.3g} ({r.spacing}{calls})" + ("*" if r is best[n] else " ")

    rows = [["", *(f"NFE {n}" for n in config.nfe)]]
    rows += [[name, *(cell(name, n) for n in config.nfe)] for name in dict.fromkeys(r.scheduler for r in results)]
    for name in dict.fromkeys(r.scheduler for r in results if r.searched):
        ratios = [f"{by[name, n].mse / b.mse:.2f} " if (b := best[n]) else "- " for n in config.nfe]
        rows.append([f"{name} / best *", *ratios])
    steps = f"{config.reference_steps} steps{told_end(config.reference_end)}"
    title = f"final-state mse against {steps}, {config.num_samples} test samples"
    note = "in brackets each scheduler's best node spacing; mse of the reference against half of them: "
    return "\n".join(["", title, "", *aligned(rows, 1), "", f"{note}{uncertainty:.1g}"])


def aligned(rows: Sequence[Sequence[str]], left: int, *also: int) -> list[str]:
    """Rows as lines of text: the first `left` columns and those numbered `also` flush left, the others flush right."""
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
    """95 % interval of the mean of errors (n,), by bootstrap with a fixed seed."""
    drawn = np.random.default_rng(0).integers(len(samples), size=(RESAMPLES, len(samples)))
    return np.percentile(samples.numpy()[drawn].mean(1), [2.5, 97.5]).tolist()


def psnr(mse: float, span: float) -> float:
    """Peak signal-to-noise ratio in dB of values that range over `span`; -inf where the mse is not finite."""
    if 0 < mse < math.inf:
        return 10 * math.log10(span**2 / mse)
    return math.inf if mse == 0 else -math.inf


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
