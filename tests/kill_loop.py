"""Kills a training at each file that it opens to write, makes, renames or removes, goes on, and compares.

python tests/kill_loop.py flow|decoder FOLDER [EVERY] prints a line for each kill after which something was not as in
an undisturbed training, and how many there were.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_training import tiny_recipe

from itarflow.data import DataConfig, sources
from itarflow.runtime.errors import RunError
from itarflow.training.decoder.config import DecoderConfig, TuneConfig
from itarflow.training.decoder.finetune import fine_tune
from itarflow.training.run_folder import RunDir
from itarflow.training.states import newest_whole
from itarflow.training.train import train

_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_VOLATILE = ("seconds", "images_per_second", "memory_gib", "tflops")
_LAST = 6


def flow(run: Path, start: str) -> None:
    """Six steps, saved after each, evaluated after every second, with a grid after every third."""
    recipe = tiny_recipe(
        split="train[:60]", held_out_images=10, batch_size=16, save_every=1, keep_states=1,
        evaluate_every_epochs=0.64, sample_every_epochs=0.96, num_images=2, num_denoise_steps=1,
    )  # fmt: skip
    train(recipe, run, start=start, max_steps=_LAST)


def decoder(run: Path, start: str) -> None:
    """The same of a decoder, but without grids."""
    config = DecoderConfig(
        vae=str(run.parent / "vae"), size=8, t_max=0.3, comparison_images=2,
        data=DataConfig(path="digits", split="train[:60]", in_memory=True, horizontal_flip=False, held_out_images=10),
        train=TuneConfig(steps=_LAST, batch_size=16, warmup_steps=2, log_every=1, save_every=1, keep_states=1,
                         evaluate_every=2),
    )  # fmt: skip
    fine_tune(config, run, start=start)


def go_on(train_: Callable[[Path, str], None], run: Path) -> None:
    """As a user would: --resume, and if there is nothing to resume, the same command without it."""
    try:
        train_(run, "resume")
    except RunError as error:
        if "holds no run to resume" not in str(error):
            raise
        train_(run, "fresh")


def forked(action: Callable[[], None], log: Path) -> int:
    """Run something in a child; returns 0, 1, or -9 if it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        action()
        code = 0
    except BaseException as error:  # the parent reports it
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def hooked(action: Callable[[], None], inside: Path, kill_at: int | None, log: Path) -> Callable[[], None]:
    """The action, killed just before its event number `kill_at`; None = its events are logged."""

    def run() -> None:
        count, me = 0, os.getpid()

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event == "open":
                writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if not writes:
                    return
            elif event not in _EVENTS:
                return
            if os.getpid() != me or not isinstance(args[0], str | bytes | os.PathLike):
                return
            path = os.path.abspath(os.fsdecode(args[0]))
            if not path.startswith(str(inside)):
                return
            count += 1
            if count == kill_at:
                os.kill(me, signal.SIGKILL)
            if kill_at is None:
                descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
                os.write(descriptor, f"{event} {path.removeprefix(str(inside))}\n".encode())
                os.close(descriptor)

        sys.addaudithook(hook)
        action()

    return run


def outcome(run: Path) -> dict[str, Any]:
    """All that must be as in an undisturbed training."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left = [p for p in run.rglob("*") if p.name.startswith((".partial", ".old", "torn")) and p.parent.name != "state"]
    index = run / "pipeline" / "model_index.json"
    record = json.loads(index.read_text())["training"] if index.exists() else {}
    figures = run / "psnr.json"
    return {
        "weights": {
            f"{file.relative_to(run)} {name}": hash(tensor.numpy().tobytes())
            for file in run.rglob("*.safetensors")
            for name, tensor in load_file(file).items()
        },
        "metrics": [{key: value for key, value in line.items() if key not in _VOLATILE} for line in metrics],
        "pictures": {str(file.relative_to(run)): hash(file.read_bytes()) for file in run.rglob("*.png")},
        "record": {key: value for key, value in record.items() if key not in _VOLATILE},
        "figures": figures.read_text() if figures.exists() else None,
        "states": [state.name for state in RunDir(run).states()],
        "left behind": [str(path) for path in left],
    }  # fmt: skip


def main(kind: str, folder: Path, every: int = 1) -> int:
    """Returns how many kills left something that was not as it should be."""
    torch.set_num_threads(1)
    sources._digits = functools.cache(sources._digits)
    sources._digits()  # encoded once, for all children
    train_ = {"flow": flow, "decoder": decoder}[kind]
    base, log = folder / kind, folder / "log"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    if kind == "decoder":
        from conftest import tiny_vae

        tiny_vae("AutoencoderTiny").save_pretrained(base / "vae")
    run, events = base / "run", base / "events"
    assert forked(hooked(lambda: train_(run, "fresh"), run, None, events), log) == 0, log.read_text()
    expected = outcome(run)
    assert expected["left behind"] == []
    names = events.read_text().splitlines()
    numbers = range(1, len(names) + 1, every)
    bad = 0
    for number in numbers:
        shutil.rmtree(run)
        assert forked(hooked(lambda: train_(run, "fresh"), run, number, events), log) in (-9, 0)
        state, passed_over = newest_whole(RunDir(run))
        newest = 0 if state is None else int(state.name[-8:])
        notes = [] if not passed_over else [f"states passed over: {passed_over}"]
        if forked(lambda: go_on(train_, run), log):
            notes.append(f"going on fails: {log.read_text().splitlines()[-1]}")
        else:
            found = outcome(run)
            notes += [
                f"{key}: {found[key]} instead of {value}" for key, value in expected.items() if found[key] != value
            ]
        bad += bool(notes)
        for note in notes:
            print(f"{number} {names[number - 1]} (newest state {newest}): {note}"[:400], flush=True)  # noqa: T201
    print(f"{len(numbers)} kills at {len(names)} events, after {bad} something was not as it should be")  # noqa: T201
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1) > 0)
