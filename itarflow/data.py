"""Image data sets: what to train on, what to measure on, and the classes.

An image is a uint8 (C, H, W) tensor. `sources` opens the data set, `images` makes an image square; here one that
can't be read is replaced, named and counted.
"""

from __future__ import annotations

import copy
import io
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from itarflow.images import Crop, DataError, check_crop, convert_image, crop_image, pillow_mode, to_array
from itarflow.sources import Rows, open_splits, open_tables
from itarflow.streaming import DamagedRowError, ParquetRows

_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
_NO_PATH = 'path is missing; give "digits", a folder of images, parquet files or a Hub name'


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images to train on, and how to read them."""

    path: str | None = None
    """Where the images are: digits, a folder, parquet files, or a data set on the Hugging Face Hub.
    digits = the scanned digits that scikit-learn ships, no download (./digits is a folder of that name);
    folder = one sub-folder a class, or no sub-folders: unlabelled; train/, test/ ... around them are splits;
    parquet = a file, a glob or a folder of them; they win over images in the same folder."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    split: str = "train"
    """Split to train on: train, for instance, or train[:10%] for its first tenth."""
    held_out_split: str | None = None
    """Split to measure on, never trained on. None = set images of `split` aside."""
    held_out_images: int = 1000
    """Images to measure on, always the same, from all classes in proportion.
    With a held_out_split, at most this many of it; 0 = all of it, for figures that can be compared with others'.
    Without, set aside from `split`: at least one and at most a tenth of it; 0 = none, nothing to measure on."""
    image_column: str | None = None
    """Column with the images. None finds the first one."""
    label_column: str | None = None
    """Column with the class labels. None finds it, if there is one."""
    crop: Crop = "center"
    """How images become square; those of the right size stay as they are. FID depends on the choice.
    center = short side resized (bilinear), then centre crop, as torchvision and the papers' code do;
    adm = halved while that fits, then bicubic, then centre crop, as for ADM's and EDM's ImageNet;
    edm = centre crop to the short side, then Lanczos, as EDM's center-crop."""
    horizontal_flip: bool = True
    """Mirror training images at random (the training loop does it). Switch it off for digits and letters."""
    in_memory: bool = False
    """Decode every image once, at the start, and keep it in memory: for small sets that are visited often."""
    num_workers: int = 2
    """Processes that decode ahead of training; 0 decodes in the training process. Not used with in_memory."""
    streaming: bool = False
    """Leave parquet files where they are, here or on the Hub, and read them row group by row group, instead of
    copying all of them into the cache first: for data sets larger than the disk. Mixes less; see shuffle_buffer.
    Name a held_out_split: images set aside from `split` lie all over it, and all is read to measure on them.
    Folders of image files, which are never copied, and digits are read as without."""
    shuffle_buffer: int = 8192
    """With streaming: images that are mixed with one another, of row groups drawn at random. With the rest of their
    row groups they are in memory, still encoded: up to eight processes that decode hold about twice as many in all,
    further ones a quarter as many each."""
    max_broken: int = 100
    """Unreadable images are replaced by their neighbours and named; stop at more than this many."""


class Example(NamedTuple):
    """uint8 image (C, H, W), its label (-1 = none), and "name: reason" if another image had to replace it."""

    image: Tensor
    label: int
    broken: str | None


