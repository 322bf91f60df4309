r"""x from y = x + g(x) for the network of a residual block: the definition, the oracle and the fallback.

The iteration is `_fixed_point.solve`: Anderson's, with plain steps as a safeguard, every sample stopping by itself
where no element of y − x − g(x) is above ``atol + rtol * max|y|``. The gradient is that of the implicit function: with
J the Jacobian of g at x,

.. math:: w = (I + J)^{-\top} \nabla_x,\qquad \nabla_y = w,\qquad \nabla_\theta = -w^\top\,\partial_\theta g(x)

where w is the fixed point of :math:`w = \nabla_x - J^\top w`, found in the same way, to ``rtol + atol`` of the
gradient's size. Here, in the oracle, it is solved for directly where there are no more than `MOST_FEATURES`.

Shapes: y ``[N, D]`` or ``[N, C, H, W]``, x like y; residual (fp32, fp64 for fp64), iterations and converged ``[N]``.
Half numbers are computed in fp32. Saved for backward: x and the network's arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkernels.reference import _block
from genkernels.reference._block import Block, linearize
from genkernels.reference._fixed_point import Solution, solve

#: Of a sample, up to which its Jacobian is taken whole.
MOST_FEATURES = 256

__all__ = ["Solution", "invertible_residual", "invertible_residual_backward"]


def invertible_residual(
    y: Tensor,
    start: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    parameters: Tensor,
    rtol: float,
    atol: float,
    max_iterations: int,
    depth: int,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(x, residual, iterations, converged)``; see above."""
    work = _block.work_dtype(y)
    block, target = Block(weights, biases, parameters, activation).to(work), y.to(work)
    fixed = Block(
        [w.detach() for w in block.weights], [b.detach() for b in block.biases], block.parameters.detach(), activation
    )
    with torch.no_grad():
        found = solve(
            lambda x, rows: linearize(fixed.of(rows), x).value,
            target.detach(),
            None if start is None else start.detach().to(work),
            rtol=rtol,
            atol=atol,
            max_iterations=max_iterations,
            depth=depth,
        )
    x = found.x
    if torch.is_grad_enabled():
        x = x + _unmoved(block, target, x)
    return x.to(y.dtype), found.residual, found.iterations, found.converged


def _unmoved(block: Block, y: Tensor, x: Tensor) -> Tensor:
    """0, as a function of y and the block: what two steps of Newton's method add, whose derivatives up to the second
    are the solution's, less itself."""
    features = x.shape[1:].numel()
    if features > MOST_FEATURES:
        if y.requires_grad or any(t.requires_grad for t in (*block.weights, *block.biases, block.parameters)):
            raise ValueError(
                f"invertible_residual: the reference differentiates up to {MOST_FEATURES} features, got {features}"
            )
        return torch.zeros_like(x)
    at_x = x
    for _ in range(2):
        at = linearize(block, at_x)
        at_x = at_x + _solved(_block.jacobian(block, at, at_x), y - at_x - at.value)
    return at_x - at_x.detach()


def _solved(jacobian: Tensor, right: Tensor) -> Tensor:
    """(I + J)⁻¹ of it."""
    matrix = jacobian + torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    return torch.linalg.solve(matrix, right.reshape(*matrix.shape[:2], 1)).reshape(right.shape)


def invertible_residual_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    parameters: Tensor,
    rtol: float,
    atol: float,
    max_iterations: int,
    depth: int,
    activation: int,
) -> list[Tensor]:
    """Gradients of y, of each weight, of each bias and of the parameters."""
    dtypes = [t.dtype for t in (x, *weights, *biases, parameters)]
    work = _block.work_dtype(x)
    block, x, grad = Block(weights, biases, parameters, activation).to(work), x.to(work), grad.to(work)
    at = linearize(block, x)
    if not x.numel():
        w = grad
    elif x[0].numel() <= MOST_FEATURES:
        w = _solved(_block.jacobian(block, at, x).transpose(1, 2), grad)
    else:
        w = _iterated(block, at, grad, rtol, atol, max_iterations, depth)
    found = [w, *block_gradient(block, at, -w)]
    return [t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)]


def _iterated(block, at, grad, rtol, atol, max_iterations, depth) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (grad, at.value)):
        raise RuntimeError(
            f"invertible_residual: more than {MOST_FEATURES} features cannot be differentiated twice, got "
            f"{grad[0].numel()}"
        )

    def of(w: Tensor, rows: Tensor | None) -> Tensor:
        picked = at if rows is None else at._replace(slopes=[s[rows] for s in at.slopes])
        return _block.transposed(block, picked, w)

    # a loss may be of any scale: relative alone
    return solve(of, grad, rtol=rtol + atol, atol=0.0, max_iterations=max_iterations, depth=depth).x


def block_gradient(block: Block, at: _block.Linearized, grad: Tensor) -> list[Tensor]:
    """Those of ⟨grad, g(x)⟩ by weights, biases and parameters."""
    curve = _block.CURVES[block.activation]
    outputs, arguments, _ = _block.pulled(block, at, grad)
    by_weight = [_block.outer(w, g, a) for w, g, a in zip(block.weights, arguments, at.inputs, strict=True)]
    by_bias = [_block.bias_gradient(b, g) for b, g in zip(block.biases, arguments, strict=True)]
    by_parameter = [
        (curve.value_by(z, p) * g).sum() for z, p, g in zip(at.points, block.parameters, outputs, strict=True)
    ]
    return [*by_weight, *by_bias, torch.stack(by_parameter)]
