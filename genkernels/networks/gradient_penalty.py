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

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.networks._penalty_plan import Plan
from genkernels.networks._penalty_run import Run
from genkernels.networks.passes import Steps, parameters
from genkernels.networks.properties import is_piecewise_linear
from genkernels.networks.steps import Activate
from genkernels.ops.gradient_penalty import PENALTY, PENALTY_BACKWARD

Penalty = Callable[[Tensor], Tensor]
#: Outputs of steps, in numbers, up to which several batches go as one: fewer calls then count for more than memory.
TOGETHER = 2**20


class NormPenalty:
    """The penalty of `genkernels.ops.gradient_penalty` times a weight, which knows its gradient without autograd.

    Args:
        weight: a number, or one a sample, ``[N]``. target, one_sided: as there.
    """

    def __init__(self, weight: float | Tensor, target: float = 0.0, one_sided: bool = False):
        self.weight, self.options = weight, (float(target), bool(one_sided))

    def __call__(self, slopes: Tensor) -> Tensor:
        return PENALTY(slopes, *self.options)[0] * self.weight

    def with_gradient(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """What a call gives, and its gradient by the slopes; without a graph."""
        value, norm = PENALTY(slopes, *self.options)
        weights = torch.full_like(value, self.weight) if isinstance(self.weight, float) else self.weight
        return value * weights, PENALTY_BACKWARD(weights, None, slopes, norm, *self.options)

    @staticmethod
    def joined(penalties: Sequence[NormPenalty], like: Tensor) -> NormPenalty | None:
        """One that does the same for `interleaved` batches of as many samples as `like` each, if there is one."""
        first = penalties[0]
        if any(not isinstance(each, NormPenalty) or each.options != first.options for each in penalties):
            return None
        if all(each.weight == first.weight for each in penalties):
            return first
        dtype = torch.promote_types(like.dtype, torch.float32)
        weights = [like.new_full((len(like),), each.weight, dtype=dtype) for each in penalties]
        return NormPenalty(interleaved(weights), *first.options)


class Penalised(NamedTuple):
    """What `penalised` returns; all but the first without a graph.

    Args:
        total: loss and penalties, a scalar with its gradient. loss: a scalar, 0 without objective. scores: ``[N]``, a
            batch each. penalties: ``[N]``, a batch each; None of a batch without penalty.
    """

    total: Tensor
    loss: Tensor
    scores: tuple[Tensor, ...]
    penalties: tuple[Tensor | None, ...]


def why_not(steps: Steps, weights: Sequence[dict]) -> str:
    """What among the steps of a network, with weights of `parameters`, has no rule here, in words, or ""."""
    for step, own in zip(steps, weights, strict=True):
        for role, value in own.items() if isinstance(step, Activate) else ():
            if isinstance(value, Tensor) and value.requires_grad:
                return f"{step.label} learns its {role}"
            if role in ("negative_slope", "alpha", "gain") and value < 0:
                return f"{step.label} has {role} = {value}: below 0 its output does not tell its slope"
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
    batches: Sequence[Tensor],
    penalties: Sequence[Penalty | None],
    objective: Callable[..., Tensor] | None = None,
    weights: Sequence[dict] | None = None,
) -> Penalised:
    """Penalties of a network's slopes, beside a loss of its scores, with gradients by its tensors and by its inputs.

    Batches go back one after the other: what the first one needed is given back before the second one needs it. Small
    ones of one size go as one.

    Args:
        steps: of `trace`, that `why_not` has nothing against, from ``[N, ...]`` to one score a sample or several, whose
            mean counts as the score.
        batches: ``[N, ...]`` each.
        penalties: of each batch a `NormPenalty`, or a function of slopes ``[N, ...]``, each of which it treats by
            itself, to ``[N]``, in fp32 at least, of which the sum counts; or None.
        objective: takes the scores ``[N]`` of every batch to a scalar; None for the penalties alone. It needs networks
            of one score.
        weights: of `parameters`, read now if not given. What labels give is the same for all batches.

    Raises:
        RuntimeError: a gradient of the gradient is asked for.
    """
    read = parameters(steps) if weights is None else weights
    if len(batches) > 1 and None not in penalties and as_one(steps, batches):
        return _together(steps, batches, penalties, objective, read)
    recording = torch.is_grad_enabled()
    wanted = [x.requires_grad and recording for x in batches]
    with torch.no_grad():
        plan = Plan(steps, read, recording, any(wanted), objective is not None)
        runs = [Run(plan, x.detach()) for x in batches]
        scores = tuple(run.forward() for run in runs)
        loss, by_scores = scores[0].new_zeros(()), (None,) * len(runs)
        if objective is not None:
            loss, by_scores = _differentiated(objective, *scores)
        found = tuple(
            _finished(*each, bool(plan.wanted) or any(wanted)) for each in zip(runs, penalties, by_scores, strict=True)
        )
        total = loss
        for penalty in found:
            total = total if penalty is None else total + penalty.sum()
        known = plan.found() + [run.gradient_by_x() for run, each in zip(runs, wanted, strict=True) if each]
    if known:
        asking = [x for x, each in zip(batches, wanted, strict=True) if each]
        total = _Known.apply(total, known, *plan.wanted, *asking)
    return Penalised(total, loss, scores, found)


