"""logistic_mixture on every implementation that runs here, against its definition in fp64 and the published formula in
50 digits."""

import itertools
import math
import warnings

import mpmath
import pytest
import torch

import genkernels as gk
from genkernels import ops
from tests.checks import assert_as_accurate, behind, off_address, opcheck_backward, pairwise
from tests.implementations import reference_of

reference = reference_of("logistic_mixture")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WORK = {torch.float64: torch.float64}
# (N, spatial, channels, components, levels): whole and odd tiles, several a sample, one pixel, no spatial dimension,
# three dimensions, one component, many
SHAPES = [
    (2, (9, 13), 3, 4, 256),
    (3, (32, 33), 1, 5, 16),
    (1, (23, 50), 3, 10, 256),
    (37, (), 1, 3, 2),
    (5, (1,), 3, 1, 17),
    (2, (3, 5, 7), 3, 2, 1000),
    (2, (64,), 1, 130, 256),
    (3, (150,), 1, 5, 16),
    (5, (), 3, 1, 2),
    (1, (10,), 1, 70, 1000),
    (2, (3, 4), 3, 10, 17),
]
LARGE = SHAPES[1:4] + SHAPES[6:7]  # of these the interpreter takes smaller ones, of the same paths
SMALL = [shape for shape in SHAPES if shape not in LARGE]
SPREADS, TEMPERATURES = [0.5, 3.0], [0.0, 0.7, 1.0]
MET, DRAWN = pairwise(SMALL, DTYPES, SPREADS), pairwise(SMALL, DTYPES, TEMPERATURES)

compiled = pytest.mark.implementations(reference=False)
quick = pytest.mark.implementations(slow=False)


