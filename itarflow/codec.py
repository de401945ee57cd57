"""Between 8-bit pixels and the values that a flow models: pixels in [-1, 1], or the codes of an autoencoder.

Codes are the latents of a VAE, shifted and scaled to about unit variance as its config says, with the noise level in
their units. Pixel space is the codec that changes nothing.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias, TypedDict

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from msgspec import Meta
from PIL import Image
from torch import Tensor

from itarflow.runtime.files import weights_digest
from itarflow.runtime.hub import folder_of
from itarflow.runtime.json_file import as_type, read_json
from itarflow.runtime.model_folder import CONFIG, check_bounded, check_finite, read_heads, weight_files
from itarflow.runtime.text import printable

Vae: TypeAlias = AutoencoderKL | AutoencoderTiny
_LARGEST_SCALING = 1e9  # of the usual VAEs it is 0.1 to 2
_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Settings of a VAE that `_check_scaling` is for."""
_KINDS = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """What the flow models: pixels, or the codes of an autoencoder."""

    vae: str | None = None
    """An autoencoder in diffusers' format, AutoencoderKL or AutoencoderTiny: a folder, or a name on the Hub such as
    stabilityai/sd-vae-ft-ema. The flow then trains on codes that vae/encode_dataset.py has made with it.
    None = the flow models pixels."""
    revision: str | None = None
    """Branch, tag or commit of a VAE on the Hub."""
    scaling_factor: float | None = None
    """Codes are (latents - shift_factor) * scaling_factor. None = as the VAE's config says."""
    shift_factor: float | None = None
    """See scaling_factor. None = as the VAE's config says."""
    encoder: str | None = None
    """SHA-256 of the VAE's encoder, if another is to be refused. Need not be given: a run writes it down, with scaling
    and shift, so that it goes on with the same codes or not at all."""
    sample_posterior: bool = True
    """Draw the code anew from the VAE's posterior each time that an image is seen; off = its mean."""


def to_pixels(images: Tensor) -> Tensor:
    """uint8 in 0 .. 255 -> float32 in [-1, 1], any shape: x / 127.5 - 1.

    Raises:
        ValueError: the images are not uint8 (converted twice, for instance).
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images have dtype {images.dtype}; expected torch.uint8 values in 0..255")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, any shape: clamped, then rounded to the nearest of the 256 levels.

    It is the only rounding in the project, so that saved images, metrics and training agree; `to_pixels` undoes it.
    """
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


class Posterior(NamedTuple):
    """Where the codes of images lie: a Gaussian for each value, or a point."""

    mean: Tensor
    """(B, C, H, W) float32, in the units of codes."""
    log_variance: Tensor | None
    """The same shape and units; None = the autoencoder gives no variance."""

    def sample(self, noise: Tensor) -> Tensor:
        """Codes (B, C, H, W) from standard normal noise of that shape; the mean if there is no variance."""
        return self.mean if self.log_variance is None else self.mean + (0.5 * self.log_variance).exp() * noise


class Codec(Protocol):
    """Images to codes and back."""

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, C, H, W) in [-1, 1] -> their codes."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> images (B, C, H, W), in about [-1, 1], float32."""


class PixelCodec:
    """Pixel space: images are their own codes."""

    def encode(self, images: Tensor) -> Posterior:
        """The images themselves."""
        return Posterior(images.float(), None)

    def decode(self, codes: Tensor) -> Tensor:
        """The codes themselves."""
        return codes.float()