class ImageDataset(Dataset[Example]):
    """Map-style set of square uint8 images, decoded on access or (see `decoded`) once for all.

    An image that cannot be read is replaced by the next readable one, so that batches keep their size; its
    example then says so in `broken`. The same image is reported at every visit: count names, not reports.

    Args:
        rows: table with a column of encoded images; of `ParquetRows`, few row groups are in memory at a time.
        image_column: name of that column.
        indices: (N,) rows that make up the set, ascending.
        labels: (N,) int64 class of each, -1 = none.
        image_size: height and width of the examples in pixels.
        in_channels: 3 for RGB, 1 for grey.
        crop: how images become square.
        max_broken: give up when more images than this, one after another, cannot be read.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        image_column: str,
        indices: Tensor,
        labels: Tensor,
        image_size: int,
        in_channels: int,
        crop: Crop = "center",
        max_broken: int = 100,
    ) -> None:
        column = rows.select_columns([image_column])
        if isinstance(column, datasets.Dataset):
            # Undecoded, because in the hands of `datasets` one broken file would end the run.
            column = column.cast_column(image_column, datasets.Image(decode=False))
        self._rows: Rows = column
        self._column = image_column
        self._indices, self._labels = indices, labels
        self._size, self._in_channels, self._crop = image_size, in_channels, crop
        self._max_broken = max_broken
        self._images: Tensor | None = None
        self._broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        """(N,) int64 labels, -1 = none; reading them decodes nothing."""
        return self._labels

    @property
    def images(self) -> Tensor | None:
        """uint8 (N, C, H, W) of a set that was decoded into memory, else None."""
        return self._images

    @property
    def broken(self) -> tuple[str, ...]:
        """Of each image that was replaced when the set was decoded into memory, its "name: reason"; else ()."""
        return self._broken

    @property
    def row_groups(self) -> Tensor | None:
        """(G,) int64 how many images lie in each row group, one after another; None if any image is as near."""
        if self._images is not None or not isinstance(self._rows, ParquetRows):
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

    def __getitem__(self, index: int) -> Example:
        """Example at `index` in 0..N-1.

        Raises:
            IndexError: the index is out of range.
            DataError: more than `max_broken` images one after another, or all of them, could not be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a data set with {len(self)} images")
        if self._images is not None:
            return Example(self._images[index], int(self._labels[index]), None)
        failures: list[str] = []
        for step in range(min(len(self), self._max_broken + 1)):
            candidate = (index + step) % len(self)
            image = self.read(candidate)
            if isinstance(image, Tensor):
                return Example(image, int(self._labels[candidate]), failures[0] if failures else None)
            failures.append(image)
        if len(failures) == len(self):
            raise DataError(
                f"none of {len(self)} images can be read; expected pictures: look at the first ones:\n  "
                + "\n  ".join(failures[:5])
            )
        raise too_many_broken(failures, self._max_broken)

    def decoded(self) -> ImageDataset:
        """The same set, replacements included, held as one uint8 tensor; `broken` then names the replaced images.

        Raises:
            DataError: more than `max_broken` images could not be read.
        """
        images = torch.empty((len(self), self._in_channels, self._size, self._size), dtype=torch.uint8)
        labels, broken = self._labels.clone(), list[str]()
        megabytes = images.numel() / 1e6
        title = f"decoding {len(self):,} images" + (f" into {megabytes:,.0f} MB" if megabytes >= 1 else "")
        # One bar a machine, not one a process.
        silent = len(self) == 0 or os.environ.get("LOCAL_RANK", "0") != "0"
        for index in track(range(len(self)), title, console=Console(stderr=True), disable=silent):
            images[index], labels[index], failure = self[index]
            broken += [failure] if failure else []
            if len(broken) > self._max_broken:
                raise too_many_broken(broken, self._max_broken)
        result = copy.copy(self)
        result._images, result._labels, result._broken = images, labels, tuple(broken)
        return result

    def read(self, index: int) -> Tensor | str:
        """Decode the uint8 (C, H, W) image at `index` itself, or say "name: reason" why there is none."""
        row = int(self._indices[index])
        value: dict[str, Any] = {}
        try:
            value = self._rows[row][self._column] or {}
            with Image.open(io.BytesIO(_encoded(value))) as image:
                square = crop_image(convert_image(image, self._in_channels), self._size, self._crop)
            return torch.from_numpy(to_array(square, self._in_channels))
        except UnidentifiedImageError:  # whose own words name a buffer in memory
            return f"{value.get('path') or f'row {row}'}: it is no picture of a known format, or its head is damaged"
        except DamagedRowError as error:  # which names file and row
            return str(error)
        # Damaged files make Pillow raise nearly anything. Nothing is hidden: the reason is reported.
        except Exception as error:
            return f"{value.get('path') or f'row {row}'}: {str(error) or type(error).__name__}"


@dataclass(frozen=True)
class ImageData:
    """What a run needs of a data set: images to train on, images to measure on, and the names of the classes.

    `held_out` is empty if the configuration asks for that; `class_names` is () for unlabelled images.
    """

    train: ImageDataset
    held_out: ImageDataset
    class_names: tuple[str, ...]

    def decoded(self) -> ImageData:
        """The same images, held in memory; see `ImageDataset.decoded`."""
        return replace(self, train=self.train.decoded(), held_out=self.held_out.decoded())


