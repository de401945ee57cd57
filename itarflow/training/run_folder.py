"""A run on disk: its recipe, metrics, sample grids, saved states and the shareable pipeline.

runs/<name>/recipe.json   metrics.jsonl   samples/step-*.png   state/step-*/   pipeline/
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from filelock import FileLock

from itarflow.runtime.errors import RunError
from itarflow.runtime.files import check_writable, locked, write_text
from itarflow.runtime.processes import on_main
from itarflow.runtime.signals import StopSignal
from itarflow.training import run_folder as runs
from itarflow.training.settings import Settings, differences, write_recipe

Start = Literal["fresh", "resume", "restart"]


@dataclass(frozen=True)
class RunDir:
    """The folder of a run, and its layout."""

    path: Path
    option: str = "--run-dir"
    """The command-line option that names it, for messages."""

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
        return self.path / ".lock"

    def grid(self, step: int) -> Path:
        """The sample grid of a step."""
        return self.path / "samples" / f"step-{step:08d}.png"

    def states(self) -> list[Path]:
        """Saved states, oldest first. Unfinished and damaged ones have other names."""
        return sorted((self.path / "state").glob("step-*"))

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(dict(values)) + "\n")

    def logged(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, without a last one that a crash cut off."""
        if not self.metrics.exists():
            return []
        return [line for line in map(_json_or_none, self.metrics.read_text().splitlines()) if line is not None]

    def rewrite_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace the lines of metrics.jsonl, atomically."""
        write_text(self.metrics, "".join(json.dumps(dict(line)) + "\n" for line in lines))


def check(
    path: Path, recipe: Settings, start: Start, allow_changes: bool = False, option: str = RunDir.option
) -> None:
    """Refuse a folder that `prepare` would refuse, without touching anything.

    Raises:
        RunError: the folder can't be written, holds a run already, holds none to resume, or one of another recipe.
    """
    run = RunDir(path, option)
    if recipe.data.path is not None and path.resolve() == Path(recipe.data.path).expanduser().resolve():
        raise RunError(
            f"{path} is the folder of the images, where a run would mix with them; choose another {option}."
        )
    try:
        check_writable(path)
    except OSError as error:
        raise RunError(f"{error} Choose another folder by {option}.") from error
    if start == "fresh" and run.recipe.exists():
        what = f"step {_step(run.states()[-1])}" if run.states() else "no saved state yet"
        raise RunError(
            f"{path} already holds a run ({what}). Go on with it by --resume, begin anew by --restart (the old run "
            f"is kept beside it), or choose another folder by {option}."
        )
    if start == "resume":
        _check_resumable(run, recipe, allow_changes)


def prepare(
    path: Path, recipe: Settings, start: Start, allow_changes: bool = False, option: str = RunDir.option
) -> RunDir:
    """Make the folder of a run ready to be written, and store the recipe in it.

    Args:
        path: the run's folder.
        recipe: resolved.
        start: "fresh" refuses a folder that has a run, "resume" goes on from its newest state (from its beginning,
            if it has been stopped before there was one), "restart" moves it aside and begins anew.
        allow_changes: resume although settings that change losses or weights differ from the stored ones.
        option: how the command line names the folder.

    Raises:
        RunError: as `check`, or the folder can't be written.
    """
    check(path, recipe, start, allow_changes, option)
    if start == "restart" and path.exists():
        _move_aside(path)
    run = RunDir(path, option)
    try:
        (path / "state").mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, run.recipe)
    except OSError as error:
        raise RunError(f"{path} can't be written: {error}. Choose another folder by {option}.") from error
    return run


def hold(run: RunDir) -> FileLock:
    """Lock a run against other trainings, of a requeued job for instance, until the lock is released.

    Raises:
        RunError: another one holds it.
    """
    what = f"{run.path} is being written by another training"
    return locked(run.lock, RunError(f"{what}; wait for its end, or choose another {run.option}."))


def claim(run: RunDir, recipe: Settings, start: Start, allow_changes: bool, locks: ExitStack) -> None:
    """Lock a run's folder, so that no other training writes into it or moves it, and prepare it.

    Args:
        run: the run.
        recipe: resolved.
        start: see `prepare`.
        allow_changes: see `prepare`.
        locks: releases the lock when it closes.

    Raises:
        RunError: as `hold` and `prepare`.
    """
    existed = run.path.exists()
    if existed:
        locks.enter_context(hold(run))
    prepare(run.path, recipe, start, allow_changes, run.option)
    if not existed or start == "restart":  # it is another folder now
        locks.enter_context(hold(run))


def check_free(run: RunDir) -> None:
    """Refuse a run that another training is writing to.

    Raises:
        RunError: as `hold`.
    """
    if run.lock.exists():
        hold(run).release()


def _check_resumable(run: RunDir, recipe: Settings, allow_changes: bool) -> None:
    if not run.recipe.exists():
        raise RunError(f"{run.path} holds no run to resume; leave --resume out to begin one there.")
    changed = differences(json.loads(run.recipe.read_text()), recipe)
    if changed and not allow_changes:
        raise RunError(
            f"{run.path} was trained with other settings, so going on would not be the same run:\n  "
            + "\n  ".join(changed)
            + "\nUse the settings of its recipe.json, go on all the same by --allow-changes, or begin anew by "
            f"--restart or in another {run.option}."
        )


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)


def _json_or_none(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _step(state: Path) -> int:
    return int(state.name.removeprefix("step-"))


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
