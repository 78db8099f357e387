"""Converted checkpoints against the official code: its outputs on small random networks (`data/golden_sit.safetensors`,
`data/golden_dit.safetensors`; what was run is in `data/README.md`), in float64."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models import embeddings
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_dssolver import DSSolverScheduler, FlowDCNTransformer2DModel, OfficialDiTTransformer2DModel
from diffusers_dssolver.pipelines import SiTPipeline
from diffusers_dssolver.published import published_config
from dssolver_search.checkpoints import convert, sit_dit
from dssolver_search.checkpoints.weights import check_keys, read, weights
from dssolver_search.cli import main

DATA = Path(__file__).parents[1] / "data"
GOLDEN = {kind: load_file(DATA / f"golden_{kind}.safetensors") for kind in ("sit", "dit")}
STATE = {k: {n.removeprefix("state."): t for n, t in g.items() if n.startswith("state.")} for k, g in GOLDEN.items()}
NULL, HEADS = 10, 3
MAKE = {"sit": convert.sit, "dit": convert.dit}


def time_features(timesteps, count, flip_sin_to_cos=True, downscale_freq_shift=0):
    """`get_timestep_embedding` of diffusers in float64."""
    i = torch.arange(count // 2, dtype=torch.float64)
    phase = timesteps.double()[:, None] * 10000 ** (-i / (count // 2 - downscale_freq_shift))
    assert flip_sin_to_cos
    return torch.cat([phase.cos(), phase.sin()], dim=1)


@pytest.fixture
def exact_times(monkeypatch):
    """Networks whose time features are float64, as all else in them. Those of diffusers are float32 in any network: at
    t = 999 the rounding of one frequency turns its phase by up to 1e-4, differently on different processors."""
    monkeypatch.setattr(
        embeddings,
        "get_timestep_embedding",
        lambda *args, **kwargs: time_features(
            *args, **{key: kwargs[key] for key in ("flip_sin_to_cos", "downscale_freq_shift")}
        ),
    )


def in_float64(model, scheduler):
    return model.double(), scheduler


@pytest.fixture(scope="module")
def converted():
    """Transformer and scheduler of either golden network, in float64."""
    return {kind: in_float64(*make(STATE[kind], HEADS)) for kind, make in MAKE.items()}


@pytest.fixture
def made(converted, exact_times):
    """The same with exact times."""
    return converted


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Folder of a tiny one."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **blocks)
    folder = tmp_path_factory.mktemp("models") / "vae"
    model.save_pretrained(folder)
    return folder


def words(kind, checkpoint, vae, *more, out="out"):
    return [
        "convert", "--type", kind, "--checkpoint", str(checkpoint), "--vae", str(vae), "--output_dir", str(out), *more,
    ]  # fmt: skip


def checkpoint(folder, kind="sit", state=None, name="model.pt"):
    file = folder / name
    torch.save(STATE[kind] if state is None else state, file)
    return file


@torch.no_grad()
def call(model, x, t, y):
    return model(x, timestep=t, class_labels=y).sample


def close(found, wanted):
    """To 1e-6 of the largest element. Converted weights of SiT are rounded to float32, the map of its times is exact to
    3e-8, and diffusers' Euler rounds states to float32: each 6e-8 or less, which together made 6e-8 where measured."""
    assert found.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))


# --- the same numbers as the official code ----------------------------------------------------------------------------


def in_diffusers(kind):
    """Times of the golden calls as diffusers feeds them, and the sign of the outputs."""
    return (1000 * (1 - GOLDEN["sit"]["t"]), -1) if kind == "sit" else (GOLDEN["dit"]["t"], 1)


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_outputs_are_the_official_ones(made, kind):
    model, golden, (t, sign) = made[kind][0], GOLDEN[kind], in_diffusers(kind)
    for labels, wanted in ((golden["y"], golden["out"]), (torch.full_like(golden["y"], NULL), golden["out_null"])):
        found = call(model, golden["x"], t, labels)
        assert found.shape[1] == 8  # with the learned sigma, which the official SiT drops
        close(sign * found[:, : wanted.shape[1]], wanted)
    assert not torch.allclose(golden["out"], golden["out_null"], atol=0.1)


