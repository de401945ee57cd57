"""Tensors of a GPU that is not there: they have shapes, dtypes and a device, but no values.

To look at a value is an error, as it is a wait on a GPU, also after a copy to the CPU. So is an operation between
devices or dtypes that don't mix. What is on the CPU alone is computed there. Gradients can't be computed, since
autograd's engine asks for the device.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_CUDA, _META, _DEVICES = 1, 14, 22  # c10::DeviceType
_QUIET = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "promote_types"}
"""Operations that launch nothing, besides views and allocations."""


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within, tensors of the device cuda are fakes.

    A build of PyTorch without CUDA has nothing that knows which device of that type is the current one, for which
    many operations ask; here the device without memory lends its answers.
    """
    with pytest.MonkeyPatch.context() as patch:
        guards = None if torch.version.cuda or torch.version.hip else _guards()
        if guards is not None:
            guards[_CUDA] = guards[_META]
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        try:
            with _OnGpu(allow_non_fake_inputs=True):
                yield
        finally:
            if guards is not None:
                guards[_CUDA] = None


class _OnGpu(FakeTensorMode):
    _at_work = False
    """On an operation, of which all parts are of fakes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, kwargs = torch.utils._pytree.tree_leaves((args, kwargs)), kwargs or {}
        on_gpu = any(isinstance(one, FakeTensor) or getattr(one, "type", None) == "cuda" for one in given)
        if not on_gpu and not self._at_work:
            return func(*args, **kwargs)
        before, self._at_work = self._at_work, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._at_work = before


def _guards() -> Any:
    """PyTorch's table of them, by type of device."""
    library = next((Path(torch.__file__).parent / "lib").glob("*c10.*"), None)
    try:
        table = (ctypes.c_void_p * _DEVICES).in_dll(
            ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE"
        )
    except (OSError, ValueError):
        pytest.skip("this build of PyTorch has no CUDA, and no table of devices where it can be found")
    if not table[_META] or table[_CUDA]:
        pytest.skip("this build of PyTorch has another table of devices")
    return table


def on_fake_cuda(module: nn.Module) -> nn.Module:
    """The module itself, with fakes in place of its weights. Within `fake_cuda`."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    made[id(tensor)] = tensors[name] = made.get(id(tensor), _faked(tensor))
    return module


def _faked(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


@contextmanager
def fake_autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """`torch.autocast("cuda", dtype)`, which turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class Launches(TorchDispatchMode):
    """Counts what would launch a kernel: operations by name, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and not func.is_view and "empty" not in name and name not in _QUIET:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))

    def __len__(self) -> int:
        return self.by_name.total()
