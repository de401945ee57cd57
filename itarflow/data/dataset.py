"""A set of images, or of their codes, decoded on access. One that can't be read is replaced, named and counted."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import datasets
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from itarflow.data.content import content_of, paths_of
from itarflow.data.context import ContextDecoder
from itarflow.data.images import Crop, convert_image, crop_image, to_array
from itarflow.data.parquet import DamagedRowError, ParquetRows
from itarflow.data.picture_file import OwnPlace, open_picture
from itarflow.data.sources import Rows
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import printable


class Example(NamedTuple):
    """An image, its label (-1 = none), and "name: reason" if another image had to replace it.

    The image is as the set's decoder makes it: uint8 (C, H, W), or of a code float16 (V, P, C, H, W). If captions are
    read, `context` is the bfloat16 (T, E) of its caption, padded with zeros.
    """

    image: Tensor
    label: int
    broken: str | None
    context: Tensor | None = None


class Decoder(Protocol):
    """Makes a tensor of a row."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it reads."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its tensors."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its tensors."""

    def __call__(self, row: Mapping[str, Any]) -> Tensor:
        """The tensor; raises nearly anything if the row is damaged."""


@dataclass(frozen=True)
class PictureDecoder:
    """Makes a square uint8 (C, H, W) tensor of an encoded image.

    Attributes:
        column: name of the column with images.
        image_size: height and width of the tensors in pixels.
        in_channels: 3 for RGB, 1 for grey.
        crop: how images become square.
        place: where files may lie that a row names.
    """

    column: str
    image_size: int
    in_channels: int
    crop: Crop = "center"
    place: OwnPlace = field(default=OwnPlace((os.sep,)), repr=False)  # not a part of what fingerprints hash
    dtype = torch.uint8

    @property
    def columns(self) -> tuple[str, ...]:
        """The one with images."""
        return (self.column,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.in_channels, self.image_size, self.image_size

    def __call__(self, row: Mapping[str, Any]) -> Tensor:
        """The image of a row; damaged files make Pillow raise nearly anything."""
        value = row[self.column] or {}
        if (encoded := value.get("bytes")) is None:
            if not value.get("path"):
                raise DataError("there is no image in this row")
            encoded = self.place.read(value["path"])
        with open_picture(encoded) as image:
            square = crop_image(convert_image(image, self.in_channels), self.image_size, self.crop)
        return torch.from_numpy(to_array(square, self.in_channels))


class _Held(NamedTuple):
    """A set in memory: examples (N, ...), and of the distinct captions (L, E) which one each has; labels are apart."""

    images: Tensor
    contexts: tuple[Tensor, ...]
    places: Tensor


class ImageDataset(Dataset[Example]):
    """Map-style set of images or stored codes, decoded on access or (see `decoded`) once for all.

    An image that cannot be read is replaced by the next readable one, so that batches keep their size; its
    example then says so in `broken`. The same image is reported at every visit: count names, not reports.

    Args:
        rows: table with the decoder's columns; of `ParquetRows`, few row groups are in memory at a time.
        decoder: makes a tensor of a row.
        indices: (N,) rows that make up the set, ascending.
        labels: (N,) int64 class of each, -1 = none.
        max_broken: give up when more images than this, one after another, cannot be read.
        context: makes the vectors of a row's caption; None = captions are not read.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        decoder: Decoder,
        indices: Tensor,
        labels: Tensor,
        max_broken: int = 100,
        context: ContextDecoder | None = None,
    ) -> None:
        self._columns = [*decoder.columns, *(context.columns if context else ())]
        columns = rows.select_columns(self._columns)
        if isinstance(columns, datasets.Dataset) and isinstance(decoder, PictureDecoder):
            # Undecoded, because with decoding by `datasets` one broken file would end the run.
            columns = columns.cast_column(decoder.column, datasets.Image(decode=False))
        self._rows: Rows = columns
        self._decoder, self._context = decoder, context
        self._indices, self._labels = indices, labels
        self._max_broken = max_broken
        self._held: _Held | None = None
        self._broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        """(N,) int64 labels, -1 = none; reading them decodes nothing."""
        return self._labels

    @property
    def indices(self) -> Tensor:
        """(N,) int64 rows of the table that make up the set."""
        return self._indices

    @property
    def images(self) -> Tensor | None:
        """The examples (N, ...) of a set that was decoded into memory, else None."""
        return self._held.images if self._held else None

    def context(self, index: int) -> Tensor | None:
        """Of a set in memory the bfloat16 (L, E) of the caption at `index`; None if captions are not read."""
        if self._held is None or self._context is None:
            return None
        return self._held.contexts[int(self._held.places[index])]

    @property
    def captions(self) -> ContextDecoder | None:
        """What makes vectors of the captions; None if they are not read."""
        return self._context

    @property
    def broken(self) -> tuple[str, ...]:
        """Of each image that was replaced when the set was decoded into memory, its "name: reason"; else ()."""
        return self._broken

    @property
    def row_groups(self) -> Tensor | None:
        """(G,) int64 how many images lie in each row group, one after another; None if any image is as near."""
        if self._held is not None or not isinstance(self._rows, ParquetRows):
            return None
        begins = torch.searchsorted(self._indices, torch.from_numpy(self._rows.group_starts))
        return begins.diff()

    def keeping(self, windows: int, size: int) -> ImageDataset:
        """The same set for a reader that is busy in so many windows of `row_groups`, each of `size` images.

        It keeps their row groups in memory. Sets without row groups need nothing, and are returned as they are.
        """
        if not isinstance(self._rows, ParquetRows):
            return self
        rows = math.ceil(size * len(self._rows) / max(len(self), 1)) + 2 * self._rows.largest_group
        result = copy.copy(self)
        result._rows = self._rows.keeping(windows * rows)
        return result

    def fingerprint(self) -> str:
        """SHA-256 of all that the set depends on: the same as long as that was not changed. No image is read.

        Of image files these are paths, sizes and times of change; of parquet files that are read in place the same
        (their ETags elsewhere); of what `datasets` holds its own fingerprint; besides, the decoder and the rows.
        """
        digest = hashlib.sha256(repr(self._decoder).encode())
        digest.update(repr(self._context).encode() if self._context else b"")
        digest.update(self._indices.numpy().tobytes())
        if isinstance(self._rows, ParquetRows):
            states = self._rows.states()
        else:
            digest.update(self._rows._fingerprint.encode())
            column = self._decoder.columns[0]
            pictures = isinstance(self._rows.features[column], datasets.Image)
            paths = paths_of(self._rows.with_format("arrow")[:][column]) if pictures else iter(())
            states = (_state(path) for path in paths)
        for state in states:
            digest.update(state.encode())
        return digest.hexdigest()

    def file(self, index: int) -> str | None:
        """Path of the picture at `index` if it is a file of its own, else None."""
        if isinstance(self._rows, ParquetRows) or not isinstance(self._decoder, PictureDecoder):
            return None
        value = self._rows[int(self._indices[index])][self._decoder.column] or {}
        return None if value.get("bytes") is not None else value.get("path")

    def content(self) -> str:
        """What the images of the whole table are, wherever it lies, as a hash with its kind: see `content.content_of`.

        It depends neither on the decoder nor on which rows make up the set. No image is decoded.
        """
        place = self._decoder.place if isinstance(self._decoder, PictureDecoder) else None
        return content_of(self._rows, self._columns, place)

    def __getitem__(self, index: int) -> Example:
        """Example at `index` in 0..N-1.

        Raises:
            IndexError: the index is out of range.
            DataError: more than `max_broken` images one after another, or all of them, could not be read.
        """
        example = self.unpadded(index)
        context = padded(self._context, [example.context])
        return example if context is None else example._replace(context=context[0])

    def unpadded(self, index: int) -> Example:
        """The same as by `[index]`, but its context is the (L, E) of the caption's own tokens."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a data set with {len(self)} images")
        if self._held is not None:
            return Example(self._held.images[index], int(self._labels[index]), None, self.context(index))
        failures: list[str] = []
        for step in range(min(len(self), self._max_broken + 1)):
            candidate = (index + step) % len(self)
            found = self._read(candidate)
            if not isinstance(found, str):
                image, context = found
                return Example(image, int(self._labels[candidate]), failures[0] if failures else None, context)
            failures.append(found)
        if len(failures) == len(self):
            raise DataError(
                f"none of {len(self)} images can be read; expected pictures: look at the first ones:\n  "
                + "\n  ".join(failures[:5])
            )
        raise too_many_broken(failures, self._max_broken)

    def decoded(self) -> ImageDataset:
        """The same set, replacements included, held as one tensor; `broken` then names the replaced images.

        Raises:
            DataError: more than `max_broken` images could not be read.
        """
        images = torch.empty((len(self), *self._decoder.shape), dtype=self._decoder.dtype)
        labels, broken = self._labels.clone(), list[str]()
        megabytes = images.nbytes / 1e6
        title = f"reading {len(self):,} images" + (f" into {megabytes:,.0f} MB" if megabytes >= 1 else "")
        # One bar a machine, not one a process.
        silent = len(self) == 0 or os.environ.get("LOCAL_RANK", "0") != "0"
        places, distinct, contexts = torch.zeros_like(labels), dict[bytes, int](), list[Tensor]()
        for index in track(range(len(self)), title, console=Console(stderr=True), disable=silent):
            images[index], labels[index], failure, context = self.unpadded(index)
            broken += [failure] if failure else []
            if context is not None:  # few captions, such as of classes, are held once
                key = hashlib.sha256(context.view(torch.int16).numpy().tobytes()).digest()
                places[index] = distinct.setdefault(key, len(distinct))
                contexts += [context] if len(distinct) > len(contexts) else []
            if len(broken) > self._max_broken:
                raise too_many_broken(broken, self._max_broken)
        result = copy.copy(self)
        result._held, result._labels, result._broken = _Held(images, tuple(contexts), places), labels, tuple(broken)
        return result

    def contexts(self, indices: Sequence[int]) -> Tensor | None:
        """The bfloat16 (B, T, E) of the captions of some images, which are not decoded; None if they are not read."""
        if self._context is None:
            return None
        found = [self.context(index) for index in indices]
        if self._held is None:
            rows = self._rows.select_columns(list(self._context.columns))
            found = [self._context(rows[int(self._indices[index])]) for index in indices]
        return padded(self._context, found)

    def read(self, index: int) -> Tensor | str:
        """Decode the image at `index` itself, or say "name: reason" why there is none."""
        found = self._read(index)
        return found if isinstance(found, str) else found[0]

    def _read(self, index: int) -> tuple[Tensor, Tensor | None] | str:
        """The image at `index` and the (L, E) of its caption, or "name: reason"."""
        row = int(self._indices[index])
        values: dict[str, Any] = {}
        try:
            values = self._rows[row]
            return self._decoder(values), self._context(values) if self._context else None
        except DamagedRowError as error:  # which names file and row
            return str(error)
        except Exception as error:  # nothing is hidden: the reason is reported
            value = values.get(self._decoder.columns[0])
            name = (value.get("path") if isinstance(value, dict) else None) or f"row {row}"
            return printable(f"{name}: {str(error) or type(error).__name__}")


def padded(captions: ContextDecoder | None, contexts: Iterable[Tensor | None]) -> Tensor | None:
    """The bfloat16 (B, T, E) of B captions (L, E); None without captions."""
    return None if captions is None else captions.padded([one for one in contexts if one is not None])


def _state(path: str) -> str:
    """Path, size and time of change of a file; of one that is missing, or in an archive, its path."""
    try:
        found = os.stat(path)
    except OSError:
        return f"{path}\n"
    return f"{path} {found.st_size} {found.st_mtime_ns}\n"


def too_many_broken(failures: Sequence[str], limit: int) -> DataError:
    """The error that ends a run whose images can't be read; `failures` are "name: reason"."""
    return DataError(
        f"{len(failures)} images could not be read, and data.max_broken is {limit}. Repair or remove them, or raise "
        "data.max_broken to train without them. The first ones:\n  " + "\n  ".join(failures[:5])
    )
