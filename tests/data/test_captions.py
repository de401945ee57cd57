"""Captions beside images and codes: encoded once, read with each image, and refused where they are not as expected."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from conftest import tiny_vae
from PIL import Image
from tiny_text import TOKENS, WIDTH, save_text_encoder
from torch import Tensor

from itarflow.codec import CodecConfig, load_vae, vae_identity
from itarflow.commands import encode_dataset
from itarflow.commands.cli import main
from itarflow.data import DataConfig, load_data
from itarflow.data.context import ContextDecoder, check_encoder, find_context, to_bytes
from itarflow.data.load import ImageData
from itarflow.data.loader import batches, in_order
from itarflow.data.parquet import open_parquet
from itarflow.data.prepare.crop import PrepareConfig, prepare
from itarflow.data.prepare.encode import Encoded, begin, encode_share, finish
from itarflow.data.prepare.encode_plan import EncodeConfig, plan_encoding
from itarflow.runtime.errors import DataError
from itarflow.text_encoder import TextEncoder

pytest.importorskip("transformers")
SHAPE = (TOKENS, WIDTH)
TEXTS = ["a cat", "a dog on the beach", "a cat", "the red corgi", "a dog on the beach", "a small picture", "a cat"]
KINDS = pytest.mark.parametrize("kind", ["prepared", "codes"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a VAE and of text encoders."""
    folder = tmp_path_factory.mktemp("models")
    tiny_vae("AutoencoderTiny", in_channels=3, out_channels=3).save_pretrained(folder / "vae")
    save_text_encoder(folder / "t5")
    save_text_encoder(folder / "other", seed=1)
    save_text_encoder(folder / "wide", width=12)
    return folder


def write_images(folder: Path, texts: Sequence[Any] | None, classes: Sequence[str] = ("cat", "dog")) -> Path:
    """Images of noise in class folders, and what metadata.jsonl says of them, in this order."""
    generator = np.random.default_rng(0)
    lines = []
    for index in range(len(texts or TEXTS)):
        name = f"{classes[index % len(classes)]}/{index}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / name)
        lines.append({"file_name": name} | ({"text": texts[index]} if texts else {}))
    if texts:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_images(tmp_path / "source", TEXTS)


def make(kind: str, source: Path, out: Path, models: Path, *, processes: int = 1, **options: Any) -> Path:
    options = {"captions": "text", "text_encoder": str(models / "t5"), "context_tokens": TOKENS} | options
    options = {"source": str(source), "out": out, "size": 8, "num_workers": 0} | options
    if kind == "prepared":
        prepare(PrepareConfig(**options))
    else:
        encode(models, processes=processes, **options)
    return out


def encode(models: Path, *, processes: int = 1, **options: Any) -> Encoded:
    plan = plan_encoding(EncodeConfig(vae=str(models / "vae"), **options))
    begin(plan)
    for index in reversed(range(processes)):
        encode_share(plan, device="cpu", process_index=index, num_processes=processes, count=int)
    return finish(plan)


def read(kind: str, path: Path, models: Path, *, context: tuple[int, int] | None = SHAPE, **options: Any) -> ImageData:
    config = DataConfig(path=str(path), **{"held_out_images": 0} | options)
    if kind == "prepared":
        return load_data(config, image_size=8, in_channels=3, context=context)
    identity = vae_identity(load_vae(CodecConfig(vae=str(models / "vae"))))
    return load_data(config, image_size=4, in_channels=4, vae=identity, context=context)


def vectors(models: Path, texts: Sequence[str], tokens: int = TOKENS) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = TextEncoder.from_pretrained(str(models / "t5"), max_tokens=tokens)
        return encoder.encode(texts).to(torch.bfloat16)


def near(found: Tensor | None, wanted: Tensor) -> bool:
    """Up to the last bit of bfloat16: batches of other lengths round differently."""
    assert found is not None
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-5)
    return True


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# What is written and read


