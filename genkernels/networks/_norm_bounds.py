r"""Upper bounds of the norm of a weight's map that hold for certain, rounding included.

* A matrix, and a convolution that is small enough to be written as one: the largest eigenvalue of its Gram matrix.
* Any other convolution: the largest norm of the symbols :math:`S(\omega)` of the cyclic convolution that it can be set
  into (`genkernels.networks._cyclic`), the least of several such. Groups act on channels of their own: the largest of
  their norms.
* Where it is less, the root of the largest sum of a row's magnitudes times the largest sum of a column's (Schur).

Grams. :math:`S(\omega)^* S(\omega)` or :math:`S(\omega) S(\omega)^*`, whichever is smaller, is a trigonometric
polynomial of :math:`\omega`, of the degree E of an `Axis`: it is multiplied out at 2E + 1 frequencies an axis only,
and interpolated at the others.

Largest eigenvalue. :math:`\lambda I - G` has a Cholesky factor exactly where :math:`\lambda` exceeds all eigenvalues of
G. This tells an upper bound from a number that is none at a tenth of the cost of the eigenvalues, for all frequencies
in turn with the :math:`\lambda` that held so far; where it fails, :math:`\lambda` is raised by bisection.

Rounding, in fp64, for Grams of side c over sums of K terms: their entries are off by no more than
:math:`4 (K + 2)\,\varepsilon` of the sum of their terms' magnitudes, hence G by that times :math:`\operatorname{tr} G
\le c \lambda` in norm, and the factorisation of a matrix that lies within :math:`4 (c + 1)\,\varepsilon\, c \lambda` of
the given one (Higham, "Accuracy and stability of numerical algorithms", 2002, theorem 10.3). `_allowance` grants
twice the sum, K having been multiplied by what interpolation amplifies, :math:`2 + \ln(2E + 1)` an axis, above its
Lebesgue constant. For 512 channels and kernels of 3×3 that is :math:`3 \cdot 10^{-8}`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from genkernels.networks import _cyclic
from genkernels.networks._cyclic import Axis, circular_axis, padded_axis
from genkernels.reference.spectral_norm import CIRCULAR, Geometry, apply, apply_transpose, as_matrix

#: How far the bound of largest eigenvalues may lie above them, relatively; half of it for the norm.
TOLERANCE = 1e-3
#: Sides of Gram matrices up to which eigenvalues are computed, exactly.
EXACT = 1024
#: Multiplications, c²·K, for the Gram matrix of a convolution written as a matrix, and numbers, c·K, in it.
DENSE_WORK, DENSE_NUMBERS = 2**31, 2**24
#: Operations from which fewer frequencies do, `COARSE` a degree: about two seconds of one core.
MUCH_WORK, COARSE = 4e10, 12
#: Operations that a second cyclic convolution, which may give a lower bound, is worth: about a second of one core.
FURTHER_WORK = 2e10
#: Numbers that a batch of Gram matrices has. Small batches: those with λ too low are factorised again and again.
BATCH = 2**18


def matrix_bound(weight: Tensor, axis: int) -> float:
    """Of an fp64 weight, seen as a matrix: exact for a smaller side up to `EXACT`, then within half of `TOLERANCE`."""
    return _dense_bound(as_matrix(weight, axis))


def convolution_bound(weight: Tensor, g: Geometry, size: Sequence[int], out: Sequence[int]) -> float:
    """Of an fp64 weight, for inputs of `size` and outputs of `out`, sizes of the convolution that it transposes where
    ``g.transposed``."""
    g = g._replace(transposed=False)
    input_shape, output_shape = (weight.shape[1] * g.groups, *size), (weight.shape[0], *out)
    small, large = sorted((math.prod(input_shape), math.prod(output_shape)))
    if small * small * large <= DENSE_WORK and small * large <= DENSE_NUMBERS:
        return _dense_bound(_written_out(weight, g, input_shape, output_shape))
    return min(_cyclic_bound(weight, g, size, out), _schur_bound(weight, g, size, out))


def _allowance(side: int, terms: float) -> float:
    """The factor for a norm's rounding; the root of the eigenvalue halves it, which is the second half of the twice."""
    return 1 + 4 * torch.finfo(torch.float64).eps * side * (side + terms + 16)


# ---------------------------------------------------------------------------------------------------- written as matrix


def _written_out(weight: Tensor, g: Geometry, input_shape: Sequence[int], output_shape: Sequence[int]) -> Tensor:
    """The convolution as a matrix, or that matrix's transpose: the fewer rows."""
    if math.prod(input_shape) <= math.prod(output_shape):
        shape, other, act = input_shape, output_shape, apply
    else:
        shape, other, act = output_shape, input_shape, apply_transpose
    rows = torch.eye(math.prod(shape), dtype=weight.dtype, device=weight.device).view(-1, *shape)
    return torch.vmap(lambda row: act(weight, g, row, other))(rows).flatten(1)


