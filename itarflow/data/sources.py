"""Where images are found: the digits of scikit-learn, folders, parquet files, the Hugging Face Hub.

In all cases `open_splits` gives tables of encoded images. Reading is left to `datasets`, except for plain folders
and for parquet files that are read where they are (`parquet`).
"""

from __future__ import annotations

import errno
import glob
import importlib.util
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from rich.console import Console
from rich.markup import escape

from itarflow.data.containers import is_saved, open_saved, refuse_container, refuse_containers
from itarflow.data.folders import counted, list_folder, suffixes
from itarflow.data.image_folder import open_image_folder
from itarflow.data.parquet import ParquetRows, concatenate, open_parquet
from itarflow.data.parquet_schema import check_class_names, stated_features
from itarflow.data.splits import bare_names, match_splits, split_of_file
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import check_writable, open_regular
from itarflow.runtime.text import printable

_DOCUMENTATION = (".json", ".md", ".txt", ".yaml", ".yml", ".safetensors", "")
"""Suffixes of what lies beside parquet files, and is no part of the images: cards, manifests, licences, the vectors of
the empty caption."""
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
    wanted = bare_names(f"{split}+{held_out_split}" if held_out_split else split)
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
    if streamed:
        return concatenate(streamed)
    for part in parts:
        if part.features != parts[0].features:
            raise DataError(
                f"parts of split {'+'.join(name for name, _ in ranges)!r} differ in their columns or classes: "
                f"{parts[0].features} and {part.features}; write them alike, or name one"
            )
    return datasets.concatenate_datasets(parts)


def open_tables(path: str, name: str | None, wanted: Sequence[str], streaming: bool = False) -> Tables:
    """Open whole splits of what `path` names, by their names alone; arguments and errors as in `open_splits`.

    Returns:
        Tables by split, whose images are not decoded yet: those of `wanted`, at least.
    """
    place = os.path.expanduser(path)
    if place == "digits":
        digits = _digits()
        return Tables(dict.fromkeys(match_splits(path, wanted, ["train"]), digits))
    if os.path.exists(place) or glob.has_magic(place) or place.endswith(".parquet"):
        if name is not None:
            raise DataError(f"name is {name!r}, but path {place!r} is not on the Hub: leave name out")
        if os.path.isdir(place):
            return _open_folder(path, wanted, Path(os.path.abspath(place)), streaming)
        files = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
        for file in files:
            refuse_container(file)
            if os.path.splitext(file)[1].lower() in suffixes():
                raise DataError(f"path {file!r} is a single image; give the folder that it lies in, or parquet files")
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
        meant = match_splits(path, wanted, builder.info.splits or builder.config.data_files or wanted)
        if streaming:
            return _stream(path, meant, builder)
        builder.download_and_prepare()
        return {name: builder.as_dataset(split=split) for name, split in meant.items()}
    except DataError:
        raise
    # What `datasets` raises for broken, odd or empty files, a full disk, unknown names, an unreachable Hub: it runs
    # on files that may be anybody's, and nothing is hidden.
    except Exception as error:
        if problem := _cache_problem(error):
            raise DataError(problem) from error
        problem = "cannot be read; repair, replace or remove the file at fault"
        if "name" in options:
            problem = (
                "is no file or folder here, nor to be had from the Hub; check path, name and network, or log in by "
                "`hf auth login` if the data set is gated"
            )
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"path {path!r} {problem}: {printable(f'{error}{cause}')}") from error


