"""MaskedLinear, MADE, MAF and IAF: who sees whom by the fp64 Jacobian, inverses, gradients, state, refusals."""

import copy
import itertools

import pytest
import torch

import genkernels as gk
from genkernels import nn as gnn
from genkernels.nn import MADE, AutoregressiveTransform, InverseAutoregressiveTransform, MaskedLinear
from tests.nn.flow_checks import brute_log_det, perturb

ORDERS = ["natural", "reversed", "random"]
#: features, hidden, residual: plenty of units, fewer than D − 1, several depths, D = 1 and 2
NETWORKS = [
    (6, (17, 11), False),
    (6, 13, True),
    (9, (4, 6, 3), False),
    (5, 1, False),
    (1, (3, 2), False),
    (1, 4, True),
    (2, (5,), False),
    (70, (150, 90), False),
]


def network(features, hidden, residual, order="natural", context=0, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    if context and features > 1 and hidden == 1:
        hidden = 2
    made = MADE(
        features, hidden, residual=residual, order=order, context_features=context, generator=generator, **options
    )
    return perturb(made.double(), 0.25 if features < 50 else 0.05, seed)


def may_see(made):
    """``[D, D]`` bool from the degrees alone: paths through live weights exist."""
    reach = None
    for layer in made.layers:
        mask = layer.mask.double()
        reach = mask if reach is None else ((mask @ reach) > 0).double()
    return reach.view(made.params_per_feature, made.features, made.features) > 0


def jacobian(function, x):
    return torch.autograd.functional.jacobian(function, x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("features,hidden,residual", NETWORKS)
def test_made_sees_exactly_the_features_before(features, hidden, residual, order, train):
    made = network(features, hidden, residual, order, params_per_feature=3).train(train)
    with torch.no_grad():
        for layer in made.layers:  # all paths alive: no unit sleeps, no two paths cancel
            layer.weight.abs_()
            layer.bias.abs_()
    found = jacobian(made, torch.rand(1, features, dtype=torch.float64)).view(3, features, features) != 0
    position = torch.argsort(made.order)
    before = position.unsqueeze(1) > position.unsqueeze(0)
    assert torch.equal(found, may_see(made))
    assert not (found & ~before).any()
    least = min(made.hidden_features)
    if least >= features - 1:
        assert torch.equal(found, before.expand_as(found)), "an allowed dependency is missing"
    elif features > 1:
        last = int(made.order[-1])
        assert found[:, last].any(1).all() and found[:, int(made.order[1]), int(made.order[0])].all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("features,hidden,residual", NETWORKS)
def test_context_reaches_every_output(features, hidden, residual, order):
    made = network(features, hidden, residual, order, context=2)
    with torch.no_grad():
        for p in made.parameters():
            p.abs_()
    x, context = torch.rand(1, features, dtype=torch.float64), torch.rand(1, 2, dtype=torch.float64)
    assert (jacobian(lambda c: made(x, c), context).view(2 * features, 2) != 0).all()
    assert torch.equal(jacobian(lambda v: made(v, context), x).view(2, features, features) != 0, may_see(made))


@pytest.mark.parametrize("strict", [True, False])
def test_masked_linear_sees_by_degree(strict):
    into, out = torch.randint(1, 6, (7,)), torch.cat([torch.tensor([6, 2]), torch.randint(2, 6, (7,))])
    into[3] = 1
    layer = MaskedLinear(7, 9, into, out, strict=strict).double()
    torch.nn.init.normal_(layer.weight)
    live = out[:, None] > into if strict else out[:, None] >= into
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer.mask, live)
    assert torch.equal(jacobian(lambda v: layer(v[None])[0], x[0].detach()) != 0, live)
    plain = torch.nn.functional.linear(x, layer.weight * live, layer.bias)
    torch.testing.assert_close(layer(x), plain)
    layer(x).square().sum().backward()
    assert (layer.weight.grad[~live] == 0).all() and (layer.weight.grad[live] != 0).all()


def test_masked_linear_is_a_plain_linear():
    layer, plain = MaskedLinear(3, 4, [1, 2, 3], [1, 1, 2, 3]), torch.nn.Linear(3, 4)
    assert isinstance(layer, torch.nn.Linear)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert (layer.weight[~layer.mask] == 0).all()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, plain.weight * layer.mask, plain.bias))
    assert layer(torch.randn(2, 5, 3)).shape == (2, 5, 4)
    assert MaskedLinear(3, 4, [1, 2, 3], [1, 1, 2, 3], bias=False)(x).shape == (5, 4)


