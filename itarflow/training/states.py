"""Saved states (checkpoints for resuming): written to a temporary folder, flushed, with a manifest, then renamed.

So a state is complete or absent, and the manifest detects one that was damaged later by a disk or a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from msgspec import Meta
from torch.distributed.checkpoint.api import CheckpointException

from itarflow.data.identity import DataIdentity
from itarflow.runtime.errors import DataError, RunError
from itarflow.runtime.files import file_sha256, flush, flush_folder, remove
from itarflow.runtime.json_file import as_type, read_json
from itarflow.runtime.processes import on_main
from itarflow.runtime.text import listed, printable
from itarflow.training.run_folder import RunDir, step_of

MANIFEST, PROGRESS = "manifest.json", "progress.json"

OnMain = Callable[[Callable[[], object]], None]
"""Runs an action on the main process alone, waits for it on all, and raises its error on all."""


class State(NamedTuple):
    """Where a training is, besides its tensors."""

    step: int = 0
    seconds: float = 0.0
    """Of training, over all resumed parts."""
    bad_steps: int = 0


@dataclass(frozen=True)
class _File:
    bytes: Annotated[int, Meta(ge=0)]
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, _File]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a state holds besides tensors. What a kind of training adds of its own stands beside it in `PROGRESS`."""

    step: Annotated[int, Meta(ge=0)]
    seconds: Annotated[float, Meta(ge=0)]
    bad_steps: Annotated[int, Meta(ge=0)]
    broken: tuple[str, ...] = ()
    """Names, with reasons, of the images that could not be read."""
    run: str = ""
    """A name of the run that no other has; "" in states of before there were such names."""
    data: DataIdentity | None = None
    """The images it was trained on; None in states of before this was stored."""


@dataclass(frozen=True)
class _Record:
    train_images: int
    held_out_images: int


@dataclass(frozen=True)
class _Index:
    """What a pipeline's model_index.json says of the images that its flow was trained on."""

    class_names: tuple[str, ...] | None = None
    training: _Record | None = None


def read_progress(state: Path) -> tuple[Progress, dict[str, Any]]:
    """What a state holds besides tensors, and what its kind of training has added.

    Raises:
        DataError: it is damaged, or of another step than the state's name says.
        OSError: it can't be read.
    """
    path = state / PROGRESS
    values = read_json(path, dict[str, Any])
    progress = as_type(values, Progress, str(path))
    if progress.step != step_of(state):
        raise DataError(f"{path} is of step {progress.step}; expected that of its folder's name")
    known = {field.name for field in fields(Progress)}
    return progress, {name: value for name, value in values.items() if name not in known}


def run_here(action: Callable[[], object]) -> None:
    """The `OnMain` of a single process."""
    action()


def save_state(
    run: RunDir,
    step: int,
    keep: int | None,
    write: Callable[[Path], None],
    progress: Mapping[str, Any] | None = None,
    on_main: OnMain = run_here,
    warn: Callable[[str], object] = warnings.warn,
) -> Path:
    """Save a state, and remove the oldest of this run's that are more than `keep`. All processes call this.

    Args:
        run: the run.
        step: optimiser steps done.
        keep: newest states to keep; None = all.
        write: fills an existing folder; called by all processes.
        progress: plain values, stored beside what is written as `PROGRESS`.
        on_main: see `OnMain`.
        warn: is told of older states that can't be removed.

    Raises:
        RunError: the disk is full or read-only, or the run has been moved. The older states are untouched.
    """
    on_main(run.check_held)
    final = run.path / "state" / f"step-{step:08d}"
    partial = run.path / "state" / f".partial-{step:08d}"
    try:
        on_main(lambda: _make_empty(partial))
        write(partial)
        on_main(lambda: _seal(run, partial, final, progress or {}))
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:  # torch has its own types for a failed write
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"The state of step {step} could not be saved in {final}: {first_cause(error)}. Older states are whole; "
            "make room, or mend the folder, and go on with --resume."
        ) from error
    if keep is not None:
        on_main(lambda: _prune(run, final, keep, warn))
    return final