def _encoded(value: dict[str, Any]) -> bytes:
    path = value.get("path")
    if value.get("bytes") is not None:
        return value["bytes"]
    if not path:
        raise DataError("there is no image in this row")
    # The archives of Hub data sets stay packed: "zip://cat.png::/cache/train.zip".
    with xopen(path, "rb") as file:
        return file.read()


def too_many_broken(failures: Sequence[str], limit: int) -> DataError:
    """The error that ends a run whose images can't be read; `failures` are "name: reason"."""
    return DataError(
        f"{len(failures)} images could not be read, and data.max_broken is {limit}. Repair or remove them, or raise "
        "data.max_broken to train without them. The first ones:\n  " + "\n  ".join(failures[:5])
    )


def load_data(config: DataConfig, *, image_size: int, in_channels: int) -> ImageData:
    """Open the data set that `config` names, choose images to measure on, and try to read one image of each.

    Nothing else is decoded: `in_memory` is for the caller to follow, by `ImageData.decoded`.

    Args:
        config: what to open, and how to read it.
        image_size: height and width of the images in pixels.
        in_channels: 3 for RGB, 1 for grey.

    Returns:
        Training images, held-out images, class names.

    Raises:
        DataError: the configuration or the data cannot be used; the message says what to change.
    """
    _check(config, image_size, in_channels)
    if config.path is None:
        raise DataError(_NO_PATH)
    train, held_out = open_splits(
        config.path,
        name=config.name,
        split=config.split,
        held_out_split=config.held_out_split,
        streaming=config.streaming,
    )
    image_column = _find_image_column(train.features, config.image_column)
    label_column = _find_label_column(train.features, config.label_column)

    def images(rows: Rows, indices: Tensor, labels: Tensor) -> ImageDataset:
        dataset = ImageDataset(
            rows,
            image_column=image_column,
            indices=indices,
            labels=labels[indices],
            image_size=image_size,
            in_channels=in_channels,
            crop=config.crop,
            max_broken=config.max_broken,
        )
        if len(dataset) > 0:
            dataset[0]  # what is wrong with the column or the files shows now, not once the model is built
        return dataset

    labels = _labels(train, label_column)
    if held_out is None:
        chosen = torch.zeros(len(train), dtype=torch.bool)
        chosen[_spread(labels, _set_aside(len(train), config.held_out_images))] = True
        names = _class_names(train.features, label_column, labels)
        parts = [images(train, mask.nonzero().flatten(), labels) for mask in (~chosen, chosen)]
    else:
        held_out_labels = _labels(held_out, label_column)
        names = _class_names(train.features, label_column, torch.cat([labels, held_out_labels]))
        measured = _spread(held_out_labels, min(config.held_out_images or len(held_out), len(held_out)))
        parts = [images(train, torch.arange(len(train)), labels), images(held_out, measured, held_out_labels)]
    return ImageData(train=parts[0], held_out=parts[1], class_names=names)


def load_splits(
    config: DataConfig, splits: Sequence[str], *, image_size: int, in_channels: int
) -> tuple[dict[str, ImageDataset], tuple[str, ...]]:
    """Open whole splits with the classes that they share. Nothing is decoded.

    Args:
        config: what to open, and how to read it; what it says of splits and held-out images is not used.
        splits: names of the splits.
        image_size: height and width of the images in pixels.
        in_channels: 3 for RGB, 1 for grey.

    Returns:
        All images of each split by its name, in the order of the source, and the names of the classes.

    Raises:
        DataError: the configuration or the data cannot be used; the message says what to change.
    """
    _check(config, image_size, in_channels)
    if config.path is None:
        raise DataError(_NO_PATH)
    opened = open_tables(config.path, config.name, splits)
    tables = {split: opened[split] for split in splits}
    features = tables[splits[0]].features
    image_column = _find_image_column(features, config.image_column)
    label_column = _find_label_column(features, config.label_column)
    labels = {split: _labels(table, label_column) for split, table in tables.items()}
    sets = {
        split: ImageDataset(
            table,
            image_column=image_column,
            indices=torch.arange(len(table)),
            labels=labels[split],
            image_size=image_size,
            in_channels=in_channels,
            crop=config.crop,
            max_broken=config.max_broken,
        )
        for split, table in tables.items()
    }
    return sets, _class_names(features, label_column, torch.cat(list(labels.values())))