@pytest.mark.parametrize("flow", [AutoregressiveTransform, InverseAutoregressiveTransform])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh"])
@pytest.mark.parametrize("method", ["blocked", "jacobi", "sequential"])
@pytest.mark.parametrize("features,hidden,residual", NETWORKS)
@torch.no_grad()
def test_inverse_undoes_forward(features, hidden, residual, method, scale_map, flow):
    if features > 50 and (scale_map, method) not in (("exp", "blocked"), ("tanh", "jacobi")):
        return  # as long as it is only to be seen that several blocks work
    for order, context in zip(ORDERS, (0, 2, 0), strict=True):
        layer = flow(network(features, hidden, residual, order, context), scale_map, method)
        for batch in (0, 1, 3):
            x = torch.randn(batch, features, dtype=torch.float64)
            c = torch.randn(batch, context, dtype=torch.float64) if context else None
            z, ldj = layer(x, c)
            back, inverse_ldj = layer.inverse(z, c)
            assert z.shape == x.shape and ldj.shape == inverse_ldj.shape == (batch,)
            torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(inverse_ldj, -ldj, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("flow", [AutoregressiveTransform, InverseAutoregressiveTransform])
@pytest.mark.parametrize("order", ORDERS)
def test_flows_are_triangular_and_their_log_det_is_right(order, flow, train):
    layer = flow(network(6, 13, True, order, context=2), "sigmoid").train(train)
    x, c = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    for way in (layer.forward, layer.inverse):
        for i in range(3):
            expected = brute_log_det(lambda v, i=i, way=way: way(v, c[i : i + 1])[0], x[i : i + 1])
            torch.testing.assert_close(way(x, c)[1][i : i + 1], expected)
        j = jacobian(lambda v, way=way: way(v, c[:1])[0], x[:1])[0, :, 0]
        sorted_j = j[layer.made.order][:, layer.made.order]
        assert (sorted_j.triu(1) == 0).all() and (sorted_j.diagonal() > 0).all()


@pytest.mark.parametrize("method", ["blocked", "jacobi", "sequential"])
@pytest.mark.parametrize("scale_map,seed", [("exp", 0), ("sigmoid", 1), ("tanh", 2)])
@pytest.mark.parametrize(
    "features,hidden,residual", [(7, 19, False), (7, 19, True), (1, (3, 2), False), (9, (4, 6, 3), False)]
)
def test_gradients_of_the_inverse_are_those_through_all_passes(features, hidden, residual, scale_map, method, seed):
    """To second order, by every weight, every bias, the context and z."""
    layer = AutoregressiveTransform(network(features, hidden, residual, "random", 2, seed), scale_map, method)
    rng = torch.Generator().manual_seed(seed)
    z, c = (torch.randn(4, n, dtype=torch.float64, generator=rng).requires_grad_() for n in (features, 2))
    leaves = [z, c, *layer.parameters()]
    log_scale = {"exp": lambda s: s, "sigmoid": lambda s: torch.log(torch.sigmoid(s + 2)), "tanh": torch.tanh}[
        scale_map
    ]

    def passes():
        x = torch.zeros_like(z)
        for _ in range(features):
            s, t = layer.made(x, c).chunk(2, 1)
            x = (z - t) * torch.exp(-log_scale(s))
        return x, -log_scale(s).sum(1)

    def grads(outputs, **options):
        x, ldj = outputs
        return torch.autograd.grad((x.sin() * ldj.unsqueeze(1)).sum() + ldj.square().sum(), leaves, **options)

    def second(outputs):
        first = grads(outputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    got, expected = grads(layer.inverse(z, c)), grads(passes())
    for ours, theirs in zip((*got, *second(layer.inverse(z, c))), (*expected, *second(passes())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * max(1, theirs.abs().max().item()))
    masks = [m.mask for m in layer.made.layers]
    by_weight = [g for g, p in zip(got[2:], layer.parameters(), strict=True) if p.dim() == 2][: len(masks)]
    for grad, mask in zip(by_weight, masks, strict=True):
        assert (grad[~mask] == 0).all()


def test_guesses_that_overflow_leave_what_is_settled_alone():
    """Weights so large that sweeps over all features pass through infinities, and that some samples end there."""
    made = MADE(20, 40)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4)
        z = torch.randn(64, 20)
        jacobi, passes = (AutoregressiveTransform(made, method=m).inverse(z) for m in ("jacobi", "sequential"))
    assert 0 < passes[0].isfinite().all(1).sum() < 64
    for ours, theirs in zip(jacobi, passes, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_dead_weights_never_act():
    layer = AutoregressiveTransform(network(6, 13, True, "random"))
    z = torch.randn(3, 6, dtype=torch.float64)
    before = layer.inverse(z), layer(z)
    with torch.no_grad():
        for m in layer.made.layers:
            m.weight.masked_fill_(~m.mask, float("nan"))
    for a, b in itertools.chain(
        *(zip(x, y, strict=True) for x, y in zip(before, (layer.inverse(z), layer(z)), strict=True))
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("features,hidden,residual", [(64, 96, False), (33, 70, True), (20, 7, False), (1, 3, False)])
def test_fp32_inverse_agrees_with_the_passes(features, hidden, residual):
    made = perturb(MADE(features, hidden, residual=residual, order="random"), 0.03)
    blocked, passes = (AutoregressiveTransform(made, method=m) for m in ("blocked", "sequential"))
    z = torch.randn(50, features)
    with torch.no_grad():
        for ours, theirs in zip(blocked.inverse(z), passes.inverse(z), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert blocked.inverse(z.bfloat16().float())[1].dtype == torch.float32


def test_state_dict_takes_the_order_along():
    first, second = (network(8, 12, False, "random", seed=seed) for seed in (1, 2))
    assert not torch.equal(first.order, second.order)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(first.order, second.order) and torch.equal(first(x), second(x))
    flows = [AutoregressiveTransform(m) for m in (first, second)]
    assert torch.equal(*(f.inverse(x)[0] for f in flows))
    damaged = {**first.state_dict(), "order": torch.zeros(8, dtype=torch.int64)}
    with pytest.raises(ValueError, match="MADE: order must be a permutation of 0 to 7"):
        second.load_state_dict(damaged)


@pytest.mark.parametrize("assign", [False, True])
def test_a_network_made_without_storage_gets_its_degrees_with_its_order(assign):
    made = MADE(6, (4, 9), order="random", context_features=2)
    with torch.device("meta"):
        empty = MADE(6, (4, 9), context_features=2)
    if not assign:
        empty = empty.to_empty(device="cpu")
        for buffer in empty.buffers():
            buffer.zero_()  # as anything may stand in fresh memory
    empty.load_state_dict(made.state_dict(), assign=assign)
    x, context = torch.randn(3, 6), torch.randn(3, 2)
    assert torch.equal(empty(x, context), made(x, context))
    ours, theirs = (AutoregressiveTransform(m).inverse(x, context)[0] for m in (empty, made))
    assert torch.equal(ours, theirs)


def test_what_is_no_tensor_is_named():
    made = MADE(3, 4, context_features=2)
    for call, sentence in (
        (lambda: made([[0.0] * 3]), "MADE: x must be a torch.Tensor, got list"),
        (lambda: made(torch.zeros(1, 3), [[0.0] * 2]), "MADE: context must be a torch.Tensor, got list"),
        (lambda: AutoregressiveTransform(made).inverse(None), "the input must be a torch.Tensor, got NoneType"),
    ):
        with pytest.raises(TypeError, match=sentence):
            call()


def test_copies_and_casts():
    layer = AutoregressiveTransform(MADE(5, 8, order="random"))
    x = torch.randn(3, 5)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x)[0], layer(x)[0])
    wide = layer.double()
    z, ldj = wide(x.double())
    assert z.dtype == ldj.dtype == torch.float64 and wide.made.order.dtype == torch.int64
    torch.testing.assert_close(wide.inverse(z)[0], x.double())
    z, ldj = twin.bfloat16()(x.bfloat16())
    assert z.dtype == torch.bfloat16 and ldj.dtype == torch.float32
    back, ldj = twin.inverse(z)
    assert back.dtype == torch.bfloat16 and ldj.dtype == torch.float32
    torch.testing.assert_close(back.float(), x, rtol=0.1, atol=0.1)


def test_flow_sequential_trains():
    flow = gnn.FlowSequential(
        AutoregressiveTransform(MADE(4, 16)),
        AutoregressiveTransform(MADE(4, 16, order="reversed")),
        InverseAutoregressiveTransform(MADE(4, 16)),
    )
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    x = torch.randn(64, 4) @ torch.randn(4, 4)
    losses = []
    for _ in range(20):
        z, ldj = flow(x)
        loss = (0.5 * z.square().sum(1) - ldj).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    for m in flow.modules():
        if isinstance(m, MaskedLinear):
            assert (m.weight[~m.mask] == 0).all()
    torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x, rtol=1e-3, atol=1e-3)


#: Options of splines, and how many parameters a feature has.
SPLINES = [
    ({}, 23),
    ({"parametrization": "zuko", "bound": 2.0, "floor": 1e-2}, 2),
    ({"parametrization": "circular", "logit_scale": 0.3}, 6),
]


@pytest.mark.parametrize("flow", [AutoregressiveTransform, InverseAutoregressiveTransform])
@pytest.mark.parametrize("options,count", SPLINES, ids=range(len(SPLINES)))
def test_autoregressive_splines(options, count, flow):
    """One spline a feature by what the network says; the other way is the inverse, by whatever method."""
    for features, hidden, residual in NETWORKS[:-1]:
        made = network(features, hidden, residual, "random", 2, params_per_feature=count)
        x, c = 2 * torch.randn(3, features, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        params = made(x, c).view(3, count, features).movedim(1, 2)
        expected = gk.ops.rational_quadratic_spline(x, params, **options)
        for method in ("blocked", "jacobi", "sequential"):
            layer = flow(made, method=method, transform="spline", **options)
            one, other = layer.forward, layer.inverse
            if flow is InverseAutoregressiveTransform:
                one, other = other, one
            z, ldj = one(x, c)
            torch.testing.assert_close((z, ldj), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(other(z, c), (x, -ldj), rtol=1e-8, atol=1e-8)


def test_autoregressive_splines_in_fp32_come_back():
    made = perturb(MADE(64, 96, params_per_feature=23, order="random"), 0.03)
    layer, x = AutoregressiveTransform(made, transform="spline", parametrization="zuko"), torch.randn(50, 64)
    with torch.no_grad():
        z, ldj = layer(x)
        back, minus = layer.inverse(z)
        calls = []
        handle = made.layers[0].register_forward_hook(lambda *_: calls.append(1))
        by_calls = layer.inverse(z)  # a hook counts both ways
        handle.remove()
    assert len(calls) == 64 and by_calls[1].shape == (50,)
    assert ((back - x).abs() / x.abs().clamp(min=1)).max() < 2e-6
    torch.testing.assert_close(minus, -ldj, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(by_calls, (back, minus), rtol=1e-5, atol=1e-4)


def test_gradients_of_hooked_splines_are_those_of_the_solve():
    layer = AutoregressiveTransform(network(5, 9, True, "random", 2, params_per_feature=8), transform="spline")
    z, c = (torch.randn(4, n, dtype=torch.float64).requires_grad_() for n in (5, 2))
    leaves = [z, c, *layer.parameters()]

    def grads():
        x, ldj = layer.inverse(z, c)
        return torch.autograd.grad((x.sin() * ldj.unsqueeze(1)).sum() + ldj.square().sum(), leaves)

    solved = grads()
    layer.made.layers[1].register_forward_hook(lambda *_: None)
    for ours, theirs in zip(solved, grads(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_splines_in_halves_and_under_autocast():
    layer = AutoregressiveTransform(MADE(5, 8, params_per_feature=11), transform="spline")
    x = torch.randn(3, 5)
    z, ldj = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == layer.inverse(z)[0].dtype == torch.float32
    halves = copy.deepcopy(layer).bfloat16()
    for way, given, expected in ((halves.forward, x, z), (halves.inverse, z, x)):
        found, log_det = way(given.bfloat16())
        assert found.dtype == torch.bfloat16 and log_det.dtype == torch.float32
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(layer.inverse(z)[1], -ldj, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compiles(backend):
    layers = [
        AutoregressiveTransform(MADE(4, 8, context_features=2)),
        AutoregressiveTransform(MADE(4, 8, params_per_feature=8, context_features=2), transform="spline"),
    ]
    x, c = torch.randn(3, 4), torch.randn(3, 2)
    for layer in layers[: 1 if backend == "reference" else 2]:  # a graph of the splines of D passes takes long
        with gk.use_backend(backend):
            torch._dynamo.reset()
            compiled = torch.compile(
                lambda x, c, layer=layer: (*layer(x, c), *layer.inverse(x, c)), backend="aot_eager"
            )
            for ours, theirs in zip(compiled(x, c), (*layer(x, c), *layer.inverse(x, c)), strict=True):
                torch.testing.assert_close(ours, theirs)


REFUSED = [
    (lambda: MaskedLinear(2, 2, [1, 2, 3], [1, 1]), "in_degrees must be 2 integers, 0 or more, got int64 \\[3\\]"),
    (lambda: MaskedLinear(2, 2, [1, 2], [1.0, 2.0]), "out_degrees must be 2 integers, 0 or more, got float32 \\[2\\]"),
    (
        lambda: MaskedLinear(2, 2, [1, -1], [1, 1]),
        "in_degrees must be 2 integers, 0 or more, got int64 \\[2\\] down to -1",
    ),
    (
        lambda: MaskedLinear(2, 3, [3, 4], [3, 5, 2]),
        "an output of degree 2 must have an input of degree at most that, got in_degrees from 3 \\(output 2",
    ),
    (
        lambda: MaskedLinear(2, 3, [2, 3], [1, 2, 3], strict=True),
        "an output of degree 2 must have an input of degree below that, got in_degrees from 2",
    ),
    (lambda: MADE(0, 4), "features must be an integer of at least 1, got 0"),
    (lambda: MADE(4, ()), "every hidden layer must have at least 1 units, got \\[\\]"),
    (
        lambda: MADE(4, 1, context_features=2),
        "at least 2 units \\(one sees the context alone, one the first feature\\), got \\[1, 1\\]",
    ),
    (lambda: MADE(4, (8, 8), residual=True), "an odd number of equal hidden layers, at least 3, got \\[8, 8\\]"),
    (lambda: MADE(3, 4, order=[0, 1, 1]), "order must be a permutation of 0 to 2, got \\[0, 1, 1\\]"),
    (lambda: MADE(3, 4, order=["a", 1, 2]), "order must be a permutation of 0 to 2, got \\['a', 1, 2\\]"),
    (
        lambda: MADE(3, 4, order="backwards"),
        "order must be natural, reversed, random or a permutation of 0 to 2, got 'backwards'",
    ),
    (lambda: MADE(3, 4)(torch.zeros(2, 4)), "x must be \\[N, 3\\], got \\[2, 4\\]"),
    (
        lambda: MADE(3, 4)(torch.zeros(2, 3), torch.zeros(2, 1)),
        "built without context_features, got a context \\[2, 1\\]",
    ),
    (lambda: MADE(3, 4, context_features=2)(torch.zeros(2, 3)), "a context \\[N, 2\\] is needed, got None"),
    (
        lambda: MADE(3, 4, context_features=2)(torch.zeros(2, 3), torch.zeros(1, 2)),
        "context must be \\[N, 2\\] with N = 2, got \\[1, 2\\]",
    ),
    (lambda: MaskedLinear(2, 2, None, [1, 1]), "in_degrees must be 2 integers, 0 or more, got None"),
    (lambda: MaskedLinear(2, 2, [True, True], [1, 1]), "in_degrees must be 2 integers, 0 or more, got bool \\[2\\]"),
    (lambda: MaskedLinear(0, 2, [], [0, 0]), "in_features must be an integer of at least 1, got 0"),
    (lambda: MADE(2.5, 4), "MADE: features must be an integer of at least 1, got 2.5"),
    (lambda: MADE(3, 4, 1.5), "MADE: params_per_feature must be an integer of at least 1, got 1.5"),
    (lambda: MADE(3, 2.5), "MADE: hidden_features must be one integer or several, got \\[2.5, 2.5\\]"),
    (lambda: MADE(3, "12"), "MADE: hidden_features must be one integer or several, got \\['12', '12'\\]"),
    (lambda: MADE(3, 4, order=["a", "b", "c"]), "order must be a permutation of 0 to 2, got \\['a', 'b', 'c'\\]"),
    (
        lambda: AutoregressiveTransform(MADE(3, 4), "cube"),
        "scale_map must be one of exp, sigmoid, tanh, sigmoid_floor, ",
    ),
    (
        lambda: InverseAutoregressiveTransform(MADE(3, 4), method="fast"),
        "method must be one of blocked, jacobi, sequential, got 'fast'",
    ),
    (lambda: AutoregressiveTransform(MADE(3, 4, 3)), "made must be a MADE with params_per_feature=2, got 3"),
    (
        lambda: AutoregressiveTransform(MADE(3, 4), transform="cubic"),
        "transform must be one of affine, spline, got 'cubic'",
    ),
    (
        lambda: AutoregressiveTransform(MADE(3, 4, 6), transform="spline"),
        "made must be a MADE with params_per_feature=3K - 1, got 6",
    ),
    (
        lambda: AutoregressiveTransform(MADE(3, 4, 5), transform="spline", parametrization="circular"),
        "made must be a MADE with params_per_feature=3K, got 5",
    ),
    (
        lambda: AutoregressiveTransform(MADE(3, 4, 8), "tanh", transform="spline"),
        "scale_map is no option of transform='spline', got 'tanh'",
    ),
    (lambda: AutoregressiveTransform(MADE(3, 4), bound=3), "bound is no option of transform='affine', got 3"),
    (
        lambda: AutoregressiveTransform(MADE(3, 4, 8), transform="spline", floor=0.5),
        "floor must be below 1/K = 1/3, the share of a bin, got 0.5",
    ),
    (
        lambda: AutoregressiveTransform(MADE(3, 4)).inverse(torch.zeros(2, 4)),
        "the input must be \\[N, 3\\], got \\[2, 4\\]",
    ),
]


@pytest.mark.parametrize("action,sentence", REFUSED, ids=range(len(REFUSED)))
def test_refusals(action, sentence):
    with pytest.raises(ValueError, match=sentence):
        action()


@pytest.mark.parametrize("method", ["blocked", "jacobi", "sequential"])
def test_shapes_alone_on_the_meta_device(method):
    affine = gk.nn.AutoregressiveTransform(gk.nn.MADE(4, 8), method=method)
    splines = gk.nn.AutoregressiveTransform(gk.nn.MADE(4, 8, 8), method=method, transform="spline")
    x = torch.empty(3, 4, device="meta")
    for layer in (affine.to("meta"), splines.to("meta")):
        for result, ldj in (layer(x), layer.inverse(x)):
            assert result.shape == (3, 4) and ldj.shape == (3,) and result.is_meta


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_small_layers_as_dense_products(strict, rank):
    """The same values and gradients as the operator, whatever stands in dead weights; their gradient is exactly 0."""
    layer = MaskedLinear(4, 6, [1, 2, 3, 3], [1, 2, 2, 3, 3, 3], strict=strict, dtype=torch.float64)
    layer.weight.data[layer.dead] = float("nan")
    x = torch.randn(*(2, 3)[: rank - 1], 4, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("auto", "reference"):
        with gk.use_backend(backend):
            assert (layer._dense_dtype(x) is None) == (backend == "reference")
            y = layer(x)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [x, layer.weight, layer.bias])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert layer.dead.any() and not results[0][2][layer.dead].any()
    assert torch.equal(layer.dead, ~layer.mask)


def test_which_layers_are_dense_products():
    small, large = (MaskedLinear(n, n, range(1, n + 1), range(1, n + 1)) for n in (256, 257))
    x = torch.randn(2, 256)
    with gk.use_backend("auto"):
        assert small._dense_dtype(x) == torch.float32 and large._dense_dtype(torch.randn(2, 257)) is None
        for refused in (x.double(), x[:, 1:]):
            assert small._dense_dtype(refused) is None  # the operator says why
        with pytest.raises(TypeError, match="made: weight must have the dtype of x"):
            small(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert large._dense_dtype(torch.randn(2, 257)) == torch.bfloat16
            assert small(x).dtype == small(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert small._dense_dtype(x) is None
    if not gk.backends.why_missing("cpu"):
        with gk.use_backend("cpu"):
            assert small._dense_dtype(x) is None


# --- what follows from sizes and from the order ------------------------------------------------------------------


@pytest.mark.parametrize("handed", ["all buffers", "the state dict"])
@pytest.mark.parametrize("order", ["natural", "random"])
def test_an_ensemble_runs_under_vmap(order, handed):
    first = network(5, 8, False, order)
    members = [perturb(copy.deepcopy(first), 0.2, seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    if handed == "the state dict":
        buffers = {"order": buffers["order"]}
    skeleton, x = network(5, 8, False, order, seed=9), torch.randn(4, 5, dtype=torch.float64)
    for _ in range(2):
        run = torch.func.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (x,)))
        torch.testing.assert_close(run(parameters, buffers), torch.stack([member(x) for member in members]))


def test_masks_outlive_storage_that_is_made_empty():
    """``skip_init``, and ``to_empty`` of "meta" with ``reset_parameters``: no state dict has the masks."""
    degrees = {"in_degrees": [3, 1, 2, 4], "out_degrees": [1, 2, 3, 4, 4]}
    expected = MaskedLinear(4, 5, **degrees)
    for _ in range(3):  # empty storage holds what was there before
        rubbish = [torch.full((20,), 77) for _ in range(50)]
        del rubbish
        layer = torch.nn.utils.skip_init(MaskedLinear, 4, 5, **degrees)
        assert torch.equal(layer.dead, expected.dead) and torch.equal(layer.in_degrees, expected.in_degrees)
        with torch.device("meta"):
            loaded = MaskedLinear(4, 5, **degrees)
        loaded.to_empty(device="cpu").load_state_dict(expected.state_dict())
        x = torch.randn(2, 4)
        torch.testing.assert_close(loaded(x), expected(x))
        live = MaskedLinear(4, 5, **degrees).to_empty(device="cpu")
        assert torch.equal(live.out_degrees, expected.out_degrees)


def test_a_plain_layer_in_a_masked_one_s_place():
    """Weights merged into a plain layer run; where the order changes it cannot follow."""
    made = network(5, 8, False, "natural")
    merged, first, x = copy.deepcopy(made), made.layers[0], torch.randn(3, 5, dtype=torch.float64)
    merged.layers[0] = torch.nn.Linear(5, 8).double()
    merged.layers[0].load_state_dict({"weight": first.masked_weight(), "bias": first.bias})
    torch.testing.assert_close(merged(x), made(x))
    merged.load_state_dict(merged.state_dict())
    merged.order.copy_(torch.arange(4, -1, -1))
    with pytest.raises(RuntimeError, match="its order has changed, and layer 0, a Linear, holds no MaskedLinear"):
        merged(x)
