"""What a search keeps in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..console import say
from ..processes import from_main
from ..storage import Damaged, from_line, to_line, write_text


class Journal:
    """Results of tasks on disk, one line each as soon as it is known, so that a resumed run need not do them again.

    Lines are appended: a killed process leaves at most the last one torn, and that one is left out.

    Args:
        file: JSON lines; written by the main process, read by it and sent to the others.
        key: of the run; lines with another key are not its own.
    """

    def __init__(self, file: Path, key: str, accelerator: Accelerator) -> None:
        self.file, self.key, self.writes = file, key, accelerator.is_main_process
        self._known: dict[str, Any] = from_main(accelerator, self._read() if self.writes else {})

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {}
        kept, known = [], {}
        lines = self.file.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                record = from_line(line.decode())
            except (Damaged, UnicodeDecodeError) as error:
                say(f"{self.file}, line {number} is damaged and left out: {error}")
                continue
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            if record.get("key") == self.key:
                known[json.dumps(record["task"], sort_keys=True)] = record["result"]
        if kept != lines:
            write_text(self.file, b"".join(kept).decode())
        return known

    def get(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result that an earlier, killed run found."""
        return self._known.get(json.dumps(task, sort_keys=True))

    def add(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        if self.writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(to_line({"key": self.key, "task": task, "result": result}) + "\n")

    def clear(self) -> None:
        """Forget them: what they served is kept elsewhere."""
        self._known = {}
        if self.writes:
            self.file.unlink(missing_ok=True)
