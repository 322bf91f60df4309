"""The gradient of a torch operator, which `Operator.define` asks for: one of three.

- `Formula`: one's own, whose backward runs a kernel;
- `THROUGH_REFERENCE`, above all for backward operators: the autograd of the reference, so that every higher order is
  exact. Without it torch gives zeros at second order with no more than a warning;
- `Refused`: a sentence.

Arguments and results may be tensors, optional tensors and lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from genkernels.ops import _autocast as autocast


@dataclass(frozen=True)
class Formula:
    """A gradient of one's own, as ``torch.library.register_autograd`` takes it, lists of tensors included."""

    setup: Callable[..., None]  #: ``setup(ctx, inputs, output)`` saves what the backward needs
    #: ``backward(ctx, *gradients of the outputs)``: one gradient an argument. An output that is not used has None, not
    #: a zero, which would turn an infinity to NaN; where all do, it is not called.
    backward: Callable[..., tuple]
    #: Places of arguments that never have a gradient, where lists come or go: autograd, whose cost a step of small
    #: layers feels, is not given their tensors.
    constants: tuple[int, ...] = ()
    #: ``handed(*arguments)``: what the operator itself is given of them, out of autograd's sight. Not with lists.
    handed: Callable[..., Sequence] | None = None


@dataclass(frozen=True)
class Refused:
    """No gradient: differentiating raises the sentence. Where the operator writes into its arguments, the call does."""

    sentence: str


class _ThroughReference:
    def __repr__(self) -> str:
        return "THROUGH_REFERENCE"


THROUGH_REFERENCE = _ThroughReference()

Gradient = Formula | Refused | _ThroughReference


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is running, by itself or under ``torch.func.jvp``: a registered operator
    gives zero tangents there, without a word."""
    return forward_ad._current_level >= 0


def transforms_active() -> bool:
    """Whether a functorch transform (``vmap``, ``grad``, ``jvp``) or forward-mode differentiation is running.

    Registered operators fail under the former. The only place that rests on these private names of torch; a test fails
    loudly when they move.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def with_gradient(name: str, run: Any, reference: Callable, gradient: Gradient) -> Callable:
    """What torch calls where autograd may be recording."""
    schema = run._schema
    if any(a.has_default_value() for a in schema.arguments):
        raise ValueError(f"{name}: a schema must give no default values, its public function has them; got {schema}")
    if isinstance(gradient, Refused):
        if schema.is_mutable:
            return _refusing_call(run, gradient.sentence)
        return _refusing(run, reference, gradient.sentence)
    if schema.is_mutable:
        raise ValueError(f"{name}: the gradient of an operator that writes into its arguments must be Refused")
    if isinstance(gradient, Formula):
        return _recording(run, reference, gradient)
    if gradient is THROUGH_REFERENCE:
        return _recording(run, reference, _through(reference))
    raise TypeError(f"{name}: gradient must be a Formula, THROUGH_REFERENCE or Refused, got {gradient!r}")


