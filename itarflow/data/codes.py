"""A data set of codes on disk: parquet files, and a card that says which VAE made them from what.

Each row has a label, and the posterior of an image's code as bytes: float16, little-endian, (C, H, W).
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from itarflow.codec import VaeIdentity, differing
from itarflow.data.images import Crop
from itarflow.runtime.errors import DataError
from itarflow.runtime.hub import folder_of
from itarflow.runtime.json_file import read_json
from itarflow.runtime.text import printable

CARD = "codes.json"
"""Name of the card in the folder of the parquet files."""
PREPARED = "prepare.json"
"""Name of what takes its place beside prepared images."""
NULL_CONTEXT = "null_context.safetensors"
"""Name of the file with the vectors of the empty caption, beside images or codes with captions."""


@dataclass(frozen=True, kw_only=True)
class CodesCard:
    """What the codes are."""

    vae: str
    """Name of the VAE, for display; of a folder, its last part."""
    revision: str | None
    """Commit of a VAE on the Hub, if it was named."""
    identity: VaeIdentity
    """What the codes depend on: encoder and scaling."""
    image_size: Annotated[int, Meta(ge=1)]
    """Side of the encoded images in pixels."""
    crop: Crop
    """How they became square."""
    flips: bool
    """Whether the mirrored images are there, too."""
    variance: bool
    """Whether there are log-variances; an AutoencoderTiny gives none."""
    class_names: tuple[str, ...]
    """() if the images are unlabelled."""
    finished: bool
    """Whether all parquet files are there."""
    code_mean: tuple[float, ...] = ()
    """Of each channel, over all images; () until finished."""
    code_std: tuple[float, ...] = ()
    """Standard deviation of each channel, of the means of the posteriors; () until finished."""

    def __post_init__(self) -> None:
        if self.image_size % self.identity.stride:
            raise ValueError(f"the stride {self.identity.stride} does not divide image_size {self.image_size}")
        for name, values in (("code_mean", self.code_mean), ("code_std", self.code_std)):
            if len(values) not in (0, self.identity.channels) or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} is {values}; expected {self.identity.channels} numbers, or none")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a code."""
        side = self.image_size // self.identity.stride
        return self.identity.channels, side, side

    def columns(self, *, flips: bool, variance: bool) -> tuple[str, ...]:
        """Names of the columns with these parts of the posteriors: straight ones first, of each the mean first."""
        parts = ("mean", "log_variance") if variance and self.variance else ("mean",)
        return tuple(part + view for view in (("", "_flipped") if flips else ("",)) for part in parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass(frozen=True)
class CodeDecoder:
    """Makes a tensor of a row: float16 (V, P, C, H, W) as `codec.stored_codes` takes it.

    Attributes:
        card: of the data set.
        flips: whether to give the mirrored image as a second view.
        variance: whether to give the log-variance, if there is one.
    """

    card: CodesCard
    flips: bool
    variance: bool
    dtype = torch.float16

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are read."""
        return self.card.columns(flips=self.flips, variance=self.variance)

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, P, C, H, W)."""
        views = 2 if self.flips else 1
        return views, len(self.columns) // views, *self.card.shape

    def __call__(self, row: Mapping[str, Any]) -> Tensor:
        """The tensor of a row whose columns hold bytes.

        Raises:
            DataError: bytes of another length, or values that are not finite.
        """
        values = []
        for name in self.columns:
            data = row[name]["bytes"] if isinstance(row[name], Mapping) else row[name]
            wanted = 2 * int(np.prod(self.card.shape))
            if not isinstance(data, bytes) or len(data) != wanted:
                found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
                raise DataError(f"column {name!r} holds {found}; expected {wanted} bytes of float16 {self.card.shape}")
            values.append(np.frombuffer(data, "<f2"))
        codes = np.concatenate(values)
        if not np.isfinite(codes).all():
            raise DataError(f"columns {', '.join(self.columns)} hold values that are not finite")
        return torch.from_numpy(codes.astype(np.float16, copy=False)).reshape(self.shape)


def to_bytes(code: Tensor) -> bytes:
    """A code or log-variance (C, H, W) as a data set of codes stores it."""
    return code.cpu().numpy().astype("<f2").tobytes()


def find_card(path: str) -> CodesCard | None:
    """The card of the data set that `DataConfig.path` names: a folder, parquet files, or a name on the Hub.

    Returns:
        None if there is none: then it is no data set of codes. "digits" are none, even beside a folder of that name.

    Raises:
        DataError: the card is damaged.
    """
    folder = folder_of_cards(path)
    return read_card(folder / CARD) if folder is not None and (folder / CARD).is_file() else None


def folder_of_cards(path: str) -> Path | None:
    """The local folder that would hold the cards of the data set that `DataConfig.path` names; None if there is none.

    Of a data set on the Hub they are downloaded, and nothing else.
    """
    if path == "digits":
        return None
    place = Path(path).expanduser()
    try:
        files = glob.has_magic(path) or place.suffix == ".parquet"
        cards = (CARD, PREPARED, NULL_CONTEXT)
        return place.parent if files else folder_of(path, cards, expected="codes", repo_type="dataset")
    except OSError:  # no such data set, or no network: opening it will raise
        return None


def read_card(file: Path) -> CodesCard:
    """The card in a file.

    Raises:
        DataError: it is damaged, or of another program.
        OSError: it can't be read.
    """
    return read_json(file, _CardFile).card


@dataclass(frozen=True)
class _CardFile:
    card: CodesCard


def check_card(
    card: CodesCard, path: str, wanted: VaeIdentity, shape: tuple[int, int, int], *, flips: bool, crop: Crop
) -> None:
    """Refuse codes that are not those that a recipe asks for.

    Args:
        card: of the codes.
        path: where they are, for the message.
        wanted: the identity of the recipe's VAE.
        shape: (C, H, W) that the flow models.
        flips: whether training mirrors images.
        crop: how the recipe says that images became square.

    Raises:
        DataError: unfinished, of another VAE or scaling, of another shape or crop, or without mirrored images.
    """
    if not card.finished:
        raise DataError(
            f"the codes in {path} are not finished: parquet files are missing; run the command that began them again"
        )
    if changes := differing(card.identity, wanted):
        raise DataError(
            f"the codes in {path} were made by another VAE ({printable(card.vae)}) or scaling than codec.vae "
            "names:\n  "
            + "\n  ".join(map(printable, changes))
            + "\nName that VAE and scaling, or encode the images again by vae/encode_dataset.py."
        )
    if card.shape != shape:
        raise DataError(
            f"the codes in {path} have shape {card.shape}, of images of {card.image_size} pixels, but the model takes "
            f"{shape}; set --model.in-channels {card.shape[0]} --model.image-size {card.shape[1]}, or encode the "
            f"images at {shape[1] * wanted.stride} pixels"
        )
    if card.crop != crop:
        raise DataError(
            f"data.crop is {crop!r}, but the images of the codes in {path} were cropped by {card.crop!r}; set "
            f"--data.crop {card.crop}, so that the record of the run is true, or encode the images again"
        )
    if flips and not card.flips:
        raise DataError(
            f"data.horizontal_flip is on, but the codes in {path} have no mirrored images; set "
            "--data.no-horizontal-flip, or encode the images with flips"
        )
