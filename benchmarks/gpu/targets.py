"""What is aimed at on one H100, and what a check has found of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpu.figures import Figure


class Target(NamedTuple):
    """One aim."""

    what: str
    wanted: float
    found: float
    unit: str
    at_most: bool = False
    """Else at least."""

    @property
    def row(self) -> list[str]:
        """For a table: what, aim, found, and whether it has been reached."""
        reached = self.found <= self.wanted if self.at_most else self.found >= self.wanted
        sign = "at most" if self.at_most else "at least"
        aim = f"{sign} {self.wanted:g} {self.unit}"
        return [self.what, aim, f"{self.found:.3g}", "reached" if reached else "missed"]


def targets(figures: Sequence[Figure]) -> Iterator[Target]:
    """Of the figures that are there."""
    measured = [figure for figure in figures if figure.failed is None and figure.seconds]
    products = (f.flops / f.seconds for f in measured if f.what == "largest product" and f.dtype == "bf16" and f.flops)
    peak = next(products, None)
    for figure in measured:
        seconds, name = figure.seconds or 1.0, f"{figure.what}, {figure.images} images"
        kind = figure.what, figure.case, figure.dtype
        if kind == ("inverse", "", "bf16") and figure.images >= 8 and figure.floor_seconds:
            yield Target(f"{name}, over the floor", 2, seconds / figure.floor_seconds, "times", at_most=True)
        if figure.what == "inverse and ten scores" and figure.peer_seconds:
            yield Target(f"{name}, beside the official code", 10, figure.peer_seconds / seconds, "times as fast")
        if kind == ("training step", "compiled", "bf16") and figure.flops and peak:
            part = 100 * figure.flops / seconds / peak
            yield Target(f"{name}, compiled, of the largest product's rate", 50, part, "%")
        if figure.what == "training step" and figure.peak_bytes and figure.estimated_bytes:
            off = 100 * abs(figure.estimated_bytes / figure.peak_bytes - 1)
            case = f", {figure.case}" if figure.case else ""
            yield Target(f"{name}{case}, {figure.dtype}, memory off its estimate", 15, off, "%", at_most=True)
    parts = [figure for figure in measured if figure.what.startswith(IMAGENET64)]
    if len(parts) == 2:
        speed = parts[0].images / sum(figure.seconds or 0.0 for figure in parts)
        yield Target("TARFlow's ImageNet-64, inverse and denoising", 7, speed, "images a second")


IMAGENET64 = "TARFlow's ImageNet-64 "
