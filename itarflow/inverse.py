"""Solvers that invert one block: x = z * scale + shift, where both depend on the tokens of x before.

A solver sees a block only through a function `affine_at(tokens, start)` that gives the shift and scale of the
tokens which follow `tokens`, so it works for any conditioner, guided or not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AffineAt = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""affine_at(tokens, start): tokens (B, n, D) at positions start .. start + n - 1, all before them already given;
returns (shift, scale), each (B, n, D), of the tokens at positions start + 1 .. start + n."""

Progress = Callable[[int], None]
"""Called with the number of tokens that have just been solved."""

Solver = Callable[[AffineAt, Tensor, tuple[Tensor, Tensor], Progress | None], Tensor]
"""solver(affine_at, z, first, progress) -> x: z and x are (B, N, D), first is the (shift, scale) of token 0."""


def sequential(
    affine_at: AffineAt, z: Tensor, first: tuple[Tensor, Tensor], progress: Progress | None = None
) -> Tensor:
    """Exact inversion, one token after another: N - 1 evaluations of `affine_at` on windows of one.

    Args:
        affine_at: the block's conditioner.
        z: (B, N, D) in the block's own order.
        first: (shift, scale) of token 0, each broadcastable to (B, 1, D).
        progress: called with 1 after each token.

    Returns:
        x: (B, N, D).
    """
    x = torch.empty_like(z)
    shift, scale = first
    for position in range(z.shape[1]):
        if position > 0:
            shift, scale = affine_at(x[:, position - 1 : position], position - 1)
        x[:, position : position + 1] = z[:, position : position + 1] * scale + shift
        if progress is not None:
            progress(1)
    return x
