"""Recipes: all settings of an experiment as data that can be printed, stored and overridden."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from itarflow.codec import CodecConfig, Vae, load_vae, vae_identity, vae_traits
from itarflow.data.context import CaptionError, find_context
from itarflow.data.load import DataConfig, ImageData, load_data
from itarflow.denoisers.ode import DenoiseScheduler, Method, Spacing
from itarflow.flow.noise import NoiseConfig
from itarflow.inverse.guidance import Guidance
from itarflow.presets import ModelConfig
from itarflow.runtime.devices import Products
from itarflow.runtime.errors import DataError
from itarflow.training.settings import LARGEST, Optimisation, check_trackers


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Optimisation):
    """How the flow is trained. The defaults are the papers', who do not limit the gradient's norm."""

    epochs: float = 300
    """Times that each training image is seen; sets the length of the learning-rate schedule."""
    batch_size: int = 512
    """Images an optimiser step, over all processes and accumulated micro-batches."""
    accumulation: int = 1
    """Micro-batches that an optimiser step is split into, to save memory. The result is the same."""
    learning_rate: float = 1e-4
    """Highest learning rate, after the warm-up."""
    min_learning_rate: float = 1e-6
    """Learning rate where the warm-up begins and the decay ends."""
    warmup_epochs: float = 1.0
    """Length of the linear warm-up, before the cosine decay."""
    weight_decay: float = 1e-4
    """AdamW's, on all parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm. None = never."""
    label_drop: float = 0.1
    """Probability that a training image goes without its label or caption, which guidance needs."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights for sampling and sharing, e.g. 0.9999. None = do not."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the transformers. Affine maps, losses and log-determinants are float32 always."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory for a second forward pass."""
    shard: bool = False
    """Split weights, gradients, optimiser state and averages over the processes (FSDP2), for models whose training
    does not fit one device; evaluation and samples still gather the weights on each. An Accelerate config with
    `distributed_type: FSDP` asks for the same."""
    compile: bool = False
    """Compile the transformer layers with torch.compile; needs a C++ compiler, pays off on long runs."""
    seed: int = 0
    """0 or more. Decides the initial weights, the order of the images, and all noise."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every_epochs: float = 10.0
    """Epochs between held-out evaluations."""
    sample_every_epochs: float = 10.0
    """Epochs between sample grids."""
    save_every: int = 1000
    """Steps between saved states, from which --resume goes on."""
    keep_states: int = 2
    """Newest saved states that are kept."""
    max_bad_steps: int = 10
    """Give up after so many steps in a row whose loss or gradient is not finite. Such steps are skipped."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where Accelerate logs to, besides metrics.jsonl: tensorboard, wandb, mlflow, ..."""

    def __post_init__(self) -> None:
        self.check_numbers(
            positive=("epochs", "evaluate_every_epochs", "sample_every_epochs"), not_negative=("warmup_epochs",)
        )
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"train.label_drop is {self.label_drop}; expected a probability in [0, 1].")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of train.accumulation {self.accumulation}."
            )


