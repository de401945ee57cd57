"""Figures of a checkpoint: its samples, how far they are from real images, how likely those are, what is wrong."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from itarflow.evaluation.call import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:  # imported when first asked for, as in itarflow/__init__.py
    if name == "evaluate":
        return import_module("itarflow.evaluation.call").evaluate
    raise AttributeError(f"module 'itarflow.evaluation' has no attribute {name!r}")
