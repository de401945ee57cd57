"""Files of ml-starflow: read, refused with a reason, and written back bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from itarflow.convert import export_official, load_official, name_map, official_state, our_weights
from itarflow.convert.public_files import PUBLIC_FILES, likely_presets
from itarflow.convert.starflow import redundant_tensors, starflow_architecture
from itarflow.denoisers import FlowDenoiser
from itarflow.flow import TARFlow, nll_per_dim
from itarflow.flow.tarflow import patchify, unpatchify
from itarflow.inverse import Guidance
from itarflow.runtime.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden"
CASES = ("starflow_labels", "starflow_text", "starflow_patch2")
State = dict[str, Any]


def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The official constructor's arguments, and the recorded tensors."""
    folder = GOLDEN / name
    return json.loads((folder / "case.json").read_text())["constructor"], load_file(folder / "case.safetensors")


def told(name: str) -> dict[str, Any]:
    """What a file does not say."""
    spec, _ = case(name)
    names = ("in_channels", "patch_size", "soft_clip", "seq_order")
    return {
        **{key: spec[key] for key in names},
        "image_size": spec["img_size"],
        "softplus": bool(spec["use_softplus"]),
    }


def load(name: str) -> TARFlow:
    return load_official(GOLDEN / name / "weights.pth", **told(name))


