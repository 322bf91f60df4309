r"""log|det(I + J)| of y = x + g(x) on the GPU; `genkernels.reference.log_det_series` has the maths, `_block` the maps.

Fully connected: `_series_kernel`, a launch for the pass and all terms of a probe (of several: one for the pass and one
for all of them); a program takes BR samples of one probe through every map of every term, adds up the sums and its
samples' log-determinants, and at last the trace of an exact first term. Convolutions: a launch for each map of the
pass, of each map of each term (the last of a term with the probe's product and the sums), one for an exact first
term's trace, a tile of which has pixels of one class, and one that adds up.

The gradient: for each probe the tangents and the cotangents, then the gradient by z from the last map to the first, in
one launch where fully connected with one probe (three with several), else one for each map of each of the four chains;
then, for each map, one or two products over all rows and probes and their additions. An exact first term adds two
launches for the slopes and two for its map.

Flops, h being the maps' multiplications a sample: 2 h for the pass and for each term and probe; the gradient 6 h and
6 h a probe. Bytes, fully connected: x, v, value, sums and the slopes, which lie in the caches, and the weights once
a program and map. Convolutions, each term: what every map reads (its taps out of the caches) and writes, and the
slopes.

Without probes the series has one term, of basis vectors: the rows of the Jacobian; its inverse is torch's.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton import _block, _math
from genkernels.triton._block import CLIPSWISH, ELU, IN, IN_AT, OUT, OUT_AT, SIZES, Network
from genkernels.triton._recording import SampleCalls, meta

# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _term_tile(
    p_in,
    p_w,
    p_probes,
    p_sums,
    p_out,
    p_coefficients,
    term,
    o_r,
    m_r,
    c,
    inputs,
    columns,
    height,
    width,
    TAPS: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """w of a term; adds it to the sums, gives its product with the probe times the term's coefficient, by rows."""
    o_c = tl.arange(0, BC).to(tl.int64) + c
    m_c = o_c < columns
    b_w = _block.product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, columns, height, width, True, TAPS, BK)
    m = m_r[:, None] & m_c[None, :]
    o = o_r[:, None] * columns + o_c[None, :]
    tl.store(p_out + o, b_w, m)
    by = tl.load(p_coefficients + 2 * term).to(b_w.dtype)
    following = tl.load(p_coefficients + 2 * term + 1).to(b_w.dtype)
    b_sums = tl.load(p_sums + o, m, other=0.0)
    tl.store(p_sums + o, tl.where(following != 0, b_sums + following * b_w, b_sums), m)
    b_dot = tl.sum(b_w * tl.load(p_probes + o, m, other=0.0), axis=1)
    return tl.where(by != 0, by * b_dot, 0.0)


@triton.jit
def _shrink(b_after, b_before, power):
    """(after / before) ^ power."""
    b_ratio = b_after / tl.where(b_before > 0, b_before, 1.0)
    m = (b_ratio > 0) & (b_ratio < float("inf"))
    return tl.where(m, _math.exp(_math.log(tl.where(m, b_ratio, 1.0)) * power.to(b_ratio.dtype)), b_ratio)


