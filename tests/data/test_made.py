"""Prepared images and codes: what is not as their manifest says is refused, whether they are read or gone on with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import tiny_vae
from PIL import Image

from itarflow.codec import CodecConfig, VaeIdentity, load_vae, vae_identity
from itarflow.data import DataConfig, load_data
from itarflow.data.codes import check_card, find_card
from itarflow.data.load import ImageData
from itarflow.data.made import check_made
from itarflow.data.prepare.crop import PrepareConfig, prepare
from itarflow.data.prepare.encode import begin, encode_share, finish
from itarflow.data.prepare.encode_plan import EncodeConfig, plan_encoding
from itarflow.data.prepare.manifest import check_settings_there, check_source_there, stored_manifest
from itarflow.runtime.errors import DataError

MANIFESTS = {"prepared": "prepare.json", "codes": "codes.json"}
KINDS = pytest.mark.parametrize("kind", list(MANIFESTS))
FIRST, SECOND = "train-00000-of-00003.parquet", "train-00001-of-00003.parquet"


class Made:
    """A source, a VAE, and what is made of them, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "source"
        generator = np.random.default_rng(0)
        for name in "ab":
            (self.source / name).mkdir(parents=True)
            for index in range(5):
                pixels = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(self.source / name / f"{index}.png")
        tiny_vae("AutoencoderTiny", in_channels=3, out_channels=3).save_pretrained(folder / "vae")

    def make(self, kind: str, **options: Any) -> Path:
        """Make the set, or go on with it; three files, of 4, 4 and 2 images."""
        options = {"source": str(self.source), "out": self.folder / kind, "size": 8, "shard_size": 4} | options
        options |= {"num_workers": 0}
        if kind == "prepared":
            prepare(PrepareConfig(**options))
        else:
            plan = plan_encoding(EncodeConfig(vae=str(self.folder / "vae"), **options))
            begin(plan)
            encode_share(plan, device="cpu", count=int)
            finish(plan)
        return Path(options["out"])

    def open(self, path: Path | str, kind: str, **options: Any) -> ImageData:
        config = DataConfig(path=str(path), held_out_images=0, **options)
        if kind == "prepared":
            return load_data(config, image_size=8, in_channels=3)
        return load_data(config, image_size=4, in_channels=4, vae=self.identity)

    @property
    def identity(self) -> VaeIdentity:
        return vae_identity(load_vae(CodecConfig(vae=str(self.folder / "vae"))))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(tmp_path_factory.mktemp("made"))
    for kind in MANIFESTS:
        made.make(kind)
    return made


@pytest.fixture
def made(sound: Made, tmp_path: Path) -> Made:
    """Sound sets that a test may damage."""
    shutil.copytree(sound.folder, tmp_path / "made")
    copy = Made.__new__(Made)
    copy.folder, copy.source = tmp_path / "made", tmp_path / "made" / "source"
    return copy


def flip_a_bit(file: Path, place: float = 0.3) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


def change_manifest(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Reading


@KINDS
@pytest.mark.parametrize("streaming", [False, True])
def test_a_sound_set_is_read(made: Made, kind: str, streaming: bool) -> None:
    folder = made.folder / kind
    assert len(made.open(folder, kind, streaming=streaming).train) == 10
    assert len(made.open(folder / "*.parquet", kind, streaming=streaming).train) == 10
    assert len(made.open(folder / SECOND, kind, streaming=streaming).train) == 4


@KINDS
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
        (lambda folder: shutil.copy(folder / FIRST, folder / SECOND), SECOND),
        (lambda folder: shutil.copy(folder / FIRST, folder / "train-more.parquet"), "train-more.parquet does not bel"),
        (lambda folder: os.truncate(folder / FIRST, 100), f"{FIRST} has 100 bytes, expected "),
    ],
    ids=["missing", "doubled", "foreign", "cut"],
)
def test_files_that_the_manifest_does_not_have_are_refused(
    made: Made, kind: str, streaming: bool, damage: Callable[[Path], object], words: str
) -> None:
    damage(made.folder / kind)
    for path in (made.folder / kind, made.folder / kind / "train*.parquet"):
        with pytest.raises(DataError, match=f"not those of its {MANIFESTS[kind]}: {words}"):
            made.open(path, kind, streaming=streaming)


