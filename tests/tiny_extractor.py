"""An extractor whose features are easily told: means of the quarters of an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from itarflow.extractors import POOL_FEATURES, Features


class TinyExtractor:
    """4 features; as the Inception, 2,048 of which all but 4 are 0, with spatial ones and logits."""

    def __init__(self, name: str = "tiny", identity: str = "1" * 64, *, inception: bool = False) -> None:
        self.name, self.identity = name, identity
        self.inception, self.seen = inception, 0

    def __call__(self, images: Tensor) -> Features:
        assert images.dtype == torch.uint8
        self.seen += len(images)
        pool = F.adaptive_avg_pool2d(images.float(), 2).mean(dim=1).flatten(1) / 255
        if not self.inception:
            return Features(pool)
        return Features(F.pad(pool, (0, POOL_FEATURES - 4)), pool[:, :3], 3 * pool)
