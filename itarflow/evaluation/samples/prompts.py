"""The prompts of samples: sample i is made from prompt i, in turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.pipeline.prompts import encoded_on
from itarflow.text_encoder import TextEncoder


@dataclass(frozen=True)
class SamplePrompts:
    """Texts that samples take in turn.

    Attributes:
        texts: of which there is at least one, for a checkpoint that takes prompts; none for another one.
        encoder: reads them; it is on the device of the flow only while it does. None = that of the pipeline.
    """

    texts: Sequence[str] = ()
    encoder: TextEncoder | None = None

    def check(self, pipe: ITARFlowPipeline) -> None:
        """Refuse what does not suit a checkpoint.

        Raises:
            ValueError: prompts for a checkpoint that takes none, or none for one that does, or no text encoder.
        """
        if self.texts and not pipe.takes_prompts:
            raise ValueError("prompts were given, but this checkpoint makes no images from prompts; leave them out.")
        if pipe.takes_prompts and not self.texts:
            raise ValueError("this checkpoint makes images from prompts; give some by prompts=[...].")
        if self.texts and self.encoder is None and pipe.text_encoder is None:
            raise ValueError("this checkpoint has no text encoder; name it by --text-encoder, or load it with one.")

    def described(self, pipe: ITARFlowPipeline) -> dict[str, Any]:
        """What samples depend on; {} without prompts, as it was before there were any."""
        if not self.texts:
            return {}
        encoder = self.encoder or TextEncoder(pipe.tokenizer, pipe.text_encoder, pipe.flow.config.context_tokens)
        identity = encoder.identity  # which an encoder remembers
        texts = hashlib.sha256(json.dumps(list(self.texts)).encode()).hexdigest()
        return {"prompts": texts, "text encoder": identity.encoder, "tokenizer": identity.tokenizer}

    def embeds(self, pipe: ITARFlowPipeline, start: int, stop: int) -> dict[str, Any]:
        """The arguments of a call of the pipeline for samples start .. stop - 1; {} without prompts."""
        if not self.texts:
            return {}
        chosen = [*(self.texts[index % len(self.texts)] for index in range(start, stop)), ""]
        encoder, device = self.encoder, pipe.flow.device
        vectors = pipe.encode_prompt(chosen) if encoder is None else encoded_on(encoder, chosen, device).to(device)
        return {"prompt_embeds": vectors[:-1], "negative_prompt_embeds": vectors[-1:]}


NO_PROMPTS = SamplePrompts()
