r"""The norm of a weight's map: estimated from below at the price of a few products, and bounded from above for certain.

The map A is `genkernels.reference.spectral_norm`'s: a matrix, or a convolution with its stride, padding and size of
input. `lanczos` follows the largest singular triplet from one training step to the next; `upper_bound` tells what the
norm cannot exceed, as a layer that must be a contraction needs it; `bracket` gives both for a weight alone.

Power iterations never exceed the norm either, but where the largest singular values lie close together, as those of
convolutions do, they stay below it for long: Lanczos makes of the same products the best that their span holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.networks._geometry import (
    channels,
    check_output,
    check_size,
    check_vectors,
    geometry_of,
    most_output,
    sizes_of,
    usual_output,
)
from genkernels.networks._norm_bounds import convolution_bound, matrix_bound
from genkernels.ops import checks
from genkernels.reference.spectral_norm import MATRIX, Geometry, apply, apply_transpose

__all__ = ["Bracket", "Triplet", "bracket", "geometry_of", "lanczos", "sizes_of", "upper_bound"]

#: Products that `bracket` spends on its lower end, at least and at most, and the multiplications that it spends on what
#: lies between (about two seconds of one core): of 512 channels on 32×32, 80 products lead 0.3 % closer than 40.
LEAST_PRODUCTS, MOST_PRODUCTS, PRODUCT_WORK = 40, 80, 1e11


class Triplet(NamedTuple):
    """A Ritz triplet: the estimate of the largest singular value and of its vectors."""

    #: ⟨u, A v⟩, fp32 or fp64.
    sigma: Tensor
    u: Tensor
    v: Tensor
    #: ‖Aᵀu - σv‖, as `sigma`: some singular value lies within this of it.
    residual: Tensor
    #: Products with A or Aᵀ.
    used: int


class Bracket(NamedTuple):
    """Two fp64 scalars that have the norm between them."""

    low: Tensor
    high: Tensor


@torch.no_grad()
def lanczos(
    weight: Tensor, geometry: Geometry, u: Tensor, v: Tensor, *, tolerance: float = 1e-3, products: int = 25
) -> Triplet:
    r"""The leading singular triplet of a weight's map, by Golub-Kahan-Lanczos bidiagonalisation from a warm v.

    Every vector is made orthogonal to all earlier ones. It ends once the leading Ritz triplet, of which A v = σ u, has
    :math:`\lVert A^\top u - \sigma v\rVert \le` ``tolerance``·σ, which is known after every second product, or when the
    products are spent. σ = ⟨u, A v⟩ for u and v of length 1 never exceeds the norm, but for rounding (fp32's for
    halves, which are computed in fp32, autocast or not; on CUDA that of TF32, 1e-3, where cuDNN is allowed it).

    u does not enter the result. It tells whether v is warm: where u is nowhere near A v (a cosine below ½), v is taken
    to be a cold start, and the same random vector of its length is added to it each time, for one more product. Without
    that a v in a space that A and Aᵀ map to one another, say within one group of channels, never leaves it. A v that is
    warm and orthogonal to the leading vector stays so until the weight moves, or rounding leads it out.

    Args:
        weight: the weight; its gradient is not computed.
        geometry: how it acts.
        u: of the shape of A's output for one sample, without the batch (``[M]`` for a matrix). Any values.
        v: likewise of A's input (``[K]`` for a matrix). Any values; those of the last call are the best.
        tolerance: of the residual, relative to σ. σ itself is off by about its square, over the relative gap to the
            next singular value, or, where the values lie closer together than that, by at most itself.
        products: with A or Aᵀ, at most; 3 or more.

    Returns:
        `Triplet`; its u and v have the dtypes that came. For a weight of zeros σ is 0, for one that is not finite NaN,
        and u and v stay as they came.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Memory: ``products / 2`` vectors like u and as many like v.

    Source: Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix", 1965.
    """
    check_vectors("lanczos", weight, geometry, u, v)
    checks.integer("lanczos", "products", products, 3)
    work = torch.promote_types(weight.dtype, torch.float32)
    w = weight.detach().to(work)
    largest = float(w.abs().amax()) if w.numel() else 0.0
    if not math.isfinite(largest) or largest == 0:
        return _without_direction(w, u, v, 0.0 if largest == 0 else math.nan)
    w = w / largest  # so that no product overflows, nor underflows to 0
    with torch.autocast(w.device.type, enabled=False):
        start, image, used = _start(w, geometry, u.to(work), v.to(work))
        found = _bidiagonalise(w, geometry, start, image, tolerance, (products - used + 1) // 2)
    if found is None:  # no tap touches an input, say
        return _without_direction(w, u, v, 0.0, used)
    sigma, left, right, residual, pairs = found
    return Triplet(
        w.new_tensor(sigma * largest),
        left.view(u.shape).to(u.dtype),
        right.view(v.shape).to(v.dtype),
        w.new_tensor(residual * largest),
        used + pairs,
    )


@torch.no_grad()
def upper_bound(
    weight: Tensor, geometry: Geometry, size: Sequence[int] = (), out: Sequence[int] | None = None
) -> Tensor:
    r"""What the norm of a weight's map does not exceed, rounding included. A scalar in fp64.

    Of a matrix, or of a convolution small enough to be written as one (a side of 1,024 with one of 2,048, say), it is
    the norm, within 0.05 %. Any other convolution is set into a cyclic one whose norm, the largest of its symbols', is
    computed within 0.05 % (`genkernels.networks._cyclic` has the argument, for strides too). That is exact for
    circular padding where the stride divides the size (elsewhere it is up to √2 an axis too large), and lies above the
    norm of a convolution padded by zeros by what its edges cost: 3 % for kernels of 3×3 on 8×8, 0.6 % on 16×16, 0.2 %
    on 32×32; on inputs hardly larger than the kernel up to 20 %. From 17 (k - 1) points of an axis on, the cost no
    longer grows with it, and the bound is 0.43 % an axis too large; from 12 (k - 1) on and 0.86 % where it would take
    more than some seconds, as for 512 channels on 32×32.

    Args:
        weight: the weight.
        geometry: how it acts.
        size: A's input's, without channels; ``()`` for a matrix.
        out: A's output's, without channels (`sizes_of` has both). Without it the bound holds for zeros behind the
            last element in any number; for circular padding up to one turn, or up to as many as before the first one.

    Returns:
        The bound. 0 for a weight of zeros, NaN for one that is not finite.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    size = check_size("upper_bound", weight, geometry, size, fits=out is None)
    out = None if out is None else check_output("upper_bound", weight, geometry, size, out)
    w = weight.detach().double()
    largest = float(w.abs().amax()) if w.numel() else 0.0
    if not math.isfinite(largest) or largest == 0:
        return w.new_tensor(0.0 if largest == 0 else math.nan)
    w = w / largest
    if geometry.kind == MATRIX:
        bound = matrix_bound(w, geometry.axis)
    else:
        out = most_output(w, geometry, size) if out is None else out
        bound = convolution_bound(w, geometry, *((out, size) if geometry.transposed else (size, out)))
    return w.new_tensor(bound * largest * (1 + 4 * torch.finfo(torch.float64).eps))