def _dense_bound(matrix: Tensor) -> float:
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.t()
    side, terms = matrix.shape
    gram = matrix @ matrix.t()
    if side <= EXACT:
        largest = float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0))
    else:
        largest = _largest_eigenvalue([gram.unsqueeze(0)])
    return math.sqrt(largest) * _allowance(side, terms)


def _schur_bound(weight: Tensor, g: Geometry, size: Sequence[int], out: Sequence[int]) -> float:
    """√(‖A‖₁ ‖A‖∞), with the edges: low for weights of one sign on small inputs."""
    magnitude, one = weight.abs(), g._replace(groups=1)
    by_output = magnitude.sum(1, keepdim=True)  # over the inputs of a group: one channel of ones has the rows' sums
    rows = apply(by_output, one, weight.new_ones(1, *size), (weight.shape[0], *out)).amax()
    by_input = magnitude.unflatten(0, (g.groups, -1)).sum(1).flatten(0, 1).unsqueeze(0)
    columns = apply_transpose(by_input, one, weight.new_ones(1, *out), (by_input.shape[1], *size)).amax()
    return math.sqrt(float(rows) * float(columns)) * _allowance(1, weight.numel())


# ------------------------------------------------------------------------------------------------------ set into cycles


def _cyclic_bound(weight: Tensor, g: Geometry, size: Sequence[int], out: Sequence[int]) -> float:
    first = 3 - len(size)
    set_into = circular_axis if g.kind == CIRCULAR else padded_axis
    sizes = [*zip(weight.shape[2:], size, out, g.stride[first:], g.padding[first:], g.dilation[first:], strict=True)]
    for most in (_cyclic.POINTS_PER_DEGREE, COARSE):
        choices = list(dict.fromkeys(itertools.product(*(set_into(*axis, most) for axis in sizes))))
        if not choices or _Grams(weight, g.groups, choices[0]).work <= MUCH_WORK:
            break
    best, work = (math.inf if choices else 0.0), 0.0
    for axes in choices:
        grams = _Grams(weight, g.groups, axes)
        work += grams.work
        if work > FURTHER_WORK and math.isfinite(best):
            break
        factor = math.prod(axis.factor for axis in axes)
        allowed = factor * _allowance(grams.side, grams.terms)
        largest = _largest_eigenvalue(grams, (best / allowed) ** 2)
        best = min(best, math.sqrt(largest) * allowed)
    return best


