"""What every operator must have and do: the conformance test, and the composability table cell by cell."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import genkernels as gk
from genkernels import backends, ops
from genkernels.ops import _operator
from genkernels.ops._gradients import Refused
from tests.ops.samples import FURTHER, LOWER_UNDER_AUTOCAST, SAMPLES

ROOT = Path(gk.__file__).parent
REPOSITORY = ROOT.parent
OPERATORS = sorted(ops.OPERATORS)
EXAMPLES = sorted([*OPERATORS, *FURTHER])
needs_kernels = pytest.mark.skipif(backends.why_missing("cpu") is not None, reason="the CPU library is not built")


class Calls(TorchDispatchMode):
    """Records which of our operators ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "genkernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def files(folder, suffix):
    return {p.stem for p in (REPOSITORY / folder).glob(f"*{suffix}") if not p.stem.startswith("_")}


def test_each_file_of_a_floor_belongs_to_an_operator_of_that_name():
    assert files("genkernels/ops", ".py") == set(OPERATORS)
    assert files("genkernels/reference", ".py") == set(OPERATORS)
    kernels = files("genkernels/triton", ".py") | files("csrc/cpu", ".cpp") | files("csrc/cuda", ".cu")
    assert kernels <= set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_has_all_that_an_operator_needs(name):
    operator = ops.OPERATORS[name]
    assert (REPOSITORY / f"tests/ops/test_{name}.py").exists()
    assert (ROOT / f"benchmarks/cases/{name}.py").exists()
    assert (REPOSITORY / f"docs/{name}.md").exists()
    assert name in SAMPLES
    assert set(operator.composability) == set(_operator.FEATURES)
    assert set(operator.composability.values()) <= {"kernel", "reference", "raises"}
    for function in operator.functions:
        assert getattr(ops, function.__name__) is function
        for part in ("Equivalent to", "Args:", "Returns:"):
            assert part in function.__doc__, f"{function.__name__}: its docstring lacks {part!r}"
    for kind in operator.types:
        assert getattr(ops, kind.__name__) is kind and "Args:" in kind.__doc__
    assert set(operator.kernels) == set(backends.NAMES) - {"auto", "reference"}
    floors = {"cpu": f"csrc/cpu/{name}.cpp", "cuda": f"csrc/cuda/{name}.cu", "triton": f"genkernels/triton/{name}.py"}
    for backend, missing_because in operator.kernels.items():
        assert (REPOSITORY / floors[backend]).exists() == (not missing_because), backend
    reference = importlib.import_module(f"genkernels.reference.{name}")
    assert operator.torch_ops
    for torch_op, op in operator.torch_ops.items():
        qualified = f"genkernels::{torch_op}"
        assert getattr(reference, torch_op) is op.reference
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta"), f"{torch_op} has no fake"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Autograd"), f"{torch_op} has no gradient"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd")
        if isinstance(op.gradient, Refused):
            assert "cannot be differentiated" in op.gradient.sentence
        assert set(op.kernels) == set(operator.kernels)
        assert all(reason == "" or len(reason.split()) > 3 for reason in op.kernels.values())


def composability(example):
    return ops.OPERATORS[FURTHER.get(example, example)].composability


def is_differentiable(name):
    """Operators whose backward raises (they draw integers) are held to that sentence wherever a gradient is asked
    for."""
    return composability(name)["backward"] != "raises"


def refusal(name):
    return pytest.raises(RuntimeError, match=f"{name}: .*cannot be differentiated")


def grads_of(function, tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    loss = sum((o * o).sum() for o in function(*tensors))
    return torch.autograd.grad(loss, tensors, create_graph=True), tensors


def second_order(function, tensors):
    grads, leaves = grads_of(function, tensors)
    return torch.autograd.grad(sum((g * g).sum() for g in grads), leaves)


def on_reference(action):
    with gk.use_backend("reference"):
        return action()


class Cells:
    """Each method exercises one cell: returns (the operators that ran, ours, expected)."""

    def __init__(self, name):
        self.function, self.tensors = SAMPLES[name]()
        self.differentiable = is_differentiable(name)
        self.lowers = name in LOWER_UNDER_AUTOCAST

    def _both(self, action):
        with Calls() as calls:
            ours = action()
        return calls.names, ours, on_reference(action)

    def backward(self):
        return self._both(lambda: grads_of(self.function, self.tensors)[0])

    def double_backward(self):
        grads, leaves = grads_of(self.function, self.tensors)
        with Calls() as calls:
            ours = torch.autograd.grad(sum((g * g).sum() for g in grads), leaves)
        # the first-order part of the graph may run its kernel again; the second-order part has no kernel of its own
        return [], ours, on_reference(lambda: second_order(self.function, self.tensors)), calls

    def forward_mode(self):
        tangents = tuple(torch.full_like(t, 0.3) for t in self.tensors)
        by_func = self._both(lambda: torch.func.jvp(self.function, tuple(self.tensors), tangents)[1])

        def dual():
            with torch.autograd.forward_ad.dual_level():
                made = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(self.tensors, tangents, strict=True)]
                return [torch.autograd.forward_ad.unpack_dual(o).tangent for o in self.function(*made)]

        torch.testing.assert_close(tuple(dual()), tuple(by_func[2]))
        assert all(t.abs().sum() > 0 for t in by_func[1])
        return by_func

    def vmap(self):
        stacked = [torch.stack([t, 2 * t, -t]) for t in self.tensors]
        with Calls() as calls:
            ours = torch.func.vmap(self.function)(*stacked)
        loop = [self.function(*(t[i] for t in stacked)) for i in range(3)]
        return calls.names, ours, [torch.stack(parts) for parts in zip(*loop, strict=True)]

    def compile(self):
        seen = []

        def capture(graph, example_inputs):
            seen.extend(str(node.target) for node in graph.graph.nodes if "genkernels" in str(node.target))
            return graph

        torch._dynamo.reset()
        ours = torch.compile(self.function, fullgraph=True, backend=capture)(*self.tensors)
        return seen, ours, on_reference(lambda: self.function(*self.tensors))

    def autocast(self):
        tensors = [t.float() for t in self.tensors]
        half = [tensors[0], *(t.bfloat16() for t in tensors[1:])]
        with torch.autocast(tensors[0].device.type, dtype=torch.bfloat16), Calls() as calls:
            ours = self.function(*half)
        kind = torch.bfloat16 if self.lowers else torch.float32
        assert all(o.dtype == kind for o in ours if o.is_floating_point())
        assert self.differentiable or not any(o.is_floating_point() for o in ours)
        return calls.names, ours, on_reference(lambda: self.function(*[t.to(kind) for t in half]))

    def deterministic(self):
        def action():
            return grads_of(self.function, self.tensors)[0] if self.differentiable else self.function(*self.tensors)

        torch.use_deterministic_algorithms(True)
        try:
            first = action()
            names, again, expected = self._both(action)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        return names, again, expected


