"""Processes of a launch do not wait for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from itarflow.commands.console import reporting
from itarflow.runtime import launch

FORKS = '''
import json, os, signal, sys, time
from datetime import timedelta
from types import SimpleNamespace

from itarflow.runtime import launch
from itarflow.runtime.errors import TrainingError
from itarflow.runtime.processes import crash, on_main, refuse
from itarflow.training.loop import Loop


def forked():
    """The program of this process, one of those that were asked for; None at the end."""
    for line in sys.stdin:
        folder, port, size, body = json.loads(line)
        ranks = {}
        for rank in range(size):
            if not (pid := os.fork()):
                signal.alarm(150)  # no test waits longer
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
                for number, name in (1, "out"), (2, "err"):
                    os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
                os.chdir(folder)
                return body
            ranks[pid] = rank
        print(json.dumps({rank: pid for pid, rank in ranks.items()}), flush=True)
        for _ in range(size):
            pid, status = os.wait()
            print(ranks[pid], os.waitstatus_to_exitcode(status), flush=True)


def wait():
    """As a process that NCCL keeps waiting, which hears nothing of the others."""
    time.sleep(120)


if program := forked():
    launch._TURN, launch._GRACE = 0.2, 0.5
    state = launch.joined(timedelta(minutes=1))
    rank = state.process_index
    print("ready", flush=True)
    exec(program)
    print("done", flush=True)
'''


class Ranks:
    """Processes of a launch without a launcher, which run a program after they have met."""

    def __init__(self, forks: subprocess.Popen[str], folder: Path, body: str, count: int) -> None:
        assert forks.stdin is not None
        assert forks.stdout is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self._lines = folder, forks.stdout
        forks.stdin.write(json.dumps([str(folder), port, count, body]) + "\n")
        forks.stdin.flush()
        self.pids = {int(rank): pid for rank, pid in json.loads(self._lines.readline()).items()}
        self.statuses: dict[int, int] = {}

    def meet(self) -> None:
        """Return when they have met."""
        last = time.monotonic() + 60
        while not all("ready" in self.said(rank) for rank in self.pids):
            assert time.monotonic() < last, [self.said(rank, "err") for rank in self.pids]
            time.sleep(0.02)

    def said(self, rank: int, stream: str = "out") -> str:
        """What a process has printed."""
        path = self.folder / f"{rank}.{stream}"
        return path.read_text() if path.exists() else ""

    def wait(self, count: int | None = None) -> dict[int, int]:
        """Exit status by rank, when as many as that have ended; None = all."""
        while len(self.statuses) < (count or len(self.pids)):
            rank, status = map(int, self._lines.readline().split())
            self.statuses[rank] = status
        return self.statuses

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to those that have not ended."""
        for rank in ranks:
            if rank not in self.statuses:
                with suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)

    def close(self) -> None:
        """End them."""
        self.signal(signal.SIGKILL, *self.pids)
        self.wait()


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported what the others need, which are its forks."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", FORKS], env=env, **pipes) as process:  # type: ignore[call-overload]
        yield process


@pytest.fixture
def started(forks: subprocess.Popen[str], tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """started(body, count=2)."""
    ranks: list[Ranks] = []

    def start(body: str, count: int = 2) -> Ranks:
        ranks.append(Ranks(forks, tmp_path, body, count))
        ranks[-1].meet()
        return ranks[-1]

    yield start
    for each in ranks:
        each.close()


Started = Callable[..., Ranks]
FAILURES = {
    "refused": ("refuse(ValueError('no such data'))", "has ended: no such data"),
    "crashed": ("crash(KeyError('a bug'))", "has ended: KeyError: 'a bug'"),
    "uncaught": ("raise KeyError('a bug')", "has ended: KeyError: 'a bug'"),
    "stopped": ("raise KeyboardInterrupt", "has ended: KeyboardInterrupt"),
    "killed": ("os.kill(os.getpid(), 9)", "is silent: it has been killed, or its machine is gone"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "rank"),
    [("refused", 1), ("crashed", 0), ("uncaught", 1), ("stopped", 1), ("killed", 0), ("killed", 1)],
)
def test_who_waits_for_a_process_that_has_failed_ends_and_says_why(started: Started, failure: str, rank: int) -> None:
    statement, words = FAILURES[failure]
    ranks = started(f"if rank == {rank}:\n    {statement}\nwait()")
    assert ranks.wait() == {rank: {"killed": -signal.SIGKILL, "stopped": 130}.get(failure, 1), 1 - rank: 1}
    errors = ranks.said(1 - rank, "err")
    if failure == "killed" and rank == 0:  # and the store with it
        assert "process 1 of 2 has lost the first one: its machine may be gone\nAll processes end." in errors
        assert len(errors.splitlines()) < 60  # PyTorch prints a trace of its own where a connection is closed
    else:
        assert f"Error: process {rank} of 2 {words}\nAll processes end." in errors
    assert "All processes end" not in ranks.said(rank, "err")


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["uncaught", "killed"])
def test_a_broken_connection_is_told_as_what_has_broken_it(started: Started, failure: str) -> None:
    waiting = "launch._GRACE = 3\ntry:\n    state.wait_for_everyone()\nexcept Exception as error:\n    crash(error)"
    statement, _ = FAILURES[failure]
    words = {"uncaught": "process 0 of 2 has ended: KeyError: 'a bug'", "killed": "is gone without a word"}
    ranks = started(f"if rank == 0:\n    {statement}\n{waiting}")
    assert ranks.wait()[1] == 1
    assert words[failure] in ranks.said(1, "err")
    assert "Traceback" not in ranks.said(1, "err")