def fault(state: Path) -> str | None:
    """Why a saved state is not whole, or None if every file has the size and the SHA-256 of its manifest."""
    try:
        return _difference(state, read_json(state / MANIFEST, _Manifest).files)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except OSError as error:
        return f"it can't be read ({error})"
    except DataError as error:
        return f"its {MANIFEST} can't be read ({error})"


def _difference(state: Path, files: Mapping[str, _File]) -> str | None:
    for name, expected in files.items():
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts:
            return f"its {MANIFEST} names {printable(name)}, which is elsewhere"
        if any((state / place).is_symlink() for place in (inner, *inner.parents)):
            return f"{printable(name)} is a link"
        file = state / name
        if not file.is_file():
            return f"{printable(name)} is missing"
        if file.stat().st_size != expected.bytes:
            return f"{printable(name)} has {file.stat().st_size:,} bytes instead of {expected.bytes:,}"
    digests = _digests(state, list(files))
    return next((f"{printable(name)} is damaged" for name in files if digests[name] != files[name].sha256), None)


def newest_whole(run: RunDir) -> tuple[Path | None, list[str]]:
    """The newest whole state, if there is one, and "name: reason" of each newer one that was passed over."""
    passed_over: list[str] = []
    for state in reversed(run.states()):
        reason = fault(state)
        if reason is None:
            return state, passed_over
        passed_over.append(f"{state.name}: {reason}")
    return None, passed_over


def set_aside_newer(run: RunDir, state: Path) -> None:
    """Rename the states after `state`, so that they no longer count as states."""
    for other in run.states():
        if step_of(other) > step_of(state):
            torn = other.with_name(f"torn-{other.name}")
            remove(torn)  # from an earlier resume
            other.rename(torn)


