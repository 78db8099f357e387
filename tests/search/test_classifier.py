"""The classifier of the colour pictures: its statistics belong to it, and a small one is trained as it was."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from PIL import Image

from dssolver_search.demo import classifier
from dssolver_search.images.features import load_extractor, of_network
from dssolver_search.images.real_images import read_statistics


def test_the_statistics_of_the_pictures_are_of_its_features():
    extractor = load_extractor("dssolver_search.demo.classifier:load_emoji")
    assert read_statistics(classifier.EMOJI / "reference.safetensors", extractor).n == 5664
    assert extractor(np.zeros((1, 32, 32, 3), np.uint8))["logits"].shape == (1, 27)


def test_pictures_are_moved_as_a_whole_and_their_edges_repeated():
    picture = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    padded = torch.nn.functional.pad(picture, [1] * 4, mode="replicate")
    torch.manual_seed(0)
    for _ in range(5):
        for whole, seen in zip(padded, classifier.moved(picture, 1), strict=True):
            places = [(r, c) for r in range(3) for c in range(3)]
            assert sum(torch.equal(whole[:, r : r + 6, c : c + 6], seen) for r, c in places) == 1
    assert not torch.equal(classifier.moved(picture, 1), classifier.moved(picture, 1))


def test_classes_are_split_by_the_set_of_a_picture(tmp_path):
    colours = {("face", "a"): (255, 255, 0), ("face", "b"): (255, 0, 0), ("flag", "a"): (0, 0, 255)}
    rows = [
        {"image": Image.new("RGB", (8, 8), colour), "label": label, "vendor": vendor}
        for (label, vendor), colour in colours.items()
        for _ in range(8)
    ]
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["face", "flag"])}
    features = datasets.Features({**columns, "vendor": datasets.Value("string")})
    file, folder = str(tmp_path / "pictures.parquet"), tmp_path / "out"
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    classifier.main(
        [
            "--dataset_name", "parquet", "--data_files", file, "--test_files", file, "--num_channels", "3",
            "--resolution", "8", "--set_column", "vendor", "--reference_split", "both", "--max_shift", "1",
            "--epochs", "12", "--train_batch_size", "8", "--output_dir", str(folder), "--name", "small",
        ]
    )  # fmt: skip
    model = classifier.load(folder)
    pictures = torch.stack([torch.tensor(c).view(3, 1, 1).expand(3, 8, 8) / 255 for c in colours.values()])
    assert model(pictures)[1].argmax(1).tolist() == [0, 1, 2]  # face of a, face of b, flag of a
    assert read_statistics(folder / "reference.safetensors", of_network(model, "small")).n == 2 * len(rows)
