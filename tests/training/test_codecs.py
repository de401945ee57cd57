"""Autoencoders of every kind, with random weights, from images to pictures, and to a decoder that knows noise."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_vae
from PIL import Image
from tiny_training import losses, tiny_recipe

from itarflow import ITARFlowPipeline
from itarflow.codec import CodecConfig, VaeCodec, load_vae, vae_identity, vae_traits
from itarflow.commands.cli import main
from itarflow.data import DataConfig
from itarflow.data.codes import read_card
from itarflow.data.prepare.encode import begin, encode_share, finish
from itarflow.data.prepare.encode_plan import EncodeConfig, plan_encoding
from itarflow.training.decoder.config import DecoderConfig, TuneConfig
from itarflow.training.decoder.finetune import fine_tune
from itarflow.training.train import train

SIXTEEN = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06}
"""As the VAEs of Stable Diffusion 3 and FLUX.1 are."""
KINDS = {
    "KL of 16 channels": ("AutoencoderKL", SIXTEEN),
    "DC": ("AutoencoderDC", {"latent_channels": 8, "scaling_factor": 0.5}),
    "FLUX.2": ("AutoencoderKLFlux2", {}),
    "RAE": ("AutoencoderRAE", {}),
}


@pytest.fixture(
    scope="module",
    params=[name if name in ("DC", "RAE") else pytest.param(name, marks=pytest.mark.slow) for name in KINDS],
)
def place(request, tmp_path_factory):
    """A folder with images of noise in two classes, a VAE and its codes of the images."""
    kind, options = KINDS[request.param]
    if kind == "AutoencoderRAE":
        pytest.importorskip("transformers")
        if not hasattr(diffusers, kind):
            pytest.skip("not in this version of diffusers")
    folder = tmp_path_factory.mktemp(kind)
    tiny_vae(kind, **options).save_pretrained(folder / "vae")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")
    plan = plan_encoding(
        EncodeConfig(
            source=str(folder / "images"), out=folder / "codes", vae=str(folder / "vae"), size=8, num_workers=0
        )
    )
    begin(plan)
    encode_share(plan, device="cpu", count=int)
    finish(plan)
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """The folder of a run of two steps on the codes."""
    card = read_card(place / "codes" / "codes.json")
    assert card.variance == vae_traits(load_vae(CodecConfig(vae=str(place / "vae")))).variance
    sizes = {"in_channels": card.shape[0], "image_size": card.shape[1], "patch_size": 1, "num_classes": 2}
    sizes |= {"path": str(place / "codes"), "split": "train", "held_out_images": 4, "batch_size": 10, "epochs": 2}
    sizes |= {"evaluate_every_epochs": 2, "sample_every_epochs": 2, "warmup_epochs": 0.5, "num_images": 4}
    recipe = dataclasses.replace(tiny_recipe(**sizes), codec=CodecConfig(vae=str(place / "vae")))
    train(recipe, place / "run", max_steps=1)
    train(recipe, place / "run", max_steps=2, start="resume")
    return place / "run"


def test_codes_train_a_flow_whose_pipeline_decodes_them(place, trained):
    assert np.isfinite(list(losses(trained).values())).all()
    pipe = ITARFlowPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    vae = load_vae(CodecConfig(vae=str(place / "vae")))
    assert vae_identity(pipe.vae) == vae_identity(vae)

    def made(**options):
        return pipe(class_labels=[0, 1], generator=torch.Generator().manual_seed(0), **options).images

    codes = made(output_type="codes")
    assert codes.shape == (2, *pipe.flow.image_shape)
    decoded = (VaeCodec(vae).decode(codes).clamp(-1, 1) + 1) / 2
    assert decoded.shape == (2, *pipe.picture_shape)
    torch.testing.assert_close(made(output_type="pt"), decoded)
    assert f"{type(vae).__name__}, for images of 8 x 8 pixels" in (trained / "pipeline" / "README.md").read_text()


@pytest.mark.slow
def test_a_decoder_learns_noise_and_takes_the_place_of_the_old_one(place, trained, tmp_path):
    config = DecoderConfig(
        vae=str(place / "vae"),
        size=8,
        t_max=0.3,
        noise_levels=(0.0, 0.3),
        data=DataConfig(path=str(place / "images"), in_memory=True, held_out_images=4),
        train=TuneConfig(steps=2, batch_size=8, warmup_steps=1, learning_rate=1e-2, ema_decay=None, log_every=1),
    )
    fine_tune(config, tmp_path / "decoder")
    tuned, plain = (load_vae(CodecConfig(vae=str(path))) for path in (tmp_path / "decoder" / "vae", place / "vae"))
    assert vae_identity(tuned) == vae_identity(plain)
    codes = VaeCodec(plain).encode(torch.zeros(1, vae_traits(plain).in_channels, 8, 8)).mean
    assert not torch.equal(VaeCodec(tuned).decode(codes), VaeCodec(plain).decode(codes))
    pipeline, options = str(trained / "pipeline"), ["--class-labels", "1", "--device", "cpu", "--method", "skip"]
    pictures = []
    for name, words in (("old", []), ("new", ["--decoder", str(tmp_path / "decoder" / "vae")])):
        main(["sample", pipeline, *options, "--output", str(tmp_path / f"{name}.png"), *words])
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderRAE"])
def test_recomputed_activations_are_refused_where_diffusers_has_none(kind):
    if kind == "AutoencoderRAE":
        pytest.importorskip("transformers")
    config = DecoderConfig(vae="tiny", size=8, t_max=0.3, train=TuneConfig(gradient_checkpointing=True))
    with pytest.raises(ValueError, match=f"gradient_checkpointing is on, .* {kind}"):
        config.check(tiny_vae(kind), 1)