@KINDS
@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"in_memory": True}])
def test_captions_are_read_with_their_images(
    kind: str, options: dict[str, Any], source: Path, tmp_path: Path, models: Path
) -> None:
    data = read(kind, make(kind, source, tmp_path / "out", models, shard_size=3), models, **options)
    data = data.decoded() if options.get("in_memory") else data
    wanted = vectors(models, TEXTS)
    assert len(data.train) == 7
    for index in range(7):
        assert near(data.train[index].context, wanted[index])
    for workers in (0, 2):
        found = list(in_order(data.train, 3, workers))
        assert near(torch.cat([batch.context for batch in found if batch.context is not None]), wanted)
        assert all(torch.equal(batch.images[0], data.train[3 * number].image) for number, batch in enumerate(found))
    assert near(data.null_context, vectors(models, [""])[0])
    assert data.identity.left_out == ()
    (shuffled,) = batches(data.train, [[5, 0, 3]])
    assert near(shuffled.context, wanted[[5, 0, 3]])


@KINDS
def test_rows_have_the_text_and_the_vectors_of_its_tokens(
    kind: str, source: Path, tmp_path: Path, models: Path
) -> None:
    out = make(kind, source, tmp_path / "out", models)
    rows = pq.read_table(next(out.glob("*.parquet"))).to_pylist()
    assert [row["caption"] for row in rows] == TEXTS
    lengths = [len(text.split()) + 1 for text in TEXTS]  # words, and the end of the text
    assert [len(row["context"]) for row in rows] == [2 * length * WIDTH for length in lengths]
    card = find_context(str(out))
    assert card is not None
    assert (card.captions, card.shape, card.encoder.name, card.cut) == ("text", SHAPE, "t5", 0)
    assert {file.stat().st_mode for file in out.iterdir()} == {(out / "null_context.safetensors").stat().st_mode}
    assert str(tmp_path) not in (out / ("prepare.json" if kind == "prepared" else "codes.json")).read_text()


@KINDS
def test_a_template_makes_captions_of_classes(kind: str, tmp_path: Path, models: Path) -> None:
    source = write_images(tmp_path / "source", None)
    out = make(kind, source, tmp_path / "out", models, captions="a photo of a {}")
    data = read(kind, out, models)
    assert near(data.train[0].context, vectors(models, ["a photo of a cat"])[0])
    assert near(data.train[6].context, vectors(models, ["a photo of a dog"])[0])
    assert (out / "README.md").exists() is (kind == "codes")
    if kind == "codes":
        told = (out / "README.md").read_text()
        assert f"--model.context-tokens {TOKENS} --model.context-dim {WIDTH}" in told
        for words in ("`a photo of a {}`", "text-to-image", "null_context.safetensors", "recipes/starflow_text.py"):
            assert words in told


@KINDS
def test_without_captions_nothing_changes(kind: str, source: Path, tmp_path: Path, models: Path) -> None:
    """A set with captions holds the very images of one without, and these are read without them where none ask."""
    with_captions = make(kind, source, tmp_path / "with", models)
    without = make(kind, source, tmp_path / "without", models, captions=None)
    columns = pq.read_schema(next(without.glob("*.parquet"))).names
    assert not {"caption", "context"} & {*columns}
    assert not (without / "null_context.safetensors").exists()
    tables = [pq.read_table(next(folder.glob("*.parquet"))).select(columns) for folder in (with_captions, without)]
    assert tables[0].equals(tables[1])
    for folder in (with_captions, without):
        data = read(kind, folder, models, context=None)
        assert data.null_context is None
        assert data.train[0].context is None
        assert next(in_order(data.train, 3)).context is None


