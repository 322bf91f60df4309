"""The operators, as functions of tensors. Each runs on the fastest backend that its tensors' device offers.

One line an operator makes its functions public; nothing else anywhere lists operators.
"""

from genkernels.ops import _checks as checks
from genkernels.ops._operator import FEATURES, OPERATORS, Operator, transforms_active
from genkernels.ops.affine_coupling import affine_coupling, affine_coupling_inverse, affine_coupling_reverse
from genkernels.ops.autoregressive_sampling import Stage, autoregressive_sampling
from genkernels.ops.batch_norm_leaky_relu import BatchNormLeakyReLU, batch_norm_leaky_relu
from genkernels.ops.bias_leaky_relu import bias_leaky_relu
from genkernels.ops.elementary_flows import planar_flow, radial_flow
from genkernels.ops.gradient_penalty import gradient_penalty, interpolate_pairs
from genkernels.ops.importance_bound import gaussian_reparameterize, importance_bound
from genkernels.ops.invertible_residual import Solution, invertible_residual
from genkernels.ops.log_det_series import LogDetSeries, log_det_series
from genkernels.ops.logistic_mixture import logistic_mixture_nll, logistic_mixture_sample
from genkernels.ops.made import made_forward, made_inverse, made_spline_inverse, masked_linear
from genkernels.ops.masked_conv import masked_conv
from genkernels.ops.rational_quadratic_spline import rational_quadratic_spline, rational_quadratic_spline_inverse
from genkernels.ops.spectral_norm import CIRCULAR, CONVOLUTION, MATRIX, Geometry, SpectralNorm, spectral_norm
from genkernels.ops.upfirdn2d import upfirdn2d

__all__ = ["FEATURES", "OPERATORS", "Operator", "checks", "transforms_active"]
__all__ += [public.__name__ for operator in OPERATORS.values() for public in (*operator.functions, *operator.types)]
