"""The diagram of a diagnosis: detail along the tokens of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from itarflow.evaluation.diagnosis.failures import Onset, quartiles
from itarflow.runtime.pictures import blank_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_FEWEST = 10  # images: quartiles of fewer say little, and stretch the axis


class Detail(NamedTuple):
    """Energy of fine structure of the images of a set."""

    relative: Tensor
    """(n, N) log2, relative to the median of real images, token by token."""
    blurred: Tensor
    """(n,) bool: which images are blurred."""
    onset: Onset | None
    """Where the blur of all of them begins; None = nowhere."""
    onset_of_blurred: Onset | None
    """The same of the blurred images alone; None = nowhere, or fewer than two of them."""


def draw_detail(real: Tensor, sets: Mapping[str, Detail], path: Path) -> None:
    """Draw medians and quartiles of detail in raster order, over those of real images.

    Args:
        real: (m, N) as `Detail.relative`, of real images.
        sets: by name, a panel each.
        path: image file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = blank_figure(4.2 * len(sets) + 0.6, 3.6)
    panels = figure.subplots(1, len(sets), squeeze=False, sharey=True)[0]
    for axis, (name, detail) in zip(panels, sets.items(), strict=True):
        _draw_curve(axis, real, "real images", "0.4")
        _draw_curve(axis, detail.relative, "all images", "C0")
        if int(detail.blurred.sum()) >= _FEWEST:
            _draw_curve(axis, detail.relative[detail.blurred], "blurred images", "C3")
        if detail.onset is not None:
            where = "from" if detail.onset.order == "raster" else "up to"
            label = f"blurred {where} token {detail.onset.token}"
            axis.axvline(detail.onset.token, color="black", linestyle="--", linewidth=1, label=label)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("token in raster order", fontsize=8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    panels[0].set_ylabel("energy of fine structure (median, quartiles),\nreal images = 1", fontsize=8)
    save_figure(figure, path, 130)


def _draw_curve(axis: Axes, relative: Tensor, name: str, colour: str) -> None:
    low, median, high = quartiles(relative).exp2().numpy()
    tokens = range(relative.shape[1])
    axis.plot(tokens, median, color=colour, linewidth=1.2, label=f"{name} ({len(relative):,})")
    axis.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
