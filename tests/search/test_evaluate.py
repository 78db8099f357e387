"""`evaluate` end to end on tiny models: what it samples, scores, keeps, names and refuses; clean-fid beside it.

Models run in float64. Extractors give float32 features; what is compared comes from equal batches, so equal numbers
differ by the rounding of sums alone, some 1e-6 of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import cleanfid.features
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cleanfid import fid
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import classical, uniform_nodes
from dssolver_search.cli import main
from dssolver_search.demo import classifier
from dssolver_search.images import features as extractors
from dssolver_search.images import metrics
from dssolver_search.images.features import INCEPTION_FILE, Clip, load_extractor
from dssolver_search.images.real_images import Statistics, open_real_images, read_statistics
from dssolver_search.measure.evaluate import Evaluation, table
from dssolver_search.measure.generate import SPLIT, Generation
from dssolver_search.measure.lineup import share
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.settings import EvaluateConfig
from dssolver_search.storage import read_tensors, write_tensors
from tests.families import make_path, make_pipe, make_sampler
from tests.pipelines.zoo import TEXT, sd_parts
from tests.search.test_sampling import text_encoder
from tests.searches import arguments, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning"),  # of scipy, which clean-fid calls
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # its schedulers that fail on a spacing
    pytest.mark.filterwarnings("ignore:.*safety checker.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # clean-fid's network is of TorchScript
]
NFE, IMAGES = 3, 70  # above the 64 features of the classifier; not a whole number of shards
CLASSIFIER = "dssolver_search.demo.classifier:load"
REFERENCE = str(classifier.FOLDER / "reference.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a model (`flow`) and a solver for it (`ours-flow`)."""
    root, pipe, path = tmp_path_factory.mktemp("models"), make_pipe("flow"), make_path("flow")
    pipe.save_pretrained(root / "flow")
    solvers = {str(NFE): classical(uniform_nodes(NFE, path), path).to_dict()}
    DSSolverScheduler.from_config(pipe.scheduler.config, solvers=solvers).save_pretrained(root / "ours-flow")
    return root


def settings(folders, output, **changes):
    values = {
        "pretrained_model_name_or_path": str(folders / "flow"), "output_dir": str(output), "nfe": [NFE],
        "guidance_scale": 1.5, "solver": [str(folders / "ours-flow")], "schedulers": ["unipc", "heun"],
        "dtype": "float64", "num_images": IMAGES, "batch_size": 32, "reference": REFERENCE, "extractor": CLASSIFIER,
        "subsets": 4,
    }  # fmt: skip
    return {**values, **changes}


def evaluate(folders, output, **changes):
    """The record that the command writes."""
    main(["evaluate", *arguments(settings(folders, output, **changes))])
    return json.loads((output / "evaluation.json").read_text())


def generation_of(folders, output, **changes):
    return Generation(EvaluateConfig(**settings(folders, output, **changes)), output, Accelerator())


def figures_of(record):
    return {(r["scheduler"], r["nfe"]): {k: v["value"] for k, v in r["metrics"].items()} for r in record["results"]}


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """Folder of an evaluation with a many-step run, and its record."""
    output = tmp_path_factory.mktemp("evaluate") / "out"
    return output, evaluate(folders, output, reference_steps=9)


@pytest.fixture(scope="module")
def real_images(tmp_path_factory):
    """A folder of pictures of several modes, in two folders, and the arrays in it."""
    folder = tmp_path_factory.mktemp("real") / "pictures"
    generator = np.random.default_rng(0)
    arrays = []
    for k in range(80):
        array = (generator.random((9, 7, 3)) * 255).astype(np.uint8)
        file = folder / f"{k % 2}" / f"test-{k:03}.png"  # of no split for that
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)
        arrays.append((file, array))
    (folder / "notes.txt").write_text("no picture")
    return folder, [array for _, array in sorted(arrays, key=lambda pair: pair[0])]


# --- the whole --------------------------------------------------------------------------------------------------------


def test_record_says_what_was_run_and_measured(finished):
    _, record = finished
    found = [(r["scheduler"], r["nfe"], r["spacing"], r["calls"], r["n"]) for r in record["results"]]
    assert found == [
        ("ours-flow", NFE, "searched", NFE, IMAGES),
        ("unipc", NFE, "uniform", NFE, IMAGES),
        ("heun", NFE, "uniform", 2 * 2 - 1, IMAGES),
        ("reference", 9, None, 9, IMAGES),
    ]
    assert record["extractor"] == "fashion-classifier" and len(record["extractor_sha256"]) == 64
    assert record["data"] == {"name": "zalando-datasets/fashion_mnist (test)", "n": 10_000}
    assert set(record["versions"]) == {"diffusers", "torch"}
    for result in record["results"]:
        assert result["seconds_per_image"] > 0
        assert set(result["metrics"]) == {
            "frechet_distance", "kernel_distance", "inception_score", "precision", "recall"
        }  # fmt: skip
        for name, entry in result["metrics"].items():
            low, high = entry["interval"]
            assert low <= entry["value"] <= high and (low < high or name in ("precision", "recall"))
    assert len({entry["frechet_distance"] for entry in figures_of(record).values()}) == 4


