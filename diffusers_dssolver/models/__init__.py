"""Models that diffusers lacks."""

from diffusers.models.modeling_utils import ModelMixin

from .transformer_dit import OfficialDiTTransformer2DModel
from .transformer_flowdcn import FlowDCNTransformer2DModel

__all__ = ["FlowDCNTransformer2DModel", "ModelMixin", "OfficialDiTTransformer2DModel"]
