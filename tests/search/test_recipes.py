"""Every search recipe, run: through the command, on the pipeline's own class with tiny random networks, and the result
through that pipeline. `python tests/test_recipes.py` writes the costs in the recipes' headers anew."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers as d
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.models import FlowDCNTransformer2DModel
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.cli import COMMANDS, main, named
from dssolver_search.pipeline import model as model_module
from dssolver_search.pipeline.loading import freeze
from dssolver_search.pipeline.prompts import PROMPT, prompts_of
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.settings import SearchConfig, parse
from tests.bench import cost_model
from tests.families import make_pipe
from tests.pipelines import zoo
from tests.searches import arguments

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*", "ignore:.*FluxPosEmbed.*:FutureWarning")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "search" / "recipes"
NAMES = sorted(f.stem for f in FOLDER.glob("*.toml") if "compare" not in f.stem)
PEAKS = {"float32": 67, "bfloat16": cost_model.PEAK}  # TFLOP/s of an H100
SIZES = ("height", "width", "num_frames")  # of a tiny pipeline those of the zoo take the place of a recipe's
NFE = 3
TINY = {
    "nfe": NFE, "fill_nfe": [], "trials": 2, "starts": 1, "polish": 1, "teacher_steps": 6, "num_train_samples": 2,
    "num_trial_samples": 1, "num_validation_samples": 1, "num_prompts": 4, "batch_size": 2,
}  # fmt: skip


class System(NamedTuple):
    """make: the tiny pipeline; arguments: of the zoo, where it takes prompts; guided: evaluations of a guided call;
    calls: of the network a step; tflops: of one evaluation of the real network, counted (`test_flops`)."""

    make: Callable[[], Any]
    arguments: Callable[..., dict[str, Any]] | None = None
    guided: int = 2
    calls: int = 1
    tflops: float | None = None


def make_sit():
    parts = zoo.make_dit().components
    return SiTPipeline(parts["transformer"], d.FlowMatchEulerDiscreteScheduler(), parts["vae"])


def make_flowdcn():
    network = zoo.scaled(
        lambda: FlowDCNTransformer2DModel(
            sample_size=8, out_channels=8, hidden_size=16, num_layers=1, num_groups=2, num_embeds_ada_norm=10
        )
    )
    return SiTPipeline(network, d.FlowMatchEulerDiscreteScheduler(), zoo.make_vae())


def make_ti2v():
    return d.WanPipeline(**zoo.videos.wan_parts(), expand_timesteps=True)


def make_a14b():
    parts = zoo.videos.wan_parts()
    torch.manual_seed(1)
    other = type(parts["transformer"]).from_config(parts["transformer"].config)
    return d.WanPipeline(**parts, transformer_2=zoo.scaled(lambda: other, seed=2), boundary_ratio=0.875)


def of_zoo(name, guided=2, **others):
    entry = zoo.ZOO[name]
    return System(entry.make, entry.arguments, guided, entry.calls, **others)


SYSTEMS = {
    "all-steps": System(lambda: make_pipe("flow")),
    "demo": System(lambda: make_pipe("flow")),
    "sit-xl-2-256": System(make_sit, tflops=0.237),
    "flowdcn-b-2-256": System(make_flowdcn, tflops=0.0384),
    "dit-xl-2-256": System(zoo.make_dit, tflops=0.237),
    "dit-xl-2-512": System(zoo.make_dit, tflops=1.05),
    "pixart-alpha": System(
        lambda: d.PixArtAlphaPipeline(**zoo.betas.make_pixart().components), zoo.betas.pixart_arguments, tflops=1.24
    ),
    "pixart-sigma": of_zoo("PixArt-Sigma", tflops=6.63),
    "sd1.5": of_zoo("Stable Diffusion", tflops=0.803),
    "sdxl": of_zoo("SDXL", tflops=6.76),
    "sd3.5-medium": of_zoo("Stable Diffusion 3", tflops=11.2),
    "flux.1-dev": of_zoo("FLUX", guided=1, tflops=74.4),
    "sana": of_zoo("Sana", tflops=2.97),
    "qwen-image": of_zoo("Qwen-Image", tflops=132.0),
    "wan2.2-t2v": System(make_ti2v, zoo.videos.wan_arguments, calls=2, tflops=517.0),
    "ltx-video": of_zoo("LTX", tflops=34.1),
}
recipes = pytest.mark.parametrize("name", NAMES)
cases = pytest.mark.parametrize("name", [*NAMES, "wan2.2-t2v, two networks"])


# --- headers ----------------------------------------------------------------------------------------------------------


def header(name):
    lines = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("#")]


def commands(name):
    """The commands of a header, as words, each without what stands before `dssolver_search`."""
    text = "\n".join(line.removeprefix("#").strip() for line in header(name)).replace("\\\n", " ")
    return [
        shlex.split(line.split("-m dssolver_search ")[1]) for line in text.splitlines() if "dssolver_search" in line
    ]


def read(name, *more):
    [words] = [words for words in commands(name) if words[0] == "search"]
    return parse(SearchConfig, [*words[1:], *more], "search")


def evaluations(config, guided, gpus=1):
    """Of a whole search, those of the counts between its tables included."""
    works, nfe = cost_model.search(config), set(config.nfe)
    tables = nfe | {n for first in config.fill_nfe[:1] for n in range(first, config.fill_nfe[1] + 1)}
    gaps = [n for n in range(min(tables), max(tables)) if n not in tables]
    chosen = [gaps[i] for i in sorted({round(k * (len(gaps) - 1) / 3) for k in range(4)})] if gaps else []
    works = [*works, *(("between", config.num_validation_samples, 2 * n) for n in chosen)]
    return guided * cost_model.busiest(works, gpus)


def cost(name, config):
    """The lines that a header has of it."""
    system = SYSTEMS[name]
    first = f"# Cost: {evaluations(config, system.guided):,} evaluations by formula"
    if system.tflops is None:
        return [f"{first}."]
    peak, share = PEAKS[config.dtype], cost_model.UTILISATION
    seconds = system.tflops / (share * peak)
    hours = [evaluations(config, system.guided, gpus) * seconds / 3600 for gpus in (1, 8)]
    times = [f"{h:.2g} h" if h >= 1 else f"{60 * h:.2g} min" for h in hours]
    at = f"{share:.0%} of {peak:g} TFLOP/s ({config.dtype})"
    return [
        f"{first}, of {system.tflops:g} TFLOPs, counted;",
        f"#   estimated {times[0]} on one H100, {times[1]} on eight, at {at}.",
    ]


@recipes
def test_the_header_says_what_it_takes(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines, config = header(name), read(name)
    for label in ("Hardware", "Cost", "Result"):
        assert sum(line.startswith(f"# {label}: ") for line in lines) == 1
    at = next(i for i, line in enumerate(lines) if line.startswith("# Cost: "))
    wanted = cost(name, config)
    assert lines[at : at + len(wanted)] == wanted, f"python {Path(__file__).name} writes it anew"
    assert max(map(len, lines)) <= 120
    for words in commands(name):
        parse(named(COMMANDS[words[0]][0]), words[1:], words[0])
    made = [words[words.index("--output_dir") + 1] for words in commands(name) if words[0] == "convert"]
    assert made in ([], [config.pretrained_model_name_or_path])


def test_every_recipe_has_a_tiny_pipeline():
    assert sorted(SYSTEMS) == NAMES


# --- runs -------------------------------------------------------------------------------------------------------------


def embedding(pipe, arguments_of):
    """The pipeline with embeddings of the zoo in the place of each text's, by its checksum: it has no text encoder."""
    encode = pipe.encode_prompt
    signature = inspect.signature(encode)

    def embedded(*args, **kwargs):
        given = dict(signature.bind(*args, **kwargs).arguments)
        texts = given["prompt"]
        made = arguments_of(pipe, [zlib.crc32(text.encode()) % 1000 for text in texts])
        given |= {key: None for key in given if PROMPT.fullmatch(key)}
        given |= {key: made[key] for key in signature.parameters if key not in SIZES and key in made}
        return encode(**given)

    pipe.encode_prompt = embedded
    return pipe


