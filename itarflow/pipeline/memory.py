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
from itarflow.runtime.recording import is_plain, release_recordings
from itarflow.runtime.text import human_bytes

_Asked = tuple[int | None, torch.dtype | None, bool]
"""Slice size, dtype, and whether the flow checkpoints."""


class _Made(NamedTuple):
    """A denoiser, and what it was made of."""

    asked: _Asked
    weights: tuple[int, ...]
    denoiser: FlowDenoiser


class Fitted:
    """What a pipeline remembers from call to call, so that it does not run out of memory by the same again."""

    def __init__(self) -> None:
        self._something = False
        self._batch: tuple[int, int] | None = None  # so many images did not fit, but so many did
        self._slices: dict[_Asked, int | None] = {}
        self._last: _Made | None = None

    def check(self, flow: TARFlow, call: Call, device: torch.device) -> None:
        """See `check_memory`; what a call that has succeeded keeps is there for the next one."""
        if not self._something:
            check_memory(flow, call, device)

    def note(self, tried: int, fitted: int) -> None:
        """So many images were tried at a time, and so many could be made."""
        self._something = True
        if fitted < tried:
            self._batch = tried, fitted

    def batch(self, size: int) -> int:
        """The same, or, if so many did not fit before, what did."""
        too_many, fitted = self._batch or (math.inf, size)
        return fitted if size >= too_many else size

    def denoiser(self, flow: TARFlow, slice_size: int | None, dtype: torch.dtype | None) -> FlowDenoiser:
        """A `FlowDenoiser` of the present weights.

        While they stay where they are it is the same object for the same arguments, since it keeps what fitted, and
        what was recorded.
        """
        asked = slice_size, dtype, flow.is_gradient_checkpointing
        weights = tuple(p.data_ptr() if is_plain(p) else id(p) for p in flow.parameters())
        if self._last is None or (self._last.asked, self._last.weights) != (asked, weights):
            self.forget_weights()
            slice_size = self._slices.get(asked, slice_size)
            self._last = _Made(asked, weights, FlowDenoiser(flow, slice_size, dtype=dtype))
        else:
            self._last.denoiser.update(flow)
        return self._last.denoiser

    def forget_weights(self) -> None:
        """Keep no memory of a device that the flow is about to leave."""
        if self._last is not None:
            self._slices[self._last.asked] = self._last.denoiser.slice_size
        self._last = None


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
    dtype = call.inverse_dtype or flow.dtype
    to_come = 0 if flow.device.type == device.type else _bytes(flow)
    casts = [0 if dtype == flow.dtype else _layer_bytes(block, dtype) for block in blocks]
    # On GPUs the blocks' cast weights are kept from call to call, see `runtime.graphed`.
    inverse = sum(casts) if device.type == "cuda" else max(casts)
    inverse += max(_cache_bytes(block, from_noise, call, dtype) for from_noise, block in enumerate(blocks))
    scores = score_bytes(call.denoiser.flow) if call.evaluations and isinstance(call.denoiser, FlowDenoiser) else 0
    needed = to_come + max(inverse, scores)
    if needed > free and release_recordings():  # of other calls
        free = usable_memory(device) or 0
    if needed <= free:
        return
    part, option = ("the flow's inverse", "inverse_dtype") if inverse >= scores else ("a score", "denoise_dtype")
    raise ValueError(
        f"one image needs at least {human_bytes(needed)} for {part}, beside what is in memory, but {device} "
        f"({device_name(device)}) has {human_bytes(free)} free. Choose bfloat16 for {option} if it is float32, end "
        "other programs that use the device, or take another one, such as cpu."
    )


def _cache_bytes(block: AutoregressiveBlock, from_noise: int, call: Call, dtype: torch.dtype) -> int:
    """Of the keys and values of one image."""
    conditional = call.labels is not None or call.context is not None
    guided = call.guidance.guides(from_noise) and (conditional or call.guidance.temperature != 1)
    return math.prod(block.cache_shape(2 if guided else 1)) * dtype.itemsize


def _layer_bytes(block: AutoregressiveBlock, dtype: torch.dtype) -> int:
    """Of the layers' weights, cast."""
    parts = (*block.backbone, block.transformer)
    return dtype.itemsize * sum(p.numel() for part in parts for p in part.parameters())


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
