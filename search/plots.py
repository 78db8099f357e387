"""Pictures: samples side by side, error against NFE. Colour-blind safe (Okabe-Ito), readable at the width of a card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

if TYPE_CHECKING:
    from .compare import Result
    from .config import CompareConfig

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = "osD^vPX*"


def comparison_picture(results: Sequence[Result], config: CompareConfig, reference: Sequence[Any], file: Path) -> None:
    """Schedulers by rows, NFE by columns, the same samples in every cell; the converged reference on top."""
    names = list(dict.fromkeys(r.scheduler for r in results))
    by = {(r.scheduler, r.nfe): r for r in results}
    strips = {key: _strip(r.pictures) for key, r in by.items()}
    top = _strip(reference)
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
    """Final-state mse against NFE, logarithmic; searched solvers drawn strong."""
    figure = Figure(figsize=(7, 4.5), dpi=140)
    axis = figure.subplots()
    for i, name in enumerate(dict.fromkeys(r.scheduler for r in results)):
        points = sorted((r.nfe, r.mse) for r in results if r.scheduler == name and math.isfinite(r.mse))
        strong = any(r.searched for r in results if r.scheduler == name)
        axis.plot(
            *zip(*points, strict=True), label=name, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
            linewidth=2.6 if strong else 1.3, linestyle="-" if strong else "--",
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("network calls (NFE)")
    axis.set_ylabel("final-state mse")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, facecolor="white")


def _strip(pictures: Sequence[Any]) -> np.ndarray:
    """Pictures side by side, (H, sum of W, 3) uint8; of a video (a list of frames) its middle frame."""
    frames = [p[len(p) // 2] if isinstance(p, list) else p for p in pictures]
    images = [
        p if isinstance(p, Image.Image) else Image.fromarray((np.asarray(p) * 255).astype(np.uint8)) for p in frames
    ]
    return np.concatenate([np.asarray(image.convert("RGB")) for image in images], axis=1)