def test_each_distinct_caption_of_a_file_is_encoded_once(
    source: Path, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plain = list[str](), TextEncoder.encode

    def counted(self: TextEncoder, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        asked.extend(prompts)
        return plain(self, prompts, batch_size)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    make("prepared", source, tmp_path / "out", models, shard_size=4)
    assert sorted(asked) == sorted(["", *dict.fromkeys(TEXTS[:4]), *dict.fromkeys(TEXTS[4:])])


def test_equal_captions_of_a_row_group_take_room_once(tmp_path: Path, models: Path) -> None:
    source = write_images(tmp_path / "source", ["a photo of a dog"] * 60)
    out = make("codes", source, tmp_path / "out", models, flips=False)
    column = pq.read_metadata(next(out.glob("*.parquet"))).row_group(0).column(2)
    assert column.path_in_schema == "context"
    assert column.total_compressed_size < 5 * 2 * 6 * WIDTH
    rows = open_parquet([str(next(out.glob("*.parquet")))]).select_columns(["context"])
    assert rows[59]["context"]["bytes"] == rows[0]["context"]["bytes"]
    (group,) = rows._groups.values()  # as it is in memory
    assert isinstance(group, pa.Table)
    assert group.nbytes < 60 * 2 * 6 * WIDTH / 4


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_empty_caption_is_of_the_precision_of_the_others(dtype: str, tmp_path: Path, models: Path) -> None:
    source = write_images(tmp_path / "source", ["", "a dog"])
    data = read("codes", make("codes", source, tmp_path / "out", models, dtype=dtype, empty_captions=True), models)
    context = data.train[0].context
    assert context is not None
    assert data.null_context is not None
    assert torch.equal(context, data.null_context)


def test_half_precision_is_close(source: Path, tmp_path: Path, models: Path) -> None:
    full, half = (
        read("codes", make("codes", source, tmp_path / dtype, models, dtype=dtype), models)
        for dtype in ("float32", "bf16")
    )
    for index in range(7):
        one, other = full.train[index].context, half.train[index].context
        assert one is not None
        assert other is not None
        error = (one.float() - other.float()).norm() / one.float().norm()
        assert 0 < error < 0.1


@KINDS
def test_a_broken_image_moves_no_caption(kind: str, source: Path, tmp_path: Path, models: Path) -> None:
    (source / "cat" / "2.png").write_bytes(b"x")
    data = read(kind, make(kind, source, tmp_path / "out", models), models)
    wanted = vectors(models, [*TEXTS[:2], *TEXTS[3:]])
    assert all(near(data.train[index].context, wanted[index]) for index in range(6))


@KINDS
def test_a_broken_image_is_none_of_those_whose_caption_is_cut(
    kind: str, source: Path, tmp_path: Path, models: Path
) -> None:
    def cut(out: str) -> int:
        card = find_context(str(make(kind, source, tmp_path / out, models, context_tokens=2)))
        assert card is not None
        return card.cut

    whole = cut("whole")
    assert len(TEXTS[2].split()) + 1 > 2
    (source / "cat" / "2.png").write_bytes(b"x")
    assert cut("out") == whole - 1


def test_nobody_depends_on_the_number_of_processes(source: Path, tmp_path: Path, models: Path) -> None:
    one = make("codes", source, tmp_path / "one", models, shard_size=2)
    two = make("codes", source, tmp_path / "two", models, shard_size=2, processes=2)
    assert content(one) == content(two)


def test_prepared_captions_are_encoded(source: Path, tmp_path: Path, models: Path) -> None:
    prepared = make("prepared", source, tmp_path / "prepared", models)
    codes = make("codes", prepared, tmp_path / "codes", models, captions="caption")
    kept = [pq.read_table(next(out.glob("*.parquet"))).select(["caption", "context"]) for out in (prepared, codes)]
    assert kept[0].equals(kept[1])


# Going on


@KINDS
def test_an_interrupted_command_goes_on(
    kind: str, source: Path, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = content(make(kind, source, tmp_path / "whole", models, shard_size=3))
    plain, calls = TextEncoder.encode, 0

    def stopped(self: TextEncoder, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return plain(self, prompts, batch_size)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(kind, source, tmp_path / "out", models, shard_size=3)
    assert list((tmp_path / "out").glob(".train-*.parquet"))
    assert content(make(kind, source, tmp_path / "out", models, shard_size=3)) == wanted
    moved = shutil.copytree(models / "t5", tmp_path / "the same elsewhere")
    make(kind, source, tmp_path / "out", models, shard_size=3, text_encoder=str(moved))


@KINDS
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"captions": "a {}"}, r"captions: text there, a \{\} now"),
        ({"captions": None}, "captions: text there, None now"),
        ({"context_tokens": 5}, "context_tokens: 6 there, 5 now"),
        ({"text_encoder": "other"}, "another text encoder:\n  encoder: "),
        ({"text_encoder": "wide"}, "dim: 8 -> 12"),
    ],
)
def test_other_captions_are_not_gone_on_with(
    kind: str, options: dict[str, Any], words: str, source: Path, tmp_path: Path, models: Path
) -> None:
    make(kind, source, tmp_path / "out", models)
    if "text_encoder" in options:
        options = {"text_encoder": str(models / options["text_encoder"])}
    with pytest.raises(DataError, match=words):
        make(kind, source, tmp_path / "out", models, **options)


