"""JSON that may be anybody's, wherever a data set has some: it is understood, or refused with the file's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import encoded, write_classes

from itarflow.data.sources import open_splits
from itarflow.runtime.errors import DataError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["000.png", "Value", "int64"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "labels",
                    "label",
                    "file_name",
                    "info",
                    "features",
                    "image",
                    "_type",
                    "names",
                    "dtype",
                    "feature",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
OFTEN = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opens_or_names(path: Path, file: str) -> None:
    try:
        opened = open_splits(str(path), streaming=True)
    except DataError as error:
        said = str(error)
    else:
        said = "".join((file, *opened.left_out))
        assert 0 < len(opened.train) <= 2
    assert file in said
    said.encode()  # it can be printed


@OFTEN
@given(VALUES)
def test_labels_of_edm(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = write_classes(tmp_path_factory.mktemp("x"), {".": 2})
    for content in (value, {"labels": value}, {"labels": [["000.png", value]]}):
        (folder / "dataset.json").write_text(json.dumps(content))
        opens_or_names(folder, "dataset.json")


@OFTEN
@given(st.lists(st.dictionaries(st.sampled_from(["label", "x", "image", "\ud800"]), VALUES, max_size=3), max_size=3))
def test_metadata(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = write_classes(tmp_path_factory.mktemp("x"), {".": 2})
    lines = [json.dumps(row | {"file_name": f"00{number % 2}.png"}) for number, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    opens_or_names(folder, "metadata.jsonl")


@OFTEN
@given(VALUES)
def test_schemas_of_parquet(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    file = tmp_path_factory.mktemp("x") / "a.parquet"
    table = pa.table({"image": [encoded(1)] * 2, "label": [0, 1]})
    for stated in (value, {"info": value}, {"info": {"features": {"label": value}}}):
        text = json.dumps(stated).encode()
        pq.write_table(table.replace_schema_metadata({b"huggingface": text}), file)
        opens_or_names(file, "a.parquet")