def test_a_copy_of_equal_size_is_told_by_its_rows(made: Made) -> None:
    folder = made.folder / "codes"
    content = (folder / FIRST).read_bytes()
    (folder / SECOND).write_bytes(content)
    manifest = json.loads((folder / "codes.json").read_text())
    manifest["files"][1]["num_bytes"] = len(content)
    (folder / "codes.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"{SECOND} holds rows 0 to 4 of train"):
        made.open(folder, "codes")


def test_an_unfinished_set_is_refused(made: Made) -> None:
    change_manifest(made.folder / "prepared" / "prepare.json", finished=False)
    card = json.loads((made.folder / "codes" / "codes.json").read_text())["card"]
    change_manifest(made.folder / "codes" / "codes.json", card=card | {"finished": False})
    for kind in MANIFESTS:
        with pytest.raises(DataError, match="not finished"):
            made.open(made.folder / kind, kind)


def test_bits_that_were_flipped_are_met_when_streamed(made: Made) -> None:
    flip_a_bit(made.folder / "codes" / FIRST)
    with pytest.raises(DataError, match=r"3 images could not be read"):
        made.open(made.folder / "codes", "codes", streaming=True, max_broken=2)


# Going on


@KINDS
@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_file_with_a_flipped_bit_is_refused(made: Made, kind: str, place: float) -> None:
    flip_a_bit(made.folder / kind / SECOND, place)
    with pytest.raises(DataError, match=f"{SECOND} is damaged"):
        made.make(kind)


@KINDS
def test_files_of_others_are_refused(made: Made, kind: str) -> None:
    folder, other = made.folder / kind, "codes" if kind == "prepared" else "prepared"
    for file in (folder / FIRST, made.folder / other / SECOND):
        shutil.copy(file, folder / SECOND)
        with pytest.raises(
            DataError, match=f"{SECOND} is damaged, or not of this command: it holds rows .* delete it"
        ):
            made.make(kind)


@KINDS
def test_hidden_files_are_looked_at_as_well(made: Made, kind: str, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    elsewhere = tmp_path / "elsewhere" / kind
    for size, out in ((8, tmp_path / kind), (6, elsewhere)):
        with pytest.MonkeyPatch.context() as patch:
            for module in ("crop", "encode"):
                patch.setattr(f"itarflow.data.prepare.{module}.count_images", stop)
            with pytest.raises(KeyboardInterrupt):
                made.make(kind, out=out, size=size)
    out = tmp_path / kind
    hidden = sorted(out.glob(".train-*"))
    assert len(hidden) == 3
    sha256 = {file: file.read_bytes() for file in hidden}

    flip_a_bit(hidden[1])
    with pytest.raises(DataError, match=r"train-00001-of-00003\..* damaged: the SHA-256 is another one"):
        made.make(kind, out=out)
    hidden[1].unlink()
    copy = out / hidden[0].name.replace("00000-of", "00001-of")  # with the SHA-256 of its bytes
    shutil.copy(hidden[0], copy)
    with pytest.raises(DataError, match="not of this command: it holds rows 0 to 4 of train, expected 4 to 8"):
        made.make(kind, out=out)
    copy.unlink()
    foreign = next(elsewhere.glob(".train-00001-*"))
    shutil.copy(foreign, out)
    with pytest.raises(DataError, match="of another source or made with other settings"):
        made.make(kind, out=out)
    (out / foreign.name).unlink()

    made.make(kind, out=out)  # the one that is missing is made again
    assert sorted(file.read_bytes() for file in out.glob("*.parquet")) == sorted(sha256.values())


@KINDS
def test_a_source_whose_pictures_were_replaced_is_refused(made: Made, kind: str) -> None:
    for file in made.source.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    with pytest.raises(DataError, match=r"the source has changed:\n  images: as many, but other ones now"):
        made.make(kind)


@KINDS
def test_what_a_killed_trial_has_left_is_removed(made: Made, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "new"
    (out / ".itarflow-abc").mkdir(parents=True)
    (out / ".itarflow-def").touch()
    (out / ".partial-of-a-killed-call").touch()
    made.make(kind, out=out)
    assert not [file.name for file in out.iterdir() if file.name.startswith(".")]


# What would make an empty set


def test_nothing_but_broken_images_is_refused(made: Made) -> None:
    for file in made.source.rglob("*.png"):
        file.write_bytes(b"x")
    for kind in MANIFESTS:
        with pytest.raises(DataError, match=r"none of the images in .*source, split train"):
            made.make(kind, out=made.folder / "new" / kind)
        manifest = made.folder / "new" / kind / MANIFESTS[kind]
        assert not json.loads(manifest.read_text())["finished"]


def test_codes_are_no_source(made: Made) -> None:
    for kind in MANIFESTS:
        with pytest.raises(DataError, match="codes holds codes already; expected images"):
            made.make(kind, source=str(made.folder / "codes"), out=made.folder / "new")
    assert not (made.folder / "new").exists()


def test_sizes_that_no_image_has_are_refused(made: Made) -> None:
    for kind in MANIFESTS:
        with pytest.raises(DataError, match="1000000000"):
            made.make(kind, size=10**9, out=made.folder / "new")
    assert not (made.folder / "new").exists()


@pytest.mark.parametrize("factor", [1e-30, 1e-5, 1e6])
def test_a_scaling_by_which_nothing_is_left_is_refused(made: Made, factor: float) -> None:
    with pytest.raises(DataError, match=r"root mean square of .* expected about 1"):
        made.make("codes", out=made.folder / "new", scaling_factor=factor)
    assert not list((made.folder / "new").glob(".*train*"))


@pytest.mark.parametrize("name", ["x\ny.png", "\x1b]0;a title\x07.png"])
def test_names_of_broken_files_are_told_on_one_line(made: Made, name: str) -> None:
    (made.source / "a" / name).write_bytes(b"x")
    made.make("prepared", out=made.folder / "new")
    (report,) = json.loads((made.folder / "new" / "broken.json").read_text())["train"]
    assert report.startswith(f"a/{name.encode('unicode_escape').decode()}: ")
    assert report.isprintable()


# What is no made set


@pytest.mark.parametrize("name", list(MANIFESTS.values()))
def test_what_is_no_file_is_not_taken_for_a_set_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text('{"finished": false, "card": {}}')
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / name).write_text("{")
    assert len(load_data(DataConfig(path="digits", held_out_images=0), image_size=8, in_channels=1).train) == 1797
    for path in ("digits", "mnist", "owner/name"):
        check_made(path)
    for path in (".", "*.parquet", "gone.parquet", name, "./digits"):
        with pytest.raises(DataError):
            check_made(path)


@KINDS
def test_a_pipe_among_the_files_is_not_waited_for(made: Made, kind: str) -> None:
    file, manifest = made.folder / kind / FIRST, made.folder / kind / MANIFESTS[kind]
    stored = json.loads(manifest.read_text())["files"]
    change_manifest(manifest, files=[one | {"num_bytes": 0} if one["name"] == FIRST else one for one in stored])
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="is damaged"):
        check_made(str(file.parent))
    with pytest.raises(DataError, match="is damaged"):
        made.make(kind)


# Manifests of before


@KINDS
def test_a_set_of_before_is_not_gone_on_with_but_trains(made: Made, kind: str) -> None:
    manifest = made.folder / kind / MANIFESTS[kind]
    values = json.loads(manifest.read_text())
    for new in ("source", "files"):
        del values[new]
    manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"made by an earlier version.*train on it as it is.*another folder"):
        made.make(kind)
    assert len(made.open(manifest.parent, kind).train) == 10


