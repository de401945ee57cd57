"""Image data sets to batches.

Images travel as uint8 (C, H, W) tensors and become pixels in [-1, 1] on the device (`to_pixels`). Reading is
left to `datasets`, decoding to Pillow. The order of training images depends on (seed, step) alone, never on
the number of processes (`GlobalBatchSampler`). An image that cannot be read is replaced, named and counted.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import importlib.util
import io
import itertools
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Crop = Literal["center", "adm", "edm"]

_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_Tables = Mapping[str, datasets.Dataset]  # by name of split
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


class DataError(ValueError):
    """Data that cannot be used. The message names the thing, its value, what was expected and what to do."""


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
    """Images to set aside if there is no held_out_split, always the same, from all classes in proportion.
    At least one and at most a tenth of the set; 0 = none, which leaves nothing to measure on."""
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
    max_broken: int = 100
    """Unreadable images are replaced by their neighbours and named; stop at more than this many."""


class Example(NamedTuple):
    """uint8 image (C, H, W), its label (-1 = none), and "name: reason" if another image had to replace it."""

    image: Tensor
    label: int
    broken: str | None


class Batch(NamedTuple):
    """uint8 images (B, C, H, W), int64 labels (B,), -1 = none, and "name: reason" of each replaced image."""

    images: Tensor
    labels: Tensor
    broken: tuple[str, ...]


# ------------------------------------------------------------------------------------------ one image


def convert_image(image: Image.Image, in_channels: int) -> Image.Image:
    """Upright 8-bit RGB (in_channels 3) or L (1) version of an image of any usual mode.

    EXIF orientation is applied, transparency laid on white, 16-bit grey scaled from 0..65535 to 0..255.

    Raises:
        DataError: in_channels is neither 1 nor 3, or the range of the pixels is unknown (floats, 32-bit).
    """
    mode = _mode(in_channels)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(_sixteen_to_eight_bit(np.asarray(image)))
    elif image.mode == "F":
        raise DataError("image mode F (floats) has no known range; expected 8 or 16-bit pixels: convert it")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def crop_image(image: Image.Image, size: int, protocol: Crop = "center") -> Image.Image:
    """Square `size` x `size` version of an RGB or L image, by a published protocol (see `DataConfig.crop`).

    An image that has this size already is returned as it is.

    Raises:
        DataError: the protocol is unknown.
    """
    _check_crop(protocol)
    resampling = Image.Resampling
    if image.size == (size, size):
        return image
    if protocol == "edm":
        return _center(image, min(image.size)).resize((size, size), resampling.LANCZOS)
    if protocol == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
        scale = size / min(image.size)
        image = image.resize(_pair(round(side * scale) for side in image.size), resampling.BICUBIC)
        return _center(image, size)
    # Truncated here and rounded to the nearest even below, exactly as torchvision does.
    short = min(image.size)
    image = image.resize(_pair(int(size * side / short) for side in image.size), resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image, in_channels: int) -> np.ndarray:
    """uint8 (in_channels, H, W) array of an image of any usual mode; rules, errors: see `convert_image`."""
    array = np.array(convert_image(image, in_channels))
    return array[None] if in_channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def to_pixels(images_uint8: Tensor) -> Tensor:
    """float32 pixels in [-1, 1] of uint8 images of any shape: x / 127.5 - 1, inverted exactly by `to_uint8`.

    Raises:
        ValueError: the images are not uint8 (converted twice, for instance).
    """
    if images_uint8.dtype != torch.uint8:
        raise ValueError(f"images have dtype {images_uint8.dtype}; expected torch.uint8 values in 0..255")
    return images_uint8.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """uint8 images of finite pixels of any shape: clamped to [-1, 1], scaled to [0, 255], rounded."""
    return ((images.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _mode(in_channels: int) -> str:
    if in_channels not in (1, 3):
        raise DataError(f"in_channels is {in_channels}; expected 1 (grey) or 3 (RGB): use one of these")
    return "L" if in_channels == 1 else "RGB"


def _check_crop(protocol: str) -> None:
    if protocol not in get_args(Crop):
        raise DataError(f"crop {protocol!r} is unknown; use one of {', '.join(get_args(Crop))}")


def _sixteen_to_eight_bit(array: np.ndarray) -> np.ndarray:
    low, high = array.min(), array.max()
    if low < 0 or high > 65535:
        raise DataError(f"integer pixels reach from {low} to {high}; expected 0..65535: convert the image")
    return np.round(array / 257).astype(np.uint8)


def _center(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _pair(sides: Iterable[int]) -> tuple[int, int]:
    width, height = sides
    return width, height


# ------------------------------------------------------------------------------------------ a data set


class ImageDataset(Dataset[Example]):
    """Map-style set of square uint8 images, decoded on access or (see `decoded`) once for all.

    An image that cannot be read is replaced by the next readable one, so that batches keep their size; its
    example then says so in `broken`. The same image is reported at every visit: count names, not reports.

    Args:
        rows: table with a column of encoded images.
        image_column: name of that column.
        indices: (N,) rows that make up the set, in this order.
        labels: (N,) int64 class of each, -1 = none.
        image_size: height and width of the examples in pixels.
        in_channels: 3 for RGB, 1 for grey.
        crop: how images become square.
        max_broken: give up when more images than this, one after another, cannot be read.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        image_column: str,
        indices: Tensor,
        labels: Tensor,
        image_size: int,
        in_channels: int,
        crop: Crop = "center",
        max_broken: int = 100,
    ) -> None:
        # Undecoded, because in the hands of `datasets` one broken file would end the run.
        column = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._rows, self._column = column, image_column
        self._indices, self._labels = indices, labels
        self._size, self._in_channels, self._crop = image_size, in_channels, crop
        self._max_broken = max_broken
        self._images: Tensor | None = None

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
            image = self._read(candidate)
            if isinstance(image, Tensor):
                return Example(image, int(self._labels[candidate]), failures[0] if failures else None)
            failures.append(image)
        raise _too_many_broken(failures, self._max_broken)

    def decoded(self) -> ImageDataset:
        """The same set, replacements included, held as one uint8 tensor; warns of the replaced images.

        Raises:
            DataError: more than `max_broken` images could not be read.
        """
        images = torch.empty((len(self), self._in_channels, self._size, self._size), dtype=torch.uint8)
        labels, broken = self._labels.clone(), list[str]()
        title = f"decoding {len(self):,} images into {images.numel() / 1e6:,.0f} MB"
        # One bar a machine, not one a process.
        silent = len(self) == 0 or os.environ.get("LOCAL_RANK", "0") != "0"
        for index in track(range(len(self)), title, console=Console(stderr=True), disable=silent):
            images[index], labels[index], failure = self[index]
            broken += [failure] if failure else []
            if len(broken) > self._max_broken:
                raise _too_many_broken(broken, self._max_broken)
        if broken:
            message = f"{len(broken)} of {len(self)} images could not be read, the next ones replace them:"
            warnings.warn("\n  ".join([message, *broken]), stacklevel=2)
        result = copy.copy(self)
        result._images, result._labels = images, labels
        return result

    def _read(self, index: int) -> Tensor | str:
        """The image as a tensor, or "name: reason" why there is none."""
        row = int(self._indices[index])
        value = self._rows[row][self._column] or {}
        try:
            with Image.open(io.BytesIO(_encoded(value))) as image:
                square = crop_image(convert_image(image, self._in_channels), self._size, self._crop)
            return torch.from_numpy(to_array(square, self._in_channels))
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


