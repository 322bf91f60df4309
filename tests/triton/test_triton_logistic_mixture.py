"""The Triton kernels of logistic_mixture against the reference and its fp64 oracle."""

import os

import pytest
import torch

from genkernels.reference import logistic_mixture as reference
from genkernels.triton import logistic_mixture as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (N, spatial, channels, components, levels): several programs a sample, odd sizes, one pixel, one component, many
# components
SHAPES = [
    (2, (9, 13), 3, 4, 256),
    (3, (150,), 1, 5, 16),
    (5, (), 3, 1, 2),
    (1, (10,), 1, 70, 1000),
    (2, (3, 4), 3, 10, 17),
]


def make(n, spatial, channels, mixtures, levels, dtype, device, spread=1.0):
    work = torch.float64 if dtype == torch.float64 else torch.float32
    params = torch.randn(n, mixtures * (3 if channels == 1 else 10), *spatial, dtype=torch.float64) * spread
    params[:, mixtures:].unflatten(1, (channels, -1, mixtures))[:, :, 1] -= 2.5
    index = torch.randint(-levels, 2 * levels, (n, channels, *spatial)).clamp(0, levels - 1)
    return params.to(device, dtype), (2 * index.double() / (levels - 1) - 1).to(device, work)


def assert_as_accurate(name, ours, same_dtype, exact, scale):
    units = 256 if ours.dtype == torch.float64 else 2
    if INTERPRETED and ours.dtype == torch.bfloat16:
        units = 3  # the interpreter cuts bf16 off where a GPU rounds to nearest
    assert (ours.dtype, ours.shape, ours.device) == (same_dtype.dtype, same_dtype.shape, same_dtype.device), name
    assert not ours.isnan().any(), name
    error = (ours.double() - exact).abs()
    allowed = 2 * (same_dtype.double() - exact).abs().amax() + units * torch.finfo(ours.dtype).eps * scale
    assert (error <= allowed).all(), f"{name}: error {error.max():.3e} beyond {allowed:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(device, poisoned, shape, dtype):
    levels = shape[-1]
    for spread in (0.5, 3.0):
        params, x = make(*shape, dtype, device, spread)
        grad = torch.randn(shape[0], dtype=x.dtype, device=device)
        before = [t.clone() for t in (params, x, grad)]
        exact = reference.logistic_mixture_nll(params.double(), x.double(), levels)
        same = reference.logistic_mixture_nll(params, x, levels)
        assert_as_accurate("nll", kernels.logistic_mixture_nll(params, x, levels), same, exact, exact.abs().max())
        exact = reference.logistic_mixture_nll_backward(grad.double(), params.double(), x.double(), levels)
        same = reference.logistic_mixture_nll_backward(grad, params, x, levels)
        ours = kernels.logistic_mixture_nll_backward(grad, params, x, levels)
        assert ours.is_contiguous()
        for name, part in {"logits": slice(shape[3]), "rest": slice(shape[3], None)}.items():
            values = [t[:, part] for t in (ours, same, exact)]
            assert_as_accurate(f"gradient of {name}", *values, values[2].abs().max())
        assert all(torch.equal(a, b) for a, b in zip((params, x, grad), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("levels", "trials"), [(2, 6), (17, 1)])
def test_the_bins_add_up_to_one_and_gradients_are_finite(device, levels, trials, dtype):
    """A program a level: the interpreter is slow, the CPU's tests take more trials."""
    mixtures = 4
    params = torch.randn(trials, 3 * mixtures, dtype=torch.float64)
    params[::2, :mixtures] *= 25
    params[:, mixtures : 2 * mixtures] *= torch.tensor([0.5, 3.0, 1e3]).repeat(4)[:trials, None]
    params[:, 2 * mixtures :] = torch.rand(trials, mixtures) * 18 - 8
    params = params.to(device, dtype).repeat_interleave(levels, 0)
    x = (2 * torch.arange(levels).double() / (levels - 1) - 1).to(device, dtype).repeat(trials).reshape(-1, 1)
    nll = kernels.logistic_mixture_nll(params, x, levels)
    total = (-nll.double()).exp().reshape(trials, levels).sum(1)
    assert (total - 1).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-13)
    assert kernels.logistic_mixture_nll_backward(torch.ones_like(nll), params, x, levels).isfinite().all()


def test_a_nan_anywhere_makes_its_sample_nan_and_no_other(device):
    for row in range(10):
        params, x = make(3, (2, 3), 3, 2, 256, torch.float32, device)
        params[1, 2 * row + 1, 1, 1] = float("nan")
        x[1, :, 1, 1] = (-1.0, 1.0, 7 / 255)[row % 3]
        assert kernels.logistic_mixture_nll(params, x, 256).isnan().tolist() == [False, True, False]
    x[2, 1, 0, 0] = float("nan")
    assert kernels.logistic_mixture_nll(params, x, 256).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_tensors(device, shape):
    params, x = make(shape[0], shape[1:], 3, 2, 256, torch.float32, device)
    assert torch.equal(kernels.logistic_mixture_nll(params, x, 256), torch.zeros(shape[0], device=device))
    grad = torch.ones(shape[0], device=device)
    assert kernels.logistic_mixture_nll_backward(grad, params, x, 256).shape == params.shape
    noise = torch.rand(shape[0], 4, *shape[1:], device=device)
    assert kernels.logistic_mixture_sample(params, noise, 256, 1.0).shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_draws_are_the_references(device, temperature, dtype):
    """Where the noise lies within a rounding of a boundary the integer may be the neighbour; none is here, one of a
    thousand may be elsewhere."""
    differing = count = 0
    for n, spatial, channels, mixtures, levels in SHAPES:
        params, x = make(n, spatial, channels, mixtures, levels, dtype, device)
        noise = torch.rand(n, 1 + channels, *spatial, dtype=x.dtype, device=device)
        ours = kernels.logistic_mixture_sample(params, noise, levels, temperature)
        theirs = reference.logistic_mixture_sample(params, noise, levels, temperature)
        assert ours.dtype == torch.int64 and ours.shape == x.shape
        differing += (ours != theirs).sum().item()
        count += ours.numel()
    assert count > 1000 and differing <= (0 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("which", [0, 2])
def test_a_nan_logit_takes_the_first_component(device, which, temperature):
    params, _ = make(2, (3, 5), 1, 4, 17, torch.float32, device)
    noise = torch.rand(2, 2, 3, 5, device=device)
    params[:, which] = float("nan")
    ours = kernels.logistic_mixture_sample(params, noise, 17, temperature)
    assert torch.equal(ours, reference.logistic_mixture_sample(params, noise, 17, temperature))


def test_bitwise_the_same_from_run_to_run(device):
    params, x = make(2, (11, 13), 3, 7, 256, torch.float32, device)
    grad = torch.randn(2, device=device)
    for call in (
        lambda: kernels.logistic_mixture_nll(params, x, 256),
        lambda: kernels.logistic_mixture_nll_backward(grad, params, x, 256),
    ):
        assert torch.equal(call(), call())
