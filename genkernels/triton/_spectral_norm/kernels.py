"""What is launched: the products, what finishes them, and the gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton import _math
from genkernels.triton._spectral_norm.convolutions import apply, multiply
from genkernels.triton._spectral_norm.layers import (
    A_AT,
    B_AT,
    BLOCK,
    BLOCKS,
    DISTANCE,
    FINISH,
    GRADIENT,
    INNER,
    IS_MATRIX,
    LEFT,
    LEFT_AT,
    NUMBERS,
    PIECES,
    PRODUCT,
    PRODUCTS,
    RIGHT,
    RIGHT_AT,
    SIGMA_AT,
    SUMS_AT,
    TRANSPOSED,
    U_AT,
    U_NUMBERS,
    V_AT,
    V_NUMBERS,
    M,
    address_of,
    find_layer,
)
from genkernels.triton._spectral_norm.matrices import gather, sweep
from genkernels.triton._spectral_norm.norms import combine, keep, norm_of


@triton.jit(do_not_specialize=("turn", "alone"))
def left_kernel(p_owners, p_table, p_addresses, p_room, turn, alone, T: tl.constexpr):
    """a = A v and its pieces, of matrices the partial sums of b; turn: iterations before; alone: no b is wanted."""
    _, p_layer, p_address, block = find_layer(p_owners, p_table, p_addresses, LEFT)
    p_weight = address_of(p_address, 0, T)
    p_u = address_of(p_address, 1, T)
    p_v = address_of(p_address, 2, T)
    rights = tl.load(p_layer + BLOCKS + RIGHT).to(tl.int32)
    pieces = tl.where(turn > 0, rights, 0)
    largest, squares, _ = combine(p_room + tl.load(p_layer + RIGHT_AT), rights, pieces)
    _, usable, first, second = norm_of(largest, squares)
    given = (usable == 0) & (turn <= 1)
    p_kept = p_room + tl.load(p_layer + V_AT)
    p_found = p_room + tl.where(usable, tl.load(p_layer + B_AT), tl.load(p_layer + V_AT))
    blocks = tl.load(p_layer + BLOCKS + LEFT).to(tl.int32)
    wanted = (usable | (turn == 1)) & (turn > 0)
    keep(p_kept, p_v, p_found, given, first, second, wanted, tl.load(p_layer + V_NUMBERS).to(tl.int32), block, blocks)
    p_kept_u = p_room + tl.load(p_layer + U_AT)
    if tl.load(p_layer + IS_MATRIX) != 0:
        sweep(
            p_weight, p_layer, p_room, block, p_v, p_found, given, first, second, p_u, p_kept_u, turn == 0, alone != 0
        )
    else:
        apply(
            p_weight,
            p_layer,
            p_room,
            block,
            p_v,
            p_found,
            given,
            first,
            second,
            p_u,
            p_kept_u,
            turn == 0,
            LEFT,
            A_AT,
            LEFT_AT,
        )


@triton.jit(do_not_specialize=("turn",))
def right_kernel(p_owners, p_table, p_addresses, p_room, turn, T: tl.constexpr):
    """b = Aᵀ u and its pieces; u, for the iterations to come; and σ for the case that v stays what it is."""
    _, p_layer, p_address, block = find_layer(p_owners, p_table, p_addresses, RIGHT)
    p_weight = address_of(p_address, 0, T)
    p_u = address_of(p_address, 1, T)
    lefts = tl.load(p_layer + BLOCKS + LEFT).to(tl.int32)
    largest, squares, dot = combine(p_room + tl.load(p_layer + LEFT_AT), lefts, lefts)
    value, usable, first, second = norm_of(largest, squares)
    given = (usable == 0) & (turn == 0)
    p_kept = p_room + tl.load(p_layer + U_AT)
    p_found = p_room + tl.where(usable, tl.load(p_layer + A_AT), tl.load(p_layer + U_AT))
    blocks = tl.load(p_layer + BLOCKS + RIGHT).to(tl.int32)
    wanted = usable | (turn == 0)
    keep(p_kept, p_u, p_found, given, first, second, wanted, tl.load(p_layer + U_NUMBERS).to(tl.int32), block, blocks)
    tl.store(p_room + tl.load(p_layer + SIGMA_AT), tl.where(usable, value, dot), block == 0)
    if tl.load(p_layer + IS_MATRIX) != 0:
        gather(p_weight, p_layer, p_room, block, usable, first, second, p_u, p_found, given)
    else:
        apply(
            p_weight,
            p_layer,
            p_room,
            block,
            p_u,
            p_found,
            given,
            first,
            second,
            p_u,
            p_found,
            given,
            RIGHT,
            B_AT,
            RIGHT_AT,
        )


@triton.jit
def _factor(sigma, coefficient, coefficient_low, at_most):
    """Whether a weight is divided by its norm at all, and the factor; the coefficient in two parts, for fp64."""
    c = tl.zeros((), sigma.dtype) + coefficient + coefficient_low
    divides = tl.where(at_most != 0, (sigma > c) | (sigma != sigma), sigma != 0)
    return divides, tl.where(divides, c / tl.where(divides, sigma, 1.0), 1.0)


@triton.jit(do_not_specialize=("iterations", "coefficient", "coefficient_low", "at_most"))
def finish_kernel(
    p_owners, p_table, p_addresses, p_room, p_sigma, iterations, coefficient, coefficient_low, at_most, T: tl.constexpr
):
    """σ, and all that the operator returns."""
    layer, p_layer, p_address, block = find_layer(p_owners, p_table, p_addresses, FINISH)
    lefts = tl.load(p_layer + BLOCKS + LEFT).to(tl.int32)
    rights = tl.load(p_layer + BLOCKS + RIGHT).to(tl.int32)
    blocks = tl.load(p_layer + BLOCKS + FINISH).to(tl.int32)
    iterates = iterations > 0
    _, _, dot = combine(p_room + tl.load(p_layer + LEFT_AT), lefts, tl.where(iterates, 0, lefts))
    largest, squares, _ = combine(p_room + tl.load(p_layer + RIGHT_AT), rights, tl.where(iterates, rights, 0))
    value, usable, first, second = norm_of(largest, squares)
    other = tl.load(p_room + tl.load(p_layer + SIGMA_AT), iterates, other=0.0)
    sigma = tl.where(usable, value, tl.where(iterates, other, dot))
    tl.store(p_sigma + layer, sigma, block == 0)
    _, factor = _factor(sigma, coefficient, coefficient_low, at_most)
    o = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < tl.load(p_layer + NUMBERS)
    b_w = _math.widened(tl.load(address_of(p_address, 0, T) + o, m, other=0.0))
    tl.store(address_of(p_address, 3, T) + o, (b_w * factor).to(T), m)
    p_u = address_of(p_address, 1, T)
    p_v = address_of(p_address, 2, T)
    p_kept = p_room + tl.load(p_layer + U_AT)
    count = tl.load(p_layer + U_NUMBERS).to(tl.int32)
    keep(address_of(p_address, 4, T), p_u, p_kept, iterations == 0, 1.0, 1.0, True, count, block, blocks)
    given = (usable == 0) & (iterations <= 1)
    p_found = p_room + tl.where(usable, tl.load(p_layer + B_AT), tl.load(p_layer + V_AT))
    count = tl.load(p_layer + V_NUMBERS).to(tl.int32)
    keep(address_of(p_address, 5, T), p_v, p_found, given, first, second, True, count, block, blocks)


@triton.jit(do_not_specialize=("coefficient", "coefficient_low", "at_most"))
def inner_kernel(
    p_owners, p_table, p_addresses, p_sums, p_sigma, coefficient, coefficient_low, at_most, T: tl.constexpr
):
    """Programs' sums of G · Ŵ; nothing is read where Ŵ is W whatever its norm."""
    layer, p_layer, p_address, block = find_layer(p_owners, p_table, p_addresses, INNER)
    divides, factor = _factor(tl.load(p_sigma + layer), coefficient, coefficient_low, at_most)
    p_grad = address_of(p_address, 0, T)
    p_weight = address_of(p_address, 1, T)
    numbers = tl.load(p_layer + NUMBERS)
    b_sum = tl.zeros((BLOCK,), p_sums.dtype.element_ty)
    stride = tl.load(p_layer + BLOCKS + INNER) * BLOCK
    for i in range(block.to(tl.int64) * BLOCK, tl.where(divides, numbers, 0), stride):
        o = i + tl.arange(0, BLOCK)
        b_w = _math.widened(tl.load(p_weight + o, o < numbers, other=0.0))
        b_sum += _math.widened(tl.load(p_grad + o, o < numbers, other=0.0)) * (b_w * factor)
    tl.store(p_sums + tl.load(p_layer + SUMS_AT) + block, tl.sum(b_sum, axis=0))


