"""Where images are found: the digits of scikit-learn, folders, parquet files, the Hugging Face Hub.

In all cases `open_splits` gives tables of encoded images. Reading is left to `datasets`, except for plain folders
and for parquet files that are read where they are (`parquet`).
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from rich.console import Console
from rich.markup import escape

from itarflow.data.parquet import ParquetRows, concatenate, open_parquet
from itarflow.runtime.errors import DataError

_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
Rows: TypeAlias = datasets.Dataset | ParquetRows
_Tables: TypeAlias = Mapping[str, datasets.Dataset] | Mapping[str, ParquetRows]  # by name of split


class Tables(NamedTuple):
    """Tables of encoded images by the name of their split, and what was not taken, and why, as sentences."""

    splits: _Tables
    left_out: tuple[str, ...] = ()


class Opened(NamedTuple):
    """The rows to train on, those to measure on if a split was named for them, and what was not taken, and why."""

    train: Rows
    held_out: Rows | None
    left_out: tuple[str, ...] = ()


def open_splits(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    held_out_split: str | None = None,
    streaming: bool = False,
) -> Opened:
    """Open what `path` names, wherever it is, and take two splits of it.

    Args:
        path: "digits", a folder, a parquet file, a glob of them, or a name on the Hub.
        name: configuration of a Hub data set that has several.
        split: the rows to train on, such as train, or train[:10%]+extra.
        held_out_split: the rows to measure on, or None.
        streaming: leave parquet files where they are, and give `ParquetRows`; other sources give what they always do.

    Returns:
        Tables whose images are not decoded yet; `held_out` is None if no held_out_split is named.

    Raises:
        DataError: there is nothing to open, it is damaged, a split is missing or empty, or the two overlap; a data set
            on the Hub is to be streamed, but is not of parquet files.
    """
    wanted = _split_names(f"{split}+{held_out_split}" if held_out_split else split)
    tables, left_out = open_tables(path, name, wanted, streaming)
    train = _row_ranges(split, tables)
    if held_out_split is None:
        return Opened(_take(tables, train), None, left_out)
    held_out = _row_ranges(held_out_split, tables)
    for (home, rows), (other, more) in itertools.product(train, held_out):
        if home == other and max(rows.start, more.start) < min(rows.stop, more.stop):
            raise DataError(
                f"held_out_split {held_out_split!r} shares images with split {split!r}; "
                "expected images that are not trained on: name another split"
            )
    return Opened(_take(tables, train), _take(tables, held_out), left_out)


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


def _take(tables: _Tables, ranges: Sequence[tuple[str, range]]) -> Rows:
    parts = [tables[name].select(rows) for name, rows in ranges]
    streamed = [part for part in parts if isinstance(part, ParquetRows)]
    return concatenate(streamed) if streamed else datasets.concatenate_datasets(parts)


def _split_names(expression: str) -> list[str]:
    """Bare names in a split expression, each once: "train[:50%]+extra" asks for train and extra."""
    return list(dict.fromkeys(part.split("[")[0].strip() for part in expression.split("+")))


def _require_splits(path: str, wanted: Sequence[str], known: Iterable[Any]) -> None:
    names = sorted(map(str, known))
    missing = [name for name in wanted if name not in names]
    if missing and names:
        raise DataError(
            f"path {path!r} has no split {missing[0]!r}; use one of {', '.join(names)} for data.split and "
            "data.held_out_split (None sets images of data.split aside)"
        )


def open_tables(path: str, name: str | None, wanted: Sequence[str], streaming: bool = False) -> Tables:
    """Open whole splits of what `path` names, by their names alone; arguments and errors as in `open_splits`.

    Returns:
        Tables by split, whose images are not decoded yet: those of `wanted`, at least.
    """
    place = os.path.expanduser(path)
    if place == "digits":
        _require_splits(path, wanted, ["train"])
        return Tables({"train": _digits()})
    if os.path.exists(place) or glob.has_magic(place) or place.endswith(".parquet"):
        if name is not None:
            raise DataError(f"name is {name!r}, but path {place!r} is not on the Hub: leave name out")
        if os.path.isdir(place):
            return Tables(_open_folder(path, wanted, Path(os.path.abspath(place)), streaming))
        if os.path.splitext(place)[1].lower() in ImageFolder.EXTENSIONS:
            raise DataError(f"path {path!r} is a single image; give the folder that it lies in, or parquet files")
        files = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
        paths = [Path(os.path.abspath(file)) for file in files]
        return Tables(_open_parquet(path, wanted, paths, None, streaming))
    if not _HUB_NAME.fullmatch(place):
        raise DataError(f"path {path!r} does not exist, and is no Hub name (owner/name): check it")
    if "/" not in place and importlib.util.find_spec(f"datasets.packaged_modules.{place.split('.')[0]}"):
        # `datasets` has a reader of this name, and would run it on the current folder.
        raise DataError(f"path {place!r} is the name of a file format; give a folder, files or a Hub name")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Console(stderr=True).print(
            f"No file or folder here is called {escape(place)}: asking the Hugging Face Hub for it.", highlight=False
        )
    with _offline_if_unreachable(place):
        return Tables(_prepare(path, wanted, place, streaming, name=name))


@contextmanager
def _offline_if_unreachable(repo_id: str) -> Iterator[None]:
    """Ask the Hub once; if it does not answer, look only among what was downloaded, instead of asking on and on."""
    try:
        HfApi().dataset_info(repo_id, timeout=10)
    except HfHubHTTPError:  # it has answered; what is wrong, `datasets` will say
        pass
    except Exception:
        before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
        return
    yield


def _prepare(path: str, wanted: Sequence[str], builder_name: str, streaming: bool = False, **options: Any) -> _Tables:
    """Splits that a builder of `datasets` makes in its own cache, if they are not there yet, or would make."""
    try:
        builder = datasets.load_dataset_builder(builder_name, **options)
        _require_splits(path, wanted, builder.info.splits or builder.config.data_files or ())
        if streaming:
            return _stream(path, wanted, builder)
        builder.download_and_prepare()
        return {name: builder.as_dataset(split=name) for name in wanted}
    except DataError:
        raise
    # What `datasets` raises for broken, odd or empty files, a full disk, unknown names, an unreachable Hub.
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, RuntimeError) as error:
        problem = "cannot be read; repair, replace or remove the file at fault"
        if "name" in options:
            problem = (
                "is no file or folder here, nor to be had from the Hub; check path, name and network, or log in by "
                "`hf auth login` if the data set is gated"
            )
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"path {path!r} {problem}: {error}{cause}") from error


def _stream(path: str, wanted: Sequence[str], builder: datasets.DatasetBuilder) -> Mapping[str, ParquetRows]:
    """Splits of parquet files that stay where the builder has found them."""
    if not isinstance(builder, Parquet):
        raise DataError(
            f"path {path!r} cannot be streamed: {type(builder).__name__} reads it; expected parquet files: set "
            "streaming to False, or make parquet files of it with `itarflow prepare`"
        )
    files = {str(split): places for split, places in builder.config.data_files.items()}
    _require_splits(path, wanted, files)
    return {name: open_parquet(files[name], builder.info.features) for name in wanted}


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


def _open_folder(path: str, wanted: Sequence[str], folder: Path, streaming: bool) -> _Tables:
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
        return _open_parquet(path, wanted, tables, folder, streaming)
    if not homes:
        raise DataError(f"folder {str(folder)!r} has no images and no parquet files; is it the right folder?")
    top = {home[0] if home else "" for home in homes}
    roots: dict[str, tuple[str, ...]] = {name: (name,) for name in top} if top <= _SPLITS else {"train": ()}
    _require_splits(path, wanted, roots)
    roots = {name: roots[name] for name in wanted}
    if described:
        patterns = {name: f"{glob.escape(os.path.join(folder, *root))}/**" for name, root in roots.items()}
        return _prepare(path, wanted, "imagefolder", data_files=patterns)
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
        rows = [(file, number) for number, parts in enumerate(classes) for file in homes.get(root + parts, ())]
        paths = [os.path.join(folder, *root, *classes[number], file) for file, number in rows]
        columns = {"image": paths, "label": [number for _, number in rows]}
        tables[split] = datasets.Dataset.from_dict({name: columns[name] for name in features}, features)
    return tables


def _open_parquet(
    path: str, wanted: Sequence[str], files: Sequence[Path], root: Path | None, streaming: bool
) -> _Tables:
    """Splits of parquet files: those below the folder `root`, or those that path names one by one."""
    if not files:
        raise DataError(f"path {path!r} does not exist, or matches no files; check it")
    splits: dict[str, list[str]] = {}
    for file in files:
        try:
            pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).rstrip(". ")
            raise DataError(f"{str(file)!r} is not a readable parquet file: {reason}. Replace it") from error
        splits.setdefault(_split_of(file, root), []).append(str(file))
    if len(splits) == 1 and (root is None or "" in splits):
        # Files that are named one by one are used under any name.
        splits = {"train" if root else wanted[0]: next(iter(splits.values()))}
    if "" in splits:
        name, others = splits[""][0], ", ".join(sorted(filter(None, splits)))
        raise DataError(f"{name!r} is of no split, while other files are ({others}); rename or move it")
    _require_splits(path, wanted, splits)
    if streaming:
        return {name: open_parquet(splits[name]) for name in wanted}
    patterns = {name: [glob.escape(file) for file in splits[name]] for name in wanted}
    return _prepare(path, wanted, "parquet", data_files=patterns)


def _split_of(file: Path, root: Path | None) -> str:
    """Split by a file's name or folder ("" = none): train-00000-of-00002, test_1, val/part0."""
    if shard := _SHARD.fullmatch(file.stem):
        return shard[1]
    folders = file.relative_to(root).parts[:-1] if root else ()
    words = [re.split(r"[-._ 0-9]", file.stem)[0], *reversed(folders)]
    return next((word for word in words if word in _SPLITS), "")
