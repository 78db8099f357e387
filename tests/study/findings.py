"""The seven findings of `make study`: what each measures (a record, plain JSON), its table, and the sentence that says
what was found and, by a rule, whether it agrees with the paper. A record holds what `study_units` measured.

What is said of the paper: arXiv 2505.21114, tables of Sec. 6, Fig. 3, App. C, D and G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

from tests.bench.cost_model import table
from tests.study import models as study_models
from tests.study.units import ADAMS, CLASSICAL, REFERENCE, Study, Unit

Record = dict[str, Any]
Found = list[Any]  # of each seed, or of the one run of what has none
Rows = Mapping[str, Mapping[str, Found]]  # by name, by column
Solvers = Mapping[str, Sequence[str | Unit]]  # by name: a scheduler, or searches by seed
SEARCHED = "searched"
LIMIT = 1.05  # a ratio up to which two errors count as alike
ERROR, DISTANCE = "error", "value"  # keys of what was measured
MODEL_STEPS = 50  # of the model itself, where distances are measured
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # of finding 7: name, settings over `Budget.lean`
    "recipe": ("the paper's parametrisation and recipe", {"method": "paper", "train_batch_size": 4}),
    "rows": ("closed form", {"polish": 0}),
    "polish": ("closed form, polish", {}),
    "coefficients": ("closed form, polish of coefficients alone", {"search_over": ["coefficients"]}),
    "untimed": ("closed form, polish without times t'", {"search_over": ["nodes", "coefficients"]}),
    **{
        name: (f"closed form, polish, gradient of `{name}`", {"method": "gradient", "objective": name})
        for name in ("terminal", "trajectory", "mixed", "paper")
    },
    "perceptual": (
        "closed form, polish, gradient of `perceptual`",
        {"method": "gradient", "objective": "perceptual", "feature_network": "tests.study.models:classifier"},
    ),
}
OTHERS = ("terminal", "trajectory", "mixed")  # objectives beside the paper's


# --- figures ----------------------------------------------------------------------------------------------------------


def mean(found: Found, key: str = ERROR) -> float:
    """Over seeds; infinite if one is not finite."""
    return math.inf if any(f[key] is None for f in found) else fmean(f[key] for f in found)


def ratio(found: Found, other: Found, key: str = ERROR) -> float:
    return mean(found, key) / mean(other, key)


def geometric(ratios: Iterable[float]) -> float:
    """Mean; 0 where one is."""
    values = list(ratios)
    return geometric_mean(values) if all(values) else 0.0


def agreement(cases: Sequence[bool]) -> str:
    return "agrees" if all(cases) else "agrees in part" if any(cases) else "disagrees"


def cell(found: Found, key: str = ERROR) -> str:
    """Mean (least to most) of seeds, or +- half of the 95 % interval."""
    if not found:
        return "-"
    if (value := mean(found, key)) == math.inf:
        return "diverges"
    if len(found) > 1:
        return f"{value:.3g} ({min(f[key] for f in found):.3g} to {max(f[key] for f in found):.3g})"
    low, high = found[0]["interval"]
    return f"{value:.3g} +- {(high - low) / 2:.1g}"


def grids(by_model: Mapping[str, Rows], head: str, key: str = ERROR) -> str:
    """A table for each model, with its name in this head: rows by name, columns as they come."""
    parts = []
    for model, rows in by_model.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [(name, *(cell(row.get(c, []), key) for c in columns)) for name, row in rows.items()]
        parts.append(table((head.format(model), *columns), *lines))
    return "\n".join(parts)


def distances_head(record: Record, head: str) -> str:
    """With the name of the network whose features they are measured in."""
    rows = next(iter(record["distances"].values()))
    return f"{head}, Frechet distance ({next(iter(next(iter(rows.values())).values()))[0]['name']})"


# --- what is measured -------------------------------------------------------------------------------------------------


def errors(study: Study, model: str, solvers: Solvers, nfe: Sequence[int], **how: Any) -> dict[str, dict[str, Found]]:
    return {
        name: {str(n): [study.of(study.run(model, s, n, **how)) for s in each] for n in nfe}
        for name, each in solvers.items()
    }


def distances(study: Study, model: str, solvers: Solvers, nfe: Sequence[int]) -> dict[str, dict[str, Found]]:
    return {
        name: {str(n): [study.of(study.distance(model, s, n)) for s in each] for n in nfe}
        for name, each in solvers.items()
    }


def families(size: str) -> list[str]:
    """The models of a size."""
    return [f"{size}-{family}" for family in study_models.FAMILIES]


def searches(study: Study, model: str) -> list[Unit]:
    """The default ones, by seed: at all step counts of finding 1, or on other sizes at those of finding 2."""
    b = study.budget
    nfe = b.nfe if model.split("-")[0] in b.sizes else b.few
    return [study.search(model, seed, nfe, b.lean) for seed in study.seeds]


# --- 1: searched and stock --------------------------------------------------------------------------------------------


def record_1(study: Study) -> Record:
    b = study.budget
    found: Record = {"errors": {}, "distances": {}, "converged": {}}
    for model in (model for size in b.sizes for model in families(size)):
        adams = [f"{ADAMS}{order}" for order in b.adams] if model.endswith("flow") else []
        solvers: Solvers = {SEARCHED: searches(study, model), **{name: [name] for name in (*adams, *b.stock)}}
        found["errors"][model] = errors(study, model, solvers, b.nfe)
        itself = distances(study, model, {REFERENCE: [REFERENCE]}, [MODEL_STEPS])
        found["distances"][model] = distances(study, model, solvers, b.few) | itself
        found["converged"][model] = study.of(study.converged(model, b.guidance))
    return found


def table_1(record: Record) -> str:
    own = [found["error"] for found in record["converged"].values()]
    note = f"Of the references themselves, against half of their steps: {min(own):.1g} to {max(own):.1g}.\n"
    images = grids(record["distances"], distances_head(record, "{}, NFE"), DISTANCE)
    return f"{grids(record['errors'], '{}, NFE')}\n{note}\n{images}"


def best_other(rows: Rows, column: str, key: str) -> Found:
    """The best of a column beside the searched solvers and the model itself."""
    others = [row[column] for name, row in rows.items() if name not in (SEARCHED, REFERENCE)]
    return min(others, key=lambda found: mean(found, key))


def sentence_1(record: Record) -> str:
    def pairs(part: str, key: str) -> list[tuple[Rows, Found, Found]]:
        """Of each model and step count: the model's rows, the searched one, the best of the others."""
        by_model = record[part].values()
        return [(rows, found, best_other(rows, n, key)) for rows in by_model for n, found in rows[SEARCHED].items()]

    images = pairs("distances", DISTANCE)
    error = [ratio(found, other) for _, found, other in pairs("errors", ERROR)]
    lower, nearer = [r < 1 for r in error], [ratio(found, other, DISTANCE) < 1 for _, found, other in images]
    itself = [rows[REFERENCE][str(MODEL_STEPS)] for rows, *_ in images]
    ours, others = (
        [ratio(pair[which], model, DISTANCE) for pair, model in zip(images, itself, strict=True)] for which in (1, 2)
    )
    return (
        f"At equal calls a searched solver has {geometric(error):.2g} times the error of the best of the others "
        f"(geometric mean; from {min(error):.2g} to {max(error):.2g}), the lower one in {sum(lower)} of {len(lower)} "
        f"cases. Its images are nearer to real ones than the nearest of the others' in {sum(nearer)} of {len(nearer)}: "
        f"{min(ours):.2f} to {max(ours):.2f} times as far as the model's own in {MODEL_STEPS} calls, those of the "
        f"others {min(others):.2f} to {max(others):.2f} times. The paper's solvers are ahead at every step count: this "
        f"{agreement(lower)} in error and {agreement(nearer)} in distance."
    )


