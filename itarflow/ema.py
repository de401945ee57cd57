"""The use of an exponential moving average of the weights, diffusers' EMAModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import nn


@contextmanager
def averaged_weights(ema: EMAModel | None, model: nn.Module) -> Iterator[None]:
    """While inside, the model has its averaged weights, if there are any."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())
