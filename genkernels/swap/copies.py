"""Masked convolutions that are nobody's library: a subclass of `torch.nn.Conv2d` with a buffer ``mask``, as PixelCNNs
are mostly written.

What such a class computes is what its ``forward`` says, read from its source. Two things are known: the weight times
the mask, convolved; and the weight overwritten by that, then convolved. Whatever else a class says, it stays.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

import torch.nn.functional as F
from torch import nn

from genkernels.swap._causal import NO_MASK, ZEROED, Multiplied, Zeroed, mask_type
from genkernels.swap._rules import Becomes, Library

_REST = "self.bias, self.stride, self.padding, self.dilation"
_PRODUCTS = "self.weight * self.mask", "self.mask * self.weight"
#: What a forward says that multiplies, and one that overwrites; its argument is called x here.
MULTIPLIED_SOURCES = {
    source
    for product in _PRODUCTS
    for source in (
        f"return F.conv2d(x, {product}, {_REST})",
        f"return F.conv2d(x, {product}, {_REST}, self.groups)",
        f"return self._conv_forward(x, {product}, self.bias)",
    )
}
ZEROED_SOURCES = {
    f"{first}\nreturn {last}"
    for first in ("self.weight.data *= self.mask", "self.weight.data.mul_(self.mask)")
    for last in (
        "super().forward(x)",
        f"F.conv2d(x, self.weight, {_REST})",
        f"F.conv2d(x, self.weight, {_REST}, self.groups)",
    )
}


class _Renamed(ast.NodeTransformer):
    def __init__(self, argument: str, cls: str):
        self.argument, self.cls = argument, cls

    def visit_Name(self, node):
        return ast.Name("x", node.ctx) if node.id == self.argument else node

    def visit_Call(self, node):
        node = self.generic_visit(node)
        if ast.unparse(node) == f"super({self.cls}, self)":
            node.args = []
        return node


@functools.cache
def says(cls: type) -> str:
    """The body of a class's ``forward``, its argument called x; "" where it cannot be read."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls.forward))).body
        _, argument = tree.args.args
    except (OSError, TypeError, SyntaxError, ValueError, AttributeError):
        return ""
    if tree.decorator_list:
        return ""
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return "\n".join(ast.unparse(_Renamed(argument.arg, cls.__name__).visit(line)) for line in body)


def _rule(thing: nn.Conv2d) -> Becomes | str:
    cls = type(thing)
    if cls.__bases__ != (nn.Conv2d,) or set(vars(cls)) & {
        "__call__",
        "_conv_forward",
        "__getattr__",
        "__getattribute__",
    }:
        return "a masked convolution that is more than a forward on top of nn.Conv2d"
    source = says(cls)
    if "F." in source and cls.forward.__globals__.get("F") is not F:
        return UNKNOWN
    if source not in MULTIPLIED_SOURCES | ZEROED_SOURCES:
        return UNKNOWN
    if mask_type(thing, thing.mask) is None:
        return NO_MASK
    return Becomes(subclass(cls), ZEROED if source in ZEROED_SOURCES else "")


UNKNOWN = "its forward says something else than the weight times the mask, convolved"


@functools.cache
def subclass(cls: type) -> type:
    """The class that takes the place of a class of a user's own."""
    kind = _Zeroed if says(cls) in ZEROED_SOURCES else _Multiplied
    return type(cls.__name__, (kind, cls), {"__module__": __name__})


class _Copied:
    def __reduce_ex__(self, protocol):
        return _empty, (type(self).__bases__[1],), self.__dict__


class _Multiplied(_Copied, Multiplied):
    pass


class _Zeroed(_Copied, Zeroed):
    pass


def _empty(cls: type) -> nn.Module:
    """What a copy and a file are read into."""
    to = subclass(cls)
    return to.__new__(to)


def is_masked(thing: nn.Conv2d) -> bool:
    """Whether it is nobody's: `genkernels.nn.MaskedConv2d` has a mask too."""
    own, swapped = (type(thing).__module__.startswith(room) for room in ("genkernels.", "genkernels.swap."))
    return swapped or not own


LIBRARY = Library("", (), {}, otherwise=_rule)
