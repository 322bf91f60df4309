r"""The inverse of an autoregressive transform, affine or by splines, on the GPU.

.. math:: z_i = f(x_i;\,p_i),\qquad p_i = \mathrm{MADE}(x_{<i})

Germain et al. 2015; Papamakarios et al. 2017; Durkan et al. 2019. `genkernels.reference.made` has the maths of the
inverse and of its gradient; f is an affine map of 2 parameters, or a spline of 3K − 1 or 3K
(`genkernels.triton.rational_quadratic_spline`).

Layout. ``order [D]`` and ``counts [layers, D + 1]`` say which units become known at which step. Weights as they are,
activations ``[N, H]`` in global memory, which a program's few samples keep in the first caches. Features are gathered
into the order of the steps first, so that every prefix is contiguous.

Parallelisation. A program solves ROWS samples alone, from the first feature to the last: no program waits for another,
so one
launch does the whole inverse. A step is a few dot products over what is known: the P parameters of its feature, then
each layer's units whose degree has just become known, UNITS at a time. Every unit is computed once. Programs read the
live weights once each, through the second-level cache; the floor is their bytes times the number of programs.

The gradient's transposed solve is the same from the last feature backwards, over transposed weights. It leaves each
layer's signal, from which the weights' gradients are one product a layer (cuBLAS, in `genkernels.ops`' dtype), masked.

Masked products by themselves have no kernel here: on a GPU the half that is dead costs a dense product (cuBLAS) with
the masked weight less than a product of one's own would lose.

Within a program, units written by some threads are read by others: `tl.debug_barrier` is a barrier of the program's
threads. Sums
run in a fixed order: bitwise the same from run to run. Offsets are 64-bit.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from genkernels._options import SCALE_CONSTANTS, ScaleMap, Spline
from genkernels.triton import _math, _scale_map
from genkernels.triton import rational_quadratic_spline as _spline
from genkernels.triton._recording import SampleCalls, meta

SIZES = ("n", "features", "hidden", "layers")  # not worth a compilation for each value

#: Samples of a program, depth of one step of a dot product, units at a time. ptxas alone settles for 64 registers and
#: spills.
ROWS, DEPTH, UNITS = 4, 64, 4


def _options(wide: bool) -> dict[str, int]:
    return {"num_warps": 4, "maxnreg": 255 if wide else 128}


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _dot(p_weight, o_row, m_row, p_act, o_sample, m_sample, begin, end, UNITS: tl.constexpr, DEPTH: tl.constexpr):
    """Σ_k weight[row, k] act[sample, k] over begin ≤ k < end, [ROWS, UNITS]; o_row, o_sample are offsets of whole
    rows."""
    b_sum = tl.zeros((o_sample.shape[0], UNITS), p_act.dtype.element_ty)
    for k in range(begin, end, DEPTH):
        o_k = k + tl.arange(0, DEPTH)
        m_k = o_k < end
        b_w = tl.load(p_weight + (o_row[:, None] + o_k[None, :]), m_row[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(p_act + (o_sample[:, None] + o_k[None, :]), m_sample[:, None] & m_k[None, :], other=0.0)
        b_sum += tl.sum(b_a[:, None, :] * b_w[None, :, :], axis=2)
    return b_sum


@triton.jit(do_not_specialize=SIZES)
def _extend_kernel(
    p_z,
    p_x,
    p_ldj,
    p_weights,
    p_biases,
    p_out_weight,
    p_out_bias,
    p_context,
    p_params,
    p_values,
    p_units,
    p_counts,
    n,
    features,
    hidden,
    layers,
    MAP: tl.constexpr,
    CONSTANT: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SOLVES: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The inverse (SOLVES), or all units from a known x.

    z, x [n, D] in the order of the steps, ldj [n]; weights [layers, H, max(D, H)] padded, biases [layers, H],
    out_weight [D·P, H] and out_bias in the order of the steps; params [n, P]: of a step, in turn; values, units
    [layers, n, H]: pre-activations and what the next layer reads. Affine maps have K = 0.
    """
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < n
    o_unit = tl.arange(0, UNITS)
    wide_hidden = hidden.to(tl.int64)  # what 64-bit offsets come from
    stride = tl.maximum(features, hidden).to(tl.int64)
    plane = n.to(tl.int64) * hidden
    wide = p_x.dtype.element_ty
    b_ldj = tl.zeros((ROWS,), wide)
    for step in range(0, features + 1):
        # the units of degree `step`, layer by layer
        for layer in range(0, layers):
            first = tl.load(p_counts + layer * (features + 1) + tl.maximum(step - 1, 0))
            first = tl.where(step == 0, 0, first)
            last = tl.load(p_counts + layer * (features + 1) + step)
            for unit in range(first, last, UNITS):
                o_row = unit + o_unit
                m_row = o_row < last
                o_w = (layer * wide_hidden + o_row) * stride
                if layer == 0:
                    b_v = _dot(p_weights, o_w, m_row, p_x, o_n * features, m_n, 0, step, UNITS, DEPTH)
                else:
                    known = tl.load(p_counts + (layer - 1) * (features + 1) + step)
                    p_u = p_units + (layer - 1) * plane
                    b_v = _dot(p_weights, o_w, m_row, p_u, o_n * hidden, m_n, 0, known, UNITS, DEPTH)
                b_v += tl.load(p_biases + layer * wide_hidden + o_row, m_row, other=0.0)[None, :]
                o_out = o_n[:, None] * hidden + o_row[None, :]
                m_out = m_n[:, None] & m_row[None, :]
                if p_context is not None:
                    if layer == 0:
                        b_v += tl.load(p_context + o_out, m_out, other=0.0)
                b_u = tl.where(b_v < 0, 0.0, b_v)
                if RESIDUAL:
                    if layer % 2 == 0:
                        if layer >= 2:
                            b_v += tl.load(p_values + (layer - 2) * plane + o_out, m_out, other=0.0)
                        b_u = tl.where((layer != layers - 1) & (b_v < 0), 0.0, b_v)
                tl.store(p_values + layer * plane + o_out, b_v, m_out)
                tl.store(p_units + layer * plane + o_out, b_u, m_out)
            tl.debug_barrier()
        if SOLVES:
            if step < features:
                known = tl.load(p_counts + (layers - 1) * (features + 1) + step)
                p_u = p_units + (layers - 1) * plane
                for number in range(0, P, UNITS):
                    o_number = number + o_unit
                    o_row = (step * P + o_number).to(tl.int64)
                    m_row = o_number < P
                    b_p = _dot(p_out_weight, o_row * hidden, m_row, p_u, o_n * hidden, m_n, 0, known, UNITS, DEPTH)
                    b_p += tl.load(p_out_bias + o_row, m_row, other=0.0)[None, :]
                    tl.store(p_params + (o_n[:, None] * P + o_number[None, :]), b_p, m_n[:, None] & m_row[None, :])
                tl.debug_barrier()
                b_z = tl.load(p_z + o_n * features + step, m_n, other=0.0)
                if K == 0:
                    b_log, _ = _scale_map.log_scale(tl.load(p_params + o_n * 2, m_n, other=0.0), MAP, CONSTANT)
                    b_x = (b_z - tl.load(p_params + (o_n * 2 + 1), m_n, other=0.0)) * _math.exp(-b_log)
                    b_ldj -= b_log
                else:
                    b_x, b_more = _spline.mapped(
                        p_params, o_n, m_n, b_z, True, KIND, K, P, BINS, BOUND, SCALE, FLOOR, CLIP
                    )
                    b_ldj += b_more
                tl.store(p_x + o_n * features + step, b_x, m_n)
                tl.debug_barrier()
    if SOLVES:
        tl.store(p_ldj + o_n, b_ldj, m_n)


