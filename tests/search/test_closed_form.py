"""The closed form and the polish: formulas against numpy and hand-written loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dssolver import SolverSpec
from diffusers_dssolver.paths import FlowPath
from dssolver_search.methods import check, closed_form, gauss_newton, prior
from dssolver_search.methods.closed_form import Fits, RowFit, fit, search_near, search_step_warp, validated
from dssolver_search.methods.gauss_newton import DAMPINGS, IN_TURN, Polish, parametrised, polish
from dssolver_search.methods.log import Log
from dssolver_search.methods.prior import starts
from dssolver_search.methods.problem import DECIMALS, Samples
from dssolver_search.pipeline.plan import Plan, warped_nodes
from dssolver_search.teacher.trajectories import WARPS as TEACHER_WARPS
from dssolver_search.teacher.trajectories import TeacherTrajectory
from tests.families import WARP, Recording, both, make_path, searched

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


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


def corrections_of(row, parts, reduce=lambda mine: mine):
    """What a fit adds to the row that it is shown."""
    prior = [0.25, -0.5, 0.75, 0.5]
    for left, columns in parts:
        row(prior, left, columns)
    found = row.solve(reduce)
    assert sum(found) == pytest.approx(sum(prior), abs=1e-12)
    return torch.tensor(found, dtype=torch.float64)[:3] - torch.tensor(prior[:3], dtype=torch.float64)


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


def classical_rows(path, nodes, order=2):
    if isinstance(path, FlowPath):
        return SolverSpec.adams_bashforth(nodes, order).coefficients
    lambdas = path.lambdas(torch.tensor(nodes, dtype=torch.float64)).tolist()
    return SolverSpec.dpm_solver_pp(nodes, lambdas, order).coefficients


@both
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_rows_are_an_independent_least_squares_solution(family, ridge):
    """From the recorded network outputs: d, A and B by hand, then numpy on the system that pulls to classical rows."""
    problem = searched(family)
    with Recording(problem.student.sampler.pipe) as seen:
        spec = fit(problem, 4, WARP, ridge, problem.train).spec
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
    angles = torch.atan2(*map(torch.tensor, (sigma, alpha)))
    targets = [problem.train.teacher.at(angle).flatten().numpy() for angle in angles]
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
        np.testing.assert_allclose(row, expected, rtol=0, atol=i * 10**-DECIMALS)


def final_mse(problem, plan):
    """Mean squared error of the train samples' final states, run anew."""
    train = problem.train
    final = problem.student.run(plan, train.indices, "train").final
    return (final - train.teacher.final).double().square().mean().item()


@both
def test_last_row_is_the_best_and_the_whole_beats_classical_rows(family):
    problem = searched(family)
    found = fit(problem, 4, WARP, 1e-10, problem.train)
    nodes, rows = warped_nodes(WARP, 4), [list(row) for row in found.spec.coefficients]
    best = final_mse(problem, Plan(nodes, rows))
    assert best == pytest.approx(found.train_mse, rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-1):
        for _ in range(6):
            change = torch.randn(4, generator=generator, dtype=torch.float64)
            change = size * (change - change.mean())
            perturbed = [*rows[:-1], (torch.tensor(rows[-1], dtype=torch.float64) + change).tolist()]
            assert final_mse(problem, Plan(nodes, perturbed)) > best
    assert all(best < 0.8 * final_mse(problem, Plan(nodes, order=order)) for order in (1, 2, 3))


class Trials(Log):
    """Fits, as the log is told of them."""

    def __init__(self):
        self.seen = []

    def trial(self, candidate):
        self.seen.append(candidate)


@both
def test_search_returns_its_best_on_held_out_samples(family):
    problem = dataclasses.replace(searched(family), num_trial_samples=2)
    log = Trials()
    found = search_step_warp(Fits(problem, 3, log), trials=7, ridge=1e-4)
    trials = log.seen
    assert len(trials) == 7 + 5 + 2
    assert [t.step_warp for t in trials[:4]] == [(0, 0, 0), (0.8, 0, 0), (0, 0.8, 0), (0, 0, 0.8)]
    few = problem.train.part(0, 2)
    assert trials[1].spec == fit(problem, 3, (0.8, 0, 0), 1e-4, few).spec  # warps are compared on two samples
    best = sorted(trials[:7], key=lambda t: t.train_mse)[:5]
    again = trials[7:12]
    assert [t.step_warp for t in again] == [t.step_warp for t in best]
    assert again[0].spec == fit(problem, 3, best[0].step_warp, 1e-4, problem.train).spec  # and fitted again to all four
    first = min(again, key=lambda t: t.train_mse)
    assert [(t.step_warp, t.ridge) for t in trials[12:14]] == [(first.step_warp, 1e-3), (first.step_warp, 1e-2)]
    scores = [problem.score(Plan(warped_nodes(t.step_warp, 3), t.spec.coefficients)) for t in trials[7:14]]
    assert found.validation_mse == pytest.approx(min(scores), rel=1e-9)
    assert found.validation_mse < 0.8 * min(problem.score(Plan(warped_nodes((0, 0, 0), 3), order=o)) for o in (1, 2, 3))


