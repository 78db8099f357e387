"""`DSSolverScheduler` in every pipeline of the zoo: one function per check, one case per pipeline and solver.

`python -m tests.pipelines.conformance` runs all of it and writes the table of outcomes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.config import is_flow
from tests.pipelines.zoo import ZOO, Entry, absent, generators, networks_of

COVERING = ("DiT", "Stable Diffusion", "SDXL", "Stable Diffusion 3", "FLUX", "Wan")  # these also in the short run
STEPS, OTHER_STEPS, IMAGE_STEPS = 4, 7, 10  # the published solvers have tables for the last two
STRENGTHS = (0.1, 0.3, 0.5, 0.8, 1.0)


class Stop(Exception):
    """Raised in the middle of a run."""


def cases(keep=lambda entry: True, kinds=("classical", "table"), slow=False):
    """A test parameter per pipeline and kind of solver.

    The short run has both kinds on the covering pipelines; on the others one, a table where there is one, or with
    `slow` none.
    """
    parameters = []
    for entry in filter(keep, ZOO.values()):
        tried = [s for kind, s in (("table", entry.table), ("classical", "classical")) if kind in kinds and s]
        for solvers in tried:
            short = entry.name in COVERING or (not slow and solvers == tried[0])
            label = f"{entry.name}-{solvers}".replace(" ", "_")
            parameters.append(pytest.param(entry, solvers, marks=[] if short else [pytest.mark.slow], id=label))
    return pytest.mark.parametrize(("entry", "solvers"), parameters)


def build(entry: Entry, solvers=None):
    pipe = entry.make()
    pipe.set_progress_bar_config(disable=True)
    if solvers is not None:
        pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers=solvers)
    return pipe


def draw(entry: Entry, pipe: DiffusionPipeline, steps=STEPS, samples=(0,), decoded=False, **others):
    """Latents, which nothing clips, or with `decoded` images or frames with their colours last."""
    output_type = "np" if decoded else entry.raw
    strength = {"strength": 0.8} if entry.strength else {}
    arguments = entry.arguments(pipe, samples) | strength | others
    torch.manual_seed(0)  # SD3's ControlNet encodes pictures with noise of no generator
    with torch.no_grad():
        result = pipe(**arguments, num_inference_steps=steps, generator=generators(samples), output_type=output_type)
    values = getattr(result, entry.result)
    drawn = values.float().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    assert np.isfinite(drawn).all()
    return drawn


def halved(entry, solvers):
    pipe = build(entry, solvers).to(torch.bfloat16)
    for network in networks_of(pipe):
        for name, module in network.named_modules():
            if name.rpartition(".")[2] in entry.single:
                module.float()
    return pipe


def counted(pipe):
    """A list that grows by one with each call of the network."""
    calls = []
    for network in networks_of(pipe):
        network.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def interrupted(entry, pipe, calls, steps):
    """A run that ends after so many calls of the network."""
    made = counted(pipe)

    def stop(*_):
        if len(made) == calls:
            raise Stop

    handles = [network.register_forward_hook(stop) for network in networks_of(pipe)]
    with pytest.raises(Stop):
        draw(entry, pipe, steps)
    for handle in handles:
        handle.remove()


def realign(pipe):
    """Loaded weights lie in a mapped file, where vector instructions may add them up in another order."""
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else []:
            parameter.data = parameter.data.clone()


def relative(difference, reference):
    """Mean absolute difference, in units of the reference's own mean absolute deviation."""
    return np.abs(difference).mean() / np.abs(reference - reference.mean()).mean()


@cases()
def test_runs(entry, solvers):
    pipe = build(entry, solvers)
    calls = counted(pipe)
    drawn = draw(entry, pipe, decoded=True, **({"strength": 1.0} if entry.strength else {}))
    assert drawn.shape == (1, *entry.shape)
    assert drawn.std() > 1e-2
    assert len(pipe.scheduler.timesteps) == STEPS
    taken = (pipe.scheduler.timesteps >= 1000 * (1 - entry.part)).sum() if entry.part < 1 else STEPS
    assert len(calls) == taken * entry.calls
    assert pipe.scheduler.step_index == (None if entry.copies else taken)


@cases(slow=True)
def test_repeats(entry, solvers):
    pipe = build(entry, solvers)
    assert np.array_equal(draw(entry, pipe), draw(entry, pipe))


@cases()
def test_other_step_counts_between(entry, solvers):
    pipe = build(entry, solvers)
    first, other, third = (draw(entry, pipe, steps) for steps in (STEPS, OTHER_STEPS, STEPS))
    assert np.array_equal(first, third)
    assert relative(first - other, first) > 1e-4  # equal runs agree to the bit


