"""affine_coupling on a GPU: what only a device can show. Its values: tests/ops/test_affine_coupling.py."""

from __future__ import annotations

import importlib

import pytest
import torch

from genkernels import backends
from tests.checks import bits
from tests.ops.coupling import BF16, Case, Inputs, draw, run_all

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    """The torch operators of a backend by name, as attributes."""
    if reason := backends.why_missing(request.param):
        pytest.skip(reason)
    if request.param == "cuda":
        return torch.ops.genkernels_cuda
    return importlib.import_module("genkernels.triton.affine_coupling")


# ----------------------------------------------------------------------------------------------------------------------
# More than 2^31 elements: any offset that went through 32 bits lands elsewhere


def needs_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")


def windows(total: int, sample: int) -> torch.Tensor:
    """Flat indices around the places where things go wrong: the ends, 2^31, 2^32, the ends of halves and samples."""
    centres = [0, total - 1, 2**31, 2**32, *(k * sample // 2 for k in range(2 * (total // sample) + 1))]
    wanted = torch.cat([torch.arange(c - 600, c + 600) for c in centres])
    return wanted[(wanted >= 0) & (wanted < total)].unique().cuda()


def uniform(*shape: int) -> torch.Tensor:
    """bf16 in [0, 1): a sum of them cancels nothing, so that one in fp32 can be asked to be right to 1e-5."""
    return torch.empty(shape, dtype=BF16, device="cuda").uniform_()


@pytest.mark.parametrize("shape", [(3, 2, 358_000_000), (1, 2, 2**31 + 4096)], ids=str)
def test_forward_beyond_2_31_elements(kernels, shape):
    samples, _, half = shape
    total = samples * 2 * half
    needs_memory(4.2 * total * 2 / 2**30)
    x, params = uniform(*shape), uniform(*shape)
    z, ldj = kernels.affine_coupling(x, params, 0, 1.0, 0, 0, False, False)
    at = windows(total, 2 * half)
    n, r = at // (2 * half), at % (2 * half)
    moved, flat = r >= half, params.view(-1)
    scale_at = torch.where(
        moved, at - half, at
    )  # s stands where the pass-through half does, t where the moved one does
    expected = x.view(-1)[at].float() * flat[scale_at].float().exp() + flat[at].float()
    expected = torch.where(moved, expected, x.view(-1)[at].float()).to(BF16)
    found = z.view(-1)[at]
    off = (found.float() - expected.float()).abs() > 2**-7 * expected.float().abs()  # a unit in the last place
    assert not off.any(), f"{int(off.sum())} elements differ, the first at {int(at[off][0])} in sample {int(n[off][0])}"
    for k in range(samples):
        pieces = params[k, 0].split(2**26)
        truth = sum(piece.double().sum() for piece in pieces).item()
        assert ldj[k].item() == pytest.approx(truth, rel=1e-5)


def test_backward_beyond_2_31_elements(kernels):
    shape = samples, _, half = 3, 2, 358_000_000
    total = samples * 2 * half
    needs_memory(6.2 * total * 2 / 2**30)
    x, params, grad = uniform(*shape), uniform(*shape), uniform(*shape)
    grad_ldj = torch.tensor([1.0, 2.0, 3.0], device="cuda")
    codes = 0, 1.0, 0, 0, False
    grad_x, grad_params = kernels.affine_coupling_backward(grad, grad_ldj, x, params, *codes, False)
    at = windows(total, 2 * half)
    n, moved = at // (2 * half), at % (2 * half) >= half
    g, xs, ps = (t.view(-1) for t in (grad, x, params))
    other = torch.where(moved, at - half, at + half)
    scale = torch.where(moved, ps[other], ps[at]).float().exp()
    expected_x = torch.where(moved, g[at].float() * scale, g[at].float())
    # params' first row is s, whose element belongs to the moved x half a sample further on; its second row is t
    expected_s = g[other].float() * xs[other].float() * scale + grad_ldj[n]
    expected_params = torch.where(moved, g[at].float(), expected_s)
    for name, found, expected in (("grad_x", grad_x, expected_x), ("grad_params", grad_params, expected_params)):
        off = (found.view(-1)[at].float() - expected).abs() > 2**-7 * expected.abs()
        assert not off.any(), f"{name}: {int(off.sum())} differ, the first at {int(at[off][0])}"


# ----------------------------------------------------------------------------------------------------------------------
# Streams, graphs, devices


def test_runs_on_the_current_stream(kernels):
    """The inputs are written late on a side stream: a kernel on any other stream would read what was there before."""
    case = Case((64, 48, 32, 32))
    inputs = draw(case, "cuda")
    expected = run_all(kernels, case, inputs)
    stale = Inputs(*(torch.full_like(t, float("nan")) for t in inputs))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for t, values in zip(stale, inputs, strict=True):
            t.copy_(values, non_blocking=True)
        found = run_all(kernels, case, stale)
    side.synchronize()
    for name, value in found.items():
        assert torch.equal(bits(value), bits(expected[name])), name


@pytest.mark.parametrize("shape", [(8, 12, 32, 32), (8, 6)], ids=str)
def test_graph_capture(kernels, shape):
    """A captured graph replays on new inputs; a host synchronisation or an allocation outside torch's pool would
    fail."""
    case = Case(shape, scale_map="sigmoid")
    static, fresh = draw(case, "cuda", seed=1), draw(case, "cuda", seed=2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_all(kernels, case, static)  # loads modules, compiles Triton
    torch.cuda.current_stream().wait_stream(side)
    expected = run_all(kernels, case, fresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all(kernels, case, static)
    for t, values in zip(static, fresh, strict=True):
        t.copy_(values)
    for t in captured.values():
        t.fill_(float("nan"))
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for name, value in captured.items():
        assert torch.equal(bits(value), bits(expected[name])), name


def test_never_waits_for_the_device(kernels):
    case = Case((8, 12, 32, 32))
    inputs = draw(case, "cuda")
    run_all(kernels, case, inputs)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(kernels, case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one(kernels):
    case = Case((4, 12, 32, 32))
    first, second = draw(case, "cuda:0"), draw(case, "cuda:1")
    with torch.cuda.device(0):
        expected, found = run_all(kernels, case, first), run_all(kernels, case, second)
        assert torch.cuda.current_device() == 0
    for name, value in found.items():
        assert value.device == torch.device("cuda", 1)
        assert torch.equal(bits(value), bits(expected[name])), name