def tiny(**changes: Any) -> TARFlow:
    """A small flow with STARFlow's blocks, whose every weight is drawn at random."""
    arguments: dict[str, Any] = {
        "image_size": 4, "in_channels": 4, "patch_size": 1, "channels": 64, "num_layers": (1, 1, 1),
        "noise_conditioned": False, "rotary_side": 4, "start_token": True, "final_norm": True, "soft_clip": 4.0,
        "softplus_scale": True, "first_block_reversed": True, "context_dim": 6, "context_tokens": 3,
    } | changes  # fmt: skip
    flow = TARFlow(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return flow


@pytest.fixture
def official(tmp_path: Path) -> Callable[..., Path]:
    """Writes the file of a tiny flow after a change of its state dict, and returns its path."""

    def write(change: Callable[[State], object] = lambda state: None, **arguments: Any) -> Path:
        state = dict(official_state(tiny(**arguments)))
        result = change(state)
        path = tmp_path / "model.pth"
        torch.save(state if result is None else result, path)
        return path

    return write


def without(pattern: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


def with_(name: str, tensor: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name: tensor}


def assert_same(first: TARFlow, second: TARFlow) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# What is read


@pytest.mark.parametrize("name", CASES)
def test_official_file_survives_reading_and_writing_bit_for_bit(name, tmp_path):
    before = torch.load(GOLDEN / name / "weights.pth")
    after = torch.load(export_official(load(name), tmp_path / "back.pth"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key


def computed(name: str) -> dict[str, Tensor]:
    """Our value for each tensor that the official code recorded, in its layout."""
    spec, tensors = case(name)
    flow, patch, size = load(name), spec["patch_size"], spec["img_size"]
    context, null_context = tensors["text"], tensors["empty_text"]

    def official(tokens: Tensor) -> Tensor:  # their tokens are (row, column, channel), and lie in a grid
        return rearrange(tokens, "b (h w) (c p q) -> b h w (p q c)", p=patch, q=patch, h=size // patch)

    blocks: list[tuple[Tensor, Any]] = []
    for block in flow.blocks:
        block.register_forward_hook(lambda _, args, out: blocks.append((args[0], out)))
    with torch.no_grad():
        output = flow(tensors["x"], context=context)
    found = {"z": unpatchify(output.z, patch, size), "loss": nll_per_dim(output).mean()}
    for index, (x, out) in enumerate(blocks):
        found |= {f"outputs.{index}": official(x), f"outputs.{index + 1}": official(out.z)}
        found[f"logdets.{index}"] = out.log_det
    noise = patchify(tensors["noise"], patch)
    for weight in (0.0, 3.6):
        guidance = Guidance(weight=weight, rule="gaussian", schedule="constant", blocks=flow.config.context_blocks)
        options: dict[str, Any] = {"context": context, "null_context": null_context, "guidance": guidance}
        path = flow.inverse(noise, return_trajectory=True, **options)
        found |= {f"sample_w{weight}_sequence.{index}": step for index, step in enumerate(path)}
        found[f"sample_w{weight}"] = path[-1]
    found["sample_w3.6_temp0.7"] = flow.inverse(noise, temperature=0.7, **options)
    found["denoised_sigma0.3"] = FlowDenoiser(flow)(tensors["x"], None, 0.3, context=context)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_read_file_computes_what_the_official_code_does(name):
    expected = {
        key: tensor for key, tensor in case(name)[1].items() if key not in ("x", "noise", "text", "empty_text")
    }
    found = computed(name)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.startswith("logdets"):  # recorded by token and value
            tensor = tensor.sum(dim=(1, 2))
        guided = 1e-3 if "temp" in key else 2e-4 if "w3.6" in key else 1e-4  # guidance amplifies rounding
        torch.testing.assert_close(
            found[key], tensor, atol=guided, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("starflow_labels", {"num_classes": 10, "context_tokens": 1, "context_dim": 11, "context_blocks": 1}),
        ("starflow_text", {"num_classes": 0, "context_tokens": 5, "context_dim": 24, "channels": (64, 64, 128)}),
        ("starflow_patch2", {"context_blocks": None, "patch_size": 2, "rotary_side": 4, "image_size": 8}),
    ],
)
def test_architecture_is_told_by_the_tensors(name, expected):
    flow = load_official(GOLDEN / name / "weights.pth", in_channels=told(name)["in_channels"])
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in flow.config.items()}
    expected = {"noise_conditioned": False, "start_token": True, "final_norm": True, "head_dim": 64} | expected
    assert {key: config[key] for key in expected} == expected
    assert (config["first_block_reversed"], config["softplus_scale"], config["soft_clip"]) == (True, True, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"context_blocks": None},
        {"context_dim": 0, "context_tokens": 0},
        {"num_classes": 5, "context_tokens": 1, "context_dim": 6},
        {"start_token": False, "final_norm": False, "soft_clip": 0.0, "softplus_scale": False},
        {"channels": (64, 64, 128), "num_layers": (1, 2, 1), "first_block_reversed": False},
        {"patch_size": 2, "image_size": 8, "in_channels": 3},
        {"image_size": (2, 8)},
    ],
    ids=str,
)
def test_flow_survives_writing_and_reading_bit_for_bit(arguments, tmp_path):
    flow = tiny(**arguments)
    again = load_official(
        export_official(flow, tmp_path / "model.pth"),
        in_channels=flow.config.in_channels,
        image_size=flow.config.image_size,
        soft_clip=flow.config.soft_clip,
        softplus=flow.config.softplus_scale,
        seq_order="L2R" if flow.config.first_block_reversed else "R2L",
    )
    assert_same(flow, again)
    skipped = ("_", "context_blocks") if not flow.config.context_dim else ("_",)
    configs = [
        {key: value for key, value in one.config.items() if not key.startswith(skipped)} for one in (flow, again)
    ]
    assert [str(value) for value in configs[0].values()] == [str(value) for value in configs[1].values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_file_is_kept_there_and_back(official, tmp_path, dtype):
    path = official(lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    flow = load_official(path)
    assert {tensor.dtype for tensor in flow.state_dict().values()} == {dtype}
    before, after = torch.load(path), torch.load(export_official(flow, tmp_path / "back.pth"))
    assert all(after[name].dtype == dtype and torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("own", "of_one", "expected"),
    [
        (torch.float64, torch.float64, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_what_is_written_can_be_read_again(tmp_path, own, of_one, expected):
    flow = tiny().to(own)
    flow.blocks[1].proj_out.to(of_one)
    path = export_official(flow, tmp_path / "model.pth")
    assert {tensor.dtype for tensor in torch.load(path).values()} == {expected}
    assert_same(load_official(path), flow.to(expected))


def test_of_two_types_the_wider_one_is_taken(official):
    flow = load_official(official(lambda state: {n: t.bfloat16() if "mlp" in n else t for n, t in state.items()}))
    assert {tensor.dtype for tensor in flow.state_dict().values()} == {torch.float32}


def test_nothing_is_copied_that_need_not_be():
    flow = tiny()
    state = official_state(flow)
    weights = our_weights(state, flow)
    for official_name, name in name_map(flow, "attn_blocks").items():
        if name != "prior_variance":
            assert weights[name].data_ptr() == state[official_name].data_ptr() == flow.state_dict()[name].data_ptr()


def test_weights_are_mapped_from_the_file(official, tmp_path):
    """Private memory grows by far less than the weights."""

    def private() -> int:
        return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    path = official(channels=512, num_layers=(4, 4, 4))
    save_file({name: tensor.clone() for name, tensor in torch.load(path).items()}, tmp_path / "model.safetensors")
    for file in (path, tmp_path / "model.safetensors"):
        before = private()
        flow = load_official(file)
        assert private() - before < 0.3 * sum(p.numel() * 4 for p in flow.parameters())


def test_safetensors_are_read_like_pth(official, tmp_path):
    path = official()
    state = {f"module.{name}": tensor.clone() for name, tensor in torch.load(path).items()}
    save_file(state, tmp_path / "model.safetensors")
    assert_same(load_official(tmp_path / "model.safetensors"), load_official(path))


def test_buffers_are_not_needed_where_arguments_tell_the_same(official):
    path = official(without("^var$|feat_rope|attn_mask"))
    assert_same(load_official(path, image_size=4, context_tokens=3), tiny())


def test_another_size_than_the_one_of_training_can_be_asked_for(official):
    flow = load_official(official(), image_size=(2, 6))
    assert flow.image_shape == (4, 2, 6)
    assert flow.config.rotary_side == 4


# The 3B

WIDTH, TEXT, TOKENS = 3072, 2048, 32 * 32


def shapes_of_the_3b() -> dict[str, tuple[int, ...]]:
    """Names and shapes of starflow_3B_t2i_256x256.pth, as ml-starflow builds the model."""
    length = TOKENS + 128
    shapes: dict[str, tuple[int, ...]] = {"var": (TOKENS, 4)}
    shapes |= {f"feat_rope.freqs_{part}": (length, 64) for part in ("cos", "sin")}
    for block, layers in enumerate((2, 2, 2, 2, 2, 24)):
        own = {
            "sos_embed": (1, 1, 4), "attn_mask": (length, length), "proj_in.weight": (WIDTH, 4),
            "proj_in.bias": (WIDTH,), "proj_out.weight": (8, WIDTH), "proj_out.bias": (8,),
            "final_norm.weight": (WIDTH,),
        }  # fmt: skip
        if block == 5:
            own |= {"proj_txt.weight": (WIDTH, TEXT), "proj_txt.bias": (WIDTH,)}
        for layer in range(layers):
            own |= {
                f"attn_blocks.{layer}.{name}": shape
                for name, shape in {
                    "attention.norm.weight": (WIDTH,), "attention.norm.bias": (WIDTH,),
                    "attention.qkv.weight": (3 * WIDTH, WIDTH), "attention.qkv.bias": (3 * WIDTH,),
                    "attention.proj.weight": (WIDTH, WIDTH), "attention.proj.bias": (WIDTH,),
                    "mlp.norm.weight": (WIDTH,), "mlp.norm.bias": (WIDTH,),
                    "mlp.main.0.weight": (4 * WIDTH, WIDTH), "mlp.main.0.bias": (4 * WIDTH,),
                    "mlp.main.2.weight": (WIDTH, 4 * WIDTH), "mlp.main.2.bias": (WIDTH,),
                }.items()
            }  # fmt: skip
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in own.items()}
    return shapes


def test_the_3b_has_455_tensors_that_are_all_ours():
    expected = shapes_of_the_3b()
    assert len(expected) == 455
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in expected.items()}
        flow = TARFlow(**starflow_architecture(state))
    assert sum(parameter.numel() for parameter in flow.parameters()) == 3_858_281_544
    ours = flow.state_dict()
    found = {official: tuple(ours[name].shape) for official, name in name_map(flow, "attn_blocks").items()}
    found |= {name: tuple(tensor.shape) for name, tensor in redundant_tensors(flow, torch.bfloat16).items()}
    assert found == expected
    PUBLIC_FILES["starflow_3b"].check("starflow_3b", flow)
    assert likely_presets(flow) == ["starflow_3b"]


# What is refused


def refusal(path: Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_official(path, **arguments)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_("learnable_self_denoiser.proj_in.weight", torch.ones(64, 4)), "STARFlow-V, which makes videos"),
        (with_("blocks.2.attn_blocks.0.mlp.gate_proj.weight", torch.ones(4, 4)), "gate_proj.weight: .*Gemma"),
        (with_("blocks.2.attn_blocks.0.attention.query_norm.weight", torch.ones(64)), "query_norm.weight: .*Gemma"),
        (without(r"qkv\.bias"), "lacks blocks.0.attn_blocks.0.attention.qkv.bias.*Gemma"),
        (without(r"2\..*norm\.bias"), "lacks blocks.2.attn_blocks.0.attention.norm.bias.*Gemma"),
        (without(r"proj_in\.bias"), "lacks blocks.0.proj_in.bias, .*; expected the .* tensors"),
        (without(r"blocks\.1\.sos_embed"), "lacks blocks.1.sos_embed"),
        (without(r"blocks\.0\.final_norm"), "lacks blocks.0.final_norm.weight"),
        (without(r"blocks\.1\.attn_blocks"), "no layers in block 1"),
        (with_("blocks.0.pos_embed", torch.ones(16, 64)), "positions are learned .rope 0."),
        (with_("blocks.0.class_embed", torch.ones(3, 1, 64)), "also has blocks.0.class_embed"),
        (with_("var", torch.ones(15, 4)), r"var of shape \(15, 4\); expected \(P \* P, 4\)"),
        (with_("var", torch.ones(16, 3)), r"var of shape \(16, 3\)"),
        (with_("var", torch.ones(25, 4)), "for 19 tokens, but var for 25"),
        (with_("blocks.1.attn_mask", torch.ones(20, 20)), "different numbers of tokens"),
        (with_("blocks.1.attn_mask", torch.ones(19, 20)), r"attn_mask of shape \(19, 20\)"),
        (with_("feat_rope.freqs_cos", torch.ones(19, 32)), r"freqs_cos of shape \(19, 32\); expected \(19, 64\)"),
        (without("proj_txt"), "buffers for 3 text tokens and proj_txt in 0 blocks"),
        (with_("blocks.0.proj_txt.weight", torch.ones(64, 6)), "proj_txt in blocks 0, 2 of 3"),
        (with_("blocks.0.proj_in.weight", torch.ones(64, 16)), "tokens of 16, 4, 4 values"),
        (with_("blocks.0.proj_in.weight", torch.ones(96, 4)), "96 channels in block 0"),
        (with_("blocks.2.proj_txt.bias", torch.ones(65)), r"proj_txt.bias of shape \(65,\); expected \(64,\)"),
        (
            with_("blocks.2.proj_out.bias", torch.full((8,), float("nan"))),
            "NaN or infinite values in blocks.2.proj_out",
        ),
        (with_("blocks.2.proj_out.bias", torch.ones(8).double()), "as torch.float64"),
        (without("^var$"), "has no var, .*image_size"),
        (without("feat_rope|attn_mask"), "neither attn_mask nor feat_rope, .*context_tokens"),
    ],
)
def test_what_is_no_image_model_of_starflow(official, change, message):
    assert re.search(message, refusal(official(change)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 3}, "aren't square patches of in_channels=3; .*in_channels = 1 or 4"),
        ({"patch_size": 2}, "has patch_size 1, as D = 4 .*patch_size=2 was asked for"),
        ({"context_tokens": 4}, "has context_tokens 3, .*context_tokens=4 was asked for"),
    ],
)
def test_arguments_that_contradict_the_tensors(official, arguments, message):
    assert re.search(message, refusal(official(), **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 4}, "has image_size 12, .*image_size=4"),
        ({"patch_size": 2}, "has patch_size 4, .*patch_size=2"),
    ],
)
def test_arguments_that_contradict_an_itarflow(arguments, message):
    assert re.search(message, refusal(GOLDEN / "itarflow_cond" / "weights.pth", **arguments))


