"""Making a set is killed before each of its changes to the folder: the same command goes on to the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")]

_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "tempfile.mkdtemp", "tempfile.mkstemp"}


@pytest.mark.parametrize("kind", ["prepare", "encode", "captions"])
def test_killed_before_any_change(kind: str, tmp_path: Path) -> None:
    """In a process of its own, which has no threads yet, and forks one for each kill."""
    if kind == "captions":
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, __file__, kind, str(tmp_path)], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 20, done.stdout


def test_workers_end_with_their_process(tmp_path: Path) -> None:
    """Pictures so large that workers wait to hand them over when there is nobody any more."""
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(120):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(source / f"{index}.png")
    words = ["prepare", str(source.parent), str(tmp_path / "out"), "--size", "256", "--num-workers", "2"]
    code = f"from itarflow.commands.cli import main; main({words!r})"
    for number in (signal.SIGKILL, signal.SIGTERM):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        workers = _wait_for(lambda pid=process.pid: len(found := _children(pid)) == 2 and found)
        _wait_for(lambda: any((tmp_path / "out").glob(".partial-*")))
        process.send_signal(number)
        process.wait(20)
        _wait_for(lambda pids=workers: not any(map(_alive, pids)))


def _wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# The script


def _kill_everywhere(kind: str, folder: Path) -> None:
    source = folder / "source" / "a"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(source / f"{index}.png")
    (source / "broken.png").write_bytes(b"x")
    command = _command(kind, folder)
    events = folder / "events"
    assert _forked(lambda: command(folder / "whole"), folder / "whole", None, events) == 0
    wanted, count = _content(folder / "whole"), len(events.read_text().splitlines())
    for number in range(1, count + 1):
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        assert _forked(lambda: command(folder / "out"), out, number, events) == -signal.SIGKILL, number
        assert _forked(lambda: command(folder / "out"), out, None, events) == 0, (number, os.listdir(out))
        assert _content(out) == wanted, (number, os.listdir(out))
    print(count, "kills")  # noqa: T201


def _command(kind: str, folder: Path) -> Callable[[Path], None]:
    common = ["--size", "8", "--shard-size", "3", "--num-workers", "0"]
    if kind == "prepare":
        from itarflow.commands import prepare  # noqa: F401 - once, for all that are forked
        from itarflow.commands.cli import main

        return lambda out: main(["prepare", str(folder / "source"), str(out), *common])
    from conftest import tiny_vae

    from itarflow.commands import encode_dataset

    tiny_vae("AutoencoderTiny", in_channels=3, out_channels=3).save_pretrained(folder / "vae")
    words = [*common, "--vae", str(folder / "vae")]
    if kind == "captions":
        from tiny_text import save_text_encoder

        words += ["--text-encoder", str(save_text_encoder(folder / "t5")), "--captions", "a photo of a {}"]
    return lambda out: encode_dataset.main(args=[str(folder / "source"), str(out), *words])


def _forked(command: Callable[[], None], inside: Path, kill_at: int | None, events: Path) -> int:
    """Run a command in a process, and kill it before its `kill_at`-th change inside a folder; its exit status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            events.write_text("")
            _kill_at(inside, kill_at, events)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            command()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill_at(inside: Path, kill_at: int | None, events: Path) -> None:
    me, count, log = os.getpid(), 0, os.open(events, os.O_WRONLY | os.O_APPEND)

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if os.getpid() != me or not args or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if event == "open":
            if not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event not in _EVENTS:
            return
        if not os.path.abspath(os.fsdecode(args[0])).startswith(str(inside)):
            return
        count += 1
        os.write(log, f"{event} {os.fsdecode(args[0])}\n".encode())
        if count == kill_at:
            os.kill(me, signal.SIGKILL)

    sys.addaudithook(hook)


def _content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _kill_everywhere(sys.argv[1], Path(sys.argv[2]))
