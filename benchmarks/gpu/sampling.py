"""Steps: the inverse of a flow, its tokens one by one and by windows, and from noise to pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from costs import Cost, floor, inverse_costs, score_cost, total
from plain_kernels import plain
from predicted import OWN, TEXT_GUIDANCE, seconds
from subject import with_starflow_blocks
from timing import release
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gpu.figures import Figure
from gpu.hooks import Counting, recordings_counted, without_recordings
from gpu.setting import GUIDANCE, LEVELS, NAMES, Setting, distance, tried
from itarflow.codec import to_pil
from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise
from itarflow.flow import TARFlow
from itarflow.inverse import Guidance, Jacobi
from itarflow.pipeline import ITARFlowPipeline
from itarflow.presets import TARFLOW, ModelConfig, starflow_text_model
from itarflow.runtime.recording import release_recordings

UNGUIDED = Guidance()


def inverse(setting: Setting) -> Iterator[Figure]:
    """Guided and exact, by number of images and dtype; then the same in other ways, which must come to the same."""
    flow, few = setting.flow(), _few(setting)
    many = (1, few, 64, 256) if not setting.dry else (1, few)

    def inverses(dtype: torch.dtype, images: int) -> Figure:
        blank = inverse_figure(flow, images, dtype, GUIDANCE, "inverse")
        return tried(blank, lambda blank: _inverted(setting, flow, blank))

    yield from (inverses(torch.bfloat16, images) for images in many[:3])
    yield inverses(torch.float32, few)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        blank = Figure(what="flow of the inverse", dtype=NAMES[dtype], images=few, tolerance=tolerance)
        yield tried(blank, lambda blank, dtype=dtype: _round_trip(setting, flow, blank, dtype))
    for case in ("without recordings", "without own kernels"):
        blank = Figure(what="inverse", case=case, dtype="bf16", images=few, tolerance=0.05)
        yield tried(blank, lambda blank: _otherwise(setting, flow, blank))
    yield from (inverses(torch.bfloat16, images) for images in many[3:])  # the longest: last


def starflow(setting: Setting) -> Iterator[Figure]:
    """STARFlow's blocks in the sizes of the step `inverse`, and the text-to-image model with its 3.9B parameters."""
    yield from _of_same_sizes(setting)
    release_recordings()
    few, tiny = _few(setting), with_starflow_blocks(setting.model)
    tiny = replace(tiny, num_classes=0, context_dim=8, context_tokens=4, noise_conditioned=False)
    flow = setting.flow(tiny if setting.dry else starflow_text_model())
    for images in (1, few):
        blank = inverse_figure(flow, images, torch.bfloat16, TEXT_GUIDANCE, "inverse of texts")
        blank = replace(blank, more={"predicted for an H100, s": seconds(flow, images, TEXT_GUIDANCE, OWN)})
        yield tried(blank, lambda blank: _of_texts(setting, flow, blank))


def _of_same_sizes(setting: Setting) -> Iterator[Figure]:
    flow, few, case = setting.flow(with_starflow_blocks(setting.model)), _few(setting), "STARFlow's blocks"
    for images in (1, few):
        blank = replace(inverse_figure(flow, images, torch.bfloat16, GUIDANCE, "inverse"), case=case)
        yield tried(blank, lambda blank: _inverted(setting, flow, blank))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        blank = Figure(what="flow of the inverse", case=case, dtype=NAMES[dtype], images=few, tolerance=tolerance)
        yield tried(blank, lambda blank, dtype=dtype: _round_trip(setting, flow, blank, dtype))
    blank = Figure(what="inverse", case=f"{case}, without own kernels", dtype="bf16", images=few, tolerance=0.05)
    yield tried(blank, lambda blank: _otherwise(setting, flow, blank))


def _of_texts(setting: Setting, flow: TARFlow, blank: Figure) -> Figure:
    """By random vectors in place of an encoder's."""
    size = flow.config.context_tokens, flow.config.context_dim
    drawn = torch.randn(blank.images, *size, generator=torch.Generator().manual_seed(blank.images))
    null = torch.zeros(1, *size, device=setting.device)
    return _inverted(setting, flow, blank, TEXT_GUIDANCE, 1, context=drawn.to(setting.device), null_context=null)


