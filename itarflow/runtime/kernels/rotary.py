"""Rotary positions: each pair of neighbouring entries of a query or a key is turned by an angle of its position.

    (x_{2i}, x_{2i+1}) -> (x_{2i} cos a_i - x_{2i+1} sin a_i, x_{2i+1} cos a_i + x_{2i} sin a_i)

A pair is a complex number, and so this is one product, which PyTorch has as one kernel. Products are in float32 or
finer, whatever the type of what is rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from itarflow.runtime.kernels import cpu

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_DEVICES = ("cpu", "cuda")
"""Which are known to have kernels of complex numbers."""


class Rotation(NamedTuple):
    """The angles of some positions, as `rotation_of` makes it."""

    pairs: Tensor
    """(n, E) or (B, n, E), float32 or finer: the cosine and the sine of each angle, side by side."""

    def at(self, positions: Tensor | slice) -> Rotation:
        """That of some of its n positions: a slice, or indices (m,) -> (m, E) or (B, m) -> (B, m, E)."""
        return Rotation(self.pairs[positions])


def rotation_of(angles: Tensor) -> Rotation:
    """The rotation by these angles (n, E / 2) in radians, of the pairs of n positions."""
    angles = angles.to(torch.promote_types(angles.dtype, torch.float32))
    return Rotation(torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(-2))


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """The queries or keys x (B, H, n, E), rotated; in x's type, and differentiable any number of times.

    Args:
        x: (B, H, n, E).
        rotation: (n, E), or (B, n, E).
    """
    pairs = rotation.pairs if rotation.pairs.ndim == 2 else rotation.pairs.unsqueeze(1)
    return _product(x, pairs)


def rotator(rotation: Rotation) -> Callable[[Tensor], None]:
    """What rotates queries and keys where they lie, in any number of layers; without gradients.

    It is given (B, n, 2, H, E), such as the first two of a layer's (B, n, 3, H, E), which it overwrites.

    Args:
        rotation: (n, E), or (B, n, E).
    """
    pairs = rotation.pairs
    if len(pairs) > 1 or pairs.ndim > 2:  # what belongs to one position fits as it is
        pairs = pairs[..., None, None, :]
    # Prepared once: that takes as long as the product of a token.
    turns = pairs.view(_COMPLEX[pairs.dtype]) if _has_complex(pairs) else None

    def rotate(qk: Tensor) -> None:
        if turns is not None and qk.dtype == pairs.dtype and _is_paired(qk):
            qk.view(turns.dtype).mul_(turns)
        else:
            qk.copy_(_product(qk, pairs))

    return rotate


def _product(x: Tensor, pairs: Tensor) -> Tensor:
    """x (..., E) times what broadcasts to it."""
    finer = x.to(torch.promote_types(x.dtype, pairs.dtype))
    if _has_complex(finer) and _is_paired(finer):
        turned = torch.view_as_complex(_by_pairs(finer)) * torch.view_as_complex(_by_pairs(pairs))
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    (even, odd), (cos, sin) = _by_pairs(finer).unbind(-1), _by_pairs(pairs).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _by_pairs(tensor: Tensor) -> Tensor:
    """(..., E) -> (..., E / 2, 2)."""
    return tensor.unflatten(-1, (-1, 2))


def _has_complex(x: Tensor) -> bool:
    """Whether complex numbers may take part; compilers and transforms know real ones better."""
    return x.dtype in _COMPLEX and x.device.type in _DEVICES and not cpu.is_watched()


def _is_paired(x: Tensor) -> bool:
    """Whether x can be seen as complex numbers, where it lies."""
    *outer, last = x.stride()
    return last == 1 and not any(stride % 2 for stride in outer) and x.storage_offset() % 2 == 0
