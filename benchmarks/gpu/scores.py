"""Steps: the score of a flow, and the same as the official code does, on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import peer as official
import torch
from costs import floor, inverse_costs, score_cost, total
from torch import Tensor

from gpu.figures import Figure
from gpu.setting import GUIDANCE, LEVELS, TINY, Setting, distance, tried
from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise
from itarflow.flow import TARFlow
from itarflow.pipeline.memory import score_bytes
from itarflow.runtime.devices import tf32_products

TEN: dict[str, Any] = {"t_max": LEVELS[1], "t_min": LEVELS[0], "num_denoise_steps": 10}


def score(setting: Setting) -> Iterator[Figure]:
    """By number of images, precision, and what is kept or compiled; against float32."""
    flow = setting.flow()
    few, many = (2, 3) if setting.dry else (8, 32)
    expected = FlowDenoiser(flow, dtype=torch.float32).score(*_noisy(setting, flow, few))
    cases: list[tuple[str, str, int, dict[str, Any]]] = [
        ("", "bf16", 1, {}),
        ("", "bf16", few, {}),
        ("", "bf16", many, {}),
        ("checkpointed", "bf16", many, {"checkpointing": True}),
        ("", "TF32", few, {}),
        ("", "float32", few, {}),
        ("compiled", "bf16", many, {"compiled": True}),
    ]
    for case, dtype, images, options in cases:
        if setting.dry and case == "compiled":  # takes a compiler, and a minute
            continue
        cost = score_cost(flow, images, torch.bfloat16 if dtype == "bf16" else torch.float32)
        blank = Figure(what="score", case=case, dtype=dtype, images=images, flops=cost.flops,
                       moved_bytes=cost.moved_bytes)  # fmt: skip

        def measure(blank: Figure, options: dict[str, Any] = options) -> Figure:
            precision = torch.bfloat16 if blank.dtype == "bf16" else torch.float32
            denoiser = FlowDenoiser(flow, dtype=precision, **options)
            given = _noisy(setting, flow, blank.images)
            found: list[Tensor] = []
            with tf32_products(blank.dtype == "TF32"):
                measured = setting.timed(blank, lambda: found.append(denoiser.score(*given)))
            # Of TF32 there is no measured peak here: its floor is that of bf16, which is half of its own.
            peak = setting.peaks[torch.float32 if blank.dtype == "float32" else torch.bfloat16]
            error = None if blank.images != few else distance(found[0], expected)
            least = floor([score_cost(flow, blank.images, precision)], peak)
            kept = blank.images * score_bytes(denoiser.flow)
            return replace(
                measured, floor_seconds=least, error=error, tolerance=_TOLERANCES[blank.dtype], estimated_bytes=kept
            )

        yield tried(blank, measure)


_TOLERANCES = {"bf16": 5e-2, "TF32": 1e-2, "float32": 1e-5}


def _noisy(setting: Setting, flow: TARFlow, images: int) -> tuple[Tensor, Tensor | None, Tensor]:
    level = torch.full((images,), 0.1, device=setting.device)
    return setting.images(flow, images), setting.labels(flow, images), level


def peer(setting: Setting) -> Iterator[Figure]:
    """The official code from a clone: its results on a small flow in float32, and its time on the large one.

    Its inverse runs under autocast and its scores in float32, as in its scripts. cuDNN's attention is off for it: that
    prepares itself for each length of the cache, for minutes.
    """
    if setting.peer is None:
        yield Figure(what="official code", left_out="no --peer names a clone of it")
        return
    module = official.official_module(setting.peer)
    yield from _agreement(setting, module, setting.flow(TINY))
    flow, images = setting.flow(), 2 if setting.dry else 8
    theirs = official.load_peer(module, flow)
    noise, labels = setting.noise(flow, images), setting.labels(flow, images)
    noisy = setting.images(flow, images)
    denoiser, schedule = FlowDenoiser(flow, dtype=torch.bfloat16), DenoiseScheduler(**TEN)

    def their_inverse() -> Tensor:
        with torch.autocast(setting.device.type, torch.bfloat16):
            return official.inverse(theirs, noise, labels, LEVELS[1], GUIDANCE)

    def their_scores() -> Tensor:
        return official.denoise(theirs, noisy, labels, slice_size=None, **TEN)

    def inverse() -> Tensor:
        return flow.inverse(noise, labels, LEVELS[1], guidance=GUIDANCE, dtype=torch.bfloat16)

    def scores() -> Tensor:
        return denoise(denoiser, noisy, labels, schedule)

    peak, bf16 = setting.peaks[torch.bfloat16], torch.bfloat16
    cost = total(inverse_costs(flow, images, bf16, GUIDANCE)), total([score_cost(flow, images, bf16)] * 10)
    least = floor(inverse_costs(flow, images, bf16, GUIDANCE), peak), floor([cost[1]], peak)
    found = {}
    for index, (what, own, other) in enumerate(
        (("inverse", inverse, their_inverse), ("ten scores", scores, their_scores))
    ):
        blank = Figure(what=what, case="beside the official code", dtype="bf16", images=images,
                       flops=cost[index].flops, moved_bytes=cost[index].moved_bytes)  # fmt: skip

        def measure(blank: Figure, own: Any = own, other: Any = other, least: float = least[index]) -> Figure:
            measured = setting.timed(blank, own, repeats=2)
            with _without_cudnn_attention():
                other_seconds = setting.seconds(other)  # once: its first call prepares next to nothing
            return replace(measured, floor_seconds=least, peer_seconds=other_seconds)

        found[what] = tried(blank, measure)
        yield found[what]
    if all(figure.failed is None for figure in found.values()):
        both = list(found.values())
        yield Figure(
            what="inverse and ten scores",
            case="beside the official code",
            dtype="bf16",
            images=images,
            seconds=sum(figure.seconds or 0 for figure in both),
            floor_seconds=sum(figure.floor_seconds or 0 for figure in both),
            peer_seconds=sum(figure.peer_seconds or 0 for figure in both),
        )


def _agreement(setting: Setting, module: Any, flow: TARFlow) -> Iterator[Figure]:
    """Of results in float32."""
    theirs, images = official.load_peer(module, flow), 2
    noise, labels = setting.noise(flow, images), setting.labels(flow, images)
    noisy, denoiser = setting.images(flow, images), FlowDenoiser(flow, dtype=torch.float32)

    def inverses(blank: Figure) -> Figure:
        expected = official.inverse(theirs, noise, labels, LEVELS[1], GUIDANCE)
        found = flow.inverse(noise, labels, LEVELS[1], guidance=GUIDANCE, dtype=torch.float32)
        return replace(blank, error=distance(found, expected))

    def scores(blank: Figure) -> Figure:
        expected = official.denoise(theirs, noisy, labels, slice_size=None, **TEN)
        return replace(blank, error=distance(denoise(denoiser, noisy, labels, DenoiseScheduler(**TEN)), expected))

    for what, compare in (("inverse", inverses), ("ten scores", scores)):
        blank = Figure(what=what, case="against the official code", dtype="float32", images=images, tolerance=1e-4)
        with _without_cudnn_attention():
            yield tried(blank, compare)


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
