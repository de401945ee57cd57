"""A sweep as people look at it: its figures over each of its settings, and the same images of all settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from itarflow.codec import to_pil, to_pixels
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.samples.files import open_samples
from itarflow.evaluation.sweep import HIGHER_IS_BETTER, Setting, best_settings, figure_names, plain
from itarflow.runtime.pictures import blank_figure, titled_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_AXES = {"guidance_weight": "guidance weight", "t_max": "t_max", "num_denoise_steps": "denoising steps"}
_LINES = {"guidance_weight": "t_max", "t_max": "num_denoise_steps", "num_denoise_steps": "guidance_weight"}
"""What has a line each in the panels over a setting: so each pair of settings is seen once."""


def draw_curves(scores: Mapping[Setting, Scores], path: Path) -> None:
    """Draw a row of panels over each setting that has several values, with a panel for each figure.

    A second setting has a line for each of its values. A third one is held where the first figure, a Fréchet
    distance, is best. A star marks the best setting of all by a panel's figure, if it is among those in the panel.

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
        line = _LINES[x] if _LINES[x] in several or len(several) < 2 else _third(x, _LINES[x])
        held = _third(x, line)
        at = getattr(best.get(names[0], next(iter(scores))), held)
        shown = {setting: one for setting, one in scores.items() if getattr(setting, held) == at}
        for name, panel in zip(names, row, strict=True):
            _draw(panel, shown, name, x, line, best.get(name))
        if held in several:
            row[0].set_ylabel(f"at {_AXES[held]} {_text(held, at)}", fontsize=9)
    for name, panel in zip(names, panels[0], strict=True):
        title = next(one.figures[name].title for one in scores.values() if name in one.figures)
        better = "higher" if name in HIGHER_IS_BETTER else "lower"
        panel.set_title(f"{title.partition(' (')[0]}, {better} is better", fontsize=10)
    first = next(iter(scores.values()))
    same = [f"{_AXES[axis]} {_text(axis, _values(scores, axis)[0])}" for axis in _AXES if axis not in over]
    what = f"{first.samples:,} samples against {first.reference}, by {first.extractor}"
    figure.suptitle(", ".join([what, *same]) + "; star: best of all settings", fontsize=10)
    figure.savefig(path, dpi=110)


def _draw(panel: Axes, scores: Mapping[Setting, Scores], name: str, x: str, line: str, best: Setting | None) -> None:
    from matplotlib import colormaps

    lines, places = _values(scores, line), _places(x, _values(scores, x))
    for number, value in enumerate(lines):
        found = {
            places[getattr(setting, x)]: one.figures[name].value
            for setting, one in scores.items()
            if getattr(setting, line) == value and name in one.figures
        }
        colour = colormaps["viridis"](0.85 * number / max(len(lines) - 1, 1))
        panel.plot(list(found), list(found.values()), "o-", color=colour, markersize=4, linewidth=1.2,
                   label=_text(line, value))  # fmt: skip
    if best is not None and best in scores:
        panel.plot(places[getattr(best, x)], scores[best].figures[name].value, "*", color="crimson", markersize=12)
    values = [one.figures[name].value for one in scores.values() if name in one.figures]
    if name not in HIGHER_IS_BETTER and values and min(values) > 0 and max(values) > 3 * min(values):
        _make_logarithmic(panel, max(values) / min(values))  # else noisy images would leave no room for the others
    panel.set_xticks(list(places.values()), [_text(x, value) for value in places])
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


def _third(one: str, other: str) -> str:
    return next(axis for axis in _AXES if axis not in (one, other))


def _values(scores: Mapping[Setting, Scores], axis: str) -> list[float]:
    return sorted({getattr(setting, axis) for setting in scores})


def _places(axis: str, values: Sequence[float]) -> dict[float, float]:
    """Where values lie on an axis: numbers of steps, which mostly double, at equal distances."""
    return {value: float(index if axis == "num_denoise_steps" else value) for index, value in enumerate(values)}


def _text(axis: str, value: float) -> str:
    return "noisy" if axis == "num_denoise_steps" and value == 0 else plain(value)


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
    ways = len({setting.num_denoise_steps for setting in settings})
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
    page.save(path)


def _title(setting: Setting) -> str:
    steps = setting.num_denoise_steps
    steps_text = "noisy" if not steps else "1 step" if steps == 1 else f"{steps} steps"
    return f"guidance {plain(setting.guidance_weight)}\nt_max {plain(setting.t_max)}\n{steps_text}"
