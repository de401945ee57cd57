"""Linear layers and attention: PyTorch's functions, or faster ones that are equal to them up to rounding."""

from itarflow.runtime.kernels.attention import attention, attention_bias
from itarflow.runtime.kernels.cpu import Linear, linear
from itarflow.runtime.kernels.decode import decode_attention, has_decode_attention
from itarflow.runtime.kernels.packed import PackedLinear, pack

__all__ = [
    "Linear",
    "PackedLinear",
    "attention",
    "attention_bias",
    "decode_attention",
    "has_decode_attention",
    "linear",
    "pack",
]
