"""FlowDCN against the authors' code (golden tensors), against loops written out here, and their checkpoints."""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch.autograd import gradcheck

import diffusers_dssolver
from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.models.transformer_flowdcn import FlowDCNTransformer2DModel, aggregate
from diffusers_dssolver.pipelines import SiTPipeline
from diffusers_dssolver.published import published_config
from dssolver_search.checkpoints.flowdcn import convert_flowdcn, denoiser_weights
from tests.runtime.test_contract import Allocations

TINY = {"sample_size": 8, "hidden_size": 12, "num_layers": 2, "num_groups": 3, "num_embeds_ada_norm": 5}
# hidden_size, num_layers, num_groups, and parameters as counted on the authors' classes (MCG-NJU/FlowDCN at aa48042)
SIZES = {
    "S": (384, 12, 6, 30_300_632),
    "B": (768, 12, 12, 120_099_512),
    "L": (1024, 24, 16, 421_503_952),
    "XL": (1152, 28, 16, 618_948_120),
}


@pytest.fixture(scope="module")
def golden():
    """See tests/data/README.md; in float64, which holds what is stored exactly.

    The authors' kernels ran in float32. Computed here in float64, the difference is their rounding alone, which is a
    fixed number: 8e-7 in `out`, 1.1e-5 in `grad_x`, 7e-7 in `kernel.out`. It does not depend on the processor.
    """
    tensors = load_file(Path(__file__).parents[1] / "data" / "golden_flowdcn.safetensors")
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


@pytest.fixture
def state(golden):
    """The state dict of the authors' network."""
    return {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = FlowDCNTransformer2DModel(**{**TINY, **changes})
    for parameter in model.parameters():  # nothing zero: all must matter
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_inputs(height=8, width=8, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, height, width, generator=generator), torch.tensor([700.0, 120.0]), torch.tensor([3, 5])


def sampled(shape, seed=0, spread=3.0):
    """Values, offsets that often leave the image, and weights, float64."""
    batch, height, width, groups, channels, points = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, height, width, groups, channels, generator=generator, dtype=torch.float64)
    offsets = spread * torch.randn(batch, height, width, groups, points, 2, generator=generator, dtype=torch.float64)
    weights = torch.randn(batch, height, width, groups, points, generator=generator, dtype=torch.float64)
    return values, offsets, weights


def by_loops(values, offsets, weights):
    """The kernel, one number after the other: cells by rounding towards zero, zeros outside."""
    batch, height, width, groups, _ = values.shape
    out = torch.zeros_like(values)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                for g in range(groups):
                    for (dx, dy), weight in zip(
                        offsets[b, i, j, g].tolist(), weights[b, i, j, g].tolist(), strict=True
                    ):
                        x, y = j + dx, i + dy
                        left, top = math.trunc(x), math.trunc(y)
                        for column, across in ((left, left + 1 - x), (left + 1, x - left)):
                            for row, down in ((top, top + 1 - y), (top + 1, y - top)):
                                if 0 <= column < width and 0 <= row < height:
                                    out[b, i, j, g] += weight * across * down * values[b, row, column, g]
    return out


# --- the authors' code ------------------------------------------------------------------------------------------------


def test_the_authors_network(golden, state):
    """Their t runs from 0 (noise) to 1 (data), their velocity is data - noise, id 10 of 10 classes is the null one."""
    model = convert_flowdcn(state).double()
    x = golden["x"].requires_grad_()
    out = model(x, 1000 * (1 - golden["t"]), golden["y"]).sample
    torch.testing.assert_close(-out, golden["out"], rtol=0, atol=2e-6)
    [gradient] = torch.autograd.grad((-out * golden["cotangent"]).sum(), x)
    torch.testing.assert_close(gradient, golden["grad_x"], rtol=0, atol=2e-5)
    assert golden["y"].max() == model.config.num_embeds_ada_norm == 10


