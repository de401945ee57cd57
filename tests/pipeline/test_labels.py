"""What a call of the pipeline is given: labels in whatever form, and a generator an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from itarflow.codec import to_pil
from itarflow.pipeline.labels import label_list, label_number, label_tensor
from itarflow.runtime.seeds import image_generators


@pytest.mark.parametrize(
    ("given", "count", "wanted"),
    [
        (None, None, [None]),
        (None, 2, [None, None]),
        ("cat", 3, ["cat"] * 3),
        (np.int64(2), 2, [2, 2]),
        (torch.tensor([1, 0]), None, [1, 0]),
        (np.array([1, 0]), 2, [1, 0]),
        (["cat", np.int32(1), torch.tensor(2), None], None, ["cat", 1, 2, None]),
    ],
)
def test_labels_become_a_list_with_one_an_image(given, count, wanted):
    found = label_list(given, count)
    assert found == wanted
    assert all(label is None or type(label) in (int, str) for label in found)


def test_a_list_of_labels_is_not_changed():
    labels = ["cat"]
    label_list(labels, 3)
    assert labels == ["cat"]


def test_the_generator_of_an_image_does_not_depend_on_how_many_are_made():
    few, many = (image_generators(torch.Generator().manual_seed(5), count) for count in (2, 7))
    assert [one.initial_seed() for one in few] == [one.initial_seed() for one in many[:2]]
    assert len({one.initial_seed() for one in many}) == 7


def test_a_list_of_generators_gives_the_seeds_that_one_of_them_gives():
    def seeds(given, count):
        return [one.initial_seed() for one in image_generators(given, count)]

    def new(seed):
        return torch.Generator().manual_seed(seed)

    first, second = seeds(new(5), 2)
    assert seeds([new(5)], 1) == [first]
    shared = new(5)
    assert seeds([shared, shared], 2) == [first, second]
    assert seeds([new(5), new(6)], 2) == [first, *seeds(new(6), 1)]


def test_generators_of_images_are_kept():
    given = image_generators(torch.Generator().manual_seed(5), 2)
    assert image_generators(given, 2) == given
    with pytest.raises(ValueError, match="2 generators were given for 3 images"):
        image_generators(given, 3)


@pytest.mark.parametrize("given", [0, "seed", [0]], ids=repr)
def test_a_seed_is_no_generator(given):
    with pytest.raises(ValueError, match=r"expected a torch.Generator, such as .*manual_seed\(0\)"):
        image_generators(given, 1)


def test_names_in_messages_can_not_be_obeyed_by_a_terminal():
    with pytest.raises(ValueError, match=r"is not known") as refusal:
        label_number("x", 1, ["\x1b]0;pwned\x07\x1b[2J"])
    assert str(refusal.value).isprintable()


def test_pictures_are_grey_or_rgb_and_clamped():
    grey = torch.tensor([-1.0, 1.0, 5.0, float("nan")]).reshape(1, 1, 2, 2)
    (picture,) = to_pil(grey)
    assert (picture.mode, np.asarray(picture).flatten()[:3].tolist()) == ("L", [0, 255, 255])
    (picture,) = to_pil(torch.zeros(1, 3, 2, 4))
    assert (picture.mode, picture.size) == ("RGB", (4, 2))


def test_labels_become_a_tensor_if_there_are_any():
    assert label_tensor([2, None, 0]).tolist() == [2, -1, 0]
    assert label_tensor([None, None]) is None
