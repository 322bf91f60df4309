"""What every operator must have and do: the conformance test, and the composability table cell by cell."""

import functools
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
from genkernels.ops._operator import EAGER, KERNEL, NOT_TRIED, RAISES, REFERENCE
from tests.ops.samples import FURTHER, LOWER_UNDER_AUTOCAST, SAMPLES
from tests.processes import two_ranks_once

ROOT = Path(gk.__file__).parent
REPOSITORY = ROOT.parent
OPERATORS = sorted(ops.OPERATORS)
F64 = torch.float64
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
    for feature, cell in operator.composability.items():
        only_here = {EAGER: "double backward inside compile", NOT_TRIED: "CUDA graph capture"}
        assert cell in (KERNEL, REFERENCE, RAISES) or only_here.get(cell) == feature
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
    return composability(name)["backward"] != RAISES


DIFFERENTIABLE = [name for name in EXAMPLES if is_differentiable(name)]


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

    def __init__(self, name, device="cpu"):
        self.name = name
        self.function, self.tensors = SAMPLES[name](device)
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
        # the first-order part of the graph may run its kernel again, where the second-order part has none of its own
        own = composability(self.name)["double backward"] == KERNEL
        return calls.names if own else [], ours, on_reference(lambda: second_order(self.function, self.tensors)), calls

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

    def double_backward_inside_compile(self):
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            compiled = torch.compile(self.function, fullgraph=True, backend=backend)
            if backend == "eager":
                ours = second_order(compiled, self.tensors)
                continue
            with pytest.raises(RuntimeError, match="does not currently support double backward"):
                second_order(compiled, self.tensors)
        return [], ours, on_reference(lambda: second_order(self.function, self.tensors))

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

    def cuda_graph_capture(self):
        """A captured call, with its gradients, replays on other numbers."""

        def action():
            return grads_of(self.function, self.tensors)[0] if self.differentiable else self.function(*self.tensors)

        before = [t.clone() for t in self.tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            action()  # loads modules, compiles Triton
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), Calls() as calls:
            captured = action()
        for t, values in zip(self.tensors, before, strict=True):
            t.copy_(values.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        return calls.names, captured, on_reference(action)

    def ddp_hooks(self):
        """In two processes, which say what is wrong; here it is only asked whether kernels run."""
        if not self.differentiable:
            return grads_of(self.function, self.tensors)
        found = {case: what for case, what in in_two_processes().items() if case.startswith(f"{self.name}, ")}
        assert len(found) == 4 and not any(found.values()), found
        return self.backward()


@functools.cache
def in_two_processes() -> dict[str, str]:
    """What tests/ops/ddp_rank.py finds wrong, by case."""
    return two_ranks_once("tests.ops.ddp_rank")


needs_a_gpu = {"CUDA graph capture": pytest.mark.gpu}


@needs_kernels
@pytest.mark.parametrize("feature", [pytest.param(f, marks=needs_a_gpu.get(f, ())) for f in _operator.FEATURES])
@pytest.mark.parametrize("name", EXAMPLES)
def test_composability_cell(name, feature):
    promised = composability(name)[feature]
    cells = Cells(name, "cuda" if feature in needs_a_gpu else "cpu")
    action = getattr(cells, feature.replace(" ", "_").lower())
    if promised == RAISES:
        with pytest.raises((RuntimeError, NotImplementedError, ValueError), match=name):
            action()
        return
    ran, ours, expected, *_ = action()
    # two bf16 results each round by themselves
    apart = {"rtol": 2e-2, "atol": 2e-2} if feature == "autocast" and cells.lowers else {}
    torch.testing.assert_close(tuple(ours), tuple(expected), **apart)
    if promised != NOT_TRIED:
        assert bool(ran) == (promised == KERNEL), f"{feature}: promised {promised}, ran {ran or 'the reference'}"


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


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_activation_checkpoints(name):
    """Unpacking what backward saved runs the forward pass again, and must record it."""
    function, tensors = SAMPLES[name]()
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = checkpoint(function, *leaves, use_reentrant=False)
    ours = torch.autograd.grad(sum((o * o).sum() for o in outputs), leaves)
    expected = on_reference(lambda: grads_of(function, tensors)[0])
    torch.testing.assert_close(tuple(ours), tuple(expected))


class Unused(torch.autograd.Function):
    """A sum that is not differentiated: no gradient arrives at what it took."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.count = len(tensors)
        return sum(t.sum() for t in tensors)

    @staticmethod
    def backward(ctx, grad):
        return (None,) * ctx.count


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_where_no_gradient_arrives_none_is_given(name):
    """As with torch's own operators: a zero in its place would meet infinities."""
    function, tensors = SAMPLES[name]()
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.grad(Unused.apply(*function(*leaves)), leaves, allow_unused=True) == (None,) * len(leaves)


def gradients_of(name, tensors, **hooks):
    """Those of the sum of squares, of a pass under `saved_tensors_hooks` where they are given."""
    function, _ = SAMPLES[name]()
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autograd.graph.saved_tensors_hooks(**hooks):
        outputs = function(*leaves)
    return torch.autograd.grad(sum((o * o).sum() for o in outputs), leaves)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_saved_tensors_come_back_in_any_order_of_memory(name):
    """A hook that moves them away and back owes nobody their strides; their dtype it does.

    An operator that keeps its tensors by hand, so that its graph may be gone through more than once, shows hooks none
    of them: what they would do to a dtype concerns it not.
    """
    tensors = SAMPLES[name]()[1]
    packed = []

    def back(t):
        return t[..., None].expand(*t.shape, 2).contiguous()[..., 0]

    found = gradients_of(name, tensors, pack_hook=lambda t: packed.append(t) or t, unpack_hook=back)
    expected = on_reference(lambda: grads_of(SAMPLES[name]()[0], tensors)[0])
    torch.testing.assert_close(tuple(found), tuple(expected))
    if not packed:
        return
    with pytest.raises(RuntimeError, match="must (be given contiguous|have one of the dtypes)"):
        gradients_of(name, tensors, pack_hook=lambda t: t, unpack_hook=lambda t: t.half() if t.dtype == F64 else t)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_recorded_backward_pass_in_forward_mode_and_mapped_over(name):
    """``jvp`` of a ``vjp`` whose forward pass ran before: registered operators would give zero tangents in silence."""
    function, tensors = SAMPLES[name]()

    def tangents():
        leaves = [t.clone().requires_grad_() for t in tensors]
        output = function(*leaves)[0]

        def vjp(v):
            return torch.autograd.grad(output, leaves, v, create_graph=True, retain_graph=True)

        ones, along = torch.ones_like(output), torch.full_like(output, 0.3)
        with torch.autograd.forward_ad.dual_level():
            dual = [
                torch.autograd.forward_ad.unpack_dual(g) for g in vjp(torch.autograd.forward_ad.make_dual(ones, along))
            ]
        mapped = torch.func.vmap(vjp)(torch.stack([ones, along]))
        return *torch.func.jvp(vjp, (ones,), (along,))[1], *(d.tangent for d in dual), *mapped

    found, expected = tangents(), on_reference(tangents)
    torch.testing.assert_close(found, expected)
    assert all(t.abs().sum() > 0 for t in expected)


@pytest.mark.parametrize("name", sorted(set(DIFFERENTIABLE) - LOWER_UNDER_AUTOCAST))
def test_second_derivatives_inside_autocast_stay_in_fp32(name):
    function, tensors = SAMPLES[name](dtype=torch.float32)

    def penalty(inside):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sum((o * o).sum() for o in function(*leaves))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            return torch.autograd.grad(sum((g * g).sum() for g in grads), leaves)

    torch.testing.assert_close(penalty(True), penalty(False))


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
