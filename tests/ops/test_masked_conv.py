"""masked_conv on every implementation that runs here, against its definition in fp64 and against what a pixel may
see."""

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkernels as gk
from genkernels import ops
from genkernels.reference.masked_conv import ACTIVATIONS, MASK_TYPES, REGIONS, causal_mask, keeps_pre
from tests.checks import assert_as_accurate, opcheck_backward, strided
from tests.implementations import reference_of

reference = reference_of("masked_conv")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def few(implementation, problem, dtype=torch.float32):
    """Triton's interpreter takes the large problems in fp32 alone, and fp64 and fp16 on a third of the others."""
    if not implementation.is_slow or dtype == torch.float32:
        return not implementation.is_slow or problem != HUGE
    return PROBLEMS.index(problem) not in LARGE and (dtype == torch.bfloat16 or third(implementation, problem))


def third(implementation, problem):
    return not implementation.is_slow or PROBLEMS.index(problem) in (1, 6, 8, 9, 13, 15, 19)


def gated(implementation, problem, **_):
    """With each kind of condition."""
    return not implementation.is_slow or problem in PROBLEMS[4:6]


compiled = pytest.mark.implementations(reference=False)
quick = pytest.mark.implementations(slow=False)


def sample(device="cpu", dtype=torch.float64):
    """`(function of tensors, tensors)`, which returns a tuple of tensors: RGB, gated, with a bias, a condition and a
    residual."""
    generator = torch.Generator().manual_seed(2)
    shapes = (2, 3, 4, 5), (6, 3, 3, 3), (6,), (2, 6), (2, 3, 4, 5)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]

    def call(x, weight, bias, condition, residual):
        added = {"condition": condition, "residual": residual, "activation": "gate"}
        return (ops.masked_conv(x, weight, bias, mask_type="B", data_channels=3, **added),)

    return call, tuple(tensors)


SAMPLES = {"masked_conv": sample}
LOWER_UNDER_AUTOCAST = {"masked_conv"}


