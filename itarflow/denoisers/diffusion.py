"""A diffusion model of diffusers as a denoiser: a flow generates, a DiT or a UNet denoises (iTARFlow, table 7).

Ours is x_t = x_0 + t * eps. The model's is y_k = a_k * x_0 + s_k * eps with a_k^2 = alphas_cumprod[k] = 1 - s_k^2, the
same up to a factor: y_k = x_t / sqrt(1 + t^2) at the step k whose noise-to-signal ratio sigma_k = s_k / a_k is t.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from itarflow.denoisers.score import named_ends
from itarflow.flow.embedding import NULL_LABEL
from itarflow.runtime.files import weights_digest
from itarflow.runtime.modules import frozen_view

Prediction = Literal["epsilon", "v_prediction", "sample"]
_TOLERANCE = 0.01  # so little beyond a schedule's end counts as its end: a DiT begins at 0.0100005, our t_min is 0.01


class DiffusionDenoiser:
    """A diffusion model as a denoiser at any noise level of its schedule, also between two of its steps.

    The model is not changed. Its weights are shared, not copied, and get no gradients; it computes in its own dtype. A
    model that is moved or cast afterwards needs a new denoiser. There is no guidance in it.

    Args:
        model: a `DiTTransformer2DModel`, a `UNet2DModel`, or any module with their signature,
            model(y (B, C, H, W), k (B,), class_labels=(B,)).sample, and these entries of their `config`: sample_size,
            in_channels, out_channels, and num_embeds_ada_norm or num_class_embeds. Without the last two it is called
            without class_labels. Of 2 * C channels that it returns, the second half, a learned variance, is dropped.
        scheduler: a scheduler of diffusers with `alphas_cumprod` and `config.prediction_type`, such as DDIMScheduler.
        null_label: index of "no label" among the num_class_embeds embeddings of a UNet, which must be the last; None =
            all of them are classes, and every image needs a label. A DiT's is known.
        slice_size: how many images are denoised at a time, which bounds the memory; None = all.

    Raises:
        ValueError: the scheduler is of another kind, or the model can't be evaluated between steps, or with
            labels.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",))
        >>> denoiser = DiffusionDenoiser(unet, DDPMScheduler())
        >>> denoiser(torch.randn(2, 3, 8, 8), None, torch.full((2,), 0.3)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: SchedulerMixin,
        *,
        null_label: int | None = None,
        slice_size: int | None = None,
    ) -> None:
        if slice_size is not None and slice_size < 1:
            raise ValueError(f"slice_size is {slice_size}; expected a number of images >= 1, or None for all.")
        self.prediction, self._log_sigmas, self._steps = _schedule(scheduler)
        self._config = getattr(model, "config", {})
        self._classes = _classes(self._config, null_label)
        _check_model(self._config)
        self.model = frozen_view(model)
        self.slice_size = slice_size
        self._checked: Tensor | None = None

    @property
    def identity(self) -> str:
        """A text that differs between denoisers that differ: in weights, schedule, prediction or null label."""
        schedule = {"log_sigmas": torch.as_tensor(self._log_sigmas), "steps": torch.as_tensor(self._steps)}
        return f"{weights_digest({**self.model.state_dict(), **schedule})} {self.prediction} {self._classes}"

    @property
    def noise_range(self) -> tuple[float, float]:
        """Smallest and largest noise level of the schedule: sigma of its first and of its last step."""
        return float(np.exp(self._log_sigmas[0])), float(np.exp(self._log_sigmas[-1]))

    def check(
        self, image_shape: tuple[int, int, int], num_classes: int, levels: Sequence[float], *, unlabelled: bool = False
    ) -> None:
        """See `CheckedDenoiser`: the model's in_channels, sample_size, classes and schedule decide."""
        channels, height, width = image_shape
        wanted, size = _setting(self._config, "in_channels"), _setting(self._config, "sample_size")
        if wanted not in (None, channels):
            raise ValueError(
                f"images of {channels} channels are to be denoised by a diffusion model for {wanted}; a model of "
                "codes goes with a flow that models codes, one of pixels with pixels."
            )
        side = tuple(size) if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        if size is not None and side != (height, width):
            raise ValueError(
                f"images of {height} x {width} are to be denoised by a diffusion model for {side[0]} x {side[1]}; "
                "choose one of the same size."
            )
        known = self._classes
        if known and num_classes not in (0, known.number):
            raise ValueError(
                f"labels of {num_classes} classes are to be given to a diffusion model with {known.number}; choose "
                "one of the same classes, or leave the labels out."
            )
        if known and (num_classes == 0 or unlabelled) and known.null is None:
            raise ValueError(_no_null_label(known.number))
        for name, level in named_ends(levels):
            self._check_levels(f"{name}: ", np.array([level]))

    @torch.no_grad()
    def __call__(
        self,
        noisy: Tensor,
        labels: Tensor | None,
        noise_level: Tensor | float,
        context: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """The model's estimate of the clean images, which stands in for Tweedie's (iTARFlow, table 7).

            y = a x_t,  a = 1 / sqrt(1 + t^2)
            x_0 = x_t - t eps(y, k),  or  a (y - t v(y, k)),  or  x_0(y, k)

        by what it predicts: "epsilon", "v_prediction" or "sample".

        Args:
            noisy: (B, C, H, W), clean images plus noise of standard deviation noise_level.
            labels: (B,) int64, -1 = none; None = none at all. A model without classes ignores them.
            noise_level: (B,) or one number, inside `noise_range`; up to 1 % beyond counts as its end. The values of a
                tensor on a GPU are not checked, since that would synchronise: `check` them before.
            context: not used; the model denoises without it.

        Returns:
            (B, C, H, W), float32, or float64 if noisy is.

        Raises:
            ValueError: a level outside the range, labels that the model does not have, or wrong shapes.
        """
        x = noisy.to(torch.promote_types(noisy.dtype, torch.float32))
        t = torch.as_tensor(noise_level).detach().reshape(-1)
        t = (t.cpu() if t.device.type == "mps" else t).double()  # which interpolation needs, and some devices lack
        if len(t) not in (1, len(x)):
            raise ValueError(f"noise_level has shape {tuple(t.shape)}; expected ({len(x)},), one an image.")
        if t.device.type == "cpu":  # elsewhere it would wait for the device
            self._check_levels("", t.numpy())
        t = t.expand(len(x))
        k = self._steps_at(t.log()).to(x)
        signal, level = ((1 + t.square()).rsqrt().to(x)[:, None, None, None], t.to(x)[:, None, None, None])
        y = signal * x
        mapped, size = self._mapped(labels, len(x), x.device), self.slice_size or max(len(x), 1)
        label_parts = itertools.repeat(None) if mapped is None else mapped.split(size)
        parts = zip(y.split(size), k.split(size), label_parts, strict=False)
        predicted = torch.cat([self._predict(*part) for part in parts])
        if self.prediction == "epsilon":
            return x - level * predicted
        if self.prediction == "v_prediction":
            return signal * (y - level * predicted)
        return predicted

    def _steps_at(self, log_sigma: Tensor) -> Tensor:
        """The steps (B,) at which log sigma_k is so much, (B,) float64, also between whole ones."""
        table = torch.from_numpy(np.stack([self._log_sigmas, self._steps]))
        known, steps = table.to(log_sigma.device, non_blocking=True)
        after = torch.searchsorted(known, log_sigma.contiguous()).clamp(1, len(known) - 1)
        slope = (steps[after] - steps[after - 1]) / (known[after] - known[after - 1])
        return (slope * (log_sigma - known[after - 1]) + steps[after - 1]).clamp(steps[0], steps[-1])

    def _predict(self, y: Tensor, k: Tensor, labels: Tensor | None) -> Tensor:
        """The model's output for y, without a learned variance, in y's precision."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), y.dtype)
        given = {} if labels is None else {"class_labels": labels}
        output = self.model(y.to(dtype), k, **given).sample
        channels = y.shape[1]
        if output.shape[0] != len(y) or output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the diffusion model returned shape {tuple(output.shape)} for images {tuple(y.shape)}; expected as "
                "many channels, or twice as many for a learned variance."
            )
        return output[:, :channels].to(y)

    def _check_levels(self, name: str, levels: np.ndarray) -> None:
        low, high = self.noise_range
        if not ((levels >= low * (1 - _TOLERANCE)) & (levels <= high * (1 + _TOLERANCE))).all():
            raise ValueError(
                f"{name}noise_level {levels.tolist()[:5]} lies outside [{low:.6g}, {high:.6g}], the noise levels of "
                "this diffusion model's schedule; choose t_max and t_min inside."
            )

    def _mapped(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """The model's own labels (B,) for ours; None for a model without classes."""
        if self._classes is None:
            return None
        classes, null = self._classes
        if labels is None:
            if null is None:
                raise ValueError(_no_null_label(classes))
            return torch.full((count,), null, device=device)
        if labels.device.type == "cpu" or labels is not self._checked:  # on a GPU once, since it waits for the device
            _check_labels(labels, count, self._classes)
            self._checked = labels
        return (labels if null is None else torch.where(labels == NULL_LABEL, null, labels)).to(device, torch.int64)


class _Classes(NamedTuple):
    number: int
    null: int | None
    """The model's index of "no label"; None = it has none."""


def _check_labels(labels: Tensor, count: int, known: _Classes) -> None:
    """Refuse labels that are not (count,) of the known classes."""
    if tuple(labels.shape) != (count,) or labels.is_floating_point():
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; expected ({count},) int64."
        )
    if not ((labels >= NULL_LABEL) & (labels < known.number)).all():
        raise ValueError(
            f"labels {labels.tolist()[:5]} are not all among the diffusion model's 0 .. {known.number - 1}, or "
            f"{NULL_LABEL} for no label."
        )
    if known.null is None and (labels == NULL_LABEL).any():
        raise ValueError(_no_null_label(known.number))


