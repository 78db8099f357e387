"""The objective on decoded images: its gradient against differences through whole pipelines with their decoders, its
feature networks against their own image processors, what it refuses, and a search with it."""

from __future__ import annotations

import functools
import json
import re
import sys

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn
from torch.nn.utils import vector_to_parameters

from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.images.networks import FeatureNetwork, distance, load_feature_network
from dssolver_search.methods import gradient
from dssolver_search.methods import setup as search_setup
from dssolver_search.methods.closed_form import fit, validated
from dssolver_search.methods.gauss_newton import parametrised
from dssolver_search.methods.gradient import PerceptualDescent
from dssolver_search.methods.objective import terminal_loss
from dssolver_search.methods.parameters import current
from dssolver_search.methods.perceptual import Perceptual
from dssolver_search.pipeline.loading import freeze
from dssolver_search.pipeline.plan import Plan
from dssolver_search.settings import GROUPS, SearchConfig
from dssolver_search.teacher.ends import even_nodes
from tests.families import WARP, make_pipe, make_scheduler, make_student, problem_of
from tests.pipelines.zoo import ZOO, make_vae, scaled
from tests.search.test_gradient import GRADIENT
from tests.searches import lines_of, search
from tests.zoo_students import student_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torchvision.*", "ignore:Converting a tensor.*", "ignore:.*FluxPosEmbed.*:FutureWarning"
)
LATENT = ("SiT", "Stable Diffusion")


class TwoLayers(nn.Module):
    """Smooth features at two depths, the first with its places in two dimensions."""

    def __init__(self, width=6):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)

    def forward(self, images):
        shallow = torch.tanh(self.first(images))
        return shallow, torch.tanh(self.second(shallow)).flatten(2).transpose(1, 2)


def make_network():
    return FeatureNetwork(TwoLayers(), "two layers")


def factory():
    return TwoLayers()


def no_module():
    return [TwoLayers()]


@functools.cache
def latent_sit():
    """A class-conditional pipeline of ours with an autoencoder."""

    def make():
        return DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=5,
            norm_num_groups=1,
        )

    return freeze(SiTPipeline(scaled(make), make_scheduler("flow"), make_vae())).to(torch.float64)


def latent(name):
    """A student whose pipeline decodes latents, in float64."""
    return make_student(latent_sit()) if name == "SiT" else student_of(name)


def of(student, samples=3):
    """A problem with trajectories of few steps, in float64."""
    problem = problem_of(student, samples, steps=6, batch_size=2)
    for samples in (problem.train, problem.validation):
        object.__setattr__(samples.teacher, "states", samples.teacher.states.double())
    return problem


def perceptual_of(problem):
    found = Perceptual(make_network(), problem.student)
    found.check()
    for samples in (problem.train, problem.validation):
        found.remember(problem, samples)
    return found


# --- distance ---------------------------------------------------------------------------------------------------------


def test_distance_by_hand():
    """Equation 1 of LPIPS with unit weights, for (B, C, H, W), (B, tokens, C) and (B, C)."""
    torch.manual_seed(0)
    layers = [torch.randn(2, 3, 4, 5), torch.randn(2, 6, 3), torch.randn(2, 7)]
    others = [torch.randn_like(layer) for layer in layers]

    class Giving(nn.Module):
        def forward(self, images):
            return self.given

    network = FeatureNetwork(Giving(), "giving")

    def features(given):
        network.network.given = given
        return network(torch.rand(2, 1, 8, 8))

    def unit(x, axis):
        return x / x.square().sum(axis, keepdim=True).sqrt()

    expected = sum(
        (unit(x, axis) - unit(y, axis)).square().sum(axis).mean()
        for x, y, axis in zip(layers, others, (1, 2, 1), strict=True)
    )
    assert distance(features(layers), features(others)) == pytest.approx(float(expected) / 3, rel=1e-5)
    dark = features([torch.zeros(2, 3, 4, 4, requires_grad=True)])  # a feature of length 0 has no direction
    dark[0].sum().backward()
    assert not dark[0].any() and torch.isfinite(network.network.given[0].grad).all()


