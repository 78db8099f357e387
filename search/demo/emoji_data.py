"""The pictures that the colour models are trained on: every emoji of three sets, 64 x 64 pixels on white.

    python -m dssolver_search.demo.emoji_data --output_dir DIR

writes DIR/emoji-train.parquet (5 195 pictures) and DIR/emoji-test.parquet (469, no emoji of which is in train in any
set), columns image, label (nine classes), name, vendor. The three packages come from the npm registry by `npm pack`
(150 MB); with `--packages FOLDER`, from a folder that has the .tgz files already, or gets them. Nothing is installed.

google: `emoji-datasource-google` 16.0.0, Noto Emoji, Apache-2.0. twitter: `emoji-datasource-twitter` 16.0.0, Twemoji,
CC BY 4.0, copyright Twitter, Inc and other contributors, fork by jdecked. fluent: `@lobehub/fluent-emoji-3d` 1.1.0,
Fluent Emoji by Microsoft, MIT. The first two have all 1 906 emoji, fluent has 1 852.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tqdm.auto import tqdm

PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
CLASSES = {  # the categories of emoji.json, without "Component", the skin tones by themselves
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
SIZE = 64
TEST = """
    8ball abcd adult anguished arrow_forward arrow_upper_left athletic_shoe bacon bar_chart barely_sunny basketball
    bathtub beetle black_medium_small_square black_medium_square blowfish blueberries bookmark_tabs boot bricks
    call_me_hand chains city_sunset closed_umbrella cool couch_and_lamp diving_mask dna email eye
    face_with_head_bandage family_adult_child_child fearful female-cook female-singer female_fairy flag-aw flag-bb
    flag-cc flag-ch flag-ec flag-england flag-gh flag-ht flag-ie flag-lv flag-mm flag-nf flag-nl flag-nr flag-nz
    flag-ph flag-pl flag-pw flag-sh flag-sj flag-tk flag-uy flag-uz flag-za flashlight full_moon golfer green_apple
    grey_exclamation handball heavy_heart_exclamation_mark_ornament heavy_minus_sign high_brightness hippopotamus
    icecream japanese_castle jellyfish juggling keycap_star kimono kissing kite large_blue_circle large_green_square
    lower_left_crayon lying_face male-cook male-detective male-factory-worker male_supervillain male_vampire
    man-girl-boy man-man-boy-boy man-man-girl man_in_lotus_position man_kneeling man_kneeling_facing_right
    mantelpiece_clock massage mega memo microbe microphone moneybag monkey_face musical_note nazar_amulet new_moon
    nose office on ophiuchus pager pancakes panda_face parachute person_with_probing_cane pinching_hand
    potable_water radio_button rage rain_cloud recycle relaxed restroom right_anger_bubble rotating_light ru scales
    seat second_place_medal shield ship snow_cloud spades speak_no_evil standing_person star2
    stuck_out_tongue_closed_eyes suspension_railway takeout_box teacher thong_sandal tiger toothbrush traffic_light
    transgender_symbol unicorn_face volleyball walking waning_gibbous_moon white_circle white_flower wilted_flower
    wind_blowing_face woman-boy-boy woman-shrugging woman-woman-girl-boy woman_in_motorized_wheelchair x
    yellow_heart yin_yang
"""  # drawn once at random, all classes alike


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--packages", type=Path, default=None, help="folder of the .tgz files, by default temporary")
    return parser.parse_args(argv)


def archive(vendor: str, folder: Path) -> Path:
    """The package of `vendor` in `folder`, fetched unless it is there."""
    path = folder / (PACKAGES[vendor].removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", PACKAGES[vendor]], cwd=folder, check=True)
    return path


def read_pictures(path: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Of a package: the pictures' files by their lower-case names without suffix, and emoji.json ([] without one)."""
    pictures, emoji = {}, []
    with tarfile.open(path) as package:
        for member in package:
            name = Path(member.name)
            if name.name == "emoji.json":
                emoji = json.load(package.extractfile(member))
            elif name.suffix == ".webp" or (name.suffix == ".png" and name.parent.name == f"{SIZE}"):
                pictures[name.stem.lower()] = package.extractfile(member).read()
    return pictures, emoji


def on_white(file: bytes) -> Image.Image:
    """Squared, on white, SIZE pixels a side."""
    picture = Image.open(io.BytesIO(file)).convert("RGBA")
    side = max(picture.size)
    page = Image.new("RGBA", (side, side), "white")
    page.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    page = page.convert("RGB")
    return page if side == SIZE else page.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Every emoji of every set that has it, in the order of emoji.json; its skin-tone variants are no entries there."""
    emoji: list[dict[str, Any]] = []
    for vendor in PACKAGES:
        pictures, listed = read_pictures(archive(vendor, folder))
        emoji = emoji or listed
        for entry in tqdm(emoji, vendor):
            codes = [entry[key].lower() for key in ("unified", "non_qualified") if entry[key]]
            file = next((pictures[code] for code in codes if code in pictures), None)
            if entry["category"] in CLASSES and file is not None:
                label, name = CLASSES[entry["category"]], entry["short_name"]
                yield {"image": on_white(file), "label": label, "name": name, "vendor": vendor}


def main(argv: list[str] | None = None) -> None:
    args, held_out = parse_args(argv), set(TEST.split())
    columns = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(CLASSES.values())),
            "name": datasets.Value("string"),
            "vendor": datasets.Value("string"),
        }
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        everything = list(rows(folder))
    for split in ("train", "test"):
        chosen = [row for row in everything if (row["name"] in held_out) == (split == "test")]
        data = datasets.Dataset.from_list(chosen, features=columns)
        data.to_parquet(args.output_dir / f"emoji-{split}.parquet")
        print(f"{split}: {len(data)} pictures")


if __name__ == "__main__":
    main()
