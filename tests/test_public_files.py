"""`itarflow convert`: presets of the public files, STARFlow's files, and what the card says of their licence."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import tiny_vae
from huggingface_hub import ModelCard
from PIL import Image
from torch.distributed.checkpoint import save as save_shards

from itarflow import Guidance, ITARFlowPipeline
from itarflow.convert import PUBLIC_FILES, load_official, name_map
from itarflow.convert.public_files import Preset
from itarflow.flow import TARFlow
from itarflow.pipeline import storage
from itarflow.runtime.torch_file import shards_advice

GOLDEN = Path(__file__).parent / "golden"
SENTENCE = (
    "Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model License "
    "Agreement."
)
SIZES = {
    "afhq256": (825, 463_481_856),
    "gsj_afhq256": (825, 463_481_856),
    "gsj_imagenet64_uncond": (817, 460_142_784),
    "gsj_imagenet64": (825, 817_636_096),
    "gsj_imagenet128": (825, 823_927_552),
    "starflow_3b": (455, 3_858_281_544),
}
"""Tensors and parameters, as the official code counts them."""


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The presets, made for tiny files: "afhq256" for tarflow_cond, "starflow_3b" for starflow_labels."""
    tiny = {
        "afhq256": {"image_size": 8, "num_classes": 6},
        "gsj_afhq256": {"image_size": 8, "num_classes": 6},
        "starflow_3b": {"image_size": 6, "context_tokens": 1},
    }
    names = tuple("abcdef")
    changed = {
        name: replace(PUBLIC_FILES[name], architecture=architecture, vae=None, text_encoder=None,
                      class_names=None if name == "starflow_3b" else names)
        for name, architecture in tiny.items()
    }  # fmt: skip
    monkeypatch.setattr("itarflow.commands.convert.PUBLIC_FILES", changed)
    monkeypatch.setattr("itarflow.convert.public_files.PUBLIC_FILES", changed)
    return changed


def card(folder: str = "ours") -> ModelCard:
    return ModelCard.load(Path(folder) / "README.md")


# The table


def test_every_name_has_a_file():
    assert set(get_args(Preset)) == set(PUBLIC_FILES) == set(SIZES)


@pytest.mark.parametrize("name", PUBLIC_FILES)
def test_a_preset_is_a_model_of_the_published_size(name):
    public, starflow = PUBLIC_FILES[name], name == "starflow_3b"
    more = {"noise_conditioned": False, "rotary_side": 32} if starflow else {}
    with torch.device("meta"):
        flow = TARFlow(**public.architecture, **more)
    buffers = 2 if starflow else 0  # feat_rope; and a mask a block
    tensors = len(name_map(flow, "attn_blocks")) + len(flow.blocks) + buffers
    assert (tensors, sum(parameter.numel() for parameter in flow.parameters())) == SIZES[name]
    public.check(name, flow)
    assert public.guidance.weight > 0
    assert public.class_names is None or len(public.class_names) == flow.config.num_classes


def test_the_step_of_denoising_is_the_owners():
    """x0 = x + 1.4 sigma^2 score, from the level that the pipeline denoises at."""
    public = PUBLIC_FILES["gsj_afhq256"]
    assert public.t_max**2 == pytest.approx(1.4 * 0.07**2)
    assert PUBLIC_FILES["starflow_3b"].t_max == 0.3


def test_each_published_fid_is_told_of_its_own_file():
    fids = {name: public.fid for name, public in PUBLIC_FILES.items() if public.fid is not None}
    assert fids == {
        "gsj_afhq256": 13.60, "gsj_imagenet64_uncond": 14.67, "gsj_imagenet64": 4.42, "gsj_imagenet128": 5.06,
    }  # fmt: skip


# Conversion by a preset


def test_a_preset_gives_the_sampling_of_its_owners(run, presets):
    run("convert", GOLDEN / "tarflow_cond" / "weights.pth", "ours", "--preset", "gsj_afhq256")
    pipe = ITARFlowPipeline.from_pretrained("ours")
    assert pipe.default_guidance == Guidance(weight=3.4, rule="log_scale", schedule="linear")
    assert (pipe.scheduler.config.t_max, pipe.scheduler.config.num_denoise_steps) == (presets["gsj_afhq256"].t_max, 1)
    assert pipe.class_names == list("abcdef")
    run("sample", "ours", "--class-labels", "b", "--output", "images")
    assert [Image.open(path).size for path in Path("images").iterdir()] == [(8, 8)]


