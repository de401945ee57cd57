"""Denoisers by name: another flow, or a diffusion model in diffusers' format."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiTTransformer2DModel, SchedulerMixin, UNet2DModel
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

from itarflow.codec import CodecConfig, Vae, check_same_codes, load_vae
from itarflow.denoisers.diffusion import DiffusionDenoiser
from itarflow.denoisers.score import FlowDenoiser
from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.devices import sampling_dtype
from itarflow.runtime.hub import folder_of, read_index
from itarflow.runtime.json_file import read_json
from itarflow.runtime.model_folder import (
    CONFIG,
    check_bounded,
    check_finite,
    check_like_defaults,
    read_heads,
    weight_files,
)
from itarflow.runtime.pipeline_index import checked_files, pipeline_index, vae_kind

_MODELS: dict[str, type[DiTTransformer2DModel] | type[UNet2DModel]] = {
    "transformer": DiTTransformer2DModel,
    "unet": UNet2DModel,
}
_EXPECTED = (
    "a pipeline, such as runs/NAME/pipeline, or a diffusion model in diffusers' format, such as facebook/DiT-XL-2-256"
)


def load_denoiser(
    name: str,
    *,
    vae: Vae | None = None,
    slice_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> FlowDenoiser | DiffusionDenoiser:
    """The denoiser in a folder or a repository of the Hugging Face Hub.

    Args:
        name: a folder, or a Hub id (NAME/MODEL), of an itarflow pipeline, whose flow then denoises; or of a diffusers
            pipeline with a DiTTransformer2DModel or a UNet2DModel and its scheduler, as of DiTPipeline, DDPMPipeline
            or DDIMPipeline. Of such a one only these two are read, and of their weights only safetensors.
        vae: whose codes are to be denoised; a flow of another VAE's is refused. None = pixels, or not known.
        slice_size: images that are denoised at a time, which bounds the memory; None = all.
        dtype: of a flow's layers, see `FlowDenoiser`; None = bfloat16 on GPUs, see `sampling_dtype`, else as stored.
        device: where it computes.

    Raises:
        OSError: there is no such folder or repository, it holds neither, or its weights are damaged or pickles.
        ValueError: slice_size < 1, a flow of another VAE's codes, a diffusion model of a kind that
            `DiffusionDenoiser` refuses, or a dtype for one.
    """
    folder = folder_of(name, ["*.json"], expected=_EXPECTED)
    index = read_index(folder)
    if "flow" in index:
        flow = _flow(name, vae).to(device)
        return FlowDenoiser(flow, slice_size, dtype=dtype or sampling_dtype(flow.device, flow.dtype))
    part = next((part for part in _MODELS if _class_of(index, part) == _MODELS[part].__name__), None)
    if part is None or _class_of(index, "scheduler") is None:
        found = [f"{part}: {_class_of(index, part)}" for part in (*_MODELS, "scheduler") if _class_of(index, part)]
        kind = index.get("_class_name", "pipeline of unknown kind")
        raise OSError(
            f"{name} holds a {kind} ({', '.join(found) or 'neither'}); expected a transformer "
            "(DiTTransformer2DModel) or a unet (UNet2DModel), and a scheduler of diffusers, as of a DiTPipeline or "
            "DDPMPipeline; or a pipeline of itarflow."
        )
    if dtype is not None:
        raise ValueError(
            f"the denoiser {name} is a diffusion model, and {dtype} is for flows, whose score it makes cheaper; leave "
            "it out."
        )
    weights = "diffusion_pytorch_model*.safetensors"
    files = ["*.json", weights, *(f"{part}/{weights}" for part in _MODELS)]
    folder = folder_of(name, files, expected=_EXPECTED, ignore_patterns=["*.fp16*", "vae/*"])
    try:
        scheduler = _scheduler(folder, str(_class_of(index, "scheduler")))
        model = _model(folder, part, name)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of diffusers and safetensors
        raise _damaged("diffusion model", name, error) from error
    return DiffusionDenoiser(model.to(device), scheduler, slice_size=slice_size)


def _flow(name: str, vae: Vae | None) -> TARFlow:
    """The flow of an itarflow pipeline, whose codes must be those of `vae` if both have one."""
    folder = folder_of(name, ["*.json", "*.safetensors"], expected=_EXPECTED)
    try:
        index = pipeline_index(folder)
        own = None if vae is None else stored_vae(folder, index)
        flow = stored_flow(folder, index)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of diffusers and safetensors
        raise _damaged("flow", name, error) from error
    if vae is not None and own is not None:
        check_same_codes(name, own, vae)
    return flow


def stored_flow(
    folder: Path, index: Mapping[str, Any], variant: str | None = None, dtype: torch.dtype | None = None
) -> TARFlow:
    """The flow in a pipeline's folder, if its weights are those that the index tells of.

    Args:
        folder: of the pipeline.
        index: from `pipeline_index`.
        variant: of the weights; None = the plain ones.
        dtype: of the weights; None = float32. Those that are stored in it are mapped from the disk, not copied.

    Raises:
        OSError: there are none.
        ValueError: they are damaged, or not those of the config.
    """
    checked_files(folder, "flow", index, variant)
    return TARFlow.from_pretrained(folder / "flow", variant=variant, dtype=dtype)


def stored_vae(folder: Path, index: Mapping[str, Any], variant: str | None = None) -> Vae | None:
    """The VAE in a pipeline's folder, None if its index names none; arguments and errors as of `stored_flow`."""
    if vae_kind(index) is None:
        return None
    checked_files(folder, "vae", index, variant)
    return load_vae(CodecConfig(vae=str(folder / "vae")), variant=variant)


