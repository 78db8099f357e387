"""Pictures of comparisons.

Colours are safe for the colour-blind (Okabe-Ito, viridis) and legible on light and dark pages; pictures are 8 inches
wide, the width of a card at 800 pixels.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from ..settings import CompareConfig
from .results import Result

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "dssolver",
}  # fmt: skip
WIDTH = 8.0  # inches
SMALLEST = 96  # pixels of a row of pictures in a notebook
Drawing = Callable[[bool], Figure]  # of whether the page is dark


def comparison_picture(results: Sequence[Result], config: CompareConfig, converged: Sequence[Any], file: Any) -> None:
    """A grid of the same samples: converged runs in the first row, then a row per scheduler; a column per NFE."""
    names = list(dict.fromkeys(r.scheduler for r in results))
    by = {(r.scheduler, r.nfe): r for r in results}
    top = strip(converged)
    ratio, columns = top.shape[0] / top.shape[1], len(config.nfe)
    size = (2.2 + 4.2 * columns, (len(names) + 1) * (4.2 * ratio + 0.32) + 0.3)
    figure = Figure(figsize=size, dpi=140)
    axes = figure.subplots(len(names) + 1, columns, squeeze=False)
    for column, nfe in enumerate(config.nfe):
        _cell(axes[0][column], top)
        axes[0][column].set_title(f"NFE {nfe}", fontsize=12, fontweight="bold")
        for name, axis in zip(names, axes[1:, column], strict=True):
            _cell(axis, strip(by[name, nfe].pictures))
            axis.set_xlabel(f"mse {by[name, nfe].mse:.2g}", fontsize=9, labelpad=2)
    for name, axis in zip([None, *names], axes[:, 0], strict=True):
        strong = name is not None and by[name, config.nfe[0]].searched
        axis.set_ylabel(
            f"reference\n{config.reference_steps} steps" if name is None else name,
            rotation=0, ha="right", va="center", fontsize=11, fontweight="bold" if strong else "normal",
        )  # fmt: skip
    figure.tight_layout(h_pad=0.4)
    figure.savefig(file, facecolor="white")


def _cell(axis: Any, picture: np.ndarray) -> None:
    """A picture without a frame."""
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def error_curves(results: Sequence[Result], file: Path) -> None:
    """`error_figure` for a light page, as a file."""
    file.write_bytes(rendered(functools.partial(error_figure, [vars(r) for r in results])))


def rendered(draw: Drawing, dark: bool = False, kind: str = "png") -> bytes:
    """A picture as bytes of a "png" or "svg" file; equal data give equal bytes."""
    text, faint, background = ("#e6edf3", "#3d444d", "#0d1117") if dark else ("#1f2328", "#d1d9e0", "#ffffff")
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text)
    style |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), background)
    file = io.BytesIO()
    with matplotlib.rc_context({**style, "grid.color": faint, **STYLE}):
        draw(dark).savefig(file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def error_figure(results: Iterable[Mapping[str, Any]], dark: bool = False) -> Figure:
    """Final-state mse against NFE on a logarithmic axis; searched solvers are drawn strong.

    Args:
        results: those of a comparison.json.
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
            label=name.replace("$", r"\$"),  # not a formula
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


def positive(value: Any) -> bool:
    """Whether a value can be shown on a logarithmic axis."""
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < math.inf


def shades(count: int, dark: bool) -> np.ndarray:
    """Colours (count, 4) from few calls to many, without those that the background swallows."""
    return matplotlib.colormaps["viridis"](np.linspace(*((0.3, 1.0) if dark else (0.0, 0.8)), count))


def strip(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Images (H, W, C) uint8, or the middle frames of videos (F, H, W, C), side by side: (H, sum of W, 3)."""
    images = [p[len(p) // 2] if p.ndim == 4 else p for p in pictures]
    whole = np.concatenate(images, axis=1)
    return np.broadcast_to(whole, (*whole.shape[:2], 3))


def row(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Pictures side by side; small ones are enlarged by whole factors."""
    image = Image.fromarray(np.ascontiguousarray(strip(pictures)))
    return image.resize([side * max(-(-SMALLEST // image.height), 1) for side in image.size], Image.Resampling.NEAREST)


def as_html(text: str, image: Image.Image | None = None) -> str:
    """A text in columns, and a picture under it, for a notebook."""
    shown = f'<pre style="white-space: pre; overflow-x: auto">{html.escape(text.strip())}</pre>'
    if image is None:
        return shown
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'{shown}\n<img style="max-width: 100%" src="data:image/png;base64,{data}">'


def as_uint8(picture: Any) -> Tensor:
    """An image (H, W, C) or the frames of a video (F, H, W, C), uint8, from what a pipeline returns: Pillow's images or
    arrays in [0, 1]."""
    if isinstance(picture, list):
        return torch.stack([as_uint8(frame) for frame in picture])
    if isinstance(picture, Image.Image):
        array = np.array(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
        return torch.from_numpy(array.reshape(*array.shape[:2], -1))
    values = torch.as_tensor(picture).detach().float().cpu()
    return (values * 255).round().clamp(0, 255).to(torch.uint8)
