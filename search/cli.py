"""The commands: `python -m dssolver_search {search,compare}`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .config import CompareConfig, SearchConfig, parse

USAGE = (
    "usage: python -m dssolver_search {search,compare} [--config recipe.toml] [--key value ...]   (--help for the keys)"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a bad setting, file or model ends in one line on stderr and exit status 2."""
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
