"""Search solvers for diffusers pipelines, from Python or by `accelerate launch -m dssolver_search search ...`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .interface import Found, compare, evaluate, load_pipeline, search

__all__ = ["Found", "compare", "evaluate", "load_pipeline", "search"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(".interface", __name__), name)
    return value
