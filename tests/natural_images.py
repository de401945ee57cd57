"""Pictures with the spectrum of photographs, without a photograph, and what goes wrong in generated ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def natural_images(count: int, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """uint8 (N, C, H, W): amplitudes fall as 1 / frequency; brightness, contrast and slope differ between images."""
    generator = torch.Generator().manual_seed(seed)
    across = torch.fft.fftfreq(size)
    frequency = torch.hypot(across[:, None], torch.fft.rfftfreq(size)[None]).clamp(min=1 / size)
    slope = 0.8 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    noise = noise + 2 * torch.randn(count, 1, size, size, generator=generator)  # channels go together
    shaped = torch.fft.irfft2(torch.fft.rfft2(noise) * frequency**-slope, s=(size, size))
    shaped = (shaped - shaped.mean(dim=(2, 3), keepdim=True)) / shaped.std(dim=(1, 2, 3), keepdim=True)
    contrast = 25 + 40 * torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 90 + 80 * torch.rand(count, 1, 1, 1, generator=generator)
    return (brightness + contrast * shaped).clamp(0, 255).round().to(torch.uint8)


def with_background(images: Tensor, level: float, ripple: float = 0.0, seed: int = 0) -> Tensor:
    """All but the middle quarter of each image at one grey level, with a little noise."""
    size = images.shape[-1]
    noise = ripple * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    collapsed = (level + noise).clamp(0, 255).round().to(torch.uint8)
    middle = slice(size // 4, size - size // 4)
    collapsed[:, :, middle, middle] = images[:, :, middle, middle]
    return collapsed


def blurred(images: Tensor, sigma: float = 1.5) -> Tensor:
    """The images under a Gaussian of this standard deviation in pixels."""
    reach = int(3 * sigma)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate")
    smooth = F.conv2d(padded.flatten(0, 1)[:, None], kernel)
    return smooth.view(images.shape).round().to(torch.uint8)


def blurred_tokens(images: Tensor, patch: int, tokens: range, sigma: float = 1.5) -> Tensor:
    """The images with these tokens, in raster order, replaced by those of the blurred ones."""
    result, smooth = images.clone(), blurred(images, sigma)
    for token in tokens:
        row, column = (patch * place for place in divmod(token, images.shape[-1] // patch))
        part = (..., slice(row, row + patch), slice(column, column + patch))
        result[part] = smooth[part]
    return result
