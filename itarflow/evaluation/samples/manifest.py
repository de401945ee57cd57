"""samples.json: what the samples in a folder are, all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import as_type, read_json

MANIFEST = "samples.json"


class _Content(TypedDict):
    """What is read of a manifest; the rest is compared as it is."""

    num_samples: Annotated[int, Meta(ge=1)]
    cleaning: dict[str, dict[str, Any]]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's samples.json; None = there is none.

    Raises:
        DataError: it is damaged.
    """
    path = folder / MANIFEST
    try:
        stored = read_json(path, dict[str, Any])
    except FileNotFoundError:
        return None
    as_type(stored, _Content, str(path))
    return stored


def origin_of(manifest: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """All that the samples of a variant depend on, other variants left out; raises DataError if it has none such."""
    if variant not in manifest["cleaning"]:
        known = ", ".join(manifest["cleaning"])
        raise DataError(f"{MANIFEST} knows no samples {variant!r}, but {known}; make them by `itarflow evaluate`.")
    return {**manifest, "cleaning": manifest["cleaning"][variant]}


def origin_digest(manifest: Mapping[str, Any], variant: str) -> str:
    """SHA-256 of `origin_of`: what each file of these samples carries."""
    return hashlib.sha256(json.dumps(origin_of(manifest, variant), sort_keys=True).encode()).hexdigest()
