"""Every operator in plain PyTorch, any dtype and device: the definition that kernels are held against."""

from genkernels.reference.affine_coupling import affine_coupling, affine_coupling_backward, affine_coupling_reverse
from genkernels.reference.autoregressive_sampling import autoregressive_sampling, network_output
from genkernels.reference.logistic_mixture import (
    logistic_mixture_nll,
    logistic_mixture_nll_backward,
    logistic_mixture_sample,
)
from genkernels.reference.made import (
    made_inverse,
    made_inverse_backward,
    masked_linear,
    masked_linear_grad_input,
    masked_linear_grad_weight,
)
from genkernels.reference.masked_conv import masked_conv, masked_conv_backward

__all__ = [
    "affine_coupling",
    "affine_coupling_backward",
    "affine_coupling_reverse",
    "autoregressive_sampling",
    "logistic_mixture_nll",
    "logistic_mixture_nll_backward",
    "logistic_mixture_sample",
    "made_inverse",
    "made_inverse_backward",
    "masked_conv",
    "masked_conv_backward",
    "masked_linear",
    "masked_linear_grad_input",
    "masked_linear_grad_weight",
    "network_output",
]