def test_diffusers_own_class_is_another_network(made):
    """Why there is a class for DiT: with diffusers' frequencies the same weights give other outputs at t = 999, further
    away than their standard deviation, and the same at t = 0."""
    model, golden = made["dit"][0], GOLDEN["dit"]
    plain = DiTTransformer2DModel.from_config(model.config).double().eval()
    plain.load_state_dict(model.state_dict())
    error = (call(plain, golden["x"], golden["t"], golden["y"]) - golden["out"]).flatten(1)
    assert golden["t"][0] == 999 and error[0].square().mean().sqrt() > golden["out"].std() and error[0].abs().max() > 1
    assert golden["t"][3] == 0 and error[3].abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_official_guidance_is_of_three_channels(made, kind):
    model, golden, (t, sign) = made[kind][0], GOLDEN[kind], in_diffusers(kind)
    x, y, t, wanted = golden["x"][:2], golden["y"][:2], t[1:2].repeat(2), golden["cfg"]
    with_class, without = (sign * call(model, x, t, labels) for labels in (y, torch.full_like(y, NULL)))
    guided = without + 3 * (with_class - without)
    close(guided[:, :3], wanted[:, :3])
    close(with_class[:, 3 : wanted.shape[1]], wanted[:, 3:])
    assert (guided[:, 3] - wanted[:, 3]).abs().max() > 0.1  # what diffusers' DiTPipeline does


def test_sit_pipeline_goes_the_way_of_sit_sampling(made):
    """4 Euler steps of the official sampler, guided: time and sign as they are there, every state."""
    golden, states = GOLDEN["sit"], []
    pipe = SiTPipeline(*made["sit"])
    pipe.set_progress_bar_config(disable=True)
    pipe(
        golden["y"][:2].tolist(), guidance_scale=3.0, guidance_channels=3, num_inference_steps=4, output_type="latent",
        latents=golden["x"][:2], callback_on_step_end=lambda *a: states.append(a[3]["latents"]) or {},
    )  # fmt: skip
    assert len(golden["sampled"]) == 1 + len(states) == 5
    for found, wanted in zip(states, golden["sampled"][1:], strict=True):
        close(found, wanted)


def test_dit_goes_the_way_of_dit_sampling(made):
    """5 steps of the official DDIM, guided on three channels; noise levels in float64 as there."""
    golden, (model, scheduler) = GOLDEN["dit"], made["dit"]
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    pipe = SiTPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        golden["y"][:2].tolist(), guidance_scale=3.0, guidance_channels=3, num_inference_steps=5, output_type="latent",
        latents=golden["x"][:2],
    ).images  # fmt: skip
    close(found, golden["sampled"])


def test_euler_with_a_converted_sit_is_euler_in_its_own_convention(made):
    """t from 0 to 1 in uneven steps and data - noise, by hand, against sigma from 1 to 0 and noise - data."""
    model, scheduler = made["sit"]
    times, labels, own = [0.0, 0.1, 0.45, 0.8, 1.0], torch.tensor([2, 5]), GOLDEN["sit"]["x"][2:]
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(sigmas=[1 - t for t in times[:-1]])
    x = own
    for t, after, step in zip(times[:-1], times[1:], scheduler.timesteps, strict=True):
        data_minus_noise = -call(model, own, torch.full((2,), 1000 * (1 - t), dtype=torch.float64), labels)[:, :4]
        own = own + (after - t) * data_minus_noise
        x = scheduler.step(call(model, x, step.expand(2), labels)[:, :4], step, x).prev_sample
        close(x, own)


