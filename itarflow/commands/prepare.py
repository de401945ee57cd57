"""`itarflow prepare`: a data set, cropped and resized once."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from itarflow.commands.console import print_table, resumable, say
from itarflow.commands.encode_dataset import captions_told, keep_tokenizers_quiet
from itarflow.data.prepare.codes_card import context_options, patch_size
from itarflow.data.prepare.crop import PrepareConfig, Prepared, prepare
from itarflow.runtime.files import check_writable

_MUCH_MEMORY = 4 * 2**30  # bytes of decoded images


@dataclass(frozen=True)
class Prepare(PrepareConfig):
    """Crop and resize a data set once, into parquet files that train like it but need far less time and room.

    Training reads the folder by --data.path: the classes, labels and, as png, pixels are those of the source.
    An interrupted command goes on where it stopped when it is run again.

    Example: itarflow prepare /data/imagenet/train imagenet64/ --size 64 --crop adm
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Where the images are: digits, a folder, parquet files, or a data set on the Hugging Face Hub."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write: a new or empty one, or one that the same command has begun."""

    def run(self) -> None:
        """Carry the command out."""
        keep_tokenizers_quiet()
        check_writable(self.out)
        with resumable(self.out):
            prepared = prepare(self, console=Console(stderr=True))
        broken, speed = sum(map(len, prepared.broken.values())), prepared.images_per_second
        print_table("Prepared", {
            **{f"images in {split}": f"{count:,}" for split, count in prepared.images.items()},
            "broken, left out": f"{broken:,}, see {self.out / 'broken.json'}" if broken else "none",
            "classes": len(prepared.class_names) or "none: unlabelled",
            **captions_told(prepared.context),
            "files": prepared.shards,
            "size": f"{prepared.num_bytes / 1e6:,.1f} MB",
            "speed": f"{speed:,.0f} images/s" if speed else "nothing was left to do",
        })  # fmt: skip
        say(f"Train on them, by a recipe for small images: {self._training(prepared)}")

    def _training(self, prepared: Prepared) -> str:
        """The command that trains on what was prepared, by the recipe of CIFAR-10, or of digits with captions."""
        train = "train" if "train" in self.split else self.split[0]
        held_out = next((split for split in self.split if split != train), None)
        options = {
            "data.path": self.out,
            "data.split": train,
            "data.held-out-split": held_out,
            "model.image-size": self.size,
            "model.in-channels": self.in_channels,
            "model.num-classes": 0 if prepared.context else len(prepared.class_names),
            "model.patch-size": patch_size(self.size),
            **context_options(prepared.context, self.text_encoder),
        }
        words = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items()
                 if value is not None or name == "data.held-out-split"]  # fmt: skip
        if sum(prepared.images.values()) * self.in_channels * self.size**2 > _MUCH_MEMORY:
            words.append("--data.no-in-memory")
        recipe = "digits_text" if prepared.context else "cifar10"
        return " ".join([f"python recipes/{recipe}.py", *words])
