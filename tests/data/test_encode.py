"""Codes of a data set: those of the VAE, for any order and number of processes; what would spoil them is refused."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from conftest import tiny_vae
from huggingface_hub import DatasetCard
from image_files import damage, write_classes, write_row_groups
from PIL import Image
from torch import Tensor

from itarflow.codec import CodecConfig, VaeCodec, load_vae, to_pixels, vae_identity
from itarflow.commands import encode_dataset
from itarflow.data import DataConfig, load_data
from itarflow.data.codes import read_card
from itarflow.data.prepare import encode
from itarflow.data.prepare.encode import Encoded, begin, encode_share, finish
from itarflow.data.prepare.encode_plan import EncodeConfig, plan_encoding
from itarflow.runtime.errors import DataError

SCRIPT = Path(__file__).parents[2] / "vae" / "encode_dataset.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of VAEs of random weights, with stride 2."""
    folder = tmp_path_factory.mktemp("vaes")
    for name, kind, channels in (
        ("kl", "AutoencoderKL", 3),
        ("tiny", "AutoencoderTiny", 3),
        ("grey", "AutoencoderTiny", 1),
        ("two", "AutoencoderTiny", 2),
    ):
        tiny_vae(kind, in_channels=channels, out_channels=channels).save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


def write_noise(folder: Path, classes: dict[str, int]) -> Path:
    """Images of noise, one sub-folder a class."""
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, size=(9, 10 + index, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of seven images in two classes."""
    return write_noise(tmp_path / "source", {"a": 4, "b": 3})


def settings(source: Path | str, out: Path, vae: Path, **options: Any) -> EncodeConfig:
    return EncodeConfig(source=str(source), out=out, vae=str(vae), **{"size": 8, "num_workers": 0} | options)


def run(source: Path | str, out: Path, vae: Path, *, processes: int = 1, **options: Any) -> Encoded:
    plan = plan_encoding(settings(source, out, vae, **options))
    begin(plan)
    for index in reversed(range(processes)):
        encode_share(plan, device="cpu", process_index=index, num_processes=processes, count=int)
    return finish(plan)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def pixels(source: Path | str, vae: Path, **options: Any) -> Tensor:
    """All images, cropped, in [-1, 1]."""
    sets = plan_encoding(settings(source, Path("nowhere"), vae, **options)).sets["train"]
    return to_pixels(torch.stack([sets[index].image for index in range(len(sets))]))


def stored(out: Path, column: str, shape: tuple[int, int, int]) -> Tensor:
    values = pq.read_table(sorted(out.glob("*.parquet")))[column].to_pylist()
    return torch.from_numpy(np.stack([np.frombuffer(value, "<f2").reshape(shape) for value in values])).float()


def close(found: Tensor, wanted: Tensor) -> bool:
    torch.testing.assert_close(found, wanted, rtol=2**-10, atol=2e-5)  # half of float16's last bit
    return True


# What is written


def test_both_orientations_with_their_variance(source: Path, tmp_path: Path, vaes: dict[str, Path]) -> None:
    done, out = run(source, tmp_path / "out", vaes["kl"]), tmp_path / "out"
    codec = VaeCodec(load_vae(CodecConfig(vae=str(vaes["kl"]))))
    images = pixels(source, vaes["kl"])
    for suffix, view in (("", images), ("_flipped", images.flip(-1))):
        posterior = codec.encode(view)
        assert posterior.log_variance is not None
        assert close(stored(out, "mean" + suffix, (4, 4, 4)), posterior.mean)
        assert close(stored(out, "log_variance" + suffix, (4, 4, 4)), posterior.log_variance)
    assert pq.read_schema(next(out.glob("*.parquet"))).names == [
        "mean", "log_variance", "mean_flipped", "log_variance_flipped", "label"
    ]  # fmt: skip
    assert (done.images, done.broken, done.shards) == ({"train": 7}, {"train": ()}, 1)
    assert done.num_bytes == done.shard_bytes == sum(map(len, content(out).values()))


def test_a_vae_without_variance_and_straight_images_alone(source: Path, tmp_path: Path, vaes: dict[str, Path]) -> None:
    out = tmp_path / "out"
    run(source, out, vaes["tiny"], flips=False, scaling_factor=2.0, shift_factor=-0.5)
    codec = VaeCodec(load_vae(CodecConfig(vae=str(vaes["tiny"]))))
    assert close(stored(out, "mean", (4, 4, 4)), (codec.encode(pixels(source, vaes["tiny"])).mean + 0.5) * 2)
    assert pq.read_schema(next(out.glob("*.parquet"))).names == ["mean", "label"]


def test_training_reads_it(source: Path, tmp_path: Path, vaes: dict[str, Path]) -> None:
    run(source, tmp_path / "out", vaes["kl"], shard_size=3)
    identity = vae_identity(load_vae(CodecConfig(vae=str(vaes["kl"]))))
    config = DataConfig(path=str(tmp_path / "out"), held_out_images=0)
    data = load_data(config, image_size=4, in_channels=4, vae=identity)
    assert data.class_names == ("a", "b")
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    views = torch.stack([data.train[index].image for index in range(7)])
    assert torch.equal(views[:, 1, 0].float(), stored(tmp_path / "out", "mean_flipped", (4, 4, 4)))


@pytest.mark.slow
def test_nobody_depends_on_the_number_of_processes(tmp_path: Path, vaes: dict[str, Path]) -> None:
    source = write_row_groups(tmp_path / "source" / "train.parquet", 80, 80).parent
    options: dict[str, Any] = {"shard_size": 25, "batch_size": 10}
    one = run(source, tmp_path / "one", vaes["grey"], **options)
    two = run(source, tmp_path / "two", vaes["grey"], processes=2, num_workers=1, **options)
    assert len(content(tmp_path / "one")) == 4
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert one == two


def test_statistics_of_the_channels(tmp_path: Path, vaes: dict[str, Path]) -> None:
    source = write_row_groups(tmp_path / "source" / "train.parquet", 250, 250).parent
    card = run(source, tmp_path / "out", vaes["grey"], shard_size=140).card
    means = stored(tmp_path / "out", "mean", (4, 4, 4)).double()
    np.testing.assert_allclose(card.code_mean, means.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(card.code_std, means.std((0, 2, 3), correction=0), rtol=1e-9)
    footers = [pq.read_metadata(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [footer.num_rows for footer in footers] == [140, 110]
    assert [footers[0].row_group(index).num_rows for index in range(2)] == [128, 12]


def test_half_precision_is_close(source: Path, tmp_path: Path, vaes: dict[str, Path]) -> None:
    for dtype in ("float32", "bf16"):
        run(source, tmp_path / dtype, vaes["kl"], dtype=dtype)
    full, half = (stored(tmp_path / dtype, "mean", (4, 4, 4)) for dtype in ("float32", "bf16"))
    assert 0 < (full - half).abs().max() < 0.05


# The card


def test_the_card_says_what_was_done(tmp_path: Path, vaes: dict[str, Path]) -> None:
    source, commit, out = tmp_path / "pictures", "0123456789" * 4, tmp_path / "out"
    for split, count in (("train", 3), ("test", 2)):
        write_noise(source / split, {"a": count, "b": 1})
    vae = shutil.copytree(vaes["kl"], tmp_path / "models--me--vae" / "snapshots" / commit)
    card = run(source, out, vae, split=("train", "test"), crop="adm", size=6).card
    assert card == read_card(out / "codes.json")
    assert (card.image_size, card.shape, card.crop, card.flips, card.variance) == (6, (4, 3, 3), "adm", True, True)
    assert (card.class_names, card.finished, card.revision) == (("a", "b"), True, commit)
    assert (card.identity.scaling_factor, card.identity.shift_factor) == (0.4, 0.1)
    manifest = json.loads((out / "codes.json").read_text())
    assert (manifest["images"], manifest["broken"]) == ({"train": 4, "test": 3}, {"train": 0, "test": 0})
    readme = DatasetCard.load(out / "README.md")
    files = [{"split": split, "path": f"{split}-*.parquet"} for split in ("train", "test")]
    assert readme.data.configs == [{"config_name": "default", "data_files": files}]
    assert "Codes of pictures" in readme.text
    assert str(tmp_path) not in readme.text
    (words,) = re.findall("itarflow train photos_latent.*", readme.text)
    assert words.endswith(
        f"--data.path PATH --data.split train --data.held-out-split test --codec.vae {commit} "
        "--model.image-size 3 --model.in-channels 4 --model.num-classes 2 --model.patch-size 1"
    )


def test_its_example_reads_a_row(
    source: Path, tmp_path: Path, vaes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "out", vaes["kl"], shard_size=4)
    (example,) = re.findall("```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(example, names)
    np.testing.assert_array_equal(names["code"], stored(Path(), "mean", (4, 4, 4))[0].numpy())


def test_datasets_reads_it_too(source: Path, tmp_path: Path, vaes: dict[str, Path]) -> None:
    run(source, tmp_path / "out", vaes["tiny"], shard_size=4)
    opened = datasets.load_dataset(str(tmp_path / "out"))
    binary = {name: datasets.Value("binary") for name in ("mean", "mean_flipped")}
    assert opened["train"].features == datasets.Features(binary | {"label": datasets.ClassLabel(names=["a", "b"])})
    assert len(opened["train"]) == 7


# Stopping and going on


def _stop_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> list[int]:
    """Ctrl-C in a batch; returns the sizes of those before it."""
    sizes: list[int] = []
    original = encode._codes

    def codes(codec: VaeCodec, images: Tensor, flips: bool) -> Tensor:
        if len(sizes) == batch:
            raise KeyboardInterrupt
        sizes.append(len(images))
        return original(codec, images, flips)

    monkeypatch.setattr(encode, "_codes", codes)
    return sizes


@pytest.mark.slow
def test_goes_on_where_it_was_stopped(
    source: Path, tmp_path: Path, vaes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"shard_size": 3, "batch_size": 2}
    damage(source / "a" / "1.png")
    whole, out = run(source, tmp_path / "whole", vaes["kl"], **options), tmp_path / "out"
    with monkeypatch.context() as patch:
        _stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, vaes["kl"], **options)
    assert [name[:22] for name in files(out)] == [".train-00000-of-00003.", "broken.json", "codes.json"]
    assert not read_card(out / "codes.json").finished
    with pytest.raises(DataError, match="not finished"):
        load_data(DataConfig(path=str(out)), image_size=4, in_channels=4, vae=whole.card.identity)

    (out / ".partial-of-a-killed-call").write_text("")
    with monkeypatch.context() as patch:
        sizes = _stop_at(patch, 9)
        assert run(source, out, vaes["kl"], **options) == whole
        assert sizes == [2, 1, 1]
        assert run(source, out, vaes["kl"], **options | {"batch_size": 3}) == whole
        assert sizes == [2, 1, 1]
    assert files(out) == files(tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_files_that_others_have_not_written_are_missed(source: Path, tmp_path: Path, vaes: dict[str, Path]) -> None:
    plan = plan_encoding(settings(source, tmp_path / "out", vaes["tiny"], shard_size=4))
    begin(plan)
    encode_share(plan, device="cpu", process_index=1, num_processes=2, count=int)
    with pytest.raises(DataError, match=r"1 files .*out, train-00000-of-00002.parquet"):
        finish(plan)


def test_a_machine_that_does_not_see_the_new_manifest_yet_encodes_its_share(
    source: Path, tmp_path: Path, vaes: dict[str, Path]
) -> None:
    plan = plan_encoding(settings(source, tmp_path / "out", vaes["tiny"], shard_size=4))
    begin(plan)
    (tmp_path / "out" / "codes.json").rename(tmp_path / "codes.json")
    encode_share(plan, device="cpu", process_index=1, num_processes=2, count=int)
    (tmp_path / "codes.json").rename(tmp_path / "out" / "codes.json")
    encode_share(plan, device="cpu", process_index=0, num_processes=2, count=int)
    assert finish(plan).shards == 2


def test_full_disk(source: Path, tmp_path: Path, vaes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", fail)
        with pytest.raises(OSError, match=r"out can't be written: .*No space left"):
            run(source, tmp_path / "out", vaes["tiny"])
    assert files(tmp_path / "out") == ["codes.json"]
    assert run(source, tmp_path / "out", vaes["tiny"]).images == {"train": 7}


def test_too_little_room(source: Path, tmp_path: Path, vaes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(7 * 512 - 1))
    with pytest.raises(OSError, match=r"7 images \(512 bytes an image\) need 3.5 KiB, but only 3.5 KiB are free in .*"
                                      r"make room, choose another folder, or leave .*--no-flips"):  # fmt: skip
        run(source, tmp_path / "out", vaes["kl"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(7 * 512))
    run(source, tmp_path / "out", vaes["kl"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0))
    assert run(source, tmp_path / "out", vaes["kl"]).images == {"train": 7}  # what is there needs nothing more


# Broken images


def test_codes_that_are_not_finite_are_broken_images(
    source: Path, tmp_path: Path, vaes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = encode._codes

    def codes(codec: VaeCodec, images: Tensor, flips: bool) -> Tensor:
        found = original(codec, images, flips).numpy()
        found[-1, -1, 0, 0, 0] = np.inf
        return torch.from_numpy(found)

    monkeypatch.setattr(encode, "_codes", codes)
    damage(source / "a" / "1.png")
    done = run(source, tmp_path / "out", vaes["tiny"], batch_size=4)
    first, second, third = done.broken["train"]
    assert first.startswith("a/1.png: ")
    assert second == "row 3: the VAE makes codes of it that are not finite in float16"
    assert third.startswith("row 6: ")
    assert json.loads((tmp_path / "out" / "broken.json").read_text()) == {"train": [first, second, third]}
    assert pq.read_table(next((tmp_path / "out").glob("*.parquet")))["label"].to_pylist() == [0, 0, 1, 1]
    assert np.isfinite(done.card.code_mean).all()


def test_too_many_broken_images(tmp_path: Path, vaes: dict[str, Path]) -> None:
    source = write_classes(tmp_path / "source", {"a": 3})
    damage(source / "a" / "000.png")
    with pytest.raises(DataError, match=r"1 images .*max_broken is 0"):
        run(source, tmp_path / "out", vaes["tiny"], shard_size=2, max_broken=0)
    with pytest.raises(DataError, match=r"none of the images in .*source"):  # too large for float16
        run(source, tmp_path / "other", vaes["tiny"], scaling_factor=1e9)


# Refusals


@pytest.mark.parametrize(
    ("vae", "options", "message"),
    [
        ("tiny", {"size": 0}, "size is 0; expected 1 or more"),
        ("tiny", {"size": 9}, "9 x 9 .*stride of 2"),
        ("tiny", {"batch_size": 0}, "batch_size is 0"),
        ("tiny", {"shard_size": 0}, "shard_size is 0"),
        ("tiny", {"num_workers": -1}, "num_workers is -1"),
        ("tiny", {"dtype": "int8"}, "dtype 'int8' .*float32, bf16, fp16"),
        ("tiny", {"crop": "round"}, "crop 'round' is unknown"),
        ("tiny", {"split": ("train[:10%]",)}, r"split 'train\[:10%\]'"),
        ("tiny", {"split": ("val",)}, "no split 'val'"),
        ("tiny", {"tiled": True}, "stride 2.* stride 8"),
        ("tiny", {"scaling_factor": 0.0}, "scaling_factor is 0.0"),
        ("two", {}, r"2 channels.* 1 \(grey\) or 3 \(RGB\)"),
    ],
)
def test_refused_before_anything_is_written(
    source: Path, tmp_path: Path, vaes: dict[str, Path], vae: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", vaes[vae], **options)
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_used_are_refused(source: Path, tmp_path: Path, vaes: dict[str, Path]) -> None:
    with pytest.raises(OSError, match=r"VAE '.*nowhere' "):
        run(source, tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(DataError, match="would be taken for a part of it"):
        run(source, source / "codes", vaes["tiny"])
    with pytest.raises(DataError, match="a folder with other things in it"):
        run("digits", source, vaes["grey"])
    assert files(source) == ["a", "b"]
    run(source, tmp_path / "out", vaes["tiny"])
    with pytest.raises(DataError, match="out holds codes already; expected images"):
        run(tmp_path / "out", tmp_path / "again", vaes["tiny"])


def test_a_folder_is_not_gone_on_with_otherwise(source: Path, tmp_path: Path, vaes: dict[str, Path]) -> None:
    out = tmp_path / "out"
    run(source, out, vaes["tiny"])
    for options, message in (
        ({"size": 6}, "size: 8 there, 6 now"),
        ({"flips": False}, "flips: True there, False now"),
        ({"dtype": "bf16"}, "dtype: float32 there, bf16 now"),
    ):
        with pytest.raises(DataError, match=f"other settings(.|\n)*{message}"):
            run(source, out, vaes["tiny"], **options)
    with pytest.raises(DataError, match="kind: AutoencoderTiny -> AutoencoderKL"):
        run(source, out, vaes["kl"])
    with pytest.raises(DataError, match=r"scaling_factor: 1.0 -> 2.0"):
        run(source, out, vaes["tiny"], scaling_factor=2.0)
    moved = shutil.copytree(vaes["tiny"], tmp_path / "the same elsewhere")
    run(source, out, moved, batch_size=1, max_broken=0, num_workers=1)


def test_only_the_name_of_a_local_source_is_stored(
    source: Path, tmp_path: Path, vaes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(source, out, vaes["tiny"])
    assert json.loads((out / "codes.json").read_text())["settings"]["source"] == "source"
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    monkeypatch.chdir(tmp_path)
    run("source", out, vaes["tiny"])  # the same folder
    with pytest.raises(DataError, match="source: source there, other now"):
        run(write_noise(tmp_path / "other", {"a": 4, "b": 3}), out, vaes["tiny"])


# The command


def test_command(source: Path, tmp_path: Path, vaes: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(source), str(tmp_path / "out"), "--vae", str(vaes["tiny"]), "--size", "8", "--num-workers", "0"]
    encode_dataset.main(args=[*words, "--no-flips"])
    told = capsys.readouterr().out
    assert "images/s" in told
    assert (
        f"--data.path {tmp_path / 'out'} --data.split train --codec.vae {vaes['tiny']} --model.image-size 4 "
        "--model.in-channels 4 --model.num-classes 2 --model.patch-size 1 --data.no-horizontal-flip"
    ) in told
    encode_dataset.main(args=[*words, "--no-flips"])
    assert "nothing was left to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        encode_dataset.main(args=words)
    assert "flips: False there, True now" in capsys.readouterr().err


def test_command_is_stopped(
    source: Path,
    tmp_path: Path,
    vaes: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(source), str(tmp_path / "out"), "--vae", str(vaes["tiny"]), "--size", "8", "--num-workers", "0"]
    _stop_at(monkeypatch, 0)
    with pytest.raises(SystemExit, match="130"):
        encode_dataset.main(args=words)
    assert "Stopped. The same command goes on with" in capsys.readouterr().err


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    told = capsys.readouterr().out
    assert "--vae stabilityai/sd-vae-ft-ema --size 256 --split train validation" in told
    assert "--no-flips" in told
