"""A small classifier whose features the images of the embedded models are scored in, and its training.

    python -m dssolver_search.demo.classifier --dataset_name zalando-datasets/fashion_mnist --output_dir OUT

writes the three files of `classifier/`: the weights, the measured accuracy, and statistics of images that `evaluate
--extractor dssolver_search.demo.classifier:load` compares with. `--num_channels 3` and other settings train one of
other images, such as `emoji-classifier/`, whose factory is `:load_emoji`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..images.features import of_network
from ..images.real_images import Statistics
from ..storage import read_tensors, write_tensors, write_text

NAME = "fashion-classifier"
FOLDER = Path(__file__).parent / "classifier"
EMOJI = Path(__file__).parent / "emoji-classifier"
WEIGHTS = "model.safetensors"
SIZE = 28


class Classifier(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> features (B, 64) and logits (B, classes).

    Args:
        name: shown beside the metrics.
        channels: 3; 1: images are made grey.
        size: images are resized to size x size pixels.
    """

    def __init__(self, name: str = NAME, channels: int = 1, size: int = SIZE, classes: int = 10) -> None:
        super().__init__()
        self.name, self.channels, self.size = name, channels, size
        layers: list[nn.Module] = []
        for channels_in, channels_out, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2)):
            convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.output = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen, size = images.mean(1, keepdim=True) if self.channels == 1 else images, (self.size, self.size)
        if seen.shape[-2:] != size:
            seen = F.interpolate(seen, size, mode="bilinear", antialias=True, align_corners=False)
        features = self.layers(seen)
        return features, self.output(features)


def load(folder: Path = FOLDER) -> Classifier:
    """The shipped classifier, or one that `main` wrote to a folder; in evaluation mode.

    Raises:
        ValueError: its weights are damaged or absent (they are part of a checkout, not of an installed package).
    """
    tensors, facts = read_tensors(folder / WEIGHTS)
    classes = len(tensors["output.bias"])
    model = Classifier(facts.get("name", NAME), int(facts.get("channels", 1)), int(facts.get("size", SIZE)), classes)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def load_emoji() -> Classifier:
    """That of the colour pictures: 27 classes, each of the nine of emoji in each of the three sets."""
    return load(EMOJI)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder, with the splits `train` and `test`")
    parser.add_argument("--data_files", default=None, help="of a builder such as `parquet`: training images")
    parser.add_argument("--test_files", default=None, help="and test images")
    parser.add_argument("--num_channels", type=int, choices=(1, 3), default=1)
    parser.add_argument("--resolution", type=int, default=SIZE)
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--set_column", default=None, help="texts that split each class further, such as `vendor`")
    parser.add_argument("--reference_split", choices=("test", "both"), default="test", help="whose statistics are kept")
    parser.add_argument("--max_shift", type=int, default=0, help="pixels by which training images are moved at random")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.data_files is None) != (args.test_files is None):
        parser.error("--data_files and --test_files belong together; give both or neither")
    return args


def split_of(args: argparse.Namespace, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) uint8 and labels (n,)."""
    import datasets

    from .train import load_images  # slow to import

    files = args.data_files if split == "train" else args.test_files
    settings = {**vars(args), "data_files": files, "split": split if files is None else "train"}
    images, labels, _ = load_images(argparse.Namespace(**settings))
    if args.set_column:
        texts = datasets.load_dataset(args.dataset_name, data_files=files, split=settings["split"])[args.set_column][:]
        sets = sorted(set(texts))
        labels = labels * len(sets) + torch.tensor([sets.index(text) for text in texts])
    return images, labels


def train(args: argparse.Namespace, images: Tensor, labels: Tensor) -> Classifier:
    """AdamW with a one-cycle learning rate, on images mirrored and moved at random."""
    torch.manual_seed(args.seed)
    model = Classifier(args.name, args.num_channels, args.resolution, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    steps = args.epochs * (len(images) // args.train_batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, steps)
    with tqdm(total=steps, desc=args.name, mininterval=10) as bar:
        for _ in range(args.epochs):
            for batch in torch.randperm(len(images)).split(args.train_batch_size)[: steps // args.epochs]:
                x = images[batch].float() / 255
                mirrored = torch.rand(len(x), 1, 1, 1) < 0.5
                x = torch.where(mirrored, x.flip(-1), x)
                if args.max_shift:
                    x = moved(x, args.max_shift)
                logits = model(x)[1]
                loss = F.cross_entropy(logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    return model.eval().requires_grad_(False)


def moved(images: Tensor, most: int) -> Tensor:
    """Images (B, C, H, W), each moved by up to so many pixels; what lies at the edge is repeated."""
    size = images.shape[-1]
    padded = F.pad(images, [most] * 4, mode="replicate")
    rows, columns = (torch.randint(0, 2 * most + 1, (len(images), 1)) + torch.arange(size) for _ in range(2))
    return padded[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    images, labels = split_of(args, "train")
    began = time.time()
    model = train(args, images, labels)
    minutes = (time.time() - began) / 60
    sees = {"name": args.name, "channels": str(args.num_channels), "size": str(args.resolution)}
    write_tensors(args.output_dir / WEIGHTS, model.state_dict(), sees)

    test_images, labels = split_of(args, "test")
    both = args.reference_split == "both"
    extractor, shown = of_network(model, args.name), torch.cat([test_images, images]) if both else test_images
    found = [extractor(batch.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()) for batch in shown.split(500)]
    features, logits = (torch.cat([part[name] for part in found]) for name in ("features", "logits"))
    real = Statistics.of(features, args.dataset_name if both else f"{args.dataset_name} (test)")
    real.write(args.output_dir / "reference.safetensors", extractor, torch.float16)
    facts = {
        "name": args.name, "dataset": args.dataset_name, "epochs": args.epochs,
        "train_batch_size": args.train_batch_size, "minutes": round(minutes, 1), "device": "cpu",
        "test_images": len(labels),
        "test_accuracy": round((logits[: len(labels)].argmax(1) == labels).float().mean().item(), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    write_text(args.output_dir / "training.json", json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
