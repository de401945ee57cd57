"""The config of encoding a data set with a VAE, and the plan that every process makes before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from itarflow import __version__
from itarflow.codec import CodecConfig, Vae, VaeCodec, code_shape, differing, load_vae, vae_identity, vae_traits
from itarflow.data.codes import CARD, CodesCard
from itarflow.data.dataset import ImageDataset
from itarflow.data.made import Manifest
from itarflow.data.prepare.contexts import Captions, plan_captions
from itarflow.data.prepare.manifest import (
    SourceConfig,
    check_settings,
    check_settings_there,
    check_source_there,
    refuse_changes,
    stored_manifest,
)
from itarflow.data.prepare.shards import Shard, plan_shards
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import display_name, printable

Precision = Literal["float32", "bf16", "fp16"]
"""In which a VAE computes."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(SourceConfig):
    """What to encode, and how."""

    vae: str
    """An autoencoder in diffusers' format, such as an AutoencoderKL: a folder, or a name on the Hub such as
    stabilityai/sd-vae-ft-ema. Images are read as grey or RGB, as it takes them."""
    revision: str | None = None
    """Branch, tag or commit of a VAE on the Hub."""
    scaling_factor: float | None = None
    """Codes are (latents - shift_factor) * scaling_factor, of about unit variance. None = as the VAE's config says."""
    shift_factor: float | None = None
    """See scaling_factor. None = as the VAE's config says."""
    size: int
    """Height and width of the images in pixels, a multiple of the VAE's stride (mostly 8). The model's image_size is
    that of the codes: 256 pixels at stride 8 are codes of 32 x 32."""
    flips: bool = True
    """Encode the mirrored images, too, for training with data.horizontal_flip: a mirrored code is not the code of
    the mirrored image. Without, half the time and room."""
    batch_size: int = 32
    """Images that are encoded at a time in each process; lower it if memory runs out."""
    dtype: Precision = "float32"
    """Precision in which the VAE computes; bf16 and fp16 are faster on GPUs, bf16 on many CPUs, with small errors. In
    fp16, a VAE whose config says that it overflows (force_upcast) computes in float32 all the same. The text encoder
    computes in bf16 or float32."""
    tiled: bool = False
    """Encode large images in overlapping tiles, if they do not fit otherwise; the codes differ slightly."""
    shard_size: int = 2_560
    """Images a file. An interruption loses what each process has of its file, so up to so many images: make it smaller
    for small sets, and if there are fewer files than processes, as each process encodes whole files."""
    max_broken: int = 100
    """Unreadable images are left out and listed in broken.json; stop at more than this many."""
    num_workers: int | None = None
    """Processes that decode images ahead, beside each that encodes. None = the processor cores shared out, at most
    8 for each."""

    @property
    def codec(self) -> CodecConfig:
        """That of a flow that trains on the codes."""
        return CodecConfig(
            vae=self.vae,
            revision=self.revision,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
        )


@dataclass(frozen=True)
class Plan:
    """What a call has to do.

    Attributes:
        config: as it was called.
        vae: in float32 on the CPU.
        card: of the codes, unfinished.
        sets: images by split.
        shards: all files, in order.
        manifest: what codes.json holds from the beginning.
        captions: that are encoded, too; None = none.
    """

    config: EncodeConfig
    vae: Vae
    card: CodesCard
    sets: Mapping[str, ImageDataset]
    shards: tuple[Shard, ...]
    manifest: Manifest
    captions: Captions | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of codes."""
        return self.card.columns(flips=self.card.flips, variance=self.card.variance)

    @property
    def num_images(self) -> int:
        """Of the source."""
        return sum(len(shard.rows) for shard in self.shards)

    @property
    def image_bytes(self) -> int:
        """What the codes of an image take on the disk, and, by an estimate, the vectors of its caption."""
        of_caption = self.captions.estimate.image_bytes if self.captions else 0.0
        return 2 * len(self.columns) * int(np.prod(self.card.shape)) + round(of_caption)


def plan_encoding(config: EncodeConfig) -> Plan:
    """Check everything, load the VAE and the text encoder, and open the source; nothing is written.

    Raises:
        DataError: the configuration or the source cannot be used, or the folder holds something else.
        OSError: there is no such VAE.
        ValueError: the VAE does not suit the images.
    """
    _check(config)
    settings, stored = _settings(config), stored_manifest(config, CARD)
    check_settings_there(config.out, stored, settings)
    vae = load_vae(config.codec)
    traits = vae_traits(vae)
    in_channels = traits.in_channels
    if in_channels not in (1, 3):
        raise DataError(f"the VAE {config.vae} takes images of {in_channels} channels; expected 1 (grey) or 3 (RGB)")
    code_shape(vae, (in_channels, config.size, config.size))
    VaeCodec(vae, tiled=config.tiled)
    sets, source, texts = config.open(in_channels)
    captions = plan_captions(config, texts, stored, torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    card = CodesCard(
        vae=display_name(config.vae),
        revision=_commit(vae) or config.revision,
        identity=vae_identity(vae),
        image_size=config.size,
        crop=config.crop,
        flips=config.flips,
        variance=traits.variance,
        class_names=source.class_names,
        finished=False,
    )
    depends = {"settings": settings, "source": source.content, "card": card.to_json() | {"vae": "", "revision": ""}}
    depends |= captions.depends if captions else {}
    sizes = {split: len(images) for split, images in sets.items()}
    shards = plan_shards(config.out, sizes, config.shard_size, depends)
    manifest = Manifest(itarflow=__version__, settings=settings, source=source, shards=len(shards), card=card,
                        context=captions.card if captions else None)  # fmt: skip
    check_source_there(config.out, stored, manifest)
    if stored is not None and stored.card is None:
        raise DataError(f"{config.out / CARD} is damaged: it has no card; choose another folder")
    if stored is not None and stored.card is not None:
        changes = differing(stored.card.identity, card.identity)
        refuse_changes(config.out, "another VAE or scaling", [printable(change) for change in changes])
    return Plan(config, vae, card, sets, tuple(shards), manifest, captions)


def _check(config: EncodeConfig) -> None:
    """Refuse what is wrong in the settings alone."""
    check_settings(
        config, {"size": 1, "shard_size": 1, "batch_size": 1, "max_broken": 0, "num_workers": 0, "context_tokens": 1}
    )
    if config.dtype not in get_args(Precision):
        raise DataError(f"dtype {config.dtype!r} is unknown; use one of {', '.join(get_args(Precision))}")


def _settings(config: EncodeConfig) -> dict[str, Any]:
    """What the codes depend on besides the VAE, which is in the card, as JSON values."""
    elsewhere = ("vae", "revision", "scaling_factor", "shift_factor", "batch_size", "max_broken", "num_workers")
    return config.settings(without=elsewhere)


def _commit(vae: Vae) -> str | None:
    """The commit of a VAE that was downloaded: the cache of the Hub names the folder after it."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)", str(vae.config.get("_name_or_path", "")))
    return found[1] if found else None
