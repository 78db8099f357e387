"""The Python interface on tiny pipelines: it finds what the command finds, and leaves the pipeline as it was."""

from __future__ import annotations

import functools
import itertools
import json
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusion3ModularPipeline
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3AutoBlocks
from torch import nn

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search import compare, evaluate, search
from dssolver_search.demo import classifier
from dssolver_search.methods import budget as budget_module
from dssolver_search.methods import preflight
from dssolver_search.pipeline.sampler import Sampler
from tests import notebook
from tests.families import CLASSES, make_pipe
from tests.pipelines.zoo import ZOO
from tests.search.forks import NEVER, Forks
from tests.searches import CLOSED_FORM, without_clock

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torchvision.*", "ignore:__array:DeprecationWarning", "ignore:invalid value:RuntimeWarning",
    "ignore:.*FluxPosEmbed.*:FutureWarning",
)  # fmt: skip
SMALL = {
    "nfe": [2, 3], "fill_nfe": [], "trials": 2, "starts": 1, "polish": 0, "num_train_samples": 4,
    "num_trial_samples": 3, "num_validation_samples": 3, "teacher_steps": 10, "progress": False,
}  # fmt: skip
ONE = {**SMALL, "nfe": 2}


def state_of(pipe):
    """All of a pipeline that a search might leave changed."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    modules = [module for network in networks.values() for module in network.modules()]
    hooks = [
        [list(d) for d in (m._forward_pre_hooks, m._forward_hooks, m._forward_pre_hooks_with_kwargs)] for m in modules
    ]
    scheduler = vars(pipe).get("scheduler")
    return {
        "own": {k: v for k, v in vars(pipe).items() if k not in networks and not k.startswith("_guidance")},
        "config": dict(pipe.config),
        "scheduler": dict(scheduler.config) if scheduler else None,
        "networks": {name: id(part) for name, part in networks.items()},
        "modules": [{k: v for k, v in vars(m).items() if k[0] != "_" or k == "_hf_hook"} for m in modules],
        "hooks": hooks,
        "gradients": [p.requires_grad for m in modules for p in m.parameters(recurse=False)],
    }


def live_pipe(family="flow"):
    """A pipeline as a user may hold it: partly in training, with gradients and a progress bar."""
    pipe = make_pipe(family)
    pipe.transformer.requires_grad_(True).train()
    pipe.transformer.transformer_blocks[0].eval()
    pipe.transformer.pos_embed.requires_grad_(False)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    pipe._num_timesteps = pipe._interrupt = None  # what any call of the pipeline sets
    return pipe


@pytest.fixture
def pipe():
    made = live_pipe()
    before = state_of(made)
    yield made
    after = state_of(made)
    for state in (before, after):
        for name in ("_num_timesteps", "_interrupt"):
            state["own"].pop(name)
    assert after == before


@functools.cache
def found_small():
    return search(live_pipe(), **SMALL, guidance_scale=2.0)


# --- one engine -------------------------------------------------------------------------------------------------------


def test_it_finds_what_the_command_finds(models, results):
    pipe = SiTPipeline.from_pretrained(models["flow"])
    found = search(pipe, **CLOSED_FORM, progress=False)
    wanted = DSSolverScheduler.from_pretrained(results["flow"]).config
    assert found.scheduler.config.solvers == wanted.solvers and found.nfe == [3, 4]
    told, expected = found.scheduler.config.provenance, wanted.provenance
    for key in ("results", "call", "guidance_scale", "teacher", "samples", "network_evaluations", "settings"):
        assert without_clock(told[key]) == without_clock(expected[key]), key
    assert told["model"] == expected["model"] == "flow"


def test_the_pipeline_stays_as_it_was_and_nothing_is_written(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stages = []
    found = search(pipe, **{**SMALL, "polish": 1}, callback=stages.append)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "") and not list(tmp_path.iterdir())
    assert [(s.get("nfe"), s["stage"]) for s in stages] == [
        (None, "teacher"), *((n, stage) for n in (2, 3) for stage in ("closed_form", "polish", "searched")),
    ]  # fmt: skip
    counts = [s["network_evaluations"] for s in stages]
    assert counts == sorted(counts) and counts[-1] == found.scheduler.config.provenance["network_evaluations"]
    assert repr(found) == found.table and "2 searched" in found.table
    assert found.compare(schedulers=["euler"], num_samples=2, reference_steps=8).results
    assert found.picture().size == (4 * 4 * 24, 4 * 24) and "data:image/png" in found._repr_html_()
    assert not list(tmp_path.iterdir())


def test_arguments_reach_the_call(pipe):
    seen, call = [], type(pipe).__call__

    def spied(self, *args, **kwargs):
        seen.append(kwargs)
        return call(self, *args, **kwargs)

    class Spied(type(pipe)):
        __call__ = functools.wraps(call)(spied)

    pipe.__class__, plain = Spied, type(pipe)
    try:
        found = search(pipe, **ONE, guidance_scale=2, guidance_channels=1, output_type="latent")
    finally:
        pipe.__class__ = plain
    assert {(k["guidance_scale"], k["guidance_channels"], k["output_type"]) for k in seen} == {(2.0, 1, "latent")}
    assert found.scheduler.config.provenance["call"] == {
        "guidance_scale": 2.0, "guidance_channels": 1, "output_type": "latent",
    }  # fmt: skip


# --- interrupted, killed ----------------------------------------------------------------------------------------------


class Failing:
    """A callback that raises at the end of a stage."""

    def __init__(self, error, stage="searched", nfe=2):
        self.error, self.at = error, (stage, nfe)

    def __call__(self, facts):
        if (facts["stage"], facts.get("nfe")) == self.at:
            raise self.error


def test_ctrl_c_returns_what_is_finished_and_the_rest_follows(pipe, tmp_path, capsys):
    whole = search(pipe, **SMALL)
    found = search(pipe, **SMALL, output_dir=tmp_path, callback=Failing(KeyboardInterrupt))
    assert found.scheduler.tables == (2,) and found.nfe == [2]
    assert "interrupted; solvers for 2 calls are finished" in capsys.readouterr().err
    assert DSSolverScheduler.from_pretrained(tmp_path).tables == (2,)
    resumed = search(pipe, **SMALL, output_dir=tmp_path)
    assert resumed.scheduler.config.solvers == whole.scheduler.config.solvers and resumed.folder == tmp_path
    with pytest.raises(KeyboardInterrupt):
        search(pipe, **SMALL, callback=Failing(KeyboardInterrupt, "teacher", None))


def test_an_error_of_any_kind_leaves_the_pipeline_as_it_was(pipe):
    with pytest.raises(ZeroDivisionError):
        search(pipe, **SMALL, callback=Failing(ZeroDivisionError))


def test_killed_and_gone_on_with_to_the_bit(tmp_path):
    """kill -9 in the teacher, in a fit and while a file is renamed; and Ctrl-C in a network call."""
    forks = Forks(tmp_path)

    def job(folder):
        return lambda: search(live_pipe(), **SMALL, batch_size=2, output_dir=folder)

    [code], [log] = forks.run((job(tmp_path / "whole"), NEVER, {}))
    assert code == 0, log
    steps = forks.counts()["step"]
    for moment in (("step", round(0.5 * steps)), ("step", round(0.2 * steps)), ("before rename", 2), NEVER):
        [code], [log] = forks.run((job(tmp_path / "killed"), moment, {}))
        assert code == (0 if moment is NEVER else -signal.SIGKILL), log
    [code], [log] = forks.run((job(tmp_path / "stopped"), ("interrupt", round(0.9 * steps)), {}))
    assert code == 0 and "interrupted; solvers for 2 calls are finished" in log
    forks.run((job(tmp_path / "stopped"), NEVER, {}))
    files = [tmp_path / name / "scheduler_config.json" for name in ("whole", "killed", "stopped")]
    whole, *others = (without_clock(json.loads(file.read_text())) for file in files)
    assert others == [whole, whole]


def test_several_processes_share_the_work(tmp_path):
    """Each has a pipeline of its own, as a script under `accelerate launch`."""

    def job():
        found = search(live_pipe(), **SMALL)
        compared = found.compare(schedulers=["euler"], num_samples=4, reference_steps=8)
        assert [r.scheduler for r in compared.results] == ["searched", "euler"] * 2
        found.save(tmp_path / "several")

    codes, logs = Forks(tmp_path).group(2, job)
    assert codes == [0, 0], logs
    solvers = DSSolverScheduler.from_pretrained(tmp_path / "several").solvers
    single = search(live_pipe(), **SMALL).scheduler.solvers
    for nfe in (2, 3):
        np.testing.assert_allclose(solvers[nfe].nodes, single[nfe].nodes, rtol=1e-3)


# --- pipelines of all kinds -------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as peft makes them."""

    def __init__(self, base_layer, scale):
        super().__init__()
        self.base_layer, self.scaling, self.active_adapters = base_layer, {"style": scale}, ["style"]
        generator = torch.Generator().manual_seed(3)
        self.down, self.up = (
            nn.Parameter(torch.randn(shape, generator=generator))
            for shape in ((2, base_layer.in_features), (base_layer.out_features, 2))
        )

    def forward(self, x):
        return self.base_layer(x) + self.scaling["style"] * (x @ self.down.T) @ self.up.T


