from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itarflow import convert
from itarflow.convert import export_official, load_official, name_map, official_name
from itarflow.flow import TARFlow
from itarflow.runtime.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL: dict[str, dict[str, Any]] = {
    "itarflow_cond": {},
    "itarflow_mixed_patch": {},
    "itarflow_shared_backbone": {},
    "itarflow_uncond": {"in_channels": 1},
    "itarflow_vp": {},
    "tarflow_cond": {},
    "tarflow_uncond": {},
}
"""Official checkpoints, and what must be told to read them."""

State = dict[str, Any]


def tiny(**changes: Any) -> TARFlow:
    """A small flow whose every tensor is drawn at random, so that no mix-up goes unseen."""
    arguments = {"image_size": 4, "in_channels": 3, "patch_size": 2, "channels": 64, "num_layers": (1, 1)} | changes
    flow = TARFlow(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in flow.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return flow


@pytest.fixture
def official(tmp_path: Path) -> Callable[..., Path]:
    """Writes an official checkpoint of a tiny flow after a change of its state dict, and returns its path."""

    def write(change: Callable[[State], object] = lambda state: None, **arguments: Any) -> Path:
        state = convert.official_state(tiny(**arguments))
        result = change(state)
        path = tmp_path / "model.pth"
        torch.save(state if result is None else result, path)
        return path

    return write


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def with_(name: str, tensor: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name: tensor}


def config_of(flow: TARFlow) -> dict[str, Any]:
    return {name: value for name, value in flow.config.items() if not name.startswith("_")}


def assert_same(first: TARFlow, second: TARFlow) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# What is read


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_file_survives_reading_and_writing_bit_for_bit(name, tmp_path):
    source = GOLDEN / name / "weights.pth"
    flow = load_official(source, **OFFICIAL[name])
    before, after = (torch.load(path, weights_only=True) for path in (source, export_official(flow, tmp_path / "a")))
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key
    redundant = {key for key in before if "attn_mask" in key or ".shared_backbone." in key}
    names = name_map(flow, "attn_blocks" if name.startswith("tarflow") else "head_blocks")
    assert set(names) == set(before) - redundant
    assert sorted(names.values()) == sorted(flow.state_dict())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("itarflow_cond", {"image_size": 12, "patch_size": 4, "num_layers": (1, 1, 1, 2), "num_classes": 10}),
        ("itarflow_mixed_patch", {"image_size": 8, "patch_size": (4, 2), "num_layers": (1, 1), "num_classes": 4}),
        ("itarflow_shared_backbone", {"num_layers": (1, 2), "shared_layers": 1, "volume_preserving": False}),
        ("itarflow_uncond", {"image_size": 8, "in_channels": 1, "num_classes": 0, "noise_conditioned": True}),
        ("itarflow_vp", {"volume_preserving": True, "noise_conditioned": True, "shared_layers": 0}),
        ("tarflow_cond", {"noise_conditioned": False, "num_classes": 6, "num_layers": (1, 1), "channels": 64}),
        ("tarflow_uncond", {"noise_conditioned": False, "num_classes": 0, "num_layers": (1,), "channels": 128}),
    ],
)
def test_architecture_is_told_by_the_shapes(name, expected):
    config = config_of(load_official(GOLDEN / name / "weights.pth", **OFFICIAL[name]))
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_classes": 5, "noise_range": (0.01, 0.3), "input_scale": 1.7},
        {"patch_size": (2, 4, 1), "channels": (64, 128, 192), "num_layers": (1, 2, 1), "num_classes": 1},
        {"shared_layers": 2, "num_layers": (2, 3, 4), "num_classes": 2},
        {"volume_preserving": True, "in_channels": 4},
        {"noise_conditioned": False, "num_classes": 3, "num_layers": (2, 2), "patch_size": (2, 2)},
        {"noise_conditioned": False, "volume_preserving": True, "in_channels": 1, "patch_size": 1},
    ],
)
def test_flow_survives_writing_and_reading_bit_for_bit(arguments, tmp_path):
    flow = tiny(**arguments)
    known = {key: arguments[key] for key in ("in_channels", "input_scale", "noise_range") if key in arguments}
    again = load_official(export_official(flow, tmp_path / "model.pth"), **known)
    assert_same(flow, again)
    uniform = {"patch_size": 2} if arguments.get("patch_size") == (2, 2) else {}
    assert config_of(again) == config_of(flow) | uniform


