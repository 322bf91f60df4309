"""The backward pass of a flow from its last output alone.

forward runs the layers without a graph and keeps (z, context). backward goes from the last layer to the first: it
rebuilds the layer's input from its output, asks for the layer's gradients there, and forgets both. What is alive at any
time is one layer's activations, whatever the depth (Gomez et al. 2017).

A layer may bring its own ``reverse_backward(z, context, grad_z, grad_ldj, wanted) -> (x, grad_x, grad_context,
grads)``; `invert_and_recompute` serves the others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from genkernels.backends import current_backend, use_backend
from genkernels.nn._log_det import zero_log_det

_NAME = "FlowSequential(reversible=True)"


def run_reversible(flow: nn.Module, steps: Callable[[], list], x: Tensor, context: Tensor | None):
    """``(z, ldj)`` of the flow, with a backward that stores nothing in between.

    Args:
        flow: the module, for its parameters. steps: gives the layers as they are to run now.
    """
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(f"{_NAME}: context must be a tensor or None, got {type(context).__name__}")
    for module in flow.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise RuntimeError(
                f"{_NAME}: layers must give the same result when run again, got an active {type(module).__name__}; "
                "use reversible=False"
            )
    parameters = [p for p in flow.parameters() if p.requires_grad]
    return _Reversible.apply(steps, context, x, *parameters)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make_steps, context, x, *parameters):
        ctx.set_materialize_grads(False)
        device = x.device.type
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.backend = current_backend()
        # kept, not asked for again in backward: an ActNorm that sets itself up in this pass would be folded by then
        ctx.steps = make_steps()
        log_dets = []
        z = x
        with _autocast(*ctx.autocast):
            for step in ctx.steps:
                z, log_det = step(z, context)
                log_dets.append(log_det)
        ldj = torch.stack(log_dets).sum(0) if log_dets else zero_log_det(x)
        ctx.save_for_backward(z, context)
        ctx.parameters = parameters
        ctx.versions = [p._version for p in parameters]
        return z, ldj

    @staticmethod
    def backward(ctx, grad_z, grad_ldj):
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{_NAME}: its gradients cannot be differentiated again (create_graph=True); use reversible=False"
            )
        if [p._version for p in ctx.parameters] != ctx.versions:
            raise RuntimeError(f"{_NAME}: a parameter was changed in place between forward and backward")
        z, context = ctx.saved_tensors
        grad_z = torch.zeros_like(z) if grad_z is None else grad_z
        if grad_ldj is None:
            grad_ldj = zero_log_det(z)
        place = {id(p): i for i, p in enumerate(ctx.parameters)}
        grads: list[Tensor | None] = [None] * len(place)
        grad_context = None
        with use_backend(ctx.backend), _autocast(*ctx.autocast):
            for step in reversed(ctx.steps):
                wanted = [p for p in step.parameters() if id(p) in place]
                rule = getattr(step, "reverse_backward", None)
                z, grad_z, of_context, of_parameters = (
                    rule(z, context, grad_z, grad_ldj, wanted)
                    if rule
                    else invert_and_recompute(step, z, context, grad_z, grad_ldj, wanted)
                )
                grad_context = _plus(grad_context, of_context)
                for parameter, grad in zip(wanted, of_parameters, strict=True):
                    at = place[id(parameter)]
                    grads[at] = _plus(grads[at], grad)
        return None, grad_context, grad_z if ctx.needs_input_grad[2] else None, *grads


@torch.no_grad()
def invert_and_recompute(step, z: Tensor, context, grad_z: Tensor, grad_ldj: Tensor, wanted: list[Tensor]):
    """``(x, grad_x, grad_context, grads)`` of any layer: its input by the inverse, then one pass with a graph."""
    x, _ = step.inverse(z, context)
    x = x.detach()
    with torch.enable_grad():
        leaves = [x.requires_grad_()]
        if context is not None:
            context = context.detach().requires_grad_(context.is_floating_point())
            leaves += [context] if context.requires_grad else []
        outputs = step(x, context)
        pairs = [(o, g) for o, g in zip(outputs, (grad_z, grad_ldj), strict=True) if o.requires_grad]
        leaf_grads = torch.autograd.grad(
            [o for o, _ in pairs], leaves + wanted, [g for _, g in pairs], allow_unused=True
        )
    grad_x = torch.zeros_like(x) if leaf_grads[0] is None else leaf_grads[0]
    return x.detach(), grad_x, leaf_grads[1] if len(leaves) == 2 else None, list(leaf_grads[len(leaves) :])


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _autocast(device: str, enabled: bool, dtype: torch.dtype):
    """The autocast state of forward, without its cache, so that no weight's cast is shared between passes with and
    without a graph."""
    if not enabled and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
