"""The operators, as functions of tensors. Each runs on the fastest backend that its tensors' device offers."""

from genkernels.ops._operator import FEATURES, OPERATORS, Operator
from genkernels.ops.affine_coupling import affine_coupling, affine_coupling_inverse, affine_coupling_reverse
from genkernels.ops.masked_conv import masked_conv

__all__ = [
    "FEATURES",
    "OPERATORS",
    "Operator",
    "affine_coupling",
    "affine_coupling_inverse",
    "affine_coupling_reverse",
    "masked_conv",
]
