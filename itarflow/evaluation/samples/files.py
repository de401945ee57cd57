"""Sets of 8-bit sample images on disk, read in parts, from itarflow or other software.

`itarflow evaluate` writes safetensors files of some images each; other software image files, or the `.npz`
of ADM's evaluation suite (arr_0: uint8 (N, H, W, C)). All are uint8 tensors (n, C, H, W) here.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from itarflow.data.images import to_array
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import atomically

SUFFIX = ".safetensors"
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_NONE = torch.zeros(0, dtype=torch.int64)


class Samples(Protocol):
    """Images of one size, by number."""

    @property
    def name(self) -> str:
        """For tables and messages."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W); C is 1 or 3."""

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64, -1 = none; None if they are not recorded."""

    @property
    def broken(self) -> Tensor:
        """(n,) int64 numbers of images that had values which were not finite; such values are stored as mid-grey."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1, uint8 (n, C, H, W).

        Raises:
            DataError: a file is damaged.
        """


def open_samples(path: Path) -> Samples:
    """The images in a folder of `itarflow evaluate`, an `.npz` file, or a folder of image files in their order.

    Raises:
        DataError: there are none, they are of several sizes, or a file is damaged.
    """
    if path.is_file() and path.suffix == ".npz":
        return ArraySamples.open(path)
    if not path.is_dir():
        raise DataError(
            f"{path} is neither a folder nor an .npz file; expected samples, such as evaluation/iterative of "
            "`itarflow evaluate`, a folder of images, or an .npz file with uint8 arr_0."
        )
    if shards := _whole(path):
        return StoredSamples.open(path, shards)
    if inside := sorted(folder.name for folder in path.iterdir() if folder.is_dir() and _whole(folder)):
        names = ", ".join(str(path / name) for name in inside)
        raise DataError(f"{path} holds several sets of samples; name one of them: {names}.")
    return ImageFileSamples.open(path)


def batches(samples: Samples, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
    """Images start .. stop - 1 (None = all) in their order, at most `size` at a time."""
    end = len(samples) if stop is None else stop
    return (samples.read(first, min(first + size, end)) for first in range(start, end, size))


def _whole(folder: Path) -> list[Path]:
    """The files of images in a folder, in their order, without unfinished ones."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def shard_name(start: int, stop: int) -> str:
    """The file of images start .. stop - 1."""
    return f"{start:08d}-{stop:08d}{SUFFIX}"


