"""Folders of checkpoints, local or on the Hub: downloaded, read and uploaded, without code and without pickles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, snapshot_download, upload_folder

from itarflow.runtime.errors import DataError
from itarflow.runtime.files import write_json
from itarflow.runtime.json_file import read_json

INDEX = "model_index.json"


def folder_of(name: str, patterns: Sequence[str], *, expected: str, **options: Any) -> Path:
    """The local folder of a name, downloaded if it is a repository of the Hub.

    Args:
        name: a folder, or a Hub id (NAME/MODEL).
        patterns: of the files of a repository that are needed; neither code nor pickles.
        expected: what the folder should be of, for messages.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        OSError: it is neither, or can't be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise OSError(f"{name} is a file; expected the folder of {expected}.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise OSError(f"{name!r} is neither a folder here nor a Hub id (NAME/MODEL); expected {expected}.")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except Exception as error:  # of the Hub's client and of the network
        raise OSError(
            f"{name!r} is not a folder here, and could not be downloaded from the Hub: {error}\nCheck the spelling "
            f"and the network; expected {expected}."
        ) from error


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    before: Callable[[str], None] | None = None,
) -> str:
    """Upload a pipeline's folder to the Hub; returns the address of the commit.

    Args:
        folder: written by `save_pretrained`.
        repo_id: "name/model"; made if needed.
        private: whether a new repository is; None = as the account says.
        token: None = that of `hf auth login`.
        commit_message: None = a plain one.
        create_pr: propose the commit instead of making it.
        before: called with the repository's whole id before the upload.

    Raises:
        OSError: the Hub can't be reached, knows no such user, or refuses the upload.
    """
    try:
        repo = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if before is not None:
            before(repo)
        message = commit_message or "Upload an itarflow pipeline"
        return str(
            upload_folder(repo_id=repo, folder_path=folder, token=token, commit_message=message, create_pr=create_pr)
        )
    except Exception as error:  # of the Hub's client and of the network's
        raise OSError(
            f"The pipeline could not be uploaded to {repo_id!r}: {error}\nLog in by `hf auth login` with a "
            "token that may write there, and check the network and the name (NAME/MODEL)."
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline, of itarflow or of diffusers.

    Raises:
        OSError: there is none, or it is damaged.
    """
    if not (folder / INDEX).is_file():
        inner = folder / "pipeline"
        near = f"did you mean {inner}? " if (inner / INDEX).is_file() else ""
        raise OSError(
            f"{folder} holds no pipeline: {INDEX} is missing; {near}expected a folder written by save_pretrained, "
            "such as runs/NAME/pipeline. An official .pth file is turned into one by `itarflow convert`."
        )
    try:
        return read_json(folder / INDEX, dict[str, Any])
    except DataError as error:
        raise OSError(str(error)) from error


def rewrite_json(path: Path, changes: dict[str, Any], without: Sequence[str] = ()) -> None:
    """Put `changes` in, and remove the local path that diffusers records on loading, which is private."""
    content = {**read_json(path, dict[str, Any]), **changes}
    for name in ("_name_or_path", *without):
        content.pop(name, None)
    write_json(path, content)
