"""The direction of one pass of made on every implementation that runs here, against its definition in fp64."""

import itertools

import pytest
import torch

import genkernels as gk
from genkernels import ops
from genkernels.ops.made import SCALE_MAPS, made_chain
from genkernels.reference.made import degree_mask, degrees_of
from tests.checks import assert_as_accurate, opcheck_backward
from tests.ops.test_made import GIVEN, NETWORKS, network

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16

OPERATOR = "made"
forward = pytest.mark.implementations(torch_op="made_forward")
compiled = pytest.mark.implementations(reference=False)


def chain(net, *, transforms=3, norms=0, **options):
    """`(tensors, the rest of the call)` of transforms of one kind one after the other, each with another order, and so
    many ActNorms."""
    cases = [network(**{**net, "order": order}, **options) for order in ("random", "natural", "reversed")[:transforms]]
    x, features = cases[0][0], net["features"]
    lists = {
        "contexts": [case[5]["context"] for case in cases if net.get("context")],
        "weights": [w for case in cases for w in case[1]],
        "biases": [b for case in cases for b in case[2]],
        "norms": [0.3 * torch.randn(features, dtype=F64).to(x.dtype).to(x.device) for _ in range(2 * norms)],
    }
    return {"x": x, **lists}, ([case[3] for case in cases], [case[4] for case in cases], net.get("residual", False))


def run(tensors, rest, scale_map=0, constant=1.0, grads=None):
    """Outputs and, given their gradients, all gradients, by name."""
    flat = {"x": tensors["x"]} | {f"{k} {i}": t for k, v in tensors.items() if k != "x" for i, t in enumerate(v)}
    leaves = {k: t.detach().clone().requires_grad_() for k, t in flat.items()}
    lists = [[leaves[f"{k} {i}"] for i in range(len(v))] for k, v in tensors.items() if k != "x"]
    z, ldj = made_chain(leaves["x"], *lists, *rest, scale_map, constant)
    found = {"z": z.detach(), "ldj": ldj.detach()}
    if grads is not None:
        pairs = [(o, g) for o, g in zip((z, ldj), grads, strict=True) if g is not None]
        options = {"allow_unused": True, "materialize_grads": True}
        got = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], **options)
        found |= {f"grad {name}": grad for name, grad in zip(leaves, got, strict=True)}
    return found


def widened(tensors):
    return {k: v.double() if k == "x" else [t.double() for t in v] for k, v in tensors.items()}


@forward
@compiled
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("norms", [0, 3, 4])
@pytest.mark.parametrize("net", NETWORKS, ids=range(len(NETWORKS)))
def test_transforms_and_their_gradients(implementation, device, poisoned_memory, net, norms, dtype):
    """With the gradients of both outputs, and with that of either alone."""
    tensors, rest = chain(net, norms=norms, dtype=dtype, device=device, scale=0.7)
    x = tensors["x"]
    grads = torch.randn_like(x), torch.randn(len(x), dtype=dtype, device=device)
    for some in GIVEN:
        given = [grad if wanted else None for grad, wanted in zip(grads, some, strict=True)]
        ours = run(tensors, rest, 1, grads=given)
        with gk.use_backend("reference"):
            same = run(tensors, rest, 1, grads=given)
            exact = run(widened(tensors), rest, 1, grads=[g if g is None else g.double() for g in given])
        for name, value in ours.items():
            if dtype == F64:  # both round
                torch.testing.assert_close(value, exact[name], rtol=1e-10, atol=1e-12, msg=name)
            else:  # three transforms on end
                assert_as_accurate(name, value, same[name], exact[name], 8)


@forward
@compiled
@pytest.mark.every_build
def test_wide_layers_lose_no_digits(implementation, device):
    """Sums over hundreds of units, of values and of gradients, are no further off than torch's own."""
    tensors, rest = chain({"features": 32, "hidden": (1024, 1024)}, transforms=1, dtype=F32, device=device, batch=32)
    grads = torch.randn_like(tensors["x"]), torch.randn(32, device=device)
    ours = run(tensors, rest, 1, grads=grads)
    with gk.use_backend("reference"):
        same = run(tensors, rest, 1, grads=grads)
        exact = run(widened(tensors), rest, 1, grads=[g.double() for g in grads])
    for name, value in ours.items():
        assert_as_accurate(name, value, same[name], exact[name])


@forward
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_one_transform_is_undone_by_the_inverse(implementation, device, scale_map, dtype):
    x, weights, biases, order, counts, options = network(
        9, (14, 15, 16), context=True, order="random", device=device, dtype=dtype, scale=0.5
    )
    z, ldj = ops.made_forward(x, weights, biases, order, counts, scale_map=scale_map, **options)
    assert z.dtype == dtype and ldj.dtype == torch.promote_types(dtype, F32)
    back, inverse_ldj = ops.made_inverse(z, weights, biases, order, counts, scale_map=scale_map, **options)
    tolerance = {F64: 1e-10, F32: 1e-3, BF16: 0.2}[dtype]
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_ldj, -ldj, rtol=tolerance, atol=tolerance)


@forward
@compiled
@pytest.mark.parametrize("net,norms", [(NETWORKS[2], 3), ({"features": 3, "hidden": (4, 5), "context": True}, 4)])
def test_gradcheck(implementation, device, net, norms):
    tensors, rest = chain(net | {"batch": 2}, transforms=2, norms=norms - 1, device=device)
    sizes = [len(v) for k, v in tensors.items() if k != "x"]
    leaves = [tensors["x"], *itertools.chain(*(v for k, v in tensors.items() if k != "x"))]
    leaves = [t.requires_grad_() for t in leaves]

    def function(x, *flat):
        flat = iter(flat)
        return made_chain(x, *([next(flat) for _ in range(n)] for n in sizes), *rest, 2, 0.7)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@forward
