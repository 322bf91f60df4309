"""What every operator shares: its registration with torch, its choice of backend and its record.

An operator's file declares an `Operator`, then calls `define` once for each torch operator that it needs (the forward
one, its backward, …). `define` gives the schema in Python, so that names never depend on what was built, and hooks up

- ``CompositeExplicitAutograd``: the reference, wherever no kernel exists;
- ``CPU``: the C++ library registers itself under the same name when it is loaded;
- ``CUDA``: a launcher that picks Triton or CUDA C++ (`genkernels_cuda::<name>`) by `Operator.prefers_cuda` or as
  forced;
- the fake (shape, strides, dtype, device) that ``torch.compile`` needs.

Gradients: `differentiate` registers a first-order formula that runs a kernel; `differentiate_reference` makes any
operator, above all a backward one, differentiable through the autograd of its reference, so that every higher order is
exact. Without it torch gives zeros at second order with no more than a warning.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genkernels import backends

LIBRARY = torch.library.Library("genkernels", "DEF")
CUDA_LIBRARY = torch.library.Library("genkernels_cuda", "DEF")

#: What each row of the composability table says about; each cell is "kernel", "reference" or "raises".
FEATURES = ("backward", "double backward", "forward mode", "vmap", "compile", "autocast", "deterministic")

#: The cells of an operator with first-order kernels: what has none of its own goes through the reference.
DIFFERENTIABLE = {
    "backward": "kernel",
    "double backward": "reference",
    "forward mode": "reference",
    "vmap": "reference",
    "compile": "kernel",
    "autocast": "kernel",
    "deterministic": "kernel",
}


@dataclass
class Operator:
    """One hot path, by the one name that it carries on every floor."""

    name: str
    #: The public functions of `genkernels.ops`.
    functions: tuple[Callable, ...] = ()
    #: The public types that they take, for the documentation.
    types: tuple[type, ...] = ()
    #: Backends that have a kernel, mapped to "" or to the reason why there is none ("would win nothing: …").
    backends: dict[str, str] = field(default_factory=dict)
    composability: dict[str, str] = field(default_factory=dict)
    #: torch operators, by name: "differentiable", or the sentence that says why a gradient is not wanted.
    torch_ops: dict[str, str] = field(default_factory=dict)
    #: Picks CUDA C++ over Triton where both run, from the tensor arguments; the measurement is committed.
    prefers_cuda: Callable[..., bool] = lambda *tensors: False


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    OPERATORS[operator.name] = operator
    return operator


def transforms_active() -> bool:
    """Whether a functorch transform (``vmap``, ``grad``, ``jvp``) or forward-mode differentiation is running.

    Registered operators fail under the former or, worse, silently give zero tangents. The only place that rests on
    these private names of torch; a test fails loudly when they move.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active()


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; asked of the meta device, which has none, torch raises."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def backend_for(operator: Operator, tensor: Tensor) -> str:
    """The backend that runs `operator` on `tensor`'s device: the forced one, else the fastest there is.

    Raises:
        BackendUnavailable: a backend is forced that cannot run here or on this device; says which condition failed.
    """
    forced = backends.current_backend()
    if forced == "reference":
        return "reference"
    device = tensor.device.type
    if forced == "auto":
        if device == "cpu" and _usable(operator, "cpu"):
            return "cpu"
        if device == "cuda":
            return _auto_cuda(operator, tensor)
        return "reference"
    if reason := backends.why_missing(forced) or operator.backends.get(forced, "it has no such kernel"):
        raise backends.BackendUnavailable(f"{operator.name}: backend {forced!r} cannot run: {reason}")
    wanted = "cpu" if forced == "cpu" else "cuda"
    if device != wanted:
        raise backends.BackendUnavailable(
            f"{operator.name}: backend {forced!r} needs {wanted.upper()} tensors, got {tensor.device}"
        )
    return forced


def _has_kernel(operator: Operator, backend: str) -> bool:
    """A backend that is not named, or named with a reason for its absence, has none."""
    return operator.backends.get(backend) == ""


def _usable(operator: Operator, backend: str) -> bool:
    return _has_kernel(operator, backend) and not backends.why_missing(backend)


def _auto_cuda(operator: Operator, *tensors: Tensor) -> str:
    have = [name for name in ("triton", "cuda") if _usable(operator, name)]
    if len(have) == 2:
        return "cuda" if operator.prefers_cuda(*tensors) else "triton"
    return have[0] if have else "reference"


def runs_reference(operator: Operator, tensor: Tensor) -> bool:
    """Whether a public function should take the plain PyTorch path, where autograd and every transform are torch's
    own."""
    return backend_for(operator, tensor) == "reference" or transforms_active()