def test_figures_are_those_of_the_pipeline_called_by_hand(folders, finished):
    """Own noise, own classes, the network and clean-fid's distances, without our code in between."""
    sampler = make_sampler(load_pipeline(str(folders / "flow"), "float64"))
    sampler.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    found = []
    for first in range(0, IMAGES, 32):
        indices = range(first, min(first + 32, IMAGES))
        images = sampler.pipe(
            [i % 3 for i in indices], guidance_scale=1.5, num_inference_steps=NFE,
            generator=sampler.generators(indices, SPLIT),
        ).images  # fmt: skip
        arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
        with torch.no_grad():
            found.append(classifier.load()(torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255))
    features, logits = map(torch.cat, zip(*found, strict=True))
    tensors, _ = read_tensors(classifier.FOLDER / "reference.safetensors")
    expected = fid.frechet_distance(
        features.double().mean(0).numpy(), np.cov(features.double().numpy(), rowvar=False),
        tensors["mu"].numpy(), tensors["sigma"].numpy(),
    )  # fmt: skip
    output, _ = finished
    record = evaluate(folders, output.parent / "euler", schedulers=["euler"], solver=[], subsets=0)
    [(key, figures)] = figures_of(record).items()
    assert key == ("euler", NFE)
    assert figures["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    real = tensors["features"][:IMAGES].double().numpy()
    kernel = fid.kernel_distance(features.double().numpy(), real, num_subsets=1)
    assert figures["kernel_distance"] == pytest.approx(kernel, rel=1e-3)
    p = logits.double().softmax(1)
    score = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert figures["inception_score"] == pytest.approx(score, rel=1e-4)
    assert "interval" not in record["results"][0]["metrics"]["recall"]


def test_printed_table_names_the_extractor_and_never_says_fid(finished):
    _, record = finished
    text = table(record)
    assert "FID" not in text and "KID" not in text
    assert f"{IMAGES} images of each, against 10000 of zalando-datasets/fashion_mnist (test)" in text
    block = text.split("Frechet distance (fashion-classifier)\n\n")[1].split("\n\n")[0].splitlines()
    assert block[0].split() == ["NFE", "3", "NFE", "9"]
    value = record["results"][0]["metrics"]["frechet_distance"]
    half = (value["interval"][1] - value["interval"][0]) / 2
    assert block[1].startswith("ours-flow") and f"{value['value']:.4g} +- {half:.2g}" in block[1]
    assert block[1].endswith(" -") and block[4].split()[:2] == ["reference", "-"]
    assert "seconds for an image" in text


def test_schedulers_run_in_the_best_spacing_of_a_comparison(folders, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "dssolver_search")
    results = [
        {"scheduler": "unipc", "nfe": NFE, "spacing": "karras"},
        {"scheduler": "heun", "nfe": NFE + 1, "spacing": "karras"},  # another step count
        {"scheduler": "euler", "nfe": NFE, "spacing": "sideways"},  # none that is known
    ]
    (tmp_path / "comparison.json").write_text(json.dumps({"results": results}))
    names = ["unipc", "heun", "euler"]
    generation = generation_of(folders, tmp_path / "out", comparison=str(tmp_path), schedulers=names)
    assert [(r.name, r.spacing) for r in generation.runs] == [
        ("ours-flow", "searched"), ("unipc", "karras"), ("heun", "uniform"), ("euler", "uniform")
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "unipc at 3 calls: karras, the comparison's best\n" in said
    assert "heun at 3 calls: uniform, the first of its spacings\n" in said


def test_evaluation_speaks_of_no_setting_that_it_has_not(folders, tmp_path, capsys):
    """`compare` tells where its converged runs end otherwise than the search's teacher; here there are none."""
    solver = DSSolverScheduler.from_pretrained(folders / "ours-flow", provenance={"teacher": {"end": 0.1}})
    solver.save_pretrained(tmp_path / "early")
    generation_of(folders, tmp_path, solver=[str(tmp_path / "early")])
    assert "end" not in capsys.readouterr().err.replace("Loading pipeline components", "")


# --- shards -----------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_no_search_and_no_comparison(folders, tmp_path):
    generation = generation_of(folders, tmp_path)
    seen, draw = [], generation.sampler.generators
    generation.sampler.generators = lambda indices, split: seen.append(split) or draw(indices, split)
    generation.images(generation.runs[0], range(3))
    assert set(seen) == {"evaluate"}


def test_files_of_images_are_named_after_what_they_depend_on(folders, tmp_path):
    generation = generation_of(folders, tmp_path, nfe=[3, 5])
    run, *others = generation.runs
    indices = generation.shards[0]
    names = {generation.file(r, indices) for r in (run, *others)}
    assert len(names) == len(generation.runs)

    def file(**changes):
        scheduler = copy.deepcopy(run.scheduler)
        scheduler.register_to_config(**changes)
        return generation.file(dataclasses.replace(run, scheduler=scheduler), indices)

    assert file() == file(provenance={"seconds": 3}) == generation.file(run, indices)
    solvers = copy.deepcopy(dict(run.scheduler.config.solvers))
    solvers[str(NFE)]["coefficients"][1] = [0.25, 0.75]
    assert file(solvers=solvers) not in names


def process(number, count):
    """The accelerator of one of several processes that run one after the other."""
    return SimpleNamespace(
        num_processes=count, process_index=number, is_main_process=number == 0, device=torch.device("cpu"),
        local_main_process_first=contextlib.nullcontext, wait_for_everyone=lambda: None,
    )  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_shard_is_sampled_by_one_process(processes, folders, tmp_path, monkeypatch):
    sampled = []
    monkeypatch.setattr(Evaluation, "_features", lambda self, run, i: sampled.append((run.name, i)) or ({}, {}))
    for number in range(processes):
        output = tmp_path / f"{number}"  # the files of others do not count
        evaluation = Evaluation(EvaluateConfig(**settings(folders, output)), process(number, processes))
        share(evaluation.accelerator, evaluation._made_tasks(), "")
    expected = [(name, i) for name in ("ours-flow", "unipc", "heun") for i in evaluation.generation.shards]
    assert sorted(sampled, key=str) == sorted(expected, key=str)


def test_divided_runs_end_in_the_same_figures(folders, finished, real_images, tmp_path, capsys):
    """Two processes, the main one last; real images and made ones."""
    changes = {"reference": str(real_images[0]), "schedulers": ["unipc"], "reference_steps": 0, "solver": []}
    whole = evaluate(folders, tmp_path / "whole", **changes)
    for number in (1, 0):
        config = EvaluateConfig(**settings(folders, tmp_path / "divided", **changes))
        Evaluation(config, process(number, 2))()
        assert (tmp_path / "divided" / "evaluation.json").exists() == (number == 0)
    found = json.loads((tmp_path / "divided" / "evaluation.json").read_text())
    assert found["data"] == whole["data"]
    [(key, figures)] = figures_of(whole).items()
    assert figures_of(found)[key] == pytest.approx(figures, rel=1e-9)


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_runs_end_in_the_same_figures(after, folders, finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C just before or after a file is renamed into place; what is there is not made again."""
    whole, output = finished[1], tmp_path / "out"
    replace, renamed = os.replace, []

    def interrupted(source, target):
        if after:
            replace(source, target)
        renamed.append(target)
        if len(renamed) == 7:
            raise KeyboardInterrupt
        if not after:
            replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(SystemExit, match="130"):
            evaluate(folders, output, reference_steps=9)
    assert f"interrupted; the same command goes on from what {output} holds" in capsys.readouterr().err
    made = {file: file.stat().st_mtime_ns for file in output.rglob("*.*")}
    assert len(made) == 6 + after and all(file.suffix == ".safetensors" for file in made)
    found = evaluate(folders, output, reference_steps=9)
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert figures_of(found) == figures_of(whole)
    assert {r["scheduler"]: r["calls"] for r in found["results"]} == {
        "ours-flow": 3, "unipc": 3, "heun": 3, "reference": 9
    }  # fmt: skip


def test_images_are_sampled_once(folders, finished, tmp_path, monkeypatch):
    """Found again by a second run, by one with more images and by another extractor; not by one with other noise."""
    output, record = finished
    shutil.copytree(output, tmp_path / "out")
    sampled = []
    plain = Generation._sampled
    monkeypatch.setattr(
        Generation, "_sampled", lambda self, run, i: sampled.append((run.name, i)) or plain(self, run, i)
    )
    again = evaluate(folders, tmp_path / "out", reference_steps=9)
    assert not sampled and again["results"] == record["results"]
    evaluate(folders, tmp_path / "out", num_images=96, schedulers=[], subsets=0)
    assert sampled == [("ours-flow", range(64, 96))]
    sampled.clear()
    monkeypatch.setattr(classifier, "load", lambda: classifier.Classifier())  # other weights
    monkeypatch.setattr(extractors, "weights_digest", lambda network: "f" * 64)
    record = evaluate(folders, tmp_path / "out", reference=str(picture_folder(tmp_path)), schedulers=[], subsets=0)
    assert not sampled and record["extractor_sha256"] == "f" * 64
    assert len(list((tmp_path / "out" / "shards").rglob("*.ffffffff.safetensors"))) == 3 + 3  # real and made
    evaluate(folders, tmp_path / "out", reference=str(tmp_path / "real"), schedulers=[], subsets=0, seed=1)
    assert len(sampled) == 3


def test_the_model_itself_with_several_ends(folders, finished, tmp_path):
    """A run for each, of which the one without is the ordinary one; none is taken for another's."""
    output, record = finished
    shutil.copytree(output, tmp_path / "out")
    ends = evaluate(folders, tmp_path / "out", reference_steps=9, reference_ends=[0, 0.1, 0.4, 0.1])
    found = figures_of(ends)
    names = ["reference", "reference, from 0.1", "reference, from 0.4"]
    assert [name for name, nfe in found if nfe == 9] == names
    assert found["reference", 9] == figures_of(record)["reference", 9]
    assert len({found[name, 9]["frechet_distance"] for name in names}) == 3
    assert {r["calls"] for r in ends["results"] if r["nfe"] == 9} == {9}
    alone = evaluate(folders, tmp_path / "alone", reference_steps=9, reference_ends=[0.4], schedulers=[], solver=[])
    assert figures_of(alone)[names[2], 9] == found[names[2], 9]


def picture_folder(folder):
    """Random pictures, enough of them."""
    (folder / "real").mkdir()
    for k in range(66):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (5, 5, 3), dtype=np.uint8)).save(
            folder / "real" / f"{k}.png"
        )
    return folder / "real"


def test_damaged_files_are_made_anew_with_a_line(folders, finished, tmp_path, capsys):
    output, record = finished
    shutil.copytree(output, tmp_path / "out")
    files = sorted((tmp_path / "out" / "shards").rglob("000032-000063*"))
    images, features = [f for f in files if f.name.count(".") == 1], [f for f in files if f.name.count(".") == 2]
    assert len(images) == len(features) == 4
    for file in features:  # images are looked at where features are not there
        file.unlink()
    images[0].write_bytes(images[0].read_bytes()[:-5])
    data = bytearray(images[1].read_bytes())
    data[-1] ^= 1
    images[1].write_bytes(data)
    again = evaluate(folders, tmp_path / "out", reference_steps=9)
    said = capsys.readouterr().err
    for file in images[:2]:
        assert f"{file} is damaged and made anew: " in said
    assert said.count(" is damaged and made anew") == 2
    assert figures_of(again) == figures_of(record)


def test_pipelines_that_give_no_images_and_schedulers_that_fail_end_in_one_line(folders, tmp_path, monkeypatch, capsys):
    changes = {"schedulers": ["euler"], "solver": []}
    config, generation = settings(folders, tmp_path / "out", **changes), generation_of(folders, tmp_path, **changes)
    [run], frames = generation.runs, [[Image.new("L", (4, 4))] * 2] * 3
    monkeypatch.setattr(
        Sampler, "__call__", lambda *args, plain=Sampler.__call__, **more: (frames, plain(*args, **more))
    )
    with pytest.raises(ValueError, match=r"SiTPipeline gives \(3, 2, 4, 4, 1\) for 3 samples"):
        generation._sampled(run, range(3))

    def breaks(self, *args, **kwargs):
        raise RuntimeError("no such step")

    monkeypatch.setattr(type(run.scheduler), "step", breaks)
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert "euler (uniform) fails at 3 calls: no such step" in line


# --- references -------------------------------------------------------------------------------------------------------


def test_folder_data_set_and_statistics_are_the_same_reference(folders, real_images, tmp_path):
    folder, arrays = real_images
    bytes_of = [file.read_bytes() for file in sorted(folder.rglob("*.png"))]
    rows = {"picture": [{"bytes": b, "path": None} for b in bytes_of]}
    Dataset.from_dict(rows, features=Features({"picture": ImageColumn()})).to_parquet(tmp_path / "real.parquet")
    common = {"solver": [], "schedulers": ["euler"]}
    by_folder = evaluate(folders, tmp_path / "a", reference=str(folder), **common)
    by_set = evaluate(
        folders, tmp_path / "b", reference=str(tmp_path / "real.parquet"), reference_column="picture", **common
    )
    by_file = evaluate(folders, tmp_path / "c", reference=str(tmp_path / "a" / "reference.safetensors"), **common)
    assert by_folder["data"] == {"name": "pictures", "n": 80} == by_file["data"]
    assert by_set["data"] == {"name": "real.parquet", "n": 80}
    assert figures_of(by_folder) == figures_of(by_set) == figures_of(by_file)
    assert not (tmp_path / "c" / "reference.safetensors").exists()
    with torch.no_grad():
        features, _ = classifier.load()(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255)
    tensors, facts = read_tensors(tmp_path / "a" / "reference.safetensors")
    torch.testing.assert_close(tensors["mu"], features.double().mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["sigma"], features.double().T.cov(), rtol=1e-3, atol=1e-5)
    assert facts["n"] == "80" and facts["extractor"] == "fashion-classifier"
    for given in (str(folder), str(tmp_path / "real.parquet")):
        changes = {"reference_column": "picture", "num_reference_images": 66, **common}
        fewer = evaluate(folders, tmp_path / "a", reference=given, **changes)
        assert fewer["data"]["n"] == 66 and figures_of(fewer) != figures_of(by_folder)


def test_as_many_images_as_real_ones_are_compared_one_by_one(folders, real_images, tmp_path):
    sha256 = load_extractor(CLASSIFIER).sha256
    output, changes = tmp_path / "out", {"schedulers": [], "num_images": 90, "subsets": 0}
    [found] = figures_of(evaluate(folders, output, reference=str(real_images[0]), **changes)).values()
    files = [file for file in (output / "shards").rglob("*.safetensors") if file.name.count(".") == 2]
    made = [f for f in files if (f.parent / f.name.replace(f".{sha256[:8]}", "")).exists()]
    assert len(made) == 3
    features = torch.cat([read_tensors(file)[0]["features"] for file in sorted(made)])
    real = read_tensors(output / "reference.safetensors")[0]["features"]
    assert len(features) == 90 and len(real) == 80
    kernel = fid.kernel_distance(features[:80].double().numpy(), real.double().numpy(), num_subsets=1)
    assert found["kernel_distance"] == pytest.approx(kernel, rel=1e-3)


def test_changed_pictures_are_described_anew(folders, tmp_path):
    folder, common = picture_folder(tmp_path), {"schedulers": [], "subsets": 0}
    before = evaluate(folders, tmp_path / "out", reference=str(folder), **common)
    Image.new("RGB", (5, 5), "white").save(folder / "3.png")
    assert figures_of(evaluate(folders, tmp_path / "out", reference=str(folder), **common)) != figures_of(before)


def test_data_set_without_rows_is_refused(folders, tmp_path, capsys):
    file = tmp_path / "none.parquet"
    Dataset.from_dict({"image": []}, features=Features({"image": ImageColumn()})).to_parquet(file)
    config = settings(folders, tmp_path / "out", reference=str(file))
    assert "holds no image" in refused(capsys, lambda: main(["evaluate", *arguments(config)]))


def test_kept_features_are_drawn_from_all_images(monkeypatch):
    monkeypatch.setattr("dssolver_search.images.real_images.KEPT_FEATURES", 20)
    features = torch.arange(100.0)[:, None].repeat(1, 2)
    kept = Statistics.of(features, "x").features[:, 0]
    assert len(kept) == 20 and len(kept.unique()) == 20
    assert kept[:5].max() > 30 and kept.tolist() != sorted(kept.tolist())  # any first ones are from all over
    assert Statistics.of(features, "x").mean[0] == pytest.approx(49.5)


def spoilt_statistics(kind, file):
    good = {"mu": torch.zeros(64), "sigma": torch.eye(64), "features": torch.zeros(12, 64)}
    facts = {"data": "x", "n": "12", "extractor": "other", "extractor_sha256": load_extractor(CLASSIFIER).sha256}
    if kind == "other extractor":
        facts["extractor_sha256"] = "0" * 64
    elif kind == "shapes":
        good["mu"] = torch.zeros(63)
    elif kind == "features":
        good["features"] = torch.zeros(12, 3)
    elif kind == "few":
        good["features"] = torch.zeros(9, 64)
    elif kind == "nan":
        good["sigma"] = good["sigma"] * float("nan")
    elif kind == "no mu":
        del good["mu"]
    elif kind == "no extractor":
        del facts["extractor_sha256"]
    write_tensors(file, good, facts)
    if kind == "damaged":
        file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    "kind, message",
    [
        ("other extractor", "it is of extractor other 00000000, not of fashion-classifier"),
        ("shapes", "its shapes are not those of 64 features"),
        ("features", "its shapes are not those of 64 features"),
        ("few", "the features of 9 images, fewer than 10"),
        ("nan", "not a finite number"),
        ("no mu", "mu"),
        ("no extractor", "extractor_sha256"),
        ("damaged", "cannot be read"),
    ],
)
def test_spoilt_statistics_are_refused(kind, message, folders, tmp_path, capsys):
    file = tmp_path / "reference.safetensors"
    spoilt_statistics(kind, file)
    config = settings(folders, tmp_path / "out", reference=str(file))
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert str(file) in line and message in line and not (tmp_path / "out").exists()
    spoilt_statistics("", file)
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert "the number of reference images is 12, fewer than the 64 features" in line
    assert read_statistics(file, load_extractor(CLASSIFIER)).n == 12


