"""Official checkpoints, read and written.

An official checkpoint is `torch.save(model.state_dict())`: names and tensors, and nothing that says how the model was
built. Its family and its architecture follow from names and shapes, but for what leaves no trace in them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itarflow.convert import starflow, tarflow
from itarflow.convert.names import (
    HEAD_DIM,
    ITARFLOW_LAYERS,
    MLP_RATIO,
    TARFLOW_LAYERS,
    channel_first,
    name_map,
)
from itarflow.convert.shapes import layers_name
from itarflow.convert.starflow import SeqOrder, is_starflow, starflow_architecture
from itarflow.convert.tarflow import tarflow_architecture
from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.errors import CheckpointError
from itarflow.runtime.files import atomically
from itarflow.runtime.ranges import check_integer, shown
from itarflow.runtime.text import listed
from itarflow.runtime.torch_file import read_state

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_STARFLOW_FIELDS = ("start_token", "final_norm", "soft_clip", "softplus_scale", "first_block_reversed", "context_dim")


def load_official(
    path: str | os.PathLike[str],
    *,
    in_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    input_scale: float = 1.0,
    noise_range: tuple[float, float] | None = None,
    soft_clip: float | None = None,
    softplus: bool | None = None,
    seq_order: SeqOrder | None = None,
    context_tokens: int | None = None,
) -> TARFlow:
    """Read a checkpoint of ml-tarflow, ml-itarflow or ml-starflow; which of them, its tensors tell.

    The file is read twice, once for its checksums, and code in it is never run.

    Args:
        path: the .pth file with the weights (not the optimizer's, `*_opt_*.pth`), or the same names and tensors in a
            safetensors file. Weights inside a dict, such as {"model": weights, "epoch": 3}, and names with the
            prefixes of DDP, FSDP or torch.compile are understood.
        in_channels: channels of the images or codes, which the file doesn't say; None = 3, or 4 of a STARFlow.
        image_size: side of the images or codes; of a STARFlow also another one than it was trained on, or
            (height, width). None = as the file tells.
        patch_size: a patch's side, one number for all blocks; None = as in_channels and the file tell.
        input_scale: the factor on the images that a TARFlow or iTARFlow was trained with; the file doesn't say.
        noise_range: (t_min, t_max) of the training, which the flow will then insist on; None = unknown.
        soft_clip: of a STARFlow alone: bound of the outputs of its blocks, 0 = none; the file doesn't say. None = 4.
        softplus: of a STARFlow alone: whether its scale is a softplus, not an exponential; the file doesn't say.
            None = True.
        seq_order: of a STARFlow alone: "L2R" if its first block walks backwards, else "R2L"; the file doesn't say.
            None = "L2R".
        context_tokens: of a STARFlow alone: T, its number of text tokens; needed only for a file without its buffers.

    Returns:
        The flow on the CPU, in evaluation mode. A TARFlow or iTARFlow is in float32 and noise conditioned if the
        checkpoint is. A STARFlow keeps the file's type; its weights are mapped from the file, not copied, where the
        layouts agree: leave the file as it is while the flow is used.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind or architecture, holds code, or contradicts an
            argument.
        ValueError: input_scale, noise_range or another argument out of range, or one that the file's family has not.
        OSError: the file exists, but may not or can't be read.
    """
    path = Path(path)
    _check_arguments(image_size, context_tokens, seq_order)
    told = _given(in_channels=in_channels, image_size=image_size, patch_size=patch_size)
    of_starflow = _given(soft_clip=soft_clip, softplus=softplus, seq_order=seq_order, context_tokens=context_tokens)
    try:
        state = read_state(path)
        if is_starflow(state):
            config = starflow_architecture(state, **told, **of_starflow)
            _check_family(path, "STARFlow", {} if input_scale == 1 else {"input_scale": input_scale})
        else:
            config = tarflow_architecture(state, **told)
            _check_family(path, "TARFlow or iTARFlow", of_starflow)
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

    A flow with STARFlow's blocks becomes a checkpoint of ml-starflow, one with noise conditioning of ml-itarflow, and
    others of ml-tarflow. The format has no place for what `load_official` must be told: pass it when the file is
    loaded.

    Args:
        flow: on any device. It is stored in float32, a STARFlow in its own type: in the widest of them if there are
            several, and in float32 instead of float64, which isn't read back.
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
    """The official names and tensors of a flow, masks, buffers and aliases included, on the CPU.

    They are float32 copies; of a STARFlow they are the flow's own, where layout and type agree.
    """
    if flow.config.rotary_side:
        return _starflow_state(flow)
    ours = flow.state_dict()
    names = name_map(flow, ITARFLOW_LAYERS if flow.config.noise_conditioned else TARFLOW_LAYERS)
    state = {
        official: ours[name].detach().to("cpu", torch.float32, copy=True).reshape(_official_shape(name, ours[name]))
        for official, name in names.items()
    }
    return state | tarflow.redundant_tensors(state, len(flow.blocks))


def _starflow_state(flow: TARFlow) -> dict[str, Tensor]:
    patch, ours = flow.patch_sizes[0], flow.state_dict()
    widest = reduce(torch.promote_types, (parameter.dtype for parameter in flow.parameters()))
    dtype = widest if widest in _WEIGHTS else torch.float32
    state = {
        official: channel_first(name, ours[name].detach().to("cpu", dtype), patch, back=True).contiguous()
        for official, name in name_map(flow, TARFLOW_LAYERS).items()
    }
    return state | starflow.redundant_tensors(flow, dtype)


def our_weights(state: Mapping[str, Tensor], flow: TARFlow) -> dict[str, Tensor]:
    """Official weights as a state dict of `flow`.

    Args:
        state: official names and tensors, from `read_state`.
        flow: a flow of that architecture; only its names and shapes are read.

    Returns:
        float32 copies that share no memory with `state`; for a STARFlow tensors of the type of `state`, the widest if
        there are several, that are copies only where type or layout differ, or where two share memory.

    Raises:
        CheckpointError: a tensor is missing, too many, of a wrong shape or type, or not finite.
    """
    names = name_map(flow, layers_name(state))
    if flow.config.rotary_side:
        names.pop("var", None)  # it carries nothing, and may be missing
        _check_names(state, names, [name for name in state if starflow.is_redundant(name)])
        return _starflow_weights(state, names, flow)
    _check_names(state, names, [name for name in state if tarflow.is_redundant(name, state)])
    shapes = {name: _official_shape(name, tensor) for name, tensor in flow.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for official, name in names.items():
        tensor = state[official]
        _check_tensor(official, tensor, shapes[name])
        copy = tensor.to(torch.float32, copy=True).contiguous()
        weights[name] = copy.squeeze(1) if name.endswith("class_embedding.weight") else copy
    return weights


def _starflow_weights(state: Mapping[str, Tensor], names: Mapping[str, str], flow: TARFlow) -> dict[str, Tensor]:
    expected = flow.state_dict()
    for official, name in names.items():
        _check_tensor(official, state[official], tuple(expected[name].shape))
    dtype = reduce(torch.promote_types, (state[official].dtype for official in names))
    weights = {
        name: channel_first(name, state[official].to(dtype), flow.patch_sizes[0]).contiguous()
        for official, name in names.items()
    }
    return _apart(weights) | {"prior_variance": torch.ones(flow.z_shape, dtype=dtype)}


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same contiguous tensors, those that share memory with another copied: training would change both."""
    apart, end = dict(weights), 0
    for name, tensor in sorted(weights.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            apart[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return apart


def _official_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The official shape of our tensor `name`: class embeddings have a dimension for the tokens."""
    shape = tuple(tensor.shape)
    return (shape[0], 1, shape[1]) if name.endswith("class_embedding.weight") else shape


def _check_names(state: Mapping[str, Tensor], names: Collection[str], redundant: Collection[str]) -> None:
    missing = [name for name in names if name not in state]
    unexpected = [name for name in state if name not in names and name not in redundant]
    if missing or unexpected:
        found = [f"{word} {listed(them)}" for word, them in (("lacks", missing), ("also has", unexpected)) if them]
        raise CheckpointError(
            f"{' and '.join(found)}; expected the {len(names)} tensors of the architecture that its shapes tell. "
            "It is incomplete, or of another model."
        )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"has {name} of shape {tuple(tensor.shape)}; expected {shape}, as its other tensors tell. "
            "It is of another architecture, or put together from several checkpoints."
        )
    if tensor.dtype not in _WEIGHTS:
        raise CheckpointError(f"has {name} as {tensor.dtype}; expected float32. Save model.float().state_dict().")
    if not tensor.isfinite().all():
        raise CheckpointError(
            f"has NaN or infinite values in {name}; expected finite weights. The training diverged: "
            "take an earlier checkpoint."
        )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_arguments(image_size: Any, context_tokens: Any, seq_order: Any) -> None:
    """Refuse, before a file is read, what fits none; raises ValueError."""
    sides = image_size if isinstance(image_size, Sequence) else () if image_size is None else (image_size,)
    if isinstance(image_size, Sequence) and len(sides) != 2:
        raise ValueError(f"image_size is {shown(image_size)}; expected a side, or height and width.")
    for side in sides:
        check_integer("image_size", side, 1, 2**16)
    if context_tokens is not None:
        check_integer("context_tokens", context_tokens, 0, 2**16)
    if seq_order not in (None, "L2R", "R2L"):
        raise ValueError(f"seq_order is {shown(seq_order)}; expected 'L2R' or 'R2L'.")


def _check_family(path: Path, family: str, others: Mapping[str, Any]) -> None:
    """Refuse options that only models of the other family have; raises ValueError."""
    if not others:
        return
    name, value = next(iter(others.items()))
    raise ValueError(
        f"{name} is {shown(value)}, but {path} is a {family}, which has no {name}; leave it out "
        f"(--{name.replace('_', '-')})."
    )


def _check_exportable(flow: TARFlow) -> None:
    """Refuse what the official model classes can't express."""
    config = flow.config
    _, height, width = flow.image_shape
    if height != width and not config.rotary_side:
        raise ValueError(
            f"image_size={(height, width)} can't be exported; ml-tarflow and ml-itarflow would need a square. "
            "Save this flow with save_pretrained instead."
        )
    allowed: dict[str, Any] = {"learned_first_token": False, "head_dim": HEAD_DIM, "mlp_ratio": MLP_RATIO}
    code = "ml-starflow" if config.rotary_side else "ml-itarflow" if config.noise_conditioned else "ml-tarflow"
    if code == "ml-starflow":
        allowed |= {"noise_conditioned": False, "volume_preserving": False, "input_scale": 1, "shared_layers": 0}
        allowed |= {"patch_size": _first(config.patch_size)}
        allowed |= {"context_tokens": 1} if config.num_classes else {}
        allowed |= {"context_blocks": 1} if config.context_blocks not in (None, len(flow.blocks)) else {}
        shallow = [block.transformer.channels for block, _ in flow._blocks()][:-1]
        allowed |= {"channels": shallow[0]} if len(set(shallow)) > 1 else {}
    else:
        allowed |= dict.fromkeys(_STARFLOW_FIELDS, 0)
        if code == "ml-tarflow":
            allowed |= {"input_scale": 1, "shared_layers": 0}
            allowed |= {name: _first(getattr(config, name)) for name in ("patch_size", "channels", "num_layers")}
    for name, expected in allowed.items():
        value = getattr(config, name)
        values = value if isinstance(value, Sequence) else (value,)
        if any(entry != expected for entry in values):
            where = " in all blocks" if len(values) > 1 else ""
            expected = bool(expected) if isinstance(value, bool) else expected
            raise ValueError(
                f"{name}={value} can't be exported; {code} would need {expected}{where}. "
                "Save this flow with save_pretrained instead."
            )


def _first(value: int | Sequence[int]) -> int:
    return value[0] if isinstance(value, Sequence) else value
