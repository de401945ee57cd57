"""What an inverse should take on an H100, by a count of launches and bytes. Nothing of it is measured.

python benchmarks/predicted.py

The count: kernels of a token follow one another, so each costs at least its launch within a CUDA graph; weights, keys
and values are read at a part of the bandwidth that kernels of that kind reach. gpu_check.py measures the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from costs import Peak, floor, inverse_costs, total

from itarflow.flow import TARFlow
from itarflow.inverse import Guidance
from itarflow.presets import TARFLOW, ModelConfig, itarflow_model, starflow_text_model
from itarflow.runtime.kernels.thin import MOST_ROWS

H100 = Peak("H100", torch.bfloat16, flops_per_second=798e12, bytes_per_second=3.0e12)
"""What large products and copies have been seen to reach on one; its data sheet says 989e12 and 3.35e12."""


class Way(NamedTuple):
    """A way of decoding a token."""

    launches_a_layer: float
    launches_of_many: float
    """The same of more rows than the fused products take."""
    launches_around: float
    """Of a block, besides its layers."""
    launches_guided: float
    """The same if it is guided."""
    launch: float
    """Seconds from one kernel of a graph to the next."""
    host: float
    """Seconds a token that the device waits for the host."""
    products: float
    """Part of the bandwidth at which weights are read."""
    attention: float
    """The same of keys and values."""
    length: float
    """Keys and values that are read, in units of those that are needed."""
    once: float
    """Seconds of each call, for recording."""


PLAIN = Way(20, 20, 20, 20, 2e-6, 50e-6, 0.6, 0.55, 1.34, 0.3)
"""PyTorch's kernels, a graph a token, recorded in each call; lengths rounded up to powers of two."""
OWN = Way(6, 10, 7, 15, 1.5e-6, 0.0, 0.8, 0.8, 1.0, 0.0)
"""The package's kernels, the loop over tokens in the graph, recorded in an earlier call."""
TEXT_GUIDANCE = Guidance(weight=3.6, rule="gaussian", schedule="constant", blocks=1)
"""As STARFlow's script samples."""
STARFLOW_HEAD = 13
"""Launches around STARFlow's block that the present one has not: an RMS norm, the clip, the softplus."""
ROTATED = 2
"""Launches a layer of PyTorch's kernels, for rotary positions."""


def seconds(flow: TARFlow, images: int, guidance: Guidance | None, way: Way) -> float:
    """Of an inverse in bf16."""
    one, two = (total(inverse_costs(flow, number, torch.bfloat16, guidance)).moved_bytes for number in (1, 2))
    cache, weights = images * (two - one), 2 * one - two
    found = way.once
    for from_noise, block in enumerate(reversed(flow.blocks)):
        layers, guided = block.cache_shape(1)[0], guidance is not None and guidance.guides(from_noise)
        many = images * (2 if guided else 1) > MOST_ROWS
        launches = layers * (way.launches_of_many if many else way.launches_a_layer)
        launches += way.launches_guided if guided else way.launches_around
        launches += 0 if block.start_token is None else STARFLOW_HEAD
        launches += layers * ROTATED if block.rotary is not None and (many or way is PLAIN) else 0
        found += (block.num_tokens - 1) * (launches * way.launch + way.host)
    read = weights / way.products + cache * way.length / way.attention
    return found + read / H100.bytes_per_second


def main() -> None:
    """Print tables as markdown."""
    models: dict[str, tuple[Callable[[], ModelConfig], tuple[int, ...], Guidance | None]] = {
        "S at 64 pixels, guided": (lambda: itarflow_model("S", 64), (1, 8, 64, 256), Guidance(weight=1.5, blocks=1)),
        "TARFlow's ImageNet-64": (TARFLOW["imagenet64_uncond"].model, (32,), None),
        "STARFlow's 3B at 256 pixels, guided": (starflow_text_model, (1, 8), TEXT_GUIDANCE),
    }
    print("| bf16 | images | floor, s | PyTorch's kernels, s | own kernels, s | over floor | images/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (model, batch_sizes, guidance) in models.items():
        with torch.device("meta"):
            flow = model().build()
        for images in batch_sizes:
            least = floor(inverse_costs(flow, images, torch.bfloat16, guidance), H100)
            plain, own = (seconds(flow, images, guidance, way) for way in (PLAIN, OWN))
            cells = [name, str(images), f"{least:.2f}", f"{plain:.1f}", f"{own:.1f}", f"{own / least:.1f}"]
            print(f"| {' | '.join([*cells, f'{images / own:.3g}'])} |")


if __name__ == "__main__":
    main()