def test_images_that_cannot_be_read_are_named(folders, real_images, tmp_path, capsys):
    shutil.copytree(real_images[0], tmp_path / "pictures")
    broken = tmp_path / "pictures" / "0" / "test-078.png"
    broken.write_bytes(b"no picture")
    config = settings(folders, tmp_path / "out", reference=str(tmp_path / "pictures"))
    assert str(broken) in refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    "content, column, message",
    [
        ('{"image": 3}', "image", "could not be read"),
        ('{"text": "a"}', "image", "column 'image' holds no image"),
        ("", "image", "rows.json"),
        (None, "image", "could not be read"),
    ],
)
def test_data_sets_without_images_end_in_one_line(content, column, message, folders, tmp_path, capsys):
    file = tmp_path / "rows.json"
    if content is not None:
        file.write_text(content)
    config = settings(folders, tmp_path / "out", reference=str(file), reference_column=column)
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert "rows.json" in line and message in line and not (tmp_path / "out").exists()


# --- Inception --------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """In the place of Inception's: 2048 features of an image 299 x 299."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(13)
        self.linear = nn.Linear(3 * 13 * 13, 2048)

    def forward(self, x):
        return self.linear(self.pool(x).flatten(1)).relu()


class StandIn(nn.Module):
    """A network of the interface of clean-fid's file."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.output = Layers(), nn.Linear(2048, 1008)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers(img)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """The folder with a stand-in file, where clean-fid and we look for it."""
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.jit.script(StandIn()).save(str(folder / INCEPTION_FILE))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    digest = hashlib.sha256((folder / INCEPTION_FILE).read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", digest)
    network = cleanfid.features.InceptionV3W
    monkeypatch.setattr(cleanfid.features, "InceptionV3W", lambda path, **kwargs: network(str(folder), download=False))
    return folder


def test_inception_features_are_those_of_clean_fid(inception, real_images):
    folder, arrays = real_images
    extractor = load_extractor("inception")
    assert (extractor.name, extractor.dimension) == ("inception", 2048)
    found = extractor(arrays[:6])
    network = cleanfid.features.build_feature_extractor("clean", torch.device("cpu"), use_dataparallel=False)
    files = sorted(map(str, folder.rglob("*.png")))[:6]
    expected = fid.get_files_features(files, network, num_workers=0, device="cpu", mode="clean", verbose=False)
    np.testing.assert_allclose(found["features"], expected, rtol=1e-5, atol=1e-6)
    weight = StandIn().output.weight.detach()
    torch.testing.assert_close(found["logits"], found["features"] @ weight.T, rtol=1e-4, atol=1e-4)


def test_inception_makes_an_fid(inception, folders, real_images, tmp_path, monkeypatch, capsys):
    """With clean-fid's statistics: what is compared, and its name. The eigenvalues of 2048 features are left to
    `test_fid_is_that_of_clean_fid`."""
    features = load_extractor("inception")(real_images[1][:12])["features"].double()
    stats = tmp_path / "stats.npz"
    np.savez(stats, mu=features.mean(0).numpy(), sigma=np.cov(features.numpy(), rowvar=False))

    class Distance:
        def __init__(self, mean, covariance):
            torch.testing.assert_close(mean, features.mean(0))
            torch.testing.assert_close(covariance, features.T.cov())

        def __call__(self, made):
            return {"frechet_distance": float(made.shape == (10, 2048))}

    monkeypatch.setattr(metrics, "FrechetDistance", Distance)
    changes = {"extractor": "inception", "num_images": 10, "subsets": 0, "allow_few_images": "true", "solver": []}
    record = evaluate(folders, tmp_path / "out", reference=str(stats), schedulers=["euler"], **changes)
    assert record["extractor"] == "inception" and record["data"] == {"name": "stats", "n": None}
    assert record["versions"]["clean-fid"]
    [found] = [r["metrics"] for r in record["results"]]
    assert set(found) == {"frechet_distance", "inception_score"}  # the file has no single features
    assert found["frechet_distance"]["value"] == 1
    text = capsys.readouterr().out
    assert "\nFID\n" in text and "\nInception score\n" in text and "(inception)" not in text


@pytest.mark.slow
def test_fid_is_that_of_clean_fid(inception, folders, real_images, tmp_path):
    """The whole of it, from folders of images: scipy takes the root of a matrix of 2048 x 2048."""
    changes = {"extractor": "inception", "num_images": 10, "subsets": 0, "allow_few_images": "true", "solver": []}
    record = evaluate(folders, tmp_path / "out", reference=str(real_images[0]), schedulers=["euler"], **changes)
    (tmp_path / "made").mkdir()
    shards = [f for f in (tmp_path / "out" / "shards").rglob("*-*.safetensors") if f.name.count(".") == 1]
    images = torch.cat([read_tensors(file)[0]["images"] for file in sorted(shards)])
    for k, image in enumerate(images):
        Image.fromarray(image.numpy()).save(tmp_path / "made" / f"{k}.png")
    expected = fid.compute_fid(
        str(tmp_path / "made"), str(real_images[0]), mode="clean", num_workers=0, device=torch.device("cpu"),
        use_dataparallel=False, verbose=False,
    )  # fmt: skip
    [metrics] = [r["metrics"] for r in record["results"]]
    assert metrics["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-3)


def test_another_inception_file_is_refused(inception, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", "0" * 64)
    config = settings(folders, tmp_path / "out", extractor="inception")
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert f"{inception / INCEPTION_FILE} is not the file that clean-fid uses" in line
    (inception / INCEPTION_FILE).unlink()

    def offline(*args):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert f"could not be fetched (no network); put it at {inception / INCEPTION_FILE}" in line
    assert not (tmp_path / "out").exists()


def test_clean_fid_statistics_are_for_inception_only_and_never_pickled(inception, folders, tmp_path, capsys):
    file = tmp_path / "stats.npz"
    np.savez(file, mu=np.zeros(64), sigma=np.eye(64))
    config = settings(folders, tmp_path / "out", reference=str(file))
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert "of Inception's features, not of fashion-classifier's" in line
    np.savez(file, mu=np.array([os.getcwd], dtype=object), sigma=np.eye(64))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_statistics(file, load_extractor("inception"))


# --- other networks ---------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Gives what it is told to."""

    def __init__(self, gives):
        super().__init__()
        self.gives = gives

    def forward(self, images):
        return self.gives(images)


