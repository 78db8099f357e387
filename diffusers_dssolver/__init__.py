"""Full-quality images in 5 to 10 network calls: searched solvers as a drop-in diffusers scheduler."""

from typing import TYPE_CHECKING

from diffusers.schedulers.scheduling_utils import SchedulerMixin  # saved pipelines are loaded by way of this name

from .published import published_solvers
from .scheduler import DSSolverScheduler
from .solver import SolverSpec

if TYPE_CHECKING:
    from .models import FlowDCNTransformer2DModel, OfficialDiTTransformer2DModel

MODELS = ("FlowDCNTransformer2DModel", "ModelMixin", "OfficialDiTTransformer2DModel")
__all__ = [
    "DSSolverScheduler",
    "FlowDCNTransformer2DModel",
    "OfficialDiTTransformer2DModel",
    "SchedulerMixin",
    "SolverSpec",
    "published_solvers",
]


def __getattr__(name: str) -> object:
    """Models, and the name by way of which saved ones are loaded: imported when asked for, as an import stays light."""
    if name not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import models

    return getattr(models, name)