def first_cause(error: BaseException) -> str:
    """The message of the cause of an error of torch's distributed checkpoints, else of the error itself."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().split("\n")[0].rstrip(". ") or type(error).__name__


def _make_empty(folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    for left_by_a_crash in folder.parent.glob(".partial-*"):
        remove(left_by_a_crash)
    folder.mkdir()


def _seal(run: RunDir, partial: Path, final: Path, progress: Mapping[str, Any]) -> None:
    (partial / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
    names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    digests = _digests(partial, names)
    files = {name: {"bytes": (partial / name).stat().st_size, "sha256": digests[name]} for name in names}
    (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
    flush_folder(partial)
    if run.metrics.exists():
        flush(run.metrics)  # whose lines up to this step no resumed run writes again
    old = _unnamed(final)  # renamed before it is removed, so that a kill does not leave half of it
    if final in run.states():
        os.replace(final, old)
    elif os.path.lexists(final):  # a file or a link of somebody's
        os.replace(final, final.with_name(f"other-{uuid.uuid4().hex[:8]}-{final.name}"))
    os.replace(partial, final)
    remove(old)
    flush(final.parent)


def _prune(run: RunDir, newest: Path, keep: int, warn: Callable[[str], object]) -> None:
    """Remove the states before `newest` of the same run but for the newest `keep`."""
    name = _name_of_run(newest)
    mine = [s for s in run.states() if step_of(s) <= step_of(newest) and _name_of_run(s) == name]
    for old in mine[:-keep]:
        try:
            os.replace(old, _unnamed(old))
            shutil.rmtree(_unnamed(old))
        except OSError as error:
            warn(f"{old} is no longer needed, but can't be removed ({error.strerror}); remove it to have its room.")


def _unnamed(state: Path) -> Path:
    """Where a state goes that is to be removed; what a kill leaves there goes with the next save."""
    return state.with_name(f".partial-old-{state.name}")


def _name_of_run(state: Path) -> str | None:
    try:
        return read_progress(state)[0].run
    except (OSError, DataError):
        return None


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(lambda name: file_sha256(folder / name), names), strict=True))


def agreed_state(run: RunDir, accelerator: Accelerator, say: Callable[[str], None]) -> Path:
    """The newest whole state, as the main process finds it; newer ones are set aside, and named.

    Raises:
        RunError: there is none.
    """
    found: list[Any] = [None]

    def look() -> None:
        state, passed_over = newest_whole(run)
        if state is None:
            raise RunError(
                f"{run.path} has no whole state to resume from:\n  " + "\n  ".join(passed_over) + "\nBegin anew by "
                "--restart, or bring the files back."
            )
        for link in (path for path in (run.path / "state").glob("step-*") if path.is_symlink()):
            say(f"Passed over {link.name}: it is a link. To go on from it, put the folder itself there.")
        for reason in passed_over:
            say(f"Passed over {reason}. It is set aside as torn-{reason.split(':')[0]}, to be deleted.")
        set_aside_newer(run, state)
        found[0] = str(state)

    on_main(accelerator, look)
    return Path(broadcast_object_list(found)[0])


def check_stateless(run: RunDir) -> None:
    """Refuse to begin a run anew that has no states, if it once had some: its metrics and export would be lost.

    Raises:
        RunError: naming what there is in their place.
    """
    others = [f"state/{path.name}" for path in (run.path / "state").glob("[!.]*")]
    exported = [path.name for path in (run.pipeline, run.path / "vae") if path.exists()]
    if others or exported:
        raise RunError(
            f"{run.path} holds no saved state to go on from, but {listed(others + exported)}. Put folders called "
            "step-NNNNNNNN, no links and no archives, back into state/, or begin anew by --restart."
        )


def exported_data(run: RunDir, now: DataIdentity) -> DataIdentity | None:
    """What the run's pipeline says of the images that it was trained on, and for all else what holds `now`.

    None = it says nothing, or there is none that can be read.
    """
    try:
        index = read_json(run.pipeline / "model_index.json", _Index)
    except (OSError, DataError):
        return None
    if index.training is None:
        return None
    images = {"train": index.training.train_images, "held out": index.training.held_out_images}
    return replace(now, images=images, class_names=index.class_names or now.class_names)


def check_same_data(state: Path, stored: DataIdentity | None, now: DataIdentity, allowed: bool) -> list[str]:
    """What distinguishes the images now from those that a state was trained on, a line each.

    Raises:
        RunError: there is something, and it is not `allowed`.
    """
    changed = [] if stored is None else stored.differences(now)
    if changed and not allowed:
        raise RunError(
            f"The images are others than those of {state}, so going on would not be the same run:\n  "
            + "\n  ".join(changed)
            + "\nBring the former images back, go on all the same by --allow-changes (images that were trained on may "
            "then be held out), or begin anew by --restart."
        )
    return changed


def open_state(
    run: RunDir, accelerator: Accelerator, data: DataIdentity, allow_changes: bool, say: Callable[..., None]
) -> tuple[Path, Progress, dict[str, Any]]:
    """The newest whole state, as `agreed_state` finds it, and what `read_progress` reads of it.

    Args:
        run: has states.
        accelerator: of the launch.
        data: the images now.
        allow_changes: the state may be of other images; they are named then.
        say: prints a line, in a colour.

    Raises:
        RunError: there is none, or it is of other images.
        DataError: its `PROGRESS` is damaged.
    """
    folder = agreed_state(run, accelerator, say)
    progress, own = read_progress(folder)
    stored = progress.data or exported_data(run, data)
    if progress.data is None:
        compared = "only classes and numbers of images are compared" if stored else "they are not compared"
        say(f"{folder} does not say which images it was trained on; {compared}.", "yellow")
    elif progress.data.content_kind != data.content_kind:
        say(
            f"The images of {folder} were read in another way (with or without data.streaming, here or on the Hub): "
            "their numbers, classes and columns are compared, but not their bytes.",
            "yellow",
        )
    for change in check_same_data(folder, stored, data, allow_changes):
        say(f"Going on with other images: {change}", "yellow")
    return folder, progress, own


@contextmanager
def reading(state: Path, task: str) -> Iterator[None]:
    """Raises RunError for whatever error comes of reading the tensors of a state into a model that is not its own."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, CheckpointException) as error:  # of many libraries, all meaning the same
        raise RunError(
            f"The state {state} is whole, but can't be read: {first_cause(error)}. It is of another {task}, or of "
            "another version of this program: use the settings of its recipe.json, or begin anew by --restart."
        ) from error
