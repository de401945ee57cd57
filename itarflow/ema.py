"""The exponential moving average of the weights: diffusers' EMAModel, its place in a state, and its use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

_FILE = "ema.safetensors"


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


def save_ema(ema: EMAModel, folder: Path) -> None:
    """Write the average and the number of its steps into a state's folder."""
    tensors = {str(index): tensor.contiguous() for index, tensor in enumerate(ema.shadow_params)}
    save_file(tensors, folder / _FILE, metadata={"optimization_step": str(ema.optimization_step)})


def load_ema(ema: EMAModel, folder: Path) -> None:
    """Bring an average back to where `save_ema` left it; an error means it is not there, or another."""
    with safe_open(folder / _FILE, "pt") as file:
        shadow = [file.get_tensor(str(index)).to(old.device) for index, old in enumerate(ema.shadow_params)]
        ema.load_state_dict({"optimization_step": int(file.metadata()["optimization_step"]), "shadow_params": shadow})
