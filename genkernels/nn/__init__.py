"""Layers. Data → noise is forward: ``z, ldj = layer(x, context=None)`` and ``x, ldj = layer.inverse(z,
context=None)``."""

from genkernels.nn.actnorm import ActNorm
from genkernels.nn.affine_coupling import AffineCoupling
from genkernels.nn.autoregressive import AutoregressiveTransform, InverseAutoregressiveTransform
from genkernels.nn.conv_zeros import Conv2dZeros
from genkernels.nn.dequantize import Dequantize, Logit
from genkernels.nn.invertible_conv import InvertibleConv1x1
from genkernels.nn.made import MADE
from genkernels.nn.masked_conv import MaskedConv2d
from genkernels.nn.masked_linear import MaskedLinear
from genkernels.nn.prior import Prior
from genkernels.nn.sequential import FlowSequential
from genkernels.nn.split import Split
from genkernels.nn.squeeze import EvenOdd, Squeeze

__all__ = [
    "MADE",
    "ActNorm",
    "AffineCoupling",
    "AutoregressiveTransform",
    "Conv2dZeros",
    "Dequantize",
    "EvenOdd",
    "FlowSequential",
    "InverseAutoregressiveTransform",
    "InvertibleConv1x1",
    "Logit",
    "MaskedConv2d",
    "MaskedLinear",
    "Prior",
    "Split",
    "Squeeze",
]
