"""How a layer's weight acts: its geometry, the sizes that it takes and gives, and what is refused of either."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from genkernels.ops import checks
from genkernels.reference.spectral_norm import CIRCULAR, CONVOLUTION, MATRIX, Geometry, _behind, output_size

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a `torch.nn.Linear`, ``Conv1d`` to ``Conv3d`` or ``ConvTranspose1d`` to ``ConvTranspose3d``.

    Raises:
        TypeError: another layer.
        ValueError: padding that mirrors or repeats the input ('reflect', 'replicate').
    """
    if isinstance(layer, nn.Linear):
        return Geometry(MATRIX)
    if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)):
        raise TypeError(
            "geometry_of: layer must be a Linear, a Conv1d to Conv3d or a ConvTranspose1d to ConvTranspose3d, got "
            f"{type(layer).__name__}"
        )
    before, behind = _paddings(layer)
    padded = any(before) or any(behind)
    if padded and layer.padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"geometry_of: padding_mode must be zeros or circular, got {layer.padding_mode!r}, which adds inputs to "
            "one another and is no convolution"
        )
    circular = padded and layer.padding_mode == "circular"
    return Geometry(
        CIRCULAR if circular else CONVOLUTION,
        groups=layer.groups,
        transposed=isinstance(layer, _TRANSPOSED),
        stride=_three(layer.stride, 1),
        padding=_three(before, 0),
        dilation=_three(layer.dilation, 1),
    )