def _recording(run: Any, reference: Callable, formula: Formula) -> Callable:
    """Calls `run` through an `autograd.Function`.

    ``torch.library.register_autograd`` would do, but reads the schema anew in every call, which costs as much as a
    small layer (some 30 µs), and twice that with lists.
    """
    schema = run._schema
    if any(_is_tensor_list(value.type) for value in (*schema.arguments, *schema.returns)):
        return _recording_lists(run, reference, formula)

    def plain(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return run(*arguments) if formula.handed is None else run(*formula.handed(*arguments))

    def forward(ctx, *arguments):
        output = plain(*arguments)
        ctx.set_materialize_grads(False)
        formula.setup(ctx, arguments, output)
        return output

    # runs with autograd in reach: reading saved tensors may run a checkpoint's forward pass again
    def backward(ctx, *grad_outputs):
        for grad in grad_outputs:
            if grad is not None:
                return formula.backward(ctx, *grad_outputs)
        return (None,) * len(schema.arguments)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{run._opname}_gradient", (torch.autograd.Function,), members)

    def call(*arguments):
        if forward_ad._current_level >= 0:
            return reference(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments)
        return plain(*arguments)

    return call


def _recording_lists(run: Any, reference: Callable, formula: Formula) -> Callable:
    """The same where lists of tensors come or go: `autograd.Function` sees the tensors that stand by themselves, so it
    is given all of them flat, and the arguments as they are, which it does not look into."""
    schema = run._schema
    varying = [i for i in range(len(schema.arguments)) if i not in formula.constants]
    lists = [at for at, i in enumerate(varying) if _is_tensor_list(schema.arguments[i].type)]  # among these
    gives_list = any(_is_tensor_list(value.type) for value in schema.returns)
    if formula.handed is not None:
        raise ValueError(f"{schema.name}: a formula with `handed` must have no lists, got {schema}")
    if gives_list and len(schema.returns) > 1:
        raise ValueError(f"{schema.name}: a schema must return tensors or one list of them, got {schema}")

    def lengths(arguments):
        return [len(arguments[varying[at]]) for at in lists]

    def forward(ctx, arguments, *flat):
        with torch._C._AutoDispatchBelowAutograd():
            output = run(*arguments)
        ctx.lengths = lengths(arguments)
        ctx.set_materialize_grads(False)
        formula.setup(ctx, arguments, output)
        return tuple(output) if gives_list else output

    def backward(ctx, *grad_outputs):
        needs = ctx.needs_input_grad
        if all(grad is None for grad in grad_outputs):
            return (None,) * len(needs)
        of_varying = dict(zip(varying, _nested(needs[1:], lists, ctx.lengths), strict=True))
        ctx.needs_input_grad = tuple(of_varying.get(i, False) for i in range(len(schema.arguments)))
        try:
            grads = formula.backward(ctx, *((list(grad_outputs),) if gives_list else grad_outputs))
        finally:
            ctx.needs_input_grad = needs
        return None, *_flat([grads[i] for i in varying], lists, ctx.lengths)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{run._opname}_gradient", (torch.autograd.Function,), members)

    def call(*arguments):
        if forward_ad._current_level >= 0:
            return reference(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            flat = _flat([arguments[i] for i in varying], lists, lengths(arguments))
            output = function.apply(arguments, *flat)
            return list(output) if gives_list else output
        with torch._C._AutoDispatchBelowAutograd():
            return run(*arguments)

    return call


def _is_tensor_list(kind) -> bool:
    return isinstance(kind, torch.ListType) and "Tensor" in str(kind.getElementType())


def _flat(values: Sequence, lists: Sequence[int], lengths: Sequence[int]) -> list:
    """`values` with those at the places `lists` spread out; None there counts as that many."""
    flat, length_at = [], dict(zip(lists, lengths, strict=True))
    for i, value in enumerate(values):
        if i not in length_at:
            flat.append(value)
        else:
            flat += [None] * length_at[i] if value is None else value
    return flat


def _nested(flat: Sequence, lists: Sequence[int], lengths: Sequence[int]) -> list:
    """`_flat` undone."""
    values, rest = [], list(flat)
    for i, length in zip(lists, lengths, strict=True):
        before = i - len(values)
        values += [*rest[:before], rest[before : before + length]]
        rest = rest[before + length :]
    return values + rest


def _through(reference: Callable) -> Formula:
    """The gradient of any order by the autograd of `reference`, whatever nests its tensors are passed in."""

    def setup(ctx, inputs, output):
        leaves, ctx.structure = pytree.tree_flatten(tuple(inputs))
        ctx.others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        ctx.save_for_backward(*[leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def backward(ctx, *grad_outputs):
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved) if other is None else other[0] for other in ctx.others]
        wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        higher = torch.is_grad_enabled()
        grads: list[Tensor | None] = [None] * len(leaves)
        # the forward pass has settled the dtypes: under autocast a product would take a lower one
        kept_out = autocast.kept_out(next(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        with torch.enable_grad(), kept_out:
            if not higher:
                for i in wanted:
                    leaves[i] = leaves[i].detach().requires_grad_()
            outputs = pytree.tree_leaves(reference(*pytree.tree_unflatten(leaves, ctx.structure)))
            pairs = [
                (output, grad)
                for output, grad in zip(outputs, pytree.tree_leaves(grad_outputs), strict=True)
                if grad is not None and output.requires_grad
            ]
            if pairs and wanted:
                by_input = torch.autograd.grad(
                    [output for output, _ in pairs],
                    [leaves[i] for i in wanted],
                    [grad for _, grad in pairs],
                    create_graph=higher,
                    allow_unused=True,
                )
                for i, grad in zip(wanted, by_input, strict=True):
                    grads[i] = grad
        nested = pytree.tree_unflatten(grads, ctx.structure)
        # a list of numbers, too, must have None for its gradient, not a list of them
        return tuple(None if all(g is None for g in pytree.tree_leaves(value)) else value for value in nested)

    return Formula(setup, backward)


def _refusing(run: Any, reference: Callable, sentence: str) -> Callable:
    def setup(ctx, inputs, output):
        pass

    def backward(ctx, *grad_outputs):
        raise RuntimeError(sentence)

    return _recording(run, reference, Formula(setup, backward))


def _refusing_call(run: Any, sentence: str) -> Callable:
    """For an operator that writes into its arguments, which no `autograd.Function` takes."""

    def call(*arguments):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            raise RuntimeError(sentence)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*arguments)

    return call
