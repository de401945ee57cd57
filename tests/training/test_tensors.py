"""The tensors of a state come back as they were; nothing that somebody has put in their place is run."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from itarflow.training import tensors
from itarflow.training.tensors import load_tensors, save_tensors


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def parts(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model, and its optimiser after a step."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def change_metadata(folder: Path, change: Callable[[Metadata], Any]) -> None:
    file = folder / "tensors" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(metadata) or metadata))


def all_at(folder: Path, name: str) -> Callable[[Metadata], Any]:
    def change(metadata: Metadata) -> Metadata:
        infos = {key: dataclasses.replace(info, relative_path=name) for key, info in metadata.storage_data.items()}
        return dataclasses.replace(metadata, storage_data=infos)

    return change


def test_weights_and_the_optimiser_come_back_and_its_settings_stay(tmp_path: Path) -> None:
    model, optimizer = parts()
    save_tensors(tmp_path, model, optimizer, None)
    other, its = parts(1)
    load_tensors(tmp_path, other, its, None)
    assert all(value.equal(model.state_dict()[name]) for name, value in other.state_dict().items())
    for index, values in its.state_dict()["state"].items():
        assert all(value.equal(optimizer.state_dict()["state"][index][name]) for name, value in values.items())
    assert its.param_groups[0]["lr"] == 1.1


def test_a_state_holds_nothing_but_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path, *parts(), None)
    metadata = pickle.loads((tmp_path / "tensors" / ".metadata").read_bytes())
    assert not [name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)]


def test_a_description_that_is_code_is_not_run(tmp_path: Path) -> None:
    save_tensors(tmp_path, *parts(), None)
    (tmp_path / "tensors" / ".metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"\.metadata is damaged: it asks for .*mkdir"):
        load_tensors(tmp_path, *parts(), None)
    assert not (tmp_path / "made").exists()


def test_code_in_a_corner_of_the_description_is_not_run(tmp_path: Path) -> None:
    save_tensors(tmp_path, *parts(), None)
    change_metadata(tmp_path, lambda metadata: setattr(metadata, "planner_data", _Evil(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"it asks for .*mkdir"):
        load_tensors(tmp_path, *parts(), None)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("declared", [True, False])
def test_code_in_place_of_a_tensor_is_not_run(tmp_path: Path, declared: bool) -> None:
    """Declared as an object, torch would unpickle it without limits; declared as a tensor, with limits."""
    save_tensors(tmp_path, *parts(), None)
    written = io.BytesIO()
    torch.save(_Evil(tmp_path / "made"), written)
    (tmp_path / "tensors" / "evil").write_bytes(written.getvalue())

    def change(metadata: Metadata) -> Metadata:
        (bias,) = (key for key in metadata.storage_data if key.fqn == "model.bias")
        infos = dict(metadata.storage_data)
        infos[bias] = dataclasses.replace(infos[bias], relative_path="evil", offset=0, length=len(written.getvalue()))
        kinds = dict(metadata.state_dict_metadata)
        if declared:
            infos[dataclasses.replace(bias, offset=None)] = infos.pop(bias)
            kinds["model.bias"] = BytesStorageMetadata()
        return dataclasses.replace(metadata, storage_data=infos, state_dict_metadata=kinds)

    change_metadata(tmp_path, change)
    with pytest.raises((CheckpointException, pickle.UnpicklingError)) as refusal:
        load_tensors(tmp_path, *parts(), None)
    assert not (tmp_path / "made").exists()
    assert not declared or "model.bias is no tensor there" in str(refusal.value)


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "..", "pipe"])
def test_no_file_but_those_of_the_state_is_opened(tmp_path: Path, name: str) -> None:
    save_tensors(tmp_path / "state", *parts(), None)
    (tmp_path / "state" / "outside").write_bytes(b"")
    os.mkfifo(tmp_path / "state" / "tensors" / "pipe")
    change_metadata(tmp_path / "state", all_at(tmp_path, name))
    with pytest.raises(ValueError, match=r"\.metadata is damaged: "):
        load_tensors(tmp_path / "state", *parts(), None)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps([[]] * 3)])
def test_a_description_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    save_tensors(tmp_path, *parts(), None)
    (tmp_path / "tensors" / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata is damaged: "):
        load_tensors(tmp_path, *parts(), None)


def test_a_description_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tensors(tmp_path, *parts(), None)
    size = (tmp_path / "tensors" / ".metadata").stat().st_size
    monkeypatch.setattr(tensors, "_LARGEST", size)
    load_tensors(tmp_path, *parts(), None)
    monkeypatch.setattr(tensors, "_LARGEST", size - 1)
    with pytest.raises(ValueError, match=rf"\.metadata is too large; expected at most {size - 1:,} bytes"):
        load_tensors(tmp_path, *parts(), None)
