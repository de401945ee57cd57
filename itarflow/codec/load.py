"""An autoencoder from its folder, which may be anybody's."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.utils import is_transformers_available
from msgspec import Meta

from itarflow.codec.identity import check_own_scaling, own_scaling
from itarflow.codec.kinds import KINDS, Vae, kind_of
from itarflow.runtime.hub import folder_of
from itarflow.runtime.json_file import as_type, read_json
from itarflow.runtime.model_folder import (
    CONFIG,
    StoredTensor,
    check_bounded,
    check_finite,
    read_heads,
    read_weights,
    weight_files,
)
from itarflow.runtime.text import listed, printable

_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Settings of a VAE that `check_own_scaling` and `Kind.unfit` are for."""
_OTHERS = {
    "Video|Wan|QwenImage|CogVideo|LTX|Mochi|Allegro|Magvit|Cosmos|Temporal|VidTok": "which encodes videos",
    "Audio|Oobleck|Vocoder": "which encodes sound",
    "VQModel": "whose codes are words of a book",
    "AutoencoderKL.+|AsymmetricAutoencoderKL|ConsistencyDecoderVAE": "which is not among those that are known here",
}
"""Why classes of diffusers with such names don't fit."""


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """What the flow models: pixels, or the codes of an autoencoder."""

    vae: str | None = None
    """An autoencoder in diffusers' format, such as an AutoencoderKL: a folder, or a name on the Hub such as
    stabilityai/sd-vae-ft-ema. The flow then trains on codes that vae/encode_dataset.py has made with it.
    None = the flow models pixels."""
    revision: str | None = None
    """Branch, tag or commit of a VAE on the Hub."""
    scaling_factor: float | None = None
    """Codes are (latents - shift_factor) * scaling_factor. None = as the VAE's config says."""
    shift_factor: float | None = None
    """See scaling_factor. None = as the VAE's config says."""
    encoder: str | None = None
    """SHA-256 of the VAE's encoder, if another is to be refused. Need not be given: a run writes it down, with scaling
    and shift, so that it goes on with the same codes or not at all."""
    sample_posterior: bool = True
    """Draw the code anew from the VAE's posterior each time that an image is seen; off = its mean."""


def load_vae(config: CodecConfig, *, variant: str | None = None) -> Vae:
    """The VAE that a config names, in float32 on the CPU, with the config's scaling in its own config.

    A folder or repository of a whole pipeline gives the VAE in it. Only safetensors are read.

    Args:
        config: names it.
        variant: of the weights in a folder, such as "fp16"; None = the plain ones.

    Raises:
        OSError: there is no such VAE, or it is of another kind, or damaged.
        ValueError: the config names none, or a scaling factor, given or in the VAE's own config, is no number > 0.
    """
    if config.vae is None:
        raise ValueError("codec.vae is None; expected a folder or a Hub name of a VAE.")
    if config.scaling_factor is not None and not 0 < config.scaling_factor < float("inf"):
        raise ValueError(f"codec.scaling_factor is {config.scaling_factor}; expected a number > 0, or None.")
    try:
        vae = _checked_vae(_folder_of(config.vae, config.revision), variant)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of diffusers, the Hub's client and safetensors
        raise OSError(
            f"the VAE {config.vae!r} can't be loaded: {error}\nExpected a folder or a Hub name (NAME/MODEL) of a "
            f"VAE in diffusers' format, {CONFIG} and safetensors, of a class of {', '.join(KINDS)}; check the name, "
            "the network and the files."
        ) from error
    own = dict(zip(_SCALING, own_scaling(vae), strict=False))
    changes = {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}
    vae.register_to_config(**{key: value for key, value in changes.items() if value is not None and value != own[key]})
    check_own_scaling(vae, f"the VAE {config.vae!r} has a config.json whose ")
    return vae.eval().requires_grad_(False)


_Count: TypeAlias = Annotated[int, Meta(ge=1)]


