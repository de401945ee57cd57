"""What removes noise: the flow's own score or a diffusion model, and the ODE that follows it down."""

from itarflow.denoisers.diffusion import DiffusionDenoiser
from itarflow.denoisers.load import load_denoiser
from itarflow.denoisers.ode import DenoiseScheduler, denoise
from itarflow.denoisers.protocol import Denoiser
from itarflow.denoisers.score import FlowDenoiser

__all__ = ["DenoiseScheduler", "Denoiser", "DiffusionDenoiser", "FlowDenoiser", "denoise", "load_denoiser"]
