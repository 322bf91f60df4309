"""Every operator in plain PyTorch, any dtype and device: the definition that kernels are held against."""

from genkernels.reference.affine_coupling import (
    affine_coupling,
    affine_coupling_backward,
    affine_coupling_reverse,
)
from genkernels.reference.autoregressive_sampling import (
    autoregressive_sampling,
    network_output,
)
from genkernels.reference.masked_conv import (
    masked_conv,
    masked_conv_backward,
)

__all__ = [
    "affine_coupling",
    "affine_coupling_backward",
    "affine_coupling_reverse",
    "autoregressive_sampling",
    "masked_conv",
    "masked_conv_backward",
    "network_output",
]