def test_the_authors_kernel(golden):
    values, offsets, weights = (golden[f"kernel.{name}"] for name in ("values", "offsets", "weights"))
    steps = torch.arange(6)
    outside = offsets[..., 0] + steps.view(1, 1, 6, 1, 1) < 0
    assert 0.1 < outside.float().mean() < 0.5
    torch.testing.assert_close(aggregate(values, offsets, weights), golden["kernel.out"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes_have_the_official_numbers_of_parameters(size):
    hidden_size, num_layers, num_groups, wanted = SIZES[size]
    with torch.device("meta"):  # their head has twice the channels
        model = FlowDCNTransformer2DModel(
            hidden_size=hidden_size, num_layers=num_layers, num_groups=num_groups, out_channels=8
        )
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == wanted


# --- the sum over points ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 5, 2, 3, 4), (1, 6, 2, 3, 2, 9), (1, 1, 1, 1, 1, 1)])
def test_the_sum_is_that_of_loops(shape):
    values, offsets, weights = sampled(shape)
    torch.testing.assert_close(aggregate(values, offsets, weights), by_loops(values, offsets, weights))


def test_points_on_tokens_and_borders():
    """Whole and half positions around the image, where rounding decides."""
    values, _, _ = sampled((1, 4, 4, 1, 2, 1))
    places = torch.arange(-3, 6, 0.5, dtype=torch.float64)
    offsets = torch.cartesian_prod(places, places).expand(1, 4, 4, 1, -1, 2).contiguous()
    weights = torch.rand(offsets.shape[:-1], dtype=torch.float64)
    torch.testing.assert_close(aggregate(values, offsets, weights), by_loops(values, offsets, weights))


@pytest.mark.parametrize(
    "x, shares",
    [(0.5, (0.5, 0.5)), (-0.5, (1.5, -0.5)), (-1.5, (-0.5, 0)), (-2.5, (0, 0)), (1.5, (0, 0.5)), (2.5, (0, 0))],
)
def test_near_edges_continue_a_line_and_far_ones_fade(x, shares):
    values = torch.tensor([3.0, 7.0]).view(1, 1, 2, 1, 1)
    offsets = torch.tensor([x, 0.0]).expand(1, 1, 2, 1, 1, 2)
    out = aggregate(values, offsets, torch.ones(1, 1, 2, 1, 1))
    assert out.flatten()[0] == shares[0] * 3 + shares[1] * 7


def test_gradients_of_the_sum():
    values, offsets, weights = sampled((1, 3, 2, 2, 2, 4))
    offsets = offsets.trunc() + 0.1 + 0.8 * (offsets - offsets.trunc()).abs()  # away from the kinks
    inputs = [tensor.requires_grad_() for tensor in (values, offsets, weights)]
    assert gradcheck(aggregate, inputs)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1e30])
def test_points_of_a_diverged_run_read_nothing_outside(wrong):
    values, offsets, weights = sampled((1, 3, 3, 1, 2, 2))
    offsets[0, 1, 1, 0, 0, 0] = wrong
    out = aggregate(values, offsets, weights)
    assert out[0, 1, 1].isfinite().all() == (wrong == -1e30)
    out[0, 1, 1] = 0
    assert out.isfinite().all()


def test_memory_is_linear_in_tokens_and_no_gather_is_made():
    peaks = []
    for side in (8, 16):
        values, offsets, weights = (tensor.float() for tensor in sampled((1, side, side, 2, 64, 9)))
        with Allocations() as allocations:
            aggregate(values, offsets, weights)
        peaks.append(allocations.peak)
        assert allocations.peak < 6 * values.nbytes  # a gather alone takes 36 times
    assert peaks[1] == pytest.approx(4 * peaks[0], rel=0.02)


# --- the network ------------------------------------------------------------------------------------------------------


