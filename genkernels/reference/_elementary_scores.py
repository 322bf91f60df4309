r"""What planar and radial flows make of a score, :math:`g = \nabla_z \log q(z)`, in plain PyTorch.

A layer :math:`z' = f(z)` gives draws whose density is known where it was drawn, and so is its slope, without the
layer's inverse:

.. math:: \log q'(z') = \log q(z) - \ell(z),\ \ell = \log|\det J|\quad\Rightarrow\quad
    g' = J^{-\top} \left(g - \nabla_z \ell(z)\right)

Both Jacobians are a multiple of 1 plus one outer product, whose inverse is another:

- planar, with :math:`h = \tanh t,\ s = 1 - h^2`: :math:`J = 1 + s\,\hat u w^\top`, so :math:`J^{-\top} y = y -
  \frac{s\,\hat u^\top y}{1 + s\,w^\top\hat u} w`; :math:`\nabla \ell = -\frac{2 h s\,w^\top\hat u}{1 + s\,w^\top\hat u}
  w`.
- radial, along :math:`e = (z - c)/r` and around it: J stretches e by λ and all else by μ (`along` and `around` of
  `elementary_flows`); with :math:`A = \alpha + r,\ x = \beta/A,\ \rho = \alpha/A`, :math:`\nabla \ell = -\frac{x}{A}
  \left(\frac{D - 1}{\mu} + \frac{2\rho}{\lambda}\right) e`, which at the centre counts as 0, as its kink does there.

(Vaitl et al., "Gradients should stay on path: better estimators of the reverse- and forward KL divergence for
normalizing flows", 2022.)

Shapes: as `elementary_flows`; the score like z. All is computed in fp32 at least, without a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.reference.elementary_flows import _layer, _planar, _radial, _softplus, _tanh_sech2, _wide


@torch.no_grad()
def planar_score(score: Tensor, z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """The score at z_K of what has `score` at z."""
    x, g, w, b = _wide(z), _wide(score), _wide(w), _wide(b)
    p = _planar(w, _wide(u))
    for k in range(w.shape[-2]):
        w_k, b_k, u_k, soft = (_layer(t, k, x, has) for t, has in ((w, 1), (b, 0), (p.u, 1), (p.soft, 0)))
        h, s = _tanh_sech2((x * w_k).sum(-1) + b_k)
        share = s / (h * h + s * soft)  # s / (1 + s wᵀû), the latter without cancellation
        # y = g - ∇ℓ; of it w takes what ûᵀy says
        y = g + (2 * h * (soft - 1) * share).unsqueeze(-1) * w_k
        g = y - (share * (u_k * y).sum(-1)).unsqueeze(-1) * w_k
        x = x + h.unsqueeze(-1) * u_k
    return g


@torch.no_grad()
def radial_score(score: Tensor, z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The score at z_K of what has `score` at z."""
    x, g, c = _wide(z), _wide(score), _wide(center)
    inner, outer = _softplus(_wide(alpha)), _softplus(_wide(beta))
    for k in range(center.shape[-2]):
        p = _radial(x, c, inner, outer, k)
        e = p.d / torch.where(p.r > 0, p.r, 1).unsqueeze(-1)  # 0 at the centre
        slope = -p.x / p.sum * ((x.shape[-1] - 1) / p.around + 2 * p.share / p.along)
        y = g - slope.unsqueeze(-1) * e
        along = (e * y).sum(-1)
        g = y / p.around.unsqueeze(-1) + (along * (1 / p.along - 1 / p.around)).unsqueeze(-1) * e
        x = x + p.x.unsqueeze(-1) * p.d
    return g