def as_one(steps: Steps, batches: Sequence[Tensor]) -> bool:
    """Whether batches, of one size, are so small that they had better go through the network together."""
    return len({len(x) for x in batches}) == 1 and sum(len(x) for x in batches) <= most_as_one(steps)


def most_as_one(steps: Steps) -> int:
    """How many samples had better go through the network together."""
    return TOGETHER // sum(prod(step.shape) for step in steps)


def interleaved(batches: Sequence[Tensor]) -> Tensor:
    """Batches of one size as one, the first samples of all before all the second ones.

    What cancels between the batches, as a critic's biases do where a loss takes the difference of real and generated
    scores, then cancels next to where it arose. One batch after the other it would leave the rounding of sums that
    climb and come down again, of which Adam makes whole steps.
    """
    return torch.stack(list(batches), 1).flatten(0, 1)


def apart(values: Tensor, batches: int) -> tuple[Tensor, ...]:
    """What belongs to each of the batches that `interleaved` made one."""
    return values.unflatten(0, (-1, batches)).unbind(1)


def _together(steps: Steps, batches, penalties, objective, weights) -> Penalised:
    """The same with all batches as one."""
    n = len(batches)

    def each_its_own(slopes: Tensor) -> Tensor:
        return interleaved([each(part) for each, part in zip(penalties, apart(slopes, n), strict=True)])

    def of_all(scores: Tensor) -> Tensor:
        return objective(*apart(scores, n))

    weights = [
        {**own, **{s.role: own[s.role].repeat_interleave(n, 0) for s in step.sources if s.of_labels}}
        for step, own in zip(steps, weights, strict=True)
    ]
    penalty = NormPenalty.joined(penalties, batches[0]) or each_its_own
    found = penalised(steps, [interleaved(batches)], [penalty], of_all if objective else None, weights)
    (scores,), (values,) = found.scores, found.penalties
    return found._replace(scores=apart(scores, n), penalties=apart(values, n))


def _finished(run: Run, penalty: Penalty | None, by_score: Tensor | None, recording: bool) -> Tensor | None:
    """The penalties of one batch, whose gradients are collected where they are `recording`."""
    value, direction = None, None
    if penalty is not None or (recording and not run.plan.layout.bends):
        slopes = run.pull()
    if isinstance(penalty, NormPenalty):
        value, direction = penalty.with_gradient(slopes)
    elif penalty is not None:
        value, (direction,) = _differentiated(penalty, slopes)
    if recording:
        run.push(None if direction is None else direction.to(slopes.dtype), by_score)
    return value


def _differentiated(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a function gives, and the gradients of its sum."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in at]
        value = function(*leaves)
        gradients = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    return value.detach(), gradients


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
        gradients, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if all(needed) and len({gradient.dtype for gradient in gradients}) == 1:
            return None, None, *torch._foreach_mul(gradients, grad.to(gradients[0].dtype))
        pairs = zip(gradients, needed, strict=True)
        return None, None, *(gradient * grad.to(gradient.dtype) if need else None for gradient, need in pairs)
