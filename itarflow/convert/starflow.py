"""The architecture of a checkpoint of ml-starflow, from the shapes of its tensors.

P is the side of the grid of tokens that it was trained on, T the number of text tokens, E their width, D the values
of an image token. Buffers that carry nothing tell P and T: `var` is (P^2, D), `attn_mask` (P^2 + T, P^2 + T).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

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
from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.errors import CheckpointError
from itarflow.runtime.text import listed

SeqOrder = Literal["L2R", "R2L"]
"""Which way the block at the noise side of an even number walks, as ml-starflow's configs have it."""

_OTHERS = (
    (
        r"^learnable_self_denoiser\.",
        "it is a STARFlow-V, which makes videos and denoises by a network of its own. itarflow has neither.",
    ),
    (
        r"\.(gate_proj|query_norm|key_norm|post_norm)\.|^feat_rope_gen\.",
        "its layers are those of a Gemma language model (RMSNorm, gated MLPs, grouped queries); itarflow has none.",
    ),
    (r"\.adaLN_modulation\.", "its layers are modulated (adaLN), which itarflow's are not."),
    (
        r"\.pos_embed$",
        "its positions are learned (rope 0); expected rotary ones (rope 1), as in the published models.",
    ),
)
"""Names of tensors of models that ml-starflow has too, and why they are refused."""
_IGNORED = r"var|feat_rope\.freqs_(cos|sin)|blocks\.\d+\.attn_mask"


