"""The peak of a process's resident memory on Linux, and what has to be done before it means anything."""

from __future__ import annotations

import os
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def give_back_freed_tensors() -> None:
    """Tell the C library of processes started from here on to return freed memory at once.

    By default it keeps so much that the peak says little about what is in use.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"


def one_step_of_a_tiny_model(device: torch.device) -> None:
    """What libraries load and allocate once is not the model's."""
    linear = torch.nn.Linear(8, 8).to(device)
    optimizer = torch.optim.AdamW(linear.parameters())
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            linear(torch.ones(8, 8, device=device)).sum().backward()
    optimizer.step()


def forget_peak() -> None:
    """From here on `peak_resident` tells of what comes; nothing on systems that can't."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def peak_resident() -> int:
    """The most that this process has had resident, in bytes.

    Raises:
        RuntimeError: this is no Linux.
    """
    for line in STATUS.read_text().splitlines() if STATUS.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM; expected Linux.")