def _check(config: DataConfig, image_size: int, in_channels: int) -> None:
    pillow_mode(in_channels)
    check_crop(config.crop)
    if image_size < 1:
        raise DataError(f"image_size is {image_size}; expected a positive number of pixels")
    for name in ("held_out_images", "num_workers", "max_broken"):
        if getattr(config, name) < 0:
            raise DataError(f"{name} is {getattr(config, name)}; expected 0 or more")
    if config.streaming and config.in_memory:
        raise DataError(
            "streaming and in_memory are both set; expected one: for images that exceed the memory add "
            "--data.no-in-memory, for others leave streaming out"
        )
    if config.shuffle_buffer < 1:
        raise DataError(f"shuffle_buffer is {config.shuffle_buffer}; expected 1 or more, such as 8192")


def _find_image_column(features: datasets.Features, wanted: str | None) -> str:
    def encoded(feature: Any) -> bool:  # what other writers of parquet leave of an image
        return "bytes" in feature if isinstance(feature, dict) else "binary" in getattr(feature, "dtype", "")

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    usable = typed + [name for name, feature in features.items() if encoded(feature)]
    if wanted is not None and wanted not in usable:
        raise DataError(f"image_column {wanted!r} has no images; use one of {usable} (of {list(features)})")
    if not usable:
        raise DataError(f"no column of type Image among {list(features)}; is this a set of images?")
    return wanted or usable[0]


def _find_label_column(features: datasets.Features, wanted: str | None) -> str | None:
    def usable(name: str) -> bool:
        return name in typed or re.match("u?int", getattr(features.get(name), "dtype", "")) is not None

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in _LABEL_NAMES if name in features]
    if wanted is not None and not usable(wanted):
        kind = features.get(wanted, "missing")
        raise DataError(f"label_column {wanted!r} is {kind}; expected ClassLabel or ints, of {list(features)}")
    found = [*(name for name in named if name in typed), *typed, *filter(usable, named)]
    if wanted is None and named and not found:
        warnings.warn(f"column {named[0]!r} is no ClassLabel and no int: images are unlabelled", stacklevel=3)
    return wanted or (found[0] if found else None)


def _labels(rows: Rows, column: str | None) -> Tensor:
    """(N,) int64 labels of a split, -1 = none."""
    if column is None:
        return torch.full((len(rows),), -1, dtype=torch.int64)
    if isinstance(rows, ParquetRows):
        values = rows.column(column).cast(pa.int64())
    else:
        values = rows.select_columns([column]).with_format("arrow")[:][column].cast(pa.int64())
    known = values.drop_null().to_numpy()
    if (known < 0).any() and not isinstance(rows.features[column], datasets.ClassLabel):
        raise DataError(f"label_column {column!r} holds {known.min()}; expected 0, 1, ...: renumber the classes")
    return torch.from_numpy(np.array(values.fill_null(-1).to_numpy()))


def _class_names(features: datasets.Features, column: str | None, labels: Tensor) -> tuple[str, ...]:
    if column is None:
        return ()
    if isinstance(features[column], datasets.ClassLabel):
        return tuple(features[column].names)
    return tuple(str(label) for label in range(int(labels.max()) + 1))


def _set_aside(total: int, wanted: int) -> int:
    """How many of `total` images to keep from training: those wanted, but at most a tenth, rounded up to one."""
    count = min(wanted, max(total // 10, 1))
    if count == total:
        raise DataError(f"held_out_images leaves nothing of {total} image to train on; set it to 0, or add images")
    return count


def _spread(labels: Tensor, count: int) -> Tensor:
    """Ascending indices of `count` images evenly spaced in the order of labels: each class in proportion."""
    places = (2 * torch.arange(count) + 1) * len(labels) // (2 * max(count, 1))
    return torch.argsort(labels, stable=True)[places].sort().values
