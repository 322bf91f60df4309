r"""log|det(I + J)| of y = x + g(x) for the network of a residual block: the definition, the oracle and the fallback.

.. math:: \log\lvert\det(I + J)\rvert = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k}\operatorname{tr} J^k
    \approx \sum_k c_k \frac{(-1)^{k+1}}{k}\, v^\top w_k,\qquad w_0 = v,\quad w_k = J^\top w_{k-1}

for probes v of covariance I and the weights c of the terms (1, or over the probability that a roulette reaches the
term). The slopes of the activations are computed once, each term is a chain of transposed maps with them. Of a block of
three maps the first term may be exact, without a probe: :math:`\operatorname{tr} J = \sum d_2^\top M d_1`
(`_block.trace_map`). Without probes the whole Jacobian is taken.

The gradient takes the sums :math:`s = \sum_k c_k (-1)^{k+1} w_{k-1}` (the columns of :math:`(I + J)^{-\top}` where the
Jacobian is whole) as constants:

.. math:: \partial \log\lvert\det(I + J)\rvert = s^\top\,\partial J\,v

which is the mean's own gradient (Chen et al., "Residual flows for invertible generative modeling", 2019). With the
tangents :math:`t_i` of z for v, the cotangents :math:`\beta_i` of the activations' outputs for s, and the cotangents
:math:`\alpha_i` of the same for the gradient by g, that of the arguments is

.. math:: \delta_i = d_i\,\alpha_i + \varphi''(z_i)\,(\beta_i\,t_i + \text{the trace's})

and every map has the gradient :math:`\delta \otimes a + (d\beta) \otimes (dt)`, a being its input. A second derivative
goes through s, too.

Shapes: x ``[N, D]`` or ``[N, C, H, W]``, probes ``[P, N, ...]``; value like x, log_det ``[N]``, sums like the probes
(over P, so that they need no mean), shrink ``[P, N]``: the norm of the last w over that of v, to the power 1/n. Half
numbers are computed in fp32. Saved for backward: the arguments and the sums; the pass is computed anew, or kept
(`log_det_series_keeping`) where that is little.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels.reference import _block
from genkernels.reference._block import Block, dot, linearize


class _Through(torch.autograd.Function):
    """The estimate ``[N]`` with the derivatives of Σ ⟨J v, s⟩ in which s is a constant of the first, and of no further
    one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(estimate, product, sums):
        return estimate.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None
        _, sums = ctx.saved_tensors
        return None, grad.reshape(*grad.shape, *[1] * (sums.dim() - 2)) * sums, None

    @staticmethod
    def jvp(ctx, _, tangent, __):
        _, sums = ctx.saved_tensors
        if tangent is None:
            return sums.new_zeros(sums.shape[1])
        return dot(tangent, sums, sums.dim() - 2).sum(0)


def roulette_weights(known: int, poisson: bool, p: float, further: int) -> list[float]:
    """1 / P(N ≥ k) of each term: of `known` terms, and of `further` ones that a roulette has added."""
    weights = [1.0] * known
    if not poisson:
        return weights + [(1 - p) ** -(k - 1) for k in range(1, further + 1)]
    places = torch.arange(further, dtype=torch.float64)
    reached = torch.special.gammainc(places, torch.full_like(places, p))  # P(Poisson >= k); 1 at k = 0
    return weights + [1 / r for r in reached.tolist()]


