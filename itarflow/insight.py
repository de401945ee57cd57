"""What a training step tells about itself: likelihood by noise level, z after each block, and the device's use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itarflow.flow.tarflow import TARFlow
from itarflow.objective import Losses
from itarflow.recipe import Recipe

NUM_BUCKETS = 4
"""Noise levels are told apart in so many buckets of equal width."""


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
        flow: the flow, under whatever wrapper; it is watched, not changed.
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
    """Mean and standard deviation of z after each block, image side first; 0 and 1 of a flow that fits.

    Args:
        moments: as `watch_blocks` collects them, summed over processes.
    """
    count, first, second = moments.double().cpu().unbind(dim=1)
    mean = first / count
    return mean.tolist(), (second / count - mean.square()).clamp(min=0).sqrt().tolist()


def worst_level(nll: Tensor, noise_level: Tensor) -> tuple[float, float]:
    """Noise level and NLL of the image that fares worst: one that is not finite, else the one with the largest."""
    finite = nll.isfinite()
    index = int((~finite).int().argmax()) if not finite.all() else int(nll.argmax())
    return float(noise_level[index]), float(nll[index])


def step_sums(losses: Losses, noise_level: Tensor, moments: Tensor, edges: Tensor | None) -> dict[str, Tensor]:
    """What of a process's images is added to that of the others' before `step_metrics`.

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
    """The likelihoods of `step_metrics` in bits a dim; of pixels, for codes are not counted in grey levels."""
    by_level = {level: bits_per_dim(value) for level, value in metrics["nll_by_level"].items()}
    return {"bpd": bits_per_dim(metrics["nll"]), "bpd_by_level": by_level}


def bits_per_dim(nll: float) -> float:
    """Of nats a dim of values in [-1, 1], in bits, counting in steps of 8-bit images: log2 of 128 is added."""
    return (nll + math.log(128)) / math.log(2)


def rounded(values: Sequence[float], digits: int = 5) -> list[float]:
    """Short enough for a line of metrics."""
    return [float(np.format_float_positional(value, digits, fractional=False)) for value in values]