def tiny(system, dtype):
    pipe = freeze(system.make()).to(getattr(torch, dtype))
    return embedding(pipe, system.arguments) if system.arguments else pipe


@cases
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, two = name.split(",")[0], "two" in name
    system = SYSTEMS[name]._replace(make=make_a14b) if two else SYSTEMS[name]
    more = words_of_the_other_network() if two else []
    recipe = read(name, *more)
    pipe = tiny(system, "float32" if recipe.dtype == "auto" else recipe.dtype)
    accepted = inspect.signature(pipe.__call__).parameters
    assert set(recipe.call_arguments) <= set(accepted)
    known = system.arguments(pipe, [0]) if system.arguments else {}
    call = recipe.call | {key: known[key] for key in SIZES if key in recipe.call}
    call |= {key: False for key in ("use_resolution_binning",) if key in known}  # a tiny size is in no bin
    options = {**TINY, "output_dir": tmp_path / "out", "call": json.dumps(call)}
    assert ("prompt" in accepted) == (recipe.prompts_dataset is not None)
    if recipe.prompts_dataset:
        file = tmp_path / "prompts.csv"
        file.write_text(f"number,{recipe.prompts_column}\n1,a cat\n2,a dog\n3,a bird\n", encoding="utf-8")
        options["prompts_dataset"] = file
    loaded = []
    monkeypatch.setattr(model_module, "load_pipeline", lambda *args: loaded.append(args) or pipe)
    more += arguments(options)
    [command] = [words for words in commands(name) if words[0] == "search"]
    main([*command, *more])
    assert loaded[0][:2] == (recipe.pretrained_model_name_or_path, recipe.dtype)
    settings = read(name, *more)
    scheduler = DSSolverScheduler.from_pretrained(tmp_path / "out")
    assert scheduler.tables == (NFE,)
    found = sampled(pipe, settings, scheduler, system)
    plain = sampled(pipe, settings, DSSolverScheduler.from_config(pipe.scheduler.config, solvers="classical"), system)
    assert found.isfinite().all() and found.shape == plain.shape
    state = json.loads((tmp_path / "out" / "search_state.json").read_text())
    refused = state["solvers"][str(NFE)].get("source") == "classical"  # by the last check
    assert refused or (found - plain).abs().max() > 1e-3
    mse = {stage["stage"]: stage["validation_mse"] for stage in state["solvers"][str(NFE)]["stages"]}
    kept = mse["polish"] != mse["closed_form"]  # one that arrived nowhere is not run again
    spared = 0 if kept else system.guided * NFE * settings.num_train_samples
    assert state["network_evaluations"] == evaluations(settings, system.guided) - spared


