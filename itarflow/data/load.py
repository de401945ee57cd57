"""Data sets of images or of their codes: training and held-out images, and the classes.

An image is a uint8 (C, H, W) tensor, a stored code a float16 one (see `codes.CodeDecoder`).
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from itarflow.codec import VaeIdentity
from itarflow.data.codes import CodeDecoder, check_card, find_card
from itarflow.data.dataset import Decoder, ImageDataset, PictureDecoder
from itarflow.data.identity import DataIdentity
from itarflow.data.images import Crop, check_image_size
from itarflow.data.made import check_made
from itarflow.data.parquet import ParquetRows
from itarflow.data.sources import Rows, open_splits, open_tables
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import printable

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
    """Held-out split, never trained on. None = set images of `split` aside."""
    held_out_images: int = 1000
    """Held-out images, always the same, from all classes in proportion.
    With a held_out_split, at most this many of it; 0 = all of it, for figures that can be compared with others'.
    Without, set aside from `split`: at least one and at most a tenth of it; 0 = none, and no evaluation."""
    image_column: str | None = None
    """Column with the images. None finds the first one."""
    label_column: str | None = None
    """Column with the class labels. None finds it, if there is one."""
    crop: Crop = "center"
    """How images become square; those of the right size stay as they are. FID depends on the choice.
    center = short side resized (bilinear), then centre crop, as torchvision and the papers' code do;
    adm = halved while that fits, then bicubic, then centre crop, as for ADM's and EDM's ImageNet;
    edm = centre crop to the short side, then Lanczos, as EDM's center-crop;
    pad = long side resized (bilinear), the rest white: nothing is cut off, such as of photographs of products."""
    horizontal_flip: bool = True
    """Mirror training images at random (the training loop does it). Switch it off for digits and letters."""
    in_memory: bool = False
    """Decode every image once, at the start, and keep it in memory: for small sets that are visited often."""
    num_workers: int = 2
    """Processes that decode ahead of training; 0 decodes in the training process. Not used with in_memory."""
    streaming: bool = False
    """Leave parquet files where they are, here or on the Hub, and read them row group by row group, instead of
    copying all of them into the cache first: for data sets larger than the disk. Mixes less; see shuffle_buffer.
    Name a held_out_split: images set aside from `split` lie all over it, and all is read to evaluate on them.
    Folders of image files, which are never copied, and digits are read as without."""
    shuffle_buffer: int = 8192
    """With streaming: images that are mixed with one another, of row groups drawn at random. With the rest of their
    row groups they are in memory, still encoded: up to eight processes that decode hold about twice as many in all,
    further ones a quarter as many each."""
    max_broken: int = 100
    """Unreadable images are replaced by their neighbours and named; stop at more than this many."""


@dataclass(frozen=True)
class ImageData:
    """The data of a run: training images, held-out images, and the identity of the set that they are of.

    `held_out` is empty if the configuration asks for that; `identity` says what was understood of the data set, and
    of what was left out.
    """

    train: ImageDataset
    held_out: ImageDataset
    identity: DataIdentity

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels; () for unlabelled images."""
        return self.identity.class_names

    def decoded(self) -> ImageData:
        """The same images, held in memory; see `ImageDataset.decoded`."""
        return replace(self, train=self.train.decoded(), held_out=self.held_out.decoded())


