"""A tiny T5 text encoder of random weights, with a tokenizer of words; needs transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from itarflow.text_encoder import TextEncoder

_KNOWN = """a an the of on with and photo picture corgi cat dog beach red blue large small
zero one two three four five six seven eight nine"""
WORDS = _KNOWN.split()
WIDTH, TOKENS = 8, 6
"""E and T of the tiny encoder."""


def tiny_tokenizer() -> Any:
    """A tokenizer that knows `WORDS`, ends each text with </s> as T5's does, and pads with <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_t5(width: int = WIDTH, seed: int = 0, **config: Any) -> Any:
    """A `T5EncoderModel` of two layers with random weights."""
    from transformers import T5Config, T5EncoderModel

    sizes: dict[str, Any] = {"vocab_size": len(WORDS) + 3, "d_model": width, "d_kv": 4, "d_ff": 16, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5EncoderModel(T5Config(**sizes | {"num_layers": 2, "feed_forward_proj": "gated-gelu"} | config))
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def tiny_text_encoder(max_tokens: int = TOKENS, **config: Any) -> TextEncoder:
    """The two together: texts -> (B, `TOKENS`, `WIDTH`)."""
    return TextEncoder(tiny_tokenizer(), tiny_t5(**config), max_tokens)


def save_text_encoder(folder: Path, **config: Any) -> Path:
    """A folder that `TextEncoder.from_pretrained` reads; returned."""
    tiny_t5(**config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
