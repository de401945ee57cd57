"""An extractor whose features are easily told: means of the quarters of an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from itarflow.evaluation.metrics.extractors import INCEPTION, POOL_FEATURES, Features


class TinyExtractor:
    """4 features; or, with a width, as many, of which the others are 0, and spatial ones and logits as well."""

    def __init__(self, name: str = "tiny", identity: str = "1" * 64, *, width: int = 0) -> None:
        self.name, self.identity = name, identity
        self.width, self.seen = width, 0

    def __call__(self, images: Tensor) -> Features:
        assert images.dtype == torch.uint8
        self.seen += len(images)
        pool = F.adaptive_avg_pool2d(images.float(), 2).mean(dim=1).flatten(1) / 255
        if not self.width:
            return Features(pool)
        return Features(F.pad(pool, (0, self.width - 4)), pool[:, :3], 3 * pool)


def tiny_inception(name: str = INCEPTION) -> TinyExtractor:
    return TinyExtractor(name, width=POOL_FEATURES)
