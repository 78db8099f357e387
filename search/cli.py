"""The commands: `python -m dssolver_search COMMAND`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from .settings import (
    CardsConfig,
    CompareConfig,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    MergeConfig,
    PlotConfig,
    PublishConfig,
    ReportConfig,
    SearchConfig,
    parse,
)

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended
# settings, then the module that is imported only when its command is given, and what it calls
COMMANDS: dict[str, tuple[type, str, str]] = {
    "search": (SearchConfig, "methods.search", "search"),
    "compare": (CompareConfig, "measure.compare", "compare"),
    "merge": (MergeConfig, "artefacts.merge", "merge"),
    "export": (ExportConfig, "artefacts.export", "export"),
    "convert": (ConvertConfig, "checkpoints.convert", "convert"),
    "evaluate": (EvaluateConfig, "measure.evaluate", "evaluate"),
    "plot": (PlotConfig, "artefacts.plots", "plot"),
    "report": (ReportConfig, "artefacts.report", "report"),
    "publish": (PublishConfig, "artefacts.publish", "publish"),
    "cards": (CardsConfig, "artefacts.publish", "cards"),
}
USAGE = (
    f"usage: python -m dssolver_search {{{','.join(COMMANDS)}}} [--config recipe.toml] [--key value ...]   "
    "(--help for the keys)"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a bad setting, file or model ends in one line on stderr and exit status 2, Ctrl-C in one line
    and exit status 130."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    prog = f"dssolver_search {command}"
    if command not in COMMANDS:
        print(USAGE, file=sys.stderr)
        sys.exit(0 if command in ("-h", "--help") else 2)
    config, module, function = COMMANDS[command]
    try:
        settings = parse(config, rest, prog)
        run: Callable[[Any], None] = getattr(import_module(f".{module}", __package__), function)
        run(settings)
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{prog}: {interrupt or 'interrupted'}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(INTERRUPTED)  # the others may be gone, or wait: nothing more can be agreed with them
        sys.exit(INTERRUPTED)
