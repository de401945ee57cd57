"""The flow: a stack of causal transformers, each an autoregressive affine map of image patches."""

from itarflow.flow.density import log_density, nll_per_dim
from itarflow.flow.noise import NoiseConfig
from itarflow.flow.tarflow import TARFlow, patchify, unpatchify

__all__ = ["NoiseConfig", "TARFlow", "log_density", "nll_per_dim", "patchify", "unpatchify"]
