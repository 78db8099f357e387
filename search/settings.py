"""Typed settings of the commands: a TOML recipe, then `--key value` over it. Unknown keys are errors."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from diffusers_dssolver.solver import MAX_NFE

METHODS = ("closed_form", "gradient", "paper")
OPTIMIZERS = ("lbfgs", "adam", "lion")
OBJECTIVES = ("terminal", "trajectory", "mixed", "paper")
PERCEPTUAL = "perceptual"  # the objective on decoded images, see `perceptual`
STARTS = ((0.0, 0.0, 0.0), (1.5, 0.0, -0.7), (0.75, -1.0, 0.0), (1.5, -1.0, -0.7))  # of the search of a warp
GROUPS = ("nodes", "coefficients", "times")
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
CHECKPOINTS = ("sit", "dit", "flowdcn")  # of whose code `convert` reads
FEWEST_IMAGES = 10  # of which half have four nearest neighbours each
LATEST_END = 0.5  # of a reference: what goes to the data in one step from there has no details
T = TypeVar("T")


def option(help: str, **kwargs: Any) -> Any:
    """A dataclass field with its help text."""
    return field(metadata={"help": help}, **kwargs)


@dataclass(frozen=True)
class ModelConfig:
    """The model and how it is run; what `search` and `compare` share."""

    pretrained_model_name_or_path: str = option("pipeline, Hub id or folder", default="")
    output_dir: str = option("folder for the results", default="")
    nfe: list[int] = option("network calls", default_factory=lambda: [5, 8])
    guidance_scale: float | None = option("the guidance of the run, passed to the pipeline", default=None)
    call: dict[str, Any] = option("more arguments of the pipeline's call, as JSON", default_factory=dict)
    prompts_file: str | None = option("text file, one prompt per line", default=None)
    prompts_dataset: str | None = option(
        "or a data set, Hub id or file (json, csv, parquet, txt), streamed", default=None
    )
    prompts_column: str = option("its column", default="text")
    prompts_split: str = option("its split", default="train")
    num_prompts: int = option("so many of its first prompts", default=1000)
    revision: str | None = option("revision of the model", default=None)
    dtype: str = option(
        "float32, float64, bfloat16, float16; auto: bfloat16 where the denoiser's weights are saved so, else float32",
        default="auto",
    )
    seed: int = option("of all noise", default=0)
    batch_size: int = option("samples per pipeline call and process", default=64)

    def __post_init__(self) -> None:
        for name in ("pretrained_model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name}")
        _require(self, "nfe", bool(self.nfe) and all(1 <= n <= 1000 for n in self.nfe), "whole numbers from 1 to 1000")
        _require(self, "dtype", self.dtype in DTYPES, " or ".join(DTYPES))
        for name in ("batch_size", "num_prompts"):
            _require(self, name, getattr(self, name) >= 1, "1 or more")
        if self.prompts_file is not None and self.prompts_dataset is not None:
            raise ValueError("prompts_file and prompts_dataset are both given; give one")

    def changed(self) -> dict[str, Any]:
        """The settings that are not their defaults, without the folder for the results."""
        entries = [entry for entry in dataclasses.fields(self) if entry.name != "output_dir"]
        defaults = {e.name: e.default_factory() if callable(e.default_factory) else e.default for e in entries}
        values = {e.name: getattr(self, e.name) for e in entries}
        return {name: value for name, value in values.items() if value != defaults[name]}

    @property
    def call_arguments(self) -> dict[str, Any]:
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {**guidance, **self.call}


@dataclass(frozen=True)
class SearchConfig(ModelConfig):
    """Settings of `search`."""

    method: str = option(
        "closed_form (forward evaluations only), gradient (closed_form, then a descent) or paper (Algorithm 1 and 2)",
        default="closed_form",
    )
    guidance_scales: list[float] = option(
        "several, for one solver that serves them all: samples take them in turn", default_factory=list
    )
    num_train_samples: int = option("closed_form: samples that rows are fitted to", default=64)
    num_trial_samples: int = option("closed_form: so many of them compare warps", default=32)
    num_validation_samples: int = option("held-out samples that choose between candidates", default=32)
    teacher_steps: int = option("steps of the reference; 0: as few as meet teacher_tolerance", default=200)
    teacher_order: int = option("order of the reference, 1 to 3", default=3)
    teacher_scheduler: str = option(
        "what makes the reference: empty for our own multistep, euler for its order 1 (the paper's Euler or DDIM), or "
        "a scheduler class of diffusers such as UniPCMultistepScheduler",
        default="",
    )
    teacher_end: float = option(
        "time, from 1 (noise) to 0 (data), from which the reference goes to the data in one step; 0: it does not",
        default=0.0,
    )
    # The mse of a solver against the reference is wrong by the reference's own error, which must stay far below it.
    # Over the variance, 20 steps of UniPC leave 1e-3 on the embedded models and searched solvers of 10 calls 4e-4 to
    # 1e-3; a searched one of 20 calls may leave a tenth of that, which is still ten times this.
    teacher_tolerance: float = option(
        "teacher_steps 0: mse of final states against twice the steps, over their variance", default=1e-5
    )
    trials: int = option("closed_form: warps tried per NFE by the best start, half of them by each other", default=40)
    starts: int = option(
        f"closed_form: places from which warps are searched, the best one's polished, 1 to {len(STARTS)}",
        default=len(STARTS),
    )
    polish: int = option("closed_form: Gauss-Newton iterations after it, forward evaluations too", default=2)
    polish_nfe: int = option("largest NFE that is polished; the cost grows with the cube of it", default=20)
    search_over: list[str] = option(
        f"what polish and gradient move: {', '.join(GROUPS)} (times: what the network is fed)",
        default_factory=lambda: list(GROUPS),
    )
    gradient_calls: int = option("gradient: evaluations of loss and gradient on all training samples", default=20)
    optimizer: str = option(f"gradient: {', '.join(OPTIMIZERS)}", default="lbfgs")
    objective: str = option(
        f"gradient: {', '.join(OBJECTIVES)} or {PERCEPTUAL} (of decoded images, up to 6 calls)", default="terminal"
    )
    feature_network: str | None = option(
        f"objective {PERCEPTUAL}: a vision model of transformers, Hub id or folder, or package.module:factory",
        default=None,
    )
    ridge: float = option("closed_form: pull of each row towards the classical one", default=1e-4)
    fill_nfe: list[int] = option(
        "closed_form: other step counts that get a table, first and last", default_factory=lambda: [3, 20]
    )
    fill_polish_nfe: int = option("largest of these that is polished", default=8)
    num_generated_samples: int = option("paper: samples generated during the search", default=50_000)
    train_batch_size: int = option("paper: samples per update, over all processes", default=32)
    learning_rate: float = option("paper: of Lion, constant; gradient: of adam and lion, falling", default=1e-2)
    reference_steps: int = option("paper: Euler (DDIM) steps of the reference", default=100)
    validation_steps: int = option("paper: updates between held-out checks", default=10)
    resume_from_checkpoint: str = option(
        "latest: go on where a killed run of this very search stopped, begin if there is none; none: refuse a folder "
        "that holds a search",
        default="latest",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "method", self.method in METHODS, " or ".join(METHODS))
        _require(self, "resume_from_checkpoint", self.resume_from_checkpoint in ("latest", "none"), "latest or none")
        _require(self, "teacher_order", self.teacher_order in (1, 2, 3), "1, 2 or 3")
        _require(self, "optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS))
        objectives = (*OBJECTIVES, PERCEPTUAL)
        _require(self, "objective", self.objective in objectives, " or ".join(objectives))
        if self.objective == PERCEPTUAL and not self.feature_network:
            raise ValueError(f"objective {PERCEPTUAL} needs a feature_network; give one, or another objective")
        if self.objective != PERCEPTUAL and self.feature_network is not None:
            raise ValueError(f"feature_network is for objective {PERCEPTUAL}; leave it out, or give that objective")
        _require(self, "guidance_scales", all(map(math.isfinite, self.guidance_scales)), "numbers")
        if self.guidance_scales and self.guidance_scale is not None:
            raise ValueError("guidance_scale and guidance_scales are both given; give one")
        if self.guidance_scales and self.objective == PERCEPTUAL:
            raise ValueError(f"objective {PERCEPTUAL} takes one guidance_scale, not guidance_scales")
        groups = bool(self.search_over) and set(self.search_over) <= set(GROUPS)
        _require(self, "search_over", groups, f"some of {', '.join(GROUPS)}")
        for name in ("polish", "polish_nfe", "fill_polish_nfe"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "starts", 1 <= self.starts <= len(STARTS), f"from 1 to {len(STARTS)}")
        _require(self, "ridge", self.ridge > 0, "above 0")
        _require(self, "learning_rate", self.learning_rate > 0, "above 0")
        _require(
            self,
            "fill_nfe",
            self.fill_nfe == [] or (len(self.fill_nfe) == 2 and 1 <= self.fill_nfe[0] <= self.fill_nfe[1] <= 1000),
            "first and last step count, or nothing",
        )
        steps = self.teacher_steps == 0 or max(self.nfe) < self.teacher_steps <= MAX_NFE
        _require(self, "teacher_steps", steps, f"more than the largest NFE, at most {MAX_NFE}, or 0 to have it chosen")
        _require(self, "teacher_tolerance", self.teacher_tolerance > 0, "above 0")
        _require(self, "teacher_end", 0 <= self.teacher_end <= LATEST_END, f"from 0 to {LATEST_END}")
        if self.teacher_end and (self.method == "paper" or self.teacher_scheduler not in ("", "euler")):
            other = "method paper has" if self.method == "paper" else f"{self.teacher_scheduler} has"
            raise ValueError(
                f"teacher_end is {self.teacher_end:g}, but {other} an end of its own; leave one of them out"
            )
        for name in (
            "num_train_samples",
            "num_trial_samples",
            "num_validation_samples",
            "trials",
            "gradient_calls",
            "num_generated_samples",
            "train_batch_size",
            "reference_steps",
            "validation_steps",
        ):
            _require(self, name, getattr(self, name) >= 1, "1 or more")


@dataclass(frozen=True)
class CompareConfig(ModelConfig):
    """Settings of `compare`."""

    solver: list[str] = option("searched solvers: folders, Hub ids or published names", default_factory=list)
    schedulers: list[str] = option(
        "diffusers' own", default_factory=lambda: ["unipc", "dpmpp_2m", "dpmpp_3m", "deis", "heun", "euler"]
    )
    num_samples: int = option("test samples, none of them seen by a search", default=64)
    reference_steps: int = option("steps of the converged reference", default=400)
    reference_end: float = option("where the last of them begins, as teacher_end of a search", default=0.0)
    num_pictures: int = option("samples per cell of the picture", default=6)
    feature_network: str | None = option(
        "also compares images in its features: a vision model of transformers, Hub id or folder, or "
        "package.module:factory",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_samples", "reference_steps", "num_pictures"):
            _require(self, name, getattr(self, name) >= 1, "1 or more")
        _require(self, "reference_end", 0 <= self.reference_end <= LATEST_END, f"from 0 to {LATEST_END}")


@dataclass(frozen=True)
class MergeConfig:
    """Settings of `merge`."""

    solver: list[str] = option("solvers searched at one guidance scale each: folders or Hub ids", default_factory=list)
    output_dir: str = option("folder for the one that holds them all", default="")
    guidance_scale: float | None = option(
        "whose tables are used where no guidance_scale is asked for; none: the middle one's", default=None
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is missing; give --output_dir")
        if len(self.solver) < 2:
            raise ValueError(f"solver names {len(self.solver)}; give two or more")


@dataclass(frozen=True)
class ExportConfig:
    """Settings of `export`."""

    solver: str = option("folder, Hub id or published name", default="")
    format: str = option("sigmas (of one step count, printed) or kdiffusion (a Python file)", default="kdiffusion")
    nfe: list[int] = option("step counts; kdiffusion, none: all that have a table", default_factory=list)
    guidance_scale: float | None = option("of an artefact with a solver for each guidance", default=None)
    output_file: str = option("kdiffusion: the file", default="sample_dssolver.py")

    def __post_init__(self) -> None:
        if not self.solver:
            raise ValueError("solver is missing; give --solver")
        if self.format not in ("sigmas", "kdiffusion"):
            raise ValueError(f"format is {self.format!r}; it must be sigmas or kdiffusion")


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of `convert`."""

    type: str = option(f"whose code wrote the checkpoint: {', '.join(CHECKPOINTS)}", default="")
    checkpoint: str = option("file, .pt or .safetensors", default="")
    vae: str = option("AutoencoderKL that it was trained with, Hub id or folder", default="")
    id2label: str | None = option("JSON file of class ids and names, for calls by name", default=None)
    num_heads: int | None = option("sit, dit: of a width that no official size has", default=None)
    sample_size: int | None = option("flowdcn: side of its latents, 32 if not given", default=None)
    output_dir: str = option("folder for the pipeline", default="")

    def __post_init__(self) -> None:
        for name in ("type", "checkpoint", "vae", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name}")
        if self.type not in CHECKPOINTS:
            raise ValueError(f"type is {self.type!r}; it must be {' or '.join(CHECKPOINTS)}")
        for name, takers in (("num_heads", ("sit", "dit")), ("sample_size", ("flowdcn",))):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
            if value is not None and self.type not in takers:
                raise ValueError(f"{name} is for type {' and '.join(takers)}; leave it out")


