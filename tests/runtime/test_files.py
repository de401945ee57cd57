"""Files and folders are written whole or not at all, and nobody's link leads a write elsewhere."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from itarflow.runtime import files
from itarflow.runtime.errors import DataError, RunError
from itarflow.runtime.files import atomically, check_writable, locked, replace_folder, restore_folder


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes: as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"x" * 5000),
        lambda path: save_file({"x": torch.zeros(5000)}, path),
        lambda path: torch.save({"x": torch.zeros(5000)}, path),
    ],
    ids=["bytes", "safetensors", "torch"],
)
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(OSError, match=rf"{tmp_path}/file can't be written: .*[Mm]ake room"),
        atomically(tmp_path / "file") as partial,
    ):
        write(partial)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_missing_folder_is_named_by_the_file_that_was_asked_for(tmp_path: Path) -> None:
    message = rf"{tmp_path}/a/file can't be written: No such file"
    with pytest.raises(OSError, match=message) as refusal, atomically(tmp_path / "a" / "file") as partial:
        partial.write_text("text")
    assert refusal.value.errno == errno.ENOENT


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomically(tmp_path / "file") as partial:
        partial.write_text((tmp_path / "elsewhere").read_text())
    with pytest.raises(RuntimeError, match=r"^other$"), atomically(tmp_path / "file"):
        raise RuntimeError("other")


def test_trying_a_folder_leaves_nothing_even_when_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = files.tempfile.TemporaryFile

    def look(**options: str) -> object:
        file = real(**options)
        seen.append(os.listdir(tmp_path))  # what a kill would leave
        return file

    monkeypatch.setattr(files.tempfile, "TemporaryFile", look)
    check_writable(tmp_path / "new")
    assert seen == [[]]


def test_the_file_behind_a_link_is_not_emptied_to_lock_it(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DataError, match="is a link"):
        locked(tmp_path / ".lock", RuntimeError("busy"))
    assert (tmp_path / "precious").read_text() == "precious"


def make(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "text").write_text(text)

    return write


def content(target: Path) -> str:
    return (target / "text").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders at once")
def test_at_no_moment_there_is_no_folder(tmp_path: Path) -> None:
    target, missing = tmp_path / "target", []
    replace_folder(target, make("old"))
    watching = [True]

    def watch(event: str, _args: tuple[object, ...]) -> None:
        if watching[0] and event.startswith(("os.", "shutil.", "open")) and not target.exists():
            missing.append(event)

    sys.addaudithook(watch)
    replace_folder(target, make("new"))
    watching[0] = False
    assert content(target) == "new"
    assert missing == []
    assert os.listdir(tmp_path) == ["target"]


def test_without_an_exchange_two_renames_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for text in ("old", "new"):
        replace_folder(tmp_path / "target", make(text))
    assert content(tmp_path / "target") == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_a_rename_that_fails_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_folder(tmp_path / "target", make("old"))
    real = os.replace

    def replace(one: Path, other: Path) -> None:
        if one.name.startswith(".partial-"):
            raise OSError(5, "Input/output error")
        real(one, other)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(RunError, match="What was there before is whole"):
        replace_folder(tmp_path / "target", make("new"))
    assert content(tmp_path / "target") == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_all_files_are_on_the_disk_before_the_folder_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    real = files.flush

    def flush(path: Path) -> None:
        flushed.append((path.name, (tmp_path / "target").exists()))
        real(path)

    monkeypatch.setattr(files, "flush", flush)
    replace_folder(tmp_path / "target", make("new"))
    assert flushed[0] == ("text", False)
    assert flushed[-1] == (tmp_path.name, True)


def test_what_killed_calls_left_is_put_back_or_removed_and_nothing_else(tmp_path: Path) -> None:
    make("old")(tmp_path / ".old-target")
    for name in (".partial-target", ".partial-0123abcdtarget", ".partial-0123abcdother-target"):
        make("half")(tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text").write_text("precious")
    (tmp_path / ".partial-0123abcetarget").symlink_to(tmp_path / "elsewhere")
    restore_folder(tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == [".partial-0123abcdother-target", "elsewhere", "target"]
    assert content(tmp_path / "target") == "old"
    assert content(tmp_path / "elsewhere") == "precious"


def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    make("precious")(tmp_path / "elsewhere")
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"target can't be written: it is a link"):
        replace_folder(tmp_path / "target", make("new"))
    assert content(tmp_path / "elsewhere") == "precious"
