"""The inverse of a residual block: schema, checks, fakes, gradient. The maths is in
`genkernels.reference.invertible_residual`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _block_checks as block_checks
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula, transforms_active
from genkernels.ops._operator import DIFFERENTIABLE, Operator
from genkernels.reference import invertible_residual as reference
from genkernels.reference._fixed_point import Solution

NAME = "invertible_residual"
#: Steps of the past that Anderson's iteration looks at, at most.
MOST_DEPTH = 5


def invertible_residual(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activation: str = "lipswish",
    parameters: Tensor | None = None,
    *,
    start: Tensor | None = None,
    rtol: float = 0.0,
    atol: float = 1e-5,
    max_iterations: int = 200,
    depth: int = MOST_DEPTH,
) -> Solution:
    r"""x from y = x + g(x), g an alternation of linear maps and one activation that contracts.

    An accelerated fixed-point iteration (Anderson, with plain steps as a safeguard) that stops sample by sample: one
    that has converged costs nothing from then on, one that is NaN ends at once.

    Equivalent to::

        x = y
        for _ in range(max_iterations):     # of each sample, until no element of y - x - g(x) exceeds its limit
            x = y - g(x)

    Args:
        y: ``[N, D]`` or ``[N, C, H, W]``, fp64, fp32, bf16 or fp16 (computed in fp32).
        weights, biases, activation, parameters: of g, as for `log_det_series`.
        start: where to begin, like y; y by default.
        rtol, atol: a sample has converged where no element of y − x − g(x) is above ``atol + rtol * max|y|``.
        max_iterations: evaluations of g a sample. depth: steps of the past that are looked back on, 0 (the plain
            iteration) to 5.

    Returns:
        `Solution`: x, and of each sample the residual, the iterations and whether it converged. The gradient by y and
        by what g holds is that of the implicit function, solved for in the same way to within ``rtol + atol`` of its
        own size, and costs no more memory for more iterations.

    Raises:
        ValueError: a shape or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Under ``torch.func.vmap`` all samples take `max_iterations` plain steps.

    Source: Behrmann et al., "Invertible residual networks", 2019; Walker and Ni, "Anderson acceleration for fixed-point
    iterations", 2011; Bai et al., "Deep equilibrium models", 2019 (implicit gradient).
    """
    number, y, weights, biases, parameters, (start,) = block_checks.settled(
        NAME, "y", y, weights, biases, parameters, activation, {"start": start}
    )
    if start is not None:
        checks.shape(NAME, "start", start, y.shape, "like y")
    rtol, atol = block_checks.number(NAME, "rtol", rtol), block_checks.number(NAME, "atol", atol)
    checks.integer(NAME, "max_iterations", max_iterations, 1)
    checks.integer(NAME, "depth", depth, 0, MOST_DEPTH)
    run = SOLVE.run if y.is_meta else SOLVE  # without values the reference cannot decide when to stop
    with autocast.kept_out(y):
        found = run(y, start, weights, biases, parameters, rtol, atol, max_iterations, depth, number)
    return Solution(*found)


# --------------------------------------------------------------------------------------------------- gradient and fakes


def _setup(ctx, inputs, output):
    _, _, weights, biases, parameters, *ctx.options, ctx.activation = inputs
    ctx.count = len(weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[0], parameters, *weights, *biases)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    x, parameters, *both = ctx.saved_tensors
    weights, biases = both[: ctx.count], both[ctx.count :]
    run = reference.invertible_residual_backward if transforms_active() else BACKWARD.dense
    with autocast.kept_out(x):
        by_y, *rest = run(grad, x, weights, biases, parameters, *ctx.options, ctx.activation)
    return by_y, None, rest[: ctx.count], rest[ctx.count : -1], rest[-1], None, None, None, None, None


def _fake(y, start, weights, biases, parameters, rtol, atol, max_iterations, depth, activation):
    each = (y.shape[0],)
    residual = y.new_empty(each, dtype=block_checks.work(y))
    return y.new_empty(y.shape), residual, y.new_empty(each, dtype=torch.int64), y.new_empty(each, dtype=torch.bool)


def _fake_backward(grad, x, weights, biases, parameters, rtol, atol, max_iterations, depth, activation):
    return block_checks.fakes(x, weights, biases, parameters)


OPERATOR = Operator(
    NAME,
    functions=(invertible_residual,),
    types=(Solution,),
    kernels={"cpu": "", "triton": "", "cuda": ""},
    composability=DIFFERENTIABLE,
)
SOLVE = OPERATOR.define(
    "invertible_residual(Tensor y, Tensor? start, Tensor[] weights, Tensor[] biases, Tensor parameters, float rtol, "
    "float atol, int max_iterations, int depth, int activation) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.invertible_residual,
    _fake,
    gradient=Formula(_setup, _backward),
)
BACKWARD = OPERATOR.define(
    "invertible_residual_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] biases, Tensor parameters, "
    "float rtol, float atol, int max_iterations, int depth, int activation) -> Tensor[]",
    reference.invertible_residual_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