def _schedule(scheduler: SchedulerMixin) -> tuple[str, np.ndarray, np.ndarray]:
    """What the model predicts, log sigma_k and k, float64; steps without noise, or without signal, are left out.

    Raises:
        ValueError: it is no schedule of this kind.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise ValueError(
            f"a {kind} has no alphas_cumprod: it belongs to another kind of diffusion model, such as flow matching, "
            "whose noise levels are not known here. Expected the scheduler of a DDPM, such as DDIMScheduler."
        )
    prediction = _setting(config, "prediction_type")
    if prediction not in get_args(Prediction):
        raise ValueError(
            f"the scheduler's prediction_type is {prediction!r}; expected one of {', '.join(get_args(Prediction))}."
        )
    signal = torch.as_tensor(alphas_cumprod).cpu().double().numpy()
    steps = np.flatnonzero((signal > 0) & (signal < 1))
    log_sigmas = 0.5 * (np.log1p(-signal[steps]) - np.log(signal[steps]))
    if len(steps) < 2 or not (np.diff(log_sigmas) > 0).all():
        raise ValueError(
            f"the alphas_cumprod of this {kind} do not fall from step to step; expected a noise schedule."
        )
    return prediction, log_sigmas, steps.astype(np.float64)


def _classes(config: Any, null_label: int | None) -> _Classes | None:
    """The classes of a model, None if it has none."""
    of_dit, of_unet = _setting(config, "num_embeds_ada_norm"), _setting(config, "num_class_embeds")
    kind = _setting(config, "class_embed_type")
    if kind is not None:
        raise ValueError(f"the model's class_embed_type is {kind!r}; expected None: an embedding for each class.")
    last = of_dit if of_dit is not None else None if of_unet is None else of_unet - 1
    if null_label is not None and null_label != last:
        raise ValueError(f"null_label is {null_label}; expected the model's last label, {last}, or None.")
    if of_dit is not None:
        return _Classes(of_dit, of_dit)
    if of_unet is None:
        return None
    return _Classes(of_unet, None) if null_label is None else _Classes(of_unet - 1, null_label)


def _check_model(config: Any) -> None:
    """Refuse a model that can't be evaluated at fractional steps, or that returns another number of channels."""
    embedding = _setting(config, "time_embedding_type")
    if embedding not in (None, "positional"):
        raise ValueError(
            f"the model's time_embedding_type is {embedding!r}; expected 'positional', which is defined between "
            "two steps."
        )
    channels, out = _setting(config, "in_channels"), _setting(config, "out_channels")
    if channels is not None and out not in (None, channels, 2 * channels):
        raise ValueError(f"the model turns {channels} channels into {out}; expected {channels} or {2 * channels}.")


def _no_null_label(classes: int) -> str:
    return (
        f"images without a label are to be denoised by a diffusion model of {classes} classes that has no label for "
        "them; give every image a label (or, in Python, DiffusionDenoiser a null_label, if its last one means none)."
    )


def _setting(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
