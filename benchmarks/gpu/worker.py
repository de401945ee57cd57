"""Another process, in which steps run one after another: what breaks a GPU's context, or hangs, ends with it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from gpu.figures import Done, Figure, missing_package, reason


class Step(NamedTuple):
    """What a worker is told."""

    name: str
    module: str
    """Where the function of that name is."""
    setting: dict[str, Any]
    """Arguments of `Setting`."""


@dataclass(frozen=True)
class _Ended:
    failed: str | None
    healthy: bool
    """Whether the process can go on with another step."""


def unready(dry: bool) -> str | None:
    """Import what all steps need, and return in a sentence why none can run in this process; None = they can."""
    try:
        for name in ("gpu.hooks", "gpu.setting", "itarflow.pipeline", "itarflow.training.train"):
            importlib.import_module(name)
        return None if dry else importlib.import_module("gpu.setting").no_gpu()
    except Exception as error:
        missing = missing_package(error)
        return reason(error) if missing is None else f"{missing}; benchmarks/README.md says which wheels to bring."


def run_here(step: Step, found: Callable[[Figure], None]) -> str | None:
    """Run a step in this process; gives each figure to `found`, and returns why the step failed, or None."""
    try:
        module, hooks = importlib.import_module(step.module), importlib.import_module("gpu.hooks")
        make: Callable[[Any], Iterator[Figure]] = getattr(module, step.name)
        setting = importlib.import_module("gpu.setting").Setting(**step.setting)
        with hooks.told() as lines:
            try:
                for figure in make(setting):
                    found(figure)
                    if setting.left <= 0:
                        raise TimeoutError("its time was over before its end")
            finally:
                for line in dict.fromkeys(lines):
                    if line.startswith(hooks.KERNEL_LEFT_OUT):
                        found(Figure(what="kernel", failed=line))
                    else:
                        found(Figure(what="told", more={"": line}))
    except Exception as error:
        missing = missing_package(error)
        if missing is None:
            return reason(error)
        found(Figure(what=step.name, left_out=missing))
    finally:
        _cleaned(step)
    return None


class Worker:
    """Runs steps in a process that is started when it is needed, and anew after one that left it broken."""

    def __init__(self, dry: bool = False) -> None:
        self._dry = dry
        self._process: Any = None
        self._connection: Connection | None = None

    def start(self, until: float) -> str | None:
        """Start the process unless there is one, and wait for its imports, which are no step's.

        Returns why it could not be started until then, of `time.monotonic()`; None = it is ready.
        """
        if self._process is not None:
            return None
        spawned = multiprocessing.get_context("spawn")
        self._connection, other = spawned.Pipe()
        self._process = spawned.Process(target=_serve, args=(other, self._dry), daemon=False)
        self._process.start()
        other.close()
        try:
            if self._connection.poll(max(0.0, until - time.monotonic())):
                failed = self._connection.recv()
                if failed is None:
                    return None
            else:
                failed = "its process was not ready in time"
        except EOFError:
            self._process.join(5)
            failed = f"its process ended with exit status {self._process.exitcode} as it began"
        self.stop()
        return failed

    def run(self, step: Step, done: Done, until: float) -> None:
        """Run a step in the process that has been started, and add its figures to `done` as they come.

        Args:
            step: what to run.
            done: gets figures, and why the step failed.
            until: of `time.monotonic()`, when its process is ended.
        """
        assert self._connection is not None
        try:
            self._connection.send(step)
            while self._connection.poll(max(0.0, until - time.monotonic())):
                message = self._connection.recv()
                if isinstance(message, Figure):
                    done.figures.append(message)
                    continue
                done.failed = message.failed
                if not message.healthy:
                    self.stop()
                return
            done.failed = "its time was over, so its process was ended"
        except (EOFError, OSError):
            self._process.join(5)
            done.failed = f"its process ended with exit status {self._process.exitcode}"
        self.stop()

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and what it has started
            self._process.kill()  # it may not lead its group yet
            self._process.join()
            assert self._connection is not None
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, dry: bool) -> None:
    """The process: run what comes, until nobody is there any more."""
    os.setpgrp()
    connection.send(unready(dry))
    while True:
        try:
            step: Step = connection.recv()
        except EOFError:
            return
        failed = run_here(step, connection.send)
        connection.send(_Ended(failed, _healthy(step)))


def _cleaned(step: Step) -> None:
    """Give memory back, as far as the device still answers."""
    try:
        import torch
        from timing import release

        from itarflow.runtime.recording import release_recordings

        release_recordings()
        release(torch.device("cpu" if step.setting["dry"] else "cuda"))
    except Exception as error:  # the context is broken, which `_healthy` will find, too
        print(f"after {step.name}: {reason(error)}")


def _healthy(step: Step) -> bool:
    import torch

    try:
        return step.setting["dry"] or not torch.cuda.is_available() or torch.ones(1, device="cuda").item() == 1
    except RuntimeError:
        return False
