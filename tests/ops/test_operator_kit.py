"""What `Operator.define` makes of a schema, a reference, a fake and a gradient, on toy operators; and which backend an
operator takes, on a machine that pretends to have them all."""

import importlib
import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genkernels import backends, ops
from genkernels.backends import BackendUnavailable, use_backend
from genkernels.ops import _operator
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula, Refused
from genkernels.ops._operator import Operator

NONE = dict.fromkeys(("cpu", "triton", "cuda"), "a toy of the tests has none")
EVERY = dict.fromkeys(("cpu", "triton", "cuda"), "")
F64 = torch.float64


@pytest.fixture(scope="module")
def make():
    """Makes operators that the registry forgets again."""
    names = []

    def operator(name, kernels=NONE, **options):
        names.append(name)
        return Operator(name, kernels=kernels, **options)

    yield operator
    for name in names:
        ops.OPERATORS.pop(name, None)


# ----------------------------------------------------------------------------------------------------- lists of tensors


def toy(xs, weight):
    """``(Σ w x³, Σ w x²)`` over a list; no weight counts as 1."""
    w = 1 if weight is None else weight
    return sum((w * x**3).sum() for x in xs), sum((w * x**2).sum() for x in xs)


def toy_backward(grad_cubes, grad_squares, xs, weight):
    """The gradient of each x, then that of the weight, which is there even where no weight is."""
    w = 1 if weight is None else weight
    a, b = (xs[0].new_zeros(()) if g is None else g for g in (grad_cubes, grad_squares))
    by_weight = sum((a * x**3 + b * x**2).sum() for x in xs)
    return [*(w * (3 * a * x**2 + 2 * b * x) for x in xs), by_weight]


def setup(ctx, inputs, output):
    xs, weight = inputs
    ctx.save_for_backward(weight, *xs)
    ctx.set_materialize_grads(False)


@pytest.fixture(scope="module")
def listed(make):
    operator = make("toy")
    needed = []

    def backward(ctx, grad_cubes, grad_squares):
        needed.append(ctx.needs_input_grad)
        weight, *xs = ctx.saved_tensors
        *by_xs, by_weight = backward_op.run(grad_cubes, grad_squares, xs, weight)
        return by_xs, None if weight is None else by_weight

    def fake(xs, weight):
        return xs[0].new_empty(()), xs[0].new_empty(())

    def fake_backward(grad_cubes, grad_squares, xs, weight):
        return [*(x.new_empty(x.shape) for x in xs), xs[0].new_empty(())]

    schema = "toy(Tensor[] xs, Tensor? weight) -> (Tensor, Tensor)"
    operator.define(schema, toy, fake, gradient=Formula(setup, backward))
    schema = "toy_backward(Tensor? grad_cubes, Tensor? grad_squares, Tensor[] xs, Tensor? weight) -> Tensor[]"
    backward_op = operator.define(schema, toy_backward, fake_backward, gradient=THROUGH_REFERENCE)
    operator.needed = needed
    return operator


def leaves(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=F64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_list_of_tensors_is_differentiated_twice(listed, weighted):
    *xs, weight = leaves((2, 3), (4,), (), ())
    tensors = (*xs, weight) if weighted else tuple(xs)

    def call(*tensors):
        return torch.ops.genkernels.toy(list(tensors[:3]), tensors[3] if weighted else None)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)
    assert torch.autograd.gradcheck(lambda *t: call(*t)[1], tensors), "one of two gradients is missing"
    grads = torch.autograd.grad(sum(call(*tensors)), tensors)
    expected = torch.autograd.grad(sum(toy(xs, weight if weighted else None)), tensors)
    torch.testing.assert_close(grads, expected)


def test_a_list_of_tensors_comes_back(listed):
    """The backward operator itself, whose result is a list, to the second order."""
    a, b, *xs, weight = leaves((), (), (2, 3), (4,), ())

    def call(a, b, *tensors):
        given = torch.ops.genkernels.toy_backward(a, b, list(tensors[:2]), tensors[2])
        assert isinstance(given, list)
        return tuple(given)

    assert torch.autograd.gradcheck(call, (a, b, *xs, weight))
    assert torch.autograd.gradgradcheck(call, (a, b, *xs, weight))


def test_opcheck_on_lists(listed):
    a, b, *xs, weight = leaves((), (), (2, 3), (4,), ())
    for w in (weight, None):
        torch.library.opcheck(torch.ops.genkernels.toy, (xs, w))
        torch.library.opcheck(torch.ops.genkernels.toy_backward, (a, b, xs, w))
        torch.library.opcheck(torch.ops.genkernels.toy_backward, (None, b, xs, w))