@triton.jit(do_not_specialize=SIZES)
def _transposed_kernel(
    p_grad_x,
    p_grad_ldj,
    p_x,
    p_params,
    p_solution,
    p_cotangents,
    p_weights,
    p_out_weight,
    p_values,
    p_signals,
    p_counts,
    n,
    features,
    hidden,
    layers,
    MAP: tl.constexpr,
    CONSTANT: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The transposed solve: λ [n, D], the parameters' cotangents [n, D, P] and the hidden layers' signals [layers, n,
    H].

    weights [layers, max(D, H), H] and out_weight [H, D·P] are transposed; everything in the order of the steps.
    """
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < n
    o_unit = tl.arange(0, UNITS)
    wide_hidden = hidden.to(tl.int64)  # what 64-bit offsets come from
    stride = tl.maximum(features, hidden).to(tl.int64)
    plane = n.to(tl.int64) * hidden
    wide = p_x.dtype.element_ty
    b_by_ldj = tl.zeros((ROWS,), wide)
    if p_grad_ldj is not None:
        b_by_ldj = tl.load(p_grad_ldj + o_n, m_n, other=0.0)
    for back in range(0, features + 1):
        step = features - back  # first the units of this degree, then the feature of this degree
        for up in range(0, layers):
            layer = layers - 1 - up
            first = tl.load(p_counts + layer * (features + 1) + tl.maximum(step - 1, 0))
            first = tl.where(step == 0, 0, first)
            last = tl.load(p_counts + layer * (features + 1) + step)
            for unit in range(first, last, UNITS):
                o_row = unit + o_unit
                m_row = o_row < last
                if layer == layers - 1:
                    o_w = o_row * (P * features.to(tl.int64))
                    o_c = o_n * (P * features)
                    b_g = _dot(p_out_weight, o_w, m_row, p_cotangents, o_c, m_n, step * P, features * P, UNITS, DEPTH)
                else:
                    below = tl.load(p_counts + (layer + 1) * (features + 1) + tl.maximum(step - 1, 0))
                    below = tl.where(step == 0, 0, below)
                    o_w = ((layer + 1) * stride + o_row) * wide_hidden
                    p_above = p_signals + (layer + 1) * plane
                    b_g = _dot(p_weights, o_w, m_row, p_above, o_n * hidden, m_n, below, hidden, UNITS, DEPTH)
                o_out = o_n[:, None] * hidden + o_row[None, :]
                m_out = m_n[:, None] & m_row[None, :]
                b_v = tl.load(p_values + layer * plane + o_out, m_out, other=0.0)
                if RESIDUAL:
                    b_g = tl.where((b_v <= 0) & (layer != layers - 1), 0.0, b_g)
                    if layer % 2 == 0:
                        if layer + 2 < layers:
                            b_g += tl.load(p_signals + (layer + 2) * plane + o_out, m_out, other=0.0)
                else:
                    b_g = tl.where(b_v <= 0, 0.0, b_g)
                tl.store(p_signals + layer * plane + o_out, b_g, m_out)
            tl.debug_barrier()
        if step > 0:
            feature = step - 1
            seen = tl.load(p_counts + feature)  # units of the first layer that do not see it
            o_w = feature * wide_hidden + 0 * o_unit
            b_sum = _dot(p_weights, o_w, o_unit < 1, p_signals, o_n * hidden, m_n, seen, hidden, UNITS, DEPTH)
            b_rest = -tl.sum(b_sum, axis=1)
            o_feature = o_n * features + feature
            if p_grad_x is not None:
                b_rest += tl.load(p_grad_x + o_feature, m_n, other=0.0)
            if K == 0:
                o_c = o_feature * 2
                b_log, b_slope = _scale_map.log_scale(tl.load(p_params + o_c, m_n, other=0.0), MAP, CONSTANT)
                b_found = b_rest * _math.exp(-b_log)
                b_by_log = b_rest * tl.load(p_x + o_feature, m_n, other=0.0)
                if p_grad_x is None:  # nothing sees the last feature's x, which may be infinite
                    b_found = tl.where(step < features, b_found, 0.0)
                    b_by_log = tl.where(step < features, b_by_log, 0.0)
                tl.store(p_cotangents + o_c, (b_by_log + b_by_ldj) * b_slope, m_n)
                tl.store(p_cotangents + (o_c + 1), b_found, m_n)
            else:
                b_x = tl.load(p_x + o_feature, m_n, other=0.0)
                b_found = -_spline.gradients(
                    p_params,
                    p_cotangents,
                    o_feature,
                    m_n,
                    b_x,
                    -b_rest,
                    -b_by_ldj,
                    True,
                    KIND,
                    K,
                    P,
                    BINS,
                    BOUND,
                    SCALE,
                    FLOOR,
                    CLIP,
                )
            tl.store(p_solution + o_feature, b_found, m_n)
            tl.debug_barrier()


# ---------------------------------------------------------------------------------------------------------- launchers


class _Padded:
    """The layers' tensors in one piece each: hidden layers padded to one width, features in the order of the steps."""

    def __init__(self, weights, biases, order, counts, maps):
        *hidden, last = weights
        self.maps, self.params = maps, maps["P"]
        self.features, self.layers = order.numel(), len(hidden)
        self.sizes = [w.shape[0] for w in hidden]
        self.hidden = max(self.sizes)
        width = max(self.features, self.hidden)
        new = last.new_zeros
        self.weights, self.biases = new((self.layers, self.hidden, width)), new((self.layers, self.hidden))
        for layer, (w, b) in enumerate(zip(hidden, biases[:-1], strict=True)):
            w = w[:, order] if layer == 0 else w
            self.weights[layer, : w.shape[0], : w.shape[1]] = w
            self.biases[layer, : w.shape[0]] = b
        numbers = torch.arange(self.params, device=order.device) * self.features
        self.rows = (order[:, None] + numbers).flatten()
        self.out_weight = new((self.params * self.features, self.hidden))
        self.out_weight[:, : last.shape[1]] = last[self.rows]
        self.out_bias = biases[-1][self.rows]
        # a count beyond the units there are would be an address beyond the tensors
        most = torch.tensor(self.sizes, dtype=counts.dtype).to(counts.device, non_blocking=True)
        self.counts = counts.clamp(min=0).minimum(most[:, None]).contiguous()

    def padded(self, context: Tensor | None) -> Tensor | None:
        if context is None or context.shape[1] == self.hidden:
            return context
        return F.pad(context, (0, self.hidden - context.shape[1])).contiguous()


def _affine(scale_map: int, constant: float) -> dict:
    """What kernels know of the maps when they are compiled: of affine ones, and nothing of splines."""
    splines = {"KIND": 0, "K": 0, "P": 2, "BINS": 1, "BOUND": 0.0, "SCALE": 0.0, "FLOOR": 0.0, "CLIP": 0.0}
    return {"MAP": int(scale_map), "CONSTANT": float(constant), **splines}


def _splines(outputs: int, features: int, *options) -> dict:
    return {"MAP": 0, "CONSTANT": 0.0, **_spline.compiled_in(outputs // features, *options)}


def _extend(net: _Padded, z, x, ldj, context, residual):
    """Runs `_extend_kernel`: ``(values, units)`` ``[layers, N, H]``; solves for x where z is given."""
    n = x.shape[0]
    values, units = (x.new_zeros((net.layers, n, net.hidden)) for _ in range(2))
    with torch.cuda.device_of(x):
        _extend_kernel[(triton.cdiv(n, ROWS),)](
            z,
            x,
            ldj,
            net.weights,
            net.biases,
            net.out_weight,
            net.out_bias,
            net.padded(context),
            x.new_empty((n, net.params)) if z is not None else None,
            values,
            units,
            net.counts,
            n,
            net.features,
            net.hidden,
            net.layers,
            RESIDUAL=bool(residual),
            **net.maps,
            SOLVES=z is not None,
            ROWS=ROWS,
            DEPTH=DEPTH,
            UNITS=UNITS,
            enable_fp_fusion=True,
            **_options(x.dtype == torch.float64),
        )
    return values, units


def made_inverse(z, context, weights, biases, order, counts, residual, scale_map, constant):
    """`(x, ldj)` of contiguous fp32 or fp64 tensors on one GPU; the caller has checked them."""
    return _inverse(_affine(scale_map, constant), z, context, weights, biases, order, counts, residual)


def made_inverse_backward(grad_x, grad_ldj, x, context, weights, biases, order, counts, residual, scale_map, constant):
    """Gradients of z, context and each layer's weight and bias. Conditions as for `made_inverse`."""
    network = context, weights, biases, order, counts, residual
    return _inverse_backward(_affine(scale_map, constant), grad_x, grad_ldj, x, *network)


def made_spline_inverse(z, context, weights, biases, order, counts, residual, *options):
    """As `made_inverse`; options: parametrization, bound, logit_scale, floor."""
    maps = _splines(weights[-1].shape[0], z.shape[1], *options)
    return _inverse(maps, z, context, weights, biases, order, counts, residual)


def made_spline_inverse_backward(grad_x, grad_ldj, x, context, weights, biases, order, counts, residual, *options):
    """As `made_inverse_backward`."""
    maps = _splines(weights[-1].shape[0], x.shape[1], *options)
    return _inverse_backward(maps, grad_x, grad_ldj, x, context, weights, biases, order, counts, residual)


def _inverse(maps: dict, z, context, weights, biases, order, counts, residual):
    x, ldj = torch.empty_like(z), z.new_empty(z.shape[0])
    if z.shape[0] == 0:
        return x, ldj
    found = torch.empty_like(z)
    net = _Padded(weights, biases, order, counts, maps)
    _extend(net, z[:, order].contiguous(), found, ldj, context, residual)
    x[:, order] = found
    return x, ldj


def _inverse_backward(maps: dict, grad_x, grad_ldj, x, context, weights, biases, order, counts, residual):
    n, features = x.shape
    if n == 0:
        both = [t for pair in zip(weights, biases, strict=True) for t in pair]
        return [torch.zeros_like(x), x.new_zeros((0, weights[0].shape[0])), *map(torch.zeros_like, both)]
    net = _Padded(weights, biases, order, counts, maps)
    steps = x[:, order].contiguous()
    values, units = _extend(net, None, steps, None, context, residual)
    in_steps = torch.arange(1, features + 1, device=x.device)
    ranks = [torch.searchsorted(c, torch.arange(net.hidden, device=x.device), right=True) for c in net.counts]
    live = [ranks[0][:, None] >= in_steps, *(ranks[i][:, None] >= ranks[i - 1] for i in range(1, net.layers))]
    live_out = in_steps.repeat_interleave(net.params)[:, None] > ranks[-1]
    params = F.linear(units[-1], net.out_weight.masked_fill(~live_out, 0), net.out_bias)
    solution, cotangents, signals = torch.empty_like(steps), torch.empty_like(params), torch.zeros_like(values)
    given = None if grad_x is None else grad_x[:, order].contiguous()
    with torch.cuda.device_of(x):
        _transposed_kernel[(triton.cdiv(n, ROWS),)](
            given,
            grad_ldj,
            steps,
            params,
            solution,
            cotangents,
            net.weights.mT.contiguous(),
            net.out_weight.mT.contiguous(),
            values,
            signals,
            net.counts,
            n,
            features,
            net.hidden,
            net.layers,
            RESIDUAL=bool(residual),
            **net.maps,
            ROWS=ROWS,
            DEPTH=DEPTH,
            UNITS=UNITS,
            enable_fp_fusion=True,
            **_options(x.dtype == torch.float64),
        )
    by_z = torch.empty_like(x)
    by_z[:, order] = solution
    grads = [by_z, -signals[0, :, : net.sizes[0]].contiguous()]
    inverse_order = torch.argsort(order)
    for layer, out in enumerate(net.sizes):
        u = steps if layer == 0 else units[layer - 1]
        by_weight = -(signals[layer].mT @ u).masked_fill(~live[layer], 0)
        by_weight = by_weight[:out, inverse_order] if layer == 0 else by_weight[:out, : net.sizes[layer - 1]]
        grads += [by_weight.contiguous(), -signals[layer].sum(0)[:out]]
    by_out = -(cotangents.mT @ units[-1]).masked_fill(~live_out, 0)[:, : net.sizes[-1]]
    by_weight, by_bias = torch.empty_like(weights[-1]), torch.empty_like(biases[-1])
    by_weight[net.rows], by_bias[net.rows] = by_out, -cotangents.sum(0)
    return [*grads, by_weight, by_bias]


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Each scale map, parametrization and type, with and without context and residual blocks."""
    n, features, hidden = 8, 6, (8, 8, 8)
    affine = [("fp32", 0, True), ("fp32", 1, False), ("fp32", 2, True), ("fp64", 1, True)]
    affine += [("fp32", code, True) for code in range(ScaleMap.SIGMOID_FLOOR, len(ScaleMap))] + [("fp64", 7, False)]
    cases = [
        (dtype, f"map {code}", flag, 2, made_inverse, made_inverse_backward, (code, SCALE_CONSTANTS.get(code, 1.0)))
        for dtype, code, flag in affine
    ]
    for dtype, kind, flag in [("fp32", 0, False), ("fp32", 1, True), ("fp64", 0, True), ("fp64", 2, False)]:
        count, codes = 24 - (kind != Spline.CIRCULAR), (kind, 5.0, 1.0, 1e-3)
        both = made_spline_inverse, made_spline_inverse_backward
        cases.append((dtype, f"splines {kind}", flag, count, *both, codes))
    calls = []
    for dtype, name, flag, count, inverse, backward, codes in cases:
        tensor = partial(meta, dtype=torch.float64 if dtype == "fp64" else torch.float32)
        sizes = (features, *hidden, count * features)
        weights = [tensor(out, into) for into, out in zip(sizes, sizes[1:], strict=False)]
        biases = [tensor(out) for out in sizes[1:]]
        order, counts = meta(features, dtype=torch.int64), meta(len(hidden), features + 1, dtype=torch.int64)
        z, context = tensor(n, features), tensor(n, hidden[0]) if flag else None
        net = (context, weights, biases, order, counts, flag, *codes)
        calls.append((f"{dtype} {name} residual {flag} inverse", partial(inverse, z, *net)))
        calls.append((f"{dtype} {name} residual {flag} backward", partial(backward, z, tensor(n), z, *net)))
    return calls
