"""Train one of the embedded class-conditional models (`flow/`, `vp/`).

    python -m dssolver_search.demo.train --path flow --dataset_name zalando-datasets/fashion_mnist --output_dir OUT

Hardware, cost and loss of the shipped weights, and the whole commands: README.md beside this file. `accelerate launch
-m ...` uses every device; a killed run continues with `--resume_from_checkpoint latest` on the very batches it would
have seen. OUT/pipeline is the result, OUT/samples.png a page of its images, a row for each class.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

CHECKPOINT = "checkpoint-{}"
LOSS_WEIGHT = 0.01  # of a step in the running mean of the loss
GUIDANCE, STEPS, COLUMNS = 2.0, 50, 16  # of the page of samples


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--path", choices=("flow", "vp"), required=True, help="rectified flow, or DDPM with linear betas")
    add("--output_dir", type=Path, required=True)
    add("--dataset_name", required=True, help="Hub id, or a builder such as `parquet`, `imagefolder`")
    add("--data_files", default=None, help="files for such a builder")
    add("--split", default="train")
    add("--image_column", default="image")
    add("--label_column", default="label")
    add("--resolution", type=int, default=28)
    add("--num_channels", type=int, choices=(1, 3), default=1)
    add("--mirrored_classes", nargs="*", default=(), help="names of classes of which half the samples are mirrored")
    add("--network", choices=("dit", "unet"), default="dit")
    add("--patch_size", type=int, default=4, help="of a dit, as are the next three")
    add("--width", type=int, default=128)
    add("--depth", type=int, default=6)
    add("--num_heads", type=int, default=4)
    add("--block_out_channels", type=int, nargs="+", default=(16, 32, 80, 144), help="of a unet, as are the next three")
    add("--layers_per_block", type=int, default=1)
    add("--attention_levels", type=int, default=2, help="how many of the coarsest resolutions have attention")
    add("--dropout", type=float, default=0.0)
    add("--noise_levels", choices=("logit-normal", "mixed"), default="logit-normal", help="of the flow, see `noised`")
    add("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon", help="of vp")
    add("--initial_model", type=Path, default=None, help="pipeline with a network of this shape to start from")
    add("--train_batch_size", type=int, default=128, help="over all processes")
    add("--max_train_steps", type=int, default=6000)
    add("--max_train_minutes", type=float, default=math.inf, help="decay and stop by the clock instead")
    add("--learning_rate", type=float, default=1e-3)
    add("--lr_warmup_steps", type=int, default=200)
    add("--weight_decay", type=float, default=0.01)
    add("--ema_decay", type=float, default=0.999)
    add("--label_dropout", type=float, default=0.1, help="share of samples trained without their class")
    add("--max_grad_norm", type=float, default=1.0)
    add("--mixed_precision", choices=("no", "bf16"), default="no")
    add("--compile", action="store_true", help="with torch.compile; what it cannot compile runs as it is")
    add("--checkpointing_steps", type=int, default=500)
    add("--preview_minutes", type=float, default=math.inf, help="write the pipeline and its samples so often")
    add("--resume_from_checkpoint", default=None, help="`latest`")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_images(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """The whole data set in memory: images (n, C, H, W) uint8, labels (n,), class names."""
    import datasets

    data = datasets.load_dataset(args.dataset_name, data_files=args.data_files, split=args.split)
    mode, size = ("L" if args.num_channels == 1 else "RGB"), (args.resolution, args.resolution)
    images = np.stack(
        [
            np.asarray(image.convert(mode).resize(size, Image.Resampling.LANCZOS))
            for image in tqdm(data[args.image_column], "images")
        ]
    )
    images = images.reshape(len(images), *size, args.num_channels).transpose(0, 3, 1, 2)
    names = data.features[args.label_column].names
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(data[args.label_column][:]), names


def build_network(args: argparse.Namespace, num_classes: int) -> DiTTransformer2DModel | UNet2DModel:
    """Both take (x, timestep=, class_labels=); the class id `num_classes` stands for none."""
    if args.network == "dit":
        return DiTTransformer2DModel(
            num_attention_heads=args.num_heads,
            attention_head_dim=args.width // args.num_heads,
            in_channels=args.num_channels,
            num_layers=args.depth,
            sample_size=args.resolution,
            patch_size=args.patch_size,
            num_embeds_ada_norm=num_classes,
        )
    levels, attention = len(args.block_out_channels), args.attention_levels
    return UNet2DModel(
        sample_size=args.resolution,
        in_channels=args.num_channels,
        out_channels=args.num_channels,
        block_out_channels=tuple(args.block_out_channels),
        down_block_types=("DownBlock2D",) * (levels - attention) + ("AttnDownBlock2D",) * attention,
        up_block_types=("AttnUpBlock2D",) * attention + ("UpBlock2D",) * (levels - attention),
        layers_per_block=args.layers_per_block,
        attention_head_dim=16,
        norm_num_groups=8,
        dropout=args.dropout,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=num_classes + 1,
    )


def build_scheduler(args: argparse.Namespace) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    if args.path == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=args.prediction_type,
    )


def draw_batch(
    args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor, mirrored: torch.Tensor, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (b, C, H, W) in [-1, 1], half those of `mirrored` (classes,) classes mirrored, and classes or none."""
    index = torch.randint(0, len(images), (args.train_batch_size,), generator=g, device=g.device)
    x0, y = images[index].float() / 127.5 - 1, labels[index]
    turn, drop = torch.rand((2, len(y)), generator=g, device=g.device)
    turn = mirrored[y] & (turn < 0.5)
    x0 = torch.where(turn.view(-1, 1, 1, 1), x0.flip(3), x0)
    return x0, torch.where(drop < args.label_dropout, len(mirrored), y)


