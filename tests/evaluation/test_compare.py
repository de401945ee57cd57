"""The comparison: what each column is made of, what is left out, measured, written and refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import tiny_vae
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from image_files import write_classes
from PIL import Image
from tiny_diffusion import UNET, Recorder
from torch import Tensor

from itarflow import DenoiseScheduler, FlowDenoiser, ITARFlowPipeline, TARFlow
from itarflow.codec import PixelCodec, VaeCodec, to_uint8
from itarflow.commands import cli
from itarflow.denoisers import DiffusionDenoiser
from itarflow.evaluation.compare import Comparison, compare, nats_per_dim, residual_noise
from itarflow.evaluation.samples.denoising import VARIANTS, Denoising, variants_of
from itarflow.evaluation.samples.files import open_samples
from itarflow.evaluation.samples.generate import Batch, Generation, generate
from itarflow.evaluation.scoring import save_samples
from itarflow.inverse import Jacobi, sequential
from itarflow.pipeline.plan import InversePlan, place_of
from itarflow.runtime.seeds import image_generators
from itarflow.runtime.text import short_names

LABELS = [0, 2, None, 1, 0]
MakePipe = Callable[..., ITARFlowPipeline]

HERE = place_of(torch.device("cpu"), torch.float32)


@pytest.fixture
def make_pipe(make_flow: Callable[..., TARFlow]) -> MakePipe:
    """make_pipe(): colour, three classes, sampled at 0.5; `flow` are the flow's arguments, `changes` the rest."""

    def make(flow: dict[str, Any] | None = None, vae: Any = None, **changes: Any) -> ITARFlowPipeline:
        built = make_flow(**{"in_channels": 3, "noise_range": (0.02, 0.6)} | (flow or {}))
        scheduler = DenoiseScheduler(**{"t_max": 0.5, "t_min": 0.05, "num_denoise_steps": 2} | changes)
        return ITARFlowPipeline(built, scheduler, guidance={"weight": 1.0}, vae=vae)

    return make


@pytest.fixture
def pipelines(make_pipe: MakePipe) -> dict[str, ITARFlowPipeline]:
    """A TARFlow of one noise level and two iTARFlows, one of which does not know 0.5."""
    tarflow = {"noise_conditioned": False, "noise_range": (0.4, 0.4), "seed": 1}
    return {
        "tarflow": make_pipe(tarflow, t_max=0.4, num_denoise_steps=1),
        "wide": make_pipe(),
        "narrow": make_pipe({"noise_range": (0.02, 0.4), "seed": 2}, t_max=0.3),
    }