@triton.jit(do_not_specialize=("coefficient", "coefficient_low", "at_most"))
def gradient_kernel(
    p_owners,
    p_table,
    p_addresses,
    p_sums,
    p_sigma,
    p_grad_sigma,
    coefficient,
    coefficient_low,
    at_most,
    T: tl.constexpr,
):
    """f G + s D."""
    layer, p_layer, p_address, block = find_layer(p_owners, p_table, p_addresses, GRADIENT)
    sigma = tl.load(p_sigma + layer)
    divides, factor = _factor(sigma, coefficient, coefficient_low, at_most)
    o_sum = tl.arange(0, PIECES)
    b_sum = tl.load(p_sums + tl.load(p_layer + SUMS_AT) + o_sum, o_sum < tl.load(p_layer + BLOCKS + INNER), other=0.0)
    by_sigma = tl.where(divides, -tl.sum(b_sum, axis=0) / tl.where(divides, sigma, 1.0), 0.0)
    if p_grad_sigma is not None:
        by_sigma += tl.load(p_grad_sigma + layer)
    p_grad = address_of(p_address, 0, T)
    p_u = address_of(p_address, 2, T)
    p_v = address_of(p_address, 3, T)
    p_out = address_of(p_address, 4, T)
    if tl.load(p_layer + IS_MATRIX) != 0:
        # number (run · rows + row) · distance + inside has row `row` and column run · distance + inside
        rows = tl.load(p_layer + M).to(tl.int32)
        distance = tl.load(p_layer + DISTANCE).to(tl.int32)
        start = block.to(tl.int64) * BLOCK
        line = start // distance
        o_inside = (start - line * distance).to(tl.int32) + tl.arange(0, BLOCK)
        run = line // rows
        o_row = (line - run * rows).to(tl.int32) + o_inside // distance
        o_column = (run.to(tl.int32) + o_row // rows) * distance + o_inside % distance
        o = start + tl.arange(0, BLOCK)
        m = o < tl.load(p_layer + NUMBERS)
        b_d = _math.widened(tl.load(p_u + o_row % rows, m, other=0.0))
        b_d *= _math.widened(tl.load(p_v + o_column, m, other=0.0))
        b_out = _math.widened(tl.load(p_grad + o, m, other=0.0)) * factor
        tl.store(p_out + o, tl.where(by_sigma != 0, b_out + by_sigma * b_d, b_out).to(T), m)
    else:
        # the left factor is y, the right one x
        p_product = p_layer + PRODUCTS + 2 * PRODUCT
        transposed = tl.load(p_layer + TRANSPOSED) != 0
        p_y = tl.load(p_address + tl.where(transposed, 3, 2)).to(tl.pointer_type(T))
        p_x = tl.load(p_address + tl.where(transposed, 2, 3)).to(tl.pointer_type(T))
        b_tile, o_tile, m_tile = multiply(p_y, p_product, block, by_sigma != 0, p_x, p_sums, True, 1.0, 1.0)
        b_grad = _math.widened(tl.load(p_grad + o_tile, m_tile, other=0.0)) * factor
        b_grad = tl.where(by_sigma != 0, b_grad + by_sigma * b_tile, b_grad)
        tl.store(p_out + o_tile, b_grad.to(T), m_tile)