def is_starflow(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are ml-starflow's."""
    ours = any(".transformer.layers." in name for name in state)
    return not ours and any(re.search(r"^feat_rope\.|\.(sos_embed|proj_txt|final_norm)\b", name) for name in state)


def starflow_architecture(
    state: Mapping[str, Tensor],
    *,
    in_channels: int = 4,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    context_tokens: int | None = None,
    soft_clip: float = 4.0,
    softplus: bool = True,
    seq_order: SeqOrder = "L2R",
) -> dict[str, Any]:
    """The arguments of `TARFlow` that official weights were made with.

    Args:
        state: official names and tensors, from `read_state`.
        in_channels: channels of the codes.
        image_size: side of the codes, or (height, width); None = the one that it was trained on.
        patch_size: what it should be; None = as in_channels and the file tell.
        context_tokens: T, needed for a file without its buffers; None = as the file tells.
        soft_clip: ml-starflow's soft_clip; 0 = off.
        softplus: its use_softplus.
        seq_order: its seq_order.

    Raises:
        CheckpointError: these are not the weights of a STARFlow that itarflow has, or not for these arguments.
    """
    _check_kind(state)
    num_blocks = num_children(state, "blocks")
    inputs = [tensor_of(state, f"blocks.{index}.proj_in.weight", "(channels, values)") for index in range(num_blocks)]
    channels, token_dims = zip(*(weight.shape for weight in inputs), strict=True)
    check_channels(channels)
    if len(set(token_dims)) > 1:
        raise CheckpointError(
            f"has tokens of {listed(map(str, token_dims))} values in its blocks; expected the same number in all. "
            "It is of another architecture, or put together from several checkpoints."
        )
    patch = patch_sides(token_dims, in_channels)[0]
    agreed("patch_size", patch_size, patch, f"D = {token_dims[0]} in blocks.0.proj_in.weight, for {in_channels=},")
    side, num_text = _grid(state, token_dims[0], image_size, patch, context_tokens)
    context_dim, context_blocks = _context(state, num_blocks, num_text)
    return {
        "image_size": side * patch if image_size is None else image_size,
        "in_channels": in_channels,
        "patch_size": patch,
        "channels": one_or_all(channels),
        "num_layers": num_layers(state, num_blocks),
        "num_classes": context_dim - 1 if num_text == 1 else 0,
        "noise_conditioned": False,
        "head_dim": HEAD_DIM,
        "mlp_ratio": MLP_RATIO,
        "rotary_side": side,
        "start_token": any(name.endswith(".sos_embed") for name in state),
        "final_norm": any(name.endswith(".final_norm.weight") for name in state),
        "soft_clip": soft_clip,
        "softplus_scale": softplus,
        "first_block_reversed": seq_order == "L2R",
        "context_dim": context_dim,
        "context_tokens": num_text,
        "context_blocks": context_blocks,
    }


def is_redundant(name: str) -> bool:
    """Whether a tensor carries nothing; `starflow_architecture` has looked at its shape."""
    return re.fullmatch(_IGNORED, name) is not None


def redundant_tensors(flow: TARFlow, dtype: torch.dtype) -> dict[str, Tensor]:
    """What an official checkpoint holds besides the weights: buffers that carry nothing, but are loaded strictly."""
    tokens, values = flow.config.rotary_side**2, flow.z_shape[1]
    length = tokens + flow.config.context_tokens
    # One tensor under many names, as in ml-starflow: they take no memory of their own.
    angles, mask = torch.zeros(length, HEAD_DIM, dtype=dtype), torch.ones(length, length, dtype=dtype).tril()
    return {
        "var": torch.ones(tokens, values, dtype=dtype),
        "feat_rope.freqs_cos": angles,
        "feat_rope.freqs_sin": angles,
        **{f"blocks.{index}.attn_mask": mask for index in range(len(flow.blocks))},
    }


def _check_kind(state: Mapping[str, Tensor]) -> None:
    """Refuse models of ml-starflow that are not its image models, by name."""
    for pattern, reason in _OTHERS:
        found = next((name for name in state if re.search(pattern, name)), None)
        if found is not None:
            raise CheckpointError(f"holds {found}: {reason} Expected a STARFlow of images, such as the 3B.")
    layers = [name.removesuffix("qkv.weight") for name in state if name.endswith(".attention.qkv.weight")]
    biases = (f"{layer}{part}.bias" for layer in layers for part in ("qkv", "norm"))
    if lacking := next((bias for bias in biases if bias not in state), None):
        raise CheckpointError(
            f"lacks {lacking}; expected biases everywhere, as in the published image models. It is incomplete, or a "
            "variant such as a Gemma, which itarflow has not."
        )


def _grid(
    state: Mapping[str, Tensor],
    token_dim: int,
    image_size: int | tuple[int, int] | None,
    patch: int,
    context_tokens: int | None,
) -> tuple[int, int]:
    """P and T, from the buffers, or where a file has none from the arguments."""
    if "var" in state:
        var = tensor_of(state, "var", "(tokens, values)")
        tokens, values = var.shape
        if not tokens or not is_square(tokens) or values != token_dim:
            raise CheckpointError(
                f"has var of shape {tuple(var.shape)}; expected (P * P, {token_dim}) for a grid of P x P tokens of "
                f"{token_dim} values. It is of another architecture."
            )
        side = math.isqrt(tokens)
    elif isinstance(image_size, int):
        if image_size % patch:
            raise CheckpointError(
                f"has tokens of patches of {patch} x {patch}, which don't divide image_size={image_size}; pass the "
                "side of the images that it was trained on."
            )
        side = image_size // patch
    else:
        raise CheckpointError(
            "has no var, which would tell the side of the images that it was trained on; pass that as image_size, "
            "one number (--image-size)."
        )
    lengths = _lengths(state)
    if len(set(lengths.values())) > 1:
        by_length = {count: name for name, count in lengths.items()}
        told = listed(f"{count} by {name}" for count, name in by_length.items())
        raise CheckpointError(f"has buffers for different numbers of tokens ({told}); expected the same in all.")
    if not lengths:
        if context_tokens is None and any(".proj_txt." in name for name in state):
            raise CheckpointError(
                "has neither attn_mask nor feat_rope, which would tell the number of text tokens; pass it as "
                "context_tokens (--context-tokens; 128 in the 3B), or take the file with all its buffers."
            )
        return side, context_tokens or 0
    name, length = next(iter(lengths.items()))
    if length < side**2:
        raise CheckpointError(
            f"has {name} for {length} tokens, but var for {side**2}; expected at least as many. It is of another "
            "architecture, or put together from several checkpoints."
        )
    return side, agreed("context_tokens", context_tokens, length - side**2, f"the shape of {name}")


def _lengths(state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tokens, text and image, each of the buffers is for."""
    lengths: dict[str, int] = {}
    for name, tensor in state.items():
        if re.fullmatch(_IGNORED, name) is None or name == "var":
            continue
        is_mask = name.endswith("attn_mask")
        rows, columns = tensor_of(state, name, "(tokens, tokens)" if is_mask else "(tokens, angles)").shape
        expected = rows if is_mask else HEAD_DIM
        if columns != expected:
            raise CheckpointError(
                f"has {name} of shape {tuple(tensor.shape)}; expected ({rows}, {expected}). It is of another "
                "architecture."
            )
        lengths[name] = rows
    return lengths


def _context(state: Mapping[str, Tensor], num_blocks: int, num_text: int) -> tuple[int, int | None]:
    """Width of the condition vectors, and in how many blocks from the noise side they are; None = in all."""
    with_text = [index for index in range(num_blocks) if f"blocks.{index}.proj_txt.weight" in state]
    if bool(with_text) != bool(num_text):
        raise CheckpointError(
            f"has buffers for {num_text} text tokens and proj_txt in {len(with_text)} blocks; expected both or none. "
            "It is incomplete, or of another architecture."
        )
    if not with_text:
        return 0, 1
    if with_text != list(range(num_blocks - len(with_text), num_blocks)):
        raise CheckpointError(
            f"has proj_txt in blocks {listed(map(str, with_text))} of {num_blocks}; expected the last one, or all."
        )
    widths = {tensor_of(state, f"blocks.{index}.proj_txt.weight", "(channels, text)").shape[1] for index in with_text}
    if len(widths) > 1:
        raise CheckpointError(
            f"has proj_txt for text of {listed(map(str, sorted(widths)))} values; expected one width."
        )
    width = widths.pop()
    if not width:
        raise CheckpointError("has proj_txt for text of 0 values; expected at least one. It is of another model.")
    return width, None if len(with_text) == num_blocks > 1 else len(with_text)