class _VaeConfig(TypedDict, total=False):
    """What is read of a VAE's config besides its scaling, also by diffusers."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: list[int]
    encoder_block_out_channels: list[int]
    layers_per_block: _Count
    norm_num_groups: _Count
    down_block_types: list[str]
    up_block_types: list[str]
    force_upcast: bool
    mid_block_add_attention: bool
    sample_size: int | list[int] | None
    # of an AutoencoderDC
    attention_head_dim: _Count
    decoder_block_out_channels: list[int] | None
    encoder_layers_per_block: list[Annotated[int, Meta(ge=0)]]
    decoder_layers_per_block: list[Annotated[int, Meta(ge=0)]]
    # of an AutoencoderKLFlux2
    batch_norm_eps: Annotated[float, Meta(gt=0)]
    # of an AutoencoderRAE
    encoder_hidden_size: _Count
    encoder_patch_size: _Count
    encoder_num_hidden_layers: _Count
    encoder_input_size: _Count
    decoder_hidden_size: _Count
    decoder_num_hidden_layers: _Count
    decoder_num_attention_heads: _Count
    decoder_intermediate_size: _Count
    image_size: _Count | None
    num_channels: _Count
    noise_tau: float
    reshape_to_2d: bool


class _Flux2Config(_VaeConfig, total=False):
    patch_size: Annotated[list[_Count], Meta(min_length=2, max_length=2)]


class _RepresentationConfig(_VaeConfig, total=False):
    patch_size: _Count


_CONFIGS: dict[str, Any] = {"AutoencoderKLFlux2": _Flux2Config, "AutoencoderRAE": _RepresentationConfig}
"""Of the kinds that have a patch size, each in a form of its own."""


def _checked_vae(folder: Path, variant: str | None) -> Vae:
    """The VAE in a folder, which may be anybody's: nothing is filled in before config and heads of weights fit."""
    path = folder / CONFIG
    values = read_json(path, dict[str, Any])
    kind = _class_of(str(values.get("_class_name", "a model of unknown kind")))
    as_type(values, _CONFIGS.get(kind.__name__, _VaeConfig), str(path))
    heads = read_heads(files := weight_files(folder, variant))
    check_bounded({name: value for name, value in values.items() if name not in _SCALING}, heads, path)
    arguments = {name: values[name] for name in inspect.signature(kind).parameters if name in values}
    _check_size(kind, arguments, heads, path)
    if kind.__name__ == "AutoencoderRAE":
        vae = _renamed(kind, arguments, files)
        own = {name: values[name] for name in ("shift_factor",) if name in values}  # as from_pretrained keeps it
        vae.register_to_config(_name_or_path=str(folder), **own)
    else:  # not filled in piece by piece, because parts of an AutoencoderKL have changed their names over the years
        vae, report = kind.from_pretrained(
            folder, variant=variant, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
        if missing := report["missing_keys"]:  # which diffusers leaves uninitialised
            raise OSError(f"{len(missing)} tensors are missing, such as {missing[0]}")
        for name, tensor in vae.state_dict().items():
            check_finite(name, tensor, str(folder))
    if reason := kind_of(vae).unfit(vae):
        raise OSError(f"{path}: {reason}")
    return vae


def _class_of(name: str) -> type[Vae]:
    """The class of diffusers of that name, if it is one whose codes a flow can model; raises OSError."""
    if name not in KINDS:
        why = next((f", {why}" for pattern, why in _OTHERS.items() if re.search(pattern, name)), "")
        raise OSError(f"it is {printable(name)}{why}, as {CONFIG} says")
    if not hasattr(diffusers, name):
        raise OSError(f"it is {name}, which diffusers {diffusers.__version__} has not; pip install -U diffusers")
    if name == "AutoencoderRAE" and not is_transformers_available():
        raise OSError(f"it is {name}, whose encoder is of transformers; pip install transformers")
    found: type[Vae] = getattr(diffusers, name)
    return found


def _check_size(kind: type[Vae], arguments: Mapping[str, Any], heads: Mapping[str, StoredTensor], path: Path) -> None:
    """Refuse a config of another size than the weights are of; raises OSError."""
    try:
        with torch.device("meta"):  # without storage, so that a wrong size costs nothing
            expected = kind(**arguments).state_dict()
    except AttributeError as error:  # diffusers asks parts of transformers for what those have not
        raise OSError(f"this diffusers ({diffusers.__version__}) can't build it: {error}") from error
    ignored = kind._keys_to_ignore_on_load_unexpected or ()
    held, stored = (
        sum(math.prod(one.shape) for name, one in some.items() if name not in ignored) for some in (expected, heads)
    )
    if held != stored:  # counted, since names have changed
        missing = sorted(expected.keys() - heads.keys())
        lacking = f"; missing: {listed(missing)}" if missing else ""
        raise OSError(f"{path} is of a VAE of {held:,} numbers; its weights hold {stored:,}{printable(lacking)}")


def _renamed(kind: type[Vae], arguments: Mapping[str, Any], files: Sequence[Path]) -> Vae:
    """A VAE with the weights of files that another version of the libraries may have written; raises OSError."""
    with init_empty_weights():  # it has half a billion weights, and drawing them takes a minute
        vae = kind(**arguments)
    plain = kind_of(vae).plain_name
    stored = {plain(name): tensor.float() for name, tensor in read_weights(files).items()}
    names = {name: plain(name) for name in vae.state_dict()}
    if missing := [name for name in names if names[name] not in stored]:
        raise OSError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    vae.load_state_dict({name: stored[other] for name, other in names.items()}, assign=True)
    return vae


def _folder_of(name: str, revision: str | None) -> Path:
    """The folder with a VAE's config and weights, downloaded if need be; that of a whole pipeline has it in vae/."""
    files = ("config.json", "diffusion_pytorch_model.safetensors")
    patterns = [*files, *(f"vae/{file}" for file in files)]
    folder = folder_of(name, patterns, expected="a VAE", revision=revision)
    found = next((place for place in (folder, folder / "vae") if (place / "config.json").is_file()), None)
    if found is None:
        raise OSError(f"{folder} holds no config.json, nor does a folder vae in it")
    return found
