"""The data set card that is written beside codes, for people and for the Hub, and the command that trains on them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from itarflow.codec import CodecConfig
from itarflow.data.codes import CodesCard
from itarflow.data.context import CAPTION, CONTEXT, ContextCard

_MOST_TOKENS, _MOST_TOKENS_LARGE = 16, 32  # a side, of a flow to begin with, and of a large one

# Of Jinja, which torch brings along.
_TEMPLATE = """---
{{ card_data }}
---

# Codes of {{ source }}

The images of {{ source }}, encoded once by the VAE {{ card.vae }}: what a normalizing flow of \
`itarflow` trains on. Made by
`vae/encode_dataset.py`; `codes.json` says the same to programs.

| | |
| --- | --- |
{% for split, count in images.items() -%}
| images in {{ split }} | {{ "{:,}".format(count) }} |
{% endfor -%}
| classes | {{ card.class_names | length or "none: unlabelled" }} |
| image size | {{ card.image_size }} x {{ card.image_size }} pixels, crop `{{ card.crop }}` |
| codes | {{ card.shape[0] }} channels of {{ card.shape[1] }} x {{ card.shape[2] }}, float16 |
| orientations | straight {{ "and mirrored" if card.flips else "only" }} |
| VAE | {{ card.vae }} ({{ vae.kind }}), {{ vae.stride }} pixels a code |
{% if card.revision -%}
| revision | {{ card.revision }} |
{% endif -%}
| scaling factor | {{ vae.scaling_factor }} |
| shift factor | {{ vae.shift_factor }} |
| SHA-256 of the encoder | `{{ vae.encoder }}` |
{% set shift = vae.latents_mean | list or vae.shift_factor -%}
{% set spread = vae.latents_std | list or 1 %}
A code is the {{ "mean of the VAE's posterior" if card.variance else "VAE's latent" }}, (latent - {{ shift }}) / \
{{ spread }} * {{ vae.scaling_factor }}, so that its values have about unit variance:

| channel | mean | standard deviation |
| --- | --- | --- |
{% for mean in card.code_mean -%}
| {{ loop.index0 }} | {{ "%.4f" % mean }} | {{ "%.4f" % card.code_std[loop.index0] }} |
{% endfor %}
They are measured over all images as they are, not mirrored.

## Reading a row

Each column {{ "of codes" if context else "but the label" }} holds \
{{ card.shape[0] * card.shape[1] * card.shape[2] }} values in float16, little-endian, \
in the order (channel, row, column):

```python
import numpy as np
import pyarrow.parquet as pq

table = pq.read_table("{{ file }}")
code = np.frombuffer(table["mean"][0].as_py(), "<f2").reshape{{ card.shape }}
```

{% for name in columns -%}
- `{{ name }}`: {{ meaning[name] }}
{% endfor %}
`itarflow.codec.VaeCodec` decodes them; `{{ vae.kind }}.decode` of diffusers takes the latent, of which the code is as
the table says.

{% if context -%}
## Captions

Captions are \
{{ "made of the names of the classes," if "{}" in context.captions else "the texts of the column" }} \
`{{ context.captions }}`. The text encoder {{ context.encoder.name }}\
{{ " (revision " ~ context.encoder.revision ~ ")" if context.encoder.revision else "" }} has made vectors of them in \
bfloat16, little-endian, {{ context.encoder.dim }} numbers for each token:

```python
context = torch.frombuffer(bytearray(table["context"][0].as_py()), dtype=torch.bfloat16).reshape(-1, \
{{ context.encoder.dim }})
```

A model takes {{ context.encoder.max_tokens }} vectors: these, and zeros behind them.\
{{ " %d captions have more tokens and are cut." % context.cut if context.cut else "" }} `null_context.safetensors` \
holds those of the empty caption, for guidance.

{% endif -%}
## Training on them

```bash
{{ command }}
```

PATH is the folder of these files, or their name on the Hub.{{ " The model is a small one to begin with." if small \
else "" }} The VAE must
be the one that made the codes: another one is refused.

