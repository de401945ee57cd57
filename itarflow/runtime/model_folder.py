"""The folder of a model, config.json and safetensors, which may be anybody's: looked through before anything is built.

A safetensors file begins with the names, types and shapes of its tensors, so a config that asks for another model is
refused without one. Weights that are no floating point numbers, or not finite, are none.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, get_origin, get_type_hints

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.hub import folder_of
from itarflow.runtime.json_file import as_type, read_json
from itarflow.runtime.text import listed, printable

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
"""How diffusers calls the weights of a model."""
TRANSFORMERS_WEIGHTS = "model"
"""How transformers does."""
DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
"""Options of a download from the Hub."""
LARGEST = 2**20
"""Of the whole numbers in a config; no size of a model comes near it."""
_LARGEST_FLOAT = torch.finfo(torch.float32).max
_OF_DIFFUSERS = ("low_cpu_mem_usage", "disable_mmap", "offload_folder", "offload_state_dict", "max_memory", "provider",
                 "sess_options", "user_agent", "dduf_entries", "use_flashpack")  # fmt: skip
_TYPES = ("F32", "F16", "BF16", "F64")
_COUNTER = ".num_batches_tracked"  # a whole number of a batch norm
_POSITIVE = ("num_groups", "head_dim", "layers_per_block", "num_layers", "num_attention_heads")
Model = TypeVar("Model", bound=nn.Module)
_HEADER_LIMIT = 100_000_000  # the format's own
_AGAIN = "copy or download the folder again"


class _Entry(TypedDict):
    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    data_offsets: tuple[int, int]


class StoredTensor(NamedTuple):
    """What the head of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path, variant: str | None = None, stem: str = WEIGHTS) -> list[Path]:
    """The safetensors files of a model, in order: one, or as many as its index names.

    Args:
        folder: of the model.
        variant: as in diffusers, such as "fp16"; None = the plain one.
        stem: how the library that wrote them calls its weights.

    Raises:
        OSError: there are none, or none of that variant.
        DataError: the index is damaged, or names files elsewhere.
    """
    dot = "" if variant is None else f".{variant}"
    single, index = folder / f"{stem}{dot}.safetensors", folder / f"{stem}.safetensors.index{dot}.json"
    if single.exists():
        return [single]
    if index.exists():
        names = sorted(set(as_type(read_json(index, dict[str, Any]).get("weight_map"), dict[str, str], str(index))
                           .values()))  # fmt: skip
        if others := [name for name in names if name != os.path.basename(name) or not name.endswith(".safetensors")]:
            raise DataError(f"{index} names {printable(listed(others))}; expected safetensors files beside it")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise OSError(f"{folder / missing[0]} is missing, which {index.name} names: {_AGAIN}")
        return [folder / name for name in names]
    if variant is not None:
        held = ", ".join(repr(name) if name else "the plain one" for name in variants(folder, stem)) or "no weights"
        raise OSError(f"{folder} has no weights of the variant {variant!r}; it holds {held}: name one of these")
    held = listed(map(repr, variants(folder, stem)))
    advice = f"there are the variants {held}: name one of these" if held else _AGAIN
    raise OSError(f"{single} is missing; {advice}")


def variants(folder: Path, stem: str = WEIGHTS) -> list[str]:
    """The variants of weights in a folder; "" is the plain one."""
    stems = {path.name.removesuffix(".safetensors") for path in folder.glob(f"{stem}*.safetensors")}
    return sorted({name.removeprefix(stem).removeprefix(".").split("-")[0] for name in stems})


