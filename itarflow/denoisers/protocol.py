"""Denoisers: any function (noisy, labels, noise_level) -> clean estimate.

One that denoises what was made by condition vectors, such as a text's, takes these, too, as `context`.

The model that generates and the one that denoises may differ (iTARFlow, table 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


class Denoiser(Protocol):
    """noisy (B, C, H, W), labels (B,) or None, noise_level (B,) -> an estimate of the clean images, same shape."""

    def __call__(self, noisy: Tensor, labels: Tensor | None, noise_level: Tensor) -> Tensor: ...  # noqa: D102


@runtime_checkable
class CheckedDenoiser(Denoiser, Protocol):
    """A denoiser that can check its inputs, so that unsuitable images are refused before they are generated."""

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """Smallest and largest noise level that it was trained on; None = not recorded."""

    def check(
        self, image_shape: tuple[int, int, int], num_classes: int, levels: Sequence[float], *, unlabelled: bool = False
    ) -> None:
        """Refuse images, labels or noise levels that it can't denoise.

        Args:
            image_shape: (C, H, W) of the images to come.
            num_classes: how many classes their labels are of; 0 = no labels will come.
            levels: the noise levels to come, from t_max down to t_min.
            unlabelled: whether some images come without a label.

        Raises:
            ValueError: naming what was asked for and what the denoiser supports.
        """
