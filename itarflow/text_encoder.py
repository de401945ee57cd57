"""Prompts and captions to condition vectors: the encoder of a T5 of transformers, with its tokenizer.

transformers is imported where text is encoded, and nowhere else: `pip install "itarflow[text]"`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Self, TypedDict

import torch
from msgspec import Meta
from safetensors import safe_open
from torch import Tensor, nn

from itarflow.runtime.devices import in_batches
from itarflow.runtime.files import weights_digest
from itarflow.runtime.hub import folder_of
from itarflow.runtime.json_file import as_type, read_json
from itarflow.runtime.model_folder import CONFIG, TRANSFORMERS_WEIGHTS, check_finite, read_heads, weight_files
from itarflow.runtime.pipeline_index import ENCODER, TEXT_PARTS, TOKENIZER
from itarflow.runtime.text import listed, printable

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                    "spiece.model")  # fmt: skip
_ENCODER_FILES = (CONFIG, f"{TRANSFORMERS_WEIGHTS}.safetensors", f"{TRANSFORMERS_WEIGHTS}-*.safetensors",
                  f"{TRANSFORMERS_WEIGHTS}.safetensors.index.json")  # fmt: skip
_BATCH = 32
"""Texts that are encoded at a time; if memory runs out, fewer."""
_Size = Annotated[int, Meta(ge=1, le=2**20)]


@dataclass(frozen=True)
class TextIdentity:
    """All that condition vectors depend on: of equal identities, equal texts give equal vectors, up to rounding.

    Where an encoder is from is told, but not compared: a copy of it is as good.
    """

    name: str | None = field(compare=False)
    """The folder or the Hub name that it was loaded from; None = not known."""
    revision: str | None = field(compare=False)
    encoder: str
    """SHA-256 of the settings, and of the weights rounded to bfloat16: one for float32 and bfloat16."""
    tokenizer: str
    """SHA-256 of the vocabulary, and of how the empty text is read."""
    dim: Annotated[int, Meta(ge=1)]
    """Width E of the vectors."""
    max_tokens: Annotated[int, Meta(ge=1)]
    """T, the vectors of a text."""

    def differences(self, wanted: TextIdentity) -> list[str]:
        """Lines "name: this one's -> wanted" of what differs; [] if the two give equal vectors."""
        own, other = asdict(self), asdict(wanted)
        return [f"{key}: {own[key]} -> {other[key]}" for key in own if own[key] != other[key]
                and key not in ("name", "revision")]  # fmt: skip


class TextEncoder:
    """Texts -> condition vectors (B, T, E).

    The encoder may be moved or cast by its owner at any time; texts are read without dropout, whatever its mode.

    Args:
        tokenizer: of transformers, with a padding token.
        encoder: a `T5EncoderModel` of transformers.
        max_tokens: T; longer texts are cut, with a warning, shorter ones padded with zero vectors.
        name: where the two are from, for cards; None = not known.
        revision: of a name on the Hub.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the encoder is of another kind, the tokenizer has no padding token or more words than the encoder,
            or max_tokens < 1.
    """

    def __init__(
        self, tokenizer: Any, encoder: nn.Module, max_tokens: int = 128, *, name: str | None = None,
        revision: str | None = None,
    ) -> None:  # fmt: skip
        kind = _transformers().T5EncoderModel
        if not isinstance(encoder, kind):
            raise ValueError(
                f"the text encoder is a {type(encoder).__name__}; expected a T5EncoderModel of transformers, such as "
                "of google/flan-t5-xl."
            )
        _check_max_tokens(max_tokens)
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) has no padding token; expected the one that belongs to "
                "the text encoder."
            )
        largest, words = max(tokenizer.get_vocab().values()), encoder.config.vocab_size
        if largest >= words:
            raise ValueError(
                f"the tokenizer knows {largest + 1:,} tokens, but the text encoder has vectors of {words:,}; expected "
                "the tokenizer that belongs to it."
            )
        self.tokenizer, self.encoder = tokenizer, encoder
        self.max_tokens, self.name, self.revision = max_tokens, name, revision

    @classmethod
    def from_pretrained(
        cls, name: str, revision: str | None = None, max_tokens: int = 128, dtype: torch.dtype | None = None
    ) -> Self:
        """Load encoder and tokenizer, on the CPU, for evaluation. Only safetensors are read, and no code is run.

        Args:
            name: a folder, or a Hub name such as google/flan-t5-xl. Of a whole T5 the encoder is taken; of a whole
                pipeline what is in its folders text_encoder and tokenizer.
            revision: branch, tag or commit of a name on the Hub.
            max_tokens: T.
            dtype: of the weights; None = float32.

        Raises:
            ImportError: transformers is not installed.
            OSError: there is no such encoder or tokenizer, or it is of another kind, or damaged.
            ValueError: max_tokens < 1.
        """
        _transformers()
        _check_max_tokens(max_tokens)
        files = (*_ENCODER_FILES, *TOKENIZER_FILES)
        patterns = [*files, *(f"{ENCODER}/{file}" for file in files), *(f"{TOKENIZER}/{file}" for file in files)]
        try:
            folder = folder_of(name, patterns, expected="a T5 text encoder", revision=revision)
            inner = (folder / ENCODER).is_dir()
            encoder = load_encoder(folder / ENCODER if inner else folder, dtype=dtype)
            tokenizer = load_tokenizer(folder / TOKENIZER if inner else folder)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of transformers, the Hub's client and safetensors
            raise OSError(
                f"the text encoder {name!r} can't be loaded: {error}\nExpected a folder or a Hub name (NAME/MODEL) of "
                f"a T5 of transformers with its tokenizer, such as google/flan-t5-xl, in safetensors; check the name, "
                "the network and the files."
            ) from error
        return cls(tokenizer, encoder, max_tokens, name=name, revision=revision)

    @property
    def dim(self) -> int:
        """Width E of the vectors."""
        return int(self.encoder.config.d_model)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or cast the encoder in place; returns this object."""
        self.encoder.to(device=device, dtype=dtype)
        return self

    @cached_property
    def identity(self) -> TextIdentity:
        """What the vectors depend on; reads all weights once, some seconds for a large encoder."""
        weights = {key: value.to(torch.bfloat16) for key, value in self.encoder.state_dict().items()
                   if key != "encoder.embed_tokens.weight"}  # fmt: skip
        settings = {key: getattr(self.encoder.config, key) for key in _SETTINGS}
        vocabulary = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer("").input_ids]
        return TextIdentity(
            name=self.name,
            revision=self.revision,
            encoder=_sha256([settings, weights_digest(weights)]),
            tokenizer=_sha256(vocabulary),
            dim=self.dim,
            max_tokens=self.max_tokens,
        )

    def encode(self, prompts: Sequence[str], batch_size: int = _BATCH) -> Tensor:
        """Texts -> their vectors (B, T, E), float32, on the encoder's device; rows of padding are zero.

        A text of more than T tokens is cut, with a warning that shows where. The empty text is one: its vectors are
        those of the end token. What a text gives does not depend on the others, up to rounding.

        Args:
            prompts: B of them.
            batch_size: that are encoded at a time; if memory runs out, fewer.

        Raises:
            ValueError: there are none, something is no text, batch_size < 1, or vectors that are not finite (of a T5
                in float16).
            RuntimeError: memory ran out at one text.
        """
        texts = checked_prompts(prompts)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected a number of prompts >= 1.")
        unique = list(dict.fromkeys(texts))
        for ids in self.tokenizer(unique, verbose=False).input_ids:
            self._warn_if_cut(ids)

        def make(part: slice) -> Tensor:
            with torch.no_grad():
                return self._encode(unique[part])

        training = self.encoder.training
        self.encoder.eval()  # one that was built by hand drops values at random
        try:
            parts, _ = in_batches(make, len(unique), batch_size, "encoding the prompts of", "batch_size")
        finally:
            self.encoder.train(training)
        vectors = torch.cat(parts)
        if not bool(vectors.isfinite().all()):
            raise ValueError(
                f"the text encoder gives vectors that are not finite in {self.encoder.dtype}; load it in float32 or "
                "bfloat16."
            )
        if len(unique) == len(texts):
            return vectors
        place = {text: index for index, text in enumerate(unique)}
        return vectors[torch.tensor([place[text] for text in texts], device=vectors.device)]

    def _encode(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt",
            padding_side="right", return_attention_mask=True,
        )  # fmt: skip
        device = self.encoder.device
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        # Not multiplied: of a text without any token, T5's attention over nothing may be NaN.
        return torch.where(mask[..., None].to(states.device) > 0, states.float(), 0.0)

    def _warn_if_cut(self, ids: list[int]) -> None:
        if len(ids) <= self.max_tokens:
            return
        kept = self.max_tokens - len(self.tokenizer("").input_ids)  # every text ends with these
        read = self.tokenizer.decode(ids[:kept], skip_special_tokens=True)
        left_out = self.tokenizer.decode(ids[kept:], skip_special_tokens=True)
        warnings.warn(
            f"a prompt of {len(ids)} tokens is cut to {self.max_tokens}: it is read up to "
            f"{printable('... ' + read[-_SHOWN:])!r}, and {printable(left_out[:_SHOWN])!r} ... is left out.",
            stacklevel=3,
        )


