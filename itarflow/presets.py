"""The papers' model sizes and set-ups, as data.

Figures are from iTARFlow (arXiv 2604.20041, tables 2 to 5, and the published commands), from
TARFlow (arXiv 2412.06329, table 7), and from STARFlow (arXiv 2506.06276).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from itarflow.flow.tarflow import TARFlow


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. Values that differ between blocks are lists, image side first and noise side last."""

    image_size: int
    """Side of the square images in pixels; other images are cropped and resized to it. With codec.vae: of their
    codes, which the VAE's stride has made smaller, such as 32 for images of 256 pixels."""
    in_channels: int = 3
    """1 = greyscale, 3 = colour; with codec.vae the channels of the codes, such as 4."""
    num_classes: int = 0
    """Number of labels; 0 = a model without labels."""
    patch_size: int | tuple[int, ...] = 2
    """Side of a patch; divides image_size. One number, or one a block."""
    channels: int | tuple[int, ...] = 768
    """Width of the transformers; a multiple of head_dim. One number, or one a block."""
    num_layers: tuple[int, ...] = (8, 8, 8, 8, 8, 8, 8, 8)
    """Transformer layers of each block; as many blocks as numbers."""
    noise_conditioned: bool = True
    """True = iTARFlow, which knows the noise level; False = TARFlow."""
    volume_preserving: bool = False
    """Blocks that only shift, with a prior variance estimated in training."""
    shared_layers: int = 0
    """Layers that all blocks share and run first, counted as part of num_layers."""
    input_scale: float = 1.0
    """Factor on the input images of the flow."""
    learned_first_token: bool = False
    """Let each block transform its first token too, by an affine of noise level and label alone."""
    head_dim: int = 64
    """Width of an attention head."""
    mlp_ratio: int = 4
    """Hidden width of the MLPs, in units of channels."""
    rotary_side: int = 0
    """Rotary positions, for square images of so many tokens a side, as in STARFlow. 0 = learned positions."""
    start_token: bool = False
    """Let each block transform its first token too, by what its transformer makes of a learned token before it."""
    final_norm: bool = False
    """An RMS norm before each block's last projection."""
    soft_clip: float = 0.0
    """c in c tanh(o / c), of all outputs o of a block; 0 = they are not clipped."""
    softplus_scale: bool = False
    """Scales that are a softplus of the output, instead of its exponential."""
    first_block_reversed: bool = False
    """Let the blocks 0, 2, ... read the image backwards, instead of 1, 3, ..."""
    context_dim: int = 0
    """Width of the condition vectors, such as a text encoder's; 0 = none."""
    context_tokens: int = 0
    """Number of condition vectors, which come before the image. With num_classes 1: the label, and context_dim is
    num_classes + 1."""
    context_blocks: int | None = 1
    """How many blocks read them, counted from the noise side. None = all."""

    def build(self, noise_range: Sequence[float] | None = None) -> TARFlow:
        """The flow, freshly initialised; raises ValueError where the settings do not fit together."""
        return TARFlow(**asdict(self), noise_range=noise_range)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, or of their codes."""
        return self.in_channels, self.image_size, self.image_size

    @property
    def context_shape(self) -> tuple[int, int]:
        """(T, E) of the condition vectors; (0, 0) without."""
        return self.context_tokens, self.context_dim

    @property
    def takes_captions(self) -> bool:
        """Whether the images come with captions, and not with labels, which are a context of their own kind."""
        return self.context_dim > 0 and self.num_classes == 0  # the rule of `pipeline.prompts.takes_prompts`


@dataclass(frozen=True, kw_only=True)
class Size:
    """A row of iTARFlow's table 2."""

    channels: int
    num_layers: tuple[int, ...]
    paper_parameters: str
    """As the paper prints it."""
    note: str = ""


SIZES: dict[str, Size] = {
    "S": Size(
        channels=1280,
        num_layers=(2, 2, 2, 12),
        paper_parameters="350M",
        note="The paper counts the 18 layers alone; with noise, class and position embeddings there are 417M.",
    ),
    "B": Size(channels=1280, num_layers=(4, 4, 4, 24), paper_parameters="770M"),
    "L": Size(channels=1600, num_layers=(4, 4, 4, 24), paper_parameters="1.2B"),
    "XL": Size(channels=2176, num_layers=(4, 4, 4, 24), paper_parameters="2.2B"),
}

T_MIN = 0.01
T_MAX = {64: 0.3, 128: 0.5, 256: 0.7}
"""iTARFlow's largest noise level at each resolution in pixels."""
T_MAX_CODES = 0.5
"""iTARFlow's largest noise level on SD-VAE codes of images of 256 pixels."""
SD_VAE = "stabilityai/sd-vae-ft-ema"
"""The VAE of the latent models: codes of 4 channels, each for 8 x 8 pixels."""


