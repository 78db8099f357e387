"""The notebook of the search, executed without a kernel; `python -m tests.notebook` stores its outputs anew."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "search" / "notebooks" / "search_your_own.ipynb"


def run(source: str, scope: dict[str, Any]) -> list[dict[str, Any]]:
    """A cell: what it prints, and what a notebook shows of its last expression."""
    tree, value = ast.parse(source), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), scope)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    return outputs


def executed(folder: Path, *changes: tuple[str, str]) -> dict[str, Any]:
    """The notebook with the outputs of a run in a folder that looks like a checkout.

    Args:
        changes: (old, new) texts in its code.
    """
    notebook = json.loads(FILE.read_text(encoding="utf-8"))
    shutil.copytree(ROOT / "search" / "demo" / "flow", folder / "demo" / "flow")
    (folder / "notebooks").mkdir()
    scope, before = {}, Path.cwd()
    os.chdir(folder / "notebooks")
    try:
        for number, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
            source = "".join(cell["source"])
            for old, new in changes:
                source = source.replace(old, new)
            cell |= {"outputs": run(source, scope), "execution_count": number + 1}
    finally:
        os.chdir(before)
    return notebook


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(executed(Path(folder)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
