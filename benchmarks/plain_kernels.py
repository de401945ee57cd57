"""What the package's own kernels bring on a CPU: the same work with and without them, in turns; the fastest counts.

Seconds are those of one thread on the processor, so that other programs disturb little.

python benchmarks/plain_kernels.py --repeats 5
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import tyro

from itarflow import TARFlow
from itarflow.flow import nll_per_dim
from itarflow.runtime.kernels import cpu as kernels


@dataclass(frozen=True)
class Options:
    """A flow of 32 x 32 pixels in 8 x 8 tokens, layers 1, 1, 1, 4, with random weights."""

    width: int = 512
    """Channels."""
    batch_size: int = 8
    """Images."""
    repeats: int = 5
    """Turns that are timed, after one that is not."""


@contextmanager
def plain() -> Iterator[None]:
    """All as under ITARFLOW_PLAIN_KERNELS=1, for what is called within."""
    before = kernels.PLAIN, kernels.ONEDNN, kernels.BLOCKS
    kernels.PLAIN, kernels.ONEDNN, kernels.BLOCKS = True, False, False
    try:
        yield
    finally:
        kernels.PLAIN, kernels.ONEDNN, kernels.BLOCKS = before


def main(options: Options) -> None:
    """Time a training step's two passes, in bfloat16 too where the CPU has it, and an inverse."""
    print(f"oneDNN for float32: {kernels.ONEDNN}; blocks of queries for bfloat16: {kernels.BLOCKS}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flow = TARFlow(32, 3, 4, options.width, (1, 1, 1, 4), noise_conditioned=False)
    for block in flow.blocks:  # which begin as the identity
        torch.nn.init.normal_(block.proj_out.weight, std=0.01)
    images = torch.randn(options.batch_size, *flow.image_shape)
    z = torch.randn(options.batch_size, *flow.z_shape)

    def passes(enabled: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = nll_per_dim(flow(images)).mean()
        loss.backward()
        flow.zero_grad()

    work: dict[str, Callable[[], object]] = {
        "forward and backward pass, float32": lambda: passes(False),
        "inverse, float32": lambda: flow.inverse(z),
    }
    if kernels.BLOCKS:
        work["forward and backward pass, bf16"] = lambda: passes(True)
    for name, function in work.items():
        own, without = [], []
        for _ in range(1 + options.repeats):
            own.append(seconds(function))
            with plain():
                without.append(seconds(function))
        best, bare = min(own[1:]), min(without[1:])
        print(f"{name}: {best:.3f} s, without {bare:.3f} s, {bare / best:.2f} times as fast", flush=True)


def seconds(function: Callable[[], object]) -> float:
    """Of one call, waiting for the processor left out."""
    began = time.process_time()
    function()
    return time.process_time() - began


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
