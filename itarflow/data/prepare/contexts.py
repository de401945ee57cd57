"""Captions of a made data set: what is to be encoded, how much room it takes, and the vectors of each row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from rich.console import Console

from itarflow.data.codes import NULL_CONTEXT
from itarflow.data.context import CAPTION, CONTEXT, ContextCard, read_null_context, to_bytes, write_null_context
from itarflow.data.images import spread_over
from itarflow.data.made import Manifest
from itarflow.data.prepare.manifest import SourceConfig, refuse_changes
from itarflow.data.prepare.shards import ROW_GROUP, Content, Shard
from itarflow.runtime.files import file_sha256
from itarflow.runtime.text import display_name, human_bytes, printable
from itarflow.text_encoder import TextEncoder

FEATURES = datasets.Features({CONTEXT: datasets.Value("binary"), CAPTION: datasets.Value("string")})
"""The columns of captions."""
_AHEAD = 8 * ROW_GROUP  # rows whose new captions are encoded at a time, sorted by their length
_BATCH, _STEP = 32, 16  # captions that go through the encoder at once; tokens by which their length is rounded up
_GROUPS = 64  # that are looked at for the estimate


@dataclass(frozen=True)
class Captions:
    """The captions of a data set, and what makes vectors of them.

    Attributes:
        encoder: on the CPU, until `to` moves it.
        card: of the vectors, unfinished.
        texts: of each image, by split.
    """

    encoder: TextEncoder
    card: ContextCard
    texts: Mapping[str, Sequence[str]]

    @property
    def depends(self) -> dict[str, Any]:
        """What files depend on: not where the encoder is from."""
        return {"context": self.card.to_json() | {"encoder": asdict(replace(self.card.encoder, name="", revision=""))}}

    @cached_property
    def estimate(self) -> Estimate:
        """What they take, by some of them."""
        groups = [texts[first : first + ROW_GROUP]
                  for texts in self.texts.values() for first in range(0, len(texts), ROW_GROUP)]  # fmt: skip
        looked_at = [groups[index] for index in spread_over(len(groups), min(len(groups), _GROUPS))]
        distinct = list(dict.fromkeys(text for group in looked_at for text in group))
        lengths = dict(zip(distinct, self._lengths(distinct), strict=True))
        limit = self.card.encoder.max_tokens
        images = [text for group in looked_at for text in group]
        long = [text for text in images if lengths[text] > limit]
        # A row group of a file holds equal captions once.
        tokens = sum(min(lengths[text], limit) for group in looked_at for text in set(group))
        return Estimate(
            looked_at=len(images),
            tokens=sum(min(lengths[text], limit) for text in images) / max(len(images), 1),
            image_bytes=2 * self.card.encoder.dim * tokens / max(len(images), 1),
            cut=len(long),
            example=long[0] if long else "",
        )

    def say(self, console: Console | None) -> None:
        """Print what is to be encoded, and warn of captions that are cut; None = nowhere."""
        if console is None:
            return
        found, (tokens, dim) = self.estimate, self.card.shape
        total = sum(map(len, self.texts.values()))
        lines = [
            f"captions: {found.tokens:.1f} of at most {tokens} vectors of {dim} for an image on average, about "
            f"{human_bytes(found.image_bytes * total)} in all"
        ]
        if found.cut:
            looked_at = " that were looked at" * (found.looked_at < total)
            lines.append(
                f"WARNING: {found.cut:,} of {found.looked_at:,} captions{looked_at} have more than {tokens} tokens "
                f"and are cut, such as {found.example[:200]!r}; --context-tokens is how many are kept"
            )
        console.print("\n".join(map(printable, lines)), markup=False, highlight=False, soft_wrap=True)

    def beside(
        self, rows: Iterable[dict[str, Any] | str], shard: Shard, cut: Callable[[int], object]
    ) -> Iterator[dict[str, Any] | str]:
        """The rows of a file, each with its caption and vectors. Texts say why an image is left out.

        Args:
            rows: of the file, in order.
            shard: the file.
            cut: called with 1 for each row whose caption is cut, and with 0 for the others.
        """
        for row, (caption, is_cut) in zip(rows, self._rows(shard), strict=True):
            if isinstance(row, str):
                yield row
            else:
                cut(int(is_cut))
                yield row | caption

    def _rows(self, shard: Shard) -> Iterator[tuple[dict[str, Any], bool]]:
        """Caption and vectors of each row of a file, and whether it is cut; each distinct caption is encoded once."""
        texts = self.texts[shard.split][shard.rows.start : shard.rows.stop]
        last = {text: row for row, text in enumerate(texts)}
        held = dict[str, bytes]()
        long = set[str]()
        for first in range(0, len(texts), _AHEAD):
            part = texts[first : first + _AHEAD]
            new = [text for text in dict.fromkeys(part) if text not in held]
            lengths = self._lengths(new)
            long |= {text for text, length in zip(new, lengths, strict=True) if length > self.encoder.max_tokens}
            held |= self._encoded(new, lengths)
            for row, text in enumerate(part, first):
                yield {CAPTION: text, CONTEXT: held[text]}, text in long
                if last[text] == row:
                    del held[text]

    def _encoded(self, texts: Sequence[str], lengths: Sequence[int]) -> dict[str, bytes]:
        """The vectors of texts as they are stored. Those of about equal length go together: padding is work, too."""
        limit, found = self.encoder.max_tokens, dict[str, bytes]()
        by_length: dict[int, list[str]] = {}
        for text, length in zip(texts, lengths, strict=True):
            by_length.setdefault(min(-(-length // _STEP) * _STEP, limit), []).append(text)
        for length, group in sorted(by_length.items()):
            encoder = self._encoder(length)
            for first in range(0, len(group), _BATCH):
                part = group[first : first + _BATCH]
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "a prompt of")  # that it is cut: it was said for all of them
                    vectors = encoder.encode(part)
                found |= {text: to_bytes(one) for text, one in zip(part, vectors, strict=True)}
        return found

    def _encoder(self, tokens: int) -> TextEncoder:
        """The encoder, for texts of fewer tokens."""
        return TextEncoder(self.encoder.tokenizer, self.encoder.encoder, tokens)

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.encoder.tokenizer(list(texts), verbose=False).input_ids] if texts else []


class Estimate(NamedTuple):
    """What captions take, by a sample of all of them.

    Attributes:
        looked_at: images of the sample.
        tokens: of a caption, on average.
        image_bytes: of an image, on average, as equal captions near each other are stored once.
        cut: images of the sample whose caption is too long.
        example: the first of these captions, or "".
    """

    looked_at: int
    tokens: float
    image_bytes: float
    cut: int
    example: str


def plan_captions(
    config: SourceConfig,
    texts: Mapping[str, Sequence[str]] | None,
    stored: Manifest | None,
    dtype: torch.dtype = torch.float32,
) -> Captions | None:
    """Load the text encoder, and look whether it is the one that a folder was begun with; None without captions.

    Args:
        config: names it.
        texts: of each image, by split; None = no captions.
        stored: what the folder holds already; None = nothing.
        dtype: of its weights: float32 or bfloat16, as T5 overflows in float16.

    Raises:
        DataError: another encoder.
        OSError: there is no such encoder.
        ImportError: transformers is not installed.
    """
    if texts is None or config.captions is None:
        return None
    encoder = TextEncoder.from_pretrained(
        config.text_encoder, config.text_encoder_revision, config.context_tokens, dtype
    )
    identity = replace(encoder.identity, name=display_name(config.text_encoder))
    card = ContextCard(encoder=identity, captions=config.captions)
    if stored is not None and stored.context is not None:
        changes = stored.context.encoder.differences(identity)
        refuse_changes(config.out, "another text encoder", [printable(change) for change in changes])
    return Captions(encoder, card, texts)


def begin_captions(captions: Captions | None, out: Path) -> None:
    """Write the vectors of the empty caption, unless they are there.

    Raises:
        DataError: those that are there are damaged.
        OSError: they can't be written.
    """
    if captions is not None:
        if not (out / NULL_CONTEXT).exists():
            write_null_context(out, captions.encoder.encode([""])[0])
        read_null_context(out, captions.card.shape)


def finished_card(captions: Captions | None, out: Path, contents: Mapping[Shard, Content]) -> ContextCard | None:
    """The card once all files are there: it says how many captions were cut, and which file has the empty one.

    Raises:
        DataError: the empty caption is missing or damaged.
    """
    if captions is None:
        return None
    read_null_context(out, captions.card.shape)
    cut = sum(int(content.notes.get("cut", 0)) for content in contents.values())
    return replace(captions.card, cut=cut, null_context=file_sha256(out / NULL_CONTEXT))
