"""One run of ``torch.fx`` through a module, which writes down steps instead of a graph.

fx calls the module's ``forward`` with a stand-in for its input and hands over each call of a layer and each function of
a stand-in; the rules of `_registry` turn these into steps. What is not written down would be lost in silence, so that
everything else that a ``forward`` may do is refused: branches on values, tensors from elsewhere, random draws, other
modes of autograd, hooks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from genkernels.networks._plain import defined_together, hooked, plain
from genkernels.networks._registry import FUNCTIONS, forward_of, layer_rule, why_not
from genkernels.networks._symbols import BatchSize, Intercept, Symbol
from genkernels.networks.activations import ACTIVATIONS
from genkernels.networks.steps import Activate, Input, Mirror, Source, Step


class Untraceable(ValueError):
    """A network that cannot be turned into steps; the message names the layer and says why.

    Attributes:
        couples_samples: whether the reason is that a layer mixes the samples of a batch, so that no algorithm that
            treats samples by themselves is right.
    """

    def __init__(self, message: str, couples_samples: bool = False):
        super().__init__(message)
        self.couples_samples = couples_samples

    def __reduce__(self):
        return type(self), (*self.args, self.couples_samples)


Untraceable.__module__ = "genkernels.networks"  # where it is found


class Tracer(fx.Tracer):
    """`steps(sample)` of one module. Rules call `shape`, `emit`, `alias`, `own` and `refuse`."""

    proxy_buffer_attributes = True  # calls `getattr` for them too

    def __init__(self, module: nn.Module):
        super().__init__(autowrap_modules=())  # functions of numbers, of which none can be given here
        self._module = module
        self._paths = {id(child): path for path, child in module.named_modules()}
        self._tensors = {(id(m), name): tensor for m in module.modules() for name, tensor in _tensors(m)}
        self._thread = threading.get_ident()
        self._batch = BatchSize(self)
        self._calls: list[nn.Module] = []
        self._function = ""
        self._steps: list[Step] = []
        self._slots: list[int] = []  # the step whose output a stand-in holds now: writing in place changes it
        self._family: list[int] = []  # stand-ins that may share memory have one number
        self._written: dict[int, str] = {}
        self._refusal: Untraceable | None = None

    def steps(self, sample: tuple[int, ...], labelled: bool = False) -> tuple[Step, ...]:
        """The steps from the input ``[N, *sample]``, beside labels ``[N]`` where it is `labelled`, to the output."""
        self._steps.append(Input(label="the input", path="", reads=(), shape=sample))
        self._input = self._symbol(0)
        self._labels = Symbol((self._batch,)) if labelled else None
        module = self._module if self._labels is None else lambda x: self._module(x, self._labels)
        # with gradients, as in them alone an autograd.Function, whose backward no rule knows, is told from what it does
        with Intercept(self), torch.enable_grad():
            self._modes = _modes()
            self.trace(lambda x: module(x))
        if self._refusal is not None:  # and the module went on by another way, which it does not take otherwise
            raise self._refusal
        return _needed(self._steps, self._read(self._output))

    # ------------------------------------------------------------------------------------------------ what rules use

    def refuse(self, reason: str, couples_samples: bool = False, cause: BaseException | None = None):
        self._refusal = self._refusal or Untraceable(f"trace: {self._label()} {reason}", couples_samples)
        raise self._refusal from cause

    def is_value(self, x) -> bool:
        return isinstance(x, Symbol) and x._source is None and x is not self._labels

    def is_own(self, x) -> bool:
        """Whether it is a parameter or a buffer, or what a layer gives for the labels."""
        return isinstance(x, Symbol) and x._source is not None

    def is_labels(self, x) -> bool:
        return x is not None and x is self._labels

    def is_of_labels(self, x) -> bool:
        return self.is_own(x) and x._source.of_labels

    def shape(self, x) -> tuple[int, ...]:
        """Of a sample of a value, without the batch; refuses what is no value of the network."""
        if self.is_of_labels(x):
            self.refuse("takes what the labels give, which may multiply a value or be added to one")
        if not self.is_value(x):
            self.refuse("is called with something that is no value of the network")
        return tuple(x._sizes[1:])

    def own_shape(self, x) -> tuple[int, ...]:
        """Of a parameter or a buffer."""
        return x._sizes

    def is_batch(self, n) -> bool:
        return n is self._batch

    def emit(self, kind: type[Step], inputs: Sequence, shape, sources=(), view=False, in_place=False, **fields):
        """Appends a step and gives its output; a `view` may share memory with its first input, `in_place` it is the
        first input, written over."""
        for x in inputs:
            self.shape(x)
        reads = tuple(self._read(x) for x in inputs)
        shape, path = tuple(shape), self._paths[id(self._calls[-1])]
        step = kind(label=self._label(), path=path, reads=reads, shape=shape, sources=tuple(sources), **fields)
        self._steps.append(step)
        if in_place:
            return self._write(inputs[0])
        return self._symbol(len(self._steps) - 1, inputs[0] if view else None)

    def alias(self, x, shares_memory: bool = True):
        """The same values as another tensor."""
        self.shape(x)
        return self._symbol(self._read(x), x if shares_memory else None)

    def own(self, layer: nn.Module, **roles: str) -> tuple[Source, ...]:
        """Where the tensors of a layer are, by role."""
        return tuple(Source(role, name, self._paths[id(layer)], layer) for role, name in roles.items())

    def of_labels(self, layer: nn.Module, shape: tuple[int, ...]) -> Symbol:
        """What a layer gives for the labels: a tensor with an entry of this shape a sample."""
        source = Source("", path=self._paths[id(layer)], owner=layer, of_labels=True)
        return Symbol((self._batch, *shape), source=source)

    # ------------------------------------------------------------------------------------------------ values, in memory

    def _symbol(self, step: int, shares_memory: Symbol | None = None) -> Symbol:
        slot = len(self._slots)
        self._slots.append(step)
        self._family.append(slot if shares_memory is None else self._family[shares_memory._slot])
        return Symbol((self._batch, *self._steps[step].shape), slot)

    def _read(self, x: Symbol) -> int:
        if x._slot in self._written:
            self.refuse(f"may read what {self._written[x._slot]} has changed in place")
        return self._slots[x._slot]

    def _write(self, x: Symbol) -> Symbol:
        """`x` now holds the last step's output. Other tensors in its memory may have changed or not."""
        if self._family[x._slot] == self._family[self._input._slot]:
            self.refuse("changes the network's input in place")
        for slot, family in enumerate(self._family):
            if family == self._family[x._slot] and slot != x._slot:
                self._written[slot] = self._label()
        self._slots[x._slot] = len(self._steps) - 1
        return x

    # ------------------------------------------------------------------------------------------------- what fx calls

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:  # fx replaces the call of all modules, those of other threads too
            return forward(*args, **kwargs)
        if id(m) not in self._paths:
            self.refuse(f"calls a {type(m).__name__} that is not registered in the network")
        self._calls.append(m)
        function, self._function = self._function, ""
        try:
            result = self._call(m, args, kwargs)
            if len(self._calls) == 1:
                self._take_output(result)
            return result
        except Untraceable:
            raise
        except Exception as error:
            self.refuse(f"cannot be traced: {type(error).__name__}: {error}", cause=error)
        finally:
            self._function = function
            self._calls.pop()

    def _call(self, m, args, kwargs):
        if hooked(m):
            self.refuse("has hooks or a forward of its own, which its weights do not tell")
        self._same_modes()
        rule, announced = layer_rule(m), _announced(m)
        if announced or (rule is not None and plain(m, rule.cls)):
            if rule is not None and forward_of(m) is not rule.forward:
                self.refuse("has another forward than its class came with")
            if method := _own_method(m):
                self.refuse(f"has a method of its own, {method!r}")
            if any(tensor is not self._tensors.get((id(c), name)) for c in m.modules() for name, tensor in _tensors(c)):
                self.refuse("is called with other tensors than its own")
            if len(args) + len(kwargs) != 1:
                self.refuse(f"has a rule for one input, got {len(args) + len(kwargs)} arguments")
            (x,) = (*args, *kwargs.values())
            return self._activate(m, *announced, x) if announced else rule.build(self, m, x)
        if (why := why_not(m)) is not None:
            self.refuse(*why)
        return m.forward(*args, **kwargs)  # which is what a call of m without hooks does, compiled or not

    def _activate(self, m, name, parameters, x):
        shape = self.shape(x)
        wanted = ACTIVATIONS[name].parameters if name in ACTIVATIONS else None
        if wanted is None or len(wanted) != len(parameters):
            self.refuse(f"says that it is {name!r} of {len(parameters)} parameters, which is none of ACTIVATIONS")
        if name == "clipswish":
            if not shape:
                self.refuse("needs an axis of features, got samples of none")
            shape = (2 * shape[0], *shape[1:])
            x = self.emit(Mirror, [x], shape)
        sources = self.own(m, **dict(zip(wanted, parameters, strict=True)))
        return self.emit(Activate, [x], shape, sources, name=name)

    def call_function(self, function, args, kwargs):
        name = function.__name__
        if name == "__get__":
            return self._attribute(args[0], function.__self__.__name__)
        if name in ("__repr__", "__format__"):
            return f"Symbol({list(args[0]._sizes[1:])})"
        if name in ("dim", "ndimension"):
            return len(args[0]._sizes)
        if name == "size":
            return _size(*args, **kwargs)
        self._function = name[2:-2] if name.startswith("__") else name
        self._same_modes()
        if any(self.is_labels(x) for x in (*args, *kwargs.values())):
            self.refuse("computes with the labels: only an embedding of them has a rule")
        if (why := _REASONS.get(name)) is not None:
            self.refuse(why)
        rule = FUNCTIONS.get(function)
        if rule is None:
            self.refuse("has no rule")
        try:
            rule.signature.bind(self, *args, **kwargs)
        except TypeError as error:
            self.refuse(f"has no rule with these arguments: {error}", cause=error)
        result = rule.build(self, *args, **kwargs)
        self._function = ""
        return result

    def _attribute(self, x: Symbol, name: str):
        if name == "shape":
            return x._sizes
        if name == "ndim":
            return len(x._sizes)
        return self.refuse(f"reads .{name} of {'a value' if x._source is None else repr(x._source.name)}")

    def create_proxy(self, kind, *_, **__):
        return self._input  # for the one argument of what is traced: nothing else is a proxy

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread or not isinstance(attr_val, Tensor):
            return attr_val
        if isinstance(attr_val, Symbol):  # which a functional_call within the network has put there
            return attr_val
        holders = [m for m in (*reversed(self._calls), *self._module.modules()) if _holds(m, attr, attr_val)]
        told = holders and (holders[0] in self._calls or len({id(m) for m in holders}) == 1)
        if not told or self._tensors.get((id(holders[0]), attr)) is not attr_val:
            self.refuse(f"reads a tensor {attr!r} that belongs to no module or to several")
        return Symbol(tuple(attr_val.shape), source=self.own(holders[0], **{"": attr})[0])

    def create_arg(self, a):
        return None  # fx's own graph stays empty

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _take_output(self, result) -> None:
        if not self.is_value(result):
            got = "what the labels give" if self.is_of_labels(result) or self.is_labels(result) else ""
            got = got or ("a parameter or buffer" if self.is_own(result) else f"a {type(result).__name__}")
            self.refuse(f"must give one tensor that depends on its input, got {got}")
        self._output = result

    def _same_modes(self) -> None:
        if _modes() != self._modes:
            self.refuse("runs under no_grad, inference mode or autocast of its own")

    def _label(self) -> str:
        layer = self._calls[-1] if self._calls else self._module
        path = self._paths.get(id(layer), "")
        label = f"layer {path!r} ({type(layer).__name__})" if path else f"the network ({type(layer).__name__})"
        return f"{self._function!r} in {label}" if self._function else label


