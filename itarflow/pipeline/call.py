"""A call of the pipeline: its checked arguments, the images that they make, and the types of its output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from PIL import Image
from torch import Tensor, nn

from itarflow.codec import Codec, to_pil
from itarflow.denoisers.ode import DenoiseScheduler, denoise, noise_levels
from itarflow.denoisers.score import CheckedDenoiser, Denoiser, FlowDenoiser
from itarflow.flow.tarflow import TARFlow
from itarflow.inverse.guidance import Guidance
from itarflow.inverse.solvers import Solver
from itarflow.pipeline.labels import label_list
from itarflow.pipeline.prompts import Contexts, takes_prompts

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Call:
    """The checked arguments of a call, with the checkpoint's defaults filled in."""

    labels: Tensor | None
    """(B,) int64 on the flow's device; None = all unlabelled."""
    generators: list[torch.Generator]
    """B, one an image."""
    guidance: Guidance
    solver: Solver | Sequence[Solver]
    inverse_dtype: torch.dtype | None
    denoiser: Denoiser
    build_denoiser: Callable[[], Denoiser]
    """Gives another one, for a flow that has moved."""
    schedule: DenoiseScheduler
    codec: Codec
    """Decodes what the flow models to the output."""
    context: Tensor | None = None
    """(B, T, E) on the flow's device, of prompts; None = the flow takes none."""
    null_context: Tensor | None = None
    """(B, T, E) or (1, T, E), of the unguided branch; None = there is none."""

    @property
    def evaluations(self) -> int:
        """Of the denoiser, for each image."""
        config = self.schedule.config
        return 0 if config.method == "skip" else config.num_denoise_steps

    def part(self, chunk: slice) -> Call:
        """The same for some of the images."""
        labels = None if self.labels is None else self.labels[chunk]
        context = None if self.context is None else self.context[chunk]
        null = self.null_context
        null = null if null is None or len(null) == 1 else null[chunk]
        return replace(self, labels=labels, generators=self.generators[chunk], context=context, null_context=null)

    def with_contexts(self, contexts: Contexts, rows: Sequence[int]) -> Call:
        """The same from prompts, of which each image has the one of that row."""
        chosen = torch.tensor(rows, device=contexts.context.device)
        null = contexts.null_context
        null = null if null is None or len(null) == 1 else null[chosen]
        return replace(self, context=contexts.context[chosen], null_context=null)


def generate(flow: TARFlow, call: Call, advance: Callable[[int], None]) -> Tensor:
    """The images (B, C, H, W) of a call, all at once: noise -> inverse of the flow -> denoising -> decoding.

    Args:
        flow: generates.
        call: what to make.
        advance: called with the number of steps done, tokens of the inverse and evaluations of the denoiser.
    """
    own = call.generators

    def counted(noisy: Tensor, labels: Tensor | None, noise_level: Tensor, **context: Tensor) -> Tensor:
        clean = call.denoiser(noisy, labels, noise_level, **context)
        advance(1)
        return clean

    noisy = flow.inverse(
        flow.sample_prior(len(own), own),
        call.labels,
        call.schedule.config.t_max,
        context=call.context,
        null_context=call.null_context,
        guidance=call.guidance,
        solver=call.solver,
        dtype=call.inverse_dtype,
        progress=advance,
    )
    return call.codec.decode(denoise(counted, noisy, call.labels, call.schedule, generator=own, context=call.context))


def check_denoiser(denoiser: Denoiser, scheduler: DenoiseScheduler, flow: TARFlow, labels: Tensor | None) -> None:
    """Refuse what the denoiser can't denoise, before anything is generated.

    Args:
        denoiser: not checked unless it is a `CheckedDenoiser`.
        scheduler: the noise levels at which it will be evaluated.
        flow: makes the noisy images.
        labels: (B,) their labels, -1 = none; None = all without.

    Raises:
        ValueError: naming what was asked for and what the denoiser supports.
    """
    config = scheduler.config
    if isinstance(denoiser, FlowDenoiser) and config.method != "skip":
        _check_context(denoiser.flow, flow)
    elif takes_prompts(flow) and config.method != "skip" and not _takes_context(denoiser):
        raise ValueError(
            f"the denoiser ({type(denoiser).__name__}) has no argument context, but this flow makes images from "
            "prompts; expected denoiser(noisy, labels, noise_level, context=...), where context is their vectors "
            "(B, T, E)."
        )
    if isinstance(denoiser, CheckedDenoiser) and config.method != "skip":
        levels = noise_levels(config.t_max, config.t_min, config.num_denoise_steps, config.spacing)[:-1]
        num_classes, unlabelled = (0, True) if labels is None else (flow.config.num_classes, bool((labels < 0).any()))
        denoiser.check(flow.image_shape, num_classes, levels, unlabelled=unlabelled)


