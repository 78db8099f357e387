"""Single lines that a command tells its user."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm


def say(line: str) -> None:
    """Print a line on stderr, above any progress bar."""
    tqdm.write(line, file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
