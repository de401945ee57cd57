"""Images in other containers than folders and parquet files: what they are, and what to do with them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TypedDict

import datasets

from itarflow.data.folders import Listing
from itarflow.data.parquet_schema import check_features
from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import read_json
from itarflow.runtime.text import printable

_TAR = (
    "a tar archive: unpack it, and name the folder of pictures; of WebDataset's shards make a parquet file by "
    '`datasets.load_dataset("webdataset", data_files="FOLDER/*.tar", split="train").to_parquet("train.parquet")`'
)
_OTHERS = {
    ".zip": "a zip archive: unpack it, and name the folder",
    ".7z": "an archive: unpack it, and name the folder",
    ".rar": "an archive: unpack it, and name the folder",
    ".tar": _TAR,
    ".tgz": _TAR,
    ".gz": "packed by gzip: unpack it",
    ".npz": "NumPy's arrays, such as ADM's batches of samples: write each picture into a folder, as by "
    '`[Image.fromarray(image).save(f"{i:06}.png") for i, image in enumerate(numpy.load(FILE)["arr_0"])]`',
    ".npy": "a NumPy array: write each picture into a folder, by Image.fromarray(...).save(...)",
    ".arrow": 'an Arrow file: make a parquet file by `datasets.Dataset.from_file(FILE).to_parquet("train.parquet")`',
    ".tfrecord": "TensorFlow's records: write the pictures into a folder, one sub-folder a class",
    ".h5": "an HDF5 file: write the pictures into a folder, one sub-folder a class",
    ".hdf5": "an HDF5 file: write the pictures into a folder, one sub-folder a class",
    ".mdb": "an LMDB data base: write the pictures into a folder, one sub-folder a class",
}
_DICT, _INFO, _STATE = "dataset_dict.json", "dataset_info.json", "state.json"


def refuse_container(file: str | Path) -> None:
    """Refuse a file that holds images as we don't read them, by its suffix.

    Raises:
        DataError: saying what it is, and what to do.
    """
    if what := _OTHERS.get(os.path.splitext(file)[1].lower()):
        raise DataError(f"{str(file)!r} is {what}")


def refuse_containers(listing: Listing) -> None:
    """The same for a folder of such files."""
    found = Counter(os.path.splitext(parts[-1])[1].lower() for parts in listing.unknown)
    for suffix, count in found.most_common():
        if what := _OTHERS.get(suffix):
            example = next(parts for parts in listing.unknown if parts[-1].lower().endswith(suffix))
            raise DataError(
                f"folder {str(listing.root)!r} has no images and no parquet files, but {count:,} "
                f"{suffix}; {listing.show(example)!r} is {what}"
            )


class _DataFile(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_DataFile]


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return (folder / _DICT).is_file() or ((folder / _STATE).is_file() and (folder / _INFO).is_file())


def open_saved(folder: Path) -> dict[str, datasets.Dataset]:
    """The splits of a folder that `save_to_disk` has written; a set without splits is "train".

    Raises:
        DataError: it is damaged.
    """
    if not (folder / _DICT).is_file():
        return {"train": _open_one(folder)}

    class Splits(TypedDict):
        splits: list[str]

    names = read_json(folder / _DICT, Splits)["splits"]
    for name in names:
        if not is_saved(folder / name) or Path(name).name != name:
            raise DataError(f"{str(folder)!r} lacks the split {name!r} that its {_DICT} names")
    return {name: _open_one(folder / name) for name in names}


def _open_one(folder: Path) -> datasets.Dataset:
    for part in read_json(folder / _STATE, _State)["_data_files"]:
        file = folder / part["filename"]
        if file.parent != folder or not file.is_file():  # nor a pipe, which would be waited for
            raise DataError(f"{str(file)!r}, which {_STATE} names, is no file of that folder; copy it again")
    info = read_json(folder / _INFO, dict)
    check_features(info.get("features") or {}, str(folder / _INFO))
    try:
        return datasets.Dataset.load_from_disk(str(folder)).with_format(None)
    except Exception as error:  # nearly anything, by damaged files
        reason = printable(str(error)) or type(error).__name__
        raise DataError(f"{str(folder)!r} can't be read as save_to_disk writes it: {reason}; copy it again") from error