_SHOWN = 40
"""Characters that are shown of both sides of a cut."""
_SETTINGS = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "feed_forward_proj",
             "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")  # fmt: skip
"""Of a T5 config, that change what an encoder computes."""


def _check_max_tokens(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"max_tokens is {value!r}; expected a number of tokens >= 1.")


def checked_prompts(prompts: Any) -> list[str]:
    """The prompts as a list.

    Raises:
        ValueError: it is empty, a single text, without an order, or something in it is none, or can't be encoded.
    """
    if isinstance(prompts, str | AnySet | Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is {prompts!r}; expected a list of texts, such as ['a red cat'].")
    texts = list(prompts)
    if not texts:
        raise ValueError("prompts is empty; expected at least one text; '' is one, and means: without a prompt.")
    if wrong := [one for one in texts if not isinstance(one, str)]:
        raise ValueError(f"a prompt is {wrong[0]!r}; expected a text. '' is the empty one.")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt {printable(text)!r} can't be written in UTF-8 ({error.reason}); expected whole "
                "characters: type it again, or give it in a file of UTF-8."
            ) from error
    return texts


def load_encoder(folder: Path, variant: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """The encoder of the T5 in a folder, which may be anybody's: looked through before anything is built.

    Args:
        folder: with config.json and safetensors, of an encoder or of a whole T5.
        variant: of the weights, such as "fp16"; None = the plain ones.
        dtype: of the weights; None = float32.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such encoder, or it is none of a T5.
        DataError: files that are damaged or do not fit each other.
    """
    transformers, path = _transformers(), folder / CONFIG
    values = read_json(path, dict[str, Any])
    if (kind := values.get("model_type")) != "t5":
        raise OSError(f"it is of the kind {printable(str(kind))!r}, as {CONFIG} says; expected 't5'")
    sizes = as_type({key: value for key, value in values.items() if key in _SETTINGS}, _T5Sizes, str(path))
    files = weight_files(folder, variant, stem=TRANSFORMERS_WEIGHTS)
    heads = read_heads(files)
    if sizes["num_layers"] > len(heads):
        raise OSError(f"{path} tells of {sizes['num_layers']:,} layers; its weights have {len(heads):,} tensors")
    # Of the settings nothing else is passed on: some make transformers fetch code from the Hub, or change the weights.
    config = transformers.T5Config(**sizes)
    with torch.device("meta"):  # without storage, so that a wrong size costs nothing
        encoder = transformers.T5EncoderModel(config)
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items() if key != _TABLE[1]}
    held = {_own_name(key): value.shape for key, value in heads.items()}
    others = [key for key in held.keys() - expected.keys() if not key.startswith(("decoder.", "lm_head."))]
    if wrong := sorted([*(key for key, shape in expected.items() if held.get(key) != shape), *others]):
        told = ", ".join(f"{printable(key)} {held.get(key, 'missing')}, expected {expected.get(key, 'none')}"
                         for key in wrong[:3])  # fmt: skip
        raise OSError(f"the weights in {folder} do not fit its {CONFIG}: {len(wrong)} tensors differ ({told})")
    tensors = {key: tensor.to(_stored_as(key, dtype)) for key, tensor in _tensors(files, expected)}
    encoder.load_state_dict(tensors | {_TABLE[1]: tensors[_TABLE[0]]}, assign=True)
    encoder.set_input_embeddings(encoder.shared)  # one table again
    return encoder.eval().requires_grad_(False)


