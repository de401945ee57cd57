"""From a checkpoint to figures: samples are made by all processes, denoised in each variant, and scored in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markup import escape

from itarflow.evaluation.metrics.extractors import Extractor
from itarflow.evaluation.metrics.features import extract
from itarflow.evaluation.metrics.reference import Reference
from itarflow.evaluation.metrics.scores import Scores, score
from itarflow.evaluation.samples.files import Samples, open_samples
from itarflow.evaluation.samples.generate import Generation, begin_generation, manifest_of, save
from itarflow.evaluation.samples.manifest import MANIFEST, origin_of, read_manifest
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import check_writable, folder_lock, remove_partial, write_json
from itarflow.runtime.json_file import read_json
from itarflow.runtime.processes import on_main, shared_images
from itarflow.runtime.progress import image_progress

SCORES = "scores.json"
"""The figures of the samples in a folder."""
_BATCH = 50
"""Images that an extractor sees at a time."""


def save_samples(generations: Mapping[Path, Generation], state: PartialState, console: Console | None = None) -> int:
    """Make the missing images of generations. All processes of a launch call this.

    Args:
        generations: checked; by their folders, which get samples.json, and a folder for each variant. None is begun
            if one of the folders is refused.
        state: of the launch.
        console: where the main process draws a bar; None = nowhere.

    Returns:
        How many images were made now, counting each variant.

    Raises:
        RunError: a folder holds something else, or can't be written; another process has stopped.
    """
    missing = 0

    def report(text: str) -> None:
        if console is not None:
            console.print(f"[yellow]Note:[/] {escape(text)}", soft_wrap=True, highlight=False)

    with ExitStack() as locks:

        def first() -> None:
            nonlocal missing
            for folder in generations:
                check_writable(folder)
                locks.enter_context(folder_lock(folder))
            manifests = {folder: manifest_of(generation, folder) for folder, generation in generations.items()}
            for folder, generation in generations.items():
                for place in (folder, *(folder / name for name in generation.variants)):
                    remove_partial(place)
                missing += begin_generation(generation, folder, manifests[folder], report)

        on_main(state, first)
        total = sum(len(one.labels) * len(one.variants) for one in generations.values())
        shown = console if missing else None
        with shared_images(state, shown, "making images", total, total - missing) as count:
            for folder, generation in generations.items():
                share = {"process_index": state.process_index, "num_processes": state.num_processes}
                save(generation, folder, **share, count=count)
    return missing


def score_samples(
    samples: Samples,
    reference: Reference,
    extractor: Extractor,
    state: PartialState,
    *,
    device: torch.device | str = "cpu",
    count: Callable[[int], object] = int,
) -> Scores:
    """The figures of a set of samples; all processes of a launch call this, and get the same.

    Args:
        samples: of the reference's size.
        reference: statistics of real images.
        extractor: that made the reference, on the device of this process.
        state: of the launch.
        device: where distances between features are computed.
        count: called with the number of images whose features this process has taken since its last call.
    """
    mine = share_of(len(samples), state)
    batches = ((torch.arange(start, stop), samples.read(start, stop)) for start, stop in mine)
    found = extract(extractor, batches, len(samples), count=count)
    scores = list[Any]()
    on_main(
        state, lambda: scores.append(score(found, reference, extractor, broken=len(samples.broken), device=device))
    )
    return broadcast_object_list(scores or [None])[0]


def share_of(total: int, state: PartialState) -> list[tuple[int, int]]:
    """First image, and one past the last, of each batch whose features this process takes."""
    starts = range(state.process_index * _BATCH, total, state.num_processes * _BATCH)
    return [(start, min(start + _BATCH, total)) for start in starts]


def scores_of(
    folders: Sequence[Path],
    reference: Reference,
    extractor: Extractor,
    state: PartialState,
    *,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> tuple[list[Scores], int]:
    """The figures of sets of samples, kept beside them as scores.json; those that are kept are not computed again.

    Args:
        folders: of variants, as `save_samples` has left them.
        reference: statistics of real images.
        extractor: that made the reference, on the device of this process.
        state: of the launch; all processes call this, and get the same.
        device: where distances between features are computed.
        console: where the main process draws a bar; None = nowhere.

    Returns:
        The figures, in the order of the folders, and how many images were scored now.

    Raises:
        DataError: samples are missing or damaged.
    """
    keys: dict[Path, dict[str, Any]] = {}
    found: list[dict[Path, Scores]] = [{}]

    def look() -> None:
        against = {"reference": reference.digest(), "extractor": extractor.identity}
        for folder in folders:
            keys[folder] = {"samples": _origin(folder), **against}
            kept = _kept(folder / SCORES, keys[folder])
            if kept is not None:
                found[0][folder] = kept

    on_main(state, look)
    scores: dict[Path, Scores] = broadcast_object_list(found)[0]
    missing = {folder: open_samples(folder) for folder in folders if folder not in scores}
    mine = sum(stop - start for samples in missing.values() for start, stop in share_of(len(samples), state))
    if missing:
        with image_progress(console if state.is_main_process else None, "taking features", mine, 0) as show:
            for folder, samples in missing.items():
                one = score_samples(samples, reference, extractor, state, device=device, count=show)
                content = {"of": keys.get(folder), "scores": one.to_json()}
                on_main(state, partial(write_json, folder / SCORES, content))
                scores[folder] = one
    return [scores[folder] for folder in folders], sum(map(len, missing.values()))


def _origin(folder: Path) -> dict[str, Any]:
    """All that the samples in a variant's folder depend on."""
    manifest = read_manifest(folder.parent)
    if manifest is None:
        raise DataError(f"{folder.parent} has no {MANIFEST}: its samples are of unknown origin; make them again.")
    return origin_of(manifest, folder.name)


@dataclass(frozen=True)
class _Kept:
    """The content of scores.json."""

    of: dict[str, Any]
    scores: Scores


def _kept(path: Path, key: Mapping[str, Any]) -> Scores | None:
    """The scores in a file, if they are of the same samples, reference and extractor."""
    try:
        kept = read_json(path, _Kept)
    except (FileNotFoundError, DataError):  # what can't be read is computed anew
        return None
    return kept.scores if kept.of == key else None
