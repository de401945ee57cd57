"""JSON of strangers: any content is read as what is expected, or refused by the name of the file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import parse_json, read_json


@dataclass(frozen=True)
class Card:
    name: str
    count: Annotated[int, msgspec.Meta(ge=0)]
    sizes: tuple[float, ...] = ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[]", "Expected `object`"),
        ('{"name": "a"}', "missing required field `count`"),
        ('{"name": "a", "count": -1}', "at `$.count`"),
        ('{"name": "a", "count": true}', "at `$.count`"),
        ('{"name": "a", "count": 1, "sizes": ["x"]}', "at `$.sizes[0]`"),
        ("[" * 10**5, "nested too deeply"),
        ('{"name": "a", "count": ' + "9" * 10**4 + "}", "digits"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_is_not_expected_is_refused_by_name(text, said):
    with pytest.raises(DataError, match=r"^x\\x1b\.json is damaged: ") as refused:
        parse_json(text, Card, "x\x1b.json")
    assert said in str(refused.value)


def test_unknown_fields_are_of_a_newer_version(tmp_path):
    (tmp_path / "card.json").write_text('{"name": "a", "count": 3, "sizes": [1, 2.5], "new": 1}')
    assert read_json(tmp_path / "card.json", Card) == Card("a", 3, (1, 2.5))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("name", "count", "sizes", "x")), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_gives_the_type_or_a_refusal(values):
    try:
        card = parse_json(json.dumps(values), Card, "f")
    except DataError:
        return
    assert isinstance(card.name, str)
    assert card.count >= 0
    assert all(isinstance(size, float | int) for size in card.sizes)


def test_only_regular_files_of_a_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text(" " * 101)
    with pytest.raises(DataError, match="no regular file"):
        read_json(tmp_path / "pipe", dict)
    with pytest.raises(DataError, match="at most 100 bytes"):
        read_json(tmp_path / "large", dict, limit=100)
    with pytest.raises(DataError, match="no regular file"):
        read_json(tmp_path, dict)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent", dict)