class _Grams:
    """The Gram matrices of the symbols at the frequencies of `axes`, in batches ``[f, side, side]``, complex.

    Of the last axis half the frequencies are left out: a real kernel's symbols at ω and -ω are conjugate.
    """

    def __init__(self, weight: Tensor, groups: int, axes: Sequence[Axis]):
        self.weight, self.groups, self.axes = weight, groups, axes
        self.phases = sorted(set(itertools.product(*(axis.phases for axis in axes))))
        rows, columns = weight.shape[0] // groups, weight.shape[1] * len(self.phases)
        self.by_output = rows <= columns
        amplified = math.prod(2 + math.log(2 * axis.degree + 1) for axis in axes)
        self.side, self.terms = min(rows, columns), amplified * max(rows, columns) * weight.shape[2:].numel()
        self.frequencies = math.prod(axis.points for axis in axes[:-1]) * (axes[-1].points // 2 + 1)
        self.work = 4 / 3 * self.frequencies * groups * self.side**3

    def __iter__(self) -> Iterator[Tensor]:
        """Each batch lies where the one before it lay: fresh memory would cost more than what is computed into it."""
        nodes, interpolation = self._nodes()
        known = torch.view_as_real(self._multiplied_out(nodes)).flatten(1)  # [nodes, groups·side·side·2]
        each = max(16, BATCH // (self.groups * self.side**2))  # each batch reads all that is known
        room = known.new_empty(min(each, len(interpolation)), known.shape[1])
        for rows in interpolation.split(each):
            grams = torch.matmul(rows, known, out=room[: len(rows)])
            yield torch.view_as_complex(grams.view(-1, self.side, self.side, 2))

    def _nodes(self) -> tuple[Tensor, Tensor]:
        """The frequencies at which to multiply out, ``[nodes, axes]``, and the weights ``[frequencies, nodes]`` of
        these at the wanted ones."""
        nodes, weights = [], torch.ones(1, 1, dtype=torch.float64)
        for last, axis in enumerate(self.axes, 1 - len(self.axes)):
            wanted = (torch.arange(axis.points, dtype=torch.float64) + axis.twist) * (2 * math.pi / axis.points)
            if last == 0:
                # j and -j - 2·twist are a pair
                wanted = wanted[: (axis.points + 1) // 2 if axis.twist else axis.points // 2 + 1]
            count = 2 * axis.degree + 1
            if count >= axis.points:
                nodes.append(wanted)
                weights = torch.kron(weights, torch.eye(len(wanted), dtype=torch.float64))
                continue
            nodes.append(torch.arange(count, dtype=torch.float64) * (2 * math.pi / count))
            distance = wanted[:, None] - nodes[-1]
            kernel = sum((2 * torch.cos(h * distance) for h in range(1, axis.degree + 1)), torch.ones_like(distance))
            weights = torch.kron(weights, kernel / count)
        device = self.weight.device
        return torch.cartesian_prod(*nodes).view(-1, len(self.axes)).to(device), weights.to(device)

    def _multiplied_out(self, nodes: Tensor) -> Tensor:
        """``[nodes, groups, side, side]``."""
        weight = self.weight
        for dim, axis in enumerate(self.axes, 2):
            weight = weight.index_select(dim, torch.tensor(axis.taps, device=weight.device))
        weight = weight.unflatten(0, (self.groups, -1)).flatten(3).to(torch.complex128)  # [groups, out, in, taps]
        offsets = torch.cartesian_prod(*(torch.tensor(axis.offsets, dtype=torch.float64) for axis in self.axes))
        offsets = offsets.view(-1, len(self.axes)).to(weight.device)
        phases = list(itertools.product(*(axis.phases for axis in self.axes)))
        members = [[t for t, other in enumerate(phases) if other == phase] for phase in self.phases]
        parts = [weight[..., of].movedim(-1, 0).flatten(1).contiguous() for of in members]
        grams = weight.new_empty(len(nodes), self.groups, self.side, self.side)
        each = max(1, BATCH // (weight[..., 0].numel() * len(self.phases)))
        for some, target in zip(nodes.split(each), grams.split(each), strict=True):
            turns = torch.exp(1j * (some @ offsets.t()))  # [nodes, taps]
            sums = [turns[:, of] @ part for of, part in zip(members, parts, strict=True)]
            symbols = torch.cat([each_phase.view(-1, *weight.shape[:3]) for each_phase in sums], -1)
            adjoint = symbols.mH
            torch.matmul(*((symbols, adjoint) if self.by_output else (adjoint, symbols)), out=target)
        return grams


# --------------------------------------------------------------------------------------------------- largest eigenvalue


def _largest_eigenvalue(grams: Iterable[Tensor], enough: float = math.inf) -> float:
    """A bound of all eigenvalues of all `grams`, ``[f, c, c]`` each and positive, at most 1 + `TOLERANCE` times the
    largest; from `enough` on it may be one of some of them only."""
    bound, room = 0.0, None
    for batch in grams:
        if bound == 0:
            bound = float(batch.diagonal(dim1=-2, dim2=-1).real.mean(-1).amax())  # at most their largest
            if bound <= 0:
                continue  # all of them are 0
        room = torch.empty_like(batch) if room is None else room
        bound = _raised(batch, bound, room)
        if bound >= enough:
            break
    return bound


def _raised(grams: Tensor, bound: float, room: Tensor) -> float:
    """`bound` where it exceeds all eigenvalues of `grams`, else the least one, up to `TOLERANCE`, that does; `room` is
    like `grams`, or longer."""
    grams = _not_below(grams, bound, room)
    if not len(grams):
        return bound
    low, step = max(bound, _estimate(grams)), TOLERANCE
    while len(above := _not_below(grams, low * (1 + step), room)):
        grams, low, step = above, low * (1 + step), 2 * step
    high = low * (1 + step)
    while high > low * (1 + TOLERANCE):
        middle = math.sqrt(low * high)
        if len(above := _not_below(grams, middle, room)):
            grams, low = above, middle
        else:
            high = middle
    return high


def _not_below(grams: Tensor, bound: float, room: Tensor) -> Tensor:
    """Those of the `grams` that have an eigenvalue of `bound` or more."""
    shifted = torch.neg(grams, out=room[: len(grams)])
    shifted.diagonal(dim1=-2, dim2=-1).add_(bound)
    info = torch.empty(len(grams), dtype=torch.int32, device=grams.device)
    # factorised where it lies: the transpose, which is the conjugate, has its columns one after the other, as LAPACK
    # wants them
    torch.linalg.cholesky_ex(shifted.mT, out=(shifted.mT, info))
    return grams[info != 0]


def _estimate(grams: Tensor, steps: int = 12) -> float:
    """The largest Rayleigh quotient of some powers of every matrix: at most its largest eigenvalue."""
    most = grams.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    x = grams[torch.arange(len(grams), device=grams.device), :, most].unsqueeze(-1)
    for _ in range(steps):
        x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=1e-300)
        y, x = x, grams @ x
    return float((y.conj() * x).real.sum((-2, -1)).amax())
