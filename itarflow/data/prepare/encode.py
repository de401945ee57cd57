"""Encode a data set once with a VAE: parquet files of codes, which training reads instead of the images.

OUT/codes.json   README.md   train-00000-of-00012.parquet ...   broken.json (if images could not be read)

See `shards` for the files. Every process makes a plan, one begins the folder, each encodes its share of the files,
and one finishes. No batch has images of two files: codes do not depend on the number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from itarflow.codec import VaeCodec, to_pixels
from itarflow.data.codes import CARD, CodesCard, to_bytes
from itarflow.data.context import ContextCard
from itarflow.data.made import Manifest, StoredFile
from itarflow.data.prepare.codes_card import codes_card, training_command
from itarflow.data.prepare.contexts import FEATURES, begin_captions, finished_card
from itarflow.data.prepare.encode_plan import Plan
from itarflow.data.prepare.manifest import check_room, clear_leftovers, stored_manifest
from itarflow.data.prepare.shards import (
    Content,
    Reader,
    Shard,
    broken_by_split,
    check_broken,
    check_bytes,
    count_images,
    label_features,
    read_ahead,
    read_contents,
    show_shards,
    stored_files,
    write_shard,
)
from itarflow.runtime.devices import usable_cores
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import check_writable, write_json, write_text
from itarflow.runtime.json_file import read_json
from itarflow.runtime.launch import processes_here
from itarflow.runtime.text import display_name

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_PIXELS = 2**15  # at a time: with more, CPUs spend their time on getting memory
_SMALLEST, _LARGEST = 1e-3, 1e3  # root mean square of codes; that of usual ones is 0.5 to 2
_MOST_WORKERS = 8  # a process; more decode no faster than one VAE encodes


@dataclass(frozen=True)
class Encoded:
    """What lies in the folder in the end.

    Attributes:
        card: of the codes, with the statistics of their channels.
        images: by split, how many were encoded.
        broken: by split, "name: reason" of each image that was left out.
        shards: number of parquet files.
        num_bytes: their size.
        shard_bytes: size of the largest.
        context: of captions, if there are any.
    """

    card: CodesCard
    images: Mapping[str, int]
    broken: Mapping[str, tuple[str, ...]]
    shards: int
    num_bytes: int
    shard_bytes: int
    context: ContextCard | None = None


def begin(plan: Plan, console: Console | None = None) -> int:
    """Write the manifest, unless it is there, and look at the files that are; see `files.folder_lock`.

    One process does it, before any encodes.

    Args:
        plan: what is to be done.
        console: where a bar is drawn while files are read; None = nowhere.

    Returns:
        How many images are in files that are missing.

    Raises:
        OSError: the folder can't be written, or its disk has less room than the missing codes take.
        DataError: a file or the manifest is damaged, or not of this plan.
    """
    out = plan.config.out
    check_writable(out)
    stored = stored_manifest(plan.config, CARD)
    clear_leftovers(out)
    contents = read_contents(plan.shards, {}, stored.files if stored else ())
    check_bytes(contents, console)
    missing = plan.num_images - sum(len(shard.rows) for shard in contents)
    flips = ", or leave the mirrored images out by --no-flips" if plan.card.flips else ""
    what = f"the codes of {missing:,} images ({plan.image_bytes:,} bytes an image)"
    check_room(out, missing * plan.image_bytes, what, flips)
    out.mkdir(parents=True, exist_ok=True)
    if stored is None:
        write_json(out / CARD, plan.manifest.to_json())
    begin_captions(plan.captions, out)
    return missing


def encode_share(
    plan: Plan,
    *,
    device: torch.device | str,
    process_index: int = 0,
    num_processes: int = 1,
    count: Callable[[int], object],
) -> None:
    """Encode what is missing of the files process_index, process_index + num_processes, ...

    Args:
        plan: of a folder that `begin` has made.
        device: where the VAE computes.
        process_index: of this process.
        num_processes: that share the files.
        count: called with the number of images that have been done since its last call.

    Raises:
        DataError: too many images could not be read by all processes, a worker process died, or codes are far from
            unit variance.
        OSError: the folder cannot be written; files that are whole stay.
    """
    config = plan.config
    recorded = _recorded(config.out / CARD)
    contents = read_contents(plan.shards, {}, recorded)
    check_broken(config.out, plan.shards, contents, config.max_broken)
    missing = [shard for shard in plan.shards[process_index::num_processes] if shard not in contents]
    if not missing:
        return
    device, vae = torch.device(device), copy.deepcopy(plan.vae)
    torch.nn.Module.to(vae, device, _DTYPES[config.dtype])  # the one of diffusers warns of every cast
    vae.to(memory_format=torch.channels_last)  # less time and memory traffic, above all on CPUs
    slice_size = max(_CPU_PIXELS // config.size**2, 1) if device.type == "cpu" else None
    codec = VaeCodec(vae, slice_size=slice_size, tiled=config.tiled)
    if plan.captions:
        plan.captions.encoder.to(device)
    cores = min(max(usable_cores() // processes_here(), 1), _MOST_WORKERS)
    batches = read_ahead(
        Reader(plan.sets, config.source),
        missing,
        batch_size=config.batch_size,
        num_workers=cores if config.num_workers is None else config.num_workers,
        collate=_collate,
    )
    codes = {name: datasets.Value("binary") for name in plan.columns}
    of_captions = FEATURES if plan.captions else {}
    features = datasets.Features(codes | label_features(plan.card.class_names) | of_captions)
    for shard in missing:
        sums, cut = [np.zeros((2, plan.card.shape[0]))], list[int]()
        rows = _rows(plan, shard, codec, batches, sums.append, count)
        if plan.captions:
            rows = plan.captions.beside(rows, shard, cut.append)
        contents[shard] = write_shard(shard, features, rows, partial(_notes, sums, cut))
        contents = read_contents(plan.shards, contents, recorded)
        check_broken(config.out, plan.shards, contents, config.max_broken)


def finish(plan: Plan) -> Encoded:
    """Show the files, and write the card and README.md; one process does it, when all have encoded.

    Raises:
        DataError: files are missing, or too many images could not be read.
        OSError: the folder cannot be written.
    """
    config, card_file = plan.config, plan.config.out / CARD
    manifest = read_json(card_file, Manifest)
    contents = read_contents(plan.shards, {}, manifest.files)
    missing = [shard.path.name for shard in plan.shards if shard not in contents]
    if missing:
        raise DataError(
            f"{len(missing)} files are missing in {config.out}, {missing[0]} first; with several machines it must be "
            "a folder that all of them see. Run the same command again."
        )
    check_broken(config.out, plan.shards, contents, config.max_broken)
    images, broken = count_images(plan.shards, contents, config.source), broken_by_split(plan.shards, contents)
    mean, std = _statistics(plan, contents)
    context = finished_card(plan.captions, config.out, contents)
    card = replace(manifest.card or plan.card, finished=True, code_mean=mean, code_std=std)
    sizes = [content.num_bytes for content in contents.values()]
    readme = codes_card(
        card,
        source=display_name(config.source),
        images=images,
        file=plan.shards[0].path.name,
        command=training_command(card, replace(config.codec, vae=card.vae), "PATH", config.split, context),
        context=context,
    )
    write_text(config.out / "README.md", str(readme))
    manifest = replace(
        manifest,
        context=context,
        images=images,
        broken={split: len(reports) for split, reports in broken.items()},
        files=stored_files(contents),
    )
    write_json(card_file, manifest.to_json())  # first, as the names that are shown no longer hold a SHA-256
    show_shards(contents)
    write_json(card_file, replace(manifest, card=card, finished=True).to_json())
    return Encoded(
        card=card,
        images=images,
        broken=broken,
        shards=len(sizes),
        num_bytes=sum(sizes),
        shard_bytes=max(sizes),
        context=context,
    )


def _recorded(manifest: Path) -> tuple[StoredFile, ...]:
    """The files of the manifest. Another machine may not see yet that it has been begun: it records none then."""
    try:
        return read_json(manifest, Manifest).files
    except FileNotFoundError:
        return ()


def _collate(images: list[Tensor | str]) -> tuple[Tensor, list[str | None]]:
    """The images (B, C, H, W) that could be read, and for each of all None or "name: reason"."""
    good = [image for image in images if isinstance(image, Tensor)]
    return torch.stack(good) if good else torch.empty(0), [
        image if isinstance(image, str) else None for image in images
    ]


def _rows(
    plan: Plan,
    shard: Shard,
    codec: VaeCodec,
    batches: Iterator[tuple[Tensor, list[str | None]]],
    add: Callable[[np.ndarray], None],
    count: Callable[[int], object],
) -> Iterator[dict[str, Any] | str]:
    """The values of each row of a shard, or why it has none; `add` gets sums and sums of squares by channel."""
    labels = plan.sets[shard.split].labels
    rows = iter(shard.rows)
    for first in range(shard.rows.start, shard.rows.stop, plan.config.batch_size):
        images, reports = next(batches)
        found = _codes(codec, images, plan.card.flips) if len(images) else torch.empty(0)
        if first == 0 and len(images):
            _check_scale(found[:, 0], plan.card.identity.scaling_factor)
        codes = iter(found)
        for report in reports:
            row = next(rows)
            if report is not None:
                yield report
                continue
            parts = next(codes)
            if not torch.isfinite(parts).all():
                yield f"row {row}: the VAE makes codes of it that are not finite in float16"
                continue
            mean = parts[0].double().numpy()
            add(np.stack([mean.sum((1, 2)), (mean**2).sum((1, 2))]))
            yield {name: to_bytes(part) for name, part in zip(plan.columns, parts, strict=True)} | {
                "label": int(labels[row])
            }
        count(len(reports))


def _check_scale(codes: Tensor, factor: float) -> None:
    """Refuse codes (B, C, H, W) of which float16 keeps little or nothing, or that no noise level suits."""
    values = codes[codes.isfinite()].float()
    size = float(values.square().mean().sqrt())
    if len(values) and not _SMALLEST <= size <= _LARGEST:
        raise DataError(
            f"codes have a root mean square of {size:.3g} in float16, with the scaling factor {factor:g}; expected "
            "about 1: choose --scaling-factor so that codes have unit variance"
        )


def _notes(sums: list[np.ndarray], cut: list[int]) -> dict[str, Any]:
    return {"sums": np.sum(sums, 0).tolist()} | ({"cut": sum(cut)} if cut else {})


@torch.inference_mode()
def _codes(codec: VaeCodec, images: Tensor, flips: bool) -> Tensor:
    """What is stored of uint8 images (B, C, H, W): float16 (B, columns, C, H, W) on the CPU."""
    pixels = to_pixels(images.to(next(codec.vae.parameters()).device))
    posteriors = [codec.encode(view) for view in ((pixels, pixels.flip(-1)) if flips else (pixels,))]
    return torch.stack([part for posterior in posteriors for part in posterior if part is not None], 1).half().cpu()


def _statistics(plan: Plan, contents: Mapping[Shard, Content]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, over all straight images as they are stored."""
    values = sum(content.images for content in contents.values()) * int(np.prod(plan.card.shape[1:]))
    mean, square = np.sum([contents[shard].notes["sums"] for shard in plan.shards], 0) / values
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist())
