"""The processes of a launch: how they join, and how none waits for one that is gone.

A process that waits for others in a collective can't know that one of them has died: NCCL says nothing, for hours. So
each process counts in the store that all share, in the background, and watches whether another one does. What ends one
ends all, within minutes: each says what has happened, unless it has had something to say itself.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from itarflow.runtime.devices import check_own_gpu, on_cpu

_TURN = 5.0
"""Seconds between two signs of life."""
_SILENT = 24
"""Turns without one after which a process counts as dead: two minutes. Stopped together, all count on together."""
_LATE = 4320
"""Turns within which it must have begun: six hours, in which a script may download before it joins."""
_GRACE = 10.0
"""Seconds in which a process that has heard of a failure may still say something itself, or be ended by a launcher."""
_FAILED, _LEFT = "itarflow failed", -(2**40)
Answer = TypeVar("Answer")


def joined(timeout: timedelta = timedelta(days=7)) -> PartialState:
    """Join the processes of a launch, if there are several, and watch them from now on.

    Args:
        timeout: of a wait for others in a collective. Long, since one that is done waits for the others, and one that
            has died is noticed all the same. Without effect if the processes have been joined before.

    Raises:
        ValueError: there are more processes than GPUs on this machine, or another process has this one's.
    """
    if not has_joined():
        _check_gpus()
    state = PartialState(cpu=on_cpu(), timeout=timeout)
    if state.num_processes > 1 and dist.is_initialized() and _watch() is None:
        watch = _Watch(state.process_index, state.num_processes)
        watch.start()
        _WATCH.append(watch)
        atexit.register(watch.leave)
        sys.excepthook = _ending(sys.excepthook)
        check_own_gpu(state)  # of several; one process may be asked for another device
    return state


def has_joined() -> bool:
    """Whether this process has joined those of its launch, be they one."""
    return bool(PartialState._shared_state)


def processes_here() -> int:
    """How many processes of the launch run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _check_gpus() -> None:
    here = processes_here()
    if on_cpu() or not torch.cuda.is_available() or here <= torch.cuda.device_count():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    which = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    raise ValueError(
        f"{here} processes were started on this machine, but there are {count} GPUs to see{which}; expected a GPU for "
        f"each process, and that each sees all of them. Start {count} (--num_processes, or --nproc_per_node of "
        "torchrun), or compute on CPUs by ACCELERATE_USE_CPU=1."
    )


def end(text: str, status: int = 1) -> NoReturn:
    """End this process after a failure, and with it all others, which may be waiting for it.

    Args:
        text: what has happened, after "process 1 of 8 has ended: ", for the others to say. This process has said it.
        status: that it exits with.
    """
    watch = _watch()
    if watch is None:
        sys.exit(status)
    watch.tell(f"has ended: {text}")
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    # Not by sys.exit: NCCL would wait, at the end of the program, for what the others can't finish.
    os._exit(status)


def part() -> None:
    """End the watch: the processes end in order, all of which have come here."""
    for watch in _WATCH:
        watch.stop()


def answered(ask: Callable[[], Answer]) -> Answer | None:
    """What the store answers; None if it doesn't, within seconds: its process may be stopped, or gone."""
    answers: list[Answer] = []

    def asking() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(_GRACE)
    return answers[0] if answers else None