def test_the_best_of_several_starts_is_taken(monkeypatch):
    """Best by the fit of its best trial to all training samples."""
    problem, log, trials = searched("vp"), Trials(), 6
    kinds, plain = [], closed_form.fit
    monkeypatch.setattr(closed_form, "fit", lambda *args: kinds.append(len(args[-1]) < 4) or plain(*args))
    starts = closed_form.STARTS[:3]
    found = search_step_warp(Fits(dataclasses.replace(problem, num_trial_samples=3), 4, log), trials, 1e-4, starts)
    candidates = log.seen
    assert kinds == [*([True] * 3 + [False]) * 3, *[True] * 3, *[False] * (len(kinds) - 15)]
    groups, firsts = [candidates[k : k + 3] for k in (0, 4, 8)], candidates[3:12:4]
    assert [group[0].step_warp for group in groups] == list(starts)  # half of the trials each, no warp twice
    assert [c.step_warp for c in firsts] == [min(group, key=lambda c: c.train_mse).step_warp for group in groups]
    taken = min(range(3), key=lambda k: firsts[k].train_mse)
    assert taken != 0  # else one start would do here
    tried = [*groups[taken], *candidates[12:15]]  # and the other half by the best
    assert len({c.step_warp for c in tried}) == trials
    finalists = [c.step_warp for c in sorted(tried, key=lambda c: c.train_mse)[:5]]
    assert [w for w in finalists if w != firsts[taken].step_warp] == [c.step_warp for c in candidates[15:-2]]
    assert found.step_warp in finalists


def test_fits_of_a_killed_run_are_recalled():
    """Neither made nor counted again, but for the first calls that later runs share."""

    class Remembering(Log):
        def __init__(self):
            self.kept = {}

        def recall(self, task):
            return self.kept.get(str(task))

        def remember(self, task, result):
            self.kept[str(task)] = result

    problem, log = dataclasses.replace(searched("flow")), Remembering()
    made = Fits(problem, 3, log)(WARP, 1e-4)
    sampler = problem.student.sampler
    before = sampler.network_evaluations
    again = dataclasses.replace(problem)
    found = Fits(again, 3, log)(WARP, 1e-4)
    assert sampler.network_evaluations == before
    assert (found.spec, found.train_mse) == (made.spec, made.train_mse)
    assert problem.score(found.plan) == problem.score(made.plan)
    Fits(again, 3, log)(WARP, 1e-3)
    assert sampler.network_evaluations - before == 2 * 4 * (3 - 1) + 2 * 2 * 4 * 3 - 2 * 4


# --- polish -----------------------------------------------------------------------------------------------------------


def polish_of(problem, found):
    return Polish(problem, found, parametrised(problem, found))