# --- 2: searched on one size, run on another --------------------------------------------------------------------------


def record_2(study: Study) -> Record:
    b, (first, *_, last) = study.budget, study_models.SIZES
    found: Record = {"errors": {}, "distances": {}}
    for family in study_models.FAMILIES:
        solvers = {f"{size}-{family}": searches(study, f"{size}-{family}") for size in study_models.SIZES}
        for target in solvers:
            found["errors"][target] = errors(study, target, solvers, b.few)
        ends = {model: solvers[model] for model in (f"{first}-{family}", f"{last}-{family}")}
        found["distances"][f"{last}-{family}"] = distances(study, f"{last}-{family}", ends, b.few)
    return found


def table_2(record: Record) -> str:
    head = "searched on, by rows; run on {}, NFE"
    return f"{grids(record['errors'], head)}\n{grids(record['distances'], distances_head(record, head), DISTANCE)}"


def transfer(by_model: Mapping[str, Rows], source: str, target: str, key: str = ERROR) -> float:
    """What solvers of one size have on another, over its own; geometric mean over families and step counts."""
    return geometric(
        ratio(rows[model.replace(target, source)][n], own, key)
        for model, rows in by_model.items()
        if model.startswith(target)
        for n, own in rows[model].items()
    )


def sentence_2(record: Record) -> str:
    small, *_, large = study_models.SIZES
    up, down = (transfer(record["errors"], *pair) for pair in ((small, large), (large, small)))
    distance = transfer(record["distances"], small, large, DISTANCE)
    return (
        f"Run on the {large} model, a solver searched on the {small} one has {up:.2f} times the error and "
        f"{distance:.2f} times the distance of one searched there; the other way round {down:.2f} times the error. The "
        f"paper's are as good or better from small to large: this {agreement([up <= LIMIT])} in error and "
        f"{agreement([distance <= LIMIT])} in distance (as good: up to {LIMIT} times)."
    )


