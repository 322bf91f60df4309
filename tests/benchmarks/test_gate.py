"""The gate lets right values through and nothing else."""

import math

import pytest
import torch

from genkernels.benchmarks.measure import errors
from genkernels.benchmarks.runner import draw, run_case

CPU = torch.device("cpu")


def right(x, s):
    return x * torch.exp(s), s.float().sum(1)


class OffByOnePart(torch.autograd.Function):
    """Right forward, right gradient of x, and a gradient of s without the second output's part."""

    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(x, s)
        return right(x, s)

    @staticmethod
    def backward(ctx, gy, gt):
        x, s = ctx.saved_tensors
        return gy * torch.exp(s), gy * x * torch.exp(s)


def one_element(x, s):
    y, t = right(x, s)
    y = y + torch.zeros_like(y).index_fill(1, torch.tensor([y.shape[1] - 1]), 0.05)
    return y, t


def nan(x, s):
    y, t = right(x, s)
    return torch.where(torch.arange(y.shape[1]) == 3, math.nan, y), t


def transposed(x, s):
    y, t = right(x, s)
    return y.T, t


def wrong_dtype(x, s):
    y, t = right(x, s)
    return y, t.double()


def raising(x, s):
    raise RuntimeError("launch failed\nand more")


def forgets_s(x, s):
    y, t = right(x, s.detach())
    return y, t


def one_output(x, s):
    return right(x, s)[0]


WRONG = {
    "gradient of s: error": OffByOnePart.apply,
    "y: error": one_element,
    "y: error inf": nan,
    "total: torch.float32 is wanted, got torch.float64": wrong_dtype,
    "raised RuntimeError: launch failed": raising,
    "gradient of s: error 1.0": forgets_s,
    "raised ValueError": one_output,
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_values_fail_and_show_no_speed(fault, toy, fake, effort):
    (row,), skipped = run_case(toy(), [fake(WRONG[fault])], CPU, effort)
    assert row.gate == "fail" and row.fault.startswith(fault)
    assert (row.median_s, row.q20_s, row.q80_s, row.peak_bytes, row.share_of_peak) == (None,) * 5
    assert not skipped


def test_wrong_shapes_fail(toy, fake, effort):
    (row,), _ = run_case(toy(direction="inverse"), [fake(transposed)], CPU, effort)
    assert row.fault == "y: shape [6, 40] is wanted, got [40, 6]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("direction", ["forward+backward", "forward", "step"])
def test_right_values_pass_and_are_timed(dtype, direction, toy, fake, effort):
    (row,), _ = run_case(toy(dtype=dtype, direction=direction), [fake(right)], CPU, effort)
    assert (row.gate, row.fault) == ("pass", "")
    assert 0 < row.q20_s <= row.median_s <= row.q80_s


def test_one_wrong_element_in_many_bf16_fails(toy, fake, effort):
    """In the 2-norm it would drown in bf16's rounding; the largest error sees it."""

    def op(x, s):
        y, t = right(x, s)
        spoiled = y.clone()
        spoiled[7, 77] += 0.03 * y.abs().max()
        return spoiled, t

    case = toy(shape=(256, 1024), dtype=torch.bfloat16, direction="forward")
    (row,), _ = run_case(case, [fake(op)], CPU, effort)
    assert row.fault.startswith("y: largest error")


def test_an_unwritten_element_fails_even_over_recycled_memory(toy, fake, effort):
    """The kernel leaves one element to whatever its memory held: a recycled right answer, or NaN once poisoned."""
    held = {}

    def forgetful(x, s):
        y, t = right(x, s)
        out = torch.empty_like(y)
        if not torch.are_deterministic_algorithms_enabled():
            out.copy_(held.setdefault("before", y.clone()))
        out[:, 1:] = y[:, 1:]
        return out, t

    before = torch.are_deterministic_algorithms_enabled()
    (row,), _ = run_case(toy(direction="forward"), [fake(forgetful)], CPU, effort)
    assert row.fault.startswith("with uninitialised memory set to NaN: y: error inf")
    assert torch.are_deterministic_algorithms_enabled() is before


def test_ours_are_held_to_twice_the_references_error_and_baselines_to_the_wide_floor(toy, fake, effort):
    def careless(x, s):
        y, t = right(x, s)
        return y * (1 + 20 * torch.finfo(y.dtype).eps), t

    (row,), _ = run_case(toy(direction="forward"), [fake(careless)], CPU, effort)
    assert row.fault.startswith("y: error")
    (row,), _ = run_case(toy(direction="forward"), [fake(careless, ours=False)], CPU, effort)
    assert row.gate == "pass"


def test_truth_is_fp64_on_the_rounded_inputs(toy):
    problem = draw(toy(dtype=torch.bfloat16), CPU)
    x, s = problem.inputs.args
    assert x.dtype == torch.bfloat16
    assert torch.equal(problem.standard.truth[0], x.double() * torch.exp(s.double()))
    assert list(problem.standard.names) == ["y", "total", "gradient of x", "gradient of s"]


def test_inputs_repeat_between_runs_and_differ_between_cases(toy):
    first, again, other = (draw(toy(name=name), CPU).inputs.args[0] for name in ("toy/a", "toy/a", "toy/b"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_errors():
    truth = torch.tensor([3.0, -4.0, math.inf, math.nan])
    assert errors(truth, truth) == (0.0, 0.0)
    assert errors(truth + torch.tensor([0.0, 0.4, 0.0, 0.0]), truth) == pytest.approx((0.08, 0.1))
    assert errors(torch.full((4,), math.nan), truth)[0] == math.inf
    assert errors(torch.tensor([3.0, -4.0, 1e30, math.nan]), truth)[0] == math.inf
    assert errors(torch.tensor([0.25]), torch.zeros(1)) == (0.25, 0.25)
    assert errors(torch.empty(0, 2), torch.empty(0, 2)) == (0.0, 0.0)
