"""Metrics of training steps, and the `Monitor` that logs them to the terminal, to files and to trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from itarflow.data.dataset import too_many_broken
from itarflow.flow.noise import bits_per_dim
from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.text import flat
from itarflow.training.held_out import Evaluation, describe
from itarflow.training.objective import Losses
from itarflow.training.recipe import Recipe
from itarflow.training.run_folder import RunDir
from itarflow.training.settings import Settings, to_json

NUM_BUCKETS = 4
"""Metrics by noise level have so many buckets of equal width."""


def bucket_edges(recipe: Recipe) -> Tensor | None:
    """(NUM_BUCKETS + 1,) noise levels from t_min to t_max; None if there is only one level, or none."""
    if recipe.noise_range is None or recipe.noise_range[0] == recipe.noise_range[1]:
        return None
    return torch.linspace(*recipe.noise_range, NUM_BUCKETS + 1)


def bucket_sums(values: Tensor, noise_level: Tensor, edges: Tensor) -> Tensor:
    """(2, NUM_BUCKETS): sums and numbers of the values (b,) whose noise levels (b,) lie between two edges."""
    bucket = torch.bucketize(noise_level, edges[1:-1].to(noise_level.device))
    sums = values.new_zeros(2, NUM_BUCKETS)
    sums[0].index_add_(0, bucket, values)
    sums[1].index_add_(0, bucket, torch.ones_like(values))
    return sums


def bucket_means(sums: Tensor, edges: Tensor) -> dict[str, float]:
    """Such as {"0.02-0.14": mean}, from the `bucket_sums` of all processes; a bucket without images is left out."""
    names = [f"{low:.3g}-{high:.3g}" for low, high in zip(edges.tolist()[:-1], edges.tolist()[1:], strict=True)]
    totals, counts = sums.tolist()
    return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}


@contextmanager
def watch_blocks(flow: TARFlow, wanted: bool = True) -> Iterator[Tensor]:
    """Collects (blocks, 3) sums over the z that each block gives inside `with`: of 1, z and z^2.

    Args:
        flow: the flow, not its wrapper; it gets forward hooks for the time.
        wanted: False collects nothing.
    """
    moments = torch.zeros(len(flow.blocks), 3, device=flow.device)

    def watch(index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            z = output.z.detach().float()
            moments[index] += torch.stack([torch.full_like(z.sum(), z.numel()), z.sum(), z.square().sum()])

        return hook

    hooks = [block.register_forward_hook(watch(index)) for index, block in enumerate(flow.blocks)] if wanted else []
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def mean_and_spread(moments: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of z after each block, image side first; 0 and 1 for a well-trained flow.

    Args:
        moments: as `watch_blocks` collects them, summed over processes.
    """
    count, first, second = moments.double().cpu().unbind(dim=1)
    mean = first / count
    return mean.tolist(), (second / count - mean.square()).clamp(min=0).sqrt().tolist()


def worst_level(nll: Tensor, noise_level: Tensor) -> tuple[float, float]:
    """Noise level and NLL of the worst image: one that is not finite, else the one with the largest NLL."""
    finite = nll.isfinite()
    index = int((~finite).int().argmax()) if not finite.all() else int(nll.argmax())
    return float(noise_level[index]), float(nll[index])


def step_sums(losses: Losses, noise_level: Tensor, moments: Tensor, edges: Tensor | None) -> dict[str, Tensor]:
    """Sums over a process's images, to be reduced over processes before `step_metrics`.

    Args:
        losses: of its images.
        noise_level: (b,) of them.
        moments: from `watch_blocks`.
        edges: from `bucket_edges`.
    """
    nll = losses.nll
    sums = {"loss": losses.loss, "nll": torch.stack([nll.sum(), torch.full_like(nll.sum(), len(nll))])}
    if edges is not None:
        sums["levels"] = bucket_sums(nll, noise_level, edges)
    return sums | {"moments": moments}


def step_metrics(sums: Mapping[str, Tensor], num_processes: int, edges: Tensor | None) -> dict[str, Any]:
    """Loss, likelihoods in nats a dim, and z after each block, from the `step_sums` of all processes."""
    nll = (sums["nll"][0] / sums["nll"][1]).item()
    by_level = {} if edges is None else bucket_means(sums["levels"], edges)
    z_mean, z_std = mean_and_spread(sums["moments"])
    return {
        "loss": sums["loss"].item() / num_processes,
        "nll": nll,
        "nll_by_level": by_level,
        "z_mean": rounded(z_mean),
        "z_std": rounded(z_std),
    }


