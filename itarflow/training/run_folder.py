"""A run on disk: its recipe, metrics, sample grids, saved states and the shareable pipeline.

runs/<name>/recipe.json   metrics.jsonl   samples/step-*.png   state/step-*/   pipeline/
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from accelerate import Accelerator
from filelock import FileLock
from msgspec import Meta

from itarflow.runtime.errors import DataError, RunError
from itarflow.runtime.files import LOCK, check_writable, locked, remove_partial, write_text
from itarflow.runtime.json_file import as_type, parse_json, read_bytes, read_json
from itarflow.runtime.processes import on_main
from itarflow.runtime.signals import StopSignal
from itarflow.runtime.text import listed, printable
from itarflow.training import run_folder as runs
from itarflow.training.settings import Settings, differences, write_recipe

Start = Literal["fresh", "resume", "restart"]


_STATE = re.compile(r"step-(\d{8,})")
_WRITTEN = (
    "recipe.json", "metrics.jsonl", "samples", "state", "pipeline", "logs", "vae", "psnr.json", "comparison.png", LOCK,
)  # fmt: skip
"""What a training writes in its folder."""
_WAIT = 1.0
"""Seconds to wait for a lock, which others also take for an instant, to see whether the run is free."""
_LARGEST_LOG = 2**30
"""Bytes of metrics.jsonl, whose lines have some 750: a million of them fit."""


class _HeldOut(TypedDict):
    nll: dict[str, float]
    bpd: float | None


class _Line(TypedDict):
    """What is read again of a line of metrics.jsonl."""

    step: Annotated[int, Meta(ge=0)]
    held_out: NotRequired[_HeldOut]
    psnr: NotRequired[dict[str, float]]


@dataclass(frozen=True)
class RunDir:
    """The folder of a run, and its layout."""

    path: Path
    option: str = "--run-dir"
    """The command-line option that names it, for messages."""
    inode: tuple[int, int] | None = None
    """Device and inode of the folder that was locked; see `held`."""

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def pipeline(self) -> Path:
        """The latest shareable pipeline."""
        return self.path / "pipeline"

    @property
    def lock(self) -> Path:
        """Held by the training that writes here; see `hold`."""
        return self.path / LOCK

    def held(self) -> RunDir:
        """The same, but methods that write notice from now on if the folder is moved or removed."""
        found = self.path.stat()
        return replace(self, inode=(found.st_dev, found.st_ino))

    def check_held(self) -> None:
        """Refuse a folder that is no longer the one of `held`, so that nothing is written beside a run.

        Raises:
            RunError: it has been moved or removed.
        """
        if self.inode is None:
            return
        try:
            found = self.path.stat()
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self.inode:
            raise RunError(
                f"{self.path} has been moved or removed while it was trained, and nothing is written in its place. "
                f"Go on from its newest state by --resume with {self.option} naming the folder where it is now."
            )

    def grid(self, step: int) -> Path:
        """The sample grid of a step; raises RunError as `check_held`."""
        self.check_held()
        return self.path / "samples" / f"step-{step:08d}.png"

    def states(self) -> list[Path]:
        """Saved states, oldest first: folders called step-NNNNNNNN. Links, archives and other names do not count."""
        found = [
            path
            for path in (self.path / "state").glob("step-*")
            if _STATE.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
        return sorted(found, key=step_of)

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; raises RunError as `check_held`."""
        self.check_held()
        with self.metrics.open("a") as file:
            file.write(json.dumps(dict(values)) + "\n")

    def logged(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl that are whole; errors as of `read_log`."""
        return self.read_log()[0]

    def read_log(self) -> tuple[list[dict[str, Any]], int]:
        """The lines of metrics.jsonl, objects that have a step; and the number of others, but for a last one cut off.

        Raises:
            DataError: it is no regular file, or too large.
        """
        if not self.metrics.exists():
            return [], 0
        texts = read_bytes(self.metrics, _LARGEST_LOG).decode(errors="replace").splitlines(keepends=True)
        lines = [_line_or_none(text) for text in texts]
        damaged = sum(line is None and text.endswith("\n") for line, text in zip(lines, texts, strict=True))
        return [line for line in lines if line is not None], damaged

    def resume(self, recipe: Settings, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace recipe.json and the lines of metrics.jsonl, each atomically, once nothing can refuse to go on.

        Raises:
            RunError: as `check_held`.
            OSError: they can't be written.
        """
        self.check_held()
        write_recipe(recipe, self.recipe)
        write_text(self.metrics, "".join(json.dumps(dict(line)) + "\n" for line in lines))


def step_of(state: Path) -> int:
    """The step of a state by its name."""
    return int(state.name.removeprefix("step-"))


def _line_or_none(text: str) -> dict[str, Any] | None:
    try:
        line = parse_json(text, dict[str, Any], "")
        as_type(line, _Line, "")
    except DataError:
        return None
    return line


def check(
    path: Path, recipe: Settings, start: Start, allow_changes: bool = False, option: str = RunDir.option
) -> None:
    """Refuse a folder that `claim` would refuse, without touching anything.

    Raises:
        RunError: the folder can't be written, holds a run already, holds none to resume or restart, or one of another
            recipe; it mixes with the images; or a link in it leads elsewhere.
        DataError: its recipe.json is damaged.
    """
    run = RunDir(path, option)
    _check_apart(run, recipe.data.path)
    _check_links(run)
    try:
        check_writable(path)
    except OSError as error:
        raise RunError(f"{error} Choose another folder by {option}.") from error
    if start == "fresh":
        _check_fresh(run)
    elif start == "resume":
        _check_resumable(run, recipe, allow_changes)
    elif path.exists() and not _parts(run) and any(entry.name != LOCK for entry in path.iterdir()):
        raise RunError(
            f"{path} holds no run, so --restart would move something else away; choose another {option}, or leave "
            "--restart out to begin a run there, beside what is in it."
        )


def _check_apart(run: RunDir, images: str | None) -> None:
    if images is None or images == "digits" or not Path(images).expanduser().is_dir():
        return
    here, there = run.path.resolve(), Path(images).expanduser().resolve()
    if here.is_relative_to(there):
        what = "is the folder of the images, or lies in it"
    elif there.is_relative_to(here):
        what = "has the folder of the images in it"
    else:
        return
    raise RunError(f"{run.path} {what} ({there}), where a run would mix with them; choose another {run.option}.")


def _check_links(run: RunDir) -> None:
    """A folder from elsewhere may have links in it, and a training would write through them."""
    for path in (run.path / name for name in _WRITTEN):
        if path.is_symlink():
            raise RunError(
                f"{path} is a link, through which a training would write elsewhere; remove it, or put what it leads "
                f"to ({printable(os.readlink(path))}) in its place. To have a whole run on another disk, let "
                f"{run.path} itself be a link."
            )


def _parts(run: RunDir) -> list[str]:
    """What there is of a run: recipe.json, metrics.jsonl, states."""
    files = [path.name for path in (run.recipe, run.metrics) if path.exists()]
    return files + [f"state/{state.name}" for state in run.states()]


def _check_fresh(run: RunDir) -> None:
    if run.recipe.exists():
        what = f"step {step_of(run.states()[-1])}" if run.states() else "no saved state yet"
        raise RunError(
            f"{run.path} already holds a run ({what}). Go on with it by --resume, begin anew by --restart (the old "
            f"run is kept beside it), or choose another folder by {run.option}."
        )
    if parts := _parts(run):
        raise _without_recipe(run, parts)


def _without_recipe(run: RunDir, parts: Sequence[str]) -> RunError:
    return RunError(
        f"{run.path} holds {listed(parts, 3)} of a run, but no recipe.json. Bring that back and go on by --resume, "
        f"begin anew by --restart (what is there is kept beside it), or choose another folder by {run.option}."
    )


def _check_resumable(run: RunDir, recipe: Settings, allow_changes: bool) -> None:
    if not run.recipe.exists():
        if parts := _parts(run):
            raise _without_recipe(run, parts)
        raise RunError(f"{run.path} holds no run to resume; leave --resume out to begin one there.")
    changed = differences(read_json(run.recipe, dict[str, Any]), recipe)
    if changed and not allow_changes:
        raise RunError(
            f"{run.path} was trained with other settings, so going on would not be the same run:\n  "
            + "\n  ".join(changed)
            + "\nUse the settings of its recipe.json, go on all the same by --allow-changes, or begin anew by "
            f"--restart or in another {run.option}."
        )


def hold(run: RunDir) -> FileLock:
    """Lock a run against other trainings, of a requeued job for instance, until the lock is released.

    Raises:
        RunError: another one holds it.
    """
    what = f"{run.path} is being written by another training"
    busy = RunError(f"{what}; wait for its end, or choose another {run.option}.")
    return locked(run.lock, busy, timeout=_WAIT)


def claim(run: RunDir, recipe: Settings, start: Start, allow_changes: bool, locks: ExitStack) -> None:
    """Lock a run's folder, so that no other training writes into it or moves it.

    A new run's recipe is stored in it; one that goes on keeps the one it has until `RunDir.resume`.

    Args:
        run: the run.
        recipe: resolved.
        start: "fresh" refuses a folder that has a run, "resume" goes on from its newest state (from its beginning,
            if it has been stopped before there was one), "restart" moves it aside and begins anew.
        allow_changes: resume although settings that change losses or weights differ from the stored ones.
        locks: releases the lock when it closes.

    Raises:
        RunError: as `check` and `hold`, or the folder can't be written.
    """
    check(run.path, recipe, start, allow_changes, run.option)
    _make(run)
    locks.enter_context(hold(run))
    check(run.path, recipe, start, allow_changes, run.option)  # another one may have been there just before
    if start == "restart" and _parts(run):
        _move_aside(run.path.resolve())
        _make(run)  # it is another folder now
        locks.enter_context(hold(run))
    for folder in (run.path, run.path / "samples"):
        remove_partial(folder)
    if os.name != "nt":  # which opens no folders
        # Kept open, since another folder could get the inode of one that is removed; see `RunDir.held`.
        locks.callback(os.close, os.open(run.path, os.O_RDONLY))
    try:
        (run.path / "state").mkdir(exist_ok=True)
        if start != "resume":
            write_recipe(recipe, run.recipe)
    except OSError as error:
        raise RunError(f"{run.path} can't be written: {error}. Choose another folder by {run.option}.") from error


def _make(run: RunDir) -> None:
    """Make the folder of a run; of a link to a folder that is no longer there, that one."""
    try:
        run.path.resolve().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run.path} can't be made: {error}. Choose another folder by {run.option}.") from error


def check_free(run: RunDir) -> None:
    """Refuse a run that another training is writing to.

    Raises:
        RunError: as `hold`.
    """
    if run.lock.exists():
        hold(run).release()


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)


def check_run_folder(
    run: RunDir, settings: Settings, accelerator: Accelerator, start: Start, allow_changes: bool
) -> None:
    """Refuse a run's folder that can't be used, or is in use, before any work and without touching it.

    Raises:
        RunError: on all processes; as `run_folder.check` and `run_folder.check_free`.
    """
    on_main(accelerator, lambda: runs.check(run.path, settings, start, allow_changes, run.option))
    on_main(accelerator, lambda: runs.check_free(run))


@contextmanager
def claimed(
    run: RunDir, settings: Settings, accelerator: Accelerator, start: Start, allow_changes: bool
) -> Iterator[StopSignal]:
    """While inside, the run's folder is prepared and locked by the main process, and a first signal asks to stop.

    Yields:
        The record of that signal.

    Raises:
        RunError: on all processes; as `run_folder.claim`.
    """
    with ExitStack() as locks, StopSignal() as stop:
        on_main(accelerator, lambda: runs.claim(run, settings, start, allow_changes, locks))
        yield stop
