"""affine_coupling on a GPU: Triton and CUDA C++ against the reference in fp64, and what only a device can show."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from coupling_checks import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    MAPS,
    REFERENCE,
    SPLITS,
    Case,
    Inputs,
    Kernels,
    bits,
    cases,
    check_batch,
    check_empty,
    check_extremes,
    check_missing_gradients,
    check_one_misaligned,
    check_pass_through,
    check_repeat,
    check_values,
    draw,
    run_all,
)

from genkernels import backends, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

#: Every pair of dtypes with exp, the main ones with every other map: each combination is a Triton compilation.
COMBINATIONS = [("exp", pair) for pair in DTYPES] + [
    (scale_map, (dtype, dtype)) for scale_map in ("sigmoid", "tanh", "additive") for dtype in (F64, F32, BF16)
]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if reason := backends.why_missing(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def kernels(backend):
    if backend == "cuda":
        home = torch.ops.genkernels_cuda
    else:
        home = importlib.import_module("genkernels.triton.affine_coupling")
    return Kernels(backend, "cuda", home.affine_coupling, home.affine_coupling_backward, home.affine_coupling_reverse)


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(("scale_map", "dtypes"), COMBINATIONS, ids=str)
def test_values(kernels, poisoned_memory, scale_map, dtypes):
    # Triton compiles five kernels a case: every fifth, which meets all shapes and options, each time others
    first, step = (COMBINATIONS.index((scale_map, dtypes)) % 5, 5) if kernels.name == "triton" else (0, 1)
    for case in itertools.islice(cases([scale_map], [dtypes]), first, None, step):
        check_values(kernels, case)


@pytest.mark.parametrize(
    "shape", [(16, 48, 32, 32), (3, 12, 129, 67), (2, 6, 256, 256), (4096, 64), (1, 2, 999_999)], ids=str
)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
def test_larger_tensors(kernels, poisoned_memory, shape, dtypes):
    for layout in ("halves", "interleaved"):
        check_values(kernels, Case(shape, "channel", "sigmoid", layout, dtypes=dtypes))
    if len(shape) == 4:
        check_values(kernels, Case(shape, "checkerboard", "tanh", "interleaved", flip=True, dtypes=dtypes))


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_misaligned_inputs(kernels, poisoned_memory, offset, split, dtypes):
    for layout in ("halves", "interleaved"):
        check_values(kernels, Case((2, 4, 12, 16), split, "exp", layout, dtypes=dtypes), offset)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_one_misaligned_input(kernels, poisoned_memory, dtypes):
    check_one_misaligned(kernels, Case((2, 4, 4, 8), dtypes=dtypes))


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("split", SPLITS)
def test_pass_through(kernels, poisoned_memory, scale_map, split):
    for dtypes in ((F64, F64), (F32, F32), (BF16, BF16)):
        for flip in (False, True):
            for shape in ((2, 4, 6, 8), (3, 2, 5, 3)):
                check_pass_through(kernels, Case(shape, split, scale_map, flip=flip, dtypes=dtypes))


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("split", SPLITS)
def test_missing_gradients(kernels, poisoned_memory, scale_map, split):
    for shape in ((2, 4, 6, 8), (3, 2, 5, 3)):
        check_missing_gradients(kernels, Case(shape, split, scale_map))


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_extremes(kernels, scale_map, split, dtype):
    check_extremes(kernels, Case((1, 2), split, scale_map, dtypes=(dtype, dtype)))


@pytest.mark.parametrize("shape", [(0, 4), (0, 2, 3, 3), (3, 0), (3, 4, 0), (3, 2, 0, 5)], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_empty(kernels, poisoned_memory, shape, split):
    if split == "checkerboard" and len(shape) != 4:
        pytest.skip("the checkerboard split takes images")
    check_empty(kernels, Case(shape, split))
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", [(70_000, 2), (1 << 20, 4), (66_001, 6)], ids=str)
def test_many_samples(kernels, poisoned_memory, shape):
    """More samples than a grid's second dimension holds."""
    check_values(kernels, Case(shape))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16)], ids=str)
def test_repeated_runs_agree(kernels, split, dtypes):
    check_repeat(kernels, Case((32, 12, 64, 64), split, "sigmoid", dtypes=dtypes), times=10)


def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch(kernels):
    if kernels.name != "cuda":
        pytest.skip("promised by the CUDA C++ kernels alone")
    for shape in ((3, 12, 24, 16), (130, 6), (5, 4, 3, 3)):
        check_batch(kernels, Case(shape))


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
    z, ldj = kernels.forward(x, params, MAPS["exp"], SPLITS["channel"], 0, False, False)
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
    codes = MAPS["exp"], SPLITS["channel"], 0, False
    grad_x, grad_params = kernels.backward(grad, grad_ldj, x, params, *codes, False)
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


# ----------------------------------------------------------------------------------------------------------------------
# Through the public functions


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("function", [ops.affine_coupling, ops.affine_coupling_inverse])
def test_gradcheck(backend, scale_map, split, function):
    case = Case((2, 4, 3, 3), split, scale_map, flip=True, dtypes=(F64, F64))
    x, params, _, _ = draw(case, "cuda")

    def call(x, params):
        return function(x, params, scale_map=scale_map, split=split, flip=True)

    with backends.use_backend(backend):
        leaves = x.requires_grad_(), params.requires_grad_()
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


def test_any_stride(backend):
    """Transposed and sliced inputs, an expanded incoming gradient: the values of their dense copies, bit for bit."""
    room = torch.randn(6, 5, 4, 20, device="cuda")
    x = room.transpose(1, 2)[:, :, :, ::2]  # [6, 4, 5, 10]
    params = torch.randn(6, 10, 5, 4, device="cuda").permute(0, 3, 2, 1)
    results = []
    with backends.use_backend(backend):
        for leaves in ((x, params), (x.contiguous(), params.contiguous())):
            leaves = [t.detach().requires_grad_() for t in leaves]
            z, ldj = ops.affine_coupling(*leaves, scale_map="tanh")
            (z.sum() + ldj.sum()).backward()
            results.append([z, ldj, *(t.grad for t in leaves)])
    for strided, dense in zip(*results, strict=True):
        assert torch.equal(strided, dense)


def test_autocast_pairs_fp32_inputs_with_half_params(backend):
    case = Case((4, 8, 6, 6), dtypes=(F32, BF16))
    x, params, _, _ = draw(case, "cuda")
    with backends.use_backend(backend), torch.autocast("cuda", dtype=BF16):
        z, ldj = ops.affine_coupling(x, params)
    assert z.dtype == F32 and ldj.dtype == F32
    truth, _ = REFERENCE.forward(x.cpu().double(), params.cpu().double(), *case.codes, False)
    torch.testing.assert_close(z.cpu().double(), truth, rtol=1e-5, atol=1e-5)
