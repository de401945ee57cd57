"""Normalizing flows that generate images: TARFlow and iTARFlow, from training to a shared checkpoint."""

from itarflow.denoisers.diffusion import DiffusionDenoiser
from itarflow.denoisers.ode import DenoiseScheduler, denoise
from itarflow.denoisers.score import FlowDenoiser
from itarflow.flow.tarflow import TARFlow
from itarflow.inverse.guidance import Guidance
from itarflow.inverse.solvers import Jacobi
from itarflow.pipeline.pipeline import ITARFlowPipeline

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
