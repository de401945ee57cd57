"""The folder of a pipeline: what belongs in it, and how it is written without following a link or losing a note."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from filelock import FileLock, Timeout

from itarflow.pipeline.model_card import PICTURE, is_generated
from itarflow.runtime.files import LOCK, PARTIAL, file_sha256, write_text
from itarflow.runtime.hub import INDEX, read_index, rewrite_json
from itarflow.runtime.json_file import as_type, read_json
from itarflow.runtime.model_folder import CONFIG, TRANSFORMERS_WEIGHTS, WEIGHTS
from itarflow.runtime.pipeline_index import CHECKSUMS, ENCODER, IN_REPOSITORY, SHARED, TOKENIZER
from itarflow.runtime.text import printable
from itarflow.text_encoder import TOKENIZER_FILES

CARD = "README.md"
PARTS = ("flow", "scheduler", "vae", ENCODER, TOKENIZER)
_PATIENCE = 60.0  # seconds that another command may take to note something in a folder


def finish_folder(folder: Path, kept: Mapping[str, Any] | None = None) -> None:
    """Make a folder that diffusers has written loadable by its generic loader too, and free of private paths.

    Args:
        folder: of a pipeline.
        kept: entries of an older index, from `kept_entries`.
    """
    rewrite_json(folder / "flow" / CONFIG, {})
    if (folder / "vae").is_dir():
        finish_vae(folder / "vae")
    if (folder / ENCODER).is_dir():
        rewrite_json(folder / ENCODER / CONFIG, {})
    for name, source in _MODULES.items():
        write_text(folder / name, source)
    kept = kept or {}
    found = {file.relative_to(folder).as_posix(): file_sha256(file) for file in sorted(folder.rglob("*.safetensors"))}
    rewrite_json(folder / INDEX, {**kept, **IN_REPOSITORY, CHECKSUMS: {**kept.get(CHECKSUMS, {}), **found}})


# diffusers' generic loader, given a Hub id, only looks for modules in the repository: so there are one-line modules
# for those who use it and trust remote code. Ours does without.
_MODULES = {
    "pipeline.py": "from itarflow import ITARFlowPipeline  # noqa: F401\n",
    "flow/modeling_flow.py": "from itarflow import TARFlow  # noqa: F401\n",
    "scheduler/scheduling_denoise.py": "from itarflow import DenoiseScheduler  # noqa: F401\n",
}


def finish_vae(folder: Path) -> None:
    """Free the folder of a VAE, as diffusers has written it, of private paths and of an invalid setting."""
    kind = read_json(folder / CONFIG, dict[str, Any]).get("_class_name")
    # An AutoencoderTiny writes this, and on loading warns that it does not know it.
    rewrite_json(folder / CONFIG, {}, ("block_out_channels",) if kind == "AutoencoderTiny" else ())


def foreign_entries(folder: Path) -> list[str]:
    """The files and folders in a folder, at any depth, that are none of a pipeline's, in order.

    A link is none of a pipeline's, nor is a model card that was written or edited by hand.
    """
    found = []
    for place, folders, files in os.walk(folder):  # does not go into links
        inside = Path(place).relative_to(folder)
        for name in [*folders, *files]:
            path = (inside / name).as_posix()
            if path.startswith(f"{PARTIAL}") or path == LOCK:
                continue
            by_hand = path == CARD and not is_free(folder / path)
            if not _ours(path) or by_hand or (folder / path).is_symlink() or (name in folders) != (path in PARTS):
                found.append(path)
    return sorted(found)


_STEMS = {"flow": WEIGHTS, "vae": WEIGHTS, ENCODER: TRANSFORMERS_WEIGHTS}
"""How the files of weights begin, by part."""
_FILE = re.compile("|".join((
    *(rf"{part}/(config\.json|{stem}[\w.-]*\.(safetensors|safetensors\.index[\w.-]*\.json))"
      for part, stem in _STEMS.items()),
    rf"{TOKENIZER}/({'|'.join(map(re.escape, TOKENIZER_FILES))})",
)))  # fmt: skip


def _ours(path: str) -> bool:
    """Whether a pipeline has a file or a folder of that path."""
    names = {INDEX, CARD, PICTURE, ".gitattributes", "scheduler/scheduler_config.json", *PARTS, *_MODULES}
    return path in names or _FILE.fullmatch(path) is not None


def check_no_links(folder: Path) -> None:
    """Refuse folders of a pipeline that are links: what is written would go elsewhere. Raises OSError."""
    if links := [str(folder / part) for part in PARTS if (folder / part).is_symlink()]:
        raise OSError(f"{printable(links[0])} is a link to another folder, which is not written through; remove it.")


def is_free(card: Path) -> bool:
    """Whether a model card may be written: there is none, or one that was generated and never edited since."""
    if not card.is_file():
        return not card.is_dir()
    try:
        return is_generated(card.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait for other commands that write into a folder."""
    lock = FileLock(folder / LOCK, timeout=_PATIENCE)  # never through a link
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"{folder} is being written by another command for long; try again at its end.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` to write to, which is removed after, as are those of killed calls."""
    for left in folder.glob(f"{PARTIAL}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as stage:
        yield Path(stage)


def kept_entries(folder: Path) -> dict[str, Any]:
    """What stays of the index of an older pipeline in a folder: where it is shared, and the checksums of weights.

    Only of weights that are still there; {} if there is no such index.
    """
    try:
        index = as_type(read_index(folder), _Kept, str(folder / INDEX))
    except (OSError, ValueError):
        return {}
    there = {name: value for name, value in index.get("_sha256", {}).items() if (folder / name).is_file()}
    return {CHECKSUMS: there} | ({SHARED: index["_shared"]} if index.get("_shared") else {})


class _Kept(TypedDict, total=False):
    _sha256: dict[str, str]
    _shared: dict[str, str | None]


def put_in_place(stage: Path, folder: Path, variant: str | None) -> None:
    """Put what was written in its place, the index last, and remove what an older pipeline had in its stead."""
    files = sorted(
        (path.relative_to(stage) for path in stage.rglob("*") if path.is_file()), key=lambda p: p.name == INDEX
    )
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / file, folder / file)  # a link is replaced, not followed
    dot = "" if variant is None else re.escape(f".{variant}")
    weights = rf"({dot}(-\d+-of-\d+)?\.(safetensors|bin)|\.(safetensors|bin)\.index{dot}\.json)"
    for part in (*_STEMS, TOKENIZER):
        stale = re.compile(_STEMS.get(part, "") + weights)
        gone = not (stage / part).is_dir()
        old = gone or part == TOKENIZER  # which has no variants
        for path in (folder / part).glob("*"):
            inside = path.relative_to(folder)
            if inside not in files and (stale.fullmatch(path.name) or (old and _ours(inside.as_posix()))):
                path.unlink()
        if gone:
            with suppress(OSError):  # there is something else in it, or it is not there
                (folder / part).rmdir()