def define(
    operator: Operator, schema: str, *, reference: Callable, fake: Callable, not_differentiable: str = ""
) -> None:
    """Defines one torch operator of `operator`; `schema` is as for ``torch.library.Library.define``."""
    name = schema.split("(", 1)[0]
    operator.torch_ops[name] = not_differentiable or "differentiable"
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genkernels::{name}", fake, lib=LIBRARY)
    if _has_kernel(operator, "cuda"):
        CUDA_LIBRARY.define(schema)
    if _has_kernel(operator, "cuda") or _has_kernel(operator, "triton"):
        LIBRARY.impl(name, functools.partial(_launch_on_gpu, operator, name, reference), "CUDA")


def _launch_on_gpu(operator: Operator, name: str, reference: Callable, *arguments):
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    chosen = backends.current_backend()
    if chosen not in ("triton", "cuda"):
        # a forced "reference" or "cpu" was turned down, or obeyed, above; a backward pass may still run after its block
        # ended
        chosen = _auto_cuda(operator, *tensors)
    if chosen == "cuda":
        return getattr(torch.ops.genkernels_cuda, name)(*arguments)
    if chosen == "triton":
        return getattr(importlib.import_module(f"genkernels.triton.{operator.name}"), name)(*arguments)
    return reference(*arguments)


def differentiate(name: str, setup_context: Callable, backward: Callable) -> None:
    """Registers the first-order gradient of `genkernels::name`.

    ``torch.library.register_autograd`` reads the schema anew in every call, which costs as much as a small layer (some
    30 µs). It is left to operators with lists of tensors and with defaults, which it fills in; the others get the same
    `autograd.Function` without that.
    """
    run = getattr(torch.ops.genkernels, name).default
    if any(a.has_default_value() or "List" in str(a.type) for a in run._schema.arguments):
        torch.library.register_autograd(f"genkernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        return

    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            output = run(*arguments)
        setup_context(ctx, arguments, output)
        return output

    # `backward` runs with autograd in reach: reading saved tensors may run a checkpoint's forward pass again
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{name}_gradient", (torch.autograd.Function,), members)

    def call(*arguments):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*arguments)

    LIBRARY.impl(name, call, "Autograd")


def differentiate_reference(name: str, reference: Callable) -> None:
    """Makes `genkernels::name` differentiable through the autograd of its reference, to any order."""

    def setup_context(ctx, inputs, output):
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx, *grad_outputs):
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        wanted = [i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.requires_grad]
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            if not higher:
                for i in wanted:
                    inputs[i] = inputs[i].detach().requires_grad_()
            outputs = reference(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
            grads: list[Tensor | None] = [None] * len(inputs)
            if pairs and wanted:
                found = torch.autograd.grad(
                    [o for o, _ in pairs],
                    [inputs[i] for i in wanted],
                    [g for _, g in pairs],
                    create_graph=higher,
                    allow_unused=True,
                )
                for i, grad in zip(wanted, found, strict=True):
                    grads[i] = grad
        return tuple(grads)

    differentiate(name, setup_context, backward)


def refuse_gradient(name: str, sentence: str) -> None:
    """Makes differentiating through `genkernels::name` raise `sentence` instead of giving zeros."""

    def setup_context(ctx, inputs, output):
        pass

    def backward(ctx, *grad_outputs):
        raise RuntimeError(sentence)

    differentiate(name, setup_context, backward)


def refuse_gradient_in_place(name: str, sentence: str) -> None:
    """The same for an operator that writes into its arguments, which `differentiate` does not take: `sentence` is
    raised at the call."""
    run = getattr(torch.ops.genkernels, name)

    def call(*arguments):
        tensors = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(sentence)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*arguments)

    LIBRARY.impl(name, call, "Autograd")


def temperature_of(operator: str, value: float) -> float:
    """A temperature as every backend can hold it: below fp32's normal numbers it counts as 0, above 2^127 as that."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{operator}: temperature must be a finite number, 0 or more, got {value!r}")
    return 0.0 if value < 2.0**-126 else float(min(value, 2.0**127))


def whole(who: str, argument: str, value: int, least: int) -> int:
    """`value`, or the sentence that it must be an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{who}: {argument} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{who}: {argument} must be at least {least}, got {value}")
    return value


def choose(operator: str, argument: str, value: str, options: Sequence[str]) -> int:
    """The integer code of a string option, or the sentence that lists what it may be."""
    try:
        return options.index(value)
    except ValueError:
        raise ValueError(f"{operator}: {argument} must be one of {', '.join(options)}, got {value!r}") from None
