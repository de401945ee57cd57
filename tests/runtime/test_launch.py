"""Processes of a launch do not wait for one that is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from itarflow.commands.console import reporting
from itarflow.runtime import launch

SCRIPT = '''
import os, sys, time
from itarflow.runtime import launch
from itarflow.runtime.processes import crash, on_main, refuse

launch._TURN, launch._GRACE = 0.2, 0.5
state = launch.joined()
rank = state.process_index
print("ready", rank, flush=True)


def wait():
    """As a process that NCCL keeps waiting, which hears nothing of the others."""
    time.sleep(120)


{body}
print("done", rank, flush=True)
'''


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """started(body): two processes of a launch without a launcher, which run this after they have met."""
    processes: list[subprocess.Popen[str]] = []

    def start(body: str, *, count: int = 2) -> list[subprocess.Popen[str]]:
        (tmp_path / "script.py").write_text(SCRIPT.format(body=body))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": "1",
        }
        for rank in range(count):
            env = {**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"}
            command = [sys.executable, str(tmp_path / "script.py")]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=env, **pipes))  # type: ignore[call-overload]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ended(processes: list[subprocess.Popen[str]], within: float) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    last = time.monotonic() + within
    outputs = [process.communicate(timeout=last - time.monotonic()) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


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
    [("refused", 1), ("crashed", 0), ("uncaught", 0), ("uncaught", 1), ("stopped", 1), ("killed", 0), ("killed", 1)],
)
def test_who_waits_for_a_process_that_has_failed_ends_and_says_why(
    started: Callable[..., list[subprocess.Popen[str]]], failure: str, rank: int
) -> None:
    statement, words = FAILURES[failure]
    processes = started(f"if rank == {rank}:\n    {statement}\nwait()")
    found = ended(processes, within=30)
    assert "done" not in found[0][1] + found[1][1]
    status, _, errors = found[1 - rank]
    assert status == 1
    if failure == "killed" and rank == 0:  # and the store with it
        assert "process 1 of 2 has lost the first one: its machine may be gone\nAll processes end." in errors
    else:
        assert f"Error: process {rank} of 2 {words}\nAll processes end." in errors
    assert found[rank][0] == {"killed": -signal.SIGKILL, "stopped": 130}.get(failure, 1)
    assert "All processes end" not in found[rank][2]


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["uncaught", "killed"])
def test_a_broken_connection_is_told_as_what_has_broken_it(
    started: Callable[..., list[subprocess.Popen[str]]], failure: str
) -> None:
    waiting = "try:\n    state.wait_for_everyone()\nexcept Exception as error:\n    crash(error)"
    statement, _ = FAILURES[failure]
    words = {"uncaught": "process 0 of 2 has ended: KeyError: 'a bug'", "killed": "is gone without a word"}
    _, (status, _, errors) = ended(started(f"if rank == 0:\n    {statement}\n{waiting}"), within=30)
    assert status == 1
    assert words[failure] in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_who_is_done_early_late_or_stopped_for_a_while_is_no_failure(
    started: Callable[..., list[subprocess.Popen[str]]],
) -> None:
    body = "launch._SILENT = 5\non_main(state, lambda: time.sleep(4))\nif rank == 0:\n    time.sleep(4)"
    processes = started(body, count=3)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    assert [(status, errors) for status, _, errors in ended(processes, within=60)] == [(0, "")] * 3


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
