"""Captions beside images or codes: the condition vectors that a text encoder has made of them, and the card of these.

Each row has the caption as text, and its vectors as bytes: bfloat16, little-endian, (L, E), of its L tokens alone.
Read, they are padded with zero vectors to T. `null_context.safetensors` holds those of the empty caption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from itarflow.data.codes import CARD, NULL_CONTEXT, PREPARED, folder_of_cards
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import atomically, file_sha256
from itarflow.runtime.json_file import read_json
from itarflow.runtime.text import printable
from itarflow.text_encoder import TextIdentity

CAPTION, CONTEXT = "caption", "context"
"""Columns of the text and of its vectors."""
_TENSOR = "null_context"
_EXPONENT = np.int16(0x7F80)  # of a bfloat16: all of its bits are set in what is not finite


class CaptionError(DataError):
    """Captions are missing, or not of the vectors that a model takes; the caller adds how to do without."""


@dataclass(frozen=True, kw_only=True)
class ContextCard:
    """What the condition vectors of a data set are."""

    encoder: TextIdentity
    """Of the text encoder; of a folder, its name is the last part."""
    captions: str
    """The column that they are from, or the template with {} for the name of the class."""
    cut: Annotated[int, Meta(ge=0)] = 0
    """Images whose caption has more than T tokens, of which only the first T count."""
    null_context: str = ""
    """SHA-256 of the file of the empty caption; "" until finished."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, E) of the vectors of a caption."""
        return self.encoder.max_tokens, self.encoder.dim

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass(frozen=True)
class ContextDecoder:
    """Makes the vectors of a row's caption.

    Attributes:
        tokens: T, at most.
        dim: E.
    """

    tokens: int
    dim: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are read; the text is a part of what the data set is."""
        return CONTEXT, CAPTION

    def __call__(self, row: Mapping[str, Any]) -> Tensor:
        """bfloat16 (L, E), of the caption's own tokens, 1 <= L <= T.

        Raises:
            DataError: bytes of another length, or values that are not finite.
        """
        data = row[CONTEXT]["bytes"] if isinstance(row[CONTEXT], Mapping) else row[CONTEXT]
        of_token = 2 * self.dim
        if not isinstance(data, bytes) or not data or len(data) % of_token or len(data) > self.tokens * of_token:
            found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
            raise DataError(
                f"column {CONTEXT!r} holds {found}; expected bfloat16 of 1 to {self.tokens} vectors of {self.dim}, so "
                f"a multiple of {of_token} bytes"
            )
        bits = np.frombuffer(data, "<i2").astype(np.int16)
        if ((bits & _EXPONENT) == _EXPONENT).any():
            raise DataError(f"column {CONTEXT!r} holds values that are not finite")
        return torch.from_numpy(bits).view(torch.bfloat16).reshape(-1, self.dim)

    def padded(self, contexts: Sequence[Tensor]) -> Tensor:
        """The vectors of B captions, each (L, E), as one bfloat16 (B, T, E), with zeros behind them."""
        result = torch.zeros(len(contexts), self.tokens, self.dim, dtype=torch.bfloat16)
        for place, context in zip(result, contexts, strict=True):
            place[: len(context)] = context
        return result


def to_bytes(vectors: Tensor) -> bytes:
    """Vectors of a caption (T, E) as a data set stores them: without the zero vectors at their end."""
    rounded = vectors.cpu().to(torch.bfloat16)
    length = int(rounded.any(-1).nonzero().max()) + 1 if rounded.any() else 1
    return rounded[:length].contiguous().view(torch.int16).numpy().astype("<i2").tobytes()


class StoredContext(NamedTuple):
    """The card of the captions of a data set, and the bfloat16 vectors (T, E) of the empty caption."""

    card: ContextCard
    null_context: Tensor

    @property
    def decoder(self) -> ContextDecoder:
        """Of its rows."""
        return ContextDecoder(*self.card.shape)


def find_context(path: str) -> ContextCard | None:
    """The card of the captions in the data set that `DataConfig.path` names; None if it has none.

    Raises:
        DataError: the card is damaged.
    """
    folder = folder_of_cards(path)
    files = [] if folder is None else [folder / name for name in (CARD, PREPARED)]
    return next((read_json(file, _CardFile).context for file in files if file.is_file()), None)


@dataclass(frozen=True)
class _CardFile:
    context: ContextCard | None = None


def open_context(path: str, shape: tuple[int, int]) -> StoredContext:
    """The captions of the data set that `DataConfig.path` names, for a model that takes them.

    Args:
        path: of the data set.
        shape: (T, E) that the model takes: its context_tokens and context_dim.

    Raises:
        CaptionError: it has no captions, or those of another shape.
        DataError: it has no whole file of the empty caption.
    """
    card, folder = find_context(path), folder_of_cards(path)
    if card is None or folder is None:
        raise CaptionError(
            f"the images in {path} have no captions (codes.json or prepare.json beside them tells of none), but the "
            f"model takes them, as {shape[0]} vectors of {shape[1]}. Make them by --captions of "
            "vae/encode_dataset.py, or of `itarflow prepare`, for models of pixels"
        )
    check_context(card, path, shape)
    null_context = read_null_context(folder, card.shape)
    if card.null_context not in ("", file_sha256(folder / NULL_CONTEXT)):
        raise DataError(
            f"{printable(str(folder / NULL_CONTEXT))} is not the one that was made with the captions beside it: its "
            "SHA-256 is another one. Copy it again"
        )
    return StoredContext(card, null_context)


def check_context(card: ContextCard, path: str, shape: tuple[int, int]) -> None:
    """Refuse captions that are not of the vectors that a model takes.

    Args:
        card: of the captions.
        path: where they are, for the message.
        shape: (T, E) that the model takes.

    Raises:
        CaptionError: they are not.
    """
    if card.shape != shape:
        tokens, dim = card.shape
        name = printable(str(card.encoder.name))
        raise CaptionError(
            f"the captions in {path} are {tokens} vectors of {dim}, by the text encoder {name}, but the model takes "
            f"{shape[0]} of {shape[1]}; encode the captions again, by --context-tokens {shape[0]} and a "
            f"--text-encoder of width {shape[1]}"
        )


def check_encoder(card: ContextCard, path: str, wanted: TextIdentity) -> None:
    """Refuse captions that another text encoder has made than the one that prompts will go through.

    Args:
        card: of the captions.
        path: where they are, for the message.
        wanted: the identity of the model's text encoder.

    Raises:
        DataError: saying what differs.
    """
    if changes := card.encoder.differences(wanted):
        raise DataError(
            f"the captions in {path} were encoded by another text encoder ({printable(str(card.encoder.name))}) than "
            f"{printable(str(wanted.name))}:\n  "
            + "\n  ".join(map(printable, changes))
            + "\nName the encoder that made them, or encode the captions again."
        )


def write_null_context(folder: Path, vectors: Tensor) -> None:
    """Write the vectors (T, E) of the empty caption, as `to_bytes` does.

    Raises:
        OSError: it can't be written.
    """
    data = np.frombuffer(to_bytes(vectors), "<i2").astype(np.int16)
    tensor = torch.from_numpy(data).view(torch.bfloat16).reshape(-1, vectors.shape[-1])
    with atomically(folder / NULL_CONTEXT) as partial:
        partial.write_bytes(to_safetensors({_TENSOR: tensor}))  # `save_file` lets nobody else read it


def read_null_context(folder: Path, shape: tuple[int, int]) -> Tensor:
    """The bfloat16 vectors (T, E) of the empty caption, padded with zeros.

    Args:
        folder: of the data set.
        shape: (T, E).

    Raises:
        DataError: the file is missing or damaged, or of another text encoder.
    """
    file, (tokens, dim) = folder / NULL_CONTEXT, shape
    try:
        found = load_file(file)[_TENSOR]
    except FileNotFoundError as error:
        raise DataError(
            f"{printable(str(file))} is missing, with the vectors of the empty caption; copy it, or run the command "
            "that made the folder again"
        ) from error
    except (SafetensorError, KeyError, OSError) as error:
        raise DataError(
            f"{printable(str(file))} is damaged: {printable(str(error))}; copy it again, or delete it, and run the "
            "command that made the folder again"
        ) from error
    whole = found.dtype == torch.bfloat16 and found.ndim == 2 and 1 <= len(found) <= tokens and found.shape[1] == dim
    if not whole or not bool(found.isfinite().all()):
        raise DataError(
            f"{printable(str(file))} holds {found.dtype} {tuple(found.shape)}; expected finite bfloat16 of 1 to "
            f"{tokens} vectors of {dim}: it is of another text encoder, or damaged. Copy it again, or delete it, and "
            "run the command that made the folder again"
        )
    return ContextDecoder(tokens, dim).padded([found])[0]