def itarflow_model(size: str, resolution: int, num_classes: int = 1000) -> ModelConfig:
    """ITARFlow at a resolution in pixels: 1024 tokens, whatever the resolution (patch = resolution / 32).

    Args:
        size: "S", "B", "L" or "XL".
        resolution: a multiple of 32.
        num_classes: 0 = unconditional.

    Raises:
        ValueError: unknown size, or a resolution that 32 does not divide.
    """
    if size not in SIZES:
        raise ValueError(f"model size is {size!r}; expected one of {', '.join(SIZES)}.")
    if resolution < 32 or resolution % 32:
        raise ValueError(f"resolution is {resolution}; expected a multiple of 32.")
    row = SIZES[size]
    return ModelConfig(
        image_size=resolution,
        num_classes=num_classes,
        patch_size=resolution // 32,
        channels=row.channels,
        num_layers=row.num_layers,
    )


def latent_itarflow_model(size: str, resolution: int = 256, num_classes: int = 1000) -> ModelConfig:
    """ITARFlow on SD-VAE codes: a token a code; arguments as `itarflow_model`."""
    row = itarflow_model(size, resolution, num_classes)
    return replace(row, image_size=resolution // 8, in_channels=4, patch_size=1)


STARFLOW_NOISE = 0.3
"""STARFlow's only noise level, on SD-VAE codes."""


def starflow_model(num_classes: int = 1000, resolution: int = 256) -> ModelConfig:
    """STARFlow's class-conditional model on SD-VAE codes, a token a code, 1.4B parameters.

    Width and the number of layers follow from the paper's size; how they are divided between the deep block and the
    shallow ones (two layers each, as in its text model) is that of `TarFlow_XLv2_1` in the published code.

    Args:
        num_classes: the label is a vector before the tokens of the deep block.
        resolution: of the images in pixels, a multiple of 8; the paper has 256 and 512.

    Raises:
        ValueError: no classes, or a resolution that 8 does not divide.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected a number >= 1.")
    if resolution < 8 or resolution % 8:
        raise ValueError(f"resolution is {resolution}; expected a multiple of 8, the stride of the SD-VAE.")
    return ModelConfig(
        image_size=resolution // 8,
        in_channels=4,
        num_classes=num_classes,
        patch_size=1,
        channels=2048,
        num_layers=(2, 2, 2, 2, 2, 18),
        noise_conditioned=False,
        rotary_side=resolution // 8,
        start_token=True,
        final_norm=True,
        soft_clip=4.0,
        softplus_scale=True,
        first_block_reversed=True,
        context_dim=num_classes + 1,  # one-hot; the last entry = no label
        context_tokens=1,
        context_blocks=1,
    )


def starflow_text_model() -> ModelConfig:
    """STARFlow's text-to-image model of 256 pixels, 3.86B parameters: 128 vectors of google/flan-t5-xl a caption."""
    return replace(
        starflow_model(),
        num_classes=0,
        channels=3072,
        num_layers=(2, 2, 2, 2, 2, 24),
        context_dim=2048,
        context_tokens=128,
    )


def itarflow_starflow_model(num_classes: int = 1000, resolution: int = 256) -> ModelConfig:
    """ITARFlow with STARFlow's blocks: `starflow_model`, conditioned on the noise level. It is in neither paper."""
    return replace(starflow_model(num_classes, resolution), noise_conditioned=True)


@dataclass(frozen=True, kw_only=True)
class TARFlowRow:
    """A row of TARFlow's table 7, there written P-Ch-T-K-noise."""

    image_size: int
    patch_size: int  # P
    channels: int  # Ch
    num_blocks: int  # T
    num_layers: int  # K, in each block
    noise_std: float | None  # None = uniform dequantisation, U(0, 1/128)
    num_classes: int
    batch_size: int
    epochs: int

    def model(self) -> ModelConfig:
        """The architecture."""
        return ModelConfig(
            image_size=self.image_size,
            num_classes=self.num_classes,
            patch_size=self.patch_size,
            channels=self.channels,
            num_layers=(self.num_layers,) * self.num_blocks,
            noise_conditioned=False,
        )


TARFLOW: dict[str, TARFlowRow] = {
    "imagenet64_bpd": TARFlowRow(
        image_size=64, patch_size=2, channels=768, num_blocks=8, num_layers=8, noise_std=None,
        num_classes=0, batch_size=384, epochs=60,
    ),  # 2-768-8-8-U(0, 1/128)
    "imagenet64_uncond": TARFlowRow(
        image_size=64, patch_size=2, channels=768, num_blocks=8, num_layers=8, noise_std=0.05,
        num_classes=0, batch_size=256, epochs=200,
    ),  # 2-768-8-8-N(0, 0.05^2)
    "imagenet64_cond": TARFlowRow(
        image_size=64, patch_size=2, channels=1024, num_blocks=8, num_layers=8, noise_std=0.05,
        num_classes=1000, batch_size=768, epochs=320,
    ),  # 2-1024-8-8-N(0, 0.05^2)
    "imagenet128": TARFlowRow(
        image_size=128, patch_size=4, channels=1024, num_blocks=8, num_layers=8, noise_std=0.15,
        num_classes=1000, batch_size=768, epochs=320,
    ),  # 4-1024-8-8-N(0, 0.15^2)
    "afhq256": TARFlowRow(
        image_size=256, patch_size=8, channels=768, num_blocks=8, num_layers=8, noise_std=0.07,
        num_classes=3, batch_size=256, epochs=4000,
    ),  # 8-768-8-8-N(0, 0.07^2)
}  # fmt: skip