def words_of_the_other_network():
    """What a header's last lines put in the place of its model."""
    lines = [line.removeprefix("#").strip().removesuffix("\\") for line in header("wan2.2-t2v")]
    at = next(i for i, line in enumerate(lines) if line.startswith("--pretrained_model_name_or_path"))
    return shlex.split(" ".join(lines[at : at + 2]))


def sampled(pipe, config, scheduler, system):
    """Final states (2, ...) of an ordinary call at the searched count, which takes so many network calls."""
    sampler, states = Sampler(pipe, config.call_arguments, prompts_of(config)), []
    step = scheduler.step
    scheduler.step = lambda *args, **kwargs: states.append(step(*args, **kwargs)) or states[-1]
    with sampler.using(scheduler), torch.no_grad():
        sampler([0, 1], "test", NFE, output_type="latent" if isinstance(pipe, SiTPipeline) else "np")
    assert len(states) == NFE
    assert (sampler.network_calls, sampler.network_evaluations) == (NFE * system.calls, 2 * NFE * system.guided)
    return states[-1][0].float()


# --- costs ------------------------------------------------------------------------------------------------------------


def real(name, call):
    """The network as it is published and the arguments of one evaluation; to be made on the meta device."""
    height, width, frames = (call.get(key, 1) for key in SIZES)
    t = one = torch.ones(1, dtype=torch.long)

    def text(tokens, channels, key="encoder_hidden_states"):
        return {"timestep": t, key: torch.zeros(1, tokens, channels)}

    def image(channels, by, key="hidden_states"):
        return {key: torch.zeros(1, channels, height // by, width // by)}

    def video(channels, by, every):
        return {"hidden_states": torch.zeros(1, channels, (frames - 1) // every + 1, height // by, width // by)}

    def tokens(channels, by, count=1):
        return {"hidden_states": torch.zeros(1, count * (height // by) * (width // by), channels)}

    if name.startswith("dit") or name == "sit-xl-2-256":
        size = int(name.split("-")[-1]) // 8
        config = {"attention_head_dim": 72, "num_layers": 28, "in_channels": 4, "out_channels": 8, "sample_size": size,
                  "patch_size": 2, "num_embeds_ada_norm": 1000}  # fmt: skip
        inputs = {"hidden_states": torch.zeros(1, 4, size, size), "timestep": t, "class_labels": one}
        return d.DiTTransformer2DModel(**config), inputs
    if name == "flowdcn-b-2-256":
        return FlowDCNTransformer2DModel(), {
            "hidden_states": torch.zeros(1, 4, 32, 32),
            "timestep": t,
            "class_labels": one,
        }
    if name.startswith("pixart"):
        size, prompt = height // 8, 120 if name == "pixart-alpha" else 300
        config = {"sample_size": size, "caption_channels": 4096, "use_additional_conditions": False}
        return d.PixArtTransformer2DModel(**config), image(4, 8) | text(prompt, 4096)
    if name == "sd1.5":
        network = d.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return network, image(4, 8, "sample") | text(77, 768)
    if name in KNOWN:
        [model] = [model for model in cost_model.MODELS if model.name == KNOWN[name]]
        assert (height, width) == (1024, 1024)
        return model.kind(**model.config), pytree.tree_map(
            torch.zeros, model.inputs, is_leaf=lambda shape: isinstance(shape, tuple)
        )
    if name == "sana":
        return d.SanaTransformer2DModel(), image(32, 32) | text(300, 2304)
    if name == "qwen-image":
        shapes = {"img_shapes": [[(1, height // 16, width // 16)]], "encoder_hidden_states_mask": torch.ones(1, 128)}
        return d.QwenImageTransformer2DModel(), tokens(64, 16) | text(128, 3584) | shapes
    if name == "wan2.2-t2v":
        config = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
        return d.WanTransformer3DModel(**config), video(48, 16, 4) | text(512, 4096)
    count = (frames - 1) // 8 + 1
    sizes = {"num_frames": count, "height": height // 32, "width": width // 32}
    mask = {"encoder_attention_mask": torch.ones(1, 128)}
    return d.LTXVideoTransformer3DModel(), tokens(128, 32, count) | text(128, 4096) | sizes | mask


KNOWN = {"sdxl": "SDXL", "sd3.5-medium": "SD3.5-medium", "flux.1-dev": "FLUX.1-dev"}  # to the cost model


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.tflops])
def test_flops(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with torch.device("meta"), torch.no_grad():
        network, inputs = real(name, read(name).call)
        with FlopCounterMode(display=False) as counter:
            network.eval()(**inputs)
    assert counter.get_total_flops() / 1e12 == pytest.approx(SYSTEMS[name].tflops, rel=5e-3)


def update():
    os.chdir(ROOT)
    for name in NAMES:
        file = FOLDER / f"{name}.toml"
        lines = file.read_text(encoding="utf-8").splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("# Cost: "))
        past = at + 1 + lines[at + 1].startswith("#   estimated")
        file.write_text("\n".join([*lines[:at], *cost(name, read(name)), *lines[past:], ""]), encoding="utf-8")


if __name__ == "__main__":
    update()
