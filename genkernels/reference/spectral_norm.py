r"""Spectral norm of weights in plain PyTorch: the definition, the oracle and the fallback.

A weight W acts on its input as a linear map A: as a matrix (its axis of outputs against all others, Miyato et al.,
"Spectral normalization for generative adversarial networks", 2018), or as the convolution that it is, with its stride,
padding and size of input (Behrmann et al., "Invertible residual networks", 2019). The two norms are up to the root of
the number of taps apart. One power iteration is

.. math:: u \leftarrow A v / \lVert A v\rVert,\qquad v \leftarrow A^\top u / \lVert A^\top u\rVert,\qquad
    \sigma = \langle u, A v\rangle

and never exceeds the norm. With u and v taken as constants :math:`\sigma` is linear in W, :math:`\langle D, W\rangle`,
D being the weight gradient of A for input v and output gradient u (:math:`u v^\top` for a matrix), so that

.. math:: \hat W = f W,\quad f = c / \sigma\ \text{or}\ \min(1, c / \sigma),\qquad
    \nabla_W = f G - \tfrac1\sigma \langle G, \hat W\rangle D \quad (\nabla_W = G\ \text{where}\ f = 1\
    \text{is the minimum})

for a gradient G of :math:`\hat W`. A weight of zeros has :math:`\sigma = 0`, f = 1, and its u and v stay what they
were, as do those of a weight that is not finite.

Shapes: u is A's output and v its input, of one sample, without the batch: ``[M]`` and ``[K]`` for a matrix, ``[C_out,
*output]`` and ``[C_in, *input]`` for a convolution, whose sizes they thereby hold. Half numbers are computed in fp32.
Saved for backward: the weights, u, v and :math:`\sigma`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MATRIX, CONVOLUTION, CIRCULAR = 0, 1, 2


class Geometry(NamedTuple):
    """How a weight acts on one sample: as a matrix, or as the convolution that it is.

    Args:
        kind: `MATRIX`, `CONVOLUTION` (beyond its ends the input is 0) or `CIRCULAR` (it goes on at the other end).
        axis: of a matrix, the weight's axis of outputs; the others, in their order, are the columns.
        groups: of a convolution, as for `torch.nn.Conv2d`.
        transposed: the weight is that of a transposed convolution, ``[C_in, C_out / groups, *kernel]``.
        stride, padding, dilation: of three axes, of which the last ones count; 1, 0 and 1 for those that the weight
            lacks. Padding is that before the first element; what lies behind the last one follows from the sizes.
    """

    kind: int = MATRIX
    axis: int = 0
    groups: int = 1
    transposed: bool = False
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)


#: Integers of a plan that stand for one `Geometry`.
RECORD = 13


def as_plan(geometries: Sequence[Geometry]) -> list[int]:
    return [
        int(n) for g in geometries for n in (g.kind, g.axis, g.groups, g.transposed, *g.stride, *g.padding, *g.dilation)
    ]


def from_plan(plan: Sequence[int]) -> list[Geometry]:
    records = [plan[i : i + RECORD] for i in range(0, len(plan), RECORD)]
    return [Geometry(r[0], r[1], r[2], bool(r[3]), tuple(r[4:7]), tuple(r[7:10]), tuple(r[10:13])) for r in records]


def output_size(g: Geometry, kernel: Sequence[int], size: Sequence[int], behind: Sequence[int]) -> list[int]:
    """What a convolution makes of inputs of `size`, padded by ``g.padding`` before and `behind` after."""
    axes = range(3 - len(size), 3)
    return [
        (n + g.padding[a] + r - g.dilation[a] * (k - 1) - 1) // g.stride[a] + 1
        for a, n, k, r in zip(axes, size, kernel, behind, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------- the maps


def as_matrix(weight: Tensor, axis: int) -> Tensor:
    """``[M, K]``: the axis of outputs against all others."""
    return weight.movedim(axis, 0).flatten(1)


def _behind(weight: Tensor, g: Geometry, size: Sequence[int], out: Sequence[int]) -> list[int]:
    """How far the taps of the last output reach beyond the input; below 0 where they do not reach its end."""
    axes = range(3 - len(size), 3)
    return [
        (o - 1) * g.stride[a] + g.dilation[a] * (k - 1) + 1 - n - g.padding[a]
        for a, n, o, k in zip(axes, size, out, weight.shape[2:], strict=True)
    ]


def _padded(weight: Tensor, g: Geometry, x: Tensor, out: Sequence[int]) -> Tensor:
    """``[1, C_in, *padded]``: what the taps of all outputs reach."""
    pads = []
    for before, behind in zip(g.padding[5 - weight.dim() :], _behind(weight, g, x.shape[1:], out), strict=True):
        pads = [before, behind, *pads]
    # first what is added: where outputs see padding alone, more is cut than there was
    x = F.pad(x.unsqueeze(0), [max(p, 0) for p in pads], "circular" if g.kind == CIRCULAR else "constant")
    return F.pad(x, [min(p, 0) for p in pads])


def _convolve(weight: Tensor, g: Geometry, x: Tensor, out: Sequence[int]) -> Tensor:
    """``[C_in, *size]`` → ``[C_out, *out]``."""
    dims = weight.dim() - 2
    x = _padded(weight, g, x, out)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolution(x, weight, None, g.stride[3 - dims :], 0, g.dilation[3 - dims :], g.groups).squeeze(0)


def _spread(weight: Tensor, g: Geometry, y: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of `_convolve`: ``[C_out, *out]`` → ``[C_in, *size]``."""
    dims = weight.dim() - 2
    convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    stride, dilation = g.stride[3 - dims :], g.dilation[3 - dims :]
    x = convolution(y.unsqueeze(0), weight, None, stride, 0, 0, g.groups, dilation).squeeze(0)
    after = _behind(weight, g, size, y.shape[1:])
    for axis, n, before, behind in zip(range(1, dims + 1), size, g.padding[3 - dims :], after, strict=True):
        if behind < 0:  # no tap reaches the last inputs
            x = torch.cat([x, x.new_zeros([-behind if a == axis else s for a, s in enumerate(x.shape)])], axis)
        inner = x.narrow(axis, before, n)
        if g.kind == CIRCULAR:
            if before:
                inner = inner + F.pad(x.narrow(axis, 0, before), _pad_axis(dims, axis, n - before, 0))
            if behind > 0:
                inner = inner + F.pad(x.narrow(axis, before + n, behind), _pad_axis(dims, axis, 0, n - behind))
        x = inner
    return x


