"""The `merge` command: solvers that were searched at one guidance scale each become one artefact, from which
`DSSolverScheduler.from_pretrained(..., guidance_scale=w)` takes, or blends, the tables for any scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.artefacts import mismatch
from diffusers_dssolver.published import CONFIG_NAME

from ..console import say
from ..settings import MergeConfig
from ..storage import write_text

SAME = ("model", "revision", "pipeline")  # facts of a provenance that the solvers must share


def merge(config: MergeConfig) -> None:
    """Write the artefact.

    Raises:
        ValueError: for solvers that were not searched on the same model in the same way but for the guidance, or a
            folder that holds a solver already; nothing is written.
    """
    folder = Path(config.output_dir)
    if (folder / CONFIG_NAME).exists():
        raise ValueError(f"{folder} holds a solver; choose another --output_dir")
    artefacts = {source: dict(DSSolverScheduler.from_pretrained(source).config) for source in config.solver}
    by_scale: dict[float, dict[str, Any]] = {}
    first, reference = next(iter(artefacts.items()))
    for source, artefact in artefacts.items():
        scale = _scale(source, artefact)
        if scale in by_scale:
            raise ValueError(f"{source!r} was searched at guidance scale {scale}, as another one was; give one of them")
        if difference := _difference(reference, artefact):
            raise ValueError(f"{source!r} {difference}, {first!r} does not; they cannot share a file")
        by_scale[scale] = artefact
    counts = set.intersection(*(set(a["solvers"]) for a in by_scale.values()))
    left_out = sorted(set().union(*(a["solvers"] for a in by_scale.values())) - counts, key=int)
    if not counts:
        raise ValueError("the solvers have no step count in common; search the same --nfe at every guidance scale")
    if left_out:
        say(f"left out, since not every guidance scale has tables for them: {', '.join(left_out)} steps")
    scales = sorted(by_scale)
    default = scales[len(scales) // 2] if config.guidance_scale is None else config.guidance_scale
    if default not in by_scale:
        raise ValueError(f"guidance_scale is {default}; it must be one of {', '.join(map(str, scales))}")
    tables = {w: {n: a["solvers"][n] for n in sorted(counts, key=int)} for w, a in sorted(by_scale.items())}
    facts = {key: reference["provenance"].get(key) for key in SAME}
    call = {**reference["provenance"]["call"], "guidance_scale": scales}
    provenance = {
        "kind": "merged", **facts, "call": call, "default_guidance_scale": default,
        "by_guidance_scale": {str(w): dict(by_scale[w]["provenance"]) for w in scales},
    }  # fmt: skip
    merged = {
        **by_scale[default], "solvers": tables[default], "provenance": provenance,
        "guidance_solvers": {str(w): solvers for w, solvers in tables.items()},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_NAME, DSSolverScheduler.from_config(merged).to_json_string())
    print(f"guidance scales {', '.join(map(str, scales))} ({default} by default), {len(counts)} step counts: {folder}")


def _scale(source: str, artefact: Mapping[str, Any]) -> float:
    """The one guidance scale that a solver was searched at."""
    provenance = artefact["provenance"]
    call = provenance.get("call") if isinstance(provenance, Mapping) else None
    scale = call.get("guidance_scale") if isinstance(call, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"{source!r} does not say one guidance scale that it was searched at; search with one")
    return float(scale)


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What `other` has that keeps it out of a file with `one`."""
    if reason := mismatch(one, other) or mismatch(other, one):
        return reason
    facts = [a["provenance"] for a in (one, other)]
    for key in SAME:
        if facts[0].get(key) != facts[1].get(key):
            return f"has {key} {facts[1].get(key)!r}"
    calls = [{k: v for k, v in f["call"].items() if k != "guidance_scale"} for f in facts]
    if calls[0] != calls[1]:
        return f"was searched with {calls[1]!r}"
    for key, name in (("searched_shift", "was searched at shift"), ("mean_decay", "has mean_decay")):
        if one[key] != other[key]:
            return f"{name} {other[key]!r}"
    return None