def noised(
    args: argparse.Namespace, scheduler, x0: torch.Tensor, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Network input (b, C, H, W), its timestep (b,) on the 0..1000 scale, and the regression target.

    flow: x = (1 - sigma) x0 + sigma noise, target noise - x0, sigma logit-normal, or half of them uniform ("mixed":
    the last steps of a solver, near the data, are then trained as well as the rest). vp: DDPM, target the noise, or the
    velocity alpha noise - sigma x0 (Salimans and Ho 2022), which stays well-posed where noise drowns the data.
    """
    noise = torch.randn(x0.shape, generator=g, device=g.device)
    if args.path == "flow":
        sigma = torch.sigmoid(torch.randn(len(x0), generator=g, device=g.device))
        if args.noise_levels == "mixed":
            sigma[::2] = torch.rand(len(sigma[::2]), generator=g, device=g.device)
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * noise, sigma * 1000, noise - x0
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),), generator=g, device=g.device)
    target = noise if args.prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
    return scheduler.add_noise(x0, noise, t), t, target


def progress_of(step: int, started: float, args: argparse.Namespace) -> float:
    """How much of the run is over, in [0, 1]: by steps or by the clock, whichever is nearer its end."""
    return min(1.0, max(step / args.max_train_steps, (time.time() - started) / (60 * args.max_train_minutes)))


def learning_rate(step: int, done: float, args: argparse.Namespace) -> float:
    """Linear warm-up by steps, cosine decay to the end of the run."""
    return args.learning_rate * min(1, (step + 1) / args.lr_warmup_steps) * 0.5 * (1 + math.cos(math.pi * done))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: folders are renamed into place, so a `.tmp` one is what a kill left behind."""
    found = [p for p in folder.glob(CHECKPOINT.format("*")) if p.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: dict) -> None:
    target = folder / CHECKPOINT.format(progress["step"])
    partial = target.with_name(target.name + ".tmp")
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps(progress))
        os.replace(partial, target)
        for old in folder.glob(CHECKPOINT.format("*")):
            if old != target:
                shutil.rmtree(old)


