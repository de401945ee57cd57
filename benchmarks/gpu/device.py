"""Steps: what the machine is and does at most, and the kernels of the package, one by one."""

from __future__ import annotations

import itertools
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata

import torch
from peaks import device_name, device_seconds
from plain_kernels import plain
from torch import Tensor, nn

from gpu.figures import Figure
from gpu.hooks import Operators
from gpu.setting import NAMES, Setting, distance, tried
from itarflow.runtime.devices import tf32_products
from itarflow.runtime.kernels import (
    Rotation,
    attention,
    attention_bias,
    decode_attention,
    has_decode_attention,
    pack,
    rotated,
    rotation_of,
)


def env(setting: Setting) -> Iterator[Figure]:
    """Versions, and peaks: products of random matrices, a copy and a sum."""
    more = {name: metadata.version(name) for name in ("torch", "diffusers", "accelerate", "datasets")}
    with suppress(metadata.PackageNotFoundError):
        more["triton"] = metadata.version("triton")
    more |= {"python": platform.python_version(), "name": device_name(setting.device)}
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        more |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()), "driver": _driver()}
        more |= {"capability": f"{properties.major}.{properties.minor}"}
        more |= {"memory, GiB": f"{properties.total_memory / 2**30:.1f}", "SMs": str(properties.multi_processor_count)}
    yield Figure(what="machine", more=more)
    size, values = (256, 2**20) if setting.dry else (8192, 2**30)
    for name, dtype in (("bf16", torch.bfloat16), ("TF32", torch.float32), ("float32", torch.float32)):

        def product(blank: Figure, name: str = name, dtype: torch.dtype = dtype) -> Figure:
            x, y = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
            with tf32_products(name == "TF32"):
                return replace(blank, seconds=device_seconds(lambda: x @ y, setting.device))

        yield tried(Figure(what="largest product", dtype=name, flops=2 * size**3), product)

    def moved(blank: Figure) -> Figure:
        x = torch.ones(values, device=setting.device)
        y = torch.empty_like(x)
        work = x.sum if blank.case == "read" else lambda: y.copy_(x)
        return replace(blank, seconds=device_seconds(work, setting.device, calls=1 if setting.dry else 4))

    for case, times in (("copied", 2), ("read", 1)):
        yield tried(Figure(what="memory", case=case, moved_bytes=times * 4 * values), moved)


def kernels(setting: Setting) -> Iterator[Figure]:
    """Which attention is taken, and of each kernel its time, its error, and the time of PyTorch's own in its place."""
    yield from (tried(*case) for case in _attentions(setting))
    yield from (tried(*case) for case in _decoding(setting))
    yield from (tried(*case) for case in _products(setting))


Case = tuple[Figure, Callable[[Figure], Figure]]
UNCACHED = 2**27
"""Bytes that no GPU's caches hold."""


