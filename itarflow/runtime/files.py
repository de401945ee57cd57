"""Files and folders that are written whole or not at all, by one command at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from itarflow.runtime.errors import DataError, RunError
from itarflow.runtime.text import printable

LOCK = ".lock"
PARTIAL = ".partial-"
"""Prefix of files that are being written, or were left by a killed call."""


@contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Make a folder, and lock it against other commands inside `with`; lock file and empty folder are removed after.

    Raises:
        DataError: another command writes into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{out} is being written by another command; wait for its end, or choose another folder")
    lock = locked(out / LOCK, busy)
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # of a folder with something in it
            out.rmdir()


def locked(path: Path, busy: Exception) -> FileLock:
    """A lock file of a name, held by this process until it is released; raises `busy` if another one holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise busy from None
    return lock


def remove_partial(out: Path) -> None:
    """Remove the partial files of a killed call."""
    for left in out.glob(f"{PARTIAL}*"):
        left.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at success it is flushed and renamed to `path`, else it is removed."""
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}{path.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading that is one: a named pipe is waited for, a device gives bytes without end.

    Raises:
        DataError: it is no regular file.
        OSError: it can't be opened.
    """
    # Looked at after it is opened, so that it can't be exchanged in between; without waiting for a pipe's writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{printable(str(path))} is no regular file; expected one: remove or replace it")
    return open(descriptor, "rb")


def check_writable(folder: Path) -> None:
    """Refuse a folder that can't be written or made, by trying; nothing is left behind.

    Raises:
        OSError: naming the folder and the reason.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise OSError(f"{folder} can't be written: {existing} is a file.")
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".itarflow-"):
            pass
    except OSError as error:
        raise OSError(f"{folder} can't be written: nothing can be made in {existing} ({error.strerror}).") from error


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside `target`, then put it in its place, so that a failed write leaves the old one.

    Raises:
        RunError: it can't be written; the old one is whole.
    """
    partial, old = target.with_name(f".partial-{target.name}"), target.with_name(f".old-{target.name}")
    if old.exists() and not target.exists():  # killed between two renames
        os.replace(old, target)
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        write(partial)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors has an error of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{target} can't be written: {error}. What was there before is whole; make room.") from error
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors as float32, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