def test_gray_images_and_frames_are_pictures_too():
    network = make_network()
    gray, frames = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 3, 8, 8)
    for one, three in zip(network(gray), network(gray.repeat(1, 3, 1, 1)), strict=True):
        torch.testing.assert_close(one, three)
    for k, layer in enumerate(network(frames)):
        torch.testing.assert_close(layer[1], network(frames[1])[k].flatten(0, 1))
    assert not any(p.requires_grad for p in network.parameters()) and not network.training


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LATENT)
def test_gradient_is_the_central_difference(name, exact):
    problem = of(latent(name), 3 if name == "SiT" else 2)
    perceptual = perceptual_of(problem)
    found = fit(problem, 3, WARP, 1e-3, problem.train)
    parameters = parametrised(problem, found)
    torch.manual_seed(1)
    start = 0.05 * torch.randn(parameters.count, dtype=torch.float64)
    vector_to_parameters(start, parameters.parameters())
    descent = PerceptualDescent(problem, found, parameters, perceptual)
    value = descent.value()
    gradients = torch.cat([p.grad.flatten() for p in parameters.parameters()])

    def loss(vector):
        vector_to_parameters(vector, parameters.parameters())
        run = perceptual.run(current(parameters), problem.train.indices, "train")
        return float(perceptual.loss(run.output, problem.train))

    assert value == pytest.approx(loss(start), rel=1e-8)  # the sum over batches
    at = 0
    for group in GROUPS:  # one direction each
        size = getattr(parameters, f"free_{group}").numel()
        way = torch.zeros_like(start)
        way[at : at + size] = torch.randn(size, dtype=torch.float64)
        # pixels are cut off at 0 and 1, times are float32 in places: differences of several sizes, the nearest counts
        slopes = [(loss(start + h * way) - loss(start - h * way)) / (2 * h) for h in (1e-3, 3e-4, 1e-4)]
        assert abs(slopes[0]) > 1e-6, group
        nearest = min(slopes, key=lambda s: abs(s - float(gradients @ way)))
        assert float(gradients @ way) == pytest.approx(nearest, rel=2e-3), group
        at += size


@pytest.mark.parametrize("name", [*LATENT, "DiT", "Wan"])
def test_the_teachers_own_images_have_no_distance_and_cost_one_evaluation(name, exact):
    """The final state in place of the last step's, in a call of one step and in one of two; DiT and Stable Diffusion
    hold each state twice, Wan gives frames."""
    student = latent(name)
    sampler, problem = student.sampler, of(student, 2)
    perceptual = Perceptual(make_network(), student)
    before = sampler.network_evaluations
    perceptual.check()
    assert sampler.network_evaluations == before
    train = problem.train
    perceptual.remember(problem, train)
    per_step = 2  # guidance
    assert sampler.network_evaluations - before == per_step * len(train)
    for nfe in (1, 2):
        run = perceptual.run(Plan(even_nodes(nfe)), train.indices, "train", train.teacher.final)
        images = run.output
        torch.testing.assert_close(run.final, train.teacher.final)
        assert images.shape[-3] == 3 and 0 <= images.min() < images.max() <= 1
        assert float(perceptual.loss(images, train)) < 1e-12
        assert float(perceptual.loss(images.flip(0), train)) > 1e-8
    halves = [float(perceptual.loss(images.flip(0)[i : i + 1], train.part(i, i + 1))) for i in (0, 1)]
    assert float(perceptual.loss(images.flip(0), train)) == pytest.approx(sum(halves) / 2, rel=1e-9)
    assert "output_type" not in sampler.call


def test_a_run_without_images_decodes_nothing(exact):
    """After one that did."""
    problem = of(latent("SiT"), 2)
    perceptual_of(problem)
    decoded = []
    sampler = problem.student.sampler
    handle = sampler.pipe.vae.register_forward_hook(lambda *args: decoded.append(args))
    run = problem.student.run(Plan(even_nodes(3)), range(2), "train")
    plain = sampler(range(2), "train", 3, output_type="latent")
    handle.remove()
    assert len(run.states) == 4 and not decoded and run.output is None
    assert plain[0].shape == run.final.shape


