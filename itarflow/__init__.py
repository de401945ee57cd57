"""Normalizing flows that generate images: TARFlow and iTARFlow, from training to a shared checkpoint."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from itarflow.denoisers import DenoiseScheduler, DiffusionDenoiser, FlowDenoiser, denoise
    from itarflow.flow import TARFlow
    from itarflow.inverse import Guidance, Jacobi
    from itarflow.pipeline import ITARFlowPipeline

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

# Imported when first asked for: PyTorch and diffusers take seconds, which a page of --help does not need.
_WINGS = {
    "DenoiseScheduler": "denoisers",
    "DiffusionDenoiser": "denoisers",
    "FlowDenoiser": "denoisers",
    "Guidance": "inverse",
    "ITARFlowPipeline": "pipeline",
    "Jacobi": "inverse",
    "TARFlow": "flow",
    "denoise": "denoisers",
}


def __getattr__(name: str) -> Any:
    if name not in _WINGS:
        raise AttributeError(f"module 'itarflow' has no attribute {name!r}")
    value = getattr(import_module(f"itarflow.{_WINGS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
