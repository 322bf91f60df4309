"""The Triton kernels of made against the reference and its fp64 oracle."""

import itertools

import pytest
import torch

from genkernels.reference import made as reference
from genkernels.reference.made import plan
from genkernels.triton import made as kernels

#: features, hidden, residual, context, batch: one feature, several units a degree, more units at once than a tile, two
#: programs
NETWORKS = [
    (1, (3, 2), False, True, 2),
    (3, (4, 4, 4), True, True, 5),
    (5, (7, 12), False, False, 3),
    (6, (30,), False, True, 1),
]


def network(features, hidden, residual, context, batch, dtype, device):
    low = 0 if context or features == 1 else 1
    draw = lambda *s: torch.randn(s, dtype=torch.float64).to(device, dtype)  # noqa: E731
    units = [torch.randint(low, max(features, low + 1), (h,)).sort().values for h in hidden]
    order, counts = plan([torch.randperm(features) + 1, *([units[0]] * len(hidden) if residual else units)])
    sizes = [features, *hidden, 2 * features]
    weights = [draw(m, n) * n**-0.5 for n, m in itertools.pairwise(sizes)]
    biases = [0.3 * draw(m) for m in sizes[1:]]
    added = draw(batch, hidden[0]) if context else None
    return draw(batch, features), added, weights, biases, order.to(device), counts.to(device), residual


def wide(v):
    if isinstance(v, list):
        return [wide(t) for t in v]
    return (
        v.double().cpu()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v.cpu()
        if isinstance(v, torch.Tensor)
        else v
    )


def assert_close_to_oracle(ours, theirs, exact, what):
    for i, (a, b, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and a.is_contiguous(), (what, i)
        if not true.numel():
            continue
        error, allowed = ((t.double().cpu() - true).abs().max().item() for t in (a, b))
        assert error <= 2 * allowed + 16 * torch.finfo(a.dtype).eps * true.abs().max().item(), (what, i, error, allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale_map", [0, 1, 2])
@pytest.mark.parametrize("net", NETWORKS, ids=str)
def test_inverse_and_its_gradient(device, poisoned, net, scale_map, dtype):
    z, *rest = network(*net, dtype, device)
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


def test_empty_batch(device):
    z, *rest = network(4, (5, 6), False, True, 0, torch.float32, device)
    x, ldj = kernels.made_inverse(z, *rest, 0)
    assert x.shape == (0, 4) and ldj.shape == (0,)
    for ours, theirs in zip(
        *(m.made_inverse_backward(None, ldj, x, *rest, 0) for m in (kernels, reference)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_repeats_give_the_same_bits(device):
    z, *rest = network(5, (9, 8), False, False, 6, torch.float32, device)
    for a, b in zip(*(kernels.made_inverse(z, *rest, 2) for _ in range(2)), strict=True):
        assert torch.equal(a, b)
