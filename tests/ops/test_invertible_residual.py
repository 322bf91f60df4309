"""invertible_residual on every implementation that runs here, against its definition in fp64 and unrolled autograd."""

import pytest
import torch

import genkernels as gk
from genkernels import ops
from tests.checks import bits, pairwise
from tests.ops.blocks import ACTIVATIONS, OF_EACH, SHAPES, block, network

F64, F32 = torch.float64, torch.float32
quick = pytest.mark.implementations(slow=False)
THIN = ["mlp", "deep", "3-1-3 of 2x2"]
#: What Triton's interpreter takes in a few seconds each: a fully connected block and an image.
INTERPRETED = [("mlp", "clipswish"), ("3-1-3 of 2x2", "lipswish")]


def thin(implementation, name, activation):
    if not implementation.is_slow or (name, activation) in OF_EACH:
        return True
    return (name, activation) in INTERPRETED if implementation.is_interpreted else name in THIN


def sample(device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    y, weights, biases, parameters = block("first of each", "lipswish", device=device, dtype=dtype)
    count = len(weights)

    def function(y, *rest):
        return (ops.invertible_residual(y, rest[:count], rest[count:-1], "lipswish", rest[-1], atol=1e-12).x,)

    return function, (y, *weights, *biases, parameters)


SAMPLES = {"invertible_residual": sample}


def made(name, activation, **options):
    """``(x, y, weights, biases, parameters)`` with y = x + g(x)."""
    x, weights, biases, parameters = block(name, activation, **options)
    return x, x + network(weights, biases, activation, parameters)(x), weights, biases, parameters


@pytest.mark.implementations(when=thin)
@pytest.mark.every_build
@pytest.mark.parametrize(("name", "activation"), pairwise(list(SHAPES), ACTIVATIONS))
def test_gives_back_what_went_in(implementation, device, name, activation):
    x, y, *rest = made(name, activation, norm=0.95, samples=5, device=device)
    weights, biases, parameters = rest
    found = ops.invertible_residual(y, weights, biases, activation, parameters, atol=1e-10)
    assert found.converged.all()
    torch.testing.assert_close(found.x, x, rtol=0, atol=1e-7)
    left = (y - found.x - network(weights, biases, activation, parameters)(found.x)).flatten(1).abs().amax(1)
    torch.testing.assert_close(found.residual, left, rtol=0, atol=1e-13)
    with gk.use_backend("reference"):
        expected = ops.invertible_residual(y, weights, biases, activation, parameters, atol=1e-10)
    torch.testing.assert_close(found.iterations, expected.iterations)


@quick
@pytest.mark.parametrize("depth", [0, 2, 5])
@pytest.mark.parametrize("norm", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("name", ["mlp", "3-1-3 of 2x2", "3-1-3"])
def test_every_sample_has_the_residual_that_was_asked_for(implementation, device, name, norm, depth):
    _, y, weights, biases, parameters = made(name, "lipswish", norm=norm, samples=50, device=device, dtype=F32)
    y = y * torch.linspace(0.1, 30, 50, device=device).view(-1, *[1] * (y.dim() - 1))
    found = ops.invertible_residual(
        y, weights, biases, "lipswish", parameters, atol=1e-5, rtol=1e-6, depth=depth, max_iterations=1000
    )
    left = (y.double() - found.x.double()).flatten(1)
    g = network([w.double() for w in weights], [b.double() for b in biases], "lipswish", parameters.double())
    left = (left - g(found.x.double()).flatten(1)).abs().amax(1)
    limit = 1e-5 + 1e-6 * y.flatten(1).abs().amax(1)
    assert found.converged.all() and (left <= 1.5 * limit + 1e-6).all()
    assert found.iterations.min() >= 1


@quick
def test_samples_stop_by_themselves(implementation, device):
    """A sample's numbers are those that it has alone; one that is NaN ends at once and stalls none."""
    x, y, weights, biases, parameters = made("wide", "elu", norm=0.97, samples=60, device=device, dtype=F32)
    y[7] = float("nan")
    start = torch.cat([x[:30], y[30:]])  # half of them begin where they end
    found = ops.invertible_residual(y, weights, biases, "elu", parameters, start=start, atol=1e-5)
    ended = torch.ones(60, dtype=torch.bool, device=device)
    ended[7] = False
    assert torch.equal(found.converged, ended) and found.iterations[7] == 1 and found.residual[7].isnan()
    assert found.iterations[:7].max() <= 2 < found.iterations[30:].min()
    if implementation.name != "cpu":
        return
    for i in (0, 31, 59):
        at = slice(i, i + 1)
        alone = ops.invertible_residual(y[at], weights, biases, "elu", parameters, start=start[at], atol=1e-5)
        assert torch.equal(bits(alone.x[0]), bits(found.x[i])) and alone.iterations[0] == found.iterations[i]


@quick
def test_what_did_not_converge_says_so_and_gives_its_best(implementation, device):
    _, y, weights, biases, parameters = made("mlp", "lipswish", norm=0.97, samples=9, device=device)
    found = ops.invertible_residual(y, weights, biases, "lipswish", parameters, atol=1e-14, max_iterations=3)
    assert not found.converged.any() and (found.iterations == 3).all()
    g = network(weights, biases, "lipswish", parameters)
    torch.testing.assert_close(found.residual, (y - found.x - g(found.x)).flatten(1).abs().amax(1), rtol=0, atol=1e-13)


@pytest.mark.implementations(when=thin)
@pytest.mark.every_build
@pytest.mark.parametrize(
    ("name", "activation"), pairwise(["mlp", "deep", "two maps", "3-1-3 of 2x2", "3-1-3", "3-3"], ACTIVATIONS) + OF_EACH
)
def test_the_gradient_is_that_of_the_unrolled_iteration(implementation, device, name, activation):
    _, y, weights, biases, parameters = made(name, activation, norm=0.8, samples=3, device=device)
    leaves = [t.detach().requires_grad_() for t in (y, *weights, *biases, parameters)]
    count = len(weights)
    parts = leaves[1 : 1 + count], leaves[1 + count : -1], activation, leaves[-1]
    found = ops.invertible_residual(leaves[0], *parts, atol=1e-11)
    g = network(*parts)
    unrolled = leaves[0]
    for _ in range(150):
        unrolled = leaves[0] - g(unrolled)
    torch.testing.assert_close(found.x, unrolled, rtol=0, atol=1e-9)
    by = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=F64).to(device)
    ours = torch.autograd.grad((found.x * by).sum(), leaves, allow_unused=True, retain_graph=True)
    expected = torch.autograd.grad((unrolled * by).sum(), leaves, allow_unused=True)
    for a, b, leaf in zip(ours, expected, leaves, strict=True):
        a, b = (torch.zeros_like(leaf) if grad is None else grad for grad in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    # a loss that is a mean over many is as small as it likes to be
    (small,) = torch.autograd.grad((found.x * (1e-9 * by)).sum(), leaves[0], retain_graph=True)
    torch.testing.assert_close(small * 1e9, expected[0], rtol=1e-5, atol=1e-7)


@quick
@pytest.mark.parametrize("name", ["mlp", "mlp of each"])
def test_many_samples_of_many_speeds(implementation, device, name):
    """More than a tile, some of which go on long after the others: forward, and the transposed equation."""
    y, weights, biases, parameters = block(name, "relu", norm=0.99, samples=300, device=device)
    y = y * torch.linspace(0.01, 20, 300, device=device)[:, None].double()
    leaves = [t.detach().requires_grad_() for t in (y, *weights)]
    found = ops.invertible_residual(leaves[0], leaves[1:], biases, "relu", parameters, atol=1e-9)
    assert found.converged.all() and found.iterations.unique().numel() > 1
    by = torch.linspace(-1, 1, y.numel(), dtype=F64, device=device).view_as(y)
    ours = torch.autograd.grad((found.x * by).sum(), leaves)
    with gk.use_backend("reference"):
        again = ops.invertible_residual(leaves[0], leaves[1:], biases, "relu", parameters, atol=1e-9)
        expected = torch.autograd.grad((again.x * by).sum(), leaves)
    torch.testing.assert_close(found.x, again.x, rtol=0, atol=1e-7)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)


@quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_fp32(implementation, device, dtype):
    _, y, weights, biases, parameters = made("mlp", "tanh", samples=6, device=device)
    y, parameters = y.to(dtype), parameters.to(dtype)
    weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    found = ops.invertible_residual(y, weights, biases, "tanh", parameters)
    wide = ops.invertible_residual(y.float(), [w.float() for w in weights], [b.float() for b in biases], "tanh")
    torch.testing.assert_close(found.x, wide.x.to(dtype))
    assert found.residual.dtype == F32 and found.converged.all()


@quick
@pytest.mark.parametrize("name", ["mlp", "3-1-3"])
def test_no_samples(implementation, device, name):
    y, weights, biases, parameters = block(name, samples=0, device=device)
    leaves = [t.detach().requires_grad_() for t in (y, *weights)]
    found = ops.invertible_residual(leaves[0], leaves[1:], biases, "lipswish", parameters)
    assert [t.shape for t in found] == [y.shape, (0,), (0,), (0,)]
    grads = torch.autograd.grad(found.x.sum(), leaves, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rtol": -1.0}, "rtol must be a finite number, 0 or more, got -1.0"),
        ({"depth": 6}, "depth must be an integer from 0 to 5, got 6"),
        ({"max_iterations": 0}, "max_iterations must be an integer of at least 1, got 0"),
        ({"start": torch.zeros(3, 5, dtype=F64)}, r"start must be like y = \[4, 5\], got \[3, 5\]"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"biases": [None]}, "biases must be as many as weights, 3, got 1"),
    ],
)
def test_says_what_is_wrong(change, sentence):
    y, weights, biases, parameters = block("mlp")
    given = {"y": y, "weights": weights, "biases": biases, "parameters": parameters} | change
    with pytest.raises((ValueError, TypeError), match=f"invertible_residual: .*{sentence}"):
        ops.invertible_residual(**given)
