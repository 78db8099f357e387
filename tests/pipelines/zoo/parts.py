"""What a pipeline of the zoo is made of: the entry, networks with random weights, and arguments of calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers as d
import torch

SIZE = 16  # pixels; the autoencoder halves them
TEXT = 16  # width of the prompt embeddings
TOKENS = 5
WIDE = 32  # pixels where a pipeline wants multiples of 32
NO_TEXT = dict.fromkeys(["text_encoder", "tokenizer"])
NO_TEXT_TWO = {**NO_TEXT, **dict.fromkeys(["text_encoder_2", "tokenizer_2"])}  # SDXL, FLUX
NO_TEXT_SD3 = {**NO_TEXT_TWO, **dict.fromkeys(["text_encoder_3", "tokenizer_3"])}
DIT_TABLE, FLOW_TABLE = "dit-xl-2-256", "flowdcn-b-2-256"  # published solvers


@dataclass(frozen=True)
class Entry:
    """A pipeline, how to call it, and what to expect of it.

    make: the pipeline with its family's stock scheduler.
    arguments: (pipe, samples) -> keyword arguments other than steps, generator and output type.
    shape: of one decoded sample, channels last.
    calls: of the network in one step.
    result: the attribute of the output.
    raw: the output type that nothing clips, where there is one.
    half: whether the pipeline itself runs in bfloat16.
    single: modules that diffusers keeps in float32 when it loads a model in bfloat16, and the network relies on it.
    strength: whether it takes a picture and a strength.
    table: the published solver that belongs to these betas, or to any flow model.
    part: of the times, that this call takes.
    own_grid: whether the pipeline passes linear-quadratic sigmas, which classical rows keep and tables replace.
    batches: whether the pipeline takes more than one prompt at a time.
    copies: whether the pipeline steps deep copies of its scheduler only.
    """

    name: str
    make: Callable[[], Any]
    arguments: Callable[[Any, Sequence[int]], dict[str, Any]]
    shape: tuple[int, ...] = (SIZE, SIZE, 3)
    calls: int = 1
    result: str = "images"
    raw: str = "latent"
    half: bool = True
    single: tuple[str, ...] = ()
    strength: bool = False
    table: str | None = None
    part: float = 1.0
    own_grid: bool = False
    batches: bool = True
    copies: bool = False


def scaled(make, gain=1.0, seed=0):
    """The network with weights that keep the size of what passes through, so that state, time and prompt matter.

    The fast waves of the time embedding are damped: a trained network is smooth in time. A rough one would tell
    apart times that are one in bfloat16, and solvers of every order would agree badly.
    """
    torch.manual_seed(seed)
    model = make()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
        else:
            torch.nn.init.normal_(parameter, std=gain / parameter[0].numel() ** 0.5)
        if re.search(r"(time|guidance|t_embedder)\w*\.(linear_1|mlp\.0|in_layer)\.weight$", name):
            slowness = torch.linspace(0, 1, parameter.shape[1] // 2) ** 2
            parameter.data *= 2 * slowness.repeat(2)
    return model.eval()


def make_vae(channels=4, levels=2, **config):
    def make():
        return d.AutoencoderKL(
            block_out_channels=(4,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=channels,
            norm_num_groups=2,
            scaling_factor=1.0,
            **config,
        )

    return scaled(make, 0.5, seed=1)


def of(pipeline, parts, **options):
    """The maker of this pipeline from parts."""
    return lambda: pipeline(**parts(**options))


def fixed(pipeline, **values):
    """The pipeline with sizes that its constructor sets and that are too large here."""
    keep = {name: property(lambda self, value=value: value, lambda self, new: None) for name, value in values.items()}
    return type(pipeline.__name__, (pipeline,), keep)


def networks_of(pipe):
    """The networks that are called in a step, one of them: Wan 2.2 has two."""
    names = ("unet", "transformer", "transformer_2")
    return [network for name in names if (network := pipe.components.get(name)) is not None]


def network_of(pipe):
    return networks_of(pipe)[0]


def absent(pipe) -> dict[str, None]:
    """The keyword arguments that `from_pretrained` wants for components that are not there."""
    return {name: None for name, part in pipe.components.items() if part is None}


# --- arguments -----------------------------------------------------------------------------------------------------


def generators(samples):
    return [torch.Generator().manual_seed(100 + i) for i in samples]


def normal(pipe, samples, *shape, seed):
    rows = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(1000 * seed + i)) for i in samples]
    return torch.cat(rows).to(network_of(pipe).dtype)


def pictures(samples, *shape):
    return torch.cat([torch.rand(1, *shape, generator=torch.Generator().manual_seed(9000 + i)) for i in samples])


def positive(pipe, samples, size=SIZE):
    return {"prompt_embeds": normal(pipe, samples, TOKENS, TEXT, seed=1), "height": size, "width": size}


def prompts(pipe, samples, size=SIZE, scale=2.0):
    negative = normal(pipe, samples, TOKENS, TEXT, seed=2)
    return positive(pipe, samples, size) | {"negative_prompt_embeds": negative, "guidance_scale": scale}


def pooled(pipe, samples, *names):
    return {name: normal(pipe, samples, TEXT, seed=3 + i) for i, name in enumerate(names)}


def ones(samples, *names, dtype=torch.float32):
    return {name: torch.ones(len(samples), TOKENS, dtype=dtype) for name in names}


def with_picture(arguments, name="image", size=SIZE):
    return lambda pipe, samples: arguments(pipe, samples) | {name: pictures(samples, 3, size, size)}


def with_mask(arguments):
    """A picture whose right half is to be drawn."""

    def masked(pipe, samples):
        mask = torch.zeros(len(samples), 1, SIZE, SIZE)
        mask[..., SIZE // 2 :] = 1
        return arguments(pipe, samples) | {"mask_image": mask, "height": SIZE, "width": SIZE}

    return with_picture(masked)


def without_size(arguments):
    return lambda pipe, samples: {k: v for k, v in arguments(pipe, samples).items() if k not in ("height", "width")}


MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def with_pooled(pipe, samples):
    return prompts(pipe, samples) | pooled(pipe, samples, *POOLED)


def flux_arguments(pipe, samples):
    return positive(pipe, samples) | pooled(pipe, samples, POOLED[0])


def masked_arguments(pipe, samples, size=SIZE, dtype=torch.float32, **others):
    return prompts(pipe, samples, size) | ones(samples, *MASKS, dtype=dtype) | others


def flow(name, make, arguments, shape=(SIZE, SIZE, 3), **others):
    return Entry(name, make, arguments, shape, table=FLOW_TABLE, **others)


def video(frames, size):
    return {"shape": (frames, size, size, 3), "result": "frames"}
