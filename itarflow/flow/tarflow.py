"""TARFlow: a stack of causal transformers, each an autoregressive affine flow over image patches.

Shapes: B batch, K blocks, N tokens, D values a token, C channels of the transformer, (B, C, H, W) images.
The papers: TARFlow, arXiv 2412.06329; iTARFlow, arXiv 2604.20041; STARFlow, arXiv 2506.06276.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from itarflow.flow import checks
from itarflow.flow.block import AutoregressiveBlock, ContextSize, FlowOutput
from itarflow.flow.condition import Given, check_noise_range, checked_condition, without_condition
from itarflow.flow.density import log_density
from itarflow.flow.embedding import NULL_LABEL
from itarflow.flow.transformer import Transformer
from itarflow.inverse import solvers
from itarflow.inverse.guidance import Guidance
from itarflow.runtime.graphed import CALLS, Decoders, decoders
from itarflow.runtime.model_folder import load_model
from itarflow.runtime.ranges import check_number
from itarflow.runtime.recording import Recordings, is_plain


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, D), N = H W / p^2, D = C p^2 (TARFlow, section 2.3).

    Tokens are in raster order, the values in each by (channel, row, column).
    """
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, patch_size: int, image_size: int | Sequence[int]) -> Tensor:
    """The inverse of `patchify` for images of that side, or of those (height, width)."""
    height, width = checks.height_and_width(image_size)
    pattern = "b (h w) (c p q) -> b c (h p) (w q)"
    return rearrange(tokens, pattern, h=height // patch_size, w=width // patch_size, p=patch_size, q=patch_size)


class TARFlow(ModelMixin, ConfigMixin):
    """A normalizing flow of images: TARFlow, or iTARFlow if it is conditioned on the noise level.

    STARFlow is a TARFlow with the options from `rotary_side` on.

    Values that differ between blocks are tuples in the order of the forward direction, image side first and
    noise side last; a single number applies to all blocks.

    Args:
        image_size: side of the square images, or their (height, width), in pixels (or in codes, in a latent space).
        in_channels: channels of the images.
        patch_size: side of a patch, a divisor of image_size; one number, or one a block.
        channels: width of the transformers, a multiple of head_dim; one number, or one a block.
        num_layers: transformer layers of each block; its length is the number of blocks.
        num_classes: 0 = no labels.
        noise_conditioned: True = iTARFlow, which models log p(x_t, t); False = TARFlow.
        volume_preserving: shift-only blocks (VP), with a prior variance that training estimates.
        shared_layers: layers of a backbone that all blocks share and run first; it counts as part
            of num_layers, and a block with fewer layers than that has none of its own. 0 = none.
        input_scale: factor on the input images of the flow. It does not rescale the noise level.
        learned_first_token: lets each block transform its first token by an affine of the condition alone.
        head_dim: width of an attention head.
        mlp_ratio: hidden width of the MLPs in units of channels.
        noise_range: (t_min, t_max) that the flow was trained on; None = unknown: no level is refused.
        rotary_side: tokens along the side of the square images that rotary positions are made for, see
            `RotaryPositions`; 0 = learned positions.
        start_token: lets each block transform its first token too, by what its transformer makes of a learned token
            that comes first.
        final_norm: an RMS norm before each block's last projection.
        soft_clip: c in c tanh(o / c), of all outputs o of a block; 0 = they are not clipped.
        softplus_scale: scales are softplus(a + 0.5413), which is 1 at a = 0, instead of exp(a).
        first_block_reversed: whether the blocks 0, 2, ... read the image backwards, instead of 1, 3, ...
        context_dim: E, width of the condition vectors, such as a text encoder's; 0 = none.
        context_tokens: T, their number. They come before the image, as a causal prefix. With num_classes it is 1, and
            the label is that vector: one-hot of context_dim = num_classes + 1 values, of which the last is no label.
        context_blocks: how many blocks read them, counted from the noise side; None = all.

    Raises:
        ValueError: arguments that do not fit together.

    Example:
        >>> flow = TARFlow(image_size=8, in_channels=1, channels=64, num_layers=(1, 1, 2), num_classes=10)
        >>> images, labels, noise_level = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, -1]), torch.full((4,), 0.1)
        >>> z, log_det = flow(images, labels, noise_level)
        >>> z.shape, log_det.shape
        (torch.Size([4, 16, 4]), torch.Size([4]))
        >>> torch.allclose(flow.inverse(z, labels, noise_level), images, atol=1e-4)
        True
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Layer"]
    _repeated_blocks: ClassVar = ["Layer"]

    @register_to_config
    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 3,
        patch_size: int | Sequence[int] = 2,  # noqa: ARG002, as below: `block_sizes` takes it from the config
        channels: int | Sequence[int] = 768,  # noqa: ARG002
        num_layers: Sequence[int] = (8, 8, 8, 8, 8, 8, 8, 8),  # noqa: ARG002
        num_classes: int = 0,
        noise_conditioned: bool = True,
        volume_preserving: bool = False,
        shared_layers: int = 0,
        input_scale: float = 1.0,  # noqa: ARG002
        learned_first_token: bool = False,
        head_dim: int = 64,
        mlp_ratio: int = 4,
        noise_range: Sequence[float] | None = None,  # noqa: ARG002
        rotary_side: int = 0,
        start_token: bool = False,
        final_norm: bool = False,
        soft_clip: float = 0.0,
        softplus_scale: bool = False,
        first_block_reversed: bool = False,
        context_dim: int = 0,
        context_tokens: int = 0,
        context_blocks: int | None = 1,
    ) -> None:
        super().__init__()
        self._decoding_checked = False
        self._recordings: Recordings[Decoders] = Recordings(CALLS)
        sizes = checks.block_sizes(self.config)
        height, width = checks.height_and_width(image_size)
        first_with_context = 0 if context_blocks is None else len(sizes) - context_blocks
        self.patch_sizes = tuple(size.patch_size for size in sizes)
        backbone = Transformer(sizes[0].channels, shared_layers, head_dim, mlp_ratio) if shared_layers else None
        self.shared_backbone = backbone
        self.blocks = nn.ModuleList(
            AutoregressiveBlock(
                grid=(height // size.patch_size, width // size.patch_size),
                token_dim=in_channels * size.patch_size**2,
                channels=size.channels,
                num_layers=max(size.num_layers - shared_layers, 0),
                backbone=backbone,
                reverse=index % 2 == (0 if first_block_reversed else 1),
                volume_preserving=volume_preserving,
                num_classes=0 if context_tokens else num_classes,
                noise_conditioned=noise_conditioned,
                learned_first_token=learned_first_token,
                head_dim=head_dim,
                mlp_ratio=mlp_ratio,
                rotary_side=rotary_side,
                start_token=start_token,
                final_norm=final_norm,
                soft_clip=soft_clip,
                softplus_scale=softplus_scale,
                context=ContextSize(context_dim if index >= first_with_context else 0, context_tokens),
            )
            for index, size in enumerate(sizes)
        )
        # Of z, per token and channel; ones unless the flow is volume preserving.
        self.register_buffer("prior_variance", torch.ones(self.z_shape))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> TARFlow:
        """The flow in a folder or on the Hub, in evaluation mode; see `model_folder.load_model` for the options.

        Raises:
            OSError: there is none, or not of that variant.
            ValueError: its weights do not fit its config, are no floating point numbers or not finite, or a file is
                damaged; the message names it.
        """
        return load_model(cls, name, _num_layers, **options)

    @property
    def null_label(self) -> int:
        """The label of "no label"."""
        return NULL_LABEL

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.config.in_channels, *checks.height_and_width(self.config.image_size)

    @property
    def z_shape(self) -> tuple[int, int]:
        """(N, D) of z: the token layout of the last block."""
        patch, (channels, height, width) = self.patch_sizes[-1], self.image_shape
        return (height // patch) * (width // patch), channels * patch**2

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        noise_level: Tensor | float | None = None,
        context: Tensor | None = None,
    ) -> FlowOutput:
        """Map images to z, block after block.

            z = f(x) = (f^{T-1} o ... o f^0)(x)                         (TARFlow, section 2.2)
            log |det dz/dx| = sum_t log |det df^t/dx^t|, each by        (TARFlow, eq. 5)

        Args:
            images: (B, C, H, W), noisy with standard deviation `noise_level`.
            labels: (B,) int64 in [0, num_classes), null_label for single unlabelled entries; None = all unlabelled.
            noise_level: (B,) or one number for all, > 0, in the units of the images; not used, and not needed,
                without noise conditioning.
            context: (B, T, E) condition vectors, such as a text's. With classes it may stand in for labels.

        Returns:
            z (B, N, D) and log_det (B,) in nats, at least float32.

        Raises:
            ValueError: wrong shapes, labels, noise levels or context.
        """
        images = self._checked_images(images)
        given = self._given(len(images), labels, noise_level, context)
        image_size, patch = self.config.image_size, self.patch_sizes[0]
        x = patchify(images, patch) * self.config.input_scale
        log_det = images.new_full((len(images),), images[0].numel() * math.log(self.config.input_scale))
        for block, block_patch in self._blocks():
            if block_patch != patch:
                x = patchify(unpatchify(x, patch, image_size), block_patch)
                patch = block_patch
            x, block_log_det = block(x, block.condition(*given))
            log_det = log_det + block_log_det
        return FlowOutput(x, log_det)

    def log_prob(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        noise_level: Tensor | float | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Exact log-density (B,) of the images in nats, constant included; arguments as in `forward`.

        The prior of z is a Gaussian with the learned variance if the flow is volume preserving, else a unit one.

        Raises:
            ValueError: as `forward`, and a noise level outside the trained range.
        """
        self.check_noise_range(noise_level)
        return log_density(self(images, labels, noise_level, context), self.prior_variance)

    @torch.no_grad()
    def inverse(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        noise_level: Tensor | float | None = None,
        *,
        context: Tensor | None = None,
        null_context: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        return_trajectory: bool = False,
        solver: solvers.Solver | Sequence[solvers.Solver] = solvers.sequential,
        dtype: torch.dtype | None = None,
        guess: Tensor | None = None,
        progress: solvers.Progress | None = None,
    ) -> Tensor:
        """Map z to images: the inverse of `forward`, by default one token after another in each block.

            y = f^{-1}(z),  z ~ p_0, the first half of                  (TARFlow, eq. 8)

        Of an iTARFlow it is a sample at noise level t_max, where denoising begins (iTARFlow, section 3.2).

        Args:
            z: (B, N, D). A sample is made from z drawn by `sample_prior`.
            labels: as in `forward`.
            noise_level: as in `forward`; t_max in sampling.
            context: as in `forward`.
            null_context: (B, T, E), or (1, T, E) for all: the condition of guidance's other pass, such as the empty
                text; None = no label.
            guidance: None = off.
            temperature: divides the attention logits, in both passes; that of `guidance` in its other pass, too.
            return_trajectory: also give what lies between the blocks (TARFlow, appendix D.1).
            solver: how a block is inverted, see `itarflow.inverse.solvers`; or one a block, in the order of inversion:
                noise side first, as from `InversePlan.solvers_of`.
            dtype: of the transformers' products and of the cache, such as torch.bfloat16, which changes the
                images a little, and is faster unless the model is narrow; the affine maps keep the weights' type.
                None = the weights', or autocast's.
            guess: (K + 1, B, C, H, W), where iterative solvers start: the trajectory of the same z at a nearby noise
                level or with other labels, as `return_trajectory` gives it.
            progress: called with the number of tokens just solved; they sum up to `num_solved_tokens`.

        Returns:
            (B, C, H, W) images, or with return_trajectory (K + 1, B, C, H, W): z laid out as an image, then
            the result of each inverted block, the last of which is the images. All are divided by input_scale.

        Raises:
            ValueError: wrong shapes, labels, context, or a noise level outside the trained range; temperature <= 0;
                guidance by a context without null_context; not a solver a block.
        """
        if z.ndim != 3 or tuple(z.shape[1:]) != self.z_shape:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected (B, {self.z_shape[0]}, {self.z_shape[1]}).")
        self.check_noise_range(noise_level)
        check_number("temperature", temperature, 1e-6, 1e6, " (1 = untouched)")
        given = self._given(len(z), labels, noise_level, context)
        guidance = guidance or Guidance()
        if not isinstance(guidance.blocks, int | None) and max(guidance.blocks, default=0) >= len(self.blocks):
            raise ValueError(
                f"guidance blocks {tuple(guidance.blocks)} name a block that is not there; this flow has "
                f"{len(self.blocks)}, counted from 0 at the noise side."
            )
        by_block = checks.solver_of_each_block(solver, [block.num_tokens for block, _ in reversed(self._blocks())])
        self._check_guess(guess, len(z))
        dtype = _autocast_dtype(self.device) if dtype is None else dtype
        image_size, patch = self.config.image_size, self.patch_sizes[-1]
        x = z.to(torch.promote_types(torch.promote_types(z.dtype, self.dtype), torch.float32))
        path = [unpatchify(x, patch, image_size)]
        unchecked = not self._decoding_checked and self._can_check_decoding()
        # Where labels and context play no part both passes are equal at temperature 1: guidance changes nothing.
        conditional = labels is not None or context is not None
        guided = [
            guidance.guides(from_noise) and (guidance.temperature != 1 or (conditional and block.reads(given)))
            for from_noise, (block, _) in enumerate(reversed(self._blocks()))
        ]
        unguided = without_condition(self.config, given, null_context, needed=any(guided))
        cache = max(
            math.prod(block.cache_shape(2 * len(z) if both else len(z)))
            for (block, _), both in zip(reversed(self._blocks()), guided, strict=True)
        )
        # `dtype` sets the precision, of affine maps too.
        precise = torch.autocast(self.device.type, enabled=False)
        with precise, decoders(self._recordings, self.device, len(z), dtype or self.dtype, cache) as kept:
            for from_noise, (block, block_patch) in enumerate(reversed(self._blocks())):
                if block_patch != patch:
                    x = patchify(unpatchify(x, patch, image_size), block_patch)
                    patch = block_patch
                condition, guiding = block.condition(*given, temperature), None
                if guided[from_noise]:
                    guiding = block.condition(*unguided, temperature * guidance.temperature)
                if unchecked and from_noise < 2 and block.num_tokens > 1:  # in both directions
                    block.check_decoding(x, condition)
                known = None if guess is None else patchify(guess[from_noise + 1], patch) * self.config.input_scale
                solve = by_block[from_noise]
                x = block.inverse(x, condition, guiding, guidance, solve, progress, dtype, known, kept)
                if return_trajectory:
                    path.append(unpatchify(x, patch, image_size))
        self._decoding_checked |= unchecked
        images = unpatchify(x, patch, image_size) / self.config.input_scale
        return torch.stack(path) / self.config.input_scale if return_trajectory else images

    def release_recordings(self) -> None:
        """Give back the memory, on a GPU, of CUDA graphs and caches that `inverse` keeps for its next call."""
        self._recordings.release()

    def _apply(self, fn: Any, recurse: bool = True) -> TARFlow:
        self.release_recordings()  # of weights that move
        return super()._apply(fn, recurse)

    def _can_check_decoding(self) -> bool:
        """Whether weights are precise enough for it, and nothing is compiled or recorded, which it would disturb."""
        recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        compiled = any(m._compiled_call_impl is not None for m in self.modules())
        plain = is_plain(self.prior_variance) and not recording and not compiled
        return plain and self.dtype in (torch.float32, torch.float64)

    def sample_prior(self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Draw z (B, N, D) in float32 on the flow's device; a list of generators gives each sample its own."""
        from_generator = generator if isinstance(generator, list) else [generator]
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators were given for {batch_size} samples; expected one each.")
        shape = (1 if isinstance(generator, list) else batch_size, *self.z_shape)
        drawn = [
            torch.randn(shape, generator=g, device="cpu" if g is None else g.device, dtype=torch.float32)
            for g in from_generator
        ]
        return torch.cat([part.to(self.device) for part in drawn]) * self.prior_variance.float().sqrt()

    @property
    def num_solved_tokens(self) -> int:
        """How many tokens one call of `inverse` solves, over all blocks."""
        return sum(block.num_tokens for block, _ in self._blocks())

    def _blocks(self) -> list[tuple[AutoregressiveBlock, int]]:
        """The blocks with their patch sizes, image side first."""
        return list(zip(cast(Sequence[AutoregressiveBlock], self.blocks), self.patch_sizes, strict=True))

    def _checked_images(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, {', '.join(map(str, self.image_shape))})."
            )
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def _given(
        self, batch_size: int, labels: Tensor | None, noise_level: Tensor | float | None, context: Tensor | None
    ) -> Given:
        return checked_condition(self.config, self.device, batch_size, labels, noise_level, context)

    def _check_guess(self, guess: Tensor | None, batch_size: int) -> None:
        expected = (len(self.blocks) + 1, batch_size, *self.image_shape)
        if guess is not None and tuple(guess.shape) != expected:
            raise ValueError(f"guess has shape {tuple(guess.shape)}; expected {expected}, a trajectory of `inverse`.")

    def check_noise_range(self, noise_level: Tensor | float | None) -> None:
        """Refuse levels that the flow was not trained on. It reads the values, so it is not for training steps."""
        if self.config.noise_range is not None and noise_level is not None:
            check_noise_range(noise_level, self.config.noise_range)


def _num_layers(arguments: Mapping[str, Any]) -> int:
    """How many blocks and layers a stored flow has, each of which has weights."""
    shared, depths = arguments.get("shared_layers", 0), arguments["num_layers"]
    return len(depths) + shared + sum(max(depth - shared, 0) for depth in depths)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on that device; None = it is off."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if available and torch.is_autocast_enabled(device.type) else None
