"""The `merge` command: one artefact of solvers that were searched at one guidance scale each.

`DSSolverScheduler.from_pretrained(..., guidance_scale=w)` takes its tables for w, or blends those of w's neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.artefacts import mismatch
from diffusers_dssolver.published import CONFIG_NAME

from ..console import warn
from ..settings import MergeConfig
from ..storage import write_text
from .read import load_solver

SAME = ("model", "revision", "pipeline")  # fields of the provenance that all solvers must share


def merge(config: MergeConfig) -> None:
    """Write the artefact.

    Raises:
        ValueError: the solvers differ in more than their guidance, or the folder holds a solver; nothing is written.
    """
    folder = Path(config.output_dir)
    if (folder / CONFIG_NAME).exists():
        raise ValueError(f"{folder} holds a solver; choose another --output_dir")
    by_scale = _by_scale(config.solver)
    scales = list(by_scale)
    default = scales[len(scales) // 2] if config.guidance_scale is None else config.guidance_scale
    if default not in by_scale:
        raise ValueError(f"guidance_scale is {default}; it must be one of {', '.join(map(str, scales))}")
    merged = _merged(by_scale, default)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_NAME, DSSolverScheduler.from_config(merged).to_json_string())
    told = f"guidance scales {', '.join(map(str, scales))} ({default} by default)"
    print(f"{told}, {len(merged['solvers'])} step counts: {folder}")


def _by_scale(sources: Sequence[str]) -> dict[float, dict[str, Any]]:
    """Configurations of the solvers by guidance scale, rising."""
    artefacts = {source: dict(load_solver(source).config) for source in sources}
    first, pattern = next(iter(artefacts.items()))
    by_scale: dict[float, dict[str, Any]] = {}
    for source, artefact in artefacts.items():
        scale = _scale(source, artefact)
        if scale in by_scale:
            raise ValueError(f"{source!r} was searched at guidance scale {scale}, as another one was; give one of them")
        if difference := _difference(pattern, artefact):
            raise ValueError(f"{source!r} {difference}, {first!r} does not; they cannot share a file")
        by_scale[scale] = artefact
    return dict(sorted(by_scale.items()))


def _merged(by_scale: Mapping[float, Mapping[str, Any]], default: float) -> dict[str, Any]:
    """Configuration of the artefact that holds them all, for the step counts that they have in common."""
    counts = set.intersection(*(set(a["solvers"]) for a in by_scale.values()))
    if not counts:
        raise ValueError("the solvers have no step count in common; search the same --nfe at every guidance scale")
    if left_out := sorted(set().union(*(a["solvers"] for a in by_scale.values())) - counts, key=int):
        warn(f"left out, since not every guidance scale has tables for them: {', '.join(left_out)} steps")
    tables = {w: {n: a["solvers"][n] for n in sorted(counts, key=int)} for w, a in by_scale.items()}
    facts = by_scale[default]["provenance"]
    provenance = {
        "kind": "merged", **{key: facts.get(key) for key in SAME},
        "call": {**facts["call"], "guidance_scale": list(by_scale)}, "default_guidance_scale": default,
        "by_guidance_scale": {str(w): dict(a["provenance"]) for w, a in by_scale.items()},
    }  # fmt: skip
    return {
        **by_scale[default], "solvers": tables[default], "provenance": provenance,
        "guidance_solvers": {str(w): solvers for w, solvers in tables.items()},
    }  # fmt: skip


def _scale(source: str, artefact: Mapping[str, Any]) -> float:
    """The guidance scale that a solver was searched at."""
    provenance = artefact["provenance"]
    call = provenance.get("call") if isinstance(provenance, Mapping) else None
    scale = call.get("guidance_scale") if isinstance(call, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"{source!r} does not say one guidance scale that it was searched at; search with one")
    return float(scale)


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What keeps `other` out of a file with `one`, if anything."""
    if reason := mismatch(one, other) or mismatch(other, one):
        return reason
    facts = [a["provenance"] for a in (one, other)]
    for key in SAME:
        if facts[0].get(key) != facts[1].get(key):
            return f"has {key} {facts[1].get(key)!r}"
    calls = [{k: v for k, v in f["call"].items() if k != "guidance_scale"} for f in facts]
    if calls[0] != calls[1]:
        return f"was searched with {calls[1]!r}"
    for key, name in (
        ("searched_shift", "was searched at shift"), ("mean_decay", "has mean_decay"), ("carried_from", "comes from"),
    ):  # fmt: skip
        if one[key] != other[key]:
            return f"{name} {other[key]!r}"
    return None