def test_a_formula_sees_which_of_a_list_need_a_gradient(listed):
    x, y, weight = leaves((2,), (3,), ())
    torch.ops.genkernels.toy([x, y.detach()], weight.detach())[0].backward()
    assert listed.needed[-1] == ([True, False], False)
    torch.testing.assert_close(x.grad, 3 * weight.detach() * x.detach() ** 2)


def test_lists_compile_with_their_gradient(listed):
    xs = leaves((2, 3), (4,))
    compiled = torch.compile(lambda *xs: torch.ops.genkernels.toy(list(xs), None), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(sum(compiled(*xs)), xs), torch.autograd.grad(sum(toy(xs, None)), xs))


# ------------------------------------------------------------------------------------------------- what define asks for


def copy_of(x):
    return x.clone()


def test_a_refused_gradient_raises_its_sentence(make):
    operator = make("toy_refused")
    refused = Refused("toy_refused: a toy cannot be differentiated")
    operator.define("toy_refused(Tensor x) -> Tensor", copy_of, torch.empty_like, gradient=refused)
    x = torch.ones(2, requires_grad=True)
    y = torch.ops.genkernels.toy_refused(x)
    with pytest.raises(RuntimeError, match="^toy_refused: a toy cannot be differentiated$"):
        y.sum().backward()


def test_an_operator_that_writes_refuses_at_the_call(make):
    operator = make("toy_writing")
    refused = Refused("toy_writing: what is written cannot be differentiated")

    def write(to, xs):
        to.copy_(sum(x.sum() for x in xs))

    operator.define("toy_writing(Tensor(a!) to, Tensor[] xs) -> ()", write, lambda *a: None, gradient=refused)
    to, x = torch.zeros(()), torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="^toy_writing: what is written cannot be differentiated$"):
        torch.ops.genkernels.toy_writing(to, [x])
    assert to == 0
    with torch.no_grad():
        torch.ops.genkernels.toy_writing(to, [x])
    assert to == 2
    schema = "toy_writing_too(Tensor(a!) to) -> ()"
    with pytest.raises(ValueError, match="writes into its arguments must be Refused"):
        operator.define(schema, write, lambda *a: None, gradient=THROUGH_REFERENCE)


def test_nothing_can_be_left_out(make):
    operator = make("toy_whole")
    with pytest.raises(TypeError, match="gradient"):
        operator.define("toy_whole(Tensor x) -> Tensor", copy_of, torch.empty_like)
    with pytest.raises(TypeError, match="gradient must be a Formula, THROUGH_REFERENCE or Refused, got None"):
        operator.define("toy_whole_none(Tensor x) -> Tensor", copy_of, torch.empty_like, gradient=None)
    with pytest.raises(ValueError, match="a schema must give no default values"):
        schema = "toy_whole_default(Tensor x, int n=1) -> Tensor"
        operator.define(schema, copy_of, torch.empty_like, gradient=THROUGH_REFERENCE)
    with pytest.raises(ValueError, match="a formula with `handed` must have no lists"):
        handed = Formula(lambda *a: None, lambda *a: (None,), handed=lambda xs: (xs,))
        operator.define("toy_whole_handed(Tensor[] xs) -> Tensor", sum, lambda xs: xs[0], gradient=handed)
    with pytest.raises(ValueError, match="toy_half: kernels must say for each of cpu, triton, cuda .*, got cpu"):
        make("toy_half", kernels={"cpu": ""})
    with pytest.raises(ValueError, match="kernels must be of cpu, triton, cuda, got 'tpu'"):
        make("toy_half", kernels={**NONE, "tpu": ""})
    with pytest.raises(ValueError, match="made: there is an operator of this name already"):
        Operator("made", kernels=NONE)


# ------------------------------------------------------------------------------------------------------------- backends


@pytest.fixture
def everything_available(monkeypatch):
    monkeypatch.setattr(backends, "why_missing", lambda name: None)


@pytest.fixture
def on_gpu(everything_available):
    """A tensor that says that it lies on a GPU: it has a shape and no numbers."""
    with FakeTensorMode():
        yield torch.empty(2, 2, device="cuda")


def every_torch_op():
    return [pytest.param(op, id=op.name) for operator in ops.OPERATORS.values() for op in operator.torch_ops.values()]


