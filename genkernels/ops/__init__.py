"""The operators, as functions of tensors. Each runs on the fastest backend that its tensors' device offers."""

from genkernels.ops._operator import FEATURES, OPERATORS, Operator
from genkernels.ops.affine_coupling import affine_coupling, affine_coupling_inverse, affine_coupling_reverse

__all__ = [
    "FEATURES",
    "OPERATORS",
    "Operator",
    "affine_coupling",
    "affine_coupling_inverse",
    "affine_coupling_reverse",
]