def read_head(path: Path) -> dict[str, StoredTensor]:
    """Names, types and shapes of the tensors in a safetensors file.

    Raises:
        DataError: it is none, truncated, holds a name twice, or tensors that are no floating point numbers.
    """

    def damaged(reason: str) -> DataError:
        return DataError(f"{printable(str(path))} is truncated or damaged ({printable(reason)}); {_AGAIN}")

    with open_regular(path) as file:
        start, total = file.read(8), os.fstat(file.fileno()).st_size
        if start == b"version ":
            raise DataError(f"{path} is a Git LFS pointer, not the weights it stands for; run `git lfs pull`")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(total - 8, _HEADER_LIMIT):
            raise damaged(f"{total:,} bytes without the head of a safetensors file")
        text = file.read(length)
    try:
        values = json.loads(text, object_pairs_hook=_unique)
        values.pop("__metadata__", None)
        entries = as_type(values, dict[str, _Entry], str(path))
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(str(error) or type(error).__name__) from error
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != total - 8 - length:
        raise damaged(f"it has {total:,} bytes; its head tells of {8 + length + end:,}")
    for name, entry in entries.items():
        if entry["dtype"] not in _TYPES and not name.endswith(_COUNTER):
            raise DataError(
                f"{path} holds {printable(name)} as {printable(entry['dtype'])}; expected weights of one of "
                f"{', '.join(_TYPES)}: it is damaged or of another kind"
            )
    return {name: StoredTensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def read_heads(files: Collection[Path]) -> dict[str, StoredTensor]:
    """What `read_head` says of some files, of which no two may hold the same tensor."""
    found: dict[str, StoredTensor] = {}
    for path in files:
        head = read_head(path)
        if twice := found.keys() & head.keys():
            raise DataError(f"{path} holds {printable(listed(twice))}, as another file does; {_AGAIN}")
        found |= head
    return found


def read_weights(files: Collection[Path]) -> dict[str, Tensor]:
    """The tensors of files that `read_head` has accepted, mapped from the disk.

    Raises:
        DataError: a value is not finite, or a file is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors' own
            raise DataError(f"{path} is damaged: {error}; {_AGAIN}") from error
        for name, tensor in tensors.items():
            check_finite(name, tensor, str(path))
        found |= tensors
    return found


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """Refuse a tensor with NaN or infinite values; raises DataError."""
    if tensor.numel() and not all(
        bool(end.isfinite()) for end in torch.aminmax(tensor.detach())
    ):  # NaN passes through
        raise DataError(
            f"{where} holds NaN or infinite values in {printable(name)}; the training diverged, or the file is "
            "damaged: take an earlier checkpoint, or copy it again"
        )


def read_arguments(path: Path, function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a model or a scheduler in its config file; see `check_arguments`.

    Entries that begin with _ are diffusers' own, and left out.
    """
    values = {key: value for key, value in read_json(path, dict[str, Any]).items() if not key.startswith("_")}
    return check_arguments(values, function, str(path))


def check_arguments(values: dict[str, Any], function: Callable[..., Any], name: str) -> dict[str, Any]:
    """The values, if `function` can be called with them, as far as its annotations tell.

    A text where it declares one of some words is let through: whether the word is known is for `function` to say.

    Args:
        values: arguments by name.
        function: takes them.
        name: where the values are from, for messages: a file's name.

    Raises:
        DataError: an argument is missing, not known, of another type, not finite, or beyond `LARGEST`.
    """
    hints, signature = get_type_hints(function), inspect.signature(function)
    if unknown := values.keys() - signature.parameters.keys():
        raise DataError(
            f"{printable(name)} has {printable(listed(sorted(unknown)))}, which this version of itarflow does not "
            "know; it is of a newer one, or damaged: update itarflow, or take another checkpoint"
        )
    needed = [key for key, one in signature.parameters.items() if one.default is one.empty and key in hints]
    if missing := [key for key in needed if key not in values]:
        raise DataError(f"{printable(name)} is damaged: {listed(missing)} is missing; {_AGAIN}")
    for key, value in values.items():
        as_type(value, str if get_origin(hints[key]) is Literal else hints[key], f"{key} in {name}")
    check_numbers(values, name)
    return values


def check_numbers(config: Mapping[str, Any], name: str) -> None:
    """Refuse a config with a number that is not finite, or beyond `LARGEST`; raises DataError."""
    for key, value in config.items():
        for number in _numbers(value):
            if not abs(number) <= (LARGEST if isinstance(number, int) else _LARGEST_FLOAT):
                shown = printable(f"{key} is {value}")[:80]
                raise DataError(f"{printable(name)} is damaged: {shown}; {_AGAIN}")


def check_bounded(config: Mapping[str, Any], heads: Mapping[str, StoredTensor], path: Path) -> None:
    """Refuse a config with a number that no model with these weights has, before it is built, perhaps for ever.

    Args:
        config: of a model of diffusers.
        heads: of its weights.
        path: of the config, for the message.

    Raises:
        DataError: naming the number.
    """
    largest = max([len(heads), *(size for tensor in heads.values() for size in tensor.shape)], default=0)
    for name, value in config.items():
        bound = LARGEST if name == "sample_size" else largest
        for number in _numbers(value):
            if not math.isfinite(number) or (
                isinstance(number, int) and number > bound and not name.endswith("_factor")
            ):
                raise DataError(
                    f"{path} is damaged: {printable(name)} is {printable(str(value))[:80]}, which does not go with "
                    f"its weights; {_AGAIN}"
                )


def check_like_defaults(config: Mapping[str, Any], function: Callable[..., Any], name: str) -> None:
    """Refuse a setting of diffusers that is of another kind than its default: no number, no switch, no text.

    Args:
        config: arguments by name; those that `function` does not know are left alone.
        function: takes them.
        name: where they are from, for messages: a file's name.

    Raises:
        DataError: naming the first.
    """
    check_numbers(config, name)
    for key, parameter in inspect.signature(function).parameters.items():
        default, value = parameter.default, config.get(key, parameter.default)
        kinds = next((kinds for kinds in ((bool,), (int, float), (str,)) if isinstance(default, kinds)), None)
        may_be_none = parameter.annotation is parameter.empty or re.search("None|Optional", str(parameter.annotation))
        fits = kinds is None or (isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool))
        if key.endswith(_POSITIVE) and value is not None:
            fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not fits and not (value is None and may_be_none):
            shown = printable(f"{key} is {value!r}")[:80]
            raise DataError(f"{printable(name)} is damaged: {shown}; expected such as {default!r}: {_AGAIN}")


