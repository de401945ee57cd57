"""The curves of runs, from metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from itarflow.runtime.errors import RunError
from itarflow.runtime.pictures import blank_figure, save_figure
from itarflow.training.run_folder import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name of a line -> steps and values; "" if the panel has one line a run."""


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    find: Callable[[Sequence[Mapping[str, Any]]], Lines]
    """Takes the lines of metrics.jsonl."""
    logarithmic: bool = False
    level: float | None = None
    """A value to compare with, drawn thin."""


def plot_runs(runs: Sequence[Path], output: Path) -> None:
    """Draw the curves of one run, or of several over one another, into an image file.

    Panels for which no run has figures are left out. Noisy curves are drawn faint, with their moving average.

    Args:
        runs: folders of runs.
        output: a file with a suffix that matplotlib writes, such as .png, .svg or .pdf.

    Raises:
        RunError: a folder holds no run, or one without metrics yet, or without figures among them.
        ImportError: matplotlib is not installed.
        ValueError: matplotlib can't write such a file.
    """
    logged = {path: _logged(path) for path in runs}
    panels = [panel for panel in PANELS if any(panel.find(lines) for lines in logged.values())]
    if not panels:
        raise RunError(
            f"{', '.join(map(str, runs))}: metrics.jsonl holds no figures to draw, such as a loss by step; expected "
            "those that a training writes."
        )
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = blank_figure(4.6 * columns, 3.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = _names(list(logged))
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, {names[path]: panel.find(lines) for path, lines in logged.items()})
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(", ".join(f"{name} ({_STYLES[i % len(_STYLES)]})" for i, name in enumerate(names.values()))
                    if len(names) > 1 else next(iter(names.values())))  # fmt: skip
    save_figure(figure, output, 110)


def _logged(path: Path) -> list[dict[str, Any]]:
    run = RunDir(path)
    if not run.recipe.exists():
        raise RunError(f"{path} holds no run: recipe.json is missing. Expected a folder such as runs/digits.")
    lines = [line for line in run.logged() if isinstance(line, dict)]
    if not lines:
        raise RunError(f"{path} has no metrics yet: train.log_every steps must have been done.")
    return lines


def _draw(axis: Axes, panel: Panel, runs: Mapping[str, Lines]) -> None:
    # A style a run, and a colour a line, which the legend then has once; runs of a single line have their own colours.
    colours = {
        line: f"C{index}"
        for index, line in enumerate(dict.fromkeys(line for found in runs.values() for line in found))
    }
    for number, lines in enumerate(runs.values()):
        for line, (steps, values) in lines.items():
            smooth, style = _smoothed(values), _STYLES[number % len(_STYLES)]
            label = line if number == 0 else None
            (drawn,) = axis.plot(
                steps, smooth, style, linewidth=1.2, label=label, color=colours[line] if line else f"C{number}"
            )
            if smooth is not values:
                axis.plot(steps, values, linewidth=0.5, alpha=0.25, color=drawn.get_color())
            if len(steps) < 3:
                axis.plot(steps, values, "o", markersize=3, color=drawn.get_color())
    if panel.level is not None:
        axis.axhline(panel.level, color="grey", linewidth=0.6, linestyle=":")
    if panel.logarithmic:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(linewidth=0.3)
    if any(line.get_label() and not str(line.get_label()).startswith("_") for line in axis.get_lines()):
        axis.legend(fontsize=7)


_STYLES = ("-", "--", ":", "-.")


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The names of the runs, or their paths where names are not enough to tell them apart."""
    unique = len({path.name for path in paths}) == len(paths)
    return {path: path.name if unique else str(path) for path in paths}


def _smoothed(values: Sequence[float]) -> Sequence[float]:
    """Mean over about a fiftieth of the curve around each point; short curves stay as they are."""
    window = len(values) // 50 * 2 + 1
    if window < 3:
        return values
    padded = np.pad(np.asarray(values, dtype=float), window // 2, mode="edge")
    return list(np.convolve(padded, np.ones(window) / window, mode="valid"))


def _values(key: str) -> Callable[[Sequence[Mapping[str, Any]]], Lines]:
    return lambda lines: _collect((line.get("step"), {"": line.get(key)}) for line in lines)


def _losses(of_decoder: bool) -> Callable[[Sequence[Mapping[str, Any]]], Lines]:
    """Of a flow's training, or of a decoder's fine-tuning, whose lines have a term of `LossConfig` at least."""
    terms = ("l1", "l2", "lpips")
    return lambda lines: _collect(
        (line.get("step"), {"": line.get("loss")})
        for line in lines
        if any(term in line for term in terms) == of_decoder
    )


def _table(*keys: str) -> Callable[[Sequence[Mapping[str, Any]]], Lines]:
    """Of a dict inside a line, found by one key after another; lists count as dicts of blocks."""

    def find(lines: Sequence[Mapping[str, Any]]) -> Lines:
        return _collect((line.get("step"), _entries(line, keys)) for line in lines)

    return find


def _entries(line: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    value: Any = line
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, list):
        return {f"block {index}": entry for index, entry in enumerate(value)}
    if isinstance(value, dict):
        return {f"t = {name}": entry for name, entry in value.items()}
    return {"": value}


def _collect(found: Any) -> Lines:
    """Lines from pairs of a step and its values by name; what is missing or not finite leaves a gap."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for step, values in found:
        for name, value in values.items():
            if _is_figure(step) and _is_figure(value):
                steps, line = lines.setdefault(name, ([], []))
                steps.append(step)
                line.append(value)
    return lines


def _is_figure(value: Any) -> bool:
    """Whether it can be drawn; numbers that are too large for a float can't."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


PANELS = (
    Panel("loss (weighted nll)", _losses(of_decoder=False)),
    Panel("loss of the decoder (weighted sum)", _losses(of_decoder=True)),
    Panel("held-out nll, nats/dim", _table("held_out", "nll")),
    Panel("held-out bits/dim", _table("held_out", "bpd")),
    Panel("held-out PSNR by noise level, dB", _table("psnr")),
    Panel("training nll by noise level, nats/dim", _table("nll_by_level")),
    Panel("gradient norm", _values("grad_norm"), logarithmic=True),
    Panel("learning rate", _values("learning_rate")),
    Panel("mean of z after each block", _table("z_mean"), level=0.0),
    Panel("spread of z after each block", _table("z_std"), level=1.0),
    Panel("images/s", _values("images_per_second")),
    Panel("TFLOP/s a device", _values("tflops")),
    Panel("memory, GiB", _values("memory_gib")),
)