def _pad_axis(dims: int, axis: int, before: int, after: int) -> list[int]:
    pads = [0] * (2 * dims)
    pads[2 * (dims - axis)], pads[2 * (dims - axis) + 1] = before, after
    return pads


def apply(weight: Tensor, g: Geometry, v: Tensor, out: Sequence[int]) -> Tensor:
    """A v, of shape `out` (that of u)."""
    if g.kind == MATRIX:
        return as_matrix(weight, g.axis).mv(v)
    return _spread(weight, g, v, out[1:]) if g.transposed else _convolve(weight, g, v, out[1:])


def apply_transpose(weight: Tensor, g: Geometry, u: Tensor, size: Sequence[int]) -> Tensor:
    """Aᵀ u, of shape `size` (that of v)."""
    if g.kind == MATRIX:
        return as_matrix(weight, g.axis).t().mv(u)
    return _convolve(weight, g, u, size[1:]) if g.transposed else _spread(weight, g, u, size[1:])


def outer(weight: Tensor, g: Geometry, u: Tensor, v: Tensor) -> Tensor:
    """D, like the weight: the gradient of ⟨u, A v⟩ by it."""
    if g.kind == MATRIX:
        rest = [n for axis, n in enumerate(weight.shape) if axis != g.axis % weight.dim()]
        return torch.outer(u, v).view(-1, *rest).movedim(0, g.axis)
    x, y = (u, v) if g.transposed else (v, u)
    dims = weight.dim() - 2
    x = _padded(weight, g, x, y.shape[1:])
    # Σ_o y[c, o]·x[i, o·stride + t·dilation]: a convolution of x by y, whose stride is the dilation and the reverse;
    # a group's input channels stand as samples
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    stride, dilation = g.stride[3 - dims :], g.dilation[3 - dims :]
    per_group = x.shape[1] // g.groups
    by_input = x.view(g.groups, per_group, *x.shape[2:]).transpose(0, 1)  # [C_in / groups, groups, *padded]
    d = convolution(by_input, y.unsqueeze(1), None, dilation, 0, stride, g.groups)  # [C_in / groups, C_out, *taps]
    taps = [slice(0, k) for k in weight.shape[2:]]
    return d[(slice(None), slice(None), *taps)].transpose(0, 1)


# ------------------------------------------------------------------------------------------------------ the operators


def _norm(x: Tensor) -> Tensor:
    """‖x‖, without the overflow of its squares."""
    largest = x.abs().amax()
    return torch.where(largest > 0, largest * (x / largest).square().sum().sqrt(), largest)


def _unit(x: Tensor, otherwise: Tensor) -> Tensor:
    """x / ‖x‖, `otherwise` where that is no vector of length 1."""
    norm = _norm(x)
    return torch.where((norm > 0) & norm.isfinite(), x / norm, otherwise)


