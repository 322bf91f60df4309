"""What every operator shares: its registration with torch, its gradients, its choice of backend and its record.

An operator's file makes one `Operator`, which enters itself into `OPERATORS`, then calls `define` once for each torch
operator that it needs (the forward one, its backward, …). `define` asks for all of them at once, so that none can be
forgotten: the schema, in Python, so that names never depend on what was built; the reference; the fake; the gradient.
It hooks up

- ``CompositeExplicitAutograd``: the reference, wherever no kernel exists;
- ``CPU``: the C++ library registers itself under the same name when it is loaded;
- ``CUDA``: a launcher that picks Triton or CUDA C++ (`genkernels_cuda::<name>`);
- ``Autograd``: a `Formula`, `THROUGH_REFERENCE` or `Refused` (`genkernels.ops._gradients`);
- the fake (shape, strides, dtype, device) that ``torch.compile`` needs.

Which backend runs is asked in two places, by public functions (`TorchOp.runs_reference`) and by the launcher on a GPU,
and answered in one, `TorchOp.backend_for`, from the same thing: all arguments of the torch operator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from genkernels import backends
from genkernels.ops._gradients import Gradient, transforms_active, with_gradient

LIBRARY = torch.library.Library("genkernels", "DEF")
CUDA_LIBRARY = torch.library.Library("genkernels_cuda", "DEF")

#: Backends with kernels, by the device of the tensors; the first that can run is taken unless `prefers` says otherwise.
KERNELS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

#: What each row of the composability table says about.
FEATURES = (
    *("backward", "double backward", "forward mode", "vmap", "compile", "double backward inside compile"),
    *("autocast", "deterministic", "CUDA graph capture", "DDP hooks"),
)

#: What a cell may say. `EAGER`: through the reference with ``backend="eager"``; with others torch itself raises.
#: `NOT_TRIED`: it takes a GPU, and none has been at hand.
KERNEL, REFERENCE, RAISES, EAGER, NOT_TRIED = "kernel", "reference", "raises", "reference (eager)", "not tried"

#: The cells of an operator with first-order kernels: what has none of its own goes through the reference.
DIFFERENTIABLE = {
    "backward": KERNEL,
    "double backward": REFERENCE,
    "forward mode": REFERENCE,
    "vmap": REFERENCE,
    "compile": KERNEL,
    "double backward inside compile": EAGER,
    "autocast": KERNEL,
    "deterministic": KERNEL,
    "CUDA graph capture": NOT_TRIED,
    "DDP hooks": KERNEL,
}


@dataclass(eq=False)
class Operator:
    """One hot path, by the one name that it carries on every floor."""

    name: str
    #: The public functions of `genkernels.ops`.
    functions: tuple[Callable, ...] = ()
    #: For each backend "" where it has a kernel, else the reason why there is none ("would win nothing: …").
    kernels: dict[str, str] = field(kw_only=True)
    #: The public types that the functions take, for the documentation.
    types: tuple[type, ...] = field(default=(), kw_only=True)
    composability: dict[str, str] = field(default_factory=lambda: dict(DIFFERENTIABLE), kw_only=True)
    #: The backend to take where it can run, "reference" among them, or what names one from the torch operator's
    #: arguments; "" for the first of `KERNELS` that can run. The measurement behind it is committed.
    prefers: str | Callable[..., str] = field(default="", kw_only=True)
    #: Filled by `define`, by name.
    torch_ops: dict[str, TorchOp] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        _check_backends(self.name, self.kernels)
        if set(self.kernels) != set(backends.NAMES[2:]):
            raise ValueError(
                f"{self.name}: kernels must say for each of {', '.join(backends.NAMES[2:])} that there is one, or why "
                f"not, got {', '.join(self.kernels) or 'none'}"
            )
        if self.name in OPERATORS:
            raise ValueError(f"{self.name}: there is an operator of this name already")
        OPERATORS[self.name] = self

    def define(
        self,
        schema: str,
        reference: Callable,
        fake: Callable,
        *,
        gradient: Gradient,
        kernels: dict[str, str] | None = None,
        prefers: str | Callable[..., str] = "",
    ) -> TorchOp:
        """Defines one torch operator; `schema` is as for ``torch.library.Library.define``, without default values.

        `kernels` and `prefers` replace the operator's where this one differs. A forced backend that the operator has
        and this one lacks leaves this one to its reference.
        """
        _check_backends(self.name, kernels or {})
        name = schema.split("(", 1)[0]
        op = TorchOp(self, name, reference, gradient, self.kernels | (kernels or {}), prefers or self.prefers)
        op.run = in_graph(schema, reference, fake)
        # of backends for tensors on a CPU there is one: another that is preferred is a GPU's
        preferred = isinstance(op.prefers, str) and op.prefers != "reference"
        op.first_on_cpu = op.has("cpu") and preferred and not backends.why_missing("cpu")
        types = [str(argument.type) for argument in op.run._schema.arguments]
        op.tensors = [i for i, kind in enumerate(types) if kind in ("Tensor", "Optional[Tensor]")]
        op.lists = [i for i, kind in enumerate(types) if kind == "List[Tensor]"]
        if op.has("cuda"):
            CUDA_LIBRARY.define(schema)
        if op.has("cuda") or op.has("triton"):
            LIBRARY.impl(name, op.launch, "CUDA")
        op.record = with_gradient(name, op.run, reference, gradient)
        LIBRARY.impl(name, op.record, "Autograd")
        self.torch_ops[name] = op
        return op

    def backend_on(self, device: str) -> str:
        """The backend that runs on a kind of device, but for what `prefers` says of some arguments; raises as
        `TorchOp.backend_for` does."""
        return _choose(self, device, self.kernels, self.prefers if isinstance(self.prefers, str) else "")

    def left_to_reference(self, backend: str) -> str:
        """Which torch operators have no kernel of a backend that the others have, and why; empty where all have."""
        if self.kernels[backend]:
            return ""
        by_reason: dict[str, list[str]] = {}
        for op in self.torch_ops.values():
            if reason := op.kernels[backend]:
                by_reason.setdefault(reason, []).append(op.name)
        return "; ".join(f"{', '.join(names)} by the reference: {reason}" for reason, names in by_reason.items())


OPERATORS: dict[str, Operator] = {}


def in_graph(schema: str, run: Callable, fake: Callable, *tags: torch.Tag, gradient: Gradient | None = None) -> Any:
    """``torch.ops.genkernels.<name>``: `run` wherever no kernel is registered, `fake`, and the gradient, if any.

    By itself, beside the operators, what a compiled pass is to hold as one call that it does not look into.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genkernels::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.genkernels, name).default
    if gradient is not None:
        LIBRARY.impl(name, with_gradient(name, op, run, gradient), "Autograd")
    return op