@pytest.mark.parametrize("forced", ["auto", "reference", "triton", "cuda"])
@pytest.mark.parametrize("op", every_torch_op())
def test_on_a_gpu_a_backend_that_is_chosen_is_there(op, forced, on_gpu):
    """From a public function and from a backward pass alike: a kernel that exists, the reference, or one sentence."""
    arguments = ([on_gpu], None, 3)  # a list is looked into
    with use_backend(forced):
        if forced in ("triton", "cuda") and (reason := op.operator.kernels[forced]):
            for ask in (op.backend_for, op.launch):
                with pytest.raises(BackendUnavailable) as caught:
                    ask(*arguments)
                assert str(caught.value) == f"{op.operator.name}: backend {forced!r} cannot run: {reason}"
            return
        chosen = op.backend_for(*arguments)
    assert chosen in ("reference", "triton", "cuda")
    assert forced == "auto" or chosen == (forced if op.kernels.get(forced) == "" else "reference")
    if chosen == "cuda":
        assert getattr(torch.ops.genkernels_cuda, op.name).default._schema.name == f"genkernels_cuda::{op.name}"
    if chosen == "triton" and importlib.util.find_spec("triton"):
        assert callable(getattr(importlib.import_module(f"genkernels.triton.{op.operator.name}"), op.name))


def test_a_torch_operator_without_a_kernel_runs_its_reference(on_gpu):
    """masked_linear on a GPU is a product with the masked weight, whichever of made's backends is forced."""
    degrees = torch.empty(2, device="cuda", dtype=torch.int64)
    op = ops.OPERATORS["made"].torch_ops["masked_linear"]
    for forced in ("auto", "triton", "cuda"):
        with use_backend(forced):
            assert op.runs_reference(on_gpu, on_gpu, None, degrees, degrees, False)
            assert op.launch(on_gpu, on_gpu, None, degrees, degrees, False).shape == (2, 2)


def test_a_forced_backend_wants_tensors_of_its_device(on_gpu):
    op = ops.OPERATORS["made"].torch_ops["made_inverse"]
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match="made: backend 'cpu' needs CPU tensors, got cuda"):
        op.launch(on_gpu)
    with FakeTensorMode(), use_backend("cuda"):
        with pytest.raises(BackendUnavailable, match="made: backend 'cuda' needs CUDA tensors, got cpu"):
            op.backend_for(torch.empty(2))


def test_a_preference_is_asked_on_every_device_with_all_arguments(make, everything_available):
    asked = []

    def prefers(x, others, factor):
        asked.append((others, factor))
        return "reference" if x.dtype == torch.bfloat16 else "cuda" if x.is_cuda else ""

    operator = make("toy_preferring", kernels=EVERY, prefers=prefers)

    def reference(x, others, factor):
        return x * factor

    schema = "toy_preferring(Tensor x, Tensor[] others, float factor) -> Tensor"
    op = operator.define(schema, reference, lambda x, *rest: torch.empty_like(x), gradient=THROUGH_REFERENCE)
    x = torch.ones(2)
    assert op.backend_for(x, [x], 2.0) == "cpu" and asked[-1][1] == 2.0 and asked[-1][0][0] is x
    assert op.backend_for(x.bfloat16(), [x], 2.0) == "reference"
    with use_backend("cpu"):
        assert op.backend_for(x.bfloat16(), [x], 2.0) == "cpu", "a forced backend is not argued with"
    with FakeTensorMode():
        y = torch.empty(2, device="cuda")
        assert op.backend_for(y, [y], 2.0) == "cuda"
        assert op.backend_for(y.bfloat16(), [y], 2.0) == "reference"
        assert op.launch(y.bfloat16(), [y], 2.0).dtype == torch.bfloat16


def test_a_preference_for_what_is_not_there_is_passed_over(make, monkeypatch):
    operator = make("toy_passing", kernels={**EVERY, "triton": "a toy of the tests has none"}, prefers=lambda x: "cuda")
    schema = "toy_passing(Tensor x) -> Tensor"
    op = operator.define(schema, copy_of, torch.empty_like, gradient=THROUGH_REFERENCE, kernels={"triton": ""})
    monkeypatch.setattr(backends, "why_missing", lambda name: "gone" if name == "cuda" else None)
    assert op.backend_for(torch.ones(2)) == "cpu"
    with FakeTensorMode():
        assert op.backend_for(torch.empty(2, device="cuda")) == "triton"


@pytest.mark.skipif(bool(backends.why_missing("cpu")), reason="the CPU library is not built")
@pytest.mark.parametrize("name", ["log_det_series", "spectral_norm"])
def test_on_a_cpu_its_kernel_is_taken_without_a_choice_whichever_backend_a_gpu_prefers(monkeypatch, name):
    """The choice takes a microsecond in every call of a layer."""
    op = next(o.torch_ops[name] for o in ops.OPERATORS.values() if name in o.torch_ops)
    monkeypatch.setattr(_operator, "_choose", lambda *_: pytest.fail("chosen"))
    with use_backend("auto"):
        assert op.backend_for([torch.zeros(2, 2)]) == "cpu"
