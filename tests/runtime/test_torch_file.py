"""What is in a file is found, or the file is refused with the reason; code in it is never run."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import checkpoint

from itarflow.runtime.errors import CheckpointError
from itarflow.runtime.torch_file import flat_state, read_state

STATE = {"blocks.1.layer.weight": torch.linspace(0.1, 0.9, 4096).reshape(64, 64), "var": torch.ones(4, 12)}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """saved(content, **options of torch.save): the path of a file with it."""

    def save(content: object, **options: Any) -> Path:
        path = tmp_path / "model.pth"
        torch.save(content, path, **options)
        return path

    return save


def assert_same(state: Mapping[str, Tensor]) -> None:
    assert state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(state[name], tensor), name


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_state(path)
    return str(error.value)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.blocks.1.layer.weight",
        "_orig_mod.blocks.1.layer.weight",
        "module._orig_mod.blocks.1.layer.weight",
        "blocks.1._orig_mod.layer.weight",
        "_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module.layer.weight",
    ],
)
def test_prefixes_of_wrappers_are_taken_off(wrapped):
    assert_same(flat_state({wrapped: STATE["blocks.1.layer.weight"], "module.var": STATE["var"]}))


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_weights_inside_a_dict_are_found(key):
    assert_same(flat_state({key: STATE, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}))


def test_files_of_old_pytorch_and_without_checksums_are_read(saved):
    assert_same(read_state(saved(STATE)))
    assert_same(read_state(saved(STATE, _use_new_zipfile_serialization=False)))
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        path = saved(STATE)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    with pytest.warns(UserWarning, match=r"was saved without checksums: damage in it can't be seen"):
        assert_same(read_state(path))


def test_missing_file(tmp_path):
    assert re.search("no such file.*Check the path", refusal(tmp_path / "nothing.pth"))


def test_folder(tmp_path):
    assert "folder" in refusal(tmp_path)
    assert "TARFlow.from_pretrained" in refusal(tmp_path)


@pytest.mark.parametrize(("kept", "zipped"), [(0, True), (3, False), (100, True), (0.5, False), (0.999, True)])
def test_truncated_file(kept, zipped, saved):
    path = saved(STATE, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    message = refusal(path)
    assert "damaged" in message
    assert "truncated" in message or "no PyTorch checkpoint" in message


def test_flipped_bit(saved):
    """PyTorch loads it, with another weight."""
    path = saved(STATE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    assert "checksum" in refusal(path)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_with_code_is_not_run(tmp_path, protocol):
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps({"var": Bomb(tmp_path / "boom")}, protocol=protocol))
    assert "code" in refusal(path)
    assert not (tmp_path / "boom").exists()


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path):
    path = saved(STATE | {"var": Bomb(tmp_path / "boom")})
    assert "holds code besides tensors" in refusal(path)
    assert "mkdir" in refusal(path)
    assert not (tmp_path / "boom").exists()


def test_whole_pickled_model(saved):
    message = refusal(saved(nn.Linear(2, 2)))
    assert "torch.nn.modules.linear.Linear" in message
    assert "save its state_dict alone" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html></html>", "no PyTorch checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no PyTorch checkpoint"),
        (b"PK\x03\x04", "of another format"),
    ],
)
def test_other_kinds_of_files(tmp_path, content, message):
    (tmp_path / "model.pth").write_bytes(content)
    assert message in refusal(tmp_path / "model.pth")


def test_zip_of_something_else(tmp_path):
    with (tmp_path / "model.pth").open("wb") as file:
        np.savez(file, a=np.zeros(3))
    assert "of another format" in refusal(tmp_path / "model.pth")


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"module.var": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)}, path)
    state = read_state(path)
    assert sorted(state) == ["b", "var"]
    assert state["b"].dtype == torch.bfloat16
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated or damaged" in refusal(path)


def test_a_folder_of_shards_is_told_how_to_become_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {"blocks.0.proj_in.weight": torch.randn(3, 2), "var": torch.ones(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        checkpoint.save(weights, checkpoint_id="run/model.pth")
        message = refusal(Path("run/model.pth"))
        assert "is a folder of .distcp shards" in message
        command = shlex.split(message[message.index("python -c") :])
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        exec(command[2])
    state = read_state(Path("run/model.pth.pth"))
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "model.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in refusal(tmp_path / "model.pth")


def test_optimizer_file(saved):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    path = saved({"optimizer": optimizer.state_dict(), "lr_schedule": OrderedDict(counter=torch.tensor(3))})
    assert "state of an optimizer" in refusal(path)
    assert "_opt_" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "holds nothing"),
        ({"epoch": 3}, "no tensors: epoch"),
        ({"var": torch.ones(2), "epoch": 3}, "no tensors: epoch"),
        ({3: torch.ones(2)}, "no tensors: 3"),
        ({"model": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}}, "model, ema"),
        ({"module.var": torch.ones(2), "var": torch.ones(2)}, "1 have the name of another"),
    ],
)
def test_foreign_contents(saved, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_state(saved(content))