def test_a_safety_checker_is_left_out_and_put_back(exact):
    student = student_of("Stable Diffusion")
    pipe, seen = student.sampler.pipe, []

    class Checker(nn.Module):
        device, dtype = torch.device("cpu"), torch.float64

        def forward(self, *args, **kwargs):
            seen.append(args)

    checker = vars(pipe)["safety_checker"] = Checker()
    try:
        perceptual_of(of(student, 2))
        assert not seen and pipe.safety_checker is checker
    finally:
        vars(pipe)["safety_checker"] = None


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("SDXL base", "LTX condition")])
def test_any_pipeline_gives_images_with_a_gradient(name):
    """SDXL base takes a part of the times; LTX condition puts noise of the last time into its condition."""
    shape = " x ".join(map(str, (*ZOO[name].shape[:-3], 3, *ZOO[name].shape[-3:-1])))
    assert shape in Perceptual(make_network(), student_of(name, torch.float32)).check()


# --- feature networks -------------------------------------------------------------------------------------------------


def save_vision_model(kind, folder):
    """(folder, the model, its own image processor)"""
    from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "ViT":
        model = ViTModel(ViTConfig(**small, image_size=32, patch_size=8))
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    elif kind == "CLIP":
        sizes = {**small, "image_size": 24, "patch_size": 8}
        model = CLIPModel(CLIPConfig(vision_config=sizes, text_config=small))
        processor = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24})
    else:
        model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
        processor = ViTImageProcessorPil(size={"height": 48, "width": 40}, resample=3, image_mean=[0.1, 0.2, 0.3])
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return getattr(model, "vision_model", model), processor


@pytest.mark.parametrize("kind", ["ViT", "CLIP", "ResNet"])
@pytest.mark.parametrize("edges", [(20, 20), (61, 45)])
def test_features_are_those_of_the_models_own_image_processor(kind, edges, tmp_path):
    model, processor = save_vision_model(kind, tmp_path)
    rows, columns = (torch.linspace(0, 3, n) for n in edges)
    phases = torch.arange(3.0)[:, None, None] + torch.tensor([0.0, 2.0])[:, None, None, None]
    images = 0.5 + 0.45 * torch.sin(rows[:, None] + columns[None, :] ** 2 + phases)
    images = (images * 255).round() / 255
    network = load_feature_network(str(tmp_path))
    pictures = [(255 * i).byte().permute(1, 2, 0).numpy() for i in images]
    given = processor(pictures, return_tensors="pt")["pixel_values"]
    prepared = network.network.preparation(images)
    level = 1 / 255 / min(processor.image_std)  # the processor rounds what it resizes to whole levels
    torch.testing.assert_close(prepared, given, rtol=0, atol=1.1 * level)
    with torch.no_grad():
        expected = model(pixel_values=prepared, output_hidden_states=True).hidden_states
        found = network(images)
    assert len(found) == len(expected) == 3
    for layer, wanted in zip(found, expected, strict=True):
        wanted = wanted.flatten(2).transpose(1, 2) if wanted.ndim == 4 else wanted
        torch.testing.assert_close(layer, nn.functional.normalize(wanted, dim=-1))
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert float(distance(network(images), network(images.flip(0)))) > 1e-4


def test_a_model_without_a_processor_gets_its_own_size_and_imagenets_colours(tmp_path):
    save_vision_model("ViT", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    prepared = load_feature_network(str(tmp_path)).network.preparation
    assert (prepared.size, prepared.crop, prepared.mode) == ((32, 32), None, "bicubic")
    assert prepared.mean == (0.485, 0.456, 0.406) and prepared.std == (0.229, 0.224, 0.225)


def test_a_factory_by_its_module_path():
    network = load_feature_network(f"{__name__}:factory")
    images = torch.rand(2, 3, 8, 8)
    for layer, wanted in zip(network(images), make_network()(images), strict=True):
        torch.testing.assert_close(layer, wanted)
    assert network.digest == make_network().digest
    other = TwoLayers()
    other.second.bias.data[0] += 1e-3
    assert FeatureNetwork(other, "two layers").digest != network.digest


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no/such/folder", "could not be loaded"),
        (f"{__name__}:absent", "could not be made: module .* has no attribute 'absent'"),
        ("no_such_module:factory", "could not be made: No module named 'no_such_module'"),
        (f"{__name__}:no_module", "could not be made: it returns list; it must return a torch.nn.Module"),
    ],
)
def test_unknown_feature_networks_are_refused(name, reason):
    with pytest.raises(ValueError, match=f"feature_network {re.escape(repr(name))} {reason}") as refused:
        load_feature_network(name)
    assert "\n" not in str(refused.value)


