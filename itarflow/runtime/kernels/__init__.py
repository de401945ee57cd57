"""Linear layers and attention: PyTorch's functions, or faster ones that are equal to them up to rounding."""

from itarflow.runtime.kernels.attention import attention
from itarflow.runtime.kernels.cpu import Linear, linear
from itarflow.runtime.kernels.packed import PackedLinear, pack

__all__ = ["Linear", "PackedLinear", "attention", "linear", "pack"]
