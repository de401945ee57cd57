"""What a call needs of the memory, and what is remembered from call to call."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from itarflow import DenoiseScheduler, FlowDenoiser, ITARFlowPipeline, TARFlow
from itarflow.pipeline import memory
from itarflow.runtime.recording import Recordings


@pytest.fixture
def pipe(make_flow):
    scheduler = DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2)
    pipe = ITARFlowPipeline(make_flow(in_channels=3), scheduler, guidance={"weight": 1.0})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(pipe, labels=(0, 1, 2, 0), **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(list(labels), generator=generator, output_type="codes", **options).images


def full_beyond(limit, monkeypatch, error):
    """The flow's inverse fails for more images than that; returns the numbers that it was asked for."""
    asked, inverse = [], TARFlow.inverse

    def attempt(flow, z, *rest, **named):
        asked.append(len(z))
        if len(z) > limit:
            raise error
        return inverse(flow, z, *rest, **named)

    monkeypatch.setattr(TARFlow, "inverse", attempt)
    return asked


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_a_call_halves_once_and_later_ones_do_not(pipe, monkeypatch, error):
    expected = images_of(pipe)
    asked = full_beyond(2, monkeypatch, error)
    with pytest.warns(UserWarning, match="making 4 images at a time does not fit the memory; going on with 2") as said:
        first = images_of(pipe)
    assert (asked, len(said)) == ([4, 2, 2], 1)
    torch.testing.assert_close(first, expected)
    asked.clear()
    assert torch.equal(images_of(pipe), first)
    assert asked == [2, 2]


def test_fewer_than_did_not_fit_are_tried_as_they_are_asked_for(pipe, monkeypatch):
    asked = full_beyond(3, monkeypatch, MemoryError())
    with pytest.warns(UserWarning, match="going on with 2"):
        images_of(pipe)
    asked.clear()
    images_of(pipe, batch_size=3)
    assert asked == [3, 1]


def test_scores_that_did_not_fit_are_not_tried_again(pipe, monkeypatch):
    expected, asked, score = images_of(pipe), [], FlowDenoiser._score

    def attempt(denoiser, noisy, *rest):
        asked.append(len(noisy))
        if len(noisy) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return score(denoiser, noisy, *rest)

    monkeypatch.setattr(FlowDenoiser, "_score", attempt)
    with pytest.warns(UserWarning, match="the score of 4 images .* going on with 2") as said:
        first = images_of(pipe)
    assert (asked, len(said)) == ([4, 2, 2, 2, 2], 1)
    torch.testing.assert_close(first, expected)
    asked.clear()
    assert torch.equal(images_of(pipe), first)
    with torch.no_grad():
        pipe.flow.proj_out.weight.mul_(2) if hasattr(pipe.flow, "proj_out") else next(pipe.flow.parameters()).mul_(2)
    images_of(pipe)  # of other weights, in other memory: still
    assert asked == [2] * 8


