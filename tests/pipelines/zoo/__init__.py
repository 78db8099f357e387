"""One entry per diffusers pipeline: tiny random networks and the stock scheduler of the family, all built offline.

Prompts enter as embeddings, so that no text encoder is needed. Sample `i` has its own prompt, picture and generator,
whichever batch it is drawn in.
"""

from __future__ import annotations

from . import betas, images, videos
from .betas import make_ddpm, make_dit, sd_parts
from .images import flux_parts
from .parts import FLOW_TABLE, TEXT, Entry, absent, generators, make_vae, network_of, networks_of, scaled

__all__ = [
    "FLOW_TABLE", "TEXT", "ZOO", "Entry", "absent", "flux_parts", "generators", "make_ddpm", "make_dit", "make_vae",
    "network_of", "networks_of", "scaled", "sd_parts",
]  # fmt: skip

ZOO = {entry.name: entry for entry in (*betas.ENTRIES, *images.ENTRIES, *videos.ENTRIES)}
