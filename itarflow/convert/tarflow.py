"""The architecture of a checkpoint of ml-tarflow or ml-itarflow, from the shapes of its tensors.

Two things leave no trace: `in_channels` (a token of 48 values may be 3 channels of a 4 x 4 patch, or 12 of a 2 x 2)
and `input_scale`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from itarflow.convert.names import HEAD_DIM, MLP_RATIO
from itarflow.convert.shapes import (
    agreed,
    check_channels,
    is_square,
    num_children,
    num_layers,
    one_or_all,
    patch_sides,
    tensor_of,
)
from itarflow.runtime.errors import CheckpointError
from itarflow.runtime.text import listed


def tarflow_architecture(
    state: Mapping[str, Tensor],
    *,
    in_channels: int = 3,
    image_size: int | None = None,
    patch_size: int | None = None,
) -> dict[str, Any]:
    """The arguments of `TARFlow` that official weights were made with, as far as their shapes determine them.

    Args:
        state: official names and tensors, from `read_state`.
        in_channels: channels of the images.
        image_size: what it should be; None = as it is.
        patch_size: likewise.

    Raises:
        CheckpointError: these are not the weights of a TARFlow, or not for these arguments.
    """
    if "blocks.0.pos_embed" not in state:
        raise CheckpointError(
            f"holds no official TARFlow: its tensors are {listed(state)}; expected blocks.0.pos_embed, ... of a "
            "TARFlow or iTARFlow, or blocks.0.sos_embed, ... of a STARFlow. "
            "A folder that itarflow saved is opened with TARFlow.from_pretrained."
        )
    num_blocks = num_children(state, "blocks")
    embeddings = [tensor_of(state, f"blocks.{index}.pos_embed", "(tokens, channels)") for index in range(num_blocks)]
    inputs = [tensor_of(state, f"blocks.{index}.proj_in.weight", "(channels, values)") for index in range(num_blocks)]
    num_tokens, channels = zip(*(embedding.shape for embedding in embeddings), strict=True)
    shared_layers = num_children(state, "shared_backbone")
    if shared_layers and len(set(channels)) > 1:
        raise CheckpointError(
            f"has a shared backbone and blocks of {listed(map(str, channels))} channels; expected the same in all. "
            "It is of another architecture."
        )
    check_channels(channels)
    patches = patch_sides([len(weight.T) for weight in inputs], in_channels)
    source = "the shape of blocks.0.pos_embed"
    return {
        "image_size": agreed("image_size", image_size, _image_size(num_tokens, patches), source),
        "in_channels": in_channels,
        "patch_size": agreed("patch_size", patch_size, one_or_all(patches), "the shape of blocks.0.proj_in.weight"),
        "channels": one_or_all(channels),
        "num_layers": num_layers(state, num_blocks, shared_layers),
        "num_classes": _num_classes(state),
        "noise_conditioned": any(".time_embed." in name for name in state),
        "volume_preserving": _volume_preserving(state, len(inputs[0].T)),
        "shared_layers": shared_layers,
        "head_dim": HEAD_DIM,
        "mlp_ratio": MLP_RATIO,
    }


def is_redundant(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a tensor says nothing new: the causal mask, or the shared backbone under a block's name."""
    if re.fullmatch(r"blocks\.\d+\.attn_mask", name):
        return True
    alias = re.fullmatch(r"blocks\.\d+\.(shared_backbone\..+)", name)
    owner = state.get(alias[1]) if alias else None
    if owner is None:
        return False
    alias_tensor = state[name].to(owner.dtype)
    if not (alias_tensor.is_set_to(owner) or torch.equal(alias_tensor, owner)):
        raise CheckpointError(
            f"has different values in {name} and its owner, shared_backbone; expected the same tensor twice. "
            "A model whose blocks have drifted apart is no official one."
        )
    return True


def redundant_tensors(state: Mapping[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """What an official checkpoint holds besides the weights `state`: masks, and the backbone under each block's name.

    The official blocks hold the backbone as a submodule each: the same tensors under further names.
    """
    shared = {name: tensor for name, tensor in state.items() if name.startswith("shared_backbone.")}
    more: dict[str, Tensor] = {}
    for index in range(num_blocks):
        num_tokens = len(state[f"blocks.{index}.pos_embed"])
        more[f"blocks.{index}.attn_mask"] = torch.ones(num_tokens, num_tokens).tril()
        more |= {f"blocks.{index}.{name}": tensor for name, tensor in shared.items()}
    return more


def _image_size(num_tokens: Sequence[int], patches: Sequence[int]) -> int:
    """The side of the images, from the number of tokens of each block and the sides of their patches."""
    for index, tokens in enumerate(num_tokens):
        if not (tokens and is_square(tokens)):
            raise CheckpointError(
                f"has {tokens} tokens in block {index}; expected a square number, as images and patches are square. "
                "It is of another architecture."
            )
    sizes = [math.isqrt(tokens) * patch for tokens, patch in zip(num_tokens, patches, strict=True)]
    if len(set(sizes)) > 1:
        raise CheckpointError(
            f"has blocks for images of different sizes, {sizes}; expected one size. "
            "It is of another architecture, or put together from several checkpoints."
        )
    return sizes[0]


def _num_classes(state: Mapping[str, Tensor]) -> int:
    if not any(name.endswith(".class_embed") for name in state):
        return 0
    return len(tensor_of(state, "blocks.0.class_embed", "(classes, 1, channels)"))


def _volume_preserving(state: Mapping[str, Tensor], token_dim: int) -> bool:
    """Whether the blocks have no scale: one output for each value of a token instead of two."""
    outputs = len(tensor_of(state, "blocks.0.proj_out.weight", "(outputs, channels)"))
    if outputs not in (token_dim, 2 * token_dim):
        raise CheckpointError(
            f"has {outputs} outputs in blocks.0.proj_out for tokens of {token_dim} values; expected {2 * token_dim} "
            f"(scale and shift) or {token_dim} (shift only). It is of another architecture."
        )
    return outputs == token_dim