def test_loaded_flow_is_ready_for_use(official):
    flow = load_official(str(official(num_classes=3)))
    assert not flow.training
    assert all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in flow.parameters())
    z = flow.sample_prior(2, torch.Generator().manual_seed(1))
    assert flow.inverse(0.01 * z, torch.tensor([0, 2]), 0.1).shape == (2, 3, 4, 4)


def test_loaded_flow_does_not_depend_on_the_file(official):
    path = official()
    flow = load_official(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(flow, tiny())


def test_early_itarflow_names_are_read(official):
    path = official(lambda state: {name.replace("head_blocks", "attn_blocks"): t for name, t in state.items()})
    assert_same(load_official(path), tiny())


def test_weights_are_found_whatever_surrounds_them(official):
    path = official(lambda state: {"epoch": 3, "model": {f"module.{name}": tensor for name, tensor in state.items()}})
    assert_same(load_official(path), tiny())


def test_masks_and_aliases_are_not_needed(official):
    def drop(state: State) -> State:
        return {name: t for name, t in state.items() if "attn_mask" not in name and ".shared_backbone." not in name}

    assert_same(load_official(official(drop, shared_layers=1)), tiny(shared_layers=1))


def test_stored_mask_is_ignored(official):
    assert_same(load_official(official(with_("blocks.0.attn_mask", torch.zeros(4, 4)))), tiny())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(official, dtype):
    flow = load_official(official(lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}))
    for name, tensor in tiny().state_dict().items():
        assert torch.equal(flow.state_dict()[name], tensor.to(dtype).float()), name


# Names


NAMES = (
    ("prior_variance", "var"),
    ("blocks.0.position_embedding.weight", "blocks.0.pos_embed"),
    ("blocks.11.class_embedding.weight", "blocks.11.class_embed"),
    ("blocks.1.proj_in.weight", "blocks.1.proj_in.weight"),
    ("blocks.1.noise_embedding.mlp.2.bias", "blocks.1.time_embed.mlp.2.bias"),
    ("blocks.1.transformer.layers.23.attention_norm.weight", "blocks.1.head_blocks.23.attention.norm.weight"),
    ("blocks.1.transformer.layers.0.attention.qkv.bias", "blocks.1.head_blocks.0.attention.qkv.bias"),
    ("blocks.1.transformer.layers.0.mlp_norm.bias", "blocks.1.head_blocks.0.mlp.norm.bias"),
    ("blocks.1.transformer.layers.0.mlp.2.weight", "blocks.1.head_blocks.0.mlp.main.2.weight"),
    ("shared_backbone.layers.3.mlp.0.weight", "shared_backbone.3.mlp.main.0.weight"),
    ("shared_backbone.layers.3.attention_norm.bias", "shared_backbone.3.attention.norm.bias"),
)


def test_names():
    for ours, official in NAMES:
        assert official_name(ours) == official
        assert official_name(ours, "attn_blocks") == official.replace("head_blocks", "attn_blocks")


# What is written


@pytest.mark.parametrize(("noise_conditioned", "layers"), [(True, "head_blocks"), (False, "attn_blocks")])
def test_export_names_layers_as_its_repository_does(noise_conditioned, layers, tmp_path):
    path = export_official(tiny(noise_conditioned=noise_conditioned), tmp_path / "model.pth")
    state = torch.load(path, weights_only=True)
    assert any(f".{layers}." in name for name in state)
    assert any("time_embed" in name for name in state) == noise_conditioned


def test_export_writes_masks_and_aliases(tmp_path):
    path = export_official(tiny(shared_layers=1), tmp_path / "model.pth")
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["blocks.1.attn_mask"], torch.ones(4, 4).tril())
    owner = state["shared_backbone.0.attention.qkv.weight"]
    for index in range(2):
        alias = state[f"blocks.{index}.shared_backbone.0.attention.qkv.weight"]
        assert alias.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()


def test_export_leaves_the_flow_alone_and_makes_folders(tmp_path):
    flow = tiny(num_classes=2).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    path = export_official(flow, str(tmp_path / "a" / "b" / "model.pth"))
    assert path == tmp_path / "a" / "b" / "model.pth"
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pth"]
    assert all(tensor.dtype == torch.float32 for tensor in torch.load(path, weights_only=True).values())
    for name, tensor in flow.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