def _encoded(value: dict[str, Any]) -> bytes:
    path = value.get("path")
    if value.get("bytes") is not None:
        return value["bytes"]
    if not path:
        raise DataError("there is no image in this row")
    # The archives of Hub data sets stay packed: "zip://cat.png::/cache/train.zip".
    with xopen(path, "rb") as file:
        return file.read()


def _too_many_broken(failures: Sequence[str], limit: int) -> DataError:
    return DataError(
        f"{len(failures)} images could not be read (max_broken is {limit}). Repair or remove them, or raise "
        "max_broken to train without them. The first ones:\n  " + "\n  ".join(failures[:5])
    )


# ------------------------------------------------------------------------------------------ loading


def load_data(config: DataConfig, *, image_size: int, in_channels: int) -> ImageData:
    """Opens the data set that `config` names, sets images aside to measure on, and tries to read one image.

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
    train, held_out = _open_splits(config)
    image_column = _find_image_column(train.features, config.image_column)
    label_column = _find_label_column(train.features, config.label_column)

    def images(rows: datasets.Dataset, indices: Tensor, labels: Tensor) -> ImageDataset:
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
        return dataset.decoded() if config.in_memory else dataset

    labels = _labels(train, label_column)
    if held_out is None:
        chosen = torch.zeros(len(train), dtype=torch.bool)
        chosen[_spread(labels, config.held_out_images)] = True
        names = _class_names(train.features, label_column, labels)
        parts = [images(train, mask.nonzero().flatten(), labels) for mask in (~chosen, chosen)]
    else:
        held_out_labels = _labels(held_out, label_column)
        names = _class_names(train.features, label_column, torch.cat([labels, held_out_labels]))
        pairs = ((train, labels), (held_out, held_out_labels))
        parts = [images(rows, torch.arange(len(rows)), values) for rows, values in pairs]
    return ImageData(train=parts[0], held_out=parts[1], class_names=names)


def _check(config: DataConfig, image_size: int, in_channels: int) -> None:
    _mode(in_channels)
    _check_crop(config.crop)
    if config.path is None:
        raise DataError('path is missing; give "digits", a folder of images, parquet files or a Hub name')
    if image_size < 1:
        raise DataError(f"image_size is {image_size}; expected a positive number of pixels")
    for name in ("held_out_images", "num_workers", "max_broken"):
        if getattr(config, name) < 0:
            raise DataError(f"{name} is {getattr(config, name)}; expected 0 or more")


def _open_splits(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training split, and the held-out split if one is named."""
    tables = _open_tables(config)
    train = _row_ranges(config.split, tables)
    if config.held_out_split is None:
        return _take(tables, train), None
    held_out = _row_ranges(config.held_out_split, tables)
    for (name, rows), (other, more) in itertools.product(train, held_out):
        if name == other and max(rows.start, more.start) < min(rows.stop, more.stop):
            raise DataError(
                f"held_out_split {config.held_out_split!r} shares images with split {config.split!r}; "
                "expected images that are not trained on: name another split"
            )
    return _take(tables, train), _take(tables, held_out)


