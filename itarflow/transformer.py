"""Causal transformer with an explicit key-value cache. It knows nothing of flows.

Shapes: B batch, N tokens, C channels (model width), H heads, E head width (C = H * E), L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from itarflow.attention import attention
from itarflow.linear import Linear


def new_cache(num_layers: int, batch_size: int, num_tokens: int, head_dim: int, weight: Tensor) -> Tensor:
    """An empty key-value cache for `num_tokens` positions.

    It is a plain tensor of shape (L, 2, B, H, N, E) that the caller owns: the transformer writes the
    keys and values of a window at its position and reads what lies before. Nothing is kept in the modules.

    Args:
        num_layers: L.
        batch_size: B.
        num_tokens: N, the longest sequence.
        head_dim: E.
        weight: any (*, C) weight of the transformer, for its width, device and type. Under autocast
            the cache has autocast's type.
    """
    device, dtype = weight.device, weight.dtype
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    shape = (num_layers, 2, batch_size, weight.shape[-1] // head_dim, num_tokens, head_dim)
    return torch.empty(shape, device=device, dtype=dtype)


class Attention(nn.Module):
    """Multi-head causal self-attention over windows of tokens."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)

    def forward(
        self,
        x: Tensor,
        temperature: Tensor | None = None,
        cache: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Attend from each token to itself and to the tokens before it.

        Args:
            x: (B, n, C), the tokens at positions start .. start + n - 1.
            temperature: (B,), divides the attention logits of each sample; None = 1.
            cache: (2, B, H, N, E), written at the window's positions; None = the window is the whole sequence.
            start: position of the window's first token; needs a cache if above 0.
        """
        window = x.shape[1]
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, e=self.head_dim)
        if temperature is not None:
            q = q / temperature.to(q.dtype)[:, None, None, None]
        mask = None
        if cache is not None:
            end = start + window
            cache[0, :, :, start:end] = k
            cache[1, :, :, start:end] = v
            q, k, v = q.to(cache.dtype), cache[0, :, :, :end], cache[1, :, :, :end]
            if start > 0 and window > 1:
                mask = torch.ones(window, end, dtype=torch.bool, device=x.device).tril(start)
        # A flag instead of a mask wherever possible: flash kernels refuse masks.
        out = attention(q, k, v, mask, causal=start == 0 and window > 1)
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

    def forward(
        self,
        x: Tensor,
        temperature: Tensor | None = None,
        cache: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """See `Attention.forward`; x and the result are (B, n, C)."""
        x = x + self.attention(self.attention_norm(x), temperature, cache, start)
        return x + self.mlp(self.mlp_norm(x))


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

    def forward(
        self,
        x: Tensor,
        temperature: Tensor | None = None,
        cache: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Run all layers on a window of tokens.

        Args:
            x: (B, n, C), the tokens at positions start .. start + n - 1.
            temperature: (B,), divides the attention logits; None = 1.
            cache: from `new_cache`, (L, 2, B, H, N, E); its positions start .. start + n - 1 are written.
            start: position of the window's first token.

        Returns:
            (B, n, C) in x's type; entry i depends on the tokens up to start + i, that one included.
        """
        given = x.dtype
        if self.layers:  # which may be of lower precision than what surrounds them
            x = x.to(next(self.layers.parameters()).dtype)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        for index, layer in enumerate(self.layers):
            if checkpointing:
                x = self._gradient_checkpointing_func(layer, x, temperature)
            else:
                x = layer(x, temperature, None if cache is None else cache[index], start)
        return x.to(given)
