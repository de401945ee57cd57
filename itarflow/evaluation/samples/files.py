"""Sets of 8-bit sample images on disk, read in parts, from itarflow or other software.

`itarflow evaluate` writes safetensors files of some images each; other software image files, or the `.npz`
of ADM's evaluation suite (arr_0: uint8 (N, H, W, C)). All are uint8 tensors (n, C, H, W) here.
"""

from __future__ import annotations

import io
import json
import re
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
from itarflow.data.picture_file import open_picture
from itarflow.evaluation.samples.manifest import MANIFEST, origin_digest, read_manifest
from itarflow.evaluation.samples.npz import ArraySamples
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import atomically, check_no_link, open_regular, tensors_sha256
from itarflow.runtime.json_file import parse_json
from itarflow.runtime.text import listed, printable

SUFFIX = ".safetensors"
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_KEY = "itarflow_samples"  # of the metadata in a file
_NONE = torch.zeros(0, dtype=torch.int64)
_AGAIN = "The command that began the folder, `itarflow evaluate` or `sweep`, makes such files again."


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
            OSError: it can't be read.
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


def write_shard(path: Path, images: Tensor, labels: Tensor, broken: Tensor, origin: str = "") -> None:
    """Write a file of images, whole or not at all, with its range, checksum and origin.

    Args:
        path: by `shard_name`.
        images: uint8 (n, C, H, W).
        labels: int64 (n,), -1 = none.
        broken: bool (n,), whether values were not finite.
        origin: `origin_digest` of the samples.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"images": images, "labels": labels, "broken": broken}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    facts = {"range": path.stem, "origin": origin, "sha256": tensors_sha256(tensors)}
    with atomically(path) as partial:
        save_file(tensors, partial, {_KEY: json.dumps(facts)})  # one entry: their order is not kept


def read_shard(path: Path, origin: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file of images, which are what was written under its name.

    Files of version 0.1 carry no facts: they are taken if number, shapes and types of their tensors fit.

    Args:
        path: by `shard_name`.
        origin: of the samples that it has to be of; None = any.

    Raises:
        DataError: it is damaged, was written under another name, or is of other samples.
        OSError: it can't be read just now, which says nothing about what it holds.
    """
    return _read(path, origin)[0]


def renew_shard(path: Path, origin: str, labels: Tensor, image_shape: tuple[int, int, int]) -> bool:
    """Check a file of images, and give it a checksum if it has none, as files of version 0.1; whether it had none.

    Args:
        path: by `shard_name`.
        origin: of the samples that it has to be of.
        labels: (n,) that its images were to get; of a file with a checksum they are a part of the origin.
        image_shape: (C, H, W), likewise.

    Raises:
        DataError, OSError: as `read_shard`.
    """
    tensors, facts = _read(path, origin)
    if facts is not None:
        return False
    if tuple(tensors["images"].shape[1:]) != image_shape or not torch.equal(tensors["labels"], labels):
        raise _strange(path, f"its labels are others, or its images not of shape {image_shape}")
    write_shard(path, **tensors, origin=origin)
    return True


