"""The data set card that is written beside codes, for people and for the Hub, and the command that trains on them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from huggingface_hub import DatasetCard, DatasetCardData

from itarflow.codec import CodecConfig
from itarflow.data.codes import CodesCard

_TEMPLATE = """---
{metadata}
---

# Codes of {source}

The images of {source}, encoded once by the VAE {vae}: what a normalizing flow of `itarflow` trains on. Made by
`vae/encode_dataset.py`; `codes.json` says the same to programs.

| | |
| --- | --- |
{facts}

A code is {what}, {formula}, so that its values have about unit variance:

| channel | mean | standard deviation |
| --- | --- | --- |
{channels}

They are measured over all images as they are, not mirrored.

## Reading a row

Each column but the label holds {count} values in float16, little-endian, in the order (channel, row, column):

```python
import numpy as np
import pyarrow.parquet as pq

table = pq.read_table("{file}")
code = np.frombuffer(table["mean"][0].as_py(), "<f2").reshape{shape}
```

{columns}

`AutoencoderKL.decode` and `AutoencoderTiny.decode` of diffusers take `{inverse}`.

## Training on them

```bash
{command}
```

NAME is a recipe's. The VAE must be the one that made the codes: another one is refused.
"""

_MEANING = {
    "mean": "the code of the image: mean of its posterior",
    "log_variance": "the logarithm of the posterior's variance, in the units of codes",
    "mean_flipped": "as `mean`, of the mirrored image",
    "log_variance_flipped": "as `log_variance`, of the mirrored image",
    "label": "number of the class; its name is in the features",
}


def codes_card(card: CodesCard, *, source: str, images: Mapping[str, int], file: str, command: str) -> DatasetCard:
    """A card with metadata that the Hub reads, and what people need to use the codes.

    Args:
        card: finished.
        source: name of the images, for people.
        images: how many, by split.
        file: name of one of the parquet files, for the example.
        command: what trains on the codes.
    """
    columns = card.columns(flips=card.flips, variance=card.variance)
    channels, height, width = card.shape
    identity = card.identity
    facts = {
        **{f"images in {split}": f"{count:,}" for split, count in images.items()},
        "classes": len(card.class_names) or "none: unlabelled",
        "image size": f"{card.image_size} x {card.image_size} pixels, crop `{card.crop}`",
        "codes": f"{channels} channels of {height} x {width}, float16",
        "orientations": "straight and mirrored" if card.flips else "straight only",
        "VAE": f"{card.vae} ({identity.kind}), {identity.stride} pixels a code",
        **({"revision": card.revision} if card.revision else {}),
        "scaling factor": repr(identity.scaling_factor),
        "shift factor": repr(identity.shift_factor),
        "SHA-256 of the encoder": f"`{identity.encoder}`",
    }
    metadata = DatasetCardData(
        pretty_name=f"Codes of {source}",
        task_categories=["unconditional-image-generation"],
        size_categories=_size_category(sum(images.values())),
        tags=["itarflow", "vae-codes"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}-*.parquet"} for split in images],
            }
        ],
    )
    # Of single channels, in the few VAEs that have them.
    shift = (
        f"[{', '.join(map(repr, identity.latents_mean))}]" if identity.latents_mean else repr(identity.shift_factor)
    )
    spread = f"[{', '.join(map(repr, identity.latents_std))}]" if identity.latents_std else "1"
    statistics = enumerate(zip(card.code_mean, card.code_std, strict=True))
    shown = [*columns, *(["label"] if card.class_names else [])]
    return DatasetCard(
        _TEMPLATE.format(
            metadata=metadata.to_yaml(),
            source=source,
            vae=card.vae,
            facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
            what="the mean of the VAE's posterior" if card.variance else "the VAE's latent",
            formula=f"(latent - {shift}) / {spread} * {identity.scaling_factor!r}",
            inverse=f"code / {identity.scaling_factor!r} * {spread} + {shift}",
            channels="\n".join(f"| {channel} | {mean:.4f} | {std:.4f} |" for channel, (mean, std) in statistics),
            count=channels * height * width,
            file=file,
            shape=card.shape,
            columns="\n".join(f"- `{name}`: {_MEANING[name]}" for name in shown),
            command=command,
        )
    )


def training_command(card: CodesCard, codec: CodecConfig, path: str, splits: Sequence[str]) -> str:
    """The command that trains on codes.

    Args:
        card: of the codes.
        codec: the VAE, for whoever calls it.
        path: where the codes are, for whoever calls it.
        splits: names; it trains on train, or else the first, and measures on the next.
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
        "model.num-classes": len(card.class_names),
    }
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    flips = [] if card.flips else ["--data.no-horizontal-flip"]
    return " ".join(["accelerate launch recipes/NAME.py", *given, *flips])


def _size_category(count: int) -> str:
    """The Hub's word for so many rows."""
    limits = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
    return next((word for limit, word in limits.items() if count < limit), "10M<n<100M")
