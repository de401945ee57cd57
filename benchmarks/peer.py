"""The official ml-itarflow, run from a clone that the user names, on the weights of one of our flows.

Only its `transformer_flow.py` is imported. What its scripts do around the model, which import what is not needed here,
is written anew after their description: the clean estimate x - B * D * t^2 * gradient of the batch's mean loss, always
in float32, and a training step with a gradient scaler that looks at the loss before it goes on.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from itarflow.convert import export_official
from itarflow.denoisers.ode import noise_levels
from itarflow.flow import TARFlow
from itarflow.inverse import Guidance
from itarflow.training import TrainConfig

FILE = "transformer_flow.py"


def official_module(folder: Path) -> ModuleType:
    """The `transformer_flow` of a clone.

    Raises:
        OSError: the folder is no clone of ml-itarflow.
    """
    file = folder / FILE
    if not file.is_file():
        raise OSError(
            f"--peer {folder} has no {FILE}; expected a clone of apple/ml-itarflow, which you make yourself: "
            "git clone https://github.com/apple/ml-itarflow"
        )
    spec = importlib.util.spec_from_file_location("official_transformer_flow", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "Model"):
        raise OSError(f"{file} has no class Model; expected the one of apple/ml-itarflow. Is it of another project?")
    return module


def load_peer(module: ModuleType, flow: TARFlow) -> Any:
    """The official model, from `official_module`, with the weights of `flow`, on its device and without gradients.

    Raises:
        ValueError: the official code has no such model.
    """
    config = flow.config
    if not config.noise_conditioned:
        raise ValueError("ml-itarflow only has models with noise_conditioned on; measure this flow without --peer.")

    def listed(value: Any) -> list[int]:
        return [value] if isinstance(value, int) else list(value)

    with tempfile.TemporaryDirectory() as scratch:
        state = torch.load(export_official(flow, Path(scratch, "weights.pth")), weights_only=True)
    model = module.Model(
        in_channels=config.in_channels,
        img_size=config.image_size,
        patch_sizes=listed(config.patch_size),
        channels=listed(config.channels),
        num_blocks=len(config.num_layers),
        layers_per_block=listed(config.num_layers),
        nvp=not config.volume_preserving,
        num_classes=config.num_classes,
        input_scale=config.input_scale,
        shared_backbone_layers=config.shared_layers,
    )
    model.load_state_dict(state)
    return model.to(flow.device).eval().requires_grad_(False)


@torch.no_grad()
def inverse(model: Any, noise: Tensor, labels: Tensor | None, level: float, guidance: Guidance) -> Tensor:
    """Its images of noise (B, N, D), which it scales by the prior's variance itself; in the surrounding autocast."""
    blocks = -1 if guidance.blocks is None else guidance.blocks
    return model.reverse(
        noise.clone(),
        labels,
        guidance.weight if blocks else 0,
        annealed_guidance=guidance.schedule == "linear",
        t=_column(noise, level),
        lerp_style="tarflow",
        guide_flows=blocks,
    )


def denoise(
    model: Any,
    noisy: Tensor,
    labels: Tensor | None,
    *,
    t_max: float,
    t_min: float,
    num_denoise_steps: int,
    slice_size: int | None,
) -> Tensor:
    """Its Euler steps from t_max over an even grid down to t_min, and on to 0."""
    levels = noise_levels(t_max, t_min, num_denoise_steps)
    x = noisy
    for level, following in itertools.pairwise(levels):
        clean = _clean_estimate(model, x, labels, level, slice_size or len(x))
        x = x - (x - clean) / level * (level - following)
    return x


def _clean_estimate(model: Any, noisy: Tensor, labels: Tensor | None, level: float, slice_size: int) -> Tensor:
    estimates = []
    for start in range(0, len(noisy), slice_size):
        x = noisy[start : start + slice_size].detach().clone().requires_grad_()
        part = None if labels is None else labels[start : start + slice_size]
        z, _, log_det, _ = model(x, part, t=_column(x, level))
        loss = (0.5 * z.pow(2).mean(dim=[1, 2]) - log_det).mean()
        (gradient,) = torch.autograd.grad(loss, x)
        estimates.append(x.detach() - x.numel() * level**2 * gradient)
    return torch.cat(estimates)


def training_step(model: Any, train: TrainConfig, bf16: bool) -> Callable[..., Tensor]:
    """A function of (noisy, labels, noise_level, weight) that takes an optimiser step and gives the loss."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
    )
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type)

    def step(noisy: Tensor, labels: Tensor | None, noise_level: Tensor, weight: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            z, _, log_det, middle = model(noisy, labels, noise_level[:, None])
            loss = model.get_loss(z, log_det, middle, weight)
        if loss.isnan().any():
            return loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def _column(like: Tensor, level: float) -> Tensor:
    return torch.full((len(like), 1), level, device=like.device)
