"""What a GPU computes, on fake tensors: devices and dtypes fit, nothing waits for the device, launches are counted."""

from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import few_variants
from fake_cuda import Launches, fake_autocast, fake_cuda, on_fake_cuda
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from itarflow.codec import codec_of
from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise
from itarflow.denoisers.ode import SOLVERS
from itarflow.flow import block
from itarflow.inverse import Guidance, Jacobi, sequential
from itarflow.inverse.cuda_graph import GraphedConditioner
from itarflow.pipeline.call import Call, generate

GUIDANCE = Guidance(weight=1.5, temperature=1.2)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    plain = partial(GraphedConditioner, record=lambda function, *_: function)  # nothing can be recorded
    monkeypatch.setattr(block, "GraphedConditioner", plain)
    with fake_cuda():
        yield


@pytest.fixture(params=["float32", "bf16", "autocast"])
def precision(request):
    """How the layers compute: in float32, with weights in bf16, or under autocast."""
    return request.param


@pytest.fixture
def inputs(gpu, make_flow, precision, variant):
    """A flow on the GPU, images, labels and noise levels."""
    return faked_inputs(make_flow, torch.bfloat16 if precision == "bf16" else torch.float32, **variant)


def faked_inputs(make_flow, dtype=torch.float32, count=3, **changes):
    flow = on_fake_cuda(make_flow(**changes).to(dtype))
    flow._decoding_checked = True  # by its first inversion, which looks at values once
    images = torch.randn(count, *flow.image_shape, device="cuda")
    labels = torch.zeros(count, dtype=torch.int64, device="cuda") if flow.config.num_classes else None
    level = torch.full((count,), 0.3, device="cuda") if flow.config.noise_conditioned else None
    return flow, images, labels, level


def cast(precision):
    return fake_autocast() if precision == "autocast" else nullcontext()


def assert_on_gpu(tensor, shape):
    assert (tensor.device.type, tensor.dtype, tuple(tensor.shape)) == ("cuda", torch.float32, tuple(shape))


def test_a_look_at_a_value_is_an_error():
    with pytest.raises(DataDependentOutputException):
        torch.ones(3, device="cuda").sum().item()
    with pytest.raises(DataDependentOutputException):
        bool((torch.ones(3, device="cuda").cpu() > 0).all())


def test_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="devices"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_the_flow_and_its_density(inputs, precision):
    flow, images, labels, level = inputs
    images.requires_grad_()
    with cast(precision):
        z, log_det = flow(images, labels, level)
        log_prob = flow.log_prob(images, labels, level)
    assert z.requires_grad
    assert_on_gpu(z, (3, *flow.z_shape))
    assert_on_gpu(log_det, (3,))
    assert_on_gpu(log_prob, (3,))


def test_a_sample_waits_for_nothing(inputs, precision):
    flow, images, labels, level = inputs
    for generators in (None, [torch.Generator().manual_seed(seed) for seed in range(3)]):
        z = flow.sample_prior(3, generators)
        assert_on_gpu(z, (3, *flow.z_shape))
    with cast(precision):
        assert_on_gpu(flow.inverse(z, labels, level, guidance=GUIDANCE), images.shape)


@few_variants
@pytest.mark.parametrize("precision", ["float32"])
@pytest.mark.parametrize("solver", [Jacobi(), Jacobi(window=1), Jacobi(tolerance=0.0)], ids=str)
def test_an_iteration_looks_at_its_flags_alone(inputs, solver, monkeypatch):
    """Once, each time; in what it is told here a further token of each image has converged."""
    flow, images, labels, level = inputs
    known, looks = {}, []

    def flags(tensor):
        """(the least known tokens, the most, whether guesses overflowed, finished images)."""
        looks.append(tensor.shape)
        known[None] = known.get(None, 1) + 1
        return [known[None], known[None], 0, 0]

    monkeypatch.setattr(FakeTensor, "tolist", flags)
    for one in flow.blocks:
        inverse = one.inverse
        monkeypatch.setattr(one, "inverse", lambda *args, inverse=inverse: known.clear() or inverse(*args))
    assert_on_gpu(
        flow.inverse(flow.sample_prior(3, None), labels, level, guidance=GUIDANCE, solver=solver), images.shape
    )
    assert looks == [(4,)] * sum(one.num_tokens - 1 for one in flow.blocks)


