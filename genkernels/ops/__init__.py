"""The operators, as functions of tensors. Each runs on the fastest backend that its tensors' device offers."""

from genkernels.ops._operator import FEATURES, OPERATORS, Operator
from genkernels.ops.affine_coupling import affine_coupling, affine_coupling_inverse, affine_coupling_reverse
from genkernels.ops.autoregressive_sampling import Stage, autoregressive_sampling
from genkernels.ops.logistic_mixture import logistic_mixture_nll, logistic_mixture_sample
from genkernels.ops.made import made_inverse, masked_linear
from genkernels.ops.masked_conv import masked_conv

__all__ = [
    "FEATURES",
    "OPERATORS",
    "Operator",
    "Stage",
    "affine_coupling",
    "affine_coupling_inverse",
    "affine_coupling_reverse",
    "autoregressive_sampling",
    "logistic_mixture_nll",
    "logistic_mixture_sample",
    "made_inverse",
    "masked_conv",
    "masked_linear",
]