@KINDS
def test_a_changed_caption_is_another_data_set(kind: str, source: Path, tmp_path: Path, models: Path) -> None:
    first = make(kind, source, tmp_path / "first", models)
    changed = (source / "metadata.jsonl").read_text().replace("the red corgi", "the big corgi")
    (source / "metadata.jsonl").write_text(changed)
    with pytest.raises(DataError, match="the source has changed"):
        make(kind, source, first, models)
    second = make(kind, source, tmp_path / "second", models)
    identities = [read(kind, folder, models).identity for folder in (first, second)]
    assert identities[0].differences(identities[1])
    assert not read(kind, shutil.copytree(first, tmp_path / "copy"), models).identity.differences(identities[0])
    prints = [read(kind, first, models, context=context).train.fingerprint() for context in (None, SHAPE, SHAPE)]
    assert prints[0] != prints[1] == prints[2]


# What is refused


@KINDS
@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a cat", None, "", "  ", "a dog", None], r"4 of 6 images have no caption in column 'text': .*"
         r"dog/1\.png.*cat/2\.png.*dog/3\.png, \.\.\..*--empty-captions"),
        ([1, 2, 3], "column 'text' with captions is of type int64; expected one text"),
    ],
)  # fmt: skip
def test_captions_that_are_none(kind: str, texts: list[Any], words: str, tmp_path: Path, models: Path) -> None:
    source = write_images(tmp_path / "source", texts)
    with pytest.raises(DataError, match=words):
        make(kind, source, tmp_path / "out", models)
    assert not (tmp_path / "out").exists()


def test_missing_captions_are_empty_where_that_is_asked_for(tmp_path: Path, models: Path) -> None:
    source = write_images(tmp_path / "source", ["a cat", None, "  "])
    data = read("codes", make("codes", source, tmp_path / "out", models, empty_captions=True), models)
    assert data.null_context is not None
    for index in (1, 2):
        assert near(data.train[index].context, data.null_context)


def test_columns_that_hold_no_captions(tmp_path: Path, models: Path) -> None:
    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]),
        "several": datasets.List(datasets.Value("string")),
    })  # fmt: skip
    pixels = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    columns = {"image": pixels, "label": [0, 1], "several": [["x", "y"], ["z"]]}
    (tmp_path / "source").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "source" / "train.parquet")
    for captions, words in (
        ("text", r"no column 'text' with captions, only \[image, label, several\].*template"),
        ("label", "'label' holds classes.*template"),
        ("several", "expected one text for each image: choose one of the several"),
    ):
        with pytest.raises(DataError, match=words):
            make("codes", tmp_path / "source", tmp_path / "out", models, captions=captions)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "partly").mkdir()
    rows = datasets.Dataset.from_dict({"image": pixels, "label": [0, -1]}, features)
    rows.to_parquet(tmp_path / "partly" / "train.parquet")
    with pytest.raises(DataError, match="1 of 2 images have no label to make a caption of: row 1 of train"):
        make("codes", tmp_path / "partly", tmp_path / "out", models, captions="a {}")
    loose = write_images(tmp_path / "loose", None, classes=["."])
    with pytest.raises(DataError, match="is a template for names of classes, but the images are unlabelled"):
        make("codes", loose, tmp_path / "out", models, captions="a {}")
    with pytest.raises(DataError, match="context_tokens is 0; expected 1 or more"):
        make("codes", tmp_path / "source", tmp_path / "out", models, context_tokens=0)