def failure_elsewhere(error: BaseException) -> str | None:
    """What has happened to another process, if this error says no more than that it has gone; else None."""
    closed = isinstance(error, dist.DistNetworkError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if not _WATCH or not (closed or isinstance(error, dist.DistBackendError)):
        return None
    if _WATCH[-1].over.wait(_GRACE) and _WATCH[-1].text:
        return _WATCH[-1].text
    return f"another process is gone without a word ({str(error).strip()})" if closed else None


def wait_for_main(state: Any) -> None:
    """Return when the main process has come here, too, however long it takes; all processes call this.

    No collective is open meanwhile, so none runs out of time, and no GPU is kept busy by waiting.

    Args:
        state: an Accelerator or PartialState.
    """
    if state.num_processes == 1 or not dist.is_initialized():
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"itarflow main {store.add(f'itarflow calls {state.process_index}', 1)}"
    if state.is_main_process:
        store.set(key, "")
    pause = 0.001
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


class _Watch(threading.Thread):
    """Counts, listens to whether the next process does, and ends this one if not, or if any has failed.

    A store that does not answer is waited for: its process may be stopped. If its machine is gone, TCP says so, after
    a quarter of an hour or so.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(name="itarflow-watch", daemon=True)
        self.over, self.text = threading.Event(), ""
        self._rank, self._size = rank, size
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own, if torch has that: one that waits for something keeps others waiting.
        self._store: dist.Store = getattr(store, "clone", lambda: store)()
        self._store.add(f"itarflow life {rank}", 1)

    def run(self) -> None:
        """See the class."""
        try:
            self._listen()
        except RuntimeError:  # the connection is closed; the first process may have ended in order, as this one soon
            if not self.over.wait(_SILENT * _TURN) and dist.is_initialized():
                self._hear(f"process {self._rank} of {self._size} has lost the first one: its machine may be gone")
        if self.text:
            time.sleep(_GRACE)
            with suppress(OSError, ValueError):
                print(f"Error: {self.text}\nAll processes end.", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)

    def _listen(self) -> None:
        other, last, silent = (self._rank + 1) % self._size, 0, 0
        while not self.over.wait(_TURN) and dist.is_initialized():
            self._store.add(f"itarflow life {self._rank}", 1)
            if self._store.check([_FAILED]):
                self._hear(self._store.get(_FAILED).decode())
            life = self._store.add(f"itarflow life {other}", 0)
            while life < 0 and other != self._rank:  # it has ended in order
                other, last, silent = (other + 1) % self._size, 0, 0
                life = self._store.add(f"itarflow life {other}", 0)
            silent = silent + 1 if life == last else 0
            last = life
            if silent >= (_SILENT if life else _LATE):
                self._tell("is silent: it has been killed, or its machine is gone", other)

    def _hear(self, text: str) -> None:
        self.text = text
        self.over.set()

    def tell(self, text: str) -> None:
        """Tell all that this process ends; what was told first stays."""
        self.over.set()  # before it hears of itself
        answered(lambda: self._tell(text, self._rank))
        if self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * _TURN)  # the store, which the others are to ask once more, ends with this process

    def _tell(self, text: str, rank: int) -> None:
        self._store.compare_set(_FAILED, "", f"process {rank} of {self._size} {text}")

    def leave(self) -> None:
        """Say that this process ends in order, unless all have parted before."""
        with suppress(RuntimeError):
            if dist.is_initialized() and not self.over.is_set():
                self._store.add(f"itarflow life {self._rank}", _LEFT)
        self.stop()

    def stop(self) -> None:
        """End the watch. Python's end would abort the process, were a thread still asking the store then."""
        self.over.set()
        self.join(_GRACE)


_WATCH: list[_Watch] = []
"""The watch of this process, if it is one of several; before it those of groups that have parted."""


def _watch() -> _Watch | None:
    watch = _WATCH[-1] if _WATCH else None
    return None if watch is None or not watch.is_alive() or (watch.over.is_set() and not watch.text) else watch


def _ending(
    hook: Callable[[type[BaseException], BaseException, TracebackType | None], Any],
) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """What Python does with an exception that nobody catches: as before, but then all processes end."""

    def ending(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        try:
            text = failure_elsewhere(error)
            if text is None:
                hook(kind, error, traceback)
            else:
                print(f"Error: {text}", file=sys.stderr)  # noqa: T201
        finally:  # also where nothing can be printed
            end(f"{kind.__name__}: {error}".rstrip(": "), 130 if issubclass(kind, KeyboardInterrupt) else 1)

    return ending
