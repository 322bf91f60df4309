"""Rules for arithmetic, reshaping and sums."""

from __future__ import annotations

import operator
from math import prod

import torch
from torch import Tensor, nn

from genkernels.networks._registry import axis_of, function, is_number, layer, source
from genkernels.networks.steps import Add, Concatenate, Offset, Reduce, Reshape, Scale, Source

# --- arithmetic -------------------------------------------------------------------------------------------------------


@function("add", torch.add, Tensor.add)
def _add(b, input, other, *, alpha=1):
    return _sum(b, input, other, alpha)


@function("add", torch.sub, torch.subtract, Tensor.sub)
def _subtract(b, input, other, *, alpha=1):
    return _sum(b, input, other, -alpha)


@function("add", Tensor.__rsub__)
def _subtract_from(b, input, other):
    return _sum(b, other, input, -1)


@function("add", Tensor.add_)
def _add_in_place(b, input, other, *, alpha=1):
    return _sum(b, input, other, alpha, in_place=True)


@function("add", Tensor.sub_)
def _subtract_in_place(b, input, other, *, alpha=1):
    return _sum(b, input, other, -alpha, in_place=True)


def _sum(b, x, y, coefficient, in_place=False):
    if not is_number(coefficient):
        b.refuse("has no rule for an alpha that is no number")
    if not b.is_value(x):  # a constant ± coefficient · y
        if in_place:
            b.refuse("changes a parameter or buffer in place")
        y = y if coefficient == 1 else _scaled(b, y, coefficient)
        return b.emit(Offset, [y], b.shape(y), [_constant(b, x, y, "offset")])
    if not b.is_value(y):
        offset = _constant(b, y, x, "offset")
        return b.emit(Offset, [x], b.shape(x), [offset], in_place=in_place, coefficient=coefficient)
    if b.shape(x) != b.shape(y):
        b.refuse(f"adds samples of two shapes, {list(b.shape(x))} and {list(b.shape(y))}")
    return b.emit(Add, [x, y], b.shape(x), in_place=in_place, coefficient=coefficient)


@function("scale", torch.neg, Tensor.neg)
def _negate(b, input):
    return _scaled(b, input, -1)


@function("scale", torch.mul, Tensor.mul)
def _multiply(b, input, other):
    return _scaled(b, *((input, other) if b.is_value(input) else (other, input)))


@function("scale", torch.div, Tensor.div)
def _divide(b, input, other):
    return _scaled(b, input, other, divide=True)


@function("scale", Tensor.mul_)
def _multiply_in_place(b, input, other):
    return _scaled(b, input, other, in_place=True)


@function("scale", Tensor.div_)
def _divide_in_place(b, input, other):
    return _scaled(b, input, other, divide=True, in_place=True)


def _scaled(b, x, factor, divide=False, in_place=False):
    if b.is_value(factor):
        b.refuse("multiplies or divides by a value of the network: that is not linear")
    factor = _constant(b, factor, x, "factor")
    return b.emit(Scale, [x], b.shape(x), [factor], in_place=in_place, divide=divide)


def _constant(b, constant, x, role: str) -> Source:
    """A number, or a parameter or buffer that broadcasts over `x` and not the other way round."""
    if is_number(constant):
        return Source(role, constant=constant)
    if b.is_batch(constant):
        b.refuse("computes with the batch's size")
    if not b.is_own(constant):
        b.refuse("computes with something that is neither a number nor a parameter nor a buffer")
    if b.is_of_labels(constant):
        shape, sample = b.own_shape(constant)[1:], b.shape(x)
        if len(shape) != len(sample) or any(n not in (1, m) for n, m in zip(shape, sample, strict=True)):
            b.refuse(f"combines samples {list(sample)} with an embedding {list(shape)}, which has another shape")
        return source(constant, role)
    shape, whole = list(b.own_shape(constant)), [1, *b.shape(x)]
    if len(shape) > len(whole) or any(n not in (1, m) for n, m in zip(reversed(shape), reversed(whole), strict=False)):
        b.refuse(f"combines samples {whole[1:]} with a tensor {shape}, which does not broadcast over them")
    return source(constant, role)


@function("concat", torch.cat, torch.concat, torch.concatenate)
def _concatenate(b, tensors, dim=0):
    shapes = [b.shape(x) for x in tensors]
    axis = axis_of(b, dim, len(shapes[0]) + 1)
    rest = {(*shape[: axis - 1], *shape[axis:]) for shape in shapes}
    if len(rest) > 1 or len({len(shape) for shape in shapes}) > 1:
        b.refuse(f"joins samples {', '.join(str(list(shape)) for shape in shapes)}, which differ along other axes")
    total = sum(shape[axis - 1] for shape in shapes)
    return b.emit(Concatenate, tensors, (*shapes[0][: axis - 1], total, *shapes[0][axis:]), axis=axis)


