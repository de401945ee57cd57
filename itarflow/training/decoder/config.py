"""Fine-tuning of an autoencoder's decoder on noisy codes: config, random numbers, and evaluation.

A flow of one noise level models codes + t * noise, and so its samples are noisy. A decoder that has learnt to decode
such codes gives clean images at once (STARFlow, arXiv 2506.06276). The encoder stays as it is, and with it the codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from itarflow.codec import CodecConfig, Vae, VaeCodec, code_shape, to_pixels, to_uint8, vae_traits
from itarflow.data.images import spread_over
from itarflow.data.load import DataConfig, ImageDataset
from itarflow.data.loader import in_order
from itarflow.runtime.pictures import titled_grid
from itarflow.runtime.seeds import mixed_seed
from itarflow.training.decoder.losses import LossConfig, psnr
from itarflow.training.settings import Optimisation

_EVALUATION_BATCH = 16
"""Held-out images at a time; fixed, since the noise is drawn by batch."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Optimisation):
    """The optimisation."""

    steps: int = 20_000
    """Optimiser steps; the length of the learning-rate schedule."""
    batch_size: int = 32
    """Images an optimiser step, over all processes and accumulated micro-batches."""
    accumulation: int = 1
    """Micro-batches that an optimiser step is split into, to save memory. The result is the same."""
    learning_rate: float = 1e-4
    """Highest learning rate, after the warm-up; of decoder and critic."""
    min_learning_rate: float = 1e-6
    """Learning rate where the warm-up begins and the cosine ends."""
    warmup_steps: int = 200
    """Length of the linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine down to min_learning_rate at the last step, or no change."""
    weight_decay: float = 0.0
    """AdamW's, on all parameters of the decoder."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's; the critic's first is at most 0.5."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm. None = never."""
    ema_decay: float | None = 0.999
    """Exponential moving average of the weights, which is evaluated and exported. None = the last weights."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of encoder, decoder and critic in training; losses and evaluation are float32 always."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: far less memory for a second forward pass."""
    seed: int = 0
    """0 or more. Decides the order of the images, all noise, and the critic's first weights."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 2000
    """Steps between evaluations on the held-out images."""
    save_every: int = 1000
    """Steps between saved states, from which --resume goes on."""
    keep_states: int = 2
    """Newest saved states that are kept."""
    max_bad_steps: int = 10
    """Give up after so many steps in a row whose gradient is not finite. Such steps are skipped."""
    trackers: tuple[str, ...] = ()
    """Where Accelerate logs to, besides metrics.jsonl: tensorboard, wandb, mlflow, ..."""

    def __post_init__(self) -> None:
        self.check_numbers(positive=("steps", "evaluate_every"), not_negative=("warmup_steps",))


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The config of a fine-tuning: VAE, images and noise."""

    vae: str
    """The autoencoder in diffusers' format, such as an AutoencoderKL: a folder, or a name on the Hub such as
    stabilityai/sd-vae-ft-ema."""
    revision: str | None = None
    """Branch, tag or commit of a VAE on the Hub."""
    scaling_factor: float | None = None
    """Codes are (latents - shift_factor) * scaling_factor. None = as the VAE's config says. Give what the flow gets:
    it decides how much the noise is."""
    shift_factor: float | None = None
    """See scaling_factor. None = as the VAE's config says."""
    sample_posterior: bool = True
    """Draw the codes from the VAE's posterior; off = its mean."""
    size: int
    """Height and width of the images in pixels."""
    crop_size: int | None = None
    """Train on random crops of so many pixels, which is faster, and for a decoder, which looks at neighbourhoods,
    nearly as good. Held-out images are whole. None = train on whole images, too."""
    t_max: float
    """Noise level of the codes: what the flow was trained at."""
    t_min: float | None = None
    """Draw the noise level of each image uniformly from t_min to t_max, for one decoder of a range of levels.
    None = always t_max."""
    noise_levels: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5)
    """Noise levels at which the decoder is evaluated, before and after."""
    comparison_images: int = 6
    """Held-out images in comparison.png."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss terms."""
    train: TuneConfig = field(default_factory=TuneConfig)
    """The optimisation."""

    def __post_init__(self) -> None:
        if not 0 < self.t_max < math.inf:
            raise ValueError(f"t_max is {self.t_max}; expected a noise level > 0, such as 0.3.")
        if self.t_min is not None and not 0 <= self.t_min <= self.t_max:
            raise ValueError(f"t_min is {self.t_min}; expected a noise level from 0 to t_max, {self.t_max}, or None.")
        if not self.noise_levels or not all(0 <= level < math.inf for level in self.noise_levels):
            raise ValueError(f"noise_levels is {self.noise_levels}; expected one or more numbers >= 0.")
        if self.size < 1:
            raise ValueError(f"size is {self.size}; expected a number of pixels >= 1.")
        if self.crop_size is not None and not 0 < self.crop_size <= self.size:
            raise ValueError(f"crop_size is {self.crop_size}; expected 1 to {self.size} pixels (the size), or None.")
        if self.comparison_images < 1:
            raise ValueError(f"comparison_images is {self.comparison_images}; expected a number >= 1.")
        self.loss.check(self.trained_size)

    @property
    def trained_size(self) -> int:
        """Height and width in pixels of what the decoder learns from."""
        return self.crop_size or self.size

    @property
    def codec(self) -> CodecConfig:
        """The VAE, and what its codes are."""
        return CodecConfig(
            vae=self.vae,
            revision=self.revision,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            sample_posterior=self.sample_posterior,
        )

    def check(self, vae: Vae, num_processes: int) -> None:
        """Refuse settings that do not fit the VAE or the number of processes.

        Raises:
            ValueError: naming the settings.
        """
        traits = vae_traits(vae)
        channels = traits.in_channels
        if traits.out_channels != channels:
            raise ValueError(
                f"the VAE {self.vae!r} encodes images of {channels} channels, but decodes {traits.out_channels}."
            )
        if self.train.gradient_checkpointing and not vae._supports_gradient_checkpointing:
            raise ValueError(
                f"train.gradient_checkpointing is on, which diffusers can't do for an {type(vae).__name__}; switch it "
                "off."
            )
        for size in (self.size, self.trained_size):
            code_shape(vae, (channels, size, size))
        self.train.check_share(num_processes)