@triton.jit(do_not_specialize=SIZES)
def _series_kernel(
    p_table,
    p_push,
    p_pull,
    p_biases,
    bias_pitch,
    p_parameters,
    p_inputs,
    p_d,
    p_value,
    p_cotangents,
    p_probes,
    p_sums,
    p_trace_map,
    p_coefficients,
    p_log_det,
    p_shrink,
    rows,
    pitch,
    probes,
    terms,
    layers,
    ACTIVATION: tl.constexpr,
    FORWARD: tl.constexpr,
    SERIES: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Of a fully connected block value and slopes (FORWARD) and, of the grid's second axis' probe, all terms (SERIES).

    coefficients ``[terms + 1, 2]``: what a term's product counts and what its vector counts in the sums; last the
    weight of the trace and the power of shrink. The last plane of `cotangents` has the probes, and then w.
    """
    probe = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_n = o_n < rows
    plane = pitch.to(tl.int64)
    features = _block.field(p_table, 0, IN)
    last = layers - 1
    ACC: tl.constexpr = p_push.dtype.element_ty
    if FORWARD:
        _block.forward_chain(
            p_table,
            p_push,
            p_biases,
            bias_pitch,
            p_parameters,
            p_inputs,
            None,
            p_d,
            o_n,
            m_n,
            plane,
            layers,
            ACTIVATION,
            BC,
            BK,
        )
        for c in range(0, features, BC):
            o_c = tl.arange(0, BC).to(tl.int64) + c
            m_c = o_c < features
            b_value = _block.product(
                p_inputs + plane * _block.field(p_table, last, IN_AT),
                p_push + _block.field(p_table, last, _block.PUSH_AT),
                o_n,
                m_n,
                o_c,
                m_c,
                _block.field(p_table, last, IN),
                features,
                1,
                1,
                True,
                1,
                BK,
            )
            p_bias = p_biases + _block.field(p_table, last, _block.BIAS_AT)
            b_value += _block.bias_tile(p_bias, bias_pitch, o_n, m_n, o_c, m_c)
            tl.store(p_value + (o_n[:, None] * features + o_c[None, :]), b_value, m_n[:, None] & m_c[None, :])
    if SERIES:
        o_r = probe * rows + o_n
        wide = plane * probes
        p_w = p_cotangents + wide * _block.field(p_table, last, OUT_AT)
        b_log_det = tl.zeros((BR,), ACC)
        for term in range(0, terms):
            _block.pull_chain(
                p_table, p_pull, p_cotangents, None, p_d, o_r, o_n, m_n, wide, plane, layers, ACTIVATION, BC, BK
            )
            for c in range(0, features, BC):
                b_log_det += _term_tile(
                    p_cotangents,
                    p_pull,
                    p_probes,
                    p_sums,
                    p_w,
                    p_coefficients,
                    term,
                    o_r,
                    m_n,
                    c,
                    _block.field(p_table, 0, OUT),
                    features,
                    1,
                    1,
                    1,
                    BC,
                    BK,
                )
            tl.debug_barrier()
        if p_trace_map is not None:
            if probe == 0:
                inputs = _block.field(p_table, 1, IN)
                columns = _block.field(p_table, 2, IN)
                first = tl.load(p_coefficients + 2 * terms).to(ACC)
                for c in range(0, columns, BC):
                    o_c = tl.arange(0, BC).to(tl.int64) + c
                    m_c = o_c < columns
                    b_y = _block.product(p_d, p_trace_map, o_n, m_n, o_c, m_c, inputs, columns, 1, 1, True, 1, BK)
                    p_d2 = p_d + plane * inputs
                    b_d2 = tl.load(
                        p_d2 + (o_n[:, None] * columns + o_c[None, :]), m_n[:, None] & m_c[None, :], other=0.0
                    )
                    b_log_det += first * tl.sum(b_y * b_d2, axis=1)
        tl.store(p_log_det + o_r, b_log_det, m_n)
        b_after = tl.zeros((BR,), ACC)
        b_before = tl.zeros((BR,), ACC)
        for c in range(0, features, BC):
            o_c = tl.arange(0, BC).to(tl.int64) + c
            o = o_r[:, None] * features + o_c[None, :]
            m = m_n[:, None] & (o_c < features)[None, :]
            b_w = tl.load(p_w + o, m, other=0.0)
            b_v = tl.load(p_probes + o, m, other=0.0)
            b_after += tl.sum(b_w * b_w, axis=1)
            b_before += tl.sum(b_v * b_v, axis=1)
        tl.store(p_shrink + o_r, _shrink(b_after, b_before, tl.load(p_coefficients + 2 * terms + 1)), m_n)


@triton.jit(do_not_specialize=SIZES)
def _term_kernel(
    p_in,
    p_w,
    p_probes,
    p_sums,
    p_out,
    p_coefficients,
    p_dots,
    term,
    rows,
    inputs,
    columns,
    height,
    width,
    TAPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """The first map's product of a term; rows are those of all probes. dots ``[column tiles, rows]`` add up terms."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < rows
    c = tl.program_id(1) * BC
    b_dot = _term_tile(
        p_in,
        p_w,
        p_probes,
        p_sums,
        p_out,
        p_coefficients,
        term,
        o_r,
        m_r,
        c,
        inputs,
        columns,
        height,
        width,
        TAPS,
        BC,
        BK,
    )
    p_to = p_dots + (tl.program_id(1).to(tl.int64) * rows + o_r)
    if term > 0:
        b_dot += tl.load(p_to, m_r, other=0.0)
    tl.store(p_to, b_dot, m_r)


@triton.jit
def _plane_sum(p_from, pixels, rows, tiles, sample, BLOCK: tl.constexpr):
    """Of ``[tiles, rows]`` the sum over a sample's pixels."""
    b_sum = tl.zeros((BLOCK,), p_from.dtype.element_ty)
    for tile in range(0, tiles):
        for i in range(0, pixels, BLOCK):
            o = tl.arange(0, BLOCK).to(tl.int64) + i
            b_sum += tl.load(p_from + (rows.to(tl.int64) * tile + sample * pixels + o), o < pixels, other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit(do_not_specialize=("samples", "pixels", "features", "terms", "tiles", "trace_tiles"))
def _finish_kernel(
    p_dots,
    p_trace,
    p_w,
    p_probes,
    p_coefficients,
    p_log_det,
    p_shrink,
    samples,
    pixels,
    features,
    terms,
    tiles,
    trace_tiles,
    BLOCK: tl.constexpr,
):
    """Of one probe and sample the log-determinant ``[P, N]`` and how much the series shrank."""
    row = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = p_w.dtype.element_ty
    count = tl.num_programs(0).to(tl.int64) * pixels
    log_det = tl.zeros((), ACC)
    if p_dots is not None:
        log_det += _plane_sum(p_dots, pixels, count, tiles, row, BLOCK)
    if p_trace is not None:
        rows = samples.to(tl.int64) * pixels
        log_det += _plane_sum(p_trace, pixels, rows, tl.where(row < samples, trace_tiles, 0), row, BLOCK)
    tl.store(p_log_det + row, log_det)
    b_after = tl.zeros((BLOCK,), ACC)
    b_before = tl.zeros((BLOCK,), ACC)
    size = pixels.to(tl.int64) * features
    for i in range(0, size, BLOCK):
        o = tl.arange(0, BLOCK).to(tl.int64) + i
        b_w = tl.load(p_w + (row * size + o), o < size, other=0.0)
        b_v = tl.load(p_probes + (row * size + o), o < size, other=0.0)
        b_after += b_w * b_w
        b_before += b_v * b_v
    power = tl.load(p_coefficients + 2 * terms + 1)
    tl.store(p_shrink + row, _shrink(tl.sum(b_after, axis=0), tl.sum(b_before, axis=0), power))


# ---------------------------------------------------------------------------------------------------------- launchers


def _coefficients(terms, probes: int, exact: bool) -> tuple[float, list[float]]:
    """What the probes count in the sums, and the table of `_series_kernel`."""
    signed = [(c if k % 2 == 0 else -c) / probes for k, c in enumerate(terms)]
    if exact and terms:
        signed[0] = 0.0
    table = []
    for k, c in enumerate(signed):
        table += [c / (k + 1), signed[k + 1] if k + 1 < len(signed) else 0.0]
    first = terms[0] if exact and terms else 0.0
    return signed[0] if signed else 0.0, [*table, float(first), 0.5 / max(len(terms), 1)]


def log_det_series(
    x: Tensor, weights, biases, parameters: Tensor, trace_map: Tensor | None, probes: Tensor | None, terms, activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(value, log_det, sums, shrink)`` of contiguous tensors on one GPU; the caller has checked them."""
    if probes is None:
        return _whole(x, weights, biases, parameters, activation)
    value, sums = torch.empty_like(x), torch.empty_like(probes)
    work, count = torch.promote_types(x.dtype, torch.float32), len(probes)
    if not x.numel():
        value, sums = value.zero_(), sums.zero_()
        log_det, shrink = x.new_zeros((len(x),), dtype=work), x.new_zeros((count, len(x)), dtype=work)
        return value, log_det, sums, shrink
    with torch.cuda.device_of(x):
        net = Network(x, weights, biases, parameters, activation)
        into, d, out = _room(net)
        log_det, shrink = x.new_empty((count, len(x)), dtype=work), x.new_empty((count, len(x)), dtype=work)
        cotangents = net.planes(net.out_widths, count)
        w = net.enter(cotangents[1][-1], probes)
        of_probes, exact = w.clone(), trace_map is not None and len(terms) > 0
        at_first, table = _coefficients(terms, count, exact)
        summed = of_probes * at_first if at_first else torch.zeros_like(of_probes)
        coefficients = _block.numbers(table, x.device)
        state = (cotangents, of_probes, summed, coefficients, log_det, shrink)
        run = _convolutional if net.image else _connected
        run(net, into, d, out, *state, trace_map if exact else None, len(terms))
        value, sums = net.leave(out, x), net.leave(summed, probes)
    return value, log_det[0] if count == 1 else log_det.sum(0), sums, shrink


def _room(net: Network):
    """Planes of what maps read and of slopes, and that of the value."""
    into, d = net.planes(net.in_widths), net.planes(net.slope_widths)
    net.enter(into[1][0], net.x)
    return into, d, net.x.new_empty((net.rows, net.features), dtype=net.dtype)


def _connected(net, into, d, out, cotangents, probes, sums, coefficients, log_det, shrink, trace_map, terms) -> None:
    count = len(log_det)
    tiles = _block.chain_tiles(net.parameters.element_size())
    programs = triton.cdiv(net.rows, tiles.BR)
    packed = None if trace_map is None else trace_map[0].T.to(net.dtype).contiguous()
    arguments = (net.table, net.push, net.pull, net.biases, net.bias_pitch, net.parameters, into[0], d[0], out)
    arguments += (cotangents[0], probes, sums, packed, coefficients, log_det, shrink)
    arguments += (net.rows, net.pitch, count, terms, net.layers)
    options = tiles._asdict() | {"ACTIVATION": net.activation, "enable_fp_fusion": True}
    if count == 1:
        _series_kernel[(programs, 1)](*arguments, FORWARD=True, SERIES=True, **options)
    else:
        _series_kernel[(programs, 1)](*arguments, FORWARD=True, SERIES=False, **options)
        _series_kernel[(programs, count)](*arguments, FORWARD=False, SERIES=True, **options)


def _convolutional(
    net, into, d, out, cotangents, probes, sums, coefficients, log_det, shrink, trace_map, terms
) -> None:
    count = len(log_det)
    _pass(net, into, d, out)
    planes, first = cotangents[1], net.maps[0]
    tiles = net.column_tiles(net.features)
    dots = probes.new_empty((tiles, len(probes))) if terms else None
    for term in range(terms):
        for i in range(net.layers - 1, 0, -1):
            net.pull_back(i, planes[i], d[1][i - 1], None, planes[i - 1], count)
        arguments = (planes[0], first.pull, probes, sums, planes[-1], coefficients, dots, term, len(probes))
        arguments += (first.outputs, net.features, net.height, net.width)
        net.launch(_term_kernel, first, net.features, len(probes), arguments)
    trace = None if trace_map is None else _block.trace_sums(net, d[1], trace_map, coefficients[2 * terms :])
    sizes = (net.samples, net.height * net.width, net.features, terms, tiles, 0 if trace is None else len(trace))
    _finish_kernel[(count * net.samples,)](
        *(dots, trace, planes[-1], probes, coefficients, log_det, shrink, *sizes), BLOCK=256, enable_fp_fusion=True
    )


def _pass(net, into, d, out) -> None:
    for i in range(net.layers - 1):
        net.forward(i, into[1][i], None, into[1][i + 1], d[1][i])
    net.value(into[1][-1], out)


def _whole(x: Tensor, weights, biases, parameters: Tensor, activation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the Jacobian itself, whose rows are the first term's vectors of basis vectors."""
    size = x.shape[1:].numel()
    work = torch.promote_types(x.dtype, torch.float32)
    basis = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:]).expand(size, *x.shape)
    if not x.numel():
        empty = x.new_zeros((len(x),), dtype=work)
        return torch.zeros_like(x), empty, torch.zeros_like(basis).contiguous(), empty.expand(size, -1).contiguous()
    with torch.cuda.device_of(x):
        net = Network(x, weights, biases, parameters, activation)
        into, d, out = _room(net)
        cotangents = net.planes(net.out_widths, size)
        w = net.enter(cotangents[1][-1], basis)
        if net.image:
            _pass(net, into, d, out)
            for i in range(net.layers - 1, 0, -1):
                net.pull_back(i, cotangents[1][i], d[1][i - 1], None, cotangents[1][i - 1], size)
            first = net.maps[0]
            sizes = (len(w), net.samples * size, first.outputs, first.inputs, net.height, net.width)
            arguments = (cotangents[1][0], first.pull, None, None, None, None, w, None, *sizes)
            net.launch(_block.plain_kernel, first, first.inputs, len(w), arguments)
        else:
            unused = x.new_empty((2, size, len(x)), dtype=work)
            coefficients = _block.numbers([0.0, 0.0, 0.0, 0.5], x.device)
            sums = torch.empty_like(w)
            _connected(net, into, d, out, cotangents, w.clone(), sums, coefficients, *unused, None, 1)
        rows = net.leave(w, x.new_empty(basis.shape, dtype=work, device=x.device))
        matrix = rows.reshape(size, len(x), size).transpose(0, 1)
        matrix = matrix + torch.eye(size, dtype=work, device=x.device)
        sums = torch.linalg.inv(matrix).transpose(0, 1).reshape(basis.shape).to(x.dtype)
        value = net.leave(out, x)
    return value, torch.linalg.slogdet(matrix)[1], sums.contiguous(), matrix.new_zeros((size, len(x)))


def log_det_series_backward(
    grad_value: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    weights,
    biases,
    parameters: Tensor,
    trace_map: Tensor | None,
    probes: Tensor | None,
    sums: Tensor,
    first: float,
    activation,
) -> list[Tensor]:
    """Gradients of x, of each weight, of each bias, of the parameters, and of the trace's map where there is one.
    Conditions as for `log_det_series`."""
    found = [torch.zeros_like(t) for t in (x, *weights, *biases, parameters)]
    by_map = [] if trace_map is None else [torch.zeros_like(trace_map)]
    if not x.numel():
        return [*found, *by_map]
    with torch.cuda.device_of(x):
        net = Network(x, weights, biases, parameters, activation)
        at = _block.room_for_pass(net)
        deltas = net.planes(net.out_widths)
        if grad_value is None:
            deltas[1][-1].zero_()
        else:
            net.enter(deltas[1][-1], grad_value)
        probed = None
        if grad_log_det is not None:
            probed, by_map = _probed(net, at, grad_log_det, trace_map, probes, sums, first)
        by_x, by_parameters = _block.run_all(net, at, probed, deltas)
        maps = _block.map_gradients(net, at, probed, deltas, weights, biases)
    return [net.leave(by_x, x), *maps, by_parameters.to(parameters.dtype), *by_map]


def _probed(net, at, grad_log_det, trace_map, probes, sums, first):
    """The planes of probes, filled with what goes in, and the gradient by the trace's map."""
    probed = _block.room_for_probes(net, len(sums), trace_map is not None)
    if probes is None:
        size = len(sums)
        probes = (
            torch.eye(size, dtype=sums.dtype, device=sums.device).view(size, 1, *net.x.shape[1:]).expand(sums.shape)
        )
    net.enter(probed.tangents[1][0], probes)
    each = grad_log_det.to(net.dtype).contiguous()
    of_sums = net.enter(probed.cotangents[1][-1], sums)
    of_sums.view(len(sums), net.samples, -1).mul_(each[None, :, None])
    if trace_map is None:
        return probed, []
    _block.run_pass(net, at)
    coefficient = _block.numbers([float(first)], net.x.device)
    return probed, [_block.trace_gradients(net, at.d[1], trace_map, each, coefficient, probed.by[1])]


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Every activation in rows, the heaviest two in images.

    Every type, layout, number of probes and kind of first term comes with one of them, and each sample's own biases.
    """
    names = {torch.float32: "fp32", torch.float64: "fp64"}
    kinds = [(torch.float32, image, int(CLIPSWISH), 1, True, False) for image in (False, True)]
    kinds += [(torch.float32, False, activation, 1, False, False) for activation in range(7)]
    kinds += [(torch.float32, True, int(ELU), 1, False, False)]
    kinds += [(torch.float64, image, int(CLIPSWISH), 2, True, False) for image in (False, True)]
    kinds += [(torch.float32, image, 5, 2, True, False) for image in (False, True)]
    kinds += [(torch.float32, image, int(CLIPSWISH), 1, True, True) for image in (False, True)]
    kinds += [(torch.float32, False, 5, 1, False, True)]
    calls = []
    for dtype, image, activation, probes, exact, own in kinds:
        tensor = partial(meta, dtype=dtype)
        twice = 2 if activation == CLIPSWISH.value else 1
        sizes, kernels = (12, 64 * twice, 64 * twice), (3, 1, 3)
        shapes = [(out, into) for into, out in zip(sizes, (64, 64, 12), strict=True)]
        weights = [tensor(*s, *((k, k) if image else ())) for s, k in zip(shapes, kernels, strict=True)]
        x = tensor(32, 12, 8, 8) if image else tensor(512, 12)
        biases, parameters = [tensor(len(x), s[0]) if own else tensor(s[0]) for s in shapes], tensor(2)
        trace_map = tensor(9 if image else 1, sizes[2], sizes[1]) if exact else None
        v, work = tensor(probes, *x.shape), tensor(len(x))
        label = f"{names[dtype]} {'image' if image else 'rows'} {activation} probes {probes}{' exact' if exact else ''}"
        label += " own biases" if own else ""
        net = (x, weights, biases, parameters, trace_map, v)
        calls.append((f"{label} forward", partial(log_det_series, *net, [1.0, 1.0], activation)))
        calls.append((f"{label} backward", partial(log_det_series_backward, x, work, *net, v, 1.0, activation)))
    written = partial(_block.written, [1.0], meta(4, dtype=torch.int64))
    calls.append(("while a graph is captured", written))
    return calls
