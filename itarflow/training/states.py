"""Saved states (checkpoints for resuming): written to a temporary folder, flushed, with a manifest, then renamed.

So a state is complete or absent, and the manifest detects one that was damaged later by a disk or a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint.api import CheckpointException

from itarflow.runtime.errors import RunError
from itarflow.runtime.processes import on_main
from itarflow.training.run_folder import RunDir

MANIFEST, PROGRESS = "manifest.json", "progress.json"
_CHUNK = 2**22

OnMain = Callable[[Callable[[], object]], None]
"""Runs an action on the main process alone, waits for it on all, and raises its error on all."""


def run_here(action: Callable[[], object]) -> None:
    """The `OnMain` of a single process."""
    action()


def save_state(
    run: RunDir,
    step: int,
    keep: int,
    write: Callable[[Path], None],
    progress: Mapping[str, Any] | None = None,
    on_main: OnMain = run_here,
) -> Path:
    """Save a state, and remove the oldest of those that are more than `keep`. All processes call this.

    Args:
        run: the run.
        step: optimiser steps done.
        keep: newest states to keep.
        write: fills an existing folder; called by all processes.
        progress: plain values, stored beside what is written as `PROGRESS`.
        on_main: see `OnMain`.

    Raises:
        RunError: the disk is full or read-only. The older states are untouched.
    """
    final = run.path / "state" / f"step-{step:08d}"
    partial = run.path / "state" / f".partial-{step:08d}"
    try:
        on_main(lambda: _make_empty(partial))
        write(partial)
        on_main(lambda: _seal(run, partial, final, keep, progress or {}))
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:  # torch has its own types for a failed write
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"The state of step {step} could not be saved in {final}: {first_cause(error)}. Older states are whole; "
            "make room, or mend the folder, and go on with --resume."
        ) from error
    return final


def fault(state: Path) -> str | None:
    """Why a saved state is not whole, or None if every file has the size and the SHA-256 of its manifest."""
    try:
        files = json.loads((state / MANIFEST).read_text())["files"]
        return _difference(state, files)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except OSError as error:
        return f"it can't be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} can't be read ({type(error).__name__})"


def _difference(state: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    for name, expected in files.items():
        file = state / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
    digests = _digests(state, list(files))
    return next((f"{name} is damaged" for name in files if digests[name] != files[name]["sha256"]), None)


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
        if other.name > state.name:
            torn = other.with_name(f"torn-{other.name}")
            shutil.rmtree(torn, ignore_errors=True)  # from an earlier resume
            other.rename(torn)


def first_cause(error: BaseException) -> str:
    """The message of the cause of an error of torch's distributed checkpoints, else of the error itself."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().split("\n")[0].rstrip(". ") or type(error).__name__


def _make_empty(folder: Path) -> None:
    for left_by_a_crash in folder.parent.glob(".partial-*"):
        shutil.rmtree(left_by_a_crash)
    folder.mkdir(parents=True)


def _seal(run: RunDir, partial: Path, final: Path, keep: int, progress: Mapping[str, Any]) -> None:
    (partial / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
    names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    digests = _digests(partial, names)
    files = {name: {"bytes": (partial / name).stat().st_size, "sha256": digests[name]} for name in names}
    (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    if final.exists():  # renamed before it is removed, so that a kill does not leave half of it
        os.replace(final, final.with_name(f".partial-old-{final.name}"))
    os.replace(partial, final)
    shutil.rmtree(final.with_name(f".partial-old-{final.name}"), ignore_errors=True)
    _flush(final.parent)
    for old in run.states()[:-keep]:
        shutil.rmtree(old)


def _flush(path: Path) -> None:
    """Flush a file or a folder's entries to the disk, before the rename makes the state valid."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
        for reason in passed_over:
            say(f"Passed over {reason}. It is set aside as torn-{reason.split(':')[0]}, to be deleted.")
        set_aside_newer(run, state)
        found[0] = str(state)

    on_main(accelerator, look)
    return Path(broadcast_object_list(found)[0])
