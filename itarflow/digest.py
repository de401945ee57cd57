"""What tensors are, as a short text: equal weights have equal digests, whatever file they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors as float32, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