_MOST_OF_SAMPLING = {
    "num_denoise_steps": 10_000,
    "num_images": 10_000,
    "batch_size": LARGEST,
    "denoise_batch_size": LARGEST,
    "decode_batch_size": LARGEST,
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the grids during training are sampled, and the defaults of the shared pipeline."""

    guidance: Guidance = field(default_factory=Guidance)
    """Guidance by class label, or by attention temperature."""
    num_denoise_steps: int = 10
    """Score evaluations after the flow's inverse; 1 = TARFlow's single step."""
    method: Method = "euler"
    """Solver of the denoising ODE."""
    spacing: Spacing = "even"
    """Of the noise levels of the denoising. even: in t. quadratic: in the square root of t."""
    clip: bool = False
    """Clamp the estimates of the clean image to [-1, 1]."""
    denoiser: str | None = None
    """What denoises the grids instead of the flow itself: a folder or Hub name of another flow's pipeline, or of a
    DiT or UNet in diffusers' format. A flow of one noise level may then take several steps, down to the denoiser's
    smallest. The shared pipeline denoises by itself unless a call names a denoiser."""
    num_images: int = 64
    """Images of a grid."""
    batch_size: int = 64
    """Images that are sampled at a time; their key-value cache is the largest use of memory."""
    denoise_batch_size: int | None = None
    """Images that are denoised at a time; None = as many as are sampled."""
    decode_batch_size: int | None = 8
    """Images that the VAE decodes at a time; None = as many as are sampled. Not used in pixel space."""

    def __post_init__(self) -> None:
        for name, largest in _MOST_OF_SAMPLING.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= largest:
                raise ValueError(f"sampling.{name} is {value}; expected a number >= 1, at most {largest:,}.")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder of a model of captions."""

    encoder: str | None = None
    """What the pipeline is shared with, so that it takes prompts: a folder or Hub name of the text encoder that made
    the captions' vectors. None = the one that a resumed run has shared, or that the data names, unless neither can be
    loaded."""
    revision: str | None = None
    """Branch, tag or commit of an encoder on the Hub."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment. Recipes in the folder recipes/ are instances of this class and nothing more."""

    name: str
    """Name of the run; its folder is runs/NAME unless --run-dir says otherwise."""
    model: ModelConfig
    """The flow."""
    data: DataConfig
    """The images, or their codes."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """Whether the flow models pixels, or the codes of a VAE."""
    text: TextConfig = field(default_factory=TextConfig)
    """Where prompts are read."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """The noise that is added in training."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """The samples."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w][\w .+=-]*", self.name):
            raise ValueError(
                f"name is {self.name!r}; expected a plain name of letters, digits, '-', '_' and '.'. "
                "Another folder is given by --run-dir."
            )

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """(t_min, t_max) of the trained flow; None for likelihood training, which has no Gaussian noise."""
        if self.noise.distribution == "dequantise":
            return None
        if self.noise.distribution == "constant":
            return self.noise.t_max, self.noise.t_max
        return self.noise.t_min, self.noise.t_max

    @property
    def products(self) -> Products:
        """Precision of matrix products on a GPU, in training and in its evaluations.

        Likelihood training has float32 without TF32, as in the paper (TARFlow, appendix C).
        """
        if self.train.mixed_precision == "bf16":
            return "bf16"
        return "float32" if self.noise.distribution == "dequantise" else "TF32"

    def scheduler(self) -> DenoiseScheduler:
        """The denoising defaults of the pipeline."""
        one_level = self.noise.distribution == "constant"  # hence one step, unless a call names another denoiser
        return DenoiseScheduler(
            t_max=self.noise.t_max,
            t_min=self.noise.t_min,
            num_denoise_steps=1 if one_level else self.sampling.num_denoise_steps,
            method=self.sampling.method,
            spacing=self.sampling.spacing,
            clip=self.sampling.clip,
        )

    def check(self, num_processes: int = 1) -> None:
        """Refuse settings that do not fit together, before any work.

        Raises:
            ValueError: naming the settings.
        """
        single = self.noise.distribution in ("constant", "dequantise")
        if single and self.model.noise_conditioned:
            raise ValueError(
                f"noise.distribution is {self.noise.distribution!r}, which has one noise level, but "
                "model.noise_conditioned is on; set model.noise_conditioned to False, or draw a range of levels."
            )
        if not single and not self.model.noise_conditioned:
            raise ValueError(
                f"noise.distribution is {self.noise.distribution!r}, a range of noise levels, but "
                "model.noise_conditioned is off; switch it on, or use noise.distribution constant."
            )
        alone = self.noise.distribution == "constant" and self.sampling.denoiser is None
        if alone and self.sampling.num_denoise_steps > 1:
            raise ValueError(
                f"sampling.num_denoise_steps is {self.sampling.num_denoise_steps}, but a flow of one noise level "
                "has only one step; set it to 1, name a sampling.denoiser, or train a range of levels."
            )
        if self.noise.distribution == "dequantise" and self.noise.weight != "one":
            raise ValueError(f"noise.weight is {self.noise.weight!r}; likelihood training needs 'one'.")
        if self.noise.distribution == "dequantise" and self.sampling.method != "skip":
            raise ValueError(
                f"sampling.method is {self.sampling.method!r}, but likelihood training adds no Gaussian noise that "
                "could be removed; set it to 'skip'."
            )
        if self.codec.vae is not None and self.noise.distribution == "dequantise":
            raise ValueError("noise.distribution is 'dequantise', which is for 8-bit pixels; leave codec.vae out.")
        if self.codec.vae is not None and self.sampling.clip:
            raise ValueError("sampling.clip is on, but codes are not limited to [-1, 1]; switch it off.")
        if self.text.encoder is not None and not self.model.takes_captions:
            raise ValueError(
                f"text.encoder is {self.text.encoder!r}, but the model takes no captions; leave it out, or set "
                "model.context_dim and model.context_tokens to the width and the number of the captions' vectors, and "
                "model.num_classes to 0."
            )
        self.train.check_share(num_processes)
        check_trackers(self.train.trackers)
        self._check_ranges()
        self.scheduler()
        self._check_flow()

    def _check_ranges(self) -> None:
        """Refuse numbers of images that no set has, and thousands of processes."""
        for name, most in (("num_workers", 1024), ("held_out_images", LARGEST), ("shuffle_buffer", LARGEST),
                           ("max_broken", LARGEST)):  # fmt: skip
            if getattr(self.data, name) > most:
                raise ValueError(f"data.{name} is {getattr(self.data, name)}; expected at most {most:,}.")

    def _check_flow(self) -> None:
        """Refuse a model that can't be built, can't learn, or has not the blocks that are guided."""
        try:
            with torch.device("meta"):  # shapes without memory
                flow = self.model.build(self.noise_range)
        except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # sizes that no tensor can have
            reason = str(error).split("\n", maxsplit=1)[0]
            raise ValueError(f"the model can't be built: {reason}. Lower its sizes in model.*.") from error
        model, number = self.model, len(flow.blocks)
        # A flow may have such a block, but its transformer reads nothing and gets no gradient, with which DDP gives up
        # after the first step, and no state that could be read again.
        if model.image_size in flow.patch_sizes and not model.start_token:
            raise ValueError(
                f"model.patch_size is {model.patch_size} and model.image_size {model.image_size}: the transformer of "
                "a block of one token has no token to read, and can't be trained. Choose a smaller patch."
            )
        guided = self.sampling.guidance.blocks
        if isinstance(guided, int) and guided > number:
            raise ValueError(
                f"sampling.guidance.blocks is {guided}, but the flow has {number}; expected at most {number}."
            )
        if isinstance(guided, tuple) and max(guided, default=0) >= number:
            raise ValueError(
                f"sampling.guidance.blocks {guided} name a block that is not there; the flow has {number}, counted "
                "from 0 at the noise side."
            )

    def steps_per_epoch(self, num_images: int) -> float:
        """Optimiser steps in which each of num_images is seen once."""
        return num_images / self.train.batch_size

    def num_steps(self, num_images: int) -> int:
        """Optimiser steps of the whole training."""
        return max(1, math.ceil(self.train.epochs * self.steps_per_epoch(num_images)))


