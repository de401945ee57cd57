"""The data set card that is written beside codes, for people and for the Hub, and the command that trains on them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from itarflow.codec import CodecConfig
from itarflow.data.codes import CodesCard
from itarflow.data.context import CAPTION, CONTEXT, ContextCard

_MOST_TOKENS = 16  # a side, of a flow to begin with

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

PATH is the folder of these files, or their name on the Hub.{{ " The recipe is a small one to begin with." if not \
context else "" }} The VAE must
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
    )


def training_command(
    card: CodesCard,
    codec: CodecConfig,
    path: str,
    splits: Sequence[str],
    context: ContextCard | None = None,
    text_encoder: str | None = None,
) -> str:
    """The command that trains on codes: by the small recipe for codes, or, with captions, by the one for text.

    Args:
        card: of the codes.
        codec: the VAE.
        path: where the codes are.
        splits: names; it trains on train, or else the first, and measures on the next.
        context: of captions, if there are any.
        text_encoder: what made them, as it was named.
    """
    train = "train" if "train" in splits else splits[0]
    options = {
        "data.path": path,
        "data.split": train,
        "data.held-out-split": next((split for split in splits if split != train), None),
        "codec.vae": codec.vae,
        "codec.revision": codec.revision,
        "codec.scaling-factor": codec.scaling_factor,
        "codec.shift-factor": codec.shift_factor,
        "model.image-size": card.shape[1],
        "model.in-channels": card.shape[0],
        "model.num-classes": 0 if context else len(card.class_names),
        "model.patch-size": patch_size(card.shape[1]),
        **context_options(context, text_encoder),
    }
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    flips = [] if card.flips else ["--data.no-horizontal-flip"]
    recipe = "starflow_text" if context else "photos_latent"
    return " ".join([f"python recipes/{recipe}.py", *given, *flips])


def context_options(context: ContextCard | None, text_encoder: str | None) -> dict[str, int | str | None]:
    """The options of a recipe for a flow that takes these captions; of a Hub name of the encoder, the card tells."""
    if context is None:
        return {}
    tokens, dim = context.shape
    local = text_encoder if text_encoder is not None and Path(text_encoder).expanduser().is_dir() else None
    return {"model.context-tokens": tokens, "model.context-dim": dim, "text.encoder": local}


def patch_size(image_size: int) -> int:
    """The smallest patches by which images or codes of this side are at most 16 x 16 tokens; 1 if none divide it."""
    fitting = (size for size in range(1, image_size) if image_size % size == 0 and image_size // size <= _MOST_TOKENS)
    return next(fitting, 1)


def _size_category(count: int) -> str:
    """The Hub's word for so many rows."""
    limits = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
    return next((word for limit, word in limits.items() if count < limit), "10M<n<100M")