def test_the_denoiser_is_kept_while_weights_and_settings_stay(pipe):
    kept = pipe.flow_denoiser(dtype=torch.bfloat16)
    assert pipe.flow_denoiser(dtype=torch.bfloat16) is kept
    assert pipe.flow_denoiser(2, torch.bfloat16).slice_size == 2
    before = images_of(pipe, denoise_dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in pipe.flow.blocks[0].transformer.parameters():
            parameter.mul_(1.5)
    fresh = ITARFlowPipeline(pipe.flow, pipe.scheduler, guidance={"weight": 1.0})
    fresh.set_progress_bar_config(disable=True)
    after = images_of(pipe, denoise_dtype=torch.bfloat16)
    assert torch.equal(after, images_of(fresh, denoise_dtype=torch.bfloat16))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("leave", [lambda pipe: pipe.to("cpu"), lambda pipe: images_of(pipe)])
def test_no_weights_are_kept_where_the_flow_has_left(pipe, leave):
    """By `to`, and by offloading, after each call."""
    images_of(pipe)
    kept = weakref.ref(pipe.flow_denoiser())
    pipe.flow._hf_hook = SimpleNamespace(pre_forward=lambda flow: None)
    leave(pipe)
    gc.collect()
    assert kept() is None


# -- too little for one image -----------------------------------------------------------------------------------


@pytest.fixture
def never(monkeypatch):
    def inverse(*_args, **_named):
        raise AssertionError("work began before the refusal")

    monkeypatch.setattr(TARFlow, "inverse", inverse)


def free(monkeypatch, count):
    monkeypatch.setattr(memory, "usable_memory", lambda device: count)


def cache_bytes(pipe, rows, size):
    return max(torch.Size(block.cache_shape(rows)).numel() for block in pipe.flow.blocks) * size


def test_a_cache_that_can_not_fit_is_refused_before_work(pipe, monkeypatch, never):
    needed = cache_bytes(pipe, 2, 4)  # guided
    free(monkeypatch, needed - 1)
    message = (
        r"one image needs at least 1 KiB for the flow's inverse.*cpu \(cpu\) has .* free.*bfloat16 for inverse_dtype"
    )
    with pytest.raises(ValueError, match=message):
        images_of(pipe, method="skip")


@pytest.mark.parametrize(
    ("options", "rows", "size"), [({}, 2, 4), ({"guidance_weight": 0.0}, 1, 4), ({"labels": (None,)}, 1, 4)]
)
def test_what_may_fit_is_made(pipe, monkeypatch, options, rows, size):
    free(monkeypatch, cache_bytes(pipe, rows, size) - 1)
    with pytest.raises(ValueError, match="one image needs at least"):
        images_of(pipe, method="skip", **options)
    free(monkeypatch, cache_bytes(pipe, rows, size))
    assert images_of(pipe, method="skip", **options).isfinite().all()


def test_a_score_that_can_not_fit_is_refused_before_work(pipe, monkeypatch, never):
    free(monkeypatch, cache_bytes(pipe, 2, 4))
    with pytest.raises(ValueError, match=r"for a score.*bfloat16 for denoise_dtype"):
        images_of(pipe)


def test_recordings_of_other_calls_make_room(pipe, monkeypatch):
    needed, recordings = cache_bytes(pipe, 2, 4), Recordings()
    with recordings.turn(torch.device("cpu")):
        recordings.get(0, object)
    monkeypatch.setattr(memory, "usable_memory", lambda device: needed - len(recordings))
    assert images_of(pipe, method="skip").isfinite().all()
    assert len(recordings) == 0


def test_what_has_fitted_is_not_refused_because_its_memory_is_kept(pipe, monkeypatch):
    images_of(pipe)
    free(monkeypatch, 0)
    assert images_of(pipe).isfinite().all()


def test_on_a_gpu_the_cast_weights_of_all_blocks_count(pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(
        ITARFlowPipeline, "_make", lambda pipe, call, size: calls.append(call) or torch.zeros(4, 3, 4, 4)
    )
    images_of(pipe, method="skip", inverse_dtype=torch.bfloat16)
    cast = [2 * sum(p.numel() for p in block.transformer.parameters()) for block in pipe.flow.blocks]
    cache = cache_bytes(pipe, 2, 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    for device, needed in (("cpu", cache + max(cast)), ("cuda", cache + sum(cast))):
        where = torch.device(device)
        moved = 0 if device == "cpu" else 4 * sum(p.numel() for p in pipe.flow.parameters())
        free(monkeypatch, needed + moved)
        memory.check_memory(pipe.flow, calls[0], where)
        free(monkeypatch, needed + moved - 1)
        with pytest.raises(ValueError, match=f"but {device} "):
            memory.check_memory(pipe.flow, calls[0], where)


def test_where_the_memory_is_not_known_nothing_is_refused(pipe, monkeypatch):
    free(monkeypatch, None)
    assert images_of(pipe).isfinite().all()


def test_the_estimate_of_a_score_is_near_what_is_kept(make_flow):
    """By counting what autograd saves, once each, without the weights."""
    flow = make_flow(image_size=16, patch_size=1, in_channels=3, channels=64, head_dim=32, num_layers=(3, 3))
    pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.05))
    saved, weights = {}, {p.untyped_storage().data_ptr() for p in pipe.flow_denoiser().flow.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pipe.flow_denoiser().score(torch.randn(1, 3, 16, 16), None, 0.5)
    estimate = memory.score_bytes(pipe.flow_denoiser().flow)
    assert 0.6 * sum(saved.values()) < estimate < 1.05 * sum(saved.values())
