"""Images of a checkpoint, generated once and denoised in several variants: batch by batch, or into a folder.

`generate` is the one generator of batches: `save` writes them, `compare` measures and draws them. A folder has
samples.json, which says what is in it, and a folder of 8-bit images for each variant (see files.py). Files hold a
batch each; a file that is there is not made again, and its content depends on nothing but samples.json, so any number
of processes gives the same files.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from itarflow.codec import vae_identity
from itarflow.denoisers.score import check_level
from itarflow.evaluation.conversion import CONVERSIONS, Protocol, to_levels
from itarflow.evaluation.samples.denoising import Denoising, identity_of, settings_of
from itarflow.evaluation.samples.files import renew_shard, set_aside, shard_name, strange_files, write_shard
from itarflow.evaluation.samples.manifest import MANIFEST, origin_digest, read_manifest
from itarflow.evaluation.samples.prompts import NO_PROMPTS, SamplePrompts
from itarflow.flow.embedding import NULL_LABEL
from itarflow.inverse.guidance import Guidance
from itarflow.inverse.solvers import Solver
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import check_no_link, weights_digest, write_json
from itarflow.runtime.seeds import image_seeds, seeded_images
from itarflow.runtime.text import flat, listed, printable

LabelRule = Literal["balanced", "random", "none"]


def labels_by(rule: LabelRule, count: int, num_classes: int, seed: int = 0) -> Tensor:
    """The labels (count,) int64 of images 0, 1, ..., of which each depends on its number alone; -1 = none.

    Args:
        rule: "balanced": every class in turn, so that their counts differ by one at most. "random": each drawn
            uniformly. "none": no labels.
        count: of images.
        num_classes: of the flow; 0 = it has no labels, for any rule.
        seed: of random labels.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in ("balanced", "random", "none"):
        raise ValueError(f"labels is {rule!r}; expected 'balanced', 'random' or 'none'.")
    if rule == "none" or num_classes == 0:
        return torch.full((count,), NULL_LABEL)
    if rule == "balanced":
        return torch.arange(count) % num_classes
    # A separate stream, so that noise and labels are independent.
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 1))))
    return torch.from_numpy(np.floor(draws.random(count) * num_classes).astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is made. Image i depends on the weights, the seed, i and its label, and on nothing else but rounding.

    Attributes:
        pipe: the checkpoint, on its device.
        variants: of denoising, by the names of their folders; an image is generated once for all of them.
        labels: (N,) int64, -1 = none; their number is that of the images.
        seed: of the noise: that of image i is the i-th that `seeds.image_seeds` gives, as in training's grids.
        guidance: of generation; None = the checkpoint's.
        t_max: noise level of the flow's samples; None = the checkpoint's.
        solver, inverse_dtype: as in a call of the pipeline.
        batch_size: images that are made together, and lie in a file.
        protocol: how pixels become 8-bit.
        prompts: of a checkpoint that takes prompts.
    """

    pipe: ITARFlowPipeline
    variants: Mapping[str, Denoising]
    labels: Tensor
    seed: int = 0
    guidance: Guidance | None = None
    t_max: float | None = None
    solver: Solver | Sequence[Solver] | None = None
    inverse_dtype: torch.dtype | None = None
    batch_size: int = 64
    protocol: Protocol = "rounded"
    prompts: SamplePrompts = NO_PROMPTS

    @property
    def batches(self) -> list[tuple[int, int]]:
        """First image of each batch, and one past its last."""
        count = len(self.labels)
        return [(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    def check(self) -> None:
        """Refuse what can't be made.

        Raises:
            ValueError: no images, labels or prompts that do not suit, a noise level outside the flow's range, images
                neither grey nor RGB, or a denoiser that does not suit them.
        """
        flow, level = self.pipe.flow, self.level
        self.prompts.check(self.pipe)
        if len(self.labels) == 0:
            raise ValueError("there are no images to make; expected at least one.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected a number of images >= 1.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < NULL_LABEL or high >= max(flow.config.num_classes, 0):
            raise ValueError(f"labels reach from {low} to {high}; this flow has {flow.config.num_classes} classes.")
        check_level(flow, "t_max", level)
        channels, _, _ = self.pipe.picture_shape
        if channels not in (1, 3):
            raise ValueError(
                f"this checkpoint makes images of {channels} channels; expected 1 or 3. If "
                "they are codes, the pipeline lacks their VAE."
            )
        given, guidance = given_labels(self.labels), self.guidance
        unguided = given is None and not self.prompts.texts
        if guidance is not None and guidance.weight > 0 and unguided and guidance.temperature == 1:
            raise ValueError(
                f"guidance_weight is {guidance.weight}, but there are no labels to guide by; leave it out."
            )
        for variant in self.variants.values():
            variant.check(flow, given, level)

    @property
    def solvers(self) -> Solver | Sequence[Solver]:
        """How the flow is inverted: by the plan for a whole batch, also in the last one, which may be smaller."""
        size = min(self.batch_size, len(self.labels))
        return self.pipe.planned_solver(size, self.inverse_dtype) if self.solver is None else self.solver

    @property
    def level(self) -> float:
        """The noise level of the flow's samples."""
        return float(self.pipe.scheduler.config.t_max if self.t_max is None else self.t_max)

    def described(self) -> dict[str, Any]:
        """All that the images depend on, as plain values: equal values, equal images."""
        guidance = self.pipe.default_guidance if self.guidance is None else self.guidance
        by_block = self.solvers if isinstance(self.solvers, Sequence) else [self.solvers]
        values = {
            "flow": weights_digest(self.pipe.flow.state_dict()),
            "vae": None if self.pipe.vae is None else asdict(vae_identity(self.pipe.vae)),
            "decoder": None if self.pipe.vae is None else weights_digest(self.pipe.vae.state_dict()),
            "seed": self.seed,
            "num_samples": len(self.labels),
            "labels": weights_digest({"labels": self.labels}),
            **self.prompts.described(self.pipe),
            "guidance": asdict(guidance),
            "t_max": self.level,
            "solver": [getattr(one, "__name__", None) or repr(one) for one in by_block],
            "inverse_dtype": str(self.pipe.sampling_dtype(self.inverse_dtype) or self.pipe.flow.dtype),
            "cleaning": self._denoising(),
            "conversion": CONVERSIONS[self.protocol],
            "file_size": self.batch_size,
        }
        return json.loads(json.dumps(values))

    def _denoising(self) -> dict[str, Any]:
        """The schedule and the denoiser of each variant, whose weights are read once."""
        denoisers = {id(variant.denoiser): variant.denoiser for variant in self.variants.values()}
        identities = {key: identity_of(denoiser) for key, denoiser in denoisers.items()}
        return {
            name: {
                "denoiser": identities[id(variant.denoiser)],
                **({} if variant.schedule is None else settings_of(variant.schedule)),
            }
            for name, variant in self.variants.items()
        }


def given_labels(labels: Tensor) -> Tensor | None:
    """Labels (N,), -1 = none, as a flow takes them: None if no image has one."""
    return labels if bool((labels >= 0).any()) else None


class Batch(NamedTuple):
    """Images one after another, denoised in one variant."""

    variant: str
    """Its name in the generation."""
    start: int
    """Number of the first image."""
    labels: Tensor
    """(B,) int64 on the CPU, -1 = none."""
    codes: Tensor | None
    """(B, C, H, W) float32 on the CPU; None = denoised by their decoder, so that there are no denoised codes."""
    images: Tensor
    """(B, C, H, W) float32 in about [-1, 1], on the CPU; the codes themselves in pixel space."""
    seconds: float
    """From noisy codes to pixels, of all of them."""

    @property
    def broken(self) -> Tensor:
        """(B,) bool: whether values are not finite, as where the flow's inverse or the denoising diverged."""
        return ~self.images.isfinite().flatten(1).all(dim=1)


@torch.no_grad()
def generate(
    generation: Generation,
    wanted: Callable[[int, int], Collection[str]] | None = None,
    *,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[Batch]:
    """Generate every num_processes-th batch of images once, and denoise it in each variant.

    Args:
        generation: checked.
        wanted: wanted(start, stop): the variants that are wanted of images start .. stop - 1; where there are none,
            nothing is generated. None = all.
        process_index: the first batch to make.
        num_processes: see above.

    Yields:
        A batch for each variant that is wanted of the images, then those of the next images.
    """
    pipe = generation.pipe
    seeds = image_seeds(torch.Generator().manual_seed(generation.seed), len(generation.labels))
    # Batches are assigned by number, not among the wanted ones, which change while other processes write.
    for start, stop in generation.batches[process_index::num_processes]:
        names = generation.variants if wanted is None else wanted(start, stop)
        if not names:
            continue
        labels, guidance = generation.labels[start:stop], generation.guidance
        given, embeds = given_labels(labels), generation.prompts.embeds(pipe, start, stop)
        if given is None and not embeds and guidance is not None and guidance.temperature == 1:
            guidance = replace(guidance, weight=0.0)  # none of this batch has a label to guide by
        generators = seeded_images(seeds[start:stop])
        noisy = pipe(
            class_labels=None if embeds else [None if label < 0 else label for label in labels.tolist()],
            **embeds,
            guidance=guidance,
            method="skip",
            t_max=generation.t_max,
            solver=generation.solvers,
            inverse_dtype=generation.inverse_dtype,
            generator=generators,
            output_type="codes",
        ).images
        assert isinstance(noisy, Tensor)
        for name in names:
            variant, begun = generation.variants[name], time.perf_counter()
            own = None if given is None else given.to(noisy.device)
            codes = variant.denoised(noisy, own, generators, embeds.get("prompt_embeds"))
            images = variant.codec.decode(codes).cpu()  # synchronises
            seconds = time.perf_counter() - begun
            yield Batch(name, start, labels, None if variant.by_decoder else codes.cpu(), images, seconds)


# -- in a folder ------------------------------------------------------------------------------------------------


def manifest_of(generation: Generation, folder: Path) -> dict[str, Any]:
    """What samples.json is to hold, once the folder is begun, or gone on with; nothing is written.

    Variants may be fewer or more than before: more are put beside those that are there.

    Raises:
        DataError: the folder holds images that were made otherwise, or other things, or has a link in the place of
            a variant's folder.
    """
    for name in generation.variants:
        check_no_link(folder / name)
    wanted, stored = generation.described(), read_manifest(folder)
    if stored is None:
        if folder.is_dir() and (others := sorted(path.name for path in folder.iterdir() if path.name[0] != ".")):
            raise DataError(
                f"{folder} holds other things, of unknown origin, such as {printable(listed(others))}, and no "
                f"{MANIFEST}; choose another folder (--output), or empty this one."
            )
        return wanted
    there, now = _by_name(stored), _by_name(wanted)
    shared = [key for key in now if key in there or not key.startswith("cleaning ")]
    changed = [_change(key, there.get(key), now[key]) for key in shared if there.get(key) != now[key]]
    if changed:
        raise DataError(
            f"{folder} holds images that were made otherwise: {'; '.join(changed)}. Choose another folder (--output), "
            "run the command that began it, or delete it."
        )
    return {**wanted, "cleaning": {**stored["cleaning"], **wanted["cleaning"]}}


def begin_generation(
    generation: Generation,
    folder: Path,
    manifest: Mapping[str, Any] | None = None,
    report: Callable[[str], object] = str,
) -> int:
    """Prepare a folder for the files of a generation, new or begun before. For the main process only.

    Files that are there are read. Those that are damaged, or hold other images than their names say, get hidden names,
    and are made again; those of version 0.1, which are without a checksum, get one. Nothing is removed.

    Args:
        generation: checked.
        folder: made if needed.
        manifest: from `manifest_of`; None = call it.
        report: called with a sentence if files are made again, or had no checksum.

    Returns:
        How many images are still to be made, counting each variant.

    Raises:
        DataError: as `manifest_of`, or files of images that are not of this generation.
        OSError: a file can't be read, which says nothing about what it holds.
    """
    wanted = manifest_of(generation, folder) if manifest is None else dict(manifest)
    names = [shard_name(start, stop) for start, stop in generation.batches]
    damaged, unsigned = list[DataError](), 0
    for variant in generation.variants:
        if strange := strange_files(folder / variant, names):
            raise DataError(
                f"{printable(str(strange[0]))} is not of these {len(generation.labels):,} images, which are in files "
                f"of {generation.batch_size}; it would be scored with them: move it away."
            )
        origin = origin_digest(wanted, variant)
        for (start, stop), name in zip(generation.batches, names, strict=True):
            path = folder / variant / name
            if not path.exists():
                continue
            try:
                unsigned += renew_shard(path, origin, generation.labels[start:stop], generation.pipe.picture_shape)
            except DataError as error:
                damaged.append(error)
                set_aside(path)
    if damaged:
        report(
            f"{len(damaged)} files of samples are made again, and what was there is kept as .damaged-*; the first: "
            f"{damaged[0]}"
        )
    if unsigned:
        report(f"{unsigned} files of samples had no checksum, as of version 0.1; they fit, and have one now.")
    folder.mkdir(parents=True, exist_ok=True)
    if read_manifest(folder) != wanted:
        write_json(folder / MANIFEST, wanted)
    return sum((stop - start) * len(_missing(generation, folder, start, stop)) for start, stop in generation.batches)


def save(
    generation: Generation,
    folder: Path,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Write every num_processes-th batch into files, unless they are there.

    Args:
        generation: what to make.
        folder: as `begin_generation` has left it.
        process_index: the first batch to make.
        num_processes: see above.
        count: called with the number of images made, counting each variant.
    """
    missing, manifest = partial(_missing, generation, folder), read_manifest(folder) or generation.described()
    origins = {name: origin_digest(manifest, name) for name in generation.variants}
    for batch in generate(generation, missing, process_index=process_index, num_processes=num_processes):
        stop = batch.start + len(batch.images)
        levels = to_levels(generation.protocol)(torch.where(batch.images.isfinite(), batch.images, 0))
        pixels = torch.where(batch.images.isfinite(), levels, 128)
        path = _file(folder, batch.variant, batch.start, stop)
        write_shard(path, pixels, batch.labels, batch.broken, origins[batch.variant])
        count(len(batch.images))


def _missing(generation: Generation, folder: Path, start: int, stop: int) -> list[str]:
    """The variants of which images start .. stop - 1 are not there."""
    return [name for name in generation.variants if not _file(folder, name, start, stop).exists()]


def _change(key: str, there: Any, now: Any) -> str:
    """In words: the values of a setting, but of checksums only that they differ."""
    if isinstance(there, dict) and isinstance(now, dict):  # of a variant
        one, other = flat(there), flat(now)
        parts = (_change(part, one.get(part), other.get(part)) for part in one | other)
        changed = (text for text, part in zip(parts, one | other, strict=True) if one.get(part) != other.get(part))
        return f"{key.removeprefix('cleaning ')} samples: {', '.join(changed)}"
    if any(re.fullmatch("[0-9a-f]{64}", str(value)) for value in (there, now)):
        return f"other {key}"
    return f"{key}: {there} there, {now} now"


def _by_name(described: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a manifest, with one for each variant."""
    variants = {f"cleaning {name}": value for name, value in described["cleaning"].items()}
    return flat({key: value for key, value in described.items() if key != "cleaning"}) | variants


def _file(folder: Path, name: str, start: int, stop: int) -> Path:
    return folder / name / shard_name(start, stop)
