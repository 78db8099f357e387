"""What a command tells its user on the way: single lines, past any progress bar."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm


def say(line: str) -> None:
    """One line to the user, past any progress bar."""
    tqdm.write(line, file=sys.stderr)


def one_line(error: BaseException) -> str:
    """What an error says, or else its name."""
    return " ".join(str(error).split()) or type(error).__name__
