"""Causal transformer over whole sequences. It knows nothing of flows; `pack_layers` is for their inverse.

Shapes: B batch, N tokens, C channels (model width), H heads, E head width (C = H * E).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from itarflow.inverse.decoding import PackedLayer
from itarflow.runtime.kernels import Linear, Rotation, attention, pack, rms_norm, rotated


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor, temperature: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """Attend from each token to itself and to the tokens before it.

            softmax(q k^T / (tau sqrt(E))) v, masked to be causal       (TARFlow, appendix B)

        Args:
            x: (B, N, C).
            temperature: (B,), tau, divides the attention logits of each sample; None = 1.
            rotation: of queries and keys, for N positions; None = none.

        Returns:
            (B, N, C).
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, e=self.head_dim)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        if temperature is not None:
            q = q / temperature.to(q.dtype)[:, None, None, None]
        out = attention(q, k, v, causal=True)
        return self.proj(rearrange(out, "b h n e -> b n (h e)"))


class Layer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, channels: int, head_dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, head_dim)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            Linear(channels, mlp_ratio * channels), nn.GELU(), Linear(mlp_ratio * channels, channels)
        )

    def forward(self, x: Tensor, temperature: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """See `Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), temperature, rotation)
        return x + self.mlp(self.mlp_norm(x))


class OffsetRMSNorm(nn.Module):
    """x / rms(x) * (1 + w), in at least float32; a weight w of zero leaves the scale alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C), in x's type."""
        return rms_norm(x, self.factor())

    def factor(self) -> Tensor:
        """1 + w (C,), in at least float32."""
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


class Transformer(nn.Module):
    """A stack of layers, without embedding, final norm or head."""

    # Both are set by diffusers' enable_gradient_checkpointing.
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Any = None

    def __init__(self, channels: int, num_layers: int, head_dim: int = 64, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.channels = channels
        self.head_dim = head_dim
        self.layers = nn.ModuleList(Layer(channels, head_dim, mlp_ratio) for _ in range(num_layers))

    def forward(self, x: Tensor, temperature: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """Run all layers.

        Args:
            x: (B, N, C).
            temperature: (B,), divides the attention logits; None = 1.
            rotation: of the queries and keys at N positions; None = none.

        Returns:
            (B, N, C) in x's type; entry n depends on the tokens up to n, that one included.
        """
        given = x.dtype
        if self.layers:  # which may be of lower precision than what surrounds them
            x = x.to(next(self.layers.parameters()).dtype)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            run = partial(self._gradient_checkpointing_func, layer) if checkpointing else layer
            x = run(x, temperature, rotation)
        return x.to(given)


def pack_layers(layers: Iterable[Layer], dtype: torch.dtype) -> tuple[PackedLayer, ...]:
    """The layers, with their products in that type, for `run_layers`, which is `Layer.forward` with a cache."""
    return tuple(
        PackedLayer(
            pack(layer.attention.qkv, dtype, layer.attention_norm),
            pack(layer.attention.proj, dtype),
            pack(cast(nn.Linear, layer.mlp[0]), dtype, layer.mlp_norm, layer.mlp[1]),
            pack(cast(nn.Linear, layer.mlp[2]), dtype),
        )
        for layer in layers
    )