def test_models_that_take_no_pictures_or_are_pickled_are_refused(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(**sizes, vocab_size=9)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="BertModel takes no pixel_values; give a vision model"):
        load_feature_network(str(tmp_path / "text"))
    model, _ = save_vision_model("ViT", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_feature_network(str(tmp_path / "pickled"))


class Detached(nn.Module):
    def forward(self, images):
        return images.detach()


class Named(nn.Module):
    def forward(self, images):
        return {"features": images}


class Wide(nn.Module):
    def forward(self, images):
        return nn.functional.linear(images, images.new_ones(4, 99))


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Detached, "gives features without a gradient"), (Named, "gives dict; it must"), (Wide, "cannot take images of")],
)
def test_networks_that_do_not_serve_are_refused(network, reason):
    pipe = freeze(make_pipe("flow"))
    with pytest.raises(ValueError, match=f"^feature_network 'mine' {reason}"):
        Perceptual(FeatureNetwork(network(), "mine"), make_student(pipe)).check()


# --- pipelines that are refused ---------------------------------------------------------------------------------------


class Arrays(SiTPipeline):
    """As pipelines that leave torch before they give their pictures."""

    def __call__(self, class_labels, guidance_scale=1.5, output_type="pil", **kwargs):
        images = super().__call__(class_labels, guidance_scale, output_type="pt", **kwargs)[0]
        return (torch.from_numpy(images.numpy()),)


class Lists(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, output_type="pil", **kwargs):
        return super().__call__(class_labels, guidance_scale, output_type="latent", **kwargs)[0].detach().numpy(), None


class NoGraph(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, output_type="pil", **kwargs):
        return (super().__call__(class_labels, guidance_scale, output_type=output_type, **kwargs)[0].detach(),)


class Sounds(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, output_type="pil", **kwargs):
        return (super().__call__(class_labels, guidance_scale, output_type=output_type, **kwargs)[0].flatten(1),)


class Restless(SiTPipeline):
    def __call__(self, class_labels, guidance_scale=1.5, output_type="pil", num_inference_steps=1, **kwargs):
        kwargs |= {"output_type": output_type, "num_inference_steps": num_inference_steps}
        images = super().__call__(class_labels, guidance_scale, **kwargs)[0]
        return (images + 0.1 * num_inference_steps,)


class Unasked(SiTPipeline):
    def __call__(self, class_labels, num_inference_steps=1, generator=None, guidance_scale=1.5):
        return super().__call__(class_labels, guidance_scale, None, num_inference_steps, generator)


REFUSED = [
    (Arrays, "Arrays's images carry no gradient (Can't call numpy() on Tensor that requires grad"),
    (Lists, "Lists's images carry no gradient (the output is ndarray of shape (2, 1, 4, 4), not a tensor)"),
    (NoGraph, "NoGraph's images carry no gradient (the output has no graph)"),
    (Sounds, "Sounds gives Tensor of shape (2, 16) for 2 samples, which is no batch of images"),
    (Restless, "Restless decodes the same final state to other images"),
    (Unasked, "Unasked takes no output_type, so no images can be asked for"),
]


@pytest.mark.parametrize("cls, reason", REFUSED)
def test_pipelines_without_differentiable_images_are_refused(cls, reason):
    source = make_pipe("flow")
    pipe = freeze(cls(source.transformer, source.scheduler))
    student = make_student(pipe)
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        Perceptual(make_network(), student).check()
    assert "\n" not in str(refused.value) and str(refused.value).endswith("use objective terminal")
    assert pipe.scheduler is source.scheduler and student.sampler.call == {"guidance_scale": 1.5}
    assert torch.is_grad_enabled()


# --- command ----------------------------------------------------------------------------------------------------------

PERCEPTUAL = {
    **GRADIENT, "objective": "perceptual", "feature_network": f"{__name__}:factory", "batch_size": 3, "polish": 0,
    "trials": 1, "gradient_calls": 1,
}  # fmt: skip


def facts_of(folder):
    return json.loads((folder / "scheduler_config.json").read_text())["provenance"]


