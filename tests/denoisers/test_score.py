"""The score of a flow, and the denoiser that it makes: values, memory, and what is refused."""

import pytest
import torch
from conftest import few_variants
from torch.autograd.graph import saved_tensors_hooks

from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("noise_level", [torch.full((5,), 0.2), torch.tensor(0.2)], ids=["batch", "scalar"])
def test_one_noise_level_stands_for_all(make_flow, make_inputs, noise_level):
    flow = make_flow()
    images, labels, _ = make_inputs(flow, 5)
    denoiser = FlowDenoiser(flow)
    torch.testing.assert_close(denoiser(images, labels, noise_level), denoiser(images, labels, 0.2))


@pytest.mark.parametrize("slice_size", [2, 9])
def test_slices_change_no_score(make_flow, make_inputs, slice_size):
    flow = make_flow()
    images, labels, noise_level = make_inputs(flow, 5)
    batches = []
    sliced = FlowDenoiser(flow, slice_size)
    sliced.flow.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    expected = FlowDenoiser(flow).score(images, labels, noise_level)
    torch.testing.assert_close(sliced.score(images, labels, noise_level), expected)
    assert (max(batches), sum(batches)) == (min(slice_size, 5), 5)


def test_score_without_labels_is_that_of_null_labels(make_flow, make_inputs):
    flow = make_flow()
    images, _, noise_level = make_inputs(flow)
    denoiser = FlowDenoiser(flow, slice_size=2)
    null = torch.full((3,), flow.null_label)
    assert torch.equal(denoiser.score(images, None, noise_level), denoiser.score(images, null, noise_level))
    assert not torch.equal(denoiser.score(images, null, noise_level), denoiser.score(images, null + 1, noise_level))


@few_variants
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_callers_flow_is_only_read(flow, make_inputs, checkpointing):
    images, labels, noise_level = make_inputs(flow)
    frozen = next(flow.parameters())
    frozen.requires_grad_(False)
    flow.train()
    if checkpointing:
        flow.enable_gradient_checkpointing()
    originals = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    inputs = [v if v is None else v.clone() for v in (images, labels, noise_level)]
    FlowDenoiser(flow)(images, labels, 0.3 if noise_level is None else noise_level)
    assert flow.training
    assert all(p.grad is None for p in flow.parameters())
    assert all(p.requires_grad == (p is not frozen) for p in flow.parameters())
    assert all(torch.equal(tensor, originals[name]) for name, tensor in flow.state_dict().items())
    for now, before in zip((images, labels, noise_level), inputs, strict=True):
        assert now is None or torch.equal(now, before)
    assert not images.requires_grad


@few_variants
def test_the_denoiser_shares_the_weights_and_differentiates_none(flow):
    view = FlowDenoiser(flow).flow
    theirs = {name: tensor.data_ptr() for name, tensor in (*flow.named_parameters(), *flow.named_buffers())}
    assert {n: tensor.data_ptr() for n, tensor in (*view.named_parameters(), *view.named_buffers())} == theirs
    modules = (view, *(shared for block in view.blocks for shared in block.backbone))
    assert not any(p.requires_grad for module in modules for p in module.parameters())


@few_variants
def test_weights_updated_in_place_are_seen(flow, make_inputs):
    images, labels, noise_level = make_inputs(flow)
    level = 0.3 if noise_level is None else noise_level
    denoiser = FlowDenoiser(flow)
    before = denoiser.score(images, labels, level)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.1)
    after = denoiser.score(images, labels, level)
    assert torch.equal(after, FlowDenoiser(flow).score(images, labels, level))
    assert not torch.allclose(after, before)