def test_time_map_is_exact_between_its_points_too():
    sigma = torch.rand(4000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    to_sit = sit_dit.time_map()
    found = time_features(1000 * sigma, 256, downscale_freq_shift=1) @ to_sit[:-1] + to_sit[-1]
    assert (found - time_features(1 - sigma, 256)).abs().max() < 1e-7
    assert torch.linalg.matrix_norm(to_sit, 2) < 2  # so that rounding, of bfloat16 too, does not grow


@pytest.mark.parametrize("shift", [0, 1])
def test_time_features_of_diffusers_are_those_of_float64_but_for_their_rounding(shift):
    """f = exp(-x) in float32: x is rounded twice and f three times, each by 2^-24, and so is the product t f, so that
    the phase is off by 2^-24 (2 x + 3) t f, and what comes of it by another 2^-24."""
    times = torch.rand(1000, generator=torch.Generator().manual_seed(3)) * 999
    found = embeddings.get_timestep_embedding(times, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    x = math.log(10000) * torch.arange(128, dtype=torch.float64) / (128 - shift)
    bound = 2**-24 * ((2 * x + 3) * torch.exp(-x) * times[:, None] + 1).repeat(1, 2)
    assert ((found - time_features(times, 256, downscale_freq_shift=shift)).abs() <= bound).all()


def test_only_the_velocity_changes_its_sign():
    state = sit_dit.in_diffusers_convention(weights(STATE["sit"], "x"), 4, 8)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        found, wanted = (s[key].float().unflatten(0, (4, 8)) for s in (state, STATE["sit"]))
        assert torch.equal(found[:, :4], -wanted[:, :4]) and torch.equal(found[:, 4:], wanted[:, 4:])


def test_a_published_solver_takes_a_converted_sit(made):
    """Its 5 steps in the paper's convention by hand: x += dt sum_j c_ij v_j, v = data - noise."""
    model, scheduler = made["sit"]
    table, labels = published_config("sit-xl-2-256")["solvers"]["5"], GOLDEN["sit"]["y"][:2]
    x, velocities = GOLDEN["sit"]["x"][:2], []
    for i, row in enumerate(table["coefficients"]):
        time = torch.full((2,), 1000 * table["nodes"][i], dtype=torch.float32)  # as schedulers give it to pipelines
        velocities.append(-call(model, x, time, labels)[:, :4])
        mean = sum(c * v for c, v in zip(row, velocities, strict=False))
        x = x + (table["nodes"][i] - table["nodes"][i + 1]) * mean
    chosen = DSSolverScheduler.from_config(scheduler.config)  # the published solver that fits
    assert "5" in chosen.config["solvers"]
    pipe = SiTPipeline(model, DSSolverScheduler.from_published("sit-xl-2-256"))
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent"}
    close(pipe(labels.tolist(), latents=GOLDEN["sit"]["x"][:2], **arguments).images, x)


# --- sizes ------------------------------------------------------------------------------------------------------------

SIZES = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}


def official(width, depth, patch, latent):
    """Weights of an official size on the meta device: those of the golden network, its every length told by its value
    there (width 48, 16 tokens, 11 classes, 4 * 8 outputs)."""
    lengths = {48 * k: width * k for k in (1, 2, 3, 4, 6)}
    lengths |= {11: 1001, 16: (latent // patch) ** 2, 32: 8 * patch**2, 2: patch}
    state = {}
    for name, tensor in STATE["sit"].items():
        for i in range(depth) if name.startswith("blocks.0.") else [0]:
            if not name.startswith("blocks.1."):
                shape = [lengths.get(n, n) for n in tensor.shape]
                state[name.replace("blocks.0.", f"blocks.{i}.")] = torch.empty(shape, device="meta")
    return state


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_official_sizes(size, patch):
    width, depth, heads, millions = SIZES[size]
    latent = 32 if patch != 4 else 64
    state = official(width, depth, patch, latent)
    if patch == 2:  # Table 1 of DiT and of SiT
        assert sum(t.numel() for t in state.values()) / 1e6 == pytest.approx(millions, abs=0.8)
    sizes = sit_dit.architecture(state, "x")
    assert sizes == {
        "num_attention_heads": heads, "attention_head_dim": width // heads, "num_layers": depth, "in_channels": 4,
        "out_channels": 8, "patch_size": patch, "sample_size": latent, "num_embeds_ada_norm": 1000, "norm_eps": 1e-6,
    }  # fmt: skip
    with init_empty_weights():
        model = OfficialDiTTransformer2DModel(**sizes)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in sit_dit.diffusers_state(state).items()} == wanted


# --- the command ------------------------------------------------------------------------------------------------------


def test_sit_on_the_command_line(made, vae, tmp_path, capsys):
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"1": "goldfish, Carassius auratus", "7": "cock"}))
    file = tmp_path / "sit.safetensors"
    save_file(STATE["sit"], file)
    out = tmp_path / "new" / "sit"
    main(words("sit", file, vae, "--num_heads", "3", "--id2label", str(labels), out=out))
    told = capsys.readouterr().out
    assert "SiTPipeline.from_pretrained" in told and "10 classes" in told
    pipe = SiTPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.transformer) is DiTTransformer2DModel  # of diffusers: any program loads it
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    wanted = made["sit"][0].state_dict()
    assert pipe.transformer.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in pipe.transformer.state_dict().items())
    expected = AutoencoderKL.from_pretrained(vae).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.vae.state_dict().items())
    assert pipe.get_label_ids(["cock", "goldfish"]) == [7, 1]
    assert pipe([7], num_inference_steps=1).images[0].size == (16, 16)
    assert [p.name for p in out.parent.iterdir()] == ["sit"]
    for written in out.rglob("*.json"):
        assert str(tmp_path) not in written.read_text() and str(vae) not in written.read_text()