@pytest.mark.parametrize(("name", "levels"), [("afhq256", (0.07, 0.07)), ("gsj_afhq256", None)])
@pytest.mark.usefixtures("presets")
def test_the_level_of_training_is_recorded_unless_the_step_is_another(run, name, levels):
    run("convert", GOLDEN / "tarflow_cond" / "weights.pth", "ours", "--preset", name)
    found = ITARFlowPipeline.from_pretrained("ours").flow.config.noise_range
    assert found == levels or tuple(found) == levels


def test_options_go_before_a_preset(run, presets):
    words = ("--preset", "gsj_afhq256", "--guidance-weight", 0.5, "--t-max", 0.2)
    run("convert", GOLDEN / "tarflow_cond" / "weights.pth", "ours", *words)
    pipe = ITARFlowPipeline.from_pretrained("ours")
    assert pipe.default_guidance == Guidance(weight=0.5, rule="log_scale", schedule="linear")
    assert pipe.scheduler.config.t_max == 0.2


def test_a_preset_of_another_file_is_refused_with_both_values(refused):
    message = refused("convert", GOLDEN / "tarflow_cond" / "weights.pth", "ours", "--preset", "afhq256")
    assert "the file has image_size 8, but the preset afhq256 is for afhq_model_8_768_8_8_0.07.pth" in message
    assert "which has 256" in message
    assert not Path("ours").exists()


def test_a_preset_of_another_family_is_refused(refused):
    message = refused("convert", GOLDEN / "tarflow_cond" / "weights.pth", "ours", "--preset", "starflow_3b")
    assert "the preset starflow_3b is for starflow_3B_t2i_256x256.pth" in message
    for name in ("starflow_text", "starflow_labels"):
        message = refused("convert", GOLDEN / name / "weights.pth", "ours", "--preset", "starflow_3b")
        assert "the file has image_size 6, but the preset starflow_3b is for starflow_3B_t2i_256x256.pth" in message
        assert "Choose the file's own preset, or leave --preset out" in message


@pytest.mark.usefixtures("presets")
def test_a_file_that_looks_public_is_told_of_its_presets(run):
    words = ("--t-max", 0.1)
    told = run("convert", GOLDEN / "tarflow_cond" / "weights.pth", "ours", *words)
    assert "--preset afhq256 or gsj_afhq256" in told
    assert "--preset" not in run("convert", GOLDEN / "tarflow_uncond" / "weights.pth", "others", *words)


def test_presets_are_listed_in_order(run, capsys):
    with pytest.raises(SystemExit):
        run("convert", "some.pth", "ours", "--preset", "x")
    said = "".join(capsys.readouterr())
    places = [said.index(f"'{name}'") for name in [*get_args(Preset), "None"]]
    assert places == sorted(places)


# STARFlow without a preset


def test_a_starflow_becomes_a_pipeline_and_goes_back(run):
    source = GOLDEN / "starflow_labels" / "weights.pth"
    told = run("convert", source, "ours")
    assert "t_max is not in the file; 0.3 is assumed" in told
    assert "It has no VAE" in told
    assert "text encoder" not in told
    pipe = ITARFlowPipeline.from_pretrained("ours")
    assert pipe.default_guidance == Guidance(weight=0, rule="gaussian", schedule="constant", blocks=1)
    assert pipe.scheduler.config.num_denoise_steps == 1
    run("convert", "ours", "back.pth", "--to-official")
    before, after = torch.load(source), torch.load("back.pth")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_starflow_without_a_vae_is_sampled_by_one_that_is_named(run, refused, tmp_path):
    run("convert", GOLDEN / "starflow_labels" / "weights.pth", "ours")
    words = ("sample", "ours", "--class-labels", 1, 2)
    assert "this checkpoint has no VAE: give --decoder, or convert it again with --vae" in refused(*words)
    tiny_vae(latent_channels=3).save_pretrained(tmp_path / "other")
    message = refused(*words, "--decoder", tmp_path / "other")
    assert "codes have shape (4, 6, 6); this VAE expects (3, H, W). Name that of its training." in message
    tiny_vae().save_pretrained(tmp_path / "vae")
    run(*words, "--decoder", tmp_path / "vae", "--output", "out")
    pipe = ITARFlowPipeline.from_pretrained("ours", vae=tiny_vae())
    expected = pipe(class_labels=[1, 2], generator=torch.Generator().manual_seed(0)).images
    for file, image in zip(sorted(Path("out").iterdir()), expected, strict=True):
        assert Image.open(file).tobytes() == image.tobytes()


