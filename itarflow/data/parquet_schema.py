"""What parquet files state of their columns, for `datasets`: types and the names of classes. It may be anybody's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import as_type, parse_json
from itarflow.runtime.text import listed, printable

_KEY = b"huggingface"


def stated_features(schema: pa.Schema, file: str) -> datasets.Features:
    """The columns of a parquet file, with the names of classes that its schema states.

    Raises:
        DataError: what it states can't be understood; the message names the file.
    """
    name = f"{file}: what it states of its columns (schema metadata 'huggingface')"
    stated = (schema.metadata or {}).get(_KEY)
    if stated is not None:
        info = parse_json(stated, dict[str, Any], name).get("info") or {}
        check_features(as_type(info, dict[str, Any], name).get("features") or {}, name)
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # nearly anything, by types that it does not know
        raise DataError(
            f"{printable(name)} can't be understood: {printable(str(error)) or type(error).__name__}; write the file "
            "again, or remove this metadata"
        ) from error


def check_features(features: Any, name: str) -> None:
    """Refuse types of columns, as `datasets` stores them, that would read a file or fill the memory when made.

    Raises:
        DataError: the classes of a column are not stated as a list of names.
    """
    as_type(features, dict[str, Any], name)
    for value in _objects(features):
        if value.get("_type") == "ClassLabel":
            if "names_file" in value:
                raise DataError(f"{printable(name)} leaves the names of classes to a file; expected a list of them")
            as_type(value.get("names"), list[str], f"{name}, names of classes")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in a value."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield value
            rest += value.values()
        elif isinstance(value, list):
            rest += value


def check_class_names(schemas: Mapping[str, pa.Schema]) -> None:
    """Refuse files whose labels mean different classes: names differ, or their order does.

    Args:
        schemas: by file.

    Raises:
        DataError: naming the two files, the column and its names in both.
    """
    if not schemas:
        return
    known: dict[str, dict[str, list[str]]] = {}
    first, names = "", dict[str, list[str]]()
    for file, schema in schemas.items():
        stated = f"{(schema.metadata or {}).get(_KEY)} {schema.remove_metadata()}"
        if stated not in known:  # usually all files state the same
            known[stated] = _class_names(stated_features(schema, file))
        if not first:
            first, names = file, known[stated]
        for column, there in names.items():
            here = known[stated].get(column, there)  # a column that is missing is not for us to say
            if here != there:
                raise DataError(
                    f"label {_first_difference(here, there)} of column {column!r} means other classes in "
                    f"{file!r} ([{printable(listed(here))}]) than in {first!r} "
                    f"([{printable(listed(there))}]); write both with the same ClassLabel names, in the same order"
                )


def _class_names(features: datasets.Features) -> dict[str, list[str]]:
    """Names of classes by column; [] of a column that is none of classes."""
    return {name: getattr(feature, "names", []) for name, feature in features.items()}


def _first_difference(here: list[str], there: list[str]) -> int:
    same = [one == other for one, other in zip(here, there, strict=False)]
    return same.index(False) if False in same else len(same)