# --- shapes and sums --------------------------------------------------------------------------------------------------


@layer("reshape", nn.Flatten)
def _flatten_layer(b, m, input):
    return _flatten(b, input, m.start_dim, m.end_dim)


@function("reshape", torch.flatten, Tensor.flatten)
def _flatten(b, input, start_dim=0, end_dim=-1):
    shape = b.shape(input)
    if not shape:
        b.refuse("has no axes to flatten but the batch")
    if prod(shape) == 1 and start_dim in (0, -len(shape) - 1) and end_dim in (-1, len(shape)):  # [N, 1] as [N]
        return _reshaped(b, input, ())
    first, last = (axis_of(b, dim, len(shape) + 1) for dim in (start_dim, end_dim))
    return _reshaped(b, input, (*shape[: first - 1], prod(shape[first - 1 : last]), *shape[last:]))


@layer("reshape", nn.Unflatten)
def _unflatten_layer(b, m, input):
    if not isinstance(m.dim, int):
        b.refuse("unflattens a named axis")
    return _unflatten(b, input, m.dim, m.unflattened_size)


@function("reshape", torch.unflatten, Tensor.unflatten)
def _unflatten(b, input, dim, sizes):
    shape = b.shape(input)
    axis = axis_of(b, dim, len(shape) + 1)
    return _reshaped(b, input, (*shape[: axis - 1], *_completed(b, sizes, shape[axis - 1]), *shape[axis:]))


@function("reshape", torch.reshape, Tensor.reshape, Tensor.view)
def _reshape(b, input, *shape):
    sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else list(shape)
    if not sizes or not (b.is_batch(sizes[0]) or sizes[0] == -1):
        b.refuse("must keep the batch as its first axis: x.shape[0] or -1")
    if not b.is_batch(sizes[0]) and -1 in sizes[1:]:
        b.refuse("has two sizes of -1")
    return _reshaped(b, input, _completed(b, sizes[1:], prod(b.shape(input))))


@function("reshape", torch.squeeze, Tensor.squeeze)
def _squeeze(b, input, dim=None):
    if dim is None:
        b.refuse("drops the batch's axis too where there is one sample: name the axis")
    shape = b.shape(input)
    axes = {axis_of(b, d, len(shape) + 1) for d in (dim if isinstance(dim, tuple) else (dim,))}
    return _reshaped(b, input, [n for axis, n in enumerate(shape, start=1) if axis not in axes or n != 1])


@function("reshape", torch.unsqueeze, Tensor.unsqueeze)
def _unsqueeze(b, input, dim):
    shape = b.shape(input)
    axis = axis_of(b, dim, len(shape) + 2)
    return _reshaped(b, input, (*shape[: axis - 1], 1, *shape[axis - 1 :]))


def _completed(b, sizes, total: int) -> tuple[int, ...]:
    """`sizes`, of which one may be -1, of `total` elements."""
    sizes = [operator.index(n) for n in sizes]
    known = prod(n for n in sizes if n != -1)
    if sizes.count(-1) == 1 and known and total % known == 0:
        sizes[sizes.index(-1)] = total // known
    if min(sizes, default=0) < 0 or prod(sizes) != total:
        b.refuse(f"makes samples {sizes} of {total} elements")
    return tuple(sizes)


def _reshaped(b, x, shape):
    return b.emit(Reshape, [x], shape, view=True)


@function("sum", torch.sum, Tensor.sum)
def _sum_over(b, input, dim=None, keepdim=False):
    return _reduced(b, input, dim, keepdim, mean=False)


@function("sum", torch.mean, Tensor.mean)
def _mean_over(b, input, dim=None, keepdim=False):
    return _reduced(b, input, dim, keepdim, mean=True)


def _reduced(b, x, dim, keepdim, mean):
    shape = b.shape(x)
    axes = _reduced_axes(b, shape, dim)
    kept = [1 if axis in axes else n for axis, n in enumerate(shape, start=1) if keepdim or axis not in axes]
    return b.emit(Reduce, [x], kept, axes=axes, mean=mean)


def _reduced_axes(b, shape, dim) -> tuple[int, ...]:
    dims = dim if isinstance(dim, tuple | list) else () if dim is None else (dim,)
    if not dims:
        b.refuse("couples the samples of a batch: it takes them all together", True)
    return tuple(sorted({axis_of(b, d, len(shape) + 1) for d in dims}))


@function("spread", torch.std, Tensor.std, torch.var, Tensor.var)
def _spread(b, input, dim=None, *others, **options):
    _reduced_axes(b, b.shape(input), dim)
    b.refuse("has no rule")