def test_export_can_replace_the_file_it_came_from(official):
    path = official()
    assert_same(load_official(export_official(load_official(path), path)), tiny())


def test_failed_export_leaves_the_old_file_whole(official, monkeypatch):
    path = official()
    before = path.read_bytes()

    def full_disk(state: State, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_official(tiny(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pth"]


def test_a_full_disk_is_told_in_torchs_words_too(monkeypatch, tmp_path):
    def full_disk(state: State, file: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"model\.pth can't be written: .*unexpected pos.* Make room"):
        export_official(tiny(), tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learned_first_token": True}, "learned_first_token=True .*ml-itarflow .*False"),
        ({"head_dim": 32}, "head_dim=32.* 64"),
        ({"mlp_ratio": 2}, "mlp_ratio=2.* 4"),
        ({"noise_conditioned": False, "input_scale": 2.0}, "input_scale=2.0.*ml-tarflow .*1"),
        ({"noise_conditioned": False, "shared_layers": 1}, "shared_layers=1.*ml-tarflow .*0"),
        ({"noise_conditioned": False, "patch_size": (2, 4)}, "patch_size=.2, 4.* 2 in"),
        ({"noise_conditioned": False, "channels": (64, 128)}, "channels=.64, 128.* 64 in"),
        ({"noise_conditioned": False, "num_layers": (1, 2)}, "num_layers=.1, 2.*save_pretrained"),
        ({"image_size": (4, 16)}, r"image_size=\(4, 16\) .*square.*save_pretrained"),
        ({"image_size": (8, 4), "noise_conditioned": False}, r"image_size=\(8, 4\) .*square"),
        ({"start_token": True}, "start_token=True .*would need False"),
    ],
)
def test_export_refuses_what_the_official_code_has_not(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_official(tiny(**arguments), tmp_path / "folder" / "model.pth")
    assert not (tmp_path / "folder").exists()


# What is refused


def refusal(path: Path, **arguments: Any) -> str:
    """The message of the refusal, which must begin with the file's name."""
    with pytest.raises(CheckpointError) as error:
        load_official(path, **arguments)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).removeprefix(f"{path}: ")


def test_refused_file_is_named(tmp_path):
    assert "no such file" in refusal(tmp_path / "nothing.pth")


def test_weights_of_another_model(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pth")
    message = refusal(tmp_path / "model.pth")
    assert re.search("weight, bias;.*blocks.0.pos_embed", message)


def test_weights_of_ours(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "model.pth")
    assert "opened with TARFlow.from_pretrained" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("var"), "lacks var;.* 45 tensors"),
        (without("blocks.1.proj_out.bias", "blocks.0.proj_in.bias"), "lacks blocks.0.proj_in.bias, blocks.1.proj_out"),
        (without("blocks.0.head_blocks.0.mlp.norm.bias"), "lacks blocks.0.head_blocks.0.mlp.norm.bias"),
        (without("blocks.1.class_embed"), "lacks blocks.1.class_embed"),
        (without("blocks.1.time_embed.mlp.0.bias"), "lacks blocks.1.time_embed.mlp.0.bias"),
        (without("blocks.1.pos_embed"), "no tensor blocks.1.pos_embed"),
        (without("blocks.0.proj_out.weight"), "no tensor blocks.0.proj_out.weight"),
        (with_("final_norm.weight", torch.ones(64)), "also has final_norm.weight"),
        (with_("blocks.0.shared_backbone.0.mlp.norm.bias", torch.ones(64)), "also has blocks.0.shared_backbone.0"),
        (
            with_("blocks.0.attn_blocks.0.mlp.norm.bias", torch.ones(64)),
            "no layers in block 1 .blocks.1.attn_blocks.0",
        ),
    ],
)
def test_missing_and_unexpected_tensors(official, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_official(official(change, num_classes=3))


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.head_blocks.99999.x",
        "blocks.0.head_blocks.1000000000.x",
        f"blocks.0.head_blocks.{'9' * 5000}.x",
        "blocks.1000000000.pos_embed",
        "shared_backbone.1000000000.x",
    ],
    ids=lambda name: name[:40],
)
def test_a_number_in_a_name_builds_no_layers(official, name):
    begun = time.monotonic()
    message = refusal(official(with_(name, torch.zeros(1))))
    assert "expected numbers without gaps" in message
    assert time.monotonic() - begun < 5