Seen = Callable[[ITARFlowPipeline, str], tuple[Tensor, Tensor]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """seen(pipe, title): codes and images of a generator, denoised in one way, in the comparisons of this test."""
    found: list[tuple[ITARFlowPipeline, Batch]] = []

    def remember(generation: Generation) -> Iterator[Batch]:
        for batch in generate(generation):
            found.append((generation.pipe, batch))
            yield batch

    def chosen(pipe: ITARFlowPipeline, title: str) -> tuple[Tensor, Tensor]:
        batches = [batch for by, batch in found if by is pipe and batch.variant == title]
        codes = [batch.images if batch.codes is None else batch.codes for batch in batches]
        return torch.cat(codes), torch.cat([batch.images for batch in batches])

    monkeypatch.setattr("itarflow.evaluation.compare.generate", remember)
    return chosen


@pytest.fixture
def never_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TARFlow, "inverse", None)  # its call would raise a TypeError


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves compare.png out, which takes longer than all the rest."""
    monkeypatch.setattr("itarflow.evaluation.compare.draw_comparison", lambda *_: None)


def methods(comparison: Comparison, generator: str) -> list[str]:
    return [result.method for result in comparison.results if result.generator == generator]


@pytest.mark.usefixtures("undrawn")
def test_columns_are_what_applies_to_each_generator(pipelines, tmp_path):
    comparison = compare(pipelines, [0], output=tmp_path)
    assert methods(comparison, "tarflow") == ["noisy", "self", "iterative: wide", "iterative: narrow"]
    assert methods(comparison, "wide") == ["noisy", "self", "own iterative"]
    assert methods(comparison, "narrow") == ["noisy", "self", "own iterative", "iterative: wide"]


@pytest.mark.usefixtures("undrawn")
def test_each_column_denoises_the_same_noisy_images_in_its_way(pipelines, tmp_path, seen):
    compare(pipelines, LABELS, output=tmp_path, seed=3, batch_size=2)
    narrow, wide = pipelines["narrow"], pipelines["wide"]
    labels = torch.tensor([0, 2, -1, 1, 0])
    seeds = image_generators(torch.Generator().manual_seed(3), 5)
    noisy = narrow.flow.inverse(narrow.flow.sample_prior(5, seeds), labels, 0.3, guidance=narrow.default_guidance)

    def ode(pipe: ITARFlowPipeline) -> Tensor:
        return Denoising("", PixelCodec(), FlowDenoiser(pipe.flow), narrow.schedule()).denoised(noisy, labels, seeds)

    expected = {
        "noisy": noisy,
        "self": FlowDenoiser(narrow.flow)(noisy, labels, 0.3),
        "own iterative": ode(narrow),
        "iterative: wide": ode(wide),
    }
    for title, images in expected.items():
        torch.testing.assert_close(seen(narrow, title)[1], images, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("planned", "method", "count", "batch_size"),
    [(False, "euler", 5, 2), (True, "sde", 5, 2), (True, "euler", 3, 16), (False, "sde", 3, 16)],
)
def test_images_are_those_of_the_pipeline_and_of_an_evaluation(
    make_pipe, tmp_path, seen, planned, method, count, batch_size
):
    """Bit by bit, whatever the batch size; a checkpoint's plan, here a coarse one, is followed by all three."""
    pipe = make_pipe(method=method)
    if planned:
        coarse = Jacobi(tolerance=0.3)
        plan = InversePlan(solvers=(coarse,) * 2, num_tokens=(4, 4), batch_size=2 if count == 5 else 3, **HERE)
        pipe.register_to_config(plans=[plan.to_json()])
    pipe.set_progress_bar_config(disable=True)
    compare({"pets": pipe}, LABELS[:count], output=tmp_path, seed=7, batch_size=batch_size)
    labels, ways = torch.tensor([0, 2, -1, 1, 0])[:count], variants_of(pipe, pipe.schedule())
    evaluation = Generation(pipe=pipe, variants=ways, labels=labels, seed=7, batch_size=batch_size)
    evaluation.check()
    save_samples({tmp_path / "evaluation": evaluation}, PartialState(cpu=True))
    calls = {"noisy": {"method": "skip"}, "self": {"num_denoise_steps": 1, "method": "euler"}, "own iterative": {}}
    for (title, options), way in zip(calls.items(), VARIANTS, strict=True):
        call = {"generator": torch.Generator().manual_seed(7), "output_type": "codes", "batch_size": batch_size}
        images = pipe(LABELS[:count], **call, **options).images
        assert torch.equal(seen(pipe, title)[1], images)
        assert torch.equal(open_samples(tmp_path / "evaluation" / way).read(0, count), to_uint8(images))
    if planned:
        exact = pipe(LABELS[:count], **call | {"generator": torch.Generator().manual_seed(7)}, solver=sequential)
        assert not torch.equal(exact.images, images)


@pytest.mark.slow
def test_files_and_figures(pipelines, tmp_path):
    write_classes(tmp_path / "data", {"a": 3, "b": 2})
    output = tmp_path / "new" / "compare"
    comparison = compare(pipelines, LABELS, output=output, data=str(tmp_path / "data"), picture_rows=2)
    written = json.loads((output / "compare.json").read_text())
    assert written["real"] == {"residual noise": 0.0, "images": 5}  # plain squares
    assert list(written["metrics"]) == ["residual noise", "seconds an image", "nats/dim, wide", "nats/dim, narrow"]
    assert len(written["results"]) == len(comparison.results) == 11
    for result in written["results"]:
        if result["broken"] == 0:
            assert all(isinstance(result["values"][title], float) for title in written["metrics"]), result
        assert Image.open(output / result["grid"]).size == (5 * 48 + 4 * 2, 48)
    assert len({result["grid"] for result in written["results"]}) == 11
    assert written["settings"]["columns"]["tarflow"]["iterative: wide"]["t_max"] == 0.4
    values = {(r["generator"], r["method"]): r["values"]["nats/dim, wide"] for r in written["results"]}
    assert values["wide", "noisy"] != values["wide", "self"]
    picture = np.asarray(Image.open(output / "compare.png").convert("L"))
    assert picture.shape[0] > picture.shape[1]  # 6 rows, 5 columns
    assert picture.std() > 10