def sample(device="cpu", dtype=torch.float64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    generator = torch.Generator().manual_seed(1)
    params = torch.randn(3, 20, 2, 3, generator=generator, dtype=torch.float64).to(device, dtype)
    x = (torch.randint(17, (3, 3, 2, 3), generator=generator) / 8.0 - 1).to(device)
    return lambda p: (ops.logistic_mixture_nll(p, x, levels=17),), (params,)


SAMPLES = {"logistic_mixture": sample}


def at_level(index, levels, dtype=torch.float32):
    return (2 * index.double() / (levels - 1) - 1).to(dtype)


def make(n, spatial, channels, mixtures, levels, dtype=torch.float64, device="cpu", spread=1.0):
    params = torch.randn(n, mixtures * (3 if channels == 1 else 10), *spatial, dtype=torch.float64) * spread
    params[:, mixtures:].unflatten(1, (channels, -1, mixtures))[:, :, 1] -= 2.5
    index = torch.randint(-levels, 2 * levels, (n, channels, *spatial)).clamp(0, levels - 1)  # a third at either end
    work = WORK.get(dtype, torch.float32)
    return params.to(device, dtype), at_level(index, levels, work).to(device)


# --- the definition -----------------------------------------------------------------------------------------------


def taken_apart(row, channels, mixtures):
    """(logits, means, log_scales, coefficients) of one pixel's list of parameters, by their places in it."""
    take = lambda j: row[j * mixtures : (j + 1) * mixtures]  # noqa: E731
    width = 2 if channels == 1 else 3
    means, log_scales = ([take(1 + width * c + r) for c in range(channels)] for r in (0, 1))
    return take(0), means, log_scales, [take(3 + width * c) for c in range(3)] if channels == 3 else None


def published(logits, means, log_scales, coefficients, x, levels, lowest=None, highest=None):
    """Minus the log-likelihood of one pixel as the paper writes it, in mpmath's digits.

    x: level indices; lowest, highest: which of them are at an end, where x has left its level.
    """
    sigmoid = lambda t: 1 / (1 + mpmath.exp(-t))  # noqa: E731
    lowest = [i == 0 for i in x] if lowest is None else lowest
    highest = [i == levels - 1 for i in x] if highest is None else highest
    half = mpmath.mpf(1) / (levels - 1)
    value = [2 * mpmath.mpf(i) / (levels - 1) - 1 for i in x]
    weights = [mpmath.exp(mpmath.mpf(v)) for v in logits]
    total = mpmath.mpf(0)
    for k, weight in enumerate(weights):
        likelihood = weight / mpmath.fsum(weights)
        for c in range(len(x)):
            mean = mpmath.mpf(means[c][k])
            if c == 1:
                mean += mpmath.tanh(mpmath.mpf(coefficients[0][k])) * value[0]
            if c == 2:
                mean += mpmath.tanh(mpmath.mpf(coefficients[1][k])) * value[0]
                mean += mpmath.tanh(mpmath.mpf(coefficients[2][k])) * value[1]
            scale = mpmath.exp(max(mpmath.mpf(log_scales[c][k]), -7))
            upper = mpmath.mpf(1) if highest[c] else sigmoid((value[c] + half - mean) / scale)
            lower = mpmath.mpf(0) if lowest[c] else sigmoid((value[c] - half - mean) / scale)
            likelihood *= upper - lower
        total += likelihood
    return -mpmath.log(total)


@quick
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_is_the_published_formula(implementation, device, channels, levels):
    """With 50 digits beyond those that the difference of two sigmoids near 1 loses."""
    mixtures = 3
    for spread, digits, samples in ((0.3, 150, 12), (1.0, 600, 12), (3.0, 5000, 2)):
        params, x = make(samples, (), channels, mixtures, levels, torch.float32, device, spread)
        index = ((x + 1) * (levels - 1) / 2).round().long().tolist()
        single = ops.logistic_mixture_nll(params, x, levels=levels).tolist()
        double = ops.logistic_mixture_nll(params.double(), x.double(), levels=levels).tolist()
        for n, row in enumerate(params.double().tolist()):
            with mpmath.workdps(digits):
                exact = float(published(*taken_apart(row, channels, mixtures), index[n], levels))
            assert abs(double[n] - exact) <= 1e-12 * max(1, abs(exact)), (spread, n)
            assert abs(single[n] - exact) <= 2e-5 * max(1, abs(exact)), (spread, n)


def extreme_params(mixtures, channels, dtype):
    """Rows [trials, P] at the ends of what a network gives, every combination of them, beside ordinary ones."""
    rows = []
    for logits, mean, low, high in itertools.product((1, 50), (0.5, 3, 1e3), (-8, -7, -2, 5), (-7, 0, 10)):
        if low > high:
            continue
        row = torch.randn(mixtures * (3 if channels == 1 else 10), dtype=torch.float64)
        row[:mixtures] = row[:mixtures].clamp(-1, 1) * logits
        parts = row[mixtures:].unflatten(0, (channels, -1, mixtures))
        parts[:, 0] *= mean
        parts[:, 1] = torch.rand(channels, mixtures) * (high - low) + low
        rows.append(row)
    return torch.stack(rows).to(dtype)


@pytest.mark.every_build
@quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_the_bins_add_up_to_one(implementation, device, levels, dtype):
    """One channel, every level a sample."""
    every = at_level(torch.arange(levels), levels, dtype)
    for mixtures in (1, 4, 10):
        params = extreme_params(mixtures, 1, dtype)
        trials = len(params)
        x = every.repeat(trials).reshape(-1, 1).to(device)
        nll = ops.logistic_mixture_nll(params.repeat_interleave(levels, 0).to(device), x, levels=levels)
        total = (-nll.double()).exp().reshape(trials, levels).sum(1)
        assert (total - 1).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.every_build
@quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bins_of_three_channels_add_up_to_one(implementation, device, dtype):
    """All triples of few levels; of 256, one channel at a time, the two others certain of an end."""
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for levels in (2, 5):
        triples = torch.cartesian_prod(*[torch.arange(levels)] * 3)
        params = extreme_params(4, 3, dtype)
        x = at_level(triples, levels, dtype).repeat(len(params), 1).to(device)
        nll = ops.logistic_mixture_nll(params.repeat_interleave(levels**3, 0).to(device), x, levels=levels)
        total = (-nll.double()).exp().reshape(len(params), -1).sum(1)
        assert (total - 1).abs().max() <= tolerance
    for summed in range(3):
        params = extreme_params(4, 3, dtype)
        rows = params[:, 4:].unflatten(1, (3, 3, 4))
        certain = [c for c in range(3) if c != summed]
        rows[:, certain, 0], rows[:, certain, 1] = -1e3, -7.0
        index = torch.zeros(256, 3, dtype=torch.long)
        index[:, summed] = torch.arange(256)
        x = at_level(index, 256, dtype).repeat(len(params), 1).to(device)
        nll = ops.logistic_mixture_nll(params.repeat_interleave(256, 0).to(device), x)
        total = (-nll.double()).exp().reshape(len(params), -1).sum(1)
        assert (total - 1).abs().max() <= tolerance


# --- kernels against the definition -------------------------------------------------------------------------------


@pytest.mark.implementations(when=lambda i, shape, **_: not i.is_slow or shape not in LARGE)
@pytest.mark.every_build
@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(implementation, functions, device, poisoned_memory, shape, dtype):
    levels = shape[-1]
    # in fp64 neither side is the exact one, and a posterior's relative error is the absolute one of its log, some 100
    # nats; the interpreter cuts bf16 off where a GPU rounds to nearest
    half = 3 if implementation.is_slow else 2
    beside = {torch.float64: 256, torch.bfloat16: half}.get(dtype, 2)
    for spread in behind(MET, shape, dtype) if implementation.is_interpreted else SPREADS:
        params, x = make(*shape, dtype, device, spread)
        grad = torch.randn(shape[0], dtype=x.dtype, device=device)
        before = [t.clone() for t in (params, x, grad)]
        exact = reference.logistic_mixture_nll(params.double(), x.double(), levels)
        same = reference.logistic_mixture_nll(params, x, levels)
        assert_as_accurate(
            "nll",
            functions.logistic_mixture_nll(params, x, levels),
            same,
            exact,
            256 if x.dtype == torch.float64 else 2,
        )
        exact = reference.logistic_mixture_nll_backward(grad.double(), params.double(), x.double(), levels)
        same = reference.logistic_mixture_nll_backward(grad, params, x, levels)
        ours = functions.logistic_mixture_nll_backward(grad, params, x, levels)
        assert ours.is_contiguous()
        for name, part in {"logits": slice(shape[3]), "rest": slice(shape[3], None)}.items():
            values = [t[:, part].contiguous() for t in (ours, same, exact)]
            assert_as_accurate(f"gradient of {name}", *values, beside)
        assert all(torch.equal(a, b) for a, b in zip((params, x, grad), before, strict=True)), "an input was written to"


@pytest.mark.implementations(only=("triton", "triton interpreted"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("levels", "trials"), [(2, 6), (17, 1)])
def test_the_bins_of_few_levels_add_up_to_one_and_gradients_are_finite(functions, device, levels, trials, dtype):
    """A program a level: the interpreter is slow, the tests below take more trials."""
    mixtures = 4
    params = torch.randn(trials, 3 * mixtures, dtype=torch.float64)
    params[::2, :mixtures] *= 25
    params[:, mixtures : 2 * mixtures] *= torch.tensor([0.5, 3.0, 1e3]).repeat(4)[:trials, None]
    params[:, 2 * mixtures :] = torch.rand(trials, mixtures) * 18 - 8
    params = params.to(device, dtype).repeat_interleave(levels, 0)
    x = at_level(torch.arange(levels), levels, dtype).to(device).repeat(trials).reshape(-1, 1)
    nll = functions.logistic_mixture_nll(params, x, levels)
    total = (-nll.double()).exp().reshape(trials, levels).sum(1)
    assert (total - 1).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-13)
    assert functions.logistic_mixture_nll_backward(torch.ones_like(nll), params, x, levels).isfinite().all()


@quick
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_to_second_order(implementation, device, channels):
    params, x = make(2, (2, 2), channels, 2, 17, device=device)
    params[:, 2:].unflatten(1, (channels, -1, 2))[0, :, 1, 0] = -8.0  # below the clamp
    params.requires_grad_()
    call = lambda p: ops.logistic_mixture_nll(p, x, levels=17)  # noqa: E731
    assert torch.autograd.gradcheck(call, (params,))
    assert torch.autograd.gradgradcheck(call, (params,))


@quick
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_by_x_is_the_formulas(implementation, device, channels):
    """By finite differences of the formula itself, which is smooth in x; never a silent zero."""
    levels, mixtures = 17, 2
    params, x = make(3, (), channels, mixtures, levels, device=device)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.logistic_mixture_nll(params, leaf, levels=levels).sum(), leaf)
    for n, c in itertools.product(range(3), range(channels)):
        index = ((x[n] + 1) * (levels - 1) / 2).round().long().tolist()
        given = taken_apart(params[n].tolist(), channels, mixtures)
        ends = [i == 0 for i in index], [i == levels - 1 for i in index]
        with mpmath.workdps(600):
            step = mpmath.mpf(10) ** -20
            below, above = (
                published(*given, [i + shift * (d == c) for d, i in enumerate(index)], levels, *ends)
                for shift in (-step, step)
            )
            exact = float((above - below) / (2 * step)) * (levels - 1) / 2
        assert abs(grad[n, c].item() - exact) <= 1e-9 * max(1, abs(exact)), (n, c)


