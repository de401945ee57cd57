"""The first signal is a request, its echo is nothing, and a later one acts at once."""

import signal
import time
from collections.abc import Iterator

import pytest

from itarflow.runtime import signals as interrupt
from itarflow.runtime.signals import StopSignal


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Shells start commands in the background with SIGINT ignored, and then it stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_afterwards_signals_are_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
