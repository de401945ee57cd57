"""What recording does around a CUDA graph, with stand-ins for CUDA."""

import gc
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from itarflow.runtime import recording
from itarflow.runtime.recording import Lane, Recordings

DEVICE = torch.device("cuda", 0)


class Cuda:
    """Streams by name, and graphs that end as they are told to."""

    def __init__(self, error=None):
        self.stream, self.error, self.collects = "own", error, []

    def install(self, patch):
        patch.setattr(recording, "_FREE", {})
        patch.setattr(recording, "_new_pool", lambda: (0, 1))
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "Stream", lambda _: MagicMock())
        patch.setattr(torch.cuda, "CUDAGraph", MagicMock)
        patch.setattr(torch.cuda, "current_stream", lambda: MagicMock(spec=["wait_stream", "device_index"]))
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "set_stream", self.set_stream)
        patch.setattr(torch.cuda, "graph", self.graph)

    def set_stream(self, stream):
        self.stream = "own"

    @contextmanager
    def graph(self, _graph, **_options):
        self.stream = "of recording"
        self.collects.append(gc.isenabled())
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        if self.error is not None:
            raise self.error  # and does not leave the stream
        self.stream = "own"


def double(x):
    return 2 * x


def test_a_recording_waits_with_garbage(monkeypatch):
    cuda = Cuda()
    cuda.install(monkeypatch)
    Lane(DEVICE).record(double, torch.ones(2))
    assert (cuda.collects, gc.isenabled(), cuda.stream) == ([False], True, "own")


def test_what_cant_be_recorded_is_called_as_it_is(monkeypatch):
    cuda = Cuda(RuntimeError("profilers and graphs don't go together"))
    cuda.install(monkeypatch)
    lane = Lane(DEVICE)
    with pytest.warns(UserWarning, match="one by one, which is slower.*profilers"):
        assert lane.record(double, torch.ones(2)) is double
    assert lane.record(double, torch.ones(2)) is double  # nothing is tried again
    assert len(cuda.collects) == 1
    assert (cuda.stream, gc.isenabled()) == ("own", True)


@pytest.mark.parametrize("where", ["in the function", "at the end"])
def test_memory_that_runs_out_is_the_callers_to_solve(monkeypatch, where):
    cuda = Cuda(torch.OutOfMemoryError("CUDA out of memory.") if where == "at the end" else None)
    cuda.install(monkeypatch)
    calls = []

    def function(x):
        calls.append(x)
        if where == "in the function" and len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x

    with pytest.raises(RuntimeError):
        Lane(DEVICE).record(function, torch.ones(2))
    assert (cuda.stream, gc.isenabled()) == ("own", True)


def test_graphs_of_different_lanes_have_different_streams_which_are_used_again(monkeypatch):
    Cuda().install(monkeypatch)
    streams = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: streams.append(MagicMock()) or streams[-1])
    first, second = Lane(DEVICE), Lane(DEVICE)
    kept = [lane.record(double, torch.ones(2)) for lane in (first, second, first)]
    assert len(streams) == 2
    del first  # its graphs are still in use
    gc.collect()
    third = Lane(DEVICE)
    third.record(double, torch.ones(2))
    assert len(streams) == 3
    kept.clear()
    Lane(DEVICE).record(double, torch.ones(2))
    assert len(streams) == 3


def test_the_oldest_makes_room_before_a_new_one_is_made():
    recordings, there = Recordings(2), []
    for key in "abcab":
        recordings.get(key, lambda: there.append(len(recordings)) or object())
    assert there == [0, 1, 1, 1, 1]
