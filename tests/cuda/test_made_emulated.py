"""The CUDA C++ kernels of made, compiled by g++ and run on the CPU, against the reference in fp64."""

from __future__ import annotations

import itertools
import shutil

import emulation
import pytest
import torch

from genkernels import reference
from genkernels.reference.made import plan

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

#: features, hidden, residual, context, batch: one feature; two blocks of samples; more units at once than warps; deep
#: dot products
NETWORKS = [
    (1, (3, 2), False, True, 2),
    (3, (4, 4, 4), True, True, 5),
    (5, (40,) * 5, True, False, 3),
    (5, (7, 12), False, False, 9),
    (9, (37, 70), False, True, 1),
]


@pytest.fixture(scope="module")
def kernels():
    return emulation.load("made")


def network(features, hidden, residual, context, batch, dtype):
    low = 0 if context or features == 1 else 1
    draw = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype)  # noqa: E731
    units = [torch.randint(low, max(features, low + 1), (h,)).sort().values for h in hidden]
    order, counts = plan([torch.randperm(features) + 1, *([units[0]] * len(hidden) if residual else units)])
    sizes = [features, *hidden, 2 * features]
    weights = [draw(m, n) * n**-0.5 for n, m in itertools.pairwise(sizes)]
    biases = [0.3 * draw(m) for m in sizes[1:]]
    return draw(batch, features), draw(batch, hidden[0]) if context else None, weights, biases, order, counts, residual


def wide(v):
    if isinstance(v, list):
        return [wide(t) for t in v]
    return v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v


def assert_close_to_oracle(ours, theirs, exact, what):
    for i, (a, b, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and a.is_contiguous(), (what, i)
        assert not a.isnan().any(), (what, i)
        error, allowed = ((t.double() - true).abs().max().item() for t in (a, b))
        assert error <= 2 * allowed + 16 * torch.finfo(a.dtype).eps * true.abs().max().item(), (what, i, error, allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale_map", [0, 1, 2])
@pytest.mark.parametrize("net", NETWORKS, ids=str)
def test_inverse_and_its_gradient(kernels, poisoned_memory, net, scale_map, dtype):
    z, *rest = network(*net, dtype)
    ours, theirs = (m.made_inverse(z, *rest, scale_map) for m in (kernels, reference))
    rest64 = [wide(v) for v in rest]
    assert_close_to_oracle(ours, theirs, reference.made_inverse(wide(z), *rest64, scale_map), "inverse")
    x = theirs[0].contiguous()
    grads = torch.randn_like(x), torch.randn_like(theirs[1])
    for given in (grads, (grads[0], None), (None, grads[1])):
        ours, theirs = (m.made_inverse_backward(*given, x, *rest, scale_map) for m in (kernels, reference))
        exact = reference.made_inverse_backward(
            *(None if g is None else wide(g) for g in given), wide(x), *rest64, scale_map
        )
        assert_close_to_oracle(ours, theirs, exact, "backward")


def test_dead_weights_never_act(kernels, poisoned_memory):
    z, context, weights, biases, order, counts, residual = network(6, (9, 11), False, False, 3, torch.float32)
    expected = kernels.made_inverse(z, context, weights, biases, order, counts, residual, 0)
    degrees = reference.made.degrees_of(order, counts, (9, 11))
    outs = [*degrees[1:], degrees[0].repeat(2)]
    dirty = [
        w.masked_fill(~reference.made.degree_mask(i, o, k == 2), float("nan"))
        for k, (w, i, o) in enumerate(zip(weights, degrees, outs, strict=True))
    ]
    for a, b in zip(kernels.made_inverse(z, context, dirty, biases, order, counts, residual, 0), expected, strict=True):
        assert torch.equal(a, b)


def test_empty_batch(kernels):
    z, *rest = network(4, (5, 6), False, True, 0, torch.float32)
    x, ldj = kernels.made_inverse(z, *rest, 0)
    assert x.shape == (0, 4) and ldj.shape == (0,)
    found = zip(*(m.made_inverse_backward(None, ldj, x, *rest, 0) for m in (kernels, reference)), strict=True)
    for ours, theirs in found:
        assert torch.equal(ours, theirs)


def test_a_wrong_plan_reads_nothing_outside(kernels):
    """Counts and order beyond what there is are cut; an access outside ends the process."""
    z, context, weights, biases, order, counts, residual = network(4, (5, 6), False, False, 3, torch.float32)
    beside = [[emulation.beside_forbidden_memory(t, True) for t in group] for group in (weights, biases)]
    for wrong_order, wrong_counts in ((order, counts + 3), (order, counts - 3), (order + 2, counts)):
        kernels.made_inverse(z, context, *beside, wrong_order, wrong_counts, residual, 0)


def test_too_many_layers_are_refused(kernels):
    z, *rest = network(2, (2,) * 17, False, False, 1, torch.float32)
    with pytest.raises(RuntimeError, match="the CUDA kernels take at most 16 hidden layers"):
        kernels.made_inverse(z, *rest, 0)
