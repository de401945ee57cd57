"""Prompts as options of the commands that make images, and what of a checkpoint an image is made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from itarflow.commands.class_labels import MOST_IMAGES, chosen_labels, class_name
from itarflow.data.images import spread_over, square_side
from itarflow.data.load import DataConfig, load_splits
from itarflow.evaluation.samples.prompts import SamplePrompts
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.pipeline.prompts import encoded_on, text_encoder_of
from itarflow.runtime.text import file_name, human_bytes, printable
from itarflow.text_encoder import TextEncoder

Prompts = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
"""The option --prompt: one text or several after it, and more than once; see `listed_prompts`."""
_LARGEST_FILE = 64 * 2**20
_LONGEST_NAME = 60
"""Characters of a prompt in the name of a file."""
_MOST_BYTES = 180
"""Of these; file systems take names of 255 bytes, of which a file has some more until it is whole."""


@dataclass(frozen=True)
class Subjects:
    """What images are made from, one an image: labels, or prompts."""

    labels: list[int | None]
    """None = no label."""
    prompts: list[str] | None
    """None = images are made from labels."""
    names: list[str]
    """Of the labels, or the prompts; "" for none."""

    def __len__(self) -> int:
        return len(self.names)

    def facts(self) -> dict[str, str]:
        """For the file of all images."""
        if self.prompts is not None:
            return {"prompts": json.dumps(self.prompts)}
        return {"labels": ", ".join(name or "none" for name in self.names)}

    def facts_of(self, index: int) -> dict[str, str]:
        """For the file of an image."""
        if self.prompts is not None:
            return {"prompt": self.prompts[index]}
        return {"label": self.names[index] or "none"}

    def file(self, index: int) -> str:
        """The name of that file."""
        name = "" if self.prompts is None else file_name(self.prompts[index])[:_LONGEST_NAME]
        name = name.encode()[:_MOST_BYTES].decode(errors="ignore").strip("-")
        return f"{index:06d}{'-' if name else ''}{name}.png"


def subjects_of(
    pipe: ITARFlowPipeline, class_labels: Sequence[str] | None, prompts: Sequence[str] | None, num_images: int | None
) -> Subjects:
    """What each image is made from, as the options of a command say.

    Args:
        pipe: makes the images.
        class_labels: see `chosen_labels`.
        prompts: repeated in turn.
        num_images: None = one a prompt, or as `chosen_labels` says.

    Raises:
        ValueError: labels for a checkpoint that takes prompts, prompts for one that takes none, there are no prompts,
            or no image is asked for.
    """
    if not pipe.takes_prompts:
        if prompts is not None:
            labelled = pipe.flow.config.num_classes and class_labels is None
            instead = "give --class-labels" if labelled else "leave it out"
            raise ValueError(f"--prompt was given, but this checkpoint makes no images from prompts; {instead}.")
        labels = chosen_labels(pipe, class_labels, num_images)
        return Subjects(labels, None, [class_name(pipe, label) for label in labels])
    if class_labels is not None:
        instead = "leave them out" if prompts else "give --prompt"
        raise ValueError(f"--class-labels were given, but this checkpoint takes prompts; {instead}.")
    if not prompts:
        raise ValueError(
            "this checkpoint makes images from prompts; give one, such as --prompt 'a corgi on the beach', or "
            "--prompt '' for none in particular."
        )
    count = len(prompts) if num_images is None else num_images
    if not 1 <= count <= MOST_IMAGES:
        raise ValueError(f"--num-images is {count}; expected a number >= 1, and at most {MOST_IMAGES:,}.")
    chosen = [prompts[index % len(prompts)] for index in range(count)]
    return Subjects([None] * count, chosen, [printable(prompt).replace("\n", " ") for prompt in chosen])


def listed_prompts(given: Sequence[Sequence[str]]) -> list[str]:
    """The texts of the option --prompt in order."""
    return list(chain.from_iterable(given))


def prompts_in(path: Path) -> list[str]:
    """The prompts in a file, one a line, where a blank line is the empty prompt, but at the end.

    Raises:
        OSError: it can't be read.
        ValueError: there is no such file, or it is no text in UTF-8, too large, or empty.
    """
    if not path.exists() or path.is_dir():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"--prompts {path} {what}; expected a text file with one prompt a line.")
    try:
        with path.open("rb") as file:  # of any kind, such as /dev/stdin
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"--prompts {path} is too large; expected at most {human_bytes(_LARGEST_FILE)}.")
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is no text in UTF-8 ({error}); expected one prompt a line.") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"--prompts {path} is empty; expected one prompt a line.")
    return lines


def put_encoder(pipe: ITARFlowPipeline, name: str) -> None:
    """Give a pipeline another text encoder, by name.

    Raises:
        ImportError: transformers is not installed.
        OSError: it can't be loaded.
        ValueError: it does not fit the flow.
    """
    if not pipe.takes_prompts:
        raise ValueError(f"--text-encoder {name} is for prompts, which this checkpoint does not take; leave it out.")
    other = TextEncoder.from_pretrained(name, max_tokens=pipe.flow.config.context_tokens)
    text_encoder_of(other.encoder, other.tokenizer, pipe.flow)  # raises ValueError if it does not fit
    pipe.register_modules(text_encoder=other.encoder, tokenizer=other.tokenizer)


def take_encoder(pipe: ITARFlowPipeline) -> TextEncoder:
    """The text encoder of a pipeline, which is left without, so that the two need not lie beside on a device.

    Raises:
        ValueError: there is none.
    """
    encoder = text_encoder_of(pipe.text_encoder, pipe.tokenizer, pipe.flow)
    if encoder is None:
        known = (pipe.config.training or {}).get("captions_encoder")
        named = f"it was trained with {printable(str(known))}" if known else "such as google/flan-t5-xl for STARFlow's"
        raise ValueError(
            f"this checkpoint has no text encoder; name the one of its training by --text-encoder ({named})."
        )
    pipe.register_modules(text_encoder=None, tokenizer=None)
    return encoder


@dataclass(frozen=True)
class Encoded:
    """The vectors of the prompts of images, on the CPU, each text once."""

    vectors: Tensor
    """(U, T, E), and those of the empty prompt at the end."""
    rows: list[int]
    """Of the prompt of each image."""

    def of(self, part: slice) -> dict[str, Any]:
        """Arguments of a call of the pipeline for some of the images."""
        return {"prompt_embeds": self.vectors[self.rows[part]], "negative_prompt_embeds": self.vectors[-1:]}


def encode_once(encoder: TextEncoder, prompts: Sequence[str], device: str | torch.device) -> Encoded:
    """Encode the prompts of images, and the empty one, on a device, of which the encoder is gone at the end."""
    texts = list(dict.fromkeys(prompts))
    place = {text: row for row, text in enumerate(texts)}
    vectors = encoded_on(encoder, [*texts, ""], device)
    return Encoded(vectors, [place[text] for text in prompts])


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompts of samples that are compared with real images."""

    captions: str | None = None
    """Of a checkpoint that takes prompts: those are the captions of the real images of --data, a column of texts, or a
    template for the name of the class, such as "a photo of a {}"; of as many images as there are samples, evenly
    spaced."""
    prompts: Path | None = None
    """In place of --captions: a file with one prompt a line, which the samples take in turn; a blank line is the empty
    prompt."""
    text_encoder: str | None = None
    """The text encoder of such a checkpoint, if it holds none: a folder or a Hub id of a T5."""

    def check_prompts(self, data: str | None) -> None:
        """Check what needs no checkpoint; raises OSError or ValueError."""
        if self.captions is not None and self.prompts is not None:
            raise ValueError("--captions and --prompts were given; expected one of them.")
        if self.captions is not None and data is None:
            raise ValueError("--captions are those of the images of --data, which was not given; give --prompts FILE.")
        if self.prompts is not None:
            _ = self._prompts

    @cached_property
    def _prompts(self) -> Sequence[str]:
        return [] if self.prompts is None else prompts_in(self.prompts)  # read once: it may be a pipe

    def prompts_of(self, data: DataConfig, shape: tuple[int, int, int], count: int) -> SamplePrompts:
        """The prompts of so many samples.

        Args:
            data: the real images.
            shape: (C, H, W) of the samples.
            count: of samples.

        Raises:
            DataError: the images have no such captions, or some lack one.
        """
        if self.prompts is not None:
            return SamplePrompts(self._prompts)
        if self.captions is None:
            return SamplePrompts()
        texts = _captions(data, self.captions, square_side(shape), shape[0])
        return SamplePrompts([texts[index] for index in spread_over(len(texts), min(len(texts), count))])

    def told(self) -> dict[str, str]:
        """What a report says of them; {} if there are none."""
        named = {"captions": self.captions, "prompts": None if self.prompts is None else self.prompts.name}
        return {key: value for key, value in named.items() if value is not None}


@lru_cache(maxsize=1)  # asked for more than once, of what may be a large set
def _captions(data: DataConfig, captions: str, size: int, channels: int) -> Sequence[str]:
    found = load_splits(data, [data.split], image_size=size, in_channels=channels, captions=captions).captions
    assert found is not None
    return found[data.split]
