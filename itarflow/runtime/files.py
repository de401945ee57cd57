"""Files and folders that are written whole or not at all, by one command at a time."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from itarflow.runtime.errors import DataError, RunError
from itarflow.runtime.text import printable

LOCK = ".lock"
PARTIAL = ".partial-"
"""Prefix of files that are being written, or were left by a killed call."""
_RANDOM = 8
"""Letters after `PARTIAL`, so that nobody can have put a link where a file is going to be written."""


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


def locked(path: Path, busy: Exception, timeout: float = 0) -> FileLock:
    """A lock file of a name, held by this process until it is released; `busy` if another holds it so many seconds.

    Raises:
        DataError: it is a link, whose file would be emptied.
    """
    if path.is_symlink():
        raise DataError(f"{path} is a link, expected a file: remove it")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise busy from None
    return lock


def remove_partial(out: Path) -> None:
    """Remove the partial files and folders of a killed call."""
    for left in out.glob(f"{PARTIAL}*"):
        remove(left)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at success it is flushed and renamed to `path`, else it is removed.

    Raises:
        OSError: naming `path`, if the disk is full, for instance. safetensors and torch have errors of their own for
            that, which become one.
    """
    partial = _partial(path)
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _failed_write(error, partial)) is None:
            raise
        refusal = OSError(f"{path} can't be written: {reason}. Make room, or choose another place, and try again.")
        refusal.errno = getattr(error, "errno", None)
        raise refusal from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:_RANDOM]}{path.name}")


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def _failed_write(error: Exception, partial: Path) -> str | None:
    """Why a file could not be written, or None for another error."""
    if isinstance(error, OSError):
        ours = error.filename is not None and Path(os.fsdecode(error.filename)) == partial
        return error.strerror if ours or (error.filename is None and error.errno in _DISK) else None
    if isinstance(error, SafetensorError):
        found = re.search(r"(?:.*: )?(.*) \(os error \d+\)", str(error))
        return found and found[1]
    if any(name in str(error) for name in ("PytorchStreamWriter", "inline_container")):  # of torch.save
        return f"torch could not write it ({str(error).splitlines()[0]})"
    return None


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    if os.name == "nt":  # which opens no folders, and flushes no file that was opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush a folder and all in it to the disk, before a rename makes it valid."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def open_regular(path: Path) -> BufferedReader:
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


def check_no_link(folder: Path) -> None:
    """Refuse a folder that is a link: in a folder from elsewhere it would lead what is written away from there.

    Raises:
        DataError: naming it.
    """
    if folder.is_symlink():
        raise DataError(
            f"{printable(str(folder))} is a link to another folder ({printable(os.readlink(folder))}), which is not "
            "written through; remove it, or choose another folder."
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that can't be written or made, by trying; nothing is left behind.

    Raises:
        OSError: naming the folder and the reason.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise OSError(f"{folder} can't be written: {existing} is a file.")
    try:
        # A file without a name where the system has them, so that not even a killed call leaves it behind.
        with tempfile.TemporaryFile(dir=existing, prefix=".itarflow-"):
            pass
    except OSError as error:
        raise OSError(f"{folder} can't be written: nothing can be made in {existing} ({error.strerror}).") from error


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside `target`, flush it, then put it in its place: the old or the new one is always there.

    Where the system can't exchange two folders at once, there is an instant without one; `restore_folder` puts the old
    one back after a kill just then.

    Raises:
        RunError: it can't be written, or a link is in its place; the old one is whole.
    """
    restore_folder(target)
    partial = _partial(target)
    try:
        if target.is_symlink():
            raise OSError("it is a link; remove it")
        write(partial)
        flush_folder(partial)
        if not target.exists():
            os.rename(partial, target)
        elif not _exchange(partial, target):
            os.replace(target, _old(target))
            os.replace(partial, target)
        flush(target.parent)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise RunError(f"{target} can't be written: {error}. What was there before is whole; make room.") from error
    finally:
        remove(partial)  # what failed, or what was there before
        restore_folder(target)


def restore_folder(target: Path) -> None:
    """Put back a folder that a killed `replace_folder` left under another name, and remove what else it left."""
    old = _old(target)
    if old.is_dir() and not old.is_symlink() and not target.exists():
        os.replace(old, target)
    for left in target.parent.glob(f"{PARTIAL}*{target.name}"):
        if left.name in (f"{PARTIAL}{target.name}", f"{PARTIAL}{left.name[len(PARTIAL) :][:_RANDOM]}{target.name}"):
            remove(left)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _old(target: Path) -> Path:
    return target.with_name(f".old-{target.name}")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; False where the system or its disk can't (Linux can since 3.15)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def file_sha256(path: Path) -> str:
    """The SHA-256 of a regular file's bytes, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors on the CPU, of their types, shapes and bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors as float32, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
