"""What a search costs on large models: `python -m tests.bench.cost_model [--peak 989] [--utilisation 0.4] [--update]`.

Counted: size and FLOPs of each denoiser (on the meta device, no weights), network evaluations by formulas that the
tests hold against searches, idle GPUs. Assumed, not measured: the FLOP/s of a GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from dssolver_search.methods.check import FEW
from dssolver_search.methods.closed_form import KEEP, RIDGE_FACTORS, fits_of
from dssolver_search.methods.gauss_newton import DAMPINGS
from dssolver_search.settings import SearchConfig
from dssolver_search.teacher.convergence import CONVERGENCE_SAMPLES
from tests import documents

PEAK, UTILISATION = 989.0, 0.4  # TFLOP/s of an H100, bfloat16, dense; the share of it that is reached
CONSUMER = 165.2  # the same of an RTX 4090, which has 24 GB
GPUS = (1, 8, 32, 512)
Work = tuple[str, int, int]  # stage; samples, which are shared out over the GPUs; calls of each, one after the other


class Model(NamedTuple):
    """A denoiser at 1024 x 1024; network evaluations of a call; input shapes of one sample, the latent first."""

    name: str
    kind: Callable[..., Any]
    config: dict[str, Any]
    guided: int
    inputs: dict[str, Any]


UNET = {"sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "use_linear_projection": True, "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
MEDIUM = {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
          "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "caption_projection_dim": 1536,
          "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384, "qk_norm": "rms_norm"}  # fmt: skip
LARGE = {**MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "dual_attention_layers": (), "pos_embed_max_size": 192}  # fmt: skip
TO_UNET = {"sample": (1, 4, 128, 128), "timestep": (1,), "encoder_hidden_states": (1, 77, 2048),
           "added_cond_kwargs": {"text_embeds": (1, 1280), "time_ids": (1, 6)}}  # fmt: skip
TO_SD3 = {"hidden_states": (1, 16, 128, 128), "timestep": (1,), "encoder_hidden_states": (1, 77 + 256, 4096),
          "pooled_projections": (1, 2048)}  # fmt: skip
TO_FLUX = {"hidden_states": (1, 4096, 64), "timestep": (1,), "guidance": (1,), "encoder_hidden_states": (1, 512, 4096),
           "pooled_projections": (1, 768), "img_ids": (4096, 3), "txt_ids": (512, 3)}  # fmt: skip
MODELS = (
    Model("SDXL", UNet2DConditionModel, UNET, 2, TO_UNET),
    Model("SD3.5-medium", SD3Transformer2DModel, MEDIUM, 2, TO_SD3),
    Model("SD3.5-large", SD3Transformer2DModel, LARGE, 2, TO_SD3),
    Model("FLUX.1-dev", FluxTransformer2DModel, {"guidance_embeds": True}, 1, TO_FLUX),
)


def measured(model: Model) -> tuple[int, dict[str, int]]:
    """Numbers in a checkpoint, SD3's positions among them; FLOPs of one sample's forward by operator."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = model.kind(**model.config).eval()
        network(**pytree.tree_map(torch.zeros, model.inputs, is_leaf=lambda shape: isinstance(shape, tuple)))
    count = {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(t.numel() for t in network.state_dict().values()), count


def numbers(n: int) -> int:
    """Searched at N calls: step sizes, coefficients, times."""
    return (n - 1) + n * (n - 1) // 2 + n


def moved(n: int) -> int:
    """Network calls of one difference of each number: those that it reaches, the others are replayed."""
    return (n - 1) ** 2 + n * (n - 1) * (n - 2) // 6 + n * (n + 1) // 2  # step sizes, coefficients, times


def polish(c: SearchConfig, n: int) -> list[Work]:
    """Where it stands (the first call is known at first), what the differences move, N where it arrived; held out, N
    per damping and iteration; a quick one is content with the first damping."""
    few, dampings = min(c.num_polish_samples, c.num_train_samples), len(DAMPINGS) if c.starts else 1
    again = few < c.num_train_samples  # its first call is that of a batch of its own
    works = [("polish", few, c.polish * (n + moved(n)) - 1 + n + again)]
    return [*works, ("held out", c.num_validation_samples, c.polish * dampings * n)]


def fitted(c: SearchConfig, n: int) -> list[Work]:
    """The search of a warp, all trials spent (those beyond the largest warp cost nothing); each set of samples has its
    first call in common."""
    train, held_out = c.num_train_samples, c.num_validation_samples
    if not c.starts:
        trials = ("trial fits", min(c.num_trial_samples, train), 1 + c.trials * (n - 1))
        return [trials, ("final fits", train, n), ("held out", held_out, n)]
    few, judged = min(c.num_trial_samples, train), min(KEEP, c.trials) + len(RIDGE_FACTORS)
    trials, fits = fits_of(c.trials, c.starts)
    works = [("trial fits", few, 1 + trials * (n - 1)), ("final fits", train, 1 + fits * (n - 1))]
    return [*works, ("held out", held_out, 1 + judged * (n - 1))]


def solver(c: SearchConfig, n: int) -> list[Work]:
    """One table: every polish kept, no early end."""
    train, held_out = c.num_train_samples, c.num_validation_samples
    if c.method == "paper":  # whole batches; 3 a differentiated call, nothing recomputed
        updates = math.ceil(c.num_generated_samples / c.train_batch_size)
        works = [("paper", c.train_batch_size, updates * (c.reference_steps + 3 * n))]
        return [*works, ("held out", held_out, 1 + math.ceil(updates / c.validation_steps) * (n - 1))]
    works = fitted(c, n) + (polish(c, n) if c.polish and n <= c.polish_nfe else [])
    if c.method == "gradient":  # 4 a call: forward, recomputation, 2 for backward; L-BFGS makes one call for its scale
        works += [("gradient", train, 4 * n * (c.gradient_calls + 1))]
        works += [("held out", held_out, c.gradient_calls * n)]
    return works


def checked(c: SearchConfig, n: int, known: bool) -> list[Work]:
    """The last check of a table, whose own errors on held-out samples are known or not: three classical solvers; of a
    quick search, one on a few samples, where these leave no doubt."""
    if c.starts or c.method == "paper":
        return [("held out", c.num_validation_samples, 3 * (n - 1))]
    return [("check", min(FEW, c.num_validation_samples), n if known else 2 * n - 1)]


def filled(c: SearchConfig, n: int) -> list[Work]:
    """One table: a fit (below the fewest calls searched, a search), polished if that is cheap, and a derived solver
    beside it; of a quick search, a fit to the trial samples, or all of it for the fewest calls."""
    if not c.starts:
        few = min(c.num_trial_samples, c.num_train_samples)
        return solver(c, n) if n <= c.fill_polish_nfe else [("filled", few, n)]
    works = [("filled", c.num_train_samples, n), ("held out", c.num_validation_samples, n)]
    works = fitted(c, n) if n < min(c.nfe) else works
    works += [("held out", c.num_validation_samples, n)]
    return works + (polish(c, n) if c.polish and n <= c.fill_polish_nfe else [])


def search(c: SearchConfig) -> list[Work]:
    """All of it but the preflight."""
    by_paper, train, held_out, nfe = c.method == "paper", c.num_train_samples, c.num_validation_samples, set(c.nfe)
    others = {*range(c.fill_nfe[0], c.fill_nfe[1] + 1)} - nfe if c.fill_nfe and not by_paper else set()
    works = [("teacher", 0 if by_paper else train, c.teacher_steps), ("teacher, held out", held_out, c.teacher_steps)]
    works += [("its estimate", 1, CONVERGENCE_SAMPLES * 3 * c.teacher_steps)]  # all of it in every process
    works += [work for n in sorted(nfe) for work in solver(c, n)] + [work for n in others for work in filled(c, n)]
    return works + [w for n in nfe | others for w in checked(c, n, n in nfe or n <= c.fill_polish_nfe)]


def busiest(works: list[Work], gpus: int = 1) -> int:
    """Calls times samples of the GPU with the most samples."""
    return sum(math.ceil(samples / gpus) * calls for _, samples, calls in works)


def reduced_bytes(n: int) -> tuple[int, int, int]:
    """Summed over processes at once: by the fit of the last row, a descent call, a polish iteration."""
    return 8 * (n - 1) * n, 8 * (numbers(n) + 1), 8 * (numbers(n) ** 2 + numbers(n))


def table(*rows: tuple[Any, ...]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""])