@pytest.mark.usefixtures("undrawn")
def test_a_diffusion_model_denoises_by_its_ode_where_it_knows_the_level(make_pipe, tmp_path, seen):
    unet = DiffusionDenoiser(Recorder(channels=3), DDPMScheduler(prediction_type="sample"))
    loud = DDPMScheduler(10, beta_start=0.2, beta_end=0.3)  # begins at 0.5
    both = {"pets": make_pipe(), "quiet": make_pipe(t_max=0.3)}
    models = {"unet": unet, "high": DiffusionDenoiser(Recorder(channels=3), loud)}
    comparison = compare(both, [0, 1], output=tmp_path, diffusion=models, num_denoise_steps=3)
    assert methods(comparison, "pets")[-2:] == ["diffusion: unet", "diffusion: high"]
    assert "diffusion: high" not in methods(comparison, "quiet")
    images = seen(both["pets"], "diffusion: unet")[1]
    torch.testing.assert_close(images, torch.arange(3.0)[None, :, None, None].expand(2, -1, 4, 4))
    assert len(unet.model.seen) == 2 * 3
    compare({"pets": make_pipe()}, [0], output=tmp_path, diffusion={"unet": unet})
    assert len(unet.model.seen) == 2 * 3 + 10
    assert round(float(unet.model.seen[-1][1][0])) == 0


@pytest.mark.usefixtures("undrawn")
def test_codes_are_decoded_and_a_decoder_may_denoise(make_pipe, tmp_path, seen):
    vae = tiny_vae(latent_channels=2)
    decoder = tiny_vae(latent_channels=2)
    torch.nn.init.normal_(decoder.decoder.conv_out.weight, generator=torch.Generator().manual_seed(1))
    pipe = make_pipe({"in_channels": 2}, vae=vae)
    comparison = compare({"codes": pipe}, LABELS, output=tmp_path, decoders={"robust": decoder}, batch_size=3)
    assert methods(comparison, "codes") == ["noisy", "self", "own iterative", "decoder: robust"]
    noisy = seen(pipe, "noisy")[0]
    for title, by in (("noisy", vae), ("own iterative", vae), ("decoder: robust", decoder)):
        codes = noisy if title == "decoder: robust" else seen(pipe, title)[0]
        torch.testing.assert_close(seen(pipe, title)[1], VaeCodec(by).decode(codes), rtol=0, atol=1e-4)
    assert comparison.results[-1].values["nats/dim, codes"] is None
    assert Image.open(tmp_path / comparison.results[-1].grid).mode == "L"


# -- figures ----------------------------------------------------------------------------------------------------


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grey_levels", [3.0, 30.0])
def test_the_noise_of_a_smooth_image_is_found(grey_levels):
    ramp = torch.linspace(-0.5, 0.5, 64)[None, :] + torch.linspace(-0.1, 0.1, 64)[:, None]
    noisy = ramp + grey_levels / 127.5 * noise(4, 3, 64, 64)
    torch.testing.assert_close(residual_noise(noisy), torch.full((4,), grey_levels), rtol=0.05, atol=0)
    assert residual_noise(ramp.expand(1, 1, 64, 64)).item() < 1  # what rounding to 8 bits leaves: 0.29
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 8\); expected at least 3 x 3"):
        residual_noise(torch.zeros(1, 1, 2, 8))