def test_dit_on_the_command_line(vae, tmp_path, capsys):
    """1000 classes: diffusers' own pipeline, after no more than `import diffusers_dssolver`. Others: SiTPipeline."""
    generator = torch.Generator().manual_seed(4)
    thousand = torch.randn(1001, 48, generator=generator)
    state = {**STATE["dit"], sit_dit.CLASSES: thousand}
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"999": "toilet tissue, bathroom tissue"}))
    folder = tmp_path / "dit"
    folder.mkdir()  # empty: may be filled
    file = checkpoint(tmp_path, state=state)
    main(words("dit", file, vae, "--num_heads", "3", "--id2label", str(labels), out=folder))
    assert "DiTPipeline.from_pretrained" in capsys.readouterr().out
    library, name = json.loads((folder / "model_index.json").read_text())["transformer"]
    assert library == "diffusers_dssolver"  # all that a program imports to load it
    assert getattr(importlib.import_module(library), name) is OfficialDiTTransformer2DModel
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.transformer) is OfficialDiTTransformer2DModel
    wanted = convert.dit(state, 3)[0].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in pipe.transformer.state_dict().items())
    labels = pipe.get_label_ids(["bathroom tissue"])
    assert labels == [999] and pipe(labels, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    chosen = DSSolverScheduler.from_config(pipe.scheduler.config)
    assert chosen.config["solvers"] == published_config("dit-xl-2-256")["solvers"]
    assert isinstance(pipe.scheduler, DDIMScheduler) and not pipe.scheduler.config.clip_sample

    main(words("dit", checkpoint(tmp_path, "dit"), vae, "--num_heads", "3", out=tmp_path / "ten"))
    assert "SiTPipeline.from_pretrained" in capsys.readouterr().out
    assert SiTPipeline.from_pretrained(tmp_path / "ten").transformer.config.num_embeds_ada_norm == 10


def test_flowdcn_on_the_command_line(vae, tmp_path):
    golden = load_file(DATA / "golden_flowdcn.safetensors")
    state = {n.removeprefix("state."): t for n, t in golden.items() if n.startswith("state.")}
    file = checkpoint(tmp_path, state={"state_dict": {f"denoiser.{name}": tensor for name, tensor in state.items()}})
    main(words("flowdcn", file, vae, "--sample_size", "8", out=tmp_path / "flowdcn"))
    pipe = SiTPipeline.from_pretrained(tmp_path / "flowdcn")
    assert type(pipe.transformer) is FlowDCNTransformer2DModel and pipe.transformer.config.sample_size == 8
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    wanted = convert.flowdcn({"state_dict": {f"denoiser.{n}": t for n, t in state.items()}})[0].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in pipe.transformer.state_dict().items())


class Other(nn.Module):
    """Anything that is no tensor and no plain data."""


class Evil:
    ran = False

    def __reduce__(self):
        return _run, ()


def _run():
    Evil.ran = True
    return {}


def training():
    """What the official train.py saves."""
    moved = {name: tensor + (name != "pos_embed") for name, tensor in STATE["sit"].items()}
    args = argparse.Namespace(path_type="Linear", prediction="velocity", lr=1e-4)
    return {"model": moved, "ema": STATE["sit"], "opt": {"state": {}, "param_groups": []}, "args": args}


def test_the_average_of_a_training_run_is_taken(made, tmp_path):
    model, _ = convert.sit(read(checkpoint(tmp_path, state=training())), HEADS)
    wanted = made["sit"][0].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    only = {key: value for key, value in training().items() if key != "ema"}
    other, _ = convert.sit(read(checkpoint(tmp_path, state=only)), HEADS)
    assert not torch.equal(other.proj_out_1.bias, model.proj_out_1.bias)


def test_other_paths_and_predictions_are_refused():
    for changes in ({"path_type": "GVP"}, {"prediction": "score"}):
        args = argparse.Namespace(**{"path_type": "Linear", "prediction": "velocity", **changes})
        with pytest.raises(
            ValueError, match=f"was trained with {next(iter(changes))} '{next(iter(changes.values()))}'"
        ):
            convert.sit(training() | {"args": args}, HEADS)


