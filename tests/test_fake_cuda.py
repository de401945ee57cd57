"""What a GPU computes, on fake tensors: devices and dtypes fit, nothing waits for the device, launches are counted."""

from contextlib import nullcontext

import pytest
import torch
from conftest import VARIANTS, few_variants
from diffusers import DDPMScheduler, UNet2DModel
from fake_cuda import Launches, fake_autocast, fake_cuda, on_fake_cuda
from tiny_diffusion import UNET
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from itarflow.codec import codec_of
from itarflow.denoisers import DenoiseScheduler, DiffusionDenoiser, FlowDenoiser, denoise
from itarflow.denoisers.ode import SOLVERS
from itarflow.flow import TARFlow, log_density
from itarflow.flow.block import FlowOutput
from itarflow.flow.transformer import Layer
from itarflow.inverse import Guidance, Jacobi, sequential
from itarflow.pipeline.call import Call, generate

GUIDANCE = Guidance(weight=1.5, temperature=1.2)


@pytest.fixture(autouse=True)
def gpu():
    with fake_cuda():
        yield


PRECISIONS = ["layers", "float32", "bf16", "autocast"]
"""The layers alone in bf16, as images are generated on a GPU, or all in one type, or as autocast has it."""
MOST = ("no_classes", "all_at_once")
"""Variants in each precision; of the others, all but the first are slow."""
every_precision = pytest.mark.parametrize(
    ("variant", "precision"),
    [
        pytest.param(variant, one, marks=() if one == "layers" or variant in MOST else pytest.mark.slow)
        for variant in VARIANTS
        for one in PRECISIONS
    ],
    indirect=["variant"],
)


@pytest.fixture
def inputs(gpu, make_flow, precision, variant):
    """A flow on the GPU, images, labels and noise levels."""
    return faked_inputs(make_flow, precision, **variant)


def faked_inputs(make_flow, precision="float32", count=3, **changes):
    flow = make_flow(**changes)
    for module in flow.modules() if precision in ("layers", "bf16") else ():
        if isinstance(module, Layer if precision == "layers" else TARFlow):
            module.bfloat16()
    on_fake_cuda(flow)
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


@every_precision
def test_the_flow_and_its_density(inputs, precision):
    flow, images, labels, level = inputs
    images.requires_grad_()
    with cast(precision):
        z, log_det = flow(images, labels, level)
        log_prob = log_density(FlowOutput(z, log_det), flow.prior_variance)
    assert z.requires_grad
    assert_on_gpu(z, (3, *flow.z_shape))
    assert_on_gpu(log_det, (3,))
    assert_on_gpu(log_prob, (3,))


@every_precision
def test_a_sample_waits_for_nothing(inputs, precision):
    flow, images, labels, level = inputs
    for generators in (None, [torch.Generator().manual_seed(seed) for seed in range(3)]):
        z = flow.sample_prior(3, generators)
        assert_on_gpu(z, (3, *flow.z_shape))
    dtype = torch.bfloat16 if precision == "layers" else None
    with cast(precision):
        assert_on_gpu(flow.inverse(z, labels, level, guidance=GUIDANCE, dtype=dtype), images.shape)


@pytest.mark.parametrize("solver", [Jacobi(), Jacobi(window=2, tolerance=0.0)], ids=str)
def test_an_iteration_looks_at_its_flags_alone(make_flow, solver, monkeypatch):
    """Once each time. It is told that all images know one token more, and one of them two, none of which overflows."""
    flow, images, labels, level = faked_inputs(make_flow)
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


@every_precision
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


STARFLOW = VARIANTS["starflow"] | {"head_dim": 16, "rotary_side": 4}
LARGER = {"image_size": 8, "channels": 16, "head_dim": 8, "num_layers": (1, 2)}
"""With heads of a width for which a GPU has fused attention."""


def test_images_in_bf16_wait_for_nothing(make_flow, no_engine):
    """Noise -> inverse -> denoising -> pixels, with the layers alone in bf16."""
    denoiser = FlowDenoiser(make_flow(**LARGER | {"image_size": 4}), dtype=torch.bfloat16)
    on_fake_cuda(denoiser.flow)
    flow, _, labels, _ = faked_inputs(make_flow, **LARGER | {"image_size": 4})
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
        measured(*faked_inputs(make_flow, **LARGER | changes | {"num_layers": (1, layers)})) for layers in (1, 2)
    )
    return more - few, few - (more - few)


# A layer: four products, two norms, GELU, attention, the cache is written, two sums over layers. In bfloat16 what the
# norms give is cast to it, and both products that are added are cast back.
# Besides: the embedding and the head, the affine maps of both passes, their guidance, and the token.
# STARFlow's queries and keys are rotated, in bfloat16 between casts to float32 and back; its head has an RMS norm, 7
# here, is clipped, 3, and its scale is a softplus, 3.
@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "changes", "layer", "others"),
    [
        (torch.float32, {}, 11, 13),
        (torch.bfloat16, {}, 15, 13),
        (torch.float32, STARFLOW, 12, 26),
        (torch.bfloat16, STARFLOW, 17, 26),
    ],
    ids=str,
)
def test_launches_of_a_token(make_flow, dtype, changes, layer, others):
    """Of a guided block, in the loop on the device, by PyTorch's kernels alone."""

    def token(flow, images, labels, level):
        block, x = flow.blocks[-1], torch.zeros(3, *flow.z_shape, device="cuda")
        context = torch.zeros(3, 1, block.proj_context.in_features, device="cuda") if block.proj_context else None
        passes = [block.condition(3, one, level, context=context) for one in (labels, None)]
        conditioner = block.conditioner(*passes, Guidance(weight=1.5), dtype)
        counts = []
        for tokens in (1, 2):
            with Launches() as counted:
                conditioner.solve(x, x, torch.zeros(1, dtype=torch.int64, device="cuda"), tokens, 8)
            counts.append(counted.by_name)
        return counts[1] - counts[0]

    assert_at_most(launches(make_flow, token, **changes), layer, others)


# A layer: four products, two norms, GELU, attention, two sums. Besides: twice the condition, 25, the embedding, the
# head and the affine map.
@torch.no_grad()
@pytest.mark.parametrize(("precision", "others"), [("float32", 92), ("bf16", 96)])
def test_launches_of_a_forward_pass(make_flow, precision, others):
    def forward(flow, images, labels, level):
        with Launches() as counted:
            flow(images, labels, level)
        return counted.by_name

    assert_at_most(launches(make_flow, forward, precision=precision), 10, others)


def assert_at_most(found, layer, others):
    """Fewer are welcome: then lower the numbers."""
    assert all(have.total() <= most for have, most in zip(found, (layer, others), strict=True)), found
