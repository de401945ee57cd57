"""What a command says of a file that is not as expected: a message, no traceback, nothing that a terminal obeys."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from itarflow.commands import console
from itarflow.commands.info import Info

ERRORS = {
    "escapes": (OSError("\x1b]0;title\x07weights"), r"\x1b]0;title\x07weights"),
    "unicode": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
    "nesting": (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    "number": (OverflowError("int too big to convert"), "a number is too large (int too big to convert)"),
    "memory": (MemoryError("3 PiB"), "memory ran out (3 PiB)"),
    "allocator": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), "memory ran out"),
    "kernels": (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"), "memory ran out"),
    "cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "memory ran out"),
    "device": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "memory ran out"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_of_a_file_is_a_message(refused, monkeypatch, case):
    error, words = ERRORS[case]

    def fail(_self: Info) -> None:
        raise error

    monkeypatch.setattr(Info, "run", fail)
    message = refused("info", "somewhere")
    assert words in message
    assert message.isprintable() or message.strip("\n").isprintable()


def test_an_error_of_the_program_keeps_its_traceback(run, monkeypatch):
    def fail(_self: Info) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Info, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("info", "somewhere")


def test_a_gpu_that_can_not_be_used_is_refused_before_work_unless_another_device_is_named(capsys, monkeypatch):
    def fail(_state: object) -> None:
        raise ValueError("the GPU can't be used: no kernel image is available")

    monkeypatch.setattr(console, "check_own_gpu", fail)
    with pytest.raises(SystemExit), console.reporting(Console(), ""):
        raise AssertionError("work began")
    assert "Error: the GPU can't be used: no kernel image is available" in capsys.readouterr().err
    worked = []
    with console.reporting(Console(), "", device="cpu"):
        worked.append(True)
    assert worked