class Draws(NamedTuple):
    """The random numbers of an optimiser step, for its global batch."""

    noise_level: Tensor
    """(B,)"""
    noise: Tensor
    """(B, C, H, W) in the shape of the codes, standard normal."""
    posterior: Tensor
    """The same, for drawing from the VAE's posterior."""
    flip: Tensor
    """(B,) bool, images to mirror."""
    corner: Tensor
    """(B, 2) int64, row and column where the crops begin."""


def draw(config: DecoderConfig, shape: tuple[int, int, int], step: int, device: torch.device) -> Draws:
    """The random numbers of optimiser step `step` = 0, 1, ..., for codes of a shape: of seed and step alone."""
    size, room = config.train.batch_size, config.size - config.trained_size
    generator = torch.Generator(device).manual_seed(mixed_seed(config.train.seed, step))
    low = config.t_max if config.t_min is None else config.t_min
    noise_level = low + (config.t_max - low) * torch.rand(size, generator=generator, device=device)
    noise, posterior = (torch.randn((size, *shape), generator=generator, device=device) for _ in range(2))
    flip = torch.rand(size, generator=generator, device=device) < (0.5 if config.data.horizontal_flip else 0.0)
    corner = torch.randint(room + 1, (size, 2), generator=generator, device=device)
    return Draws(noise_level, noise, posterior, flip, corner)


class Decoding(nn.Module):
    """The decoder of a VAE as a module: codes (B, C, H, W) -> images in about [-1, 1], in float32.

    It shares the VAE's modules, so that the VAE learns with it.
    """

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self._codec = VaeCodec(vae)
        self.requires_grad_(True)

    def forward(self, codes: Tensor) -> Tensor:
        """See the class."""
        return self._codec.decode(codes)


def augmented(images: Tensor, draws: Draws, size: int) -> Tensor:
    """Images (B, C, H, W) mirrored and cropped to so many pixels as the draws say."""
    images = torch.where(draws.flip[:, None, None, None], images.flip(3), images)
    if images.shape[-1] > size:
        parts = zip(images, draws.corner.tolist(), strict=True)
        images = torch.stack([image[:, top : top + size, left : left + size] for image, (top, left) in parts])
    return images.contiguous(memory_format=torch.channels_last)


