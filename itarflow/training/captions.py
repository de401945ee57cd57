"""What a training on captions needs besides images: their vectors for the flow, and the encoder for the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from itarflow.data.context import check_encoder
from itarflow.data.dataset import ImageDataset
from itarflow.data.images import spread_over
from itarflow.data.load import ImageData
from itarflow.data.loader import Batch, batches
from itarflow.runtime.errors import DataError, RunError
from itarflow.runtime.pipeline_index import ENCODER
from itarflow.runtime.processes import on_main
from itarflow.runtime.text import display_name, printable
from itarflow.text_encoder import TextEncoder, TextIdentity
from itarflow.training.recipe import Recipe

WITH_ENCODER = "with_text_encoder"
"""In a pipeline's record of its training: whether the encoder is in the pipeline."""


EXAMPLE = "example_prompt"
"""In the same record: a prompt for the model card."""
_LOOKED_AT, _LONGEST = 50, 120  # captions that may be an example, and characters of one


def vectors(recipe: Recipe, batch: Batch, device: torch.device) -> Tensor | None:
    """The context (b, T, E) of a batch's captions, in float32 on the device; None unless the flow takes captions."""
    if not recipe.model.takes_captions or batch.context is None:
        return None
    return batch.context.to(device, non_blocking=True).float()


def empty(data: ImageData, device: torch.device) -> Tensor | None:
    """The null context (1, T, E) in float32 on the device; None if the images have no captions."""
    return None if data.null_context is None else data.null_context[None].to(device).float()


def prompts_of(data: ImageData, indices: Sequence[int]) -> dict[str, Tensor]:
    """Arguments of a pipeline: the captions of these held-out images, or of training images if none are held out.

    Indices beyond the last image begin again with the first.
    """
    images = _shown(data)
    batch = next(batches(images, [[index % len(images) for index in indices]]))
    null_context = empty(data, torch.device("cpu"))
    if batch.context is None or null_context is None:
        raise DataError("the images have no captions to sample from")
    return {
        "prompt_embeds": batch.context.float(),
        "negative_prompt_embeds": null_context.expand(len(indices), -1, -1),
    }


def texts_of(data: ImageData, indices: Sequence[int]) -> list[str]:
    """The texts of these captions, which `prompts_of` has the vectors of, each on one line."""
    images = _shown(data)
    return [printable(" ".join(images.caption(index % len(images)).split())) for index in indices]


def spread_captions(data: ImageData, count: int) -> list[int]:
    """Indices of so many captions for `prompts_of`, spread over all: sets are often sorted by class."""
    total = len(_shown(data))
    return spread_over(total, count) if count <= total else [index % total for index in range(count)]


def _shown(data: ImageData) -> ImageDataset:
    """The images whose captions are sampled from."""
    return data.held_out if len(data.held_out) else data.train


def open_text_encoder(
    recipe: Recipe, data: ImageData, pipeline: Path, accelerator: Accelerator, say: Callable[[str], object]
) -> TextEncoder | None:
    """The text encoder that made the captions' vectors, on the CPU of the main process, for the pipeline.

    Args:
        recipe: may name it.
        data: whose captions have a card that names it, too, though not the folder where it was.
        pipeline: the folder where the run has shared its pipeline, with the encoder in it, if it is resumed.
        accelerator: of the training; all processes call this.
        say: prints a line.

    Returns:
        None without captions, on other processes, and, which is said, if the recipe names none, and neither is one in
        the pipeline nor the one that the card names at hand.

    Raises:
        RunError: the one that the recipe names can't be loaded, or is not the one that made the captions.
    """
    found: list[TextEncoder] = []

    def load() -> None:
        if data.captions is None:
            return
        card, reason = data.captions.card, "the captions name none"
        for name, revision in _places(recipe, card.encoder, pipeline):
            try:
                text = TextEncoder.from_pretrained(name, revision, card.encoder.max_tokens)
                check_encoder(card, str(recipe.data.path), text.identity)
            except (ImportError, OSError, ValueError) as error:
                if recipe.text.encoder is not None:
                    raise RunError(str(error)) from error
                reason = str(error)
            else:
                found.append(text)
                return
        say(
            "The pipeline will be without a text encoder: it takes prompt_embeds, but no prompts. To add it, name "
            f"the one that made the captions by --text.encoder, here or later with --resume. ({reason})"
        )

    on_main(accelerator, load)
    return found[0] if found else None


def _places(recipe: Recipe, card: TextIdentity, pipeline: Path) -> list[tuple[str, str | None]]:
    """Names and revisions under which the encoder may be found, the best first."""
    if recipe.text.encoder is not None:
        return [(recipe.text.encoder, recipe.text.revision or card.revision)]
    places: list[tuple[str, str | None]] = [(str(pipeline), None)] if (pipeline / ENCODER).is_dir() else []
    return places if card.name is None else [*places, (card.name, recipe.text.revision or card.revision)]


def example_prompt(data: ImageData) -> str:
    """A prompt to begin with: the caption of a class, if captions are made of these, or else of a held-out image."""
    template = "" if data.captions is None else data.captions.card.captions
    names = data.class_names
    if "{}" in template and names:
        return template.replace("{}", names[0])
    texts = texts_of(data, range(min(len(_shown(data)), _LOOKED_AT)))
    return next((text for text in texts if 0 < len(text) <= _LONGEST), "a photo")


def facts(data: ImageData, has_encoder: bool) -> dict[str, Any]:
    """What a pipeline's record of its training says of captions; {} without."""
    if data.captions is None:
        return {}
    card = data.captions.card
    name = None if card.encoder.name is None else display_name(card.encoder.name)
    return {
        "captions": card.captions,
        "captions_encoder": name,
        WITH_ENCODER: has_encoder,
        EXAMPLE: example_prompt(data),
    }