@KINDS
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((TOKENS, 16), r"are 6 vectors of 8, by the text encoder t5, but the model takes 6 of 16; "
         "encode the captions again, by --context-tokens 6 and a --text-encoder of width 16"),
        ((5, WIDTH), "the model takes 5 of 8"),
    ],
)  # fmt: skip
def test_a_model_of_other_vectors(
    kind: str, shape: tuple[int, int], words: str, source: Path, tmp_path: Path, models: Path
) -> None:
    out = make(kind, source, tmp_path / "out", models)
    with pytest.raises(DataError, match=words):
        read(kind, out, models, context=shape)
    card = find_context(str(out))
    assert card is not None
    other = TextEncoder.from_pretrained(str(models / "other"), max_tokens=TOKENS).identity
    with pytest.raises(DataError, match=r"by another text encoder \(t5\)(.|\n)*encoder: "):
        check_encoder(card, str(out), other)
    check_encoder(card, str(out), TextEncoder.from_pretrained(str(models / "t5"), max_tokens=TOKENS).identity)


@KINDS
def test_a_model_of_captions_and_a_set_without(kind: str, source: Path, tmp_path: Path, models: Path) -> None:
    out = make(kind, source, tmp_path / "out", models, captions=None)
    with pytest.raises(DataError, match=r"have no captions .*but the model takes them.*--captions"):
        read(kind, out, models)
    with pytest.raises(DataError, match="digits have no captions"):
        load_data(DataConfig(path="digits"), image_size=8, in_channels=1, context=SHAPE)


def _other_null(out: Path, models: Path, source: Path) -> None:
    wide = make("prepared", source, out.parent / "wide", models, text_encoder=str(models / "wide"))
    shutil.copy(wide / "null_context.safetensors", out)


def _same_width(out: Path, models: Path, source: Path) -> None:
    other = make("prepared", source, out.parent / "other", models, text_encoder=str(models / "other"))
    shutil.copy(other / "null_context.safetensors", out)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out, *_: (out / "null_context.safetensors").unlink(), "null_context.safetensors is missing"),
        (lambda out, *_: (out / "null_context.safetensors").write_bytes(b"x" * 99), "is damaged"),
        (_other_null, r"holds torch.bfloat16 \(1, 12\); expected finite bfloat16 of 1 to 6 vectors of 8"),
        (_same_width, "is not the one that was made with the captions beside it"),
    ],
)
def test_a_damaged_empty_caption(
    damage: Callable[[Path, Path, Path], None], words: str, source: Path, tmp_path: Path, models: Path
) -> None:
    out = make("codes", source, tmp_path / "out", models)
    damage(out, models, source)
    with pytest.raises(DataError, match=words):
        read("codes", out, models)


def test_the_command_writes_a_lost_empty_caption_anew(source: Path, tmp_path: Path, models: Path) -> None:
    out = make("codes", source, tmp_path / "out", models)
    wanted = content(out)
    (out / "null_context.safetensors").unlink()
    assert content(make("codes", source, out, models)) == wanted


