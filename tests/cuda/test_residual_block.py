"""The CUDA kernels of log_det_series and invertible_residual against their definitions, one torch operator after the
other, over the paths that only they have; the public functions: tests/ops."""

from __future__ import annotations

import importlib
import os
import shutil

import pytest
import torch

from genkernels import backends
from genkernels._options import Nonlinearity
from genkernels.ops import _block_checks as block_checks
from tests.checks import bits
from tests.cuda import emulation
from tests.ops.blocks import block

series_ops = importlib.import_module("genkernels.ops.log_det_series")
series_reference = importlib.import_module("genkernels.reference.log_det_series")
inverse_reference = importlib.import_module("genkernels.reference.invertible_residual")

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
TOLERANCE = {FP64: 1e-11, FP32: 3e-5, BF16: 2e-2}
TERMS = [1.0, 1.0, 1.3, 1.9, 2.5]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """``(torch operators of an operator, device)``."""
    if request.param == "cuda":
        if reason := backends.why_missing("cuda"):
            pytest.skip(reason)
        return lambda operator: torch.ops.genkernels_cuda, "cuda"
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("there is no C++ compiler (g++) on PATH")
    return emulation.load, "cpu"


def draw(x, *lead, dtype=None, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, *x.shape, generator=generator, dtype=FP64).to(dtype or x.dtype)


def moved(values, device):
    return [
        [t.to(device) for t in v] if isinstance(v, list) else v.to(device) if v is not None else None for v in values
    ]


def assert_near(found, expected, dtype, tolerance=None):
    assert len(found) == len(expected)
    for i, (ours, its) in enumerate(zip(found, expected, strict=True)):
        assert (ours.dtype, ours.shape) == (its.dtype, its.shape), i
        if its.numel():
            size = max(its.double().abs().max().item(), 1e-30)
            error = (ours.cpu().double() - its.double()).abs().max().item() / size
            assert error < (tolerance or TOLERANCE[dtype]), f"output {i}: {error:.2e} of its largest"


CASES = [  # block, activation, samples, probes (0: none, the whole Jacobian), terms, exact first, dtype
    ("mlp", "lipswish", 4, 1, 3, False, FP64),
    ("mlp", "clipswish", 9, 3, 2, True, FP64),
    ("mlp", "clipswish", 2, 0, 0, False, FP64),
    ("mlp", "elu", 1, 1, 5, True, FP32),
    ("mlp", "silu", 3, 10, 2, False, FP64),  # probes of more columns than a block takes alone
    ("mlp", "lipswish", 0, 1, 2, False, FP64),
    ("two maps", "leaky_relu", 9, 1, 0, False, FP64),
    ("two maps", "tanh", 3, 0, 0, False, FP32),
    ("deep", "elu", 17, 3, 4, False, FP64),
    ("wide", "clipswish", 5, 1, 2, True, FP32),
    ("wide", "lipswish", 3, 1, 2, True, BF16),
    ("3-1-3", "clipswish", 3, 3, 2, True, FP64),
    ("3-1-3", "lipswish", 2, 1, 5, True, BF16),
    ("3-1-3", "elu", 2, 0, 0, False, FP64),
    ("3-3", "tanh", 3, 1, 3, False, FP64),
    ("3-3", "relu", 0, 3, 3, False, FP32),
    ("1-1-1", "leaky_relu", 3, 1, 2, True, FP64),
    ("3-1-3 of 2x2", "silu", 5, 3, 1, True, FP64),
    ("1-3-1 of one row", "clipswish", 3, 1, 4, False, FP64),
    ("large", "clipswish", 1, 1, 2, True, FP64),
    ("mlp of each", "silu", 3, 10, 2, False, FP64),
    ("mlp of each", "lipswish", 9, 1, 2, True, BF16),
    ("3-1-3 of each", "lipswish", 3, 1, 2, False, BF16),
]