def _row_ranges(split: str, tables: _Tables) -> list[tuple[str, range]]:
    """Names and rows of the tables that a split expression means: "train[:50%]+extra"."""
    try:
        sizes = {name: len(table) for name, table in tables.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except ValueError as error:
        raise DataError(f"split {split!r} cannot be read: {error}; write it like train[:10%]") from error
    if all(part.from_ >= part.to for part in parts):
        raise DataError(f"split {split!r} has no rows; expected images: name another split")
    return [(part.splitname, range(part.from_, part.to)) for part in parts]


def _take(tables: _Tables, ranges: Sequence[tuple[str, range]]) -> datasets.Dataset:
    return datasets.concatenate_datasets([tables[name].select(rows) for name, rows in ranges])


def _split_names(config: DataConfig) -> list[str]:
    """Bare names of the splits asked for, each once: "train[:50%]+extra" asks for train and extra."""
    expressions = [config.split, config.held_out_split or config.split]
    parts = [part for expression in expressions for part in expression.split("+")]
    return list(dict.fromkeys(part.split("[")[0].strip() for part in parts))


def _require_splits(config: DataConfig, known: Iterable[Any]) -> None:
    names = sorted(map(str, known))
    missing = [name for name in _split_names(config) if name not in names]
    if missing and names:
        raise DataError(f"path {config.path!r} has no split {missing[0]!r}; use one of {', '.join(names)}")


def _open_tables(config: DataConfig) -> _Tables:
    """The splits of what path names: those asked for, at least."""
    path = os.path.expanduser(config.path or "")
    if path == "digits":
        _require_splits(config, ["train"])
        return {"train": _digits()}
    if os.path.exists(path) or glob.has_magic(path) or path.endswith(".parquet"):
        if config.name is not None:
            raise DataError(f"name is {config.name!r}, but path {path!r} is not on the Hub: leave name out")
        if os.path.isdir(path):
            return _open_folder(config, Path(path).absolute())
        files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        return _open_parquet(config, [Path(file).absolute() for file in files], root=None)
    if not _HUB_NAME.fullmatch(path):
        raise DataError(f"path {config.path!r} does not exist, and is no Hub name (owner/name): check it")
    if "/" not in path and importlib.util.find_spec(f"datasets.packaged_modules.{path.split('.')[0]}"):
        # `datasets` has a reader of this name, and would turn it loose on the current folder.
        raise DataError(f"path {path!r} is the name of a file format; give a folder, files or a Hub name")
    return _prepare(config, path=path, name=config.name)


def _prepare(config: DataConfig, **source: Any) -> _Tables:
    """Splits that a builder of `datasets` makes of `source`, in its own cache, if they are not there yet."""
    try:
        builder = datasets.load_dataset_builder(**source)
        _require_splits(config, builder.info.splits or builder.config.data_files or ())
        builder.download_and_prepare()
        return {name: builder.as_dataset(split=name) for name in _split_names(config)}
    except DataError:
        raise
    # What `datasets` raises for broken, odd or empty files, a full disk, unknown names, an unreachable Hub.
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, RuntimeError) as error:
        problem = "cannot be read; repair, replace or remove the file at fault"
        if "name" in source:
            problem = "is no file or folder here, nor to be had from the Hub; check path, name and network"
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"path {config.path!r} {problem}: {error}{cause}") from error


