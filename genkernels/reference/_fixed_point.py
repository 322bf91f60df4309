r"""x from y = x + g(x), for any g that contracts: an accelerated fixed-point iteration that stops sample by sample.

With r(x) = y − x − g(x) the plain iteration is x ← x + r(x), and shrinks r by the Lipschitz constant of g a step.
Anderson's takes the last x and r of up to `depth` + 1 steps, of each sample its own, and steps from the point of their
affine hull at which r, were it affine, would be smallest:

.. math:: \gamma = \arg\min \lVert r_k - \Delta R\,\gamma\rVert,\qquad
    x_{k+1} = x_k + r_k - (\Delta X + \Delta R)\,\gamma

It is not known to shrink r each time. A sample whose :math:`\lVert r\rVert` has grown by it goes back to where it came
from and takes a plain step, with an empty history; plain steps are never taken back. So it can be slower than the plain
iteration, but not fail where that converges.

Source: Behrmann et al., "Invertible residual networks", 2019 (plain iteration); Walker and Ni, "Anderson acceleration
for fixed-point iterations", 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels._options import INTERVAL


class Solution(NamedTuple):
    """What an inverse returns, by sample.

    Args:
        x: like y. residual: ``[N]``, the largest \\|y − x − g(x)\\|, at this x; NaN where it is. iterations: ``[N]``,
            evaluations of g. converged: ``[N]`` bool.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor


@torch.no_grad()
def solve(
    g: Callable[[Tensor, Tensor | None], Tensor],
    y: Tensor,
    start: Tensor | None = None,
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    max_iterations: int = 200,
    depth: int = 5,
    interval: int = INTERVAL,
) -> Solution:
    """x for which every element of y − x − g(x) is at most ``atol + rtol * y.abs().amax()``, of each sample its own.

    Args:
        g: called as ``g(x, rows)`` with the samples that are left and their places in the batch ``[n]``, None while all
            are; samples may not mix.
        y: ``[N, ...]``. start: x to begin from; y by default.
        rtol, atol: see above. max_iterations: evaluations of g a sample.
        depth: steps that are looked back on; 0 for the plain iteration.
        interval: iterations between two looks for samples that have converged.

    A sample whose residual is not finite, and not for a step too bold, ends at once.
    """
    count, shape = y.shape[0], y.shape
    flat = y.reshape(count, math.prod(shape[1:]))
    solution = Solution(
        (flat if start is None else start.reshape(flat.shape)).clone(),
        flat.new_full((count,), float("inf")),
        torch.zeros(count, dtype=torch.int64, device=y.device),
        torch.zeros(count, dtype=torch.bool, device=y.device),
    )
    if flat.numel() and mapped_over():
        return _mapped(g, y, solution.x.view(shape), rtol, atol, max_iterations)
    if flat.numel():
        _iterate(g, flat, shape, solution, rtol, atol, max_iterations, depth, max(1, interval))
    return solution._replace(x=solution.x.view(shape))


def mapped_over() -> bool:
    """Whether ``torch.func.vmap`` is running, under which nothing can be decided by a value."""
    running = torch._C._functorch.get_interpreter_stack() or ()
    return any(one.key() == torch._C._functorch.TransformType.Vmap for one in running)


def _mapped(g, y, x, rtol, atol, max_iterations) -> Solution:
    """All of the plain iterations, for all samples."""
    for _ in range(max_iterations):
        x = y - g(x, None)
    residual = (y - x - g(x, None)).flatten(1).abs().amax(1)
    limit = atol + rtol * y.flatten(1).abs().amax(1)
    return Solution(x, residual, torch.full_like(residual, max_iterations, dtype=torch.int64), residual <= limit)


