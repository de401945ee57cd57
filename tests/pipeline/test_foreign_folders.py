"""Pipelines that anybody may have made: what is not as it should be is refused by name, and nothing else happens.

Links are not followed, no code is run, nothing is built without end, and damaged weights are not taken for whole ones.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_vae
from diffusers import AutoencoderTiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from itarflow import DenoiseScheduler, ITARFlowPipeline, TARFlow
from itarflow.commands.info import Info
from itarflow.denoisers import load_denoiser
from itarflow.inverse.solvers import Jacobi
from itarflow.pipeline.folder import foreign_entries
from itarflow.pipeline.plan import InversePlan
from itarflow.runtime.pipeline_index import CHECKSUMS

MakeFlow = Callable[..., TARFlow]
WEIGHTS = "flow/diffusion_pytorch_model.safetensors"
PLAN = InversePlan(solvers=(Jacobi(window=2), Jacobi(window=1)), num_tokens=(4, 4), device="cpu", batch_size=4)
FILES = ("model_index.json", "flow/config.json", "scheduler/scheduler_config.json", "vae/config.json")


def make_pipe(flow: TARFlow, **changes: Any) -> ITARFlowPipeline:
    arguments: dict[str, Any] = {
        "guidance": {"weight": 1.0, "rule": "scale", "blocks": [0], "temperature": 1.0},
        "class_names": ["a", "b", "c"] if flow.config.num_classes else None,
        "training": {"name": "t", "data": "x/y", "metrics": {"nll": 1.0}, "recipe": {"data": {"path": "x"}}},
        "plans": [PLAN.to_json()],
        "evaluations": {"raw": "FID 3"},
    }
    return ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.05), **arguments | changes)


@pytest.fixture
def folder(make_flow: MakeFlow, tmp_path: Path) -> Path:
    """A pipeline of pixels."""
    make_pipe(make_flow(in_channels=3, noise_range=(0.02, 0.6))).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def latent(make_flow: MakeFlow, tmp_path: Path) -> Path:
    """A pipeline with a VAE."""
    make_pipe(make_flow(in_channels=4), vae=tiny_vae()).save_pretrained(tmp_path / "latent")
    return tmp_path / "latent"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forget_checksums(folder: Path) -> None:
    """As of a folder that an earlier version wrote."""
    index = json.loads((folder / "model_index.json").read_text())
    del index[CHECKSUMS]
    (folder / "model_index.json").write_text(json.dumps(index))


# -- every field of every file ----------------------------------------------------------------------------------

deep: Any = 1
for _ in range(400):
    deep = [deep]
ABSURD = [None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, 10**6, "", "../x", [], [1, "a"], {}, deep]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of a JSON value are, the whole included."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inside:
        yield from paths(entry, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return value


@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
@settings(max_examples=40, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_an_absurd_value_is_read_or_refused_by_name(latent: Path, file: str, data: st.DataObject):
    whole = (latent / file).read_text()
    path = data.draw(st.sampled_from(list(paths(json.loads(whole)))))
    value = data.draw(st.sampled_from(ABSURD))
    (latent / file).write_text(json.dumps(changed(json.loads(whole), path, value)))
    outside = {path: path.stat().st_mtime_ns for path in latent.parent.rglob("*")}
    refusal = ""
    try:
        Info(checkpoint=str(latent)).run()
        str(ITARFlowPipeline.from_pretrained(latent).model_card())
    except (OSError, ValueError) as error:
        refusal = str(error)
    now = {path: path.stat().st_mtime_ns for path in latent.parent.rglob("*")}
    (latent / file).write_text(whole)
    assert Path(file).name in refusal or not refusal
    assert now == outside


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "\x00", '{"a": ' * 5000], ids=lambda text: repr(text[:3]))
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_no_json_is_refused_by_name(latent, file, text):
    (latent / file).write_text(text)
    with pytest.raises(OSError, match=Path(file).name):
        ITARFlowPipeline.from_pretrained(latent)


@pytest.mark.parametrize("file", FILES)
def test_a_pipe_is_not_waited_for(latent, file):
    (latent / file).unlink()
    os.mkfifo(latent / file)
    with pytest.raises(OSError, match=Path(file).name):
        ITARFlowPipeline.from_pretrained(latent)


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": [1_000_000]}, {"num_layers": [1] * 100_000}, {"shared_layers": 10**30}, {"num_layers": [5000, 1]}],
    ids=lambda changes: str(changes)[:30],
)
def test_layers_that_the_weights_do_not_have_are_not_built(folder, changes):
    edit(folder / "flow" / "config.json", **changes)
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"config\.json"):
        ITARFlowPipeline.from_pretrained(folder)
    assert time.monotonic() - begun < 5


# -- classes and code -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("flow", ["os", "system"]),
        ("flow", ["evil", "TARFlow"]),
        ("flow", ["diffusers", "UNet2DModel"]),
        ("flow", "TARFlowX"),
        ("scheduler", ["subprocess", "Popen"]),
        ("scheduler", ["diffusers", "DDIMScheduler"]),
        ("vae", ["evil", "AutoencoderKL"]),
        ("vae", ["diffusers", "AutoencoderKLWan"]),
        ("vae", "AutoencoderKL"),
        ("_class_name", "DDPMPipeline"),
        ("_class_name", ["evil", "ITARFlowPipeline"]),
    ],
    ids=str,
)
def test_a_class_of_somebody_else_is_refused_and_its_module_not_imported(folder, part, named, monkeypatch):
    (folder / "evil.py").write_text("raise AssertionError('code of a checkpoint was run')\n")
    (folder / "flow" / "evil.py").write_text("raise AssertionError('code of a checkpoint was run')\n")
    monkeypatch.syspath_prepend(folder)
    edit(folder / "model_index.json", **{part: named})
    with pytest.raises(OSError, match=rf"model_index\.json names .* as {part}; expected"):
        ITARFlowPipeline.from_pretrained(folder)
    if part == "flow":
        with pytest.raises(OSError, match=r"model_index\.json names"):
            load_denoiser(str(folder))


@pytest.mark.parametrize(
    "named", [["modeling_flow", "TARFlow"], ["itarflow.flow", "TARFlow"], ["itarflow", "TARFlow"]]
)
def test_our_own_classes_are_known_under_each_name_they_have_had(folder, named):
    edit(folder / "model_index.json", flow=named)
    assert isinstance(ITARFlowPipeline.from_pretrained(folder).flow, TARFlow)


def test_pickles_are_not_read_on_demand_either(folder):
    for load in (ITARFlowPipeline.from_pretrained, TARFlow.from_pretrained):
        with pytest.raises(ValueError, match="use_safetensors=False would read a pickle"):
            load(folder, use_safetensors=False)


def test_an_option_that_is_not_known_is_not_ignored(folder):
    with pytest.raises(ValueError, match="custom_pipeline is no option of ITARFlowPipeline"):
        ITARFlowPipeline.from_pretrained(folder, custom_pipeline="someone/pipeline")


def test_names_of_anybody_do_not_reach_the_terminal(make_flow, tmp_path, capsys):
    evil = "\x1b]0;pwned\x07\x1b[2J"
    training = {"name": evil, "data": evil, "metrics": {evil: 1.0}, "recipe": {"data": {evil: [evil]}}}
    pipe = make_pipe(
        make_flow(), class_names=[evil, "b", "c"], training=training, evaluations={evil: evil}, plans=None
    )
    pipe.save_pretrained(tmp_path)
    Info(checkpoint=str(tmp_path)).run()
    assert "\x1b]" not in capsys.readouterr().out
    assert "\x1b" not in (tmp_path / "README.md").read_text()


# -- weights ----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-401] ^= 0x40
    (folder / WEIGHTS).write_bytes(content)
    for load in (ITARFlowPipeline.from_pretrained, lambda folder: load_denoiser(str(folder))):
        with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors .*SHA-256"):
            load(folder)


def test_swapped_tensors_are_noticed(folder):
    weights = weights_of(folder)
    first, second = (f"blocks.{block}.transformer.layers.0.mlp_norm.weight" for block in (0, 1))
    weights[first], weights[second] = weights[second].clone() + 1, weights[first].clone()
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(OSError, match="SHA-256"):
        ITARFlowPipeline.from_pretrained(folder)


def test_weights_of_a_vae_have_a_checksum_too(latent):
    file = latent / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-41] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"vae/diffusion_pytorch_model\.safetensors .*SHA-256"):
        ITARFlowPipeline.from_pretrained(latent)


def as_integers(weights: dict[str, torch.Tensor]) -> None:
    weights |= {name: tensor.to(torch.int8) for name, tensor in weights.items()}


def test_the_vae_of_a_denoiser_is_the_one_that_its_index_tells_of(latent):
    assert load_denoiser(str(latent), vae=tiny_vae())
    file = latent / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, file)
    with pytest.raises(OSError, match=r"vae/diffusion_pytorch_model\.safetensors .*SHA-256"):
        load_denoiser(str(latent), vae=tiny_vae())


def test_an_unknown_option_is_refused_beside_one_that_does_not_matter(folder):
    ITARFlowPipeline.from_pretrained(folder, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="nonsense is no option"):
        ITARFlowPipeline.from_pretrained(folder, low_cpu_mem_usage=True, nonsense=1)


def test_as_many_classes_as_a_flow_may_have_can_be_stored(make_flow, tmp_path):
    make_pipe(make_flow(num_classes=2**20), class_names=None).save_pretrained(tmp_path)
    assert ITARFlowPipeline.from_pretrained(tmp_path).flow.config.num_classes == 2**20
    with pytest.raises(ValueError, match=r"num_classes is 1048577; expected .* to 1,048,576"):
        make_flow(num_classes=2**20 + 1)


def with_nan(weights: dict[str, torch.Tensor]) -> None:
    next(iter(weights.values())).view(-1)[0] = float("nan")


def with_infinity(weights: dict[str, torch.Tensor]) -> None:
    list(weights.values())[-1].view(-1)[-1] = float("-inf")


def lacking_one(weights: dict[str, torch.Tensor]) -> None:
    weights.popitem()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (as_integers, r"as I8; expected weights of one of F32"),
        (with_nan, "NaN or infinite values in "),
        (with_infinity, "NaN or infinite values in "),
        (lacking_one, "1 tensors are missing"),
    ],
)
def test_weights_that_are_none_are_refused_without_checksums_too(folder, damage, words):
    weights = weights_of(folder)
    damage(weights)
    save_file(weights, folder / WEIGHTS)
    forget_checksums(folder)
    with pytest.raises(OSError, match=words):
        ITARFlowPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=words):
        TARFlow.from_pretrained(folder / "flow")


def test_a_tensor_that_is_there_twice_is_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = content[8 : 8 + length].rstrip()
    name, entry = next((n, e) for n, e in json.loads(head).items() if n != "__metadata__")
    head = head[:-1] + f', "{name}": {json.dumps(entry)}}}'.encode()
    (folder / WEIGHTS).write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])
    forget_checksums(folder)
    with pytest.raises(OSError, match="a name is there twice"):
        ITARFlowPipeline.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, -100])
def test_a_file_that_is_cut_off_is_refused(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    forget_checksums(folder)
    with pytest.raises(OSError, match="truncated or damaged"):
        ITARFlowPipeline.from_pretrained(folder)


def test_half_precision_weights_are_weights(folder):
    save_file({name: tensor.half() for name, tensor in weights_of(folder).items()}, folder / WEIGHTS)
    forget_checksums(folder)
    assert ITARFlowPipeline.from_pretrained(folder).flow.dtype == torch.float32


def test_an_index_of_shards_names_no_file_elsewhere(folder, tmp_path):
    (folder / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../../elsewhere.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(OSError, match="expected safetensors files beside it"):
        ITARFlowPipeline.from_pretrained(folder)


# -- writing ----------------------------------------------------------------------------------------------------


def note(folder: Path, what: str = "raw") -> bool:
    pipe = ITARFlowPipeline.from_pretrained(folder)
    return pipe.record(folder, "evaluations", lambda known: {**(known or {}), what: "FID 4"})


@pytest.mark.parametrize("name", ["README.md", "model_index.json", ".partial-model_index.json", ".partial-README.md"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_note_does_not_go_through_a_link(folder, tmp_path, name, exists):
    victim, place = tmp_path / "victim.txt", folder / name
    if exists:
        victim.write_text(place.read_text() if place.exists() else "mine")
    place.unlink(missing_ok=True)
    place.symlink_to(victim)
    before = victim.read_text() if exists else None
    if name == "model_index.json" and not exists:
        with pytest.raises(OSError, match=r"model_index\.json is missing"):
            note(folder)
    else:
        note(folder)
    assert (victim.read_text() if victim.exists() else None) == before


def test_a_lock_does_not_go_through_a_link(folder, tmp_path):
    (tmp_path / "victim").write_text("mine")
    (folder / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.lock"):
        note(folder)
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_note_in_the_cache_of_the_hub_leaves_the_blobs_alone(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        place = snapshot / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        place.symlink_to(blobs / str(number))
    before = {path: path.read_bytes() for path in blobs.iterdir()}
    assert note(snapshot)
    assert before == {path: path.read_bytes() for path in blobs.iterdir()}
    assert ITARFlowPipeline.from_pretrained(snapshot).config.evaluations == {"raw": "FID 4"}


def test_saving_replaces_links_to_files_and_refuses_those_to_folders(folder, tmp_path, make_flow):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / "README.md").unlink()
    for name in ("model_index.json", "pipeline.py", WEIGHTS, "flow/config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(victim)
    pipe = make_pipe(make_flow(in_channels=3))
    pipe.save_pretrained(folder)
    assert victim.read_text() == "mine"
    ITARFlowPipeline.from_pretrained(folder)
    shutil.move(folder / "flow", tmp_path / "flow")
    (folder / "flow").symlink_to(tmp_path / "flow")
    with pytest.raises(OSError, match="is a link to another folder"):
        pipe.save_pretrained(folder)


def test_a_card_that_a_killed_call_left_behind_is_brought_up_to_date(folder, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ITARFlowPipeline, "_write_card", killed)
        with pytest.raises(KeyboardInterrupt):
            note(folder, "first")
    assert "| first |" not in (folder / "README.md").read_text()
    assert note(folder, "second")
    card = (folder / "README.md").read_text()
    assert "| first | 4 |" in card
    assert "| second | 4 |" in card


def note_in_turn(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    for number in range(3):
        note(folder, f"{name} {number}")


def test_notes_at_the_same_time_are_all_kept(folder):
    both = [multiprocessing.get_context("fork").Process(target=note_in_turn, args=(folder, name)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    wanted = {"raw", *(f"{name} {number}" for name in "ab" for number in range(3))}
    assert set(ITARFlowPipeline.from_pretrained(folder).config.evaluations) == wanted
    card = (folder / "README.md").read_text()
    assert all(f"| {what} | " in card for what in wanted)
    assert not (folder / ".lock").exists()


# -- saving over an older pipeline ------------------------------------------------------------------------------


def test_weights_in_one_file_take_the_place_of_shards(make_flow, tmp_path):
    make_pipe(make_flow(fresh=True)).save_pretrained(tmp_path, max_shard_size="5KB")
    new = make_flow()
    make_pipe(new).save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "flow").glob("*.safetensors*")] == [Path(WEIGHTS).name]
    for name, tensor in ITARFlowPipeline.from_pretrained(tmp_path).flow.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name])
    make_pipe(new).save_pretrained(tmp_path, max_shard_size="5KB")
    assert not (tmp_path / WEIGHTS).exists()
    ITARFlowPipeline.from_pretrained(tmp_path)


def test_a_pipeline_of_pixels_takes_the_place_of_one_with_a_vae(latent, make_flow):
    make_pipe(make_flow()).save_pretrained(latent)
    assert not (latent / "vae").exists()
    assert ITARFlowPipeline.from_pretrained(latent).vae is None


def test_a_vae_that_the_index_does_not_name_is_not_loaded(latent):
    edit(latent / "model_index.json", vae=[None, None])
    assert ITARFlowPipeline.from_pretrained(latent).vae is None


def test_a_card_of_somebody_stays(folder, make_flow):
    (folder / "README.md").write_text("# Mine\n")
    make_pipe(make_flow()).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_variants_lie_side_by_side(latent):
    whole = ITARFlowPipeline.from_pretrained(latent)
    half = ITARFlowPipeline.from_pretrained(latent, torch_dtype=torch.float16)
    half.save_pretrained(latent, variant="fp16")
    loaded = ITARFlowPipeline.from_pretrained(latent, variant="fp16", torch_dtype=torch.float16)
    assert (loaded.flow.dtype, loaded.vae.dtype) == (torch.float16, torch.float16)
    plain = ITARFlowPipeline.from_pretrained(latent)
    assert torch.equal(plain.flow.prior_variance, whole.flow.prior_variance)
    assert len(json.loads((latent / "model_index.json").read_text())[CHECKSUMS]) == 4


def test_a_variant_that_is_missing_is_called_so(latent):
    with pytest.raises(OSError, match=r"no weights of the variant 'fp16'; it holds the plain one") as refusal:
        ITARFlowPipeline.from_pretrained(latent, variant="fp16")
    assert "download" not in str(refusal.value)


# -- what belongs in a folder -----------------------------------------------------------------------------------


def test_nothing_of_a_pipeline_is_foreign(latent, make_flow, tmp_path):
    assert foreign_entries(latent) == []
    make_pipe(make_flow()).save_pretrained(tmp_path / "shards", max_shard_size="5KB", variant="fp16")
    assert foreign_entries(tmp_path / "shards") == []


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "flow/notes.txt",
        "scheduler/x/y.txt",
        "vae/notes.txt",
        "flow/model.safetensors",
        "more/a",
        "README.md",
    ],
)
def test_files_of_the_user_are_foreign_at_any_depth(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    assert foreign_entries(folder)


def test_tiny_autoencoders_are_vaes(make_flow, tmp_path):
    sizes: dict[str, Any] = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **sizes)
    make_pipe(make_flow(in_channels=4), vae=vae).save_pretrained(tmp_path)
    assert isinstance(ITARFlowPipeline.from_pretrained(tmp_path).vae, AutoencoderTiny)