@needs_kernels
@pytest.mark.parametrize("feature", _operator.FEATURES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_composability_cell(name, feature):
    promised = composability(name)[feature]
    cells = Cells(name)
    action = getattr(cells, feature.replace(" ", "_"))
    if promised == "raises":
        with pytest.raises((RuntimeError, NotImplementedError, ValueError), match=name):
            action()
        return
    ran, ours, expected, *_ = action()
    # two bf16 results each round by themselves
    apart = {"rtol": 2e-2, "atol": 2e-2} if feature == "autocast" and cells.lowers else {}
    torch.testing.assert_close(tuple(ours), tuple(expected), **apart)
    assert bool(ran) == (promised == "kernel"), f"{feature}: promised {promised}, ran {ran or 'the reference'}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_compiles_end_to_end_with_its_gradient(name):
    function, tensors = SAMPLES[name]()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    if not is_differentiable(name):
        torch.testing.assert_close(compiled(*tensors), on_reference(lambda: function(*tensors)))
        with refusal(name):
            compiled(*[t.clone().requires_grad_() for t in tensors])
        return
    leaves = [t.clone().requires_grad_() for t in tensors]
    ours = torch.autograd.grad(sum((o * o).sum() for o in compiled(*leaves)), leaves)
    expected = on_reference(lambda: grads_of(function, tensors)[0])
    torch.testing.assert_close(tuple(ours), tuple(expected))


@pytest.mark.parametrize("name", EXAMPLES)
def test_activation_checkpoints(name):
    """Unpacking what backward saved runs the forward pass again, and must record it."""
    if not is_differentiable(name):
        pytest.skip("it has no backward pass")
    function, tensors = SAMPLES[name]()
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = checkpoint(function, *leaves, use_reentrant=False)
    ours = torch.autograd.grad(sum((o * o).sum() for o in outputs), leaves)
    expected = on_reference(lambda: grads_of(function, tensors)[0])
    torch.testing.assert_close(tuple(ours), tuple(expected))


@pytest.mark.parametrize("name", EXAMPLES)
def test_func_grad_and_higher_transforms(name):
    function, tensors = SAMPLES[name]()

    def loss(*t):
        return sum((o * o).sum() for o in function(*t))

    every = tuple(range(len(tensors)))
    if not is_differentiable(name):
        for transform in (torch.func.grad(loss, argnums=every), torch.func.hessian(loss)):
            with refusal(name):
                transform(*tensors)
        return
    ours = torch.func.grad(loss, argnums=every)(*tensors)
    torch.testing.assert_close(ours, tuple(g.detach() for g in on_reference(lambda: grads_of(function, tensors)[0])))
    hessian = torch.func.hessian(loss)(*tensors)
    with gk.use_backend("reference"):
        torch.testing.assert_close(hessian, torch.func.hessian(loss)(*tensors))
    assert hessian.abs().sum() > 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_transforms_inside_compile(name):
    function, tensors = SAMPLES[name]()

    def tangent(*t):
        return torch.func.jvp(function, t, tuple(torch.ones_like(a) for a in t))[1]

    torch._dynamo.reset()
    if not is_differentiable(name):
        with refusal(name):
            torch.compile(tangent, backend="eager")(*tensors)
        return
    ours = torch.compile(tangent, backend="eager")(*tensors)
    torch.testing.assert_close(tuple(ours), tuple(on_reference(lambda: tangent(*tensors))))


def test_the_private_names_that_detect_transforms_still_exist():
    """`transforms_active` rests on them: where one moves, a silent zero tangent is back. Mend
    `_operator.transforms_active`."""
    assert torch.autograd.forward_ad._current_level == -1
    assert torch._C._are_functorch_transforms_active() is False
    assert not _operator.transforms_active()
    seen = []
    torch.func.vmap(lambda t: seen.append(_operator.transforms_active()) or t)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        seen.append(_operator.transforms_active())
    assert seen == [True, True]


@pytest.mark.parametrize(
    "name", [name for name in EXAMPLES if name != "made"]
)  # its sample reads degrees: tests/nn/test_made.py has it
def test_shapes_alone_on_the_meta_device(name):
    """Models are built and sized without memory: every operator gives its results' shapes there."""
    function, tensors = SAMPLES[name]()
    expected = function(*tensors)
    function, tensors = SAMPLES[name]("meta")
    found = function(*tensors)
    assert [(o.shape, o.dtype, o.device.type) for o in found] == [(o.shape, o.dtype, "meta") for o in expected]
