"""How well does a flow tell the images it was trained on from others? AUROC by data set, noise level and rule.

python benchmarks/ood.py runs/cifar10/pipeline --inside cifar10 --outside caltech=caltech101

The rules, each a score that is larger for images that look foreign: the plain one, -log p(image + noise, t); how far
that is from its median over reference images, on either side (typicality, Nalisnick et al. 2019); and -log p less the
bits of the image's PNG file (complexity, Serra et al. 2020). Nothing is trained on images from outside. Besides the
data sets named, there are the inside images blurred, and flat ones of their mean colours. 0.5 = by chance; less than
that, foreign images look more familiar than those of the training.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import ImageFilter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor

from itarflow import ITARFlowPipeline, TARFlow
from itarflow.codec import Posterior, to_pil, to_pixels
from itarflow.data import DataConfig, load_data
from itarflow.data.images import spread_over, to_array
from itarflow.evaluation.likelihood.bounds import Noise, likelihoods, noises_of

BATCH = 50
console = Console(width=120)


@dataclass
class Options:
    """Compare a flow's likelihoods of data sets; it is asked without labels."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """The folder of a pipeline that models pixels."""
    inside: str
    """The data set of the training, as `DataConfig.path`."""
    outside: tuple[str, ...] = ()
    """Other data sets, NAME=PATH."""
    inside_split: str = "test"
    """Images that it was not trained on."""
    reference_split: str = "train"
    """Of the inside data, to know what is typical."""
    outside_split: str = "test"
    """Of the others."""
    num_images: int = 500
    """Of each set, evenly spaced over it; all, if there are fewer."""
    num_levels: int = 4
    """Noise levels, evenly over those of the training."""
    draws: int = 1
    """Draws of the noise, averaged."""


def main(options: Options) -> None:
    """Print the mean likelihoods, then the AUROC of each rule."""
    pipe = ITARFlowPipeline.from_pretrained(options.checkpoint)
    noises = noises_of(pipe.flow, kind="gaussian", count=options.num_levels)
    inside = _images(pipe.flow, options.inside, options.inside_split, options.num_images)
    sets = {"inside": inside}
    for named in options.outside:
        name, _, path = named.partition("=")
        sets[name] = _images(pipe.flow, path, options.outside_split, options.num_images)
    sets["blurred"] = _blurred(inside)
    sets["flat"] = inside.float().mean(dim=(2, 3), keepdim=True).round().byte().expand_as(inside)
    reference = _images(pipe.flow, options.inside, options.reference_split, options.num_images)
    nll = {name: _bits(pipe.flow, images, noises, options.draws) for name, images in sets.items()}
    typical = np.median(_bits(pipe.flow, reference, noises, options.draws), axis=0)
    size = {name: np.array([_png_bits(image) for image in images])[:, None] for name, images in sets.items()}

    titles = [f"t = {noise.level:g}" for noise in noises]
    means = Table(
        "images", "number", "PNG", *titles, title="Mean bits/dim: of PNG files, and -log2 p", title_justify="left"
    )
    for name, values in nll.items():
        means.add_row(
            name, str(len(values)), f"{size[name].mean():.2f}", *(f"{mean:.3f}" for mean in values.mean(axis=0))
        )
    console.print(means)
    scores = {
        "-log p": nll,
        "typicality": {name: np.abs(values - typical) for name, values in nll.items()},
        "complexity": {name: values - size[name] for name, values in nll.items()},
    }
    table = Table("outside", "rule", *titles, title="AUROC of inside against outside", title_justify="left")
    for name in list(sets)[1:]:
        for rule, values in scores.items():
            table.add_row(name, rule, *(f"{area:.3f}" for area in _areas(values["inside"], values[name])))
    console.print(table)


def _images(flow: TARFlow, path: str, split: str, count: int) -> Tensor:
    """uint8 (B, C, H, W)."""
    channels, size, _ = flow.image_shape
    config = DataConfig(path=path, split=split, held_out_images=0)
    found = load_data(config, image_size=size, in_channels=channels).train
    count = min(count, len(found))
    return torch.stack([found[index].image for index in spread_over(len(found), count)])


def _bits(flow: TARFlow, images: Tensor, noises: tuple[Noise, ...], draws: int) -> np.ndarray:
    """(B, levels), -log2 p(image + noise) / D."""
    parts = []
    for start in track(range(0, len(images), BATCH), "measuring", console=Console(stderr=True)):
        part = Posterior(to_pixels(images[start : start + BATCH]), None)
        numbers = range(start, start + len(part.mean))
        parts.append(likelihoods(flow, part, None, noises, draws=draws, numbers=numbers, bits=False).nll)
    return torch.cat(parts).numpy() / math.log(2)


def _blurred(images: Tensor) -> Tensor:
    """By a Gaussian of one pixel."""
    pictures = [picture.filter(ImageFilter.GaussianBlur(1)) for picture in to_pil(to_pixels(images))]
    return torch.from_numpy(np.stack([to_array(picture, images.shape[1]) for picture in pictures]))


def _png_bits(image: Tensor) -> float:
    """Bits/dim of an image (C, H, W) as a PNG file."""
    (picture,) = to_pil(to_pixels(image)[None])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return 8 * len(buffer.getvalue()) / image.numel()


def _areas(inside: np.ndarray, outside: np.ndarray) -> list[float]:
    foreign = np.repeat([0, 1], [len(inside), len(outside)])
    return [roc_auc_score(foreign, np.concatenate(columns)) for columns in zip(inside.T, outside.T, strict=True)]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
