"""What lies in a pipeline's folder, here or on the Hub, beside what diffusers writes and reads itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, snapshot_download, upload_folder

_INDEX = "model_index.json"

# Where our classes are found. diffusers' generic loader, given a Hub id, only looks for modules in the repository:
# so there are one-line modules for those who use it and trust remote code. Ours needs neither.
_INSTALLED = {"flow": ["itarflow.flow", "TARFlow"], "scheduler": ["itarflow.denoise", "DenoiseScheduler"]}
_IN_REPOSITORY = {
    "_class_name": ["pipeline", "ITARFlowPipeline"],
    "flow": ["modeling_flow", "TARFlow"],
    "scheduler": ["scheduling_denoise", "DenoiseScheduler"],
}
_MODULES = {
    "pipeline.py": "from itarflow.pipeline import ITARFlowPipeline  # noqa: F401\n",
    "flow/modeling_flow.py": "from itarflow.flow import TARFlow  # noqa: F401\n",
    "scheduler/scheduling_denoise.py": "from itarflow.denoise import DenoiseScheduler  # noqa: F401\n",
}


def finish_folder(folder: Path) -> None:
    """Make a folder that diffusers has written loadable by its generic loader too, and free of private paths."""
    _rewrite_json(folder / _INDEX, _IN_REPOSITORY)
    _rewrite_json(folder / "flow" / "config.json", {})
    if (folder / "vae").is_dir():
        finish_vae(folder / "vae")
    for name, source in _MODULES.items():
        (folder / name).write_text(source)


def write_setting(folder: Path, name: str, value: Any) -> None:
    """Set a setting of the pipeline in a folder, whole or not at all."""
    partial = folder / f".partial-{_INDEX}"
    partial.write_text((folder / _INDEX).read_text())
    _rewrite_json(partial, {name: value})
    os.replace(partial, folder / _INDEX)


def finish_vae(folder: Path) -> None:
    """Free the folder of a VAE, as diffusers has written it, of private paths and of a setting that is none."""
    config = json.loads((folder / "config.json").read_text())
    # An AutoencoderTiny writes this, and on loading warns that it does not know it.
    without = ("block_out_channels",) if config["_class_name"] == "AutoencoderTiny" else ()
    _rewrite_json(folder / "config.json", {}, without)


def foreign_entries(folder: Path) -> list[str]:
    """Names in a folder that are not of a pipeline, in order."""
    ours = {_INDEX, "README.md", ".gitattributes", "vae", *(Path(name).parts[0] for name in (*_MODULES, *_INSTALLED))}
    return sorted(path.name for path in folder.iterdir() if path.name not in ours)


def installed_classes(index: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in a model_index.json so that the installed package's classes are loaded."""
    return {"_class_name": "ITARFlowPipeline", **_INSTALLED} if "flow" in index else {}


def download(repo_id: str, options: dict[str, Any]) -> Path:
    """Bring a Hub repository's weights and settings here, but neither its code nor pickles.

    Args:
        repo_id: "name/model".
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        OSError: it is no Hub id, or can't be downloaded.
    """
    if Path(repo_id).is_file():
        raise OSError(
            f"{repo_id} is a file; expected the folder of a pipeline. An official .pth file is turned into one by "
            "`itarflow convert`."
        )
    looks_local = repo_id.startswith((".", "/", "~")) or repo_id.count("/") != 1
    if looks_local:
        raise OSError(
            f"{repo_id!r} is neither a folder here nor a Hub id (NAME/MODEL). A finished training run has its "
            "pipeline in runs/NAME/pipeline."
        )
    try:
        patterns = ["*.json", "*.safetensors", "README.md"]
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **options))
    except Exception as error:
        raise OSError(
            f"{repo_id!r} is not a folder here, and could not be downloaded from the Hub: {error}\nCheck the "
            "spelling. A finished training run has its pipeline in runs/NAME/pipeline."
        ) from error


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a pipeline's folder to the Hub; returns the address of the commit.

    Args:
        folder: written by `save_pretrained`.
        repo_id: "name/model"; made if needed.
        private: whether a new repository is; None = as the account says.
        token: None = that of `hf auth login`.
        commit_message: None = a plain one.
        create_pr: propose the commit instead of making it.

    Raises:
        OSError: the Hub can't be reached, knows no such user, or refuses the upload.
    """
    try:
        repo = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
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
    """What the model_index.json of a pipeline, of ours or of diffusers, names.

    Raises:
        OSError: there is none, or it is damaged.
    """
    if not (folder / _INDEX).is_file():
        raise OSError(
            f"{folder} holds no pipeline: {_INDEX} is missing. Expected a folder written by save_pretrained, "
            "such as runs/NAME/pipeline. An official .pth file is turned into one by `itarflow convert`."
        )
    try:
        index = json.loads((folder / _INDEX).read_text())
        if not isinstance(index, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise OSError(f"{folder / _INDEX} is damaged: {error}. Copy or download the folder again.") from error
    return index


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no pipeline of ours, or whose weights are pickles.

    Raises:
        OSError: saying what the folder holds instead.
    """
    index = read_index(folder)
    if not _INSTALLED.keys() <= index.keys():
        raise OSError(
            f"{folder} holds a pipeline of another kind ({index.get('_class_name', 'unknown')}); expected an "
            "ITARFlowPipeline, with a flow and a scheduler. Load it with diffusers, or choose another checkpoint."
        )
    weights = [path.name for path in (folder / "flow").glob("*") if path.suffix in (".safetensors", ".bin", ".pth")]
    if weights and not any(name.endswith(".safetensors") for name in weights):
        raise OSError(
            f"The weights in {folder / 'flow'} are a pickle ({weights[0]}), which could run code and is never read. "
            "Ask for a safetensors version; an official .pth file is turned into one by `itarflow convert`."
        )


def _rewrite_json(path: Path, changes: dict[str, Any], without: Sequence[str] = ()) -> None:
    """Put `changes` in, and take out the path that diffusers notes on loading: it is nobody else's business."""
    content = {**json.loads(path.read_text()), **changes}
    for name in ("_name_or_path", *without):
        content.pop(name, None)
    path.write_text(json.dumps(content, indent=2) + "\n")