@pytest.mark.slow
def test_who_is_done_early_late_or_stopped_for_a_while_is_no_failure(started: Started) -> None:
    """The first process has the store, as a launcher may: while it is stopped, the others get no answer."""
    work = "on_main(state, lambda: [time.sleep(0.1) for _ in range(900) if not os.path.exists('go')])"
    ranks = started(f"{work}\nif rank == 0:\n    time.sleep(7)", 3)
    for stopped in (0, 1, 2), (0,):
        ranks.signal(signal.SIGSTOP, *stopped)
        time.sleep(7)  # 35 turns, of which 24 are too many
        ranks.signal(signal.SIGCONT, *stopped)
        time.sleep(1)
    (ranks.folder / "go").touch()
    assert ranks.wait() == {0: 0, 1: 0, 2: 0}
    assert [ranks.said(rank, "err") for rank in ranks.pids] == [""] * 3


@pytest.mark.slow
def test_a_process_ends_in_order_while_its_watch_asks(started: Started) -> None:
    hurry = "launch._TURN, launch._SILENT = 0.0005, 10**6\ntime.sleep(1 if rank else 2)"
    assert started(hurry, 4).wait() == dict.fromkeys(range(4), 0)


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["refused", "crashed", "uncaught"])
def test_a_failure_is_said_and_ends_its_process_where_no_store_answers(started: Started, failure: str) -> None:
    statement, words = FAILURES[failure]
    ranks = started(f"while rank == 0 or not os.path.exists('go'):\n    time.sleep(0.1)\n{statement}")
    ranks.signal(signal.SIGSTOP, 0)
    (ranks.folder / "go").touch()
    assert ranks.wait(1) == {1: 1}
    assert words.rpartition(": ")[2].strip("'") in ranks.said(1, "err")


@pytest.mark.slow
def test_a_process_that_can_not_print_ends_all_the_same(started: Started) -> None:
    ranks = started("sys.stderr = open('/dev/full', 'w')\nif rank == 1:\n    raise KeyError('a bug')\nwait()")
    assert ranks.wait() == {0: 1, 1: 1}


@pytest.mark.slow
def test_trackers_of_a_failed_training_are_finished_before_a_process_ends_the_others(started: Started) -> None:
    training = """
def fail(*_):
    raise TrainingError("no finite gradient")

def finish():
    time.sleep(0 if rank else 3)
    print("finished", flush=True)

try:
    Loop.run_to(SimpleNamespace(_run_to=fail, _finish_trackers=finish, accelerator=state), None, resume=False)
except TrainingError as error:
    refuse(error)
"""
    ranks = started(training)
    assert ranks.wait() == {0: 1, 1: 1}
    assert "finished" in ranks.said(0)
    assert (ranks.said(0, "err") + ranks.said(1, "err")).count("Error of process") == 1


def test_an_error_that_can_not_be_shown_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "end", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        launch._ending(Mock(side_effect=BrokenPipeError))(KeyError, KeyError("a bug"), None)


def test_more_processes_than_gpus_are_refused_before_they_meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    meeting = Mock(_shared_state={}, side_effect=AssertionError("they have met"))
    monkeypatch.setattr(launch, "PartialState", meeting)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    words = r"2 processes .*, but there are 1 GPUs to see \(CUDA_VISIBLE_DEVICES=3\).*Start 1 .*ACCELERATE_USE_CPU"
    with pytest.raises(ValueError, match=words):
        launch.joined()
    with pytest.raises(SystemExit) as stop, reporting(Console(), ""):
        pass
    assert stop.value.code == 1
    assert "Error: 2 processes were started" in capsys.readouterr().err


def test_as_many_processes_as_gpus_are_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launch._check_gpus()
