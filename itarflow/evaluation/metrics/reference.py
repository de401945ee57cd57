"""Reference statistics: features of real images, computed once for a data set and a crop, and cached.

A file of statistics is named after a fingerprint of all that they depend on, so that none is ever taken for another.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import constants
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from itarflow.data.dataset import too_many_broken
from itarflow.data.images import Crop
from itarflow.data.load import DataConfig, load_data
from itarflow.data.loader import in_order
from itarflow.evaluation.conversion import Protocol, as_scripts_see
from itarflow.evaluation.metrics.extractors import INCEPTION, POOL_FEATURES, SPATIAL_FEATURES, Extractor
from itarflow.evaluation.metrics.features import Extracted, Moments, extract
from itarflow.evaluation.samples.npz import array_headers, read_array
from itarflow.runtime.errors import RunError
from itarflow.runtime.files import atomically, check_writable, open_regular, tensors_sha256, weights_digest
from itarflow.runtime.json_file import parse_json
from itarflow.runtime.processes import main_first, on_main
from itarflow.runtime.progress import image_progress
from itarflow.runtime.text import display_name, without_folders

KEPT_IMAGES = 10_000
"""Real images whose features are kept, for kernel distances, precision and recall: as many as ADM's files hold."""

_KEY = "itarflow_reference"  # of the metadata in a file of statistics
_CHECKSUM = "sha256"
_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """The source of statistics.

    Attributes:
        source: name of the images: "cifar10, split train", or the name of a file.
        extractor: its name.
        identity: the extractor's; "" of an .npz file, which only says by its numbers that it is of Inception.
        image_size: height and width of the images in pixels; None = not in the file.
        crop: how they became square; None = not in the file.
        count: number of images; None = not in the file.
        broken: "name: reason" of each image that could not be read, and was replaced by its neighbour.
    """

    source: str
    extractor: str
    identity: str
    image_size: int | None
    crop: Crop | None
    count: int | None
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Attributes:
        origin: their source.
        pool: moments of the pooled features.
        spatial: moments of those that sFID is taken of, or None.
        features: (K, F) float32 pooled features of some images, evenly spaced, or None.
    """

    origin: Origin
    pool: Moments
    spatial: Moments | None = None
    features: Tensor | None = None

    def digest(self) -> str:
        """A text that differs between statistics that differ."""
        tensors = {"mean": self.pool.mean, "covariance": self.pool.covariance}
        if self.spatial is not None:
            tensors |= {"spatial_mean": self.spatial.mean, "spatial_covariance": self.spatial.covariance}
        if self.features is not None:
            tensors["features"] = self.features
        return f"{weights_digest(tensors)} {json.dumps(asdict(self.origin))}"


def statistics_folder() -> Path:
    """The default folder of statistics: beside the caches of Hugging Face."""
    return Path(constants.HF_HOME, "itarflow", "statistics")


def reference_of(
    data: DataConfig,
    *,
    image_size: int,
    in_channels: int,
    extractor: Extractor,
    accelerator: Accelerator,
    keep: int = KEPT_IMAGES,
    batch_size: int = 50,
    cache: Path | None = None,
    console: Console | None = None,
    protocol: Protocol = "rounded",
) -> Reference:
    """Statistics of all images of `data.split`, unmirrored; from the cache if they have been computed before.

    Every process calls this, computes its share, and gets the same.

    The fingerprint covers the images (see `ImageDataset.fingerprint`), their size, channels and crop, the extractor,
    and `keep`; it does not cover versions of Pillow.

    Args:
        data: where the images are; its held-out settings are ignored.
        image_size: height and width of the images in pixels.
        in_channels: 3 for RGB, 1 for grey.
        extractor: on the device of this process.
        accelerator: of the launch.
        keep: of how many evenly spaced images to keep the features.
        batch_size: images at a time in each process.
        cache: folder for statistics; None = `statistics_folder()`.
        console: for a line of progress; None = none.
        protocol: how pixels become 8-bit; "official" also flips images at random.

    Raises:
        RunError: the data cannot be used, a kept file is damaged, or the cache cannot be written.
        DataError: this process met more than `data.max_broken` images that cannot be read.
    """
    whole = replace(data, held_out_split=None, held_out_images=0, horizontal_flip=False, in_memory=False)
    images = main_first(accelerator, lambda: load_data(whole, image_size=image_size, in_channels=in_channels).train)
    origin = Origin(
        f"{display_name(str(data.path))}, split {data.split}"
        + ("" if protocol == "rounded" else ", flipped, truncated"),
        extractor.name,
        extractor.identity,
        image_size,
        data.crop,
        len(images),
    )

    share = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    broken: list[str] = []

    def batches() -> Iterator[Tensor]:
        dealt = in_order(images, batch_size, data.num_workers, **share)
        for number, batch in enumerate(dealt):
            broken.extend(batch.broken)
            if len(broken) > data.max_broken:
                raise too_many_broken(broken, data.max_broken)
            first = (number * accelerator.num_processes + accelerator.process_index) * batch_size
            yield as_scripts_see(batch.images, first) if protocol == "official" else batch.images

    def compute() -> Reference:
        found = _extract(extractor, batches(), len(images), keep, batch_size, accelerator, console)
        names = tuple(sorted({without_folders(name, str(data.path)) for name in gather_object(broken)}))
        return Reference(
            replace(origin, broken=names),
            found.pool.moments(),
            None if found.spatial is None else found.spatial.moments(),
            found.kept.pool,
        )

    fingerprint = _from_main(accelerator, lambda: _hash(asdict(origin), in_channels, keep, images.fingerprint()))
    return _cached(cache or statistics_folder(), fingerprint, accelerator, compute)


def read_reference(
    path: Path,
    *,
    extractor: Extractor,
    image_size: int,
    crop: Crop,
    accelerator: Accelerator,
    keep: int = KEPT_IMAGES,
    batch_size: int = 50,
    cache: Path | None = None,
    console: Console | None = None,
    protocol: Protocol = "rounded",
) -> Reference:
    """Statistics from a file: one that `reference_of` has kept, or an .npz file such as ADM's.

    An .npz file holds arr_0, uint8 images (N, H, W, C), or mu and sigma of Inception's pooled features and mu_s and
    sigma_s of its spatial ones, or both. With the published Inception the moments are taken as they are, and arr_0
    gives the features to keep, which are cached; with any other extractor all comes from arr_0.

    Args:
        path: the file, whose name ends in .safetensors or .npz.
        extractor: on the device of this process.
        image_size: height and width of the samples in pixels.
        crop: how the real images of the samples' model became square. An .npz file does not hold its own.
        accelerator: of the launch; every process calls this, and gets the same.
        keep: of how many evenly spaced images of arr_0 to keep the features.
        batch_size: images at a time in each process.
        cache: folder for the features of arr_0; None = `statistics_folder()`.
        console: for a line of progress; None = none.
        protocol: how pixels of the samples become 8-bit; those of the file are what they are.

    Raises:
        OSError: there is no such file.
        RunError: a kept file is damaged, or the cache cannot be written.
        ValueError: the file is damaged, or of another size, crop or extractor; both are named.
    """
    if protocol == "official" and path.suffix != ".safetensors":
        raise ValueError(
            f"the protocol 'official' flips real images at random, but {path} is of images as they are; give the "
            "images by --data, or take the protocol 'rounded'."
        )
    if not path.is_file():
        raise OSError(f"{path} is no file; expected statistics of real images (.safetensors, or ADM's .npz).")
    if path.suffix == ".safetensors":
        reference = _read(path)
        _check(path, reference.origin, extractor, image_size, crop)
        return reference
    arrays = array_headers(path)
    shape, dtype = arrays.get("arr_0", ((0, image_size, image_size, 3), np.dtype(np.uint8)))
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
        raise ValueError(f"{path} holds arr_0 of {dtype} {shape}; expected uint8 images (N, H, W, 3).")
    if shape[1:3] != (image_size, image_size):
        raise ValueError(
            f"{path} holds images of {shape[2]} x {shape[1]} pixels, but the samples have {image_size} x {image_size};"
            " use statistics of that size."
        )
    has_moments = extractor.name == INCEPTION and {"mu", "sigma"} <= arrays.keys()
    if not has_moments and "arr_0" not in arrays:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, and no images (arr_0) from which to compute the "
            f"statistics of {extractor.name}; expected arr_0, or with {INCEPTION} mu and sigma."
        )
    known = image_size if "arr_0" in arrays else None
    origin = Origin(path.name, extractor.name, extractor.identity, known, None, None if has_moments else shape[0])

    def compute() -> Reference:
        images = read_array(path, "arr_0")
        starts = range(accelerator.process_index * batch_size, len(images), accelerator.num_processes * batch_size)
        share = (torch.from_numpy(images[at : at + batch_size]).permute(0, 3, 1, 2) for at in starts)
        found = _extract(extractor, share, len(images), keep, batch_size, accelerator, console)
        if has_moments:
            return replace(_moments_of(path, arrays, origin), features=found.kept.pool)
        spatial = None if found.spatial is None else found.spatial.moments()
        return Reference(origin, found.pool.moments(), spatial, found.kept.pool)

    if "arr_0" not in arrays:
        return _moments_of(path, arrays, origin)
    state = path.stat()
    file = [str(path.resolve()), state.st_size, state.st_mtime_ns]
    fingerprint = _from_main(accelerator, lambda: _hash(asdict(origin), keep, file))
    return _cached(cache or statistics_folder(), fingerprint, accelerator, compute)


def _extract(
    extractor: Extractor,
    share: Iterable[Tensor],
    total: int,
    keep: int,
    batch_size: int,
    accelerator: Accelerator,
    console: Console | None,
) -> Extracted:
    """Of batches that are dealt to the processes in turn."""
    shown = console if accelerator.is_main_process else None

    def numbered() -> Iterator[tuple[Tensor, Tensor]]:
        for number, images in enumerate(share):
            start = (number * accelerator.num_processes + accelerator.process_index) * batch_size
            yield torch.arange(start, start + len(images)), images

    with image_progress(shown, "real images", -(-total // accelerator.num_processes), 0) as show:
        return extract(extractor, numbered(), total, keep=keep, count=show)


def _check(path: Path, origin: Origin, extractor: Extractor, image_size: int, crop: Crop) -> None:
    for what, stored, wanted in (
        ("extractor", origin.extractor, extractor.name),
        ("extractor's weights", origin.identity, extractor.identity),
        ("image_size", origin.image_size, image_size),
        ("crop", origin.crop, crop),
    ):
        if stored != wanted:
            raise ValueError(
                f"{path} was made of {origin.source} with {what} {stored}, but {wanted} is wanted; the figures would "
                "mean nothing. Compute statistics of the data set anew."
            )


def _cached(folder: Path, fingerprint: str, accelerator: Accelerator, compute: Callable[[], Reference]) -> Reference:
    """What the folder holds under this fingerprint; else what all processes compute, and the main one keeps."""
    path = folder / f"{fingerprint[:32]}.safetensors"
    found: Reference | None = _from_main(accelerator, lambda: _read(path) if path.exists() else None)
    if found is not None:
        return found
    on_main(accelerator, lambda: check_writable(folder))  # raises now, not after the work
    reference = compute()

    def keep() -> None:
        try:
            _write(reference, path)
        except (OSError, RunError, SafetensorError) as error:  # the work is done, and serves this call
            warnings.warn(f"statistics of {reference.origin.source} could not be kept: {error}", stacklevel=2)

    on_main(accelerator, keep)
    return reference


def _from_main(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """What the main process makes, on all of them."""
    made: list[Any] = [None]

    def act() -> None:
        made[0] = make()

    on_main(accelerator, act)
    return broadcast_object_list(made)[0]


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *values]).encode()).hexdigest()


def _write(reference: Reference, path: Path) -> None:
    tensors = {"mean": reference.pool.mean, "covariance": reference.pool.covariance}
    if reference.spatial is not None:
        tensors |= {"spatial_mean": reference.spatial.mean, "spatial_covariance": reference.spatial.covariance}
    if reference.features is not None:
        tensors["features"] = reference.features
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {_KEY: json.dumps(asdict(reference.origin)), _CHECKSUM: tensors_sha256(tensors)}
    with atomically(path) as partial:
        save_file(tensors, partial, facts)


def _read(path: Path) -> Reference:
    try:
        open_regular(path).close()  # a pipe would be waited for
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            origin = parse_json(facts[_KEY], Origin, str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if facts.get(_CHECKSUM, "") not in ("", tensors_sha256(tensors)):  # files of older versions have none
            raise ValueError("its checksum is that of other numbers")
        return Reference(
            origin,
            Moments(tensors["mean"], tensors["covariance"]),
            Moments(tensors["spatial_mean"], tensors["spatial_covariance"]) if "spatial_mean" in tensors else None,
            tensors.get("features"),
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no statistics of real images, or is damaged ({error}); delete it, and they are computed "
            "anew."
        ) from error


def _moments_of(path: Path, shapes: Mapping[str, Any], origin: Origin) -> Reference:
    """Those that an .npz file holds, of Inception."""

    def read(mean: str, covariance: str, count: int) -> Moments:
        for name, wanted in ((mean, (count,)), (covariance, (count, count))):
            if shapes[name][0] != wanted:
                raise ValueError(f"{path} holds {name} of shape {shapes[name][0]}; expected {wanted}.")
        return Moments(*(torch.from_numpy(read_array(path, name).astype(np.float64)) for name in (mean, covariance)))

    spatial = read("mu_s", "sigma_s", SPATIAL_FEATURES) if {"mu_s", "sigma_s"} <= shapes.keys() else None
    return Reference(origin, read("mu", "sigma", POOL_FEATURES), spatial)