def test_gradients_of_the_network():
    """By x and by the time, as a search of solvers takes them."""
    model = make_model(num_layers=1).double()
    x, timestep, labels = make_inputs(4, 4)
    inputs = [x.double().requires_grad_(), timestep.double().requires_grad_()]
    assert gradcheck(lambda x, t: model(x, 10 * t, labels).sample, inputs)
    [by_time] = torch.autograd.grad(model(x.double(), inputs[1], labels).sample.square().sum(), inputs[1])
    assert by_time.abs().min() > 1e-6


def test_checkpointing_changes_memory_not_gradients():
    model, gradients, held = make_model(num_layers=4), [], []
    x, timestep, labels = make_inputs()
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.zero_grad()
        given = x.clone().requires_grad_()
        with Allocations() as allocations:
            loss = model(given, timestep, labels).sample.square().sum()
            held.append(allocations.now())
            loss.backward()
        gradients.append([given.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert held[1] < 0.3 * held[0]


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12), (16, 6)])
def test_any_resolution(height, width):
    """Without blocks a network answers for each patch alone, wherever it is; with them it sees the others."""
    x, timestep, labels = make_inputs(height, width)
    for layers in (0, 2):
        model = make_model(num_layers=layers)
        out = model(x, timestep, labels).sample
        assert out.shape == x.shape
        part = model(x[..., 2:4, 4:6], timestep, labels).sample
        assert torch.allclose(out[..., 2:4, 4:6], part, atol=1e-5) == (layers == 0)
    assert torch.equal(out, model(x, timestep, labels).sample)


def test_one_time_for_all_and_labels_that_matter():
    model = make_model()
    x, _, labels = make_inputs()
    wanted = model(x, torch.full((2,), 700.0), labels).sample
    for timestep in (700, 700.0, torch.tensor(700), torch.tensor([700.0]), torch.tensor(700.0, dtype=torch.float64)):
        torch.testing.assert_close(model(x, timestep, labels, return_dict=False)[0], wanted, rtol=0, atol=1e-6)
    assert (model(x, 600, labels).sample - wanted).abs().max() > 1e-3
    assert (model(x, 700, torch.tensor([3, 2])).sample - wanted)[1].abs().max() > 1e-3


def test_wrong_sizes_are_named():
    x, timestep, labels = make_inputs(8, 7)
    with pytest.raises(ValueError, match="8 x 7; both must be multiples of patch_size, 2"):
        make_model()(x, timestep, labels)
    with pytest.raises(ValueError, match=r"hidden_size is 12.*multiple of num_groups, 5"):
        make_model(num_groups=5)
    with pytest.raises(ValueError, match=r"num_points is 8.*square"):
        make_model(num_points=8)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_precision_and_autocast(dtype, bound):
    """No float32 left inside, no warning, and the error of a few roundings."""
    model = make_model()
    x, timestep, labels = make_inputs()
    wanted = model(x, timestep, labels).sample.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", dtype):
            mixed = model(x, timestep, labels).sample
        mixed.float().sum().backward()
        model.to(dtype)
        half = model(x.to(dtype), timestep, labels).sample
        half.sum().backward()
    assert mixed.dtype == half.dtype == dtype
    for out in (mixed, half):
        assert (out.float() - wanted).abs().max() < bound * wanted.abs().max()


def test_compiles_in_one_graph():
    model = make_model(num_layers=1)
    x, timestep, labels = make_inputs(4, 4)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(x, timestep, labels).sample
    torch.testing.assert_close(found, model(x, timestep, labels).sample)


def test_a_fresh_network_starts_as_the_authors_does(state):
    """Silent, with a 3 x 3 grid of points whose reach grows with the group to 6 tokens."""
    model = FlowDCNTransformer2DModel(**TINY)
    assert not model(*make_inputs()).sample.any()
    attention = model.blocks[0].attn
    assert torch.equal(attention.deformables_prior, state["blocks.0.attn.deformables_prior"])  # fixed, never drawn anew
    seen = []
    attention.out.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        attention.qk_weights.bias.view(3, 9)[:, 8] = 1.0  # the last point: x = y = 1
        attention.v.weight.copy_(torch.eye(12))
        x = torch.zeros(1, 9, 9, 12)
        x[0, 6, 6] = 1.0
        attention(x)
    assert [int(v) for v in seen[0][0, 4, 4].view(3, 4)[:, 0].round()] == [1, 0, 0]  # reach 2 of 2, 4, 6
    assert [int(v) for v in seen[0][0, 2, 2].view(3, 4)[:, 0].round()] == [0, 1, 0]
    assert [int(v) for v in seen[0][0, 0, 0].view(3, 4)[:, 0].round()] == [0, 0, 1]


