"""Pipelines that diffusers lacks."""

from .pipeline_sit import SiTPipeline

__all__ = ["SiTPipeline"]