def sizes_of(
    layer: nn.Module, size: Sequence[int] = (), weight: Tensor | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one sample's input and output, v's and u's: channels (features of a Linear) and what follows them.

    Args:
        layer: one that `geometry_of` takes.
        size: the input's size without channels, ``()`` for a Linear.
        weight: what the shapes are read from, where the layer's own weight cannot be asked for yet.

    Raises:
        TypeError, ValueError: as `geometry_of`; a size of the wrong length, below 1, or too small for the kernel.
    """
    geometry = geometry_of(layer)
    weight = layer.weight if weight is None else weight
    size = check_size("sizes_of", weight, geometry, size, fits=False)
    c_in, c_out = channels(weight, geometry)
    if geometry.kind == MATRIX:
        return (c_in,), (c_out,)
    if geometry.transposed:
        usual = usual_output(weight, geometry, size)
        out = [n + extra for n, extra in zip(usual, layer.output_padding, strict=True)]
    else:
        out = output_size(geometry, weight.shape[2:], size, _paddings(layer)[1])
    _check_fit("sizes_of", weight, geometry, size, out)
    return (c_in, *size), (c_out, *out)


def _paddings(layer: nn.Module) -> tuple[list[int], list[int]]:
    """Before the first element and behind the last one, an axis each."""
    if layer.padding == "same":  # what is odd goes behind
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    before = [0 for _ in layer.kernel_size] if layer.padding == "valid" else list(layer.padding)
    return before, before


def _three(values: Sequence[int], fewer: int) -> tuple[int, ...]:
    return (fewer,) * (3 - len(values)) + tuple(values)


# --------------------------------------------------------------------------------------------------- sizes and refusals


def channels(weight: Tensor, g: Geometry) -> tuple[int, int]:
    """Of A's input and output; for a matrix all that there is of either."""
    if g.kind == MATRIX:
        rows = weight.shape[g.axis]
        return weight.numel() // max(rows, 1), rows
    a, b = weight.shape[0], weight.shape[1] * g.groups
    return (a, b) if g.transposed else (b, a)


def usual_output(weight: Tensor, g: Geometry, size: Sequence[int]) -> list[int]:
    """A's output for inputs of `size` where the padding is the same before and behind."""
    kernel = weight.shape[2:]
    if not g.transposed:
        return output_size(g, kernel, size, g.padding[3 - len(size) :])
    axes = range(3 - len(size), 3)
    return [
        (n - 1) * g.stride[a] - 2 * g.padding[a] + g.dilation[a] * (k - 1) + 1
        for a, n, k in zip(axes, size, kernel, strict=True)
    ]


def most_output(weight: Tensor, g: Geometry, size: Sequence[int]) -> list[int]:
    """A's largest output whose every element a tap reaches, or, of a circular one, a turn."""
    usual, kernel = usual_output(weight, g, size), weight.shape[2:]
    axes = range(3 - len(size), 3)
    if g.kind == CIRCULAR:
        if g.transposed:
            return usual
        # to all of the turn, or as far as taps that lie at most one turn behind the last input
        last = [2 * n + g.padding[a] - g.dilation[a] * (k - 1) - 1 for a, n, k in zip(axes, size, kernel, strict=True)]
        turn = [min(-(-n // g.stride[a]), r // g.stride[a] + 1) for a, n, r in zip(axes, size, last, strict=True)]
        return [max(pair) for pair in zip(usual, turn, strict=True)]
    if g.transposed:
        return [m + g.padding[a] for m, a in zip(usual, axes, strict=True)]
    return [(n - 1 + g.padding[a]) // g.stride[a] + 1 for n, a in zip(size, axes, strict=True)]


def check_weight(who: str, weight: Tensor, g: Geometry) -> None:
    checks.tensor(who, "weight", weight)
    least, most = (2, None) if g.kind == MATRIX else (3, 5)
    if weight.dim() < least or (most and weight.dim() > most):
        what = "a matrix must have 2 axes or more" if g.kind == MATRIX else "a convolution must have 3 to 5 axes"
        raise ValueError(f"{who}: the weight of {what}, got shape {list(weight.shape)}")
    if g.kind != MATRIX and weight.shape[0] % g.groups:
        raise ValueError(
            f"{who}: the weight's first axis must be a multiple of the {g.groups} groups, got {weight.shape[0]}"
        )


def check_size(who: str, weight: Tensor, g: Geometry, size: Sequence[int], fits: bool = True) -> tuple[int, ...]:
    """`size` as a tuple, if the weight can act on inputs of it; `fits`: padded as much behind as before."""
    check_weight(who, weight, g)
    dims = 0 if g.kind == MATRIX else weight.dim() - 2
    size = _integers(who, "size", size, dims, "the input's without channels" if dims else "a matrix having none")
    if not dims:
        return size
    padding = g.padding[3 - dims :]
    if fits:
        _check_fit(who, weight, g, size, usual_output(weight, g, size))
    if g.kind == CIRCULAR and not g.transposed and any(p > n for p, n in zip(padding, size, strict=True)):
        raise ValueError(
            f"{who}: circular padding must be at most the input's size, got padding {list(padding)} at size "
            f"{list(size)}"
        )
    return size


def _check_fit(who: str, weight: Tensor, g: Geometry, size: Sequence[int], out: Sequence[int]) -> None:
    if min(out, default=1) < 1:
        first = 3 - len(size)
        raise ValueError(
            f"{who}: the kernel must fit into the padded input, got kernel {list(weight.shape[2:])} with dilation "
            f"{list(g.dilation[first:])} at size {list(size)} with padding {list(g.padding[first:])}"
        )


def check_output(who: str, weight: Tensor, g: Geometry, size: Sequence[int], out: Sequence[int]) -> tuple[int, ...]:
    """`out` as a tuple, if it can be the output's size without channels."""
    dims = 0 if g.kind == MATRIX else weight.dim() - 2
    out = _integers(who, "out", out, dims, "the output's without channels" if dims else "a matrix having none")
    if g.kind == CIRCULAR:
        inner, outer = (out, size) if g.transposed else (size, out)
        if any(b > n for b, n in zip(_behind(weight, g, inner, outer), inner, strict=True)):
            raise ValueError(
                f"{who}: out must be no more than circular padding by one turn gives, got {list(out)} at size "
                f"{list(size)}"
            )
    return out


def check_vectors(who: str, weight: Tensor, g: Geometry, u: Tensor, v: Tensor) -> None:
    check_weight(who, weight, g)
    checks.tensors(who, {"weight": weight, "u": u, "v": v})
    dims = 0 if g.kind == MATRIX else weight.dim() - 2
    for label, value, count in zip(("v", "u"), (v, u), channels(weight, g), strict=True):
        if value.dim() != dims + 1 or value.shape[0] != count:
            meaning = "[K]" if label == "v" and not dims else "[M]" if not dims else "[C, *size]"
            wanted = [count, *["…"] * dims]
            raise ValueError(
                f"{who}: {label} must be {meaning} = [{', '.join(map(str, wanted))}], got {list(value.shape)}"
            )


def _integers(who: str, label: str, values: Sequence[int], count: int, meaning: str) -> tuple[int, ...]:
    try:
        given = tuple(values)
    except TypeError:
        given = None
    if given is None or len(given) != count or not all(isinstance(n, int) and n >= 1 for n in given):
        wanted = f"{count} integer{'s' * (count > 1)} of at least 1" if count else "()"
        raise ValueError(f"{who}: {label} must be {wanted}, {meaning}, got {values!r}")
    return given