def test_the_example_on_a_card_runs_without_a_vae(run):
    run("convert", GOLDEN / "starflow_labels" / "weights.pth", "ours")
    code = str(card()).split("```python\n")[1].split("```")[0].replace("path/to/this/folder", "ours")
    assert "It holds no VAE" in str(card())
    named: dict[str, Any] = {}
    exec(code, named)
    assert named["codes"].shape == (4, 6, 6)
    run("convert", GOLDEN / "starflow_text" / "weights.pth", "text")
    assert "It holds no text encoder" in str(card("text"))


def test_a_folder_with_a_file_is_told_of_it(refused):
    message = refused("convert", GOLDEN / "starflow_labels", "ours")
    assert "Name a file in it: weights.pth, case.safetensors." in message


def test_settings_of_ml_starflow_are_options(run):
    words = ("--in-channels", 3, "--soft-clip", 0, "--softplus", False, "--seq-order", "R2L", "--image-size", 4, 8)
    assert "It has no text encoder" in run("convert", GOLDEN / "starflow_patch2" / "weights.pth", "ours", *words)
    config = ITARFlowPipeline.from_pretrained("ours").flow.config
    assert (config.soft_clip, config.softplus_scale, config.first_block_reversed) == (0, False, False)
    assert tuple(config.image_size) == (4, 8)


def test_a_file_without_buffers_is_told_its_text_tokens(run, refused, tmp_path):
    state = torch.load(GOLDEN / "starflow_text" / "weights.pth")
    state = {name: tensor for name, tensor in state.items() if "attn_mask" not in name and "feat_rope" not in name}
    torch.save(state, tmp_path / "bare.pth")
    assert "--context-tokens" in refused("convert", tmp_path / "bare.pth", "ours")
    run("convert", tmp_path / "bare.pth", "ours", "--context-tokens", 5)
    assert ITARFlowPipeline.from_pretrained("ours").flow.config.context_tokens == 5


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("tarflow_cond", ("--soft-clip", 7), "soft_clip is 7.0, but .*TARFlow or iTARFlow, .*--soft-clip"),
        ("itarflow_cond", ("--seq-order", "R2L"), "seq_order is 'R2L', but .*TARFlow or iTARFlow"),
        ("starflow_labels", ("--input-scale", 2), "input_scale is 2.0, but .*is a STARFlow, .*--input-scale"),
    ],
)
def test_options_of_the_other_family_are_refused(refused, name, words, message):
    assert re.search(message, " ".join(refused("convert", GOLDEN / name / "weights.pth", "ours", *words).split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--t-max", 0), "t_max is 0"),
        (("--t-max", "nan"), "t_max is nan"),
        (("--t-min", -1), "t_min is -1"),
        (("--guidance-weight", "nan"), "weight is nan"),
        (("--num-denoise-steps", 0), "num_denoise_steps is 0"),
        (("--input-scale", 0), "input_scale is 0"),
        (("--soft-clip", -1), "soft_clip is -1"),
    ],
)
def test_numbers_are_refused_before_the_file_is_read(refused, monkeypatch, words, message):
    monkeypatch.setattr("itarflow.commands.convert.load_official", lambda *args, **_: pytest.fail("it was read"))
    assert message in refused("convert", GOLDEN / "tarflow_cond" / "weights.pth", "ours", *words)


def test_bfloat16_stays_bfloat16_in_the_folder(run, tmp_path):
    state = torch.load(GOLDEN / "starflow_labels" / "weights.pth")
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "half.pth")
    run("convert", tmp_path / "half.pth", "ours")
    run("convert", "ours", "back.pth", "--to-official")
    back = torch.load("back.pth")
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in state.items())
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert "stored as bfloat16" in str(card())


def test_a_folder_of_shards_is_explained(refused):
    Path("run.pth").mkdir()
    Path("run.pth/__0_0.distcp").touch()
    message = refused("convert", "run.pth", "ours")
    assert """dcp_to_torch_save as save; save(sys.argv[1], sys.argv[1] + ".pth")' run.pth""" in message


