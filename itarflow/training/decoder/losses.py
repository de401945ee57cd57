"""Losses of a decoder (reconstruction terms and a critic), and PSNR."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_VGG_PIXELS = 16
"""Smallest side of an image that VGG's five scales can look at."""
_CRITIC_PIXELS = 8
"""Smallest side of an image of which the critic sees a patch."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; 0 leaves a term out. Images are in [-1, 1], and each term is a mean over all values."""

    l1: float = 1.0
    """Of the absolute difference to the original."""
    l2: float = 1.0
    """Of the squared difference. It is what PSNR measures, and alone gives blurred images."""
    lpips: float = 0.0
    """Of LPIPS, the perceptual difference by VGG-16; 1 is usual. Needs pip install "itarflow[decoder]",
    and downloads the weights of VGG-16 (528 MB) once."""
    adversarial: float = 0.0
    """Of a critic that learns to tell decoded patches from real ones: sharper, at the expense of PSNR; 0.1, say."""
    adversarial_start: int = 0
    """Step at which the critic begins; better late, once the other terms have settled."""

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "lpips", "adversarial", "adversarial_start"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"loss.{name} is {getattr(self, name)}; expected a number >= 0.")
        if not self.l1 + self.l2 + self.lpips:
            raise ValueError("loss.l1, loss.l2 and loss.lpips are all 0; expected one of them > 0.")

    def check(self, size: int) -> None:
        """Refuse images of so many pixels that are too small for a term.

        Raises:
            ValueError: naming the term.
        """
        for name, smallest in (("lpips", _VGG_PIXELS), ("adversarial", _CRITIC_PIXELS)):
            if getattr(self, name) and size < smallest:
                raise ValueError(
                    f"loss.{name} is {getattr(self, name)}, which needs images of {smallest} x {smallest} pixels or "
                    f"more, but they are {size} x {size}; set it to 0."
                )


class PatchCritic(nn.Module):
    """A PatchGAN: images (B, C, H, W) -> (B, 1, H / 8, W / 8), how real the surroundings of each place look."""

    def __init__(self, in_channels: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(2):
            inner, outer = width << level, width << (level + 1)
            # Group norm, not batch norm, so that an image's scores do not depend on the batch.
            layers += [
                nn.Conv2d(inner, outer, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(8, outer),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width << 2, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Scores, positive for real."""
        return self.layers(images)


def hinge_loss(real: Tensor, decoded: Tensor) -> Tensor:
    """What the critic minimises, (), from its scores of real and of decoded images, in float32."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + decoded.float()).mean())


def adversarial_loss(critic: nn.Module, decoded: Tensor) -> Tensor:
    """What the decoder minimises, (): minus the critic's mean score. The critic gets no gradient."""
    weights = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    return -torch.func.functional_call(critic, weights, (decoded,)).float().mean()


def reconstruction_terms(
    config: LossConfig, decoded: Tensor, images: Tensor, perceptual: nn.Module | None
) -> dict[str, Tensor]:
    """The terms of a weight > 0 but for the critic's, each (), of decoded images (B, C, H, W) and their originals.

    Args:
        config: the weights.
        decoded: in about [-1, 1], float32.
        images: in [-1, 1], float32.
        perceptual: LPIPS; needed if its weight is > 0.
    """
    terms: dict[str, Tensor] = {}
    if config.l1:
        terms["l1"] = (decoded - images).abs().mean()
    if config.l2:
        terms["l2"] = (decoded - images).square().mean()
    if config.lpips and perceptual is not None:
        terms["lpips"] = perceptual(*(part.expand(-1, 3, -1, -1) for part in (decoded, images))).float().mean()
    return terms


def load_lpips() -> nn.Module:
    """LPIPS of VGG-16, frozen: two batches (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1).

    Raises:
        ValueError: the package is not installed, or its weights can be had neither from the disk nor from the network.
    """
    try:
        import lpips
    except ImportError as error:
        raise ValueError(
            f'loss.lpips needs the package lpips ({error}): pip install "itarflow[decoder]", or set it to 0.'
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by a deprecated interface
            return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:  # no network, or half a file
        raise ValueError(
            f"loss.lpips needs the weights of VGG-16, which could not be loaded: {error}\nOn a machine with a network "
            "run: python -c \"import torchvision; torchvision.models.vgg16(weights='IMAGENET1K_V1')\"; then copy "
            f"vgg16-397923af.pth from there into {torch.hub.get_dir()}/checkpoints, or set loss.lpips to 0."
        ) from error


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio of each decoded image in dB, 100 at most.

    Args:
        decoded: (B, C, H, W), clamped to [-1, 1] first.
        images: (B, C, H, W) in [-1, 1], whose peak is 2.
    """
    error = (decoded.float().clamp(-1, 1) - images.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))
