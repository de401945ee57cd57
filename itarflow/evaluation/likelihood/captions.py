"""The captions by which likelihoods are measured: whether a checkpoint's own text encoder has made their vectors."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from itarflow.data.context import CaptionError, ContextCard, check_encoder, open_context
from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.errors import DataError
from itarflow.runtime.hub import folder_of
from itarflow.runtime.model_folder import CONFIG
from itarflow.runtime.pipeline_index import ENCODER
from itarflow.text_encoder import TextEncoder


def context_shape(flow: TARFlow) -> tuple[int, int]:
    """(T, E) of the condition vectors that a flow takes."""
    return flow.config.context_tokens, flow.config.context_dim


def captions_facts(card: ContextCard | None, prompted: bool) -> dict[str, Any]:
    """What a report says of captions, and its figures depend on.

    Args:
        card: of the images' captions; None = they are not read.
        prompted: whether the flow takes any; {} if not.
    """
    if not prompted:
        return {}
    if card is None:
        return {"captions": "none"}
    return {"captions": card.captions, "captions_encoder": [card.encoder.encoder, card.encoder.tokenizer]}


def checked_captions(checkpoint: str, flow: TARFlow, data: str, card: ContextCard | None) -> Tensor | None:
    """Compare captions with a checkpoint's text encoder, or give the empty caption in their place.

    The encoder is loaded on the CPU. Without transformers captions are measured as they are, with a warning.

    Args:
        checkpoint: a folder with a pipeline, or a Hub id.
        flow: of it.
        data: path of the images.
        card: of the images' captions; None = they are not read.

    Returns:
        Without a card the vectors (T, E) of the empty caption in bfloat16: the encoder's, or, if there is none, those
        that lie beside the captions of the images.

    Raises:
        DataError: captions of another encoder, or no vectors of the empty one.
    """
    encoder = _text_encoder(checkpoint, flow)
    if card is not None:
        if encoder is not None:
            check_encoder(card, data, encoder.identity)
        return None
    if encoder is not None:
        return encoder.encode([""])[0].bfloat16()  # as it is stored beside captions
    try:
        return open_context(data, context_shape(flow)).null_context
    except CaptionError as error:
        raise DataError(
            "there are no vectors of the empty caption: the checkpoint has no text encoder that makes them, or it "
            f"can't be loaded, and {error}."
        ) from error


def _text_encoder(checkpoint: str, flow: TARFlow) -> TextEncoder | None:
    """Of a checkpoint; None if there is none, or, with a warning, no transformers."""
    folder = folder_of(checkpoint, [f"{ENCODER}/{CONFIG}"], expected="a pipeline")
    if not (folder / ENCODER).is_dir():
        return None
    try:
        return TextEncoder.from_pretrained(str(folder), max_tokens=flow.config.context_tokens)
    except ImportError as error:
        warnings.warn(f"captions are not compared with the checkpoint's text encoder: {error}", stacklevel=2)
        return None
