"""SiTPipeline against diffusers' own DiTPipeline, against loops written out here, and against misuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback

from diffusers_dssolver.pipelines import SiTPipeline

pytestmark = pytest.mark.filterwarnings(r"error:::diffusers_dssolver\..*")

CLASSES = 10
ID2LABEL = {0: "tench, Tinca tinca", 1: "crane", 2: "Crane", 3: "drake", 4: "bow, drake", 9: "volcano"}


def make_transformer(channels=4, out_channels=None, classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=channels,
        out_channels=out_channels,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=1,
    )
    for parameter in model.parameters():  # larger than the usual start: classes and times must matter
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_vae(**config):
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **DOWN_UP, **config)
    return vae.eval()


DOWN_UP = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def make_pipe(scheduler=None, vae=None, id2label=None, **transformer):
    pipe = SiTPipeline(make_transformer(**transformer), scheduler or FlowMatchEulerDiscreteScheduler(), vae, id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_noise(batch=2, channels=4, seed=7):
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def sample(pipe, labels=(1, 3), **kwargs):
    """Latents of a short run from fixed noise."""
    kwargs.setdefault("latents", make_noise(len(labels), pipe.transformer.config.in_channels))
    kwargs.setdefault("num_inference_steps", 3)
    return pipe(list(labels), output_type="latent", **kwargs).images


@torch.no_grad()
def euler(transformer, x, labels, scale, steps, guided_channels=4):
    """Rectified flow by hand: uniform nodes from 1 to 0, two network calls a step, guidance, Euler."""
    labels = torch.tensor(labels)
    nodes = torch.linspace(1, 0, steps + 1)
    for now, after in zip(nodes[:-1], nodes[1:], strict=True):
        t = (1000 * now).repeat(len(x))
        with_class = transformer(x, timestep=t, class_labels=labels).sample
        without = transformer(x, timestep=t, class_labels=torch.full_like(labels, CLASSES)).sample
        velocity = with_class.clone()
        velocity[:, :guided_channels] += (scale - 1) * (with_class - without)[:, :guided_channels]
        x = x + (after - now) * velocity
    return x


def record_calls(pipe):
    """A list that receives (hidden_states, timestep, class_labels) of each network call."""
    calls = []

    def hook(module, args, kwargs):
        calls.append((args[0], kwargs["timestep"], kwargs["class_labels"]))

    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


# --- the same numbers as others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_channels", [4, 8], ids=["plain", "learned_sigma"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_equals_diffusers_dit_pipeline(scale, out_channels):
    transformer = make_transformer(classes=1000, out_channels=out_channels)
    scheduler, vae = DDIMScheduler(clip_sample=False), make_vae(scaling_factor=0.5)
    ours = SiTPipeline(transformer, scheduler, vae)
    theirs = DiTPipeline(transformer, vae, scheduler)
    images = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        kwargs = {"guidance_scale": scale, "num_inference_steps": 4, "generator": generator, "output_type": "np"}
        images.append(pipe([5, 999], **kwargs).images)
    assert images[0].shape == (2, 16, 16, 3)
    assert images[0].std() > 0.01
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance_channels, guided_channels", [(None, 4), (3, 3), (1, 1)], ids=["all", "three", "one"])
def test_flow_trajectory_and_guided_channels_equal_hand_written_loop(guidance_channels, guided_channels):
    pipe, noise = make_pipe(), make_noise()
    result = sample(pipe, (1, 3), guidance_scale=2.5, guidance_channels=guidance_channels, latents=noise)
    expected = euler(pipe.transformer, noise, (1, 3), 2.5, 3, guided_channels)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    if guidance_channels is not None:
        everything = euler(pipe.transformer, noise, (1, 3), 2.5, 3)
        assert (result - everything).abs().max() > 1e-2


def test_one_step_guidance_differs_only_in_the_unguided_channels():
    pipe = make_pipe()
    everything = sample(pipe, num_inference_steps=1, guidance_scale=3.0)
    three = sample(pipe, num_inference_steps=1, guidance_scale=3.0, guidance_channels=3)
    none = sample(pipe, num_inference_steps=1, guidance_scale=1.0)
    assert torch.equal(three[:, :3], everything[:, :3])
    torch.testing.assert_close(three[:, 3:], none[:, 3:], rtol=0, atol=1e-6)
    assert not torch.allclose(three[:, 3:], everything[:, 3:], atol=1e-3)


def test_vp_scheduler_with_scaled_input_equals_hand_written_loop():
    """EulerDiscrete: noise of standard deviation sigma_max, input divided by sqrt(sigma^2 + 1), dx/dsigma = epsilon."""
    pipe, noise = make_pipe(EulerDiscreteScheduler()), make_noise()
    result = sample(pipe, (1, 3), guidance_scale=1.0, latents=noise)
    sigmas, timesteps = pipe.scheduler.sigmas, pipe.scheduler.timesteps
    x = noise * pipe.scheduler.init_noise_sigma
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            scaled = x / (sigmas[i] ** 2 + 1) ** 0.5
            x = x + (sigmas[i + 1] - sigmas[i]) * pipe.transformer(scaled, t.repeat(2), torch.tensor([1, 3])).sample
    assert sigmas[0] > 10
    torch.testing.assert_close(result, x, rtol=1e-5, atol=1e-5)


# --- schedulers -------------------------------------------------------------------------------------------------------

FLOW_UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    "scheduler, steps, grid",
    [
        (FlowMatchEulerDiscreteScheduler(), 4, [1000, 750, 500, 250]),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 2, [1000, 750]),
        (UniPCMultistepScheduler(**FLOW_UNIPC), 4, [999, 750, 500, 250]),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), 2, None),
        (UniPCMultistepScheduler(), 2, None),
        (DPMSolverMultistepScheduler(), 2, None),
        (DPMSolverMultistepScheduler(**FLOW_UNIPC), 2, None),
        (FlowMatchHeunDiscreteScheduler(), 2, None),
        (EDMEulerScheduler(), 2, None),
        (DDIMScheduler(), 2, None),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Scheduler") if hasattr(value, "config") else None,
)
def test_schedulers_get_the_grid_they_understand(scheduler, steps, grid):
    """grid: what a flow scheduler is asked for; None: whatever the scheduler does when left alone."""
    if grid is None:
        scheduler.set_timesteps(steps, device="cpu")
        grid = scheduler.timesteps.tolist()
    pipe = make_pipe(scheduler)
    calls = record_calls(pipe)
    result = sample(pipe, num_inference_steps=steps)
    assert torch.isfinite(result).all()
    assert [float(t[0]) for _, t, _ in calls] == pytest.approx(grid, rel=1e-6)
    assert pipe.num_timesteps == len(grid)


def test_scheduler_steps_the_single_batch_in_the_dtype_of_the_model():
    pipe = make_pipe().to(torch.bfloat16)
    seen, step = [], pipe.scheduler.step

    def spy(model_output, timestep, latents, return_dict=True):
        seen.append((model_output.shape, latents.shape, latents.dtype, timestep.shape))
        return tuple(x.float() for x in step(model_output, timestep, latents, return_dict=return_dict))

    pipe.scheduler.step = spy
    result = sample(pipe, guidance_scale=3.0)
    shape = torch.Size((2, 4, 8, 8))
    assert seen == [(shape, shape, torch.bfloat16, torch.Size(()))] * 3
    assert result.dtype == torch.bfloat16


class LearningEuler(FlowMatchEulerDiscreteScheduler):
    """FlowMatchEuler whose nodes are a leaf: switches gradients on, as a search for nodes would."""

    offset = 0.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None):
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas)
        torch.set_grad_enabled(True)
        self.nodes = self.sigmas.clone()
        self.nodes[1] += self.offset
        self.nodes.requires_grad_()
        self.sigmas, self.timesteps = self.nodes, 1000 * self.nodes[:-1]


def test_gradients_flow_through_the_whole_call():
    """Against a central difference; without the path through t the answer is another one."""
    pipe = make_pipe(LearningEuler())
    weights = make_noise(seed=8)

    def loss(offset):
        pipe.scheduler.offset = offset
        return (sample(pipe, guidance_scale=2.0, guidance_channels=3).double() * weights).sum()

    # the time embedding turns by up to one radian per unit of t, 1000 over the path: slow it down, or no
    # difference is fine enough
    for embedder in [m for m in pipe.transformer.modules() if type(m).__name__ == "Timesteps"]:
        embedder.scale = 1e-3
    width = 2e-2
    difference = (loss(width) - loss(-width)).item() / (2 * width)
    loss(0.0).backward()
    gradient = pipe.scheduler.nodes.grad[1].item()
    assert gradient == pytest.approx(difference, rel=1e-2)


def test_call_keeps_its_undecorated_function_and_gives_no_gradients_by_itself():
    assert callable(SiTPipeline.__call__.__wrapped__)
    assert not sample(make_pipe()).requires_grad


# --- classes and guidance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [5, CLASSES])
def test_null_class_comes_from_the_config(classes):
    pipe = make_pipe(classes=classes)
    calls = record_calls(pipe)
    sample(pipe, (1, 3), guidance_scale=1.01)
    assert [labels.tolist() for _, _, labels in calls] == [[1, 3, classes, classes]] * 3


@pytest.mark.parametrize("scale, rows", [(0.0, 2), (1.0, 2), (1.5, 4)])
def test_network_sees_twice_the_rows_only_with_guidance(scale, rows):
    pipe = make_pipe()
    calls = record_calls(pipe)
    sample(pipe, guidance_scale=scale)
    assert [(len(x), t.shape, len(labels)) for x, t, labels in calls] == [(rows, (rows,), rows)] * 3


@pytest.mark.parametrize(
    "class_labels, ids",
    [
        (4, [4]),
        ("volcano", [9]),
        (["VOLCANO", 0, " tinca tinca "], [9, 0, 0]),
        ("tench, Tinca tinca", [0]),
        (["crane", "Crane", "bow"], [1, 2, 4]),
        (torch.tensor([3, 1]), [3, 1]),
        (np.array(2), [2]),
        (np.int64(2), [2]),
        ((np.int64(2), torch.tensor(5)), [2, 5]),
    ],
)
def test_names_and_ids(class_labels, ids):
    pipe = make_pipe(id2label=ID2LABEL)
    assert pipe.get_label_ids(class_labels) == ids
    by_name, by_id = (sample_any(pipe, labels, len(ids)) for labels in (class_labels, ids))
    assert torch.equal(by_name, by_id)


def sample_any(pipe, class_labels, batch):
    return pipe(class_labels, num_inference_steps=1, latents=make_noise(batch), output_type="latent").images


def test_labels_and_config_of_names():
    pipe = make_pipe(id2label={0: "tench, Tinca tinca", "9": "volcano"})
    assert dict(pipe.config.id2label) == {"0": "tench, Tinca tinca", "9": "volcano"}
    assert pipe.labels == {"Tinca tinca": 0, "tench": 0, "volcano": 9}
    assert make_pipe().labels == {}


# --- noise and callbacks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler()], ids=["ode", "stochastic"])
def test_own_generator_makes_a_sample_independent_of_its_batch(scheduler):
    pipe = make_pipe(scheduler)

    def draw(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(labels, num_inference_steps=3, generator=generators, output_type="latent").images

    batch, alone = draw([1, 2, 3], [10, 11, 12]), draw([3], [12])
    torch.testing.assert_close(batch[2:], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(batch[2:], draw([3], [13]), atol=1e-2)


def test_callback_sees_every_step_and_edits_latents():
    pipe = make_pipe()
    calls, seen = record_calls(pipe), []

    def callback(pipeline, i, t, kwargs):
        seen.append((pipeline is pipe, i, float(t), list(kwargs)))
        return {"latents": torch.full_like(kwargs["latents"], 0.25)} if i == 1 else {}

    sample(pipe, guidance_scale=1.0, num_inference_steps=4, callback_on_step_end=callback)
    assert seen == [(True, i, t, ["latents"]) for i, t in enumerate([1000.0, 750.0, 500.0, 250.0])]
    fixed = [bool((x == 0.25).all()) for x, _, _ in calls]
    assert fixed == [False, False, True, False]


def test_callback_without_tensor_inputs_is_given_none():
    seen = []

    def callback(pipeline, i, t, kwargs):
        seen.append(list(kwargs))
        return kwargs

    sample(make_pipe(), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert seen == [[]] * 3


def test_callback_can_stop_guidance_and_interrupt():
    pipe = make_pipe()
    calls = record_calls(pipe)

    def callback(pipeline, i, t, kwargs):
        pipeline._guidance_scale = 1.0
        pipeline._interrupt = i == 1
        return kwargs

    for _ in range(2):  # neither outlives its call
        calls.clear()
        sample(pipe, guidance_scale=2.0, num_inference_steps=4, callback_on_step_end=callback)
        assert [len(x) for x, _, _ in calls] == [4, 2]


class NoInputs(PipelineCallback):
    tensor_inputs = ["noise"]


def test_callback_objects_bring_their_own_tensor_inputs():
    with pytest.raises(ValueError, match="'noise'"):
        sample(make_pipe(), callback_on_step_end=NoInputs(0.5))


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_pixel_space_outputs(channels, mode):
    pipe = make_pipe(channels=channels)
    noise = 3 * make_noise(2, channels)  # wide enough for both ends of the range
    runs = {
        kind: pipe([1, 3], latents=noise, num_inference_steps=2, output_type=kind)
        for kind in ("latent", "pt", "np", "pil")
    }
    latent, pt, array, pil = (run.images for run in runs.values())
    assert latent.shape == pt.shape == (2, channels, 8, 8)
    assert latent.min() < -1 and latent.max() > 1
    assert torch.equal(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert array.shape == (2, 8, 8, channels) and array.dtype == np.float32
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [(image.mode, image.size) for image in pil] == [(mode, (8, 8))] * 2
    bytes_of_pil = np.stack([np.asarray(image).reshape(8, 8, channels) for image in pil])
    np.testing.assert_array_equal(bytes_of_pil, (array * 255).round().astype(np.uint8))


def test_default_output_is_pil_and_return_dict_false_gives_a_tuple():
    pipe = make_pipe(channels=3)
    images = pipe([1, 3], num_inference_steps=1).images
    assert [image.mode for image in images] == ["RGB", "RGB"]
    result = pipe([1], num_inference_steps=1, output_type="pt", return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1 and result[0].shape == (1, 3, 8, 8)


def test_vae_is_given_unscaled_and_unshifted_latents():
    vae = make_vae(scaling_factor=0.3, shift_factor=0.7)
    pipe = make_pipe(vae=vae)
    latents = sample(pipe)
    image = pipe([1, 3], latents=make_noise(), num_inference_steps=3, output_type="pt").images
    with torch.no_grad():
        expected = (vae.decode(latents / 0.3 + 0.7).sample / 2 + 0.5).clamp(0, 1)
    assert image.shape == (2, 3, 16, 16)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    assert [x.size for x in pipe([1, 3], num_inference_steps=1).images] == [(16, 16)] * 2


@pytest.mark.parametrize("with_vae", [False, True])
def test_saved_and_loaded_pipeline_gives_equal_images(tmp_path, with_vae):
    pipe = make_pipe(vae=make_vae() if with_vae else None, id2label=ID2LABEL if with_vae else None)
    pipe.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.vae is not None) is with_vae
    assert loaded.labels == pipe.labels and len(pipe.labels) == (7 if with_vae else 0)
    labels = ["volcano", "Tinca tinca"] if with_vae else [9, 0]
    images = [p(labels, latents=make_noise(), num_inference_steps=2, output_type="np").images for p in (pipe, loaded)]
    np.testing.assert_array_equal(*images)


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"class_labels": 10}, r"class id 10 .* 0 to 9"),
        ({"class_labels": -1}, r"class id -1 .* 0 to 9"),
        ({"class_labels": [1, 2.5]}, r"2\.5 is neither"),
        ({"class_labels": 2.5}, r"2\.5 is neither"),
        ({"class_labels": "dragon"}, r"'dragon' is unknown; use 'Crane', .*9 names.*pipe\.labels"),
        ({"class_labels": "CRANE"}, r"'CRANE' belongs to the classes \[1, 2\]"),
        ({"class_labels": "drake"}, r"'drake' belongs to the classes \[3, 4\]"),
        ({"class_labels": []}, r"empty"),
        ({"guidance_channels": 0}, r"guidance_channels is 0; use 1 to 4"),
        ({"guidance_channels": 5}, r"guidance_channels is 5; use 1 to 4"),
        ({"num_inference_steps": 0}, r"num_inference_steps is 0"),
        ({"generator": [torch.Generator()]}, r"1 generators for 2"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"\(1, 4, 8, 8\).*\(2, 4, 8, 8\)"),
        ({"output_type": "jpeg"}, r"'jpeg'; use one of pil, np, pt, latent"),
        ({"output_type": "pil"}, r"1 or 3 image channels, here are 4"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "noise"]}, r"\['noise'\]; .*\['latents'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_misuse_is_refused_before_the_network_runs(kwargs, message):
    pipe = make_pipe(id2label={**ID2LABEL, 8: "fig, apple"})
    calls = record_calls(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1, 3], "output_type": "latent", "num_inference_steps": 1, **kwargs})
    assert not calls


def test_names_without_id2label_are_refused():
    with pytest.raises(ValueError, match="'volcano' is unknown: this pipeline has no id2label"):
        sample(make_pipe(), ["volcano"])


@pytest.mark.parametrize("key", ["10", "tench", -1])
def test_id2label_of_other_classes_is_refused(key):
    with pytest.raises(ValueError, match=f"{key}.*0 to 9"):
        make_pipe(id2label={key: "tench"})


def make_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=CLASSES + 1,
    ).double().eval()  # fmt: skip


def test_a_unet_has_its_null_class_last():
    """Its table of classes counts the null class, that of a DiT does not."""
    pipe = SiTPipeline(make_unet(), FlowMatchEulerDiscreteScheduler(), id2label={CLASSES - 1: "volcano"})
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_classes == CLASSES and pipe.get_label_ids("volcano") == [CLASSES - 1]
    with pytest.raises(ValueError, match=f"class id {CLASSES} is unknown"):
        pipe([CLASSES])
    with pytest.raises(ValueError, match=f"id2label has the key '{CLASSES}'"):
        SiTPipeline(make_unet(), FlowMatchEulerDiscreteScheduler(), id2label={CLASSES: "null"})
    noise, labels = make_noise(1, 3).double(), torch.tensor([2, CLASSES])
    with torch.no_grad():
        conditional, null = pipe.transformer(torch.cat([noise, noise]), torch.full((2,), 1000.0), labels).sample
    expected = noise - (null + 3 * (conditional - null))
    made = pipe([2], guidance_scale=3.0, num_inference_steps=1, latents=noise, output_type="latent").images
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)  # sigmas of the stock scheduler are float32
