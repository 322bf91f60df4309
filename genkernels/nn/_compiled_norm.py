"""Spectral norm as a compiled pass takes it: one operator a weight, into which the compiler does not look.

Whether a weight has been normalised in this step already is known at run time alone, by its version. So the operator
asks the weight's `Group`, as an eager pass does, which updates u and v of all weights that have changed, in one call.
That its calls are as good as one, and that nothing else in a pass reads u or v, is what allows for a state that the
compiler does not know of.

The weight must come as the memory that it is, by which the group knows it. Beside convolutions Inductor lays tensors of
four dimensions out anew, parameters too, and hands an operator a copy. So it is handed as a vector.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkernels.ops._gradients import Formula
from genkernels.ops._operator import in_graph
from genkernels.ops.spectral_norm import BACKWARD

#: Members of groups by number, which a pass is given as a tensor: as a constant of its code it would outlive the
#: process, in the compiler's cache.
_MEMBERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def numbered(member: Any) -> Tensor:
    """The number of a member, which has ``member.group.held(member, weight)``."""
    number = next(_NUMBERS)
    _MEMBERS[number] = member
    return torch.tensor(number)


def normalised(weight: Tensor, number: Tensor, u: Tensor, v: Tensor, plan: Sequence[int], settings) -> Tensor:
    """The weight of a member as its group normalises it; u and v are read for their sizes."""
    sizes = list(weight.shape), list(weight.stride()), list(u.shape), list(v.shape)
    arguments = *sizes, plan, settings.coefficient, settings.at_most
    return torch.ops.genkernels.spectral_norm_held(weight, number, *arguments)[0]


def _as_vector(weight, number, size, stride, *others):
    if sum((n - 1) * step for n, step in zip(size, stride, strict=True)) == weight.numel() - 1:  # no gaps
        weight = weight.as_strided((weight.numel(),), (1,))  # of which the compiler makes no copy
    return weight, number, size, stride, *others


def _run(weight, number, size, stride, u_size, v_size, plan, coefficient, at_most):
    weight = weight.as_strided(size, stride)
    member = _MEMBERS.get(int(number))
    if member is None:
        raise RuntimeError("spectral_norm_: a compiled pass must run beside the layers it was compiled for, got none")
    with torch.no_grad():
        return member.group.held(member, weight)


def _fake(weight, number, size, stride, u_size, v_size, plan, coefficient, at_most):
    work = torch.promote_types(weight.dtype, torch.float32)
    return *(weight.new_empty(shape) for shape in (size, u_size, v_size)), weight.new_empty((1,), dtype=work)


def _setup(ctx, inputs, output):
    weight, *_, ctx.plan, ctx.coefficient, ctx.at_most = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(weight, *output[1:])


def _backward(ctx, grad, *_):
    weight, u, v, sigma = ctx.saved_tensors
    (found,) = BACKWARD.dense([grad], None, [weight], [u], [v], sigma, ctx.plan, ctx.coefficient, ctx.at_most)
    return found, *[None] * 8


in_graph(
    "spectral_norm_held(Tensor weight, Tensor number, SymInt[] size, SymInt[] stride, SymInt[] u_size, "
    "SymInt[] v_size, int[] plan, float coefficient, bool at_most) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    *([torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []),
    gradient=Formula(_setup, _backward, handed=_as_vector),
)