def open_vae(recipe: Recipe) -> Vae | None:
    """The VAE that the recipe names, on the CPU; None in pixel space.

    Raises:
        OSError: it can't be loaded.
        ValueError: its codes have other channels than the model.
    """
    if recipe.codec.vae is None:
        return None
    vae = load_vae(recipe.codec)
    channels = vae_traits(vae).channels
    if channels != recipe.model.in_channels:
        raise ValueError(
            f"the codes of {recipe.codec.vae} have {channels} channels, but model.in_channels is "
            f"{recipe.model.in_channels}; set --model.in-channels {channels}, or name another VAE."
        )
    found = vae_identity(vae).encoder
    if recipe.codec.encoder not in (None, found):
        raise ValueError(
            f"the encoder of {recipe.codec.vae} is {found}, but codec.encoder is {recipe.codec.encoder}; name the VAE "
            "that it is of, or leave codec.encoder out."
        )
    return vae


def with_identity(recipe: Recipe, vae: Vae | None) -> Recipe:
    """The recipe with the VAE's encoder and scaling recorded, so that another VAE is refused later."""
    if vae is None:
        return recipe
    identity = vae_identity(vae)
    codec = replace(
        recipe.codec,
        encoder=identity.encoder,
        scaling_factor=identity.scaling_factor,
        shift_factor=identity.shift_factor,
    )
    return replace(recipe, codec=codec)


def open_data(recipe: Recipe, vae: Vae | None) -> ImageData:
    """The recipe's data set, of images or of codes that its VAE has made, with the labels or captions of the model.

    Raises:
        DataError: as `load_data` and `check_classes`.
    """
    try:
        data = load_data(
            recipe.data,
            image_size=recipe.model.image_size,
            in_channels=recipe.model.in_channels,
            vae=None if vae is None else vae_identity(vae),
            variance=recipe.codec.sample_posterior,
            context=recipe.model.context_shape if recipe.model.takes_captions else None,
        )
    except CaptionError as error:
        card = find_context(str(recipe.data.path))
        tokens, dim = card.shape if card else (0, 0)
        instead = f"set --model.context-tokens {tokens} --model.context-dim {dim}{'' if card else ' to train without'}"
        raise DataError(f"{error}; or {instead}.") from error
    check_classes(recipe, data)
    return data


def stored_bytes(recipe: Recipe) -> int:
    """Bytes that a data set hands over for an image, at most."""
    of_image = math.prod(recipe.model.image_shape)
    # Stored codes are of 2 bytes, with a mean and a deviation, straight and mirrored; vectors of captions are, too.
    of_caption = 2 * math.prod(recipe.model.context_shape) if recipe.model.takes_captions else 0
    return (of_image if recipe.codec.vae is None else 8 * of_image) + of_caption


def check_classes(recipe: Recipe, data: ImageData) -> None:
    """Refuse a data set whose labels are not the model's.

    Raises:
        DataError: naming both numbers.
    """
    num_classes, found = recipe.model.num_classes, len(data.class_names)
    prefix = num_classes > 0 and recipe.model.context_tokens > 0  # the label as a vector: it has no width of its own
    without = " --model.context-tokens 0 --model.context-dim 0" if prefix else ""
    if num_classes and not found:
        why = "".join(f" ({note})" for note in data.identity.left_out if note.startswith("labels"))
        raise DataError(
            f"The images in {recipe.data.path} have no labels{why}, but model.num_classes is {num_classes}. Put each "
            "class in a folder of its own, name the column by data.label_column, or train without labels "
            f"by --model.num-classes 0{without}."
        )
    if num_classes and found != num_classes:
        raise DataError(
            f"The images in {recipe.data.path} have {found} classes, but model.num_classes is {num_classes}; "
            f"set --model.num-classes {found}{f' --model.context-dim {found + 1}' if prefix else ''}, or "
            f"{f'--model.num-classes 0{without}' if prefix else 0} to ignore the labels."
        )
