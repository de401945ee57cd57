"""8-bit pixels and back; codes of an autoencoder and back; which autoencoder made them."""

import copy
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import randomise, tiny_vae
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from itarflow.codec import (
    CodecConfig,
    PixelCodec,
    Posterior,
    VaeCodec,
    code_shape,
    codec_of,
    differing,
    image_shape,
    load_vae,
    own_scaling,
    stored_codes,
    to_pixels,
    to_uint8,
    vae_identity,
    vae_traits,
)
from itarflow.codec.identity import affine
from itarflow.codec.kinds import KINDS as KINDS_OF_CODECS
from itarflow.runtime.pipeline_index import VAE_KINDS

KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2", "AutoencoderRAE")


CODES = {"AutoencoderKLFlux2": (8, 4, 6)} | {kind: (4, 4, 6) for kind in KINDS if kind != "AutoencoderKLFlux2"}
"""Shapes of the codes of images of 8 x 12 pixels."""


def vae_of(kind, **options):
    """A tiny VAE; the test is left out where an AutoencoderRAE can't be built."""
    if kind == "AutoencoderRAE":
        pytest.importorskip("transformers")
        if not hasattr(diffusers, kind):
            pytest.skip("not in this version of diffusers")
    return tiny_vae(kind, **options)


def images_for(vae, count=3):
    return images(count, 8, vae_traits(vae).in_channels)


def images(count=3, size=8, channels=1, seed=0):
    return torch.rand((count, channels, size, size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pixels_round_trip_for_all_values():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    pixels = to_pixels(images)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    torch.testing.assert_close(pixels, images.double().div(127.5).sub(1).float(), rtol=0, atol=1e-7)
    assert torch.equal(to_uint8(pixels), images)
    assert torch.equal(to_uint8(pixels + 0.0038), images)  # half a grey level is 0.00392


def test_to_uint8_clamps_and_takes_half_precision():
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
    assert to_uint8(torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)).tolist() == [0, 255]


def test_pixels_are_not_converted_twice():
    with pytest.raises(ValueError, match="uint8"):
        to_pixels(torch.zeros(1))


def test_pixel_space_is_the_codec_that_changes_nothing():
    codec = codec_of(None)
    assert isinstance(codec, PixelCodec)
    posterior = codec.encode(images())
    assert posterior.sample(torch.randn(3, 1, 8, 8)).equal(images())
    assert codec.decode(posterior.mean).equal(images())


def test_codes_of_a_kl_autoencoder_are_its_latents_shifted_and_scaled():
    vae = tiny_vae(scaling_factor=0.4, shift_factor=0.1)
    posterior = VaeCodec(vae).encode(images())
    expected = vae.encode(images()).latent_dist
    torch.testing.assert_close(posterior.mean, (expected.mean - 0.1) * 0.4)
    torch.testing.assert_close((0.5 * posterior.log_variance).exp(), expected.std * 0.4)
    torch.testing.assert_close(VaeCodec(vae).decode(posterior.mean), vae.decode(expected.mean).sample)


def test_codes_of_a_tiny_autoencoder_have_no_variance():
    vae = tiny_vae("AutoencoderTiny", scaling_factor=2.0, shift_factor=0.25)
    posterior = VaeCodec(vae).encode(images())
    latents = vae.encode(images()).latents
    assert posterior.log_variance is None
    torch.testing.assert_close(posterior.mean, (latents - 0.25) * 2)
    torch.testing.assert_close(VaeCodec(vae).decode(posterior.mean), vae.decode(latents).sample)


def test_statistics_of_single_channels_take_part():
    vae = tiny_vae(latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(0.5, 1.0, 2.0, 4.0), scaling_factor=3.0)
    latents = vae.encode(images()).latent_dist.mean
    channel = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None], torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None, None]
    codes = VaeCodec(vae).encode(images()).mean
    torch.testing.assert_close(codes, (latents - channel[0]) / channel[1] * 3.0)
    torch.testing.assert_close(VaeCodec(vae).decode(codes), vae.decode(latents).sample)


