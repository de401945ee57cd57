"""Splits of a folder of pictures, labelled by sub-folder, by a metadata file, or by dataset.json of EDM's tools.

Not left to `datasets`, which takes a class "bullet_train" for the training split and drops the others, forgets the
labels if there is one class only or a file of captions, drops pictures that this file does not list, and needs minutes
for a million files, at every start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from itarflow.data.columns import LABEL_NAMES
from itarflow.data.folders import LABELS, METADATA, Listing, Parts, check_text, counted, homes_below, without_pictures
from itarflow.data.metadata import class_folder, describe, descriptions_of, edm_labels
from itarflow.data.splits import is_split, match_splits, several
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import listed, printable


@dataclass(frozen=True)
class _Part:
    """Pictures of a split, relative to the folder that was listed, and what descriptions say of them."""

    root: Parts
    files: Sequence[Parts]
    columns: pa.Table | None = None
    described_by: str = ""
    """Names of the descriptions."""
    unlabelled: bool = False
    """The folders are known to be no classes."""


def open_image_folder(
    path: str, wanted: Sequence[str], listing: Listing
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    """Splits of a folder of pictures by the names that they were asked for, and what was not taken, and why.

    Raises:
        DataError: a split is missing, or it can't be told which pictures belong to which class.
    """
    check_text(listing.root, listing.pictures)
    notes = list(listing.left_out())
    roots = _split_roots(listing, notes)
    meant = match_splits(path, wanted, roots, notes)
    parts = {name: _part(listing, roots[split], notes) for name, split in meant.items()}
    classes = _class_folders(listing, parts, notes)
    columns = _shared_columns(parts, notes)
    types = {"image": datasets.Image()}
    if columns is not None:
        types |= datasets.Features.from_arrow_schema(columns.schema)
    if classes:
        types["label"] = datasets.ClassLabel(names=list(classes))
    tables, first = {}, 0
    for name, part in parts.items():
        files = part.files

        def label(file: Parts, depth: int = len(part.root)) -> int:
            return classes[class_folder(file[depth])]

        values: dict[str, list[object]] = {}
        if columns is not None:
            values = columns.slice(first, len(files)).to_pydict()
            first += len(files)
        elif classes:
            files = sorted(files, key=label)  # which keeps their order otherwise
        values["image"] = [os.path.join(listing.root, *file) for file in files]
        if classes:
            values["label"] = [label(file) for file in files]
        tables[name] = datasets.Dataset.from_dict(
            {column: values[column] for column in types}, datasets.Features(types)
        )
    return tables, tuple(notes)


def _split_roots(listing: Listing, notes: list[str]) -> dict[str, Parts]:
    """Folders of the splits by their names; without such folders all is the split "train"."""
    top = {home[0] if home else "" for home in listing.pictures}
    named = {parts[0] for parts in (*listing.folders, *listing.dangling) if len(parts) == 1 and is_split(parts[0])}
    if top <= named:
        return {name: (name,) for name in top}
    beside = sorted(top - named - {""})
    shown = listed(sorted(map(printable, named)))
    if not several(named):
        if named & top:
            notes.append(f"no split by the name of folder {shown}: it is taken for a class, beside {_list(beside)}")
        return {"train": ()}
    if beside:
        notes.append(f"folders beside {shown}, taken for splits of their own: {_list(beside)}")
    if loose := listing.pictures.get(()):
        notes.append(counted(len(loose), "picture", f"outside of {shown}", listing.show((loose[0],))))
    return {name: (name,) for name in top if name}


def _list(names: Sequence[str]) -> str:
    return printable(listed(names)) or "loose pictures"


def _part(listing: Listing, root: Parts, notes: list[str]) -> _Part:
    """The pictures of a split: those that a description lists if there is one, else all."""
    homes = homes_below(listing, root)
    everything = [(*root, *home, name) for home, names in sorted(homes.items()) for name in names]
    descriptions = descriptions_of(listing, root)
    unlabelled = [file for file in descriptions if file[-1] == LABELS and not edm_labels(listing.root.joinpath(*file))]
    if unlabelled:
        notes.append(f"labels: {listing.show(unlabelled[0])} says that there are none")
        return _Part(root, everything, unlabelled=True)
    if descriptions:
        described = describe(listing, root, descriptions)
        if described is None:
            shown = " and ".join(map(listing.show, descriptions))
            if any(file[: len(root)] == root for file in descriptions):
                raise DataError(f"{shown} names no picture that is there; repair or remove it")
            return _Part(root, everything)  # one that speaks of other splits
        notes += described.notes
        return _Part(root, described.files, described.columns, " and ".join(map(listing.show, descriptions)))
    if _are_buckets(homes):
        notes.append(
            f"labels: folders {_list(sorted(home[0] for home in homes))} in {listing.show(root)}/ hold a thousand "
            "pictures each, by their numbers, and are no classes; rename them if they are"
        )
        return _Part(root, everything, unlabelled=True)
    return _Part(root, everything)


def _are_buckets(homes: Mapping[Parts, Sequence[str]]) -> bool:
    """Whether folders hold a thousand pictures each in the order of their numbers, as EDM's tools and FFHQ have it.

    00001/img00001234.png is such a picture, and 01000/01234.png.
    """
    if not all(len(home) == 1 and re.fullmatch(r"[0-9]{5}", home[0]) for home in homes):
        return False
    for home, names in homes.items():
        for name in names:
            number = re.fullmatch(r"[A-Za-z_]*([0-9]{5,8})", os.path.splitext(name)[0])
            if not number or int(number[1]) // 1000 not in (int(home[0]), int(home[0]) / 1000):
                return False
    return True


def _class_folders(listing: Listing, parts: Mapping[str, _Part], notes: list[str]) -> dict[str, int]:
    """Labels by class folder, shared by the splits; empty if the folders are not the classes."""
    homes = {file[len(part.root) : -1] for part in parts.values() for file in part.files}
    depths = {len(home) for home in homes}
    names = class_order({class_folder(home[0]) for home in homes if home})
    if stated := _stated_labels(listing, parts):
        if depths == {1} and len(names) > 1 and not stated.endswith(LABELS):
            notes.append(
                f"the class folders {_list(names)}: the labels are those of {stated}; for labels by folder rename the "
                "column, or remove the file"
            )
        return {}
    if depths == {0} or any(part.unlabelled for part in parts.values()):
        return {}
    described = " and ".join(dict.fromkeys(part.described_by for part in parts.values() if part.described_by))
    if described and (depths != {1} or len(names) == 1):  # images/ beside metadata.csv is no class
        notes.append(
            f"labels: {described} has none, and hides the folders, which are not one folder a class; add a column "
            f"{LABEL_NAMES[0]!r} to it, or put the pictures of each class into a folder"
        )
        return {}
    if depths != {1}:
        deepest = "/".join(max((len(home), home) for home in homes)[1])
        raise DataError(
            f"folder {str(listing.root)!r} has images at several depths or too deep, as in "
            f"{deepest!r}; expected all of them loose (unlabelled), or all in sub-folders, one a class: "
            "move the others, or narrow path"
        )
    if empty := [place for part in parts.values() for place in without_pictures(listing, part.root)]:
        notes.append(f"class folders without pictures: {printable(listed(map('/'.join, empty)))}")
    return {name: number for number, name in enumerate(names)}


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: as numbers if all are (label 2 is folder 2), else as text."""
    names = list(names)
    if all(re.fullmatch("[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _stated_labels(listing: Listing, parts: Mapping[str, _Part]) -> str:
    """The column and file that labels are from, such as "column 'label' of x/metadata.csv"; "" = the folders.

    Raises:
        DataError: some splits have such a column, others don't.
    """
    stated: dict[str, str] = {}
    for name, part in parts.items():
        columns = part.columns.column_names if part.columns is not None else ()
        if found := [column for column in LABEL_NAMES if column in columns]:
            stated[name] = f"column {found[0]!r} of {part.described_by}"
    for name, part in parts.items():
        if stated and name not in stated:
            other, source = next(iter(stated.items()))
            raise DataError(
                f"split {other!r} has labels by {source}, but {listing.show(part.root)}/ has none; expected labels in "
                f"both: write {METADATA[0]} or {LABELS} there as well, remove the other, or open one split only"
            )
    return next(iter(stated.values()), "")


def _shared_columns(parts: Mapping[str, _Part], notes: list[str]) -> pa.Table | None:
    """The columns that all splits have, one split after another."""
    tables = [part.columns for part in parts.values() if part.columns is not None]
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    shared = [
        name for name in names if len(tables) == len(parts) and all(name in table.column_names for table in tables)
    ]
    if lost := [name for name in names if name not in shared]:
        notes.append(f"columns that not all splits have: {printable(listed(lost))}")
    try:
        return (
            pa.concat_tables([table.select(shared) for table in tables], promote_options="permissive")
            if shared
            else None
        )
    except pa.ArrowException as error:
        described = " and ".join(part.described_by for part in parts.values())
        raise DataError(f"columns of {described} don't agree: {printable(str(error))}; write them alike") from error