@pytest.fixture
def no_engine(monkeypatch):
    """Autograd's engine wants a device: here gradients are zero."""
    monkeypatch.setattr(torch.autograd, "grad", lambda of, inputs: (torch.zeros_like(inputs),))


def test_a_score_waits_for_nothing(inputs, precision, no_engine):
    flow, images, labels, level = inputs
    with cast(precision):
        for given in (0.3, 0.3 if level is None else level):
            assert_on_gpu(FlowDenoiser(flow)(images, labels, given), images.shape)


@few_variants
@pytest.mark.parametrize("method", list(SOLVERS))
def test_a_denoising_step_waits_for_nothing(make_flow, variant, method, no_engine):
    flow, images, labels, _ = faked_inputs(make_flow, noise_range=(0.01, 0.5), **variant)
    schedule = DenoiseScheduler(t_max=0.3, t_min=0.1, num_denoise_steps=4, method=method, clip=True)
    assert_on_gpu(denoise(FlowDenoiser(flow), images, labels, schedule), images.shape)


LARGER = {"image_size": 8, "channels": 16, "head_dim": 8, "num_layers": (2, 5)}
"""With heads of a width for which a GPU has fused attention."""


def test_images_in_bf16_wait_for_nothing(make_flow, no_engine):
    """Noise -> inverse -> denoising -> pixels, with the layers alone in bf16."""
    denoiser = FlowDenoiser(make_flow(**LARGER), dtype=torch.bfloat16)
    on_fake_cuda(denoiser.flow)
    flow, _, labels, _ = faked_inputs(make_flow, **LARGER)
    call = Call(
        labels=labels,
        generators=[torch.Generator().manual_seed(seed) for seed in range(3)],
        guidance=GUIDANCE,
        solver=sequential,
        inverse_dtype=torch.bfloat16,
        denoiser=denoiser,
        build_denoiser=lambda: denoiser,
        schedule=DenoiseScheduler(t_max=0.3, t_min=0.1, num_denoise_steps=2, method="sde"),
        codec=codec_of(None),
    )
    assert_on_gpu(generate(flow, call, lambda _: None), (3, *flow.image_shape))


# Launches


def launches(make_flow, measured, **changes):
    """What one layer more launches, and all others, in `measured(flow, images, labels, level)`."""
    few, more = (
        measured(*faked_inputs(make_flow, **LARGER | {"num_layers": (2, layers)} | changes)) for layers in (2, 3)
    )
    layer = more - few
    return layer.total(), (few - Counter({name: 2 * count for name, count in layer.items()})).total(), layer


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "layer", "others"), [(torch.float32, 0, 0), (torch.bfloat16, 0, 0)], ids=str)
def test_launches_of_a_token(make_flow, dtype, layer, others):
    def token(flow, images, labels, level):
        last = flow.blocks[-1]
        passes = last.condition(3, labels, level), last.condition(3, None, level)
        conditioner = block.GraphedConditioner(last.conditioner(*passes, Guidance(weight=1.5), dtype))
        with Launches() as counted:
            conditioner(torch.randn(3, 1, images.shape[1] * 4, device="cuda"), 5)
        return counted.by_name

    assert launches(make_flow, token) == (layer, others)


@torch.no_grad()
@pytest.mark.parametrize(("precision", "layer", "others"), [("float32", 0, 0), ("bf16", 0, 0)])
def test_launches_of_a_forward_pass(make_flow, precision, layer, others):
    def forward(flow, images, labels, level):
        with Launches() as counted:
            flow(images, labels, level)
        return counted.by_name

    assert launches(make_flow, forward, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) == (
        layer,
        others,
    )
