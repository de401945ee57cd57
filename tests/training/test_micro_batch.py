"""The micro-batch that fits is found by trying, and the global batch stays."""

import pytest
import torch
from accelerate import Accelerator
from tiny_training import losses, tiny_recipe

from itarflow.training import micro_batch as microbatch
from itarflow.training.micro_batch import find_accumulation
from itarflow.training.train import train


@pytest.fixture
def memory(monkeypatch):
    """memory(n): from now on a training step runs out of memory with more than n images."""

    def limit(images):
        def run_out(flow_output):
            if len(flow_output.z) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return original(flow_output)

        monkeypatch.setattr(microbatch, "nll_per_dim", run_out)

    original = microbatch.nll_per_dim
    return limit


@pytest.mark.parametrize(("fits", "accumulation"), [(1000, 1), (12, 1), (11, 2), (5, 3), (1, 12)])
def test_the_largest_divisor_of_the_batch_that_fits_is_taken(memory, fits, accumulation):
    memory(fits)
    assert find_accumulation(tiny_recipe(batch_size=12), Accelerator(cpu=True)) == accumulation


def test_no_image_at_all_is_refused_with_advice(memory):
    memory(0)
    with pytest.raises(ValueError, match=r"micro-batch of one image.*gradient-checkpointing"):
        find_accumulation(tiny_recipe(batch_size=4), Accelerator(cpu=True))


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(output):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(microbatch, "nll_per_dim", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_accumulation(tiny_recipe(), Accelerator(cpu=True))


@pytest.mark.slow
def test_a_training_with_the_micro_batch_found_has_the_losses_of_the_whole_batch(memory, tmp_path, capsys):
    train(tiny_recipe(), tmp_path / "whole", max_steps=3)
    memory(40)
    train(tiny_recipe(), tmp_path / "parts", max_steps=3, find_micro_batch=True)
    assert "4 micro-batches of 32 images a step" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