def test_layers_of_a_tensor_each_are_not_built(official):
    more = {f"blocks.0.head_blocks.{index}.x": torch.zeros(1) for index in range(1, 2000)}
    assert "tensors for all its layers" in refusal(official(lambda state: state | more))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1, 1, 1).expand(10**9, 1, 64), torch.eye(64).to_sparse()], ids=["expanded", "sparse"]
)
def test_a_tensor_without_memory_of_its_own_is_refused(official, tensor):
    assert "one value under many places: blocks.0.class_embed" in refusal(
        official(with_("blocks.0.class_embed", tensor))
    )


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth is no regular file"):
        load_official(tmp_path / "model.pth")


def test_block_without_layers(official):
    path = official(lambda state: {n: t for n, t in state.items() if not n.startswith("blocks.1.head_blocks")})
    assert "no layers in block 1" in refusal(path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.1.proj_in.bias", (63,), r"proj_in.bias .*\(63,\).*\(64,\)"),
        ("blocks.1.class_embed", (3, 64), r"class_embed .*\(3, 64\).*\(3, 1, 64\)"),
        ("blocks.0.class_embed", (3, 64), r"class_embed .*\(3, 64\).*\(classes, 1, channels\)"),
        ("blocks.1.class_embed", (4, 1, 64), r"class_embed .*\(4, 1, 64\)"),
        ("blocks.0.pos_embed", (4,), r"pos_embed .*\(4,\).*\(tokens, channels\)"),
        ("blocks.0.pos_embed", (5, 64), "5 tokens in block 0"),
        ("blocks.1.pos_embed", (16, 64), r"different sizes, \[4, 8\]"),
        ("blocks.1.pos_embed", (4, 96), "96 channels in block 1.* 64"),
        ("blocks.0.proj_out.weight", (36, 64), r"36 outputs.* 24 .* 12 "),
        ("blocks.1.proj_out.weight", (12, 64), r"proj_out.weight .*\(12, 64\).*\(24, 64\)"),
        ("blocks.0.head_blocks.0.mlp.main.0.weight", (128, 64), r"expected \(256, 64\)"),
        ("var", (16, 12), r"var .*\(16, 12\).*\(4, 12\)"),
    ],
)
def test_shapes_that_do_not_fit_together(official, name, shape, message):
    with pytest.raises(CheckpointError, match=message):
        load_official(official(with_(name, torch.ones(shape)), num_classes=3))


@pytest.mark.parametrize("in_channels", [5, 0])
def test_in_channels_that_do_not_fit(official, in_channels):
    message = refusal(official(), in_channels=in_channels)
    assert f"aren't square patches of in_channels={in_channels}" in message
    assert "pass in_channels = 3 or 12 (--in-channels)" in message


def test_tokens_that_fit_no_in_channels(official):
    path = official(with_("blocks.1.proj_in.weight", torch.ones(64, 0)))
    assert "another architecture" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(official, value):
    def spoil(state: State) -> None:
        state["blocks.1.head_blocks.0.mlp.main.0.weight"][3, 5] = value

    assert "NaN or infinite values in blocks.1.head_blocks.0.mlp.main.0.weight" in refusal(official(spoil))


def test_weights_that_are_no_floats(official):
    path = official(lambda state: state | {"var": state["var"].long()})
    assert "var as torch.int64; expected float32" in refusal(path)


def test_shared_backbone_that_differs_between_blocks(official):
    name = "blocks.1.shared_backbone.0.mlp.norm.bias"
    path = official(with_(name, torch.zeros(64)), shared_layers=1)
    assert f"different values in {name}" in refusal(path)


def test_shared_backbone_of_blocks_with_different_channels(official):
    path = official(with_("shared_backbone.0.mlp.norm.bias", torch.ones(64)), channels=(64, 128))
    assert "shared backbone and blocks of 64, 128 channels" in refusal(path)


def test_wrong_arguments_are_not_blamed_on_the_file(official):
    with pytest.raises(ValueError, match="input_scale is 0"):
        load_official(official(), input_scale=0.0)
    with pytest.raises(ValueError, match="noise_range"):
        load_official(official(), noise_range=(0.5, 0.1))


def test_two_threads_can_load_at_once(official):
    path = official()
    flows: list[TARFlow] = []
    threads = [threading.Thread(target=lambda: flows.append(load_official(path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(*flows)
    assert_same(flows[0], tiny())
