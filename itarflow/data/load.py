"""Data sets of images or of their codes: training and held-out images, and the classes.

An image is a uint8 (C, H, W) tensor, a stored code a float16 one (see `codes.CodeDecoder`).
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from itarflow.codec import VaeIdentity
from itarflow.data.captions import read_captions
from itarflow.data.codes import CodeDecoder, check_card, find_card, folder_of_cards
from itarflow.data.columns import find_image_column, find_label_column
from itarflow.data.context import CAPTION, StoredContext, open_context
from itarflow.data.dataset import Decoder, ImageDataset, PictureDecoder
from itarflow.data.identity import DataIdentity
from itarflow.data.images import Crop, check_image_size, spread_over
from itarflow.data.labels import Labels, read_labels
from itarflow.data.made import check_made
from itarflow.data.picture_file import own_place
from itarflow.data.sources import Rows, open_splits, open_tables
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import listed, printable

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
    """Split to train on: train, for instance, or train[:10%] for its first tenth. Where images are sorted by class, as
    folders are, that is the first classes only."""
    held_out_split: str | None = None
    """Held-out split, never trained on. None = set images of `split` aside."""
    held_out_images: int = 1000
    """Held-out images, always the same, from all classes in proportion.
    With a held_out_split, at most this many of it; 0 = all of it, for figures that can be compared with others'.
    Without, set aside from `split`: at least one and at most a tenth of it; 0 = none, and no evaluation."""
    image_column: str | None = None
    """Column with the images. None finds it; of several it takes image, img, pixel_values, jpg or png."""
    label_column: str | None = None
    """Column with the class labels: numbers 0, 1, ..., or names as text. None finds it, if there is one."""
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
    """Unreadable images are replaced by their neighbours and named; stop at more than this many. Images of 16 bits
    that use at most 12 of them are such, unless their file says so: convert them to 8 bits."""


@dataclass(frozen=True)
class ImageData:
    """The data of a run: training images, held-out images, and the identity of the set that they are of.

    `held_out` is empty if the configuration asks for that; `identity` says what was understood of the data set, and
    of what was left out; `captions` are None if they are not read.
    """

    train: ImageDataset
    held_out: ImageDataset
    identity: DataIdentity
    captions: StoredContext | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels; () for unlabelled images."""
        return self.identity.class_names

    @property
    def null_context(self) -> Tensor | None:
        """bfloat16 (T, E) of the empty caption, as each item and batch has a `context`; None without captions."""
        return self.captions.null_context if self.captions else None

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
    context: tuple[int, int] | None = None,
) -> ImageData:
    """Open the data set that `config` names, choose held-out images, and try to read one image of each.

    Nothing else is decoded: `in_memory` is for the caller to follow, by `ImageData.decoded`.

    Args:
        config: what to open, and how to read it.
        image_size: height and width of the images in pixels, or of the codes.
        in_channels: 3 for RGB, 1 for grey; or the channels of the codes.
        vae: None = images; else codes that this VAE has made.
        variance: of codes, whether to read the posterior's log-variance, if it is there.
        context: (T, E) of the condition vectors that a model takes for a caption: they are read with each image. None
            = captions are not read.

    Returns:
        Training images, held-out images, and what was understood of the set.

    Raises:
        CaptionError: captions are missing, or of other vectors.
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
    captions = None
    if context is not None and folder_of_cards(config.path) is not None:  # if not, first see whether there is a set
        captions = open_context(config.path, context)  # before a large one is downloaded
    train, held_out, left_out = open_splits(
        config.path,
        name=config.name,
        split=config.split,
        held_out_split=config.held_out_split,
        streaming=config.streaming,
    )
    if context is not None and captions is None:
        captions = open_context(config.path, context)
    tables: dict[str, Rows] = {f"split {config.split!r}": train}
    if held_out is not None:
        tables[f"held_out_split {config.held_out_split!r}"] = held_out
    decoders: tuple[Decoder, Decoder]
    if card is None:
        column = find_image_column(train.features, config.image_column)
        decoders = (PictureDecoder(column, image_size, in_channels, config.crop, own_place(config.path)),) * 2
    else:
        decoders = (CodeDecoder(card, config.horizontal_flip, variance), CodeDecoder(card, False, variance))
    of_context = captions.decoder if captions else None
    _check_columns(tables, [*decoders[0].columns, *(of_context.columns if of_context else ())])
    label_column = find_label_column(train.features, config.label_column)
    labels = read_labels(tables, label_column, wanted=config.label_column is not None)

    def images(part: str, indices: Tensor, decoder: Decoder) -> ImageDataset:
        classes = labels.classes[part][indices]
        dataset = ImageDataset(
            tables[part],
            decoder=decoder,
            indices=indices,
            labels=classes,
            max_broken=config.max_broken,
            context=of_context,
        )
        if len(dataset) > 0:
            dataset[0]  # errors of the column or the files show now, not once the model is built
        return dataset

    first, last = next(iter(tables)), next(reversed(tables))
    if held_out is None:
        chosen = torch.zeros(len(train), dtype=torch.bool)
        chosen[_spread(labels.order[first], _set_aside(len(train), config.held_out_images))] = True
        rows = (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
    else:
        count = min(config.held_out_images or len(held_out), len(held_out))
        rows = torch.arange(len(train)), _spread(labels.order[last], count)
    parts = {"train": images(first, rows[0], decoders[0]), "held out": images(last, rows[1], decoders[1])}
    columns = _columns(parts["train"], decoders[0].columns[0], label_column, labels)
    columns |= {"caption": CAPTION} if captions else {}
    identity = _identity(parts, config.path, labels, columns, left_out, shared=held_out is None)
    return ImageData(train=parts["train"], held_out=parts["held out"], identity=identity, captions=captions)


class Splits(NamedTuple):
    """Whole splits by their names, what was understood of the set, and, if asked for, the captions of each split."""

    sets: dict[str, ImageDataset]
    identity: DataIdentity
    captions: Mapping[str, Sequence[str]] | None = None


def load_splits(
    config: DataConfig,
    splits: Sequence[str],
    *,
    image_size: int,
    in_channels: int,
    captions: str | None = None,
    empty_captions: bool = False,
) -> Splits:
    """Open whole splits with the classes that they share. Nothing is decoded.

    Args:
        config: what to open, and how to read it; what it says of splits and held-out images is not used.
        splits: names of the splits.
        image_size: height and width of the images in pixels.
        in_channels: 3 for RGB, 1 for grey.
        captions: a column of texts, or a template with {} for the name of the class; None = captions are not read.
        empty_captions: whether images may lack one; they get the empty caption then.

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
    tables = {f"split {split!r}": opened.splits[split] for split in splits}
    features = next(iter(tables.values())).features
    image_column = find_image_column(features, config.image_column)
    _check_columns(tables, [image_column])
    label_column = find_label_column(features, config.label_column)
    labels = read_labels(tables, label_column, wanted=config.label_column is not None)
    sets = {
        split: ImageDataset(
            table,
            decoder=PictureDecoder(image_column, image_size, in_channels, config.crop, own_place(config.path)),
            indices=torch.arange(len(table)),
            labels=classes,
            max_broken=config.max_broken,
        )
        for split, table, classes in zip(splits, tables.values(), labels.classes.values(), strict=True)
    }
    columns = _columns(sets[splits[0]], image_column, label_column, labels)
    if captions is None:
        return Splits(sets, _identity(sets, config.path, labels, columns, opened.left_out))
    texts = read_captions(opened.splits, sets, captions, labels.names, allow_empty=empty_captions)
    columns |= {"caption": captions} if "{}" not in captions else {}
    return Splits(sets, _identity(sets, config.path, labels, columns, opened.left_out, captions=texts), texts)