def test_a_posterior_is_sampled_with_its_own_spread():
    mean, log_variance = torch.full((20000,), 3.0), torch.full((20000,), 2 * torch.tensor(0.5).log().item())
    drawn = Posterior(mean, log_variance).sample(torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_change_nothing(kind):
    vae = vae_of(kind)
    whole, sliced = VaeCodec(vae), VaeCodec(vae, slice_size=2)
    codes = whole.encode(images_for(vae, 5)).mean
    torch.testing.assert_close(sliced.encode(images_for(vae, 5)).mean, codes)
    torch.testing.assert_close(sliced.decode(codes), whole.decode(codes))


def test_tiles_are_for_large_images_and_leave_the_vae_as_it_is():
    vae = tiny_vae(sample_size=16)
    whole, tiled = VaeCodec(vae), VaeCodec(vae, tiled=True)
    small, large = whole.encode(images(1, 16)).mean, whole.encode(images(1, 40)).mean
    torch.testing.assert_close(tiled.decode(small), whole.decode(small))
    seen = tiled.decode(large)
    assert seen.shape == (1, 1, 40, 40)
    assert not torch.equal(seen, whole.decode(large))
    assert not vae.use_tiling
    vae.enable_tiling()
    torch.testing.assert_close(VaeCodec(vae).decode(large), seen)


def test_a_vae_that_overflows_in_half_precision_computes_in_float32():
    vae = tiny_vae(force_upcast=True)
    half = copy.deepcopy(vae).half()
    torch.testing.assert_close(
        VaeCodec(half).encode(images()).mean, VaeCodec(vae).encode(images()).mean, atol=5e-3, rtol=0
    )
    assert half.dtype == torch.float16
    low = VaeCodec(copy.deepcopy(vae).bfloat16())
    assert low.vae.dtype == torch.bfloat16
    assert low.decode(low.encode(images()).mean).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda vae: VaeCodec(vae).encode(images(1, 9)), "9 x 9 .*stride of 2"),
        (lambda vae: VaeCodec(vae).encode(images(1, 8, 3)), "3 channels.* of 1"),
        (
            lambda vae: VaeCodec(vae).decode(torch.zeros(1, 3, 4, 4)),
            r"\(3, 4, 4\); this VAE expects \(4, H, W\)",
        ),
        (lambda vae: VaeCodec(vae, slice_size=0), "slice_size is 0"),
        (lambda _: VaeCodec(tiny_vae("AutoencoderTiny"), tiled=True), "stride 2.* stride 8"),
    ],
)
def test_what_does_not_fit_a_vae_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny_vae())


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_of_codes(kind):
    vae = vae_of(kind)
    stride, shape, pixels = (4, (64, 2, 2), (3, 8, 8)) if kind == "AutoencoderRAE" else (2, CODES[kind], (1, 8, 12))
    assert vae_traits(vae).stride == stride
    codes = VaeCodec(vae).encode(torch.zeros(1, *pixels)).mean
    assert code_shape(vae, pixels) == shape == tuple(codes.shape[1:])
    assert image_shape(vae, shape) == pixels == tuple(VaeCodec(vae).decode(codes).shape[1:])
    assert vae_traits(vae).variance == (VaeCodec(vae).encode(torch.zeros(1, *pixels)).log_variance is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_of_a_vae_is_that_of_its_encoder_and_scaling(kind):
    vae = vae_of(kind)
    identity = vae_identity(vae)
    other_decoder, other_encoder = copy.deepcopy(vae), copy.deepcopy(vae)
    randomise(other_decoder.decoder)
    randomise(other_encoder.encoder)
    assert vae_identity(other_decoder) == identity
    assert [line.split(":")[0] for line in differing(identity, vae_identity(other_encoder))] == ["encoder"]
    rescaled = copy.deepcopy(vae)
    rescaled.register_to_config(scaling_factor=0.9)
    assert differing(identity, vae_identity(rescaled)) == [f"scaling_factor: {identity.scaling_factor} -> 0.9"]
    assert not torch.equal(VaeCodec(rescaled).encode(images_for(vae)).mean, VaeCodec(vae).encode(images_for(vae)).mean)
    low = copy.deepcopy(vae).bfloat16()
    assert vae_identity(low) == vae_identity(copy.deepcopy(low).float())  # the same values, stored differently


def test_a_vae_is_found_in_its_folder_or_in_that_of_a_pipeline(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    for place in (tmp_path / "pipeline" / "vae", tmp_path / "pipeline"):
        loaded = load_vae(CodecConfig(vae=str(place)))
        assert vae_identity(loaded) == vae_identity(vae)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    rescaled = load_vae(CodecConfig(vae=str(tmp_path / "pipeline"), scaling_factor=2.0, shift_factor=-1.0))
    torch.testing.assert_close(
        VaeCodec(rescaled).encode(images()).mean, (vae.encode(images()).latent_dist.mean + 1) * 2
    )
    rescaled.save_pretrained(tmp_path / "rescaled")
    assert json.loads((tmp_path / "rescaled" / "config.json").read_text())["scaling_factor"] == 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_to_disk_and_back_with_another_scaling(kind, tmp_path):
    vae = vae_of(kind)
    plain = VaeCodec(vae).encode(images_for(vae))
    vae.save_pretrained(tmp_path / "plain")
    loaded = load_vae(CodecConfig(vae=str(tmp_path / "plain")))
    assert vae_identity(loaded) == vae_identity(vae)
    assert VaeCodec(loaded).encode(images_for(vae)).mean.equal(plain.mean)
    (factor, shift), changed = own_scaling(vae), CodecConfig(vae=str(tmp_path / "plain"), scaling_factor=1.5)
    rescaled = load_vae(changed if vae_identity(vae).latents_std else replace(changed, shift_factor=0.25))
    if not vae_identity(vae).latents_std:
        plain = plain._replace(mean=plain.mean + (shift - 0.25) * factor)
    seen = VaeCodec(rescaled).encode(images_for(vae))
    torch.testing.assert_close(seen.mean, plain.mean / factor * 1.5)
    torch.testing.assert_close(
        VaeCodec(rescaled).decode(seen.mean),
        VaeCodec(vae).decode(VaeCodec(vae).encode(images_for(vae)).mean),
        rtol=1e-4,
        atol=1e-5,
    )
    rescaled.save_pretrained(tmp_path / "rescaled")
    assert vae_identity(load_vae(CodecConfig(vae=str(tmp_path / "rescaled")))) == vae_identity(rescaled)


def test_codes_of_a_deep_compression_autoencoder_are_its_latents():
    vae = tiny_vae("AutoencoderDC", scaling_factor=2.0)
    latents = vae.encode(images()).latent
    torch.testing.assert_close(VaeCodec(vae).encode(images()).mean, latents * 2)
    torch.testing.assert_close(VaeCodec(vae).decode(latents * 2), vae.decode(latents).sample)


def test_codes_of_a_flux2_autoencoder_are_those_of_the_pipeline_of_diffusers():
    from diffusers import Flux2Pipeline

    vae = tiny_vae("AutoencoderKLFlux2")
    codes = VaeCodec(vae).encode(images())
    encode = Flux2Pipeline._encode_vae_image
    owner = SimpleNamespace(vae=vae, _patchify_latents=Flux2Pipeline._patchify_latents)
    torch.testing.assert_close(codes.mean, encode(owner, images(), None))
    deviation = vae.encode(images()).latent_dist.std
    factor = (vae.bn.running_var + vae.config.batch_norm_eps).rsqrt()[:, None, None]
    expected = Flux2Pipeline._patchify_latents(deviation) * factor
    torch.testing.assert_close((0.5 * codes.log_variance).exp(), expected)
    torch.testing.assert_close(
        VaeCodec(vae).decode(codes.mean), vae.decode(vae.encode(images()).latent_dist.mean).sample
    )


def test_statistics_of_a_flux2_autoencoder_stay_on_the_device(monkeypatch):
    """Numbers would be waited for at each slice, and a Mac's GPU has no float64."""
    vae = tiny_vae("AutoencoderKLFlux2")
    means, stds = KINDS_OF_CODECS["AutoencoderKLFlux2"].statistics(vae)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("read back"))
    monkeypatch.setattr(torch.Tensor, "double", lambda _: pytest.fail("in float64"))
    shift, factor = affine(vae, torch.device("cpu"))
    torch.testing.assert_close(shift.flatten(), torch.tensor(means))
    torch.testing.assert_close(factor.flatten(), 1 / torch.tensor(stds))
    assert shift.dtype == factor.dtype == torch.float32


def test_a_pipelines_index_knows_the_same_classes():
    assert tuple(KINDS_OF_CODECS) == VAE_KINDS


def test_a_single_image_is_no_batch():
    with pytest.raises(ValueError, match=r"images have shape \(1, 8, 8\); expected \(B, C, H, W\)"):
        VaeCodec(tiny_vae("AutoencoderKL")).encode(images()[0])


@pytest.mark.parametrize("encoder_type", ["dinov2", "mae"])
def test_a_representation_autoencoder_sees_images_in_0_to_1_and_scales_by_itself(encoder_type):
    vae = vae_of("AutoencoderRAE", encoder_type=encoder_type)
    latents = vae.encode((images(3, 8, 3) + 1) / 2).latent
    codec = VaeCodec(copy.deepcopy(vae).to(memory_format=torch.channels_last))
    codes = codec.encode(images(3, 8, 3)).mean
    torch.testing.assert_close(codes, latents)
    decoded = codec.decode(codes.to(memory_format=torch.channels_last))
    torch.testing.assert_close(decoded, 2 * vae.decode(latents).sample - 1, rtol=1e-4, atol=1e-5)
    other = copy.deepcopy(vae)
    other._latents_std += 0.1
    assert [line.split(":")[0] for line in differing(vae_identity(vae), vae_identity(other))] == ["encoder"]


@pytest.mark.parametrize("encoder_type", ["dinov2", "mae"])
def test_names_of_transformers_4_in_a_representation_autoencoder_are_understood(encoder_type, tmp_path):
    vae = vae_of("AutoencoderRAE", encoder_type=encoder_type)
    vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {"attention.o_proj": "attention.output.dense", "encoder.layers.": "encoder.encoder.layer."}
    older |= {f"attention.{name[0]}_proj": f"attention.attention.{name}" for name in ("query", "key", "value")}
    older |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"} if encoder_type == "mae" else {}
    renamed = {}
    for name, tensor in load_file(file).items():
        old = name
        for new, before in older.items() if name.startswith("encoder.") else ():
            old = old.replace(new, before)
        renamed[old] = tensor
    assert sum(name not in vae.state_dict() for name in renamed) >= 8
    save_file(renamed | {"decoder.decoder_pos_embed": torch.zeros(1, 5, 32)}, file)
    loaded = load_vae(CodecConfig(vae=str(tmp_path)))
    assert vae_identity(loaded) == vae_identity(vae)
    assert VaeCodec(loaded).encode(images(3, 8, 3)).mean.equal(VaeCodec(vae).encode(images(3, 8, 3)).mean)
    del renamed["encoder.embeddings.cls_token"]
    save_file(renamed, file)
    with pytest.raises(OSError, match="its weights hold"):
        load_vae(CodecConfig(vae=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latents_std": [[[-0.5]]] * 64}, "_latents_std holds -0.5; expected numbers > 0"),
        (
            {"latents_mean": [0.1] * 64},
            r"_latents_mean has shape \(64,\), which does not go with codes of \(64, 2, 2\)",
        ),
        ({"reshape_to_2d": False}, "its codes are no grid"),
    ],
)
def test_representation_autoencoders_without_usable_codes_are_refused(options, words, tmp_path):
    vae_of("AutoencoderRAE", **options).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=words):
        load_vae(CodecConfig(vae=str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("AutoencoderKLWan", "it is AutoencoderKLWan, which encodes videos"),
        ("AutoencoderKLQwenImage", "which encodes videos"),
        ("AutoencoderOobleck", "which encodes sound"),
        ("VQModel", "it is VQModel, whose codes are"),
        ("AutoencoderKLHunyuanImage", "which is not among those"),
    ],
)
def test_autoencoders_of_other_things_are_refused_by_name(kind, words, tmp_path):
    tiny_vae().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": kind}))
    with pytest.raises(OSError, match=words):
        load_vae(CodecConfig(vae=str(tmp_path)))