def _seconds(setting: Setting, size: int, prepare: Callable[[], Callable[[], Tensor]]) -> float:
    """Of one call, on inputs of so many bytes that come from memory, as in use: several of them take turns."""
    copies = 1 if setting.dry else max(1, min(16, UNCACHED // size))
    calls = itertools.cycle([prepare() for _ in range(copies)])
    return device_seconds(lambda: next(calls)(), setting.device, 10)


def _attentions(setting: Setting) -> Iterator[Case]:
    heads, width, longest = (2, 16, 32) if setting.dry else (20, 64, 1024)
    many = (2,) if setting.dry else (2, 16, 128)
    cases = [("causal", 8, longest - 1, longest - 1)]
    cases += [("one token", rows, 1, length) for rows in many for length in (longest // 4, longest)]
    cases += [("window", rows, 16, longest // 2) for rows in (2, 16)]
    for dtype in (torch.bfloat16, torch.float32):
        for what, rows, n, length in cases:

            def measure(
                blank: Figure,
                what: str = what,
                dtype: torch.dtype = dtype,
                rows: int = rows,
                n: int = n,
                length: int = length,
            ) -> Figure:
                allowed = torch.ones(n, length, dtype=torch.bool, device=setting.device).tril(length - n)
                mask = attention_bias(allowed, dtype) if what == "window" else None

                def inputs() -> list[Tensor]:
                    sizes = ((rows, heads, number, width) for number in (n, length, length))
                    return [torch.randn(size, device=setting.device, dtype=dtype) for size in sizes]

                def prepare() -> Callable[[], Tensor]:
                    return partial(attention, *inputs(), mask, what == "causal")

                q, k, v = inputs()
                with Operators() as called:
                    found = attention(q, k, v, mask, what == "causal")
                exact = _exact(q[:2].double(), k[:2].double(), v[:2].double(), allowed)
                moved = 2 * (k.numel() + q.numel()) * dtype.itemsize
                return replace(
                    blank,
                    first_seconds=setting.seconds(prepare()),
                    seconds=_seconds(setting, moved, prepare),
                    moved_bytes=moved,
                    error=distance(found[:2], exact),
                    tolerance=_tolerance(dtype),
                    more={"by": ", ".join(called.names) or "products"},
                )

            name = f"{what}, {rows} rows, {n} of {length}"
            yield Figure(what="attention", case=name, dtype=NAMES[dtype]), measure


def _decoding(setting: Setting) -> Iterator[Case]:
    """Attention of a token to a cache, at the end of a sequence and in its middle."""
    heads, width, longest = (2, 16, 32) if setting.dry else (20, 64, 1024)
    if setting.dry and not has_decode_attention(torch.empty(2, 2, heads, longest, width)):
        return  # CPUs have none
    cases = [(2, False), (2, True), (16, False), (16, True), (128, False), (512, False)]
    for dtype in (torch.bfloat16, torch.float32):
        for rows, rotary in cases[:1] if setting.dry else cases:
            for position in (longest // 2 - 1, longest - 1):

                def measure(
                    blank: Figure,
                    dtype: torch.dtype = dtype,
                    rows: int = rows,
                    position: int = position,
                    rotary: bool = rotary,
                ) -> Figure:
                    at = torch.tensor([position], device=setting.device)
                    angles = torch.linspace(0, position, width // 2, device=setting.device)
                    rotation = rotation_of(angles[None]) if rotary else None

                    def inputs() -> tuple[Tensor, Tensor]:
                        qkv = torch.randn(rows, 1, 3 * heads * width, device=setting.device, dtype=dtype)
                        return qkv, torch.randn(2, rows, heads, longest, width, device=setting.device, dtype=dtype)

                    qkv, cache = inputs()
                    if not has_decode_attention(cache, rotary):
                        return replace(blank, more={"own kernel": "there is none here, or it is slower"})
                    expected = _decoded(qkv[:2], cache[:, :2], position, rotation)
                    moved = cache[..., : position + 1, :].numel() * dtype.itemsize
                    rest = at, None, rotation
                    return replace(
                        blank,
                        seconds=_seconds(setting, moved, lambda: partial(decode_attention, *inputs(), *rest)),
                        moved_bytes=moved,
                        error=distance(decode_attention(qkv, cache, *rest)[:2], expected),
                        tolerance=_tolerance(dtype),
                    )

                name = f"{rows} rows, position {position}{', rotary' * rotary}"
                yield Figure(what="attention of a token", case=name, dtype=NAMES[dtype]), measure


def _decoded(qkv: Tensor, cache: Tensor, position: int, rotation: Rotation | None) -> Tensor:
    """What `decode_attention` should give, in float64."""
    rows, heads, width = len(qkv), cache.shape[2], cache.shape[4]
    q, k, v = qkv.double().view(rows, 3, heads, 1, width).unbind(1)
    if rotation is not None:
        q, k = rotated(q, rotation), rotated(k, rotation)
    keys, values = cache[..., :position, :].double()
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    return _exact(q, keys, values, None).reshape(rows, 1, heads * width)


def _exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention of q (B, H, n, E) to k and v (B, H, N, E), where it is allowed (n, N)."""
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.softmax(-1) @ v


def _products(setting: Setting) -> Iterator[Case]:
    """The products of a layer with what stands before and after them, against the same without own kernels."""
    width = 64 if setting.dry else 1280
    shapes = {
        "norm, q k v": (1, 3, True, False),
        "norm, up, GELU": (1, 4, True, True),
        "projection, residual": (1, 1, False, False),
        "down, residual": (4, 1, False, False),
    }
    for rows in (2, 16, 64) if not setting.dry else (2,):
        for name, (wide, out, normed, active) in shapes.items():

            def measure(
                blank: Figure,
                rows: int = rows,
                wide: int = wide,
                out: int = out,
                normed: bool = normed,
                active: bool = active,
            ) -> Figure:
                def prepare() -> Callable[[], Tensor]:
                    with setting.device:
                        layer, norm = nn.Linear(wide * width, out * width), nn.LayerNorm(wide * width)
                        x, residual = torch.randn(rows, 1, wide * width), torch.randn(rows, 1, out * width)
                    packed = pack(layer, torch.bfloat16, norm if normed else None, nn.GELU() if active else None)
                    return partial(packed, x) if normed else partial(packed.plus, x.bfloat16(), residual)

                moved = 2 * wide * out * width**2
                with torch.no_grad():
                    product = prepare()
                    found, seconds = product(), _seconds(setting, moved, prepare)
                    with plain():
                        expected, other = product(), _seconds(setting, moved, prepare)
                return replace(
                    blank,
                    seconds=seconds,
                    moved_bytes=moved,
                    error=distance(found, expected),
                    tolerance=_tolerance(torch.bfloat16),
                    more={"without own kernels, us": 1e6 * other},
                )

            yield Figure(what="product", case=f"{name}, {rows} rows", dtype="bf16"), measure


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype == torch.bfloat16 else 1e-4


def _driver() -> str:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