class Problem(NamedTuple):
    """One call: sizes and options."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    kernel: tuple[int, int]
    mask_type: str = "B"
    data_channels: int = 1
    region: str = "raster"
    activation: str = "none"
    condition: int = 0  # its rank
    residual: bool = False
    bias: bool = True

    @property
    def codes(self):
        named = (MASK_TYPES, self.mask_type), (REGIONS, self.region), (ACTIVATIONS, self.activation)
        mask_type, region, activation = (options.index(value) for options, value in named)
        return mask_type, self.data_channels, region, activation

    @property
    def mask(self):
        shape = self.outputs, self.inputs, self.kernel
        return causal_mask(*shape, self.mask_type, self.data_channels, self.region, self.activation == "gate")

    def tensors(self, dtype=torch.float64, device="cpu"):
        """x, weight, bias, condition, residual; dead taps of the weight are not 0."""
        n, i, o, h, w = self[:5]
        left = o // 2 if self.activation == "gate" else o
        fan_in = i * self.kernel[0] * self.kernel[1]
        shapes = [(n, i, h, w), (o, i, *self.kernel), (o,) if self.bias else None]
        shapes += [{0: None, 2: (n, o), 4: (n, o, h, w)}[self.condition], (n, left, h, w) if self.residual else None]
        made = [None if s is None else torch.randn(s, dtype=torch.float64) for s in shapes]
        made[1] *= fan_in**-0.5
        return [None if t is None else t.to(device, dtype) for t in made]

    def call(self, x, weight, bias=None, condition=None, residual=None):
        options = {"mask_type": self.mask_type, "data_channels": self.data_channels, "region": self.region}
        return ops.masked_conv(
            x, weight, bias, condition=condition, residual=residual, activation=self.activation, **options
        )


# whole and ragged tiles of pixels and of channels; one channel in, one out; a kernel larger than the image; long rows;
# wide kernels; products that are written straight to the tensor, of ragged tiles and in several bands
PROBLEMS = [
    Problem(2, 16, 32, 8, 8, (3, 3)),
    Problem(3, 6, 9, 5, 7, (3, 3), "B", 3, condition=2, activation="relu"),
    Problem(2, 1, 24, 13, 11, (7, 7), "A"),
    Problem(2, 24, 1, 6, 9, (5, 5), residual=True),
    Problem(1, 12, 24, 9, 6, (3, 3), "A", 3, activation="gate", condition=4, residual=True),
    Problem(2, 8, 16, 7, 5, (3, 3), "B", region="vertical", activation="gate", condition=2),
    Problem(2, 8, 8, 7, 5, (5, 3), "A", region="vertical", activation="relu", residual=True),
    Problem(2, 9, 18, 4, 19, (1, 3), "B", 3, "horizontal"),
    Problem(2, 5, 7, 3, 4, (3, 5), "A", 1, "horizontal", condition=4, bias=False),
    Problem(2, 17, 19, 2, 3, (7, 5)),
    Problem(3, 3, 12, 1, 1, (1, 1), "A", 3, activation="gate"),
    Problem(2, 20, 33, 3, 3, (1, 1), activation="relu", condition=4),
    Problem(2, 6, 132, 3, 5, (1, 1), data_channels=3),
    Problem(1, 3, 5, 3, 130, (3, 3), bias=False),
    Problem(1, 70, 66, 17, 16, (3, 3), activation="relu"),
    Problem(2, 9, 16, 7, 5, (1, 1)),
    Problem(1, 23, 72, 41, 33, (1, 1), bias=False),
    Problem(2, 3, 4, 23, 24, (3, 3)),  # several splits of the pixels
    Problem(1, 40, 70, 5, 6, (3, 3)),  # several blocks of channels in and out
    Problem(1, 4, 80, 3, 3, (3, 3), activation="gate", condition=2),  # and with the gate
]
HUGE, LARGE = PROBLEMS[16], (0, 2, 12, 14, 16, 18)  # too much for the interpreter, and much
IDS = [f"{i}-{p.mask_type}-{p.region}-{p.activation}" for i, p in enumerate(PROBLEMS)]


def everything(functions, problem, tensors, grad_output, grad_pre):
    """All that the operator computes; `functions` is a module of torch operators."""
    x, weight, _, _, residual = tensors
    output, pre = functions.masked_conv(*tensors, *problem.codes, True)
    state = None
    if problem.activation != "none":
        state = pre if keeps_pre(problem.codes[-1], residual is not None) else output
    grad_pre = grad_pre if pre.numel() else None
    wanted = (True, True, True, problem.condition != 0)
    grads = functions.masked_conv_backward(
        grad_output, grad_pre, state, x, weight, *problem.codes, problem.condition, *wanted
    )
    names = ("grad_x", "grad_weight", "grad_bias", "grad_condition")
    return {"output": output, "pre": pre} | dict(zip(names, grads, strict=True))


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def cotangents(problem, tensors):
    x = tensors[0]
    outputs = problem.outputs // 2 if problem.activation == "gate" else problem.outputs
    shapes = (problem.batch, outputs, *x.shape[2:]), (problem.batch, problem.outputs, *x.shape[2:])
    return [torch.randn(shape, dtype=torch.float64).to(x.device, x.dtype) for shape in shapes]


@pytest.mark.implementations(when=few)
@compiled
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_agrees_with_the_definition(implementation, functions, device, poisoned_memory, problem, dtype):
    torch.manual_seed(3)
    tensors = problem.tensors(dtype, device)
    given = cotangents(problem, tensors)
    before = [None if t is None else t.clone() for t in tensors]
    ours = everything(functions, problem, tensors, *given)
    same = everything(reference, problem, tensors, *given)
    exact = everything(reference, problem, wide(*tensors), *wide(*given))
    # sums of thousands of terms in fp64 round on both sides, and neither is exact; the interpreter cuts bf16 off where
    # a GPU rounds to nearest
    units = {torch.float64: 64, torch.bfloat16: 4 if implementation.is_slow else 2}.get(dtype, 2)
    for name, true in exact.items():
        assert_as_accurate(name, ours[name], same[name], true, units)
    assert all(a is b or torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "an input was written to"


def may_see(problem):
    """[Cout', H, W, Cin, H, W]: whether an output may depend on an input, said pixel by pixel and not by masks of
    taps."""
    _, inputs, outputs, height, width = problem[:5]
    gate = problem.activation == "gate"
    outputs = outputs // 2 if gate else outputs
    reach_h, reach_w = problem.kernel[0] // 2, problem.kernel[1] // 2
    seen = torch.zeros(outputs, height, width, inputs, height, width, dtype=torch.bool)
    for o, h, w, i, y, x in itertools.product(*map(range, seen.shape)):
        if abs(y - h) > reach_h or abs(x - w) > reach_w:
            continue
        block_out, block_in = o * problem.data_channels // outputs, i * problem.data_channels // inputs
        earlier = block_in < block_out if problem.mask_type == "A" else block_in <= block_out
        before = (y, x) < (h, w) or ((y, x) == (h, w) and earlier)
        seen[o, h, w, i, y, x] = {
            "raster": before,
            "horizontal": before and y == h,
            "vertical": y < h if problem.mask_type == "A" else y <= h,
        }[problem.region]
    return seen


@quick
@pytest.mark.parametrize("activation", ["none", "gate"])
@pytest.mark.parametrize("data_channels", [1, 3])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_jacobian_is_exactly_what_may_be_seen(implementation, device, mask_type, region, data_channels, activation):
    """Both ways: no later input is seen, and none that should be is missed."""
    torch.manual_seed(4)
    shapes = [(4, 3, (3, 3)), (3, 5, (3, 3)), (5, 3, (5, 3)), (2, 3, (7, 7)), (1, 1, (3, 3))]
    for height, width, kernel in shapes:
        outputs = 6 if activation == "gate" else 3
        problem = Problem(1, 3, outputs, height, width, kernel, mask_type, data_channels, region, activation)
        x, weight, bias, *_ = problem.tensors(device=device)
        jacobian = torch.autograd.functional.jacobian(lambda a: problem.call(a, weight, bias), x)[0, :, :, :, 0]  # noqa: B023
        assert torch.equal(jacobian.cpu() != 0, may_see(problem)), (height, width, kernel)


@pytest.mark.implementations(when=third)
@pytest.mark.every_build
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_dead_taps_get_no_gradient_and_have_no_say(implementation, device, poisoned_memory, problem):
    x, weight, *rest = problem.tensors(torch.float32, device)
    dead = ~problem.mask.to(device)
    spoiled = weight.masked_fill(dead, float("nan")).requires_grad_()
    (grad,) = torch.autograd.grad(problem.call(x, spoiled, *rest).square().sum(), spoiled)
    assert torch.equal(problem.call(x, spoiled, *rest), problem.call(x, weight, *rest))
    given = cotangents(problem, [x])
    clean = everything(implementation.functions, problem, [x, weight, *rest], *given)
    dirty = everything(implementation.functions, problem, [x, spoiled.detach(), *rest], *given)
    assert all(torch.equal(clean[name], value) for name, value in dirty.items())
    assert (grad[dead] == 0).all() and not grad.isnan().any()
    if problem.height > 1 and problem.width > 1:  # each live tap meets a pixel
        reach = [min(k // 2, size - 1) for k, size in zip(problem.kernel, (problem.height, problem.width), strict=True)]
        rows, columns = (slice(k // 2 - r, k // 2 + r + 1) for k, r in zip(problem.kernel, reach, strict=True))
        live = ~dead[:, :, rows, columns]
        assert (grad[:, :, rows, columns][live] != 0).float().mean() > 0.7  # relu may silence a channel


SMALL = [
    Problem(2, 2, 3, 3, 4, (3, 3), "A", residual=True),
    Problem(1, 3, 6, 2, 3, (3, 3), "B", 3, activation="gate", condition=2, residual=True),
    Problem(1, 2, 4, 3, 2, (1, 3), "B", 1, "horizontal", activation="gate", condition=4),
    Problem(1, 2, 2, 4, 3, (3, 3), "B", 1, "vertical", condition=4),
    Problem(2, 2, 2, 3, 3, (3, 3), activation="relu", condition=2),
    Problem(2, 2, 2, 3, 3, (3, 3), activation="relu", condition=4, residual=True),
]


@quick
@pytest.mark.parametrize("problem", SMALL, ids=range(len(SMALL)))
def test_gradients_to_second_order(implementation, device, problem):
    torch.manual_seed(5)
    tensors = [t if t is None else t.requires_grad_() for t in problem.tensors(device=device)]
    given = [t for t in tensors if t is not None]

    def call(*some):
        some = iter(some)
        return problem.call(*(None if t is None else next(some) for t in tensors))

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


@compiled
@quick
@pytest.mark.parametrize("problem", SMALL, ids=range(len(SMALL)))
def test_opcheck(implementation, device, problem):
    tensors = [t if t is None else t.requires_grad_() for t in problem.tensors(torch.float32, device)]
    for keep in (True, False):
        test = torch.library.opcheck if keep else forward_opcheck
        test(torch.ops.genkernels.masked_conv.default, (*tensors, *problem.codes, keep))
    grad_output, grad_pre = cotangents(problem, tensors)
    output, pre = torch.ops.genkernels.masked_conv(*tensors, *problem.codes, True)
    state = None if problem.activation == "none" else (pre if pre.numel() else output).detach().requires_grad_()
    has_condition = problem.condition != 0
    for wanted in ((True, True, True, has_condition), (False, True, False, False), (True, False, False, has_condition)):
        opcheck_backward(
            torch.ops.genkernels.masked_conv_backward.default,
            (
                grad_output.requires_grad_(),
                grad_pre if pre.numel() else None,
                state,
                *tensors[:2],
                *problem.codes,
                problem.condition,
                *wanted,
            ),
        )


def forward_opcheck(op, arguments):
    torch.library.opcheck(op, [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments])


@quick
def test_only_the_gradients_that_are_wanted_are_computed(implementation, device):
    problem = Problem(2, 4, 8, 5, 5, (3, 3), activation="gate", condition=2, residual=True)
    tensors = problem.tensors(device=device)
    whole = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(problem.call(*whole).square().sum(), whole)
    for i, true in enumerate(expected):
        one = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        torch.testing.assert_close(torch.autograd.grad(problem.call(*one).square().sum(), one[i])[0], true)


@compiled
def test_a_gradient_without_its_pre_activation_is_refused(implementation, device):
    problem = Problem(1, 2, 4, 3, 3, (3, 3), activation="gate")
    tensors = [t if t is None else t.requires_grad_() for t in problem.tensors(device=device)]
    output, _ = torch.ops.genkernels.masked_conv(*tensors, *problem.codes, False)
    with pytest.raises(RuntimeError, match="masked_conv: a gradient needs the pre-activation, which keep=False"):
        output.sum().backward()


@pytest.mark.threads
@quick  # where the others run, one thread goes through a launch in its order
@compiled
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(implementation, device, problem, dtype):
    if by_torch(implementation, dtype):
        pytest.skip("torch's gradient of the weight depends on the number of threads")
    tensors = problem.tensors(dtype, device)
    given = cotangents(problem, tensors)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 2, 3) if implementation.name == "cpu" else (threads,) * 2:
            torch.set_num_threads(count)
            runs.append(everything(implementation.functions, problem, tensors, *given))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


@pytest.mark.implementations(when=gated)
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_an_empty_batch(implementation, device, problem):
    tensors = [t if t is None else t.requires_grad_() for t in problem._replace(batch=0).tensors(device=device)]
    y = problem.call(*tensors)
    assert y.shape[0] == 0 and y.shape[2:] == tensors[0].shape[2:]
    given = [t for t in tensors if t is not None]
    for t, grad in zip(given, torch.autograd.grad(y.sum(), given), strict=True):
        assert grad.shape == t.shape and (grad == 0).all()


def any_problem(draw):
    c, gate = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1), (5, 5), (3, 7)]))
    return Problem(
        draw(st.integers(0, 3)),
        c * draw(st.integers(1, 7)),
        gate * c * draw(st.integers(1, 7)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 40)),
        kernel,
        draw(st.sampled_from("AB")),
        c,
        draw(st.sampled_from(REGIONS)),
        "gate" if gate == 2 else draw(st.sampled_from(["none", "relu"])),
        draw(st.sampled_from([0, 2, 4])),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@pytest.mark.implementations(only=("cpu",))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 1000))
def test_any_shape_stride_and_option(implementation, data, seed):
    draw = data.draw
    problem = any_problem(draw)
    if not problem.mask.any():
        return
    torch.manual_seed(seed)
    plain = problem.tensors(torch.float32)
    offset, step, last = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    odd = [None if t is None else strided(t, offset, step).requires_grad_() for t in plain]
    if last:
        odd[0] = plain[0].to(memory_format=torch.channels_last).requires_grad_()
    y = problem.call(*odd)
    given = [t for t in odd if t is not None]
    grads = torch.autograd.grad(y.sum(), given)
    with gk.use_backend("reference"):
        leaves = [None if t is None else t.requires_grad_() for t in plain]
        expected = problem.call(*leaves)
        grads_expected = torch.autograd.grad(expected.sum(), [t for t in leaves if t is not None])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, true in zip(grads, grads_expected, strict=True):
        torch.testing.assert_close(
            ours, true, rtol=1e-5, atol=1e-6 * float(true.abs().max() + 10) if true.numel() else 0
        )


def by_torch(implementation, dtype):
    """Whether the CPU kernel leaves the product to torch's convolution of all taps."""
    cpus = Path("/proc/cpuinfo")
    return implementation.name == "cpu" and dtype == torch.bfloat16 and cpus.exists() and "amx_bf16" in cpus.read_text()


@pytest.mark.implementations(only=("cpu",))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 1000))
def test_small_whole_numbers_are_rounded_once_in_bf16(implementation, data, seed):
    """Their products and sums are exact in fp32, in whatever order: the result is the exact one, rounded."""
    if by_torch(implementation, torch.bfloat16):
        pytest.skip("torch's convolution rounds before the condition is added")
    problem = any_problem(data.draw)
    if not problem.mask.any():
        return
    if problem.activation == "gate":
        problem = problem._replace(activation="relu")
    torch.manual_seed(seed)
    drawn = [*problem.tensors(), *cotangents(problem, problem.tensors())]
    exact = [t if t is None else torch.randint_like(t, -3, 4) for t in drawn]
    rounded = [t if t is None else t.bfloat16() for t in exact]
    true = everything(reference, problem, exact[:5], *exact[5:])
    for name, value in everything(torch.ops.genkernels, problem, rounded[:5], *rounded[5:]).items():
        assert torch.equal(value, true[name].bfloat16()), name


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_reach_the_pixels_that_see_them_and_no_earlier_one(implementation, device, bad, dtype):
    """The reference multiplies dead taps by 0, and 0 · inf is NaN: there the leak of a NaN is the definition's own."""
    if by_torch(implementation, dtype):
        pytest.skip("torch's convolution multiplies dead taps by 0")
    problem = Problem(1, 3, 3, 5, 6, (3, 3), "B")
    x, weight, bias, *_ = problem.tensors(dtype, device)
    clean = problem.call(x, weight, bias)
    x[0, :, 2, 3] = bad
    y = problem.call(x, weight, bias)
    sees = may_see(problem)[:, :, :, 0, 2, 3].to(device)
    assert not y[0][sees].isfinite().any()
    assert torch.equal(y[0].flatten(1)[:, : 2 * 6 + 3], clean[0].flatten(1)[:, : 2 * 6 + 3])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [6, 7])