@pytest.mark.parametrize("name, activation, samples, probes, terms, exact, dtype", CASES)
def test_log_det_series(device, name, activation, samples, probes, terms, exact, dtype):
    kernels, place = device[0]("log_det_series"), device[1]
    x, weights, biases, parameters = block(name, activation, samples, dtype=dtype)
    number, terms = int(Nonlinearity[activation.upper()]), TERMS[:terms]
    assert not exact or block_checks.takes_exact_first(weights, x.shape[2:])
    trace_map = series_reference.log_det_series_trace_map(weights, number) if exact else None
    vectors = draw(x, probes) if probes else None
    given = [x, weights, biases, parameters, trace_map, vectors]
    expected = series_reference.log_det_series(*given, terms, number)
    found = kernels.log_det_series(*moved(given, place), terms, number)
    assert_near(found, expected, dtype)
    sums, first = expected[2].contiguous(), terms[0] if terms else 0.0
    by_value, by_log_det = draw(x, seed=4), draw(expected[1], seed=5)
    for some in ((by_value, by_log_det), (None, by_log_det), (by_value, None)):
        given_back = [*some, *given, sums]
        found = kernels.log_det_series_backward(*moved(given_back, place), first, number)
        if samples:
            assert_near(found, series_reference.log_det_series_backward(*given_back, first, number), dtype)
        else:
            assert all((t == 0).all() for t in found[1:])


def test_more_terms_than_a_launch_takes(device):
    x, weights, biases, parameters = block("mlp", "lipswish", 3)
    given = [x, weights, biases, parameters, None, draw(x, 1)]
    terms = [1.0 + 0.01 * k for k in range(67)]
    expected = series_reference.log_det_series(*given, terms, int(Nonlinearity.LIPSWISH))
    found = device[0]("log_det_series").log_det_series(*moved(given, device[1]), terms, int(Nonlinearity.LIPSWISH))
    assert_near(found, expected, FP64)


SOLVES = [  # block, activation, samples, depth, dtype
    ("mlp", "lipswish", 4, 5, FP64),
    ("mlp", "clipswish", 9, 3, FP32),
    ("two maps", "elu", 3, 5, FP64),  # fewer features than steps are looked back on
    ("deep", "leaky_relu", 17, 0, FP64),
    ("wide", "silu", 3, 5, BF16),
    ("3-1-3", "clipswish", 3, 5, FP64),
    ("3-3", "tanh", 1, 1, FP64),
    ("1-1-1", "lipswish", 3, 5, FP32),
    ("1-3-1 of one row", "relu", 0, 5, FP64),
    ("large", "lipswish", 2, 5, FP64),
    ("mlp of each", "lipswish", 9, 5, BF16),
]


@pytest.mark.parametrize("name, activation, samples, depth, dtype", SOLVES)
def test_invertible_residual(device, name, activation, samples, depth, dtype):
    kernels, place = device[0]("invertible_residual"), device[1]
    y, weights, biases, parameters = block(name, activation, samples, dtype=dtype)
    number, exactly = int(Nonlinearity[activation.upper()]), dtype == FP64
    atol = 1e-9 if exactly else 1e-5
    given = [y, None, weights, biases, parameters]
    options = [0.0, atol, 100, depth, number]
    x, residual, iterations, converged = kernels.invertible_residual(*moved(given, place), *options)
    expected = inverse_reference.invertible_residual(*given, *options)
    assert torch.equal(converged.cpu(), expected[3])
    assert converged.all()
    assert ((iterations.cpu() - expected[2]).abs() <= (0 if exactly else 2)).all(), (iterations, expected[2])
    assert (residual <= atol).all()
    assert_near([x], expected[:1], dtype, tolerance=1e-6 if exactly else 3e-4 if dtype == FP32 else 2e-2)
    grad = draw(y, seed=7)
    given_back = [grad, expected[0], weights, biases, parameters]
    found = kernels.invertible_residual_backward(*moved(given_back, place), *options)
    if not samples:
        assert all((t == 0).all() for t in found[1:])
        return
    expected = inverse_reference.invertible_residual_backward(*given_back, *options)
    assert_near(found, expected, dtype, tolerance=1e-6 if exactly else 3e-4 if dtype == FP32 else 2e-2)


