"""Official checkpoints of TARFlow (ml-tarflow) and iTARFlow (ml-itarflow), read and written.

An official checkpoint is `torch.save(model.state_dict())`: names and float32 tensors, and nothing that says how the
model was built. Its architecture follows from the shapes, except for `in_channels` (a token of 48 values may be
3 channels of a 4 x 4 patch, or 12 of a 2 x 2) and `input_scale`, which leaves no trace.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.errors import CheckpointError
from itarflow.runtime.files import atomically
from itarflow.runtime.text import listed
from itarflow.runtime.torch_file import read_state

HEAD_DIM = 64
"""Width of an attention head in all official models."""
MLP_RATIO = 4
"""Hidden width of the MLPs in all official models, in units of the channels."""
TARFLOW_LAYERS, ITARFLOW_LAYERS = "attn_blocks", "head_blocks"
"""What ml-tarflow and ml-itarflow call the layers of a block. Early iTARFlow checkpoints have the first name, too."""

_LEAST_TENSORS = 8
"""In a layer; there are 12."""

_RENAMES = (
    (r"^prior_variance$", "var"),
    (r"\.position_embedding\.weight$", ".pos_embed"),
    (r"\.class_embedding\.weight$", ".class_embed"),
    (r"\.noise_embedding\.", ".time_embed."),
    (r"^shared_backbone\.layers\.", "shared_backbone."),
    (r"(\.\d+)\.mlp\.", r"\1.mlp.main."),
    (r"\.attention_norm\.", ".attention.norm."),
    (r"\.mlp_norm\.", ".mlp.norm."),
)


def load_official(
    path: str | os.PathLike[str],
    *,
    in_channels: int = 3,
    input_scale: float = 1.0,
    noise_range: tuple[float, float] | None = None,
) -> TARFlow:
    """Read a checkpoint of ml-tarflow or ml-itarflow.

    The file is read twice, once for its checksums, and code in it is never run.

    Args:
        path: the .pth file with the weights (not the optimizer's, `*_opt_*.pth`). Weights inside a dict, such as
            {"model": weights, "epoch": 3}, and names with the prefixes of DDP or torch.compile are understood.
        in_channels: channels of the images; the file doesn't say.
        input_scale: the factor on the images that the model was trained with; the file doesn't say.
        noise_range: (t_min, t_max) of the training, which the flow will then insist on; None = unknown.

    Returns:
        The flow in float32 on the CPU, in evaluation mode. It is noise conditioned if the checkpoint is.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind or architecture, or holds code.
        ValueError: input_scale or noise_range out of range.
        OSError: the file exists, but may not or can't be read.
    """
    path = Path(path)
    try:
        state = read_state(path)
        config = architecture(state, in_channels)
        # Without storage: the weights of a large model are neither drawn nor held twice.
        with torch.device("meta"):
            flow = TARFlow(**config, input_scale=input_scale, noise_range=noise_range)
        weights = our_weights(state, flow)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    flow.load_state_dict(weights, assign=True)
    return flow.eval()


def export_official(flow: TARFlow, path: str | os.PathLike[str]) -> Path:
    """Write a flow as an official checkpoint, which the official code loads strictly.

    A flow with noise conditioning becomes a checkpoint of ml-itarflow, one without a checkpoint of ml-tarflow. The
    format has no place for `in_channels`, `input_scale` and `noise_range`: pass them when the file is loaded.

    Args:
        flow: on any device; stored in float32.
        path: the file to write, replaced if it exists; missing folders are made. It is never half written.

    Returns:
        The path.

    Raises:
        ValueError: the official code has no such model.
        OSError: the file can't be written.
    """
    _check_exportable(flow)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as partial, partial.open("wb") as file:  # torch would write the partial's name into it
        torch.save(official_state(flow), file)
    return path


def official_state(flow: TARFlow) -> dict[str, Tensor]:
    """The official names and tensors of a flow: float32 copies on the CPU, masks and aliases included."""
    ours = flow.state_dict()
    names = name_map(flow, ITARFLOW_LAYERS if flow.config.noise_conditioned else TARFLOW_LAYERS)
    state = {
        official: ours[name].detach().to("cpu", torch.float32, copy=True).reshape(_official_shape(name, ours[name]))
        for official, name in names.items()
    }
    shared = {name: tensor for name, tensor in state.items() if name.startswith("shared_backbone.")}
    for index in range(len(flow.blocks)):
        num_tokens = len(state[f"blocks.{index}.pos_embed"])
        state[f"blocks.{index}.attn_mask"] = torch.ones(num_tokens, num_tokens).tril()
        # The official blocks hold the backbone as a submodule each: the same tensors under further names.
        state |= {f"blocks.{index}.{name}": tensor for name, tensor in shared.items()}
    return state


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


def architecture(state: Mapping[str, Tensor], in_channels: int) -> dict[str, Any]:
    """The arguments of `TARFlow` that official weights were made with, as far as their shapes determine them.

    Args:
        state: official names and tensors, from `read_state`.
        in_channels: channels of the images.

    Raises:
        CheckpointError: these are not the weights of a TARFlow, or not for in_channels.
    """
    if "blocks.0.pos_embed" not in state:
        raise CheckpointError(
            f"holds no official TARFlow: its tensors are {listed(state)}; expected blocks.0.pos_embed, ... "
            "A folder that itarflow saved is opened with TARFlow.from_pretrained."
        )
    num_blocks = _num_children(state, "blocks")
    embeddings = [_tensor(state, f"blocks.{index}.pos_embed", "(tokens, channels)") for index in range(num_blocks)]
    inputs = [_tensor(state, f"blocks.{index}.proj_in.weight", "(channels, values)") for index in range(num_blocks)]
    num_tokens, channels = zip(*(embedding.shape for embedding in embeddings), strict=True)
    shared_layers = _num_children(state, "shared_backbone")
    _check_channels(channels, shared_layers)
    image_size, patch_sizes = _image_geometry(num_tokens, [len(weight.T) for weight in inputs], in_channels)
    return {
        "image_size": image_size,
        "in_channels": in_channels,
        "patch_size": _one_or_all(patch_sizes),
        "channels": _one_or_all(channels),
        "num_layers": _num_layers(state, num_blocks, shared_layers),
        "num_classes": _num_classes(state),
        "noise_conditioned": any(".time_embed." in name for name in state),
        "volume_preserving": _volume_preserving(state, len(inputs[0].T)),
        "shared_layers": shared_layers,
        "head_dim": HEAD_DIM,
        "mlp_ratio": MLP_RATIO,
    }


def our_weights(state: Mapping[str, Tensor], flow: TARFlow) -> dict[str, Tensor]:
    """Official weights as a state dict of `flow`: float32 copies that share no memory with `state`.

    Args:
        state: official names and tensors, from `read_state`.
        flow: a flow of that architecture; only its names and shapes are read.

    Raises:
        CheckpointError: a tensor is missing, too many, of a wrong shape or type, or not finite.
    """
    names = name_map(flow, _layers_name(state))
    _check_names(state, names)
    shapes = {name: _official_shape(name, tensor) for name, tensor in flow.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for official, name in names.items():
        tensor = state[official]
        _check_tensor(official, tensor, shapes[name])
        copy = tensor.to(torch.float32, copy=True).contiguous()
        weights[name] = copy.squeeze(1) if name.endswith("class_embedding.weight") else copy
    return weights


def _num_children(state: Iterable[str], prefix: str) -> int:
    """How many modules prefix.0, prefix.1, ... there are.

    Raises:
        CheckpointError: one is missing between them, so that the last number is not what it seems.
    """
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    found = {match[1] for match in matches if match}
    expected = {str(number) for number in range(len(found))}
    if found != expected:
        odd = min(found - expected, key=len)
        raise CheckpointError(
            f"has {prefix}.{odd[:20]}, but no {prefix}.{min(expected - found, key=len)}; expected numbers without "
            "gaps. It is incomplete, or of another model."
        )
    return len(found)


def _tensor(state: Mapping[str, Tensor], name: str, shape: str) -> Tensor:
    """The tensor of that name, whose shape must have as many entries as the one written out in `shape`."""
    if name not in state:
        raise CheckpointError(f"has no tensor {name}; expected one of shape {shape}. Is it the whole state_dict()?")
    if state[name].ndim != len(shape.split(",")):
        raise CheckpointError(
            f"has {name} of shape {tuple(state[name].shape)}; expected {shape}. It is of another architecture."
        )
    return state[name]


def _check_channels(channels: Sequence[int], shared_layers: int) -> None:
    if shared_layers and len(set(channels)) > 1:
        raise CheckpointError(
            f"has a shared backbone and blocks of {listed(map(str, channels))} channels; expected the same in all. "
            "It is of another architecture."
        )
    for index, width in enumerate(channels):
        if width < 1 or width % HEAD_DIM:
            raise CheckpointError(
                f"has {width} channels in block {index}; expected a multiple of {HEAD_DIM}, the width of an official "
                "attention head. It is of another architecture."
            )


def _image_geometry(
    num_tokens: Sequence[int], token_dims: Sequence[int], in_channels: int
) -> tuple[int, tuple[int, ...]]:
    """Image size, and patch size of each block, from the number of tokens and the values in each."""
    _check_in_channels(token_dims, in_channels)
    grids = [math.isqrt(tokens) for tokens in num_tokens]
    for index, (tokens, side) in enumerate(zip(num_tokens, grids, strict=True)):
        if side**2 != tokens or side == 0:
            raise CheckpointError(
                f"has {tokens} tokens in block {index}; expected a square number, as images and patches are square. "
                "It is of another architecture."
            )
    patches = tuple(math.isqrt(values // in_channels) for values in token_dims)
    sizes = [side * patch for side, patch in zip(grids, patches, strict=True)]
    if len(set(sizes)) > 1:
        raise CheckpointError(
            f"has blocks for images of different sizes, {sizes}; expected one size. "
            "It is of another architecture, or put together from several checkpoints."
        )
    return sizes[0], patches


def _check_in_channels(token_dims: Sequence[int], in_channels: int) -> None:
    def fits(count: int) -> bool:
        return all(values and values % count == 0 and _is_square(values // count) for values in token_dims)

    if in_channels >= 1 and fits(in_channels):
        return
    possible = [count for count in range(1, min(token_dims) + 1) if fits(count)]
    choices = " or ".join(map(str, possible))
    advice = f"pass in_channels = {choices} (--in-channels)" if possible else "it is of another architecture"
    raise CheckpointError(
        f"has tokens of {listed(map(str, sorted(set(token_dims))))} values, which aren't square patches of "
        f"in_channels={in_channels}; expected in_channels * patch_size^2 values: {advice}."
    )


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _one_or_all(values: Sequence[int]) -> int | tuple[int, ...]:
    """One number if all blocks agree, else a tuple with one a block."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _layers_name(state: Iterable[str]) -> str:
    return TARFLOW_LAYERS if any(f".{TARFLOW_LAYERS}." in name for name in state) else ITARFLOW_LAYERS


def _num_layers(state: Mapping[str, Tensor], num_blocks: int, shared_layers: int) -> tuple[int, ...]:
    """Layers of each block, shared ones counted; at least those, as a block with fewer runs them all the same."""
    layers = _layers_name(state)
    if len(state) < _LEAST_TENSORS * (shared_layers + sum(
            _num_children(state, f"blocks.{index}.{layers}") for index in range(num_blocks))):  # fmt: skip
        raise CheckpointError(
            f"has only {len(state):,} tensors for all its layers; expected more. It is of another architecture."
        )
    depths = tuple(shared_layers + _num_children(state, f"blocks.{index}.{layers}") for index in range(num_blocks))
    if 0 in depths:
        raise CheckpointError(
            f"has no layers in block {depths.index(0)} (blocks.{depths.index(0)}.{layers}.0. ...); "
            "expected at least one in each block. Is it the whole state_dict()?"
        )
    return depths


def _num_classes(state: Mapping[str, Tensor]) -> int:
    if not any(name.endswith(".class_embed") for name in state):
        return 0
    return len(_tensor(state, "blocks.0.class_embed", "(classes, 1, channels)"))


def _volume_preserving(state: Mapping[str, Tensor], token_dim: int) -> bool:
    """Whether the blocks have no scale: one output for each value of a token instead of two."""
    outputs = len(_tensor(state, "blocks.0.proj_out.weight", "(outputs, channels)"))
    if outputs not in (token_dim, 2 * token_dim):
        raise CheckpointError(
            f"has {outputs} outputs in blocks.0.proj_out for tokens of {token_dim} values; expected {2 * token_dim} "
            f"(scale and shift) or {token_dim} (shift only). It is of another architecture."
        )
    return outputs == token_dim


def _official_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The official shape of our tensor `name`: class embeddings have a dimension for the tokens."""
    shape = tuple(tensor.shape)
    return (shape[0], 1, shape[1]) if name.endswith("class_embedding.weight") else shape


def _check_names(state: Mapping[str, Tensor], names: Collection[str]) -> None:
    missing = [name for name in names if name not in state]
    unexpected = [name for name in state if name not in names and not _is_redundant(name, state)]
    if missing or unexpected:
        found = [f"{word} {listed(them)}" for word, them in (("lacks", missing), ("also has", unexpected)) if them]
        raise CheckpointError(
            f"{' and '.join(found)}; expected the {len(names)} tensors of the architecture that its shapes tell. "
            "It is incomplete, or of another model."
        )


def _is_redundant(name: str, state: Mapping[str, Tensor]) -> bool:
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


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"has {name} of shape {tuple(tensor.shape)}; expected {shape}, as its other tensors tell. "
            "It is of another architecture, or put together from several checkpoints."
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"has {name} as {tensor.dtype}; expected float32. Save model.float().state_dict().")
    if not tensor.isfinite().all():
        raise CheckpointError(
            f"has NaN or infinite values in {name}; expected finite weights. The training diverged: "
            "take an earlier checkpoint."
        )


def _check_exportable(flow: TARFlow) -> None:
    """Refuse what the official model classes can't express."""
    config = flow.config
    code = "ml-itarflow" if config.noise_conditioned else "ml-tarflow"
    allowed = {"learned_first_token": False, "head_dim": HEAD_DIM, "mlp_ratio": MLP_RATIO}
    if not config.noise_conditioned:
        allowed |= {"input_scale": 1, "shared_layers": 0}
        allowed |= {name: _first(getattr(config, name)) for name in ("patch_size", "channels", "num_layers")}
    for name, expected in allowed.items():
        value = getattr(config, name)
        values = value if isinstance(value, Sequence) else (value,)
        if any(entry != expected for entry in values):
            where = " in all blocks" if len(values) > 1 else ""
            raise ValueError(
                f"{name}={value} can't be exported; {code} would need {expected}{where}. "
                "Save this flow with save_pretrained instead."
            )


def _first(value: int | Sequence[int]) -> int:
    return value[0] if isinstance(value, Sequence) else value
