"""Helpers for the processes of a launch, beyond Accelerate's."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markup import escape

from itarflow.runtime.errors import RunError
from itarflow.runtime.launch import answered, end, failure_elsewhere, has_joined, wait_for_main
from itarflow.runtime.progress import image_progress

Opened = TypeVar("Opened")


def on_main(accelerator: Accelerator | PartialState, action: Callable[[], object]) -> None:
    """Run an action on the main process only; all wait for it, and an error of it is raised on all, as a RunError.

    On the main process errors other than RunError, OSError and ValueError are raised unchanged.
    """
    refusal: list[str | None] = [None]
    unforeseen: Exception | None = None
    if accelerator.is_main_process:
        try:
            action()
        except (RunError, OSError, ValueError) as error:
            refusal = [str(error)]
        except Exception as error:
            refusal, unforeseen = [f"the main process failed: {error}"], error
    wait_for_main(accelerator)
    broadcast_object_list(refusal)
    if unforeseen is not None:
        raise unforeseen
    if refusal[0] is not None:
        raise RunError(refusal[0])


def main_first(accelerator: Accelerator | PartialState, open_: Callable[[], Opened]) -> Opened:
    """Open something on all processes, the main one first: it may download it, or raise for all.

    Raises:
        RunError: as `on_main`.
    """
    opened: list[Opened] = []
    on_main(accelerator, lambda: opened.append(open_()))
    return opened[0] if opened else open_()


def agreed(accelerator: Accelerator, *values: int) -> tuple[int, ...]:
    """The largest of each value over all processes, which all call this."""
    if accelerator.num_processes == 1:
        return values
    everywhere = accelerator.gather(torch.tensor([values], device=accelerator.device))
    return tuple(everywhere.max(dim=0).values.tolist())


_PATIENCE = timedelta(seconds=10)
"""For another process to say something: a launcher ends all processes as soon as one exits."""


def say_once(text: str, say: Callable[[], object]) -> None:
    """Let the first process that comes here with this text say it; the others return when it has been said."""
    if not dist.is_initialized():
        say()
        return
    key = f"itarflow {hashlib.sha256(text.encode()).hexdigest()}"
    store = dist.distributed_c10d._get_default_store()
    before = answered(lambda: store.add(key, 1) - 1)
    if not before:  # or no answer: better twice than never
        say()
    if before == 0:
        answered(lambda: store.set(f"{key} said", ""))
    elif before:
        answered(lambda: store.wait([f"{key} said"], _PATIENCE))


def after_main(what: str) -> None:
    """Return on the main process; on the others when it has come here, too, or after ten seconds."""
    if not dist.is_initialized():
        return
    with suppress(RuntimeError, ValueError):
        store = dist.distributed_c10d._get_default_store()
        if PartialState().is_main_process:
            store.set(f"itarflow main {what}", "")
        else:
            store.wait([f"itarflow main {what}"], _PATIENCE)


def shared_counter(name: str) -> Callable[[int], int]:
    """A function that adds to a number which all processes share, and returns it; each name is used once."""
    if not dist.is_initialized():
        total = 0

        def count(more: int) -> int:
            nonlocal total
            total += more
            return total

        return count
    store = dist.distributed_c10d._get_default_store()
    return lambda more: int(store.add(f"itarflow counts {name}", more))


@contextmanager
def shared_images(
    state: PartialState, console: Console | None, title: str, total: int, done: int
) -> Iterator[Callable[[int], None]]:
    """Context of work on images that all processes share: the main one draws a bar for all, and at the end all wait.

    Args:
        state: of the launch.
        console: where the bar is drawn; None = nowhere.
        title: of the bar.
        total: of the images.
        done: how many were done before.

    Yields:
        A function to call with the number of images that this process has done since its last call.

    Raises:
        RunError: another process has stopped.
    """
    name = broadcast_object_list([uuid.uuid4().hex])[0]  # unique to this context
    counted, shown = shared_counter(name), 0
    with image_progress(console if state.is_main_process else None, title, total, done) as show:

        def count(more: int) -> None:
            nonlocal shown
            now = counted(more)
            show(now - shown)
            shown = now

        yield count
        try:
            state.wait_for_everyone()
        except RuntimeError as error:
            raise RunError("another process has stopped; see what it said. Run the same command again.") from error
        count(0)


def refuse(error: Exception) -> NoReturn:
    """Print an error once, with the number of its process if there are several, and end all with 1."""
    if not has_joined() and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_PATIENCE.total_seconds())  # the first process of this machine says it
        sys.exit(1)
    several = has_joined() and PartialState().num_processes > 1
    of = f" of process {PartialState().process_index}" if several else ""
    text = f"[red]Error{of}:[/] {escape(str(error))}"
    say_once(str(error), lambda: Console(stderr=True).print(text, highlight=False, soft_wrap=True))
    end(str(error))


def crash(error: Exception) -> NoReturn:
    """Print an unexpected error once, with its traceback and the number of the first process that had it, and end."""
    if not has_joined() or PartialState().num_processes == 1:
        raise error
    elsewhere = failure_elsewhere(error)
    if elsewhere is not None:
        refuse(RunError(elsewhere))

    def say() -> None:
        traceback.print_exception(error)
        print(f"This happened in process {PartialState().process_index}.", file=sys.stderr)  # noqa: T201

    say_once("".join(traceback.format_tb(error.__traceback__)[-1:]) + type(error).__name__, say)
    end(f"{type(error).__name__}: {error}")