def test_a_non_finite_pixel_shows_in_the_gradients_of_the_taps_that_meet_it_alone(implementation, device, width, dtype):
    if by_torch(implementation, dtype):
        pytest.skip("torch's convolution may multiply what lies outside the image")
    problem = Problem(1, 3, 5, 4, width, (3, 3), "B")
    x, weight, bias, *_ = problem.tensors(dtype, device)
    x[0, 1, 1, width - 1] = float("nan")  # of the last column: no tap to the left ever reads it
    (grad,) = torch.autograd.grad(problem.call(x, weight.requires_grad_(), bias).sum(), weight)
    meets = problem.mask.clone()
    meets[:, :, :, 0] = False
    meets[:, [0, 2]] = False
    assert torch.equal(grad.isnan().cpu(), meets)


def test_autocast_takes_the_lower_dtype_as_a_convolution_does(implementation, device):
    problem = Problem(1, 2, 4, 3, 3, (3, 3), activation="gate", condition=2, residual=True)
    tensors = [t.requires_grad_() for t in problem.tensors(torch.float32, device)]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = problem.call(*tensors)
        assert problem.call(*(t.double() for t in tensors)).dtype == F.conv2d(*(t.double() for t in tensors[:2])).dtype
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in grads)


GOOD = {"x": (2, 3, 4, 5), "weight": (6, 3, 3, 3), "bias": (6,), "condition": (2, 6), "residual": (2, 6, 4, 5)}


