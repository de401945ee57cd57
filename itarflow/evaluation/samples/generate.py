"""Many images of a checkpoint, made once and cleaned in several ways, on disk: shared, and gone on with.

A folder has samples.json, which says what is in it, and a folder of 8-bit pictures for each way of cleaning (see
samples.py). Files hold a batch each; a file that is there is not made again, and its content depends on nothing but
samples.json, so any number of processes gives the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from itarflow.codec import to_uint8, vae_identity
from itarflow.denoisers.score import check_level
from itarflow.evaluation.samples.denoising import Column, clean, identity_of, settings_of
from itarflow.evaluation.samples.files import shard_name, write_shard
from itarflow.flow.embedding import NULL_LABEL
from itarflow.inverse.guidance import Guidance
from itarflow.inverse.solvers import Solver
from itarflow.pipeline.pipeline import ITARFlowPipeline, check_denoiser
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import weights_digest, write_json
from itarflow.runtime.seeds import image_seeds
from itarflow.runtime.text import flat

LabelRule = Literal["balanced", "random", "none"]
CONVERSION = "round((clip(x, -1, 1) + 1) * 127.5) to uint8; values that are not finite become 128, mid-grey"
MANIFEST = "samples.json"


def labels_by(rule: LabelRule, count: int, num_classes: int, seed: int = 0) -> Tensor:
    """The labels (count,) int64 of images 0, 1, ..., of which each depends on its number alone; -1 = none.

    Args:
        rule: "balanced": every class in turn, so that their counts differ by one at most. "random": each drawn
            uniformly. "none": no labels.
        count: of images.
        num_classes: of the flow; 0 = it has no labels, whatever the rule.
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
    # A stream of its own: the same as that of the noise would tie noise and label together.
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 1))))
    return torch.from_numpy(np.floor(draws.random(count) * num_classes).astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is made. Image i depends on the weights, the seed, i and its label, and on nothing else but rounding.

    Attributes:
        pipe: the checkpoint, on its device.
        columns: the ways of cleaning by the names of their folders; an image is generated once for all of them.
        labels: (N,) int64, -1 = none; their number is that of the images.
        seed: of the noise: that of image i is the i-th that `seeds.image_seeds` gives, as in training's grids.
        guidance: in generating; None = the checkpoint's.
        t_max: noise level of generating; None = the checkpoint's.
        solver: as in a call of the pipeline; None = the checkpoint's plan, else exact.
        inverse_dtype: as in a call of the pipeline.
        file_size: images of a file, which are made together.
    """

    pipe: ITARFlowPipeline
    columns: Mapping[str, Column]
    labels: Tensor
    seed: int = 0
    guidance: Guidance | None = None
    t_max: float | None = None
    solver: Solver | Sequence[Solver] | None = None
    inverse_dtype: torch.dtype | None = None
    file_size: int = 64

    @property
    def files(self) -> list[tuple[int, int]]:
        """First image of each file, and one past its last."""
        count = len(self.labels)
        return [(start, min(start + self.file_size, count)) for start in range(0, count, self.file_size)]

    def check(self) -> None:
        """Refuse what can't be made.

        Raises:
            ValueError: no images, a label that there is not, a noise level outside the flow's range, images that are
                no pictures, or a denoiser that does not suit them.
        """
        flow, level = self.pipe.flow, self.level
        if len(self.labels) == 0:
            raise ValueError("there are no images to make; expected at least one.")
        if self.file_size < 1:
            raise ValueError(f"file_size is {self.file_size}; expected a number of images >= 1.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < NULL_LABEL or high >= max(flow.config.num_classes, 0):
            raise ValueError(f"labels reach from {low} to {high}; this flow has {flow.config.num_classes} classes.")
        check_level(flow, "t_max", level)
        channels, _, _ = self.pipe.picture_shape
        if channels not in (1, 3):
            raise ValueError(
                f"this checkpoint makes images of {channels} channels, which are no pictures; expected 1 or 3. If "
                "they are codes, the pipeline lacks their VAE."
            )
        labelled = bool((self.labels >= 0).any())
        if self.guidance is not None and self.guidance.weight > 0 and not labelled and self.guidance.temperature == 1:
            raise ValueError(
                f"guidance weight is {self.guidance.weight}, but there are no labels to guide by; leave it out."
            )
        for name, column in self.columns.items():
            if column.schedule is None or column.denoiser is None:
                continue
            if column.schedule.config.t_max != level:
                raise ValueError(
                    f"{name} denoises from t_max {column.schedule.config.t_max}, but images are generated at {level}."
                )
            check_denoiser(column.denoiser, column.schedule, flow, self.labels if labelled else None)

    @property
    def solvers(self) -> Solver | Sequence[Solver]:
        """How the flow is inverted: by the plan for a whole file, also in the last one, which may be smaller."""
        return self.pipe.planned_solver(self.file_size) if self.solver is None else self.solver

    @property
    def level(self) -> float:
        """The noise level at which is generated."""
        return float(self.pipe.scheduler.config.t_max if self.t_max is None else self.t_max)

    def described(self) -> dict[str, Any]:
        """What decides on the images, as plain values; two generations with equal ones make equal images."""
        guidance = self.pipe.default_guidance if self.guidance is None else self.guidance
        by_block = self.solvers if isinstance(self.solvers, Sequence) else [self.solvers]
        values = {
            "flow": weights_digest(self.pipe.flow.state_dict()),
            "vae": None if self.pipe.vae is None else asdict(vae_identity(self.pipe.vae)),
            "decoder": None if self.pipe.vae is None else weights_digest(self.pipe.vae.state_dict()),
            "seed": self.seed,
            "num_samples": len(self.labels),
            "labels": weights_digest({"labels": self.labels}),
            "guidance": asdict(guidance),
            "t_max": self.level,
            "solver": [getattr(one, "__name__", None) or repr(one) for one in by_block],
            "inverse_dtype": str(self.inverse_dtype or self.pipe.flow.dtype),
            "cleaning": self._cleaning(),
            "conversion": CONVERSION,
            "file_size": self.file_size,
        }
        return json.loads(json.dumps(values))

    def _cleaning(self) -> dict[str, Any]:
        """The schedule and the denoiser of each column, whose weights are read once."""
        denoisers = {id(column.denoiser): column.denoiser for column in self.columns.values()}
        identities = {key: identity_of(denoiser) for key, denoiser in denoisers.items()}
        return {
            name: {
                "denoiser": identities[id(column.denoiser)],
                **({} if column.schedule is None else settings_of(column.schedule)),
            }
            for name, column in self.columns.items()
        }


def manifest_of(generation: Generation, folder: Path) -> dict[str, Any]:
    """What samples.json is to hold, once the folder is begun, or gone on with; nothing is written.

    Ways of cleaning may be fewer or more than before: more are put beside those that are there.

    Raises:
        DataError: the folder holds images that were made otherwise, or other things.
    """
    wanted, manifest = generation.described(), folder / MANIFEST
    if not manifest.exists():
        if any(folder.glob("*/*.safetensors")):
            raise DataError(f"{folder} holds files of unknown origin: {MANIFEST} is missing; choose another folder.")
        return wanted
    stored = _stored(manifest)
    there, now = _by_name(stored), _by_name(wanted)
    shared = [key for key in now if key in there or not key.startswith("cleaning ")]
    changed = [f"{key}: {there.get(key)} there, {now[key]} now" for key in shared if there.get(key) != now[key]]
    if changed:
        raise DataError(
            f"{folder} holds images that were made otherwise:\n  " + "\n  ".join(changed) + "\nChoose another folder, "
            "run the command that began it, or delete it."
        )
    return {**wanted, "cleaning": {**stored["cleaning"], **wanted["cleaning"]}}


def begin(generation: Generation, folder: Path, manifest: Mapping[str, Any] | None = None) -> int:
    """Make a folder ready for its files, or find that this is what it was begun with. For the main process alone.

    Args:
        generation: checked.
        folder: made if needed.
        manifest: of `manifest_of`; None = ask it now.

    Returns:
        How many images are still to be made, counting each way of cleaning.

    Raises:
        DataError: as `manifest_of`.
    """
    wanted = manifest_of(generation, folder) if manifest is None else dict(manifest)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists() or _stored(folder / MANIFEST) != wanted:
        write_json(folder / MANIFEST, wanted)
    missing = [(name, part) for name in generation.columns for part in generation.files]
    return sum(stop - start for name, (start, stop) in missing if not _file(folder, name, start, stop).exists())


def generate_share(
    generation: Generation,
    folder: Path,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Make every num_processes-th file, unless it is there.

    Args:
        generation: what to make.
        folder: as `begin` has left it.
        process_index: the first file to make.
        num_processes: see above.
        count: called with the number of images made, counting each way of cleaning.
    """
    seeds = image_seeds(torch.Generator().manual_seed(generation.seed), len(generation.labels))
    # Shared out by number, not among those that are missing: which these are changes while others write.
    for start, stop in generation.files[process_index::num_processes]:
        if not all(_file(folder, name, start, stop).exists() for name in generation.columns):
            _make_file(generation, folder, start, stop, seeds[start:stop], count)


@torch.no_grad()
def _make_file(
    generation: Generation, folder: Path, start: int, stop: int, seeds: Sequence[int], count: Callable[[int], None]
) -> None:
    """Images start .. stop - 1, generated once, cleaned and written in every way that is missing."""
    pipe, labels = generation.pipe, generation.labels[start:stop]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    labelled = None if bool((labels < 0).all()) else labels
    noisy = pipe(
        class_labels=None if labelled is None else [None if label < 0 else label for label in labels.tolist()],
        num_images=stop - start,
        guidance=generation.guidance,
        method="skip",
        t_max=generation.t_max,
        solver=generation.solvers,
        inverse_dtype=generation.inverse_dtype,
        generator=generators,
        output_type="codes",
    ).images
    assert isinstance(noisy, Tensor)
    for name, column in generation.columns.items():
        path = _file(folder, name, start, stop)
        if not path.exists():
            cleaned = clean(column, noisy, labelled, generators, stop - start, pipe.flow.device, lambda _: None)
            broken = ~cleaned.images.isfinite().flatten(1).all(dim=1)
            finite = torch.where(cleaned.images.isfinite(), cleaned.images, 0)
            write_shard(path, to_uint8(finite), labels, broken)
            count(stop - start)


def _stored(manifest: Path) -> dict[str, Any]:
    try:
        stored = json.loads(manifest.read_text())
        if isinstance(stored["cleaning"], dict):
            return stored
        raise TypeError("cleaning is no table")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is damaged: {error!r}. Choose another folder, or delete this one.") from error


def _by_name(described: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a manifest, with one for each way of cleaning."""
    cleaning = {f"cleaning {name}": value for name, value in described["cleaning"].items()}
    return flat({key: value for key, value in described.items() if key != "cleaning"}) | cleaning


def _file(folder: Path, name: str, start: int, stop: int) -> Path:
    return folder / name / shard_name(start, stop)