@torch.no_grad()
def sample_page(
    args: argparse.Namespace, network: DiTTransformer2DModel | UNet2DModel, num_classes: int
) -> Image.Image:
    """A row of images for each class, guided, from the same noise whenever it is asked for."""
    scheduler = build_scheduler(args)
    if args.path == "flow":
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), device=network.device)
    else:
        scheduler.set_timesteps(STEPS, device=network.device)
    labels = torch.arange(num_classes, device=network.device).repeat_interleave(COLUMNS)
    both = torch.cat([labels, torch.full_like(labels, num_classes)])
    size = args.resolution
    x = torch.randn(len(labels), args.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    x = x.to(network.device)
    for t in scheduler.timesteps:
        output = network(torch.cat([x, x]), timestep=t.expand(len(both)), class_labels=both).sample
        guided, null = output.chunk(2)
        x = scheduler.step(null + GUIDANCE * (guided - null), t, x).prev_sample
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    x = torch.nn.functional.pad(x, (1, 1, 1, 1), value=255).unflatten(0, (num_classes, COLUMNS))
    page = x.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(-1).numpy()
    return Image.fromarray(page).resize((2 * page.shape[1], 2 * page.shape[0]), Image.Resampling.NEAREST)


def save_pipeline(args: argparse.Namespace, network: DiTTransformer2DModel | UNet2DModel, names: list[str]) -> None:
    from diffusers_dssolver.pipelines import SiTPipeline

    scheduler = build_scheduler(args)
    pipe = SiTPipeline(transformer=network.half(), scheduler=scheduler, id2label=dict(enumerate(names)))
    pipe.save_pretrained(args.output_dir / "pipeline")


class Training:
    """The state of a run, restored from the latest checkpoint if there is one and it is asked for."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        set_seed(args.seed)
        images, labels, self.names = load_images(args)
        device = self.accelerator.device
        self.images, self.labels = images.to(device), labels.to(device)
        self.mirrored = torch.tensor([name in args.mirrored_classes for name in self.names], device=device)
        network = build_network(args, len(self.names))
        if args.initial_model:
            network.load_state_dict(type(network).from_pretrained(args.initial_model / "transformer").state_dict())
        # a DiT stays in eval(): its label embedders, one per block, would each drop labels; draw_batch drops them once
        network.train(args.network == "unet")
        self.ema = EMAModel(network.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        optimizer = torch.optim.AdamW(
            network.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True
        )
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.accelerator.register_for_checkpointing(self.ema)
        self.scheduler = build_scheduler(args)
        self.step, self.started = 0, time.time()
        self.loss = None  # running mean, kept on the device
        if args.resume_from_checkpoint and (checkpoint := latest_checkpoint(args.output_dir)):
            self.accelerator.load_state(str(checkpoint))
            progress = json.loads((checkpoint / "progress.json").read_text())
            self.step, self.started = progress["step"], time.time() - progress["seconds"]
            self.loss = torch.tensor(progress["loss"], device=device)
        self.ema.to(device)  # a checkpoint is read to the CPU
        if args.compile:
            torch._dynamo.config.suppress_errors = True
            self.network.compile()

    def train_step(self, done: float) -> None:
        args, accelerator = self.args, self.accelerator
        g = torch.Generator(self.images.device).manual_seed(args.seed * 1_000_003 + self.step)
        x0, y = draw_batch(args, self.images, self.labels, self.mirrored, g)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        x, t, target, y = (part[share] for part in (*noised(args, self.scheduler, x0, g), y))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, done, args)
        x = x.contiguous(memory_format=torch.channels_last)  # what convolutions like best
        output = self.network(x, timestep=t, class_labels=y).sample
        loss = torch.nn.functional.mse_loss(output.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(self.network.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        self.step += 1
        self.loss = loss.detach() if self.loss is None else self.loss.lerp(loss.detach(), LOSS_WEIGHT)

    def progress(self) -> dict[str, float]:
        return {"step": self.step, "seconds": time.time() - self.started, "loss": self.loss.item()}

    def facts(self) -> dict:
        args = self.args
        cuda = self.accelerator.device.type == "cuda"
        return {
            "path": args.path,
            "dataset": args.dataset_name,
            "images": len(self.images),
            "network": args.network,
            "noise_levels": args.noise_levels if args.path == "flow" else "uniform",
            "prediction_type": args.prediction_type if args.path == "vp" else "velocity",
            "initial_model": args.initial_model and args.initial_model.name,
            "steps": self.step,
            "train_batch_size": args.train_batch_size,
            "minutes": round((time.time() - self.started) / 60, 1),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "mixed_precision": args.mixed_precision,
            "loss": round(self.loss.item(), 5),
            "parameters": sum(p.numel() for p in self.network.parameters()),
        }

    def save(self) -> None:
        """The averaged weights as a pipeline, its facts and a page of its samples."""
        network = build_network(self.args, len(self.names)).eval().to(self.accelerator.device)
        self.ema.copy_to(network.parameters())
        facts, folder = self.facts(), self.args.output_dir
        page = sample_page(self.args, network, len(self.names))
        save_pipeline(self.args, network, self.names)
        page.save(folder / "samples.png")
        (folder / "pipeline" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(json.dumps(facts), flush=True)

    def run(self) -> None:
        args, accelerator = self.args, self.accelerator
        main, previewed = accelerator.is_main_process, time.time()
        bar = tqdm(total=args.max_train_steps, initial=self.step, disable=not main, desc=args.path, mininterval=10)
        while (done := progress_of(self.step, self.started, args)) < 1:
            self.train_step(done)
            bar.update()
            if self.step % 100 == 0:
                bar.set_postfix(loss=f"{self.loss.item():.4f}", refresh=False)
            if self.step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, args.output_dir, self.progress())
            if main and time.time() - previewed > 60 * args.preview_minutes:
                self.save()
                previewed = time.time()
        save_checkpoint(accelerator, args.output_dir, self.progress())
        if main:
            self.save()


def main(argv: list[str] | None = None) -> None:
    Training(parse_args(argv)).run()


if __name__ == "__main__":
    main()