def changed(**tensors):
    """The golden state with some tensors replaced (dots written as __); None leaves one out."""
    state = {**STATE["sit"], **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    "state, told",
    [
        (changed(pos_embed=None), "1 missing ('pos_embed')"),
        (changed(extra=torch.ones(1)), "1 unexpected ('extra')"),
        ({"a": torch.ones(1)}, "missing ('blocks.0.adaLN_modulation.1.bias', "),
        ({}, "missing"),
        (changed(blocks__1__mlp__fc1__bias=torch.ones(3)), "blocks.1.mlp.fc1.bias of shape (3,)"),
        (changed(x_embedder__proj__weight=torch.ones(())), "x_embedder.proj.weight of shape ()"),
        (changed(pos_embed=torch.ones(1, 15, 48)), "15 positions"),
        (changed(pos_embed=torch.ones(1, 16, 48)), "pos_embed that is not the fixed table"),
        (
            changed(final_layer__linear__weight=torch.ones(48, 48), final_layer__linear__bias=torch.ones(48)),
            "gives 48 numbers for each patch of 2x2x4",
        ),
        (changed(pos_embed=torch.full((1, 16, 48), torch.nan)), "no finite floats under 'pos_embed'"),
        (changed(pos_embed=[1.0]), "no finite floats under 'pos_embed'"),
        ({"ema": 3}, "holds a int as its weights"),
        ([1], "holds a list"),
    ],
)
def test_wrong_weights_are_named_in_one_line(state, told, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = checkpoint(tmp_path, state=state)
    with pytest.raises(SystemExit) as stop:
        main(words("sit", file, vae, "--num_heads", "3"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1 and len(error) < 700
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "more, told",
    [
        ([], "has width 48, which is no official size; give its --num_heads"),
        (["--num_heads", "5"], "num_heads is 5; it must divide the width 48"),
        (["--num_heads", "0"], "num_heads is 0; it must be 1 or more"),
        (["--sample_size", "8"], "sample_size is for type flowdcn; leave it out"),
        (["--num_heads", "3", "--type", "flowdcn"], "num_heads is for type sit and dit; leave it out"),
        (["--type", "flowdcn"], "the FlowDCN checkpoint has other keys than it should"),
        (["--type", "uvit"], "type is 'uvit'; it must be sit or dit or flowdcn"),
        (["--num_heads", "3", "--output_dir", "full"], "full is there and not empty"),
        (["--num_heads", "3", "--output_dir", "model.pt"], "model.pt is there and not empty"),
        (["--num_heads", "3", "--vae", "none"], "no AutoencoderKL could be loaded from 'none'"),
        (["--num_heads", "3", "--vae", ""], "vae is missing; give --vae"),
        (["--num_heads", "3", "--checkpoint", "none.pt"], "checkpoint 'none.pt' could not be read"),
        (["--num_heads", "3", "--checkpoint", "text.pt"], "checkpoint 'text.pt' is damaged"),
        (["--num_heads", "3", "--checkpoint", "text.safetensors"], "checkpoint 'text.safetensors' could not be read"),
        (["--num_heads", "3", "--id2label", "text.pt"], "id2label 'text.pt' could not be read"),
        (["--num_heads", "3", "--id2label", "labels.json"], "id2label 'labels.json' has the key '10'; use class ids"),
        (["--num_heads", "3", "--id2label", "list.json"], "id2label 'list.json' is no JSON object"),
    ],
)
def test_bad_words_write_nothing(more, told, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path)
    (tmp_path / "full").mkdir()
    for name, text in {
        "full/mine.txt": "mine", "text.pt": "no weights", "text.safetensors": "no weights",
        "labels.json": '{"9": "a", "10": "b"}', "list.json": '["a"]',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(words("sit", "model.pt", vae, *more))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_vae_of_other_channels_is_refused(vae, tmp_path, monkeypatch, capsys):
    config = AutoencoderKL.load_config(vae) | {"latent_channels": 8}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "eight")
    with pytest.raises(SystemExit):
        main(words("sit", checkpoint(tmp_path), tmp_path / "eight", "--num_heads", "3", out=tmp_path / "out"))
    assert "makes latents of 8 channels, the checkpoint takes 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("evil", [Evil(), Other()], ids=["code", "module"])
def test_code_in_a_checkpoint_is_not_run(evil, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path, state={**training(), "args": evil})
    with pytest.raises(SystemExit):
        main(words("sit", "model.pt", vae, "--num_heads", "3"))
    error = capsys.readouterr().err
    assert "holds more than weights and plain data" in error and error.count("\n") == 1
    assert not Evil.ran and [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_failure_half_way_leaves_nothing(vae, tmp_path, monkeypatch):
    def half(pipe, folder):
        folder.mkdir()
        (folder / "model_index.json").write_text("{")
        raise OSError("no space left on device")

    monkeypatch.setattr(SiTPipeline, "save_pretrained", half)
    with pytest.raises(OSError, match="no space left"):
        main(words("sit", checkpoint(tmp_path), vae, "--num_heads", "3", out=tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_wrong_keys_are_listed_not_dumped():
    told = (
        "the checkpoint has other keys than it should: 2 missing ('a', 'b'), "
        "40 unexpected ('new0', 'new1', 'new10', 'new11', 'new12', ...)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        check_keys({f"new{i}" for i in range(40)}, {"a", "b"}, "the checkpoint")
    check_keys(["a"], {"a"}, "x")
