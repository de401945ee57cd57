"""One block of a TARFlow: an affine autoregressive flow over tokens, whose conditioner is a causal transformer.

Shapes: B batch, N tokens, D values a token, C channels of the transformer. The paper's mu is `shift`, its alpha
`log_scale`; x_i is token i, x_{<i} are the tokens before it, in the block's own order.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itarflow.flow.condition import Condition, Given
from itarflow.flow.embedding import (
    NULL_LABEL,
    ClassEmbedding,
    NoiseLevelEmbedding,
    PositionEmbedding,
    RotaryPositions,
)
from itarflow.flow.transformer import Layer, OffsetRMSNorm, Transformer, pack_layers
from itarflow.inverse import solvers
from itarflow.inverse.decoding import Cache, CachedConditioner
from itarflow.inverse.guidance import Affine, Guidance, guide
from itarflow.runtime.graphed import Decoders
from itarflow.runtime.kernels import Rotation, pack, rotation_of, without_kernels

_INVERSE_SOFTPLUS_OF_1 = 0.541324854612918


class FlowOutput(NamedTuple):
    """What a flow, or one block of it, returns."""

    z: Tensor
    """(B, N, D), tokens."""
    log_det: Tensor
    """(B,), log |det dz/dx| in nats, summed over all dims."""


class ContextSize(NamedTuple):
    """The condition vectors of a flow, as one of its blocks sees them."""

    dim: int
    """E, their width; 0 = this block does not read them."""
    tokens: int
    """T, their number; 0 = the flow has none."""


class AutoregressiveBlock(nn.Module):
    """One affine autoregressive flow over the tokens of an image (TARFlow, section 2.2).

    The transformer reads the tokens before position i and gives the shift and the log-scale of token i. Token 0 has
    none before it: it passes through, or, with `learned_first_token`, is mapped by an affine of the condition alone,
    or, with `start_token`, by what the transformer makes of a learned token that comes first.

    STARFlow's block (arXiv 2506.06276) is this one with rotary positions, a start token, a final norm, clipped outputs
    whose scale is a softplus, and condition vectors that come before the tokens as a causal prefix.

    `forward` is image -> noise, all tokens at once; `inverse` is noise -> image, one token after another.

    Args:
        grid: (h, w), tokens of the image; N = h w.
        token_dim: D.
        channels: C, a multiple of head_dim.
        num_layers: layers of the block's own.
        backbone: layers shared with other blocks, run before its own; they belong to the flow, and neither
            this block's parameters nor its state include them.
        reverse: whether the block reads the image from its last token to its first.
        volume_preserving: shift only.
        num_classes: 0 = no labels.
        noise_conditioned: whether the noise level is an input.
        learned_first_token: see above.
        head_dim: width of an attention head.
        mlp_ratio: hidden width of the MLPs, in units of C.
        rotary_side: P of `RotaryPositions`; 0 = learned positions, which are added to the tokens.
        start_token: see above.
        final_norm: whether an RMS norm stands before the last projection.
        soft_clip: c in c tanh(o / c), of all outputs o; 0 = they are not clipped.
        softplus_scale: whether scales are softplus(a + 0.5413), which is 1 at a = 0, instead of exp(a).
        context: condition vectors.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        token_dim: int,
        channels: int,
        num_layers: int,
        backbone: Transformer | None,
        reverse: bool,
        volume_preserving: bool,
        num_classes: int,
        noise_conditioned: bool,
        learned_first_token: bool,
        head_dim: int,
        mlp_ratio: int,
        rotary_side: int,
        start_token: bool,
        final_norm: bool,
        soft_clip: float,
        softplus_scale: bool,
        context: ContextSize,
    ) -> None:
        super().__init__()
        self.num_tokens = math.prod(grid)
        self.context_tokens = context.tokens if context.dim else 0
        self.reverse = reverse
        self.volume_preserving = volume_preserving
        positions = RotaryPositions(grid, rotary_side, self.context_tokens, context.tokens > 0, head_dim)
        self.rotary = positions if rotary_side else None
        self.soft_clip = soft_clip
        self.softplus_scale = softplus_scale
        outputs = token_dim if volume_preserving else 2 * token_dim
        self.proj_in = nn.Linear(token_dim, channels)
        self.position_embedding = None if rotary_side else PositionEmbedding(self.num_tokens, channels)
        self.noise_embedding = NoiseLevelEmbedding(channels) if noise_conditioned else None
        self.class_embedding = ClassEmbedding(num_classes, channels) if num_classes else None
        # A tuple hides the shared layers from this module's parameters: the flow owns them, once.
        self.backbone = () if backbone is None else (backbone,)
        self.transformer = Transformer(channels, num_layers, head_dim, mlp_ratio)
        self.proj_out = zero_initialised(nn.Linear(channels, outputs))
        self.first_token = (
            nn.Sequential(nn.Linear(channels, channels), nn.GELU(), zero_initialised(nn.Linear(channels, outputs)))
            if learned_first_token
            else None
        )
        self.start_token = nn.Parameter(torch.randn(1, 1, token_dim)) if start_token else None
        self.proj_context = nn.Linear(context.dim, channels) if context.dim else None
        self.final_norm = OffsetRMSNorm(channels) if final_norm else nn.Identity()

    def condition(
        self,
        batch_size: int,
        labels: Tensor | None,
        noise_level: Tensor | None,
        context: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Condition:
        """Embed labels (B,), noise level (B,) and context (B, T, E) once, for any number of calls of `affine_at`."""
        weight = self.proj_in.weight
        embedding = weight.new_zeros(batch_size, weight.shape[0])
        if self.noise_embedding is not None and noise_level is not None:
            embedding = embedding + self.noise_embedding(noise_level)
        if self.class_embedding is not None:
            if labels is None:
                labels = torch.full((batch_size,), NULL_LABEL, device=weight.device)
            embedding = embedding + self.class_embedding(labels)
        tempered = None if temperature == 1 else weight.new_full((batch_size,), temperature)
        if self.proj_context is not None and context is not None:
            return Condition(embedding[:, None], tempered, self.proj_context(context.to(weight.dtype)))
        return Condition(embedding[:, None], tempered)

    def reads(self, given: Given) -> bool:
        """Whether labels or context play a part in what the block does."""
        return given.labels is not None or (given.context is not None and self.proj_context is not None)

    def cache_shape(self, batch_size: int) -> tuple[int, ...]:
        """(L, 2, B, H, T + N, E) of the keys and values of the whole sequence."""
        channels, head_dim = self.transformer.channels, self.transformer.head_dim
        rows = self.context_tokens + self.num_tokens
        return len(self._layers()), 2, batch_size, channels // head_dim, rows, head_dim

    def affine_at(self, tokens: Tensor, condition: Condition) -> Affine:
        """mu_i(x_{<i}) and alpha_i(x_{<i}) of i = 1 .. n in one pass (TARFlow, section 2.3).

        Args:
            tokens: (B, n, D), the first n <= N - 1 in the block's own order.
            condition: from `condition`.

        Returns:
            (shift, log_scale), each (B, n, D), at least float32: those of positions 1 .. n.
        """
        shift, log_scale = self._affines(tokens, condition)
        return (shift, log_scale) if self.start_token is None else (shift[:, 1:], log_scale[:, 1:])

    def _affines(self, tokens: Tensor, condition: Condition) -> Affine:
        """As `affine_at`, but with that of position 0 before the others if there is a start token."""
        if self.start_token is not None:
            tokens = torch.cat([self.start_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        x = self._embedded(tokens, condition.embedding)
        if condition.context is not None:
            x = torch.cat([condition.context.to(x.dtype), x], dim=1)
        rotation = self._rotation(x.shape[1])
        for transformer in (*self.backbone, self.transformer):
            x = transformer(x, condition.temperature, rotation)
        return self._split(self.proj_out(self.final_norm(x[:, x.shape[1] - tokens.shape[1] :])))

    def _embedded(self, inputs: Tensor, embedding: Tensor) -> Tensor:
        """The first inputs (B, n, D) of the transformer, start token included -> (B, n, C)."""
        x = self.proj_in(inputs.to(self.proj_in.weight.dtype))
        if self.position_embedding is not None:
            x = x + self.position_embedding(0, inputs.shape[1], self.reverse)
        return x + embedding

    def _rotation(self, length: int) -> Rotation | None:
        """Of the first positions of the sequence."""
        device = self.proj_in.weight.device
        return None if self.rotary is None else rotation_of(self.rotary.angles(device)[:length])

    def conditioner(
        self, condition: Condition, guiding: Condition | None, guidance: Guidance, dtype: torch.dtype | None = None
    ) -> CachedConditioner:
        """The block as solvers see it, with its present weights and an empty cache.

        Args:
            condition: from `condition`.
            guiding: the condition of the guiding pass; None = the block is not guided.
            guidance: rule and weights.
            dtype: of the transformer's products and of the cache; None = the weights'. The affine maps, and the sum
                over the layers, keep the weights' type.
        """
        both = condition if guiding is None else _joined(condition, guiding)
        weight, prefix = self.proj_in.weight, self._prefix(both)
        exact, offset = weight.dtype, prefix.shape[1]
        # Of each row of the cache: the place of its input, and the token that follows it.
        following = torch.arange(1 - offset, self.num_tokens, device=weight.device).clamp(min=0)
        position = None
        if self.position_embedding is not None:
            position = self.position_embedding(0, self.num_tokens, self.reverse).detach()
            position = F.pad(position, (0, 0, self.context_tokens, 0))
        return CachedConditioner(
            layers=pack_layers(self._layers(), dtype or exact),
            proj_in=pack(self.proj_in, exact),
            proj_out=pack(self.proj_out, exact),
            norm=self.final_norm.factor().detach() if isinstance(self.final_norm, OffsetRMSNorm) else None,
            prefix=prefix if offset else None,
            offset=offset,
            num_tokens=self.num_tokens,
            position=position,
            rotation=self._rotation(self.context_tokens + self.num_tokens),
            embedding=both.embedding,
            temperature=both.temperature,
            cache=Cache(self.cache_shape(len(both.embedding)), weight.new_empty(0, dtype=dtype)),
            split=self._split,
            guidance=None if guiding is None else guidance,
            weights=guidance.weights(following, self.num_tokens, torch.promote_types(exact, torch.float32)),
        )

    def _prefix(self, condition: Condition) -> Tensor:
        """What the transformer reads before the first token of the image, (B, n, C): context, and the start token."""
        embedding = condition.embedding
        parts = [embedding[:, :0]] if condition.context is None else [condition.context.to(embedding.dtype)]
        if self.start_token is not None:
            parts.append(self._embedded(self.start_token.expand(len(embedding), -1, -1), embedding))
        return torch.cat(parts, dim=1).detach()

    def check_decoding(self, tokens: Tensor, condition: Condition) -> None:
        """Raise RuntimeError unless `conditioner` gives what `affine_at` does, up to rounding, for two tokens, or one.

        Both hold the mathematics of a layer, which so lives twice: a change of one must not spoil samples in silence.
        Of the `tokens` (B, N >= 2, D) the first ones of the first image are used; `condition` is that of the method.
        """
        context = None if condition.context is None else condition.context[:1]
        tokens, first = tokens[:1, : min(2, self.num_tokens - 1)], Condition(condition.embedding[:1], None, context)
        conditioner = self.conditioner(first, None, Guidance())
        with without_kernels():  # which are compared with what is compared here
            begun = conditioner.begin()
            solved = [conditioner(one, at) for at, one in enumerate(tokens.split(1, dim=1))]
            if begun is not None and self.start_token is not None:
                solved.insert(0, begun)
        found = zip(*solved, strict=True)
        shift, log_scale = self._affines(tokens, first)
        for values, expected in zip(found, (shift, log_scale.exp()), strict=True):
            error = (torch.cat(values, dim=1) - expected).abs().max()
            if expected.isfinite().all() and not error <= 1e-2 * (1 + expected.abs().max()):
                raise RuntimeError(
                    f"the inverse is not that of the flow: its first tokens differ by {error:.3g}. The layers of "
                    "flow/transformer.py and their cached form, pack_layers there and run_layers of "
                    "inverse/decoding.py, compute different things; change both alike."
                )

    def first_affine(self, condition: Condition) -> Affine:
        """(shift, log_scale), each (B, 1, D), of token 0: zeros, z_0 = x_0 (TARFlow, eq. 3), unless it is learned."""
        if self.start_token is not None:
            return self._affines(
                self.start_token.new_empty(len(condition.embedding), 0, self.proj_in.in_features), condition
            )
        if self.first_token is None:
            outputs = self.proj_out.out_features // (1 if self.volume_preserving else 2)
            zeros = condition.embedding.new_zeros(len(condition.embedding), 1, outputs)
            return self._split(zeros if self.volume_preserving else torch.cat([zeros, zeros], dim=-1))
        return self._split(self.first_token(condition.embedding))

    def forward(self, x: Tensor, condition: Condition) -> FlowOutput:
        """Image side to noise side, all tokens at once.

            z_0 = x_0,  z_i = (x_i - mu_i(x_{<i})) exp(-alpha_i(x_{<i}))        (TARFlow, eq. 3)
            log |det dz/dx| = -sum_i sum_j alpha_i(x_{<i})_j                    (TARFlow, eq. 5)

        The Jacobian is triangular in the block's own order, so its determinant is the product of its diagonal.

        Args:
            x: (B, N, D) in raster order.
            condition: from `condition`.

        Returns:
            z (B, N, D) in raster order, and the log-determinant (B,) in nats.
        """
        x = self._ordered(x)
        if self.start_token is not None:
            shift, log_scale = self._affines(x[:, :-1], condition)
        else:
            shift, log_scale = self.first_affine(condition)
            if self.num_tokens > 1:
                rest_shift, rest_log_scale = self.affine_at(x[:, :-1], condition)
                shift = torch.cat([shift, rest_shift], dim=1)
                log_scale = torch.cat([log_scale, rest_log_scale], dim=1)
        z = (x - shift) * (-log_scale).exp()
        return FlowOutput(self._ordered(z), -log_scale.sum(dim=(1, 2)))

    def inverse(
        self,
        z: Tensor,
        condition: Condition,
        guiding: Condition | None,
        guidance: Guidance,
        solver: solvers.Solver = solvers.sequential,
        progress: solvers.Progress | None = None,
        dtype: torch.dtype | None = None,
        guess: Tensor | None = None,
        decoders: Decoders | None = None,
    ) -> Tensor:
        """Noise side to image side, by default one token after another.

            x_0 = z_0,  x_i = z_i exp(alpha_i(x_{<i})) + mu_i(x_{<i})           (TARFlow, eq. 4)

        If `guiding` is given, mu and alpha are the guided ones (TARFlow, eq. 9).

        Args:
            z: (B, N, D) in raster order.
            condition: see `conditioner`.
            guiding: see `conditioner`.
            guidance: see `conditioner`.
            solver: see `itarflow.inverse.solvers`.
            progress: called with the number of tokens that have just been solved.
            dtype: see `conditioner`.
            guess: (B, N, D) in raster order, near x, where an iterative solver starts.
            decoders: of the flow, where the block's is kept.

        Returns:
            x (B, N, D) in raster order.
        """
        conditioner = self.conditioner(condition, guiding, guidance, dtype)
        parts = (self, *self.backbone)
        read = [parameter for part in parts for parameter in part.parameters()]
        fastest = conditioner if decoders is None else decoders.of((id(self), conditioner.kind), conditioner, read)
        first = fastest.begin()
        if first is None or self.start_token is None:
            first = self._first(condition, guiding, guidance)
        known = None if guess is None else self._ordered(guess)
        return self._ordered(solver(fastest, self._ordered(z), first, progress, known))

    def _first(self, condition: Condition, guiding: Condition | None, guidance: Guidance) -> Affine:
        """(shift, scale) of token 0, where it needs no transformer."""
        shift, log_scale = self.first_affine(condition)
        if guiding is None:
            return shift, log_scale.exp()
        weights = guidance.weights(torch.zeros(1, device=shift.device), self.num_tokens, shift.dtype)
        return guide((shift, log_scale), self.first_affine(guiding), weights, guidance)

    def _layers(self) -> list[Layer]:
        """The shared ones first."""
        parts = (*self.backbone, self.transformer)
        return [cast(Layer, layer) for transformer in parts for layer in transformer.layers]

    def _ordered(self, tokens: Tensor) -> Tensor:
        """pi, from raster order to the block's own order or back: identity or flip (TARFlow, section 2.2).

        The paper hands on flipped tokens and flips them again in every later block. Here they return to raster order
        after each block, so that every other block is the reverse one: the same directions through the image.
        """
        return tokens.flip(1) if self.reverse else tokens

    def _split(self, outputs: Tensor) -> Affine:
        """Network outputs -> (shift, log_scale), in at least float32 whatever the network's type."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.soft_clip:
            outputs = self.soft_clip * torch.tanh(outputs / self.soft_clip)
        if self.volume_preserving:
            return outputs, torch.zeros_like(outputs)
        log_scale, shift = outputs.chunk(2, dim=-1)
        if not self.softplus_scale:
            return shift, log_scale
        a = log_scale + _INVERSE_SOFTPLUS_OF_1
        if 0 < self.soft_clip <= 20:
            return shift, F.softplus(a).log()
        # log softplus(a) is a far below 0, where softplus and its logarithm would round it to -inf.
        return shift, torch.where(a < -20, a, F.softplus(a.clamp(min=-20)).log())


def zero_initialised(linear: nn.Linear) -> nn.Linear:
    """The layer with weight and bias set to zero, so that a fresh flow is the identity."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _joined(condition: Condition, guiding: Condition) -> Condition:
    """Both passes as one batch of 2B."""
    embedding, temperature, context = torch.cat([condition.embedding, guiding.embedding]), None, None
    if condition.temperature is not None or guiding.temperature is not None:
        tempered = [pass_.temperature for pass_ in (condition, guiding)]
        ones = embedding.new_ones(len(embedding) // 2)
        temperature = torch.cat([ones if one is None else one for one in tempered])
    if condition.context is not None and guiding.context is not None:
        context = torch.cat([condition.context, guiding.context])
    return Condition(embedding, temperature, context)