# --- 3: teachers ------------------------------------------------------------------------------------------------------


def record_3(study: Study) -> Record:
    b = study.budget
    found: Record = {"errors": {}}
    for model in families(b.small):
        rows = found["errors"][model] = {}
        for order, steps in ((order, steps) for order in b.orders for steps in b.teachers):
            settings = {**b.lean, "teacher_steps": steps, "teacher_order": order}
            solvers = {"": [study.search(model, seed, b.few, settings) for seed in study.seeds]}
            teacher = [study.of(study.teacher(model, steps, order))]
            rows[f"order {order}, {steps} steps"] = {"teacher": teacher, **errors(study, model, solvers, b.few)[""]}
    return found


def table_3(record: Record) -> str:
    return grids(record["errors"], "{}, teacher of; NFE")


def teacher_of(name: str) -> tuple[int, int]:
    """Order and steps, from the name of a row."""
    _, order, steps, _ = name.replace(",", "").split()
    return int(order), int(steps)


def sentence_3(record: Record) -> str:
    by_model = list(record["errors"].values())
    teachers = [teacher_of(name) for name in by_model[0]]
    few, many = (n for n in next(iter(by_model[0].values())) if n != "teacher")
    shortest, longest = min(steps for _, steps in teachers), max(steps for _, steps in teachers)

    def gain(order: int, n: str) -> float:
        """The error with the shortest over that with the longest."""
        names = [f"order {order}, {steps} steps" for steps in (shortest, longest)]
        return geometric(ratio(rows[names[0]][n], rows[names[1]][n]) for rows in by_model)

    gains = {order: (gain(order, few), gain(order, many)) for order, _ in teachers}
    told = ", ".join(f"order {order}: {a:.2f} and {b:.2f}" for order, (a, b) in gains.items())
    cases = [gains[1][1] > LIMIT, gains[1][0] <= LIMIT]
    return (
        f"From {shortest} to {longest} steps of the teacher the error falls by these factors at {few} and {many} "
        f"calls: {told}. The paper's longer references, of order 1, help from 7 calls on (here: above {LIMIT}) and "
        f"hardly at 5 and 6 (up to {LIMIT}): this {agreement(cases)}."
    )


# --- 4: samples -------------------------------------------------------------------------------------------------------