def test_a_seq_order_that_there_is_not(official):
    with pytest.raises(ValueError, match="seq_order is 'RTL'; expected 'L2R' or 'R2L'"):
        load_official(official(), seq_order="RTL")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0; expected a whole number from 1"),
        ({"image_size": (4, -4)}, "image_size is -4"),
        ({"image_size": (4, 4, 4)}, r"image_size is \(4, 4, 4\); expected a side, or height and width"),
        ({"image_size": 2.5}, "image_size is 2.5"),
        ({"context_tokens": -1}, "context_tokens is -1; expected a whole number from 0"),
        ({"context_tokens": True}, "context_tokens is True"),
        ({"soft_clip": -1.0}, "soft_clip is -1"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_their_names(official, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_official(official(), **arguments)
    bare, told = official(without("^var$|feat_rope|attn_mask")), {"image_size": 4, "context_tokens": 3}
    with pytest.raises(ValueError, match=message):
        load_official(bare, **told | arguments)


@pytest.mark.parametrize("name", ["itarflow_cond", "tarflow_cond"])
@pytest.mark.parametrize(
    "option",
    [{"soft_clip": 7.0}, {"softplus": False}, {"seq_order": "R2L"}, {"context_tokens": 128}],
    ids=str,
)
def test_what_only_a_starflow_has_is_refused_of_others(name, option):
    ((key, value),) = option.items()
    with pytest.raises(
        ValueError, match=f"{key} is {value!r}, but .*weights.pth is a TARFlow or iTARFlow, .* no {key};"
    ):
        load_official(GOLDEN / name / "weights.pth", **option)


def test_what_a_starflow_has_not_is_refused(official):
    with pytest.raises(ValueError, match=r"input_scale is 2.0, but .* is a STARFlow, which has no input_scale"):
        load_official(official(), input_scale=2.0)
    with pytest.raises(ValueError, match="seq_order is 'nonsense'; expected 'L2R' or 'R2L'"):
        load_official(GOLDEN / "itarflow_cond" / "weights.pth", seq_order="nonsense")


def test_buffers_of_different_lengths_are_told_once_each(official):
    message = refusal(official(with_("blocks.1.attn_mask", torch.ones(20, 20))))
    assert re.search(r"\(19 by [\w.]+, 20 by blocks.1.attn_mask\)", message)


def test_text_without_values_is_refused(official):
    assert "proj_txt for text of 0 values" in refusal(official(with_("blocks.2.proj_txt.weight", torch.ones(64, 0))))


@pytest.mark.parametrize("kind", ["equal", "overlapping"])
def test_tensors_that_share_memory_are_set_apart(official, tmp_path, kind):
    first, second = ("blocks.0.attn_blocks.0.mlp.norm.bias", "blocks.1.attn_blocks.0.mlp.norm.bias")

    def tie(state: State) -> State:
        memory = torch.rand(100)
        return state | {first: memory[:64], second: memory[:64] if kind == "equal" else memory[36:]}

    path = official(tie)
    flow, stored = load_official(path), torch.load(path)
    names = name_map(flow, "attn_blocks")
    ours = flow.state_dict()
    assert torch.equal(ours[names[first]], stored[first])
    assert torch.equal(ours[names[second]], stored[second])
    flow.save_pretrained(tmp_path / "ours")
    assert_same(TARFlow.from_pretrained(tmp_path / "ours"), flow)
    ours[names[first]].zero_()
    assert torch.equal(ours[names[second]], stored[second])


def test_our_own_state_dict_is_no_official_file(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "model.pth")
    assert "opened with TARFlow.from_pretrained" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_conditioned": True}, "noise_conditioned=True .*ml-starflow .*False"),
        ({"context_blocks": 2}, "context_blocks=2 .*ml-starflow"),
        ({"channels": (64, 128, 128)}, "channels=.64, 128, 128. .*ml-starflow"),
        ({"num_classes": 5, "context_dim": 0, "context_tokens": 0}, "context_tokens=0 .*ml-starflow .*1"),
        ({"input_scale": 2.0}, "input_scale=2.0 .*ml-starflow"),
        ({"rotary_side": 0, "context_dim": 0, "context_tokens": 0}, "start_token=True .*ml-tarflow"),
    ],
)
def test_export_refuses_what_the_official_code_has_not(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_official(tiny(**arguments), tmp_path / "folder" / "model.pth")
    assert not (tmp_path / "folder").exists()
