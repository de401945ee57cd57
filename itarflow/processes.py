"""What Accelerate leaves open about the processes of a training."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from itarflow.run import RunError


def on_cpu() -> bool:
    """Whether to train on the CPU: Accelerate only joins several processes there when it is told so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def use_all_cores(accelerator: Accelerator) -> None:
    """Undo the single thread that `accelerate launch` sets for training on CPUs unless it is told a number."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes_here))


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Act on the main process alone; its refusal reaches all processes, so that none waits for it."""
    refusal: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (RunError, OSError, ValueError) as error:
            refusal = [str(error)]
    broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise RunError(refusal[0])
