"""Whether a tensor still holds what was last read from it, told without reading it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook


class Seen:
    """The tensor that a module last looked at, and the version it had then.

    A change in place gives a tensor another version (``copy_``, ``load_state_dict``, an average), and what replaces it
    is another tensor: a module that keeps in Python what follows from a buffer looks again wherever `holds` is False,
    and reads its device at no other time. The broadcast of buffers before each pass of `DistributedDataParallel` leaves
    versions as they are: what rank 0 alone has changed between two passes, the other ranks do not notice.

    Copies of a module and modules read from files have seen nothing. A write through ``.data`` is not noticed. The step
    of a fused optimiser counts as one here, which torch (2.13) leaves out.
    """

    genkernels_remembers = True  #: see `genkernels.networks._state`

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version = -1

    def holds(self, tensor: Tensor) -> bool:
        return tensor is self._tensor and tensor._version == self._version

    def note(self, tensor: Tensor) -> None:
        if wrapped(tensor) or tensor.is_inference():  # the one is gone after the pass, the other counts no versions
            self._tensor = None
        else:
            self._tensor, self._version = tensor, tensor._version

    def __deepcopy__(self, memo: dict) -> Seen:
        return Seen()

    def __reduce__(self):
        return Seen, ()


def _count_fused_steps(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_count_fused_steps)


def enclosing_ddp() -> DistributedDataParallel | None:
    """The wrapper whose forward pass is running, where one is: all ranks of its group are in that pass."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def wrapped(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` has it in hand."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def fake(tensor: Tensor) -> bool:
    """Whether a fake tensor, or a pass that makes them of what it is given, so that there is nothing to be read.

    ``detect_fake_mode`` takes 5 µs, which a layer spends in every call: it is asked where it can find one alone.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if plain and not torch._C._len_torch_dispatch_stack() and torch._guards.TracingContext.try_get() is None:
        return False
    return torch._guards.detect_fake_mode((tensor,)) is not None


def unwrapped(tensor: Tensor) -> Tensor | None:
    """What transforms of ``torch.func`` have in hand, with their batches as leading dimensions; None where there is
    nothing to be read: a fake tensor, or one on "meta"."""
    while wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            at = torch._C._functorch.maybe_get_bdim(tensor)
            tensor = torch._C._functorch.get_unwrapped(tensor).movedim(at, 0)
        else:
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return None if tensor.is_meta or fake(tensor) else tensor