def of_others(schema: str, run: Callable) -> Any:
    """``torch.ops.genkernels.<name>``, which consists of other operators, those that `run` calls: a compiler and
    autograd see these, while the trace of Python code holds it whole."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeImplicitAutograd")
    return getattr(torch.ops.genkernels, name).default


def _check_backends(name: str, kernels: dict[str, str]) -> None:
    for backend in kernels:
        if backend not in backends.NAMES[2:]:
            raise ValueError(f"{name}: kernels must be of {', '.join(backends.NAMES[2:])}, got {backend!r}")


# ----------------------------------------------------------------------------------------------------------- backends


@dataclass(eq=False)
class TorchOp:
    """One operator as torch knows it: ``torch.ops.genkernels.<name>``."""

    operator: Operator
    name: str
    reference: Callable
    gradient: Gradient
    kernels: dict[str, str]
    prefers: str | Callable[..., str]
    run: Any = None  #: the torch operator itself
    record: Any = None  #: what it calls where autograd may be recording
    tensors: list[int] = field(default_factory=list)  #: the places of its tensors among its arguments
    lists: list[int] = field(default_factory=list)  #: and of its lists of tensors
    first_on_cpu: bool = False  #: whether ``auto`` takes the kernel on a CPU, whatever the arguments are

    def has(self, backend: str) -> bool:
        return self.kernels.get(backend) == ""

    def backend_for(self, *arguments) -> str:
        """The backend that runs these arguments: the forced one, else the preferred, else the first that can.

        Raises:
            BackendUnavailable: a backend is forced that cannot run here or on this device; says which condition failed.
        """
        return self._backend_for(arguments)

    def _backend_for(self, arguments: tuple) -> str:
        if self.first_on_cpu and backends.current_backend() == "auto" and _device_of(arguments) == "cpu":
            return "cpu"  # what is asked in every call of a layer, answered in few steps
        preferred = self.prefers if isinstance(self.prefers, str) else self.prefers(*arguments)
        return _choose(self.operator, _device_of(arguments), self.kernels, preferred)

    def runs_reference(self, *arguments) -> bool:
        """Whether a public function should take the plain PyTorch path, where autograd and every transform are torch's
        own."""
        return self._backend_for(arguments) == "reference" or transforms_active()

    def __call__(self, *arguments):
        """The reference or the kernel."""
        if self._backend_for(arguments) == "reference" or transforms_active():
            return self.reference(*arguments)
        return self.dense(*arguments)

    def dense(self, *arguments):
        """The torch operator with its tensors made dense, as kernels want them. What a gradient calls: neither what
        arrives there nor a saved tensor that a hook gives back need be."""
        dense = list(arguments)
        for i in self.tensors:
            if (tensor := dense[i]) is not None:
                dense[i] = tensor.contiguous()
        for i in self.lists:
            dense[i] = [t.contiguous() for t in dense[i]]
        return self.now(*dense)

    def now(self, *arguments):
        """The torch operator on dense tensors. Where nothing but autograd would look on, it is what autograd calls at
        once: the way there through the dispatcher turns every argument into C++ and back, which takes 8 µs."""
        if is_compiling() or transforms_active() or torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
            return self.run(*arguments)
        return self.record(*arguments)

    def bare(self, *arguments):
        """The torch operator on dense tensors at once, past all that looks at arguments: for the inside of an
        `autograd.Function` whose caller knows that the kernel runs. Between kernels that stream through the caches each
        step of Python is a miss: four long ways in a pass of convolutions took 0.9 ms more (10 µs each where warm).
        """
        with torch._C._AutoDispatchBelowAutograd():
            return self.run(*arguments)

    def launch(self, *arguments):
        """What torch calls for tensors on a GPU, from a public function or from the backward pass."""
        chosen = self._backend_for(arguments)
        if chosen == "cuda":
            return getattr(torch.ops.genkernels_cuda, self.name)(*arguments)
        if chosen == "triton":
            return getattr(importlib.import_module(f"genkernels.triton.{self.operator.name}"), self.name)(*arguments)
        return self.reference(*arguments)


def _choose(operator: Operator, device: str, kernels: dict[str, str], preferred: str) -> str:
    forced = backends.current_backend()
    if forced == "reference" or (forced == "auto" and preferred == "reference"):
        return "reference"
    on_device = KERNELS.get(device, ())
    if forced == "auto":
        for backend in (preferred, *on_device) if preferred and preferred in on_device else on_device:
            if kernels[backend] == "" and not backends.why_missing(backend):
                return backend
        return "reference"
    if reason := backends.why_missing(forced) or operator.kernels[forced]:
        raise backends.BackendUnavailable(f"{operator.name}: backend {forced!r} cannot run: {reason}")
    if forced not in on_device:
        wanted = "CPU" if forced == "cpu" else "CUDA"
        raise backends.BackendUnavailable(f"{operator.name}: backend {forced!r} needs {wanted} tensors, got {device}")
    return forced if kernels[forced] == "" else "reference"


def _device_of(arguments: Sequence) -> str:
    """The kind of device of the first tensor."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device.type
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return argument[0].device.type
    return "cpu"
