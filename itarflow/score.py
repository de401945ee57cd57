"""The score of a flow, and denoisers: any function (noisy, labels, noise_level) -> clean estimate.

A flow denoises by Tweedie's formula on the gradient of its own log-density. What generates and what denoises may be
different models (iTARFlow, table 6).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from itarflow.flow import TARFlow

Module = TypeVar("Module", bound=nn.Module)


class Denoiser(Protocol):
    """noisy (B, C, H, W), labels (B,) or None, noise_level (B,) -> an estimate of the clean images, same shape."""

    def __call__(self, noisy: Tensor, labels: Tensor | None, noise_level: Tensor) -> Tensor: ...  # noqa: D102


@runtime_checkable
class CheckedDenoiser(Denoiser, Protocol):
    """A denoiser that knows what it can't denoise, so that it is refused before anything is generated for it."""

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """Smallest and largest noise level that it knows; None = not recorded."""

    def check(
        self, image_shape: tuple[int, int, int], num_classes: int, levels: Sequence[float], *, unlabelled: bool = False
    ) -> None:
        """Refuse what will not go.

        Args:
            image_shape: (C, H, W) of the images to come.
            num_classes: how many classes their labels are of; 0 = no labels will come.
            levels: the noise levels to come, from t_max down to t_min.
            unlabelled: whether some images come without a label.

        Raises:
            ValueError: naming what is asked for and what the denoiser is for.
        """


class FlowDenoiser:
    """The denoiser that a flow implies: Tweedie's formula on the gradient of its own log-density.

    The flow is only read. Its weights are shared, not copied, and get no gradients. Weights that are updated in
    place are seen; a flow that is moved or cast afterwards needs a new denoiser.

    Args:
        flow: any TARFlow. Without noise conditioning it has one noise level of its own, and cleans well only there.
        slice_size: how many images are differentiated at a time, which bounds the memory; None = all.
    """

    def __init__(self, flow: TARFlow, slice_size: int | None = None) -> None:
        if slice_size is not None and slice_size < 1:
            raise ValueError(f"slice_size is {slice_size}; expected a number of images >= 1, or None for all.")
        self.flow = frozen_view(flow)
        self.slice_size = slice_size

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """See `CheckedDenoiser`."""
        known = self.flow.config.noise_range
        return None if known is None else (known[0], known[1])

    def check(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        levels: Sequence[float],
        *,
        unlabelled: bool = False,  # which every flow knows
    ) -> None:
        """See `CheckedDenoiser`: the flow's image shape, number of classes and noise_range decide."""
        if image_shape != self.flow.image_shape:
            raise ValueError(
                f"images of shape {image_shape} are to be denoised by a flow for {self.flow.image_shape}; choose a "
                "flow of the same channels and size."
            )
        if num_classes and num_classes != self.flow.config.num_classes:
            raise ValueError(
                f"labels of {num_classes} classes are to be given to a denoising flow with "
                f"{self.flow.config.num_classes}; choose a flow of the same classes, or leave the labels out."
            )
        for name, level in named_ends(levels):
            check_level(self.flow, name, level)

    def score(self, noisy: Tensor, labels: Tensor | None, noise_level: Tensor | float) -> Tensor:
        """The gradient of log p(noisy, t | labels) with respect to noisy, (B, C, H, W), in float32.

        Args:
            noisy: (B, C, H, W).
            labels: (B,) or None. Guidance plays no part in the score.
            noise_level: (B,) or one number, inside the flow's noise_range.

        Raises:
            ValueError: as `TARFlow.log_prob`.
        """
        level = torch.as_tensor(noise_level, device=noisy.device).reshape(-1)
        for name, values in (("labels have", labels), ("noise_level has", level if len(level) != 1 else None)):
            if values is not None and len(values) != len(noisy):
                raise ValueError(f"{name} shape {tuple(values.shape)}; expected ({len(noisy)},), one an image.")
        level = level.expand(len(noisy))
        size = self.slice_size or len(noisy)
        slices = (slice(start, start + size) for start in range(0, len(noisy), size))
        return torch.cat([self._score(noisy[s], None if labels is None else labels[s], level[s]) for s in slices])

    def _score(self, noisy: Tensor, labels: Tensor | None, noise_level: Tensor) -> Tensor:
        # The caller may be in inference mode, whose tensors can't be differentiated: leave it, and copy.
        with torch.inference_mode(False), torch.enable_grad():
            x = noisy.detach().clone().to(torch.promote_types(noisy.dtype, torch.float32)).requires_grad_()
            log_prob = self.flow.log_prob(x, labels, noise_level)
            (score,) = torch.autograd.grad(log_prob.sum(), x)
        return score

    def __call__(self, noisy: Tensor, labels: Tensor | None, noise_level: Tensor | float) -> Tensor:
        """E[clean | noisy] = noisy + t^2 * score (Tweedie); arguments as `score`."""
        level = torch.as_tensor(noise_level, device=noisy.device).reshape(-1, 1, 1, 1)
        return noisy + level**2 * self.score(noisy, labels, noise_level)


def named_ends(levels: Sequence[float]) -> list[tuple[str, float]]:
    """The largest and the smallest of falling levels, by the names that they have in `denoise`."""
    return list(zip(("t_max", "t_min"), (*levels[:1], *levels[1:][-1:]), strict=False))


def check_level(flow: TARFlow, name: str, level: float) -> None:
    """Refuse a level that the flow was not trained on, by its name.

    Raises:
        ValueError: it lies outside the flow's noise_range.
    """
    try:
        flow.check_noise_range(level)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def frozen_view(module: Module) -> Module:
    """A second module over the same weights that no gradient reaches, and that is not in training.

    Autograd then neither computes weight gradients nor keeps the activations they would need, and the caller's
    module is left as it is, also for other threads.
    """
    shared: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    shared |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, shared).eval()
