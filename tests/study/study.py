"""`make study`: the paper's findings in small, on models of three sizes (`study_models`), with three seeds.

    python -m tests.study.study [--findings 1 3] [--seeds 0 1 2] [--plan] [--share k/n] [--update]

An error is the final-state mse on test samples that no search has seen, over the variance of the converged reference's
final states, so that models compare. Over seeds: the mean, and the least and the most; of what has no seed, half of
the 95 % interval by bootstrap over samples. Sizes and what runs on which model: `study_units.Budget`. Every unit is
kept under --output, so that a killed study goes on; processes with `--share 0/2` and `--share 1/2` measure different
ones, and a run without it collects them: tables, study.json and plots there. `--plan` counts network calls and hours
beforehand. `--update` puts the tables into search/docs/study.md, the plots and what all is made of into
search/results/.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatterSciNotation, NullLocator

from dssolver_search.measure.pictures import COLOURS, MARKERS, WIDTH, rendered
from dssolver_search.storage import replacing, write_text
from tests import documents
from tests.bench.cost_model import table
from tests.study import models as study_models
from tests.study.findings import FINDINGS, SEARCHED, Found, Record, block, mean, teacher_of
from tests.study.units import Budget, Study

FILE, MODELS = "study.json", "models"
LEGEND, HANDLE = 98, 5  # characters that stand side by side in a legend, and what a handle takes of them
Line = list[tuple[float, list[float]]]  # x, values of the seeds
Panels = dict[str, dict[str, Line]]  # by title, by label


# --- plots ------------------------------------------------------------------------------------------------------------


def line(found: Iterable[tuple[float, Found]]) -> Line:
    """Without what diverges."""
    return [(x, [f["error"] for f in runs]) for x, runs in found if mean(runs) < math.inf]


def by_column(record: Record) -> Panels:
    """A panel for each model, a line for each row."""
    return {
        model: {name: line((float(column), found) for column, found in row.items()) for name, row in rows.items()}
        for model, rows in record["errors"].items()
    }


def by_teacher(record: Record) -> Panels:
    """A panel for each model and step count, a line for each order."""
    panels: Panels = {}
    for model, rows in record["errors"].items():
        for name, row in rows.items():
            order, steps = teacher_of(name)
            for n in (n for n in row if n != "teacher"):
                lines = panels.setdefault(f"{model}, {n} calls", {})
                lines.setdefault(f"order {order}", []).extend(line([(steps, row[n])]))
    return panels


def by_row(record: Record) -> Panels:
    """A panel for each model, its rows along x."""
    return {
        f"{model}, {n} calls": {SEARCHED: line((float(x), row[n]) for x, row in rows.items())}
        for model, rows in record["errors"].items()
        for n in next(iter(rows.values()))
    }


def by_guidance(record: Record) -> Panels:
    """`by_column` of searches at guidance scales: what a line was searched at is said."""

    def told(name: str) -> str:
        return f"{SEARCHED} at {name}" if name[0].isdigit() else name

    return {model: {told(name): line for name, line in lines.items()} for model, lines in by_column(record).items()}


PLOTS: dict[int, tuple[Callable[[Record], Panels], str, bool]] = {  # by finding; what lies along x, logarithmic or not
    1: (by_column, "network calls (NFE)", False),
    3: (by_teacher, "steps of the teacher", True),
    4: (by_row, "training samples", True),
    5: (by_guidance, "guidance scale of the run", False),
}


def curves(panels: Panels, xlabel: str, logarithmic: bool, dark: bool = False) -> Figure:
    """Errors, logarithmic: the mean over seeds, least to most shaded."""
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for label, points in lines.items():
            k, x = labels.index(label), [x for x, _ in points]
            colour = COLOURS[k % len(COLOURS)]
            ink = matplotlib.rcParams["text.color"] if colour == "#000000" else colour
            axis.plot(
                x, [fmean(values) for _, values in points], color=ink, marker=MARKERS[k % len(MARKERS)], markersize=4,
                label=label, linewidth=2.6 if label == SEARCHED else 1.3,
            )  # fmt: skip
            least, most = ([end(values) for _, values in points] for end in (min, max))
            axis.fill_between(x, least, most, color=ink, alpha=0.15, linewidth=0)
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.2, 0.7)))
        axis.set_xscale("log" if logarithmic else "linear")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(title=title, xlabel=xlabel, ylabel="error over variance")
        axis.grid(True, which="both", alpha=0.5)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    shown = {t: h for axis in axes for h, t in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(labels) > 1:
        most = LEGEND // (max(map(len, shown)) + HANDLE)
        columns = math.ceil(len(shown) / math.ceil(len(shown) / most))
        figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=columns, frameon=False)
    return figure


# --- the whole --------------------------------------------------------------------------------------------------------


def plan(study: Study, findings: Sequence[int]) -> str:
    """Units, network calls of one sample and core-hours of each finding, what it shares with those before left out. An
    upper bound: teachers that several searches share count for each."""
    lines: list[tuple[Any, ...]] = [("", "units", "calls", "core-hours", "done")]
    counted: set[str] = set()
    for number in (*findings, None):
        if number is not None:
            FINDINGS[number].record(study)
        units = [unit for name, unit in study.wanted.items() if number is None or name not in counted]
        counted |= set(study.wanted)
        hours, calls = sum(unit.seconds for unit in units) / 3600, sum(unit.calls for unit in units)
        name = "all" if number is None else f"{number}. {FINDINGS[number].title}"
        lines.append((name, len(units), f"{calls:,}", f"{hours:.2f}", sum(study.known(u) is not None for u in units)))
    return table(*lines)


def models_block(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The models, from what their trainings wrote; the classifier has its accuracy in the place of a loss."""
    lines: list[tuple[Any, ...]] = [("model", "parameters", "MFLOP", "training", "minutes", "device", "loss")]
    for name, f in facts.items():
        trained = f"{f['steps']:,} steps" if "steps" in f else f"{f['epochs']} epochs"
        reached = f.get("loss", f"accuracy {f.get('test_accuracy')}")
        mflop = study_models.MFLOP.get(name.split("-")[0], "")
        lines.append((name, f"{f['parameters']:,}", mflop, trained, f["minutes"], f["device"], reached))
    return table(*lines).rstrip()