@compiled
def test_opcheck(functions, device):
    tensors, rest = chain({"features": 3, "hidden": (4, 5), "context": True}, transforms=2, norms=3, device=device)
    x, *lists = tensors.values()
    arguments = (*lists, *rest, 1, 1.0)
    _, _, kept = functions.made_forward(x, *arguments, True)
    for t in (x, *itertools.chain(*lists)):
        t.requires_grad_()
    torch.library.opcheck(functions.made_forward, (x, *arguments, True))
    for grads in ((x.detach(), None), (None, x[:, 0].detach().contiguous())):
        for by_layers in (True, False):
            opcheck_backward(functions.made_forward_backward, (*grads, x, kept, *arguments, by_layers))


@forward
@pytest.mark.parametrize("norms", [0, 4])
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(implementation, device, batch, norms):
    tensors, rest = chain({"features": 6, "hidden": (8, 9), "context": True}, norms=norms, batch=batch, device=device)
    grads = torch.ones_like(tensors["x"]), torch.ones(batch, dtype=F64, device=device)
    found = run(tensors, rest, grads=grads)
    with gk.use_backend("reference"):
        expected = run(tensors, rest, grads=grads)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.threads
@forward
@compiled
@pytest.mark.every_build
@pytest.mark.parametrize("batch", [77, 300])
def test_repeats_and_batches_give_the_same_bits(implementation, device, batch):
    tensors, rest = chain({"features": 40, "hidden": (50, 60)}, norms=4, batch=batch, dtype=F32, device=device)
    grads = torch.randn_like(tensors["x"]), torch.randn(batch, device=device)
    first, again = (run(tensors, rest, grads=grads) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        others = run(tensors, rest, grads=grads)
    finally:
        torch.set_num_threads(threads)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, others[name]), f"{name} by the number of threads"
    alone = run({**tensors, "x": tensors["x"][70:71]}, rest)
    assert torch.equal(alone["z"], first["z"][70:71]) and torch.equal(alone["ldj"], first["ldj"][70:71])


@forward
@compiled
def test_dead_weights_never_act_and_get_no_gradient(implementation, device):
    x, weights, biases, order, counts, _ = network(9, (14, 15), order="random", device=device)
    expected = ops.made_forward(x, weights, biases, order, counts)
    degrees = degrees_of(order, counts, (14, 15))
    outs = [*degrees[1:], degrees[0].repeat(2)]
    dead = [~degree_mask(i, o, k == 2) for k, (i, o) in enumerate(zip(degrees, outs, strict=False))]
    dirty = [w.masked_fill(mask, float("nan")).requires_grad_() for w, mask in zip(weights, dead, strict=True)]
    z, ldj = ops.made_forward(x, dirty, biases, order, counts)
    assert torch.equal(z, expected[0]) and torch.equal(ldj, expected[1])
    for grad, mask in zip(torch.autograd.grad(z.sum() + ldj.sum(), dirty), dead, strict=True):
        assert grad.isfinite().all() and not grad[mask].any() and grad[~mask].any()


@forward
def test_only_what_is_asked_for(implementation, device):
    """The gradient by x alone, with layers that ask for none; and of nothing at all."""
    x, weights, biases, order, counts, _ = network(5, (7, 8), device=device)
    z, ldj = ops.made_forward(x, weights, biases, order, counts)
    assert not z.requires_grad and not ldj.requires_grad
    by_x = torch.autograd.grad(ops.made_forward(x.requires_grad_(), weights, biases, order, counts)[0].sum(), x)[0]
    for w in weights:
        w.requires_grad_()
    again = torch.autograd.grad(ops.made_forward(x, weights, biases, order, counts)[0].sum(), [x, *weights])[0]
    assert torch.equal(by_x, again)


@pytest.mark.skipif(gk.backends.why_missing("cpu") is not None, reason="the CPU library is not built")
def test_the_kernel_addresses_nothing_by_a_wrong_plan():
    x, weights, biases, order, counts, _ = network(3, (4, 4))
    run = torch.ops.genkernels.made_forward.default
    with pytest.raises(RuntimeError, match="order must be a permutation of 0 to 2"):
        ops.made_forward(x, weights, biases, torch.tensor([0, 1, 3]), counts)
    with pytest.raises(RuntimeError, match="counts must ascend from 0 or more to the number of units"):
        ops.made_forward(x, weights, biases, order, torch.tensor([[0, 3, 2, 4], [0, 1, 2, 4]]))
    with pytest.raises(RuntimeError, match="a list must hold as many tensors for each transform, got 2 orders"):
        run(x, [], weights, biases, [], [order, order], [counts, counts], False, 0, 1.0, False)


@pytest.mark.parametrize(
    "changes,error,sentence",
    [
        ({"x": torch.zeros(3, dtype=F64)}, ValueError, r"made: x must be \[N, D\] with D at least 1, got \[3\]"),
        ({"x": torch.zeros(2, 3)}, TypeError, r"made: weights\[0\] must have the dtype of x, torch.float32, got"),
        ({"context": torch.zeros(5, 3, dtype=F64)}, ValueError, r"made: context must be \[N, H\] = \[5, 4\], got"),
        ({"scale_map": "additive"}, ValueError, "made: scale_map must be one of exp, sigmoid, tanh"),
    ],
)
def test_refusals(changes, error, sentence):
    x, weights, biases, order, counts, _ = network(3, (4, 5))
    call = {"x": x, "weights": weights, "biases": biases, "order": order, "counts": counts, **changes}
    with pytest.raises(error, match=sentence):
        ops.made_forward(**call)