@pytest.mark.parametrize(
    ("lacking", "words"), [("diffusers", "not in this|has not; pip install"), ("transformers", "is of transformers")]
)
def test_a_missing_library_is_named(lacking, words, tmp_path, monkeypatch):
    vae_of("AutoencoderRAE").save_pretrained(tmp_path)
    if lacking == "diffusers":
        monkeypatch.delattr(diffusers, "AutoencoderRAE")
        monkeypatch.setattr("itarflow.codec.load.diffusers", SimpleNamespace(__version__="0.36.0"))
    else:
        monkeypatch.setattr("itarflow.codec.load.is_transformers_available", lambda: False)
    with pytest.raises(OSError, match=words):
        load_vae(CodecConfig(vae=str(tmp_path)))


def test_a_representation_autoencoder_is_for_images_of_one_size():
    vae = vae_of("AutoencoderRAE")
    with pytest.raises(ValueError, match="images are 16 x 16 pixels; this AutoencoderRAE is for 8 x 8 alone"):
        VaeCodec(vae).encode(images(1, 16, 3))
    with pytest.raises(ValueError, match=r"codes have shape \(64, 4, 4\); this VAE expects \(64, 2, 2\)"):
        VaeCodec(vae).decode(torch.zeros(1, 64, 4, 4))
    with pytest.raises(ValueError, match="sees whole images alone"):
        VaeCodec(vae, tiled=True)


