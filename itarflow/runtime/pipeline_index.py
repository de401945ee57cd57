"""What the folder of a pipeline says of itself in model_index.json: checked, whoever wrote it.

Its parts are made by this package, or are a VAE of diffusers, or a T5 encoder and a tokenizer of transformers. Nothing
else is looked up by name, so that a folder can't ask for other code, whatever the version of these libraries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from itarflow.runtime.errors import DataError
from itarflow.runtime.files import file_sha256
from itarflow.runtime.hub import INDEX, read_index
from itarflow.runtime.json_file import as_type
from itarflow.runtime.model_folder import TRANSFORMERS_WEIGHTS, WEIGHTS, weight_files
from itarflow.runtime.text import printable

CHECKSUMS = "_sha256"
"""Entry of model_index.json: the SHA-256 of each file of weights, by its path. diffusers leaves out what begins so."""
SHARED = "_shared"
"""Entry of model_index.json: the id of the repository on the Hub and the license, for the card; None where unknown."""
VAE_KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2", "AutoencoderRAE")
ENCODER, TOKENIZER = "text_encoder", "tokenizer"
TEXT_PARTS = {
    ENCODER: ("T5EncoderModel",),
    TOKENIZER: ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
}
"""The parts by which prompts are read, and their classes of transformers; what a tokenizer is called varies with its
version."""
IN_REPOSITORY = {
    "_class_name": ["pipeline", "ITARFlowPipeline"],
    "flow": ["modeling_flow", "TARFlow"],
    "scheduler": ["scheduling_denoise", "DenoiseScheduler"],
}
"""The classes as they are written: in modules of the repository, for diffusers' generic loader."""


class _Recipe(TypedDict, total=False):
    data: dict[str, Any]


class _Training(TypedDict, total=False):
    name: str
    data: str | None
    metrics: dict[str, float | None]
    recipe: _Recipe


class _Index(TypedDict, total=False):
    class_names: list[str] | None
    training: _Training | None
    guidance: dict[str, Any] | None
    plans: list[dict[str, Any]] | None
    evaluations: dict[str, str] | None
    _sha256: dict[str, str]
    _shared: dict[str, str | None]


_DEEPEST = 32  # a recipe has 4 levels
MEASURED = ("plans", "evaluations")
"""Entries that commands add to an index: what they found with its weights."""
SETTINGS = ("guidance", "class_names", "training", *MEASURED)
"""What an index holds besides the parts: arguments of the pipeline."""


def pipeline_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of an itarflow pipeline.

    Raises:
        OSError: there is none, or it is of another kind of pipeline, or its weights are pickles.
        DataError: it is damaged, or names a class that is none of a pipeline's parts.
    """
    index, place = read_index(folder), printable(str(folder / INDEX))
    if not {"flow", "scheduler"} <= index.keys():
        raise OSError(
            f"{folder} holds a pipeline of another kind ({printable(str(index.get('_class_name', 'unknown')))}); "
            f"expected an ITARFlowPipeline, with a flow and a scheduler in its {INDEX}. Load it with diffusers, "
            "or choose another checkpoint."
        )
    for part, (_, kind) in IN_REPOSITORY.items():
        _check_class(place, part, index.get(part), kind)
    if vae_kind(index) is not None and index["vae"] not in [["diffusers", kind] for kind in VAE_KINDS]:
        raise DataError(
            f"{place} names {printable(str(index['vae']))} as vae; expected one of {', '.join(VAE_KINDS)} of "
            "diffusers. Other classes are not looked for; take another checkpoint."
        )
    for part in text_parts(index):
        if index[part] not in [["transformers", kind] for kind in TEXT_PARTS[part]]:
            raise DataError(
                f"{place} names {printable(str(index[part]))} as {part}; expected {' or '.join(TEXT_PARTS[part])} of "
                "transformers. Other classes are not looked for; take another checkpoint."
            )
    if _depth(index) > _DEEPEST:
        raise DataError(f"{place} is damaged: it is nested deeper than {_DEEPEST} levels; copy or download it again")
    as_type(index, _Index, place)
    for part in ("flow", ENCODER):
        check_no_pickle(folder / part)
    return index


def vae_kind(index: Mapping[str, Any]) -> Any:
    """What an index names as the VAE's class; None = the flow models pixels."""
    return None if index.get("vae") in (None, [None, None]) else index["vae"]


def text_parts(index: Mapping[str, Any]) -> list[str]:
    """Those of `TEXT_PARTS` that an index names."""
    return [part for part in TEXT_PARTS if index.get(part) not in (None, [None, None])]


def check_no_pickle(folder: Path) -> None:
    """Refuse weights that are pickles alone; raises OSError."""
    weights = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pth")]
    if weights and not any(name.endswith(".safetensors") for name in weights):
        raise OSError(
            f"The weights in {folder} are a pickle ({printable(weights[0])}), which could run code and is never read. "
            "Ask for a safetensors version; an official .pth file is turned into one by `itarflow convert`."
        )


def checked_files(folder: Path, part: str, index: Mapping[str, Any], variant: str | None = None) -> list[Path]:
    """The files of a part's weights, compared with the checksums that the index holds; older indices hold none.

    Args:
        folder: of the pipeline.
        part: "flow", "vae" or "text_encoder".
        index: of the pipeline.
        variant: of the weights.

    Raises:
        OSError: there are none of that variant.
        DataError: a file is not the one that the index tells of.
    """
    files = weight_files(folder / part, variant, TRANSFORMERS_WEIGHTS if part == ENCODER else WEIGHTS)
    for file in files:
        expected = index.get(CHECKSUMS, {}).get(f"{part}/{file.name}")
        if expected is not None and file_sha256(file) != expected:
            raise DataError(
                f"{file} is not the file that {INDEX} tells of: its SHA-256 is another, so it is damaged or was "
                "exchanged. Copy or download the folder again."
            )
    return files


def _depth(value: Any) -> int:
    """How deeply lists and dicts are nested in a value; without recursion, which has a limit."""
    depth, level = 0, [value]
    while level := [entry for one in level if isinstance(one, list | dict)
                    for entry in (one.values() if isinstance(one, dict) else one)]:  # fmt: skip
        depth += 1
    return depth


def _check_class(place: str, part: str, named: Any, kind: str) -> None:
    """Refuse a class that is not the package's, by whatever module it is named."""
    module, name = named if isinstance(named, list) and len(named) == 2 else (None, named)
    ours = module in (None, IN_REPOSITORY[part][0]) or re.fullmatch(r"itarflow(\.\w+)*", str(module)) is not None
    if name != kind or not ours:
        raise DataError(
            f"{place} names {printable(str(named))} as {part}; expected {kind} of itarflow. Other classes are not "
            "looked for, and no code of a checkpoint is run; take another checkpoint."
        )