@cases(lambda entry: entry.half, slow=True)
def test_half_precision(entry, solvers):
    steps = 32 if entry.own_grid else STEPS  # few linear-quadratic steps have a jump, over which errors grow tenfold
    single = draw(entry, build(entry, solvers), steps)
    half = draw(entry, halved(entry, solvers), steps)
    # A hundred roundings to 8 bits add up to 10 * 0.4 %; the stock solvers' worst is 3 %.
    assert relative(single - half, single) < 0.06


@cases(lambda entry: entry.batches, slow=True)
def test_batch_is_its_samples(entry, solvers):
    pipe = build(entry, solvers)
    batch = draw(entry, pipe, samples=(0, 1))
    singles = np.concatenate([draw(entry, pipe, samples=(i,)) for i in (0, 1)])
    np.testing.assert_allclose(batch, singles, rtol=1e-4, atol=1e-4 * singles.std())
    assert relative(batch[0] - batch[1], batch) > 1e-2


@cases()
def test_interrupted_then_again(entry, solvers):
    pipe = build(entry, solvers)
    wanted = draw(entry, pipe, OTHER_STEPS)
    interrupted(entry, pipe, entry.calls + 1, OTHER_STEPS)
    assert np.array_equal(draw(entry, pipe, OTHER_STEPS), wanted)


@cases(slow=True)
def test_saved_and_loaded(entry, solvers, tmp_path):
    pipe = build(entry, solvers)
    wanted = draw(entry, pipe, OTHER_STEPS)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert pipe.config["scheduler"] == ("diffusers_dssolver", "DSSolverScheduler")
    again = type(pipe).from_pretrained(tmp_path / "pipeline", local_files_only=True, **absent(pipe))
    again.set_progress_bar_config(disable=True)
    realign(again)
    assert type(again.scheduler) is DSSolverScheduler
    assert np.array_equal(draw(entry, again, OTHER_STEPS), wanted)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    alone = build(entry)
    alone.scheduler = DSSolverScheduler.from_pretrained(tmp_path / "scheduler")
    assert np.array_equal(draw(entry, alone, OTHER_STEPS), wanted)


@cases(lambda entry: entry.strength)
def test_strengths(entry, solvers):
    ours, stock = build(entry, solvers), build(entry)
    picture = draw(entry, stock, 100, strength=0.01)  # one short step leaves the input nearly as it was
    weak = draw(entry, ours, 100, strength=0.01)
    assert np.abs(weak - picture).mean() < 0.15  # the noise of a whole run is 1
    our_calls, stock_calls, changes = counted(ours), counted(stock), []
    for strength in STRENGTHS:
        changes.append(relative(draw(entry, ours, IMAGE_STEPS, strength=strength) - picture, picture))
        assert ours.scheduler.step_index == IMAGE_STEPS
        draw(entry, stock, IMAGE_STEPS, strength=strength)
        assert len(our_calls) == len(stock_calls) == int(IMAGE_STEPS * strength) * entry.calls
        our_calls.clear(), stock_calls.clear()
    assert changes[0] < 0.5 * changes[-1]
    assert changes[0] < changes[2] < changes[-1]


def reference_scheduler(config):
    """The deterministic first-order solver of the family, on the model's own noise schedule."""
    if is_flow(config):
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
    if config.get("thresholding"):  # DDIM would go on with the unclipped epsilon
        first_order = {"solver_order": 1, "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
        return DPMSolverMultistepScheduler.from_config(config, **first_order)
    ddim = CogVideoXDDIMScheduler if "snr_shift_scale" in config else DDIMScheduler
    known = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    scheduler = ddim.from_config(config, **known)
    if "variance_type" in config:  # DDIM takes no learned variance; pipelines drop it when told so
        scheduler.register_to_config(variance_type="fixed_small")
    return scheduler


@cases(kinds=("classical",), slow=True)
def test_many_steps_agree_with_stock(entry, solvers):
    """The check for wrong signs, shifts and time scales: two solvers of one equation have one limit."""
    stock = build(entry)
    if not entry.copies:  # diffusion forcing passes whole numbers for times, which FlowMatchEuler refuses
        stock.scheduler = reference_scheduler(stock.scheduler.config)
    wanted = draw(entry, stock, 200)
    ours = build(entry, solvers)
    few, many = (relative(draw(entry, ours, steps) - wanted, wanted) for steps in (5, 100))
    assert many < 0.02
    assert many < 0.15 * few
    if not entry.own_grid:  # the limit does not depend on the grid; a shift that is left out shows here
        interrupted(entry, stock, 1, 100)  # FLUX.2 shifts by the number of steps too
        assert (ours.scheduler.timesteps - stock.scheduler.timesteps).abs().mean() < 10