def _digits() -> datasets.Dataset:
    """The 1797 8 x 8 digits of scikit-learn, whose grey values 0..16 become 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError('path "digits" needs scikit-learn: pip install scikit-learn') from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    label = datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    return datasets.Dataset.from_dict(columns, datasets.Features({"image": datasets.Image(), "label": label}))


def _open_folder(config: DataConfig, folder: Path) -> _Tables:
    """Splits of a folder of images or of parquet files."""
    homes: dict[tuple[str, ...], list[str]] = {}  # image files by their folder, relative to `folder`
    parquet: list[Path] = []
    described = False
    for directory, names, files in os.walk(folder, followlinks=True):
        names[:] = [name for name in names if not name.startswith((".", "__"))]  # caches and thumbnails
        files = sorted(file for file in files if not file.startswith("."))
        if images := [file for file in files if os.path.splitext(file)[1].lower() in ImageFolder.EXTENSIONS]:
            homes[Path(directory).relative_to(folder).parts] = images
        described |= any(file in ImageFolder.METADATA_FILENAMES for file in files)
        parquet += [Path(directory, file) for file in files if file.endswith(".parquet")]
    if tables := [file for file in sorted(parquet) if file.name not in ImageFolder.METADATA_FILENAMES]:
        return _open_parquet(config, tables, root=folder)
    if not homes:
        raise DataError(f"folder {str(folder)!r} has no images and no parquet files; is it the right folder?")
    top = {home[0] if home else "" for home in homes}
    roots: dict[str, tuple[str, ...]] = {name: (name,) for name in top} if top <= _SPLITS else {"train": ()}
    _require_splits(config, roots)
    roots = {name: roots[name] for name in _split_names(config)}
    if described:
        patterns = {name: f"{glob.escape(os.path.join(folder, *root))}/**" for name, root in roots.items()}
        return _prepare(config, path="imagefolder", data_files=patterns)
    return _list_images(str(folder), roots, homes)


def _list_images(
    folder: str, roots: Mapping[str, tuple[str, ...]], homes: Mapping[tuple[str, ...], Sequence[str]]
) -> _Tables:
    """Splits with the images below their root folders, labelled by sub-folder.

    Not left to `datasets`, which takes a class "bullet_train" for the training split and drops the others,
    forgets the labels if there is one class only, and needs minutes for a million files, at every start.
    """
    classes = sorted({home[len(at) :] for at in roots.values() for home in homes if home[: len(at)] == at})
    if {len(parts) for parts in classes} not in ({0}, {1}):
        deepest = "/".join(max((len(parts), parts) for parts in classes)[1])
        raise DataError(
            f"folder {folder!r} has images at several depths or too deep, as in {deepest!r}; expected all of "
            "them loose (unlabelled), or all in sub-folders, one a class: move the others, or narrow path"
        )
    features = datasets.Features({"image": datasets.Image()})
    if classes != [()]:
        features["label"] = datasets.ClassLabel(names=[parts[0] for parts in classes])
    tables = {}
    for split, root in roots.items():
        rows = [
            (file, number) for number, parts in enumerate(classes) for file in homes.get(root + parts, ())
        ]
        paths = [os.path.join(folder, *root, *classes[number], file) for file, number in rows]
        columns = {"image": paths, "label": [number for _, number in rows]}
        tables[split] = datasets.Dataset.from_dict({name: columns[name] for name in features}, features)
    return tables


def _open_parquet(config: DataConfig, files: Sequence[Path], root: Path | None) -> _Tables:
    """Splits of parquet files: those below the folder `root`, or those that path names one by one."""
    if not files:
        raise DataError(f"path {config.path!r} does not exist, or matches no files; check it")
    splits: dict[str, list[str]] = {}
    for file in files:
        try:
            pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{str(file)!r} is not a readable parquet file: {error}. Replace it") from error
        splits.setdefault(_split_of(file, root), []).append(glob.escape(str(file)))
    if len(splits) == 1 and (root is None or "" in splits):
        # Files that are named one by one are meant, whatever they are called.
        splits = {"train" if root else _split_names(config)[0]: next(iter(splits.values()))}
    if "" in splits:
        name, others = splits[""][0], ", ".join(sorted(filter(None, splits)))
        raise DataError(f"{name!r} is of no split, while other files are ({others}); rename or move it")
    _require_splits(config, splits)
    return _prepare(config, path="parquet", data_files={name: splits[name] for name in _split_names(config)})


def _split_of(file: Path, root: Path | None) -> str:
    """Split that a file's name or folder tells ("" = none): train-00000-of-00002, test_1, val/part0."""
    if shard := _SHARD.fullmatch(file.stem):
        return shard[1]
    folders = file.relative_to(root).parts[:-1] if root else ()
    words = [re.split(r"[-._ 0-9]", file.stem)[0], *reversed(folders)]
    return next((word for word in words if word in _SPLITS), "")


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
        raise DataError(
            f"label_column {wanted!r} is {kind}; expected ClassLabel or ints, of {list(features)}"
        )
    found = [*(name for name in named if name in typed), *typed, *filter(usable, named)]
    if wanted is None and named and not found:
        warnings.warn(f"column {named[0]!r} is no ClassLabel and no int: images are unlabelled", stacklevel=3)
    return wanted or (found[0] if found else None)


