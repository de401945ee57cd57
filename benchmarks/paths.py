"""What is measured on each path, as named variants: a new way of doing the same is one more line in its list."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import peer as official
import torch
from costs import Cost, floor, inverse_costs, score_cost, training_cost
from peaks import Peaks
from subject import DTYPES, Options, Subject
from timing import Case, Run, Variant
from torch import Tensor

from itarflow import DenoiseScheduler, FlowDenoiser, Guidance, denoise
from itarflow.codec import to_pixels
from itarflow.flow.embedding import NULL_LABEL
from itarflow.flow.noise import loss_weight
from itarflow.inverse import sequential
from itarflow.inverse.solvers import Solver
from itarflow.pipeline.plan import choose, place_of
from itarflow.training.objective import draw, training_losses
from itarflow.training.sharding import clip_grad_norm


@dataclass(frozen=True, kw_only=True)
class Bench(Options):
    """A path: settings, and the cases that they ask for."""

    name: ClassVar[str]

    def cases(self, subject: Subject, batch_size: int, peer: Any | None) -> list[Case]:
        """All variants for one batch size; peer is from `peer.load_peer`, or None."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Train(Bench):
    """A training step: forward and backward pass and AdamW. Compared: the loss of the first step."""

    name: ClassVar[str] = "train"

    def cases(self, subject: Subject, batch_size: int, peer: Any | None) -> list[Case]:
        """See `Bench`."""

        def variant(name: str, prepare: Callable[[], Run]) -> Variant:
            return _variant(name, self.dtype, prepare, lambda dtype: [training_cost(subject.flow, batch_size, dtype)])

        variants = [
            variant("ours", lambda: self._ours(subject, batch_size)),
            variant("ours, checkpointed", lambda: self._ours(subject, batch_size, checkpointing=True)),
        ]
        if peer is not None:
            variants.append(variant("peer", lambda: self._peer(subject, batch_size, peer)))
        return [Case("training step", variants)]

    def _ours(self, subject: Subject, batch_size: int, *, checkpointing: bool = False) -> Run:
        recipe, flow, device = self._recipe(subject, batch_size), copy.deepcopy(subject.flow), subject.flow.device
        flow.train().requires_grad_(True)
        if checkpointing:
            flow.enable_gradient_checkpointing()
        train = recipe.train
        optimizer = torch.optim.AdamW(
            flow.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )  # fmt: skip
        stored, labels = self._images(subject, batch_size), self._labels(subject, batch_size)
        draws = draw(recipe, 0, device)

        def step() -> Tensor:
            with _precision(subject, self.dtype):
                losses = training_losses(flow, recipe, stored, labels, draws)
            losses.loss.backward()
            if math.isfinite(clip_grad_norm(flow, math.inf)):  # the official step does not limit it
                optimizer.step()
            optimizer.zero_grad()
            return losses.loss

        return step

    def _peer(self, subject: Subject, batch_size: int, peer: Any) -> Run:
        recipe = self._recipe(subject, batch_size)
        take = official.training_step(copy.deepcopy(peer), recipe.train, self.dtype == "bf16")
        stored, labels = self._images(subject, batch_size), self._labels(subject, batch_size)
        draws = draw(recipe, 0, subject.flow.device)
        images = torch.where(draws.flip[:, None, None, None], to_pixels(stored).flip(3), to_pixels(stored))
        dropped = torch.where(draws.drop, NULL_LABEL, labels) if recipe.model.num_classes else None
        weight = loss_weight(recipe.noise, draws.noise_level)

        def step() -> Tensor:
            noisy = images + draws.noise_level[:, None, None, None] * draws.noise
            return take(noisy, dropped, draws.noise_level, weight)

        return step

    def _recipe(self, subject: Subject, batch_size: int) -> Any:
        train = replace(subject.recipe.train, batch_size=batch_size, accumulation=1)
        return replace(subject.recipe, train=train)

    def _images(self, subject: Subject, batch_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        images = torch.randint(256, (batch_size, *subject.flow.image_shape), dtype=torch.uint8, generator=generator)
        return images.to(subject.flow.device)

    def _labels(self, subject: Subject, batch_size: int) -> Tensor:
        labels = subject.labels(batch_size)
        return torch.zeros(batch_size, dtype=torch.int64, device=subject.flow.device) if labels is None else labels


@dataclass(frozen=True, kw_only=True)
class Guided(Bench):
    """Settings of paths with an inverse."""

    guided_blocks: int | Literal["all"] = 1
    """How many, from the noise side; 0 = no guidance."""
    guidance_weight: float = 1.5
    """Rule "scale", schedule "linear"."""

    def guidance(self, subject: Subject) -> Guidance:
        """None without classes, where there is nothing to guide by."""
        blocks = None if self.guided_blocks == "all" else self.guided_blocks
        weight = self.guidance_weight if subject.flow.config.num_classes else 0.0
        return Guidance(weight=weight, rule="scale", schedule="linear", blocks=blocks)


@dataclass(frozen=True, kw_only=True)
class Inverse(Guided):
    """The flow's inverse, guided. Compared: images."""

    name: ClassVar[str] = "inverse"

    def cases(self, subject: Subject, batch_size: int, peer: Any | None) -> list[Case]:
        """See `Bench`."""
        noise, labels, level = subject.noise(batch_size, self.seed), subject.labels(batch_size), subject.levels[1]
        guidance = self.guidance(subject)
        z = noise * subject.flow.prior_variance.sqrt()

        def variant(name: str, run: Run, dtype: str = self.dtype) -> Variant:
            return _variant(
                name, dtype, lambda: run, lambda dtype: inverse_costs(subject.flow, batch_size, dtype, guidance)
            )

        def ours(dtype: str = self.dtype, solver: Any = sequential) -> Tensor:
            return subject.flow.inverse(z, labels, level, guidance=guidance, dtype=DTYPES[dtype], solver=solver)

        def theirs() -> Tensor:
            with _precision(subject, self.dtype):
                return official.inverse(peer, noise, labels, level, guidance)

        variants = [variant("ours", ours)]
        if self.dtype == "float32":
            variants.append(variant("ours, bf16", lambda: ours("bf16"), "bf16"))
        if (plan := _plan(subject, batch_size)) is not None:
            variants.append(variant("ours, planned", lambda: ours(solver=plan)))
        if peer is not None:
            variants.append(variant("peer", theirs))
        return [Case("inverse", variants)]


@dataclass(frozen=True, kw_only=True)
class Score(Bench):
    """Denoising by the score in Euler steps over an even grid. Compared: clean images.

    The official code computes scores in float32 whatever its precision is elsewhere, and so does the peer.
    """

    name: ClassVar[str] = "score"
    steps: tuple[int, ...] = (1, 10)
    """Score evaluations of each case."""
    slice_size: int | None = None
    """Images that are differentiated at a time; None = all."""

    def cases(self, subject: Subject, batch_size: int, peer: Any | None) -> list[Case]:
        """See `Bench`."""
        return [self._case(subject, batch_size, peer, steps) for steps in self.steps]

    def _case(self, subject: Subject, batch_size: int, peer: Any | None, steps: int) -> Case:
        noisy, labels = subject.noisy(batch_size, self.seed), subject.labels(batch_size)

        ends, size = {"num_denoise_steps": steps, **_ends(subject, steps)}, self.slice_size

        def variant(name: str, prepare: Callable[[], Run], dtype: str = self.dtype) -> Variant:
            return _variant(name, dtype, prepare, lambda dtype: [score_cost(subject.flow, batch_size, dtype)] * steps)

        def ours(name: str, dtype: str = self.dtype, **options: Any) -> Variant:
            def prepare() -> Run:
                denoiser = FlowDenoiser(subject.flow, size, dtype=DTYPES[dtype], **options)
                return lambda: denoise(denoiser, noisy, labels, DenoiseScheduler(**ends))

            return variant(name, prepare, dtype)

        def theirs() -> Tensor:
            return official.denoise(peer, noisy, labels, slice_size=size, **ends)

        on_gpu = subject.flow.device.type == "cuda"
        variants = [ours("ours"), ours("ours, checkpointed", checkpointing=True)]
        if on_gpu:
            variants.append(ours("ours, compiled", compiled=True))
        if self.dtype == "float32":
            variants.append(ours("ours, bf16", "bf16"))
            variants.append(ours("ours, bf16, checkpointed", "bf16", checkpointing=True))
            if on_gpu:
                variants.append(ours("ours, bf16, compiled", "bf16", compiled=True))
        if peer is not None:
            variants.append(variant("peer", lambda: theirs, "float32"))
        return Case("score" if steps == 1 else f"{steps} scores", variants)


@dataclass(frozen=True, kw_only=True)
class Sample(Guided):
    """End to end: noise, inverse, denoising. Compared: clean images. --dtype is the inverse's; scores are float32.

    "fast" has all that leaves images as they are to the eye: the pipeline's plan, scores in bfloat16, and the
    predictor-corrector with --fast-steps evaluations in place of Euler with --steps.
    """

    name: ClassVar[str] = "sample"
    steps: int = 10
    """Score evaluations. The official code takes t_max / 0.01: 30 where t_max is 0.3."""
    fast_steps: int = 10
    """Score evaluations of the fast variant."""
    slice_size: int | None = None
    """Images that are differentiated at a time; None = all."""

    def cases(self, subject: Subject, batch_size: int, peer: Any | None) -> list[Case]:
        """See `Bench`."""
        noise, labels, level = subject.noise(batch_size, self.seed), subject.labels(batch_size), subject.levels[1]
        guidance, ends = self.guidance(subject), {"num_denoise_steps": self.steps, **_ends(subject, self.steps)}
        z = noise * subject.flow.prior_variance.sqrt()
        denoiser = FlowDenoiser(subject.flow, self.slice_size, dtype=torch.float32)

        def least(peaks: Peaks, steps: int, scored: torch.dtype) -> float:
            inverse = inverse_costs(subject.flow, batch_size, DTYPES[self.dtype], guidance)
            scores = [score_cost(subject.flow, batch_size, scored)] * steps
            return floor(inverse, peaks[DTYPES[self.dtype]]) + floor(scores, peaks[scored])

        fast_denoiser = FlowDenoiser(subject.flow, self.slice_size, dtype=torch.bfloat16)
        fast_ends = {"num_denoise_steps": self.fast_steps, **_ends(subject, self.fast_steps)}

        def variant(
            name: str,
            inverse: Run,
            clean: Callable[[Tensor], Tensor],
            steps: int = self.steps,
            scored: torch.dtype = torch.float32,
        ) -> Variant:
            def run() -> Tensor:
                with _precision(subject, self.dtype):
                    noisy = inverse()
                return clean(noisy)

            return Variant(name, self.dtype, lambda: run, partial(least, steps=steps, scored=scored))

        variants = [
            variant(
                "ours",
                lambda: subject.flow.inverse(z, labels, level, guidance=guidance),
                lambda noisy: denoise(denoiser, noisy, labels, DenoiseScheduler(**ends)),
            ),
            variant(
                "ours, fast",
                lambda: subject.flow.inverse(
                    z, labels, level, guidance=guidance, solver=_plan(subject, batch_size) or sequential
                ),
                lambda noisy: denoise(
                    fast_denoiser,
                    noisy,
                    labels,
                    DenoiseScheduler(method="predictor-corrector", spacing="quadratic", **fast_ends),
                ),
                self.fast_steps,
                torch.bfloat16,
            ),
        ]
        if peer is not None:
            variants.append(
                variant(
                    "peer",
                    lambda: official.inverse(peer, noise, labels, level, guidance),
                    lambda noisy: official.denoise(peer, noisy, labels, slice_size=self.slice_size, **ends),
                )
            )
        return [Case("sample", variants)]


def _variant(
    name: str, dtype: str, prepare: Callable[[], Run], costs: Callable[[torch.dtype], Iterable[Cost]]
) -> Variant:
    """One whose products are all of one type."""
    chosen = DTYPES[dtype]
    return Variant(name, dtype, prepare, lambda peaks: floor(costs(chosen), peaks[chosen]))


def _plan(subject: Subject, batch_size: int) -> list[Solver] | None:
    """The solvers of the pipeline's plan, if it has one for the device and some batch size."""
    plan = choose(subject.plans, place_of(subject.flow.device, subject.flow.dtype), batch_size)
    return None if plan is None else plan.solvers_of(subject.flow)


def _precision(subject: Subject, dtype: str) -> torch.autocast:
    return torch.autocast(subject.flow.device.type, torch.bfloat16, enabled=dtype == "bf16")


def _ends(subject: Subject, steps: int) -> dict[str, float]:
    """Where denoising begins and ends; a flow of one noise level, which knows one step, has none between."""
    low, high = subject.levels
    if low == high and steps > 1:
        raise ValueError(f"{steps} score evaluations, but this flow has one noise level, {high}; use --steps 1.")
    return {"t_max": high, "t_min": low}
