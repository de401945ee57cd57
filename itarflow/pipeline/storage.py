"""How a pipeline is stored in a folder, loaded from one or from the Hub, and shared there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from itarflow.codec import CodecConfig, load_vae
from itarflow.runtime.files import write_json
from itarflow.runtime.hub import INDEX, check_pipeline_folder, folder_of, read_index, rewrite_json, upload

_FILES = ("*.json", "*.safetensors", "README.md")
_EXPECTED = (
    "a pipeline, such as runs/NAME/pipeline of a finished training run; an official .pth file is turned into one by "
    "`itarflow convert`"
)


class StoredPipeline(DiffusionPipeline):
    """A diffusers pipeline without pickles and without code in its repository; see `ITARFlowPipeline`."""

    def model_card(self) -> Any:
        """The card that is stored with it, a `huggingface_hub.ModelCard`."""
        raise NotImplementedError

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write the pipeline: safetensors, configs, a model card, and shims for diffusers' generic loader.

        Args:
            save_directory: a folder; made if needed.
            safe_serialization: as in diffusers, but False, which would write a pickle, is refused.
            kwargs: as in diffusers; `push_to_hub` is refused.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; itarflow only writes safetensors.")
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "push_to_hub=True is not an option of save_pretrained here; call pipe.push_to_hub(repo_id)."
            )
        folder = Path(save_directory)
        super().save_pretrained(folder, **kwargs)
        finish_folder(folder)
        self.model_card().save(folder / "README.md")

    def record(self, folder: Path, name: str, value: Any) -> bool:
        """Set a setting of this pipeline, and of the folder that it was loaded from, with its model card.

        Returns:
            Whether the card was written: one that was edited by hand stays as it is.
        """
        card = folder / "README.md"
        generated = not card.exists() or card.read_text() == str(self.model_card())
        self.register_to_config(**{name: value})
        write_json(folder / "model_index.json", {**read_index(folder), name: value})
        if generated:
            self.model_card().save(card)
        return generated

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, but names the installed package's classes instead of a repository's shims."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config |= installed_classes(config)
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load from a folder or a Hub repository. No code from the repository is run, and no pickle is read.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a Hub id ("name/model").
            kwargs: as in diffusers; `revision`, `token`, `cache_dir` and `local_files_only` also guide the download.

        Raises:
            OSError: there is no such folder or repository, or it holds no pipeline, or its weights are damaged.
        """
        names = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        folder = folder_of(str(pretrained_model_name_or_path), _FILES, expected=_EXPECTED, **options)
        check_pipeline_folder(folder)
        try:
            if (folder / "vae").is_dir() and "vae" not in kwargs:
                # Not by diffusers, which would fill missing tensors with random values.
                vae = load_vae(CodecConfig(vae=str(folder / "vae")))
                given = kwargs.get("torch_dtype", kwargs.get("dtype"))
                wanted = given.get("vae", given.get("default")) if isinstance(given, dict) else given
                kwargs["vae"] = vae.to(wanted) if isinstance(wanted, torch.dtype) else vae
            return super().from_pretrained(folder, **{"use_safetensors": True, **kwargs})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise OSError(
                f"The pipeline in {folder} can't be loaded: {error}\nIf a file is truncated or missing, copy or "
                "download the folder again."
            ) from error

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the pipeline with its model card; returns the address of the commit.

        Args:
            repo_id: "name/model"; made if needed.
            kwargs: `private`, `token`, `commit_message`, `create_pr`, and options of `save_pretrained`.

        Raises:
            OSError: the Hub can't be reached, knows no such user, or refuses the upload.
        """
        options = {
            name: kwargs.pop(name) for name in ("private", "token", "commit_message", "create_pr") if name in kwargs
        }
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return upload(Path(folder), repo_id, **options)


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
    """Free the folder of a VAE, as diffusers has written it, of private paths and of an invalid setting."""
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
