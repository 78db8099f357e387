"""What needs an accelerator, in one run of a quarter of an hour: `python -m tests.bench.on_gpu --output OUT`.

    train       the embedded colour models: OUT/flow.tar and vp.tar (pipelines), flow.png and vp.png (pages of samples)
    step        one scheduler step beside diffusers' own: time, kernels, synchronisations, memory
    search      network calls a second of a search of a FLUX-shaped transformer with random weights, over the bare one
    pipelines   five pipelines in bfloat16, float16 and with offloading, against their run on the CPU

Each part adds to OUT/on_gpu.json as soon as it is done; one that fails is told there, and the others go on. `train`
reads the pictures that `dssolver_search.demo.emoji_data` writes. `--small` is a rehearsal on any machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tarfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch.profiler import ProfilerActivity, profile

from dssolver_search import search
from dssolver_search.demo import train
from tests.bench.step import REPETITIONS, SHAPES, clock, schedulers, seconds_per_step
from tests.pipelines.test_conformance import build, draw, relative
from tests.pipelines.zoo import ZOO
from tests.pipelines.zoo.parts import NO_TEXT_TWO

MINUTES = {"flow": 4.5, "vp": 4.5}
PIPELINES = ("DiT", "SDXL", "Stable Diffusion 3", "FLUX", "Wan")
NFE = 8
CLOSE = 0.06  # of a run in half precision, as in tests/pipelines


def trained(given: argparse.Namespace) -> dict[str, Any]:
    """Facts of the training of each path."""
    found = {}
    for path, minutes in MINUTES.items():
        folder = given.output.resolve().parent / f"training-{path}"
        network = ["--network", "unet", "--dropout", "0.05"]
        size = ["--train_batch_size", "512", "--mixed_precision", "bf16", "--compile"]
        if given.small:
            network = ["--network", "dit", "--width", "16", "--depth", "1", "--num_heads", "1"]
            size, minutes = ["--train_batch_size", "8"], 0.05
        train.main(
            [
                "--path", path, "--dataset_name", "parquet", "--data_files", str(given.pictures), "--num_channels", "3",
                "--resolution", "32", "--noise_levels", "mixed", "--prediction_type", "v_prediction",
                "--mirrored_classes", "smileys", "people", "animals", "food", "travel", "activities", "objects",
                "--max_train_steps", "10000000", "--max_train_minutes", str(minutes), "--lr_warmup_steps", "500",
                "--ema_decay", "0.9995", "--checkpointing_steps", "2000", "--output_dir", str(folder), *network, *size,
            ]
        )  # fmt: skip
        found[path] = json.loads((folder / "pipeline" / "training.json").read_text())
        (given.output / f"{path}.png").write_bytes((folder / "samples.png").read_bytes())
        with tarfile.open(given.output / f"{path}.tar", "w") as archive:
            archive.add(folder / "pipeline", "pipeline")
    return found


def steps(given: argparse.Namespace) -> dict[str, Any]:
    """By shape, family and scheduler: what one step of `NFE` takes."""
    found: dict[str, Any] = {}
    for name, shape in list(SHAPES.items())[: 1 if given.small else None]:
        for family in ("flow", "vp"):
            torch.manual_seed(0)
            output, start = (torch.randn(shape, device=given.device, dtype=torch.bfloat16) for _ in range(2))
            timed = schedulers(family)
            seconds: dict[str, list[float]] = {scheduler: [] for scheduler in timed}
            for _ in range(REPETITIONS):  # in turns
                for scheduler, made in timed.items():
                    seconds[scheduler].append(seconds_per_step(made, NFE, output, start))
            found[f"{name}, {family}"] = {
                scheduler: {"microseconds": round(1e6 * statistics.median(seconds[scheduler]), 1)}
                | (on_device(made, output, start) if given.device == "cuda" else {})
                for scheduler, made in timed.items()
            }
    return found


def on_device(scheduler: Any, output: torch.Tensor, start: torch.Tensor) -> dict[str, float]:
    """Kernels and synchronisations of a step, and the memory that a run holds at its peak, in states of its own."""
    scheduler.set_timesteps(NFE, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, sample = torch.cuda.memory_allocated(), start
    with warnings.catch_warnings(record=True) as told, profile(activities=[ProfilerActivity.CUDA]) as watched:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for t in scheduler.timesteps:
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    kernels = sum(event.count for event in watched.key_averages() if event.device_type.name == "CUDA")
    return {
        "kernels": kernels / NFE,
        "synchronisations": sum("synchroniz" in str(w.message) for w in told) / NFE,
        "peak_states": round((torch.cuda.max_memory_allocated() - before) / (start.numel() * 4), 2),  # of float32
    }


def flux_shaped(small: bool) -> FluxPipeline:
    """FLUX.1's width with two blocks, random weights, no text encoders and no VAE."""
    torch.manual_seed(0)
    heads, width, text = (2, 16, 32) if small else (24, 128, 4096)
    axes = (4, 6, 6) if small else (16, 56, 56)
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=heads, attention_head_dim=width, in_channels=64,
        joint_attention_dim=text, pooled_projection_dim=768, axes_dims_rope=axes, guidance_embeds=True,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, transformer=transformer, vae=None, **NO_TEXT_TWO)


