"""What a call of the pipeline needs of the memory, and what has fitted before."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from itarflow.denoisers.score import FlowDenoiser
from itarflow.flow.block import AutoregressiveBlock
from itarflow.flow.tarflow import TARFlow
from itarflow.pipeline.call import Call
from itarflow.runtime.devices import device_name, usable_memory
from itarflow.runtime.text import human_bytes


class _Made(NamedTuple):
    """A denoiser, and what it was made of."""

    asked: tuple[int | None, torch.dtype | None, bool]
    weights: tuple[tuple[int, int], ...]
    denoiser: FlowDenoiser


class Fitted:
    """What a pipeline remembers from call to call, so that it does not run out of memory by the same again."""

    def __init__(self) -> None:
        self._batch: tuple[int, int] | None = None  # so many images did not fit, but so many did
        self._last: _Made | None = None

    def note(self, tried: int, fitted: int) -> None:
        """So many images were tried at a time, and so many could be made."""
        if fitted < tried:
            self._batch = tried, fitted

    def batch(self, size: int) -> int:
        """The same, or, if so many did not fit before, what did."""
        too_many, fitted = self._batch or (math.inf, size)
        return fitted if size >= too_many else size

    def denoiser(self, flow: TARFlow, slice_size: int | None, dtype: torch.dtype | None) -> FlowDenoiser:
        """A `FlowDenoiser` of the weights where they are now.

        While they stay as they are it is the same object for the same arguments, since it keeps what fitted.
        """
        asked = slice_size, dtype, flow.is_gradient_checkpointing
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in flow.parameters())
        if self._last is not None and self._last.asked == asked:
            if self._last.weights == weights:
                return self._last.denoiser
            slice_size = self._last.denoiser.slice_size
        self._last = _Made(asked, weights, FlowDenoiser(flow, slice_size, dtype=dtype))
        return self._last.denoiser


def check_memory(flow: TARFlow, call: Call, device: torch.device) -> None:
    """Refuse a call of which not even one image can fit, before minutes of work.

    Args:
        flow: whose weights are in memory, or are to come to the device.
        call: checked.
        device: that computes.

    Raises:
        ValueError: naming what is needed and what there is.
    """
    free = usable_memory(device)
    if free is None:
        return
    blocks = [block for block in reversed(flow.blocks) if isinstance(block, AutoregressiveBlock)]
    to_come = 0 if flow.device.type == device.type else _bytes(flow)
    inverse = max(_inverse_bytes(block, from_noise, call, flow.dtype) for from_noise, block in enumerate(blocks))
    scores = score_bytes(call.denoiser.flow) if call.evaluations and isinstance(call.denoiser, FlowDenoiser) else 0
    needed = to_come + max(inverse, scores)
    if needed <= free:
        return
    part, option = ("the flow's inverse", "inverse_dtype") if inverse >= scores else ("a score", "denoise_dtype")
    raise ValueError(
        f"one image needs at least {human_bytes(needed)} for {part}, beside what is in memory, but {device} "
        f"({device_name(device)}) has {human_bytes(free)} free. Choose bfloat16 for {option} if it is float32, end "
        "other programs that use the device, or take another one, such as cpu."
    )


def _inverse_bytes(block: AutoregressiveBlock, from_noise: int, call: Call, stored: torch.dtype) -> int:
    """At least so many of one image: keys and values, and the layers' weights, if they are cast."""
    dtype = call.inverse_dtype or stored
    guided = call.guidance.guides(from_noise) and (call.labels is not None or call.guidance.temperature != 1)
    cache = math.prod(block.cache_shape(2 if guided else 1)) * dtype.itemsize
    if dtype == stored:
        return cache
    parts = (*block.backbone, block.transformer)
    return cache + dtype.itemsize * sum(p.numel() for part in parts for p in part.parameters())


def score_bytes(flow: TARFlow) -> int:
    """What the layers of a flow with frozen weights keep of one image, at least, for the gradient."""
    total = 0
    for block in flow.blocks:
        assert isinstance(block, AutoregressiveBlock)
        layers, _, _, heads, tokens, width = block.cache_shape(1)
        # What enters both norms, queries, keys, values, what attention gives, and what enters the GELU.
        kept = 1 if flow.is_gradient_checkpointing else 6 + flow.config.mlp_ratio
        weight = next(block.transformer.parameters(), block.proj_in.weight)
        total += layers * tokens * heads * width * kept * weight.dtype.itemsize
    return total


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
