"""`itarflow bpd`: likelihoods of real images, in bits and nats a dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.commands.console import reporting, resumable, say
from itarflow.evaluation.likelihood.bounds import Mean
from itarflow.evaluation.likelihood.bpd import BpdConfig, Report, measure_bpd
from itarflow.runtime.devices import usable_device
from itarflow.runtime.text import counted, printable


@dataclass(frozen=True, kw_only=True)
class Bpd(BpdConfig):
    """Measure how likely a flow finds real images: bits/dim of the 8-bit images, nats/dim of noisy ones.

    Example: itarflow bpd runs/digits/pipeline --data digits --split train --held-out-images 179 --output likelihood

    Compute is in float32. Each row of the table is a noise that is added to the images:

    uniform, that of one grey level: bits/dim as they are published. They are what a flow trained with
    --noise.distribution dequantise minimises. For one trained on Gaussian noise, at its smallest level, such
    noise is out of distribution: the bound holds, but it may be poor.

    gaussian, at the noise levels of training: nats/dim of the noisy images, which is what such a flow minimises, and
    the bits/dim that follow if an image is drawn in two steps, noisy by the flow and then each pixel's grey level by
    the noise. Smaller levels come nearer to the image.

    Bits/dim are upper bounds of -log2 P(image) / (C * H * W), tighter with more --draws. Flows of a VAE's codes have
    none: only nats/dim of their codes, which can't be compared across VAEs. Several processes share the images:
    accelerate launch -m itarflow bpd ...
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, such as runs/digits/pipeline, or a Hugging Face Hub id (NAME/MODEL). Comes first."""
    data: str
    """Where the images are: digits, a folder, parquet files, or a data set on the Hub, as --data.path in training."""

    def run(self) -> None:
        """Carry the command out."""
        with reporting(Console(), f"Try a lower --batch-size (it was {self.batch_size}).", device=self.device):
            if self.device is not None:
                usable_device(self.device)
            with resumable(self.output):
                report = measure_bpd(self, console=Console(stderr=True))
            if report is not None:
                self._show(report)

    def _show(self, report: Report) -> None:
        Console().print(_bpd_table(report))
        for line in _meanings(report):
            say(line)
        if report.broken:
            left_out = counted(len(report.broken), "unreadable image")
            say(f"{left_out} left out: {'; '.join(report.broken[:3])}")
        speed = report.images_per_second
        say("nothing was left to do" if speed is None else f"{speed:.3g} images/s")
        if self.output is not None:
            say(f"figures of each image, settings and curve in {self.output}/")


def _bpd_table(report: Report) -> Table:
    settings, draws = report.settings, report.settings["draws"]
    labels = f"labels {settings['labels']}" if settings["labels"] != "none" else "no labels"
    if (captions := settings.get("captions")) is not None:  # of a flow that takes them, and no labels
        labels = "no captions" if captions == "none" else f"captions by {escape(repr(printable(captions)))}"
    where = f"{settings['data']}, {settings['split']}" + (", held out" if settings["held_out_images"] else "")
    table = Table(
        title=f"Likelihood of {counted(report.images, 'image')} ({where}), {labels}, {counted(draws, 'draw')} each, "
        f"under {settings['checkpoint']}",
        title_justify="left",
    )
    table.add_column("noise")
    table.add_column("nats/dim", justify="right")
    if not settings["codes"]:
        table.add_column("bits/dim <=", justify="right")
        if draws > 1:
            table.add_column("with 1 draw", justify="right")
    for figures in report.figures:
        bits = [] if figures.bits is None else [_cell(figures.bits)]
        if figures.bits_one_draw is not None and draws > 1:
            bits.append(_cell(figures.bits_one_draw))
        table.add_row(escape(figures.noise.title), _cell(figures.nll), *bits)
    return table


def _cell(mean: Mean) -> str:
    if mean.mean is None:
        return f"[red]{mean.not_finite} not finite[/]"
    return f"{mean.mean:.4f}" + ("" if mean.standard_error is None else f" ± {mean.standard_error:.4f}")


def _meanings(report: Report) -> list[str]:
    """Exact meanings of the figures that are in the table."""
    kinds = {figures.noise.kind for figures in report.figures}
    lines = ["Mean over images ± its standard error, in float32; nats/dim are -log p(image + noise) / (C * H * W)."]
    if report.settings["codes"]:
        return [*lines, "They are of the VAE's codes: bits/dim of pixels do not follow from them."]
    if "uniform" in kinds:
        lines.append("uniform: bits/dim by dequantisation, an upper bound of those of the 8-bit images.")
        if report.settings["trained_on"] == "gaussian":
            lines.append(
                "  This flow was trained on Gaussian noise, not on uniform: the bound holds, but such noise is "
                "out of distribution."
            )
    if "gaussian" in kinds:
        lines.append(
            "gaussian: bits/dim if grey levels are drawn from noisy images of the flow, each pixel for itself; an "
            "upper bound too, of which log2(527 t) are the noise's own. Not to be compared with those of uniform."
        )
    return lines
