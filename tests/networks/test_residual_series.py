"""log_det_series and the fixed point of any network, against dense Jacobians in fp64."""

import itertools
import math

import pytest
import torch

from genkernels.networks.invertible_residual import attach, solve
from genkernels.networks.log_det_series import Series, log_det_series

F64 = torch.float64


def contraction(features=4, norm=0.7, seed=0, hidden=6):
    """A small smooth network of a Lipschitz constant of at most `norm`."""
    torch.manual_seed(seed)
    first, last = torch.randn(hidden, features, dtype=F64), torch.randn(features, hidden, dtype=F64)
    first, last = first / torch.linalg.matrix_norm(first, 2), norm * last / torch.linalg.matrix_norm(last, 2)
    weights = [first.requires_grad_(), last.requires_grad_(), torch.randn(hidden, dtype=F64).requires_grad_()]
    return (lambda x: torch.tanh(x @ weights[0].T + weights[2]) @ weights[1].T), weights


def jacobians(g, x):
    return torch.stack([torch.func.jacrev(lambda t: g(t[None])[0])(row) for row in x])


def all_signs(x):
    """Every probe of ±1, alike for all samples: their mean is the expectation."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=x.shape[1])), dtype=x.dtype)
    return signs[:, None].expand(-1, len(x), -1).contiguous()


# --- the series ---------------------------------------------------------------------------------------------------


def test_exact_is_the_log_determinant_and_so_is_its_gradient():
    g, weights = contraction()
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    found = log_det_series(g, x, Series("exact"))
    expected = torch.linalg.slogdet(torch.eye(4, dtype=F64) + jacobians(g, x))[1]
    torch.testing.assert_close(found.log_det, expected)
    weigh = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    ours, exact = (torch.autograd.grad((weigh * t).sum(), [x, *weights]) for t in (found.log_det, expected))
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_each_term_alone_is_its_trace_with_its_gradient(k):
    """In expectation over the probes, each sample with a weight of its own."""
    g, weights = contraction()
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    found = log_det_series(g, x, Series("series", k), [0.0] * (k - 1) + [1.0], noise=all_signs(x))
    power = torch.linalg.matrix_power(jacobians(g, x), k)
    expected = (-1) ** (k + 1) / k * power.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(found.log_det, expected)
    weigh = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    ours, exact = (torch.autograd.grad((weigh * t).sum(), [x, *weights]) for t in (found.log_det, expected))
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("stop", "p"), [("geometric", 0.5), ("geometric", 0.2), ("poisson", 2.0)])
@pytest.mark.parametrize("terms", [0, 2])
def test_unbiased_within_three_standard_errors(stop, p, terms, probe):
    """Of the value, and of a gradient. J has a norm of 0.5, whose roulette has a small variance at each stop."""
    g, weights = contraction(norm=0.5)
    series = Series("unbiased", terms, stop, p, probe)
    x = torch.randn(1, 4, dtype=F64).requires_grad_()
    exact = log_det_series(g, x, Series("exact")).log_det
    by_weight = torch.autograd.grad(exact.sum(), weights[1])[0]
    torch.manual_seed(1)
    many = x.detach().expand(64, -1).clone().requires_grad_()
    values, grads = [], []
    for _ in range(120):  # a number of terms each, shared by its samples
        found = log_det_series(g, many, series)
        values.append(found.log_det.mean())
        grads.append(torch.autograd.grad(found.log_det.mean(), weights[1])[0])
    for drawn, expected in ((torch.stack(values), exact[0]), (torch.stack(grads), by_weight)):
        error = drawn.std(0) / len(drawn) ** 0.5
        # three of one number; the furthest of two dozen lies further out
        assert ((drawn.mean(0) - expected).abs() <= (3 if drawn.dim() == 1 else 4) * error + 1e-12).all()


@pytest.mark.parametrize(("stop", "p"), [("geometric", 0.5), ("geometric", 0.1), ("poisson", 3.0)])
def test_weights_are_one_over_the_probability_that_a_term_is_reached(stop, p):
    series = Series("unbiased", 1, stop, p)
    torch.manual_seed(0)
    draws = [series.draw() for _ in range(20000)]
    assert all(weights[0] == 1 for weights in draws)
    for k in range(1, 5):
        share = sum(len(weights) > k for weights in draws) / len(draws)
        stated = next(weights[k] for weights in draws if len(weights) > k)
        assert share * stated == pytest.approx(1, abs=4 * math.sqrt(stated / len(draws)) + 1e-9), k


def test_the_same_seed_gives_the_same_terms_and_probes():
    g, _ = contraction()
    x = torch.randn(5, 4, dtype=F64)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([log_det_series(g, x, Series()).log_det for _ in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(*(log_det_series(g, x, Series(), generator=each).log_det for each in generators))


def test_a_series_of_many_terms_converges_and_probes_agree_in_the_mean():
    g, _ = contraction(norm=0.5)
    x = torch.randn(3, 4, dtype=F64)
    exact = log_det_series(g, x, Series("exact")).log_det
    torch.testing.assert_close(log_det_series(g, x, Series("series", 40), noise=all_signs(x)).log_det, exact)
    for probes in (1, 2, 7):
        torch.manual_seed(2)
        many = x[:1].expand(3000, -1)
        found = log_det_series(g, many, Series("series", 20, probes=probes)).log_det
        assert (found.mean() - exact[0]).abs() <= 3 * found.std() / 3000**0.5


def test_a_second_backward_over_a_kept_graph_and_none_without_gradients():
    g, weights = contraction()
    x = torch.randn(3, 4, dtype=F64)
    found = log_det_series(g, x, Series("series", 3))
    first = torch.autograd.grad(found.log_det.sum(), weights[:2], retain_graph=True)
    second = torch.autograd.grad(found.log_det.sum(), weights[:2])
    torch.testing.assert_close(first, second)
    with torch.no_grad():
        assert not log_det_series(g, x, Series()).log_det.requires_grad


def test_empty_batches_and_too_many_features():
    g, _ = contraction()
    for estimator in ("exact", "series", "unbiased"):
        assert log_det_series(g, torch.zeros(0, 4, dtype=F64), Series(estimator)).log_det.shape == (0,)
    with pytest.raises(ValueError, match="'exact' takes up to 256 features, got 257; 'unbiased' takes any number"):
        log_det_series(lambda x: 0.5 * x, torch.zeros(1, 257), Series("exact"))
    with pytest.raises(ValueError, match=r"must keep the shape of x, \[2, 4\], got \[2, 3\]"):
        log_det_series(lambda x: x[:, :3], torch.zeros(2, 4), Series())


# --- the fixed point ----------------------------------------------------------------------------------------------


def residual(g, y, x):
    return (y - x - g(x)).abs().amax(1)


@pytest.mark.parametrize("depth", [0, 5])
@pytest.mark.parametrize("norm", [0.5, 0.9, 0.97])
def test_every_sample_reaches_its_residual(norm, depth):
    g, _ = contraction(8, norm, hidden=16)
    y = 2 * torch.randn(300, 8, dtype=F64)
    found = solve(lambda x, rows: g(x), y, rtol=0, atol=1e-9, max_iterations=3000, depth=depth)
    assert found.converged.all() and (found.iterations >= 1).all()
    true = residual(g, y, found.x)
    assert (true <= 1e-9).all()
    torch.testing.assert_close(found.residual, true, rtol=1e-3, atol=1e-14)


def test_acceleration_takes_fewer_iterations_where_it_counts():
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0]
    symmetric = turn @ torch.diag(torch.linspace(-0.97, 0.97, 8, dtype=F64)) @ turn.T
    y = torch.randn(50, 8, dtype=F64)
    counts = [
        solve(lambda x, rows: x @ symmetric, y, atol=1e-8, rtol=0, max_iterations=2000, depth=depth).iterations.max()
        for depth in (0, 5)
    ]
    assert counts[1] < counts[0] / 3


def test_a_sample_that_is_not_finite_ends_at_once_and_holds_up_no_other():
    g, _ = contraction()
    y = torch.randn(20, 4, dtype=F64)
    alone = solve(lambda x, rows: g(x), y, atol=1e-9, rtol=0)
    y[3, 1], y[8, 0] = float("nan"), float("inf")
    found = solve(lambda x, rows: g(x), y, atol=1e-9, rtol=0)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 8]] = True
    assert torch.equal(found.converged, ~bad) and (found.iterations[bad] == 1).all()
    assert found.residual[bad].isnan().all()
    torch.testing.assert_close(found.x[~bad], alone.x[~bad], rtol=0, atol=1e-12)


def test_samples_that_have_converged_leave_the_batch():
    torch.manual_seed(0)
    rate = torch.full((40, 1), 0.3, dtype=F64)
    rate[::10] = 0.95
    sizes = []

    def g(x, rows):
        sizes.append(len(x))
        return (rate if rows is None else rate[rows]) * torch.sin(x)

    y = torch.randn(40, 3, dtype=F64)
    found = solve(g, y, atol=1e-10, rtol=0, depth=0, max_iterations=2000)
    assert found.converged.all() and sizes[0] == 40 and sizes[-1] <= 4
    assert sum(sizes) < 0.5 * len(sizes) * 40
    assert (residual(lambda x: rate * torch.sin(x), y, found.x) <= 1e-10).all()


def test_too_few_iterations_are_told_and_the_best_point_is_returned():
    g, _ = contraction(norm=0.9)
    y = torch.randn(5, 4, dtype=F64)
    found = solve(lambda x, rows: g(x), y, atol=1e-12, rtol=0, max_iterations=3)
    assert not found.converged.any() and (found.iterations == 3).all()
    torch.testing.assert_close(found.residual, residual(g, y, found.x))


def test_relative_tolerance_and_empty_batches():
    g, _ = contraction()
    y = torch.stack([torch.randn(4, dtype=F64), 1e6 * torch.randn(4, dtype=F64)])
    found = solve(lambda x, rows: g(x), y, atol=0, rtol=1e-6)
    assert (residual(g, y, found.x) <= 1e-6 * y.abs().amax(1)).all() and found.iterations[1] <= found.iterations[0]
    empty = solve(lambda x, rows: g(x), torch.zeros(0, 4, dtype=F64))
    assert empty.x.shape == (0, 4) and empty.converged.shape == (0,)


def test_the_implicit_gradient_is_the_unrolled_one():
    g, weights = contraction(norm=0.8)
    y = torch.randn(6, 4, dtype=F64, requires_grad=True)
    weigh = torch.randn(6, 4, dtype=F64)
    options = {"atol": 1e-13, "rtol": 0.0, "max_iterations": 1000}
    x = attach(g, y, solve(lambda x, rows: g(x), y.detach(), **options).x, **options)
    found = torch.autograd.grad((weigh * x).sum(), [y, *weights])
    unrolled = y
    for _ in range(250):
        unrolled = y - g(unrolled)
    expected = torch.autograd.grad((weigh * unrolled).sum(), [y, *weights])
    torch.testing.assert_close(x, unrolled)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
