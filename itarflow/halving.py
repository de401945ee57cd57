"""Batches that do not fit the memory are halved, and what is finished is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

Part = TypeVar("Part")


def in_batches(make: Callable[[slice], Part], count: int, size: int, what: str, option: str) -> tuple[list[Part], int]:
    """make(part) for parts of 0 .. count - 1 in order, of at most `size` each, or fewer where memory runs out.

    Args:
        make: makes a part; called again for a smaller one if it fails for want of memory.
        count: how many there are; with 0 it is asked for an empty part.
        size: >= 1.
        what: is made, for the warning: "the score of".
        option: that sets the size, for the warning.

    Returns:
        What was made, and the size that fitted.

    Raises:
        RuntimeError: of `make`, if it is of another kind, or not even one fits.
    """
    made: list[Part] = []
    start, size = 0, min(size, max(count, 1))
    while start < count or not made:
        tried = min(size, count - start)
        try:
            made.append(make(slice(start, start + tried)))
            start += tried
            continue
        except RuntimeError as error:
            if tried <= 1 or not should_reduce_batch_size(error):
                raise
        # Outside of the handler, which holds on to what the failed attempt had allocated.
        clear_device_cache(garbage_collection=True)
        warnings.warn(
            f"{what} {tried} images at a time does not fit the memory; going on with {tried // 2}. To choose it "
            f"yourself: {option}.",
            stacklevel=3,
        )
        size = tried // 2
    return made, size
