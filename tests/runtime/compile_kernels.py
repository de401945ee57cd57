"""Compile the Triton kernels for GPUs that need not be there, and print what each takes of a multiprocessor.

python tests/runtime/compile_kernels.py

A variant of which more than a few registers spill to memory, or that needs more shared memory than some GPUs have,
ends it with an error.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from itarflow.runtime.kernels import triton_kernels

CAPABILITIES, SHARED = (80, 90), 99
"""KiB of shared memory that a program may have on all GPUs from 8.0 on."""
FEW = 64
"""Bytes of registers that may be spilled, as happens around loops."""
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


DTYPES = (torch.bfloat16, torch.float32)


def main() -> None:
    """Attention, its keys split and not, and for the products of a layer, of few rows and many."""
    names = ("_decode", "_combine", "_thin", "_norm")
    kernels = {name: Launcher(name, getattr(triton_kernels, name)) for name in names}
    with mock.patch.multiple(triton_kernels, **kernels):
        for channels in (384, 1280, 4096):
            x, norm = torch.empty(4, channels), torch.empty(channels)
            triton_kernels.layer_norm(x, norm, norm, 1e-5, torch.bfloat16)
        for dtype in DTYPES:
            for splits in (1, 4):
                cache = torch.empty(2, 2, 20, 96, 64, dtype=dtype)
                qkv, at = torch.empty(2, 1, 3840, dtype=dtype), torch.zeros(1, dtype=torch.int64)
                for pairs in (None, torch.empty(1, 64)):
                    triton_kernels.decode_attention(qkv, cache, at, None, pairs, splits)
            for rows in (2, 64):
                for outputs, normed, gelu in ((3840, True, False), (5120, True, True), (1280, False, False)):
                    weight, bias = torch.empty(outputs, 1280, dtype=dtype), torch.empty(outputs, dtype=dtype)
                    x = torch.empty(rows, 1280, dtype=torch.float32 if normed else dtype)
                    norm = torch.empty(1280) if normed else None
                    residual = None if normed else torch.empty(rows, outputs)
                    triton_kernels.thin_product(x, weight, bias, norm, norm, 1e-5, gelu, residual)


class Launcher:
    """Takes the place of a kernel: what would be launched is compiled, once."""

    def __init__(self, name: str, kernel: triton.JITFunction) -> None:
        self.name, self.kernel = name, kernel

    def __getitem__(self, grid: object) -> Launcher:
        return self

    def __call__(self, *given: object, num_warps: int, **constants: object) -> None:
        names, signature, attributes = self.kernel.arg_names, {}, {}
        for index, (name, value) in enumerate(zip(names, given, strict=False)):
            is_aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            if is_aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        values = {(names.index(name),): value for name, value in constants.items()}
        what = " ".join(str(value) for value in (TYPES[given[1].dtype], *constants.values(), num_warps))
        for capability in CAPABILITIES:
            source = ASTSource(self.kernel, signature, values, attributes)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
            used = usage(built.asm["cubin"])
            shared = built.metadata.shared / 1024
            said = f"{used['REG']} registers, {used['STACK']} bytes spilled, {shared:.0f} KiB"
            print(f"{self.name} {what} sm_{capability}: {said}", flush=True)  # noqa: T201
            if used["STACK"] > FEW or shared > SHARED:
                raise SystemExit("too much is spilled, or shared")


def usage(binary: bytes) -> dict[str, int]:
    """Registers, bytes of stack and the like of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


if __name__ == "__main__":
    main()
