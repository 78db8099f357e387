"""The search: its formulas against numpy and hand-written loops, its runs against interruption, its command end to end.

The models are random one-layer transformers made slow in time, so that a few dozen steps converge as on a real model.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.paths import FlowPath, VPPath, make_betas
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.cli import main
from dssolver_search.methods import fill as fill_module
from dssolver_search.methods import setup as search_setup
from dssolver_search.methods import stages
from dssolver_search.methods.closed_form import DECIMALS, ClosedForm, RowFit, warped_nodes
from dssolver_search.methods.gauss_newton import DAMPINGS, Polish, polish
from dssolver_search.methods.objective import paper_loss
from dssolver_search.methods.paper import Loop
from dssolver_search.methods.parameters import PaperParameters
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.pipeline.probe import ProbeScheduler, run
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.settings import STARTS
from dssolver_search.teacher.trajectories import Reference, reference
from tests.problems import GaussianProblem

FAMILIES = ("flow", "vp")
CLASSES = 3
BETA_END = 0.006  # a first alpha of 0.2: a random network's errors stay of the size of its data
both = pytest.mark.parametrize("family", FAMILIES)
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


def make_scheduler(family):
    return FlowMatchEulerDiscreteScheduler() if family == "flow" else DDIMScheduler(beta_end=BETA_END)


def make_path(family):
    return FlowPath() if family == "flow" else VPPath(make_betas(1000, 1e-4, BETA_END, "linear", None, False))


def make_pipe(family, seed=0):
    """A random class-conditional model of 4 x 4 pixels whose output changes slowly with time."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_num_groups=1,
    )
    for name, parameter in transformer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.25)
        if name.endswith("timestep_embedder.linear_1.weight"):  # 128 frequencies, twice: without the fast ones
            parameter.data[:, (torch.arange(256) % 128) < 80] = 0
    pipe = SiTPipeline(transformer.eval().requires_grad_(False), make_scheduler(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sampler(pipe, guidance_scale=1.5, seed=0):
    return Sampler(pipe, {"guidance_scale": guidance_scale}, seed=seed)


def make_probe(pipe):
    return ProbeScheduler.from_config(pipe.scheduler.config, solvers="classical")


def alone(tensor):
    """The sum over one process."""
    return tensor


def quiet_reference(sampler, indices=range(4), split="train", steps=20, order=3, **kwargs):
    return reference(sampler, make_probe(sampler.pipe), indices, split, steps, order, 4, progress=False, **kwargs)


@functools.cache
def searched(family):
    """(ClosedForm, its sampler) with converged references of four train and four other samples."""
    sampler = make_sampler(make_pipe(family))
    train, validation = (quiet_reference(sampler, range(4), split, 60) for split in ("train", "validation"))
    probe = make_probe(sampler.pipe)
    return ClosedForm(sampler, probe, (range(4), train), (range(4), validation), 4, alone), sampler


class Recording:
    """The states and guided outputs that pass through a pipeline's transformer, one entry per call."""

    def __init__(self, pipe, guidance_scale=1.5):
        self.pipe, self.scale, self.states, self.outputs, self.times = pipe, guidance_scale, [], [], []

    def __enter__(self):
        self.handle = self.pipe.transformer.register_forward_hook(self.hook, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.handle.remove()

    def hook(self, module, args, kwargs, result):
        with_class, without = result[0].chunk(2)
        self.outputs.append(without + self.scale * (with_class - without))
        self.states.append(args[0].chunk(2)[0])
        self.times.append(float(kwargs["timestep"][0]))


# --- nodes and rows ---------------------------------------------------------------------------------------------------

warps = st.tuples(*[st.floats(-4, 4)] * 3)


@given(warps, st.integers(1, 30))
def test_warped_nodes_fall_from_one_to_zero(warp, nfe):
    nodes = warped_nodes(warp, nfe)
    assert nodes.dtype == torch.float64 and nodes.shape == (nfe + 1,)
    assert nodes[0] == 1 and nodes[-1] == 0
    assert (nodes[1:] < nodes[:-1]).all()


@given(warps, st.integers(2, 30))
def test_warped_nodes_are_the_softmax_written_out(warp, nfe):
    u = np.linspace(-1, 1, nfe)
    exponents = warp[0] * u + warp[1] * u**2 + warp[2] * u**3
    weights = np.exp(exponents - exponents.max())
    expected = 1 - np.concatenate([[0], np.cumsum(weights / weights.sum())])
    np.testing.assert_allclose(warped_nodes(warp, nfe), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nfe", [1, 2, 7])
def test_no_warp_is_uniform(nfe):
    np.testing.assert_allclose(warped_nodes((0, 0, 0), nfe), np.linspace(1, 0, nfe + 1), rtol=0, atol=1e-15)


def row_problem(rows=3, length=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(rows, length, generator=generator) * torch.tensor([[1.0], [3.0], [0.2]])
    return torch.randn(length, generator=generator), columns


def corrections_of(fit, parts, reduce=alone):
    """What a fit adds to the row that it is shown."""
    prior = [0.25, -0.5, 0.75, 0.5]
    for left, columns in parts:
        fit(prior, left, columns)
    row = fit.solve(reduce)
    assert sum(row) == pytest.approx(sum(prior), abs=1e-12)
    return torch.tensor(row, dtype=torch.float64)[:3] - torch.tensor(prior[:3], dtype=torch.float64)


@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_row_fit_is_least_squares_on_the_augmented_system(ridge):
    left, columns = row_problem()
    matrix = columns.double().numpy().T
    scale = ridge * (matrix**2).sum(0).mean()  # the mean squared length of the columns
    augmented = np.concatenate([matrix, np.sqrt(scale) * np.eye(3)])
    expected = np.linalg.lstsq(augmented, np.concatenate([left.double().numpy(), np.zeros(3)]), rcond=None)[0]
    found = corrections_of(RowFit(ridge), [(left, columns)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.6 * 10**-DECIMALS)


def test_enormous_ridge_keeps_the_classical_row():
    assert corrections_of(RowFit(1e12), [row_problem()]).abs().max() < 1e-9


def test_batches_and_shards_solve_the_system_of_the_whole():
    left, columns = row_problem()
    whole = corrections_of(RowFit(0.01), [(left, columns)])
    parts = [(left[part], columns[:, part]) for part in (slice(0, 20), slice(20, 35), slice(35, None))]
    torch.testing.assert_close(corrections_of(RowFit(0.01), parts), whole, rtol=0, atol=1e-12)
    systems = []
    corrections_of(RowFit(0.01), parts[1:], lambda mine: systems.append(mine) or mine)
    shard = corrections_of(RowFit(0.01), parts[:1], lambda mine: mine + systems[0])
    torch.testing.assert_close(shard, whole, rtol=0, atol=1e-12)


# --- closed form inside the pipeline's call ---------------------------------------------------------------------------

WARP = (0.5, -0.3, 0.2)


def classical_rows(path, nodes, order=2):
    if isinstance(path, FlowPath):
        return SolverSpec.adams_bashforth(nodes, order).coefficients
    lambdas = path.lambdas(torch.tensor(nodes, dtype=torch.float64)).tolist()
    return SolverSpec.dpm_solver_pp(nodes, lambdas, order).coefficients


@both
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_rows_are_an_independent_least_squares_solution(family, ridge):
    """From the recorded network outputs: d, A and B by hand, then numpy on the system that pulls to classical rows."""
    form, sampler = searched(family)
    with Recording(sampler.pipe) as seen:
        spec = form.fit(4, WARP, ridge).spec
    nodes = torch.tensor(spec.nodes, dtype=torch.float64)
    assert torch.equal(nodes, warped_nodes(WARP, 4))
    path = make_path(family)
    assert seen.times[-4:] == pytest.approx(path.timestep(nodes[:-1]).tolist(), rel=1e-6)
    alpha, sigma = (f.numpy() for f in path.alpha_sigma(nodes))
    # runs up to each row, mostly replayed, then the one to the end
    states = [s.double().flatten().numpy() for s in seen.states[-4:]]
    outputs = [o.double().flatten().numpy() for o in seen.outputs[-4:]]
    if family == "flow":
        quantities, a = outputs, np.ones(4)
        b = sigma[1:] - sigma[:-1]
    else:
        quantities = [(x - s * o) / al for x, o, s, al in zip(states, outputs, sigma, alpha, strict=False)]
        a = sigma[1:] / sigma[:-1]
        b = alpha[1:] - a * alpha[:-1]
    targets = [
        form.train[1].at(angle).double().flatten().numpy() for angle in torch.atan2(*map(torch.tensor, (sigma, alpha)))
    ]
    prior = classical_rows(path, spec.nodes)
    for i, row in enumerate(spec.coefficients):
        assert sum(row) == pytest.approx(1, abs=1e-12)
        if i == 0:
            assert row == (1.0,)
            continue
        left = targets[i + 1] - a[i] * states[i] - b[i] * sum(c * d for c, d in zip(prior[i], quantities, strict=False))
        columns = np.stack([b[i] * (d - quantities[i]) for d in quantities[:i]], axis=1)
        pull = np.sqrt(ridge * (columns**2).sum(0).mean()) * np.eye(i)
        delta = np.linalg.lstsq(np.concatenate([columns, pull]), np.concatenate([left, np.zeros(i)]), rcond=None)[0]
        expected = np.add(prior[i], [*delta, -delta.sum()])
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=2e-4)


def final_mse(form, nodes, rows=None, order=2):
    """Mean squared error of the train samples' final states, run anew."""
    indices, wanted = form.train
    form.probe.prepare(nodes, rows, order=order)
    final = run(form.sampler, form.probe, indices, "train", len(nodes) - 1)[-1]
    return (final - wanted.final).double().square().mean().item()


@both
def test_last_row_is_the_best_and_the_whole_beats_classical_rows(family):
    form, _ = searched(family)
    found = form.fit(4, WARP, 1e-10)
    nodes, rows = warped_nodes(WARP, 4), [list(row) for row in found.spec.coefficients]
    best = final_mse(form, nodes, rows)
    assert best == pytest.approx(found.train_mse, rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-1):
        for _ in range(6):
            change = torch.randn(4, generator=generator, dtype=torch.float64)
            change = size * (change - change.mean())
            perturbed = [*rows[:-1], (torch.tensor(rows[-1], dtype=torch.float64) + change).tolist()]
            assert final_mse(form, nodes, perturbed) > best
    assert all(best < 0.8 * final_mse(form, nodes, order=order) for order in (1, 2, 3))


@both
def test_search_returns_its_best_on_held_out_samples(family):
    form, _ = searched(family)
    trials = []
    form = ClosedForm(form.sampler, form.probe, form.train, form.validation, 2, alone, trials.append)
    found = form.search(3, trials=7, ridge=1e-4)
    assert len(trials) == 7 + 5 + 2
    assert [t.warp for t in trials[:4]] == [(0, 0, 0), (0.8, 0, 0), (0, 0.8, 0), (0, 0, 0.8)]
    few = Reference(form.train[1].angles, form.train[1].states[:, :2])
    assert trials[1].spec == form.fit(3, (0.8, 0, 0), 1e-4, (range(2), few)).spec  # warps are compared on two samples
    best = sorted(trials[:7], key=lambda t: t.train_mse)[:5]
    again = trials[7:12]
    assert [t.warp for t in again] == [t.warp for t in best]
    assert again[0].spec == form.fit(3, best[0].warp, 1e-4).spec  # and fitted again to all four
    first = min(again, key=lambda t: t.train_mse)
    assert [(t.warp, t.ridge) for t in trials[12:14]] == [(first.warp, 1e-3), (first.warp, 1e-2)]
    scores = [form.score(warped_nodes(t.warp, 3), t.spec.coefficients) for t in trials[7:14]]
    assert found.validation_mse == pytest.approx(min(scores), rel=1e-6)
    assert found.validation_mse < 0.8 * min(form.score(warped_nodes((0, 0, 0), 3), None, o) for o in (1, 2, 3))


# --- polish -----------------------------------------------------------------------------------------------------------


@both
def test_polish_starts_at_the_candidate(family):
    form, _ = searched(family)
    found = form.fit(3, WARP, 1e-4)
    problem = Polish(form, found)
    raw, rows, offsets = problem.solver(torch.zeros(problem.count, dtype=torch.float64))
    assert problem.count == 2 + 3 + 3
    torch.testing.assert_close(raw, found.raw, rtol=0, atol=1e-14)
    assert [pytest.approx(row, abs=1e-14) for row in found.spec.coefficients] == rows
    assert not offsets.any()
    raw, rows, offsets = problem.solver(torch.randn(problem.count, dtype=torch.float64))
    assert raw[0] == 1 and raw[-1] == 0 and (raw.diff() < 0).all()
    assert all(sum(row) == pytest.approx(1, abs=1e-12) for row in rows) and offsets.all()


@both
def test_polish_step_is_the_gauss_newton_step(family):
    """Against central differences and numpy's least squares on the damped system."""
    form, _ = searched(family)
    problem = Polish(form, form.fit(3, WARP, 1e-4))
    start = torch.zeros(problem.count, dtype=torch.float64)

    def errors(parameters):
        return problem.errors("train", parameters).flatten().double().numpy()

    columns = []
    for k in range(problem.count):
        move = torch.zeros_like(start)
        move[k] = 1e-2
        columns.append((errors(start + move) - errors(start - move)) / 2e-2)
    jacobian = np.stack(columns, 1)
    jacobian[:, -3] = 0 if family == "vp" else jacobian[:, -3]  # the first node cannot be fed a noisier time
    for damping, got in zip(DAMPINGS, problem.step(start, lambda: None), strict=True):
        scale = np.sqrt(damping * np.maximum((jacobian**2).sum(0), 1e-9))
        system = np.concatenate([jacobian, np.diag(scale)])
        wanted = np.linalg.lstsq(system, -np.concatenate([errors(start), 0 * scale]))[0]
        predicted = np.square(errors(start) + jacobian @ wanted).mean()
        reached = np.square(errors(start) + jacobian @ got.numpy()).mean()
        assert reached < 1.2 * predicted + 1e-9
        assert predicted < 0.95 * np.square(errors(start)).mean()


@both
def test_polish_lowers_the_held_out_error_or_leaves_the_candidate_alone(family):
    form, _ = searched(family)
    found = form.validated(form.fit(4, (0.0, 0.0, 0.0), 1e-4))
    calls = []
    better = polish(form, found, 2, lambda: calls.append(0))
    assert len(calls) in (Polish(form, found).count, 2 * Polish(form, found).count)
    assert better.validation_mse < 0.97 * found.validation_mse
    again = form.mean_square(form.errors("validation", better.raw, better.spec.coefficients, offsets=better.offsets))
    assert again == pytest.approx(better.validation_mse, rel=1e-5)
    assert better.spec.timesteps is not None
    unbeatable = dataclasses.replace(found, validation_mse=0.0)
    assert polish(form, unbeatable, 1) is unbeatable


# --- references -------------------------------------------------------------------------------------------------------


def test_reference_reads_cubics_exactly():
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(9, generator=generator, dtype=torch.float64).sort(descending=True).values * 1.5
    factors = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)

    def cubic(angle):
        return sum(factors[k] * angle**k for k in range(4))

    known = Reference(angles, torch.stack([cubic(a) for a in angles]))
    between = (angles[1:] + angles[:-1]) / 2
    for angle in [*angles, *between]:
        torch.testing.assert_close(known.at(angle), cubic(angle), rtol=0, atol=1e-10)
    assert torch.equal(known.final, known.states[-1])


def test_reference_at_uses_the_four_nearest_nodes():
    """A kink in one place must not be felt on the other side of a node two away."""
    angles = torch.linspace(1, 0, 11, dtype=torch.float64)
    states = torch.zeros(11, 1, dtype=torch.float64)
    states[2] = 1.0
    known = Reference(angles, states)
    felt = [abs(known.at(torch.tensor(1 - (k + 0.5) / 10, dtype=torch.float64)).item()) > 1e-9 for k in range(10)]
    assert felt == [True] * 4 + [False] * 6


def test_nearest_state():
    known = Reference(torch.tensor([1.0, 0.7, 0.3, 0.0]), torch.arange(4.0)[:, None])
    nodes = [1.0, 0.84, 0.83, 0.51, 0.49, 0.17, 0.16, 0.0]  # the times are uniform, whatever the angles
    assert [known.nearest(torch.tensor(n)).item() for n in nodes] == [0, 0, 1, 1, 2, 2, 3, 3]


@both
def test_third_order_reference_has_converged(family):
    sampler = make_sampler(make_pipe(family))
    coarse, fine, euler = (quiet_reference(sampler, steps=n, order=k) for n, k in ((100, 3), (200, 3), (100, 1)))
    error = (coarse.final - fine.final).square().mean()
    assert coarse.states.shape == (101, 4, 1, 4, 4) and coarse.angles.shape == (101,)
    assert error < 1e-5 * fine.final.square().mean()
    assert error < 0.01 * (euler.final - fine.final).square().mean()


class GaussianModel(ModelMixin, ConfigMixin):
    """The exact network of Gaussian data whose mean hangs on the class: its flow is linear and solvable."""

    @register_to_config
    def __init__(self, kind="flow", in_channels=1, sample_size=2, num_embeds_ada_norm=CLASSES):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor([0.8, -0.3, 0.1, 0.4]))  # the last is that of no class
        self.path = make_path(kind)

    def forward(self, x, timestep, class_labels, return_dict=False):
        alpha, sigma = (f.item() for f in self.path.alpha_sigma(self.path.node(timestep[0])))
        problem = self.problem(self.means[class_labels])
        denoised = problem.denoised(x.double(), alpha, sigma)
        flow = self.config["kind"] == "flow"
        return (((x - (1 if flow else alpha) * denoised) / sigma).to(x.dtype),)

    def problem(self, means):
        return GaussianProblem("flow", means.detach().double().reshape(-1, 1, 1, 1), torch.tensor(0.5).double())


@both
def test_reference_of_a_solvable_model_is_the_solution(family):
    """With guidance 2: it acts on the mean alone, which is then 2 m_class - m_null."""
    network = GaussianModel(family)
    pipe = SiTPipeline(network, make_scheduler(family))
    pipe.set_progress_bar_config(disable=True)
    found = quiet_reference(make_sampler(pipe, 2.0), steps=200)
    problem = network.problem(2 * network.means[[0, 1, 2, 0]] - network.means[3])
    path = make_path(family)
    points = [tuple(map(float, path.alpha_sigma(torch.tensor(n).double()))) for n in np.linspace(1, 0, 201)]
    torch.testing.assert_close(found.angles, torch.tensor([np.arctan2(s, a) for a, s in points]).double())
    start = found.states[0].double()
    for i in (1, 20, 100, 150, 200):
        exact = problem.exact(start, points[0], points[i])
        assert (found.states[i] - exact).abs().max() < (1e-4 if family == "flow" else 3e-3)
    assert (found.final - start).abs().mean() > 0.3


@both
def test_reference_is_cached_under_all_that_it_depends_on(family, tmp_path):
    sampler = make_sampler(make_pipe(family))
    first = quiet_reference(sampler, cache=tmp_path)
    spent = sampler.network_evaluations
    assert spent == first.network_evaluations == 2 * 4 * 20
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4  # one a sample
    again = quiet_reference(sampler, cache=tmp_path)
    assert sampler.network_evaluations == again.network_evaluations == spent
    assert torch.equal(first.angles, again.angles) and torch.equal(first.states, again.states)
    part = quiet_reference(sampler, [3, 1], cache=tmp_path)  # whatever the batch or the process
    assert torch.equal(part.states, first.states[:, [3, 1]]) and part.network_evaluations == spent / 2
    assert sorted(tmp_path.iterdir()) == files

    others = [make_sampler(sampler.pipe, 1.6), make_sampler(sampler.pipe, seed=1), make_sampler(make_pipe(family, 1))]
    others.append(make_sampler(make_pipe(family)))
    others[-1].pipe.transformer.double()
    for count, other in enumerate(others, 2):
        quiet_reference(other, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 4 * count
    for count, change in enumerate(
        ({"steps": 21}, {"order": 2}, {"split": "validation"}, {"indices": range(4, 8)}), len(others) + 2
    ):
        quiet_reference(sampler, **change, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 4 * count

    whole = files[0].read_bytes()
    files[0].unlink()
    (tmp_path / f"{files[0].name}.1.tmp").write_bytes(whole[:100])  # what a killed process leaves
    spent = sampler.network_evaluations
    assert torch.equal(quiet_reference(sampler, cache=tmp_path).states, first.states)
    assert sampler.network_evaluations == spent + 2 * 4 * 20  # its batch is run whole
    assert files[0].read_bytes() == whole


@pytest.mark.parametrize("library", ["torch", "diffusers"])
def test_reference_of_another_library_version_is_made_anew(library, tmp_path, monkeypatch):
    sampler = make_sampler(make_pipe("flow"))
    quiet_reference(sampler, cache=tmp_path)
    monkeypatch.setattr(f"{library}.__version__", "0.0.1")
    quiet_reference(sampler, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("dtype, kept", [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
def test_reference_has_the_precision_of_the_run(dtype, kept):
    pipe = make_pipe("flow")
    pipe.transformer.to(getattr(torch, dtype))
    assert quiet_reference(make_sampler(pipe), steps=4).states.dtype == getattr(torch, kept)


# --- samples ----------------------------------------------------------------------------------------------------------


@both
def test_a_sample_is_the_same_in_any_batch(family):
    sampler, nodes = make_sampler(make_pipe(family)), warped_nodes((0, 0, 0), 3)
    probe = make_probe(sampler.pipe)

    def states(indices, split="train"):
        probe.prepare(nodes)
        return run(sampler, probe, indices, split, 3)

    whole, part, other = states(range(5)), states([4, 2]), states(range(5), "test")
    assert torch.equal(whole[0][[4, 2]], part[0])
    torch.testing.assert_close(whole[-1][[4, 2]], part[-1], rtol=1e-4, atol=1e-5)
    assert (whole[0] - other[0]).abs().mean() > 0.3
    assert len({tuple(x.flatten().tolist()) for x in [*whole[0], *other[0]]}) == 10
    assert 0.5 < whole[0].std() < 1.5
    another_seed = make_sampler(sampler.pipe, seed=1)
    probe.prepare(nodes)
    assert not torch.equal(run(another_seed, probe, range(5), "train", 3)[0], whole[0])


def test_classes_are_balanced():
    labels = make_sampler(make_pipe("flow")).conditions(range(9))["class_labels"]
    assert np.bincount(labels).tolist() == [3, 3, 3]
    assert make_sampler(make_pipe("flow")).conditions([4, 2])["class_labels"] == [1, 2]


@both
@pytest.mark.parametrize("guidance_scale, factor", [(1.5, 2), (1.0, 1)], ids=["guided", "unguided"])
def test_network_evaluations_are_counted(family, guidance_scale, factor):
    sampler = make_sampler(make_pipe(family), guidance_scale)
    probe = make_probe(sampler.pipe)
    probe.prepare(warped_nodes((0, 0, 0), 5))
    run(sampler, probe, range(3), "train", 5)
    assert sampler.network_evaluations == factor * 5 * 3


def test_pipeline_gets_its_scheduler_back():
    sampler = make_sampler(make_pipe("flow"))
    own, probe = sampler.pipe.scheduler, make_probe(sampler.pipe)
    probe.prepare(warped_nodes((0, 0, 0), 2))
    run(sampler, probe, range(1), "train", 2)
    assert sampler.pipe.scheduler is own
    with pytest.raises(ValueError, match="asks for 3 steps, the search for 2"):
        run(sampler, probe, range(1), "train", 3)
    assert sampler.pipe.scheduler is own and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


# --- the paper's search -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", range(1, 12))
def test_paper_parameters_start_as_uniform_euler(nfe):
    parameters = PaperParameters(nfe)
    np.testing.assert_allclose(parameters.nodes().detach(), np.linspace(1, 0, nfe + 1), rtol=0, atol=1e-12)
    rows = [[w.item() for w in row] for row in parameters.rows()]
    assert rows == [[0.0] * i + [1.0] for i in range(nfe)]
    if nfe >= 7:
        assert parameters.count == nfe + nfe * (nfe - 1) // 2


@pytest.mark.parametrize("nfe", [3, 5, 6, 7, 10])
def test_paper_rows_sum_to_one_and_small_nfe_end_in_second_order(nfe):
    parameters = PaperParameters(nfe)
    generator = torch.Generator().manual_seed(0)
    for p in parameters.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    nodes, rows = parameters.nodes(), parameters.rows()
    assert nodes[0] == 1 and nodes[-1] == 0 and (nodes[1:] < nodes[:-1]).all()
    steps = (nodes[:-1] - nodes[1:]).detach().numpy()
    weights = np.exp(parameters.r.detach().numpy())
    np.testing.assert_allclose(steps, weights / weights.sum(), rtol=1e-9)
    assert [len(row) for row in rows] == list(range(1, nfe + 1))
    free = 0
    for i, row in enumerate(rows):
        assert sum(w.item() for w in row) == pytest.approx(1, abs=1e-12)
        masked = nfe <= 6 and i >= nfe - 2
        for j in range(i):
            used = not masked or j == i - 1
            assert row[j].item() == (parameters.c[i, j].item() if used else 0)
            free += used
    assert parameters.count == nfe + free


def test_paper_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    states, references = ([torch.randn(2, 1, 2, 2, generator=generator) for _ in range(4)] for _ in range(2))
    references[-1] = states[-1].clone()
    references[-1].flatten()[0] += 0.0004  # within delta
    references[-1].flatten()[1] -= 0.3  # beyond it
    trajectory = sum(((x - y) ** 2).mean().item() for x, y in zip(states[1:], references[1:], strict=True))
    huber = (0.5 * 0.0004**2 + 0.001 * (0.3 - 0.5 * 0.001)) / 8
    assert paper_loss(states, references).item() == pytest.approx(trajectory + 1000 * huber, rel=1e-5)


@pytest.mark.parametrize(
    "family, options, tolerance",
    [
        ("flow", {}, 1e-5),
        (
            "vp",
            {},
            1e-2,
        ),  # its log(sigma/alpha) has a kink at each timestep: the slope within a cell is not that across
        ("vp", {"continuous_time": True}, 1e-5),
    ],
    ids=["flow", "vp", "continuous"],
)
def test_gradients_through_the_pipeline_equal_finite_differences(family, options, tolerance, monkeypatch):
    """Of the nodes' and the coefficients' parameters, along random directions, by differences of fourth order."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # time embedding and loss round otherwise
    pipe = make_pipe(family)
    pipe.transformer.double()
    sampler = make_sampler(pipe)
    probe = ProbeScheduler.from_config(pipe.scheduler.config, solvers="classical", **options)
    parameters = PaperParameters(4)
    generator = torch.Generator().manual_seed(1)
    for p in parameters.parameters():
        p.data = p.data + 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    start = {name: p.detach().clone() for name, p in parameters.named_parameters()}

    def states():
        probe.prepare(parameters.nodes(), parameters.rows())
        return run(sampler, probe, range(2), "train", 4)

    with torch.no_grad():  # references too far away for an error to change its sign
        wanted = [s + 1 + torch.rand(s.shape, generator=generator, dtype=s.dtype) for s in states()]
    loss = paper_loss(states(), wanted)
    gradients = dict(zip(start, torch.autograd.grad(loss, list(parameters.parameters())), strict=True))
    assert torch.is_grad_enabled() and pipe.transformer.dtype == torch.float64
    for name in start:
        for _ in range(2):
            direction = torch.randn(start[name].shape, generator=generator, dtype=torch.float64)

            def moved(amount, name=name, direction=direction):
                getattr(parameters, name).data = start[name] + amount * direction
                value = paper_loss(states(), wanted).item()
                getattr(parameters, name).data = start[name].clone()
                return value

            h = 2e-2
            difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
            slope = (gradients[name] * direction).sum().item()
            assert slope == pytest.approx(difference, rel=tolerance)


# --- fit --------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of a process."""


class Bowl(torch.nn.Module):
    """A quadratic loss whose target changes with the iteration."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

    def loss(self, iteration):
        target = torch.randn(3, generator=torch.Generator().manual_seed(iteration), dtype=torch.float64)
        return (self.a - 0.3 * target).square().sum() + (self.b.sum() - target[0]).square()


def fit_bowl(bowl, iterations, validate=None, loss_of=None, every=2, lr=0.01, **kwargs):
    validate = validate or (lambda: bowl.loss(1000).item())
    return Loop(bowl, loss_of or bowl.loss, validate, Accelerator(), iterations, lr, every, **kwargs).run()


def test_first_lion_step_is_the_sign_of_the_gradient():
    bowl = Bowl()
    before = {name: p.detach().clone() for name, p in bowl.named_parameters()}
    bowl.loss(0).backward()
    signs = {name: p.grad.sign() for name, p in bowl.named_parameters()}
    fit_bowl(bowl, 1, lr=0.125)
    for name, p in bowl.named_parameters():
        assert torch.equal(p.detach(), before[name] - 0.125 * signs[name]) and signs[name].abs().min() == 1


@pytest.mark.parametrize("killed_at", [1, 4, 7])
def test_killed_fit_goes_on_to_the_same_result(killed_at, tmp_path):
    whole, bowl, file = Bowl(), Bowl(), tmp_path / "fit.safetensors"
    records = []
    best = fit_bowl(whole, 11, log=records.append, checkpoint=tmp_path / "whole.safetensors")

    def dies(iteration):
        if iteration == killed_at:
            raise Killed
        return bowl.loss(iteration)

    with pytest.raises(Killed):
        fit_bowl(bowl, 11, loss_of=dies, checkpoint=file)
    bowl, later = Bowl(), []
    assert fit_bowl(bowl, 11, checkpoint=file, log=later.append) == best
    assert later == [r for r in records if r["iteration"] > killed_at // 2 * 2]
    assert [r["iteration"] for r in records] == [2, 4, 6, 8, 10, 11]
    for name, p in whole.named_parameters():
        assert torch.equal(p, bowl.get_parameter(name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.safetensors", "whole.safetensors"]

    bowl = Bowl()  # and once more, when there is nothing left to do
    assert fit_bowl(bowl, 11, checkpoint=file, loss_of=dies) == best
    assert all(torch.equal(p, bowl.get_parameter(name)) for name, p in whole.named_parameters())


def test_best_validation_is_put_in_place():
    bowl, seen = Bowl(), []
    errors = iter([5.0, 2.0, 3.0, float("nan"), 2.0])

    def validate():
        seen.append(bowl.a.detach().clone())
        return next(errors)

    assert fit_bowl(bowl, 10, validate) == 2.0
    assert torch.equal(bowl.a, seen[1]) and len({tuple(a.tolist()) for a in seen[:4]}) == 4
    assert (seen[4] - seen[1]).abs().max() < 0.021  # two updates away from the best: rolled back after the NaN


# --- the command ------------------------------------------------------------------------------------------------------

CLOSED_FORM = {
    "nfe": [3, 4], "fill_nfe": [3, 5], "trials": 6, "num_train_samples": 4, "num_validation_samples": 3,
    "num_trial_samples": 3, "teacher_steps": 20, "guidance_scale": 1.5, "batch_size": 4, "seed": 5, "polish": 1,
    "fill_polish_nfe": 4,
}  # fmt: skip
PAPER = {
    "method": "paper", "nfe": [3], "num_generated_samples": 8, "train_batch_size": 4, "reference_steps": 10,
    "num_validation_samples": 3, "teacher_steps": 20, "guidance_scale": 1.5, "validation_steps": 1,
}  # fmt: skip


def arguments(settings):
    words = []
    for key, value in settings.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def search(model, output, settings=CLOSED_FORM, **changes):
    model_and_output = {"pretrained_model_name_or_path": model, "output_dir": output}
    main(["search", *arguments({**model_and_output, **settings, **changes})])


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Folder of a finished closed-form search by family."""
    folder = tmp_path_factory.mktemp("results")
    for family in FAMILIES:
        search(models[family], folder / family)
    return {family: folder / family for family in FAMILIES}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out_mse(model, folder, nfe, wanted, settings, by_config):
    """The solver in the pipeline's plain call on the validation samples."""
    pipe = load_pipeline(str(model))
    if by_config:
        pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers=str(folder))
    else:
        pipe.scheduler = DSSolverScheduler.from_pretrained(folder)
    sampler = make_sampler(pipe, settings["guidance_scale"], settings.get("seed", 0))
    output = sampler(range(len(wanted)), "validation", nfe, output_type="latent")
    return (output[0] - wanted).double().square().mean().item()


@both
def test_solver_does_in_the_pipeline_what_its_provenance_says(family, models, results):
    folder = results[family]
    config = json.loads((folder / "scheduler_config.json").read_text())
    facts = config["provenance"]
    assert facts["method"] == "closed_form" and facts["model"] == family and facts["call"] == {"guidance_scale": 1.5}
    assert set(facts["results"]) == {"3", "4", "5"} and {"3", "4"} <= set(config["solvers"])
    assert [facts["results"][n]["kind"] for n in "34"] == ["searched"] * 2
    assert facts["results"]["5"]["kind"] == "filled" and set(config["solvers"]) == {"3", "4", "5"}
    sampler = make_sampler(load_pipeline(str(models[family])), seed=5)
    wanted = quiet_reference(sampler, range(3), "validation").final
    for nfe in config["solvers"]:
        claimed = facts["results"][nfe]["validation_mse"]
        for by_config in (False, True):
            found = held_out_mse(models[family], folder, int(nfe), wanted, CLOSED_FORM, by_config)
            assert found == pytest.approx(claimed, rel=1e-3)
        assert claimed < facts["results"][nfe]["classical_mse"]


@both
def test_files_and_evaluations_of_a_search(family, results):
    folder, records = results[family], lines_of(results[family])
    assert {p.name for p in folder.iterdir()} == {
        "scheduler_config.json", "search_state.json", "search_state.previous.json", "metrics.jsonl", "cache",
    }  # fmt: skip
    assert len(list((folder / "cache").iterdir())) == 4 + 3
    # trials on three samples: three from each of four starts, three more from the best one; on all four samples: the
    # best of each start, four more of the best one's and two more ridges, seven of these held out; polish: where it
    # stands and what every difference moves, three dampings held out, where it ends, both with a first time of their
    # own; three classical orders; each set of samples has its first call in common; all guided
    trials = [r for r in records if "train_mse" in r]
    kept = {r["nfe"]: r for r in records if "kind" in r}
    assert [r["nfe"] for r in trials] == [3] * 25 + [4] * 25 + [5]
    solvers = json.loads((folder / "scheduler_config.json").read_text())["solvers"]
    # step sizes (n - 1 calls each), corrections, times
    differences = {3: 2 * 2 + 1 + (3 + 2 + 1), 4: 3 * 3 + (2 + 2) + (4 + 3 + 2 + 1)}
    first = 4 + 3  # of the train and the validation samples
    by_nfe = {5: 2 * (first + 4 * 4 + 3 * 4 + 3 * 5 + 3 * 3 * 4)}  # the fit, a derived solver, three classical ones
    for n, moved in differences.items():
        polish_rows = 4 * (n - 1 + moved) + 3 * 3 * n + 4 * n * ("timesteps" in solvers[str(n)])
        by_nfe[n] = 2 * (3 + first + (n - 1) * (3 * (4 * 3 + 3) + 4 * (4 + 4 + 2) + 3 * 7 + 3 * 3) + polish_rows)
    assert {n: r["network_evaluations"] for n, r in kept.items()} == by_nfe
    estimate = 2 * 4 * (20 + 40)  # of the teacher's error, by twice its steps on four samples
    teacher = 2 * 20 * (4 + 3) + estimate
    state = json.loads((folder / "search_state.json").read_text())
    assert state["network_evaluations"] == teacher + sum(by_nfe.values())
    totals = [r.get("total_network_evaluations", r["network_evaluations"]) for r in records]
    assert totals == sorted(totals) and totals[-1] == state["network_evaluations"]
    assert totals[:2] == [estimate, teacher + 2 * 3 * 3]


@both
def test_filled_tables_are_the_best_of_three(family, results):
    facts = json.loads((results[family] / "scheduler_config.json").read_text())["provenance"]["results"]["5"]
    others = {"closed_form", "derived", "classical"} - {facts["source"]}
    assert set(facts["rejected"]) == others
    assert all(facts["validation_mse"] <= error for error in facts["rejected"].values())
    known = facts["rejected"] | {facts["source"]: facts["validation_mse"]}
    assert facts["classical_mse"] == known["classical"]


@pytest.mark.parametrize("best", ["classical", "derived", "closed_form"])
def test_a_fill_takes_whatever_is_best_on_held_out_samples(best, models, tmp_path, monkeypatch, capsys):
    """Each of the three made the best in turn, by what it is said to reach."""
    made = {}
    for name, function in (("classical", "classical"), ("derived", "derived"), ("closed_form", "entry_of")):
        real = getattr(fill_module, function)

        def measured(*args, name=name, real=real):
            made[name] = real(*args) | {"validation_mse": 1e-9 if name == best else 1.0}
            return made[name]

        monkeypatch.setattr(fill_module, function, measured)
    search(models["flow"], tmp_path, nfe=[3], fill_nfe=[5, 5], trials=1, polish=0)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["provenance"]["results"]["5"]["source"] == best
    assert config["solvers"]["5"]["coefficients"] == [list(row) for row in made[best]["coefficients"]]
    assert f"filled, {best}" in capsys.readouterr().out


def test_the_best_of_several_starts_is_taken(models, tmp_path, monkeypatch):
    """Best by the fit of its best trial to all training samples; what is written is that start's alone."""
    fits, trials = [], 6
    fit, polished = ClosedForm.fit, stages.polish

    def watched(form, nfe, warp, ridge, samples=None):
        fits.append((samples is not None, fit(form, nfe, warp, ridge, samples)))
        return fits[-1][1]

    def improved(form, found, *rest):
        fits.append((None, found))
        return polished(form, found, *rest)

    monkeypatch.setattr(ClosedForm, "fit", watched)
    monkeypatch.setattr(stages, "polish", improved)
    search(models["vp"], tmp_path, nfe=[4], fill_nfe=[], trials=trials, starts=3, polish=1, num_train_samples=8)
    on_few = [which for which, _ in fits]
    assert on_few == [*([True] * 3 + [False]) * 3, *[True] * 3, *[False] * 6, None]
    candidates = [c for _, c in fits]
    groups, firsts = [candidates[k : k + 3] for k in (0, 4, 8)], candidates[3:12:4]
    assert [group[0].warp for group in groups] == list(STARTS[:3])  # half of the trials each, no warp twice
    assert [c.warp for c in firsts] == [min(group, key=lambda c: c.train_mse).warp for group in groups]
    taken = min(range(3), key=lambda k: firsts[k].train_mse)
    assert taken != 0  # else one start would do here
    tried = [*groups[taken], *candidates[12:15]]  # and the other half by the best
    assert len({c.warp for c in tried}) == trials
    finalists = [c.warp for c in sorted(tried, key=lambda c: c.train_mse)[:5]]
    again = [c.warp for c in candidates[15:19]]
    assert [w for w in finalists if w != firsts[taken].warp] == again
    found = candidates[-1]
    facts = DSSolverScheduler.from_pretrained(tmp_path).config.provenance["results"]["4"]
    assert tuple(facts["warp"]) == found.warp and found.warp in finalists


def test_fewer_calls_than_any_searched_are_searched(models, tmp_path, monkeypatch):
    """Not fitted on the warp of more calls: the solver is that of a search which asks for them, before any polish."""
    settings = {"trials": 4, "starts": 2, "polish": 0}
    search(models["flow"], tmp_path / "asked", nfe=[3], fill_nfe=[], **settings)
    searched, find = [], ClosedForm.search
    monkeypatch.setattr(ClosedForm, "search", lambda form, nfe, *rest: searched.append(nfe) or find(form, nfe, *rest))
    search(models["flow"], tmp_path / "filled", nfe=[4], fill_nfe=[3, 5], **settings)
    assert searched == [4, 3]
    asked, filled = (DSSolverScheduler.from_pretrained(tmp_path / name).config for name in ("asked", "filled"))
    told = filled["provenance"]["results"]
    wanted = asked["provenance"]["results"]["3"]["validation_mse"]
    assert told["3"]["kind"] == "filled"
    assert (told["3"]["rejected"] | {told["3"]["source"]: told["3"]["validation_mse"]})["closed_form"] == wanted
    assert told["5"]["kind"] == "filled"


def test_few_calls_are_polished_when_they_are_filled(models, tmp_path):
    def filled(folder, **settings):
        search(models["flow"], tmp_path / folder, nfe=[4], fill_nfe=[3, 3], trials=2, starts=1, **settings)
        return json.loads((tmp_path / folder / "scheduler_config.json").read_text())

    plain, polished = filled("plain", fill_polish_nfe=2), filled("polished", fill_polish_nfe=3)
    assert "timesteps" not in plain["solvers"]["3"] and "timesteps" in polished["solvers"]["3"]
    errors = [c["provenance"]["results"]["3"]["validation_mse"] for c in (polished, plain)]
    assert errors[0] < errors[1]
    never = filled("never", polish_nfe=3, fill_polish_nfe=0)
    assert all("timesteps" not in table for table in never["solvers"].values())
    assert [s["stage"] for s in never["provenance"]["results"]["4"]["stages"]] == ["closed_form"]


def test_finished_search_is_not_done_again(models, results, capsys):
    folder = results["flow"]
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    calls = []
    count = Sampler._count

    def counting(self, *args):
        calls.append(self)
        return count(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "_count", counting)
        search(models["flow"], folder)
    assert not calls
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    out = capsys.readouterr().out
    assert "searched" in out and str(folder) in out


@pytest.mark.parametrize("change", [{"seed": 6}, {"ridge": 1e-3}, {"guidance_scale": 2.0}, {"trials": 7}])
def test_another_search_in_the_same_folder_is_refused(change, models, results, capsys):
    before = {p.name: p.read_bytes() for p in results["flow"].iterdir() if p.is_file()}
    line = refused(capsys, lambda: search(models["flow"], results["flow"], **change))
    assert "holds another search" in line and "--output_dir" in line
    assert {p.name: p.read_bytes() for p in results["flow"].iterdir() if p.is_file()} == before


def without_clock(value):
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not k.startswith("seconds")}
    return value


def test_more_step_counts_are_added_to_a_finished_search(models, results, tmp_path):
    search(models["flow"], tmp_path, nfe=[3], fill_nfe=[])
    only = DSSolverScheduler.from_pretrained(tmp_path)
    assert only.tables == (3,)
    search(models["flow"], tmp_path)
    both_tables = DSSolverScheduler.from_pretrained(tmp_path)
    whole = DSSolverScheduler.from_pretrained(results["flow"])
    assert both_tables.config.solvers == whole.config.solvers
    assert both_tables.config.solvers["3"] == only.config.solvers["3"]


@both
def test_paper_search_writes_a_solver_that_loads(family, models, tmp_path):
    search(models[family], tmp_path, PAPER)
    scheduler = DSSolverScheduler.from_pretrained(tmp_path)
    assert scheduler.tables == (3,)
    settings = scheduler.config.provenance["settings"]  # for the same command, without a path of this machine
    assert settings["method"] == "paper" and settings["pretrained_model_name_or_path"] == family
    assert "output_dir" not in settings and str(tmp_path) not in str(settings)
    facts = scheduler.config.provenance["results"]["3"]
    # c of the last two rows: one each; two Lion steps of 0.01 leave each parameter within 0.02 of its start
    assert facts["parameters"] == 3 + 2
    rows = scheduler.config.solvers["3"]["coefficients"]
    sampler = make_sampler(load_pipeline(str(models[family])))
    wanted = quiet_reference(sampler, range(3), "validation").final
    found = held_out_mse(models[family], tmp_path, 3, wanted, PAPER, by_config=False)
    assert found == pytest.approx(facts["validation_mse"], rel=1e-3)
    assert all(abs(w) <= 0.02 + 1e-9 for row in rows for w in row[:-1])
    assert any(w != 0 for row in rows for w in row[:-1])
    records = [r for r in lines_of(tmp_path) if "iteration" in r]
    assert [r["iteration"] for r in records] == [1, 2]
    assert facts["validation_mse"] == min(r["validation_mse"] for r in records)


def test_paper_counts_a_backward_pass_as_two(models, tmp_path):
    search(models["flow"], tmp_path, PAPER, num_generated_samples=4)
    guided = 2
    teacher = guided * (20 * 3 + 4 * (20 + 40))  # of the three held-out samples, and how far it is from converged
    update = guided * 4 * (10 + 3 * 3)  # Euler's ten steps, then three forward and backward
    validation = guided * 3 * (1 + (1 + 3) * 2)  # the first call, then the paper's solver and three classical ones
    state = json.loads((tmp_path / "search_state.json").read_text())
    assert state["network_evaluations"] == teacher + update + validation


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(capsys, command):
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command()
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    [line] = [line for line in captured.err.splitlines() if "error:" in line]
    assert captured.err.splitlines()[-1] == line and "Traceback" not in captured.err
    return line


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nfe": [0]}, "nfe is [0]"),
        ({"nfe": ["many"]}, "--nfe many"),
        ({"nfe": [1001]}, "nfe is [1001]"),
        ({"nfe": []}, "nfe is []"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"flavour": "sweet"}, "--flavour"),
        ({"teacher_steps": 4}, "teacher_steps is 4"),
        ({"fill_nfe": [5, 3]}, "fill_nfe is [5, 3]"),
        ({"call": '{"prompt": "a cat"}'}, "'prompt'"),
        ({"call": "{"}, "--call {"),
        ({"call": "[1]"}, "call is [1]"),
        ({"prompts_file": "absent.txt"}, "absent.txt"),
        ({"config": "absent.toml"}, "absent.toml"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"pretrained_model_name_or_path": "absent/folder/of-mine"}, "absent/folder/of-mine"),
        ({"output_dir": ""}, "output_dir is missing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_end_in_one_line_and_write_nothing(changes, message, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, lambda: search(models["flow"], tmp_path / "out", **changes))
    assert message in line and line.startswith("dssolver_search search: error: ")
    assert not list(tmp_path.iterdir())


class PromptPipeline(SiTPipeline):
    """Stands for a pipeline that takes text."""

    def __call__(self, prompt, guidance_scale=1.5, **kwargs):
        return super().__call__([len(p) % CLASSES for p in prompt], guidance_scale, **kwargs)


def test_pipeline_with_prompts_needs_some(models, tmp_path, capsys, monkeypatch):
    source = make_pipe("flow")
    pipe = PromptPipeline(source.transformer, source.scheduler)
    monkeypatch.setattr(search_setup, "load_pipeline", lambda *args: pipe)
    line = refused(capsys, lambda: search(models["flow"], tmp_path / "out"))
    assert "prompts_file" in line
    (tmp_path / "empty.txt").write_text("\n \n")
    line = refused(capsys, lambda: search(models["flow"], tmp_path / "out", prompts_file=tmp_path / "empty.txt"))
    assert "empty.txt" in line and "holds no prompt" in line
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def test_folder_with_a_foreign_solver_is_refused(models, tmp_path, capsys):
    DSSolverScheduler().save_pretrained(tmp_path)
    before = (tmp_path / "scheduler_config.json").read_bytes()
    line = refused(capsys, lambda: search(models["flow"], tmp_path))
    assert "holds a solver that this search did not make" in line
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    assert (tmp_path / "scheduler_config.json").read_bytes() == before


@pytest.mark.parametrize("spoil", ["model_index.json", "transformer/config.json"])
def test_truncated_pipeline_is_refused(spoil, tmp_path, capsys):
    make_pipe("flow").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / spoil
    file.write_text(file.read_text()[:40])
    line = refused(capsys, lambda: search(tmp_path / "model", tmp_path / "out"))
    assert "no pipeline could be loaded" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["polish"]])
def test_unknown_command_shows_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage:")


@pytest.mark.parametrize("command", [["--help"], ["search", "--help"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert "usage:" in captured.out + captured.err
