"""SIGINT, SIGTERM and SIGHUP as a request to stop, which a loop checks between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):  # noqa: N818 - it is not an error
    """Training was asked to stop, and its state has been saved."""

    def __init__(self, signal_number: int, run_path: Path, step: int) -> None:
        super().__init__(
            f"Stopped at step {step}; the state is saved in {run_path}. Go on by the same command with --resume."
        )
        self.exit_code = 128 + signal_number


def _stop_signals() -> list[int]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return list(map(int, numbers))


_ECHO_SECONDS = 2.0
"""A signal so soon after the first is its echo: launchers pass on what the terminal has already sent to all."""


class StopSignal:
    """Inside `with`, the first signal only sets `requested`; one after two seconds acts at once.

    SIGINT, SIGTERM, and SIGHUP, which comes when a terminal or connection is closed; under nohup it stays ignored.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._terminals: list[int] = []

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal_number is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in _stop_signals():
                self._previous[number] = signal.signal(number, self._handle)
            self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if time.monotonic() - self._since > _ECHO_SECONDS:
                self._restore()
                signal.raise_signal(number)  # to this thread, hence at once
            return
        self.signal_number, self._since = number, time.monotonic()
        with suppress(OSError):  # the terminal may be gone
            # Not through rich or print, which the signal may have interrupted.
            os.write(2, b"\nStopping after this step and saving; a second signal stops at once.\n")
        if number == getattr(signal, "SIGHUP", None):
            # What is said from now on has no reader, and would fail: a failure to print must not cost the state.
            for fd in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
