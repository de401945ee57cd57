"""The file of an official checkpoint: what it holds, or why it is refused.

An official checkpoint is `torch.save(model.state_dict())`, or the same tensors as safetensors. Code in a file is never
run, and checksums are compared where there are some: PyTorch itself loads flipped bits without a word. Messages don't
name the file; `load_official` puts its path in front.
"""

from __future__ import annotations

import pickle
import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from itarflow.runtime.errors import CheckpointError, DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.model_folder import read_head
from itarflow.runtime.text import listed, printable

# What DistributedDataParallel, FSDP, activation checkpointing and torch.compile put into the names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def read_state(path: Path) -> dict[str, Tensor]:
    """The names and tensors in a checkpoint, on the CPU and mapped from the file where its format allows it.

    Mapped tensors take no memory but what the system can take back, and the file isn't changed through them. A file
    of torch.save is read twice, once for its checksums. See `flat_state` for what may surround the tensors.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind, holds code, or not one set of tensors.
        DataError: it is a named pipe or a device.
        OSError: the file exists, but may not or can't be read.
    """
    return flat_state(_read(path))


def flat_state(content: object) -> dict[str, Tensor]:
    """The one mapping of names to tensors in a loaded file, its names freed from wrappers' prefixes.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"holds {'nothing' if content == {} else f'a {type(content).__name__}'}; expected names and tensors, "
            "as torch.save(model.state_dict()) writes them."
        )
    if "optimizer" in content and "lr_schedule" in content:
        raise CheckpointError(
            "holds the state of an optimizer and a learning rate schedule, no weights; "
            "load the checkpoint without '_opt_' in its name."
        )
    state = _unwrapped(content)
    others = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(
            f"holds entries that are no tensors: {listed(others)}; expected names and tensors only. "
            "Save model.state_dict() alone."
        )
    if odd := [name for name, tensor in state.items() if not _is_plain(tensor)]:
        raise CheckpointError(
            f"holds tensors that are sparse, quantized, or one value under many places: {printable(listed(odd))}; "
            "expected plain ones. Save model.float().state_dict()."
        )
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): t for name, t in state.items()}
    if len(plain) != len(state):
        raise CheckpointError(
            f"holds {len(state)} tensors of which {len(state) - len(plain)} have the name of another once "
            "'module.' and '_orig_mod.' are taken off; expected one model. Save one model's state_dict() alone."
        )
    return plain


def _read(path: Path) -> object:
    """What torch.save wrote, with the tensors mapped from the file where its format allows it."""
    if not path.exists():
        raise CheckpointError("there is no such file; expected an official checkpoint (.pth). Check the path.")
    if path.is_dir():
        raise CheckpointError(
            shards_advice(path)
            or "this is a folder; expected an official checkpoint (.pth). "
            "A folder that itarflow saved is opened with TARFlow.from_pretrained."
        )
    with open_regular(path) as file:  # a pipe would be waited for
        start = file.read(64)
    if start[8:10] == b'{"':
        return _read_safetensors(path)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "this is a Git LFS pointer, not the weights it stands for; run `git lfs pull`, or download the weights."
        )
    is_zip = start.startswith(b"PK")
    if is_zip:
        _check_checksums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(error)) from error
    except OSError:
        raise
    except Exception as error:  # a damaged file can make the unpickler raise nearly anything
        reason = str(error).split("\n", maxsplit=1)[0]
        # The unpickler's own words may be a mere key.
        raise CheckpointError(_damage(path, reason if " " in reason else "it is none")) from error


def shards_advice(folder: Path) -> str | None:
    """How to make one file of a folder that torch.distributed.checkpoint saved; None if it is no such folder."""
    if not any(folder.glob("*.distcp")):
        return None
    program = (
        "import sys; from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as save; "
        'save(sys.argv[1], sys.argv[1] + ".pth")'
    )
    name = str(folder)  # anybody's: it is quoted for the shell, and never a part of the program
    return (
        f"{printable(name)} is a folder of .distcp shards, which ml-starflow's training saves with fsdp 1; expected "
        f"one file. Make it by: python -c '{program}' {printable(shlex.quote(name))}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from it."""
    try:
        read_head(path)
        return load_file(path)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # safetensors' own
        raise CheckpointError(_damage(path, str(error))) from error


def _check_checksums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch can be set not to compute checksums; it then writes zeros.
            has_checksums = any(entry.CRC for entry in archive.infolist())
            if not has_checksums:
                warnings.warn(
                    f"{printable(str(path))} was saved without checksums: damage in it can't be seen. Compare its "
                    "size and SHA-256 with the original.",
                    stacklevel=2,
                )
            damaged = archive.testzip() if has_checksums else None
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(_damage(path, str(error))) from error
    if damaged is not None:
        raise CheckpointError(_damage(path, f"wrong checksum of {damaged}"))


def _damage(path: Path, reason: str) -> str:
    return (
        f"can't be read as a PyTorch checkpoint ({reason[:200].rstrip(' .')}); its {path.stat().st_size:,} bytes are "
        "truncated, damaged, or of another format. Download or copy it again, and compare its size with the original."
    )


def _refusal(error: pickle.UnpicklingError) -> str:
    """Why the unpickler for plain tensors refused a file."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        return (
            "is no PyTorch checkpoint of plain tensors: it is another kind of file, damaged, or holds code. Nothing "
            "of it was run; expected what torch.save(model.state_dict()) writes."
        )
    return (
        f"holds code besides tensors ({found[1]}) and was not loaded, since loading would run it; expected what "
        "torch.save(model.state_dict()) writes. If you trust where it comes from, save its state_dict alone."
    )


def _unwrapped(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The mapping itself, or the single state dict inside it."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return content
    inside = {key: value for key, value in content.items() if _is_state_dict(value)}
    if len(inside) > 1:
        raise CheckpointError(
            f"holds several sets of weights: {listed(map(str, inside))}; expected one. Save the one you mean alone."
        )
    return next(iter(inside.values()), content)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own for each of its values."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())