def report(peak: float = PEAK, utilisation: float = UTILISATION) -> str:
    c = SearchConfig("model", "folder", nfe=[5, 6, 8, 10])
    full = SearchConfig("model", "folder", nfe=[5, 6, 8, 10], effort="full")
    runs = {"closed_form": search(c), "closed_form, effort full": search(full)}
    runs |= {"gradient": search(replace(c, method="gradient"))}
    runs |= {"paper": search(SearchConfig("model", "folder", nfe=[10], method="paper"))}
    most = min(c.num_trial_samples, c.num_train_samples, c.num_validation_samples)  # each process needs one of all
    cached = (c.teacher_steps + 1) * (c.num_train_samples + c.num_validation_samples)
    models = [("", "numbers", "TFLOPs", "in attention", "seconds (assumed)", "teacher cache", "polish Jacobian")]
    minutes = "minutes on an RTX 4090", "minutes on an H100"
    costs = [("", "method", "evaluations", *minutes, *(f"hours on {g} H100" for g in GPUS[1:]), f"idle of {GPUS[-1]}")]
    for model in MODELS:
        size, count = measured(model)
        total, latent = sum(count.values()), 4 * math.prod(next(iter(model.inputs.values()))) / 1e9
        second, share = total / (peak * 1e12 * utilisation), count["bmm"] / total  # every bmm is of attention
        memory = f"{latent * cached:.1f} GB", f"{latent * min(c.batch_size, c.num_polish_samples) * numbers(10):.1f} GB"
        models += [(model.name, f"{size / 1e9:.2f} B", f"{total / 1e12:.1f}", f"{share:.0%}", f"{second:.3f}", *memory)]
        for method, works in runs.items():
            hours = [model.guided * second * busiest(works, g) / 3600 for g in GPUS]
            one = 60 * hours[0] * peak / CONSUMER, 60 * hours[0]
            cells = f"{model.guided * busiest(works):,}", *(f"{m:,.0f}" for m in one), *(f"{h:.3g}" for h in hours[1:])
            costs += [(model.name, method, *cells, f"{1 - hours[0] / (GPUS[-1] * hours[-1]):.0%}")]
    shares = [("stage", "samples", *(f"calls, {method}" for method in runs), *(f"idle of {g}" for g in GPUS[1:]))]
    for stage, samples in dict.fromkeys(work[:2] for works in runs.values() for work in works if work[1]):
        calls = [sum(w[2] for w in works if w[:2] == (stage, samples)) for works in runs.values()]
        shares += [(stage, f"{samples}", *(f"{n:,}" for n in calls), *(f"{max(g - samples, 0)}" for g in GPUS[1:]))]
    row, descent, polished = reduced_bytes(10)
    notes = f"""\
An RTX 4090 is taken to reach that share of {CONSUMER:g} TFLOP/s; what its 24 GB do not hold is offloaded or quantised.
Hours = sum over stages (calls x ceil(samples / GPUs)) x evaluations a call x FLOPs / {peak:g}e12 / {utilisation} / 3600
More than {most} processes are refused at these settings; the columns of {GPUS[-1]} GPUs ignore that.
At 10 calls processes sum {row} bytes for the last row, {descent} for a gradient, {polished:,} for a polish iteration.
"""
    return "\n".join([table(*models), table(*costs), table(*shares), notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", type=float, default=PEAK, help="TFLOP/s of a GPU")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="share of it that is reached")
    parser.add_argument("--update", action="store_true", help="put the result into its document")
    given = parser.parse_args()
    print(text := report(given.peak, given.utilisation))
    if given.update:
        documents.put("cost", text)


if __name__ == "__main__":
    main()