def _check_columns(tables: Mapping[str, Rows], columns: Sequence[str]) -> None:
    """Refuse tables without the columns that are read of the first one."""
    for part, rows in tables.items():
        if missing := [name for name in columns if name not in rows.features]:
            names = printable(listed(map(str, rows.features), 20))
            raise DataError(f"{part} has no column {missing[0]!r}, only [{names}]; expected it in all of the set")


def _columns(images: ImageDataset, image: str, label: str | None, labels: Labels) -> dict[str, str]:
    """Columns that were taken; of a folder of pictures none, nor one for labels that are the names of its folders."""
    columns = {"image": image} | ({} if label is None or labels.refused else {"label": label})
    sample = spread_over(len(images), min(len(images), 16))
    files = {index: file for index in sample if (file := images.file(index)) is not None}
    if len(files) < len(sample) or not sample:
        return columns
    del columns["image"]
    for index, file in files.items():
        folder, label_of_it = os.path.basename(os.path.dirname(file)), int(images.labels[index])
        if label_of_it < 0 or not _same_name(labels.names[label_of_it], folder):
            return columns
    columns.pop("label", None)
    return columns


def _same_name(one: str, other: str) -> bool:
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _identity(
    parts: Mapping[str, ImageDataset],
    path: str,
    labels: Labels,
    columns: dict[str, str],
    left_out: tuple[str, ...],
    *,
    shared: bool = False,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> DataIdentity:
    """What was understood of the data set at `path`; `shared`: its parts are of one table."""
    digest, kind = hashlib.sha256(), "rows"
    for number, (name, images) in enumerate(parts.items()):
        digest.update(f"{name} {len(images)}\n".encode())
        digest.update(images.indices.numpy().tobytes() + images.labels.numpy().tobytes())
        for text in captions[name] if captions else ():
            digest.update(b"%d:%b" % (len(text.encode()), text.encode()))
        # The digits are encoded anew at each start: their bytes depend on the version of Pillow.
        if path != "digits" and not (shared and number):
            kind, _, content = images.content().partition(":")
            digest.update(content.encode())
    trained = next(iter(parts.values())).labels
    return DataIdentity(
        content=f"{kind}:{digest.hexdigest()}",
        images={name: len(images) for name, images in parts.items()},
        class_names=labels.names,
        class_counts=tuple(trained[trained >= 0].bincount(minlength=len(labels.names)).tolist()),
        columns=columns,
        left_out=(*left_out, *([f"labels: {labels.refused}"] if labels.refused else [])),
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