def _labels(rows: datasets.Dataset, column: str | None) -> Tensor:
    """(N,) int64 labels of a split, -1 = none."""
    if column is None:
        return torch.full((len(rows),), -1, dtype=torch.int64)
    values = rows.select_columns([column]).with_format("arrow")[:][column].cast(pa.int64())
    known = values.drop_null().to_numpy()
    if (known < 0).any() and not isinstance(rows.features[column], datasets.ClassLabel):
        raise DataError(
            f"label_column {column!r} holds {known.min()}; expected 0, 1, ...: renumber the classes"
        )
    return torch.from_numpy(np.array(values.fill_null(-1).to_numpy()))


def _class_names(features: datasets.Features, column: str | None, labels: Tensor) -> tuple[str, ...]:
    if column is None:
        return ()
    if isinstance(features[column], datasets.ClassLabel):
        return tuple(features[column].names)
    return tuple(str(label) for label in range(int(labels.max()) + 1))


def _spread(labels: Tensor, count: int) -> Tensor:
    """Indices of at most `count` images evenly spaced in the order of labels: each class in proportion."""
    total = len(labels)
    count = min(count, max(total // 10, 1))
    if count == total:
        raise DataError(
            f"held_out_images leaves nothing of {total} image to train on; set it to 0, or add images"
        )
    places = (2 * torch.arange(count) + 1) * total // (2 * max(count, 1))
    return torch.argsort(labels, stable=True)[places]


# ------------------------------------------------------------------------------------------ batches


class GlobalBatchSampler(Sampler[list[int]]):
    """Endless lists of indices; what an optimiser step sees depends on (seed, step) alone.

    Every epoch is a fresh permutation of all images. Epochs are strung together, and step k uses positions
    k * B .. (k + 1) * B - 1 of the string, B = global_batch_size: batches straddle epochs, and neither the
    number of processes, nor accumulation, nor a resumed run changes what a step sees. For each step come
    `accumulation` lists of m = B / (num_processes * accumulation) indices: list a of process p has the
    positions from (a * num_processes + p) * m on, counted from the start of the step.

    The seed of epoch e is the first 8 bytes (big-endian) of SHA-256 of "itarflow epoch {seed} {e}".

    Raises:
        ValueError: an argument is out of range, or num_processes * accumulation does not divide the batch.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        counts = {"num_images": num_images, "global_batch_size": global_batch_size}
        counts |= {"num_processes": num_processes, "accumulation": accumulation}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if not 0 <= process_index < num_processes or start_step < 0:
            raise ValueError(
                f"process {process_index} of {num_processes}, start_step {start_step}: out of range"
            )
        parts = num_processes * accumulation
        if global_batch_size % parts:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not divisible by num_processes {num_processes} x "
                f"accumulation {accumulation}; choose a multiple of {parts}"
            )
        self.num_images, self.seed = num_images, seed
        self.size, self.stride = global_batch_size // parts, global_batch_size // accumulation
        self.start = start_step * global_batch_size + process_index * self.size

    def __iter__(self) -> Iterator[list[int]]:
        position, epoch, order = self.start, -1, torch.empty(0)
        while True:
            indices: list[int] = []
            while len(indices) < self.size:
                wanted, offset = divmod(position + len(indices), self.num_images)
                if wanted != epoch:  # positions only grow, so that one permutation at a time is enough
                    epoch, order = wanted, self._permutation(wanted)
                indices += order[offset : offset + self.size - len(indices)].tolist()
            yield indices
            position += self.stride

    def _permutation(self, epoch: int) -> Tensor:
        digest = hashlib.sha256(f"itarflow epoch {self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        return torch.randperm(self.num_images, generator=generator)


def batches(dataset: ImageDataset, sampler: Iterable[list[int]], num_workers: int = 0) -> Iterator[Batch]:
    """A batch for every list of indices that the sampler yields, in its order.

    Args:
        dataset: the images; a set that is held in memory is indexed directly, without workers.
        sampler: lists of indices, such as a `GlobalBatchSampler`.
        num_workers: processes that decode ahead; 0 decodes here.

    Yields:
        Batches, endlessly if the sampler is endless.
    """
    if dataset.images is not None:
        for indices in sampler:
            yield Batch(dataset.images[indices], dataset.labels[indices], ())
        return
    yield from DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_collate,
        generator=torch.Generator(),  # else the loader draws from the global one, which is not its to advance
    )


def in_order(dataset: ImageDataset, batch_size: int, num_workers: int = 0) -> Iterator[Batch]:
    """Every image once, in the order of the set; the last batch may be smaller. Arguments as in `batches`."""
    indices = list(range(len(dataset)))
    return batches(dataset, [indices[i : i + batch_size] for i in indices[::batch_size]], num_workers)


def _collate(examples: Sequence[Example]) -> Batch:
    images, labels, broken = zip(*examples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels, dtype=torch.int64), tuple(filter(None, broken)))
