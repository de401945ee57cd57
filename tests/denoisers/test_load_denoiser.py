"""Denoisers by name: what is loaded, and what is never read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from tiny_diffusion import DIT, UNET

from itarflow import DenoiseScheduler, FlowDenoiser, ITARFlowPipeline, TARFlow
from itarflow.denoisers import DiffusionDenoiser, load_denoiser
from itarflow.runtime import hub as checkpoint

NOISY = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unet(randomise: Callable[..., None]) -> UNet2DModel:
    model = UNet2DModel(**UNET).eval()
    randomise(model)
    return model


@pytest.fixture
def folder(unet: UNet2DModel, tmp_path: Path) -> Path:
    """A DDPMPipeline on disk."""
    DDPMPipeline(unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def test_a_flow_denoises_as_itself(make_flow: Callable[..., TARFlow], tmp_path):
    flow = make_flow()
    ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.05)).save_pretrained(tmp_path / "flow")
    denoiser = load_denoiser(str(tmp_path / "flow"), slice_size=1)
    assert isinstance(denoiser, FlowDenoiser)
    assert denoiser.slice_size == 1
    labels = torch.tensor([0, -1])
    torch.testing.assert_close(denoiser(NOISY, labels, 0.3), FlowDenoiser(flow)(NOISY, labels, 0.3))
    cheaper = load_denoiser(str(tmp_path / "flow"), dtype=torch.bfloat16)
    expected = FlowDenoiser(flow, dtype=torch.bfloat16)(NOISY, labels, 0.3)
    torch.testing.assert_close(cheaper(NOISY, labels, 0.3), expected)


def test_a_dtype_for_a_diffusion_model_is_refused(folder):
    with pytest.raises(ValueError, match=r"diffusion model.*torch\.bfloat16"):
        load_denoiser(str(folder), dtype=torch.bfloat16)


def test_a_unet_denoises_by_its_own_schedule(unet, folder):
    expected = DiffusionDenoiser(unet, DDPMScheduler(prediction_type="v_prediction"))(NOISY, None, 0.3)
    denoiser = load_denoiser(str(folder), slice_size=1)
    assert denoiser.slice_size == 1
    torch.testing.assert_close(denoiser(NOISY, None, 0.3), expected)


def test_of_a_dit_only_transformer_and_scheduler_are_read(randomise, tmp_path):
    model = DiTTransformer2DModel(**DIT, num_embeds_ada_norm=3, norm_num_groups=1, out_channels=4).eval()
    randomise(model)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=2)
    DiTPipeline(model, vae, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    for file in (tmp_path / "dit" / "vae").iterdir():
        file.write_text("damaged")
    labels = torch.tensor([2, -1])
    denoiser = load_denoiser(str(tmp_path / "dit"))
    torch.testing.assert_close(
        denoiser(NOISY, labels, 0.3), DiffusionDenoiser(model, DDIMScheduler())(NOISY, labels, 0.3)
    )


def test_the_layout_of_the_first_years_loads(folder, unet):
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    denoiser = load_denoiser(str(folder))
    assert isinstance(denoiser, DiffusionDenoiser)
    assert denoiser.prediction == "v_prediction"


def test_pickles_are_never_read_and_the_way_out_is_named(folder, monkeypatch):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(OSError, match=r"(?s)no safetensors in its unet.*use_safetensors=False") as error:
        load_denoiser(str(folder))
    assert str(folder) in str(error.value)


def test_only_settings_and_safetensors_are_downloaded(folder, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update({"name": name} | options)
        return str(folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert isinstance(load_denoiser("someone/ddpm"), DiffusionDenoiser)
    assert asked["name"] == "someone/ddpm"
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked["allow_patterns"])


def test_what_is_no_denoiser_is_refused(folder, tmp_path):
    with pytest.raises(OSError, match=r"'\./none' "):
        load_denoiser("./none")
    with pytest.raises(OSError, match=r"(?s)'someone/none' .*downloaded"):
        load_denoiser("someone/none")
    with pytest.raises(OSError, match=r"model_index\.json is missing"):
        load_denoiser(str(tmp_path))
    index = json.loads((folder / "model_index.json").read_text())
    for changes, words in (
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, r"DDPMPipeline \(unet: UNet2DConditionModel, scheduler: "),
        ({"unet": ["mine", "UNet2DModel"]}, r"DDPMPipeline \(scheduler: DDPMScheduler\)"),
        ({"scheduler": ["diffusers", "UNet2DModel"]}, "UNet2DModel is no scheduler"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(OSError, match=words):
            load_denoiser(str(folder))
    (folder / "model_index.json").write_text("[")
    with pytest.raises(OSError, match=r"model_index\.json is damaged"):
        load_denoiser(str(folder))


def test_missing_tensors_are_not_filled_up_at_random(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights)
    with pytest.raises(OSError, match=r"1 tensors .*unet .*conv_in\.weight"):
        load_denoiser(str(folder))


def test_damaged_weights_and_other_schedules_are_refused(folder, unet):
    DDPMPipeline(unet, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    with pytest.raises(ValueError, match="has no alphas_cumprod"):
        load_denoiser(str(folder))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="can't be loaded"):
        load_denoiser(str(folder))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"layers_per_block": 10**9}),
        ("unet/config.json", {"norm_num_groups": -1}),
        ("unet/config.json", {"norm_eps": "x"}),
        ("unet/config.json", {"freq_shift": None}),
        ("unet/config.json", {"mid_block_scale_factor": 10**30}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}),
        ("scheduler/scheduler_config.json", {"beta_end": float("nan")}),
        ("scheduler/scheduler_config.json", {"trained_betas": True}),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused_by_the_name_of_its_file(folder, file, changes):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(OSError, match=Path(file).name):
        load_denoiser(str(folder))


def test_settings_of_older_diffusers_are_none_of_these(folder):
    file = folder / "unet" / "config.json"
    older = {"attention_head_dim": None, "downsample_padding": 0, "norm_eps": 1e-6, "freq_shift": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | older))
    load_denoiser(str(folder))


def test_weights_of_a_diffusion_model_are_finite_floats(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] * torch.nan}, file)
    with pytest.raises(OSError, match="NaN or infinite values in"):
        load_denoiser(str(folder))
    save_file({key: value.to(torch.int8) for key, value in weights.items()}, file)
    with pytest.raises(OSError, match="as I8; expected weights of one of"):
        load_denoiser(str(folder))