def with_adapter(pipe, scale=0.2):
    attention = pipe.transformer.transformer_blocks[0].attn1
    attention.to_q = Adapted(attention.to_q, scale)
    return pipe


def quantised(pipe):
    """Its linear layers in int8."""
    pipe.transformer = torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, torch.qint8)
    return pipe


def offloaded(pipe):
    """As `enable_model_cpu_offload` leaves it, on a computer without another device."""
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


VARIANTS = {
    "LoRA": with_adapter, "int8": quantised, "offloaded": offloaded, "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*torch.ao.*:DeprecationWarning", "ignore::UserWarning")
def test_variants_of_a_pipeline(variant, tmp_path, capsys):
    """Each is searched as it is: another solver than that of the plain one, unless it only lies elsewhere."""
    pipe = VARIANTS[variant](make_pipe("flow"))
    pipe._num_timesteps = pipe._interrupt = None
    before, hooks = state_of(pipe), [getattr(m, "_hf_hook", None) for m in pipe.transformer.modules()]
    found = search(pipe, **SMALL, output_dir=tmp_path, guidance_scale=2.0)
    after = state_of(pipe)
    for name in ("scheduler", "networks", "modules", "hooks", "gradients"):
        assert after[name] == before[name]
    assert hooks == [getattr(m, "_hf_hook", None) for m in pipe.transformer.modules()]
    assert any(hooks) == (variant == "offloaded")
    same = found.scheduler.config.solvers == found_small().scheduler.config.solvers
    assert same == (variant == "offloaded")
    found.apply(pipe)
    assert len(pipe([0, 1], num_inference_steps=3, output_type="pil").images) == 2


