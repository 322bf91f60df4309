r"""The invertible 1×1 convolution of Glow in its PLU form.

.. math::
    W = P L (U + \mathrm{diag}(s)),\qquad \mathrm{ldj} = H W \sum_c \log|s_c|

P is a fixed permutation, L unit lower triangular, U strictly upper triangular; the signs of s are fixed. One parameter
holds it all, ``factors [C, C]``: L below the diagonal, log|s| on it, U above. The small matrices are computed in fp64,
so that forward and inverse are each other's inverse to the precision of the data, whatever TF32 setting is in force.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.networks._plain import renew_weights
from genkernels.nn._log_det import per_sample
from genkernels.nn._pixelwise import pixelwise_linear
from genkernels.nn._values import check_channels


class InvertibleConv1x1(nn.Module):
    """Multiplies the channel vector of every pixel by one invertible matrix.

    Equivalent to::

        z = torch.nn.functional.conv2d(x, W.view(C, C, 1, 1))
        ldj = H * W * torch.linalg.slogdet(W).logabsdet

    It starts as a random rotation, runs in the dtype of `x`, also under autocast, and never waits for the device.

    Args:
        channels: size of dimension 1 of the input.
        lu: the PLU form, whose log-determinant costs C additions. False: a dense matrix and its ``slogdet``, O(C³).

    Shapes:
        x, z: ``[N, channels]`` or ``[N, channels, *spatial]``. ldj: ``[N]``, nats, fp32 or wider.

    Source: Kingma & Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018.
    """

    def __init__(self, channels: int, lu: bool = True):
        super().__init__()
        self.channels = channels
        self.lu = lu
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        dtype = torch.get_default_dtype()
        if not lu:
            self.weight = nn.Parameter(rotation.to(dtype))
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        s = upper.diagonal()
        factors = lower.tril(-1) + upper.triu(1) + s.abs().log().diag()
        self.factors = nn.Parameter(factors.to(dtype))
        self.register_buffer("permutation", permutation.to(dtype))
        self.register_buffer("sign", s.sign().to(dtype))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check(x)
        weight, log_det = assemble([self])
        return pixelwise_linear(x, weight[0]), per_sample(log_det[0], x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check(z)
        renew_weights(self)
        weight, log_det = assemble_inverse([self])
        return pixelwise_linear(z, weight[0]), per_sample(log_det[0], z)

    def matrix(self) -> Tensor:
        """W, ``[C, C]``, fp64; differentiable."""
        renew_weights(self)
        return assemble([self])[0][0]

    def check(self, x: Tensor) -> None:
        check_channels("InvertibleConv1x1", x, self.channels)

    def extra_repr(self) -> str:
        return f"{self.channels}, lu={self.lu}"


def assemble(convs: list[InvertibleConv1x1]) -> tuple[Tensor, Tensor]:
    """W ``[K, C, C]`` and log|det W| ``[K]``, fp64, of K layers alike in channels and form, in one batch of
    operations."""
    if not convs[0].lu:
        weight = _stack([conv.weight for conv in convs])
        return weight, torch.linalg.slogdet(weight).logabsdet
    factors, permutation, s, log_s = _factors(convs)
    upper = factors.triu(1) + torch.diag_embed(s)
    return permutation @ torch.baddbmm(upper, factors.tril(-1), upper), log_s.sum(-1)


def assemble_inverse(convs: list[InvertibleConv1x1]) -> tuple[Tensor, Tensor]:
    """W⁻¹ ``[K, C, C]`` and log|det W⁻¹| ``[K]``, fp64, by triangular solves."""
    if not convs[0].lu:
        weight = _stack([conv.weight for conv in convs])
        # inv_ex does not check the result, which would wait for the device
        return torch.linalg.inv_ex(weight).inverse, -torch.linalg.slogdet(weight).logabsdet
    factors, permutation, s, log_s = _factors(convs)
    half_way = torch.linalg.solve_triangular(factors.tril(-1), permutation.mT, upper=False, unitriangular=True)
    upper = factors.triu(1) + torch.diag_embed(s)
    return torch.linalg.solve_triangular(upper, half_way, upper=True), -log_s.sum(-1)


def _factors(convs: list[InvertibleConv1x1]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The factors, the permutation, s and log|s|, stacked over the layers, fp64."""
    factors = _stack([conv.factors for conv in convs])
    log_s = factors.diagonal(dim1=-2, dim2=-1)
    s = log_s.exp() * _stack([conv.sign for conv in convs])
    return factors, _stack([conv.permutation for conv in convs]), s, log_s


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).double()
