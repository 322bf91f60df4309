"""Planar and radial flows as layers: K of them in one pass, with parameters of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels import ops
from genkernels.ops import checks

#: softplus of this is 1: what the constraints leave of it is nothing.
NEUTRAL = math.log(math.e - 1)
#: The spread of what makes a fresh layer differ from the identity, so that layers do not learn alike.
SPREAD = 0.01


class _ElementaryFlow(nn.Module):
    def __init__(self, dim: int, layers: int):
        super().__init__()
        name = type(self).__name__
        self.dim = checks.integer(name, "dim", dim, 1)
        self.layers = checks.integer(name, "layers", layers, 0)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        checks.tensor(name, "z", z)
        if z.dim() not in (2, 3) or z.shape[-1] != self.dim:
            raise ValueError(f"{name}: z must be [N, {self.dim}] or [N, S, {self.dim}], got {list(z.shape)}")
        if context is not None:
            got = list(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                f"{name}: its parameters serve every example, it takes no context, got {got}; parameters of each "
                f"example's own go to genkernels.ops.{self._operator.__name__}"
            )
        return self._operator(z, *(p.to(z.dtype) for p in self._values()))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        raise NotImplementedError(f"{name}: it is invertible, but no inverse in closed form is offered")

    def extra_repr(self) -> str:
        return f"{self.dim}, layers={self.layers}"


class PlanarFlow(_ElementaryFlow):
    r"""K planar layers: each moves all points along one direction, by a tanh of their place along another.

    .. math:: z' = z + \hat u\tanh(w^\top z + b)

    Equivalent to::

        z, ldj = genkernels.ops.planar_flow(z, flow.w, flow.u, flow.b)

    It starts near the identity. `inverse` raises: every layer is invertible, but not in closed form, so that the flow
    draws samples with their densities, and gives no density of a point from elsewhere.

    Args:
        dim: D, the features of z.
        layers: K; 0 is the identity.

    Shapes:
        z: ``[N, D]`` or ``[N, S, D]``. ldj: ``[N]`` or ``[N, S]``, nats, fp32 or wider. Parameters: w, u ``[K, D]``, b
        ``[K]``; they follow the dtype of z.

    Raises:
        ValueError: a size or a shape is wrong, or a context is given: it has no use for one. NotImplementedError: by
            `inverse`.

    Source: Rezende & Mohamed, "Variational inference with normalizing flows", 2015.
    """

    _operator = staticmethod(ops.planar_flow)

    def __init__(self, dim: int, layers: int):
        super().__init__(dim, layers)
        w = F.normalize(torch.randn(layers, dim), dim=1)
        self.w = nn.Parameter(w)
        self.u = nn.Parameter(NEUTRAL * w + SPREAD * torch.randn(layers, dim))
        self.b = nn.Parameter(torch.zeros(layers))

    def _values(self) -> tuple[Tensor, ...]:
        return self.w, self.u, self.b


class RadialFlow(_ElementaryFlow):
    r"""K radial layers: each draws points towards a centre, or drives them from it.

    .. math:: z' = z + \frac{\hat\beta}{\hat\alpha + \lVert z - c\rVert}\,(z - c)

    Equivalent to::

        z, ldj = genkernels.ops.radial_flow(z, flow.center, flow.alpha, flow.beta)

    It starts near the identity, its centres drawn from a normal distribution. `inverse` raises, as `PlanarFlow`'s does.

    Args:
        dim: D, the features of z.
        layers: K; 0 is the identity.

    Shapes:
        z: ``[N, D]`` or ``[N, S, D]``. ldj: ``[N]`` or ``[N, S]``, nats, fp32 or wider. Parameters: center ``[K, D]``,
        alpha, beta ``[K]``, before their constraints; they follow the dtype of z.

    Raises:
        ValueError: a size or a shape is wrong, or a context is given: it has no use for one. NotImplementedError: by
            `inverse`.

    Source: Rezende & Mohamed, "Variational inference with normalizing flows", 2015.
    """

    _operator = staticmethod(ops.radial_flow)

    def __init__(self, dim: int, layers: int):
        super().__init__(dim, layers)
        self.center = nn.Parameter(torch.randn(layers, dim))
        self.alpha = nn.Parameter(torch.full((layers,), NEUTRAL))
        self.beta = nn.Parameter(NEUTRAL + SPREAD * torch.randn(layers))

    def _values(self) -> tuple[Tensor, ...]:
        return self.center, self.alpha, self.beta
