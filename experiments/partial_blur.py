"""How much blur of a part of an image `itarflow diagnose` finds: real images, a part of each blurred on purpose.

    python experiments/partial_blur.py uoft-cs/cifar10 --split test --size 32

The threshold is taken from one half of the images, so that 1 % of them lie below it. Of the other half, as they are,
that gives the false alarms; with a part blurred, what is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter
from torch import Tensor

from itarflow.data import DataConfig, load_data
from itarflow.evaluation.diagnosis.failures import fine_detail, threshold

FALSE_ALARMS = 0.01
PARTS = {
    "the lower half": lambda size: (slice(size // 2, size), slice(None)),
    "the right half": lambda size: (slice(None), slice(size // 2, size)),
    "a quarter, in a corner": lambda size: (slice(size // 2, size), slice(size // 2, size)),
    "a strip of a quarter of the height": lambda size: (slice(3 * size // 4, size), slice(None)),
}
BLUR = (1.0, 1.5, 2.5)
"""Standard deviations of the Gaussian, in pixels."""
NOISE = (1, 2, 3, 5)
"""Standard deviations of noise that is left on the blurred images, in grey levels."""


@dataclass(frozen=True)
class Options:
    """Real images to plant blur in."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """As for --data.path of a recipe."""
    size: int = 32
    """Height and width to which they are cropped."""
    split: str = "train"
    images: int = 6000
    """From all over the set; one half of them sets the threshold."""
    planted: int = 600
    """Images of the other half in which blur is planted."""


def main(options: Options) -> None:
    """Print shares of images below the threshold."""
    config = DataConfig(path=options.data, split=options.split, held_out_images=0)
    found = load_data(config, image_size=options.size, in_channels=3).train
    chosen = torch.linspace(0, len(found) - 1, min(options.images, len(found)), dtype=torch.float64).long()
    images = torch.stack([found[int(index)].image for index in chosen])
    known, others = images[::2], images[1::2]
    limit = threshold(detail(known), FALSE_ALARMS)

    def share(of: Tensor) -> str:
        return f"{float((detail(of) < limit).float().mean()):.1%}"

    planted = others[: options.planted]
    table = Table("blurred", *(f"{sigma:g} pixels" for sigma in BLUR), title=f"found, of {len(planted):,} images")
    for name, part in PARTS.items():
        table.add_row(name, *(share(blurred(planted, part(options.size), sigma)) for sigma in BLUR))
    console = Console()
    console.print(f"false alarms: {share(others)} of {len(others):,} images as they are")
    console.print(table)
    for level in NOISE:
        half = blurred(planted, PARTS["the lower half"](options.size), 1.5)
        noise = level * torch.randn(half.shape, generator=torch.Generator().manual_seed(0))
        console.print(
            f"the lower half by 1.5 pixels, with noise of {level} grey levels on it: {share(to_grey(half + noise))}"
        )


def detail(images: Tensor) -> Tensor:
    """`fine_detail`, some images at a time."""
    return torch.cat([fine_detail(part) for part in images.split(250)])


def blurred(images: Tensor, part: tuple[slice, slice], sigma: float) -> Tensor:
    """The images (N, C, H, W), with a part of each replaced by that of its blurred version."""
    result = images.clone()
    smooth = torch.from_numpy(gaussian_filter(images.numpy().astype("float32"), (0, 0, sigma, sigma)))
    result[:, :, part[0], part[1]] = to_grey(smooth)[:, :, part[0], part[1]]
    return result


def to_grey(values: Tensor) -> Tensor:
    """Values as uint8 grey levels."""
    return values.round().clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