def load_data(
    config: DataConfig,
    *,
    image_size: int,
    in_channels: int,
    vae: VaeIdentity | None = None,
    variance: bool = True,
) -> ImageData:
    """Open the data set that `config` names, choose held-out images, and try to read one image of each.

    Nothing else is decoded: `in_memory` is for the caller to follow, by `ImageData.decoded`.

    Args:
        config: what to open, and how to read it.
        image_size: height and width of the images in pixels, or of the codes.
        in_channels: 3 for RGB, 1 for grey; or the channels of the codes.
        vae: None = images; else codes that this VAE has made.
        variance: of codes, whether to read the posterior's log-variance, if it is there.

    Returns:
        Training images, held-out images, and what was understood of the set.

    Raises:
        DataError: the configuration or the data cannot be used; the message says what to change.
    """
    _check(config)
    if config.path is None:
        raise DataError(_NO_PATH)
    card = find_card(config.path)
    check_made(config.path)
    if vae is None:
        if card is not None:
            raise DataError(
                f"{config.path} holds codes of the VAE {printable(card.vae)}, not images; to train on them name the "
                "VAE by codec.vae, for all else name the images that they are of"
            )
        check_image_size(image_size, in_channels, config.crop)
    elif card is None:
        raise DataError(
            f"{config.path} holds no codes (no codes.json, or the Hub can't be reached), but codec.vae is set; "
            "make them by "
            f"`accelerate launch vae/encode_dataset.py {config.path} OUT --vae VAE --size {image_size * vae.stride}`, "
            "and set data.path to OUT"
        )
    else:
        check_card(
            card,
            config.path,
            vae,
            (in_channels, image_size, image_size),
            flips=config.horizontal_flip,
            crop=config.crop,
        )
    train, held_out, left_out = open_splits(
        config.path,
        name=config.name,
        split=config.split,
        held_out_split=config.held_out_split,
        streaming=config.streaming,
    )
    decoders: tuple[Decoder, Decoder]
    if card is None:
        column = _find_image_column(train.features, config.image_column)
        decoders = (PictureDecoder(column, image_size, in_channels, config.crop),) * 2
    else:
        decoders = (CodeDecoder(card, config.horizontal_flip, variance), CodeDecoder(card, False, variance))
    label_column = _find_label_column(train.features, config.label_column)

    def images(rows: Rows, indices: Tensor, labels: Tensor, decoder: Decoder) -> ImageDataset:
        dataset = ImageDataset(
            rows, decoder=decoder, indices=indices, labels=labels[indices], max_broken=config.max_broken
        )
        if len(dataset) > 0:
            dataset[0]  # errors of the column or the files show now, not once the model is built
        return dataset

    labels = _labels(train, label_column)
    if held_out is None:
        chosen = torch.zeros(len(train), dtype=torch.bool)
        chosen[_spread(labels, _set_aside(len(train), config.held_out_images))] = True
        names = _class_names(train.features, label_column, labels)
        parts = [
            images(train, (~chosen).nonzero().flatten(), labels, decoders[0]),
            images(train, chosen.nonzero().flatten(), labels, decoders[1]),
        ]
    else:
        held_out_labels = _labels(held_out, label_column)
        names = _class_names(train.features, label_column, torch.cat([labels, held_out_labels]))
        measured = _spread(held_out_labels, min(config.held_out_images or len(held_out), len(held_out)))
        parts = [
            images(train, torch.arange(len(train)), labels, decoders[0]),
            images(held_out, measured, held_out_labels, decoders[1]),
        ]
    identity = _identity(
        {"train": parts[0], "held out": parts[1]},
        config,
        names,
        {"image": decoders[0].columns[0]} | ({} if label_column is None else {"label": label_column}),
        left_out,
        shared=held_out is None,
    )
    return ImageData(train=parts[0], held_out=parts[1], identity=identity)


def load_splits(
    config: DataConfig, splits: Sequence[str], *, image_size: int, in_channels: int
) -> tuple[dict[str, ImageDataset], DataIdentity]:
    """Open whole splits with the classes that they share. Nothing is decoded.

    Args:
        config: what to open, and how to read it; what it says of splits and held-out images is not used.
        splits: names of the splits.
        image_size: height and width of the images in pixels.
        in_channels: 3 for RGB, 1 for grey.

    Returns:
        All images of each split by its name, in the order of the source, and what was understood of the set.

    Raises:
        DataError: the configuration or the data cannot be used; the message says what to change.
    """
    _check(config)
    check_image_size(image_size, in_channels, config.crop)
    if config.path is None:
        raise DataError(_NO_PATH)
    check_made(config.path)
    opened = open_tables(config.path, config.name, splits)
    tables = {split: opened.splits[split] for split in splits}
    features = tables[splits[0]].features
    image_column = _find_image_column(features, config.image_column)
    label_column = _find_label_column(features, config.label_column)
    labels = {split: _labels(table, label_column) for split, table in tables.items()}
    sets = {
        split: ImageDataset(
            table,
            decoder=PictureDecoder(image_column, image_size, in_channels, config.crop),
            indices=torch.arange(len(table)),
            labels=labels[split],
            max_broken=config.max_broken,
        )
        for split, table in tables.items()
    }
    names = _class_names(features, label_column, torch.cat(list(labels.values())))
    columns = {"image": image_column} | ({} if label_column is None else {"label": label_column})
    return sets, _identity(sets, config, names, columns, opened.left_out)


def _identity(
    parts: Mapping[str, ImageDataset],
    config: DataConfig,
    class_names: tuple[str, ...],
    columns: dict[str, str],
    left_out: tuple[str, ...],
    *,
    shared: bool = False,
) -> DataIdentity:
    """What was understood; `shared`: the parts are of one table."""
    digest = hashlib.sha256()
    for number, (name, images) in enumerate(parts.items()):
        digest.update(f"{name} {len(images)}\n".encode())
        digest.update(images.indices.numpy().tobytes() + images.labels.numpy().tobytes())
        # The digits are encoded anew at each start: their bytes depend on the version of Pillow.
        if config.path != "digits" and not (shared and number):
            digest.update(images.content().encode())
    trained = next(iter(parts.values())).labels
    return DataIdentity(
        content=digest.hexdigest(),
        images={name: len(images) for name, images in parts.items()},
        class_names=class_names,
        class_counts=tuple(trained[trained >= 0].bincount(minlength=len(class_names)).tolist()),
        columns=columns,
        left_out=left_out,
    )


def _check(config: DataConfig) -> None:
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