@pytest.mark.filterwarnings("ignore:.*torch.ao.*:DeprecationWarning", "ignore::UserWarning")
def test_what_a_variant_computes_with_is_part_of_the_key(tmp_path):
    def key(pipe):
        return Sampler(pipe).fingerprint()["key"]

    plain, other = make_pipe("flow"), make_pipe("flow", seed=1)
    keys = [key(plain), *(key(with_adapter(make_pipe("flow"), scale)) for scale in (0.2, 0.3))]
    keys += [key(quantised(pipe)) for pipe in (plain, other)]
    assert len(set(keys)) == len(keys)
    assert key(offloaded(make_pipe("flow"))) == keys[0]


def alike(one, other):
    """Two searches found the same solver for two calls, but for roundings."""
    for a, b in zip(*(found.scheduler.solvers[2].coefficients for found in (one, other)), strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def zoo_search(name, **options):
    """A search of a pipeline of the zoo, its embeddings as conditions."""
    entry = ZOO[name]
    pipe = entry.make()
    given = {"conditions": lambda indices: entry.arguments(pipe, indices), **ONE, **options}
    return pipe, search(pipe, **given)


def test_control_pictures_as_lists():
    """One entry a sample, whatever the batch: the same solver as by a function."""
    entry = ZOO["Stable Diffusion ControlNet"]
    pipe, by_function = zoo_search("Stable Diffusion ControlNet", guidance_scale=2.0)
    whole = entry.arguments(pipe, range(4))
    lists = {name: value for name, value in whole.items() if torch.is_tensor(value)}
    others = {name: value for name, value in whole.items() if name not in lists}
    by_lists = search(pipe, **{**ONE, "conditions": lists, **others, "batch_size": 3})
    for a, b in zip(
        by_function.scheduler.solvers[2].coefficients, by_lists.scheduler.solvers[2].coefficients, strict=True
    ):
        assert a == pytest.approx(b, abs=1e-3)
    assert by_lists.compare(schedulers=[], num_samples=2, reference_steps=6).results


def test_prompts_and_lists_together():
    class Pictured(SiTPipeline):
        def __call__(self, prompt, image, **kwargs):
            seen.append((list(prompt), list(image)))
            return super().__call__([len(p) % CLASSES for p in prompt], **kwargs)

    seen, source = [], make_pipe("flow")
    pipe = Pictured(source.transformer, source.scheduler)
    search(pipe, **ONE, prompts=["a", "bc"], conditions={"image": ["x", "y", "z"]})
    assert (["a", "bc", "a", "bc"], ["x", "y", "z", "x"]) in seen


def test_a_modular_pipeline(capsys):
    """Its guider is the guidance, at the scale of the search as long as it lasts."""
    entry, blocks = ZOO["Stable Diffusion 3"], StableDiffusion3AutoBlocks()
    plain = entry.make()
    for name in ("text_encoder", "vae_encoder"):
        del blocks.sub_blocks[name]
    pipe = StableDiffusion3ModularPipeline(blocks=blocks)
    pipe.update_components(transformer=plain.transformer, vae=plain.vae, scheduler=plain.scheduler)
    guider = pipe.guider

    def conditions(indices):
        return {k: v for k, v in entry.arguments(plain, indices).items() if k != "guidance_scale"}

    found = search(pipe, **ONE, conditions=conditions, guidance_scale=3.0)
    assert pipe.guider is guider and pipe.scheduler is plain.scheduler and found.nfe == [2]
    assert found.scheduler.config.provenance["guidance_scale"] == 3.0
    assert search(pipe, **ONE, conditions=conditions).scheduler.config.provenance["guidance_scale"] == 7.0
    capsys.readouterr()
    found.apply(pipe)
    told = "searched at guidance scale 3, this pipeline's default is 7; call it with guidance_scale=3"
    assert told in capsys.readouterr().err and found.picture().size[0] > 0
    ordinary = search(plain, **ONE, conditions=conditions, guidance_scale=3.0)
    alike(found, ordinary)


def test_two_pipelines_at_once():
    wanted = {family: search(make_pipe(family), **SMALL).scheduler.config.solvers for family in ("flow", "vp")}
    found, pipes = {}, {family: make_pipe(family) for family in wanted}

    def work(family):
        found[family] = search(pipes[family], **SMALL).scheduler.config.solvers

    threads = [threading.Thread(target=work, args=[family]) for family in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


# --- apply, compare, evaluate, save -----------------------------------------------------------------------------------


def test_apply_and_restore(capsys):
    pipe, found = make_pipe("flow"), found_small()
    own = pipe.scheduler
    for _ in range(2):  # the first scheduler is what is put back
        found.apply(pipe)
        assert pipe.scheduler.solvers == found.scheduler.solvers
    assert (
        "searched at guidance scale 2, this pipeline's default is 1.5; call it with guidance_scale=2"
        in capsys.readouterr().err
    )
    found.restore(pipe)
    assert pipe.scheduler is own
    with pytest.raises(ValueError, match="not applied to this SiTPipeline"):
        found.restore(pipe)
    other = make_pipe("vp")
    found.apply(other)
    assert other.scheduler.config.carried_from["prediction_type"] == "flow_prediction"
    assert other.scheduler.solvers == found.scheduler.solvers


def test_a_comparison_of_what_was_found(capsys, tmp_path):
    """Of the model with its own scheduler, whether or not a solver is applied; equal to the command's."""
    found = found_small()
    compared = found.compare(schedulers=["euler", "unipc"], num_samples=3, reference_steps=12)
    assert {(r.scheduler, r.nfe) for r in compared.results} == {
        (name, nfe) for name in ("searched", "euler", "unipc") for nfe in (2, 3)
    }
    found.apply()
    again = found.compare(schedulers=["euler", "unipc"], num_samples=3, reference_steps=12, output_dir=tmp_path / "c")
    assert [r.mse for r in again.results] == [r.mse for r in compared.results]
    found.restore()
    assert repr(compared) == compared.table and "searched / best *" in compared.table
    assert compared.picture().width > 100 and "data:image/png" in compared._repr_html_()
    assert {p.name for p in (tmp_path / "c").iterdir()} >= {"comparison.json", "comparison.png", "pictures"}
    capsys.readouterr()
    compare(make_pipe("flow"), {"mine": found.scheduler}, nfe=[2], schedulers=[], num_samples=2, reference_steps=6)
    assert "mine was searched at guidance scale 2.0, this run is at 1.5" in capsys.readouterr().err


def crowded(most):
    """A hook: a device on which so many samples fit."""

    def full(module, args):
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    return full


def test_an_evaluation_of_what_was_found(tmp_path, monkeypatch, capsys):
    """On a device that holds 40 guided pairs: images are made 32 at a time."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipe = make_pipe("flow")
    pipe.transformer.register_forward_pre_hook(crowded(80))
    evaluated = evaluate(
        pipe, found_small(), reference=classifier.FOLDER / "reference.safetensors", nfe=2, batch_size=64,
        extractor="dssolver_search.demo.classifier:load", schedulers=["unipc"], num_images=70, subsets=0,
        guidance_scale=2.0,
    )  # fmt: skip
    assert [r["scheduler"] for r in evaluated.record["results"]] == ["searched", "unipc"]
    assert "64 samples do not fit into memory; 32 run together from here on" in capsys.readouterr().err
    assert "Frechet distance" in repr(evaluated) and "<pre" in evaluated._repr_html_()
    assert not list(tmp_path.iterdir())


def test_save_and_push(tmp_path):
    found = found_small()
    compared = found.compare(schedulers=["euler"], num_samples=2, reference_steps=6)
    told = found.push_to_hub("org/solver", comparison=compared, private=True, dry_run=True)
    assert "would be sent to org/solver" in told and "comparison.png" in told and "| euler" in told
    found.save(tmp_path / "x")
    assert DSSolverScheduler.from_pretrained(tmp_path / "x").solvers == found.scheduler.solvers
    found.folder = None  # shared with other tests


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_of_evaluations_is_kept_and_told(pipe, capsys, tmp_path):
    settings = {"nfe": [3, 4], "fill_nfe": [3, 8], "progress": False}
    spent = {}
    for budget in (2_000, 4_000, 8_000):
        found = search(pipe, **settings, budget=budget)
        spent[budget] = found.scheduler.config.provenance["network_evaluations"]
        assert spent[budget] <= budget
        told = f"budget {budget}: left out or made smaller: {'; '.join(found.left_out)}"
        assert told in found.table and told in capsys.readouterr().err
    assert spent[2_000] < spent[4_000] < spent[8_000]
    assert any(part.startswith("teacher_steps 50 -> ") for part in found.left_out)


def test_a_budget_of_time_and_one_that_is_too_small(pipe, monkeypatch):
    ticks = itertools.count()

    def clock():
        return 0.02 * next(ticks)

    for module in (budget_module, preflight):  # a machine of 600 evaluations a second
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    found = search(pipe, nfe=[3, 4], fill_nfe=[3, 8], progress=False, budget="8s")
    assert found.left_out and 3 in found.nfe
    with pytest.raises(
        ValueError, match="budget is 50, about 50 network evaluations of this pipeline; the least that 3"
    ):
        search(pipe, nfe=[3, 4], budget=50)
    for budget in ("soon", 0, "5 parsecs"):
        with pytest.raises(ValueError, match=f"budget is '{budget}'; it must be a time"):
            search(pipe, budget=budget)


def test_a_search_with_a_budget_goes_on(pipe, tmp_path):
    settings = {"nfe": [2, 3], "fill_nfe": [], "progress": False, "budget": 5_000}
    whole = search(pipe, **settings)
    search(pipe, **settings, output_dir=tmp_path, callback=Failing(KeyboardInterrupt))
    found = search(pipe, **settings, output_dir=tmp_path)
    assert found.scheduler.config.solvers == whole.scheduler.config.solvers
    assert search(pipe, **settings, output_dir=tmp_path).left_out == found.left_out


# --- bad input --------------------------------------------------------------------------------------------------------


def refusing(pipe, message, **arguments):
    """The search is refused in one line; what the test finds afterwards shows that nothing was left behind."""
    with pytest.raises(ValueError, match=message) as refused:
        search(pipe, **{**ONE, **arguments})
    assert "\n" not in str(refused.value)


def test_arguments_that_fit_nothing(pipe, tmp_path):
    out = tmp_path / "out"
    told = "'guidence_scale' is neither a setting of search nor an argument of SiTPipeline; did you mean guidance_scale"
    refusing(pipe, f"{told}.* Settings: batch_size, .* Arguments: class_labels, ", guidence_scale=2, output_dir=out)
    refusing(pipe, "dtype is for commands", dtype="bfloat16", output_dir=out)
    refusing(pipe, "nfe is 2.5; it must be int", nfe=[2.5], output_dir=out)
    refusing(pipe, "prompts is empty; give at least one", prompts=[], output_dir=out)
    refusing(pipe, "prompts holds int, not text", prompts=[3], output_dir=out)
    refusing(pipe, r"conditions\['class_labels'\] is empty", conditions={"class_labels": []}, output_dir=out)
    refusing(pipe, "takes no argument 'picture'", conditions={"picture": [1]}, output_dir=out)
    refusing(pipe, "'num_inference_steps' is chosen", num_inference_steps=3, output_dir=out)
    with pytest.raises(ValueError, match="'org/model' is no pipeline; load one"):
        search("org/model")
    assert not out.exists()


def fixed_levels(pipe):
    call = type(pipe).__call__

    class Turbo(type(pipe)):
        @functools.wraps(call)
        def __call__(self, *args, num_inference_steps=50, **kwargs):
            return call(self, *args, num_inference_steps=4, **kwargs)

    pipe.__class__ = Turbo


def stochastic(pipe):
    pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] + torch.rand(()),), prepend=True)


def not_a_number(pipe):
    pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * float("nan"),))


FAULTS = {
    "no scheduler": (lambda pipe: delattr(pipe, "scheduler"), "SiTPipeline has no scheduler"),
    "distilled": (
        lambda pipe: setattr(pipe, "scheduler", LCMScheduler()),
        "SiTPipeline is sampled by LCMScheduler, which draws noise between the few levels",
    ),
    "fixed levels": (fixed_levels, "the pipeline takes 4 steps where 3 are asked for; a distilled .Turbo. model"),
    "stochastic": (stochastic, "SiTPipeline gives another result each time"),
    "NaN": (not_a_number, "SiTPipeline gives values that are not finite; try it with another dtype or guidance"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_pipelines_that_cannot_be_searched(fault, tmp_path):
    spoil, message = FAULTS[fault]
    pipe = live_pipe()
    spoil(pipe)
    before = state_of(pipe)
    refusing(pipe, message, output_dir=tmp_path / "out")
    after = state_of(pipe)
    for state in (before, after):
        state["own"] = state["own"].get("_progress_bar_config")
    assert after == before and not (tmp_path / "out" / "scheduler_config.json").exists()


def test_a_name_that_tells_of_distillation_is_told(pipe, capsys):
    own = pipe._internal_dict
    pipe.register_to_config(_name_or_path="org/model-Turbo")
    with pytest.raises(KeyboardInterrupt):
        search(pipe, **ONE, callback=Failing(KeyboardInterrupt, "teacher", None))
    assert "org/model-Turbo seems to be distilled for a few fixed steps" in capsys.readouterr().err
    vars(pipe)["_internal_dict"] = own


@pytest.mark.parametrize("most", [3, 0])
def test_out_of_memory(most, pipe, capsys, tmp_path, monkeypatch):
    """A device on which so many samples fit: the batch is halved until it does."""
    wanted = search(pipe, **ONE, batch_size=2, guidance_scale=1.0)
    capsys.readouterr()
    hook = pipe.transformer.register_forward_pre_hook(crowded(most))
    try:
        if most == 0:
            refusing(pipe, "a single sample does not fit into memory; offload .*bfloat16, or make smaller images")
            return
        found = search(pipe, **ONE, batch_size=8, guidance_scale=1.0)
        assert "samples do not fit into memory; " in capsys.readouterr().err
        compared = found.compare(schedulers=["euler"], num_samples=5, reference_steps=6, batch_size=5)
        assert len(compared.results) == 2
        assert "5 samples do not fit into memory; 2 run together from here on" in capsys.readouterr().err
    finally:
        hook.remove()
    for nfe, spec in found.scheduler.solvers.items():
        np.testing.assert_allclose(spec.nodes, wanted.scheduler.solvers[nfe].nodes, atol=1e-4)
    told = [s.config.provenance["network_evaluations"] for s in (found.scheduler, wanted.scheduler)]
    assert told[0] == told[1]


def test_classes_of_a_unet_are_those_of_its_pipeline():
    """Its embedding counts the null class too."""
    sampler = Sampler(make_pipe("flow"))
    sampler.denoisers = [SimpleNamespace(config=SimpleNamespace(num_class_embeds=4))]
    assert sampler.conditions(range(5))["class_labels"] == [0, 1, 2, 0, 1]


# --- the notebook -----------------------------------------------------------------------------------------------------


def kinds(book):
    """Of each output: a stream, or what a notebook can show of it."""
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return [[sorted(o.get("data", [o["output_type"]])) for o in cell["outputs"]] for cell in cells]


def test_the_notebook_runs_as_stored(tmp_path, monkeypatch):
    smaller = [("BUDGET = 20000", "BUDGET = 2500"), ("num_samples=4", "num_samples=2"), ("steps=100", "steps=10")]
    found = notebook.executed(tmp_path, *smaller)
    stored = json.loads(notebook.FILE.read_text(encoding="utf-8"))
    assert kinds(found) == kinds(stored) and sum(map(bool, kinds(found))) == 4
    shown = "".join("".join(o.get("text", [])) for cell in stored["cells"] for o in cell.get("outputs", []))
    assert "DSSolverScheduler has tables for (5, 8) network calls" in shown and "would be sent to" in shown
    assert notebook.FILE.stat().st_size < 150_000 and str(tmp_path.parents[1]) not in notebook.FILE.read_text()
    assert (tmp_path / "notebooks" / "runs" / "your-solver" / "scheduler_config.json").is_file()