@few_variants
@pytest.mark.parametrize(
    ("context", "built_inside"),
    [
        (torch.no_grad, False),
        (torch.inference_mode, False),
        (torch.inference_mode, True),
        (torch.enable_grad, True),
    ],
)
def test_scores_are_the_same_in_every_gradient_mode(flow, make_inputs, context, built_inside):
    images, labels, noise_level = make_inputs(flow)
    level = 0.3 if noise_level is None else noise_level
    denoiser = FlowDenoiser(flow)
    expected = denoiser.score(images, labels, level)
    with context():
        if built_inside:
            denoiser = FlowDenoiser(flow)
        score = denoiser.score(*make_inputs(flow)[:2], level)  # inputs born in this mode
        clean = denoise(denoiser, images * 1, labels, DenoiseScheduler(t_max=0.3, t_min=0.1, num_denoise_steps=2))
    assert torch.equal(score, expected)
    assert not score.requires_grad
    assert not clean.requires_grad
    torch.testing.assert_close(denoiser.score(images, labels, level), expected)


def test_scores_of_half_precision_weights_are_float32(make_flow, make_inputs):
    flow = make_flow()
    images, labels, noise_level = make_inputs(flow)
    expected = FlowDenoiser(flow).score(images, labels, noise_level)
    score = FlowDenoiser(flow.to(torch.bfloat16)).score(images, labels, noise_level)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, expected, atol=0.1, rtol=0.02)


def test_half_precision_images_are_scored_in_float32(make_flow, make_inputs):
    flow = make_flow()
    images, labels, noise_level = make_inputs(flow)
    images = images.to(torch.bfloat16)
    score = FlowDenoiser(flow).score(images, labels, noise_level)
    assert score.dtype == torch.float32
    assert torch.equal(score, FlowDenoiser(flow).score(images.float(), labels, noise_level))


# Cheaper ones

LARGER = {"image_size": 16, "channels": 64, "head_dim": 32, "num_layers": (2, 4), "noise_range": (0.01, 0.5)}


