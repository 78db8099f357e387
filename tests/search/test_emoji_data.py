"""The pictures of the colour model, made from packages with two emoji."""

from __future__ import annotations

import io
import json
import tarfile

import datasets
import numpy as np
from PIL import Image

from dssolver_search.demo import emoji_data

ENTRIES = [
    {"unified": "1F600", "non_qualified": None, "category": "Smileys & Emotion", "short_name": "grinning"},
    {"unified": "1F627-FE0F", "non_qualified": "1F627", "category": "Smileys & Emotion", "short_name": "anguished"},
    {"unified": "1F3FB", "non_qualified": None, "category": "Component", "short_name": "skin-tone-2"},
]


def picture(colour, size, kind):
    """The bytes of a picture of one colour."""
    file = io.BytesIO()
    Image.new("RGBA", size, colour).save(file, kind, **({"lossless": True} if kind == "webp" else {}))
    return file.getvalue()


def pack(path, files):
    with tarfile.open(path, "w:gz") as package:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            package.addfile(entry, io.BytesIO(data))


def test_pictures_are_squared_on_white_and_split_by_emoji(tmp_path):
    red, half = picture("red", (64, 64), "png"), picture((0, 0, 0, 0), (64, 64), "png")
    listed = json.dumps(ENTRIES).encode()
    for vendor in ("google", "twitter"):
        codes = {"1f600": red, "1f627": half, "1f3fb": red}
        folder = f"img/{vendor}/64"
        small = {f"img/{vendor}/32/{code}.png": b"no picture" for code in codes}
        files = {f"{folder}/{code}.png": data for code, data in codes.items()}
        pack(tmp_path / f"emoji-datasource-{vendor}-16.0.0.tgz", {"emoji.json": listed, **small, **files})
    wide = picture("blue", (128, 64), "webp")
    pack(tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz", {"assets/1f600.webp": wide})

    emoji_data.main(["--output_dir", str(tmp_path / "out"), "--packages", str(tmp_path)])
    made = {
        split: datasets.Dataset.from_parquet(str(tmp_path / "out" / f"emoji-{split}.parquet"), cache_dir=str(tmp_path))
        for split in ("train", "test")
    }
    assert made["train"]["name"][:] == ["grinning"] * 3  # a component is none, and "anguished" is held out
    assert made["train"]["vendor"][:] == ["google", "twitter", "fluent"]
    assert made["test"]["vendor"][:] == ["google", "twitter"] and set(made["test"]["name"]) == {"anguished"}
    assert made["train"].features["label"].names[made["train"]["label"][0]] == "smileys"
    google, _, fluent = (np.asarray(image) for image in made["train"]["image"])
    assert google.shape == fluent.shape == (64, 64, 3) and (google == (255, 0, 0)).all()
    assert (fluent[32] == (0, 0, 255)).all() and (fluent[[0, 63]] == 255).all()  # wide: white above and below
    assert (np.asarray(made["test"]["image"][0]) == 255).all()  # nothing is white
