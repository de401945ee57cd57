"""Modules for use with frozen weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Module = TypeVar("Module", bound=nn.Module)


def frozen_view(module: Module) -> Module:
    """A second module over the same weights, without gradients and in eval mode.

    Autograd then neither computes weight gradients nor keeps the activations they would need, and the caller's
    module is left unchanged, also for other threads.
    """
    shared: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    shared |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, shared).eval()


def recomputed(layer: nn.Module, *inputs: Any) -> Tensor:
    """The layer's output, whose activations are computed again for the gradient, in place of being kept."""
    # Nothing in a layer is random, so the generators' states, one of them on the device, need not be kept.
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
