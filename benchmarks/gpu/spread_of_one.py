"""One process of a launch, as several would be: collectives, FSDP2 on a mesh of one, states saved and loaded.

python benchmarks/gpu/spread_of_one.py --cpu
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel

from itarflow.flow import TARFlow, nll_per_dim
from itarflow.training.sharding import clip_grad_norm, distribute
from itarflow.training.tensors import load_tensors, save_tensors


class Training(NamedTuple):
    """A sharded flow and all that belongs to it."""

    flow: TARFlow
    optimizer: torch.optim.Optimizer
    ema: EMAModel


def begun(accelerator: Accelerator) -> Training:
    """Always the same."""
    torch.manual_seed(0)
    flow = TARFlow(image_size=8, channels=64, num_layers=(1, 2), num_classes=3)
    flow.enable_gradient_checkpointing()
    distribute(flow, accelerator, sharded=True, bf16=True)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, fused=True)
    return Training(flow, optimizer, EMAModel(flow.parameters(), 0.9, foreach=True))


def step(training: Training, device: torch.device) -> tuple[float, float]:
    """Loss and gradient norm."""
    flow, optimizer, ema = training
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = nll_per_dim(flow(images, labels, torch.full((4,), 0.1, device=device))).mean()
    loss.backward()
    norm = clip_grad_norm(flow, 0.1)
    optimizer.step()
    optimizer.zero_grad()
    ema.step(flow.parameters())
    return float(loss.detach()), norm


def main(cpu: bool) -> None:
    """Raises AssertionError, or an error of the libraries, where something is not as it should be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    accelerator = Accelerator(cpu=cpu)
    device = accelerator.device
    print(f"{torch.distributed.get_backend()} on {device}, {accelerator.distributed_type}")
    assert gather_object([("a", 1)]) == [("a", 1)]
    assert broadcast_object_list(["b"]) == ["b"]
    assert accelerator.reduce({"sum": torch.ones(3, device=device)}, "sum")["sum"].tolist() == [1, 1, 1]
    one = begun(accelerator)
    taken = [step(one, device) for _ in range(3)]
    assert taken[-1][0] < taken[0][0], taken
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder), one.flow, one.optimizer, one.ema)
        other = begun(accelerator)
        load_tensors(Path(folder), other.flow, other.optimizer, other.ema)
    following = step(one, device), step(other, device)
    # Gradients of attention are summed in any order on a GPU.
    assert abs(following[0][0] - following[1][0]) < 1e-3, following
    print(f"losses and gradient norms {[tuple(round(value, 4) for value in pair) for pair in taken]}, resumed as well")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
    print("ended")


if __name__ == "__main__":
    main("--cpu" in sys.argv)