@pytest.mark.parametrize(
    "given, message",
    [
        ("absent.module:load", "No module named 'absent'"),
        ("dssolver_search.demo.classifier:absent", "absent"),
        ("dssolver_search.demo.classifier:split_of", "missing 2 required"),
        ("builtins:dict", "it returns dict; it must return a torch.nn.Module"),
        ("resnet", "give inception, clip:ID or package.module:factory"),
        ("clip:/absent", "no CLIP model could be loaded from '/absent'"),
    ],
)
def test_extractors_that_cannot_be_used_are_refused(given, message, folders, tmp_path, capsys):
    config = settings(folders, tmp_path / "out", extractor=given)
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert f"extractor {given!r} cannot be used: " in line and message in line and not (tmp_path / "out").exists()


def test_networks_that_give_no_features_are_refused():
    for gives in (lambda x: x, lambda x: x.mean(), lambda x: x.flatten(1).repeat(2, 1)):
        with pytest.raises(ValueError, match=r"it must give features \(images, D\)"):
            extractors.of_network(Broken(gives), "broken")
    extractor = extractors.of_network(Broken(lambda x: x.flatten(1)[:, :3] / (x.sum() == 0)), "broken")
    assert extractor.dimension == 3 and extractor.name == "broken"
    with pytest.raises(ValueError, match="'broken' gives features that are not finite"):
        extractor([np.ones((4, 4, 3), np.uint8)])
    with pytest.raises(ValueError, match="'broken' cannot take images of 4 x 4 and 5 x 4 pixels"):
        extractor([np.ones((4, 4, 3), np.uint8), np.ones((5, 4, 3), np.uint8)])