def _damaged(kind: str, name: str, error: Exception) -> OSError:
    return OSError(
        f"the {kind} {name!r} can't be loaded: {error}\nIf a file is truncated or missing, copy or download the "
        "folder again."
    )


def _class_of(index: dict[str, Any], part: str) -> str | None:
    """The class of diffusers that a part of a pipeline is of; None if there is no such part, or of another library."""
    named = index.get(part)
    if isinstance(named, list) and len(named) == 2 and named[0] == "diffusers" and isinstance(named[1], str):
        return named[1]
    return None


def _place(folder: Path, part: str) -> Path:
    """Where a part's files are; in old repositories of diffusers, beside the index."""
    return folder / part if (folder / part).is_dir() else folder


def _scheduler(folder: Path, kind: str) -> SchedulerMixin:
    known = getattr(diffusers, kind, None)
    if not inspect.isclass(known) or not issubclass(known, SchedulerMixin):
        raise OSError(f"{kind} is no scheduler of the installed diffusers {diffusers.__version__}")
    scheduler, path = cast(Any, known), _place(folder, "scheduler") / SCHEDULER_CONFIG_NAME
    config = read_json(path, dict[str, Any])
    check_like_defaults(config, known.__init__, str(path))
    betas = config.get("trained_betas")
    if not (betas is None or isinstance(betas, list)):
        raise OSError(f"{path} is damaged: trained_betas is no list")
    return scheduler.from_config(config)


def _model(folder: Path, part: str, name: str) -> DiTTransformer2DModel | UNet2DModel:
    place = _place(folder, part)
    if not any(place.glob("*.safetensors")):
        raise OSError(
            f"there are no safetensors in its {part}, only, perhaps, a pickle (.bin), which could run code and is "
            "never read here. Convert it once, if you trust it, and name the new folder:\n"
            f"  python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('{name}', "
            "use_safetensors=False).save_pretrained('converted')\""
        )
    files, config = weight_files(place), place / CONFIG
    values = read_json(config, dict[str, Any])
    check_like_defaults(values, _MODELS[part].__init__, str(config))
    check_bounded(values, read_heads(files), config)
    model, report = _MODELS[part].from_pretrained(place, use_safetensors=True, output_loading_info=True)
    if report["missing_keys"]:  # which diffusers fills up at random
        raise OSError(f"{len(report['missing_keys'])} tensors of its {part} are missing: {report['missing_keys'][0]}")
    for key, tensor in model.state_dict().items():
        check_finite(key, tensor, str(place))
    return model