def _takes_context(denoiser: Denoiser) -> bool:
    called: Any = denoiser.forward if isinstance(denoiser, nn.Module) else denoiser
    try:
        inspect.signature(called).bind(None, None, None, context=None)
    except TypeError:
        return False
    except ValueError:  # of what is built in, which tells no signature
        pass
    return True


def _check_context(denoising: TARFlow, flow: TARFlow) -> None:
    """Refuse a denoising flow for other prompts than the generating one's; raises ValueError."""
    own, given = (
        (one.config.context_tokens, one.config.context_dim) if takes_prompts(one) else None
        for one in (denoising, flow)
    )
    if own != given:
        told = ["no prompts" if one is None else f"prompts of {one[0]} vectors of {one[1]}" for one in (own, given)]
        raise ValueError(
            f"the denoising flow takes {told[0]}, but the generating one {told[1]}; choose a flow of the same prompts."
        )


def positive(name: str, value: int | None) -> int | None:
    """The value of a setting of that name, unless it is below 1.

    Raises:
        ValueError: it is.
    """
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; expected a number >= 1, or None.")
    return value


def in_our_words(words: Mapping[str, Any], given: Mapping[str, Any], prompted: bool = False) -> dict[str, Any]:
    """Arguments of a call in diffusers' words -> arguments of `ITARFlowPipeline`.

        num_inference_steps = n     num_denoise_steps = n
        guidance_scale = s          guidance_weight = s - 1
        num_images_per_prompt = n   n images of each label or prompt, which follow one another

    Args:
        words: what was given beyond the pipeline's own arguments.
        given: those of its own that may be asked for in both ways; None = not given.
        prompted: whether images are made from prompts, so that `num_images_per_prompt` is not of labels.

    Raises:
        ValueError: something is asked for twice, or out of its range, or `callback_on_step_end`, which is not called.
        TypeError: a word that is known to neither.
    """
    ours = {"num_inference_steps": "num_denoise_steps", "guidance_scale": "guidance_weight"}
    if words.get("callback_on_step_end") is not None:
        raise ValueError(
            "callback_on_step_end is not called here, where most steps are tokens of the flow's inverse; to follow "
            "the denoising, call the pipeline with method='skip' and output_type='codes', then itarflow.denoise with "
            "a callback."
        )
    found: dict[str, Any] = {}
    for word, value in words.items():
        if word not in (*ours, "num_images_per_prompt", "callback_on_step_end", "callback_on_step_end_tensor_inputs"):
            close = get_close_matches(
                word, [*given, *ours, "class_labels", "prompt", "denoiser", "solver", "batch_size"], 1
            )
            raise TypeError(
                f"{word!r} is no argument of this pipeline" + (f"; is {close[0]!r} meant?" if close else ".")
            )
        if word in ours and value is not None:
            if given[ours[word]] is not None:
                raise ValueError(f"{word} and {ours[word]} are the same; give one of them.")
            found[ours[word]] = value
    if (scale := found.get("guidance_weight")) is not None:
        if not scale >= 1:
            raise ValueError(f"guidance_scale is {scale}; expected a number >= 1, where 1 turns guidance off.")
        found["guidance_weight"] = scale - 1
    repeats = words.get("num_images_per_prompt")
    if repeats is not None:
        labels, count = given["class_labels"], given["num_images"]
        if count is not None:
            raise ValueError(
                "num_images_per_prompt is images of each label or prompt, and num_images of all; give one of them."
            )
        positive("num_images_per_prompt", repeats)
        if not prompted:
            found["class_labels"] = [label for label in label_list(labels, None) for _ in range(repeats)]
    return found


def check_output(output_type: str, channels: int) -> None:
    """Refuse an unknown output type, or one that can't hold that many channels.

    Raises:
        ValueError: naming the output types.
    """
    if output_type not in ("pil", "np", "pt", "codes"):
        raise ValueError(f"output_type is {output_type!r}; expected 'pil', 'np', 'pt' or 'codes'.")
    if output_type == "pil" and channels not in (1, 3):
        raise ValueError(
            f"output_type 'pil' makes images of 1 or 3 channels, but this pipeline's images have {channels}; "
            "use 'pt', 'np' or, if they are codes of a VAE that is not in it, 'codes'."
        )


def converted(images: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image.Image]:
    """(B, C, H, W) in [-1, 1], or codes as they are -> the output type; warns of images that are not finite."""
    broken = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if broken:
        logger.warning(
            f"Images {broken} contain NaN or infinite values: the flow's inverse or the denoising diverged. Less "
            "guidance or float32 weights often help."
        )
    if output_type == "pil":
        return to_pil(images)
    return images if output_type == "codes" else VaeImageProcessor().postprocess(images, output_type)
