"""What lies in a pipeline's folder, here or on the Hub, beside what diffusers writes and reads itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itarflow.runtime.hub import INDEX, read_index, rewrite_json

# Where our classes are found. diffusers' generic loader, given a Hub id, only looks for modules in the repository:
# so there are one-line modules for those who use it and trust remote code. Ours needs neither, but
# modules that hold the mixins of diffusers too, by which it knows how to load a class.
_INSTALLED = {
    "flow": ["itarflow.flow.tarflow", "TARFlow"],
    "scheduler": ["itarflow.denoisers.ode", "DenoiseScheduler"],
}
_IN_REPOSITORY = {
    "_class_name": ["pipeline", "ITARFlowPipeline"],
    "flow": ["modeling_flow", "TARFlow"],
    "scheduler": ["scheduling_denoise", "DenoiseScheduler"],
}
_MODULES = {
    "pipeline.py": "from itarflow import ITARFlowPipeline  # noqa: F401\n",
    "flow/modeling_flow.py": "from itarflow import TARFlow  # noqa: F401\n",
    "scheduler/scheduling_denoise.py": "from itarflow import DenoiseScheduler  # noqa: F401\n",
}


def finish_folder(folder: Path) -> None:
    """Make a folder that diffusers has written loadable by its generic loader too, and free of private paths."""
    rewrite_json(folder / INDEX, _IN_REPOSITORY)
    rewrite_json(folder / "flow" / "config.json", {})
    if (folder / "vae").is_dir():
        finish_vae(folder / "vae")
    for name, source in _MODULES.items():
        (folder / name).write_text(source)


def finish_vae(folder: Path) -> None:
    """Free the folder of a VAE, as diffusers has written it, of private paths and of a setting that is none."""
    config = json.loads((folder / "config.json").read_text())
    # An AutoencoderTiny writes this, and on loading warns that it does not know it.
    without = ("block_out_channels",) if config["_class_name"] == "AutoencoderTiny" else ()
    rewrite_json(folder / "config.json", {}, without)


def foreign_entries(folder: Path) -> list[str]:
    """Names in a folder that are not of a pipeline, in order."""
    ours = {INDEX, "README.md", ".gitattributes", "vae", *(Path(name).parts[0] for name in (*_MODULES, *_INSTALLED))}
    return sorted(path.name for path in folder.iterdir() if path.name not in ours)


def installed_classes(index: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in a model_index.json so that the installed package's classes are loaded."""
    return {"_class_name": "ITARFlowPipeline", **_INSTALLED} if "flow" in index else {}


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
