"""spectral_norm on a GPU: what only a device can show. Its values: tests/ops/test_spectral_norm.py."""

from __future__ import annotations

import importlib

import pytest
import torch

from genkernels import backends
from genkernels.reference import spectral_norm as reference
from tests.checks import bits
from tests.ops.test_spectral_norm import LARGE, THIN, make

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    """The torch operators of a backend by name, as attributes."""
    if reason := backends.why_missing(request.param):
        pytest.skip(reason)
    if request.param == "cuda":
        return torch.ops.genkernels_cuda
    return importlib.import_module("genkernels.triton.spectral_norm")


def inputs(seed=0, cases=THIN + LARGE):
    weights, u, v, geometries = make(cases, torch.float32, "cuda", seed)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(w.shape, generator=generator).cuda() for w in weights]
    return weights, u, v, grads, reference.as_plan(geometries)


def run(kernels, weights, u, v, grads, plan):
    """Everything that two iterations and the gradient at their end give."""
    out = kernels.spectral_norm(weights, u, v, plan, 2, 0.9, True)
    count = len(weights)
    left, right, sigma = out[count : 2 * count], out[2 * count : 3 * count], out[-1]
    return [*out, *kernels.spectral_norm_backward(grads, sigma / 3, weights, left, right, sigma, plan, 0.9, True)]


def test_graph_capture(kernels):
    """A captured graph replays on new inputs, however often addresses and sizes were needed elsewhere meanwhile."""
    static, fresh = inputs(1), inputs(2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(kernels, *static)  # loads modules, compiles Triton, makes its table of sizes
    torch.cuda.current_stream().wait_stream(side)
    expected = run(kernels, *fresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(kernels, *static)
    for some, values in zip(static[:-1], fresh[:-1], strict=True):
        for t, value in zip(some, values, strict=True):
            t.copy_(value)
    for t in captured:
        t.fill_(float("nan"))
    run(kernels, *inputs(3, THIN))
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for i, (value, other) in enumerate(zip(captured, expected, strict=True)):
        assert torch.equal(bits(value), bits(other)), i


def test_never_waits_for_the_device(kernels):
    given = inputs(cases=THIN)
    run(kernels, *given)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(kernels, *given)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_runs_on_the_current_stream(kernels):
    """The weights are written late on a side stream: a kernel on any other stream would read what was there before."""
    weights, u, v, grads, plan = inputs()
    expected = run(kernels, weights, u, v, grads, plan)
    stale = [torch.full_like(w, float("nan")) for w in weights]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for t, values in zip(stale, weights, strict=True):
            t.copy_(values, non_blocking=True)
        found = run(kernels, stale, u, v, grads, plan)
    side.synchronize()
    for i, (value, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(bits(value), bits(other)), i


def test_launches_are_three_whatever_the_layers(kernels):
    given = inputs(cases=THIN * 4)
    run(kernels, *given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = kernels.spectral_norm(*given[:3], given[-1], 1, 1.0, False)
        kernels.spectral_norm_backward(given[3], None, *given[:1], *given[1:3], out[-1], given[-1], 1.0, False)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if "spectral" in e.name or "_kernel" in e.name]
    assert len(names) == 5, names
