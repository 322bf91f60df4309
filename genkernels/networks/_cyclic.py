r"""A convolution set into a cyclic one, axis by axis.

Along one axis output o of a convolution reads the inputs :math:`o s - p + d t`, t being the taps. With
:math:`d t - p = s e_t + b_t`, :math:`0 \le b_t < s`, that is input :math:`o + e_t` of the *phase* :math:`b_t`, the
inputs b, b + s, b + 2s, …: a convolution of stride 1 of s times the channels. On a cycle of N points, N large enough
that no output reads, around the cycle, an input that it does not read in truth, the convolution is the cyclic one
whose outputs are cut to those that exist and whose inputs are 0 but for those that exist; cutting and extending by 0
have norm 1, so that the cyclic convolution's norm is an upper bound. That holds too where what goes once around the
cycle is multiplied by :math:`e^{2 \pi i \tau}` (a *twist*). The norm of a cyclic convolution is the largest norm of its
symbols :math:`S(\omega)`, one matrix ``[C_out, s·C_in]`` for each of the N frequencies
:math:`\omega = 2 \pi (j + \tau) / N`.

Several axes are the product of what holds along each one, as are the cutting and the extending.
"""

from __future__ import annotations

import math
from typing import NamedTuple

#: Frequencies a degree, at most. f = x*·S*·S·x is a trigonometric polynomial of the degree E = max e - min e in ω, and
#: 0 ≤ f ≤ M, its maximum. Around it f - M/2 lies above its cosine, M/2 · cos(E(ω - ω₀)) (M. Riesz), f hence above
#: M · cos²(E(ω - ω₀) / 2): on N > 2E points the norm is missed by no more than the factor cos(πE / 2N), however long
#: the axis. At 17 points a degree that is 0.43 % of it, an axis.
POINTS_PER_DEGREE = 17


class Axis(NamedTuple):
    """One axis of a cyclic convolution whose norm, times `factor`, is at least that of the one set into it."""

    taps: tuple[int, ...]  # those of the kernel's that touch an input at all
    phases: tuple[int, ...]  # of each of these, with its offset
    offsets: tuple[int, ...]
    points: int
    twist: float = 0.0  # of a full turn; 0 or ½, for which the frequencies are symmetric
    factor: float = 1.0

    @property
    def degree(self) -> int:
        return max(self.offsets) - min(self.offsets)


def padded_axis(kernel: int, size: int, out: int, stride: int, padding: int, dilation: int, most: int) -> list[Axis]:
    """An axis padded by zeros: the cyclic ones that it fits into, of `most` points a degree at most. None if no tap
    touches an input: A is 0."""
    spans = []  # tap, phase, offset, and the first and the last output for which the tap touches an input
    for tap in range(kernel):
        offset, phase = divmod(dilation * tap - padding, stride)
        first, last = max(0, -offset), min(out - 1, (size - 1 - phase) // stride - offset)
        if first <= last:
            spans.append((tap, phase, offset, first, last))
    if not spans:
        return []
    begin, end = min(first for *_, first, _ in spans), max(last for *_, last in spans)
    low, high = {}, {}  # of each phase, the first and the last input that is touched
    for _, phase, offset, first, last in spans:
        low[phase] = min(first + offset, low.get(phase, first + offset))
        high[phase] = max(last + offset, high.get(phase, last + offset))
    # a tap reads begin + offset … end + offset: one turn on (or back) these must lie behind (before) what is touched
    points = 1 + max(max(high[b] - begin - e, end + e - low[b], end - begin) for _, b, e, *_ in spans)
    taps, phases, offsets = zip(*((tap, phase, offset) for tap, phase, offset, *_ in spans), strict=True)
    return [_capped(Axis(taps, phases, offsets, points, twist), most) for twist in (0.5, 0.0)]


def circular_axis(kernel: int, size: int, out: int, stride: int, padding: int, dilation: int, most: int) -> list[Axis]:
    """An axis padded by itself. Exact where the stride divides the size and no output comes twice.

    Elsewhere the outputs o·s mod n are some of those of stride gcd(s, n), each as often as it comes; or the axis, with
    its padding, is one padded by zeros whose inputs are the given ones, each as often as it comes.
    """
    behind = (out - 1) * stride + dilation * (kernel - 1) + 1 - size - padding
    if padding == 0 and behind <= 0:  # nothing is padded
        return padded_axis(kernel, size, out, stride, padding, dilation, most)
    step = math.gcd(stride, size)
    cycle = size // step
    places = [divmod(dilation * tap - padding, step) for tap in range(kernel)]
    offsets, phases = zip(*places, strict=True)
    repeats = -(-out // cycle)
    axes = [_capped(Axis(tuple(range(kernel)), phases, offsets, cycle, factor=math.sqrt(repeats)), most)]
    if step != stride or repeats > 1:
        whole = size + padding + max(behind, 0)
        factor = math.sqrt(-(-whole // size))
        unrolled = padded_axis(kernel, whole, out, stride, 0, dilation, most)
        axes += [axis._replace(factor=axis.factor * factor) for axis in unrolled]
    return axes


def _capped(axis: Axis, most: int) -> Axis:
    """The axis with no more than `most` points a degree; one is enough for symbols that are constant."""
    if axis.degree == 0:
        return axis._replace(points=1, twist=0.0)
    points = most * axis.degree
    if axis.points <= points:
        return axis
    return axis._replace(points=points, factor=axis.factor / math.cos(math.pi * axis.degree / (2 * points)))