def iterate(weight: Tensor, g: Geometry, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """u and v after so many power iterations; they keep their length where there are none."""
    for _ in range(iterations):
        u = _unit(apply(weight, g, v, u.shape), u)
        v = _unit(apply_transpose(weight, g, u, v.shape), v)
    return u, v


def factors(sigma: Tensor, coefficient: float, at_most: bool) -> Tensor:
    """f: ``coefficient / sigma``, never above 1 where `at_most`; 1 where sigma is 0."""
    divides = sigma > coefficient if at_most else sigma != 0
    divides = divides | sigma.isnan()
    return torch.where(divides, coefficient / torch.where(divides, sigma, 1), 1)


def spectral_norm(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    plan: Sequence[int],
    iterations: int = 1,
    coefficient: float = 1.0,
    at_most: bool = False,
) -> list[Tensor]:
    """The normalised weights, then every u, then every v, then sigma ``[L]`` in fp32 or wider."""
    normalised, left, right, sigmas = [], [], [], []
    for weight, u_old, v_old, g in zip(weights, u, v, from_plan(plan), strict=True):
        work = torch.promote_types(weight.dtype, torch.float32)
        w = weight.to(work)
        with torch.no_grad():
            u_new, v_new = iterate(w, g, u_old.to(work), v_old.to(work), iterations)
        sigma = (u_new * apply(w, g, v_new, u_new.shape)).sum()
        normalised.append((w * factors(sigma, coefficient, at_most)).to(weight.dtype))
        left.append(u_new.to(u_old.dtype))
        right.append(v_new.to(v_old.dtype))
        sigmas.append(sigma)
    return [*normalised, *left, *right, torch.stack(sigmas)]


def spectral_norm_vectors(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], plan: Sequence[int], iterations: int = 1
) -> list[Tensor]:
    """What `spectral_norm` gives beside the weights, which it does not make: every u, every v, then sigma."""
    left, right, sigmas = [], [], []
    for weight, u_old, v_old, g in zip(weights, u, v, from_plan(plan), strict=True):
        work = torch.promote_types(weight.dtype, torch.float32)
        w = weight.to(work)
        u_new, v_new = iterate(w, g, u_old.to(work), v_old.to(work), iterations)
        left.append(u_new.to(u_old.dtype))
        right.append(v_new.to(v_old.dtype))
        sigmas.append((u_new * apply(w, g, v_new, u_new.shape)).sum())
    return [*left, *right, torch.stack(sigmas)]


def spectral_norm_apply(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
    plan: Sequence[int],
    coefficient: float = 1.0,
    at_most: bool = False,
) -> list[Tensor]:
    """The normalised weights, of norms that `spectral_norm_vectors` found and their u and v."""
    out = []
    for weight, left, right, g, s in zip(weights, u, v, from_plan(plan), sigma, strict=True):
        w, s = weight.to(s.dtype), s.detach()
        if weight.requires_grad and torch.is_grad_enabled():
            # the norm that is known, as a function of the weight
            by_weight = (left.to(s.dtype) * apply(w, g, right.to(s.dtype), left.shape)).sum()
            s = torch.where(by_weight.isfinite(), s + (by_weight - by_weight.detach()), s)
        out.append((w * factors(s, coefficient, at_most)).to(weight.dtype))
    return out


def spectral_norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    """f W x + b and W x, of x ``[N, K]``, W ``[M, K]`` and b ``[M]``."""
    z = x @ weight.T
    return z * factor if bias is None else torch.add(bias, z, alpha=factor), z


def spectral_norm_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, z: Tensor, u: Tensor, v: Tensor, factor: float, norm: float, by_x: bool
) -> tuple[Tensor, Tensor]:
    r"""Gradients of f W x by W and by x, the latter where it is asked for (else empty): u, v and the norm of W are
    known, z is W x, and f a constant divided by the norm, or where that is 0 a constant."""
    scaled = grad * factor
    by_weight = scaled.T @ x
    if norm != 0:
        by_weight = by_weight - torch.outer(u * ((scaled * z).sum() / norm), v)
    return by_weight, scaled @ weight if by_x else x.new_empty(0)


def spectral_norm_backward(
    grads: Sequence[Tensor],
    grad_sigma: Tensor | None,
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
    plan: Sequence[int],
    coefficient: float = 1.0,
    at_most: bool = False,
) -> list[Tensor]:
    """The gradients by the weights, from those of the normalised weights and of sigma."""
    out = []
    for i, (grad, weight, g) in enumerate(zip(grads, weights, from_plan(plan), strict=True)):
        work = torch.promote_types(weight.dtype, torch.float32)
        grad, w = grad.to(work), weight.to(work)
        s = sigma[i].to(work)
        f = factors(s, coefficient, at_most)
        divides = (s > coefficient if at_most else s != 0) | s.isnan()
        by_sigma = torch.where(divides, -(grad * (f * w)).sum() / torch.where(divides, s, 1), 0)
        if grad_sigma is not None:
            by_sigma = by_sigma + grad_sigma[i].to(work)
        out.append((f * grad + by_sigma * outer(w, g, u[i].to(work), v[i].to(work))).to(weight.dtype))
    return out