class VaeCodec:
    """The codes of an autoencoder of diffusers.

    The module is only read, and computes in its own precision; one in float16 whose config asks for more
    (`force_upcast`, as of the SD-VAEs, which overflow) is copied to float32. Gradients flow through both directions
    unless the caller switches them off.

    Args:
        vae: AutoencoderKL or AutoencoderTiny.
        slice_size: images that are encoded or decoded at a time, which bounds the memory; None = all.
        tiled: encode and decode large images in overlapping tiles, for images that don't fit otherwise. Those larger
            than a tile (the VAE's sample_size, 512 for an AutoencoderTiny) come out slightly different.

    Raises:
        ValueError: slice_size < 1, or tiles for an AutoencoderTiny whose stride is not 8, which diffusers can't do.
    """

    def __init__(self, vae: Vae, *, slice_size: int | None = None, tiled: bool = False) -> None:
        if slice_size is not None and slice_size < 1:
            raise ValueError(f"slice_size is {slice_size}; expected a number of images >= 1, or None for all.")
        if tiled and isinstance(vae, AutoencoderTiny) and vae_stride(vae) != 8:
            raise ValueError(f"this AutoencoderTiny has stride {vae_stride(vae)}; tiles are only for stride 8.")
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae = copy.deepcopy(vae).float()
        if tiled:
            vae = copy.copy(vae)  # shares the weights; tiling is switched on for this one alone
            vae.enable_tiling()
        self.vae, self.slice_size = vae, slice_size

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, C, H, W) in [-1, 1] -> the posterior of their codes, in float32.

        Raises:
            ValueError: the VAE's stride does not divide height or width, or the number of channels is not the VAE's.
        """
        code_shape(self.vae, tuple(images.shape[1:]))
        parts = [self._encode(part) for part in self._slices(images)]
        means, log_variances = zip(*parts, strict=True)
        return Posterior(torch.cat(means), None if log_variances[0] is None else torch.cat(log_variances))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, C, H, W) -> images in about [-1, 1], in float32.

        Raises:
            ValueError: the number of channels is not that of the VAE's codes.
        """
        channels = self.vae.config.latent_channels
        if codes.ndim != 4 or codes.shape[1] != channels:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; this VAE expects (B, {channels}, H, W).")
        shift, factor = _affine(self.vae, codes.device)
        latents = (codes.float() / factor + shift).to(self.vae.dtype)
        return torch.cat([self.vae.decode(part).sample.float() for part in self._slices(latents)])

    def _encode(self, images: Tensor) -> Posterior:
        shift, factor = _affine(self.vae, images.device)
        encoded = self.vae.encode(images.to(self.vae.dtype))
        if isinstance(self.vae, AutoencoderTiny):
            return Posterior((encoded.latents.float() - shift) * factor, None)
        gaussian = encoded.latent_dist
        return Posterior((gaussian.mean.float() - shift) * factor, gaussian.logvar.float() + 2 * factor.log())

    def _slices(self, batch: Tensor) -> tuple[Tensor, ...]:
        return batch.split(self.slice_size or max(len(batch), 1))


def codec_of(vae: Vae | None, *, slice_size: int | None = None, tiled: bool = False) -> Codec:
    """The codec of a VAE, arguments as of `VaeCodec`; without one, pixel space, which needs neither."""
    return PixelCodec() if vae is None else VaeCodec(vae, slice_size=slice_size, tiled=tiled)


def stored_codes(stored: Tensor, flip: Tensor, noise: Tensor | None) -> Tensor:
    """Codes (B, C, H, W) in float32 from what a data set of codes holds of each image.

    Args:
        stored: (B, V, P, C, H, W); V = 1, or 2 with the mirrored image second; P = 1 for the posterior's mean, or 2
            with its log-variance second.
        flip: (B,) bool, which images are mirrored; none if V = 1.
        noise: (B, C, H, W), standard normal, to draw from the posterior; None = its mean.
    """
    views = stored.shape[1]
    chosen = stored[torch.arange(len(stored), device=stored.device), flip.long() if views > 1 else 0].float()
    log_variance = chosen[:, 1] if chosen.shape[1] > 1 else None
    posterior = Posterior(chosen[:, 0], log_variance)
    return posterior.mean if noise is None else posterior.sample(noise)


@dataclass(frozen=True)
class VaeIdentity:
    """All that codes depend on: two VAEs with equal identities give equal codes; their decoders may differ."""

    kind: str
    """Class of diffusers."""
    encoder: str
    """SHA-256 of the encoder's weights, as float32."""
    stride: Annotated[int, Meta(ge=1)]
    """Pixels a code, in each direction."""
    channels: Annotated[int, Meta(ge=1)]
    """Of the codes."""
    scaling_factor: float
    shift_factor: float
    latents_mean: tuple[float, ...] = ()
    """Of single channels, where a VAE has them: codes are (latents - latents_mean) / latents_std * scaling_factor."""
    latents_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_scaling(
            self.scaling_factor, self.shift_factor, self.latents_mean, self.latents_std, self.channels, "the VAE's "
        )


