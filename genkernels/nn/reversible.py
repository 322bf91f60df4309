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
from genkernels.networks._plain import defined_together, hooked
from genkernels.nn._context import check_context
from genkernels.nn._log_det import check_log_det, zero_log_det
from genkernels.nn._seen import unwrapped

_NAME = "FlowSequential(reversible=True)"


def run_reversible(flow: nn.Module, steps: Callable[[], list], x: Tensor, context: Tensor | None):
    """``(z, ldj)`` of the flow, with a backward that stores nothing in between.

    Args:
        flow: the module, for its parameters. steps: gives the layers as they are to run now.
    """
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(f"{_NAME}: context must be a tensor or None, got {type(context).__name__}")
    check_context(x, context)
    for module in flow.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise RuntimeError(_again(f"got an active {type(module).__name__}"))
    parameters = [p for p in flow.parameters() if p.requires_grad]
    return _Reversible.apply(steps, dict(flow.named_buffers()), context, x, *parameters)


def _again(got: str) -> str:
    return f"{_NAME}: layers must give the same result when run again, {got}; use reversible=False"


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make_steps, buffers, context, x, *parameters):
        ctx.set_materialize_grads(False)
        device = x.device.type
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.backend = current_backend()
        ctx.steps = make_steps()
        versions, drawn = _versions(buffers.values()), _random_state(x)
        z, log_dets = _pass(ctx, x, context)
        # another thread may have drawn meanwhile
        if drawn is not None and drawn != _random_state(x) and not torch.equal(_pass(ctx, x, context)[0], z):
            raise RuntimeError(_again("but one of them drew random numbers"))
        for (name, buffer), version in zip(buffers.items(), versions, strict=True):
            if _version(buffer) != version:
                raise RuntimeError(_again(f"but this pass changed the buffer {name}"))
        ldj = torch.stack(log_dets).sum(0) if log_dets else zero_log_det(x)
        ctx.save_for_backward(z, context)
        ctx.parameters, ctx.buffers = parameters, list(buffers.values())
        ctx.versions = _versions([*parameters, *ctx.buffers])
        return z, ldj

    @staticmethod
    def backward(ctx, grad_z, grad_ldj):
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{_NAME}: its gradients cannot be differentiated again (create_graph=True); use reversible=False"
            )
        if _versions([*ctx.parameters, *ctx.buffers]) != ctx.versions:
            raise RuntimeError(f"{_NAME}: a parameter or buffer was changed in place between forward and backward")
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
                rule = step.reverse_backward if _has_rule(step) else None
                z, grad_z, of_context, of_parameters = (
                    rule(z, context, grad_z, grad_ldj, wanted)
                    if rule
                    else invert_and_recompute(step, z, context, grad_z, grad_ldj, wanted)
                )
                grad_context = _plus(grad_context, of_context)
                for parameter, grad in zip(wanted, of_parameters, strict=True):
                    at = place[id(parameter)]
                    grads[at] = _plus(grads[at], grad)
        return None, None, grad_context, grad_z if ctx.needs_input_grad[3] else None, *grads


def _pass(ctx, x: Tensor, context) -> tuple[Tensor, list[Tensor]]:
    z, log_dets = x, []
    with _autocast(*ctx.autocast):
        for step in ctx.steps:
            z, log_det = step(z, context)
            check_log_det(step, log_det, z)
            log_dets.append(log_det)
    return z, log_dets


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
        if isinstance(step, nn.Module) and hooked(step):
            _check_rebuilt(step, outputs[0], z)
        pairs = [(o, g) for o, g in zip(outputs, (grad_z, grad_ldj), strict=True) if o.requires_grad]
        leaf_grads = torch.autograd.grad(
            [o for o, _ in pairs], leaves + wanted, [g for _, g in pairs], allow_unused=True
        )
    grad_x = torch.zeros_like(x) if leaf_grads[0] is None else leaf_grads[0]
    return x.detach(), grad_x, leaf_grads[1] if len(leaves) == 2 else None, list(leaf_grads[len(leaves) :])


def _has_rule(step) -> bool:
    """Whether a layer's own ``reverse_backward`` tells the pass that it made: no subclass has overridden ``forward``
    alone, and nothing hangs on the layer."""
    if not hasattr(step, "reverse_backward"):
        return False
    whole = defined_together(type(step), "reverse_backward", "forward", "inverse")
    return whole and not (isinstance(step, nn.Module) and hooked(step))


def _check_rebuilt(step, again: Tensor, z: Tensor) -> None:
    """That a layer with hooks or methods of its own came out as before: what changes the result may not be undone."""
    tolerance = 1e-3 if z.dtype in (torch.float32, torch.float64) else 5e-2
    if z.numel() and (again - z).abs().amax() > tolerance * (1 + z.abs().amax()):
        raise RuntimeError(_again(f"but a hook of {type(step).__name__} changes what its inverse undoes"))


def _versions(tensors) -> list[int]:
    return [_version(t) for t in tensors]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _random_state(x: Tensor) -> tuple | None:
    """What the generators of the CPU and of x's device will draw next; None where it cannot be asked for."""
    if unwrapped(x) is None:  # a pass without data
        return None
    state = torch.get_rng_state().numpy().tobytes()
    if x.device.type != "cuda":
        return (state,)
    if torch.cuda.is_current_stream_capturing():
        return None
    generator = torch.cuda.default_generators[x.device.index]
    return state, generator.initial_seed(), generator.get_offset()


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
