"""In which precision a pipeline samples, as if its device were a GPU with bfloat16."""

import pytest
import torch
from fake_cuda import fake_cuda, on_fake_cuda

from itarflow import DenoiseScheduler, ITARFlowPipeline, TARFlow
from itarflow.denoisers import load
from itarflow.evaluation.samples.denoising import variants_of
from itarflow.evaluation.samples.generate import Generation
from itarflow.evaluation.sweep import Setting, generations_of
from itarflow.inverse import Jacobi, sequential
from itarflow.pipeline import pipeline
from itarflow.pipeline.plan import InversePlan, place_of


@pytest.fixture
def pipe(make_flow):
    pipe = ITARFlowPipeline(make_flow(in_channels=3, image_size=8), DenoiseScheduler(t_max=0.5, t_min=0.05))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def bf16_device(monkeypatch):
    def default(device, weights=torch.float32):
        return torch.bfloat16 if weights == torch.float32 else None

    monkeypatch.setattr(pipeline, "sampling_dtype", default)
    monkeypatch.setattr(load, "sampling_dtype", default)


BF16 = {"inverse_dtype": torch.bfloat16, "denoise_dtype": torch.bfloat16}
FLOAT32 = {"inverse_dtype": torch.float32, "denoise_dtype": torch.float32}


def images_of(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 1, 2], generator=generator, output_type="codes", **options).images


def layer_dtype(denoiser):
    return denoiser.flow.blocks[0].transformer.layers[0].attention.qkv.weight.dtype


def test_on_a_cpu_nothing_changes(pipe):
    assert pipe.sampling_dtype() is None
    assert torch.equal(images_of(pipe), images_of(pipe, **FLOAT32))
    assert not torch.equal(images_of(pipe), images_of(pipe, **BF16))


def test_bf16_is_the_default_where_there_is_some(pipe, bf16_device):
    assert torch.equal(images_of(pipe), images_of(pipe, **BF16))
    assert not torch.equal(images_of(pipe), images_of(pipe, **FLOAT32))
    assert images_of(pipe).dtype == torch.float32


def test_a_call_on_a_gpu_is_in_bf16_and_waits_for_nothing(make_flow, monkeypatch):
    """But at its end, for the warning of images that are not finite."""
    seen, inverse = [], TARFlow.inverse
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(pipeline, "converted", lambda images, output_type: images)
    monkeypatch.setattr(TARFlow, "inverse", lambda *a, **k: seen.append(k["dtype"]) or inverse(*a, **k))
    with fake_cuda():
        flow = on_fake_cuda(make_flow(in_channels=3))
        flow._decoding_checked = True  # by its first inversion, which looks at values once
        pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.05), guidance={"weight": 1.0})
        pipe.set_progress_bar_config(disable=True)
        images = images_of(pipe, denoiser=lambda noisy, *_: noisy)
    assert (images.device.type, images.dtype, images.shape) == ("cuda", torch.float32, (3, 3, 4, 4))
    assert seen == [torch.bfloat16]


def test_what_is_asked_for_counts(pipe, bf16_device):
    expected = images_of(pipe, **FLOAT32)
    assert layer_dtype(pipe.flow_denoiser(dtype=torch.float32)) == torch.float32
    pipe.flow.double()
    assert pipe.sampling_dtype() is None  # weights that were made more precise, or less, are used as they are
    torch.testing.assert_close(images_of(pipe), expected.double(), rtol=0, atol=1e-3, check_dtype=False)


def test_evaluations_use_and_store_it(pipe, bf16_device):
    schedule, labels = pipe.schedule(), torch.tensor([0, 1])
    variants = variants_of(pipe, schedule)
    assert layer_dtype(variants["self"].denoiser) == torch.bfloat16
    stored = Generation(pipe=pipe, variants=variants, labels=labels).described()
    assert stored["inverse_dtype"] == "torch.bfloat16"
    asked = Generation(pipe=pipe, variants=variants, labels=labels, inverse_dtype=torch.float32).described()
    assert asked["inverse_dtype"] == "torch.float32"
    exact = variants_of(pipe, schedule, dtype=torch.float32)
    assert layer_dtype(exact["self"].denoiser) == torch.float32
    assert Generation(pipe=pipe, variants=exact, labels=labels).described()["cleaning"] != stored["cleaning"]
    swept = generations_of(pipe, [Setting(guidance_weight=0.0, t_max=0.5, num_denoise_steps=2)], labels)
    (variant,) = next(iter(swept.values())).variants.values()
    assert layer_dtype(variant.denoiser) == torch.bfloat16


def test_denoisers_by_name_use_it(pipe, bf16_device, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    assert layer_dtype(load.load_denoiser(str(tmp_path / "pipe"))) == torch.bfloat16
    assert layer_dtype(load.load_denoiser(str(tmp_path / "pipe"), dtype=torch.float32)) == torch.float32


def test_plans_are_of_one_precision(pipe, bf16_device):
    tokens = tuple(block.num_tokens for block in reversed(pipe.flow.blocks))
    plan = InversePlan(
        solvers=(Jacobi(window=2),) * 2,
        num_tokens=tokens,
        batch_size=4,
        **place_of(torch.device("cpu"), torch.bfloat16),
    )
    pipe.register_to_config(plans=[plan.to_json()])
    assert pipe.planned_solver(4) == [Jacobi(window=2)] * 2
    assert pipe.planned_solver(4, torch.float32) is sequential


@pytest.mark.parametrize(
    ("words", "inverse", "denoising"),
    [
        ((), torch.bfloat16, torch.bfloat16),
        (("--exact",), torch.float32, torch.bfloat16),
        (("--inverse-dtype", "float32", "--denoise-dtype", "float32"), torch.float32, torch.float32),
    ],
)
def test_the_command_asks_for_it(pipe, bf16_device, monkeypatch, run, tmp_path, words, inverse, denoising):
    seen, original = [], TARFlow.inverse

    def inverted(flow, *args, **named):
        seen.append(named["dtype"])
        return original(flow, *args, **named)

    def denoiser(own, slice_size=None, dtype=None):
        made = flow_denoiser(own, slice_size, dtype)
        seen.append(layer_dtype(made))
        return made

    flow_denoiser = ITARFlowPipeline.flow_denoiser
    monkeypatch.setattr(TARFlow, "inverse", inverted)
    monkeypatch.setattr(ITARFlowPipeline, "flow_denoiser", denoiser)
    pipe.save_pretrained(tmp_path / "pipe")
    run("sample", tmp_path / "pipe", "--num-images", 1, "--output", tmp_path / "one.png", "--device", "cpu", *words)
    assert seen == [denoising, inverse]