@pytest.mark.parametrize(
    "changes,error,sentence",
    [
        ({"mask_type": "C"}, ValueError, "mask_type must be one of A, B, got 'C'"),
        ({"region": "row"}, ValueError, "region must be one of raster, vertical, horizontal, got 'row'"),
        ({"activation": "tanh"}, ValueError, "activation must be one of none, relu, gate, got 'tanh'"),
        ({"data_channels": 0}, ValueError, "data_channels must be an integer of at least 1, got 0"),
        ({"data_channels": 2}, ValueError, "data_channels must divide the input channels, got 2 and 3 input channels"),
        (
            {"data_channels": 4},
            ValueError,
            "data_channels must divide the output channels, got 4 and 6 output channels",
        ),
        (
            {"data_channels": 2, "activation": "gate"},
            ValueError,
            "must divide half of the output channels, got 2 and 6",
        ),
        ({"weight": (6, 3, 2, 3)}, ValueError, "the kernel's height and width must be odd, got 2×3"),
        (
            {"weight": (6, 3, 1, 1), "mask_type": "A"},
            ValueError,
            "a raster mask of type A must leave a live tap, got a 1×1 kernel with data_channels 1",
        ),
        (
            {"weight": (6, 3, 1, 3), "mask_type": "A", "region": "vertical", "data_channels": 3},
            ValueError,
            "a vertical mask of type A must leave a live tap, got a 1×3",
        ),
        (
            {"weight": (6, 3, 3, 1), "mask_type": "A", "region": "horizontal"},
            ValueError,
            "a horizontal mask of type A must leave a live tap, got a 3×1",
        ),
        ({"weight": (6, 4, 3, 3)}, ValueError, "weight must be [Cout, Cin, kh, kw] with Cin = 3, got [6, 4, 3, 3]"),
        ({"x": (3, 4, 5)}, ValueError, "x must be [N, Cin, H, W] with H, W ≥ 1, got [3, 4, 5]"),
        ({"x": (2, 3, 0, 5)}, ValueError, "x must be [N, Cin, H, W] with H, W ≥ 1, got [2, 3, 0, 5]"),
        ({"bias": (5,)}, ValueError, "bias must be [Cout] = [6], got [5]"),
        (
            {"condition": (2, 6, 1, 1)},
            ValueError,
            "condition must be [N, Cout] = [2, 6] or [N, Cout, H, W] = [2, 6, 4, 5], got [2, 6, 1, 1]",
        ),
        ({"residual": (2, 3, 4, 5)}, ValueError, "residual must be [N, Cout', H, W] = [2, 6, 4, 5], got [2, 3, 4, 5]"),
        ({"activation": "gate"}, ValueError, "residual must be [N, Cout', H, W] = [2, 3, 4, 5], got [2, 6, 4, 5]"),
        (
            {"x": torch.zeros(2, 3, 4, 5, dtype=torch.long)},
            TypeError,
            "x must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
        (
            {"weight": torch.zeros(6, 3, 3, 3, dtype=torch.double)},
            TypeError,
            "weight must have the dtype of x, torch.float32, got torch.float64",
        ),
        ({"bias": [0.0]}, TypeError, "bias must be a torch.Tensor, got list"),
        (
            {"weight": torch.zeros(6, 3, 3, 3, device="meta")},
            ValueError,
            "x and weight must be on one device, got cpu and meta",
        ),
    ],
)
def test_bad_input_gets_one_sentence(changes, error, sentence):
    given = GOOD | {"mask_type": "B"} | changes
    given = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    with pytest.raises(error) as caught:
        ops.masked_conv(**given)
    text = str(caught.value)
    assert text.startswith("masked_conv: ") and sentence in text and "\n" not in text
