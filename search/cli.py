"""The commands: `python -m dssolver_search {search,compare}`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .config import CompareConfig, SearchConfig, parse

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended
USAGE = (
    "usage: python -m dssolver_search {search,compare} [--config recipe.toml] [--key value ...]   (--help for the keys)"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a bad setting, file or model ends in one line on stderr and exit status 2, Ctrl-C in one line
    and exit status 130."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    prog = f"dssolver_search {command}"
    try:
        if command == "search":
            settings = parse(SearchConfig, rest, prog)
            from .run import Search

            Search(settings)()
        elif command == "compare":
            comparison = parse(CompareConfig, rest, prog)
            from .compare import compare

            compare(comparison)
        else:
            print(USAGE, file=sys.stderr)
            sys.exit(0 if command in ("-h", "--help") else 2)
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{prog}: {interrupt or 'interrupted'}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(INTERRUPTED)  # the others may be gone, or wait: nothing more can be agreed with them
        sys.exit(INTERRUPTED)
