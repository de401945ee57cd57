"""A decoder learns to decode noisy codes; its encoder does not change; a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file

from itarflow.codec import CodecConfig, VaeCodec, load_vae, vae_identity
from itarflow.commands import finetune_decoder
from itarflow.data import DataConfig, load_data
from itarflow.data.load import ImageData
from itarflow.runtime.errors import TrainingError
from itarflow.runtime.signals import Interrupted
from itarflow.training.decoder import config as decoder
from itarflow.training.decoder import finetune
from itarflow.training.decoder.config import DecoderConfig, Draws, TuneConfig, augmented, draw, held_out_psnr
from itarflow.training.decoder.finetune import fine_tune
from itarflow.training.decoder.losses import LossConfig, PatchCritic

SCRIPT = Path(__file__).parents[2] / "vae" / "finetune_decoder.py"


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny autoencoders of grey images: stride 2, four channels, random weights."""
    folder = tmp_path_factory.mktemp("vaes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grey = {"in_channels": 1, "out_channels": 1}
        tiny = AutoencoderTiny(
            **grey, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        )  # fmt: skip
        kl = AutoencoderKL(
            **grey, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        )  # fmt: skip
    for name, vae in {"tiny": tiny, "kl": kl}.items():
        vae.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("tiny", "kl")}


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same digits again and again."""
    monkeypatch.setattr(finetune, "load_data", _data)


@functools.cache
def _data(config: DataConfig, *, image_size: int, in_channels: int) -> ImageData:
    return load_data(config, image_size=image_size, in_channels=in_channels).decoded()


def settings(vae: str, **changes: Any) -> DecoderConfig:
    """Digits and a short training; `changes` are fields of the settings or of their section train."""
    train = TuneConfig(steps=6, batch_size=16, learning_rate=1e-2, warmup_steps=2, ema_decay=0.9, log_every=1)
    known = {field.name for field in dataclasses.fields(TuneConfig)}
    train = dataclasses.replace(train, **{name: value for name, value in changes.items() if name in known})
    others = {name: value for name, value in changes.items() if name not in known}
    data = DataConfig(path="digits", in_memory=True, horizontal_flip=False, held_out_images=30)
    defaults: dict[str, Any] = {"size": 8, "t_max": 0.3, "data": data, "train": train, "comparison_images": 3}
    return DecoderConfig(vae=vae, **defaults | others)


def logged(out: Path, key: str) -> list[Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_the_decoder_learns_and_the_encoder_does_not(vaes: dict[str, str], kind: str, tmp_path: Path) -> None:
    crop_size = {"tiny": 6, "kl": None}[kind]
    config = settings(vaes[kind], steps=40, evaluate_every=20, noise_levels=(0.0, 0.3), crop_size=crop_size)
    tuned = fine_tune(config, tmp_path)
    losses = logged(tmp_path, "loss")
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert tuned.after["0.3"] > tuned.before["0.3"] + 2
    figures = json.loads((tmp_path / "psnr.json").read_text())
    assert (figures["before"], figures["after"]) == (tuned.before, tuned.after)
    assert [round(psnr["0.3"], 6) for psnr in (logged(tmp_path, "psnr")[0], logged(tmp_path, "psnr")[-1])] == [
        round(tuned.before["0.3"], 6),
        round(tuned.after["0.3"], 6),
    ]
    assert len(logged(tmp_path, "psnr")) == 3  # at steps 0, 20 and 40

    plain, made = load_vae(CodecConfig(vae=vaes[kind])), load_vae(CodecConfig(vae=str(tmp_path / "vae")))
    assert vae_identity(made) == vae_identity(plain)
    old, new = (json.loads((Path(folder) / "config.json").read_text()) for folder in (vaes[kind], tmp_path / "vae"))
    assert "_name_or_path" not in new  # nobody's folders go out with it
    assert (
        new.items()
        >= {key: value for key, value in old.items() if key != "block_out_channels" or kind[-1] == "L"}.items()
    )
    loaded = (AutoencoderTiny if kind == "tiny" else AutoencoderKL).from_pretrained(tmp_path / "vae")
    assert {
        name.split(".")[0] for name, value in loaded.state_dict().items() if not value.equal(plain.state_dict()[name])
    } == ({"decoder"} if kind == "tiny" else {"decoder", "post_quant_conv"})

    data = _data(config.data, image_size=8, in_channels=1)
    again, _ = held_out_psnr(config, VaeCodec(made), data.held_out, Accelerator(cpu=True))
    assert again == pytest.approx(tuned.after, abs=1e-4)  # the averaged weights are those that were measured
    picture = Image.open(tmp_path / "comparison.png")
    assert picture.width == 5 * 98 - 2
    corners = [picture.getpixel((48, picture.height - 98 * row + 6)) for row in (1, 2, 3)]
    assert corners == [int(data.held_out[index].image[0, 0, 4]) for index in (20, 10, 0)]


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    vaes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        vaes["kl"], steps=4, t_min=0.1, accumulation=2, gradient_checkpointing=True,
        loss=LossConfig(adversarial=0.1, adversarial_start=1),
    )  # fmt: skip
    monkeypatch.setattr(finetune, "PatchCritic", functools.partial(PatchCritic, width=8))
    whole = fine_tune(config, tmp_path / "whole")

    def draw_and_stop(config: DecoderConfig, shape: Any, step: int, device: Any) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(config, shape, step, device)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "draw", draw_and_stop)
        with pytest.raises(Interrupted, match="Stopped at step 2") as stop:
            fine_tune(config, tmp_path / "cut")
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert weights(tmp_path / "cut").keys() == weights(tmp_path / "whole").keys()  # a VAE is there already
    resumed = fine_tune(config, tmp_path / "cut", start="resume")
    for key in ("loss", "critic", "adversarial", "grad_norm", "learning_rate", "psnr"):
        assert logged(tmp_path / "cut", key) == logged(tmp_path / "whole", key)
    assert len(logged(tmp_path / "cut", "critic")) == 3
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    expected = weights(tmp_path / "whole")
    assert all(value.equal(expected[name]) for name, value in weights(tmp_path / "cut").items())


def test_a_vae_whose_export_was_killed_is_made_up_though_nothing_is_left_to_train(
    vaes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(vaes["tiny"], steps=3, save_every=1)
    fine_tune(config, tmp_path / "whole")
    export = finetune._Tuning.export

    def killed(self: Any) -> None:
        if self.state.step == 3:
            raise RuntimeError("killed")
        export(self)

    with monkeypatch.context() as patch:
        patch.setattr(finetune._Tuning, "export", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fine_tune(config, tmp_path / "cut")
    assert fine_tune(config, tmp_path / "cut", start="resume").steps == 3
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(value.equal(expected[name]) for name, value in found.items())
    assert logged(tmp_path / "cut", "psnr") == logged(tmp_path / "whole", "psnr")


@pytest.mark.slow
def test_a_critic_may_join_in_the_middle(vaes: dict[str, str], tmp_path: Path) -> None:
    config = settings(vaes["tiny"], steps=2)
    fine_tune(config, tmp_path, max_steps=1)
    critical = dataclasses.replace(config, loss=LossConfig(adversarial=0.1))
    assert fine_tune(critical, tmp_path, start="resume", allow_changes=True).steps == 2
    assert len(logged(tmp_path, "critic")) == 1


def test_a_step_s_noise_is_of_seed_and_step_alone(vaes: dict[str, str]) -> None:
    cpu, shape = torch.device("cpu"), (4, 4, 4)
    config = settings(vaes["tiny"], batch_size=256, t_min=0.1, t_max=0.5, crop_size=4)
    first, again, next_ = (draw(config, shape, step, cpu) for step in (3, 3, 4))
    assert all(one.equal(other) for one, other in zip(first, again, strict=True))
    assert not first.noise.equal(next_.noise)
    assert not first.noise.equal(first.posterior)
    assert 0.1 <= float(first.noise_level.min()) < 0.12 < 0.48 < float(first.noise_level.max()) <= 0.5
    assert set(first.corner.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert not first.flip.any()
    single = draw(settings(vaes["tiny"], t_max=0.5), shape, 0, cpu)
    assert single.noise_level.tolist() == [0.5] * 16
    assert not single.corner.any()


def test_images_are_mirrored_and_cropped_where_the_draws_say() -> None:
    images = torch.arange(2 * 64.0).reshape(2, 1, 8, 8)
    corner = torch.tensor([[0, 3], [4, 0]])
    draws = Draws(*(torch.empty(2),) * 3, flip=torch.tensor([False, True]), corner=corner)
    first, second = augmented(images, draws, 4)
    assert first.equal(images[0, :, 0:4, 3:7])
    assert second.equal(images[1].flip(2)[:, 4:8, 0:4])


def test_measured_images_have_noise_of_the_levels_they_are_listed_under(vaes: dict[str, str]) -> None:
    class Passing(VaeCodec):
        """Shows the codes instead of decoding them."""

        def decode(self, codes: torch.Tensor) -> torch.Tensor:
            return codes

    config = settings(vaes["kl"], noise_levels=(0.0, 0.5, 1.0))
    codec = Passing(load_vae(config.codec))
    clean, half, full = decoder.decoded_at_all_levels(config, codec, torch.zeros(64, 1, 8, 8), 0)
    torch.testing.assert_close(full - clean, 2 * (half - clean))
    assert float((full - clean).std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t_max": 0.0}, "t_max is 0.0"),
        ({"t_min": 0.4}, "t_min is 0.4.* t_max, 0.3"),
        ({"noise_levels": ()}, "noise_levels is"),
        ({"crop_size": 9}, "crop_size is 9.*1 to 8"),
        ({"size": 9}, "9 x 9 .*stride of 2"),
        ({"crop_size": 5}, "5 x 5 .*stride of 2"),
        ({"accumulation": 3}, "1 processes .*train.accumulation 3"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0"),
        ({"out": "/proc/out"}, r"can't be written.*another folder by OUT"),
        ({"vae": "no/such/vae"}, "'no/such/vae' can't be loaded"),
        ({"data": DataConfig(path="digits", held_out_images=0)}, "held_out_images is 0"),
        ({"data": DataConfig(path="/nowhere")}, "/nowhere"),
    ],
)
def test_what_can_not_work_is_refused_and_leaves_nothing(
    vaes: dict[str, str], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    out = Path(changes.get("out", tmp_path / "out"))
    changes = {name: value for name, value in changes.items() if name != "out"}
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        fine_tune(settings(**{"vae": vaes["tiny"]} | changes), out)
    assert not out.exists()


def test_steps_without_a_finite_gradient_change_nothing_and_end_it(
    vaes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms: Callable[..., dict[str, torch.Tensor]] = finetune.reconstruction_terms
    infinite = {name: float("inf") for name in ("l1", "l2")}
    monkeypatch.setattr(
        finetune, "reconstruction_terms",
        lambda *args: {name: term * infinite[name] for name, term in terms(*args).items()},
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"2 steps in a row.* step 2"):
        fine_tune(settings(vaes["tiny"], max_bad_steps=2), tmp_path)
    plain = load_file(Path(vaes["tiny"]) / "diffusion_pytorch_model.safetensors")
    assert all(value.equal(plain[name]) for name, value in weights(tmp_path).items())


@pytest.mark.slow
def test_the_command_begins_goes_on_begins_anew_and_overwrites_nothing(
    vaes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["digits", str(out), "--vae", vaes["tiny"], "--size", "8", "--t-max", "0.3", "--train.steps", "2",
             "--data.num-workers", "0", "--data.held-out-images", "20"]  # fmt: skip
    finetune_decoder.main(args=[*words, "--max-steps", "1"])
    printed = capsys.readouterr().out
    assert "1 step of 2 (--resume goes on)" in printed
    assert "noise of the codes" in printed
    for more, message in (
        ([], "already holds a run (step 1)"),
        (["--resume", "--t-max", "0.4"], "t_max: 0.3 -> 0.4"),
        (["--resume", "--restart"], "exclude each other"),
        (["--t-min", "0.5"], "t_min is 0.5"),
    ):
        with pytest.raises(SystemExit) as stop:
            finetune_decoder.main(args=[*words, *more])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
    finetune_decoder.main(args=[*words, "--restart", "--train.accumulation", "2", "--max-steps", "1"])
    assert logged(out, "step") == logged(tmp_path / "out.1", "step") == [0, 1]
    ours, theirs = weights(out), weights(tmp_path / "out.1")
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in ours.items())


def test_the_images_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune_decoder.main(args=["a", "out", "--vae", "v", "--size", "8", "--t-max", "0.3", "--data.path", "b"])
    assert "--data.path" in capsys.readouterr().err


def test_the_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = " ".join(capsys.readouterr().out.split())
    assert all(words in printed for words in ("accelerate launch vae/finetune_decoder.py", "DATA", "OUT", "--t-min"))
    assert "--data.split" in printed
    assert "--data.path" not in printed  # it is the first word


def test_steps_may_use_tf32_and_tuned_convolutions_and_evaluations_are_float32(
    vaes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[tuple[str, str, bool]] = set()

    def noting(function: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            found.add((function.__name__, torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark))
            return function(*args, **options)

        return noted

    for name in ("reconstruction_terms", "held_out_psnr", "decoded_examples"):
        monkeypatch.setattr(finetune, name, noting(getattr(finetune, name)))
    fine_tune(settings(vaes["tiny"], steps=1), tmp_path)
    assert found == {
        ("reconstruction_terms", "high", True),
        ("held_out_psnr", "highest", True),
        ("decoded_examples", "highest", True),
    }
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.benchmark
