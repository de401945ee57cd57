"""Which column of a table holds the images, and which one the labels."""

from __future__ import annotations

import re
import warnings
from typing import Any

import datasets

from itarflow.runtime.errors import DataError
from itarflow.runtime.text import listed, printable

IMAGE_NAMES = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp", "picture", "photo")
"""Columns of images that are taken before others, in this order."""
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
"""Columns that are taken for labels whatever their type, in this order."""


def find_image_column(features: datasets.Features, wanted: str | None) -> str:
    """The column with images: the one that is wanted, or the only one, or one of `IMAGE_NAMES`.

    Raises:
        DataError: there is none, or there are several and none has a usual name.
    """
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    others = [name for name, feature in features.items() if _encoded(feature)]
    if wanted is not None:
        if wanted in typed or wanted in others:
            return wanted
        raise DataError(
            f"image_column {wanted!r} has no images; use one of [{_shown(typed + others)}] (of [{_shown(features)}])"
        )
    usable = typed or others
    if not usable:
        raise DataError(f"no column of type Image among [{_shown(features)}]; is this a set of images?")
    named = [name for name in IMAGE_NAMES if name in usable]
    if len(usable) > 1 and not named:
        raise DataError(
            f"columns [{_shown(usable)}] all hold images; expected one, or one called {' or '.join(IMAGE_NAMES[:3])}: "
            "name it by image_column"
        )
    return usable[0] if len(usable) == 1 else named[0]


def find_label_column(features: datasets.Features, wanted: str | None) -> str | None:
    """The column with labels: the one that is wanted, or the first of these, or None.

    Classes with names come first (`datasets.ClassLabel`; of the usual names, then of others), then numbers, then
    text, of the usual names only.

    Raises:
        DataError: the wanted column holds something else.
    """

    def holds(name: str, kinds: str) -> bool:
        return re.fullmatch(kinds, str(getattr(features.get(name), "dtype", ""))) is not None

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if wanted is not None:
        if wanted in typed or holds(wanted, f"{_NUMBERS}|{_TEXT}"):
            return wanted
        kind = printable(str(features.get(wanted, "missing")))
        raise DataError(
            f"label_column {wanted!r} is {kind}; expected ClassLabel, ints or text, of [{_shown(features)}]"
        )
    named = [name for name in LABEL_NAMES if name in features]
    named = [name for name in named if not (isinstance(features[name], datasets.Image) or _encoded(features[name]))]
    numbers, text = ([name for name in named if holds(name, kinds)] for kinds in (_NUMBERS, _TEXT))
    found = [*(name for name in named if name in typed), *typed, *numbers, *text]
    if named and not found:
        warnings.warn(f"column {named[0]!r} is no ClassLabel, no int and no text: images are unlabelled", stacklevel=3)
    return found[0] if found else None


_NUMBERS, _TEXT = r"u?int\d+", "(large_)?string"


def _encoded(feature: Any) -> bool:
    """Whether it is what other writers of parquet leave of an image."""
    return "bytes" in feature if isinstance(feature, dict) else "binary" in str(getattr(feature, "dtype", ""))


def _shown(names: Any) -> str:
    return printable(listed(map(str, names), 20))