def codes_of(config: DecoderConfig, codec: VaeCodec, images: Tensor, noise: Tensor) -> Tensor:
    """Codes (B, C, H, W) of images in [-1, 1]; the standard normal noise of that shape draws from the posterior."""
    posterior = codec.encode(images)
    return posterior.sample(noise) if config.sample_posterior else posterior.mean


@torch.no_grad()
def decoded_at_all_levels(config: DecoderConfig, codec: VaeCodec, images: Tensor, batch: int) -> list[Tensor]:
    """Whole images (B, C, H, W) in [-1, 1], decoded from codes with each of the noise levels.

    Args:
        config: names the levels.
        codec: of the VAE.
        images: (B, C, H, W) in [-1, 1].
        batch: number that the noise depends on, besides the seed. It is the same noise at all levels.
    """
    generator = torch.Generator(images.device).manual_seed(mixed_seed(config.train.seed, batch, 1))
    shape = (len(images), *code_shape(codec.vae, tuple(images.shape[1:])))
    noise, posterior = (torch.randn(shape, generator=generator, device=images.device) for _ in range(2))
    codes = codes_of(config, codec, images, posterior)
    return [codec.decode(codes + level * noise) for level in config.noise_levels]


def held_out_psnr(
    config: DecoderConfig, codec: VaeCodec, dataset: ImageDataset, accelerator: Accelerator
) -> tuple[dict[str, float], tuple[str, ...]]:
    """PSNR of the images of a set, decoded from codes with fixed noise, the same at each call.

    Returns:
        Noise level -> mean over the images of all processes, in dB; and the unreadable ones that this process met.
    """
    share = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    sums, count = [0.0] * len(config.noise_levels), 0
    broken: list[str] = []
    for number, batch in enumerate(in_order(dataset, _EVALUATION_BATCH, config.data.num_workers, **share)):
        images = to_pixels(batch.images.to(accelerator.device))
        index = number * accelerator.num_processes + accelerator.process_index
        decoded = decoded_at_all_levels(config, codec, images, index)
        sums = [total + float(psnr(level, images).sum()) for total, level in zip(sums, decoded, strict=True)]
        count += len(images)
        broken += batch.broken
    everywhere = gather_object([(sums, count)])
    total = sum(images for _, images in everywhere)
    columns = zip(*(values for values, _ in everywhere), strict=True)
    means = {f"{level:g}": sum(column) / total for level, column in zip(config.noise_levels, columns, strict=True)}
    return means, tuple(broken)


def examples(config: DecoderConfig, dataset: ImageDataset) -> Tensor:
    """(N, C, H, W) uint8 images for a comparison, from all over a set."""
    count = min(config.comparison_images, len(dataset))
    return torch.stack([dataset[index].image for index in spread_over(len(dataset), count)])


def decoded_examples(config: DecoderConfig, codec: VaeCodec, images: Tensor, device: torch.device) -> list[Tensor]:
    """uint8 images (N, C, H, W), decoded from codes with each of the noise levels, as uint8 on the CPU."""
    pixels = to_pixels(images.to(device))
    return [to_uint8(decoded).cpu() for decoded in decoded_at_all_levels(config, codec, pixels, 0)]


def comparison(
    config: DecoderConfig, images: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]
) -> Image.Image:
    """A row an image: the original, and for each noise level what the decoder made of it before and after.

    Args:
        config: names the levels.
        images: (N, C, H, W) uint8.
        before: as `decoded_examples` returns it.
        after: the same.
    """
    titles, columns = ["original"], [images]
    for level, old, new in zip(config.noise_levels, before, after, strict=True):
        titles += [f"t = {level:g}\nbefore", f"t = {level:g}\nafter"]
        columns += [old, new]
    return titled_grid([_picture(column[row]) for row in range(len(images)) for column in columns], titles)


def _picture(image: Tensor) -> Image.Image:
    """uint8 (C, H, W), C = 1 or 3."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())
