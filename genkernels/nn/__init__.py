"""Layers. Data → noise is forward: ``z, ldj = layer(x, context=None)`` and ``x, ldj = layer.inverse(z,
context=None)``."""

from genkernels.nn.actnorm import ActNorm
from genkernels.nn.affine_coupling import AffineCoupling
from genkernels.nn.augment import AdaptiveAugment, Augment
from genkernels.nn.autoregressive import AutoregressiveTransform, InverseAutoregressiveTransform
from genkernels.nn.bias_leaky_relu import BiasLeakyReLU
from genkernels.nn.conv_zeros import Conv2dZeros
from genkernels.nn.dequantize import Dequantize, Logit
from genkernels.nn.elementary_flows import PlanarFlow, RadialFlow
from genkernels.nn.filtered import FilteredDownsample, FilteredUpsample
from genkernels.nn.fused_sequential import FusedSequential
from genkernels.nn.invertible_conv import InvertibleConv1x1
from genkernels.nn.invertible_residual import InvertibleResidual
from genkernels.nn.lipschitz import CLipSwish, LipschitzConv2d, LipschitzLinear, LipSwish, certify
from genkernels.nn.made import MADE
from genkernels.nn.masked_conv import MaskedConv2d
from genkernels.nn.masked_linear import MaskedLinear
from genkernels.nn.prior import Prior
from genkernels.nn.sequential import FlowSequential
from genkernels.nn.spectral_norm import spectral_norm_
from genkernels.nn.spline_coupling import SplineCoupling
from genkernels.nn.split import Split
from genkernels.nn.squeeze import EvenOdd, Squeeze

__all__ = [
    "MADE",
    "ActNorm",
    "AdaptiveAugment",
    "AffineCoupling",
    "Augment",
    "AutoregressiveTransform",
    "BiasLeakyReLU",
    "CLipSwish",
    "Conv2dZeros",
    "Dequantize",
    "EvenOdd",
    "FilteredDownsample",
    "FilteredUpsample",
    "FlowSequential",
    "FusedSequential",
    "InverseAutoregressiveTransform",
    "InvertibleConv1x1",
    "InvertibleResidual",
    "LipSwish",
    "LipschitzConv2d",
    "LipschitzLinear",
    "Logit",
    "MaskedConv2d",
    "MaskedLinear",
    "PlanarFlow",
    "Prior",
    "RadialFlow",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "certify",
    "spectral_norm_",
]
