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


class ImageGenerator(torch.Generator):
    """The random numbers of one image, from its own seed; see `image_generators`."""


def seeded_images(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[ImageGenerator]:
    """A generator an image, from seeds that `image_seeds` has drawn."""
    made = [ImageGenerator(device) for _ in seeds]
    for generator, seed in zip(made, seeds, strict=True):
        generator.manual_seed(seed)
    return made


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    """One generator an image, whose seed is drawn from what is given, see `image_seeds`.

    A generator for all images gives their seeds in turn, and of a list each gives that of its own image: the first
    image of `g` is that of `[g]`, and `[g, g]` is the same as `g`.

    Args:
        generator: one for all images, or one an image; None = torch's global one. An `ImageGenerator` has been drawn
            for its image already, and is used as it is.
        count: number of images.

    Raises:
        ValueError: there are not as many generators as images, or something is none.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return [*seeded_images(image_seeds(generator, count), device)]
    if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(
            f"generator is {generator!r}; expected a torch.Generator, such as torch.Generator().manual_seed(0), or a "
            "list with one an image."
        )
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators were given for {count} images; expected one, or one each.")
    return [
        one if isinstance(one, ImageGenerator) else seeded_images(image_seeds(one, 1), one.device)[0]
        for one in generator
    ]


def permutation(name: str, length: int) -> Tensor:
    """(length,) int64: 0..length-1 in an order that depends on the name alone.

    The generator's seed is the first 8 bytes (big-endian) of the name's SHA-256.
    """
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randperm(length, generator=generator)
