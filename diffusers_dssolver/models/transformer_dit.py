"""DiT with the time embedding that it was trained with."""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers.models import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps


class OfficialDiTTransformer2DModel(DiTTransformer2DModel):
    """A `DiTTransformer2DModel` with the frequencies of the official code (DiT: Peebles & Xie 2022, arXiv 2212.09748;
    github.com/facebookresearch/DiT, `models.py`).

    Its time embedding has angular frequencies 10000^(-i/128), i = 0 .. 127; diffusers' class has 10000^(-i/127), at
    t = 1000 phases that are off by up to 2.9 radians. Arguments, names of weights and calls are those of diffusers'
    class.
    """

    transformer_blocks: Any

    @wraps(DiTTransformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the arguments off the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)


# written into saved pipelines: `import diffusers_dssolver` is all that loading one needs
OfficialDiTTransformer2DModel.__module__ = __name__.partition(".")[0]
