"""Full-quality images in 5 to 10 network calls: searched solvers as a drop-in diffusers scheduler."""

from diffusers.schedulers.scheduling_utils import SchedulerMixin  # saved pipelines are loaded by way of this name

from .published import published_solvers
from .scheduler import DSSolverScheduler
from .solver import SolverSpec

__all__ = ["DSSolverScheduler", "SchedulerMixin", "SolverSpec", "published_solvers"]