def record_4(study: Study) -> Record:
    b = study.budget
    nfe = [b.samples_nfe]
    found: Record = {"errors": {}}
    for model in families(b.small):
        solvers = {
            str(k): [study.search(model, seed, nfe, {**b.sampled, "num_train_samples": k}) for seed in study.seeds]
            for k in b.samples
        }
        found["errors"][model] = errors(study, model, solvers, nfe)
    return found


def table_4(record: Record) -> str:
    return grids(record["errors"], "{}, samples; NFE")


def sentence_4(record: Record) -> str:
    by_model = [{int(k): mean(*row.values()) for k, row in rows.items()} for rows in record["errors"].values()]
    counts = sorted(by_model[0])
    over_first = {k: geometric(found[k] / found[counts[0]] for found in by_model) for k in counts}
    enough = next(k for k in counts if over_first[k] <= LIMIT * min(over_first.values()))
    saturates = enough < counts[-1]
    return (
        f"With {counts[-1]} samples the error is {over_first[counts[-1]]:.2f} times that with {counts[0]}, and "
        + (f"with {enough} it is within {LIMIT - 1:.0%} of the best. " if saturates else "it is still falling. ")
        + f"The paper's search saturates, near 20 000 to 30 000 samples: this {agreement([saturates])}"
        + (", with far fewer." if saturates else ".")
    )


# --- 5: guidance ------------------------------------------------------------------------------------------------------


def record_5(study: Study) -> Record:
    b = study.budget
    nfe = b.scales_nfe
    found: Record = {"nfe": nfe, "errors": {}}
    for model in families(b.small):
        solvers: dict[str, Sequence[str | Unit]] = {
            f"{w:g}": [study.search(model, seed, [nfe], b.lean, w) for seed in study.seeds] for w in b.scales
        }
        solvers |= {name: [name] for name in b.stock[:2]}
        at = {w: errors(study, model, solvers, [nfe], guidance=w) for w in b.scales}
        found["errors"][model] = {name: {f"{w:g}": at[w][name][str(nfe)] for w in b.scales} for name in solvers}
    return found


def table_5(record: Record) -> str:
    return grids(record["errors"], f"{{}}, {record['nfe']} calls: searched at, by rows; run at")


def sentence_5(record: Record) -> str:
    by_model = list(record["errors"].values())
    low, *_, high = (name for name in by_model[0] if name[0].isdigit())
    away, back = (geometric(ratio(rows[a][b], rows[b][b]) for rows in by_model) for a, b in ((low, high), (high, low)))
    return (
        f"Searched at guidance {low} and run at {high}, a solver has {away:.2f} times the error of one searched there, "
        f"and {back:.2f} times the other way round. The paper's, searched without guidance, get worse with much of it, "
        f"and it expects a search with guidance to help: this {agreement([away > LIMIT])}."
    )


# --- 6: another noise schedule ----------------------------------------------------------------------------------------


def record_6(study: Study) -> Record:
    b, model = study.budget, f"{study.budget.small}-vp"
    made = searches(study, model)
    solvers: Solvers = {SEARCHED: made, CLASSICAL: [CLASSICAL], **{name: [name] for name in b.stock[:2]}}
    found = {
        f"{schedule}'s" if schedule else "its own": errors(study, model, solvers, b.few, schedule=schedule)
        for schedule in (None, b.schedule)
    }
    return {"model": model, "errors": found, "refusals": [study.of(study.refusal(model, s, b.schedule)) for s in made]}


def table_6(record: Record) -> str:
    line = next((r["line"] for r in record["refusals"] if r["refused"]), None)
    said = "" if line is None else f"\nThe loader: `{line}`\n"
    return grids(record["errors"], f"{record['model']} on {{}} betas, NFE") + said


