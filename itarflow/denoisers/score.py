"""The score of a flow, by which it denoises: Tweedie's formula on the gradient of its own log-density."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from itarflow.denoisers.protocol import CheckedDenoiser as CheckedDenoiser
from itarflow.denoisers.protocol import Denoiser as Denoiser
from itarflow.flow.condition import checked_context, checked_labels
from itarflow.flow.density import log_density
from itarflow.flow.tarflow import TARFlow
from itarflow.flow.transformer import Layer
from itarflow.runtime.devices import in_batches
from itarflow.runtime.modules import frozen_view, recomputed
from itarflow.runtime.recording import Recordings
from itarflow.runtime.repeated import repeated

_HOST_BOUND = 5 * 2**20
"""Images times tokens times channels, of a block, up to which a score is one CUDA graph: 4 images of the size S at 64
pixels. It has about 800 kernels, to launch which takes the host longer than it takes a GPU to run them."""


class FlowDenoiser:
    """The denoiser that a flow implies: Tweedie's formula on the gradient of its own log-density.

    Its `score` is s(x_t, t) = grad_x log p(x_t, t); a call gives x_t + t^2 s(x_t, t).

    The flow is not changed, and its weights get no gradients. They are shared, so in-place updates of them take
    effect, except with a `dtype`, which copies them: see `update`. A flow that is moved or cast afterwards needs a
    new denoiser.

    On a GPU the score of a few images is recorded as a CUDA graph at its second evaluation. Recordings keep the memory
    of their activations until the denoiser is gone, or memory runs out.

    Args:
        flow: any TARFlow. Without noise conditioning it has one noise level, and denoises well only there.
        slice_size: how many images are differentiated at a time, which bounds the memory; None = all. If
            the device runs out of memory, it is halved until they fit, with a warning, and stays so (`slice_size` of
            this object is changed).
        dtype: of the transformer layers. torch.bfloat16 takes about half of the time and memory on CPUs that support
            it, unless the model is tiny; embeddings, affine maps, log-determinants and their sum over the blocks keep
            the flow's type, so that ten steps change images by about one grey level of 255. None = its own type,
            without rounding.
        checkpointing: recompute the layers' activations for the gradient instead of keeping them:
            less than half of the memory for about one and a half times the time. For batches that do not fit
            otherwise, and are too slow in slices. A flow on which gradient checkpointing is enabled already does so
            anyway.
        compiled: compile the layers by torch.compile, which takes a minute or so at the first evaluation, and again
            at the first of a single image. For many evaluations of many images on a GPU, with bfloat16; on CPUs it is
            slower than without.

    Raises:
        ValueError: slice_size < 1, or a dtype that is too narrow for gradients.
    """

    def __init__(
        self,
        flow: TARFlow,
        slice_size: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        if slice_size is not None and slice_size < 1:
            raise ValueError(f"slice_size is {slice_size}; expected a number of images >= 1, or None for all.")
        if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"dtype is {dtype}; expected torch.bfloat16, float32 or float64, or None for the flow's own."
            )
        self.flow = frozen_view(flow)
        self.slice_size = slice_size
        """Images that are differentiated at a time; lowered when they did not fit into memory."""
        self._dtype = dtype
        self._recordings: Recordings[Any] = Recordings(4)
        self._per_image = max(block.num_tokens * block.transformer.channels for block, _ in self.flow._blocks())
        if checkpointing:
            self.flow.enable_gradient_checkpointing(recomputed)
        with torch.inference_mode(False):  # whose tensors can't be differentiated
            for layer in (module for module in self.flow.modules() if isinstance(module, Layer)):
                if dtype is not None:
                    layer.to(dtype)
                if compiled:
                    layer.compile(dynamic=True)  # one graph for all batch sizes, also that of the last slice
        self._weights = [*self.flow.parameters(), *self.flow.buffers()]
        self._recorded = not (compiled or self.flow.is_gradient_checkpointing)  # which are for large batches

    def update(self, flow: TARFlow) -> None:
        """Take the present weights of the flow that it was made of, also where it has copies of them, by a `dtype`."""
        with torch.no_grad():
            for own, given in zip(self.flow.parameters(), flow.parameters(), strict=True):
                if own.dtype != given.dtype:
                    own.copy_(given)

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
        unlabelled: bool = False,  # every flow can do without labels
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

    def score(
        self,
        noisy: Tensor,
        labels: Tensor | None,
        noise_level: Tensor | float | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """grad_x log p(x_t, t | labels), by autograd through the flow; (B, C, H, W), at least float32.

        It is what moves x_t along the ODE dx = -t grad_x log p(x, t) dt (iTARFlow, section 3.2).

        Args:
            noisy: (B, C, H, W).
            labels: (B,) or None. Guidance plays no part in the score (iTARFlow, section 3.2).
            noise_level: (B,) or one number, inside the flow's noise_range; not used, and not needed, without noise
                conditioning. The values of a tensor on a GPU are not checked, since that would synchronise: `check`
                them before.
            context: (B, T, E), see `TARFlow.forward`.

        Raises:
            ValueError: as `TARFlow.log_prob`.
        """
        if not (isinstance(noise_level, Tensor) and noise_level.device.type != "cpu"):
            self.flow.check_noise_range(noise_level)
        labels = checked_labels(labels, len(noisy), self.flow.config.num_classes, noisy.device)
        context = checked_context(context, labels, len(noisy), self.flow.config, noisy.device)
        labels = labels if context is None else None
        level = None if noise_level is None else _tensor(noise_level, noisy)
        each = level if level is not None and len(level) != 1 else None
        if each is not None and len(each) != len(noisy):
            raise ValueError(f"noise_level has shape {tuple(each.shape)}; expected ({len(noisy)},), one an image.")

        def score_of(part: slice) -> Tensor:
            chosen = [None if one is None else one[part] for one in (labels, each, context)]
            return self._score(noisy[part], chosen[0], level if each is None else chosen[1], chosen[2])

        option = "slice_size, which a pipeline calls denoise_batch_size"
        parts, size = in_batches(score_of, len(noisy), self.slice_size or len(noisy), "the score of", option)
        if size < min(self.slice_size or len(noisy), len(noisy)):
            self.slice_size = size
        return torch.cat(parts)

    def _score(
        self, noisy: Tensor, labels: Tensor | None, noise_level: Tensor | None, context: Tensor | None
    ) -> Tensor:
        # The caller may be in inference mode, whose tensors can't be differentiated: leave it, and copy.
        with torch.inference_mode(False), torch.enable_grad(), self._precision(noisy.device.type):
            x = noisy.detach().clone().to(torch.promote_types(noisy.dtype, torch.float32))
            if not self._recorded or len(x) * self._per_image > _HOST_BOUND:
                return self._gradient(x, labels, noise_level, context)
            inputs = x, labels, noise_level, context
            return repeated(self._recordings, self._gradient, *inputs, weights=self._weights)

    def _gradient(
        self, x: Tensor, labels: Tensor | None, noise_level: Tensor | None, context: Tensor | None
    ) -> Tensor:
        x = x.detach().requires_grad_()
        log_prob = log_density(self.flow(x, labels, noise_level, context), self.flow.prior_variance)
        return torch.autograd.grad(log_prob.sum(), x)[0]

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        """Autocast is off if a dtype was asked for, so that the caller's does not override it."""
        if self._dtype is None or not torch.amp.is_autocast_available(device):
            return nullcontext()
        return torch.autocast(device, enabled=False)

    def __call__(
        self,
        noisy: Tensor,
        labels: Tensor | None,
        noise_level: Tensor | float,
        context: Tensor | None = None,
    ) -> Tensor:
        """The mean of the clean images given the noisy ones, by Tweedie's formula; arguments as `score`.

            E[x | y] = y + sigma^2 grad_y log q(y),  y = x + sigma eps              (TARFlow, eq. 7)
            x = y + sigma^2 grad_y log p_model(y)                                   (TARFlow, eq. 8)
            x_0 = x_t + t^2 grad_x log p(x_t, t)                                    (iTARFlow, eq. 5)

        The first holds for the true density q of noisy images. The flow's own stands in for it in the second, at its
        single noise level; in the third, at any level t that the flow was trained on.
        """
        level = _tensor(noise_level, noisy).view(-1, 1, 1, 1)
        return noisy + level**2 * self.score(noisy, labels, noise_level, context)


def _tensor(noise_level: Tensor | float, noisy: Tensor) -> Tensor:
    """(B,) or (1,) on the device of noisy; for a number without a synchronisation."""
    if isinstance(noise_level, Tensor):
        return noise_level.to(noisy.device).reshape(-1)
    return torch.full((1,), noise_level, device=noisy.device, dtype=torch.promote_types(noisy.dtype, torch.float32))


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
