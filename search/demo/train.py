"""Train one of the two embedded class-conditional models (`flow/`, `vp/`).

    python -m dssolver_search.demo.train --path flow --dataset_name zalando-datasets/fashion_mnist --output_dir OUT

Hardware, cost and loss of the shipped weights: README.md beside this file. `accelerate launch -m ...` uses every
device; a killed run continues with `--resume_from_checkpoint latest` on the very batches it would have seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

CHECKPOINT = "checkpoint-{}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--path", choices=("flow", "vp"), required=True, help="rectified flow, or DDPM with linear betas"
    )
    parser.add_argument("--dataset_name", required=True, help="Hub id, or a builder such as `parquet`, `imagefolder`")
    parser.add_argument("--data_files", default=None, help="files for such a builder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--num_channels", type=int, choices=(1, 3), default=1)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--train_batch_size", type=int, default=128, help="over all processes")
    parser.add_argument("--max_train_steps", type=int, default=6000)
    parser.add_argument("--max_train_minutes", type=float, default=math.inf, help="decay and stop by the clock instead")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--label_dropout", type=float, default=0.1, help="share of samples trained without their class")
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", default=None, help="`latest`")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_images(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """The whole data set in memory: images (n, C, H, W) uint8, labels (n,), class names."""
    data = datasets.load_dataset(args.dataset_name, data_files=args.data_files, split=args.split)
    mode, size = ("L" if args.num_channels == 1 else "RGB"), (args.resolution, args.resolution)
    images = np.stack(
        [np.asarray(image.convert(mode).resize(size)) for image in tqdm(data[args.image_column], "images")]
    )
    images = images.reshape(len(images), *size, args.num_channels).transpose(0, 3, 1, 2)
    names = data.features[args.label_column].names
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(data[args.label_column][:]), names


def build_transformer(args: argparse.Namespace, num_classes: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=args.num_heads,
        attention_head_dim=args.width // args.num_heads,
        in_channels=args.num_channels,
        num_layers=args.depth,
        sample_size=args.resolution,
        patch_size=args.patch_size,
        num_embeds_ada_norm=num_classes,
    )


def build_scheduler(path: str) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    if path == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=False
    )


def noised(
    path: str, scheduler, x0: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Network input (b, C, H, W), its timestep (b,) on the 0..1000 scale, and the regression target.

    flow: x = (1 - sigma) x0 + sigma noise, target noise - x0, sigma logit-normal. vp: DDPM, target the noise.
    """
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    if path == "flow":
        sigma = torch.sigmoid(torch.randn(len(x0), generator=generator)).to(x0.device)
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * noise, sigma * 1000, noise - x0
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),), generator=generator).to(x0.device)
    return scheduler.add_noise(x0, noise, t), t, noise


def progress_of(step: int, started: float, args: argparse.Namespace) -> float:
    """How much of the run is over, in [0, 1]: by steps or by the clock, whichever is nearer its end."""
    return min(1.0, max(step / args.max_train_steps, (time.time() - started) / (60 * args.max_train_minutes)))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: folders are renamed into place, so a `.tmp` one is what a kill left behind."""
    found = [p for p in folder.glob(CHECKPOINT.format("*")) if p.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, seconds: float) -> None:
    target = folder / CHECKPOINT.format(step)
    partial = target.with_name(target.name + ".tmp")
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps({"step": step, "seconds": seconds}))
        os.replace(partial, target)
        for old in folder.glob(CHECKPOINT.format("*")):
            if old != target:
                shutil.rmtree(old)


def save_pipeline(
    args: argparse.Namespace, model: DiTTransformer2DModel, scheduler, names: list[str], facts: dict
) -> None:
    from diffusers_dssolver.pipelines import SiTPipeline

    pipe = SiTPipeline(transformer=model.half(), scheduler=scheduler, id2label=dict(enumerate(names)))
    pipe.save_pretrained(args.output_dir / "pipeline")
    (args.output_dir / "pipeline" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    images, labels, names = load_images(args)
    # eval(): diffusers' label embedders, one per block, would each drop labels on their own; we drop them once, below
    model = build_transformer(args, len(names)).eval()
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(ema)
    ema.to(accelerator.device)
    scheduler = build_scheduler(args.path)

    step, started = 0, time.time()
    if args.resume_from_checkpoint and (checkpoint := latest_checkpoint(args.output_dir)):
        accelerator.load_state(str(checkpoint))
        progress = json.loads((checkpoint / "progress.json").read_text())
        step, started = progress["step"], time.time() - progress["seconds"]

    share = slice(accelerator.process_index, None, accelerator.num_processes)
    smooth = None
    bar = tqdm(
        total=args.max_train_steps,
        initial=step,
        disable=not accelerator.is_main_process,
        desc=args.path,
        mininterval=10,
    )
    while (done := progress_of(step, started, args)) < 1:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = torch.randint(0, len(images), (args.train_batch_size,), generator=generator)[share]
        x0 = images[index].to(accelerator.device, torch.float32) / 127.5 - 1
        y = labels[index].to(accelerator.device)
        drop = torch.rand(len(y), generator=generator).to(y.device) < args.label_dropout
        x, t, target = noised(args.path, scheduler, x0, generator)

        for group in optimizer.param_groups:
            group["lr"] = (
                args.learning_rate * min(1, (step + 1) / args.lr_warmup_steps) * 0.5 * (1 + math.cos(math.pi * done))
            )
        output = model(x, timestep=t, class_labels=torch.where(drop, len(names), y)).sample
        loss = torch.nn.functional.mse_loss(output.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

        step += 1
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        bar.update()
        if step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, step, time.time() - started)
    save_checkpoint(accelerator, args.output_dir, step, time.time() - started)

    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        ema.copy_to(model.parameters())
        facts = {
            "path": args.path,
            "dataset": args.dataset_name,
            "images": len(images),
            "steps": step,
            "train_batch_size": args.train_batch_size,
            "minutes": round((time.time() - started) / 60, 1),
            "device": str(accelerator.device),
            "mixed_precision": args.mixed_precision,
            "loss": round(smooth, 5),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        save_pipeline(args, model, scheduler, names, facts)
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
