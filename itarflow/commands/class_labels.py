"""Labels and seeds of images, as options of the commands that make them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from itarflow.commands.console import say
from itarflow.flow.embedding import NULL_LABEL
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.text import printable

MOST_IMAGES = 10**6
"""That `itarflow sample` makes; `itarflow evaluate` is for more."""


def chosen_labels(
    pipe: ITARFlowPipeline, class_labels: Sequence[str] | None, num_images: int | None
) -> list[int | None]:
    """A label an image, as the options of a command say; None = no label.

    A number is that of a label, as in Python, also where a class is called by a number; -1 = no label. All other words
    are names of classes.

    Args:
        pipe: whose labels they are.
        class_labels: names or numbers, repeated in turn; None = every class in turn.
        num_images: None = one a label, or 16 if the model has no classes.

    Raises:
        ValueError: there is no such label, or no image is asked for.
    """
    num_classes = pipe.flow.config.num_classes
    given: list[int | None]
    if class_labels:
        given = [_label(pipe, text) for text in class_labels]
    else:
        given = list(range(num_classes)) if num_classes else [None]
    count = num_images if num_images is not None else len(given) if num_classes else 16
    if not 1 <= count <= MOST_IMAGES:
        raise ValueError(f"--num-images is {count}; expected a number >= 1, and at most {MOST_IMAGES:,}.")
    return [given[index % len(given)] for index in range(count)]


def check_seed(seed: int) -> None:
    """Refuse a seed that a generator does not take; raises ValueError."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}; expected a number >= 0, and below 2^63.")


def class_name(pipe: ITARFlowPipeline, label: int | None) -> str:
    """What a label is called on a picture: its name, or else its number; "" for none."""
    if label is None:
        return ""
    names = pipe.config.class_names
    return printable(names[label]) if names else str(label)


def _label(pipe: ITARFlowPipeline, text: str) -> int | None:
    count = pipe.flow.config.num_classes
    if not re.fullmatch("[+-]?[0-9]{1,18}", text):
        return pipe.label_id(text)
    number = int(text)
    if number == NULL_LABEL:
        return None
    if count and not 0 <= number < count:
        raise ValueError(
            f"class label {number} is out of range; expected 0 .. {count - 1}, or -1 for images without a label."
        )
    names = pipe.config.class_names or []
    if text in names and names.index(text) != number:
        say(
            f"Note: label {number} is the class {class_name(pipe, number)!r}; the class that is called {text!r} has "
            f"label {names.index(text)}."
        )
    return pipe.label_id(number)
