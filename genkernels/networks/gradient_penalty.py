r"""The loss of a critic's scores and of the slopes of its scores, with its gradient, in as few passes as it needs.

Let :math:`a_l` be what step l gives, :math:`\delta_l` the gradient of each sample's score by it, and
:math:`g = \delta_0` the slope. To minimise is :math:`\ell(s) + \sum_i p(g_i)`. One pass forward and one back, seeded
with ones, give s, g and every :math:`\delta_l`; then :math:`t_0 = \partial p / \partial g` is pushed forward through
the linearised network, :math:`t_l = \phi'_l \odot W_l t_{l-1}`. As the derivative of
:math:`\langle t_0, J^\top 1\rangle` at fixed :math:`t_0` is that of :math:`\langle J t_0, 1\rangle`,

.. math:: \frac{\partial}{\partial W_l} \sum_i p(g_i) = \delta_l \otimes t_{l-1}\qquad\text{(slopes held)},

one product a layer, where double backward goes twice back through both of its passes. Under the loss the signal of
sample i is the number :math:`\ell'_i` times its signal under the score, so that both gradients share the product:

.. math:: \frac{\partial}{\partial W_l} = \delta_l \otimes (\ell'_i a_{l-1} + t_{l-1}),\qquad
    \frac{\partial}{\partial b_l} = \sum_i \ell'_i \delta_l:

four passes in all, with the loss or without it, for networks whose activations have no second derivative. Where they
have one, the slopes' own change adds :math:`\phi''_l \odot W_l t_{l-1} \odot \delta_l` at the input of each activation,
which one ordinary pass back collects: six.

Nothing is kept that is not read again, no slope is written out where torch has an operator for its product, and what
nobody else reads is written over.

Source: Etmann, "A closer look at double backpropagation", 2019 (the four passes). The product that the loss shares is
this library's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.networks._penalty_run import Run
from genkernels.networks.passes import Steps, parameters
from genkernels.networks.properties import is_piecewise_linear
from genkernels.networks.steps import Activate


class Penalised(NamedTuple):
    """What `penalised` returns.

    Args:
        total: loss and penalty, a scalar with its gradient. loss: a scalar, 0 without objective. scores: ``[N]``.
        penalties: of each penalised row. The last three have no graph.
    """

    total: Tensor
    loss: Tensor
    scores: Tensor
    penalties: Tensor


def why_not(steps: Steps) -> str:
    """What among the steps of a network has no rule here, in words, or ""."""
    for step in steps:
        if not isinstance(step, Activate):
            continue
        for source in step.sources:
            value = source.read()
            if isinstance(value, Tensor) and value.requires_grad:
                return f"{step.label} learns its {source.role}"
            if source.role == "negative_slope" and value < 0:
                return f"{step.label} has a negative slope below 0: the sign of its output does not tell its input's"
    return ""


def explained(steps: Steps, with_loss: bool = False) -> str:
    """How many passes `penalised` takes, with an objective or without, and which step makes them six."""
    bending = next((s for s in steps if isinstance(s, Activate) and not is_piecewise_linear((s,))), None)
    beside = ", the loss among them" if with_loss else ""
    if bending is None:
        return f"four passes{beside}: every step is piecewise linear"
    return f"six passes{beside}: {bending.label} has a second derivative"


def penalised(
    steps: Steps,
    x: Tensor,
    penalty: Callable[[Tensor], Tensor],
    objective: Callable[[Tensor], Tensor] | None = None,
    rows: slice = slice(None),
) -> Penalised:
    """The penalty of a network's slopes, beside a loss of its scores, with gradients by its tensors and by x.

    Args:
        steps: of `trace`, that `why_not` has nothing against, from ``[N, ...]`` to one score a sample or several, whose
            mean counts as the score.
        x: ``[N, ...]``.
        penalty: takes slopes ``[R, ...]``, each of which it treats by itself, to ``[R]``, in fp32 at least. The sum
            counts.
        objective: takes the scores ``[N]`` to a scalar; None for the penalty alone. It needs networks of one score.
        rows: the samples that are penalised, R of them; all, where there is no objective.

    Raises:
        RuntimeError: a gradient of the gradient is asked for.
    """
    read = parameters(steps)
    tensors = {id(t): t for own in read for t in own.values() if isinstance(t, Tensor) and t.requires_grad}
    recording = torch.is_grad_enabled() and (bool(tensors) or x.requires_grad)
    with torch.no_grad():
        run = Run(steps, read, tensors if recording else {}, recording and x.requires_grad, objective is not None)
        scores = run.forward(x.detach())
        slopes = run.pull()[rows]
        penalties, direction = _differentiated(penalty, slopes)
        loss, by_score = scores.new_zeros(()), None
        if objective is not None:
            loss, by_score = _differentiated(objective, scores)
        if recording:
            run.push(direction.to(slopes.dtype), by_score, rows)
        total = loss + penalties.sum()
    if recording:
        known = [(t, run.gradient_by(key)) for key, t in tensors.items()]
        known += [(x, run.gradient_by_x())] if x.requires_grad else []
        total = _Known.apply(total, [gradient for _, gradient in known], *(t for t, _ in known))
    return Penalised(total, loss, scores, penalties)


def _differentiated(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """What a function gives, and the gradient of its sum."""
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
    return value.detach(), gradient


class _Known(torch.autograd.Function):
    """A value whose gradients, by each of the tensors that follow, are known already."""

    @staticmethod
    def forward(ctx, value, gradients, *tensors):
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradient_penalty: a gradient found in four or six passes cannot be differentiated again; that of a "
                "critic given as a function, lambda x: critic(x), can be"
            )
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient * grad.to(gradient.dtype) if need else None for gradient, need in needed)
