"""What a loss that differentiates by itself asks of autograd's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

#: The node of a leaf.
ACCUMULATE = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


def now() -> int:
    """A number that every node made from now on by this thread exceeds."""
    with torch.enable_grad():
        return torch.zeros((), requires_grad=True).view(()).grad_fn._sequence_nr()


def leaves(root: Tensor, since: int) -> tuple[dict[int, Tensor], str]:
    """The leaves below a tensor, by identity; and the name of a node older than `since`, "" where there is none."""
    found, seen, stack = {}, set(), [edge.node for edge in edges([root])]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, ACCUMULATE):
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
