"""Whether calling a module does what its class says and nothing else, so that a faster way may go past the call.

A faster way reads a layer's weights and computes what its ``forward`` would: folded pairs, dense products, the blocked
inverse, the cached sampler, the reversible rule of a coupling. It would miss what users hang on a layer (hooks,
pruning, weight norm by hooks), put in its place (a LoRA wrapper, a quantised layer, a subclass) or write over it.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as modules


def plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `cls`, parametrised (``torch.nn.utils.parametrizations``) or not, without hooks of
    its own or for all modules and without a ``forward`` or an ``inverse`` of its own."""
    kind = type(module)
    if kind is not cls and not ("parametrizations" in module._modules and kind.__bases__ == (cls,)):
        return False
    return not hooked(module)


def hooked(*given: nn.Module) -> bool:
    """Whether calling or inverting one of these runs anything but its class's ``forward`` and ``inverse``."""
    for module in given:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
            or "inverse" in module.__dict__
        ):
            return True
    return bool(modules._has_any_global_hook())


def defined_together(cls: type, name: str, *others: str) -> bool:
    """Whether a method is at least as derived as others that say the same in another way: a subclass that overrides
    ``forward`` alone leaves an inherited ``reverse_backward`` or ``stages`` behind."""
    order = [kind for kind in cls.__mro__ if any(each in kind.__dict__ for each in (name, *others))]
    return bool(order) and name in order[0].__dict__


def renew_weights(module: nn.Module) -> None:
    """What ``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` compute in a hook before ``forward``, for a
    method that is not ``forward``: the weights as the next pass would see them."""
    for hook in module._forward_pre_hooks.values():
        if hasattr(hook, "apply_mask"):
            setattr(module, hook._tensor_name, hook.apply_mask(module))
        elif hasattr(hook, "do_power_iteration") or hasattr(hook, "n_power_iterations"):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
        elif hasattr(hook, "compute_weight"):
            setattr(module, hook.name, hook.compute_weight(module))
