"""Diffusion models with hardly a weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DIT = {"num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 2, "num_layers": 2, "sample_size": 4}
UNET: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": 4,
}


class Recorder(nn.Module):
    """Predicts 0 in each channel, and remembers what it was asked."""

    def __init__(self, channels: int = 2, **config: Any) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        self.seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def __deepcopy__(self, memo: Any) -> Recorder:
        return self

    def forward(self, y: Tensor, k: Tensor, **labels: Tensor) -> SimpleNamespace:
        self.seen.append((y, k, labels))
        planes = torch.arange(self.channels).to(y)[None, :, None, None]
        return SimpleNamespace(sample=planes.expand(len(y), -1, *y.shape[2:]))
