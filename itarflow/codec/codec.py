"""Images to codes and back: pixel space, and the codes of an autoencoder."""

from __future__ import annotations

import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from itarflow.codec.identity import affine
from itarflow.codec.kinds import Vae, code_shape, image_shape, kind_of


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
        vae: of a class in `KINDS`.
        slice_size: images that are encoded or decoded at a time, which bounds the memory; None = all.
        tiled: encode and decode large images in overlapping tiles, for images that don't fit otherwise. Those larger
            than a tile (the VAE's sample_size, mostly 512) come out slightly different.

    Raises:
        ValueError: slice_size < 1, a VAE of another class, or tiles that diffusers can't make.
    """

    def __init__(self, vae: Vae, *, slice_size: int | None = None, tiled: bool = False) -> None:
        if slice_size is not None and slice_size < 1:
            raise ValueError(f"slice_size is {slice_size}; expected a number of images >= 1, or None for all.")
        self._kind = kind_of(vae)
        if tiled and (reason := self._kind.tiles(vae)):
            raise ValueError(reason)
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            vae = copy.deepcopy(vae).float()
        if tiled:
            vae = copy.copy(vae)  # shares the weights; tiling is switched on for this one alone
            vae.enable_tiling()
        self.vae, self.slice_size = vae, slice_size

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, C, H, W) in [-1, 1] -> the posterior of their codes, in float32.

        Raises:
            ValueError: the images have not the VAE's channels or size, or its stride does not divide the size.
        """
        if images.ndim != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, C, H, W).")
        code_shape(self.vae, tuple(images.shape[1:]))
        parts = [self._encode(part) for part in self._slices(images)]
        means, log_variances = zip(*parts, strict=True)
        return Posterior(torch.cat(means), None if log_variances[0] is None else torch.cat(log_variances))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, C, H, W) -> images in about [-1, 1], in float32.

        Raises:
            ValueError: the VAE has no codes of that shape.
        """
        if codes.ndim != 4:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (B, C, H, W).")
        image_shape(self.vae, tuple(codes.shape[1:]))
        shift, factor = affine(self.vae, codes.device)
        latents = (codes.float() / factor + shift).to(self.vae.dtype)
        return torch.cat([self._kind.decode(self.vae, part).float() for part in self._slices(latents)])

    def _encode(self, images: Tensor) -> Posterior:
        shift, factor = affine(self.vae, images.device)
        mean, log_variance = self._kind.encode(self.vae, images.to(self.vae.dtype))
        if log_variance is not None:
            log_variance = log_variance.float() + 2 * factor.log()
        return Posterior((mean.float() - shift) * factor, log_variance)

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
