"""The scheduler of the search: run inside a pipeline's ordinary call it *is* the differentiable sampler of that
pipeline. It records every state, takes nodes and coefficients that may be live tensors, can show what a step has to
work with and end there, and leaves the call after the last step, before anything is decoded, unless the decoded output
is asked for.

Gradients: `set_timesteps` switches them on (the pipeline's own no_grad puts the mode back when its call ends) and
`step` clones what pipelines may write into. While such a run lasts, the forward of every network that takes a time is
wrapped: it is recomputed in the backward pass instead of stored, and a time that the pipeline rebuilt from numbers
gets the gradient of the node that it came from.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import classical, first_order_end, from_neighbours
from diffusers_dssolver.history import History
from diffusers_dssolver.paths import FlowPath
from diffusers_dssolver.solver import SolverSpec
from diffusers_dssolver.step import Scalar, step

from .replay import Replay, patched
from .sampler import Sampler

Rows = Sequence[Sequence[Scalar]]
TIME_NAMES = ("timestep", "timesteps", "timestep_ratio", "t", "sigma", "sigmas")  # of a network's time argument
# (row of step i, what it leaves of the target (M,), columns (i, M)): what its corrections are fitted to
Watcher = Callable[[list[Scalar], Tensor, Tensor], object]


class RunFinished(Exception):
    """Private: the last step was taken, nothing after it is wanted."""


class ProbeScheduler(DSSolverScheduler):
    """A `DSSolverScheduler` for searches. Make one with `from_config(pipe.scheduler.config, solvers="classical")`.

    Attributes:
        checkpointed: whether runs with gradients recompute the networks in the backward pass, which then holds the
            activations of one call, and states otherwise; else it holds those of all calls.

    Attributes after a run:
        states: the N+1 states, first to last, each (B, ...).
        rows: the N rows that were used.
        output: what the pipeline's call gave, of a run that decodes.
    """

    checkpointed = True
    states: Sequence[Tensor] = ()
    output: Any = None
    _twin = _decode = _exact = _ended = False
    _final: Tensor | None = None
    _carried: Tensor | None = None

    def prepare(
        self,
        nodes: Tensor,
        rows: Rows | None = None,
        *,
        order: int = 2,
        offsets: Tensor | None = None,
        until: int | None = None,
        watch: tuple[Tensor, Watcher] | None = None,
        decode: bool = False,
        final: Tensor | None = None,
        exact: bool = False,
        ended: bool = False,
    ) -> None:
        """What the next run shall do.

        Args:
            nodes: (N+1,) float64 in [0, 1] before any resolution shift, falling to 0.
            rows: N rows of weights, floats or 0-dim tensors; those that are missing at the end, all of them if None:
                classical rows of this order for these nodes.
            offsets: (N,), what the network is fed in place of each node, minus that node (after the shift); None: 0.
                Gradients flow to nodes, rows and offsets, to each that requires them.
            until: the run ends in the step of this index, before it is taken.
            watch: (target, watcher): there, the watcher is shown that step's row, target (B, ...) minus the state that
                this row makes, and the change of that state per unit of weight moved from the newest output to each
                earlier one.
            decode: the call goes on to its end after the last step, and its result is `output`.
            final: (B, ...) what the last step gives in place of its own result.
            exact: states are carried on in float32 where the pipeline's are coarser: it is given them rounded, so that
                the networks see what they see, but the roundings of many steps do not add up.
            ended: the classical row of the last step is of first order.
        """
        self._plan = (nodes, rows, order, offsets)
        self._exact, self._ended = exact, ended
        self._until, self._watch = until, watch
        self._decode, self._final = decode, final
        numbers = (nodes, offsets, *(w for row in rows or () for w in row))
        self._live = torch.is_grad_enabled() and any(isinstance(n, Tensor) and n.requires_grad for n in numbers)

    def prepare_spec(self, spec: SolverSpec) -> None:
        """The next run is this solver's, as it would be published."""
        self._plan, self._until, self._watch, self._live = spec, None, None, False
        self._decode, self._final, self._exact = False, None, False

    def final_nodes(self, nodes: Tensor) -> Tensor:
        """Nodes after the path's first node and the model's resolution shift, as they are integrated and published."""
        if isinstance(self._path, FlowPath):
            moved = self._shift()(list(nodes.unbind()))
            return torch.stack([torch.as_tensor(m, dtype=nodes.dtype) for m in moved])
        return nodes * self._path.first_node

    def searched_shift(self) -> dict[str, float | None] | None:
        """The resolution shift that the last run's nodes contain, as the configuration key of that name; None on vp."""
        if not isinstance(self._path, FlowPath):
            return None
        shift = self._shift()
        return {"factor": shift.factor, "terminal": shift.terminal}

    def derived(self, solvers: Mapping[int, SolverSpec], nfe: int) -> SolverSpec:
        """What a user gets at a step count between two tables."""
        return from_neighbours(solvers, nfe, self._path)

    def slopes(self, raw: Tensor) -> Tensor:
        """(N,) weights s_i of the classical second-order rows (.., -s_i, 1 + s_i) on nodes before any shift, 0 where
        the classical row is of first order; differentiable."""
        nodes = self.final_nodes(raw)
        rows = classical(nodes.detach().tolist(), self._path).coefficients
        at = nodes if isinstance(self._path, FlowPath) else self._path.lambdas(nodes[:-1])  # infinite at the last one
        steps = at[1:] - at[:-1]
        second = [i > 0 and row[i - 1] != 0.0 for i, row in enumerate(rows)]
        return torch.stack([steps[i] / (2 * steps[i - 1]) if s else steps.new_zeros(()) for i, s in enumerate(second)])

    def angle(self, nodes: Tensor) -> Tensor:
        """The coordinate in which references are interpolated, at final nodes."""
        return self._path.angle(nodes)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """As the parent's, for the arguments a pipeline gives; then the prepared nodes and rows are put in place."""
        if self.config.mean_decay is not None:
            raise ValueError(f"mean_decay is {self.config.mean_decay}; a search keeps no means apart, leave it out")
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
        plan = self._plan
        steps = plan.nfe if isinstance(plan, SolverSpec) else len(plan[0]) - 1
        if self.num_inference_steps != steps:
            raise ValueError(f"the pipeline asks for {self.num_inference_steps} steps, the search for {steps}")
        self.states, self.rows, self._carried = [], [], None
        if isinstance(plan, SolverSpec):
            self.nodes, self._fed = torch.tensor(plan.nodes, dtype=torch.float64), plan.timesteps
            self._install(plan, device)
            return
        raw, rows, order, offsets = plan
        if self._live:
            torch.set_grad_enabled(True)
        self.nodes = nodes = self.final_nodes(raw)
        rows = list(rows or ())
        if len(rows) < steps:
            spec = classical(nodes.detach().tolist(), self._path, order)
            rows += (first_order_end(spec) if self._ended else spec).coefficients[len(rows) :]
        fed = nodes[:-1] if offsets is None else (nodes[:-1] + offsets).clamp(0, 1)
        self._install_tensors(nodes, self._path.timestep(fed), rows, device)
        if self._watch:
            self._history.needed = [i + 1 for i in range(len(raw) - 1)]
        self._fed = None if offsets is None else self._path.timestep(fed).tolist()

    @functools.wraps(DSSolverScheduler.step)
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._live:  # pipelines may write into their tensors, which a graph cannot bear
            model_output, sample = model_output.clone(), sample.clone()
        if not self.states:
            self.states.append(sample)
        given, wide = model_output.dtype, torch.promote_types(model_output.dtype, torch.float32)
        if exact := self._exact and given != wide:
            known = self._carried is not None and torch.equal(self._carried.to(sample.dtype), sample)
            model_output, sample = model_output.to(wide), self._carried if known else sample.to(wide)
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        if self._final is not None and len(self.states) == len(self.timesteps) and not self._twin:
            result = _with_state(result, _as_batch(self._final.to(result[0]), sample))
        self.states.append(result[0])
        if exact:
            self._carried, result = result[0], _with_state(result, result[0].to(given))
        if len(self.states) == len(self.timesteps) + 1 and not self._twin and not self._decode:
            raise RunFinished
        return result

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """The parent's; in a run with gradients differentiable where the times are the schedule's, rebuilt or not, for
        pipelines that put noised data into every step (inpainting)."""
        if not self._live:
            return super().add_noise(original_samples, noise, timesteps)
        given = torch.as_tensor(timesteps).detach().to("cpu", torch.float64).reshape(-1)
        known = self.timesteps.cpu()
        times = torch.stack([known[known == t][0].double() if (known == t).any() else t for t in given])
        factors = self._path.alpha_sigma(self._path.node(times))
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        alpha, sigma = (
            f.to(original_samples.device, dtype).reshape(-1, *[1] * (original_samples.ndim - 1)) for f in factors
        )
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProbeScheduler:
        """For pipelines that keep a second scheduler (of sound): of the same run, with a history and states of its
        own, and never the one that ends the run. Tensors are shared: those with a graph cannot be copied."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({k: v.copy() if type(v) in (list, set, History) else v for k, v in vars(self).items()})
        twin._twin = True
        return twin

    @contextmanager
    def around(self, networks: Iterable[nn.Module]) -> Iterator[None]:
        """In a run with gradients: these networks' forwards checkpointed, their times attached to the nodes."""
        wrapped = list(networks) if self._live else []
        with patched(wrapped, [self._live_forward(module.forward) for module in wrapped]):
            yield

    def _live_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(forward).parameters)
        place = next((i for i, name in enumerate(names) if name in TIME_NAMES), 1)
        # what a pipeline may make of a time t: p + q t; of several that fit one step, another step tells which it is
        total = self.config.num_train_timesteps
        maps = [(0.0, 1.0), (0.0, 1 / total), (1.0, -1 / total), (float(total), -1.0)]

        @functools.wraps(forward)
        def live(*args: Any, **kwargs: Any) -> Any:
            if place < len(args):
                args = (*args[:place], self._attached(args[place], maps), *args[place + 1 :])
            elif place < len(names) and names[place] in kwargs:
                kwargs = {**kwargs, names[place]: self._attached(kwargs[names[place]], maps)}
            # copies: what is recomputed must not see what the pipeline wrote into its tensors since
            args, kwargs = pytree.tree_map_only(Tensor, lambda a: a.clone() if a.requires_grad else a, (args, kwargs))
            if not self.checkpointed:
                return forward(*args, **kwargs)
            return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False)

        return live

    def _attached(self, value: Any, maps: list[tuple[float, float]]) -> Any:
        """A network's time with the graph of this step's: as it is, where it has one; rebuilt as p + q t for one of
        the maps (p, q), with that slope; anything else as it is."""
        index = self._step_index if self._step_index is not None else self._begin_index or 0
        t = self.timesteps[min(index, len(self.timesteps) - 1)]
        if not t.requires_grad or not isinstance(value, (float, Tensor)):
            return value
        numbers = torch.as_tensor(value, device=t.device)
        if numbers.requires_grad or not numbers.is_floating_point():
            return value
        near = 4 * max(torch.finfo(numbers.dtype).eps, torch.finfo(t.dtype).eps)

        def made_by(p: float, q: float) -> bool:
            made = p + q * t.detach().double()
            return bool(((numbers.double() - made).abs() <= near * made.abs().clamp(min=abs(p))).all())

        fitting = [(p, q) for p, q in maps if made_by(p, q)]
        if not fitting:
            return value
        maps[:] = fitting
        return numbers + (maps[0][1] * (t - t.detach())).to(numbers.dtype)

    def _row(self, index: int, x: Tensor) -> Sequence[Scalar]:
        row = super()._row(index, x)
        if index == self._until and not self._twin:
            if self._watch:
                self._show(index, x, [*[0.0] * (index + 1 - len(row)), *row], *self._watch)
            raise RunFinished
        self.rows.append(row)
        return row

    def _show(self, index: int, x: Tensor, row: list[Scalar], target: Tensor, watcher: Watcher) -> None:
        *earlier, newest = history = self._history.outputs
        left = _as_batch(target.to(x), x) - step(x, history, row, self._a[index], self._b[index])
        columns = torch.stack([(self._b[index] * (d - newest)).flatten() for d in earlier])
        watcher(row, left.flatten(), columns)

    @property
    def steps_taken(self) -> int:
        """In the run that goes on."""
        return max(len(self.states) - 1, 0)

    def spec(self) -> SolverSpec:
        """The solver that the last run used."""
        n = len(self.timesteps)
        rows = [[float(w) for w in row] for row in self.rows]
        full = [[0.0] * (i + 1 - len(row)) + row for i, row in enumerate(rows)]
        return SolverSpec(self.nodes.detach().tolist()[: n + 1], full, self._fed)


