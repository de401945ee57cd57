"""Normalizing flows that generate images: TARFlow and iTARFlow, from training to a shared checkpoint."""

from itarflow.denoise import DenoiseScheduler, FlowDenoiser, denoise
from itarflow.diffusion import DiffusionDenoiser
from itarflow.flow import TARFlow
from itarflow.guidance import Guidance
from itarflow.pipeline import ITARFlowPipeline

__version__ = "0.1.0"

__all__ = [
    "DenoiseScheduler",
    "DiffusionDenoiser",
    "FlowDenoiser",
    "Guidance",
    "ITARFlowPipeline",
    "TARFlow",
    "__version__",
    "denoise",
]
