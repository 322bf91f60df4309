"""spectral_norm on every implementation that runs here, against its definition in fp64, dense matrices and autograd."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn.utils.parametrizations import spectral_norm as torchs

from genkernels import ops
from genkernels.ops import CIRCULAR, CONVOLUTION, Geometry
from tests.checks import assert_as_accurate, beside_forbidden_memory, bits, draw, off_address, opcheck_backward
from tests.implementations import reference_of

reference = reference_of("spectral_norm")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
quick = pytest.mark.implementations(slow=False)


def conv(kind=CONVOLUTION, groups=1, transposed=False, stride=(), padding=(), dilation=()):
    fill = lambda values, other: (other,) * (3 - len(values)) + tuple(values)  # noqa: E731
    return Geometry(kind, 0, groups, transposed, fill(stride, 1), fill(padding, 0), fill(dilation, 1))


# (weight, geometry, v's sizes, u's sizes): each kind, odd and even kernels, 1 to 3 axes, what the taps do not reach
MATRICES = [
    ((5, 7), Geometry(), None, None),
    ((1, 9), Geometry(), None, None),
    ((33, 1), Geometry(), None, None),
    ((64, 24, 3, 3), Geometry(), None, None),
    ((4, 3, 5), Geometry(axis=1), None, None),
    ((3, 70, 2, 2), Geometry(axis=1), None, None),
    ((2, 3, 130), Geometry(axis=2), None, None),
    ((70, 300), Geometry(), None, None),
]
CONVOLUTIONS = [
    ((5, 3, 3, 3), conv(padding=(1, 1)), (6, 7), (6, 7)),
    ((6, 2, 4, 4), conv(stride=(2, 2), padding=(1, 1)), (8, 6), (4, 3)),
    ((4, 3, 3, 3), conv(stride=(2, 2)), (8, 8), (3, 3)),  # no tap reaches the last row
    ((4, 3, 3, 2), conv(CIRCULAR, padding=(1, 1), dilation=(1, 2)), (5, 6), (5, 6)),
    ((6, 2, 3, 3), conv(groups=3, padding=(1, 1)), (4, 5), (4, 5)),
    ((3, 2, 5), conv(dilation=(2,), padding=(4,)), (9,), (9,)),
    ((3, 2, 2, 3, 3), conv(padding=(0, 1, 1), stride=(1, 2, 1)), (3, 4, 4), (2, 2, 4)),
    ((4, 3, 4, 4), conv(transposed=True, stride=(2, 2), padding=(1, 1)), (3, 4), (6, 8)),
    ((4, 2, 3, 3), conv(groups=2, transposed=True, stride=(2, 2), padding=(1, 1)), (4, 3), (8, 5)),
    ((2, 3, 1, 1), conv(), (3, 3), (3, 3)),
    ((20, 17, 3, 3), conv(padding=(1, 1)), (5, 9), (5, 9)),
    ((3, 2, 2), conv(stride=(3,)), (11,), (4,)),  # between the taps lie inputs that none reaches
    ((4, 2, 3, 3), conv(CIRCULAR, stride=(2, 1), padding=(1, 2)), (6, 5), (3, 7)),
]
CASES = MATRICES + CONVOLUTIONS
#: What Triton's interpreter takes in a few tenths of a second each: every path, in tiles that are hardly filled.
THIN = [CASES[i] for i in (0, 4, 8, 11, 12, 14, 16)]

# of several blocks, tiles or pieces each
LARGE = [
    ((3, 9216), Geometry(), None, None),
    ((20, 2304), Geometry(), None, None),
    ((600, 1000), Geometry(), None, None),
    ((37, 9001), Geometry(), None, None),
    ((70, 210, 9), Geometry(axis=1), None, None),
    ((300, 500), Geometry(axis=1), None, None),
    ((130, 40, 3, 3), conv(padding=(1, 1)), (17, 21), (17, 21)),
    ((33, 20, 3, 3), conv(padding=(1, 1)), (12, 32), (12, 32)),
    ((36, 40, 1, 1), conv(), (16, 16), (16, 16)),
    ((48, 20, 4, 4), conv(groups=2, transposed=True, stride=(2, 2), padding=(1, 1)), (26, 32), (13, 16)),
    ((24, 30, 3, 3), conv(CIRCULAR, padding=(1, 1)), (15, 20), (15, 20)),
]


def vectors(weight, g, size, out):
    """Shapes of u and v."""
    if g.kind == ops.MATRIX:
        rows = weight[g.axis]
        return (rows,), (torch.Size(weight).numel() // rows,)
    x, y = (weight[1] * g.groups, *(out if g.transposed else size)), (weight[0], *(size if g.transposed else out))
    return (x, y) if g.transposed else (y, x)


def make(cases, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights, us, vs = [], [], []
    for weight, g, size, out in cases:
        u, v = vectors(weight, g, size, out)
        weights.append(draw(weight))
        us.append(torch.nn.functional.normalize(draw(u).flatten(), dim=0).view(u))
        vs.append(torch.nn.functional.normalize(draw(v).flatten(), dim=0).view(v))
    plan = [g for _, g, _, _ in cases]
    return *([t.to(device, dtype) for t in some] for some in (weights, us, vs)), plan


def sample(device="cpu", dtype=torch.float64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    cases = [MATRICES[4], CONVOLUTIONS[1]]
    weights, u, v, geometries = make(cases, dtype, device)
    at_most = {"iterations": 2, "coefficient": 0.9, "at_most": True}

    def function(*weights):
        # under vmap and in the tests of transforms u and v go with the weights that they are given
        kinds = [t.to(weights[0].dtype) for t in (*u, *v)]
        out = ops.spectral_norm(weights, kinds[:2], kinds[2:], geometries, **at_most)
        return torch.cat([w.flatten() for w in out.weights]), out.sigma  # the first one depends on every weight

    return function, tuple(weights)


SAMPLES = {"spectral_norm": sample}


def dense(weight, g, v_shape, u_shape):
    """The map as a matrix, column by column."""
    count = torch.Size(v_shape).numel()
    columns = [reference.apply(weight, g, e.view(v_shape), u_shape).flatten() for e in torch.eye(count).to(weight)]
    return torch.stack(columns, 1)


# --- the definition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_transpose_is_the_transpose_and_the_gradient_that_of_the_map(case):
    (weight,), (u,), (v,), (g,) = make([case])
    a = dense(weight, g, v.shape, u.shape)
    torch.testing.assert_close(reference.apply_transpose(weight, g, u, v.shape).flatten(), a.T @ u.flatten())
    weight.requires_grad_()
    (by_weight,) = torch.autograd.grad((u * reference.apply(weight, g, v, u.shape)).sum(), weight)
    torch.testing.assert_close(reference.outer(weight, g, u, v), by_weight)


@quick
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sigma_is_the_largest_singular_value_of_the_dense_matrix(implementation, device, case):
    weights, u, v, g = make([case], device=device)
    out = ops.spectral_norm(weights, u, v, g, iterations=600)
    exact = torch.linalg.svdvals(dense(weights[0].cpu(), g[0], v[0].shape, u[0].shape))[0]
    torch.testing.assert_close(out.sigma.cpu()[0], exact, rtol=1e-3, atol=0)
    assert out.sigma.cpu()[0] <= exact * (1 + 1e-12)  # from below


def test_a_matrix_is_normalised_as_torch_normalises_it(implementation, device):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(5, 6, 3).double().to(device)
    own = torchs(layer, n_power_iterations=2)
    parts = own.parametrizations.weight
    u, v = parts[0]._u.clone(), parts[0]._v.clone()
    out = ops.spectral_norm([parts.original], [u], [v], iterations=2)
    expected = own.weight  # in training mode this is an iteration
    torch.testing.assert_close(out.weights[0], expected)
    torch.testing.assert_close(out.u[0], parts[0]._u)
    torch.testing.assert_close(out.v[0], parts[0]._v)
    g = torch.randn_like(expected)
    by_torch = torch.autograd.grad(expected, parts.original, g)[0]
    torch.testing.assert_close(torch.autograd.grad(out.weights[0], parts.original, g)[0], by_torch)


# --- kernels against the definition -------------------------------------------------------------------------------


@pytest.mark.every_build
@pytest.mark.implementations(reference=False)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_as_accurate_as_the_reference(implementation, device, dtype):
    turns = list(itertools.product((0, 1, 3), ((1.0, False), (2.5, True))))
    turns = implementation.some(turns, interpreted=[turns[(5, 2, 0, 3)[DTYPES.index(dtype)]]])
    for iterations, (coefficient, at_most) in turns:
        weights, u, v, g = make(implementation.some(CASES, interpreted=THIN), dtype, device, seed=iterations)
        arguments = (reference.as_plan(g), iterations, coefficient, at_most)
        if iterations == 0:  # of random vectors the norm is a sum that cancels, all rounding
            warm = reference.spectral_norm(weights, u, v, arguments[0], 2)
            u, v = warm[len(g) : 2 * len(g)], warm[2 * len(g) : 3 * len(g)]
        ours = implementation.functions.spectral_norm(weights, u, v, *arguments)
        same = reference.spectral_norm(weights, u, v, *arguments)
        exact = reference.spectral_norm(*[[t.double() for t in some] for some in (weights, u, v)], *arguments)
        for i, (a, b, c) in enumerate(zip(ours, same, exact, strict=True)):
            # in fp64 the definition itself is some units in the last place off, and stands for what is exact
            beside = 16 if dtype == torch.float64 else 4
            assert_as_accurate(f"{i} of {dtype}, {iterations}, {at_most}", a, b, c, beside=beside)


@pytest.mark.every_build
@pytest.mark.implementations(reference=False)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_as_accurate_as_the_reference(implementation, device, dtype):
    turns = list(itertools.product(((1.0, False), (2.5, True)), (False, True)))
    turns = implementation.some(turns, interpreted=[turns[DTYPES.index(dtype)]])
    for (coefficient, at_most), with_sigma in turns:
        weights, u, v, g = make(implementation.some(CASES, interpreted=THIN), dtype, device)
        plan = reference.as_plan(g)
        *_, sigma = reference.spectral_norm(weights, u, v, plan, 2, coefficient, at_most)
        grads = [torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w) for w in weights]
        by_sigma = torch.linspace(-1, 1, len(weights)).to(sigma) if with_sigma else None
        ours = implementation.functions.spectral_norm_backward(
            grads, by_sigma, weights, u, v, sigma, plan, coefficient, at_most
        )
        same = reference.spectral_norm_backward(grads, by_sigma, weights, u, v, sigma, plan, coefficient, at_most)
        double = [[t.double() for t in some] for some in (grads, weights, u, v)]
        wide = None if by_sigma is None else by_sigma.double()
        exact = reference.spectral_norm_backward(
            double[0], wide, *double[1:], sigma.double(), plan, coefficient, at_most
        )
        for i, (a, b, c) in enumerate(zip(ours, same, exact, strict=True)):
            assert_as_accurate(f"{i} of {dtype}, {at_most}, {with_sigma}", a, b, c, beside=4)


@pytest.mark.every_build
@pytest.mark.implementations(only=("cpu", "triton", "cuda", "cuda emulated"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_layers_are_as_accurate_as_the_reference(implementation, device, dtype):
    third = DTYPES.index(dtype)
    weights, u, v, g = make(implementation.some(LARGE, emulated=LARGE[third::3]), dtype, device)
    plan, beside = reference.as_plan(g), 32 if dtype == torch.float64 else 4
    ours = implementation.functions.spectral_norm(weights, u, v, plan, 2, 1.0, False)
    same = reference.spectral_norm(weights, u, v, plan, 2, 1.0, False)
    exact = reference.spectral_norm(*[[t.double() for t in some] for some in (weights, u, v)], plan, 2, 1.0, False)
    for i, results in enumerate(zip(ours, same, exact, strict=True)):
        assert_as_accurate(f"{i} of {dtype}", *results, beside=beside)
    grads = [torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w) for w in weights]
    given = [grads, None, weights, same[len(g) : 2 * len(g)], same[2 * len(g) : 3 * len(g)], same[-1]]
    wide = [some if some is None else [t.double() for t in some] for some in given[:-1]] + [same[-1].double()]
    ours = implementation.functions.spectral_norm_backward(*given, plan, 1.0, False)
    same = reference.spectral_norm_backward(*given, plan, 1.0, False)
    exact = reference.spectral_norm_backward(*wide, plan, 1.0, False)
    for i, results in enumerate(zip(ours, same, exact, strict=True)):
        assert_as_accurate(f"gradient {i} of {dtype}", *results, beside=beside)


# --- values that need care ----------------------------------------------------------------------------------------


@pytest.mark.every_build
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CONVOLUTIONS[0], CONVOLUTIONS[7]], ids=str)
def test_a_weight_of_zeros_stays_finite_and_recovers(implementation, device, case):
    weights, u, v, g = make([case], device=device)
    zero = torch.zeros_like(weights[0]).requires_grad_()
    out = ops.spectral_norm([zero], u, v, g, iterations=2)
    assert out.sigma.item() == 0 and not out.weights[0].any()
    assert torch.equal(out.u[0], u[0]) and torch.equal(out.v[0], v[0])
    grad = torch.ones_like(zero)
    assert torch.equal(torch.autograd.grad(out.weights[0], zero, grad)[0], grad)
    iterations = implementation.some([30], interpreted=[3])[0]
    again = ops.spectral_norm(weights, out.u, out.v, g, iterations=iterations)
    expected = reference.spectral_norm(weights, u, v, reference.as_plan(g), iterations)
    torch.testing.assert_close(again.sigma, expected[-1])


@pytest.mark.every_build
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [CASES[0], CONVOLUTIONS[0]], ids=str)
def test_a_weight_that_is_not_finite_leaves_its_vectors_and_the_other_weights_alone(implementation, device, case, bad):
    weights, u, v, g = make([case, *implementation.some([CASES[3]], interpreted=[CASES[5]])], torch.float32, device)
    alone = ops.spectral_norm(weights[1:], u[1:], v[1:], g[1:])
    weights[0].view(-1)[3] = bad
    out = ops.spectral_norm(weights, u, v, g, iterations=2)
    assert not out.sigma[0].isfinite() and not out.weights[0].isfinite().all()
    assert torch.equal(out.u[0], u[0]) and torch.equal(out.v[0], v[0])
    beside = ops.spectral_norm(weights, u, v, g)
    assert torch.equal(bits(beside.weights[1]), bits(alone.weights[0]))


@pytest.mark.every_build
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("case", [CASES[3], CONVOLUTIONS[0]], ids=str)
def test_tiny_and_huge_weights_do_not_overflow(implementation, device, case, size):
    thin = THIN[1] if case[1].kind == ops.MATRIX else THIN[2]
    weights, u, v, g = make(implementation.some([case], interpreted=[thin]), torch.float32, device)
    plain = ops.spectral_norm(weights, u, v, g, iterations=3)
    scaled = ops.spectral_norm([w * size for w in weights], u, v, g, iterations=3)
    torch.testing.assert_close(scaled.sigma / size, plain.sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.weights[0], plain.weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.every_build
def test_a_weight_whose_norm_is_at_most_the_coefficient_is_left_alone(implementation, device):
    cases = implementation.some([*CASES[:4], CONVOLUTIONS[0]], interpreted=THIN[1:3])
    weights, u, v, g = make(cases, torch.float32, device)
    weights = [w.requires_grad_() for w in weights]
    out = ops.spectral_norm(weights, u, v, g, coefficient=1e4, at_most=True)
    grads = [torch.randn_like(w) for w in weights]
    found = torch.autograd.grad(out.weights, weights, grads)
    assert all(torch.equal(bits(a.detach()), bits(b.detach())) for a, b in zip(out.weights, weights, strict=True))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, grads, strict=True))


def test_rank_one_and_a_repeated_singular_value(implementation, device):
    left, right = torch.randn(12, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    once = torch.outer(left, right).to(device)
    twice = 3 * torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0].to(device)
    unit = lambda n: torch.nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0).to(device)  # noqa: E731
    out = ops.spectral_norm([once, twice], [unit(12), unit(9)], [unit(9), unit(9)])
    expected = torch.stack([left.norm() * right.norm(), torch.tensor(3.0, dtype=torch.float64)])
    torch.testing.assert_close(out.sigma.cpu(), expected)


# --- memory, repetition, gradients --------------------------------------------------------------------------------


def test_same_bits_each_run_and_in_any_company(implementation, device):
    cases = implementation.some(CASES, interpreted=THIN[:4])
    weights, u, v, g = make(cases, torch.float32, device)
    runs = [ops.spectral_norm(weights, u, v, g, iterations=2) for _ in range(2)]
    for a, b in zip(runs[0][0] + runs[0][1] + runs[0][2], runs[1][0] + runs[1][1] + runs[1][2], strict=True):
        assert torch.equal(bits(a), bits(b))
    for i in {0, 1, 3, len(cases) // 2, len(cases) - 1}:
        alone = ops.spectral_norm([weights[i]], [u[i]], [v[i]], [g[i]], iterations=2)
        assert torch.equal(bits(alone.weights[0]), bits(runs[0].weights[i]))
        assert torch.equal(bits(alone.u[0]), bits(runs[0].u[i]))


@pytest.mark.every_build
@pytest.mark.implementations(only=("cpu",))
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_first_and_weights_later_have_the_same_bits(implementation, device, dtype):
    """Of the norms that are found without the weights, and of the weights that are written for them."""
    for iterations, (coefficient, at_most) in itertools.product((0, 1, 3), ((1.0, False), (0.7, False), (2.5, True))):
        weights, u, v, g = make(CASES + LARGE[:4], dtype, device, seed=iterations)
        weights[0] = torch.zeros_like(weights[0])
        plan, count = reference.as_plan(g), len(weights)
        at_once = ops.spectral_norm(weights, u, v, g, iterations=iterations, coefficient=coefficient, at_most=at_most)
        found = implementation.functions.spectral_norm_vectors(weights, u, v, plan, iterations)
        for a, b in zip(found, (*at_once.u, *at_once.v, at_once.sigma), strict=True):
            assert torch.equal(bits(a), bits(b))
        halves = found[:count], found[count : 2 * count], found[-1]
        later = implementation.functions.spectral_norm_apply(weights, *halves, plan, coefficient, at_most)
        for a, b in zip(later, at_once.weights, strict=True):
            assert torch.equal(bits(a), bits(b))


@quick
@pytest.mark.implementations(only=("cpu", "reference"))
@pytest.mark.parametrize(("coefficient", "at_most"), [(0.7, False), (0.01, True), (90.0, True)])
def test_weights_written_later_have_the_gradients_of_those_written_at_once(
    implementation, device, coefficient, at_most
):
    for case in (CASES[0], CASES[4], CONVOLUTIONS[1]):
        weights, u, v, g = make([case], device=device)
        plan = reference.as_plan(g)

        def function(w, plan=plan, u=u, v=v):
            found = implementation.functions.spectral_norm_vectors([w.detach()], u, v, plan, 0)
            return implementation.functions.spectral_norm_apply([w], u, v, found[-1], plan, coefficient, at_most)[0]

        leaf = weights[0].requires_grad_()
        assert torch.autograd.gradcheck(function, (leaf,))
        assert torch.autograd.gradgradcheck(function, (leaf,), fast_mode=True)


@pytest.mark.implementations(only=("cpu",))
def test_norms_found_alone_are_constants(implementation, device):
    weights, u, v, g = make(CASES[:1], device=device)
    found = implementation.functions.spectral_norm_vectors([weights[0].requires_grad_()], u, v, reference.as_plan(g), 1)
    with pytest.raises(RuntimeError, match="spectral_norm_vectors: .*cannot be differentiated"):
        found[-1].sum().backward()


# --- a linear layer whose normalised weight is not written ----------------------------------------------------------

# (outputs, columns): less than a vector, between vectors, of several blocks of rows, stretches and chunks of columns
LAYERS = [(1, 1), (5, 7), (33, 1), (3, 9001), (700, 70), (262, 1030)]


def make_layer(inputs, shape, dtype, device, seed=0):
    """x, weight, bias, gradient, u and v."""
    rows, columns = shape
    x, w, b, g, u, v = draw(
        *((inputs, columns), (rows, columns), (rows,), (inputs, rows), (rows,), (columns,)), device=device, seed=seed
    )
    return [t.to(dtype) for t in (x, w, b, g, u / u.norm(), v / v.norm())]


def run_layer(functions, tensors, factor=0.7, norm=1.3):
    x, w, b, g, u, v = tensors
    y, z = functions.spectral_norm_linear(x, w, b, factor)
    return y, z, *functions.spectral_norm_linear_backward(g, x, w, z, u, v, factor, norm, True)


@pytest.mark.every_build
@pytest.mark.implementations(only=("cpu",))
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("inputs", range(1, 9))
def test_a_linear_layer_is_as_accurate_as_the_reference(implementation, device, inputs, dtype):
    for shape in LAYERS:
        tensors = make_layer(inputs, shape, dtype, device, seed=inputs)
        found, plain = run_layer(implementation.functions, tensors), run_layer(reference, tensors)
        exact = run_layer(reference, [t.double() for t in tensors])
        # in fp64, where the truth is no better, by the magnitude of what is summed
        summed = run_layer(reference, [t.double().abs() for t in tensors], norm=-1.3)
        for name, ours, own, truth, total in zip(("y", "z", "by W", "by x"), found, plain, exact, summed, strict=True):
            size, beside = (total, 4.0) if dtype == torch.float64 else (truth, 2.0)
            size = max(1.0, float(size.abs().max()))
            assert_as_accurate(f"{name} of {shape}", ours, own, truth, beside=beside, size=size)


@pytest.mark.implementations(only=("cpu",))
def test_a_linear_layer_without_a_bias_a_norm_or_a_gradient_by_x(implementation, device):
    functions = implementation.functions
    x, w, b, g, u, v = make_layer(3, (9, 14), torch.float64, device)
    y, z = functions.spectral_norm_linear(x, w, None, 0.7)
    torch.testing.assert_close(z, x @ w.T)
    torch.testing.assert_close(y, 0.7 * z)
    by_weight, by_x = functions.spectral_norm_linear_backward(g, x, w, z, u, v, 1.0, 0.0, False)
    torch.testing.assert_close(by_weight, g.T @ x)
    assert by_x.shape == (0,)
    nan = torch.full_like(z, float("nan"))  # a norm that nothing is divided by has no part in the gradient
    assert torch.equal(functions.spectral_norm_linear_backward(g, x, w, nan, u, v, 1.0, 0.0, False)[0], by_weight)
    w[2, 3] = float("nan")
    y, z = functions.spectral_norm_linear(x, w, b, 0.7)
    assert torch.equal(y.isnan(), z.isnan()) and z.isnan().all(0).tolist() == [i == 2 for i in range(9)]


@pytest.mark.implementations(only=("cpu",))
def test_a_linear_layer_is_differentiated_as_its_weight_s_norm_is(implementation, device):
    x, w, b, g, _, _ = make_layer(4, (6, 5), torch.float64, device)
    left, values, right = torch.linalg.svd(w)
    u, v, sigma = left[:, 0].contiguous(), right[0].contiguous(), values[0].item()

    def layer(x, w):
        return 0.7 * x @ w.T / torch.linalg.matrix_norm(w, 2) + b

    leaves = [t.clone().requires_grad_() for t in (x, w)]
    by_x, by_weight = torch.autograd.grad(layer(*leaves), leaves, g)
    y, _, *found = run_layer(implementation.functions, (x, w, b, g, u, v), 0.7 / sigma, sigma)
    for ours, expected in zip((y, *found), (layer(x, w), by_weight, by_x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.every_build
@pytest.mark.implementations(only=("cpu",))
@pytest.mark.parametrize("after", [True, False])
def test_a_linear_layer_touches_nothing_outside_its_tensors(implementation, device, after):
    for inputs, shape in itertools.product((1, 3, 8), LAYERS[:4]):
        tensors = make_layer(inputs, shape, torch.float32, device)
        plain = run_layer(implementation.functions, tensors)
        fenced = [beside_forbidden_memory(t, after) for t in tensors]
        for a, b in zip(run_layer(implementation.functions, fenced), plain, strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.implementations(only=("cpu",))
def test_a_linear_layer_writes_its_results_alone(implementation, device, poisoned_memory):
    for inputs, shape in itertools.product((1, 4, 7), LAYERS):
        tensors = [off_address(t, 3) for t in make_layer(inputs, shape, torch.float32, device)]
        copies = [t.clone() for t in tensors]
        assert all(t.isfinite().all() for t in run_layer(implementation.functions, tensors))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.implementations(only=("cpu",))
def test_what_the_kernel_of_a_linear_layer_cannot_take(implementation, device):
    x, w, b, g, u, v = make_layer(9, (6, 5), torch.float32, device)
    with pytest.raises(RuntimeError, match="x must be .N, K. of 1 to 8 inputs"):
        implementation.functions.spectral_norm_linear(x, w, b, 1.0)
    with pytest.raises(RuntimeError, match="the bias must be .M."):
        implementation.functions.spectral_norm_linear(x[:2], w, b[:3].clone(), 1.0)
    with pytest.raises(RuntimeError, match="gradient, outputs, u and v must fit"):
        implementation.functions.spectral_norm_linear_backward(g[:2], x[:2], w, g[:2], u, v[:4].clone(), 1.0, 1.0, True)
    with pytest.raises(RuntimeError, match="spectral_norm_linear: it cannot be differentiated"):
        implementation.functions.spectral_norm_linear(x[:2], w.requires_grad_(), b, 1.0)[0].sum().backward()


@pytest.mark.threads
@pytest.mark.every_build
@pytest.mark.implementations(only=("cpu",))
def test_same_bits_for_any_number_of_threads(implementation, device):
    weights, u, v, g = make(CASES + LARGE, torch.float32, device)
    plan, threads, runs = reference.as_plan(g), torch.get_num_threads(), []
    grads = [torch.randn_like(w) for w in weights]
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            out = implementation.functions.spectral_norm(weights, u, v, plan, 2, 1.0, False)
            left, right = out[len(g) : 2 * len(g)], out[2 * len(g) : 3 * len(g)]
            found = implementation.functions.spectral_norm_backward(
                grads, None, weights, left, right, out[-1], plan, 1.0, False
            )
            linear = run_layer(implementation.functions, make_layer(3, (700, 1030), torch.float32, device))
            runs.append((*out, *found, *linear))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.every_build
@pytest.mark.implementations(only=("cpu", "cuda emulated", "triton interpreted"))
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_the_tensors_is_touched(implementation, device, dtype, after):
    weights, u, v, g = make(implementation.some(CASES, interpreted=THIN[1 + 2 * after : 3 + 2 * after]), dtype, device)
    plain = ops.spectral_norm(weights, u, v, g)
    fenced = [[beside_forbidden_memory(t, after) for t in some] for some in (weights, u, v)]
    out = ops.spectral_norm(*fenced, g)
    for a, b in zip(out.weights, plain.weights, strict=True):
        assert torch.equal(bits(a), bits(b))
    implementation.functions.spectral_norm_backward(
        fenced[0], None, *fenced, out.sigma, reference.as_plan(g), 1.0, False
    )


@pytest.mark.implementations(reference=False)
def test_any_number_of_layers_into_memory_as_it_comes(implementation, device, poisoned_memory):
    cases = (THIN * 10)[: implementation.some([65], interpreted=[5])[0]]
    weights, u, v, g = make(cases, torch.float64, device)
    for iterations in implementation.some([0, 1, 2], interpreted=[2]):
        arguments = weights, u, v, reference.as_plan(g), iterations, 1.0, False
        expected = reference.spectral_norm(*arguments)
        torch.testing.assert_close(implementation.functions.spectral_norm(*arguments), expected)
    arguments = weights, expected[-1] / 3, weights, u, v, expected[-1], reference.as_plan(g), 1.0, False
    ours = implementation.functions.spectral_norm_backward(*arguments)
    torch.testing.assert_close(ours, reference.spectral_norm_backward(*arguments))


@pytest.mark.implementations(reference=False)
def test_tensors_may_lie_anywhere_and_are_not_written(implementation, device):
    cases = implementation.some(CASES, interpreted=THIN[1:3])
    weights, u, v, g = make(cases, torch.float32, device)
    dense_out = ops.spectral_norm(weights, u, v, g)
    moved = [[off_address(t, 3) for t in some] for some in (weights, u, v)]
    copies = [[t.clone() for t in some] for some in moved]
    out = ops.spectral_norm(*moved, g)
    turned = [w.transpose(0, -1).contiguous().transpose(0, -1) for w in weights]
    strided = ops.spectral_norm(turned, u, v, g)
    for i in range(len(cases)):
        assert torch.equal(bits(out.weights[i]), bits(dense_out.weights[i]))
        assert torch.equal(bits(strided.weights[i]), bits(dense_out.weights[i]))
    for some, before in zip(moved, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(some, before, strict=True))


@pytest.mark.implementations(reference=False)
def test_the_graph_may_be_gone_through_twice_but_not_after_a_write(implementation, device):
    weights, u, v, g = make(CASES[:3], torch.float32, device)
    weights = [w.requires_grad_() for w in weights]
    out = ops.spectral_norm(weights, u, v, g)
    (2 * out.weights[0]).sum().backward()
    first = weights[0].grad.clone()
    (2 * out.weights[0]).sum().backward()
    assert torch.equal(weights[0].grad, 2 * first)
    assert weights[1].grad is None  # nothing asked for it
    with torch.no_grad():
        weights[1].add_(1)
    (2 * out.weights[0]).sum().backward()
    assert torch.equal(weights[0].grad, 3 * first)
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="spectral_norm: a weight needed for the gradient, .* an optimiser's step"):
        out.weights[0].sum().backward()


@quick
def test_gradients_of_first_and_second_order(implementation, device):
    for case in (CASES[0], CASES[4], CONVOLUTIONS[1], CONVOLUTIONS[7]):
        weights, u, v, g = make([case], device=device)
        function = lambda w: (lambda out: (*out.weights, out.sigma))(  # noqa: E731
            ops.spectral_norm([w], u, v, g, iterations=0)  # noqa: B023
        )
        leaf = weights[0].requires_grad_()
        assert torch.autograd.gradcheck(function, (leaf,))
        # of hundreds of weights along random directions
        assert torch.autograd.gradgradcheck(function, (leaf,), fast_mode=case in CONVOLUTIONS)


@pytest.mark.implementations(only=("cpu",))
def test_torch_finds_nothing_amiss(implementation, device):
    weights, u, v, g = make([CASES[0], CONVOLUTIONS[0]], torch.float32, device)
    plan, weights = reference.as_plan(g), [w.requires_grad_() for w in weights]
    torch.library.opcheck(torch.ops.genkernels.spectral_norm.default, (weights, u, v, plan, 1, 1.0, False))
    out = [t.detach() for t in implementation.functions.spectral_norm(weights, u, v, plan, 1, 1.0, False)]
    grads = [torch.randn_like(w, requires_grad=True) for w in weights]
    torch.library.opcheck(
        torch.ops.genkernels.spectral_norm_vectors.default, ([w.detach() for w in weights], u, v, plan, 1)
    )
    applied = (weights, out[2:4], out[4:6], out[6], plan, 1.0, False)
    torch.library.opcheck(torch.ops.genkernels.spectral_norm_apply.default, applied)
    x, w, b, g, left, right = make_layer(2, (5, 7), torch.float32, device)
    y, z = implementation.functions.spectral_norm_linear(x, w, b, 0.7)
    torch.library.opcheck(torch.ops.genkernels.spectral_norm_linear.default, (x, w, b, 0.7))
    arguments = (g.requires_grad_(), x, w.requires_grad_(), z, left, right, 0.7, 1.3, True)
    opcheck_backward(torch.ops.genkernels.spectral_norm_linear_backward.default, arguments)
    for by_sigma in (None, torch.ones(2)):
        opcheck_backward(
            torch.ops.genkernels.spectral_norm_backward.default,
            (grads, by_sigma, weights, out[2:4], out[4:6], out[6], plan, 1.0, False),
        )


def test_autocast_leaves_the_products_in_fp32(implementation, device):
    weights, u, v, g = make(implementation.some(CASES, interpreted=THIN[1:3]), torch.float32, device)
    plain = ops.spectral_norm(weights, u, v, g)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = ops.spectral_norm(weights, u, v, g)
    assert torch.equal(bits(inside.sigma), bits(plain.sigma))


def flags_at(address):
    """What the system notes of the memory there."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(n, 16) for n in head.split("-"))
            here = begin <= address < end
        elif here and head == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.implementations(only=("cpu",))
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="there are no large pages here")
def test_large_results_are_asked_for_in_large_pages(implementation, device):
    weights, page = [torch.randn(1024, 1025, requires_grad=True) for _ in range(2)], 2**21
    u, v = [torch.randn(1024) for _ in range(2)], [torch.randn(1025) for _ in range(2)]
    out = ops.spectral_norm(weights, u, v)
    grads = torch.autograd.grad(out.weights, weights, [torch.ones_like(w) for w in weights])
    for result in (*out.weights, *grads):
        assert "hg" in flags_at(-(-result.data_ptr() // page) * page)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_geometry_may_hold_lists():
    weight, u, v = draw((4, 3, 3, 3), (4, 5, 5), (3, 5, 5), dtype=torch.float32)
    sigma = [
        ops.spectral_norm([weight], [u], [v], [Geometry(CONVOLUTION, padding=kind((0, 1, 1)))]).sigma
        for kind in (tuple, list)
    ]
    assert torch.equal(*sigma)


def test_bad_input_gets_one_sentence():
    weights, u, v, g = make([CASES[0], CONVOLUTIONS[0]])

    def refuses(kind, sentence, weights=weights, u=u, v=v, g=g, **options):
        with pytest.raises(kind, match=sentence):
            ops.spectral_norm(weights, u, v, g, **options)

    refuses(ValueError, "must be lists of one length, 1 or more, got 0", [], [], [], [])
    refuses(ValueError, "must be lists of one length, 1 or more, got 2, 1", u=u[:1])
    refuses(TypeError, r"weights\[0\] must be .*got torch.int64", weights=[weights[0].long(), weights[1]])
    refuses(TypeError, r"v\[1\] must have the dtype of weights\[0\]", v=[v[0], v[1].float()])
    refuses(ValueError, r"weights\[0\] must have two axes or more", weights=[weights[0][0], weights[1]])
    refuses(ValueError, r"u\[0\] must be \[M\] = \[5\], got \[7\]", u=[v[0], u[1]])
    refuses(ValueError, r"v\[1\] must be \[3, \*, \*\], got \[5, 6, 7\]", v=[v[0], u[1]])
    refuses(ValueError, "the axis of weights", g=[Geometry(axis=2), g[1]])
    refuses(ValueError, "iterations must be an integer of at least 0, got -1", iterations=-1)
    refuses(ValueError, "coefficient must be a positive number, got 0", coefficient=0)
    refuses(ValueError, "as large as its circular padding", g=[g[0], conv(CIRCULAR, padding=(9, 9))])
