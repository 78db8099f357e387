"""The commands: `python -m dssolver_search COMMAND`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .console import logger
from .settings import parse

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended
# settings, and the function that takes them: names, so that a command's module is imported only when it is called
COMMANDS: dict[str, tuple[str, str]] = {
    "search": ("settings.SearchConfig", "methods.search.search"),
    "compare": ("settings.CompareConfig", "measure.compare.compare"),
    "merge": ("settings.MergeConfig", "artefacts.merge.merge"),
    "export": ("settings.ExportConfig", "artefacts.export.export"),
    "convert": ("settings.ConvertConfig", "checkpoints.convert.convert"),
    "evaluate": ("settings.EvaluateConfig", "measure.evaluate.evaluate"),
    "plot": ("settings.PlotConfig", "artefacts.plots.plot"),
    "report": ("settings.ReportConfig", "artefacts.report.report"),
    "publish": ("settings.PublishConfig", "artefacts.publish.publish"),
    "cards": ("settings.CardsConfig", "artefacts.publish.cards"),
}
USAGE = (
    f"usage: python -m dssolver_search {{{','.join(COMMANDS)}}} [--config recipe.toml] [--key value ...]   "
    "(--help for the keys)"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A bad setting, file or model ends in one line on stderr and exit status 2, Ctrl-C in one line
    and exit status 130."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    prog = f"dssolver_search {command}"
    if command not in COMMANDS:
        print(USAGE, file=sys.stderr)
        sys.exit(0 if command in ("-h", "--help") else 2)
    settings, function = COMMANDS[command]
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        given = parse(named(settings), rest, prog)
        named(function)(given)
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{prog}: {interrupt or 'interrupted'}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(INTERRUPTED)  # other processes may be gone or waiting: nothing more can be agreed with them
        sys.exit(INTERRUPTED)
    finally:
        logger.setLevel(level)


def named(path: str) -> Any:
    """What a module of this package calls so, as in `artefacts.plots.plot`."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f".{module}", __package__), name)
