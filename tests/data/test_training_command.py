"""The commands that are proposed for what was made."""

from __future__ import annotations

from pathlib import Path

import pytest

from itarflow.commands.encode_dataset import captions_told
from itarflow.data.context import ContextCard
from itarflow.data.prepare.codes_card import is_small, patch_size, run_name
from itarflow.text_encoder import TextIdentity


@pytest.mark.parametrize(("side", "patch"), [(8, 1), (16, 2), (24, 2), (32, 2), (64, 4), (17, 1)])
def test_patches_leave_eight_to_sixteen_tokens_a_side(side, patch):
    assert patch_size(side) == patch


def test_pixels_have_patches_of_two_or_more_where_these_divide_them():
    assert [patch_size(side, least=2) for side in (8, 16, 64)] == [2, 2, 4]


def test_runs_are_called_as_the_folder_if_they_may_be():
    assert run_name(Path("prepared/shapes")) == "shapes"
    assert run_name(Path("/")) is None


def captions(**values) -> ContextCard:
    encoder = TextIdentity(name="t5", revision=None, encoder="0", tokenizer="0", dim=8, max_tokens=128)
    return ContextCard(encoder=encoder, captions="text", **values)


def test_short_captions_are_said_and_empty_ones():
    told = captions_told(captions(longest=12, empty=3))
    assert told["longest caption"].startswith("12 tokens: --context-tokens 12")
    assert told["empty captions"] == "3 images"
    assert {"longest caption", "empty captions"}.isdisjoint(captions_told(captions(longest=100)))


def test_few_images_get_a_small_model():
    assert is_small({"train": 300}, captions())
    assert not is_small({"test": 5, "train": 2_000_000}, captions())
    assert is_small({"train": 2_000_000}, None)
