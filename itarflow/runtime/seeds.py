"""Random numbers that depend on a seed and an index only: of an image, a step, an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def mixed_seed(*numbers: int) -> int:
    """A seed from some numbers >= 0; tuples of one length that differ give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def image_seeds(generator: torch.Generator | None, count: int) -> list[int]:
    """A seed an image, so that image i depends neither on how many are made nor on the batch size.

    Args:
        generator: from which they are drawn; None = torch's global one.
        count: number of images.
    """
    device = "cpu" if generator is None else generator.device
    # Drawn one by one: a larger draw need not begin with the numbers of a smaller one.
    return [int(torch.randint(2**62, (), generator=generator, device=device)) for _ in range(count)]


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    """One generator an image, see `image_seeds`.

    Args:
        generator: one, from which a seed for each image is drawn; or already one an image; None = torch's global one.
        count: number of images.

    Raises:
        ValueError: there are not as many generators as images.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators were given for {count} images; expected one, or one each.")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    return [torch.Generator(device).manual_seed(seed) for seed in image_seeds(generator, count)]


def permutation(name: str, length: int) -> Tensor:
    """(length,) int64: 0..length-1 in an order that depends on the name alone.

    The generator's seed is the first 8 bytes (big-endian) of the name's SHA-256.
    """
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randperm(length, generator=generator)
