"""Which sizes of a flow fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence


def per_block(name: str, value: int | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """One value for each block, from one for all or one a block; raises ValueError if the numbers differ."""
    values = (value,) * num_blocks if isinstance(value, int) else tuple(value)
    if len(values) != num_blocks:
        raise ValueError(
            f"{name} has {len(values)} entries ({values}) for {num_blocks} blocks (the length of num_layers); "
            "expected one number, or one a block."
        )
    return values


def check_architecture(
    image_size: int,
    in_channels: int,
    patch_sizes: tuple[int, ...],
    channels: tuple[int, ...],
    num_layers: tuple[int, ...],
    shared_layers: int,
    head_dim: int,
) -> None:
    """Raise ValueError, naming the values and what would fit, unless the sizes of a flow fit together."""
    if not num_layers or min(num_layers) < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least one block, and at least one layer in each.")
    if min(image_size, in_channels, *patch_sizes, *channels, head_dim) < 1 or shared_layers < 0:
        raise ValueError(
            f"Sizes must be positive: image_size={image_size}, in_channels={in_channels}, patch_size={patch_sizes}, "
            f"channels={channels}, head_dim={head_dim}, shared_layers={shared_layers}."
        )
    for patch in patch_sizes:
        if image_size % patch:
            divisors = [p for p in range(1, image_size + 1) if image_size % p == 0]
            raise ValueError(
                f"patch_size {patch} does not divide image_size {image_size}; choose one of {divisors}, "
                "or crop the images to another size."
            )
    for width in channels:
        if width % head_dim:
            raise ValueError(f"channels {width} is not a multiple of head_dim {head_dim}; change one of the two.")
    if shared_layers and len(set(channels)) > 1:
        raise ValueError(
            f"shared_layers={shared_layers} needs the same channels in all blocks, but they are {channels}."
        )


def check_scalars(num_classes: int, input_scale: float, mlp_ratio: int, noise_range: Sequence[float] | None) -> None:
    """Raise ValueError unless the other arguments of a flow are in their ranges."""
    if num_classes < 0 or mlp_ratio < 1:
        raise ValueError(
            f"num_classes={num_classes}, mlp_ratio={mlp_ratio}; expected num_classes >= 0, mlp_ratio >= 1."
        )
    if not (math.isfinite(input_scale) and input_scale > 0):
        raise ValueError(f"input_scale is {input_scale}; expected a finite number > 0.")
    if noise_range is not None and not (len(noise_range) == 2 and 0 < noise_range[0] <= noise_range[1] < math.inf):
        raise ValueError(f"noise_range is {noise_range}; expected (t_min, t_max) with 0 < t_min <= t_max, or None.")