def blocks(whole: Record) -> dict[str, str]:
    """What stands in search/docs/study.md, by the name of its markers."""
    found = {f"study-{number}": block(int(number), record) for number, record in whole["findings"].items()}
    return {f"study-{MODELS}": models_block(whole[MODELS]), **found}


def merged(file: Path, whole: Record) -> Record:
    """This study, with those findings of an earlier one that it did not look at.

    Raises:
        ValueError: that one was made with another budget, other seeds or models.
    """
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else whole
    both = {**old["findings"], **whole["findings"]}
    different = [key for key in whole if key != "findings" and old[key] != whole[key]]
    if different and len(both) > len(whole["findings"]):
        raise ValueError(f"{file.name} holds findings with other {different[0]}; give all of --findings")
    return {**whole, "findings": {number: both[number] for number in sorted(both)}}


def write(folder: Path, whole: Record) -> None:
    """study.json and the plots."""
    write_text(folder / FILE, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    for number in map(int, whole["findings"]):
        if number in PLOTS:
            panels, xlabel, logarithmic = PLOTS[number]
            draw = functools.partial(curves, panels(whole["findings"][str(number)]), xlabel, logarithmic)
            with replacing(folder / f"study-{number}.png") as partial:
                partial.write_bytes(rendered(draw))


def share(text: str) -> tuple[int, int]:
    k, n = map(int, text.split("/"))
    if not 0 <= k < n:
        raise ValueError
    return k, n


def main(argv: list[str] | None = None, budget: Budget | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=study_models.DEFAULT)
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--findings", type=int, nargs="+", choices=FINDINGS, default=list(FINDINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plan", action="store_true", help="count and stop")
    parser.add_argument("--share", type=share, default=(0, 1), help="k/n: every n-th unit from the k-th on, then stop")
    parser.add_argument("--update", action="store_true")
    given = parser.parse_args(argv)
    try:
        study_of(given, budget or Budget())
    except ValueError as error:
        raise SystemExit(str(error)) from None


def study_of(given: argparse.Namespace, budget: Budget) -> None:
    if lacking := study_models.missing(given.models):
        raise ValueError(f"{given.models} lacks {', '.join(lacking)}; run `python -m tests.study.models`")
    findings = sorted(set(given.findings))
    whole: Record = {
        "budget": json.loads(json.dumps(asdict(budget))), "seeds": given.seeds,
        MODELS: study_models.facts(given.models), "findings": dict.fromkeys(map(str, findings)),
    }  # fmt: skip
    published = documents.ROOT / documents.RESULTS / FILE
    if given.update:
        documents.check([f"study-{name}" for name in (MODELS, *merged(published, whole)["findings"])])
    study = Study(given.models, given.output, budget, given.seeds)
    print(plan(study, findings), flush=True)
    if given.plan:
        return
    waiting = study.work(given.share)
    if given.share[1] > 1:
        print(f"this share is done; {waiting} units wait for others; when all are, run the same without --share")
        return
    whole["findings"] = {str(number): FINDINGS[number].record(study) for number in findings}
    write(given.output, whole)
    for name, text in blocks(whole).items():
        print(f"\n{name}\n\n{text}")
    if given.update:
        whole = merged(published, whole)
        write(published.parent, whole)
        for name, text in blocks(whole).items():
            documents.put(name, text)


if __name__ == "__main__":
    main()
