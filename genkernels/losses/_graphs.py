"""What a loss that differentiates by itself asks of autograd's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def now(tensor: Tensor) -> int:
    """A number that every node made from now on by this thread reaches; `tensor` is any that could have a gradient."""
    with torch.enable_grad():
        return tensor.detach().requires_grad_().view_as(tensor).grad_fn._sequence_nr()


def leaves(root: Tensor, since: int) -> tuple[dict[int, Tensor], str]:
    """The leaves below a tensor, by identity; and the name of a node older than `since`, "" where there is none."""
    found, seen, stack = {}, set(), [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        elif node._sequence_nr() < since:
            return found, node.name()
        else:
            stack += [below for below, _ in node.next_functions]
    return found, ""


def reached(root: GradientEdge, wanted: Iterable[GradientEdge], past: Iterable[GradientEdge] = ()) -> bool:
    """Whether a graph leads from `root` to one of the `wanted` edges other than through those of `past`."""
    wanted, closed = ({(edge.node, edge.output_nr) for edge in edges} for edges in (wanted, past))
    seen, stack = set(), [(root.node, root.output_nr)]
    while stack:
        edge = stack.pop()
        if edge[0] is None or edge in closed or edge in seen:
            continue
        if edge in wanted:
            return True
        seen.add(edge)
        stack += edge[0].next_functions
    return False


def edges(tensors: Iterable[Tensor]) -> list[GradientEdge]:
    return [get_gradient_edge(t) for t in tensors if t.requires_grad]


@contextlib.contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within, the hooks of these leaves rest: they are for their whole gradient, not for a part of it."""
    hooked = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in hooked:
            hooks.update(kept)