def test_a_search_lowers_the_held_out_perceptual_loss(model, tmp_path, capsys):
    settings = {**PERCEPTUAL, "num_train_samples": 8, "gradient_calls": 7, "ridge": 1e3}  # from next to classical rows
    search(model, tmp_path, settings)
    printed = capsys.readouterr().err
    result = facts_of(tmp_path)["results"]["3"]
    stage = result["stages"][-1]
    assert stage["stage"] == "gradient"
    after, before = stage["validation_perceptual"], stage["validation_perceptual_before"]
    assert 0 < after < 0.98 * before
    assert result["validation_mse"] == stage["validation_mse"]
    line = re.search(r"held out at 3 calls: perceptual loss (\S+) -> (\S+), final-state mse (\S+) -> (\S+)", printed)
    mse = result["stages"][0]["validation_mse"], stage["validation_mse"]
    assert [float(x) for x in line.groups()] == pytest.approx([before, after, *mse], rel=1e-3)
    assert "Objective perceptual: images of 1 x 4 x 4, 2 layers of features." in printed
    calls = [entry for entry in lines_of(tmp_path) if "loss" in entry]
    assert min(c["best_validation_perceptual"] for c in calls) == calls[-1]["best_validation_perceptual"] == after
    train, held_out, guided = settings["num_train_samples"], settings["num_validation_samples"], 2
    counted = 3 * guided * (held_out + 4 * train + len(calls) * (4 * train + held_out))  # before, scale, calls
    assert stage["network_evaluations"] == counted


def test_the_descent_keeps_what_is_best_by_its_own_loss():
    """Not by the final states' error: the stage is judged by what it minimises."""
    problem = of(make_student(freeze(make_pipe("flow", dtype=torch.float64))))
    perceptual = perceptual_of(problem)
    found = validated(problem, fit(problem, 3, (0.0, 0.0, 0.0), 1e3, problem.train))
    seen, numbers = [], parametrised(problem, found)
    descent = PerceptualDescent(problem, found, numbers, perceptual, lambda loss, descent: seen.append(descent.reached))
    better = descent.run(7)
    loss, mse = perceptual.held_out(problem, better.plan)
    assert loss == pytest.approx(descent.reached, rel=1e-9) and mse == pytest.approx(better.validation_mse, rel=1e-9)
    assert descent.reached == min(seen) < descent.before
    assert mse == pytest.approx(problem.score(better.plan), rel=1e-9)


@pytest.mark.parametrize("counts", [[7], [6, 7]])
def test_more_than_six_calls_fall_back_with_a_line(counts, model, tmp_path, monkeypatch, capsys):
    seen = []
    plain = gradient.Descent.__init__
    monkeypatch.setattr(
        gradient.Descent, "__init__", lambda self, *args: seen.append((type(self), args[3])) or plain(self, *args)
    )
    if counts == [7]:
        monkeypatch.setattr(search_setup, "load_feature_network", lambda *args: pytest.fail("it is not needed"))
    search(model, tmp_path, PERCEPTUAL, nfe=counts)
    assert [loss for kind, loss in seen if kind is gradient.Descent] == [terminal_loss]
    assert len(seen) == len(counts)
    assert "objective perceptual is for up to 6 calls; terminal takes its place at 7" in capsys.readouterr().err
    results = facts_of(tmp_path)["results"]
    assert [n for n in results if "validation_perceptual" in results[n]["stages"][-1]] == [str(n) for n in counts[:-1]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feature_network": "no/such/folder"}, "feature_network 'no/such/folder' could not be loaded"),
        ({"feature_network": f"{__name__}:Detached"}, "gives features without a gradient"),
    ],
)
def test_a_search_that_cannot_work_ends_before_its_references(changes, reason, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search_setup, "teacher_trajectory", lambda *args: pytest.fail("work was spent"))
    with pytest.raises(SystemExit):
        search(model, tmp_path, PERCEPTUAL, **changes)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in error
    assert not (tmp_path / "scheduler_config.json").exists()


def test_other_weights_are_another_search(model, tmp_path, monkeypatch, capsys):
    search(model, tmp_path, PERCEPTUAL)
    monkeypatch.setattr(sys.modules[__name__], "factory", lambda: TwoLayers(width=8))
    with pytest.raises(SystemExit):
        search(model, tmp_path, PERCEPTUAL)
    assert "holds another search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": "perceptual"}, "objective perceptual needs a feature_network"),
        ({"feature_network": "a:b"}, "feature_network is for objective perceptual"),
    ],
)
def test_objective_and_network_belong_together(changes, reason):
    with pytest.raises(ValueError, match=reason):
        SearchConfig(pretrained_model_name_or_path="m", output_dir="o", **changes)
