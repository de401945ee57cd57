"""Tiny flows whose weights are random, so that nothing in them is the identity; for what runs without pytest, too."""

from __future__ import annotations

from typing import Any

import torch

TINY: dict[str, Any] = {
    "image_size": 4,
    "in_channels": 2,
    "patch_size": 2,
    "channels": 8,
    "num_layers": (1, 2),
    "num_classes": 3,
    "head_dim": 4,
    "mlp_ratio": 2,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "volume_preserving": {"volume_preserving": True, "input_scale": 0.6},
    "small_patches_last": {"patch_size": (4, 2, 1), "num_layers": (1, 1, 1)},
    "shared_layers": {"shared_layers": 1, "num_layers": (1, 2, 3), "learned_first_token": True},
    "no_classes": {"num_classes": 0, "num_layers": (2,)},
    "no_noise_level": {"noise_conditioned": False, "channels": (8, 12)},
    "unconditional": {"num_classes": 0, "noise_conditioned": False, "num_layers": (1, 1, 1)},
    "one_token": {"patch_size": 4, "learned_first_token": True},
    "starflow": {
        "channels": 16,
        "head_dim": 16,
        "rotary_side": 2,
        "start_token": True,
        "final_norm": True,
        "soft_clip": 4.0,
        "softplus_scale": True,
        "first_block_reversed": True,
        "context_tokens": 1,
        "context_dim": 4,
    },
    "all_at_once": {
        "patch_size": (1, 2),
        "in_channels": 1,
        "volume_preserving": True,
        "shared_layers": 1,
        "learned_first_token": True,
        "input_scale": 1.7,
    },
}
"""Every setting of a flow, on and off."""


STARFLOW_TEXT: dict[str, Any] = VARIANTS["starflow"] | {
    "num_classes": 0,
    "context_tokens": 3,
    "context_dim": 5,
    "context_blocks": None,
    "patch_size": (2, 1),
    "noise_conditioned": False,
}
"""A flow of texts, read by all blocks."""


def condition_of(
    flow: Any, block: Any, labels: Any, noise_level: Any, temperature: float = 1.0, batch_size: int = 3
) -> Any:
    """The condition of a block of the flow."""
    return block.condition(*flow._given(batch_size, labels, noise_level, None), temperature)


def first_sample(condition: Any) -> Any:
    """The condition of the first sample alone, without gradients."""
    return type(condition)(*(None if part is None else part[:1].detach() for part in condition))


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.12) -> None:
    """Move every weight of a module, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
