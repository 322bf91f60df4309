"""The elementary functions that the kernels share, against mpmath, and at the ends of their ranges."""

import mpmath
import pytest
import torch
import triton
import triton.language as tl

from genkernels.triton import _math

TILE = 1024
UNIT = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


@triton.jit
def _function_kernel(p_x, p_y, p_y2, n, FUNCTION: tl.constexpr, TILE: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = o < n
    b_x = tl.load(p_x + o, m, other=1.0)
    b_y2 = b_x
    if FUNCTION == "exp":
        b_y = _math.exp(b_x)
    elif FUNCTION == "exp_bounded":
        b_y = _math.exp_bounded(b_x)
    elif FUNCTION == "log1p":
        b_y = _math.log1p(b_x)
    elif FUNCTION == "log":
        b_y = _math.log(b_x)
    elif FUNCTION == "one_over_one_plus":
        b_y = _math.reciprocal_of_sum(1.0, b_x)
    else:
        b_y, b_y2 = _math.tanh(b_x)
    tl.store(p_y + o, b_y, m)
    tl.store(p_y2 + o, b_y2, m)


def run(function, x):
    y, y2 = torch.empty_like(x), torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), TILE),)
    _function_kernel[grid](x, y, y2, x.numel(), function, TILE, enable_fp_fusion=True)
    return (y.cpu(), y2.cpu()) if function == "tanh" else y.cpu()


def worst_units(x, y, exact):
    """Largest error in units in the last place of the exact value."""
    worst = 0.0
    with mpmath.workprec(150):
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            true = exact(mpmath.mpf(a))
            exponent = mpmath.floor(mpmath.log(abs(true), 2))
            worst = max(worst, float(abs(mpmath.mpf(b) - true) / mpmath.mpf(2) ** exponent))
    return worst / UNIT[y.dtype]


def spread(low, high, dtype, device, count=3000):
    return (torch.rand(count, dtype=torch.float64) * (high - low) + low).to(dtype).to(device)


def tiny(lowest_exponent, dtype, device, count=1000):
    return (2.0 ** (torch.rand(count, dtype=torch.float64) * lowest_exponent)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_errs_by_one_unit_over_its_whole_range(device, dtype):
    low, high = (-87.3, 88.7) if dtype == torch.float32 else (-708.3, 709.7)
    x = torch.cat([spread(low, high, dtype, device), spread(-1, 1, dtype, device), tiny(-60, dtype, device)])
    assert worst_units(x, run("exp", x), mpmath.exp) < 1.1
    x = spread(-1, 1, dtype, device)
    assert worst_units(x, run("exp_bounded", x), mpmath.exp) < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1p_keeps_small_arguments(device, dtype):
    x = torch.cat([spread(0, 1, dtype, device), tiny(-120, dtype, device)])
    assert worst_units(x, run("log1p", x), mpmath.log1p) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_near_one_and_over_its_whole_range(device, dtype):
    whole = 2 ** spread(*((-125, 127) if dtype == torch.float32 else (-1020, 1023)), torch.float64, "cpu")
    x = torch.cat([spread(0.5, 2, dtype, device), 1 - tiny(-20, dtype, device) / 2, whole.to(dtype).to(device)])
    # under 2 with a fused multiply-add, which the interpreter of Triton 3.6 rounds twice
    assert worst_units(x[x != 1], run("log", x[x != 1]), mpmath.log) < 2.5
    one, nan = torch.ones(1, dtype=dtype, device=device), torch.full((1,), float("nan"), dtype=dtype, device=device)
    assert run("log", one).item() == 0 and run("log", nan).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_and_its_slope_cancel_nowhere(device, dtype):
    x = torch.cat([spread(-12, 12, dtype, device), spread(-1, 1, dtype, device), tiny(-60, dtype, device)])
    y, slope = run("tanh", x)
    assert worst_units(x, y, mpmath.tanh) < 3
    assert worst_units(x, slope, lambda a: 1 / mpmath.cosh(a) ** 2) < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reciprocal_of_a_sum(device, dtype):
    x = torch.cat([spread(0, 1, dtype, device), tiny(-60, dtype, device)])
    # under 1.1 with a fused multiply-add, which the interpreter of Triton 3.6 rounds twice
    assert worst_units(x, run("one_over_one_plus", x), lambda a: 1 / (1 + a)) < 1.5
    x = 1 / tiny(-90, dtype, device)
    assert worst_units(x, run("one_over_one_plus", x), lambda a: 1 / (1 + a)) < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_the_ranges(device, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e30, -1e30, 800.0, -800.0], dtype=dtype, device=device)
    expected = torch.tensor([inf, 0.0, nan, 1.0, 1.0, inf, 0.0, inf, 0.0], dtype=dtype)
    assert torch.equal(run("exp", x).nan_to_num(7), expected.nan_to_num(7))
    y, slope = run("tanh", x)
    expected = torch.tensor([1.0, -1.0, nan, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0], dtype=dtype)
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
    expected = torch.tensor([0.0, 0.0, nan, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(slope, expected, atol=1e-34, rtol=0, equal_nan=True)
    assert run("exp_bounded", torch.tensor([nan], dtype=dtype, device=device)).isnan().all()
    assert run("log1p", torch.tensor([nan], dtype=dtype, device=device)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_at_the_last_finite_and_first_normal_value(device, dtype):
    top = torch.tensor([torch.finfo(dtype).max], dtype=torch.float64).log().to(dtype).to(device)
    below = torch.nextafter(top, torch.zeros_like(top))
    assert worst_units(below, run("exp", below), mpmath.exp) < 1.1
    assert run("exp", top * (1 + 2.0**-20)).item() == float("inf")
    bottom = torch.tensor([torch.finfo(dtype).tiny], dtype=torch.float64).log().to(dtype).to(device)
    above = bottom * (1 - 2.0**-20)
    assert worst_units(above, run("exp", above), mpmath.exp) < 1.1
    assert run("exp", bottom * (1 + 2.0**-20)).item() == 0
