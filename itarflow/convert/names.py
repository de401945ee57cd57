"""What the official code and ours call the same tensor, and how it is laid out there."""

from __future__ import annotations

import re

from einops import rearrange
from torch import Tensor

from itarflow.flow.tarflow import TARFlow

HEAD_DIM = 64
"""Width of an attention head in all official models."""
MLP_RATIO = 4
"""Hidden width of the MLPs in all official models, in units of the channels."""
TARFLOW_LAYERS, ITARFLOW_LAYERS = "attn_blocks", "head_blocks"
"""What ml-tarflow (and ml-starflow) and ml-itarflow call the layers of a block. Early iTARFlow checkpoints have the
first name, too."""

_RENAMES = (
    (r"^prior_variance$", "var"),
    (r"\.position_embedding\.weight$", ".pos_embed"),
    (r"\.class_embedding\.weight$", ".class_embed"),
    (r"\.noise_embedding\.", ".time_embed."),
    (r"\.start_token$", ".sos_embed"),
    (r"\.proj_context\.", ".proj_txt."),
    (r"^shared_backbone\.layers\.", "shared_backbone."),
    (r"(\.\d+)\.mlp\.", r"\1.mlp.main."),
    (r"\.attention_norm\.", ".attention.norm."),
    (r"\.mlp_norm\.", ".mlp.norm."),
)
_VALUES = {
    "proj_in.weight": ("w ({})", {}),
    "proj_out.weight": ("(s {}) w", {"s": 2}),
    "proj_out.bias": ("(s {})", {"s": 2}),
    "start_token": ("a b ({})", {}),
}
"""Our tensors with a dimension of the D values of a token, {}; s = scale and shift."""


def name_map(flow: TARFlow, layers: str = ITARFLOW_LAYERS) -> dict[str, str]:
    """Official name -> name in `flow.state_dict()`, for every tensor that carries information.

    Args:
        flow: any flow, also on the meta device.
        layers: what the checkpoint calls the layers of a block, "attn_blocks" or "head_blocks".
    """
    return {official_name(name, layers): name for name in flow.state_dict()}


def official_name(name: str, layers: str = ITARFLOW_LAYERS) -> str:
    """The official name of one of our tensors.

    Example:
        >>> official_name("blocks.3.transformer.layers.0.mlp_norm.weight")
        'blocks.3.head_blocks.0.mlp.norm.weight'
    """
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace(".transformer.layers.", f".{layers}.")


def channel_first(name: str, tensor: Tensor, patch_size: int, back: bool = False) -> Tensor:
    """A tensor of ml-starflow, whose tokens hold (row, column, channel), for ours, which hold (channel, row, column).

    The order of a token's values is free, as long as all blocks agree: z is the same but for that order.

    Args:
        name: ours.
        tensor: of the official layout; with `back` of ours.
        patch_size: p. With 1 both are the same, and the tensor is returned as it is.
        back: from our layout to the official one.
    """
    found = next((shape for ending, shape in _VALUES.items() if name.endswith(f".{ending}")), None)
    if found is None or patch_size == 1:
        return tensor
    shape, sizes = found
    theirs, ours = shape.format("p q c"), shape.format("c p q")
    source, target = (ours, theirs) if back else (theirs, ours)
    return rearrange(tensor, f"{source} -> {target}", p=patch_size, q=patch_size, **sizes)