def _read(path: Path, origin: str | None) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """See `read_shard`; also what the file says of itself, None in version 0.1."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    facts = parse_json(metadata[_KEY], dict[str, str], str(path)) if _KEY in metadata else None
    start, stop = _range(path)
    found = {name: (one.dtype, one.ndim, *one.shape[:1]) for name, one in tensors.items()}
    kinds = {"images": (torch.uint8, 4), "labels": (torch.int64, 1), "broken": (torch.bool, 1)}
    if found != {name: (*kind, stop - start) for name, kind in kinds.items()}:
        held = ", ".join(f"{name} of {one.dtype}, shape {tuple(one.shape)}" for name, one in sorted(tensors.items()))
        raise _strange(path, f"it holds {held}; expected {stop - start} uint8 images, int64 labels and bools (broken)")
    if facts is not None and facts.get("sha256") != tensors_sha256(tensors):
        raise _strange(path, "its checksum is that of other images")
    if facts is not None and facts.get("range") != path.stem:
        raise _strange(path, f"it holds images {facts.get('range', 'unknown')}")
    if facts is not None and origin is not None and facts.get("origin") != origin:
        raise _strange(path, f"its images were made otherwise than {MANIFEST} says")
    return tensors, facts


def _strange(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is not what its name says: {printable(reason)}. {_AGAIN}")


def set_aside(path: Path) -> None:
    """Give a file of images that is not what its name says a hidden name, so that it can be made again."""
    path.replace(path.with_name(f".damaged-{path.name}"))


def strange_files(folder: Path, expected: Sequence[str]) -> list[Path]:
    """Files of images in a folder whose names are not among the expected ones."""
    return [path for path in _whole(folder) if path.name not in expected]


def _range(path: Path) -> tuple[int, int]:
    """First image of a file, and one past its last, by its name; raises DataError if that names none."""
    ends = re.fullmatch(rf"(\d+)-(\d+){re.escape(SUFFIX)}", path.name)
    if ends is None or int(ends[1]) >= int(ends[2]):
        raise DataError(f"{path} is no file of samples by its name; expected {shard_name(0, 64)}: move it away.")
    return int(ends[1]), int(ends[2])


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
        """All files must be there, from 0 on without a gap, as many images as samples.json says, each one whole."""
        starts, labels, broken = [0], list[Tensor](), list[Tensor]()
        shape: tuple[int, ...] | None = None
        manifest = read_manifest(folder.parent)
        origin = None if manifest is None else origin_digest(manifest, folder.name)
        for path in files:
            start, stop = _range(path)
            if start != starts[-1]:
                raise DataError(
                    f"{path} does not go on where the images before it end, at {starts[-1]}; let `itarflow "
                    "evaluate` make what is missing, by the same command."
                )
            tensors = read_shard(path, origin)
            labels.append(tensors["labels"])
            broken.append(tensors["broken"].nonzero().flatten() + start)
            found = tuple(tensors["images"].shape[1:])
            if shape not in (None, found):
                raise DataError(f"{path} holds images of shape {found}, files before it {shape}; expected one size.")
            shape = found
            starts.append(stop)
        if manifest is not None and starts[-1] != manifest["num_samples"]:
            raise DataError(
                f"{folder} holds {starts[-1]} images, but {manifest['num_samples']} by its {MANIFEST}; let `itarflow "
                "evaluate` make what is missing, by the same command, or move away what is too much."
            )
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
    """An open safetensors file whose damage is a DataError; a disk or network that fails stays an OSError."""
    try:
        open_regular(path).close()  # a pipe would be waited for
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {printable(str(error))}. {_AGAIN}") from error
    except OSError as error:
        raise OSError(f"{path} can't be read: {error}. It is left as it is; try again, or check the disk.") from error


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
        return cls(folder.name, _picture(files[0]).shape, files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Tensor:
        """See `Samples`."""
        channels, height, width = self.image_shape
        files = self.files[start:stop]
        images = torch.zeros((len(files), *self.image_shape), dtype=torch.uint8)
        for place, path in enumerate(files):
            array = _picture(path, channels)
            if array.shape != self.image_shape:
                raise DataError(
                    f"{printable(str(path))} has {array.shape[2]} x {array.shape[1]} pixels, others {width} x "
                    f"{height}; samples are compared as they are, so crop or resize them alike first."
                )
            images[place] = torch.from_numpy(array)
        return images


def _picture(path: Path, channels: int | None = None) -> np.ndarray:
    """uint8 (channels, H, W), of 8 bits by the rules of training data; None = 1 of a grey picture, 3 of others."""
    try:
        with open_picture(path) as image:
            grey = image.mode in ("1", "L") or image.mode.startswith("I")
            return to_array(image, channels or (1 if grey else 3))
    except MemoryError:
        raise
    except Exception as error:  # nearly anything, by damaged pictures
        raise DataError(
            f"{printable(str(path))} can't be read: {printable(str(error))}. Make or copy it again."
        ) from error


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
    """Write 00000000.png, ...; images that are already there, and are these, are left as they are.

    Raises:
        DataError: the folder holds other things, or is a link.
    """
    check_no_link(folder)
    names = [f"{index:08d}.png" for index in range(len(samples))]
    folder.mkdir(parents=True, exist_ok=True)
    known = set(names)
    if strange := sorted(path.name for path in folder.iterdir() if path.name not in known and path.name[0] != "."):
        raise DataError(
            f"{folder} holds other things than these {len(samples):,} samples: {printable(listed(strange))}; move "
            "them away, or they would be taken for samples."
        )
    for index, name in enumerate(names):
        image = samples.read(index, index + 1)[0].numpy()
        path = folder / name
        if not path.exists() or not _shows(path, image):
            encoded = io.BytesIO()
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(encoded, format="png")
            with atomically(path) as partial:
                partial.write_bytes(encoded.getvalue())


def _shows(path: Path, image: np.ndarray) -> bool:
    """Whether a picture is this one."""
    try:
        return bool(np.array_equal(_picture(path, len(image)), image))
    except DataError:
        return False