#: Methods that get a reason of their own.
_REASONS = {"__bool__": "branches on the values that pass through it", "__len__": "computes with the batch's size"}


def _size(x: Symbol, dim: int | None = None):
    return x._sizes if dim is None else x._sizes[dim]


def _announced(m: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """The activation that a layer's class says it is, and the attributes with its parameters."""
    if not defined_together(type(m), "genkernels_activation", "forward"):
        return None
    name, *parameters = type(m).genkernels_activation
    return name, tuple(parameters)


def _own_method(m: nn.Module) -> str:
    """What was put over a method that its ``forward`` may call, as libraries do to pad a convolution in another way."""
    names = (name for name, value in m.__dict__.items() if callable(value) and hasattr(type(m), name))
    return next((name for name in names if name != "_compiled_call_impl"), "")


def _tensors(m: nn.Module):
    return (*m._parameters.items(), *m._buffers.items())


def _holds(m: nn.Module, name: str, tensor: Tensor) -> bool:
    return m._parameters.get(name) is tensor or m._buffers.get(name) is tensor


def _needed(steps: list[Step], output: int) -> tuple[Step, ...]:
    """The steps that the output depends on, which comes last, numbered anew."""
    needed = {0, output}
    for index in range(output, 0, -1):
        if index in needed:
            needed.update(steps[index].reads)
    number = {index: place for place, index in enumerate(sorted(needed))}
    return tuple(replace(steps[i], reads=tuple(number[r] for r in steps[i].reads)) for i in sorted(needed))


def autocast_modes() -> tuple:
    return tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))


def _modes() -> tuple:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_modes()
