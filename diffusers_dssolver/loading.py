"""How the scheduler is made from configurations, files and the Hub, and goes to the Hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from .artefacts import carry_over, consistent, distilled, fill, first_fitting, model_facts
from .config import CLASSICAL, SCHEDULE_KEYS, check, check_keys, without_old_keys
from .derive import Shift
from .paths import Path
from .published import published_config, published_solvers
from .solver import SolverSpec

logger = logging.get_logger(__name__)

UNWATCHED = {"self", "use_flow_sigmas"}
COMPONENT_OPTIONS = {
    "variant", "torch_dtype", "dtype", "use_safetensors", "device_map", "max_memory", "low_cpu_mem_usage",
    "offload_folder", "offload_state_dict", "trust_remote_code", "use_flashpack", "disable_mmap", "quantization_config",
    "provider", "sess_options", "provider_options", "use_onnx", "custom_pipeline", "custom_revision", "mirror",
    "from_flax", "output_loading_info", "dduf_file",
}  # fmt: skip


class SolverFileError(OSError, ValueError):
    """A solver file that is absent or no JSON: an OSError for diffusers' loaders, a ValueError for users."""


class LoadableScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own two bases disagree
    """diffusers' loading, saving and changing of a configuration, with solvers."""

    config: Any
    _path: Path
    _own: Path
    _solvers: dict[int, SolverSpec]
    _searched: dict[int | None, Shift]
    _known: dict[str, Any]

    def register_to_config(self, **kwargs: Any) -> None:
        """As in diffusers; what is changed in a finished scheduler is followed, from the next `set_timesteps` on.

        Some pipelines drop their user's sigmas where the attribute `config.use_flow_sigmas` is true, so it is false.
        Classes that are made from this configuration read the item, which is kept.

        Raises:
            ValueError: for a value that is not accepted, or a noise schedule that the solvers were not searched for.
        """
        before = vars(self).get("_internal_dict")
        if "_path" in vars(self):
            kwargs = consistent(kwargs, {**self.config, **self._known}, bool(self._solvers))
        super().register_to_config(**kwargs)
        if "_path" in vars(self) and set(kwargs) & self._get_init_keys(type(self)):
            try:
                self._read_config()
            except ValueError:
                vars(self)["_internal_dict"] = before
                raise
        vars(self.config)["use_flow_sigmas"] = False

    def _read_config(self) -> None:
        """Take path and solvers from the configuration, whose entries become plain JSON."""
        checked = check(self.config)
        super().register_to_config(**checked.entries)
        vars(self.config)["use_flow_sigmas"] = False
        self._path, self._own = checked.path, checked.own
        self._solvers, self._searched = checked.solvers, checked.searched_shifts
        self._known = {
            key: self.config[key]
            for key in {*self._get_init_keys(type(self)), "flow_shift"} - UNWATCHED
            if key in self.config
        }

    def _follow_config(self) -> None:
        """Take over what was written into the configuration: items (config["shift"]) or attributes (config.shift)."""
        changes = {}
        for key, old in self._known.items():
            for value in (self.config.get(key, old), getattr(self.config, key, old)):
                if value is not old and value != old:
                    changes[key] = value
        if changes:
            self.register_to_config(**changes)

    @classmethod
    def from_published(cls, name: str, **kwargs: Any) -> Any:
        """A solver that ships with the package (`published_solvers()`), offline. ValueError for an unknown name."""
        return cls.from_config(published_config(name), **kwargs)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From any scheduler's configuration: flow or vp is inferred, and the solvers are those of

        - the configuration itself, if it has any;
        - `solvers="classical"`: none, every step count is derived;
        - `solvers="org/solver"`, a folder or a published name: that artefact. Where its noise schedule is another, it
          is carried over by noise level, and a warning says so; with `strict=True` that is an error;
        - otherwise the first published artefact whose noise schedule is the model's.

        Raises:
            ValueError: if no published artefact fits, or for an unknown argument.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config is {config!r}; pass a scheduler's configuration, such as pipe.scheduler.config")
        check_keys(config)
        config = without_old_keys(config)
        known = cls._get_init_keys(cls) - {"self"}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"{cls.__name__} has no argument {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        facts = model_facts({**config, **{key: kwargs[key] for key in SCHEDULE_KEYS if key in kwargs}})
        if warning := distilled(config):
            logger.warning(warning)
        if "flow_shift" in config:  # one shift under two names
            config["flow_shift"] = kwargs.get("shift", facts.get("shift", config["flow_shift"]))
        defaults = config.get("_use_default_values", [])
        given = {**{k: v for k, v in config.items() if k not in defaults}, **facts, **kwargs}
        source, asked = given.get("solvers"), {key: kwargs[key] for key in kwargs if key == "mean_decay"}
        if source is None:
            published = cls._published()
            source = first_fitting(cls._full(given), published)
            logger.info(f"using the published solver {source!r}")
            kwargs |= carry_over(cls._full(given), source, published[source], published)[0] | asked
        elif isinstance(source, str) and source != CLASSICAL and "solvers" in kwargs:  # a file cannot send us elsewhere
            taken, message = carry_over(cls._full(given), source, cls._load_artefact(source), cls._published())
            kwargs |= taken | asked
            if message:
                logger.warning(message)
        elif "solvers" in kwargs:
            kwargs = {"mean_decay": None, "carried_from": None, **kwargs}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **{**facts, **kwargs})

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, which passes some options to every component; those of weights mean nothing here."""
        return super().from_pretrained(*args, **{k: v for k, v in kwargs.items() if k not in COMPONENT_OPTIONS})

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; a file that is absent or no JSON object raises `SolverFileError`."""
        source = str(pretrained_model_name_or_path)
        try:
            loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        except (OSError, UnicodeDecodeError, RecursionError) as error:
            raise SolverFileError(f"no solver could be read from {source!r}: {' '.join(str(error).split())}") from error
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(config, dict):
            raise SolverFileError(f"{source!r} holds a {type(config).__name__}, not a JSON object")
        check_keys(config)
        return loaded

    @classmethod
    def _load_artefact(cls, source: str) -> dict[str, Any]:
        """Full configuration of a solver, checked."""
        config = published_config(source) if source in published_solvers() else dict(cls.load_config(source))
        if "solvers" not in config:
            raise ValueError(f"{source!r} is a scheduler configuration without solvers")
        if not isinstance(config["solvers"], Mapping):
            raise ValueError(f"{source!r} has no tables; pass solvers={CLASSICAL!r} for classical rows")
        return dict(cls.from_config(config).config)

    @classmethod
    def _full(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        arguments = inspect.signature(cls.__init__).parameters
        return fill(config, {key: argument.default for key, argument in arguments.items() if key != "self"})

    @classmethod
    def _published(cls) -> dict[str, dict[str, Any]]:
        return {name: cls._full(published_config(name)) for name in published_solvers()}

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """As in diffusers, with the solver's own card in place of an empty one; an existing card is replaced."""
        from .card import push  # slow to import: the Hub's client and the pipelines

        scheduler: Any = self
        message = commit_message or "Upload scheduler"
        return push(
            scheduler, repo_id, private, token, commit_message=message, create_pr=create_pr, path_in_repo=subfolder
        )  # fmt: skip
