"""The tensors of a training on disk: torch's distributed checkpoints, which any number of processes can read.

A state may come from anybody, so nothing in it may run. torch describes the tensors in `.metadata`, a pickle; here it
is read with the few classes that such a description needs, all of them plain values. The tensors themselves torch
reads with `weights_only=True`. Entries that it would unpickle without limits, which are all that are no tensors, are
neither written nor read.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.json_file import read_bytes
from itarflow.runtime.text import printable

_FOLDER = "tensors"
_LARGEST = 2**30
"""Bytes of a description. It has some 300 for each process's part of a tensor, so three million of those fit."""


def save_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> None:
    """Write weights, optimiser state and averages into a state's folder. All processes call this."""
    # If the optimiser has no state yet, asking torch for it would create one, and change the first step.
    parts = {"optimizer"} if optimizer.state else set()
    with _quiet():
        dcp.save(
            _tensors(model, optimizer, ema, parts | {"ema"}), checkpoint_id=folder / _FOLDER, no_dist=_single_process()
        )


def load_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> None:
    """Load what `save_tensors` wrote, on any number of processes, sharded or not. Nothing of it is run.

    Averages that were not saved start from the weights. The optimiser keeps its current settings, since a resumed run
    may have changed them.

    Raises:
        DataError: the description holds something else than tensors in files beside it.
        Exception: of torch, where the tensors are those of another model.
    """
    reader = _Reader(folder / _FOLDER)
    parts = {name.split(".")[0] for name in reader.read_metadata().state_dict_metadata}
    tensors = _tensors(model, optimizer, ema, parts)
    with _quiet():
        dcp.load(tensors, storage_reader=reader, planner=_Planner(), no_dist=_single_process())
    set_model_state_dict(model, tensors["model"])
    if "optimizer" in tensors:
        settings = get_optimizer_state_dict(model, optimizer)["param_groups"]
        set_optimizer_state_dict(model, optimizer, {**tensors["optimizer"], "param_groups": settings})
    if ema is not None and "ema" not in tensors:  # else they were loaded in place
        for average, parameter in zip(ema.shadow_params, model.parameters(), strict=True):
            average.copy_(parameter.detach())


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None, parts: Collection[str]
) -> dict[str, Any]:
    """Weights, and of `parts` "optimizer" and "ema" those that there are, by name."""
    tensors: dict[str, Any] = {"model": get_model_state_dict(model)}
    if "optimizer" in parts:
        tensors["optimizer"] = {"state": get_optimizer_state_dict(model, optimizer)["state"]}
    if ema is not None and "ema" in parts:
        names = (name.removeprefix("module.") for name, _ in model.named_parameters())
        tensors["ema"] = dict(zip(names, ema.shadow_params, strict=True))
    return tensors


_CLASSES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}  # fmt: skip
"""What a description of tensors is made of: plain values, whose making does nothing else."""


class _Description(pickle.Unpickler):
    """Reads `.metadata`; refuses all but `_CLASSES`."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module.split(".")[0] == "pathlib":  # where the state was written, which nobody asks for
            return _forgotten
        raise DataError(f"it asks for {printable(f'{module}.{name}')}, which a description of tensors has no use for")


def _forgotten(*_: object) -> None:
    """In place of a path."""


class _Reader(FileSystemReader):
    """torch's reader, which runs nothing and opens no file but those beside the description."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The description; raises DataError where it is something else, or too large."""
        folder = Path(self.path)
        description = read_bytes(folder / ".metadata", _LARGEST)
        try:
            found = _Description(io.BytesIO(description)).load()
            if not isinstance(found, Metadata) or any(i.transform_descriptors for i in found.storage_data.values()):
                raise DataError("it describes something else than tensors")
            for name in {info.relative_path for info in found.storage_data.values()}:
                if Path(name).name != name:
                    raise DataError(f"it names {printable(name)}, which is elsewhere")
                open_regular(folder / name).close()
        except OSError:
            raise
        except Exception as error:  # of pickle, or of values that are something else
            raise DataError(f"{printable(str(folder / '.metadata'))} is damaged: {printable(str(error))}") from error
        return replace(found, planner_data=None, storage_meta=None)


class _Planner(DefaultLoadPlanner):
    """torch's planner, but for entries that are no tensors, which it would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:  # noqa: ARG002
        raise DataError(f"{printable(read_item.dest_index.fqn)} is no tensor there")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning about a single process, which `no_dist` has asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _single_process() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1
