"""The models of `make study`: three sizes of one network, flow and vp, and the classifier that scores their images.

    python -m tests.study.models [--models runs/study/models] [--only small-vp classifier] [--max_train_minutes 4 5 8]
    python -m tests.study.models --dataset_name parquet --data_files 'D/*train.parquet' --test_files 'D/*test.parquet'

CIFAR-10 at 16 x 16 pixels, in colour: 16 tokens of 4 x 4. A forward pass of one sample takes 7.2, 23.3 and 54.3 MFLOP
(small, medium, large; `FlopCounterMode`). `dssolver_search.demo.train` and `.classifier` do the work, the models on a
device if there is one; arguments not known here are the former's. What is finished is left alone, what was killed goes
on from its last checkpoint; processes with other names after `--only` share the work.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from dssolver_search.demo import classifier as classifiers
from dssolver_search.demo import train

FAMILIES = ("flow", "vp")
SIZES = {"small": (64, 4, 4), "medium": (96, 6, 4), "large": (128, 8, 4)}  # width, depth, heads
MFLOP = {"small": 7.2, "medium": 23.3, "large": 54.3}
MINUTES = {"small": 4, "medium": 5, "large": 8}  # of training
RESOLUTION, CHANNELS, PATCH = 16, 3, 4
CLASSIFIER, NAME = "classifier", "cifar-classifier"
DEFAULT = Path("runs/study/models")
WHERE = "STUDY_MODELS"  # environment: the folder, for `classifier`


def names() -> list[str]:
    """Of all models, the fastest first."""
    return [f"{size}-{family}" for size in SIZES for family in FAMILIES]


def folder(models: Path, name: str) -> Path:
    """Of a finished model's pipeline, or of the classifier; its training.json is written last."""
    return models / name if name == CLASSIFIER else models / name / "pipeline"


def missing(models: Path) -> list[str]:
    return [name for name in (*names(), CLASSIFIER) if not (folder(models, name) / "training.json").exists()]


def facts(models: Path) -> dict[str, dict[str, Any]]:
    """What each training wrote of itself."""
    files = {name: folder(models, name) / "training.json" for name in (*names(), CLASSIFIER)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}


def classifier() -> nn.Module:
    """For `--feature_network tests.study.models:classifier` and `--extractor` alike."""
    return classifiers.load(folder(Path(os.environ.get(WHERE, DEFAULT)), CLASSIFIER))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=DEFAULT)
    parser.add_argument("--only", nargs="+", choices=(*names(), CLASSIFIER), default=(*names(), CLASSIFIER))
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--data_files", help="of a builder such as `parquet`")
    parser.add_argument("--test_files", help="the same, for the classifier's test images")
    parser.add_argument("--image_column", default="img")
    parser.add_argument("--max_train_minutes", nargs=len(SIZES), help="of the models of each size")
    given, more = parser.parse_known_args(argv)
    minutes = MINUTES if given.max_train_minutes is None else dict(zip(SIZES, given.max_train_minutes, strict=True))
    if (given.data_files is None) != (given.test_files is None):
        parser.error("--data_files and --test_files belong together; give both or neither")
    data = ["--dataset_name", given.dataset_name, "--image_column", given.image_column]
    data += [] if given.data_files is None else ["--data_files", given.data_files]
    data += ["--num_channels", f"{CHANNELS}", "--resolution", f"{RESOLUTION}"]
    for name in (name for name in given.only if name in missing(given.models)):
        output = ["--output_dir", str(given.models / name)]
        if name == CLASSIFIER:
            test = [] if given.test_files is None else ["--test_files", given.test_files]
            classifiers.main([*data, *test, *output, "--name", NAME])
            continue
        size, family = name.split("-")
        shape = zip(("--width", "--depth", "--num_heads"), map(str, SIZES[size]), strict=True)
        limits = ["--max_train_minutes", f"{minutes[size]}", "--max_train_steps", "1000000", "--train_batch_size", "64"]
        network = ["--path", family, "--patch_size", f"{PATCH}", *(word for pair in shape for word in pair)]
        train.main([*data, *output, *network, *limits, "--resume_from_checkpoint", "latest", *more])


if __name__ == "__main__":
    main()
