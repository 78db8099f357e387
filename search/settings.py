"""Typed settings of the commands: a TOML recipe, then `--key value` over it. Unknown keys are errors."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from diffusers_dssolver.solver import MAX_NFE

EFFORTS = ("quick", "full")
METHODS = ("closed_form", "gradient", "paper")
OBJECTIVES = ("terminal", "trajectory", "mixed", "paper")
PERCEPTUAL = "perceptual"  # the objective on decoded images
STARTS = ((0.0, 0.0, 0.0), (1.5, 0.0, -0.7), (0.75, -1.0, 0.0), (1.5, -1.0, -0.7))  # warps that a search begins from
GROUPS = ("nodes", "coefficients", "times")
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
CHECKPOINTS = ("sit", "dit", "flowdcn")  # official code whose checkpoints `convert` reads
FEWEST_IMAGES = 10  # each half of them has images with four nearest neighbours
LATEST_END = 0.5  # of a teacher: a single step from there to the data leaves out details
MAX_STEPS = 1000  # of a solver
# keys of earlier versions, and what to do instead
REMOVED = {
    "guidance_scales": "search at each guidance_scale, then merge the solvers",
    "teacher_scheduler": "the teacher is our own multistep; teacher_order chooses its order",
    "optimizer": "method gradient descends by L-BFGS",
}
T = TypeVar("T")
Rule = tuple[Callable[[Any], bool], str]  # whether a value is accepted, and what would be

REQUIRED: Rule = (bool, "")
FOR_COMMANDS: Rule = ((lambda value: True), "")  # required on the command line; from Python, objects take its place


def at_least(least: float) -> Rule:
    return (lambda value: value >= least), f"{least} or more"


def between(least: float, most: float) -> Rule:
    return (lambda value: least <= value <= most), f"from {least} to {most}"


def one_of(*names: str) -> Rule:
    return (lambda value: value in names), " or ".join(names)


POSITIVE, COUNT, NOT_NEGATIVE = ((lambda value: value > 0), "above 0"), at_least(1), at_least(0)
STEP_COUNTS: Rule = (
    lambda value: bool(value) and all(1 <= n <= MAX_STEPS for n in value),
    f"whole numbers from 1 to {MAX_STEPS}",
)
RANGE: Rule = (
    lambda value: value == [] or (len(value) == 2 and 1 <= value[0] <= value[1] <= MAX_STEPS),
    "first and last step count, or nothing",
)
ENDS: Rule = (
    lambda value: bool(value) and all(0 <= end <= LATEST_END for end in value),
    f"numbers from 0 to {LATEST_END}",
)
SOME_GROUPS: Rule = (lambda value: bool(value) and set(value) <= set(GROUPS), f"some of {', '.join(GROUPS)}")
BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|seconds|m|min|minutes|h|hours)?")
UNITS = {"s": 1, "m": 60, "h": 3600}
INTERVALS: Rule = (lambda value: value == 0 or value >= 2, "0, or 2 or more")


def budget_of(text: str) -> tuple[float, float | None]:
    """(network evaluations, seconds) of a budget; one of them is unlimited: infinite, or None.

    Raises:
        ValueError: the text is neither a number nor a time.
    """
    found = BUDGET.fullmatch(text.strip().replace("_", "").replace(",", ""))
    if text and (not found or not float(found[1])):
        raise ValueError(f"budget is {text!r}; it must be a time, as 5min or 90s, or a number of network evaluations")
    if not found:
        return math.inf, None
    return (math.inf, float(found[1]) * UNITS[found[2][0]]) if found[2] else (float(found[1]), None)


def option(help: str, default: Any, rule: Rule | None = None, full: Any = None) -> Any:
    """A dataclass field with its help text and the rule for its values. Where `full` is given, the default is that of
    `effort` quick, and `full` that of effort full."""
    metadata: dict[str, Any] = {"help": help, "rule": rule}
    if full is not None:
        return field(default=None, metadata={**metadata, "efforts": {"quick": default, "full": full}})
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Values that follow the rules of their fields.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            if getattr(self, entry.name) is None and "efforts" in entry.metadata:
                object.__setattr__(self, entry.name, _default(entry, self))
            value, rule = getattr(self, entry.name), entry.metadata["rule"]
            if rule is REQUIRED and not value:
                raise ValueError(f"{entry.name} is missing; give --{entry.name}")
            if rule:
                _require(entry.name, value, rule)


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The model and how it is run; what `search`, `compare` and `evaluate` share."""

    pretrained_model_name_or_path: str = option("pipeline, Hub id or folder", "", FOR_COMMANDS)
    output_dir: str = option("folder for the results", "", FOR_COMMANDS)
    nfe: list[int] = option("network calls", [5, 8], STEP_COUNTS)
    guidance_scale: float | None = option("the guidance of the run, passed to the pipeline", None)
    call: dict[str, Any] = option("more arguments of the pipeline's call, as JSON", {})
    prompts_file: str | None = option("text file, one prompt per line", None)
    prompts_dataset: str | None = option("or a data set, Hub id or file (json, csv, parquet, txt), streamed", None)
    prompts_column: str = option("its column", "text")
    prompts_split: str = option("its split", "train")
    num_prompts: int = option("so many of its first prompts", 1000, COUNT)
    revision: str | None = option("revision of the model", None)
    dtype: str = option(
        "float32, float64, bfloat16, float16; auto: bfloat16 where the denoiser's weights are saved so, else float32",
        "auto",
        one_of(*DTYPES),
    )
    seed: int = option("of all noise", 0)
    batch_size: int = option("samples per pipeline call and process", 64, COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts_file is not None and self.prompts_dataset is not None:
            raise ValueError("prompts_file and prompts_dataset are both given; give one")

    def changed(self) -> dict[str, Any]:
        """The settings that are not their defaults, without the folder for the results."""
        entries = [entry for entry in dataclasses.fields(self) if entry.name != "output_dir"]
        return {e.name: getattr(self, e.name) for e in entries if getattr(self, e.name) != _default(e, self)}

    @property
    def call_arguments(self) -> dict[str, Any]:
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {**guidance, **self.call}


@dataclass(frozen=True)
class SearchConfig(ModelConfig):
    """Settings of `search`."""

    method: str = option(
        "closed_form (forward evaluations only), gradient (closed_form, then a descent) or paper (Algorithm 1 and 2)",
        "closed_form",
        one_of(*METHODS),
    )
    effort: str = option(
        "quick (begins where searches of other models ended) or full (ten times the evaluations): the defaults below",
        "quick",
        one_of(*EFFORTS),
    )
    num_train_samples: int = option("closed_form: samples that rows are fitted to", 32, COUNT, full=64)
    num_trial_samples: int = option("closed_form: so many of them compare warps", 10, COUNT, full=32)
    num_polish_samples: int = option("closed_form: so many of them show a polish its way", 7, COUNT, full=64)
    num_validation_samples: int = option("held-out samples that choose between candidates", 32, COUNT, full=32)
    teacher_steps: int = option("steps of the reference; 0: as few as meet teacher_tolerance", 50, full=200)
    teacher_order: int = option("order of the reference, 1 to 3", 3, ((lambda value: value in (1, 2, 3)), "1, 2 or 3"))
    teacher_end: float = option(
        "time, from 1 (noise) to 0 (data), from which the reference goes to the data in one step; 0: it does not",
        0.0,
        between(0, LATEST_END),
    )
    # The mse of a solver is wrong by the teacher's own error, which must stay far below it. Over the variance, 20 steps
    # of UniPC leave 1e-3 on the embedded models and searched solvers of 10 calls 4e-4 to 1e-3; a searched one of 20
    # calls may leave a tenth of that, which is still ten times this.
    teacher_tolerance: float = option(
        "teacher_steps 0: mse of final states against twice the steps, over their variance", 1e-5, POSITIVE
    )
    trials: int = option(
        "closed_form: warps tried per NFE by the best start, half of them by each other", 8, COUNT, full=40
    )
    starts: int = option(
        f"closed_form: places from which warps are searched, the best one's polished, 1 to {len(STARTS)}; 0: one, from "
        "the nearest step count and other models",
        0,
        between(0, len(STARTS)),
        full=len(STARTS),
    )
    polish: int = option("closed_form: Gauss-Newton iterations after it, forward evaluations too", 2, NOT_NEGATIVE)
    polish_nfe: int = option("largest NFE that is polished; the cost grows with the cube of it", 20, NOT_NEGATIVE)
    search_over: list[str] = option(
        f"what polish and gradient move: {', '.join(GROUPS)} (times: what the network is fed)",
        list(GROUPS),
        SOME_GROUPS,
    )
    parametrisation: str = option("numbers around a fitted solver that they move, by name", "corrections")
    gradient_calls: int = option("gradient: evaluations of loss and gradient on all training samples", 20, COUNT)
    objective: str = option(
        f"gradient: {', '.join(OBJECTIVES)} or {PERCEPTUAL} (of decoded images, up to 6 calls)",
        "terminal",
        one_of(*OBJECTIVES, PERCEPTUAL),
    )
    feature_network: str | None = option(
        f"objective {PERCEPTUAL}: a vision model of transformers, Hub id or folder, or package.module:factory", None
    )
    ridge: float = option("closed_form: pull of each row towards the classical one", 1e-4, POSITIVE)
    fill_nfe: list[int] = option("closed_form: other step counts that get a table, first and last", [3, 20], RANGE)
    fill_polish_nfe: int = option("largest of these that is polished", 4, NOT_NEGATIVE, full=8)
    num_generated_samples: int = option("paper: samples generated during the search", 50_000, COUNT)
    train_batch_size: int = option("paper: samples per update, over all processes", 32, COUNT)
    learning_rate: float = option("paper: of Lion, constant", 1e-2, POSITIVE)
    reference_steps: int = option("paper: Euler (DDIM) steps of the reference", 100, COUNT)
    validation_steps: int = option("paper: updates between held-out checks", 10, COUNT)
    budget: str = option("most that it spends: a time, as 5min, 90s or 1h, or network evaluations; empty: no limit", "")
    resume_from_checkpoint: str = option(
        "latest: go on where a killed run of this very search stopped, begin if there is none; none: refuse a folder "
        "that holds a search",
        "latest",
        one_of("latest", "none"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        budget_of(self.budget)
        if self.budget and self.method == "paper":
            raise ValueError("budget is for methods closed_form and gradient; give method paper num_generated_samples")
        if self.objective == PERCEPTUAL and not self.feature_network:
            raise ValueError(f"objective {PERCEPTUAL} needs a feature_network; give one, or another objective")
        if self.objective != PERCEPTUAL and self.feature_network is not None:
            raise ValueError(f"feature_network is for objective {PERCEPTUAL}; leave it out, or give that objective")
        if self.teacher_steps != 0 and not max(self.nfe) < self.teacher_steps <= MAX_NFE:
            accepted = f"more than the largest NFE, at most {MAX_NFE}, or 0 to have it chosen"
            raise ValueError(f"teacher_steps is {self.teacher_steps}; it must be {accepted}")
        if self.teacher_end and self.method == "paper":
            raise ValueError(
                f"teacher_end is {self.teacher_end:g}, but method paper has an end of its own; leave one of them out"
            )


@dataclass(frozen=True)
class CompareConfig(ModelConfig):
    """Settings of `compare`."""

    solver: list[str] = option("searched solvers: folders, Hub ids or published names", [])
    schedulers: list[str] = option("diffusers' own", ["unipc", "dpmpp_2m", "dpmpp_3m", "deis", "heun", "euler"])
    num_samples: int = option("test samples, none of them seen by a search", 64, COUNT)
    reference_steps: int = option("steps of the converged reference", 400, COUNT)
    reference_end: float = option(
        "where the last of them begins, as teacher_end of a search", 0.0, between(0, LATEST_END)
    )
    num_pictures: int = option("samples per cell of the picture", 6, COUNT)
    feature_network: str | None = option(
        "also compares images in its features: a vision model of transformers, Hub id or folder, or "
        "package.module:factory",
        None,
    )


@dataclass(frozen=True)
class EvaluateConfig(ModelConfig):
    """Settings of `evaluate`."""

    solver: list[str] = option("searched solvers: folders, Hub ids or published names", [])
    schedulers: list[str] = option("diffusers' own", ["unipc", "dpmpp_2m"])
    comparison: str | None = option(
        "folder that compare wrote: each of these in its best spacing there; none: in its first", None
    )
    reference_steps: int = option("steps of a run that stands for the model itself; 0: none", 0, between(0, MAX_NFE))
    reference_ends: list[float] = option(
        "where the last of its steps begins, as teacher_end of a search; several: a run for each", [0.0], ENDS
    )
    num_images: int = option("of every scheduler at every NFE", 10_000, at_least(FEWEST_IMAGES))
    reference: str = option(
        "real images: folder, data set (Hub id or file, streamed), or their statistics (safetensors; clean-fid's npz)",
        "",
        REQUIRED,
    )
    reference_column: str = option("its column, if a data set", "image")
    reference_split: str = option("its split, if a data set", "train")
    num_reference_images: int = option("so many of its first images", 50_000, at_least(FEWEST_IMAGES))
    extractor: str = option(
        "network of the features: inception, clip:ID (Hub id or folder) or package.module:factory", "inception"
    )
    clip: str | None = option("CLIP model for the CLIP score of prompts, Hub id or folder", None)
    subsets: int = option("random halves of the images that intervals come from; 0: no intervals", 50, INTERVALS)
    allow_few_images: bool = option("go on with fewer images than features, which biases the distance", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.solver and not self.schedulers and not self.reference_steps:
            raise ValueError("there is nothing to evaluate; give --solver, --schedulers or --reference_steps")


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Settings of `merge`."""

    solver: list[str] = option("solvers searched at one guidance scale each: folders or Hub ids", [])
    output_dir: str = option("folder for the one that holds them all", "", REQUIRED)
    guidance_scale: float | None = option(
        "whose tables are used where no guidance_scale is asked for; none: the middle one's", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.solver) < 2:
            raise ValueError(f"solver names {len(self.solver)}; give two or more")


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Settings of `export`."""

    solver: str = option("folder, Hub id or published name", "", REQUIRED)
    format: str = option(
        "sigmas (of one step count, printed) or kdiffusion (a Python file)",
        "kdiffusion",
        one_of("sigmas", "kdiffusion"),
    )
    nfe: list[int] = option("step counts; kdiffusion, none: all that have a table", [])
    guidance_scale: float | None = option("of an artefact with a solver for each guidance", None)
    output_file: str = option("kdiffusion: the file", "sample_dssolver.py")


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """Settings of `convert`."""

    type: str = option(f"whose code wrote the checkpoint: {', '.join(CHECKPOINTS)}", "", REQUIRED)
    checkpoint: str = option("file, .pt or .safetensors", "", REQUIRED)
    vae: str = option("AutoencoderKL that it was trained with, Hub id or folder", "", REQUIRED)
    id2label: str | None = option("JSON file of class ids and names, for calls by name", None)
    num_heads: int | None = option("sit, dit: of a width that no official size has", None)
    sample_size: int | None = option("flowdcn: side of its latents, 32 if not given", None)
    output_dir: str = option("folder for the pipeline", "", REQUIRED)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("type", self.type, one_of(*CHECKPOINTS))
        for name, takers in (("num_heads", ("sit", "dit")), ("sample_size", ("flowdcn",))):
            if (value := getattr(self, name)) is None:
                continue
            _require(name, value, COUNT)
            if self.type not in takers:
                raise ValueError(f"{name} is for type {' and '.join(takers)}; leave it out")


@dataclass(frozen=True)
class PlotConfig(Settings):
    """Settings of `plot`."""

    solver: str = option("folder, Hub id or published name", "", REQUIRED)
    comparison: str | None = option("folder that compare wrote, for error against NFE", None)
    nfe: list[int] = option("step counts whose tables are drawn; none: all", [])
    output_dir: str = option("folder for the pictures; none: the solver's own", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_dir and not Path(self.solver).is_dir():
            raise ValueError(f"output_dir is missing, and solver {self.solver!r} is no folder; give --output_dir")


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Settings of `report`."""

    solver: str = option("folder, Hub id or published name", "", REQUIRED)
    comparison: str = option("folder that compare wrote", "", REQUIRED)
    evaluation: str | None = option("folder that evaluate wrote", None)
    nfe: list[int] = option("step counts whose tables are drawn; none: all", [])
    output_dir: str = option("folder for report.html", "", REQUIRED)


@dataclass(frozen=True)
class PublishConfig(Settings):
    """Settings of `publish`."""

    solver: str = option("folder of the solver, as search or merge wrote it", "", REQUIRED)
    repo_id: str = option("repository on the Hub, org/name; made if there is none", "", REQUIRED)
    comparison: str | None = option("folder that compare wrote, for the card", None)
    evaluation: str | None = option("folder that evaluate wrote, for the card", None)
    private: bool = option("make a new repository private", False)
    tag: str | None = option("name for this state of the repository, for revision=", None)
    license: str = option("of the solver, unless its provenance names one", "apache-2.0")
    dry_run: bool = option("print what would be sent, and the card; send nothing", False)
    force: bool = option("take the place of a solver that was not published from this folder", False)


@dataclass(frozen=True)
class CardsConfig(Settings):
    """Settings of `cards`."""

    folder: str = option("artefacts, one folder each, beside a README.md with their index", "hub_cards")


def parse(cls: type[T], argv: Sequence[str], prog: str) -> T:
    """Settings from `--config recipe.toml` and `--key value` arguments, the latter winning.

    Raises:
        ValueError: naming the file, key or value at fault.
    """
    _refuse_removed(word[2:].partition("=")[0] for word in argv if word.startswith("--"))
    hints = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    parser.add_argument("--config", help="TOML recipe with these keys")
    for entry in dataclasses.fields(cls):
        many = {"nargs": "*"} if typing.get_origin(hints[entry.name]) is list else {}
        flag = {"nargs": "?", "const": "true"} if hints[entry.name] is bool else {}
        text = f"{entry.metadata['help']} (default: {_default(entry)!r})".replace("%", "%%")
        parser.add_argument(f"--{entry.name}", help=text, default=argparse.SUPPRESS, **many, **flag)
    given = vars(parser.parse_args(list(argv)))
    recipe = _read_recipe(given.pop("config", None))
    _refuse_removed(recipe)
    values = {**recipe, **{k: _from_text(k, v, hints[k]) for k, v in given.items()}}
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(hints))}")
    for entry in dataclasses.fields(cls):
        if entry.metadata["rule"] is FOR_COMMANDS and not values.get(entry.name):
            raise ValueError(f"{entry.name} is missing; give --{entry.name}")
    return cls(**{key: _checked(key, value, hints[key]) for key, value in values.items()})


def made(cls: type[T], values: Mapping[str, Any]) -> T:
    """Settings from Python; single values, tuples and ranges serve as lists.

    Raises:
        ValueError: naming the key or value at fault.
    """
    hints = typing.get_type_hints(cls)

    def whole(key: str, value: Any) -> Any:
        if typing.get_origin(hints[key]) is not list:
            return value
        return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]

    return cls(**{key: _checked(key, whole(key, value), hints[key]) for key, value in values.items()})


def _refuse_removed(keys: Iterable[str]) -> None:
    for key in keys:
        if key in REMOVED:
            raise ValueError(f"there is no setting {key} any more; leave it out: {REMOVED[key]}")


def _read_recipe(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"recipe {path!r} could not be read: {error}") from error


def _from_text(key: str, text: str | list[str], hint: Any) -> Any:
    """A command line value as the type of its field."""
    if isinstance(text, list):
        return [_from_text(key, t, typing.get_args(hint)[0]) for t in text]
    kinds = _kinds(hint)
    try:
        if dict in kinds or bool in kinds:
            return json.loads(text)
        if text.lower() == "none" and type(None) in kinds:
            return None
        return next(kind for kind in (int, float, str) if kind in kinds)(text)
    except ValueError as error:
        raise ValueError(f"--{key} {text}: {error}") from None


def _checked(key: str, value: Any, hint: Any) -> Any:
    """A value of the type of its field; whole numbers serve as floats."""
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{key} is {value!r}; it must be a list")
        return [_checked(key, v, typing.get_args(hint)[0]) for v in value]
    kinds = _kinds(hint)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        raise ValueError(f"{key} is {value!r}; it must be {' or '.join(k.__name__ for k in kinds)}")
    return value


def _kinds(hint: Any) -> tuple[type, ...]:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(p) or p for p in parts)


def _default(entry: dataclasses.Field[Any], settings: Any = None) -> Any:
    """Of these settings; where there are none, as the help tells it."""
    if efforts := entry.metadata.get("efforts"):
        return (
            efforts["full" if settings.method == "paper" else settings.effort]
            if settings
            else " or ".join(f"{k} {v}" for k, v in efforts.items())
        )
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _require(name: str, value: Any, rule: Rule) -> None:
    accepts, accepted = rule
    if not accepts(value):
        raise ValueError(f"{name} is {value!r}; it must be {accepted}")
