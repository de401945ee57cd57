"""What the recipe digits_text trains on, without a network: digits in folders zero ... nine, and a tiny T5.

python benchmarks/digits_text.py digits_by_name
itarflow prepare digits_by_name/images prepared/digits_text --size 8 --in-channels 1 \
    --captions "a photo of a {}" --text-encoder digits_by_name/text_encoder --context-tokens 8
itarflow train digits_text
python benchmarks/digits_quality.py --pipeline runs/digits_text/pipeline

The T5 has random weights, by which different words still get different vectors. Its width is that of
google/flan-t5-small, which may be named in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WIDTH = 512


@dataclass
class Options:
    """Write images and text encoder."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder for images/ and text_encoder/."""
    seed: int = 0
    """Of the encoder's weights."""


def main(options: Options) -> None:
    """Write both folders."""
    write_images(options.out / "images")
    write_encoder(options.out / "text_encoder", options.seed)
    print(f"{options.out} holds images/ and text_encoder/.")


def write_images(folder: Path) -> None:
    """The digits of scikit-learn as PNG files, a folder a class."""
    digits = load_digits()
    for index, (image, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / NAMES[target]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(place / f"{index:04}.png")


def write_encoder(folder: Path, seed: int) -> None:
    """A T5 encoder of two layers with random weights, and a tokenizer that knows the words of the captions."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = word_tokenizer(("a", "photo", "of", *NAMES))
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=64, d_ff=WIDTH, num_layers=2, num_heads=8
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer(words: tuple[str, ...]) -> Any:
    """A tokenizer of whole words, with T5's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