"""

_MEANING = {
    "mean": "the code of the image: mean of its posterior",
    "log_variance": "the logarithm of the posterior's variance, in the units of codes",
    "mean_flipped": "as `mean`, of the mirrored image",
    "log_variance_flipped": "as `log_variance`, of the mirrored image",
    "label": "number of the class; its name is in the features",
    "caption": "the caption, as text",
    "context": "its vectors, see below",
}


def codes_card(
    card: CodesCard,
    *,
    source: str,
    images: Mapping[str, int],
    file: str,
    command: str,
    context: ContextCard | None = None,
) -> DatasetCard:
    """A card with metadata for the Hub, and how to use the codes.

    Args:
        card: finished.
        source: name of the images, for people.
        images: how many, by split.
        file: name of one of the parquet files, for the example.
        command: what trains on the codes.
        context: of captions, if there are any.
    """
    columns = [*card.columns(flips=card.flips, variance=card.variance), *(["label"] if card.class_names else [])]
    splits = [{"split": split, "path": f"{split}-*.parquet"} for split in images]
    metadata = DatasetCardData(
        pretty_name=f"Codes of {source}",
        task_categories=["text-to-image" if context else "unconditional-image-generation"],
        size_categories=_size_category(sum(images.values())),
        tags=["itarflow", "vae-codes"],
        configs=[{"config_name": "default", "data_files": splits}],
    )
    return DatasetCard.from_template(
        metadata,
        template_str=_TEMPLATE,
        card=card,
        vae=card.identity,
        source=source,
        images=images,
        columns=[*columns, *([CAPTION, CONTEXT] if context else [])],
        meaning=_MEANING,
        context=context,
        file=file,
        command=command,
        small=is_small(images, context),
    )


def training_command(
    card: CodesCard,
    codec: CodecConfig,
    path: str,
    images: Mapping[str, int],
    context: ContextCard | None = None,
    text_encoder: str | None = None,
    name: str | None = None,
) -> str:
    """The command that trains on codes: by the small recipe for codes, or, with captions, by the one for text.

    Args:
        card: of the codes.
        codec: the VAE.
        path: where the codes are.
        images: how many, by split; it trains on train, or else the first, and measures on the next.
        context: of captions, if there are any. Up to 100,000 images get a small model.
        text_encoder: what made them, as it was named.
        name: of the run; None = the recipe's.
    """
    train, held_out = train_and_held_out(list(images))
    count, side = images[train], card.shape[1]
    small = context is not None and is_small(images, context)
    patch = patch_size(side) if context is None or small else patch_size(side, least=1, most_tokens=_MOST_TOKENS_LARGE)
    options = {
        "name": name,
        "data.path": path,
        "data.split": train,
        "data.held-out-split": held_out,
        "codec.vae": codec.vae,
        "codec.revision": codec.revision,
        "codec.scaling-factor": codec.scaling_factor,
        "codec.shift-factor": codec.shift_factor,
        "model.image-size": side,
        "model.in-channels": card.shape[0],
        "model.num-classes": 0 if context else len(card.class_names),
        "model.patch-size": patch,
        **context_options(context, text_encoder, side // patch),
        **({"train.epochs": _epochs(count, _SMALL_TEXT["train.batch-size"])} | _SMALL_TEXT if small else {}),
    }
    flips = [] if card.flips else ["--data.no-horizontal-flip"]
    recomputed = ["--train.no-gradient-checkpointing"] if small else []
    recipe = "starflow_text" if context else "photos_latent"
    return " ".join([f"itarflow train {recipe}", *as_words(options), *flips, *recomputed])


_MOST_IMAGES = 100_000  # that a small model is proposed for
_STEPS = 2000
_SMALL_TEXT: dict[str, Any] = {
    "train.batch-size": 32,
    "train.learning-rate": 1e-3,
    "train.max-grad-norm": 1.0,
    "train.ema-decay": 0.99,
    "train.mixed-precision": "no",
    "model.channels": 256,
    "model.num-layers": (1, 1, 1, 5),
    "sampling.num-images": 16,
}
"""What makes starflow_text, of 3.86B parameters, one of some 7M for a first training, also on a CPU."""


def is_small(images: Mapping[str, int], context: ContextCard | None) -> bool:
    """Whether a small model is proposed: for codes without captions, and for few with them."""
    return context is None or images[train_and_held_out(list(images))[0]] <= _MOST_IMAGES


def _epochs(images: int, batch_size: int) -> int:
    """As many as have `_STEPS` steps, but at least ten."""
    return max(10, math.ceil(_STEPS * batch_size / max(images, 1)))


def train_and_held_out(splits: Sequence[str]) -> tuple[str, str | None]:
    """The split to train on, train or else the first, and the next one, to measure on, if there is one."""
    train = "train" if "train" in splits else splits[0]
    return train, next((split for split in splits if split != train), None)


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line; those of None are left out."""
    words = {name: " ".join(map(str, value)) if isinstance(value, tuple) else shlex.quote(str(value))
             for name, value in options.items() if value is not None}  # fmt: skip
    return [f"--{name} {value}" for name, value in words.items()]


def context_options(context: ContextCard | None, text_encoder: str | None, side: int) -> dict[str, int | str | None]:
    """The options of a recipe for a flow that takes these captions, and has side x side tokens.

    Of a Hub name of the encoder, the card tells.
    """
    if context is None:
        return {}
    tokens, dim = context.shape
    local = text_encoder if text_encoder is not None and Path(text_encoder).expanduser().is_dir() else None
    return {
        "model.rotary-side": side,
        "model.context-tokens": tokens,
        "model.context-dim": dim,
        "text.encoder": local,
    }


def run_name(folder: Path) -> str | None:
    """The name of a run on the data in a folder: the folder's, if a run may be called so."""
    name = folder.resolve().name
    return name if re.fullmatch(r"\w[\w .+=-]*", name) else None


def patch_size(side: int, least: int | None = None, most_tokens: int = _MOST_TOKENS) -> int:
    """The smallest patches by which images or codes are at most so many tokens a side; 1 if none divide them.

    Args:
        side: of images or codes.
        least: no smaller ones; None = 2 where they leave at least eight tokens a side, else 1.
        most_tokens: a side.
    """
    least = (2 if side >= 16 else 1) if least is None else least
    fitting = (size for size in range(least, side) if side % size == 0 and side // size <= most_tokens)
    return next(fitting, 1)


def _size_category(count: int) -> str:
    """The Hub's word for so many rows."""
    limits = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
    return next((word for limit, word in limits.items() if count < limit), "10M<n<100M")