@torch.no_grad()
def bracket(weight: Tensor, geometry: Geometry, size: Sequence[int] = (), out: Sequence[int] | None = None) -> Bracket:
    """Two numbers that have the norm of a weight's map between them.

    The lower end is the length of A v, in fp64 and less what that rounds, for a v that `lanczos` finds from a start
    that is always the same: no generator is touched, and a second call gives the same bits (on a GPU where cuDNN's
    algorithms do).

    Args:
        weight, geometry, size: as for `upper_bound`.
        out: likewise. Without it the lower end is that of a padding as large behind the last element as before the
            first one, as `torch.nn`'s layers have but for ``padding="same"`` of even kernels.

    Returns:
        `Bracket`: low and high. Both 0 for a weight of zeros, NaN for one that is not finite.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    high = upper_bound(weight, geometry, size, out)
    if not high > 0:
        return Bracket(high, high.clone())
    c_in, c_out = channels(weight, geometry)
    out = usual_output(weight, geometry, size) if out is None and geometry.kind != MATRIX else out
    input_shape, output_shape = (c_in, *size), (c_out, *(out or ()))
    work = torch.promote_types(weight.dtype, torch.float32)
    v = _random(input_shape, work, weight.device)
    u = torch.zeros(output_shape, dtype=work, device=weight.device)
    places = math.prod((size if geometry.transposed else out) or ())
    affordable = int(PRODUCT_WORK / (weight.numel() * places))
    products = min(max(affordable, LEAST_PRODUCTS), MOST_PRODUCTS)
    v = lanczos(weight, geometry, u, v, products=products).v.double()
    return Bracket(torch.minimum(_length(weight.detach().double(), geometry, v, output_shape), high), high)


# ------------------------------------------------------------------------------------------------------ bidiagonalising


def _start(w: Tensor, g: Geometry, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """v of length 1, A v, and the products that this took; a cold v is mixed with a random vector."""
    v = _unit(v)
    image = apply(w, g, v, u.shape)
    length = float(torch.linalg.vector_norm(image))
    if length > 0 and float((_unit(u) * image).sum()) >= 0.5 * length:
        return v, image, 1
    other = _random(v.shape, v.dtype, v.device)
    v = _unit(v + torch.where((v * other).sum() < 0, -other, other))  # the two never cancel
    return v, apply(w, g, v, u.shape), 2


def _bidiagonalise(
    w: Tensor, g: Geometry, v: Tensor, image: Tensor, tolerance: float, steps: int
) -> tuple[float, Tensor, Tensor, float, int] | None:
    """σ, u, v, the residual and the further products, from v and its image A v; None if that is 0.

    A V = U B and Aᵀ U = V Bᵀ + β v⁺ eᵀ, with B upper bidiagonal: α on its diagonal, β above.
    """
    shape = image.shape
    left, right = image.new_empty(steps, image.numel()), v.new_empty(steps + 1, v.numel())
    alphas, betas = [], []
    right[0] = v.flatten()
    most, products = 0.0, -1
    # what is left of a vector by rounding: a direction of noise, at the end of the space that v leads into
    noise = 8 * torch.finfo(w.dtype).eps * math.sqrt(max(image.numel(), v.numel()))
    for k in range(steps):
        image = image if k == 0 else apply(w, g, right[k].view(v.shape), shape)
        ahead, alpha = _orthogonal(image.flatten(), left[:k])
        products += 1
        if alpha <= noise * most:
            # A v lies in what U spans: B with its last column, though no row, has A's values in full
            break
        left[k] = ahead / alpha
        alphas.append(alpha)
        back = apply_transpose(w, g, left[k].view(shape), v.shape)
        behind, beta = _orthogonal(back.flatten(), right[: k + 1])
        products += 1
        betas.append(beta)
        x, sigma, y = _leading(alphas, betas[:-1])
        residual, most = beta * abs(float(x[-1])), max(sigma, most)
        if residual <= tolerance * sigma or beta <= noise * most or k + 1 == steps:
            return sigma, _combine(x, left), _combine(y, right), residual, products
        right[k + 1] = behind / beta
    if not alphas:
        return None
    x, sigma, y = _leading(alphas, betas)
    return sigma, _combine(x, left), _combine(y, right), alpha * abs(float(y[-1])), products


def _leading(alphas: list[float], betas: list[float]) -> tuple[Tensor, float, Tensor]:
    """The leading singular triplet x, σ, y of the bidiagonal matrix, as wide as there are betas, and one more."""
    b = torch.zeros(len(alphas), len(betas) + 1, dtype=torch.float64)
    b.diagonal().copy_(torch.tensor(alphas, dtype=torch.float64))
    b.diagonal(1).copy_(torch.tensor(betas, dtype=torch.float64))
    x, s, yt = torch.linalg.svd(b, full_matrices=False)
    return x[:, 0], float(s[0]), yt[0]


def _combine(coefficients: Tensor, basis: Tensor) -> Tensor:
    return _unit(coefficients.to(basis) @ basis[: len(coefficients)])


def _orthogonal(x: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """What is left of x beside the rows of `basis`, and its length. Twice is enough (Parlett)."""
    for _ in range(2 if len(basis) else 0):
        x = x - (basis @ x) @ basis
    return x, float(torch.linalg.vector_norm(x))


def _unit(x: Tensor) -> Tensor:
    """x / ‖x‖; 0 where that is no vector of length 1."""
    largest = x.abs().amax()
    scaled = x / largest  # no square overflows
    return torch.where((largest > 0) & largest.isfinite(), scaled / torch.linalg.vector_norm(scaled), 0)


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of length 1, always the same, from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    return _unit(torch.randn(*shape, generator=generator).to(device, dtype))


# -------------------------------------------------------------------------------------------------------- what is left


def _length(w: Tensor, g: Geometry, v: Tensor, output_shape: Sequence[int]) -> Tensor:
    """‖Aᵀ u‖ / ‖u‖ for u = A v, at most the norm: less what the sums of the last product may have rounded upwards."""
    largest = w.abs().amax()
    w = w / largest
    u = _unit(apply(w, g, v, output_shape))
    back = apply_transpose(w, g, u, v.shape)
    # |fl(Aᵀ u) - Aᵀ u| ≤ K ε |A|ᵀ |u|, and ‖|A|‖ ≤ √(largest sum of a row · largest sum of a column)
    if g.kind == MATRIX:
        rows, columns = w.abs().movedim(g.axis, 0).flatten(1).sum(1).amax(), w.abs().movedim(g.axis, 0).sum(0).amax()
    else:
        rows = w.abs().flatten(1).sum(1).amax()
        columns = w.abs().unflatten(0, (g.groups, -1)).sum(1).flatten(2).sum(-1).amax()
    eps = torch.finfo(torch.float64).eps
    rounded = 2 * eps * w.numel() * (rows * columns).sqrt()
    length = torch.linalg.vector_norm(back) / torch.linalg.vector_norm(u).clamp(min=0.5)  # 1, or 0 of a map to 0
    return ((length * (1 - 4 * eps * max(u.numel(), v.numel())) - rounded).clamp(min=0)) * largest


def _without_direction(w: Tensor, u: Tensor, v: Tensor, sigma: float, used: int = 0) -> Triplet:
    return Triplet(w.new_tensor(sigma), u, v, w.new_tensor(sigma), used)
