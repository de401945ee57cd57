"""One block of a TARFlow: an affine autoregressive flow over tokens, whose conditioner is a causal transformer.

Shapes: B batch, N tokens, D values a token, C channels of the transformer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from itarflow import inverse as solvers
from itarflow.embedding import NULL_LABEL, ClassEmbedding, NoiseLevelEmbedding, PositionEmbedding
from itarflow.guidance import Affine, Guidance, guide
from itarflow.transformer import Transformer, new_cache


class FlowOutput(NamedTuple):
    """What a flow, or one block of it, returns."""

    z: Tensor
    """(B, N, D), tokens."""
    log_det: Tensor
    """(B,), log |det dz/dx| in nats, summed over all dims."""


class Condition(NamedTuple):
    """What a block is told beside the tokens."""

    embedding: Tensor
    """(B, 1, C), noise level and class."""
    temperature: Tensor | None
    """(B,), divides the attention logits; None = 1 for all."""


class AutoregressiveBlock(nn.Module):
    """One affine autoregressive flow over the tokens of an image (TARFlow, equations 3 and 4).

    The transformer reads the tokens before position n and gives the shift and the log-scale of token n:
    z_n = (x_n - shift_n) * exp(-log_scale_n). Token 0 has none before it: it passes through, or,
    with `learned_first_token`, is mapped by an affine of the condition alone.

    Args:
        num_tokens: N.
        token_dim: D.
        channels: C, a multiple of head_dim.
        num_layers: layers of the block's own.
        backbone: layers shared with other blocks, run before its own; they belong to the flow, and neither
            this block's parameters nor its state include them.
        reverse: whether the block walks through the image from its end.
        volume_preserving: shift only.
        num_classes: 0 = no labels.
        noise_conditioned: whether the noise level is an input.
        learned_first_token: see above.
        head_dim: width of an attention head.
        mlp_ratio: hidden width of the MLPs, in units of C.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
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
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.reverse = reverse
        self.volume_preserving = volume_preserving
        outputs = token_dim if volume_preserving else 2 * token_dim
        self.proj_in = nn.Linear(token_dim, channels)
        self.position_embedding = PositionEmbedding(num_tokens, channels)
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

    def condition(
        self, batch_size: int, labels: Tensor | None, noise_level: Tensor | None, temperature: float = 1.0
    ) -> Condition:
        """Embed labels (B,) and noise level (B,) once, for any number of calls of `affine_at`."""
        weight = self.proj_in.weight
        embedding = weight.new_zeros(batch_size, weight.shape[0])
        if self.noise_embedding is not None and noise_level is not None:
            embedding = embedding + self.noise_embedding(noise_level)
        if self.class_embedding is not None:
            if labels is None:
                labels = torch.full((batch_size,), NULL_LABEL, device=weight.device)
            embedding = embedding + self.class_embedding(labels)
        tempered = None if temperature == 1 else weight.new_full((batch_size,), temperature)
        return Condition(embedding[:, None], tempered)

    def new_cache(self, batch_size: int) -> Tensor:
        """An empty key-value cache for `affine_at`, with room for the whole sequence."""
        num_layers = sum(len(transformer.layers) for transformer in (*self.backbone, self.transformer))
        # Any weight of the transformer's width tells its device and type.
        weight = self.position_embedding.weight
        return new_cache(num_layers, batch_size, self.num_tokens, self.transformer.head_dim, weight)

    def affine_at(self, tokens: Tensor, condition: Condition, cache: Tensor | None = None, start: int = 0) -> Affine:
        """The affine maps of the tokens that follow each of `tokens`. All solvers are built on this.

        Args:
            tokens: (B, n, D), at positions start .. start + n - 1 of the block's own order.
            condition: from `condition`.
            cache: from `new_cache`; holds the positions before start, and is written at the window's.
                None = the window starts the sequence.
            start: position of the first token of the window.

        Returns:
            (shift, log_scale), each (B, n, D), at least float32: those of positions start + 1 .. start + n.
        """
        stop = start + tokens.shape[1]
        x = self.proj_in(tokens.to(self.proj_in.weight.dtype))
        x = x + self.position_embedding(start, stop, self.reverse) + condition.embedding
        first_layer = 0
        for transformer in (*self.backbone, self.transformer):
            last_layer = first_layer + len(transformer.layers)
            part = None if cache is None else cache[first_layer:last_layer]
            x = transformer(x, condition.temperature, part, start)
            first_layer = last_layer
        return self._split(self.proj_out(x))

    def first_affine(self, condition: Condition) -> Affine:
        """(shift, log_scale), each (B, 1, D), of token 0: zeros unless the first token is learned."""
        if self.first_token is None:
            outputs = self.proj_out.out_features // (1 if self.volume_preserving else 2)
            zeros = condition.embedding.new_zeros(len(condition.embedding), 1, outputs)
            return self._split(zeros if self.volume_preserving else torch.cat([zeros, zeros], dim=-1))
        return self._split(self.first_token(condition.embedding))

    def forward(self, x: Tensor, condition: Condition) -> FlowOutput:
        """x (B, N, D) in raster order -> z in raster order, and the log-determinant (B,)."""
        x = self._ordered(x)
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
    ) -> Tensor:
        """z (B, N, D) in raster order -> x in raster order.

        Args:
            z: tokens.
            condition: from `condition`.
            guiding: the condition of the guiding pass; None = the block is not guided.
            guidance: rule and weights.
            solver: one of inverse.py.
            progress: called with the number of tokens that have just been solved.
        """
        batch_size = len(z)
        both = condition if guiding is None else _joined(condition, guiding)
        cache = self.new_cache(len(both.embedding))

        def guided(affine: Affine, start: int) -> Affine:
            shift, log_scale = affine
            if guiding is None:
                return shift, log_scale.exp()
            weights = guidance.weights(start, start + shift.shape[1], self.num_tokens, like=shift)
            (shift, shift_u), (log_scale, log_scale_u) = (a.split(batch_size) for a in (shift, log_scale))
            return guide((shift, log_scale), (shift_u, log_scale_u), weights, guidance)

        def affine_at(tokens: Tensor, start: int) -> Affine:
            # Both branches ride in one batch, so that the weights are read once.
            tokens = tokens if guiding is None else tokens.repeat(2, 1, 1)
            return guided(self.affine_at(tokens, both, cache, start), start + 1)

        first = guided(self.first_affine(both), 0)
        return self._ordered(solver(affine_at, self._ordered(z), first, progress))

    def _ordered(self, tokens: Tensor) -> Tensor:
        """Raster order to the block's own order, or back."""
        return tokens.flip(1) if self.reverse else tokens

    def _split(self, outputs: Tensor) -> Affine:
        """Network outputs -> (shift, log_scale), in at least float32 whatever the network's type."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.volume_preserving:
            return outputs, torch.zeros_like(outputs)
        log_scale, shift = outputs.chunk(2, dim=-1)
        return shift, log_scale


def zero_initialised(linear: nn.Linear) -> nn.Linear:
    """The layer with weight and bias set to zero, so that a fresh flow is the identity."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _joined(condition: Condition, guiding: Condition) -> Condition:
    """Both passes as one batch of 2B."""
    embedding = torch.cat([condition.embedding, guiding.embedding])
    if guiding.temperature is None:
        return Condition(embedding, None)
    return Condition(embedding, torch.cat([torch.ones_like(guiding.temperature), guiding.temperature]))