@few_variants
@pytest.mark.parametrize("options", [{"checkpointing": True}, {"dtype": torch.float64}], ids=str)
def test_options_that_change_no_score(flow, make_inputs, options):
    flow.double()
    images, labels, noise_level = make_inputs(flow)
    level = 0.3 if noise_level is None else noise_level
    expected = FlowDenoiser(flow).score(images, labels, level)
    torch.testing.assert_close(FlowDenoiser(flow, **options).score(images, labels, level), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ten_steps_in_bfloat16_change_images_by_less_than_a_grey_level(
    make_flow, make_inputs, randomise, checkpointing
):
    flow = make_flow(**LARGER, fresh=True)
    randomise(flow, std=0.03)
    images, labels, _ = make_inputs(flow)

    def clean(**options):
        denoiser = FlowDenoiser(flow, **options)
        return denoise(
            denoiser, images.clamp(-1, 1), labels, DenoiseScheduler(t_max=0.3, t_min=0.01, num_denoise_steps=10)
        )

    near, exact = clean(dtype=torch.bfloat16, checkpointing=checkpointing), clean()
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 2 / 255


@few_variants
def test_scores_in_bfloat16_are_near_those_of_every_flow(flow, make_inputs):
    images, labels, noise_level = make_inputs(flow)
    level = 0.3 if noise_level is None else noise_level
    expected = FlowDenoiser(flow).score(images, labels, level)
    score = FlowDenoiser(flow, dtype=torch.bfloat16).score(images, labels, level)
    assert score.dtype == torch.float32
    assert (score - expected).norm() < 0.01 * expected.norm()


def test_a_dtype_holds_whatever_the_callers_autocast_says(make_flow, make_inputs):
    flow = make_flow()
    inputs = make_inputs(flow)
    denoiser = FlowDenoiser(flow, dtype=torch.float32)
    expected = denoiser.score(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(denoiser.score(*inputs), expected)
        assert not torch.equal(FlowDenoiser(flow).score(*inputs), expected)


@few_variants
def test_only_layers_are_copied_in_another_dtype_and_the_callers_stay(flow):
    theirs = dict(flow.named_parameters())
    view = FlowDenoiser(flow, dtype=torch.bfloat16).flow
    for name, parameter in view.named_parameters():
        if ".layers." in name:
            assert parameter.dtype == torch.bfloat16
            torch.testing.assert_close(parameter.float(), theirs[name], atol=0, rtol=2**-8)
        else:
            assert parameter.data_ptr() == theirs[name].data_ptr()
    assert {parameter.dtype for parameter in flow.parameters()} == {torch.float32}


def kept_bytes(denoiser, inputs):
    """Of what is kept for the gradient, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in denoiser.flow.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        denoiser.score(*inputs)
    return sum(kept.values())


def test_memory_falls_with_the_dtype_and_with_checkpointing(make_flow, make_inputs):
    flow = make_flow(**LARGER)
    inputs = make_inputs(flow)
    plain, low, recomputed = (
        kept_bytes(FlowDenoiser(flow, **options), inputs)
        for options in ({}, {"dtype": torch.bfloat16}, {"checkpointing": True})
    )
    assert low < 0.6 * plain
    assert recomputed < 0.3 * plain


def test_frozen_weights_keep_no_inputs(make_flow, make_inputs):
    """A layer keeps what its norms, its attention and GELU need, which are 10 tensors of its width and some sums."""
    inputs = make_inputs(make_flow(**LARGER))
    few, more = (
        kept_bytes(FlowDenoiser(make_flow(**LARGER | {"num_layers": (2, layers), "mlp_ratio": 4})), inputs)
        for layers in (2, 4)
    )
    tokens = 3 * 63 * 64 * 4
    assert 9 * tokens < (more - few) / 2 < 10.5 * tokens


@pytest.mark.slow
def test_nothing_is_read_from_the_device(make_flow, make_inputs):
    """Tensors of the meta device have no values: to look at one is an error, as it is a wait on a GPU."""
    flow = make_flow(noise_range=(0.01, 0.5))
    images, labels, noise_level = (tensor.to("meta") for tensor in make_inputs(flow))
    for options in ({}, {"checkpointing": True}, {"dtype": torch.bfloat16}):
        denoiser = FlowDenoiser(flow.to("meta"), **options)
        assert denoiser(images, labels, noise_level).shape == images.shape
        assert (
            denoise(denoiser, images, labels, DenoiseScheduler(t_max=0.3, t_min=0.01, num_denoise_steps=2)).shape
            == images.shape
        )


def test_compiled_layers_are_those_of_the_view_alone(make_flow, make_inputs, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: lambda *args: calls.append(1) or call(*args))
    flow = make_flow()
    inputs = make_inputs(flow)
    expected = FlowDenoiser(flow).score(*inputs)
    assert not calls
    assert torch.equal(FlowDenoiser(flow, compiled=True).score(*inputs), expected)
    assert len(calls) == sum(flow.config.num_layers)
    flow(*inputs)
    assert len(calls) == sum(flow.config.num_layers)


@pytest.mark.slow
def test_layers_are_compiled_once_for_all_batch_sizes(make_flow, make_inputs, monkeypatch):
    graphs, compiled = [], torch.compile

    def note(module, inputs):
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled(call, backend=note, **options))
    torch._dynamo.reset()  # of what other tests compiled
    flow = make_flow()
    for dtype in (None, torch.bfloat16):
        denoiser = FlowDenoiser(flow, dtype=dtype, compiled=True, slice_size=4)
        for count in (6, 3, 4):
            inputs = make_inputs(flow, count)
            expected = FlowDenoiser(flow, dtype=dtype, slice_size=4).score(*inputs)
            torch.testing.assert_close(denoiser.score(*inputs), expected)
    assert len(graphs) == 2


# Memory that does not do


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def out_of_memory_beyond(denoiser, images, error=NO_MEMORY):
    """From now on more images at a time are too many; returns the sizes that are tried."""
    tried = []

    def attempt(module, args):
        tried.append(len(args[0]))
        if len(args[0]) > images:
            raise error

    denoiser.flow.register_forward_pre_hook(attempt)
    return tried


@pytest.mark.parametrize(("slice_size", "fits", "tried"), [(None, 3, [7, 3, 3, 1]), (4, 1, [4, 2, 1] + 6 * [1])])
def test_slices_are_halved_until_they_fit(make_flow, make_inputs, slice_size, fits, tried):
    flow = make_flow()
    inputs = make_inputs(flow, 7)
    denoiser = FlowDenoiser(flow, slice_size)
    sizes = out_of_memory_beyond(denoiser, fits)
    with pytest.warns(UserWarning, match=r"going on with \d.*denoise_batch_size"):
        score = denoiser.score(*inputs)
    torch.testing.assert_close(score, FlowDenoiser(flow).score(*inputs))
    assert sizes == tried
    sizes.clear()
    denoiser.score(*inputs)  # without a warning, which would fail: what fits is known
    assert max(sizes) <= fits


def test_finished_slices_are_not_computed_again(make_flow, make_inputs):
    flow = make_flow()
    inputs = make_inputs(flow, 8)
    denoiser = FlowDenoiser(flow, 4)
    sizes = out_of_memory_beyond(denoiser, 4)
    calls = iter([False, True, False, False])

    def sometimes(module, args):
        if next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    denoiser.flow.register_forward_pre_hook(sometimes)
    with pytest.warns(UserWarning, match="going on with 2"):
        score = denoiser.score(*inputs)
    assert sizes == [4, 4, 2, 2]
    torch.testing.assert_close(score, FlowDenoiser(flow).score(*inputs))


def test_a_single_image_that_does_not_fit_and_other_errors_are_raised(make_flow, make_inputs):
    flow = make_flow()
    denoiser = FlowDenoiser(flow, 1)
    out_of_memory_beyond(denoiser, 0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried"):
        denoiser.score(*make_inputs(flow))
    denoiser = FlowDenoiser(flow)
    sizes = out_of_memory_beyond(denoiser, 0, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        denoiser.score(*make_inputs(flow))
    assert sizes == [3]


# Refusals


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "bf16"])
def test_an_unfit_dtype_is_refused(make_flow, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*torch\.bfloat16"):
        FlowDenoiser(make_flow(), dtype=dtype)


@pytest.mark.parametrize("slice_size", [0, -1])
def test_an_impossible_slice_is_refused(make_flow, slice_size):
    with pytest.raises(ValueError, match=f"slice_size is {slice_size}.*>= 1"):
        FlowDenoiser(make_flow(), slice_size)


@pytest.mark.parametrize(
    ("labels", "noise_level", "words"),
    [
        (torch.tensor([0, 3, 1]), 0.2, r"labels \[3\]"),
        (torch.tensor([0, 1]), 0.2, "labels have shape"),
        (torch.tensor([0, 1, 2, 0]), 0.2, "labels have shape"),
        (None, 0.5, r"outside \[0\.1, 0\.3\]"),
        (None, 0.0, r"outside \[0\.1, 0\.3\]"),
        (None, torch.full((2,), 0.2), r"noise_level .*\(2,\)"),
    ],
    ids=str,
)
def test_the_score_refuses_what_log_prob_refuses(make_flow, make_inputs, labels, noise_level, words):
    flow = make_flow(noise_range=(0.1, 0.3))
    images = make_inputs(flow).images
    with pytest.raises(ValueError, match=words):
        FlowDenoiser(flow).score(images, labels, noise_level)


def test_the_score_refuses_images_of_another_shape(make_flow):
    with pytest.raises(ValueError, match="images have shape"):
        FlowDenoiser(make_flow()).score(torch.zeros(2, 2, 4, 5), None, 0.2)


def test_a_flow_without_a_noise_level_needs_none(make_flow, make_inputs):
    for noise_range in ((0.05, 0.05), None):
        flow = make_flow(noise_conditioned=False, noise_range=noise_range)
        images, labels, _ = make_inputs(flow)
        denoiser = FlowDenoiser(flow, slice_size=2)
        assert torch.equal(denoiser.score(images, labels), denoiser.score(images, labels, 0.05))


def test_a_flow_with_noise_levels_needs_one(make_flow, make_inputs):
    flow = make_flow()
    with pytest.raises(ValueError, match="noise_level is missing"):
        FlowDenoiser(flow).score(*make_inputs(flow)[:2])
