"""What a GPU computes, on fake tensors: devices and dtypes fit, nothing waits for the device, launches are counted."""

from contextlib import nullcontext

import pytest
import torch
from conftest import few_variants
from diffusers import DDPMScheduler, UNet2DModel
from fake_cuda import Launches, fake_autocast, fake_cuda, on_fake_cuda
from tiny_diffusion import UNET
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from itarflow.codec import codec_of
from itarflow.denoisers import DenoiseScheduler, DiffusionDenoiser, FlowDenoiser, denoise
from itarflow.denoisers.ode import SOLVERS
from itarflow.inverse import Guidance, Jacobi, sequential
from itarflow.pipeline.call import Call, generate

GUIDANCE = Guidance(weight=1.5, temperature=1.2)


@pytest.fixture(autouse=True)
def gpu():
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
    """Once each time. It is told that all images know one token more, and one of them two, none of which overflows."""
    flow, images, labels, level = inputs
    totals = [block.num_tokens for block in reversed(flow.blocks)]
    told = [[low, min(low + 1, total), 0, 0] for total in totals for low in range(2, total + 1)]
    looks = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda flags: looks.append(tuple(flags.shape)) or told[len(looks) - 1])
    assert_on_gpu(
        flow.inverse(flow.sample_prior(3, None), labels, level, guidance=GUIDANCE, solver=solver), images.shape
    )
    assert looks == [(4,)] * len(told)


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


@pytest.mark.parametrize("given", ["labels", "no labels", "no classes"])
def test_a_diffusion_models_steps_wait_for_nothing(given):
    """Except for the labels, which are checked once."""
    model = UNet2DModel(**UNET, num_class_embeds=None if given == "no classes" else 4)
    denoiser = DiffusionDenoiser(model, DDPMScheduler(), null_label=None if given == "no classes" else 3)
    on_fake_cuda(denoiser.model)
    images = torch.randn(2, 2, 4, 4, device="cuda")
    labels = None if given == "no labels" else torch.zeros(2, dtype=torch.int64, device="cuda")
    schedule = DenoiseScheduler(t_max=0.5, t_min=0.01, num_denoise_steps=3)
    if given == "labels":
        with pytest.raises(DataDependentOutputException):
            denoise(denoiser, images, labels, schedule)
        denoiser._checked = labels
    assert_on_gpu(denoise(denoiser, images, labels, schedule), images.shape)


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
    """What a further layer of the last block launches in `measured(flow, images, labels, level)`, and all else."""
    few, more = (
        measured(*faked_inputs(make_flow, **LARGER | {"num_layers": (1, layers)} | changes)) for layers in (1, 2)
    )
    return more - few, few - (more - few)


# A layer: four products, two norms, GELU, attention, the cache is written, two sums over layers. In bfloat16 what the
# norms give is cast to it, and both products that are added are cast back.
# Besides: the embedding and the head, the affine maps of both passes, their guidance, and the token.
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "layer", "others"), [(torch.float32, 11, 13), (torch.bfloat16, 15, 13)], ids=str)
def test_launches_of_a_token(make_flow, dtype, layer, others):
    """Of a guided block, in the loop on the device, by PyTorch's kernels alone."""

    def token(flow, images, labels, level):
        block, x = flow.blocks[-1], torch.zeros(3, *flow.z_shape, device="cuda")
        passes = block.condition(3, labels, level), block.condition(3, None, level)
        conditioner = block.conditioner(*passes, Guidance(weight=1.5), dtype)
        counts = []
        for tokens in (1, 2):
            with Launches() as counted:
                conditioner.solve(x, x, torch.zeros(1, dtype=torch.int64, device="cuda"), tokens, 8)
            counts.append(counted.by_name)
        return counts[1] - counts[0]

    assert_at_most(launches(make_flow, token), layer, others)


# A layer: four products, two norms, GELU, attention, two sums. Besides: twice the condition, 25, the embedding, the
# head and the affine map.
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "others"), [(torch.float32, 92), (torch.bfloat16, 96)], ids=str)
def test_launches_of_a_forward_pass(make_flow, dtype, others):
    def forward(flow, images, labels, level):
        with Launches() as counted:
            flow(images, labels, level)
        return counted.by_name

    assert_at_most(launches(make_flow, forward, dtype=dtype), 10, others)


def assert_at_most(found, layer, others):
    """Fewer are welcome: then lower the numbers."""
    assert all(have.total() <= most for have, most in zip(found, (layer, others), strict=True)), found
