"""The autoencoders of diffusers whose codes a flow can model, and what they differ in.

Each has a `Kind` in `KINDS`: sizes, how latents come out and go in, and the numbers that bring them to unit variance.
All else in the package sees `vae_traits`, `code_shape`, `image_shape` and the codec.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

Vae: TypeAlias = ModelMixin
"""An autoencoder of diffusers, of a class in `KINDS`."""


class VaeTraits(NamedTuple):
    """What others need to know of a VAE."""

    in_channels: int
    """Of the images that it encodes."""
    out_channels: int
    """Of the images that it decodes."""
    channels: int
    """Of its codes."""
    stride: int
    """Pixels a code, in each direction."""
    variance: bool
    """Whether it gives a variance of each value, or a point."""
    image_size: int | None = None
    """Height and width of its images in pixels; None = any multiple of the stride."""


class Kind:
    """A class of diffusers; as it stands, AutoencoderKL."""

    of_codes: tuple[str, ...] = ("encoder.", "quant_conv.")
    """Beginnings of the names of the tensors that codes depend on."""

    def traits(self, vae: Vae) -> VaeTraits:
        """See `VaeTraits`."""
        config = vae.config
        stride = 2 ** (len(config.block_out_channels) - 1)
        return VaeTraits(config.in_channels, config.out_channels, config.latent_channels, stride, variance=True)

    def encode(self, vae: Vae, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images in [-1, 1] -> mean and log-variance of their latents, not scaled."""
        gaussian = vae.encode(images).latent_dist
        return gaussian.mean, gaussian.logvar

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        """Latents, not scaled -> images in about [-1, 1]."""
        decoded: Tensor = vae.decode(latents).sample
        return decoded

    def statistics(self, vae: Vae) -> tuple[Any, Any]:
        """Mean and standard deviation of each channel of the latents; empty or None where the VAE has none."""
        return vae.config.get("latents_mean"), vae.config.get("latents_std")

    def moments(self, vae: Vae, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """`statistics` as float32 tensors (C,) on a device; None where the VAE has none."""
        means, stds = (torch.tensor(one, device=device).float() if one else None for one in self.statistics(vae))
        return means, stds

    def tiles(self, vae: Vae) -> str:  # noqa: ARG002
        """Why diffusers can't encode and decode it in tiles; "" if it can."""
        return ""

    def unfit(self, vae: Vae) -> str:  # noqa: ARG002
        """What is wrong with its tensors and its config besides the scaling; "" if nothing is."""
        return ""

    def plain_name(self, name: str) -> str:
        """The name of a tensor, the same in all versions of the libraries."""
        return name


class _Tiny(Kind):
    def traits(self, vae: Vae) -> VaeTraits:
        config = vae.config
        stride = 2 ** (len(config.encoder_block_out_channels) - 1)
        return VaeTraits(config.in_channels, config.out_channels, config.latent_channels, stride, variance=False)

    def encode(self, vae: Vae, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return vae.encode(images).latents, None

    def tiles(self, vae: Vae) -> str:
        stride = self.traits(vae).stride
        return "" if stride == 8 else f"this AutoencoderTiny has stride {stride}; tiles are only for stride 8."


class _DeepCompression(_Tiny):
    def traits(self, vae: Vae) -> VaeTraits:
        config = vae.config
        stride = 2 ** (len(config.encoder_block_out_channels) - 1)
        return VaeTraits(config.in_channels, config.in_channels, config.latent_channels, stride, variance=False)

    def encode(self, vae: Vae, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return vae.encode(images).latent, None

    def tiles(self, vae: Vae) -> str:  # noqa: ARG002
        return ""


class _Flux2(Kind):
    """Its codes are patches of latents, brought to unit variance by the statistics of a batch norm."""

    def traits(self, vae: Vae) -> VaeTraits:
        traits, patch = super().traits(vae), vae.config.patch_size[0]
        return traits._replace(channels=traits.channels * patch**2, stride=traits.stride * patch)

    def encode(self, vae: Vae, images: Tensor) -> tuple[Tensor, Tensor | None]:
        gaussian, patch = vae.encode(images).latent_dist, vae.config.patch_size[0]
        return pixel_unshuffle(gaussian.mean, patch), pixel_unshuffle(gaussian.logvar, patch)

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        return super().decode(vae, pixel_shuffle(latents, vae.config.patch_size[0]))

    def statistics(self, vae: Vae) -> tuple[Any, Any]:
        mean, variance = vae.bn.running_mean.cpu().double(), vae.bn.running_var.cpu().double()
        return tuple(mean.tolist()), tuple((variance + vae.config.batch_norm_eps).sqrt().tolist())

    def moments(self, vae: Vae, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        # Without a detour to the CPU, for which every slice of images would wait.
        mean, variance = (one.to(device, torch.float32) for one in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    def unfit(self, vae: Vae) -> str:
        patch = vae.config.patch_size
        return "" if len(set(patch)) == 1 else f"patch_size is {patch}; expected the same number twice"


class _Representation(Kind):
    """The tokens of a vision transformer: of images in [0, 1], of one size, scaled by statistics of its own."""

    of_codes = ("encoder.", "encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
    _RENAMED = (
        ("attention.attention.query.", "attention.q_proj."),
        ("attention.attention.key.", "attention.k_proj."),
        ("attention.attention.value.", "attention.v_proj."),
        ("attention.output.dense.", "attention.o_proj."),
        ("intermediate.dense.", "mlp.fc1."),
        ("output.dense.", "mlp.fc2."),
        ("encoder.encoder.layer.", "encoder.layers."),
        ("encoder.vision_model.", "encoder."),
    )
    """transformers has renamed the tensors of vision transformers in its version 5."""

    def traits(self, vae: Vae) -> VaeTraits:
        config = vae.config
        size = config.patch_size * (config.encoder_input_size // config.encoder_patch_size)
        channels = config.num_channels
        return VaeTraits(
            channels, channels, config.encoder_hidden_size, config.patch_size, variance=False, image_size=size
        )

    def encode(self, vae: Vae, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return vae.encode((images + 1) / 2).latent / vae.config.scaling_factor, None

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        # Its view of the tokens needs them in rows.
        return 2 * super().decode(vae, (latents * vae.config.scaling_factor).contiguous()) - 1

    def statistics(self, vae: Vae) -> tuple[Any, Any]:  # noqa: ARG002
        return None, None  # it applies its own

    def tiles(self, vae: Vae) -> str:  # noqa: ARG002
        return "an AutoencoderRAE sees whole images alone; switch tiles off."

    def unfit(self, vae: Vae) -> str:
        if not vae.config.reshape_to_2d:
            return "reshape_to_2d is off, so that its codes are no grid; expected true"
        traits = self.traits(vae)
        side = vae.config.encoder_input_size // vae.config.encoder_patch_size
        wanted = (1, traits.channels, side, side)
        for name in ("_latents_mean", "_latents_std"):
            shape = tuple(getattr(vae, name).shape)
            sizes = zip(shape[::-1], wanted[::-1], strict=False)
            if len(shape) > 4 or any(size not in (1, whole) for size, whole in sizes):
                return f"{name} has shape {shape}, which does not go with codes of {wanted[1:]}"
        smallest = float(vae._latents_std.min())
        return "" if smallest > 0 else f"_latents_std holds {smallest:g}; expected numbers > 0"

    def plain_name(self, name: str) -> str:
        if name.startswith("encoder."):
            for old, new in self._RENAMED:
                name = name.replace(old, new)
        return name


KINDS: dict[str, Kind] = {
    "AutoencoderKL": Kind(),
    "AutoencoderTiny": _Tiny(),
    "AutoencoderDC": _DeepCompression(),
    "AutoencoderKLFlux2": _Flux2(),
    "AutoencoderRAE": _Representation(),
}
"""By the name of the class; `runtime.pipeline_index` has the names too."""


def kind_of(vae: Vae) -> Kind:
    """The kind of a VAE.

    Raises:
        ValueError: it is of another class.
    """
    found = next((KINDS[one.__name__] for one in type(vae).__mro__ if one.__name__ in KINDS), None)
    if found is None:
        raise ValueError(f"the VAE is {type(vae).__name__}; expected one of {', '.join(KINDS)}.")
    return found


def vae_traits(vae: Vae) -> VaeTraits:
    """Channels, stride and more of a VAE."""
    return kind_of(vae).traits(vae)


def code_shape(vae: Vae, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of the codes of images (C, H, W).

    Raises:
        ValueError: the stride does not divide the size, or size or number of channels are not the VAE's.
    """
    (channels, height, width), traits = shape, vae_traits(vae)
    stride, only = traits.stride, traits.image_size
    if channels != traits.in_channels:
        raise ValueError(f"images have {channels} channels; this VAE encodes images of {traits.in_channels}.")
    if only is not None and (height, width) != (only, only):
        raise ValueError(
            f"images are {height} x {width} pixels; this {type(vae).__name__} is for {only} x {only} alone: resize or "
            "crop them."
        )
    if height % stride or width % stride:
        raise ValueError(
            f"images are {height} x {width} pixels, which the VAE's stride of {stride} does not divide; crop or "
            f"resize them to a multiple of {stride}."
        )
    return traits.channels, height // stride, width // stride


def image_shape(vae: Vae, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of the images that codes (C, H, W) are decoded to.

    Raises:
        ValueError: the VAE has no codes of that shape.
    """
    traits = vae_traits(vae)
    side = None if traits.image_size is None else traits.image_size // traits.stride
    if len(shape) != 3 or shape[0] != traits.channels or (side is not None and shape[1:] != (side, side)):
        wanted = f"({traits.channels}, {side or 'H'}, {side or 'W'})"
        raise ValueError(f"codes have shape {tuple(shape)}; this VAE expects {wanted}.")
    _, height, width = shape
    return traits.out_channels, height * traits.stride, width * traits.stride
