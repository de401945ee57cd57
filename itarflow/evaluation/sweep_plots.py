"""A sweep as people look at it: its figures over each of its settings, and the same images of all settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from itarflow.codec import to_pil, to_pixels
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.samples.files import open_samples
from itarflow.evaluation.sweep import HIGHER_IS_BETTER, Setting, best_settings, figure_names, plain, text
from itarflow.runtime.pictures import blank_figure, save_figure, save_picture, titled_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_AXES = {
    "guidance_weight": "guidance weight",
    "temperature": "temperature",
    "t_max": "t_max",
    "num_denoise_steps": "denoising steps",
    "method": "method",
}
_UNEVEN = ("num_denoise_steps", "method")
"""Axes whose values lie at equal distances: numbers of steps mostly double."""


def draw_curves(scores: Mapping[Setting, Scores], path: Path) -> None:
    """Draw a row of panels over each setting that has several values, with a panel for each figure.

    The next one has a line for each of its values, so that each pair of three is seen once. All others are held where
    the first figure, a Fréchet distance, is best. A star marks the best setting of all by a panel's figure, if it is
    among those in the panel.

    Args:
        scores: of all settings of a grid.
        path: of an image file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names, best = figure_names(scores), best_settings(scores)
    several = [axis for axis in _AXES if len(_values(scores, axis)) > 1]
    over = several or ["guidance_weight"]
    figure = blank_figure(3.6 * len(names), 3.3 * len(over))
    panels = figure.subplots(len(over), len(names), squeeze=False)
    for x, row in zip(over, panels, strict=True):
        line = over[(over.index(x) + 1) % len(over)] if len(over) > 1 else next(axis for axis in _AXES if axis != x)
        held = [axis for axis in over if axis not in (x, line)]
        at = best.get(names[0], next(iter(scores)))
        shown = {
            setting: one
            for setting, one in scores.items()
            if all(getattr(setting, axis) == getattr(at, axis) for axis in held)
        }
        for name, panel in zip(names, row, strict=True):
            _draw(panel, shown, name, x, line, best.get(name))
        if held:
            where = ", ".join(f"{_AXES[axis]} {text(axis, getattr(at, axis))}" for axis in held)
            row[0].set_ylabel(f"at {where}", fontsize=9)
    for name, panel in zip(names, panels[0], strict=True):
        title = next(one.figures[name].title for one in scores.values() if name in one.figures)
        better = "higher" if name in HIGHER_IS_BETTER else "lower"
        panel.set_title(f"{title.partition(' (')[0]}, {better} is better", fontsize=10)
    first = next(iter(scores.values()))
    same = [f"{_AXES[axis]} {text(axis, values[0])}" for axis in _AXES if axis not in over
            and (values := _values(scores, axis))]  # fmt: skip
    what = f"{first.samples:,} samples against {first.reference}, by {first.extractor}"
    figure.suptitle(", ".join([what, *same]) + "; star: best of all settings", fontsize=10)
    save_figure(figure, path, 110)


def _draw(panel: Axes, scores: Mapping[Setting, Scores], name: str, x: str, line: str, best: Setting | None) -> None:
    from matplotlib import colormaps

    lines, places = _values(scores, line), _places(x, _values(scores, x))
    for number, value in enumerate(lines or [None]):
        found = {
            places[getattr(setting, x)]: one.figures[name].value
            for setting, one in scores.items()
            if getattr(setting, line) == value and getattr(setting, x) is not None and name in one.figures
        }
        colour = colormaps["viridis"](0.85 * number / max(len(lines) - 1, 1))
        panel.plot(list(found), list(found.values()), "o-", color=colour, markersize=4, linewidth=1.2,
                   label=text(line, value))  # fmt: skip
    if best is not None and best in scores and getattr(best, x) is not None:
        panel.plot(places[getattr(best, x)], scores[best].figures[name].value, "*", color="crimson", markersize=12)
    values = [one.figures[name].value for one in scores.values() if name in one.figures]
    if name not in HIGHER_IS_BETTER and values and min(values) > 0 and max(values) > 3 * min(values):
        _make_logarithmic(panel, max(values) / min(values))  # else noisy images would leave no room for the others
    panel.set_xticks(list(places.values()), [text(x, value) for value in places])
    panel.set_xlabel(_AXES[x], fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(linewidth=0.3)
    if len(lines) > 1:
        panel.legend(title=_AXES[line], title_fontsize=7, fontsize=7)


def _make_logarithmic(panel: Axes, ratio: float) -> None:
    """The axis of values whose largest is so many times the smallest, with a few plain numbers at it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set_yscale("log")
    numbers = (1, 2, 3, 5, 7) if ratio < 30 else (1, 3) if ratio < 1000 else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=numbers))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _values(scores: Mapping[Setting, Scores], axis: str) -> list[Any]:
    """In order; () of an axis that settings do not have."""
    return sorted({value for setting in scores if (value := getattr(setting, axis)) is not None})


def _places(axis: str, values: Sequence[Any]) -> dict[Any, float]:
    """Where values lie on an axis."""
    return {value: float(index if axis in _UNEVEN else value) for index, value in enumerate(values)}


# -- images -----------------------------------------------------------------------------------------------------


def draw_images(settings: Sequence[Setting], folder: Path, path: Path, count: int = 4, widest: int = 3000) -> None:
    """Draw the first images of all settings: a column for each setting, a row for each image.

    Args:
        settings: of a grid, whose samples are in the folder.
        folder: of the sweep.
        path: of an image file.
        count: images of each setting.
        widest: width of the figure in pixels; further columns go below.
    """
    columns = []
    for setting in settings:
        samples = open_samples(folder / setting.generation / setting.variant)
        columns.append(to_pil(to_pixels(samples.read(0, min(count, len(samples))))))
    width = max(columns[0][0].width, 98)
    ways = len({setting.variant for setting in settings})
    # Whole settings of generating in a band, if one fits.
    fitting = max(1, widest // width)
    band = fitting // ways * ways or fitting
    pages = []
    for start in range(0, len(settings), band):
        part = columns[start : start + band]
        images = [column[row] for row in range(len(part[0])) for column in part]
        pages.append(titled_grid(images, [_title(setting) for setting in settings[start : start + band]]))
    page = Image.new(pages[0].mode, (pages[0].width, sum(one.height + 12 for one in pages) - 12), "white")
    for index, one in enumerate(pages):
        page.paste(one, (0, sum(above.height + 12 for above in pages[:index])))
    save_picture(page, path)


def _title(setting: Setting) -> str:
    steps = setting.num_denoise_steps
    by = "" if setting.method is None else f" {setting.method}"
    tau = "" if setting.temperature is None else f"tau {plain(setting.temperature)}\n"
    steps_text = "noisy" if not steps else f"1 step{by}" if steps == 1 else f"{steps} steps{by}"
    return f"guidance {plain(setting.guidance_weight)}\n{tau}t_max {plain(setting.t_max)}\n{steps_text}"
