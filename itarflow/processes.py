"""What Accelerate leaves open about the processes of a training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from itarflow.run import RunError


def on_cpu() -> bool:
    """Whether to train on the CPU: Accelerate only joins several processes there when it is told so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


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
