"""The gradient loop: batches in, loss down, best parameters kept. It knows no diffusers and no objective.

Every process holds the parameters; each adds its share of the loss and the gradients are summed by hand (a wrapper
such as DDP would reduce nothing here, because the parameters are read past its forward). Checkpoints are safetensors,
renamed into place, and a run that was killed goes on to the same result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lion_pytorch import Lion
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm


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
) -> float:
    """Lion at a constant learning rate, no weight decay; the parameters of the best validation are put in place.

    Args:
        loss_of: iteration -> this process's share of the loss (shares sum to the loss of the global batch).
        validate: held-out error of the parameters as they are; called every `validation_steps` and at the end.
        checkpoint: a safetensors file to resume from and to write after every validation.

    Returns:
        The best held-out error.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675 (Lion); paper Sec. 5.
    """
    optimizer = Lion(parameters.parameters(), lr=learning_rate, weight_decay=0.0)
    start, best, best_state = 0, float("inf"), _copy(parameters)
    if checkpoint and checkpoint.is_file():
        start, best, best_state = _load(checkpoint, parameters, optimizer)
    bar = tqdm(
        range(start, iterations),
        desc=description,
        initial=start,
        total=iterations,
        disable=not accelerator.is_main_process,
    )
    for iteration in bar:
        optimizer.zero_grad()
        loss = loss_of(iteration)
        loss.backward()
        for p in parameters.parameters():
            if p.grad is not None:
                p.grad = accelerator.reduce(p.grad, "sum")
        optimizer.step()
        done = iteration + 1
        if done % validation_steps == 0 or done == iterations:
            error = validate()
            if error < best:
                best, best_state = error, _copy(parameters)
            total = float(accelerator.reduce(loss.detach(), "sum"))
            log({"iteration": done, "loss": total, "validation_mse": error, "best_validation_mse": best})
            bar.set_postfix(loss=f"{total:.4g}", held_out=f"{error:.3g}", best=f"{best:.3g}")
            if checkpoint and accelerator.is_main_process:
                _save(
                    checkpoint,
                    parameters,
                    optimizer,
                    best_state,
                    {"done": done, "best": best},
                )
    parameters.load_state_dict(best_state)
    return best


def _copy(parameters: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.state_dict().items()}


def _save(
    file: Path, parameters: nn.Module, optimizer: Lion, best: dict[str, Tensor], progress: dict[str, Any]
) -> None:
    tensors = {f"now.{k}": v for k, v in _copy(parameters).items()} | {f"best.{k}": v for k, v in best.items()}
    for name, p in parameters.named_parameters():
        if "exp_avg" in optimizer.state[p]:
            tensors[f"momentum.{name}"] = optimizer.state[p]["exp_avg"]
    partial = file.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"progress": json.dumps(progress)})
    os.replace(partial, file)


def _load(file: Path, parameters: nn.Module, optimizer: Lion) -> tuple[int, float, dict[str, Tensor]]:
    with safe_open(file, "pt") as stored:
        progress = json.loads(stored.metadata()["progress"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    names = list(parameters.state_dict())
    parameters.load_state_dict({k: tensors[f"now.{k}"] for k in names})
    for name, p in parameters.named_parameters():
        if f"momentum.{name}" in tensors:
            optimizer.state[p]["exp_avg"] = tensors[f"momentum.{name}"]
    return progress["done"], progress["best"], {k: tensors[f"best.{k}"] for k in names}