_TABLE = ("shared.weight", "encoder.embed_tokens.weight")
"""The vectors of the tokens, stored under one name or both."""


def _own_name(key: str) -> str:
    return _TABLE[0] if key in _TABLE else key


def _tensors(files: Iterable[Path], wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors in files of weights, mapped from the disk; raises DataError if one is not finite."""
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                if _own_name(key) in wanted:
                    tensor = file.get_tensor(key)
                    check_finite(key, tensor, str(path))
                    yield _own_name(key), tensor


def _stored_as(key: str, dtype: torch.dtype | None) -> torch.dtype:
    """As transformers does: the last layers of T5 leave float16's range, and stay in float32."""
    return torch.float32 if dtype is None or (dtype == torch.float16 and ".wo." in key) else dtype


class _T5Sizes(TypedDict, total=False):
    """What is read of a T5's config; it has defaults for the rest."""

    d_model: _Size
    d_kv: _Size
    d_ff: _Size
    num_layers: _Size
    num_heads: _Size
    vocab_size: _Size
    feed_forward_proj: str
    relative_attention_num_buckets: _Size
    relative_attention_max_distance: _Size
    layer_norm_epsilon: Annotated[float, Meta(gt=0, lt=1)]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, of one of transformers' own classes.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is none, or it is damaged.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise OSError(
            f"{folder} holds no tokenizer: tokenizer.json is missing; expected one of {listed(TOKENIZER_FILES)}"
        )
    if (config := folder / "tokenizer_config.json").is_file():
        kind = read_json(config, dict[str, Any]).get("tokenizer_class")
        if kind is not None:
            _check_tokenizer(kind)
    tokenizer = _transformers().AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, truncation_side="right"
    )
    _check_tokenizer(type(tokenizer).__name__)  # which other files may name, too
    return tokenizer


def _check_tokenizer(kind: Any) -> None:
    if kind not in TEXT_PARTS[TOKENIZER]:
        raise OSError(f"its tokenizer is a {printable(str(kind))}; expected one of {', '.join(TEXT_PARTS[TOKENIZER])}")


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "prompts and captions need transformers, which is not installed; install it by: "
            'pip install "itarflow[text]"'
        ) from error
    return transformers


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
