"""Full-quality images in 5 to 10 network calls: searched solvers as a drop-in diffusers scheduler."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from .models import FlowDCNTransformer2DModel, OfficialDiTTransformer2DModel
    from .published import published_solvers
    from .scheduler import DSSolverScheduler
    from .solver import SolverSpec

__all__ = [
    "DSSolverScheduler",
    "FlowDCNTransformer2DModel",
    "ModelMixin",
    "OfficialDiTTransformer2DModel",
    "SchedulerMixin",
    "SolverSpec",
    "published_solvers",
]

# Where each name is imported from when it is first asked for. diffusers loads saved pipelines by way of the two mixins.
_HOMES = {
    "DSSolverScheduler": "diffusers_dssolver.scheduler",
    "FlowDCNTransformer2DModel": "diffusers_dssolver.models",
    "ModelMixin": "diffusers.models.modeling_utils",
    "OfficialDiTTransformer2DModel": "diffusers_dssolver.models",
    "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
    "SolverSpec": "diffusers_dssolver.solver",
    "published_solvers": "diffusers_dssolver.published",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
