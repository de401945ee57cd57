"""The command vae/encode_dataset.py: its options, messages and summary."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from diffusers.utils.logging import disable_progress_bar
from rich.console import Console

from itarflow.commands.console import parsed, print_table, resumable, say
from itarflow.data.context import ContextCard
from itarflow.data.prepare.codes_card import training_command
from itarflow.data.prepare.encode import Encoded, begin, encode_share, finish
from itarflow.data.prepare.encode_plan import EncodeConfig, plan_encoding
from itarflow.data.prepare.manifest import say_understood
from itarflow.runtime.devices import is_out_of_memory
from itarflow.runtime.errors import RunError
from itarflow.runtime.files import check_writable, folder_lock
from itarflow.runtime.launch import joined
from itarflow.runtime.processes import crash, on_main, refuse, shared_images
from itarflow.runtime.text import human_bytes


@dataclass(frozen=True, kw_only=True)
class Command(EncodeConfig):
    """The settings as words of a command line."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Where the images are: digits, a folder, parquet files, or a data set on the Hugging Face Hub."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write: a new or empty one, or one that the same command has begun."""


def main(description: str | None = None, args: list[str] | None = None) -> None:
    """Encode a data set as a command; exits with 1 and a message where something is wrong.

    Args:
        description: what --help says first; the script's docstring.
        args: the command line; None = the process's.
    """
    disable_progress_bar()  # diffusers' own, for the loading of files
    keep_tokenizers_quiet()
    try:
        joined()
        config = parsed(Command, description=description, args=args)
        with resumable(config.out):
            done = encode(config, console=Console(stderr=True))
    except (ImportError, OSError, RunError, ValueError) as error:
        refuse(error)
    except Exception as error:
        if not is_out_of_memory(error):
            crash(error)
        advice = f"Try a lower --batch-size (it was {config.batch_size}), or --tiled with large images; the "
        refuse(RuntimeError(f"the memory ran out: {str(error) or 'MemoryError'}\n{advice}same command goes on."))
    if done is not None:
        _print_encoded(config, *done)


def encode(config: EncodeConfig, *, console: Console | None = None) -> tuple[Encoded, float | None] | None:
    """Encode the images of some splits; go on where an earlier call stopped. All processes of a launch call it.

    `config.out` can be trained on as `data.path` with the same VAE as `codec.vae`.

    Args:
        config: what to encode, and how.
        console: where the main process draws a bar, which counts the images of all processes; None = nowhere.

    Returns:
        On the main process what lies in the folder, including what earlier calls did, and the speed of all processes
        in images a second (None if nothing was left to do); None on the others.

    Raises:
        DataError: the configuration or the source cannot be used, the folder holds something else, or more than
            `config.max_broken` images cannot be read. Files that are whole stay.
        OSError: there is no such VAE, the disk has too little room, or the folder cannot be written.
        ValueError: the VAE does not suit the images.
        RunError: one of these has met another process.
    """
    with ExitStack() as locks:
        return _encode(config, console, locks)


def _encode(config: EncodeConfig, console: Console | None, locks: ExitStack) -> tuple[Encoded, float | None] | None:
    """See `encode`; the main process holds the folder in `locks`."""
    state, plan, missing = joined(), None, 0

    def first() -> None:
        nonlocal plan, missing
        plan = plan_encoding(config)
        say_understood(console, plan.manifest.source)
        if plan.captions:
            plan.captions.say(console)
        check_writable(config.out)
        locks.enter_context(folder_lock(config.out))
        missing = begin(plan, console)

    on_main(state, first)  # it downloads what the others then find, and its refusal reaches them all
    plan = plan or plan_encoding(config)
    start = time.monotonic()
    bar = shared_images(state, console, "encoding", plan.num_images, plan.num_images - missing)
    with bar as count:
        encode_share(
            plan,
            device=state.device,
            process_index=state.process_index,
            num_processes=state.num_processes,
            count=count,
        )
    if not state.is_main_process:
        return None
    speed = missing / (time.monotonic() - start) if missing else None
    return finish(plan), speed


def _print_encoded(config: EncodeConfig, encoded: Encoded, speed: float | None) -> None:
    card, broken = encoded.card, sum(map(len, encoded.broken.values()))
    channels, height, width = card.shape
    print_table("Encoded", {
        **{f"images in {split}": f"{count:,}" for split, count in encoded.images.items()},
        "broken, left out": f"{broken:,}, see {config.out / 'broken.json'}" if broken else "none",
        "classes": len(card.class_names) or "none: unlabelled",
        **captions_told(encoded.context),
        "codes": f"{channels} channels of {height} x {width}" + (", straight and mirrored" if card.flips else ""),
        "mean of each channel": " ".join(f"{mean:.3f}" for mean in card.code_mean),
        "standard deviation": " ".join(f"{std:.3f}" for std in card.code_std),
        "files": f"{encoded.shards:,} of at most {human_bytes(encoded.shard_bytes)}",
        "size": human_bytes(encoded.num_bytes),
        "speed": f"{speed:,.1f} images/s" if speed else "nothing was left to do",
    })  # fmt: skip
    context, recipe = encoded.context, "by a small recipe" if encoded.context is None else "by the recipe for text"
    command = training_command(card, config.codec, str(config.out), config.split, context, config.text_encoder)
    say(f"Train on them, {recipe}: {command}")


def keep_tokenizers_quiet() -> None:
    """Data loaders fork after a tokenizer has had threads, which are of no use to them; each fork would warn of it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def captions_told(context: ContextCard | None) -> dict[str, str]:
    """What a summary says of captions."""
    if context is None:
        return {}
    tokens, dim = context.shape
    told = {"captions": context.captions, "context": f"{tokens} vectors of {dim}, by {context.encoder.name}"}
    return told | ({"captions cut": f"{context.cut:,} of more than {tokens} tokens"} if context.cut else {})