@pytest.mark.every_build
@quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_extreme_parameters_give_finite_losses_and_gradients(implementation, device, channels, dtype):
    for levels in (2, 3, 256):
        params = extreme_params(5, channels, dtype).to(device).requires_grad_()
        x = at_level(torch.randint(levels, (len(params), channels)), levels).to(device)
        nll = ops.logistic_mixture_nll(params, x, levels=levels)
        (grad,) = torch.autograd.grad(nll.sum(), params)
        assert nll.isfinite().all()
        if dtype == torch.float16:  # whose range ends at 65,504
            assert not grad.isnan().any()
        else:
            assert grad.isfinite().all()


def test_log_scales_below_the_clamp_count_as_it_with_a_gradient_of_zero(implementation, device):
    params, x = make(4, (3,), 1, 2, 256, torch.float32, device)
    rows = params[:, 2:].unflatten(1, (1, 2, 2))
    rows[:, :, 0], rows[:, :, 1, 0], rows[:, :, 1, 1] = x.unsqueeze(2) + 0.01, -9.0, -7.0
    params.requires_grad_()
    nll = ops.logistic_mixture_nll(params, x)
    (grad,) = torch.autograd.grad(nll.sum(), params)
    parts = grad[:, 2:].unflatten(1, (1, 2, 2))
    assert (parts[:, :, 1, 0] == 0).all() and (parts[:, :, 1, 1] != 0).all() and (parts[:, :, 0] != 0).all()
    raised = params.detach().clone()
    raised[:, 2:].unflatten(1, (1, 2, 2))[:, :, 1, 0] = -7.0
    assert torch.equal(ops.logistic_mixture_nll(raised, x), nll)