def vae_identity(vae: Vae) -> VaeIdentity:
    """The identity of a VAE; reads all weights of its encoder."""
    encoder = {key: value for key, value in vae.state_dict().items() if key.startswith(("encoder.", "quant_conv."))}
    return VaeIdentity(
        kind=type(vae).__name__,
        encoder=weights_digest(encoder),
        stride=vae_stride(vae),
        channels=vae.config.latent_channels,
        scaling_factor=float(vae.config.scaling_factor),
        shift_factor=float(vae.config.shift_factor or 0.0),
        latents_mean=tuple(vae.config.get("latents_mean") or ()),
        latents_std=tuple(vae.config.get("latents_std") or ()),
    )


def differing(stored: VaeIdentity, wanted: VaeIdentity) -> list[str]:
    """Lines "name: stored -> wanted" of what differs."""
    old, new = asdict(stored), asdict(wanted)
    return [f"{name}: {old[name]} -> {value}" for name, value in new.items() if old[name] != value]


def check_same_codes(name: str, other: Vae, vae: Vae) -> None:
    """Refuse what is called `name` if its VAE, `other`, makes other codes than `vae`.

    Raises:
        ValueError: saying what differs.
    """
    if lines := differing(vae_identity(vae), vae_identity(other)):
        raise ValueError(f"{name} is for other codes than the checkpoint's VAE makes:\n  " + "\n  ".join(lines))


def vae_stride(vae: Vae) -> int:
    """Pixels a code, in each direction."""
    blocks = (
        vae.config.encoder_block_out_channels if isinstance(vae, AutoencoderTiny) else vae.config.block_out_channels
    )
    return int(2 ** (len(blocks) - 1))