def test_what_is_no_vae_is_refused(tmp_path):
    UNet2DModel(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_pretrained(tmp_path / "unet")
    for name in ("cut", "whole"):
        tiny_vae().save_pretrained(tmp_path / name)
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    for name, words in {
        "unet": "it is UNet2DModel",
        "cut": "can't be loaded",
        "empty": "holds no config.json",
    }.items():
        with pytest.raises(OSError, match=words):
            load_vae(CodecConfig(vae=str(tmp_path / name)))
    incomplete = load_file(tmp_path / "whole" / weights.name)
    del incomplete["quant_conv.weight"]
    save_file(incomplete, tmp_path / "whole" / weights.name)
    with pytest.raises(OSError, match=r"missing: quant_conv\.weight"):
        load_vae(CodecConfig(vae=str(tmp_path / "whole")))
    with pytest.raises(OSError, match="is neither a folder here nor a Hub id"):
        load_vae(CodecConfig(vae="/nowhere/vae"))
    with pytest.raises(OSError, match="'someone/vae' can't be loaded"):
        load_vae(CodecConfig(vae="someone/vae"))
    with pytest.raises(ValueError, match=r"scaling_factor is 0\.0"):
        load_vae(CodecConfig(vae=str(tmp_path / "cut"), scaling_factor=0.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scaling_factor": 0}, "scaling_factor is 0; expected a number > 0"),
        ({"scaling_factor": -1.0}, "scaling_factor is -1.0; expected a number > 0"),
        ({"scaling_factor": None}, "scaling_factor is None; expected a number > 0"),
        ({"scaling_factor": "x"}, "scaling_factor is 'x'; expected a number > 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"shift_factor": "x"}, "shift_factor is 'x'; expected a number"),
        ({"latents_std": [1.0]}, "latents_std is .*; expected 4 numbers > 0, one a channel"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std is .*; expected 4 numbers > 0"),
        ({"latents_mean": 3}, "latents_mean is 3; expected 4 numbers"),
    ],
)
def test_scalings_in_a_config_by_which_nothing_can_be_scaled_are_refused(tmp_path, changes, words):
    tiny_vae().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"has a config.json whose {words}"):
        load_vae(CodecConfig(vae=str(tmp_path)))
    if set(changes) == {"scaling_factor"}:  # one that is given counts
        assert load_vae(CodecConfig(vae=str(tmp_path), scaling_factor=0.5)).config.scaling_factor == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_per_block": 100_000}, "layers_per_block is 100000, which does not go with its weights"),
        ({"layers_per_block": "x"}, "layers_per_block"),
        ({"block_out_channels": [8, 10**9]}, "block_out_channels"),
        ({"_class_name": ["AutoencoderKL"]}, "it is "),
        ({"layers_per_block": 1, "mid_block_add_attention": False}, "numbers; its weights hold"),
    ],
)
def test_configs_that_do_not_go_with_the_weights_are_refused_before_anything_is_built(tmp_path, changes, words):
    tiny_vae(layers_per_block=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    begun = time.monotonic()
    with pytest.raises(OSError, match=words):
        load_vae(CodecConfig(vae=str(tmp_path)))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("AutoencoderRAE", {"decoder_num_hidden_layers": 1e308}, "decoder_num_hidden_layers"),
        ("AutoencoderRAE", {"encoder_num_hidden_layers": 3}, "numbers; its weights hold"),
        ("AutoencoderRAE", {"encoder_input_size": 10**9}, "encoder_input_size is 1000000000, which does not go"),
        ("AutoencoderRAE", {"decoder_num_attention_heads": -1}, "decoder_num_attention_heads"),
        ("AutoencoderDC", {"encoder_layers_per_block": [1, 5]}, "numbers; its weights hold"),
        ("AutoencoderDC", {"decoder_block_out_channels": [8, "x"]}, "decoder_block_out_channels"),
        ("AutoencoderKLFlux2", {"patch_size": [1, 2]}, r"patch_size is \[1, 2\]|numbers; its weights hold"),
        ("AutoencoderKLFlux2", {"patch_size": 3}, r"patch_size.*array|array.*patch_size"),
        ("AutoencoderKLFlux2", {"patch_size": [2]}, "patch_size"),
        ("AutoencoderRAE", {"patch_size": [4, 4]}, r"patch_size.*int|int.*patch_size"),
        ("AutoencoderKLFlux2", {"batch_norm_eps": -5.0}, "batch_norm_eps"),
    ],
)
def test_so_are_those_of_other_kinds(tmp_path, kind, changes, words):
    vae_of(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    begun = time.monotonic()
    with pytest.raises(OSError, match=words):
        load_vae(CodecConfig(vae=str(tmp_path)))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    vae = tiny_vae()
    vae.decoder.conv_out.bias[0] = value
    vae.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"NaN or infinite values in decoder\.conv_out\.bias"):
        load_vae(CodecConfig(vae=str(tmp_path)))


