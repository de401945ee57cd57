"""The micro-batch that fits is found by trying, and the global batch stays."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_training import losses, tiny_recipe

from itarflow.flow import TARFlow
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


def test_captions_are_tried_too(memory, monkeypatch):
    memory(5)
    recipe = tiny_recipe(batch_size=12, num_classes=0, rotary_side=2, context_dim=8, context_tokens=3)
    seen, original = [], TARFlow.forward
    monkeypatch.setattr(
        TARFlow, "forward", lambda *args, context: seen.append(context.shape) or original(*args, context=context)
    )
    assert find_accumulation(recipe, Accelerator(cpu=True)) == 3
    assert set(seen) == {(size, 3, 8) for size in (12, 6, 4)}


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


@pytest.mark.parametrize("error", [None, RuntimeError("shapes do not match")])
def test_trials_on_a_gpu_leave_a_part_of_its_memory_and_come_after_the_first_message(monkeypatch, error):
    events, device = [], torch.device("cuda", 1)

    def noting(name):
        return lambda *args, **_: events.append((name, *args)) or list(*args[:1])

    def trial(_recipe, _accelerator, size):
        events.append(("trial", size))
        if error is not None:
            raise error
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(microbatch, "gather_object", noting("gather"))
    monkeypatch.setattr(microbatch, "_try_steps", trial)
    monkeypatch.setattr(microbatch, "clear_device_cache", lambda **_: events.append(("clear",)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0, raising=False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *to: events.append(("fraction", *to)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: events.append(("peak",)))
    accelerator = SimpleNamespace(num_processes=2, device=device)
    before = [("gather", [0]), ("fraction", 0.92, device), ("trial", 6)]
    after = [("fraction", 1.0, device), ("peak",)]
    if error is not None:
        with pytest.raises(RuntimeError, match="shapes"):
            find_accumulation(tiny_recipe(batch_size=12), accelerator)
        assert events == [*before, *after]
        return
    assert find_accumulation(tiny_recipe(batch_size=12), accelerator) == 2
    assert events == [*before, ("clear",), ("trial", 3), ("clear",), *after, ("gather", [2])]


@pytest.mark.slow
def test_a_training_with_the_micro_batch_found_has_the_losses_of_the_whole_batch(memory, tmp_path, capsys):
    train(tiny_recipe(), tmp_path / "whole", max_steps=3)
    memory(40)
    train(tiny_recipe(), tmp_path / "parts", max_steps=3, find_micro_batch=True)
    assert "4 micro-batches of 32 images a step" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