def in_bits(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The likelihoods of `step_metrics` in bits a dim; only for pixels: codes have no grey levels."""
    by_level = {level: bits_per_dim(value) for level, value in metrics["nll_by_level"].items()}
    return {"bpd": bits_per_dim(metrics["nll"]), "bpd_by_level": by_level}


def rounded(values: Sequence[float], digits: int = 5) -> list[float]:
    """Rounded to significant digits, for a line of metrics."""
    return [float(np.format_float_positional(value, digits, fractional=False)) for value in values]


_EXPLOSION = 10.0
"""A gradient norm so many times the running average is reported."""
_USUAL_AFTER = 20
"""Steps before the running average is used."""


class Monitor:
    """Logs to the terminal, to metrics.jsonl and to trackers. Each process has one; mostly the main one writes."""

    def __init__(self, recipe: Settings, run: RunDir, accelerator: Accelerator) -> None:
        self.recipe, self.run, self.accelerator = recipe, run, accelerator
        self.console = Console(quiet=not accelerator.is_main_process)
        self.broken: frozenset[str] = frozenset()
        """Names, with reasons, of the images that could not be read; those of all processes after `gather_broken`."""
        self._met: set[str] = set()  # by this process since the last resume: these count towards the limit
        self._warnings = Console(stderr=True)  # of every process: one process reads each broken image
        self._usual_norm, self._norms_seen, self._quiet_until = 0.0, 0, 0
        accelerator.init_trackers("logs", config=_scalars(to_json(recipe)))

    def say(self, text: str, style: str = "") -> None:
        """Print a line, on the main process."""
        self.console.print(escape(text), style=style, soft_wrap=True, highlight=False)

    # -- images that can't be read ------------------------------------------------------------------------------

    def name_broken(self, names: Sequence[str], aloud: bool = True) -> None:
        """Report each unreadable image once, and raise past the limit.

        Args:
            names: "name: reason" of each.
            aloud: False if another process prints the same.

        Raises:
            DataError: more than data.max_broken.
        """
        new = [name for name in names if name not in self.broken]
        for name in dict.fromkeys(new) if aloud else ():
            self._warnings.print(
                f"[yellow]Unreadable image, replaced by the next one: {escape(name)}", soft_wrap=True, highlight=False
            )
        self.broken |= frozenset(new)
        self._met |= set(names)
        if len(self._met) > self.recipe.data.max_broken:
            raise too_many_broken(sorted(self._met), self.recipe.data.max_broken)

    def gather_broken(self) -> None:
        """Make `broken` the same on all processes, which all call this."""
        self.broken = frozenset(gather_object(sorted(self.broken)))

    # -- gradients ----------------------------------------------------------------------------------------------

    def exploded(self, grad_norm: float) -> bool:
        """Whether a finite gradient norm is far above the usual one, which it then updates."""
        self._norms_seen += 1
        usual = self._usual_norm or grad_norm
        self._usual_norm = 0.95 * usual + 0.05 * min(grad_norm, _EXPLOSION * usual)
        return self._norms_seen > _USUAL_AFTER and grad_norm > _EXPLOSION * usual

    def report_explosion(self, step: int, grad_norm: float, level: float, nll: float) -> None:
        """Report the noise level behind a large gradient; at most once in a hundred steps.

        Only the main process's images are considered: a collective call would need all processes to agree to make it.
        """
        if step < self._quiet_until:
            return
        self._quiet_until = step + 100
        self.say(
            f"Step {step}: gradient norm {grad_norm:.3g}, the usual one is {self._usual_norm:.3g}. The image with the "
            f"largest loss has noise level {level:.3g} (nll {nll:.3g} nats/dim).",
            "yellow",
        )

    # -- figures ------------------------------------------------------------------------------------------------

    def log(self, values: dict[str, Any]) -> None:
        """Write a line of metrics; trackers do not get values that are None."""
        if self.accelerator.is_main_process:
            self.run.log(values)
            self.accelerator.log(_scalars(_named(values)), step=values["step"])

    def log_picture(self, step: int, path: Path) -> None:
        """Give a sample grid to the trackers that show pictures: TensorBoard and W&B."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else ():
            if tracker.name == "tensorboard":
                pixels = np.asarray(Image.open(path).convert("RGB"))[None]
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"samples": [Image.open(path)]}, step=step)

    def log_held_out(self, step: int, held_out: Evaluation) -> None:
        """Log a held-out evaluation, and print it."""
        if not self.accelerator.is_main_process:
            return
        self.run.log({"step": step, "held_out": {"nll": held_out.nll, "bpd": held_out.bpd}})
        flat = {f"held_out/nll at t={level}": value for level, value in held_out.nll.items()}
        if held_out.bpd is not None:
            flat["held_out/bpd"] = held_out.bpd
        self.accelerator.log(flat, step=step)
        self.say(f"step {step}  held-out {describe(held_out)}")


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """One entry a block for lists, and without values that are None."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            named |= {f"{key}/block {index}": item for index, item in enumerate(value)}
        elif isinstance(value, dict):
            named |= {f"{key}/{name}": item for name, item in value.items()}
        elif value is not None:
            named[key] = value
    return named


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    """Flat, with plain values, as trackers take them."""
    plain = int | float | bool | str
    return {key: value if isinstance(value, plain) else str(value) for key, value in flat(values).items()}
