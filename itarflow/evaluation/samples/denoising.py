"""Denoising variants: from noisy codes to images by a flow, a diffusion model or a decoder.

Images are generated once and denoised in all variants. This is the one place where an evaluation denoises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from itarflow.codec import Codec, codec_of
from itarflow.denoisers.diffusion import DiffusionDenoiser
from itarflow.denoisers.ode import DenoiseScheduler, denoise
from itarflow.denoisers.score import Denoiser, FlowDenoiser
from itarflow.flow.tarflow import TARFlow
from itarflow.pipeline.call import check_denoiser
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.files import weights_digest

VariantName = Literal["raw", "self", "iterative"]
VARIANTS: tuple[VariantName, ...] = ("raw", "self", "iterative")


@dataclass(frozen=True)
class Denoising:
    """A denoising variant: from noisy codes to images."""

    title: str
    """For tables and figures."""
    codec: Codec
    """Decodes what is denoised."""
    denoiser: Denoiser | None = None
    """None = the codes are left as they are."""
    schedule: DenoiseScheduler | None = None
    """The denoiser's schedule, from the noise level of the codes down; None without a denoiser."""
    by_decoder: bool = False
    """The codec denoises, so that there are no denoised codes."""

    def check(self, flow: TARFlow, labels: Tensor | None, level: float) -> None:
        """Refuse what does not suit images of a flow.

        Args:
            flow: generates the noisy codes.
            labels: (B,) int64, -1 = none; None = no image has one.
            level: noise level of the codes.

        Raises:
            ValueError: the schedule begins at another level, or the denoiser is for other images, classes or levels.
        """
        if self.denoiser is None or self.schedule is None:
            return
        if self.schedule.config.t_max != level:
            raise ValueError(
                f"{self.title} denoises from t_max {self.schedule.config.t_max}, but images are generated at {level}."
            )
        check_denoiser(self.denoiser, self.schedule, flow, labels)

    def denoised(
        self,
        noisy: Tensor,
        labels: Tensor | None,
        generators: Sequence[torch.Generator],
        context: Tensor | None = None,
    ) -> Tensor:
        """Codes (B, C, H, W) from noisy ones.

        Args:
            noisy: (B, C, H, W), on the denoiser's device.
            labels: (B,) int64 on the same, -1 = none; None = no image has one.
            generators: one an image, which are copied, not advanced: each variant draws the same noise.
            context: (B, T, E) of their prompts; None = there are none.
        """
        if self.denoiser is None or self.schedule is None:
            return noisy
        own = [generator.clone_state() for generator in generators]
        return denoise(self.denoiser, noisy, labels, self.schedule, generator=own, context=context)


def variants_of(
    pipe: ITARFlowPipeline,
    schedule: DenoiseScheduler,
    wanted: Sequence[VariantName] | None = None,
    *,
    denoiser: Denoiser | None = None,
    dtype: torch.dtype | None = None,
    slice_size: int | None = None,
    decode_size: int | None = None,
) -> dict[str, Denoising]:
    """The denoising variants of a checkpoint's samples, by the names of their folders.

    "raw": not at all, as the flow has made them. "self": by one step of the flow itself, as a TARFlow does.
    "iterative": by the schedule, as an iTARFlow does.

    Args:
        pipe: the checkpoint.
        schedule: from t_max down, of `pipe.schedule`.
        wanted: some of `VARIANTS`; None = all that apply: "iterative" needs a denoiser of a range of noise levels, and
            the method "skip" has only "raw".
        denoiser: denoises in "iterative"; None = the flow itself.
        dtype: of the flow's layers while it denoises; None = as in a call of the pipeline.
        slice_size: images that the flow denoises at a time; None = all that are given.
        decode_size: images that a VAE decodes at a time; None = all that are given.

    Raises:
        ValueError: a variant is wanted that does not apply.
    """
    codec, config = codec_of(pipe.vae, slice_size=decode_size), schedule.config
    variants = {"raw": Denoising("noisy", codec)}
    if config.method != "skip":
        own = pipe.flow_denoiser(slice_size, dtype)
        variants["self"] = Denoising("self", codec, own, one_step(schedule))
        several = pipe.flow.config.noise_conditioned and config.num_denoise_steps > 1
        if denoiser is not None or several:
            variants["iterative"] = Denoising("iterative", codec, denoiser or own, schedule)
    if wanted is not None and not wanted:
        raise ValueError(f"no denoising variant is named; expected some of {', '.join(variants)}, or leave it out.")
    for name in wanted or ():
        if name not in variants:
            raise ValueError(
                f"the samples have no denoising variant {name!r}: this checkpoint, by its schedule "
                f"({config.num_denoise_steps} steps, method {config.method}), knows {', '.join(variants)}."
            )
    return {name: variant for name, variant in variants.items() if wanted is None or name in wanted}


def one_step(schedule: DenoiseScheduler) -> DenoiseScheduler:
    """A single step from the same noise level, as a TARFlow denoises (TARFlow, equation 8)."""
    config = schedule.config
    return DenoiseScheduler(t_max=config.t_max, t_min=config.t_min, num_denoise_steps=1, clip=config.clip)


def identity_of(denoiser: Denoiser | None) -> str | None:
    """A text that identifies a denoiser: by weights and schedule, or by its type if it is of another kind."""
    if isinstance(denoiser, FlowDenoiser):
        return weights_digest(denoiser.flow.state_dict())
    if isinstance(denoiser, DiffusionDenoiser):
        return denoiser.identity
    return None if denoiser is None else type(denoiser).__name__


def settings_of(scheduler: DenoiseScheduler) -> dict[str, Any]:
    """The arguments that a scheduler was made of."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