@dataclass(frozen=True)
class PlotConfig:
    """Settings of `plot`."""

    solver: str = option("folder, Hub id or published name", default="")
    comparison: str | None = option("folder that compare wrote, for error against NFE", default=None)
    nfe: list[int] = option("step counts whose tables are drawn; none: all", default_factory=list)
    output_dir: str = option("folder for the pictures; none: the solver's own", default="")

    def __post_init__(self) -> None:
        if not self.solver:
            raise ValueError("solver is missing; give --solver")
        if not self.output_dir and not Path(self.solver).is_dir():
            raise ValueError(f"output_dir is missing, and solver {self.solver!r} is no folder; give --output_dir")


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `report`."""

    solver: str = option("folder, Hub id or published name", default="")
    comparison: str = option("folder that compare wrote", default="")
    evaluation: str | None = option("folder that evaluate wrote", default=None)
    nfe: list[int] = option("step counts whose tables are drawn; none: all", default_factory=list)
    output_dir: str = option("folder for report.html", default="")

    def __post_init__(self) -> None:
        for name in ("solver", "comparison", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name}")


@dataclass(frozen=True)
class PublishConfig:
    """Settings of `publish`."""

    solver: str = option("folder of the solver, as search or merge wrote it", default="")
    repo_id: str = option("repository on the Hub, org/name; made if there is none", default="")
    comparison: str | None = option("folder that compare wrote, for the card", default=None)
    evaluation: str | None = option("folder that evaluate wrote, for the card", default=None)
    private: bool = option("make a new repository private", default=False)
    tag: str | None = option("name for this state of the repository, for revision=", default=None)
    license: str = option("of the solver, unless its provenance names one", default="apache-2.0")
    dry_run: bool = option("print what would be sent, and the card; send nothing", default=False)
    force: bool = option("take the place of a solver that was not published from this folder", default=False)

    def __post_init__(self) -> None:
        for name in ("solver", "repo_id"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name}")


@dataclass(frozen=True)
class CardsConfig:
    """Settings of `cards`."""

    folder: str = option("artefacts, one folder each, beside a README.md with their index", default="hub_cards")


@dataclass(frozen=True)
class EvaluateConfig(ModelConfig):
    """Settings of `evaluate`."""

    solver: list[str] = option("searched solvers: folders, Hub ids or published names", default_factory=list)
    schedulers: list[str] = option("diffusers' own", default_factory=lambda: ["unipc", "dpmpp_2m"])
    comparison: str | None = option(
        "folder that compare wrote: each of these in its best spacing there; none: in its first", default=None
    )
    reference_steps: int = option("steps of a run that stands for the model itself; 0: none", default=0)
    reference_ends: list[float] = option(
        "where the last of its steps begins, as teacher_end of a search; several: a run for each",
        default_factory=lambda: [0.0],
    )
    num_images: int = option("of every scheduler at every NFE", default=10_000)
    reference: str = option(
        "real images: folder, data set (Hub id or file, streamed), or their statistics (safetensors; clean-fid's npz)",
        default="",
    )
    reference_column: str = option("its column, if a data set", default="image")
    reference_split: str = option("its split, if a data set", default="train")
    num_reference_images: int = option("so many of its first images", default=50_000)
    extractor: str = option(
        "network of the features: inception, clip:ID (Hub id or folder) or package.module:factory", default="inception"
    )
    clip: str | None = option("CLIP model for the CLIP score of prompts, Hub id or folder", default=None)
    subsets: int = option("random halves of the images that intervals come from; 0: no intervals", default=50)
    allow_few_images: bool = option("go on with fewer images than features, which biases the distance", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reference:
            raise ValueError("reference is missing; give --reference")
        if not self.solver and not self.schedulers and not self.reference_steps:
            raise ValueError("there is nothing to evaluate; give --solver, --schedulers or --reference_steps")
        for name in ("num_images", "num_reference_images"):
            _require(self, name, getattr(self, name) >= FEWEST_IMAGES, f"{FEWEST_IMAGES} or more")
        _require(self, "reference_steps", 0 <= self.reference_steps <= MAX_NFE, f"from 0 to {MAX_NFE}")
        ends = bool(self.reference_ends) and all(0 <= end <= LATEST_END for end in self.reference_ends)
        _require(self, "reference_ends", ends, f"numbers from 0 to {LATEST_END}")
        _require(self, "subsets", self.subsets == 0 or self.subsets >= 2, "0, or 2 or more")


def parse(cls: type[T], argv: Sequence[str], prog: str) -> T:
    """Settings from `--config recipe.toml` and `--key value` arguments, the latter winning.

    Raises:
        ValueError: naming the file, key or value at fault.
    """
    hints = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    parser.add_argument("--config", help="TOML recipe with these keys")
    for entry in dataclasses.fields(cls):
        default = entry.default if entry.default is not dataclasses.MISSING else "see recipe"
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        many = {"nargs": "*"} if typing.get_origin(hints[entry.name]) is list else {}
        flag = {"nargs": "?", "const": "true"} if hints[entry.name] is bool else {}
        text = f"{entry.metadata['help']} (default: {default!r})".replace("%", "%%")
        parser.add_argument(f"--{entry.name}", help=text, default=argparse.SUPPRESS, **many, **flag)
    given = vars(parser.parse_args(list(argv)))
    recipe = _read_recipe(given.pop("config", None))
    values = {**recipe, **{k: _from_text(k, v, hints[k]) for k, v in given.items()}}
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(hints))}")
    for key, value in values.items():
        values[key] = _checked(key, value, hints[key])
    return cls(**values)


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


def _require(config: ModelConfig, name: str, fine: bool, accepted: str) -> None:
    if not fine:
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be {accepted}")
