"""Stand-ins for the tensors that a module's ``forward`` computes with while it is traced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from genkernels.networks.steps import Source

if TYPE_CHECKING:
    from genkernels.networks._tracer import Tracer

_NOTHING = torch.empty(0, device="meta")


class Symbol(Tensor):
    """A stand-in: for what a step gives (`slot`), or for one of the module's own tensors (`source`).

    It is a tensor, so that a ``forward`` that looks for one finds it, and holds nothing. While a module is traced each
    function of it goes to the tracer (`Intercept`).
    """

    def __new__(cls, sizes: tuple, slot: int | None = None, source: Source | None = None):
        symbol = torch.Tensor._make_subclass(cls, _NOTHING)
        symbol._sizes, symbol._slot, symbol._source = sizes, slot, source
        symbol._is_param = source is not None  # what makes it an nn.Parameter where one is looked for
        return symbol

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ == "__get__":
            return super().__torch_function__(function, types, args, kwargs)
        raise RuntimeError(f"trace: {function.__name__} of a stand-in, which stands for no values")


class BatchSize(torch.SymInt):
    """The first entry of a stand-in's shape: it can be handed on to a reshape and to nothing else.

    It is a SymInt because methods of tensors take nothing else but numbers for a size.
    """

    def __init__(self, tracer: Tracer):
        self._tracer = tracer

    def _refuse(self, *_):
        self._tracer.refuse("computes with the batch's size")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = _refuse
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __int__ = __index__ = __float__ = _refuse
    __round__ = __floor__ = __ceil__ = __trunc__ = __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _refuse
    __sym_max__ = __sym_min__ = __sym_float__ = __sym_not__ = __sym_ite__ = as_integer_ratio = _refuse
    __hash__ = object.__hash__
    __repr__ = object.__repr__


class Intercept(TorchFunctionMode):
    """Hands each function of a stand-in to the tracer, and refuses what is computed without one: noise, masks,
    constants."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if Symbol in types:
            return self._tracer.call_function(function, args, kwargs or {})
        if function.__name__ in ("__get__", "_set_grad_enabled"):  # the mode is compared at the next step
            return function(*args, **(kwargs or {}))
        return self._tracer.refuse(f"computes {function.__name__!r} of tensors that are no values of the network")
