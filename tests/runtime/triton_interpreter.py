"""The Triton kernels on CPU tensors, by Triton's interpreter, in a process that has imported Triton without it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from itarflow.runtime.kernels import proof

KERNELS = Path(proof.__file__).with_name("triton_kernels.py")


@contextmanager
def interpreted() -> Iterator[Any]:
    """Within, `proof` takes CPUs for devices with kernels, and gives a module whose kernels are interpreted."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Functions such as tl.sum have been made for the compiler when Triton was imported.
        for name, function in list(vars(tl.standard).items()):
            if isinstance(function, JITFunction):
                again = interpreter.InterpretedFunction(function.fn)
                if getattr(tl, name, None) is function:
                    patch.setattr(tl, name, again)
                patch.setattr(tl.standard, name, again)
        _teach_bfloat16(patch, interpreter, tl)
        spec = importlib.util.spec_from_file_location("interpreted_kernels", KERNELS)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "interpreted_kernels", module)
        spec.loader.exec_module(module)
        patch.setattr(proof, "triton_kernels", lambda: module)
        patch.setattr(proof, "DEVICES", {"cpu"})
        patch.setattr(proof, "_VERDICTS", {})
        patch.setattr(proof, "_WARNED", set())
        patch.setattr(proof, "multiprocessors", lambda device: 4)
        patch.setattr(proof, "uncached_copies", lambda device, size: 2)
        patch.setattr(proof, "_milliseconds", lambda call: call(0) is None)
        yield module


def _teach_bfloat16(patch: pytest.MonkeyPatch, interpreter: Any, tl: Any) -> None:
    """The interpreter keeps bfloat16 as whole numbers of 16 bits, and multiplies them as such."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The distance of the results, as a part of the exact one's size; NaN counts."""
    return float((found.double() - exact).norm() / exact.norm())
