"""The first signal is a request, its echo is nothing, and a later one acts at once."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from itarflow.runtime import signals as interrupt
from itarflow.runtime.signals import StopSignal


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Shells start commands in the background with SIGINT ignored, nohup with SIGHUP, and then it stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_only_asks(number):
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert stop.signal_number == number


def test_an_echo_does_nothing():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # torchrun sends one after the terminal's
        assert stop.signal_number == signal.SIGINT


def test_a_later_signal_acts_as_usual(monkeypatch):
    monkeypatch.setattr(interrupt, "_ECHO_SECONDS", 0.01)
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_under_nohup_a_closed_terminal_does_not_stop():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_does_not_keep_the_step_from_ending():
    """What is printed after the hang-up would fail, and end the training before its state is saved."""
    code = (
        "import os, sys, time; from itarflow.runtime.signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.requested: time.sleep(0.01)\n"
        "    print('after', flush=True)\n"
        "    print(stop.signal_number, file=sys.stderr, flush=True)\n"
        "open(sys.argv[1], 'w').write('ended')"
    )
    master, slave = os.openpty()
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder, "mark")
        child = subprocess.Popen([sys.executable, "-c", code, str(mark)], stdout=slave, stderr=slave)
        os.close(slave)
        assert os.read(master, 5) == b"ready"
        os.close(master)
        child.send_signal(signal.SIGHUP)
        assert child.wait(60) == 0
        assert mark.read_text() == "ended"


def test_afterwards_signals_are_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
