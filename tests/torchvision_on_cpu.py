"""Lets PyPI's torchvision be imported beside a CPU build of torch; for development only, never in the package.

PyPI has torchvision for CUDA. Beside a CPU torch its compiled operators do not load; its import then fails where it
describes two of them, and transformers, which imports it where it is installed, fails too. Here their schemas are
declared just before the import if the operators do not load; calling them still fails, which nothing here does.

    python tests/torchvision_on_cpu.py

puts this module, and a .pth file that imports it, into the running environment: child processes have it as well.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclaresOperators:
    """An import finder that finds nothing, and does its work when torchvision is looked for."""

    library = None  # declarations live as long as it

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision":
            return
        sys.meta_path.remove(cls)
        found = PathFinder.find_spec(name)
        if found is None:
            return
        import torch

        try:
            for file in Path(found.origin).parent.glob("_C.*"):
                torch.ops.load_library(file)
        except OSError:
            cls.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                cls.library.define(operator + ARGUMENTS)


def install() -> None:
    module, folder = Path(__file__), Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(module, folder / module.name)
    (folder / f"{module.stem}.pth").write_text(f"import {module.stem}\n", encoding="utf-8")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, DeclaresOperators)