@pytest.mark.every_build
@pytest.mark.parametrize("row", range(10))
def test_a_nan_anywhere_makes_its_sample_nan_and_no_other(implementation, device, row):
    params, x = make(3, (5, 7), 3, 2, 256, torch.float32, device)
    clean = ops.logistic_mixture_nll(params, x)
    params[1, 2 * row + 1, 2, 3] = float("nan")
    levels = (-1.0, 1.0, 7 / 255)
    for level in implementation.some(levels, interpreted=levels[row % 3 :][:1]):
        x[1, :, 2, 3] = level
        nll = ops.logistic_mixture_nll(params, x)
        assert nll.isnan().tolist() == [False, True, False]
        assert torch.equal(nll[[0, 2]], clean[[0, 2]])


@pytest.mark.every_build
def test_a_nan_in_x_makes_its_sample_nan(implementation, device):
    for channel in range(3):
        params, x = make(2, (4,), 3, 2, 256, torch.float32, device)
        x[0, channel, 1] = float("nan")
        assert ops.logistic_mixture_nll(params, x).isnan().tolist() == [True, False]


def test_x_counts_as_its_nearest_level_and_beyond_the_ends_as_the_end(implementation, device):
    params, x = make(2, (6, 5), 3, 3, 256, torch.float32, device)
    nll = ops.logistic_mixture_nll(params, x)
    assert torch.equal(ops.logistic_mixture_nll(params, x + (torch.rand_like(x) - 0.5) * 0.007), nll)
    ends = x.abs() == 1
    assert ends.any() and torch.equal(ops.logistic_mixture_nll(params, torch.where(ends, x * 1e30, x)), nll)
    assert torch.equal(ops.logistic_mixture_nll(params, x.bfloat16()), nll)
    assert torch.equal(ops.logistic_mixture_nll(params, x.double()), nll)