def load_model(
    kind: type[Model],
    name: str | os.PathLike[str],
    num_layers: Callable[[Mapping[str, Any]], int],
    *,
    subfolder: str = "",
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    device_map: str | None = None,
    **options: Any,
) -> Model:
    """A model of ours from its folder, on the CPU, in evaluation mode. Weights are mapped from the file.

    Args:
        kind: its class, whose arguments are in the config.
        name: a folder, or a Hub id (NAME/MODEL).
        num_layers: how many layers the model of some arguments has: more than there are tensors are never built.
        subfolder: of the folder.
        variant: of the weights, such as "fp16".
        dtype: of the weights; None = float32.
        torch_dtype: the same, as diffusers called it.
        device_map: a device, such as "cuda"; None = the CPU.
        options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` and `proxies` guide a
            download; what diffusers says of how it loads is not needed here.

    Raises:
        OSError: there is no such model, or not of that variant.
        ValueError: files that are damaged or do not fit each other, or an option that is not known here.
    """
    if options.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors=False would read a pickle, which can run code; itarflow reads safetensors.")
    for needless in _OF_DIFFUSERS:
        options.pop(needless, None)
    download = {key: options.pop(key) for key in DOWNLOAD if key in options}
    if unknown := [key for key, value in options.items() if value not in (None, False)]:
        raise ValueError(f"{listed(unknown)} is no option of {kind.__name__}.from_pretrained; leave it out.")
    patterns = [f"{subfolder}/{kind_of}" if subfolder else kind_of for kind_of in ("*.json", "*.safetensors")]
    folder = folder_of(str(name), patterns, expected="a model", **download) / subfolder
    files, config = weight_files(folder, variant), folder / CONFIG
    arguments = read_arguments(config, kind.__init__)
    try:
        layers, tensors = num_layers(arguments), len(read_heads(files))
        if layers > tensors:
            raise ValueError(f"it asks for {layers:,} layers, but the weights have only {tensors:,} tensors")
        with torch.device("meta"):  # without storage, so that a wrong size costs nothing
            model = kind(**arguments)
    except DataError:
        raise
    except Exception as error:  # whatever impossible sizes raise
        raise DataError(f"{config} is damaged: {error}; {_AGAIN}") from error
    load_weights(model, files, config)
    # As nn.Module does, since diffusers' own warns of what does not concern us.
    return nn.Module.to(model, device=device_map, dtype=dtype or torch_dtype or torch.float32).eval()


def load_weights(model: nn.Module, files: Collection[Path], config: Path) -> None:
    """Give a model without storage its weights, if they are all of its own.

    Args:
        model: on the meta device.
        files: from `weight_files`.
        config: of the model, for messages.

    Raises:
        DataError: names, shapes, types or values that are not those of the model.
    """
    heads, expected = read_heads(files), {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if differing := [*(expected.keys() - heads.keys()), *(heads.keys() - expected.keys())]:
        raise DataError(
            f"the weights in {config.parent} do not fit its {config.name}: {len(differing)} tensors are missing or "
            f"too many, such as {printable(min(differing))}; copy or download the folder again"
        )
    for name, shape in expected.items():
        if heads[name].shape != shape:
            raise DataError(
                f"the weights in {config.parent} do not fit its {config.name}: {name} has shape {heads[name].shape}; "
                f"expected {shape}; copy or download the folder again"
            )
    model.load_state_dict(read_weights(files), assign=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