@both
def test_polish_starts_at_the_candidate(family):
    problem = searched(family)
    found = fit(problem, 3, WARP, 1e-4, problem.train)
    newton = polish_of(problem, found)
    plan = newton.plan(torch.zeros(newton.count, dtype=torch.float64))
    assert newton.count == 2 + 3 + 3
    torch.testing.assert_close(plan.unshifted_nodes, found.plan.unshifted_nodes, rtol=0, atol=1e-14)
    assert [pytest.approx(row, abs=1e-14) for row in found.spec.coefficients] == plan.rows
    assert not plan.offsets.any()
    plan = newton.plan(torch.randn(newton.count, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    nodes = plan.unshifted_nodes
    assert nodes[0] == 1 and nodes[-1] == 0 and (nodes.diff() < 0).all()
    assert all(sum(row) == pytest.approx(1, abs=1e-12) for row in plan.rows) and plan.offsets.all()


@both
def test_polish_step_is_the_gauss_newton_step(family):
    """Against differences of second order and numpy's least squares on the damped system."""
    problem = searched(family)
    newton = polish_of(problem, fit(problem, 3, WARP, 1e-4, problem.train))
    start = torch.zeros(newton.count, dtype=torch.float64)

    def errors(parameters):
        return newton.errors(problem.train, parameters).flatten().numpy()

    columns = []
    for k in range(newton.count):  # one-sided: the first node cannot be given a noisier time
        one, two = torch.zeros_like(start), torch.zeros_like(start)
        one[k], two[k] = 1e-3, 2e-3
        columns.append((4 * errors(start + one) - errors(start + two) - 3 * errors(start)) / 2e-3)
    jacobian = np.stack(columns, 1)
    for damping, got in zip(DAMPINGS, newton.steps(start), strict=True):
        scale = np.sqrt(damping * np.maximum((jacobian**2).sum(0), 1e-9))
        system = np.concatenate([jacobian, np.diag(scale)])
        wanted = np.linalg.lstsq(system, -np.concatenate([errors(start), 0 * scale]))[0]
        predicted = np.square(errors(start) + jacobian @ wanted).mean()
        reached = np.square(errors(start) + jacobian @ got.numpy()).mean()
        assert reached < 1.05 * predicted + 1e-9
        assert predicted < 0.95 * np.square(errors(start)).mean()


@both
def test_polish_lowers_the_held_out_error_or_leaves_the_candidate_alone(family):
    problem = searched(family)
    found = validated(problem, fit(problem, 4, (0.0, 0.0, 0.0), 1e-4, problem.train))
    numbers, calls = parametrised(problem, found), []
    better = polish(problem, found, numbers, 2, lambda: calls.append(0))
    assert len(calls) in (numbers.count, 2 * numbers.count)
    assert better.validation_mse < 0.97 * found.validation_mse
    assert problem.score(better.plan) == pytest.approx(better.validation_mse, rel=1e-9)
    assert problem.score(Plan.of(better.spec)) == pytest.approx(better.validation_mse, rel=1e-9)
    assert better.spec.timesteps is not None
    unbeatable = dataclasses.replace(found, validation_mse=0.0)
    assert polish(problem, unbeatable, numbers, 1) is unbeatable


# --- the quick search -------------------------------------------------------------------------------------------------


def test_a_quick_search_begins_with_what_is_known():
    """The nearest step count's warp, the other models' between their step counts, and the teacher's."""
    path = FlowPath()
    known = {"5": {"warp": [1.0, 2.0, 3.0]}, "7": {"warp": [0.1, 0.2, 0.3]}, "9": {"source": "classical"}}
    found = starts(path, 6, known)
    assert found[0] == (1.0, 2.0, 3.0) and starts(path, 8, known)[0] == (0.1, 0.2, 0.3)
    clothes = prior.WARPS["flow"]["clothes"]
    assert found[1] == pytest.approx([(2 * a + b) / 3 for a, b in zip(clothes[5], clothes[8], strict=True)])
    assert found[-1] == TEACHER_WARPS["flow"] and starts(make_path("vp"), 6, {})[-1] == TEACHER_WARPS["vp"]
    assert starts(path, 3, {}) == starts(path, 5, {}) and len(found) == len(starts(path, 6, {})) + 1


@both
def test_a_quick_search_tries_near_the_best_of_its_starts(family):
    problem, log = dataclasses.replace(searched(family), num_trial_samples=2), Trials()
    near = [(2.0, 0.0, 0.0), (0.0, 0.0, 0.0)]
    found = search_near(Fits(problem, 3, log), 6, 1e-4, near)
    best = min(log.seen[:2], key=lambda c: c.train_mse).step_warp
    steps = [tuple(np.add(best, step)) for step in 0.4 * np.eye(3)]
    assert [c.step_warp for c in log.seen[:5]] == [*near, *steps] and len(log.seen) == 6 + 1
    taken = min(log.seen[:6], key=lambda c: c.train_mse).step_warp
    assert found.step_warp == taken and found.spec == fit(problem, 3, taken, 1e-4, problem.train).spec
    torch.testing.assert_close(found.errors.mean().item(), problem.score(found.plan))


def test_what_is_not_affordable_is_left_out():
    """The start's own fit remains; a budget of two trials makes two."""
    problem = searched("flow")
    a_trial = 2 * 4 * (3 - 1)

    class Poor(Trials):
        def __init__(self, budget):
            super().__init__()
            self.budget = budget

        def affords(self, evaluations):
            return evaluations <= self.budget

    for budget, trials in ((a_trial - 1, 0), (2 * a_trial, 2)):
        log = Poor(budget)
        found = search_near(Fits(problem, 3, log), 6, 1e-4, [WARP, (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)])
        assert len(log.seen) == trials + 1 and found.validation_mse > 0
    assert found.step_warp in (WARP, (0.0, 0.0, 0.0))
    polished = polish(problem, found, parametrised(problem, found), 1, quick=True, affords=Poor(0).affords)
    assert polished is found


def test_a_quick_polish_takes_the_first_damping_that_helps_and_stops_when_little_is_won(monkeypatch):
    problem = searched("vp")
    found = validated(problem, fit(problem, 4, (0.0, 0.0, 0.0), 1e-4, problem.train))
    numbers, calls, sampler = parametrised(problem, found), [], problem.student.sampler

    def better(iterations):
        calls.clear()
        return polish(problem, found, numbers, iterations, lambda: calls.append(0), quick=True)

    first = polish_of(problem, found).steps(torch.zeros(numbers.count, dtype=torch.float64), dampings=IN_TURN)[0]
    assert problem.score(polish_of(problem, found).plan(first)) < found.validation_mse
    before = sampler.network_evaluations
    one = better(1)
    moved = sum(4 - shared for shared in numbers.shared_calls)
    # where it stands but for the known first call, its differences, one damping held out, where it arrived
    assert sampler.network_evaluations - before == 2 * 4 * (3 + moved + 4 + 4)
    assert one.errors is not None and one.validation_mse == pytest.approx(problem.score(one.plan), rel=1e-9)
    monkeypatch.setattr(gauss_newton, "WORTH", 1e-9)
    assert better(3).spec == one.spec and len(calls) == numbers.count
    monkeypatch.setattr(gauss_newton, "WORTH", 1.0)
    assert better(2).validation_mse < one.validation_mse and len(calls) == 2 * numbers.count


# --- the last check ---------------------------------------------------------------------------------------------------


def judged(problem, errors, theirs, few, monkeypatch, thorough=False):
    """What the check says of a solver with these errors; the classical one has `theirs`."""
    monkeypatch.setattr(check, "FEW", few)
    asked = []

    def each(samples, plan):
        asked.append((len(samples), plan.order))
        return torch.tensor(theirs[: len(samples)], dtype=torch.float64)

    monkeypatch.setattr(problem, "each", each)
    entry = check.checked(
        problem, {"mine": 1, "warp": [1.0, 0.0, 0.0]}, Plan(warped_nodes(WARP, 3), order=3), errors, thorough
    )
    return entry, asked


@pytest.mark.parametrize(
    "errors, accepted", [([1.0, 1, 1, 1], True), ([2.0, 2, 2, 2.6], False), ([0.1, 0.1, 0.1, 3], False)]
)
def test_a_solver_must_be_better_by_mean_and_by_tail(errors, accepted, monkeypatch):
    problem = dataclasses.replace(searched("flow"))
    entry, asked = judged(problem, torch.tensor(errors).double(), [2.0, 2, 2, 2.5], 2, monkeypatch, thorough=True)
    assert asked == [(4, 1), (4, 2), (4, 3)]
    assert ("mine" in entry) == accepted == (entry.get("source") != "classical")
    assert entry["classical_mse"] == pytest.approx(2.125) and entry["held_out"] == 4
    if not accepted:
        assert entry["warp"] == [1.0, 0.0, 0.0]  # other step counts begin there
        assert entry["nodes"] and entry["rejected"] == {"closed_form": pytest.approx(sum(errors) / 4)}
        assert entry["validation_mse"] == entry["classical_mse"] and entry["ratio"] == 1


def test_a_clear_advantage_is_seen_on_a_few_samples(monkeypatch):
    problem = dataclasses.replace(searched("flow"))
    mine = torch.tensor([0.1, 0.1, 0.1, 0.1]).double()
    entry, asked = judged(problem, mine, [2.0] * 4, 2, monkeypatch)
    assert asked == [(2, 2)] and entry["held_out"] == 4 and entry["ratio"] == pytest.approx(0.05)
    with monkeypatch.context() as patch:
        entry, asked = judged(dataclasses.replace(problem), mine * 12, [2.0] * 4, 2, patch)
        assert asked == [(2, 2), (4, 1), (4, 2), (4, 3)] and "mine" in entry
    _, asked = judged(problem, None, [2.0] * 4, 2, monkeypatch)
    assert asked == [(2, 3), (2, 2), (4, 3), (4, 1), (4, 2), (4, 3)]  # its own errors first


@both
def test_errors_of_each_sample_are_the_same_over_processes(family):
    problem = searched(family)
    plan = Plan(warped_nodes(WARP, 3))
    whole = problem.each(problem.validation, plan)
    assert float(whole.mean()) == pytest.approx(
        problem.mean_square(problem.errors(problem.validation, plan)), rel=1e-12
    )
    part = problem.validation
    odd = Samples(part.split, part.indices[1::2], TeacherTrajectory(part.teacher.angles, part.teacher.states[:, 1::2]))
    shard = dataclasses.replace(problem, validation=odd, reduce=lambda mine: mine * 2 if mine.ndim == 0 else mine)
    mine = shard.each(shard.validation, plan)
    torch.testing.assert_close(mine[1::2], whole[1::2], rtol=1e-9, atol=0)
    assert not mine[::2].any() and len(mine) == 4
    assert [len(odd.below(n)) for n in (0, 1, 2, 4)] == [0, 0, 1, 2]
    assert problem.cost(problem.validation, 3) == 2 * 4 * 3