def test_no_other_network_is_called_inception():
    """Its figures would be shown as FID and KID."""
    network = Broken(lambda x: x.flatten(1))
    network.name = "inception"
    with pytest.raises(ValueError, match="the name inception is that of clean-fid's network"):
        extractors.of_network(network, "mine")


def test_extractor_is_known_by_its_weights():
    torch.manual_seed(0)
    a, b = classifier.Classifier(), classifier.Classifier()
    assert extractors.of_network(a, "").sha256 != extractors.of_network(b, "").sha256
    b.load_state_dict(a.state_dict())
    assert extractors.of_network(a, "").sha256 == extractors.of_network(b, "").sha256


# --- CLIP -------------------------------------------------------------------------------------------------------------


def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[], model_max_length=16)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP model with a processor."""
    folder, words = tmp_path_factory.mktemp("clip"), tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    text = {**small, **ends, "vocab_size": len(words), "max_position_embeddings": 16}
    vision = {**small, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**sizes), words).save_pretrained(folder)
    return folder


def test_clip_scores_are_the_cosines_of_the_model(clip_folder):
    images = [np.random.default_rng(k).integers(0, 255, (20, 18, 3), dtype=np.uint8) for k in range(3)]
    prompts = ["a cat", "two dogs in the rain, and much more than sixteen letters", ""]
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True, max_length=16)
    with torch.no_grad():
        cosines = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    clip = Clip(str(clip_folder))
    torch.testing.assert_close(clip.scores(images, prompts), 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)
    assert cosines.unique().numel() == 3 and (cosines > 0).any()
    opposite = Clip(str(clip_folder))
    opposite.model.visual_projection.weight.data.neg_()
    torch.testing.assert_close(opposite.scores(images, prompts), 100 * cosines.neg().clamp(min=0), rtol=1e-4, atol=1e-4)
    extractor = load_extractor(f"clip:{clip_folder}")
    assert (
        extractor.dimension == 12 and extractor.name == f"clip:{clip_folder.name}" and extractor.sha256 == clip.sha256
    )
    with torch.no_grad():
        embeds = model(**inputs).image_embeds
    torch.testing.assert_close(nn.functional.normalize(extractor(images)["features"]), embeds, rtol=1e-4, atol=1e-5)


def test_text_to_image_gets_a_clip_score(clip_folder, tmp_path):
    words = tokenizer()
    encoder = text_encoder(CLIPTextModel)
    encoder.resize_token_embeddings(len(words))
    words.model_max_length = encoder.config.max_position_embeddings
    parts = {**sd_parts(), "text_encoder": encoder, "tokenizer": words}
    assert encoder.config.hidden_size == TEXT
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\na red house\n")
    argv = {
        "pretrained_model_name_or_path": tmp_path / "sd", "output_dir": tmp_path / "out", "nfe": [2],
        "call": '{"height": 16, "width": 16}', "guidance_scale": 2.0, "prompts_file": tmp_path / "prompts.txt",
        "schedulers": ["euler"], "num_images": 10, "batch_size": 4, "reference": REFERENCE, "extractor": CLASSIFIER,
        "clip": clip_folder, "subsets": 4, "allow_few_images": "true",
    }  # fmt: skip
    main(["evaluate", *arguments(argv)])
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    [result] = record["results"]
    assert record["clip"] == clip_folder.name and result["calls"] == 2
    shards = sorted(f for f in (tmp_path / "out" / "shards").rglob("*.safetensors") if f.name.count(".") == 1)
    images = torch.cat([read_tensors(file)[0]["images"] for file in shards]).numpy()
    prompts = ["a cat", "two dogs", "a red house"]
    scores = Clip(str(clip_folder)).scores(images, [prompts[i % 3] for i in range(10)])
    entry = result["metrics"]["clip_score"]
    assert entry["value"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert entry["interval"][0] < entry["value"] < entry["interval"][1]
    assert f"CLIP score ({clip_folder.name})" in table(record)


def test_clip_score_of_classes_is_refused(clip_folder, folders, tmp_path, capsys):
    config = settings(folders, tmp_path / "out", clip=str(clip_folder))
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert "SiTPipeline takes no prompts; leave out clip" in line and not (tmp_path / "out").exists()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reference": ""}, "reference is missing; give --reference"),
        ({"solver": [], "schedulers": []}, "there is nothing to evaluate"),
        ({"num_images": 9}, "num_images is 9; it must be 10 or more"),
        ({"num_reference_images": 9}, "num_reference_images is 9"),
        ({"subsets": 1}, "subsets is 1; it must be 0, or 2 or more"),
        ({"reference_steps": 1001}, "reference_steps is 1001"),
        ({"reference_ends": [0.1, 0.6]}, "reference_ends is [0.1, 0.6]; it must be numbers from 0 to 0.5"),
        ({"reference_ends": []}, "reference_ends is []; it must be numbers from 0 to 0.5"),
        ({"num_images": 63}, "num_images is 63, fewer than the 64 features of fashion-classifier"),
        ({"num_reference_images": 63, "reference": "pictures"}, "the number of reference images is 63"),
        ({"schedulers": ["leapfrog"]}, "'leapfrog' is unknown"),
        ({"comparison": "absent"}, "comparison 'absent/comparison.json' cannot be read"),
    ],
)
def test_bad_settings_are_refused(changes, message, folders, real_images, tmp_path, capsys):
    changes = {k: str(real_images[0]) if v == "pictures" else v for k, v in changes.items()}
    config = settings(folders, tmp_path / "out", **changes)
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert message in line
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_few_images_are_taken_if_asked_for(folders, tmp_path):
    record = evaluate(folders, tmp_path / "out", num_images=12, allow_few_images="true", schedulers=[])
    assert [r["n"] for r in record["results"]] == [12]


@pytest.mark.parametrize("text", ["", "[]", '{"results": 3}', '{"results": [[]]}', '{"results": [{"scheduler": []}]}'])
def test_spoilt_comparison_is_refused(text, folders, tmp_path, capsys):
    (tmp_path / "comparison.json").write_text(text)
    config = settings(folders, tmp_path / "out", comparison=str(tmp_path))
    line = refused(capsys, lambda: main(["evaluate", *arguments(config)]))
    assert "comparison.json' cannot be read: " in line and not (tmp_path / "out").exists()


# --- the shipped classifier -------------------------------------------------------------------------------------------


def test_shipped_files_belong_together_and_are_small():
    assert sum(file.stat().st_size for file in classifier.FOLDER.iterdir()) < 3e6
    extractor = load_extractor(CLASSIFIER)
    assert (extractor.name, extractor.dimension) == ("fashion-classifier", 64)
    found = read_statistics(classifier.FOLDER / "reference.safetensors", extractor)  # of these very weights
    assert found.n == len(found.features) == 10_000
    torch.testing.assert_close(found.mean, found.features.double().mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.covariance, found.features.double().T.cov(), rtol=1e-2, atol=1e-3)
    facts = json.loads((classifier.FOLDER / "training.json").read_text())
    assert facts["test_accuracy"] >= 0.9
    assert facts["parameters"] == sum(p.numel() for p in classifier.load().parameters())


def test_classifier_takes_colour_and_other_sizes():
    pattern = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    grey, larger = (nn.functional.interpolate(pattern, (n, n), mode="bicubic").clamp(0, 1) for n in (28, 84))
    model = classifier.load()
    features, logits = model(grey)
    assert features.shape == (2, 64) and logits.shape == (2, 10)
    coloured = torch.cat([0.5 * grey, grey, 1.5 * grey], 1)
    torch.testing.assert_close(model(coloured)[0], features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(larger)[0], features, rtol=0.1, atol=0.1)


def test_training_learns_and_writes_what_load_and_evaluate_read(tmp_path):
    """Ten classes of bright rows, told apart after a few epochs."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 100), ("test", 50)):
        labels, images = [k % 10 for k in range(count)], []
        for label in labels:
            array = generator.integers(0, 60, (11, 11), dtype=np.uint8)
            array[label : label + 2] += 150
            images.append(Image.fromarray(array))
        features = Features({"image": ImageColumn(), "label": ClassLabel(names=[str(k) for k in range(10)])})
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(
            tmp_path / "data" / f"{split}.parquet"
        )
    out = tmp_path / "out"
    classifier.main([
        "--dataset_name", str(tmp_path / "data"), "--output_dir", str(out), "--epochs", "16", "--resolution", "11",
        "--train_batch_size", "20", "--learning_rate", "0.01", "--name", "small",
    ])  # fmt: skip
    facts = json.loads((out / "training.json").read_text())
    assert facts["test_accuracy"] > 0.5 and facts["test_images"] == 50
    found = classifier.load(out)
    assert (found.name, found.size, found.channels) == ("small", 11, 1)
    real = read_statistics(out / "reference.safetensors", extractors.of_network(found, "x"))
    assert real.n == 50 and real.name.endswith("data (test)")
    (out / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        classifier.load(out)


def test_open_real_images_and_evaluation_write_nothing(folders, real_images, tmp_path):
    config = EvaluateConfig(**settings(folders, tmp_path / "out", reference=str(real_images[0])))
    images = open_real_images(config, load_extractor(CLASSIFIER))
    assert [len(batch) for batch in images.batches(32)] == [32, 32, 16]
    np.testing.assert_array_equal(next(images.batches(3))[2](), real_images[1][2])
    Evaluation(config)
    assert not (tmp_path / "out").exists()


# --- torchvision for development --------------------------------------------------------------------------------------


def test_child_processes_can_import_torchvision():
    """`make` puts `tests/torchvision_on_cpu.py` into the environment, where torch is for the CPU it is needed."""
    subprocess.run([sys.executable, "-c", "import torchvision"], check=True)
    [source] = Path(__file__).parents[1].rglob("torchvision_on_cpu.py")
    installed = Path(sysconfig.get_paths()["purelib"]) / source.name
    assert not installed.exists() or installed.read_text() == source.read_text()