def _with_state(result: Any, state: Tensor) -> Any:
    """A step's result, a tuple or an output, with another state."""
    return (state, *result[1:]) if isinstance(result, tuple) else type(result)(state, *result.to_tuple()[1:])


def _as_batch(states: Tensor, x: Tensor) -> Tensor:
    """A copy, as often as guidance has it in the batch x."""
    return states.repeat(x.shape[0] // states.shape[0], *[1] * (x.ndim - 1))


def run(
    sampler: Sampler,
    probe: ProbeScheduler,
    indices: Sequence[int],
    split: str,
    nfe: int,
    replay: Replay | None = None,
    unchanged: int = 0,
) -> list[Tensor]:
    """One prepared run: the states of the samples, N+1 of them unless a watcher ended it.

    Args:
        replay: outputs of these samples' network calls, of a run without gradients.
        unchanged: so many first steps of this run give the networks what the steps kept there gave them.

    Raises:
        ValueError: if the pipeline does not take the steps asked for, or takes them with another scheduler.
    """

    def one(group: Sequence[int], number: int) -> list[Tensor]:
        again = replay.part(number).around(sampler, probe, unchanged) if replay else nullcontext()
        with again:
            return _one_call(sampler, probe, group, split, nfe)

    return sampler.in_groups(indices, one)


def _one_call(sampler: Sampler, probe: ProbeScheduler, indices: Sequence[int], split: str, nfe: int) -> list[Tensor]:
    name = type(sampler.pipe).__name__
    with sampler.using(probe), probe.around(sampler.timed.values()):
        try:
            probe.output = sampler(indices, split, nfe)
        except RunFinished:
            return probe.states
        if sampler.pipe.scheduler is not probe:
            other = type(sampler.pipe.scheduler).__name__
            raise ValueError(f"{name} puts a {other} of its own in the scheduler's place, so no solver can reach it")
    if probe._decode and probe.steps_taken == nfe:
        return probe.states
    raise ValueError(
        f"{name} ended its loop without taking all {nfe} steps, but {probe.steps_taken}; leave out what takes a part "
        "of them, or give strength=1 to a pipeline that starts from a picture"
    )
