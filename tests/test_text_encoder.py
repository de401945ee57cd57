"""Texts to condition vectors: padding, cuts, identity, and what can't be loaded."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from tiny_text import TOKENS, WIDTH, save_text_encoder, tiny_t5, tiny_text_encoder, tiny_tokenizer

from itarflow.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def encoder():
    return tiny_text_encoder()


def test_vectors_are_those_of_t5_without_padding(encoder):
    found = encoder.encode(["a corgi on the beach", "a cat"])
    assert found.shape == (2, TOKENS, WIDTH)
    assert found.dtype == torch.float32
    ids = torch.tensor([encoder.tokenizer("a cat").input_ids])
    alone = encoder.encoder(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(found[1, : ids.shape[1]], alone)
    assert (found[1, ids.shape[1] :] == 0).all()


def test_a_text_does_not_depend_on_the_others(encoder):
    texts = ["a corgi on the beach", "a cat", "", "a cat"]
    together = encoder.encode(texts)
    for text, vectors in zip(texts, together, strict=True):
        torch.testing.assert_close(encoder.encode([text])[0], vectors)
    torch.testing.assert_close(encoder.encode(texts, batch_size=1), together)


def test_the_empty_text_is_one(encoder):
    vectors = encoder.encode([""])[0]
    assert (vectors[0] != 0).any()  # of the end token
    assert (vectors[1:] == 0).all()


def test_a_long_text_is_cut_with_a_warning_that_shows_where(encoder):
    with pytest.warns(UserWarning, match=r"10 tokens is cut to 6.*red cat with', and 'a small blue dog'"):
        cut = encoder.encode(["a large red cat with a small blue dog"])
    torch.testing.assert_close(cut, encoder.encode(["a large red cat with"]))


def test_a_long_text_that_is_there_twice_is_told_once(encoder):
    with pytest.warns(UserWarning, match="is cut to") as told:
        encoder.encode(["a large red cat with a small blue dog"] * 3)
    assert len(told) == 1


def test_an_encoder_in_training_gives_the_same_vectors(encoder):
    trained = tiny_text_encoder()
    trained.encoder.train()
    torch.testing.assert_close(trained.encode(["a cat"]), encoder.encode(["a cat"]))
    assert trained.encoder.training


@pytest.mark.parametrize("prompts", ["a cat", [], [3], [None], None, {"a cat"}, {"a cat": 1}, ["a \udcff cat"]])
def test_what_is_no_list_of_texts_is_refused(encoder, prompts):
    with pytest.raises(ValueError, match="expected"):
        encoder.encode(prompts)


def test_memory_that_runs_out_makes_batches_smaller(encoder, monkeypatch):
    expected, encode, sizes = encoder.encode(["a", "cat", "dog"]), encoder._encode, []

    def scarce(texts):
        sizes.append(len(texts))
        if len(texts) > 1:
            raise torch.OutOfMemoryError
        return encode(texts)

    monkeypatch.setattr(encoder, "_encode", scarce)
    with pytest.warns(UserWarning, match="does not fit the memory"):
        found = encoder.encode(["a", "cat", "dog"])
    torch.testing.assert_close(found, expected)
    assert sizes == [3, 1, 1, 1]


def test_vectors_that_are_not_finite_are_refused():
    broken = tiny_text_encoder()
    broken.encoder.encoder.final_layer_norm.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        broken.encode(["a cat"])


def test_identity_says_whether_vectors_are_equal(encoder, tmp_path):
    folder = str(save_text_encoder(tmp_path))
    for dtype in (None, torch.float32):
        assert TextEncoder.from_pretrained(folder, max_tokens=TOKENS, dtype=dtype).identity == encoder.identity
    rounded = TextEncoder.from_pretrained(folder, max_tokens=TOKENS, dtype=torch.bfloat16)
    assert rounded.encoder.dtype == torch.bfloat16
    assert rounded.identity == encoder.identity
    assert tiny_text_encoder(seed=1).identity.differences(encoder.identity)[0].startswith("encoder: ")
    assert tiny_text_encoder(max_tokens=7).identity.differences(encoder.identity) == ["max_tokens: 7 -> 6"]
    assert tiny_text_encoder(relative_attention_max_distance=9).identity != encoder.identity
    other = tiny_tokenizer()
    other.add_tokens(["tree"])
    assert TextEncoder(other, tiny_t5(vocab_size=60)).identity.tokenizer != encoder.identity.tokenizer


def test_a_whole_t5_gives_its_encoder(encoder, tmp_path, capsys):
    from transformers import T5ForConditionalGeneration

    config = tiny_t5().config
    config.is_encoder_decoder = True
    whole = T5ForConditionalGeneration(config)
    whole.load_state_dict(encoder.encoder.state_dict(), strict=False)
    whole.save_pretrained(tmp_path, max_shard_size="4KB")  # in several files
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model-head.safetensors", {"format": "pt"})
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-head.safetensors"
    path.write_text(json.dumps(index))
    capsys.readouterr()
    found = TextEncoder.from_pretrained(str(tmp_path), max_tokens=TOKENS)
    assert capsys.readouterr().err == ""
    torch.testing.assert_close(found.encode(["a cat"]), encoder.encode(["a cat"]))


@pytest.mark.parametrize("names", [("encoder.embed_tokens.weight",), ("encoder.embed_tokens.weight", "shared.weight")])
def test_the_table_of_tokens_may_have_either_name(encoder, tmp_path, names):
    weights = save_text_encoder(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    table = tensors.pop("shared.weight")
    save_file(tensors | {name: table.clone() for name in names}, weights, {"format": "pt"})
    found = TextEncoder.from_pretrained(str(tmp_path), max_tokens=TOKENS)
    torch.testing.assert_close(found.encode(["a cat"]), encoder.encode(["a cat"]))


def test_another_kind_of_encoder_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=50))
    with pytest.raises(ValueError, match="BertModel; expected a T5EncoderModel"):
        TextEncoder(tiny_tokenizer(), bert)
    bert.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="kind 'bert'"):
        TextEncoder.from_pretrained(str(tmp_path))


def test_a_tokenizer_of_another_encoder_is_refused():
    with pytest.raises(ValueError, match="has vectors of 10"):
        TextEncoder(tiny_tokenizer(), tiny_t5(vocab_size=10))
    without = tiny_tokenizer()
    without.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        TextEncoder(without, tiny_t5())
    with pytest.raises(ValueError, match="max_tokens is 0"):
        TextEncoder(tiny_tokenizer(), tiny_t5(), 0)
    with pytest.raises(ValueError, match="max_tokens is 0"):  # before anything is looked for
        TextEncoder.from_pretrained("./nowhere", max_tokens=0)


@pytest.mark.parametrize("name", ["no/such-encoder", "./nowhere"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(OSError, match=r"(?s)can't be loaded.*flan-t5-xl") as refusal:
        TextEncoder.from_pretrained(name)
    assert name in str(refusal.value)


def damaged(folder, case):
    config, weights = folder / "config.json", folder / "model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(weights)
    key = "encoder.final_layer_norm.weight"
    if case == "layers":
        values["num_layers"] = 100_000
    elif case == "size":
        values["d_model"] = 16
    elif case == "type":
        values["d_model"] = "8"
    elif case == "missing":
        del tensors[key]
    elif case == "superfluous":
        tensors["head.weight"] = torch.zeros(2)
    elif case == "nan":
        tensors[key][0] = torch.nan
    config.write_text(json.dumps(values))
    save_file(tensors, weights, {"format": "pt"})
    if case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif case == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif case == "tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"return_dict": False},
        {"dropout_rate": 0.9},
        {"is_decoder": True},
    ],
)
def test_other_settings_of_a_folder_play_no_part(encoder, tmp_path, settings):
    config = save_text_encoder(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    (tmp_path / "adapter_config.json").write_text("{}")
    found = TextEncoder.from_pretrained(str(tmp_path), max_tokens=TOKENS)
    assert "evil" not in str(vars(found.encoder.config))
    assert torch.equal(found.encode(["a cat"]), encoder.encode(["a cat"]))
    assert found.identity == encoder.identity


def test_precisions_are_those_of_transformers(tmp_path):
    from transformers import T5EncoderModel

    save_text_encoder(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
        found = TextEncoder.from_pretrained(str(tmp_path), max_tokens=TOKENS, dtype=dtype).encoder
        assert found.shared.weight is found.encoder.embed_tokens.weight
        assert found.dtype == dtype
        for name, tensor in expected.state_dict().items():
            assert found.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(found.state_dict()[name], tensor)


def changed_tokenizer(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_file_may_not_name_another_tokenizer(tmp_path):
    save_text_encoder(tmp_path)
    changed_tokenizer(tmp_path, tokenizer_class=None)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(OSError, match="its tokenizer is a BertTokenizer"):
        TextEncoder.from_pretrained(str(tmp_path))


def test_a_tokenizer_that_was_stored_otherwise_reads_the_same(encoder, tmp_path):
    changed_tokenizer(save_text_encoder(tmp_path), model_input_names=["input_ids"], truncation_side="left")
    found = TextEncoder.from_pretrained(str(tmp_path), max_tokens=TOKENS)
    assert torch.equal(found.encode(["a cat"]), encoder.encode(["a cat"]))
    text = "a large red cat with a small blue dog"
    with pytest.warns(UserWarning, match="is cut to"):
        assert torch.equal(found.encode([text]), encoder.encode([text]))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("layers", "100,000 layers"),
        ("size", "do not fit"),
        ("type", "damaged"),
        ("missing", "final_layer_norm.weight missing"),
        ("superfluous", "head.weight"),
        ("nan", "NaN"),
        ("truncated", "truncated"),
        ("pickle", "model.safetensors is missing"),
        ("tokenizer", "holds no tokenizer"),
    ],
)
def test_damaged_files_are_refused(tmp_path, case, message):
    damaged(save_text_encoder(tmp_path), case)
    with pytest.raises(OSError, match=message):
        TextEncoder.from_pretrained(str(tmp_path))


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install \"itarflow\[text\]\""):
        TextEncoder.from_pretrained("google/flan-t5-xl")
