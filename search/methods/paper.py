"""The gradient loop: batches in, loss down, best parameters kept. It knows no diffusers and no objective.

Every process holds the parameters; each adds its share of the loss and the gradients are summed by hand (a wrapper
such as DDP would reduce nothing here, because the parameters are read past its forward). Checkpoints are safetensors,
renamed into place, and a run that was killed goes on to the same result. What is not finite never reaches the
parameters: the loop goes back to the best and on from there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lion_pytorch import Lion
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..console import say
from ..processes import from_main, reduced
from ..storage import Damaged, read_tensors, write_tensors

DIVERGED = 100.0  # times the best held-out error
MAX_ROLLBACKS = 3  # with no better held-out error between them


@dataclass
class Progress:
    """Where the loop stands.

    Attributes:
        done: updates, those that were rolled back included.
        best: held-out error.
        rollbacks: since the best was found.
        evaluations: what `count` gave.
    """

    done: int = 0
    best: float = math.inf
    rollbacks: int = 0
    evaluations: int = 0


def fit(
    parameters: nn.Module,
    loss_of: Callable[[int], Tensor],
    iterations: int,
    learning_rate: float,
    accelerator: Accelerator,
    validate: Callable[[], float],
    validation_steps: int,
    checkpoint: Path | None = None,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
    description: str = "search",
    key: str = "",
    count: Callable[[], int] = lambda: 0,
    on_resume: Callable[[int], None] = lambda evaluations: None,
) -> float:
    """Lion at a constant learning rate, no weight decay; the parameters of the best validation are put in place.

    A loss, gradient or held-out error that is not finite, or a held-out error of more than `DIVERGED` times the best,
    puts the best parameters and their momentum back; the next updates go on from there with new samples. After
    `MAX_ROLLBACKS` of these without a better held-out error the loop ends with the best.

    Args:
        loss_of: iteration -> this process's share of the loss (shares sum to the loss of the global batch).
        validate: held-out error of the parameters as they are; called every `validation_steps` and at the end.
        checkpoint: a safetensors file to resume from and to write after every validation and every roll-back.
        key: of the run; a checkpoint with another key is left alone and replaced.
        count: network evaluations of this fit so far, over all processes; kept with the checkpoint.
        on_resume: given that count when a checkpoint was loaded, before the first update.

    Returns:
        The best held-out error.

    Raises:
        ValueError: no held-out error was finite.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675 (Lion); paper Sec. 5.
    """
    optimizer = Lion(parameters.parameters(), lr=learning_rate, weight_decay=0.0)
    progress, best = Progress(), _snapshot(parameters, optimizer)
    if checkpoint and (stored := _load(checkpoint, key, accelerator)):
        progress = Progress(**stored["progress"])
        best = _tensors(stored["best"])
        _restore(parameters, optimizer, _tensors(stored["now"]))
        on_resume(progress.evaluations)
    bar = tqdm(
        desc=description, initial=progress.done, total=iterations, disable=not accelerator.is_main_process
    )  # fmt: skip
    while progress.done < iterations and progress.rollbacks < MAX_ROLLBACKS:
        fault, loss, error = None, _update(parameters, optimizer, loss_of, progress.done, accelerator), None
        progress.done += 1
        bar.update()
        if not math.isfinite(loss):
            fault = f"the loss or its gradient is {loss}"
        elif progress.done % validation_steps == 0 or progress.done == iterations:
            error = validate()
            if not error <= DIVERGED * progress.best or not math.isfinite(error):
                fault = f"the held-out error is {error:.3g} after {progress.best:.3g}"
            elif error < progress.best:
                progress.best, progress.rollbacks, best = error, 0, _snapshot(parameters, optimizer)
        if fault:
            progress.rollbacks += 1
            _restore(parameters, optimizer, best)
            if accelerator.is_main_process:
                say(f"{description}, update {progress.done}: {fault}; rolled back to the best ({progress.rollbacks})")
        if fault or error is not None:
            record = {"iteration": progress.done, "loss": loss, "validation_mse": error}
            record |= {"best_validation_mse": progress.best} | ({"rolled_back": fault} if fault else {})
            progress.evaluations = count()
            if checkpoint and accelerator.is_main_process:
                now = _snapshot(parameters, optimizer)
                _save(checkpoint, {"now": now, "best": best}, {"key": key, "progress": json.dumps(asdict(progress))})
            log({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()})
            bar.set_postfix(loss=f"{loss:.4g}", best=f"{progress.best:.3g}")
    bar.close()
    if not math.isfinite(progress.best):
        raise ValueError(f"{description}: no update gave a finite held-out error; choose a smaller learning_rate")
    if progress.done < iterations and accelerator.is_main_process:
        say(f"{description}: ended after {MAX_ROLLBACKS} roll-backs without progress; the best is kept")
    _restore(parameters, optimizer, best)
    return progress.best


def _update(
    parameters: nn.Module, optimizer: Lion, loss_of: Callable[[int], Tensor], iteration: int, accelerator: Accelerator
) -> float:
    """One update, unless loss or gradient is not finite, and the loss over all processes, NaN if a gradient is."""
    optimizer.zero_grad()
    loss = loss_of(iteration)
    loss.backward()
    moved = [p for p in parameters.parameters() if p.grad is not None]
    parts = [loss.detach().reshape(1), *(p.grad.flatten() for p in moved if p.grad is not None)]
    total, *gradients = reduced(accelerator, torch.cat([p.double() for p in parts])).split([len(p) for p in parts])
    if not all(g.isfinite().all() for g in gradients):
        return math.nan if math.isfinite(total) else float(total)
    if total.isfinite():
        for p, gradient in zip(moved, gradients, strict=True):
            p.grad = gradient.view_as(p).to(p.dtype)
        optimizer.step()
    return float(total)


def _snapshot(parameters: nn.Module, optimizer: Lion) -> dict[str, Tensor]:
    """Parameters and momentum, copied."""
    tensors = {f"parameter.{name}": value.detach().clone() for name, value in parameters.state_dict().items()}
    for name, p in parameters.named_parameters():
        if "exp_avg" in optimizer.state[p]:
            tensors[f"momentum.{name}"] = optimizer.state[p]["exp_avg"].clone()
    return tensors


def _restore(parameters: nn.Module, optimizer: Lion, tensors: dict[str, Tensor]) -> None:
    parameters.load_state_dict({name: tensors[f"parameter.{name}"] for name in parameters.state_dict()})
    for name, p in parameters.named_parameters():
        optimizer.state[p].clear()
        if f"momentum.{name}" in tensors:
            optimizer.state[p]["exp_avg"] = tensors[f"momentum.{name}"].to(p.device).clone()


def _save(file: Path, snapshots: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> None:
    tensors = {f"{which}.{name}": t for which, snapshot in snapshots.items() for name, t in snapshot.items()}
    write_tensors(file, tensors, metadata)


def _load(file: Path, key: str, accelerator: Accelerator) -> dict[str, Any] | None:
    """The main process's checkpoint as plain data, in every process; None if there is none of this run."""
    plain = None
    if accelerator.is_main_process and file.exists():
        try:
            tensors, metadata = read_tensors(file)
            if metadata["key"] == key:
                plain = {"progress": json.loads(metadata["progress"]), "now": {}, "best": {}}
                for name, t in tensors.items():
                    which, _, rest = name.partition(".")
                    plain[which][rest] = [t.flatten().tolist(), list(t.shape), str(t.dtype).removeprefix("torch.")]
        except (Damaged, KeyError) as error:
            plain = None
            say(f"{file} is damaged and left out: {error}; this fit starts over")
    return from_main(accelerator, plain)


def _tensors(plain: dict[str, Any]) -> dict[str, Tensor]:
    return {n: torch.tensor(v, dtype=getattr(torch, dtype)).view(shape) for n, (v, shape, dtype) in plain.items()}
