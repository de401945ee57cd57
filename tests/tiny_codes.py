"""A small data set of codes."""

import dataclasses
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import tiny_vae

from itarflow.codec import vae_identity
from itarflow.data.codes import CARD, CodesCard, to_bytes

IDENTITY = vae_identity(tiny_vae())


def make_card(**changes):
    card = CodesCard(
        vae="tiny",
        revision="abc",
        identity=IDENTITY,
        image_size=8,
        crop="center",
        flips=True,
        variance=True,
        class_names=("a", "b"),
        finished=True,
        code_mean=(0.1,) * 4,
        code_std=(0.9,) * 4,
    )
    return dataclasses.replace(card, **changes)


def write_codes(folder, card, posteriors, labels, split="train"):
    """A parquet file of posteriors (N, 4 columns, C, H, W) with their card."""
    folder.mkdir(exist_ok=True)
    columns = card.columns(flips=card.flips, variance=card.variance)
    rows = {name: [to_bytes(row[index]) for row in posteriors] for index, name in enumerate(columns)}
    features = datasets.Features({name: datasets.Value("binary") for name in columns})
    features["label"] = datasets.ClassLabel(names=list(card.class_names))
    table = pa.table(rows | {"label": labels}, schema=features.arrow_schema)
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=4)
    (folder / CARD).write_text(json.dumps({"card": card.to_json()}))
    return folder