def write_shard(path: Path, images: Tensor, labels: Tensor, broken: Tensor) -> None:
    """Write a file of images, whole or not at all.

    Args:
        path: by `shard_name`.
        images: uint8 (n, C, H, W).
        labels: int64 (n,), -1 = none.
        broken: bool (n,), whether values were not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as partial:
        tensors = {"images": images, "labels": labels, "broken": broken}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)


@dataclass(frozen=True)
class StoredSamples:
    """Images in files written by `write_shard`, one after another."""

    name: str
    image_shape: tuple[int, int, int]
    labels: Tensor | None
    broken: Tensor
    files: tuple[Path, ...]
    starts: tuple[int, ...]
    """Number of the first image of each file, and at the end the number of all."""

    @classmethod
    def open(cls, folder: Path, files: Sequence[Path]) -> StoredSamples:
        """All files must be there, from 0 on without a gap."""
        starts, labels, broken = [0], list[Tensor](), list[Tensor]()
        shape: tuple[int, ...] | None = None
        for path in files:
            ends = re.fullmatch(rf"(\d+)-(\d+){re.escape(SUFFIX)}", path.name)
            if ends is None or int(ends[1]) != starts[-1]:
                raise DataError(
                    f"{path} does not go on where the images before it end, at {starts[-1]}; let `itarflow "
                    "evaluate` make what is missing, by the same command."
                )
            with _opened(path) as file:
                labels.append(file.get_tensor("labels"))
                broken.append(file.get_tensor("broken").nonzero().flatten() + starts[-1])
                found = tuple(file.get_slice("images").get_shape()[1:])
            if shape not in (None, found):
                raise DataError(f"{path} holds images of shape {found}, files before it {shape}; expected one size.")
            shape = found
            starts.append(int(ends[2]))
        assert shape is not None
        name = "/".join(folder.absolute().parts[-2:])
        image_shape = (shape[0], shape[1], shape[2])
        return cls(name, image_shape, torch.cat(labels), torch.cat(broken), tuple(files), tuple(starts))

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """See `Samples`."""
        read = [torch.zeros((0, *self.image_shape), dtype=torch.uint8)]
        for path, first, end in zip(self.files, self.starts[:-1], self.starts[1:], strict=True):
            if first < stop and start < end:
                with _opened(path) as file:
                    read.append(file.get_slice("images")[max(start - first, 0) : min(stop, end) - first])
        return torch.cat(read)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file whose damage is a DataError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read: {error}; delete it, and let it be made again.") from error


@dataclass(frozen=True)
class ArraySamples:
    """Images in an array (N, H, W, C)."""

    name: str
    array: np.ndarray
    labels: Tensor | None
    broken: Tensor = _NONE

    @classmethod
    def open(cls, path: Path) -> ArraySamples:
        """arr_0 holds the images, arr_1 their labels if it is there, as in ADM's files."""
        try:
            with np.load(path, allow_pickle=False) as file:
                array = file["arr_0"] if "arr_0" in file.files else None
                labels = file["arr_1"] if "arr_1" in file.files else None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} can't be read: {error}. Copy or download it again.") from error
        if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
            found = "no arr_0" if array is None else f"arr_0 of {array.dtype}, shape {array.shape}"
            raise DataError(f"{path} has {found}; expected arr_0 of uint8, shape (N, H, W, 3).")
        given = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        return cls(path.name, array, given)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `Samples`."""
        _, height, width, channels = self.array.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> Tensor:
        """See `Samples`."""
        return torch.from_numpy(np.ascontiguousarray(self.array[start:stop].transpose(0, 3, 1, 2)))


@dataclass(frozen=True)
class ImageFileSamples:
    """Image files of one size, in the order of their names."""

    name: str
    image_shape: tuple[int, int, int]
    files: tuple[Path, ...]
    labels: None = None
    broken: Tensor = _NONE

    @classmethod
    def open(cls, folder: Path) -> ImageFileSamples:
        """All images in a folder and the folders in it; grey if the first one is."""
        files = tuple(
            sorted(
                path
                for path in folder.rglob("*")
                if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")  # else it is half written
            )
        )
        if not files:
            raise DataError(
                f"{folder} has no images ({', '.join(_IMAGE_SUFFIXES)}) and no samples of `itarflow evaluate`; "
                "expected a folder with some."
            )
        try:
            with Image.open(files[0]) as first:
                channels = 1 if first.mode in ("1", "L") else 3
                shape = (channels, first.height, first.width)
        except OSError as error:
            raise DataError(f"{files[0]} can't be read: {error}.") from error
        return cls(folder.name, shape, files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Tensor:
        """See `Samples`."""
        channels, height, width = self.image_shape
        images = torch.zeros((0, *self.image_shape), dtype=torch.uint8)
        for path in self.files[start:stop]:
            try:
                with Image.open(path) as image:
                    if image.size != (width, height):
                        raise DataError(
                            f"{path} has {image.width} x {image.height} pixels, others {width} x {height}; "
                            "samples are compared as they are, so crop or resize them alike first."
                        )
                    array = to_array(image.convert("L" if channels == 1 else "RGB"), channels)
            except OSError as error:
                raise DataError(f"{path} can't be read: {error}. Make or copy it again.") from error
            images = torch.cat([images, torch.from_numpy(array)[None]])
        return images


# -- for other software -----------------------------------------------------------------------------------------


def write_npz(samples: Samples, path: Path) -> None:
    """Write arr_0, uint8 (N, H, W, 3), which ADM's evaluation suite reads; grey images get three equal channels.

    arr_1 holds the labels, if they are known, as in ADM's own files.
    """
    _, height, width = samples.image_shape
    array = np.empty((len(samples), height, width, 3), np.uint8)
    for start, part in zip(range(0, len(samples), 256), batches(samples, 256), strict=True):
        array[start : start + len(part)] = part.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    labels = () if samples.labels is None else (samples.labels.numpy(),)
    with atomically(path) as partial, partial.open("wb") as file:
        np.savez(file, array, *labels)


def write_png(samples: Samples, folder: Path) -> None:
    """Write 00000000.png, ...; images that are already there are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(samples)):
        path = folder / f"{index:08d}.png"
        if not path.exists():
            (image,) = samples.read(index, index + 1)
            array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
            with atomically(path) as partial:
                Image.fromarray(array).save(partial, format="png")
