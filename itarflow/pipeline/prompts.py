"""The prompts of a call: texts, or their vectors, one an image; and those of the unguided branch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.devices import clear_device_cache, is_out_of_memory
from itarflow.runtime.text import human_bytes
from itarflow.text_encoder import TextEncoder, checked_prompts

Prompt = str | Sequence[str] | None
"""One text, which is repeated, or as many as there are images."""


def takes_prompts(flow: TARFlow) -> bool:
    """Whether a flow is conditioned on vectors of texts; one of labels has classes."""
    return flow.config.context_dim > 0 and flow.config.num_classes == 0


class Contexts(NamedTuple):
    """The condition vectors of a call."""

    context: Tensor
    """(B, T, E) float32."""
    null_context: Tensor | None
    """(B, T, E) or (1, T, E), of the unguided branch; None = there is none."""


@dataclass(frozen=True)
class Prompts:
    """What a call was given, in diffusers' words; None = not given.

    Args:
        prompt: texts.
        prompt_embeds: their vectors (B, T, E) in the place of texts.
        negative_prompt: texts of the unguided branch; None = the empty one.
        negative_prompt_embeds: their vectors, (1, T, E) for all images or one a prompt.
    """

    prompt: Prompt = None
    prompt_embeds: Tensor | None = None
    negative_prompt: Prompt = None
    negative_prompt_embeds: Tensor | None = None

    def given(self) -> list[str]:
        """The names of what was given."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]

    def checked(self, flow: TARFlow, encoder: TextEncoder | None, guided: bool) -> Prompts:
        """The same with texts as lists, once all of it fits the flow.

        Args:
            flow: to be conditioned.
            encoder: of the texts; None = there is none, and vectors are needed.
            guided: whether the unguided branch is needed.

        Raises:
            ValueError: naming what is missing, given twice, of another width or length, or not finite.
        """
        for name in ("prompt", "negative_prompt"):
            if getattr(self, name) is not None and getattr(self, f"{name}_embeds") is not None:
                raise ValueError(f"{name} and {name}_embeds were given; expected one of them.")
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError(
                "prompt is missing: this flow makes images from prompts. Give prompt='a corgi on the beach', "
                "prompt='' for none in particular, or prompt_embeds."
            )
        texts = {name: _texts(name, getattr(self, name)) for name in ("prompt", "negative_prompt")}
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            _check_embeds(name, getattr(self, name), flow)
        if encoder is None and (named := [name for name, given in texts.items() if given is not None]):
            raise ValueError(
                f"{named[0]} was given, but this pipeline has no text encoder. Give {named[0]}_embeds, or load it "
                "with one: TextEncoder.from_pretrained(...), whose tokenizer and encoder are the arguments tokenizer "
                "and text_encoder of ITARFlowPipeline.from_pretrained."
            )
        unguided = self.negative_prompt_embeds if texts["negative_prompt"] is None else texts["negative_prompt"]
        if guided and encoder is None and unguided is None:
            raise ValueError(
                "negative_prompt_embeds is missing: guidance needs the vectors of the empty prompt, and this pipeline "
                "has no text encoder. Give them, or guidance_weight=0."
            )
        if unguided is not None and len(unguided) not in (1, self._count(texts["prompt"])):
            raise ValueError(
                f"{len(unguided)} negative prompts were given for {self._count(texts['prompt'])} prompts; expected "
                "one, or one each."
            )
        return replace(self, prompt=texts["prompt"], negative_prompt=texts["negative_prompt"])

    def rows(self, num_images: int | None, each: int | None) -> list[int]:
        """The number of the prompt of each image; of `checked` ones.

        Args:
            num_images: of all; None = one a prompt.
            each: images of a prompt, which follow one another; None = one.

        Raises:
            ValueError: as many prompts as images were expected, or num_images < 1.
        """
        count = self._count(self.prompt)
        if num_images is not None and (num_images < 1 or count not in (1, num_images)):
            raise ValueError(
                f"num_images is {num_images} for {count} prompts; expected a number >= 1, and a single prompt or as "
                "many prompts as images."
            )
        if num_images is not None and count == 1:
            return [0] * num_images
        return [row for row in range(count) for _ in range(each or 1)]

    def contexts(self, encoder: TextEncoder | None, guided: bool, device: torch.device | str) -> Contexts:
        """The vectors of `checked` prompts, one a prompt, float32 on the device.

        Args:
            encoder: of the texts.
            guided: whether the unguided branch is needed.
            device: of the flow.
        """
        context, null_context = self.prompt_embeds, self.negative_prompt_embeds if guided else None
        texts = list(self.prompt or []) if context is None else []
        others = list(self.negative_prompt or [""]) if guided and null_context is None else []
        if texts or others:
            assert encoder is not None
            vectors = encoded(encoder, [*texts, *others])
            context = vectors[: len(texts)] if context is None else context
            null_context = vectors[len(texts) :] if others else null_context
        assert context is not None
        null_context = None if null_context is None else null_context.to(device, torch.float32)
        return Contexts(context.to(device, torch.float32), null_context)

    def _count(self, texts: Prompt) -> int:
        return len(texts or [] if self.prompt_embeds is None else self.prompt_embeds)