def code_shape(vae: Vae, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of the codes of images (C, H, W).

    Raises:
        ValueError: the stride does not divide the size, or the number of channels is not the VAE's.
    """
    channels, height, width = image_shape
    stride, wanted = vae_stride(vae), vae.config.in_channels
    if channels != wanted:
        raise ValueError(f"images have {channels} channels; this VAE encodes images of {wanted}.")
    if height % stride or width % stride:
        raise ValueError(
            f"images are {height} x {width} pixels, which the VAE's stride of {stride} does not divide; crop or "
            f"resize them to a multiple of {stride}."
        )
    return vae.config.latent_channels, height // stride, width // stride


def load_vae(config: CodecConfig, *, variant: str | None = None) -> Vae:
    """The VAE that a config names, in float32 on the CPU, with the config's scaling in its own config.

    A folder or repository of a whole pipeline gives the VAE in it. Only safetensors are read.

    Args:
        config: names it.
        variant: of the weights in a folder, such as "fp16"; None = the plain ones.

    Raises:
        OSError: there is no such VAE, or it is of another kind, or damaged.
        ValueError: the config names none, or a scaling factor, given or in the VAE's own config, is no number > 0.
    """
    if config.vae is None:
        raise ValueError("codec.vae is None; expected a folder or a Hub name of a VAE.")
    if config.scaling_factor is not None and not 0 < config.scaling_factor < float("inf"):
        raise ValueError(f"codec.scaling_factor is {config.scaling_factor}; expected a number > 0, or None.")
    try:
        vae = _checked_vae(_folder_of(config.vae, config.revision), variant)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of diffusers, the Hub's client and safetensors
        raise OSError(
            f"the VAE {config.vae!r} can't be loaded: {error}\nExpected a folder or a Hub name (NAME/MODEL) of an "
            f"{' or '.join(_KINDS)} in diffusers' format, {CONFIG} and safetensors; check the name, the network and "
            "the files."
        ) from error
    changes = {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}
    vae.register_to_config(**{key: value for key, value in changes.items() if value is not None})
    own = vae.config
    _check_scaling(
        own.get("scaling_factor"), own.get("shift_factor"), own.get("latents_mean"), own.get("latents_std"),
        own.latent_channels, f"the VAE {config.vae!r} has a config.json whose ",
    )  # fmt: skip
    return vae.eval().requires_grad_(False)


class _VaeConfig(TypedDict, total=False):
    """What is read of a VAE's config besides its scaling, also by diffusers."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: list[int]
    encoder_block_out_channels: list[int]
    layers_per_block: Annotated[int, Meta(ge=1)]
    norm_num_groups: Annotated[int, Meta(ge=1)]
    down_block_types: list[str]
    up_block_types: list[str]
    force_upcast: bool
    mid_block_add_attention: bool
    sample_size: int | list[int] | None


def _checked_vae(folder: Path, variant: str | None) -> Vae:
    """The VAE in a folder, which may be anybody's: nothing is built before config and heads of weights are checked."""
    path = folder / CONFIG
    values = read_json(path, dict[str, Any])
    if (kind := str(values.get("_class_name", "a model of unknown kind"))) not in _KINDS:
        raise OSError(f"it is {printable(kind)}, as {CONFIG} says")
    as_type(values, _VaeConfig, str(path))
    heads = read_heads(weight_files(folder, variant))
    check_bounded({name: value for name, value in values.items() if name not in _SCALING}, heads, path)
    # Not filled in piece by piece, because parts of an AutoencoderKL have changed their names over the years.
    vae, report = _KINDS[kind].from_pretrained(
        folder, variant=variant, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    if missing := report["missing_keys"]:  # which diffusers leaves uninitialised
        raise OSError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    held, stored = (sum(math.prod(one.shape) for one in some) for some in (vae.state_dict().values(), heads.values()))
    if held != stored:  # counted, since names have changed
        raise OSError(f"{path} is of a VAE of {held:,} numbers; its weights hold {stored:,}")
    for name, tensor in vae.state_dict().items():
        check_finite(name, tensor, str(folder))
    return vae


def _check_scaling(factor: Any, shift: Any, means: Any, stds: Any, channels: int, whose: str) -> None:
    """Refuse numbers by which no latents can be scaled; the last three may be None, and () is as None.

    Raises:
        ValueError: naming the first.
    """

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if not number(factor) or not 0 < factor <= _LARGEST_SCALING:
        raise ValueError(f"{whose}scaling_factor is {factor!r}; expected a number > 0, at most {_LARGEST_SCALING:g}.")
    if shift is not None and not (number(shift) and abs(shift) <= _LARGEST_SCALING):
        raise ValueError(f"{whose}shift_factor is {shift!r}; expected a number of such a size, or null for none.")
    for name, values, positive in (("latents_mean", means, False), ("latents_std", stds, True)):
        if not values and values in (None, [], ()):
            continue
        fits = isinstance(values, list | tuple) and len(values) == channels and all(map(number, values))
        if not fits or (positive and min(values) <= 0):
            wanted = f"{channels} numbers{' > 0' if positive else ''}, one a channel"
            raise ValueError(f"{whose}{name} is {values!r}; expected {wanted}, or null for none.")


def _folder_of(name: str, revision: str | None) -> Path:
    """The folder with a VAE's config and weights, downloaded if need be; that of a whole pipeline has it in vae/."""
    files = ("config.json", "diffusion_pytorch_model.safetensors")
    patterns = [*files, *(f"vae/{file}" for file in files)]
    folder = folder_of(name, patterns, expected="a VAE", revision=revision)
    found = next((place for place in (folder, folder / "vae") if (place / "config.json").is_file()), None)
    if found is None:
        raise OSError(f"{folder} holds no config.json, nor does a folder vae in it")
    return found


def _affine(vae: Vae, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and factor (C or 1, 1, 1) of codes = (latents - shift) * factor."""
    config = vae.config
    means, stds = config.get("latents_mean"), config.get("latents_std")
    shift = torch.tensor(means if means is not None else [config.shift_factor or 0.0], device=device)
    spread = torch.tensor(stds if stds is not None else [1.0], device=device)
    return shift.float()[:, None, None], (config.scaling_factor / spread.float())[:, None, None]


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1], C = 1 or 3 -> greyscale or RGB images of PIL."""
    arrays = to_uint8(images.nan_to_num()).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
