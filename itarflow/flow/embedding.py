"""Embeddings that condition a block: noise level, class label, and positions, learned or rotary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NULL_LABEL = -1
"""The label of "no label": the mean of all class embeddings, in every model."""


def fourier_features(x: Tensor, channels: int) -> Tensor:
    """Sines, then cosines, of x at h = `channels // 2` frequencies from 1 down to almost 1/10000.

        [sin(w_k x), ..., cos(w_k x), ...],  w_k = 10000^(-k/h),  k = 0 .. h - 1

    Args:
        x: (B,).
        channels: width of the result; an odd one is padded with a zero.

    Returns:
        (B, channels) in x's dtype.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=x.device, dtype=x.dtype))
    angles = x[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, channels % 2))


class NoiseLevelEmbedding(nn.Module):
    """log t -> Fourier features -> two-layer MLP (iTARFlow, section 4).

        e(t) = W_2 GELU(W_1 [sin(w_k log t), ..., cos(w_k log t), ...] + b_1) + b_2

    Args:
        channels: C, width of the result.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, noise_level: Tensor) -> Tensor:
        """noise_level (B,), standard deviations > 0; returns (B, channels)."""
        features = fourier_features(noise_level.log(), self.channels)
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(features.to(dtype))


class ClassEmbedding(nn.Module):
    """One vector a class; the null label, the paper's empty condition, is their mean, as in the official code.

    Training drops labels at random, so that the mean learns the unconditional model (TARFlow, section 2.6).
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(num_classes, channels))

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B,) int64 in [0, num_classes), or NULL_LABEL; returns (B, channels)."""
        table = torch.cat([self.weight, self.weight.mean(dim=0, keepdim=True)])
        # The mean is the table's last row. Selecting it without a branch avoids waiting for the device.
        return table[torch.where(labels < 0, len(self.weight), labels)]


class PositionEmbedding(nn.Module):
    """A learned vector for each place in the image, in raster order."""

    def __init__(self, num_tokens: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(num_tokens, channels))

    def forward(self, start: int, stop: int, reverse: bool) -> Tensor:
        """The embeddings (stop - start, channels) of positions start .. stop - 1 in a block's own order.

        A vector belongs to a place in the image, not to a step: a block that reads the image backwards
        (`reverse`) reads the table backwards, too.
        """
        if not reverse:
            return self.weight[start:stop]
        num_tokens = len(self.weight)
        return self.weight[num_tokens - stop : num_tokens - start].flip(0)


@dataclass(frozen=True)
class RotaryPositions:
    """Where the inputs of a block lie, for rotary embeddings of the queries and keys (STARFlow, arXiv 2506.06276).

    Half of a head's width E are its angles: 3/8 of them turn with the row, as many with the column, and 1/4 with the
    place in the condition vectors; without those, halves.

        angle_k = p / 10000^(k/n),  p = row, column; k = 0 .. n - 1, n = 3E/16 or E/4
        angle_k = p / 10000^(k/m),  p = place of a condition vector; k = 0 .. m - 1, m = E/8

    A position belongs to a step, not to a place in the image: a block that reads the image backwards has its first
    input, too, at row 0 and column 0. An image of h x w tokens spans P h / sqrt(h w) rows and P w / sqrt(h w) columns,
    so that images of other shapes have the same area.

    Args:
        grid: (h, w), tokens of the image.
        side: P, tokens along the side of a square image.
        context_tokens: T condition vectors before the image; 0 = none in this block.
        context_axis: whether angles are kept for them, as in all blocks of a flow that has a block with them.
        head_dim: E, a multiple of 16.
    """

    grid: tuple[int, int]
    side: int
    context_tokens: int
    context_axis: bool
    head_dim: int

    def angles(self, device: torch.device) -> Tensor:
        """(T + h w, E/2), in float32: condition vectors first, then the image, row after row."""
        height, width = self.grid
        scale = self.side / math.sqrt(height * width)
        half = self.head_dim // 2
        for_context = half // 4 if self.context_axis else 0
        frequencies = _falling((half - for_context) // 2, device)
        rows, columns = (torch.arange(n, device=device, dtype=torch.float32) * scale for n in self.grid)
        image = torch.cat(
            [
                (rows[:, None] * frequencies)[:, None].expand(-1, width, -1),
                (columns[:, None] * frequencies)[None].expand(height, -1, -1),
                rows.new_zeros(height, width, for_context),
            ],
            dim=-1,
        ).flatten(0, 1)
        if not self.context_tokens:
            return image
        places = torch.arange(self.context_tokens, device=device, dtype=torch.float32)
        places = places * (self.side / self.context_tokens)
        context = F.pad(places[:, None] * _falling(for_context, device), (half - for_context, 0))
        return torch.cat([context, image])


def _falling(count: int, device: torch.device) -> Tensor:
    """10000^(-k/count), k = 0 .. count - 1."""
    return 10000.0 ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
