"""How a pipeline is stored in a folder, loaded from one or from the Hub, and shared there."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import nn

from itarflow.denoisers.load import stored_flow, stored_vae
from itarflow.denoisers.ode import DenoiseScheduler
from itarflow.inverse.guidance import Guidance
from itarflow.pipeline.folder import (
    CARD,
    PARTS,
    check_no_links,
    finish_folder,
    is_free,
    kept_entries,
    locked_folder,
    put_in_place,
    staged,
)
from itarflow.pipeline.model_card import PICTURE, signed
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import write_json, write_text
from itarflow.runtime.hub import INDEX, folder_of, read_index, rewrite_json, upload
from itarflow.runtime.model_folder import (
    DOWNLOAD,
    read_arguments,
)
from itarflow.runtime.pipeline_index import (
    ENCODER,
    SETTINGS,
    SHARED,
    TEXT_PARTS,
    checked_files,
    pipeline_index,
    text_parts,
)
from itarflow.runtime.text import listed, printable
from itarflow.text_encoder import load_encoder, load_tokenizer

logger = logging.get_logger(__name__)
T = TypeVar("T")

_FILES = ("*.json", "*.safetensors", CARD)
_EXPECTED = (
    "a pipeline, such as runs/NAME/pipeline of a finished training run; an official .pth file is turned into one by "
    "`itarflow convert`"
)


class StoredPipeline(DiffusionPipeline):
    """A diffusers pipeline without pickles and without code in its repository; see `ITARFlowPipeline`."""

    def model_card(self, repo_id: str | None = None, license: str | None = None, picture: bool = False) -> Any:  # noqa: A002
        """The card that is stored with it, a `huggingface_hub.ModelCard`."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        *,
        picture: Image.Image | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the pipeline: safetensors, configs, a model card, and shims for diffusers' generic loader.

        Of an older pipeline in the folder nothing is left, but for weights of other variants and for a model card
        that was written by hand. Links to files are replaced, not followed.

        Args:
            save_directory: a folder; made if needed.
            safe_serialization: as in diffusers, but False, which would write a pickle, is refused.
            picture: samples, for the card; None = the one that is there stays.
            kwargs: as in diffusers, such as `variant` and `max_shard_size`; `push_to_hub` is refused.

        Raises:
            OSError: it can't be written, or a folder in it is a link to another one.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; itarflow only writes safetensors.")
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "push_to_hub=True is not an option of save_pretrained here; call pipe.push_to_hub(repo_id)."
            )
        folder = Path(save_directory)
        check_no_links(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with locked_folder(folder), staged(folder) as stage:
            super().save_pretrained(stage, **kwargs)
            _open_to_readers(stage)
            finish_folder(stage, kept_entries(folder))
            if picture is not None:
                picture.save(stage / PICTURE)
            put_in_place(stage, folder, kwargs.get("variant"))
            if is_free(folder / CARD):
                self._write_card(folder)
            else:
                logger.warning(f"{folder / CARD} was written by hand and stays as it is.")

    def _write_card(self, folder: Path) -> None:
        """Write the card of what a folder holds."""
        shared = read_index(folder).get(SHARED) or {}
        card = self.model_card(shared.get("repo_id"), shared.get("license"), (folder / PICTURE).is_file())
        write_text(folder / CARD, signed(str(card)))

    def record(self, folder: Path, name: str, change: Callable[[Any], Any]) -> bool:
        """Change a setting of this pipeline and of the folder that it was loaded from, with its model card.

        Commands that do so at the same time wait for one another, so that no note is lost. The card is a function of
        the index: one that is behind it, because a call was killed in between, is brought up to date.

        Args:
            folder: of the pipeline.
            name: of the setting, an argument of the pipeline.
            change: gives the new value for the one that the folder holds, which may be None.

        Returns:
            Whether the card was written: one that was edited by hand stays as it is.

        Raises:
            OSError: the folder can't be written, or another command is writing into it for long.
        """
        with locked_folder(folder):
            index = read_index(folder)
            index[name] = change(index.get(name))
            self.register_to_config(**{key: index[key] for key in SETTINGS if key in index})
            write_json(folder / INDEX, index)
            generated = is_free(folder / CARD)
            if generated:
                self._write_card(folder)
        return generated

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load from a folder or a Hub repository. No code from the repository is run, and no pickle is read.

        Weights are compared with the checksums in model_index.json, where it has some. Names of solvers and guidance
        rules that are not known here are replaced by the defaults, with a warning.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a Hub id ("name/model").
            kwargs: `torch_dtype` (or `dtype`): of the weights, one or {"vae": ..., "default": ...}; `variant`, such
                as "fp16"; `device_map`: a device; arguments of the pipeline, such as another `scheduler`, which
                replace those of the folder (`text_encoder=None` leaves out its tokenizer, too); `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download` and `proxies` guide the download.

        Raises:
            OSError: there is no such folder or repository, or it holds no pipeline, or one that is damaged.
            ValueError: an option that is not known here.
        """
        options = {name: kwargs.pop(name) for name in DOWNLOAD if name in kwargs}
        given = {name: kwargs.pop(name) for name in inspect.signature(cls.__init__).parameters if name in kwargs}
        dtypes = _dtypes(kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None))
        variant, device = kwargs.pop("variant", None), kwargs.pop("device_map", None)
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False would read a pickle, which can run code; leave it out.")
        kwargs.pop("low_cpu_mem_usage", None)  # how it is loaded anyway
        if kwargs:
            raise ValueError(f"{listed(kwargs)} is no option of {cls.__name__}.from_pretrained; leave it out.")
        name = str(pretrained_model_name_or_path)
        folder = folder_of(name, _FILES, expected=_EXPECTED, **options)
        try:
            index = pipeline_index(folder)
            text_dtype, flow_dtype = (dtypes.get(part, dtypes.get("default")) for part in (ENCODER, "flow"))
            parts = _parts(folder, index, given, variant, flow_dtype) | _text_parts(
                folder, index, given, variant, text_dtype
            )
            settings = {key: index[key] for key in SETTINGS if key in index} | given
            if settings.get("guidance") is not None and "guidance" not in given:
                settings["guidance"] = _guidance(settings["guidance"], folder)
            for part, dtype in ((part, dtypes.get(part, dtypes.get("default"))) for part in ("flow", "vae")):
                if dtype is not None and parts[part] is not None and part not in given:
                    nn.Module.to(parts[part], dtype)  # diffusers' own warns of what does not concern us
            pipeline = _built(cls, {**settings, **parts}, folder)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            told = isinstance(error, DataError | ImportError) or (isinstance(error, OSError) and error.errno is None)
            advice = "" if told else "\nIf a file is truncated or missing, copy or download the folder again."
            raise OSError(f"The pipeline in {folder} can't be loaded: {error}{advice}") from error
        pipeline.register_to_config(_name_or_path=name)
        return pipeline if device is None else pipeline.to(device)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **kwargs: Any) -> str:  # noqa: A002
        """Upload the pipeline with its model card; returns the address of the commit.

        Args:
            repo_id: "name/model"; made if needed.
            license: of the weights, an identifier of the Hub such as "mit" or "cc-by-nc-4.0"; None = the card names
                none.
            kwargs: `private`, `token`, `commit_message`, `create_pr`, and options of `save_pretrained`.

        Raises:
            OSError: the Hub can't be reached, knows no such user, or refuses the upload.
            ValueError: another license than the one that converted weights keep.
        """
        self.model_card(license=license)  # before anything is made
        options = {
            name: kwargs.pop(name) for name in ("private", "token", "commit_message", "create_pr") if name in kwargs
        }
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            self.save_pretrained(folder, **kwargs)

            def describe(repo: str) -> None:
                rewrite_json(folder / INDEX, {SHARED: {"repo_id": repo, "license": license}})
                self._write_card(folder)

            return upload(folder, repo_id, before=describe, **options)


def _parts(
    folder: Path, index: Mapping[str, Any], given: Mapping[str, Any], variant: str | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Flow, scheduler and VAE, those that are not given read from the folder."""
    parts = {name: given[name] for name in PARTS if name in given}
    if "scheduler" not in parts:
        path = folder / "scheduler" / DenoiseScheduler.config_name
        arguments = read_arguments(path, DenoiseScheduler.__init__)
        try:
            parts["scheduler"] = DenoiseScheduler.from_config(arguments)
        except ValueError as error:
            raise DataError(f"{printable(str(path))} is damaged: {printable(str(error))}") from error
    if "flow" not in parts:
        parts["flow"] = stored_flow(folder, index, variant, dtype)
    if "vae" not in parts:
        parts["vae"] = stored_vae(folder, index, variant)
    return parts


def _text_parts(
    folder: Path, index: Mapping[str, Any], given: Mapping[str, Any], variant: str | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Text encoder and tokenizer, as `_parts`; None if the index names none."""
    parts = {name: given[name] for name in TEXT_PARTS if name in given}
    if parts and all(part is None for part in parts.values()):  # one as None is enough
        return dict.fromkeys(TEXT_PARTS)
    try:
        for name in text_parts(index):
            if name not in parts and name == ENCODER:
                checked_files(folder, name, index, variant)
                parts[name] = load_encoder(folder / name, variant, dtype)
            elif name not in parts:
                parts[name] = load_tokenizer(folder / name)
    except ImportError as error:
        raise ImportError(f"{error}, or load the pipeline without: from_pretrained(..., text_encoder=None)") from error
    return parts


def _guidance(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The guidance of an index, as arguments of `Guidance` that it knows."""
    where = f"{printable(str(folder / INDEX))}: guidance"
    try:
        known = Guidance.from_json(values)
    except ValueError as error:
        raise DataError(f"{where} is damaged: {printable(str(error))}") from error
    return {name: getattr(known, name) for name in values}


def _built(kind: Callable[..., T], arguments: Mapping[str, Any], folder: Path) -> T:
    try:
        return kind(**arguments)
    except ValueError as error:
        raise DataError(f"{printable(str(folder / INDEX))} does not fit the flow: {printable(str(error))}") from error


def _dtypes(given: Any) -> dict[str, torch.dtype]:
    """The dtypes that a call asks for, by part; "default" for the others."""
    asked = given if isinstance(given, dict) else {} if given is None else {"default": given}
    if wrong := [one for one in asked.values() if not isinstance(one, torch.dtype)]:
        raise ValueError(f"torch_dtype is {wrong[0]!r}; expected a torch.dtype, such as torch.bfloat16.")
    return asked


def _open_to_readers(folder: Path) -> None:
    """Give weights the permissions of the index; some versions of safetensors let their owner alone read them."""
    mode = (folder / INDEX).stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)
