"""What the package tells its user: single lines past any progress bar, and the names of what was measured.

Lines go to the logger `dssolver_search`, as those of diffusers go to its own: warnings are shown, and what a command
says besides if its level is INFO, which the commands set.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

METRICS = {
    "frechet_distance": "Frechet distance", "kernel_distance": "Kernel distance", "inception_score": "Inception score",
    "precision": "Precision", "recall": "Recall", "clip_score": "CLIP score",
}  # fmt: skip
INCEPTION_METRICS = {"frechet_distance": "FID", "kernel_distance": "KID"}


class _AboveBars(logging.Handler):
    """Writes lines to stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm  # slow to import, and --help says nothing

        tqdm.write(self.format(record), file=sys.stderr)


logger = logging.getLogger(__package__)
logger.propagate = False
logger.setLevel(logging.WARNING)
logger.addHandler(_AboveBars())


def say(line: str) -> None:
    """Tell the user how the work goes on."""
    logger.info(line)


def warn(line: str) -> None:
    """Tell the user what is not as it was asked for."""
    logger.warning(line)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def metric_name(metric: str, network: str) -> str:
    """Title of a metric. Only values from the Inception network are called FID and KID; others name their network."""
    if network == "inception" and metric in INCEPTION_METRICS:
        return INCEPTION_METRICS[metric]
    title = METRICS.get(metric, metric.replace("_", " ").capitalize())
    return title if network == "inception" else f"{title} ({network})"


def told_end(end: Any) -> str:
    """Where the last of a reference's steps begins, if it ends early; in a damaged file `end` may be anything."""
    return f", the last from {end:g} to the data" if end and isinstance(end, (int, float)) else ""