def searched(given: argparse.Namespace) -> dict[str, Any]:
    """Network calls a second within a search, its teacher included, and of the bare network in the same batches."""
    pipe = flux_shaped(given.small).to(given.device, torch.float32 if given.small else torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    transformer, edge = pipe.transformer, 64 if given.small else 1024
    text = transformer.config.joint_attention_dim
    calls: list[dict[str, Any]] = []

    def count(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    def conditions(indices: Any) -> dict[str, Any]:
        def drawn(*shape: int) -> torch.Tensor:
            rows = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in indices]
            return torch.stack(rows).to(pipe.device, pipe.dtype)

        return {"prompt_embeds": drawn(512 if not given.small else 4, text), "pooled_prompt_embeds": drawn(768)}

    hook = transformer.register_forward_pre_hook(count, with_kwargs=True)
    began = clock(transformer.x_embedder.weight)
    search(
        pipe, nfe=[5], conditions=conditions, height=edge, width=edge, output_type="latent", guidance_scale=3.5,
        fill_nfe=[], batch_size=4, **({"budget": 2000} if given.small else {}),
    )  # fmt: skip
    seconds = clock(transformer.x_embedder.weight) - began
    hook.remove()
    total = sum(len(kwargs["hidden_states"]) for kwargs in calls)
    batch = max(calls, key=lambda kwargs: len(kwargs["hidden_states"]))
    size = len(batch["hidden_states"])
    with torch.no_grad():
        transformer(**batch)
        bare_began = clock(transformer.x_embedder.weight)
        for _ in range(10):
            transformer(**batch)
        bare = 10 * size / (clock(transformer.x_embedder.weight) - bare_began)
    return {
        "evaluations": total,
        "seconds": round(seconds, 2),
        "evaluations_per_second": round(total / seconds, 2),
        "bare_evaluations_per_second": round(bare, 2),
        "overhead": round(bare * seconds / total - 1, 3),
    }


def pipelines(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By pipeline: distance of each run to the one on the CPU in float32, over that one's spread."""
    found: dict[str, dict[str, float]] = {}
    for name in PIPELINES:
        entry = ZOO[name]
        wanted = draw(entry, build(entry, "classical"))
        found[name] = {}
        for kind, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("offloaded", torch.bfloat16)):
            if given.device == "cpu" and kind != "bfloat16":
                continue
            pipe = build(entry, "classical").to(dtype)
            pipe.enable_model_cpu_offload() if kind == "offloaded" else pipe.to(given.device)
            found[name][kind] = round(float(relative(draw(entry, pipe) - wanted, wanted)), 4)
    worst = max(max(runs.values()) for runs in found.values())
    if worst > CLOSE:
        raise ValueError(f"a pipeline is {worst} from its run in float32, more than {CLOSE}: {found}")
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "step": steps,
    "pipelines": pipelines,
    "search": searched,
    "train": trained,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pictures", type=Path, default=Path("runs/emoji-data/emoji-train.parquet"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(argv)
    given.output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu"}
    for part in given.parts:
        began = time.time()
        try:
            facts[part] = PARTS[part](given)
        except Exception:  # the machine is lent for minutes: the other parts go on
            facts[part] = {"failed": traceback.format_exc()}
        facts[f"{part}_seconds"] = round(time.time() - began, 1)
        (given.output / "on_gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(part, json.dumps(facts[part], indent=1), flush=True)


if __name__ == "__main__":
    main()