def _texts(name: str, given: Prompt) -> list[str] | None:
    if given is None:
        return None
    try:
        return checked_prompts([given] if isinstance(given, str) else given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_embeds(name: str, given: Any, flow: TARFlow) -> None:
    if given is None:
        return
    expected = f"(B, {flow.config.context_tokens}, {flow.config.context_dim}), of the flow's tokens and width"
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name} is of the type {kind}; expected floating point numbers {expected}.")
    if given.ndim != 3 or not len(given) or given.shape[1:] != (flow.config.context_tokens, flow.config.context_dim):
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}; expected {expected}: the vectors of the text encoder that the "
            "flow was trained with, padded by zeros."
        )
    if not bool(given.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite; encode the prompts in float32 or bfloat16.")


def refuse_prompts(given: Sequence[str], flow: TARFlow) -> None:
    """Refuse prompts for a flow that takes none; raises ValueError."""
    if given:
        instead = "give class_labels" if flow.config.num_classes else "it takes no labels either: leave it out"
        raise ValueError(f"{given[0]} was given, but this flow makes no images from prompts; {instead}.")


def refuse_flow_of_prompts(flow: TARFlow, command: str) -> None:
    """Refuse a flow that takes prompts where there are none, before any work; raises ValueError."""
    if takes_prompts(flow):
        raise ValueError(
            f"this checkpoint makes images from prompts, which `itarflow {command}` does not take. `itarflow sample "
            "CHECKPOINT --prompt ...` makes images; in Python, ITARFlowPipeline takes prompts, and TARFlow.log_prob "
            "their vectors."
        )


def refuse_labels(class_labels: Any, prompts: Prompts) -> None:
    """Refuse labels for a flow that takes prompts; raises ValueError."""
    if class_labels is not None:
        count = 1 if isinstance(class_labels, str | int) else len(class_labels)
        many = f" ({count} of them)" if prompts.given() else ""
        raise ValueError(f"class_labels were given{many}, but this flow takes prompts; give prompt, and no labels.")


def encoded(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """The vectors (B, T, E) of texts; an encoder that `enable_model_cpu_offload` brings leaves the device at once.

    Raises:
        torch.OutOfMemoryError: not even one text fits, saying what to do.
    """
    try:
        return encoder.encode(texts)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            f"the text encoder ({_size(encoder)}) does not fit the memory beside the flow. Call "
            "pipe.enable_model_cpu_offload() in the place of pipe.to(device), which brings it there for the prompts "
            "alone, load it in bfloat16, or encode the prompts beforehand, on the CPU, by pipe.encode_prompt, and "
            "give them as prompt_embeds."
        ) from error
    finally:
        _take_away(encoder.encoder)


def encoded_on(encoder: TextEncoder, texts: Sequence[str], device: str | torch.device) -> Tensor:
    """The vectors (B, T, E) of texts, on the CPU; the encoder is on the device meanwhile, and on the CPU at the end.

    If it does not fit there, the texts are read on the CPU, with a warning.
    """
    try:
        return encoder.to(device).encode(texts).cpu()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or torch.device(device).type == "cpu":
            raise
    finally:
        encoder.to("cpu")
        clear_device_cache()
    warnings.warn(
        f"the text encoder ({_size(encoder)}) does not fit the memory of {device}; the prompts are read on the CPU.",
        stacklevel=2,
    )
    return encoder.encode(texts)


def _size(encoder: TextEncoder) -> str:
    return human_bytes(sum(p.numel() * p.element_size() for p in encoder.encoder.parameters()))


def _take_away(module: nn.Module) -> None:
    if (hook := getattr(module, "_hf_hook", None)) is not None:
        hook.init_hook(module)  # of accelerate, by which it waits on the CPU
        clear_device_cache()


def text_encoder_of(text_encoder: Any, tokenizer: Any, flow: TARFlow) -> TextEncoder | None:
    """The two components of a pipeline as one; None if there are none.

    Raises:
        ImportError: transformers is not installed.
        ValueError: one of them is missing, of another kind, or of another width than the flow's, or the flow takes no
            prompts.
    """
    if text_encoder is None and tokenizer is None:
        return None
    if text_encoder is None or tokenizer is None:
        missing, there = ("tokenizer", "text_encoder") if tokenizer is None else ("text_encoder", "tokenizer")
        raise ValueError(f"{there} was given without {missing}; expected both, or none.")
    if not takes_prompts(flow):
        raise ValueError("text_encoder was given, but this flow takes no prompts; leave it out.")
    encoder = TextEncoder(tokenizer, text_encoder, flow.config.context_tokens)
    if encoder.dim != flow.config.context_dim:
        raise ValueError(
            f"the text encoder gives vectors of {encoder.dim}, but the flow takes vectors of "
            f"{flow.config.context_dim}; expected the encoder that the flow was trained with."
        )
    return encoder