def _cache_problem(error: BaseException) -> str:
    """What is wrong with the cache of `datasets`, if an error comes from there and not from the data; else ""."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    full = [
        cause
        for cause in causes
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "Not enough disk space" in str(cause)
    ]
    problem = f"{cache} is full ({full[0]})." if full else ""
    if not full:
        try:
            check_writable(cache)
        except OSError as refused:
            problem = str(refused)
    if not problem:
        return ""
    return (
        f"the cache of data sets can't be used: {printable(problem)} Set HF_HOME or HF_DATASETS_CACHE to a folder "
        "that can be written and has room, or leave parquet files where they are by --data.streaming"
    )


def _stream(path: str, meant: Mapping[str, str], builder: datasets.DatasetBuilder) -> Mapping[str, ParquetRows]:
    """Splits of parquet files that stay where the builder has found them."""
    if not isinstance(builder, Parquet):
        raise DataError(
            f"path {path!r} cannot be streamed: {type(builder).__name__} reads it; expected parquet files: set "
            "streaming to False, or make parquet files of it with `itarflow prepare`"
        )
    files = {str(split): places for split, places in builder.config.data_files.items()}
    meant = match_splits(path, list(meant), files)
    return {name: open_parquet(files[split], builder.info.features) for name, split in meant.items()}


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


def _open_folder(path: str, wanted: Sequence[str], folder: Path, streaming: bool) -> Tables:
    """Splits of a folder of images, of parquet files, or of what `save_to_disk` has written."""
    if is_saved(folder):
        saved = open_saved(folder)
        return Tables({name: saved[split] for name, split in match_splits(path, wanted, saved).items()})
    listing = list_folder(folder)
    if listing.parquet:
        notes = listing.left_out(besides=_DOCUMENTATION)
        if count := sum(map(len, listing.pictures.values())):
            home, names = next(iter(listing.pictures.items()))
            notes = (counted(count, "picture", "beside parquet files", listing.show((*home, names[0]))), *notes)
        files = [listing.root.joinpath(*parts) for parts in sorted(listing.parquet)]
        return Tables(_open_parquet(path, wanted, files, folder, streaming), notes)
    if listing.pictures:
        return Tables(*open_image_folder(path, wanted, listing))
    refuse_containers(listing)
    found = f" ({'; '.join(listing.left_out())})" if listing.left_out() else ""
    raise DataError(f"folder {str(folder)!r} has no images and no parquet files{found}; is it the right folder?")


def _open_parquet(
    path: str, wanted: Sequence[str], files: Sequence[Path], root: Path | None, streaming: bool
) -> _Tables:
    """Splits of parquet files: those below the folder `root`, or those that path names one by one."""
    if not files:
        raise DataError(f"path {path!r} does not exist, or matches no files; check it")
    splits: dict[str, list[str]] = {}
    schemas: dict[str, pa.Schema] = {}
    for file in files:
        try:
            with open_regular(file) as stream:
                schemas[str(file)] = pq.ParquetFile(stream).schema_arrow
        except (pa.ArrowException, OSError, DataError) as error:
            reason = str(error).rstrip(". ")
            raise DataError(f"{str(file)!r} is not a readable parquet file: {reason}. Replace it") from error
        splits.setdefault(split_of_file(file, root), []).append(str(file))
    if len(splits) == 1 and (root is None or "" in splits):
        # Files that are named one by one are used under any name.
        splits = {"train" if root else wanted[0]: next(iter(splits.values()))}
    if "" in splits:
        name, others = splits[""][0], ", ".join(sorted(filter(None, splits)))
        raise DataError(f"{name!r} is of no split, while other files are ({others}); rename or move it")
    meant = match_splits(path, wanted, splits)
    for split in meant.values():
        check_class_names({file: schemas[file] for file in splits[split]})
    if streaming:
        return {name: open_parquet(splits[split]) for name, split in meant.items()}
    patterns = {name: [glob.escape(file) for file in splits[split]] for name, split in meant.items()}
    features = [stated_features(schemas[splits[split][0]], splits[split][0]) for split in meant.values()]
    if all(other == features[0] for other in features):
        return _prepare(path, wanted, "parquet", data_files=patterns)
    # Each by itself: a builder takes the columns of all splits for those of the first.
    parts = [_prepare(path, [name], "parquet", data_files={name: patterns[name]}) for name in wanted]
    return {name: part[name] for name, part in zip(wanted, parts, strict=True)}
