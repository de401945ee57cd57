"""Linear layers, attention and its cache: PyTorch's functions, or faster ones, equal to them up to rounding."""

from itarflow.runtime.kernels.attention import attention, attention_bias
from itarflow.runtime.kernels.cache import Cache
from itarflow.runtime.kernels.cpu import Linear, linear
from itarflow.runtime.kernels.decode import decode_attention, has_decode_attention
from itarflow.runtime.kernels.norm import rms_norm
from itarflow.runtime.kernels.packed import PackedLinear, pack
from itarflow.runtime.kernels.proof import without_kernels
from itarflow.runtime.kernels.rotary import Rotation, rotated, rotation_of, rotator

__all__ = [
    "Cache",
    "Linear",
    "PackedLinear",
    "Rotation",
    "attention",
    "attention_bias",
    "decode_attention",
    "has_decode_attention",
    "linear",
    "pack",
    "rms_norm",
    "rotated",
    "rotation_of",
    "rotator",
    "without_kernels",
]