@pytest.mark.parametrize(("noise_range", "level"), [((0.1, 0.9), 0.1), (None, 0.05)])
def test_nats_per_dim_is_the_negative_log_density_at_the_smallest_level(make_flow, noise_range, level):
    flow = make_flow(noise_range=noise_range)
    pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.05))
    codes, metric = noise(5, 2, 4, 4), nats_per_dim("pets", pipe, batch_size=2)
    assert f"t = {level:g}" in metric.meaning
    with torch.no_grad():
        for labels in (torch.tensor([0, 1, 2, -1, 0]), torch.full((5,), -1)):
            expected = -flow.log_prob(codes, labels, level).mean() / 32
            measured = metric.measure(Batch("", 0, labels, codes, codes, 0.0))
            assert measured == pytest.approx(float(expected), rel=1e-5)
    assert metric.measure(Batch("", 0, labels, None, codes, 0.0)) is None


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("never_generates")
def test_checkpoints_that_do_not_agree_are_refused(make_pipe, tmp_path):
    vae, other_vae = tiny_vae(latent_channels=2), tiny_vae(latent_channels=2, seed=1)
    codes = {"in_channels": 2}
    for first, second, words in (
        (make_pipe(), make_pipe({"image_size": 8}), r"image shape \(C, H, W\): a has \(3, 4, 4\), b has \(3, 8, 8\)"),
        (make_pipe(), make_pipe({"num_classes": 5}), "number of classes: a has 3, b has 5"),
        (make_pipe(codes, vae=vae), make_pipe(codes), "VAE: a has one, b has none"),
        (make_pipe(codes, vae=vae), make_pipe(codes, vae=other_vae), r"(?s)codes of different VAEs:.*encoder: "),
    ):
        with pytest.raises(ValueError, match=words):
            compare({"a": first, "b": second}, [0], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_labels": []}, "there are no images to make"),
        ({"class_labels": [3]}, "class label 3 is out of range"),
        ({"denoise_batch_size": 0}, "denoise_batch_size is 0"),
        ({"num_denoise_steps": 0}, "num_denoise_steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"guidance": {"temperature": 0}}, "temperature is 0"),
        ({"class_labels": [None], "guidance_weight": 2.0}, r"guidance_weight is 2\.0, but there are no labels"),
        ({"pipelines": {}}, "no checkpoint is named"),
        ({"decoders": {"robust": None}}, "decoder robust is for codes, but the checkpoints make pixels"),
        ({"data": "nowhere"}, "nowhere"),
        (
            {"diffusion": {"dit": DiffusionDenoiser(Recorder(sample_size=32), DDIMScheduler())}},
            "diffusion: dit can denoise the images of no checkpoint here: images of 4 x 4 .* 32 x 32",
        ),
        (
            {"diffusion": {"dit": DiffusionDenoiser(Recorder(), DDIMScheduler(10, beta_start=0.3, beta_end=0.4))}},
            r"dit can denoise the images of no checkpoint here: .*t_max",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("never_generates")
def test_settings_out_of_range_are_refused_before_any_work(make_pipe, tmp_path, options, words):
    arguments: dict[str, Any] = {"pipelines": {"pets": make_pipe()}, "class_labels": [0], "output": tmp_path / "out"}
    with pytest.raises(Exception, match=words) as error:
        compare(**arguments | options)
    assert isinstance(error.value, ValueError)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("never_generates")
def test_what_can_not_be_shown_written_or_denoised_is_refused(make_pipe, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"pets: .*images of 2 channels; expected 1 or 3"):
        compare({"pets": make_pipe({"in_channels": 2})}, [0], output=tmp_path)
    with pytest.raises(ValueError, match=r"'a/b' is not fit for a file"):
        compare({"a/b": make_pipe()}, [0], output=tmp_path)
    with pytest.raises(ValueError, match=r"pets: t_max: .* outside \[0\.02, 0\.6\]"):
        compare({"pets": make_pipe(t_max=0.9)}, [0], output=tmp_path)
    with pytest.raises(ValueError, match=r"pets can't denoise its own images: t_min: .* outside \[0\.02, 0\.6\]"):
        compare({"pets": make_pipe(t_min=0.001)}, [0], output=tmp_path)
    coded = make_pipe({"in_channels": 2}, vae=tiny_vae(latent_channels=2))
    with pytest.raises(ValueError, match=r"(?s)robust is for other codes.*encoder: "):
        compare({"pets": coded}, [0], output=tmp_path, decoders={"robust": tiny_vae(latent_channels=2, seed=1)})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        compare({"pets": make_pipe()}, [0], output=tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "itarflow\[plot\]"'):
        compare({"pets": make_pipe()}, [0], output=tmp_path)


# -- names and the command --------------------------------------------------------------------------------------


def test_short_names_are_the_last_telling_part_and_differ():
    paths = ["runs/digits/pipeline", "runs/digits/pipeline/", "me/model", "a b", "../pipeline", "x/digits"]
    assert short_names(paths) == ["digits", "digits-2", "model", "a-b", "pipeline", "digits-3"]


def test_the_command(pipelines, tmp_path, monkeypatch, capsys, randomise):
    for name, pipe in pipelines.items():
        pipe.save_pretrained(tmp_path / name)
    unet = UNet2DModel(**UNET | {"in_channels": 3, "out_channels": 3})
    randomise(unet)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unet")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    words = "compare wide tarflow --diffusion unet --num-images 3 --class-labels 1 2 --picture-rows 1"
    cli.main(words.split())
    printed = capsys.readouterr()
    for words in ("wide", "tarflow", "own iterative", "diffusion: unet", "nats/dim, wide", "compare/compare.png"):
        assert words in printed.out
    assert json.loads(Path("compare/compare.json").read_text())["settings"]["class_labels"] == [1, 2, 1]
    with pytest.raises(SystemExit):
        cli.main(["compare", "wide", "--diffusion", "tarflow"])
    assert "--diffusion tarflow is a flow; name it as a CHECKPOINT" in capsys.readouterr().err