def test_weights_that_are_a_pickle_alone_are_refused(tmp_path):
    tiny_vae().save_pretrained(tmp_path, safe_serialization=False)
    assert [path.suffix for path in tmp_path.glob("diffusion*")] == [".bin"]
    with pytest.raises(OSError, match="can't be loaded"):
        load_vae(CodecConfig(vae=str(tmp_path)))


def test_names_of_weights_from_the_first_years_are_understood(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    renamed = {re.sub(r"to_(q|k|v|out\.0)(?=\.)", lambda found: old[found[0]], name): name for name in weights}
    assert sum(name != other for name, other in renamed.items()) == 16
    save_file({name: weights[other] for name, other in renamed.items()}, file)
    assert vae_identity(load_vae(CodecConfig(vae=str(tmp_path / "old")))) == vae_identity(vae)


def test_stored_codes_are_drawn_from_the_view_that_is_wanted():
    stored = torch.randn((3, 2, 2, 4, 5, 5), generator=torch.Generator().manual_seed(0)).half()
    flip, noise = torch.tensor([False, True, True]), torch.randn(3, 4, 5, 5)
    view = torch.stack([stored[0, 0], stored[1, 1], stored[2, 1]]).float()
    torch.testing.assert_close(stored_codes(stored, flip, None), view[:, 0])
    torch.testing.assert_close(stored_codes(stored, flip, noise), view[:, 0] + (view[:, 1] / 2).exp() * noise)
    only_means = stored[:, :1, :1]
    torch.testing.assert_close(
        stored_codes(only_means, torch.zeros(3, dtype=torch.bool), noise), stored[:, 0, 0].float()
    )