# --- saved, and in a pipeline -----------------------------------------------------------------------------------------


def make_pipe(scheduler, model=None):
    pipe = SiTPipeline(model or make_model(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_saved_and_loaded(tmp_path):
    model = make_model(out_channels=8, patch_size=4, inner_size=20)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "FlowDCNTransformer2DModel"
    for dtype in (torch.float32, torch.bfloat16):
        again = FlowDCNTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
        assert again.dtype == dtype and {k: v for k, v in again.config.items() if k[0] != "_"} == {
            k: v for k, v in model.config.items() if k[0] != "_"
        }
        assert all(torch.equal(v, model.state_dict()[k].to(dtype)) for k, v in again.state_dict().items())


def test_a_saved_pipeline_is_loaded_by_name(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = make_pipe(FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers_dssolver", "FlowDCNTransformer2DModel"]
    assert diffusers_dssolver.FlowDCNTransformer2DModel is FlowDCNTransformer2DModel
    again = SiTPipeline.from_pretrained(tmp_path)
    assert "Expected types" not in caplog.text  # the class is one that the pipeline's signature admits
    again.set_progress_bar_config(disable=True)
    noise = make_inputs()[0]
    first, second = (
        p([1, 2], latents=noise, num_inference_steps=2, output_type="latent").images for p in (pipe, again)
    )
    assert torch.equal(first, second)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffusers_dssolver.nothing


@torch.no_grad()
def theirs(model, x, t, labels, scale):
    """The authors' guided velocity, data - noise, at their time t."""
    both = -model(torch.cat([x, x]), 1000 * (1 - t), torch.cat([torch.full_like(labels, 5), labels])).sample
    null, conditional = both.chunk(2)
    return null + scale * (conditional - null)


def test_euler_of_the_pipeline_is_the_authors():
    """Their sampler steps x + v dt from t = 0 to 1."""
    pipe, x = make_pipe(FlowMatchEulerDiscreteScheduler()), make_inputs()[0]
    found = pipe([1, 4], latents=x, guidance_scale=2.0, num_inference_steps=4, output_type="latent").images
    for i in range(4):
        x = x + theirs(pipe.transformer, x, i / 4, torch.tensor([1, 4]), 2.0) / 4
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_the_solver_searched_on_flowdcn_runs():
    """The published table, 5 steps, by hand in the authors' convention."""
    table = published_config("flowdcn-b-2-256")["solvers"]["5"]
    pipe, x = make_pipe(DSSolverScheduler.from_published("flowdcn-b-2-256")), make_inputs()[0]
    found = pipe([1, 4], latents=x, guidance_scale=2.0, num_inference_steps=5, output_type="latent").images
    times, velocities = [1 - node for node in table["nodes"]], []
    fed = [1 - t / 1000 for t in table.get("timesteps", [1000 * node for node in table["nodes"]])]
    for i, row in enumerate(table["coefficients"]):
        velocities.append(theirs(pipe.transformer, x, fed[i], torch.tensor([1, 4]), 2.0))
        x = x + (times[i + 1] - times[i]) * sum(c * v for c, v in zip(row, velocities, strict=True))
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_sizes_are_read_off_and_the_unread_half_is_left_behind(state):
    model = convert_flowdcn(state, sample_size=64)
    config = model.config
    assert (config.hidden_size, config.num_layers, config.num_groups, config.num_points) == (24, 3, 3, 9)
    assert (config.patch_size, config.in_channels, config.out_channels, config.inner_size) == (2, 4, 4, 64)
    assert (config.num_embeds_ada_norm, config.sample_size) == (10, 64)
    assert not model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    single = {
        k: v.view(4, 8, *v.shape[1:])[:, :4].flatten(0, 1) if "final_layer.linear" in k else v for k, v in state.items()
    }
    again = convert_flowdcn(single)  # without learned sigma
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_averages_are_taken_from_checkpoints_of_training(state):
    """Lightning's: names behind a prefix, the averages as a list in the order of the parameters."""
    kept = {"vae.model.weight": torch.zeros(1)} | {f"denoiser.{k}": v for k, v in state.items()}
    averages = tuple(v + 1 for v in state.values())
    found = denoiser_weights({"state_dict": kept, "optimizer_states": [{"opt": {}, "ema": averages}], "epoch": 3})
    assert all(torch.equal(found[k], v + 1) for k, v in state.items()) and len(found) == len(state)
    for raw in (state, {"state_dict": kept}, {"state_dict": kept, "optimizer_states": [{"opt": {}}]}):
        found = denoiser_weights(raw)
        assert all(torch.equal(found[k], v) for k, v in state.items()) and len(found) == len(state)
    later = {"state_dict": kept | {f"ema_denoiser.{k}": v + 2 for k, v in state.items()}}
    found = denoiser_weights(later)
    assert all(torch.equal(found[k], v + 2) for k, v in state.items()) and len(found) == len(state)


@pytest.mark.parametrize(
    "raw",
    [
        {"state_dict": {"net.w": torch.zeros(1)}},
        {"state_dict": 3},
        {"state_dict": {"denoiser.w": torch.zeros(1)}, "optimizer_states": [{"ema": (torch.zeros(2),)}]},
        {"state_dict": {"denoiser.w": torch.zeros(1)}, "optimizer_states": [{"ema": ()}]},
    ],
)
def test_checkpoints_of_other_things_are_refused(raw):
    with pytest.raises(
        ValueError, match=r"the FlowDCN checkpoint has .*give.* state dict|give the network's own"
    ) as told:
        denoiser_weights(raw)
    assert "\n" not in str(told.value)


def change(key, value):
    return lambda state: {**state, key: value(state[key])}


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda state: {}, r"missing \('blocks\.0\."),
        (lambda state: {k: v for k, v in state.items() if k != "blocks.1.mlp.w1.weight"}, "1 missing .'blocks.1"),
        (lambda state: {**state, "pos_embed": torch.zeros(1)}, "1 unexpected .'pos_embed'"),
        (lambda state: {**state, 3: torch.zeros(1)}, "1 unexpected .3"),
        (change("blocks.2.mlp.w2.weight", lambda v: v.T), r"2.mlp.w2.weight of shape \(64, 24\).*has \(24, 64\)"),
        (change("final_layer.linear.weight", lambda v: v[:-1]), "4 channels in and 7 out"),
        (change("final_layer.linear.bias", lambda v: v[:-1]), r"final_layer.linear.bias of shape \(31,\)"),
        (change("x_embedder.proj.weight", lambda v: v[:, :, :, :1]), "x_embedder.proj.weight of shape"),
        (change("x_embedder.proj.weight", lambda v: v[..., :0]), "0 channels in"),
        (change("y_embedder.embedding_table.weight", lambda v: v[:1]), "num_embeds_ada_norm 0"),
        (change("blocks.0.attn.v.bias", lambda v: v * math.nan), "no finite floats under 'blocks.0.attn.v.bias'"),
        (change("blocks.0.attn.v.bias", lambda v: v.tolist()), "no finite floats under 'blocks.0.attn.v.bias'"),
    ],
)  # fmt: skip
def test_wrong_weights_are_named_on_one_line(spoil, told, state):
    with pytest.raises(ValueError, match=told) as error:
        convert_flowdcn(spoil(state))
    assert "\n" not in str(error.value)