def test_samples_stop_by_themselves(device):
    """A NaN ends at once and spoils nobody; a start at the solution takes one iteration; a limit holds."""
    kernels, place = device[0]("invertible_residual"), device[1]
    y, weights, biases, parameters = block("3-1-3", "lipswish", 3)
    for dims in (4, 2):
        if dims == 2:
            y, weights, biases, parameters = block("mlp", "lipswish", 3)
        number = int(Nonlinearity.LIPSWISH)
        solution = inverse_reference.invertible_residual(
            y, None, weights, biases, parameters, 0.0, 1e-12, 200, 5, number
        )[0]
        y, start = y.clone(), y.clone()
        y[1].view(-1)[1] = float("nan")
        start[2] = solution[2]
        given = [y, start, weights, biases, parameters]
        for limit in (200, 3):
            expected = inverse_reference.invertible_residual(*given, 0.0, 1e-9, limit, 5, number)
            found = kernels.invertible_residual(*moved(given, place), 0.0, 1e-9, limit, 5, number)
            x, residual, iterations, converged = (t.cpu() for t in found)
            assert iterations.tolist() == expected[2].tolist() and iterations[1] == 1 and iterations[2] == 1
            assert converged.tolist() == expected[3].tolist() == [limit == 200, False, True]
            assert residual[1].isnan() and torch.allclose(residual[0], expected[1][0], rtol=1e-3)
            assert torch.allclose(x[[0, 2]], expected[0][[0, 2]], atol=1e-8)


def test_small_gradients_are_solved_as_well_as_large_ones(device):
    kernels, place = device[0]("invertible_residual"), device[1]
    x, weights, biases, parameters = block("mlp", "lipswish", 3)
    grad, options = draw(x), [0.0, 1e-5, 100, 5, int(Nonlinearity.LIPSWISH)]
    given = [1e-6 * grad, x, weights, biases, parameters]
    expected = inverse_reference.invertible_residual_backward(*given, *options)
    assert_near(kernels.invertible_residual_backward(*moved(given, place), *options), expected, FP64, tolerance=1e-4)


def everything(place, seed):
    """What both operators and their gradients give for an image block, and their inputs."""
    x, weights, biases, parameters = block("3-1-3", "clipswish", 3, device=place, dtype=FP32, seed=seed)
    vectors, number = draw(x.cpu(), 2, seed=seed).to(place), int(Nonlinearity.CLIPSWISH)
    grad, each = draw(x.cpu(), seed=seed + 1).to(place), torch.ones(3, device=place)
    trace_map = series_reference.log_det_series_trace_map(weights, number)
    inputs = [x, *weights, *biases, parameters, trace_map, vectors, grad, each]

    def call(series, inverse):
        out = series.log_det_series(x, weights, biases, parameters, trace_map, vectors, TERMS[:3], number)
        back = series.log_det_series_backward(
            grad, each, x, weights, biases, parameters, trace_map, vectors, out[2], 1.0, number
        )
        solved = inverse.invertible_residual(x, None, weights, biases, parameters, 0.0, 1e-5, 50, 5, number)
        solved_back = inverse.invertible_residual_backward(
            grad, solved[0], weights, biases, parameters, 0.0, 1e-5, 50, 5, number
        )
        return [*out, *back, *solved, *solved_back]

    return call, inputs


def test_the_same_bits_each_run(device):
    call, _ = everything(device[1], 0)
    kernels = [device[0](name) for name in ("log_det_series", "invertible_residual")]
    for i, (one, other) in enumerate(zip(call(*kernels), call(*kernels), strict=True)):
        assert torch.equal(
            bits(one) if one.is_floating_point() else one, bits(other) if other.is_floating_point() else other
        ), i


@pytest.mark.gpu
def test_graph_capture():
    """All four operators, the iteration too: none makes the host wait."""
    if reason := backends.why_missing("cuda"):
        pytest.skip(reason)
    kernels = [torch.ops.genkernels_cuda] * 2
    (call, inputs), (fresh, values) = everything("cuda", 1), everything("cuda", 2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*kernels)
    torch.cuda.current_stream().wait_stream(side)
    expected = fresh(*kernels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*kernels)
    for t, value in zip(inputs, values, strict=True):
        t.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for i, (value, other) in enumerate(zip(captured, expected, strict=True)):
        assert torch.equal(value, other), i
