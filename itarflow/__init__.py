"""Normalizing flows that generate images: TARFlow and iTARFlow, from training to a shared checkpoint."""

from itarflow.denoise import DenoiseScheduler, denoise
from itarflow.diffusion import DiffusionDenoiser
from itarflow.flow import TARFlow
from itarflow.guidance import Guidance
from itarflow.inverse import Jacobi
from itarflow.pipeline import ITARFlowPipeline
from itarflow.score import FlowDenoiser

__version__ = "0.1.0"

__all__ = [
    "DenoiseScheduler",
    "DiffusionDenoiser",
    "FlowDenoiser",
    "Guidance",
    "ITARFlowPipeline",
    "Jacobi",
    "TARFlow",
    "__version__",
    "denoise",
]