def inverse_figure(flow: TARFlow, images: int, dtype: torch.dtype, guidance: Guidance, what: str) -> Figure:
    """With what is counted, but for the floor."""
    cost = total(inverse_costs(flow, images, dtype, guidance))
    rows = [2 * images if guidance.guides(index) else images for index in range(len(flow.blocks))]
    caches = [block.cache_shape(row) for block, row in zip(reversed(list(flow.blocks)), rows, strict=True)]
    cache = max(torch.Size(shape).numel() for shape in caches) * dtype.itemsize
    packed = 0 if dtype == flow.dtype else dtype.itemsize * sum(parameter.numel() for parameter in flow.parameters())
    return Figure(
        what=what,
        dtype=NAMES[dtype],
        images=images,
        flops=cost.flops,
        moved_bytes=cost.moved_bytes,
        estimated_bytes=cache + packed,
    )


def _inverted(
    setting: Setting, flow: TARFlow, blank: Figure, guidance: Guidance = GUIDANCE, repeats: int = 2, **contexts: Tensor
) -> Figure:
    dtype = torch.float32 if blank.dtype == "float32" else torch.bfloat16
    z, labels = setting.noise(flow, blank.images), setting.labels(flow, blank.images)
    level = LEVELS[1] if flow.config.noise_conditioned else None
    with recordings_counted() as recorded:
        measured = setting.timed(
            blank, lambda: flow.inverse(z, labels, level, guidance=guidance, dtype=dtype, **contexts), repeats
        )
    least = floor(inverse_costs(flow, blank.images, dtype, guidance), setting.peaks[dtype])
    more = {**measured.more, "recordings": len(recorded), "seconds of recording": sum(recorded)}
    return replace(measured, floor_seconds=least, more=more)


def _round_trip(setting: Setting, flow: TARFlow, blank: Figure, dtype: torch.dtype) -> Figure:
    z, labels = setting.noise(flow, blank.images), setting.labels(flow, blank.images)
    images = flow.inverse(z, labels, LEVELS[1], dtype=dtype)
    found = flow(images, labels, LEVELS[1]).z
    return replace(blank, error=distance(found, z), more={"largest difference": float((found - z).abs().max())})


