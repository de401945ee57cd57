"""What training, inverses and scores of the presets take at least, as the tables of README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from costs import H200, Cost, Peak, floor, inverse_costs, score_cost, total, training_cost
from peaks import chosen_device, measured_peaks
from rich.console import Console

from itarflow.flow import TARFlow
from itarflow.inverse import Guidance
from itarflow.presets import ModelConfig, itarflow_model, latent_itarflow_model, starflow_model

GUIDANCE = Guidance(weight=1.5, blocks=1)
PRESETS: dict[str, ModelConfig] = {
    "cifar10": ModelConfig(image_size=32, num_classes=10, patch_size=2, channels=512, num_layers=(2, 2, 2, 12)),
    "S, 64 px": itarflow_model("S", 64),
    "B, 64 px": itarflow_model("B", 64),
    "L, 128 px": itarflow_model("L", 128),
    "XL, 256 px": itarflow_model("XL", 256),
    "B, codes of 256 px": latent_itarflow_model("B"),
    "STARFlow, codes of 256 px": starflow_model(),
}
Count = Callable[[TARFlow, int, torch.dtype], Iterable[Cost]]
COUNTS: dict[str, Count] = {
    "Training step": lambda flow, size, dtype: [training_cost(flow, size, dtype)],
    "Sequential inverse, guided on one block": lambda flow, size, dtype: inverse_costs(flow, size, dtype, GUIDANCE),
    "Score": lambda flow, size, dtype: [score_cost(flow, size, dtype)],
}


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The peaks of the device at hand: products in float32 and bf16, and bytes a second."""

    device: str | None = None
    """Such as cpu or cuda; None = the accelerator, if there is one."""
    threads: int | None = None
    """Of the CPU; None = as PyTorch chooses."""

    def run(self, _command: str, console: Console) -> None:
        """Measure and print."""
        for peak in self.peaks():
            console.print(f"{peak.name}, {_type(peak)}: {_rates(peak)}")

    def peaks(self) -> list[Peak]:
        """In float32 and bf16."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return list(measured_peaks(chosen_device(self.device)).values())


@dataclass(frozen=True, kw_only=True)
class Costs(Floor):
    """The presets' FLOPs, bytes and floors as markdown: on an H200 in bf16, and on the device at hand in float32."""

    batch_sizes: tuple[int, int] = (8, 256)
    """Images at a time."""

    def run(self, _command: str, console: Console) -> None:
        """Print a table for each thing that is counted."""
        here = self.peaks()[0]
        lines = [f"{peak.name}: {_rates(peak)} in {_type(peak)}. " for peak in (H200, here)]
        for title, count in COUNTS.items():
            lines += ["", f"**{title}**", "", *self._table(count, here)]
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _table(self, count: Count, here: Peak) -> list[str]:
        small, large = self.batch_sizes
        heads = ["preset", "TFLOP an image", f"GB in bf16, {small} images", f"{large} images"]
        heads += [f"{H200.name}, ms an image of {size}" for size in self.batch_sizes]
        heads += [f"{here.name}, s an image of {size}" for size in self.batch_sizes]
        rows = [_row(heads), _row(["---"] * len(heads))]
        for name, model in PRESETS.items():
            with torch.device("meta"):
                flow = model.build()
            sums = [total(count(flow, size, torch.bfloat16)) for size in self.batch_sizes]
            floors = [
                unit * floor(count(flow, size, peak.dtype), peak) / size
                for peak, unit in ((H200, 1e3), (here, 1.0))
                for size in self.batch_sizes
            ]
            cells = [f"{sums[0].flops / small / 1e12:.3g}", *(_number(cost.moved_bytes / 1e9) for cost in sums)]
            rows.append(_row([name, *cells, *(_number(time) for time in floors)]))
        return rows


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    """Three digits, but no fewer than there are before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _type(peak: Peak) -> str:
    return {torch.float32: "float32", torch.bfloat16: "bf16"}[peak.dtype]


def _rates(peak: Peak) -> str:
    return f"{_number(peak.flops_per_second / 1e9)} GFLOP/s and {_number(peak.bytes_per_second / 1e9)} GB/s"