@pytest.mark.parametrize("name", ["run.pth", "it's", "$(touch pwned)", 'a "b" c', "`touch pwned`;touch pwned"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_command_for_shards_makes_one_file_whatever_the_folder_is_called(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_shards({"weight": torch.arange(3.0)}, checkpoint_id=name, no_dist=True)
    command = shards_advice(Path(name)).split("Make it by: ")[1]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert torch.load(f"{name}.pth")["weight"].tolist() == [0, 1, 2]
    assert {entry.name for entry in tmp_path.iterdir()} == {name, f"{name}.pth"}


# The licence


def test_the_card_of_apples_research_weights_says_what_their_licence_asks_for(run, presets):
    run("convert", GOLDEN / "starflow_labels" / "weights.pth", "ours", "--preset", "starflow_3b")
    text = str(card())
    assert SENTENCE in text
    assert "LICENSE_MODEL" in text
    assert "Tensors were renamed" in text
    assert presets["starflow_3b"].source in text
    assert "converted by `itarflow`" in text
    assert card().data.license == "apple-amlr"


def test_the_licence_survives_saving_and_sharing(run, presets, monkeypatch, tmp_path):
    run("convert", GOLDEN / "starflow_labels" / "weights.pth", "ours", "--preset", "starflow_3b")
    pipe = ITARFlowPipeline.from_pretrained("ours")
    pipe.save_pretrained("again")
    assert SENTENCE in str(card("again"))

    shared = tmp_path / "shared.md"

    def upload(folder: Path, repo_id: str, before: Any, **options: Any) -> str:
        before(repo_id)
        shared.write_text((folder / "README.md").read_text())
        return "address"

    monkeypatch.setattr(storage, "upload", upload)
    pipe.push_to_hub("me/starflow")
    assert SENTENCE in shared.read_text()
    assert ModelCard.load(shared).data.license == "apple-amlr"
    with pytest.raises(ValueError, match=r"license is 'mit', but .* from some under apple-amlr"):
        pipe.push_to_hub("me/starflow", license="mit")


def test_other_licences_are_told_but_not_kept(run, presets):
    run("convert", GOLDEN / "tarflow_cond" / "weights.pth", "ours", "--preset", "gsj_afhq256")
    pipe = ITARFlowPipeline.from_pretrained("ours")
    assert card().data.license == "apache-2.0"
    assert "B. Liu and Z. Qin" in str(card())
    assert pipe.model_card(license="cc-by-4.0").data.license == "cc-by-4.0"
    run("convert", GOLDEN / "tarflow_cond" / "weights.pth", "apple", "--preset", "afhq256")
    assert card("apple").data.license is None
    assert "Apple names no licence for these weights" in str(card("apple"))


def test_a_flow_trained_here_has_no_such_section(save):
    text = (save() / "README.md").read_text()
    assert "License of the weights" not in text
    assert "trained with `itarflow`" in text


def test_an_index_of_others_can_not_break_the_card(save):
    folder = save(training={"name": "x", "license": {"notice": "a\n# b", "name": 3, "kept": "yes"}, "converted": [1]})
    assert "\n# b" not in (folder / "README.md").read_text()


def test_prompts_of_a_converted_starflow(run, tmp_path):
    pytest.importorskip("transformers")
    from tiny_text import save_text_encoder

    flow = load_official(GOLDEN / "starflow_text" / "weights.pth")
    save_text_encoder(tmp_path / "t5", width=flow.config.context_dim)
    told = run("convert", GOLDEN / "starflow_text" / "weights.pth", "ours", "--text-encoder", tmp_path / "t5")
    assert "It has no text encoder" not in told
    pipe = ITARFlowPipeline.from_pretrained("ours")
    images = pipe(prompt="a red corgi", guidance_weight=2.0, output_type="codes").images
    assert images.shape == (1, 4, 6, 6)


def test_a_text_encoder_of_another_width_is_refused(refused, tmp_path):
    pytest.importorskip("transformers")
    from tiny_text import WIDTH, save_text_encoder

    save_text_encoder(tmp_path / "t5")
    next((tmp_path / "t5").glob("*.safetensors")).unlink()  # its config.json tells enough
    words = ("--text-encoder", tmp_path / "t5")
    message = refused("convert", GOLDEN / "starflow_text" / "weights.pth", "ours", *words)
    assert f"gives vectors of {WIDTH}, but the flow takes vectors of 24" in message
    assert not Path("ours").exists()


def test_what_an_official_file_has_no_place_for_is_refused(refused):
    message = refused("convert", "runs/starflow", "back.pth", "--to-official", "--t-max", 0.3)
    assert "--t-max was given with --to-official" in message
