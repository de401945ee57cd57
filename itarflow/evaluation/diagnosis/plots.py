"""Diagrams of a diagnosis: detail token by token, and spectra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from itarflow.evaluation.diagnosis.failures import FINE
from itarflow.evaluation.diagnosis.onset import Onset
from itarflow.runtime.pictures import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_LEAST_RANGE = 1.0  # log2: a map of nearly normal detail is pale
_STANDARD_ERRORS = 1.96
_FEWEST = 10  # images: the mean of fewer says little, and stretches the axis


class Detail(NamedTuple):
    """Fine structure of the images of a set."""

    relative: Tensor
    """(n, N) log2 of its energy relative to the mean of real images, token by token."""
    blurred: Tensor
    """(n,) bool: which images are blurred."""
    onset: Onset | None
    """Where the blur of all of them begins."""


def draw_detail(sets: Mapping[str, Detail], side: int, path: Path) -> None:
    """Draw maps of detail relative to real images, and the same as curves along the raster order.

    Args:
        sets: by name, a column each.
        side: tokens a row of an image.
        path: picture file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = blank_figure(3.6 * len(sets) + 0.8, 6.2)
    axes = figure.subplots(2, len(sets), squeeze=False, height_ratios=(3, 2), sharey="row", sharex="row")
    means = {name: detail.relative.mean(dim=0) for name, detail in sets.items()}
    reach = max(_LEAST_RANGE, *(float(mean.abs().max()) for mean in means.values()))
    for column, (name, detail) in enumerate(sets.items()):
        shown = axes[0, column].imshow(means[name].view(side, side).numpy(), cmap="RdBu", vmin=-reach, vmax=reach)
        axes[0, column].set_title(f"{name}\n{len(detail.relative):,} images", fontsize=9)
        axes[0, column].set_xlabel("token in its row", fontsize=8)
        axes[0, column].locator_params(integer=True)
        _draw_curve(axes[1, column], detail)
    axes[0, 0].set_ylabel("row of tokens", fontsize=8)
    axes[1, 0].set_ylabel("energy of fine structure,\nreal images = 1", fontsize=8)
    bar = figure.colorbar(shown, ax=axes[0].tolist())
    bar.set_label("energy of fine structure, real images = 1", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    # Logarithms are drawn: matplotlib's own logarithmic maps have no middle.
    inside = [ratio for ratio in _RATIOS if abs(torch.tensor(ratio).log2()) <= reach + 1e-6]
    bar.set_ticks([float(torch.tensor(ratio).log2()) for ratio in inside], labels=[f"{ratio:g}" for ratio in inside])
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)


def draw_spectra(spectra: Mapping[str, Tensor], path: Path) -> None:
    """Draw mean power spectra, and their ratios to the first one's.

    Args:
        spectra: (S - 1,) each, as `failures.spectrum` gives them, those of real images first.
        path: picture file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = blank_figure(6.4, 6.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    (real_name, real), *_ = spectra.items()
    frequency = torch.arange(1, len(real) + 1) / (2 * (len(real) + 1))
    for number, (name, power) in enumerate(spectra.items()):
        colour = "black" if name == real_name else f"C{number - 1}"
        above.loglog(frequency, power, color=colour, label=name, linewidth=1.2)
        below.loglog(frequency, power / real, color=colour, linewidth=1.2)
    for axis in (above, below):
        axis.axvline(FINE, color="grey", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        _number_plainly(axis)
    below.set_xscale("log", base=2)
    below.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    low, high = below.get_ylim()
    below.set_ylim(min(low, 0.45), max(high, 2.2))  # so that nearly equal spectra look so
    above.annotate(
        " fine detail", (FINE, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color="grey", va="top"
    )
    above.set_ylabel("power, squared grey levels", fontsize=9)
    below.set_ylabel(f"relative to {real_name}", fontsize=9)
    below.set_xlabel("cycles per pixel", fontsize=9)
    above.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=130)


def _draw_curve(axis: Axes, detail: Detail) -> None:
    tokens = torch.arange(detail.relative.shape[1])
    groups = {"all images": (detail.relative, "C0"), "blurred images": (detail.relative[detail.blurred], "C3")}
    for name, (relative, colour) in groups.items():
        if len(relative) < _FEWEST:
            continue
        mean = relative.mean(dim=0)
        error = _STANDARD_ERRORS * relative.std(dim=0) / len(relative) ** 0.5
        axis.plot(tokens, mean.exp2(), color=colour, linewidth=1.2, label=f"{name} ({len(relative):,})")
        axis.fill_between(tokens, (mean - error).exp2(), (mean + error).exp2(), color=colour, alpha=0.25, linewidth=0)
    axis.axhline(1, color="black", linewidth=0.8)
    if detail.onset is not None:
        where = "from {} on" if detail.onset.order == "raster" else "up to {}"
        label = f"blurred {where.format(f'token {detail.onset.token}')}"
        axis.axvline(detail.onset.token, color="black", linestyle="--", linewidth=1, label=label)
    axis.set_yscale("log")
    _number_plainly(axis)
    axis.set_xlabel("token in raster order", fontsize=8)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _number_plainly(axis: Axes) -> None:
    """Ticks 1, 2, 5, 10, .. up a logarithmic axis, without powers."""
    from matplotlib.ticker import LogLocator

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.yaxis.minorticks_off()
