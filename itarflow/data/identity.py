"""What a data set is: its images, classes and columns, so that another one is not taken for it without a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from itarflow.runtime.text import listed, printable

_CODES = "mean"  # the column by which a set of codes is known


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """What was understood of a data set when it was opened. It is stored with all that is made of the set.

    Attributes:
        content: SHA-256 of which images and labels these are, after its kind, such as "rows:0a1b..."; see
            `content.content_of`.
        images: number of images by split or part, such as {"train": 50000, "held out": 1000}.
        class_names: in the order of the labels; () = unlabelled.
        class_counts: images of each class, in that order, of the first part: those to train on.
        columns: {"image": "img", "label": "fine_label", "caption": "text"}; of a folder of pictures no image, nor a
            label that is the name of its folder.
        left_out: what was not taken, and why, as sentences.
    """

    content: str
    images: dict[str, int]
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return {**asdict(self), "class_names": list(self.class_names), "class_counts": list(self.class_counts),
                "left_out": list(self.left_out)}  # fmt: skip

    @property
    def content_kind(self) -> str:
        """How `content` was found, as only hashes of one kind can be compared; "" where no kind is stored."""
        return self.content.rpartition(":")[0]

    def differences(self, now: DataIdentity) -> list[str]:
        """What distinguishes the set `now` from this one, a line each; empty = the same set.

        Where the files lie, and when they were written, does not count, nor a `content` of another kind.
        """
        found: list[str] = []
        if self.class_names != now.class_names:
            moved = [
                f"label {label} was {was}, is {now_is} now"
                for label, (was, now_is) in enumerate(zip(self.class_names, now.class_names, strict=False))
                if was != now_is
            ]
            found.append(f"classes: [{listed(self.class_names)}] there, [{listed(now.class_names)}] now"
                         + (f" ({listed(moved, 2)})" if moved else ""))  # fmt: skip
        found += _changed("images", self.images, now.images)
        found += _changed("columns", self.columns, now.columns)
        if not found and self.class_counts != now.class_counts:
            found.append(f"images by class: {list(self.class_counts)} there, {list(now.class_counts)} now")
        if not found and self.content_kind == now.content_kind and self.content != now.content:
            found.append("images: as many, but other ones now (by names, sizes, labels or first bytes)")
        return [printable(line) for line in found]


def described(identity: DataIdentity) -> list[str]:
    """What was understood of a data set, as lines to show where work on it begins: images, labels, what is missing."""
    columns, images = identity.columns, identity.images
    if set(images) == {"train", "held out"}:
        counts = [f"{images['train']:,} to train on", f"{images['held out']:,} held out"]
    else:
        counts = [f"{count:,} in {name}" for name, count in images.items()]
    column = columns.get("image")
    source = f", of column {column}" if column is not None and column != _CODES else ""
    lines = [f"{'codes' if column == _CODES else 'images'}: {', '.join(counts)}{source}"]
    names = identity.class_names
    classes = f"{len(names):,} class" + ("es" if len(names) != 1 else "")
    if not names:
        lines.append("labels: none")
    else:
        each = [f"{name} {count:,}" for name, count in zip(names, identity.class_counts, strict=False)]
        shown = each if len(each) <= 6 else [*each[:3], "...", each[-1]]
        source = f"of column {columns['label']}" if "label" in columns else "by folder"
        lines.append(f"labels: {classes} {source} ({', '.join(shown)})")
    empty = [name for name, count in zip(names, identity.class_counts, strict=False) if count == 0]
    if empty:
        few = "has" if len(empty) == 1 else "have"
        lines.append(f"WARNING: {len(empty):,} of {classes} {few} no training images: {listed(empty)}")
    if "caption" in columns:
        lines.append(f"captions: of column {columns['caption']}")
    lines += [f"left out: {sentence}" for sentence in identity.left_out]
    return [printable(line) for line in lines]


def _changed(what: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys((*there, *now))
    return [
        f"{what}, {name}: {there.get(name, 'none')} there, {now.get(name, 'none')} now"
        for name in names
        if there.get(name) != now.get(name)
    ]