# --- shapes, strides, repeats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_tensors(implementation, device, shape):
    n, *spatial = shape
    params, x = make(n, spatial, 3, 2, 256, torch.float32, device)
    params.requires_grad_()
    nll = ops.logistic_mixture_nll(params, x)
    assert nll.shape == (n,) and (nll == 0).all()
    (grad,) = torch.autograd.grad(nll.sum(), params)
    assert grad.shape == params.shape
    noise = torch.rand(n, 4, *spatial, device=device)
    assert ops.logistic_mixture_sample(params, noise).shape == x.shape


def test_any_stride_gives_the_same_and_inputs_are_left_alone(implementation, device):
    params, x = make(3, (6, 7), 3, 2, 256, torch.float32, device)
    noise = torch.rand(3, 4, 6, 7, device=device)
    odd = lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # noqa: E731
    given = [odd(t) for t in (params, x, noise)]
    before = [t.clone() for t in given]
    assert torch.equal(ops.logistic_mixture_nll(*given[:2]), ops.logistic_mixture_nll(params, x))
    assert torch.equal(ops.logistic_mixture_sample(given[0], given[2]), ops.logistic_mixture_sample(params, noise))
    leaf = given[0].detach().requires_grad_()
    ops.logistic_mixture_nll(leaf, given[1]).sum().backward()  # a gradient of stride 0
    dense = implementation.functions.logistic_mixture_nll_backward(torch.ones(3, device=device), params, x, 256)
    torch.testing.assert_close(leaf.grad, dense, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert torch.equal(ops.logistic_mixture_nll(off_address(params, 5), x), ops.logistic_mixture_nll(params, x))


@pytest.mark.threads
@quick  # where the others run, one thread goes through a launch in its order
@compiled
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(implementation, device):
    params, x = make(3, (33, 32), 3, 7, 256, torch.float32, device)
    grad, noise = torch.randn(3, device=device), torch.rand(3, 4, 33, 32, device=device)
    kernels, threads = implementation.functions, torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2, 5) if implementation.name == "cpu" else (threads,) * 2:
            torch.set_num_threads(count)
            runs.append(
                (
                    kernels.logistic_mixture_nll(params, x, 256),
                    kernels.logistic_mixture_nll_backward(grad, params, x, 256),
                    kernels.logistic_mixture_sample(params, noise, 256, 1.0),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@compiled
@quick
@pytest.mark.parametrize("channels", [1, 3])
def test_opcheck(implementation, device, channels):
    params, x = make(2, (3, 2), channels, 2, 17, torch.float32, device)
    leaf, grad = params.clone().requires_grad_(), torch.randn(2, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.genkernels.logistic_mixture_nll.default, (leaf, x, 17))
    opcheck_backward(torch.ops.genkernels.logistic_mixture_nll_backward.default, (grad, leaf, x, 17))
    noise = torch.rand(2, 1 + channels, 3, 2, device=device)
    torch.library.opcheck(torch.ops.genkernels.logistic_mixture_sample.default, (params, noise, 17, 0.8))


# --- the sampler --------------------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_follow_the_bins_probabilities(implementation, device, channels, levels):
    """Chi-square of 40,000 draws over the first channel and over the last given the others' means, bins merged to 20
    draws or more."""
    count, mixtures = 40_000, 3
    params, _ = make(1, (), channels, mixtures, levels, torch.float32)
    rows = params[:, mixtures:].unflatten(1, (channels, -1, mixtures))
    rows[:, :, 0] *= 0.5
    if channels == 3:
        rows[:, :2, 0], rows[:, :2, 1] = -1e3, -7.0  # the first two certain of an end: the third's conditional
    noise = torch.rand(count, 1 + channels).to(device)
    drawn = ops.logistic_mixture_sample(params.expand(count, -1).to(device), noise, levels=levels)
    assert drawn.dtype == torch.int64 and drawn.shape == (count, channels)
    assert drawn.min() >= 0 and drawn.max() < levels
    index = torch.zeros(levels, channels, dtype=torch.long)
    index[:, -1] = torch.arange(levels)
    x = at_level(index, levels, torch.float64)
    expected = count * (-reference.logistic_mixture_nll(params.double().expand(levels, -1), x, levels)).exp()
    found = torch.bincount(drawn[:, -1].cpu(), minlength=levels).double()
    if channels == 3:
        assert (drawn[:, :2] == 0).all()
    merged, pair = [], [0.0, 0.0]
    for e, f in zip(expected.tolist(), found.tolist(), strict=True):
        pair = [pair[0] + e, pair[1] + f]
        if pair[0] >= 20:
            merged.append(pair)
            pair = [0.0, 0.0]
    merged[-1] = [merged[-1][0] + pair[0], merged[-1][1] + pair[1]]
    statistic = sum((f - e) ** 2 / e for e, f in merged)
    freedom = len(merged) - 1
    assert freedom >= 1 and statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5, (statistic, freedom)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_same_noise_gives_the_same_integers(implementation, device, poisoned_memory, dtype):
    differing = count = 0
    every = [(shape, t) for shape in (SMALL if implementation.is_slow else SHAPES) for t in TEMPERATURES]
    if implementation.is_interpreted:
        every = [(shape, t) for shape, met_by, t in DRAWN if met_by == dtype]
    for (n, spatial, channels, mixtures, levels), temperature in every:
        params, x = make(n, spatial, channels, mixtures, levels, dtype, device)
        noise = torch.rand(n, 1 + channels, *spatial, dtype=x.dtype, device=device)
        ours = ops.logistic_mixture_sample(params, noise, levels=levels, temperature=temperature)
        with gk.use_backend("reference"):
            theirs = ops.logistic_mixture_sample(params, noise, levels=levels, temperature=temperature)
        assert ours.dtype == torch.int64 and ours.shape == x.shape
        # where the definition's exponentials and logarithms are CUDA's, which round otherwise, a value beside a
        # boundary may cross it
        apart = 2 if implementation.name == "triton" and dtype != torch.float64 else 0
        if not implementation.is_slow:
            assert (ours != theirs).sum() <= apart
        differing, count = differing + (ours != theirs).sum().item(), count + ours.numel()
    if implementation.is_slow:  # one of a thousand
        assert count > 1000 and differing <= (dtype != torch.float64)


@pytest.mark.every_build
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("which", [0, 2])
def test_a_nan_logit_takes_the_first_component(implementation, device, which, temperature):
    params, x = make(2, (3, 5), 1, 4, 17, torch.float32, device)
    noise = torch.rand(2, 2, 3, 5, device=device)
    params[:, which] = float("nan")
    ours = ops.logistic_mixture_sample(params, noise, levels=17, temperature=temperature)
    first = torch.cat([torch.zeros_like(params[:, :1]), params[:, 4::4]], 1)
    alone = ops.logistic_mixture_sample(first, noise, levels=17, temperature=temperature)
    assert torch.equal(ours, alone)
    with gk.use_backend("reference"):
        assert torch.equal(ours, ops.logistic_mixture_sample(params, noise, levels=17, temperature=temperature))


def test_noise_that_fp32_rounds_to_1_stays_below(implementation, device):
    """A component without probability is not drawn."""
    params = torch.tensor([0.0, -float("inf"), -0.5, 0.5, -7.0, -7.0], device=device).view(1, 6, 1)
    noise = torch.tensor([1 - 2.0**-40, 0.5], dtype=torch.float64, device=device).view(1, 2, 1)
    drawn = ops.logistic_mixture_sample(params, noise)
    assert drawn.item() == ops.logistic_mixture_sample(params.double(), noise).item() == 64


def test_the_later_channels_follow_the_coefficients(implementation, device):
    """Narrow components: the draw is the mean, shifted by tanh(coefficient) times the earlier channels' drawn
    values."""
    levels, count = 256, 12 if implementation.is_slow else 64
    params = torch.zeros(1, 10)
    params[0, [1, 4, 7]] = torch.tensor([0.5, 0.1, -0.2])
    params[0, [2, 5, 8]] = -7.0
    params[0, [3, 6, 9]] = torch.tensor([1.0, -0.6, 0.3])
    t = params[0, [3, 6, 9]].tanh()
    drawn = ops.logistic_mixture_sample(params.expand(count, -1).to(device), torch.rand(count, 4, device=device))
    value = (2 * drawn / (levels - 1) - 1).cpu().double()
    means = [torch.full((count,), 0.5), 0.1 + t[0] * value[:, 0], -0.2 + t[1] * value[:, 0] + t[2] * value[:, 1]]
    for c in range(3):
        assert (value[:, c] - means[c]).abs().max() < 0.02


# --- the losses' room ---------------------------------------------------------------------------------------------


def test_losses_are_the_operators(implementation, device):
    params, x = make(2, (4, 4), 3, 2, 256, torch.float32, device)
    assert torch.equal(gk.losses.discretized_logistic_mixture_nll(params, x), ops.logistic_mixture_nll(params, x))
    grey, x = make(2, (4, 4), 1, 3, 16, torch.float32, device)
    nll = gk.losses.discretized_logistic_mixture_nll(grey, x, levels=16)
    assert torch.equal(nll, ops.logistic_mixture_nll(grey, x, levels=16))
    for given, channels, levels in ((params, 3, 256), (grey, 1, 16)):
        generator = torch.Generator().manual_seed(3)
        drawn = gk.losses.sample_logistic_mixture(given, generator, 0.9, levels)
        noise = torch.rand(2, 1 + channels, 4, 4, generator=torch.Generator().manual_seed(3)).to(device)
        index = ops.logistic_mixture_sample(given, noise, levels=levels, temperature=0.9)
        assert torch.equal(drawn, 2 * index.float() / (levels - 1) - 1)
        assert drawn.abs().max() <= 1 and drawn.dtype == torch.float32
    both = torch.randn(2, 30, 4, 4, device=device)
    for channels in (1, 3):
        assert gk.losses.sample_logistic_mixture(both, channels=channels).shape == (2, channels, 4, 4)


def test_x_off_its_levels_is_told():
    """Images in [0, 1], where [−1, 1] is meant, have an ordinary loss."""
    params, index = torch.randn(2, 9, 4, 4), torch.randint(256, (2, 1, 4, 4))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gk.losses.discretized_logistic_mixture_nll(params.to(dtype), (index / 127.5 - 1).to(dtype))
    with pytest.warns(
        UserWarning, match=r"off the levels 2 \* i / \(levels - 1\) - 1, levels=256: images in .0, 1. are 2"
    ):
        gk.losses.discretized_logistic_mixture_nll(params, index / 255)


def test_a_draw_from_nan_is_nan():
    params = torch.randn(2, 9, 4, 4)
    params[0, 5, 1, 2] = math.nan
    drawn = gk.losses.sample_logistic_mixture(params)
    assert drawn[0, 0, 1, 2].isnan() and drawn.isnan().sum() == 1


def test_a_loss_trains_under_compile():
    params, x = make(2, (4, 4), 3, 2, 256, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(gk.losses.discretized_logistic_mixture_nll, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (compiled, gk.losses.discretized_logistic_mixture_nll):
        leaf = params.clone().requires_grad_()
        function(leaf, x).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call,error,sentence",
    [
        (lambda p, x: ops.logistic_mixture_nll([1.0], x), TypeError, "params must be a torch.Tensor, got list"),
        (
            lambda p, x: ops.logistic_mixture_nll(p, x.long()),
            TypeError,
            "x must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
        (
            lambda p, x: ops.logistic_mixture_nll(p, x.to("meta")),
            ValueError,
            "params and x must be on one device, got cpu and meta",
        ),
        (
            lambda p, x: ops.logistic_mixture_nll(p, x[:, :2]),
            ValueError,
            "x must be [N, C, ...] with C = 1 or 3, got [2, 2, 4, 4]",
        ),
        (
            lambda p, x: ops.logistic_mixture_nll(p, x[:, 0, 0, 0]),
            ValueError,
            "x must be [N, C, ...] with C = 1 or 3, got [2]",
        ),
        (
            lambda p, x: ops.logistic_mixture_nll(p[:, :19], x),
            ValueError,
            "params must be [2, 10*K, 4, 4], K being the number of components (C = 3), got [2, 19, 4, 4]",
        ),
        (
            lambda p, x: ops.logistic_mixture_nll(p, x[:, :1]),
            ValueError,
            "params must be [2, 3*K, 4, 4], K being the number of components (C = 1), got [2, 20, 4, 4]",
        ),
        (lambda p, x: ops.logistic_mixture_nll(p[:, :0], x), ValueError, "params must be [2, 10*K, 4, 4]"),
        (lambda p, x: ops.logistic_mixture_nll(p[:1], x), ValueError, "got [1, 20, 4, 4]"),
        (
            lambda p, x: ops.logistic_mixture_nll(p, x, levels=1),
            ValueError,
            "levels must be an integer from 2 to 65536, got 1",
        ),
        (
            lambda p, x: ops.logistic_mixture_nll(p, x, levels=256.0),
            ValueError,
            "levels must be an integer from 2 to 65536, got 256.0",
        ),
        (
            lambda p, x: ops.logistic_mixture_nll(p, x.bfloat16(), levels=513),
            ValueError,
            "x must be of a dtype that tells 513 levels apart, bfloat16 tells 512",
        ),
        (
            lambda p, x: ops.logistic_mixture_sample(p, x),
            ValueError,
            "noise must be [N, 1 + C, ...] with C = 1 or 3, got [2, 3, 4, 4]",
        ),
        (
            lambda p, x: ops.logistic_mixture_sample(p, torch.rand(2, 4, 4, 4), temperature=-1),
            ValueError,
            "temperature must be a finite number, 0 or more, got -1",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error) as caught:
        call(torch.zeros(2, 20, 4, 4), torch.zeros(2, 3, 4, 4))
    text = str(caught.value)
    assert text.startswith("logistic_mixture: ") and sentence in text and "\n" not in text


@pytest.mark.parametrize(
    "call,error,sentence",
    [
        (lambda p, x: gk.losses.discretized_logistic_mixture_nll(p, x * 255), ValueError, "x must lie in [-1, 1]"),
        (
            lambda p, x: gk.losses.sample_logistic_mixture(torch.zeros(2, 30, 4)),
            ValueError,
            "got 30: both fit: pass channels=1 or channels=3",
        ),
        (lambda p, x: gk.losses.sample_logistic_mixture(torch.zeros(2, 7, 4)), ValueError, "got 7: neither fits"),
        (lambda p, x: gk.losses.sample_logistic_mixture(p, channels=2), ValueError, "channels must be 1 or 3, got 2"),
        (lambda p, x: gk.losses.sample_logistic_mixture(p.long()), TypeError, "params must be a floating-point tensor"),
    ],
)
def test_the_losses_say_what_is_wrong(call, error, sentence):
    with pytest.raises(error) as caught:
        call(torch.zeros(2, 20, 4, 4), torch.ones(2, 3, 4, 4))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_torch_operator_refuses_a_gradient_by_x():
    params, x = make(2, (4,), 1, 2, 256, torch.float32)
    nll = torch.ops.genkernels.logistic_mixture_nll(params, x.requires_grad_(), 256)
    with pytest.raises(RuntimeError, match="has no gradient by x"):
        nll.sum().backward()