def _iterate(g, y, shape, solution, rtol, atol, max_iterations, depth, interval) -> None:
    rows: Tensor | None = None
    x = solution.x.clone()
    limit = atol + rtol * y.abs().amax(1)
    best_x, best = x.clone(), torch.full_like(limit, float("inf"))
    taken = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    done = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    plain = torch.ones_like(done)  #: the step that led here was no bold one
    history = _History(y, depth)
    for step in range(1, max_iterations + 1):
        r = y - x - g(x.view(-1, *shape[1:]), rows).reshape(y.shape)
        size = r.abs().amax(1)
        taken += ~done
        better = ~done & (size < best)
        best = torch.where(better, size, best)
        best_x = torch.where(better[:, None], x, best_x)
        done = done | (size <= limit) | (~size.isfinite() & plain)
        if step == max_iterations or step % interval == 0:
            ended = torch.ones_like(done) if step == max_iterations else done
            where = ended.nonzero().squeeze(1)
            if len(where):
                into = where if rows is None else rows[where]
                solution.x[into], solution.iterations[into] = best_x[where], taken[where]
                solution.residual[into] = torch.where(best[where] < float("inf"), best[where], float("nan"))
                solution.converged[into] = best[where] <= limit[where]
                left = (~ended).nonzero().squeeze(1)
                if not len(left):
                    return
                rows = left if rows is None else rows[left]
                x, r, y, limit, best, best_x, taken, done, plain = (
                    t[left] for t in (x, r, y, limit, best, best_x, taken, done, plain)
                )
                history.keep(left)
        x, plain = history.step(x, r, plain)


class _History:
    """The last steps of each sample, newest last, and Anderson's next point from them."""

    def __init__(self, y: Tensor, depth: int):
        self.depth = min(depth, y.shape[1])
        self.dx: list[Tensor] = []  #: differences of x and of r, ``[n, D]`` each; zero where a sample began anew
        self.dr: list[Tensor] = []
        self.x = self.r = y.new_empty(0)  #: the last point that was not taken back
        self.norm = y.new_empty(0)

    def keep(self, left: Tensor) -> None:
        self.dx, self.dr = [t[left] for t in self.dx], [t[left] for t in self.dr]
        if self.x.numel():
            self.x, self.r, self.norm = self.x[left], self.r[left], self.norm[left]

    def step(self, x: Tensor, r: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
        """The next point of each sample, and whether it is a plain step from an accepted one."""
        norm = torch.linalg.vector_norm(r, dim=1)
        if not self.x.numel():
            self.x, self.r, self.norm = x, r, norm
            return x + r, torch.ones_like(plain)
        accepted = plain | (norm <= self.norm)
        if not self.depth:
            self.x, self.r, self.norm = x, r, norm
            return x + r, accepted
        each = accepted[:, None]
        self.dx = [torch.where(each, t, 0) for t in (*self.dx, x - self.x)][-self.depth :]
        self.dr = [torch.where(each, t, 0) for t in (*self.dr, r - self.r)][-self.depth :]
        self.x, self.r = torch.where(each, x, self.x), torch.where(each, r, self.r)
        self.norm = torch.where(accepted, norm, self.norm)
        dr = torch.stack(self.dr, 2)  # [n, D, m]
        gamma = _least_squares(dr, self.r).to(dr.dtype)
        bold = (torch.stack(self.dx, 2) + dr) @ gamma.unsqueeze(2)
        return self.x + self.r - bold.squeeze(2), ~accepted


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """γ ``[n, m]`` that makes ‖b − Aγ‖ small, in fp64; columns of zeros get 0."""
    a, b = a.double(), b.double()
    scale = a.square().sum(1).sqrt()
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1)
    a = a / scale.unsqueeze(1)
    gram = a.transpose(1, 2) @ a
    gram = gram + 1e-10 * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    right = (a.transpose(1, 2) @ b.unsqueeze(2)).squeeze(2)
    gamma, info = torch.linalg.solve_ex(gram, right)
    usable = (info == 0)[:, None] & gamma.isfinite().all(1, keepdim=True)
    return torch.where(usable, gamma / scale, 0)