# Manifests of strangers

ODD: list[Any] = [None, True, -1, 0, 1.5, 1e308, float("nan"), float("inf"), 10**30, "", "x", "../../etc", [], {}]
ODD += [[1, "a"], {"a": 1}]


def _mutated(value: Any) -> Iterator[Any]:
    """The value with each of its parts exchanged for odd ones, one at a time, or left out."""
    yield from ODD
    if isinstance(value, dict | list):
        for key in list(value if isinstance(value, dict) else range(min(len(value), 2))):
            for odd in _mutated(value[key]):
                changed = value.copy()
                changed[key] = odd
                yield changed
            less = value.copy()
            del less[key]
            yield less


@KINDS
def test_no_manifest_whatsoever_is_a_traceback(made: Made, kind: str) -> None:
    file = made.folder / kind / MANIFESTS[kind]
    sound = json.loads(file.read_text())
    source = sound["settings"]
    config = {"source": str(made.source), "out": made.folder / kind, "size": 8, "shard_size": 4}
    identity = made.identity
    refused = read = 0
    wanted = None
    for text in [json.dumps(value) for value in (sound, *_mutated(sound))] + ["[" * 200_000, "{", "\xff", ""]:
        file.write_text(text, encoding="latin-1")
        try:
            check_made(str(file.parent))
            card = find_card(str(file.parent))
            if card is not None:
                check_card(card, "codes", identity, (4, 4, 4), flips=True, crop="center")
            stored = stored_manifest(PrepareConfig(**config), file.name)
            assert stored is not None
            wanted = wanted or stored
            check_settings_there(file.parent, stored, source)
            check_source_there(file.parent, stored, wanted)
            read += 1
        except DataError:
            refused += 1
    assert refused > 500
    assert 0 < read < refused / 2