@KINDS
def test_a_file_of_another_text_encoder(kind: str, source: Path, tmp_path: Path, models: Path) -> None:
    out = make(kind, source, tmp_path / "out", models)
    other = make(kind, source, tmp_path / "other", models, text_encoder=str(models / "wide"))
    shutil.copy(next(other.glob("*.parquet")), out)
    with pytest.raises(DataError, match=r"are not those of its .*has .* bytes, expected"):
        read(kind, out, models)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"12345", "holds 5 bytes; expected bfloat16 of 1 to 6 vectors of 8, so a multiple of 16 bytes"),
        (b"", "holds 0 bytes"),
        (None, "holds NoneType"),
        (bytes(7 * 16), "holds 112 bytes"),
        (np.full(8, 0x7FC0, "<i2").tobytes(), "not finite"),
    ],
)
def test_damaged_vectors_are_named(data: bytes | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ContextDecoder(*SHAPE)({"context": data, "caption": "x"})


def test_an_image_with_damaged_vectors_is_replaced_and_named(source: Path, tmp_path: Path, models: Path) -> None:
    out = make("codes", source, tmp_path / "out", models)
    file = next(out.glob("*.parquet"))
    table = pq.read_table(file)
    values = table["context"].to_pylist()
    values[2] = np.full(24, 0x7F80, "<i2").tobytes()  # infinite
    index = table.column_names.index("context")
    changed = table.set_column(index, "context", pa.array(values, pa.binary()))
    (tmp_path / "copy").mkdir()
    pq.write_table(changed, tmp_path / "copy" / file.name)
    card = json.loads((out / "codes.json").read_text()) | {"files": []}
    (tmp_path / "copy" / "codes.json").write_text(json.dumps(card))
    shutil.copy(out / "null_context.safetensors", tmp_path / "copy")
    (batch,) = in_order(read("codes", tmp_path / "copy", models).train, 7)
    assert len(batch.broken) == 1
    assert "row 2: column 'context' holds values that are not finite" in batch.broken[0]
    assert near(batch.context, vectors(models, [*TEXTS[:2], *TEXTS[3:4], *TEXTS[3:]]))


def test_vectors_survive_their_bytes() -> None:
    given = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    padded = ContextDecoder(*SHAPE).padded([given])[0]
    assert torch.equal(ContextDecoder(*SHAPE)({"context": to_bytes(padded)}), given)


# The commands


@KINDS
def test_commands(
    kind: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    source = write_images(tmp_path / "source", ["a cat", "a small dog with a large red corgi on the beach", "a dog"])
    words = [str(source), str(tmp_path / "out"), "--size", "8", "--num-workers", "0", "--captions", "text",
             "--text-encoder", str(models / "t5"), "--context-tokens", str(TOKENS)]  # fmt: skip
    command = main if kind == "prepared" else encode_dataset.main
    lead = ["prepare"] if kind == "prepared" else []
    vae = [] if kind == "prepared" else ["--vae", str(models / "vae")]
    command(args=[*lead, *words, *vae])
    told = capsys.readouterr()
    assert "captions: of column text" in told.err
    assert "captions: 4.0 of at most 6 vectors of 8 for an image on average, about 192 B in all" in told.err
    assert told.err.count("WARNING: 1 of 3 captions have more than 6 tokens and are cut, such as 'a small dog") == 1
    assert "1 of more than 6 tokens" in told.out
    assert "6 vectors of 8, by t5" in told.out
    options = f"--model.context-tokens {TOKENS} --model.context-dim {WIDTH} --text.encoder {models / 't5'}"
    assert options in told.out.replace("\n", "")
    assert not [one for one in recwarn if "is cut" in str(one.message)]
    card = find_context(str(tmp_path / "out"))
    assert card is not None
    assert card.cut == 1
    long = vectors(models, ["a small dog with a large red corgi on the beach"])[0]
    assert near(read(kind, tmp_path / "out", models).train[1].context, long)


@KINDS
def test_a_command_without_a_text_encoder(
    kind: str, source: Path, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(source), str(tmp_path / "out"), "--size", "8", "--captions", "text", "--text-encoder", "/nowhere"]
    command = main if kind == "prepared" else encode_dataset.main
    lead = ["prepare"] if kind == "prepared" else []
    vae = [] if kind == "prepared" else ["--vae", str(models / "vae")]
    with pytest.raises(SystemExit, match="1"):
        command(args=[*lead, *words, *vae])
    assert "/nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
