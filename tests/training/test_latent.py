"""Latent space from end to end: training on codes without the VAE, and a pipeline that decodes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_codes import make_card, write_codes
from tiny_training import losses, shared_weights, tiny_recipe

from itarflow import DenoiseScheduler, ITARFlowPipeline
from itarflow.codec import CodecConfig, VaeCodec, to_pixels, vae_identity
from itarflow.commands.cli import main
from itarflow.data import DataConfig, load_data
from itarflow.denoisers import load_denoiser
from itarflow.runtime.errors import DataError, RunError
from itarflow.training import objective
from itarflow.training.export import open_denoiser, training_record
from itarflow.training.held_out import Evaluation
from itarflow.training.train import train

STEPS = 5


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codes_folder(tmp_path_factory):
    """Posteriors of a hundred digits, as they are and mirrored."""
    digits = load_data(DataConfig(path="digits"), image_size=8, in_channels=1).held_out
    images = to_pixels(torch.stack([digits[index].image for index in range(100)]))
    codec = VaeCodec(tiny_vae())
    straight, mirrored = codec.encode(images), codec.encode(images.flip(3))
    card = make_card(identity=vae_identity(tiny_vae()), class_names=tuple("0123456789"))
    rows = torch.stack([*straight, *mirrored], dim=1).half()
    return write_codes(tmp_path_factory.mktemp("codes") / "digits", card, rows, digits.labels[:100].tolist())


@pytest.fixture
def recipe(vae_folder, codes_folder):
    return latent_recipe(vae_folder, codes_folder)


def latent_recipe(vae_folder, codes_folder, **changes):
    settings = {"image_size": 4, "in_channels": 4, "patch_size": 2, "path": str(codes_folder), "batch_size": 20}
    settings |= {"held_out_images": 10, "in_memory": False, "num_workers": 0, "save_every": 2, "epochs": 20}
    settings |= {"evaluate_every_epochs": 20, "sample_every_epochs": 20, "warmup_epochs": 0.5, "split": "train"}
    codec = CodecConfig(vae=str(vae_folder), sample_posterior=changes.pop("sample_posterior", True))
    return dataclasses.replace(tiny_recipe(**settings | changes), codec=codec)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, vae_folder, codes_folder):
    run_dir = tmp_path_factory.mktemp("latent") / "run"
    return run_dir, train(latent_recipe(vae_folder, codes_folder), run_dir, max_steps=STEPS)


@pytest.mark.slow
def test_steps_and_evaluation_never_touch_the_vae(finished, recipe, monkeypatch, tmp_path):
    def touched(*args, **kwargs):
        raise AssertionError("the VAE was used")

    for name in ("encode", "decode"):
        monkeypatch.setattr(VaeCodec, name, touched)
    with pytest.raises(AssertionError, match="the VAE was used"):  # by the grid, after all steps
        train(recipe, tmp_path / "run", max_steps=STEPS)
    assert losses(tmp_path / "run") == losses(finished[0])
    assert any("held_out" in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_a_run_resumed_with_another_decoder_is_the_uninterrupted_one(finished, recipe, codes_folder, tmp_path):
    fine_tuned = tiny_vae()
    fine_tuned.decoder.conv_out.bias.data += 1
    fine_tuned.save_pretrained(tmp_path / "fine-tuned")
    train(recipe, tmp_path / "run", max_steps=3)
    other = latent_recipe(tmp_path / "fine-tuned", codes_folder)
    summary = train(other, tmp_path / "run", max_steps=STEPS, start="resume")
    assert losses(tmp_path / "run") == losses(finished[0])
    resumed, expected = shared_weights(tmp_path / "run"), shared_weights(finished[0])
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert not np.array_equal(np.asarray(Image.open(summary.grid)), np.asarray(Image.open(finished[1].grid)))


def test_the_grid_shows_images_and_the_pipeline_carries_the_vae(finished, vae_folder):
    run_dir, summary = finished
    grid = Image.open(summary.grid)
    assert grid.size == (10 * 98 - 2, 96 + 21)  # ten images of eight pixels, twelve times as large, below their names
    weights = "diffusion_pytorch_model.safetensors"
    shared = load_file(run_dir / "pipeline" / "vae" / weights)
    assert all(torch.equal(value, shared[name]) for name, value in load_file(vae_folder / weights).items())
    text = (run_dir / "pipeline" / "README.md").read_text()
    assert "AutoencoderKL, for images of 8 x 8 pixels" in text
    assert str(vae_folder.parent) not in text


def test_a_loaded_pipeline_decodes_the_codes_that_it_makes(finished):
    pipe = ITARFlowPipeline.from_pretrained(finished[0] / "pipeline")
    pipe.set_progress_bar_config(disable=True)

    def made(**options):
        return pipe(class_labels=[3, 1, 4], generator=torch.Generator().manual_seed(0), **options).images

    codes = made(output_type="codes")
    assert codes.shape == (3, 4, 4, 4)
    assert codes.dtype == torch.float32
    decoded = VaeCodec(tiny_vae()).decode(codes)
    torch.testing.assert_close(made(output_type="pt"), (decoded.clamp(-1, 1) + 1) / 2)
    torch.testing.assert_close(made(output_type="pt", decode_batch_size=2), made(output_type="pt"))
    assert [image.size for image in made()] == [(8, 8)] * 3
    with pytest.raises(ValueError, match="clip is on"):
        made(clip=True)
    with pytest.raises(ValueError, match="decode_batch_size is 0"):
        made(decode_batch_size=0)


def test_a_pipeline_without_its_vae_gives_codes(make_flow):
    flow = make_flow(in_channels=4)
    pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"a VAE .*'codes'"):
        pipe(class_labels=[0])
    assert pipe(class_labels=[0], output_type="codes").images.shape == (1, 4, 4, 4)


def test_a_vae_of_other_codes_is_refused_by_the_pipeline(make_flow):
    with pytest.raises(ValueError, match=r"\(2, 4, 4\); this VAE expects \(4, H, W\)"):
        ITARFlowPipeline(make_flow(), DenoiseScheduler(t_max=0.5, t_min=0.05), vae=tiny_vae())


def test_each_visit_of_an_image_draws_its_code_anew(recipe):
    device = torch.device("cpu")
    first, again, second = (objective.draw(recipe, step, device).posterior for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    mean = dataclasses.replace(recipe, codec=dataclasses.replace(recipe.codec, sample_posterior=False))
    assert objective.draw(mean, 0, device).posterior is None
    drawn, without = objective.draw(recipe, 0, device), objective.draw(mean, 0, device)
    assert torch.equal(drawn.noise, without.noise)  # the noise does not depend on it


@pytest.mark.parametrize("noise_conditioned", [False, True])
def test_starflow_with_its_labels_as_a_prefix(vae_folder, codes_folder, tmp_path, noise_conditioned):
    blocks = {"rotary_side": 2, "start_token": True, "final_norm": True, "soft_clip": 4.0, "softplus_scale": True}
    blocks |= {"first_block_reversed": True, "context_tokens": 1, "context_dim": 11, "num_layers": (1, 2)}
    if not noise_conditioned:
        blocks |= {"noise_conditioned": False, "distribution": "constant", "weight": "one", "num_denoise_steps": 1}
    recipe = latent_recipe(vae_folder, codes_folder, **blocks)
    train(recipe, tmp_path / "whole", max_steps=4)
    train(recipe, tmp_path / "parts", max_steps=2)
    train(recipe, tmp_path / "parts", max_steps=4, start="resume")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights, expected = shared_weights(tmp_path / "parts"), shared_weights(tmp_path / "whole")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert weights["blocks.1.proj_context.weight"].shape == (16, 11)
    assert "blocks.0.proj_context.weight" not in weights
    pipe = ITARFlowPipeline.from_pretrained(tmp_path / "parts" / "pipeline")
    pipe.set_progress_bar_config(disable=True)

    def made(**options):
        return pipe(generator=torch.Generator().manual_seed(0), output_type="codes", **options).images

    codes = made(class_labels=[3, 1])
    assert codes.shape == (2, 4, 4, 4)
    assert bool(codes.isfinite().all())
    assert made(class_labels=["3", "1"]).equal(codes)
    assert not made(class_labels=[4, 1])[0].equal(codes[0])  # the label is read
    assert made(class_labels=None, num_images=2).isfinite().all()


@pytest.mark.slow
def test_training_on_the_means_is_another_training(finished, vae_folder, codes_folder, tmp_path):
    train(latent_recipe(vae_folder, codes_folder, sample_posterior=False), tmp_path / "run", max_steps=2)
    assert losses(tmp_path / "run")[1] != losses(finished[0])[1]


@pytest.mark.slow
def test_codes_in_memory_or_streamed_train_alike(finished, vae_folder, codes_folder, tmp_path):
    train(latent_recipe(vae_folder, codes_folder, in_memory=True), tmp_path / "memory", max_steps=STEPS)
    assert losses(tmp_path / "memory") == losses(finished[0])
    summary = train(latent_recipe(vae_folder, codes_folder, streaming=True), tmp_path / "stream", max_steps=2)
    assert summary.steps == 2


def test_metrics_of_codes_are_in_nats_alone(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert all("bpd" not in line for line in lines if "loss" in line)
    assert np.isfinite([line["nll"] for line in lines if "loss" in line]).all()


def test_another_vae_or_model_is_refused_before_any_work(vae_folder, codes_folder, tmp_path):
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="were made by another VAE"):
        train(latent_recipe(tmp_path / "other", codes_folder), tmp_path / "run")
    with pytest.raises(RunError, match=r"4 channels.*model\.in_channels is 3"):
        train(latent_recipe(vae_folder, codes_folder, in_channels=3), tmp_path / "run")
    with pytest.raises(RunError, match="'nowhere' can't be loaded"):
        train(latent_recipe("nowhere", codes_folder), tmp_path / "run")
    with pytest.raises(ValueError, match=r"sampling\.clip is on"):
        latent_recipe(vae_folder, codes_folder, clip=True).check()
    with pytest.raises(ValueError, match="which is for 8-bit pixels"):
        latent_recipe(
            vae_folder, codes_folder, distribution="dequantise", noise_conditioned=False, weight="one", method="skip"
        ).check()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_flow_may_denoise_the_grids(finished, vae_folder, codes_folder, tmp_path):
    one_level = {"noise_conditioned": False, "distribution": "constant", "weight": "one"}
    pipeline = str(finished[0] / "pipeline")
    cleaned = latent_recipe(vae_folder, codes_folder, **one_level, denoiser=pipeline)
    grid = train(cleaned, tmp_path / "run", max_steps=1).grid
    alone = latent_recipe(vae_folder, codes_folder, **one_level, num_denoise_steps=1)
    own = train(alone, tmp_path / "own", max_steps=1).grid
    assert not np.array_equal(np.asarray(Image.open(grid)), np.asarray(Image.open(own)))
    pipe = ITARFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.num_denoise_steps == 1  # it has no other denoiser with it
    # A flow of one level whose stored t_min is that level takes several steps by another one, down to where that ends.
    pipe.scheduler = DenoiseScheduler(t_max=0.5, t_min=0.5, num_denoise_steps=1)
    levels = []
    other = load_denoiser(pipeline, vae=pipe.vae)

    class Recording:
        noise_range, check = other.noise_range, staticmethod(other.check)

        def __call__(self, noisy, labels, noise_level):
            levels.append(noise_level[0].item())
            return other(noisy, labels, noise_level)

    pipe(class_labels=[3], denoiser=Recording(), num_denoise_steps=4)
    assert levels == pytest.approx([0.5, 0.34, 0.18, 0.02])
    assert pipe.config.training["recipe"]["sampling"]["denoiser"] == "pipeline"


def test_a_denoiser_of_other_images_is_refused_before_any_work(finished, tmp_path):
    with pytest.raises(RunError, match=r"flow for \(4, 4, 4\)"):
        train(tiny_recipe(denoiser=str(finished[0] / "pipeline")), tmp_path / "run")
    with pytest.raises(RunError, match="'nowhere' is neither a folder"):
        train(tiny_recipe(denoiser="nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_samples_with_another_decoder_of_the_same_codes(finished, tmp_path, capsys):
    pipeline, fine_tuned = str(finished[0] / "pipeline"), tiny_vae()
    fine_tuned.decoder.conv_out.bias.data += 1
    fine_tuned.save_pretrained(tmp_path / "fine-tuned")
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")

    def sample(*words):
        main(["sample", pipeline, "--class-labels", "3", "--method", "skip", "--device", "cpu", *map(str, words)])

    sample("--output", tmp_path / "plain.png")
    sample("--output", tmp_path / "tuned.png", "--decoder", tmp_path / "fine-tuned")
    plain, tuned = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("plain", "tuned"))
    assert (tuned - plain).mean() > 50  # a bias of 1 in [-1, 1] is 127 grey levels
    with pytest.raises(SystemExit):
        sample("--output", tmp_path / "no.png", "--decoder", tmp_path / "other")
    assert "is for other codes than the checkpoint's VAE makes" in capsys.readouterr().err
    main(["info", pipeline])
    assert "AutoencoderKL, for images of 8 x 8 pixels" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_never_goes_on_with_codes_of_another_vae(recipe, vae_folder, codes_folder, tmp_path):
    train(recipe, tmp_path / "run", max_steps=2)
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())["codec"]
    assert (stored["encoder"], stored["scaling_factor"]) == (vae_identity(tiny_vae()).encoder, 0.4)
    other = tiny_vae(seed=1)
    other.save_pretrained(tmp_path / "other")
    card = make_card(identity=vae_identity(other), class_names=tuple("0123456789"))
    rows = torch.zeros(100, 4, 4, 4, 4).half()
    codes = write_codes(tmp_path / "codes", card, rows, [index % 10 for index in range(100)])
    with pytest.raises(RunError, match=r"codec\.encoder: "):
        train(latent_recipe(tmp_path / "other", codes), tmp_path / "run", start="resume")
    pinned = dataclasses.replace(recipe, codec=dataclasses.replace(recipe.codec, encoder="0"))
    with pytest.raises(RunError, match=r"codec\.encoder is 0"):
        train(pinned, tmp_path / "pinned")


def test_a_flow_of_another_vae_is_no_denoiser_here(finished, vae_folder, codes_folder):
    pipeline = str(finished[0] / "pipeline")
    recipe = latent_recipe(vae_folder, codes_folder, denoiser=pipeline)
    assert open_denoiser(recipe, tiny_vae()) is not None
    with pytest.raises(ValueError, match="is for other codes than the checkpoint's VAE makes"):
        open_denoiser(recipe, tiny_vae(seed=1))


@pytest.mark.parametrize("given", [torch.bfloat16, {"default": torch.float32, "vae": torch.bfloat16}], ids=str)
def test_the_vae_takes_the_precision_that_is_asked_for(finished, given):
    pipe = ITARFlowPipeline.from_pretrained(finished[0] / "pipeline", torch_dtype=given)
    assert pipe.vae.dtype == torch.bfloat16
    assert pipe.flow.dtype == (torch.float32 if isinstance(given, dict) else torch.bfloat16)


def test_a_pipeline_whose_vae_lacks_tensors_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished[0] / "pipeline", tmp_path / "pipeline")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_out.weight"]
    save_file(weights, file)
    with pytest.raises(OSError, match="its SHA-256 is another"):
        ITARFlowPipeline.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_sha256": {}}))  # as of earlier versions
    with pytest.raises(OSError, match=r"missing.*decoder\.conv_out\.weight"):
        ITARFlowPipeline.from_pretrained(folder)


def test_what_is_told_of_a_training_names_no_folders_of_this_machine(recipe, tmp_path):
    private = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, path=str(tmp_path / "secret" / "*.parquet")),
        codec=dataclasses.replace(recipe.codec, vae=str(tmp_path / "vae")),
    )
    (tmp_path / "vae").mkdir()
    assert str(tmp_path) not in json.dumps(training_record(private, Evaluation({}, None), {}))
