"""How figures, and what they are measured against, are called wherever they are shown. Standard library only."""

from __future__ import annotations

from typing import Any

METRICS = {
    "frechet_distance": "Frechet distance", "kernel_distance": "Kernel distance", "inception_score": "Inception score",
    "precision": "Precision", "recall": "Recall", "clip_score": "CLIP score",
}  # fmt: skip
INCEPTION_METRICS = {"frechet_distance": "FID", "kernel_distance": "KID"}


def metric_name(metric: str, network: str) -> str:
    """FID and KID are those of the Inception network alone; a figure of any other is named with it."""
    if network == "inception":
        return INCEPTION_METRICS.get(metric, METRICS[metric])
    return f"{METRICS[metric]} ({network})"


def told_end(end: Any) -> str:
    """After a reference's steps: where its last one begins, if it ends early. From a file `end` may be anything."""
    return f", the last from {end:g} to the data" if end and isinstance(end, (int, float)) else ""