def _otherwise(setting: Setting, flow: TARFlow, blank: Figure) -> Figure:
    z, labels = setting.noise(flow, blank.images), setting.labels(flow, blank.images)

    def inverted() -> Tensor:
        return flow.inverse(z, labels, LEVELS[1], guidance=GUIDANCE, dtype=torch.bfloat16)

    expected = inverted()
    release_recordings()
    found: list[Tensor] = []
    with without_recordings() if blank.case == "without recordings" else plain(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is recorded
        measured = setting.timed(blank, lambda: found.append(inverted()), repeats=1)
    release_recordings()
    return replace(measured, error=distance(found[0], expected))


def token(setting: Setting) -> Iterator[Figure]:
    """One block alone: the time of a token, and the kernels that take longest at the end of a sequence."""
    depths = {"deep, guided": setting.model.num_layers[-1], "shallow": setting.model.num_layers[0]}
    for name, layers in depths.items():
        flow = setting.flow(replace(setting.model, num_layers=(layers,)))
        guidance = GUIDANCE if "guided" in name else UNGUIDED
        for images in (1, 8, 64) if not setting.dry else (1,):
            blank = Figure(what="token of a block", case=name, dtype="bf16", images=images)
            inverse = partial(
                flow.inverse, setting.noise(flow, images), setting.labels(flow, images), LEVELS[1],
                guidance=guidance, dtype=torch.bfloat16,
            )  # fmt: skip
            costs = list(inverse_costs(flow, images, torch.bfloat16, guidance))
            yield tried(blank, lambda blank, inverse=inverse, costs=costs: _tokens(setting, blank, inverse, costs))
            if setting.device.type == "cuda":
                blank = replace(blank, what="kernels of a token")
                total_tokens = flow.num_solved_tokens
                yield tried(blank, lambda blank, inverse=inverse, of=total_tokens: _profiled(blank, inverse, of))


def _tokens(setting: Setting, blank: Figure, inverse: Callable[[], Tensor], costs: Sequence[Cost]) -> Figure:
    whole, cost, steps = setting.timed(blank, inverse, repeats=2), total(costs), len(costs) - 1
    return replace(
        whole,
        seconds=(whole.seconds or 0) / steps,
        first_seconds=None,
        peak_bytes=None,
        floor_seconds=floor(costs, setting.peaks[torch.bfloat16]) / steps,
        flops=cost.flops // steps,
        moved_bytes=cost.moved_bytes // steps,
    )


def _profiled(blank: Figure, inverse: Callable[..., Tensor], tokens: int) -> Figure:
    """The last tokens of a sequence, whose events the profiler can still take in a second."""
    profiler, solved, first = profile(activities=[ProfilerActivity.CUDA]), 0, 0

    def watch(number: int) -> None:
        nonlocal solved, first
        solved += number
        if not first and solved >= tokens - 40:
            torch.cuda.synchronize()
            first = solved
            profiler.start()

    inverse(progress=watch)
    torch.cuda.synchronize()
    profiler.stop()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    number = max(1, tokens - first)
    more: dict[str, Any] = {
        "us of kernels": sum(event.self_device_time_total for event in events) / number,
        "kernels": sum(event.count for event in events) / number,
    }
    more |= {f"us of {event.key[:60]}": event.self_device_time_total / number for event in events[:8]}
    return replace(blank, more=more)


def jacobi(setting: Setting) -> Iterator[Figure]:
    """The inverse by windows: how many evaluations it takes, and how long."""
    flow = setting.flow()
    shortest = min(block.num_tokens for block in flow.blocks)
    cases = [(torch.bfloat16, 1, 16), (torch.bfloat16, 8, 16), (torch.bfloat16, 1, 64), (torch.float32, 1, None)]
    for dtype, images, window in cases:
        name = f"window {window or 'all'}"
        blank = replace(inverse_figure(flow, images, dtype, GUIDANCE, "inverse by Jacobi"), case=name)
        solver = Jacobi(window=None if window is None else min(window, shortest), tolerance=1e-3)

        def measure(blank: Figure, dtype: torch.dtype = dtype, solver: Jacobi = solver) -> Figure:
            z, labels = setting.noise(flow, blank.images), setting.labels(flow, blank.images)

            def inverted(solver: Any) -> Tensor:
                return flow.inverse(z, labels, LEVELS[1], guidance=GUIDANCE, dtype=dtype, solver=solver)

            counting = Counting(solver)
            inverted(counting)
            measured = setting.timed(blank, lambda: inverted(solver), repeats=1)
            # Its count is the exact inverse's, which does less at a time: there is no floor, and no rate.
            return replace(measured, flops=None, moved_bytes=None, more={"evaluations": counting.evaluations})

        yield tried(blank, measure)


def imagenet64(setting: Setting) -> Iterator[Figure]:
    """TARFlow's unconditional model of ImageNet at 64 pixels, of which the paper had 0.27 images a second."""
    small = ModelConfig(image_size=8, channels=64, num_layers=(1, 1), noise_conditioned=False)
    row = TARFLOW["imagenet64_uncond"]
    flow, images = setting.flow(small if setting.dry else row.model()), 2 if setting.dry else 32
    z = setting.noise(flow, images)

    def measure(blank: Figure) -> Figure:
        measured = setting.timed(blank, lambda: flow.inverse(z, dtype=torch.bfloat16), repeats=1)
        least = floor(inverse_costs(flow, images, torch.bfloat16), setting.peaks[torch.bfloat16])
        return replace(measured, floor_seconds=least, more={"images a second": images / (measured.seconds or 1)})

    blank = inverse_figure(flow, images, torch.bfloat16, UNGUIDED, "TARFlow's ImageNet-64 inverse")
    yield tried(blank, measure)
    denoiser, noisy = FlowDenoiser(flow, dtype=torch.bfloat16), setting.images(flow, images)
    blank = Figure(what="TARFlow's ImageNet-64 denoising", case="one step", dtype="bf16", images=images)
    yield tried(blank, lambda blank: setting.timed(blank, lambda: denoiser(noisy, None, row.noise_std or 0.05)))


def pipeline(setting: Setting) -> Iterator[Figure]:
    """From noise to pictures: inverse, denoising and decoding apart; then together with too little memory."""
    flow, images = setting.flow(), 2 if setting.dry else 64
    schedule = DenoiseScheduler(t_max=LEVELS[1], t_min=LEVELS[0], num_denoise_steps=10)
    z, labels = setting.noise(flow, images), setting.labels(flow, images)
    noisy = flow.inverse(z, labels, LEVELS[1], guidance=GUIDANCE, dtype=torch.bfloat16)
    denoiser = FlowDenoiser(flow, dtype=torch.bfloat16)
    cost = total([score_cost(flow, images, torch.bfloat16)] * 10)
    blank = Figure(what="ten scores", dtype="bf16", images=images, flops=cost.flops, moved_bytes=cost.moved_bytes,
                   floor_seconds=floor([cost], setting.peaks[torch.bfloat16]))  # fmt: skip
    yield tried(blank, lambda blank: setting.timed(blank, lambda: denoise(denoiser, noisy, labels, schedule), 1))
    blank = Figure(what="pictures of pixels", images=images)
    yield tried(blank, lambda blank: setting.timed(blank, lambda: to_pil(noisy.clamp(-1, 1))))
    yield tried(
        Figure(what="decoding of codes", dtype="float32", images=_few(setting)), lambda b: _decoded(setting, b)
    )
    pipe = ITARFlowPipeline(flow, schedule, guidance={"weight": GUIDANCE.weight, "blocks": GUIDANCE.blocks})
    pipe.set_progress_bar_config(disable=True)
    few = 2 if setting.dry else 16

    def call(dtype: torch.dtype, steps: int) -> Tensor:
        return pipe(
            class_labels=[index % 10 for index in range(few)],
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            inverse_dtype=dtype,
            denoise_dtype=dtype,
            num_denoise_steps=steps,
        ).images

    release_recordings()
    blank = Figure(what="pipeline, ten scores", dtype="bf16", images=few)
    yield tried(blank, lambda blank: setting.timed(blank, lambda: call(torch.bfloat16, 10), 1))
    release_recordings()
    found: list[Tensor] = []
    blank = Figure(what="pipeline, two scores", dtype="float32", images=few)
    whole = tried(blank, lambda blank: setting.timed(blank, lambda: found.append(call(torch.float32, 2)), 0))
    yield whole
    if whole.peak_bytes is not None:
        blank = replace(blank, case="with half of that memory", tolerance=1e-2)
        peak = whole.peak_bytes
        yield tried(blank, lambda blank: _with_half(setting, lambda: call(torch.float32, 2), blank, found[0], peak))


def _decoded(setting: Setting, blank: Figure) -> Figure:
    """By a VAE of Stable Diffusion's size, with random weights, to 256 pixels."""
    from diffusers import AutoencoderKL

    widths = (32, 32) if setting.dry else (128, 256, 512, 512)
    with setting.device:
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=1 if setting.dry else 2,
        )
        codes = torch.randn(blank.images, 4, 4 if setting.dry else 32, 4 if setting.dry else 32)
    vae.eval().requires_grad_(False)
    return setting.timed(blank, lambda: vae.decode(codes).sample)


def _with_half(setting: Setting, call: Callable[[], Tensor], blank: Figure, expected: Tensor, peak: int) -> Figure:
    """The call with half of the memory that it took: whether it comes to the same pictures in smaller batches."""
    release_recordings()
    release(setting.device)
    allowed = torch.cuda.memory_allocated(setting.device) + peak // 2
    memory = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / memory, setting.device)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            measured = setting.timed(blank, lambda: expected.sub_(call()), 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    halved = [str(warning.message)[:90] for warning in told if "fit" in str(warning.message)]
    difference = float(expected.abs().max())
    return replace(measured, error=difference, more={"greatest difference of 255": 255 * difference, "said": halved})


def _few(setting: Setting) -> int:
    return 2 if setting.dry else 8
