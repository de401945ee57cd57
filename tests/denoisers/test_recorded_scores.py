"""Scores of small batches by recorded functions, here without a GPU: they are the eager ones, whatever changes."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import few_variants

from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise, score
from itarflow.runtime import repeated
from itarflow.runtime.devices import tf32_products
from itarflow.runtime.recording import Lane, release_recordings

recorded = []


def as_a_graph(lane, function, *inputs):
    """What a CUDA graph does, without one: inputs and result stay at one address, and nothing else is looked at."""
    given = [tensor.clone() for tensor in inputs]
    found = function(*given).clone()
    recorded.append([tuple(tensor.shape) for tensor in given])

    def play(*inputs):
        for buffer, value in zip(given, inputs, strict=True):
            assert (buffer.shape, buffer.dtype) == (value.shape, value.dtype)
            buffer.copy_(value)
        return found.copy_(function(*given))

    return play


@pytest.fixture(autouse=True)
def _recorded_here(monkeypatch):
    monkeypatch.setattr(repeated, "DEVICES", {"cpu"})
    monkeypatch.setattr(Lane, "record", as_a_graph)
    recorded.clear()


def eager(flow, *inputs, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "DEVICES", set())
        return FlowDenoiser(flow, **options).score(*inputs)


def cases(flow, make_inputs, count=3):
    """Of the same shapes."""
    for seed in range(4):
        images, labels, level = make_inputs(flow, count, seed)
        labels = None if labels is None else labels.roll(seed)
        yield images, labels, 0.3 if level is None else level / (1 + seed)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_scores_are_those_of_what_is_given(flow, make_inputs, dtype):
    denoiser = FlowDenoiser(flow, dtype=dtype)
    found = [denoiser.score(*inputs) for inputs in cases(flow, make_inputs)]
    assert len(recorded) == 1  # at the second
    for one, inputs in zip(found, cases(flow, make_inputs), strict=True):
        assert torch.equal(one, eager(flow, *inputs, dtype=dtype))


@few_variants
def test_what_comes_once_is_not_recorded(flow, make_inputs):
    images, labels, _ = make_inputs(flow, 4)
    denoiser = FlowDenoiser(flow)
    for count in (1, 2, 3):
        denoiser.score(images[:count], None if labels is None else labels[:count], 0.3)
    denoiser.score(images.double()[:1], None if labels is None else labels[:1], 0.3)
    assert not recorded


def test_shapes_in_turn_keep_their_recordings(make_flow, make_inputs):
    flow = make_flow()
    denoiser = FlowDenoiser(flow)
    for images, labels, level in cases(flow, make_inputs, 5):
        for given in (
            (images, labels, level),
            (images[:2], labels[:2], level[:2]),
            (images, None, level),
            (images, labels, 0.2),
        ):
            assert torch.equal(denoiser.score(*given), eager(flow, *given))
    assert len(recorded) == 4


@few_variants
def test_weights_that_change_in_place_are_seen(flow, make_inputs):
    *_, inputs = cases(flow, make_inputs)
    denoiser = FlowDenoiser(flow)
    before = [denoiser.score(*inputs) for _ in range(2)]
    with torch.no_grad():
        for tensor in (*flow.parameters(), flow.prior_variance):
            tensor.mul_(1.1)
    after = denoiser.score(*inputs)
    assert len(recorded) == 1
    assert torch.equal(after, eager(flow, *inputs))
    assert torch.equal(*before)  # and no earlier result is overwritten
    assert not torch.allclose(after, before[1])


def test_weights_that_move_are_recorded_anew(make_flow, make_inputs):
    flow = make_flow()
    *_, inputs = cases(flow, make_inputs)
    denoiser = FlowDenoiser(flow)
    for _ in range(2):
        denoiser.score(*inputs)
    denoiser.flow.double()
    found = [denoiser.score(*inputs) for _ in range(3)]
    assert len(recorded) == 2
    for one in found:
        assert torch.equal(one, eager(flow.double(), *inputs))


def test_the_precision_of_products_is_recorded(make_flow, make_inputs):
    flow = make_flow()
    *_, inputs = cases(flow, make_inputs)
    denoiser = FlowDenoiser(flow)
    for allowed in (False, True, False):
        with tf32_products(allowed):
            for _ in range(2):
                denoiser.score(*inputs)
    assert len(recorded) == 2


def test_recordings_can_be_given_back(make_flow, make_inputs):
    flow = make_flow()
    *_, inputs = cases(flow, make_inputs)
    denoiser = FlowDenoiser(flow)
    for _ in range(2):
        for _ in range(3):
            found = denoiser.score(*inputs)
        assert release_recordings()
    assert not release_recordings()
    assert len(recorded) == 2
    assert torch.equal(found, eager(flow, *inputs))


def test_copies_of_a_denoiser_record_themselves(make_flow, make_inputs):
    flow = make_flow()
    *_, inputs = cases(flow, make_inputs)
    denoiser = FlowDenoiser(flow)
    expected = denoiser.score(*inputs)
    assert torch.equal(denoiser.score(*inputs), expected)
    for other in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        with torch.no_grad():
            denoiser.flow.prior_variance.mul_(1.5)
        for _ in range(3):
            assert torch.equal(other.score(*inputs), expected)
    assert len(recorded) == 3


def test_large_batches_are_not_recorded(make_flow, make_inputs, monkeypatch):
    flow = make_flow()  # 4 tokens of 8 channels
    monkeypatch.setattr(score, "_HOST_BOUND", 2 * 32)
    denoiser, sliced = FlowDenoiser(flow), FlowDenoiser(flow, slice_size=2)
    for inputs in cases(flow, make_inputs, 6):
        assert torch.equal(denoiser.score(*inputs), eager(flow, *inputs))
    assert not recorded
    for inputs in cases(flow, make_inputs, 6):
        torch.testing.assert_close(sliced.score(*inputs), eager(flow, *inputs))
    assert recorded == [[(2, 2, 4, 4), (2,), (2,)]]


@pytest.mark.parametrize("how", ["checkpointing", "own checkpointing", "autocast"])
def test_what_a_graph_does_not_hold_is_not_recorded(make_flow, make_inputs, how):
    flow = make_flow()
    if how == "own checkpointing":
        flow.enable_gradient_checkpointing()
    denoiser = FlowDenoiser(flow, checkpointing=how == "checkpointing")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for inputs in cases(flow, make_inputs):
            denoiser.score(*inputs)
    assert not recorded


@few_variants
def test_steps_in_inference_mode_are_recorded(flow, make_inputs):
    images, labels, _ = make_inputs(flow)
    schedule = DenoiseScheduler(t_max=0.3, t_min=0.1, num_denoise_steps=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "DEVICES", set())
        expected = denoise(FlowDenoiser(flow), images, labels, schedule)
    denoiser = FlowDenoiser(flow)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            found = denoise(denoiser, *make_inputs(flow)[:2], schedule)
        assert torch.equal(found, expected)
        assert not found.requires_grad
    assert len(recorded) == 1


def test_two_threads_take_turns(make_flow, make_inputs):
    flow = make_flow()
    denoiser, wrong, barrier = FlowDenoiser(flow), [], threading.Barrier(2)
    given = list(cases(flow, make_inputs, 2))[:2]
    expected = [eager(flow, *inputs) for inputs in given]
    assert not torch.equal(*expected)

    def work(own):
        barrier.wait()
        for _ in range(20):
            if not torch.equal(denoiser.score(*given[own]), expected[own]):
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(recorded) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_cuda_graphs_give_the_eager_scores(make_flow, make_inputs, monkeypatch, dtype):
    monkeypatch.undo()
    flow = make_flow(image_size=16, patch_size=1, channels=32, head_dim=16, num_layers=(2, 2)).cuda()
    denoiser = FlowDenoiser(flow, dtype=dtype)
    for images, labels, level in cases(flow, make_inputs):
        given = images.cuda(), labels.cuda(), level.cuda() if isinstance(level, torch.Tensor) else level
        found = denoiser.score(*given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(score, "_HOST_BOUND", 0)
            torch.testing.assert_close(found, denoiser.score(*given), atol=1e-3, rtol=1e-3)
    assert len(denoiser._recordings) == 1
