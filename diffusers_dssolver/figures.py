"""How figures of images are called wherever they are shown. Standard library only."""

from __future__ import annotations

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