def sentence_6(record: Record) -> str:
    def over(to: Callable[[Rows, str], Found]) -> list[float]:
        """The searched one's error over another's, on each schedule."""
        by_schedule = record["errors"].values()
        return [geometric(ratio(found, to(rows, n)) for n, found in rows[SEARCHED].items()) for rows in by_schedule]

    own, other = over(lambda rows, n: rows[CLASSICAL][n])
    own_best, other_best = over(lambda rows, n: best_other(rows, n, ERROR))
    refused = sum(r["refused"] for r in record["refusals"])
    return (
        f"On its own schedule a searched solver has {own:.2g} times the error of classical rows and {own_best:.2g} "
        f"times that of the best of the others. Put onto the other schedule by hand it has {other:.2g} and "
        f"{other_best:.2g} times; the loader refused {refused} of {len(record['refusals'])}. To the paper a solver is "
        f"meaningless on another schedule (here: no better than classical rows): this {agreement([other >= 1])}."
    )


# --- 7: parametrisation and objective ---------------------------------------------------------------------------------


def record_7(study: Study) -> Record:
    b = study.budget
    more = {"paper": {"num_generated_samples": b.generated}, "gradient": {"gradient_calls": b.descent}}
    found: Record = {"generated": b.generated, "errors": {}, "distances": {}}
    for model in families(b.small):
        by_error, by_distance = found["errors"][model], found["distances"][model] = {}, {}
        for name, (_, own) in VARIANTS.items():
            nfe = b.few[:1] if name == "perceptual" else b.few  # it is for up to 6 calls
            settings = {**b.lean, **own, **more.get(own.get("method", ""), {})}
            solvers = {name: [study.search(model, seed, nfe, settings) for seed in study.seeds]}
            by_error |= errors(study, model, solvers, nfe)
            by_distance |= distances(study, model, solvers, nfe)
    return found


def table_7(record: Record) -> str:
    def named(part: str) -> dict[str, Rows]:
        return {m: {VARIANTS[name][0]: row for name, row in rows.items()} for m, rows in record[part].items()}

    images = grids(named("distances"), distances_head(record, "{}, NFE"), DISTANCE)
    return f"{grids(named('errors'), '{}, NFE')}\n{images}"


def sentence_7(record: Record) -> str:
    def over(name: str, other: str, part: str = "errors", key: str = ERROR) -> float:
        return geometric(
            ratio(found, rows[other][n], key) for rows in record[part].values() for n, found in rows[name].items()
        )

    ours = over("polish", "recipe")
    others = {name: over(name, "paper") for name in OTHERS}
    best = min(others, key=lambda name: others[name])
    error, distance = over("perceptual", "terminal"), over("perceptual", "terminal", "distances", DISTANCE)
    (fewest,) = next(iter(record["errors"].values()))["perceptual"]
    return (
        f"Corrections to classical rows, found in closed form and polished, have {ours:.2f} times the error of the "
        f"paper's parametrisation and recipe ({record['generated']} of its 50 000 samples). A gradient descent from "
        f"there ends, by the best other objective (`{best}`), at {others[best]:.2f} times the error that the paper's "
        f"objective ends at; at {fewest} calls by `perceptual` at {error:.2f} times the error and {distance:.2f} times "
        f"the distance of `terminal`. With the paper's choices this {agreement([ours * LIMIT >= 1])} in "
        f"parametrisation and {agreement([others[best] * LIMIT >= 1])} in objective (where it does not, another is "
        f"better by more than {LIMIT} times)."
    )


# --- all --------------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One question: what is measured, its table, and the sentence that says what was found."""

    title: str
    record: Callable[[Study], Record]
    table: Callable[[Record], str]
    sentence: Callable[[Record], str]


FINDINGS = {
    1: Finding("searched and stock", record_1, table_1, sentence_1),
    2: Finding("sizes", record_2, table_2, sentence_2),
    3: Finding("teachers", record_3, table_3, sentence_3),
    4: Finding("samples", record_4, table_4, sentence_4),
    5: Finding("guidance", record_5, table_5, sentence_5),
    6: Finding("another schedule", record_6, table_6, sentence_6),
    7: Finding("parametrisation and objective", record_7, table_7, sentence_7),
}


def block(number: int, record: Record) -> str:
    """What stands in search/docs/study.md between the markers of a finding."""
    finding = FINDINGS[number]
    figures = finding.table(record).rstrip()
    return f"{finding.sentence(record)}\n\n<details><summary>Figures</summary>\n\n{figures}\n\n</details>"