def log_det_series(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    parameters: Tensor,
    trace_map: Tensor | None,
    probes: Tensor | None,
    terms: Sequence[float],
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(value, log_det, sums, shrink)``; see above."""
    work = _block.work_dtype(x)
    block, at_x = Block(weights, biases, parameters, activation).to(work), x.to(work)
    trace_map = None if trace_map is None else trace_map.to(work)
    probes = None if probes is None else probes.to(work)
    at = linearize(block, at_x)
    log_det, sums, shrink = series(block, at, at_x, trace_map, probes, terms)
    vectors = _block.basis(at_x) if probes is None else probes
    log_det = _Through.apply(log_det, _block.pushed(block, at, vectors)[2], sums)
    if trace_map is not None and terms:
        log_det = log_det + terms[0] * exact_trace(block, at, at_x, trace_map)
    dtype = x.dtype
    return at.value.to(dtype), log_det, sums.to(dtype), shrink.detach()


def log_det_series_keeping(
    x, weights, biases, parameters, trace_map, probes, terms, activation
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same of a fully connected block, and what its gradient would compute anew: the arguments of all activations
    and their tangents along the probes, of sixteen samples side by side: ``[N / 16, 1 + P, arguments, 16]``, zeros
    beyond the last one."""
    found = log_det_series(x, weights, biases, parameters, trace_map, probes, terms, activation)
    work = _block.work_dtype(x)
    block = Block(weights, biases, parameters, activation).to(work)
    at = linearize(block, x.to(work))
    tangents = _block.pushed(block, at, probes.to(work))[0]
    own = [len(w) for w in weights[:-1]]  # an activation of [z, −z] has twice as many outputs
    rows = [torch.cat([z[None, :, :n], t[..., :n]]) for z, t, n in zip(at.points, tangents, own, strict=True)]
    together = F.pad(torch.cat(rows, -1), (0, 0, 0, -len(x) % 16)).unflatten(
        1, (-1, 16)
    )  # [1 + P, N / 16, 16, arguments]
    return *found, together.permute(1, 0, 3, 2).contiguous()


def log_det_series_sums(x, weights, biases, parameters, trace_map, probes, terms, activation) -> Tensor:
    """The sums alone."""
    work = _block.work_dtype(x)
    block, at_x = Block(weights, biases, parameters, activation).to(work), x.to(work)
    trace_map, probes = (None if t is None else t.to(work) for t in (trace_map, probes))
    return series(block, linearize(block, at_x), at_x, trace_map, probes, terms)[1].to(x.dtype)


def log_det_series_trace_map(weights: Sequence[Tensor], activation: int) -> Tensor:
    """M of the exact first term, of the weights alone (`_block.trace_map`)."""
    work = _block.work_dtype(weights[0])
    block = Block([w.to(work) for w in weights], [], weights[0], activation)
    return _block.trace_map(block).to(weights[0].dtype).contiguous()


def log_det_series_trace_map_backward(grad: Tensor, weights: Sequence[Tensor], activation: int) -> list[Tensor]:
    """Gradients of the weights."""
    work = _block.work_dtype(weights[0])
    block = Block([w.to(work) for w in weights], [], weights[0], activation)
    found = _block.trace_map_backward(block, grad.to(work))
    return [g.to(w.dtype).contiguous() for g, w in zip(found, weights, strict=True)]


def series(block, at, x, trace_map, probes, terms) -> tuple[Tensor, Tensor, Tensor]:
    """``(log_det, sums, shrink)``, as functions of everything; log_det without the exact first term."""
    axes = x.dim() - 1
    if probes is None:
        return _whole(block, at, x)
    log_det = x.new_zeros(len(x))
    exact = trace_map is not None
    w, sums = probes, torch.zeros_like(probes)
    for k, weight in enumerate(terms, start=1):
        sign = 1 if k % 2 else -1
        if not (exact and k == 1):
            sums = sums + sign * weight / len(probes) * w
        w = _block.transposed(block, at, w)
        if not (exact and k == 1):
            log_det = log_det + sign * weight / k * dot(w, probes, axes).mean(0)
    return log_det, sums, _shrink(w, probes, len(terms), axes)


def _shrink(w: Tensor, v: Tensor, terms: int, axes: int) -> Tensor:
    before = dot(v, v, axes)
    return (dot(w, w, axes) / torch.where(before > 0, before, 1)) ** (0.5 / max(terms, 1))


def _whole(block, at, x) -> tuple[Tensor, Tensor, Tensor]:
    matrix = _block.jacobian(block, at, x)
    matrix = matrix + torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    rows = torch.linalg.inv(matrix).transpose(0, 1)  # row i of the inverse is column i of its transpose
    sums = rows.reshape(matrix.shape[1], *x.shape).contiguous()
    return torch.linalg.slogdet(matrix)[1], sums, sums.new_zeros(sums.shape[:2])


def _where(x: Tensor, trace_map: Tensor) -> Tensor | None:
    return None if x.dim() == 2 else _block.classes(x, len(trace_map))


def exact_trace(block, at, x, trace_map) -> Tensor:
    """tr J, by sample."""
    d1, d2 = at.slopes
    return dot(d2, _block.traced(trace_map, d1, _where(x, trace_map)), x.dim() - 1)


def log_det_series_backward(
    grad_value: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    parameters: Tensor,
    trace_map: Tensor | None,
    probes: Tensor | None,
    sums: Tensor,
    first: float,
    activation: int,
) -> list[Tensor]:
    """Gradients of x, of each weight, of each bias, of the parameters, and of the trace's map where there is one.

    first: the weight of the first term, where that is exact.
    """
    dtypes = [t.dtype for t in (x, *weights, *biases, parameters, *([] if trace_map is None else [trace_map]))]
    work = _block.work_dtype(x)
    block, x = Block(weights, biases, parameters, activation).to(work), x.to(work)
    curve, count = _block.CURVES[activation], len(block.weights)
    at = linearize(block, x)
    by_weight = [torch.zeros_like(w) for w in block.weights]
    by_slope: list[Tensor | None] = [None] * (count - 1)
    by_map = None if trace_map is None else torch.zeros_like(trace_map, dtype=work)
    if grad_log_det is not None:
        each = grad_log_det.to(work)
        each = each.reshape(len(each), *[1] * (x.dim() - 1))
        vectors = _block.basis(x) if probes is None else probes.to(work)
        tangents, tangent_inputs, _ = _block.pushed(block, at, vectors)
        outputs, arguments, _ = _block.pulled(block, at, each * sums.to(work))
        by_weight = [_block.outer(w, g, t) for w, g, t in zip(block.weights, arguments, tangent_inputs, strict=True)]
        by_slope = [(b * t).sum(0) for b, t in zip(outputs, tangents, strict=True)]
        if trace_map is not None:
            (d1, d2), m = at.slopes, trace_map.to(work)
            where = _where(x, m)
            d2_weighed = first * each * d2
            by_slope[1] = by_slope[1] + first * each * _block.traced(m, d1, where)
            by_slope[0] = by_slope[0] + _block.traced(m.transpose(1, 2), d2_weighed, where)
            by_map = _block.trace_map_gradient(m, d2_weighed, d1, where)
    by_bias = [torch.zeros_like(b) for b in block.biases]
    by_parameter = [block.parameters.new_zeros(()) for _ in range(count - 1)]
    delta = torch.zeros_like(at.value) if grad_value is None else grad_value.to(work)
    for i in range(count - 1, -1, -1):
        weight = block.weights[i]
        by_weight[i] = by_weight[i] + _block.outer(weight, delta, at.inputs[i])
        by_bias[i] = _block.bias_gradient(block.biases[i], delta)
        delta = _block.pull(weight, delta)
        if i == 0:
            break
        z, p = at.points[i - 1], block.parameters[i - 1]
        to_z = at.slopes[i - 1] * delta
        to_p = curve.value_by(z, p) * delta
        if by_slope[i - 1] is not None:
            to_z = to_z + curve.curvature(z, p) * by_slope[i - 1]
            to_p = to_p + at.signs[i - 1] * curve.slope_by(z, p) * by_slope[i - 1]
        by_parameter[i - 1] = to_p.sum()
        delta = _block._gathered(block, to_z, weight)
    by_parameters = torch.stack(by_parameter) if by_parameter else torch.zeros_like(block.parameters)
    found = [delta, *by_weight, *by_bias, by_parameters, *([] if by_map is None else [by_map])]
    return [t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)]


def log_det_series_kept_backward(
    grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums, kept, first, activation
) -> list[Tensor]:
    """The same, of what `log_det_series_keeping` gives: computed anew here."""
    return log_det_series_backward(
        grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums, first, activation
    )
