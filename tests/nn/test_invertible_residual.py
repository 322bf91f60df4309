"""InvertibleResidual as a layer: there and back, its log-determinant, its options and its sentences."""

import copy
import pickle

import pytest
import torch

import genkernels as gk
from genkernels import networks
from genkernels import nn as gnn

F64 = torch.float64


def mlp(features=3, context=0, coefficient=0.9):
    net = torch.nn.Sequential(
        gnn.LipschitzLinear(features + context, 16, coefficient=coefficient),
        gnn.LipSwish(),
        gnn.LipschitzLinear(16, 16, coefficient=coefficient),
        gnn.LipSwish(),
        gnn.LipschitzLinear(16, features, coefficient=coefficient),
    )
    with torch.no_grad():
        for layer in net[::2]:
            layer.parametrizations.weight.original.mul_(4)  # all bounds in force
    return net.double()


def convolutions():
    net = torch.nn.Sequential(
        gnn.LipschitzConv2d(2, 8, 3, padding=1, coefficient=0.9),
        gnn.LipSwish(),
        gnn.LipschitzConv2d(8, 8, 1, coefficient=0.9),
        gnn.LipSwish(),
        gnn.LipschitzConv2d(8, 2, 3, padding=1, coefficient=0.9),
    )
    return net.double()


class WithContext(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(3, context=2)

    def forward(self, x, context):
        return self.net(torch.cat([x, context], 1))


class Shifted(torch.nn.Module):
    """Whose context is a shift of what the first map gives, which its method tells, or which nothing tells."""

    def __init__(self, layers, tells=True):
        super().__init__()
        self.layers, self.of = layers, torch.nn.Linear(2, layers[0].weight.shape[0], dtype=F64)
        if tells:
            self.context_shift = self.of

    def forward(self, x, context=None):
        first, *rest = self.layers
        h = first(x)
        if context is not None:
            shift = self.of(context)
            h = h + shift.view(*shift.shape, *[1] * (x.dim() - 2))
        for layer in rest:
            h = layer(h)
        return h


def exact(layer, x):
    eye = torch.eye(x[0].numel(), dtype=F64)
    rows = [torch.func.jacrev(lambda t: layer.net(t[None])[0])(row).view(eye.shape) for row in x]
    return torch.linalg.slogdet(torch.stack(rows) + eye)[1]


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("make", [mlp, convolutions])
def test_inverts_before_any_forward_pass(make, loaded):
    torch.manual_seed(0)
    layer = gnn.InvertibleResidual(make(), "exact", atol=1e-9).eval()
    shape = (7, 3) if make is mlp else (7, 2, 4, 5)
    if loaded:
        source = layer
        source(torch.zeros(shape, dtype=F64))
        layer = gnn.InvertibleResidual(make(), "exact", atol=1e-9).eval()
        layer.load_state_dict(source.state_dict())
    y = torch.randn(shape, dtype=F64)
    x, inverse_log_det = layer.inverse(y)
    again, log_det = layer(x)
    torch.testing.assert_close(again, y, rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det)
    torch.testing.assert_close(log_det, exact(layer, x))


def test_in_training_mode_too_and_in_a_sequence():
    torch.manual_seed(0)
    flow = gnn.FlowSequential(*[gnn.InvertibleResidual(mlp(), "exact", atol=1e-10) for _ in range(3)])
    x = torch.randn(9, 3, dtype=F64)
    z, log_det = flow(x)
    back, inverse_log_det = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_the_unbiased_log_determinant_agrees_with_the_exact_one():
    torch.manual_seed(0)
    layer = gnn.InvertibleResidual(mlp(), terms=4).train()
    x = torch.randn(1, 3, dtype=F64)
    expected = exact(layer.eval(), x)
    layer.train()
    with torch.no_grad():
        for _ in range(30):
            layer(x.expand(16, -1))  # the running ratio finds its place
        drawn = torch.stack([layer(x.expand(64, -1))[1].mean() for _ in range(200)])
    assert 0 < layer.decay < 1
    assert (drawn.mean() - expected).abs() <= 3 * drawn.std() / len(drawn) ** 0.5


def test_gradients_through_forward_and_inverse():
    torch.manual_seed(0)
    layer = gnn.InvertibleResidual(mlp(), "exact", atol=1e-12, max_iterations=2000).eval()
    y = torch.randn(4, 3, dtype=F64, requires_grad=True)
    x, _ = layer.inverse(y)
    (by_y,) = torch.autograd.grad(x.square().sum(), y)
    jacobian = torch.stack(
        [torch.func.jacrev(lambda t: layer.net(t[None])[0])(r) + torch.eye(3, dtype=F64) for r in x.detach()]
    )
    expected = torch.linalg.solve(jacobian.transpose(1, 2), 2 * x.detach().unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(by_y, expected, rtol=1e-6, atol=1e-9)


def test_context_goes_to_the_network_in_both_directions():
    torch.manual_seed(0)
    layer = gnn.InvertibleResidual(WithContext(), "series", terms=3, atol=1e-10).eval()
    x, context = torch.randn(30, 3, dtype=F64), torch.randn(30, 2, dtype=F64)
    y, _ = layer(x, context)
    torch.testing.assert_close(layer.inverse(y, context)[0], x, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("make", "size"), [(mlp, (3,)), (convolutions, (2, 4, 3))])
@pytest.mark.parametrize("bias", [True, False])
def test_a_context_that_shifts_the_first_map_has_kernels(make, size, bias):
    """Values, log-determinants and gradients, both ways, of a network that does not tell."""
    torch.manual_seed(0)
    layers = make()
    layers(torch.zeros(1, *size, dtype=F64))  # a convolution learns the size of its input
    if not bias:
        layers[0].bias = None
    nets = [Shifted(layers), Shifted(layers, tells=False)]
    nets[1].of = nets[0].of
    x, context = torch.randn(5, *size, dtype=F64), torch.randn(5, 2, dtype=F64).requires_grad_()
    results = []
    for net in nets:
        for options in ({"log_det": "exact"}, {"log_det": "series", "terms": 3, "first_term": "probe"}):
            layer = gnn.InvertibleResidual(net, atol=1e-11, **options).eval()
            assert (layer._block(x, context)[0] is None) == (net is nets[1])
            at = x.clone().requires_grad_()
            leaves = [at, context, *layers.parameters(), *nets[0].of.parameters()]
            torch.manual_seed(1)
            y, log_det = layer(at, context)
            back, minus = layer.inverse(y.detach(), context)
            torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
            results.append([y, log_det, minus, *torch.autograd.grad((y.sin() + log_det.sum() * y).sum(), leaves)])
            results[-1] += torch.autograd.grad(back.cos().sum(), leaves[1:])
    for i in (0, 1):
        torch.testing.assert_close(results[i], results[2 + i], rtol=1e-7, atol=1e-8)


def test_a_context_of_another_number_of_samples_gets_one_sentence():
    layer = gnn.InvertibleResidual(Shifted(mlp()), "exact")
    with pytest.raises(ValueError, match=r"biases\[0\] must be \[N, outputs\] = \[5, 16\], got \[4, 16\]"):
        layer(torch.randn(5, 3, dtype=F64), torch.randn(4, 2, dtype=F64))


def test_a_sharp_block_warns_with_the_published_roulette_and_not_with_the_adaptive_one(recwarn):
    """0.9 times an orthogonal matrix: the ratio of two terms is 0.9, the survival ½ below its square."""
    torch.manual_seed(0)
    turn = torch.nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        turn.weight.copy_(0.9 * torch.linalg.qr(torch.randn(4, 4, dtype=F64))[0])
    x = torch.randn(8, 4, dtype=F64)
    layer = gnn.InvertibleResidual(turn, stop="adaptive")
    with torch.no_grad():
        for _ in range(5):
            layer(x)
        assert not recwarn.list
        drawn = torch.stack([layer(x)[1].mean() for _ in range(300)])
        expected = torch.linalg.slogdet(torch.eye(4, dtype=F64) + turn.weight)[1]
        assert (drawn.mean() - expected).abs() <= 3 * drawn.std() / len(drawn) ** 0.5
        layer.set_log_det("unbiased", stop="geometric", p=0.5)
        with pytest.warns(UserWarning, match=r"must exceed the square of the ratio .* got 0.5 and 0.9²"):
            layer(x)


def test_compiled_it_gives_the_same_numbers():
    torch._dynamo.reset()
    torch.manual_seed(0)
    flow = gnn.FlowSequential(gnn.ActNorm(3), gnn.InvertibleResidual(mlp().double(), terms=4)).double()
    x = torch.randn(9, 3, dtype=F64)
    flow(x)
    run = torch.compile(lambda x: flow(x)[1] + flow(x)[0].square().sum(1), backend="aot_eager")
    results = []
    for function in (lambda x: flow(x)[1] + flow(x)[0].square().sum(1), run):
        torch.manual_seed(1)
        value = function(x)
        results.append([value, *torch.autograd.grad(value.sum(), list(flow.parameters()))])
        flow[1].decay.zero_()
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("activation", [gnn.LipSwish, gnn.CLipSwish])
@pytest.mark.parametrize("make", [mlp, convolutions])
def test_its_networks_are_data(make, activation):
    """`genkernels.networks` takes Lipschitz layers for what they are, spectral norm included."""
    torch.manual_seed(0)
    net = make().eval()
    if activation is gnn.CLipSwish:
        wide = gnn.LipschitzLinear(32, 16) if make is mlp else gnn.LipschitzConv2d(16, 8, 1, input_size=(4, 5))
        net[1], net[2] = activation().double(), wide.double().eval()
    x = torch.randn(7, 3, dtype=F64) if make is mlp else torch.randn(7, 2, 4, 5, dtype=F64)
    expected = net(x)  # and the convolutions know their size
    steps = networks.traced(net, x)
    at = networks.linearize(steps, x)
    torch.testing.assert_close(at.values[-1], expected)
    w = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (by_x,) = torch.autograd.grad(net(leaf), leaf, w)
    torch.testing.assert_close(networks.pullback(steps, at, w), by_x)
    links, why = networks.chain(steps)
    assert why == "" and len(links) == 3


def test_what_does_not_converge_is_told():
    torch.manual_seed(0)
    net = mlp()
    y = torch.randn(6, 3, dtype=F64)
    sentence = r"must reach a residual of 1e-12 within 2 iterations, 6 of 6 samples did not, the worst"
    with pytest.raises(RuntimeError, match=sentence):
        gnn.InvertibleResidual(net, atol=1e-12, max_iterations=2).inverse(y)
    with pytest.warns(UserWarning, match=sentence):
        gnn.InvertibleResidual(net, atol=1e-12, max_iterations=2, on_failure="warn").inverse(y)
    gnn.InvertibleResidual(net, atol=1e-12, max_iterations=2, on_failure="ignore").inverse(y)
    y[2] = float("nan")
    with pytest.raises(RuntimeError, match=r"1 of 6 samples did not, the worst \(sample 2\) has nan after 1"):
        gnn.InvertibleResidual(net).inverse(y)


def test_copies_and_state_dicts():
    torch.manual_seed(0)
    layer = gnn.InvertibleResidual(mlp(), "exact").eval()
    other = copy.deepcopy(layer)
    x = torch.randn(2, 3, dtype=F64)
    third = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x)[0], layer(x)[0]) and torch.equal(third(x)[0], layer(x)[0])
    assert "decay" in layer.state_dict() and type(third.net[0]).__mro__[1] is gnn.LipschitzLinear
    third.train()(x)[0].sum().backward()  # on its own
    assert layer.net[0].parametrizations.weight.original.grad is None


def test_bad_input_gets_one_sentence():
    for kind, sentence, options in (
        (TypeError, "net must be a torch.nn.Module, got function", {"net": lambda x: x}),
        (ValueError, "coefficient of each layer of net must be below 1 .* got 1$", {"net": mlp(coefficient=1.0)}),
        (ValueError, "log_det must be one of exact, series, unbiased, got 'best'", {"log_det": "best"}),
        (ValueError, "stop must be one of geometric, poisson, adaptive, got 'x'", {"stop": "x"}),
        (ValueError, "p must be a number between 0 and 1, got 1.5", {"stop": "geometric", "p": 1.5}),
        (ValueError, "terms must be an integer of at least 1, got 0", {"log_det": "series", "terms": 0}),
        (ValueError, "probes must be an integer of at least 1, got 0", {"probes": 0}),
        (ValueError, "atol must be a number, 0 or more, got -1", {"atol": -1}),
        (ValueError, "rtol or atol must be above 0, got 0 for both", {"atol": 0}),
        (ValueError, "max_iterations must be an integer of at least 1, got 0", {"max_iterations": 0}),
        (ValueError, "on_failure must be one of raise, warn, ignore, got 'no'", {"on_failure": "no"}),
    ):
        with pytest.raises(kind, match=sentence):
            gnn.InvertibleResidual(**({"net": mlp()} | options))
    wrong = gnn.InvertibleResidual(torch.nn.Linear(3, 2).double())
    for call in (wrong, wrong.inverse):
        with pytest.raises(ValueError, match=r"must keep the shape of x, \[5, 3\], got \[5, 2\]"):
            call(torch.zeros(5, 3, dtype=F64))


# --- kernels and autograd -----------------------------------------------------------------------------------------


def both_ways(layer, x, inverse=False):
    """Values and gradients by the kernels and by autograd, of the same draws."""
    found = []
    for backend in ("auto", "reference"):
        own = copy.deepcopy(layer)
        at = x.clone().requires_grad_()
        torch.manual_seed(3)
        with gk.use_backend(backend):
            y, log_det = own.inverse(at) if inverse else own(at)
            loss = (y * y).sum() + (log_det * torch.arange(len(x))).sum()
            leaves = [at, *own.parameters()]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append(
            [y, log_det, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))]
        )
    return found


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("estimator", ["exact", "series", "unbiased"])
@pytest.mark.parametrize("make", [mlp, convolutions])
def test_kernels_and_autograd_agree_draw_by_draw(make, estimator, inverse):
    torch.manual_seed(0)
    options = {} if estimator == "exact" else {"terms": 4, "probes": 2}
    layer = gnn.InvertibleResidual(make(), estimator, atol=1e-10, **options)
    x = torch.randn((5, 3) if make is mlp else (5, 2, 4, 3), dtype=F64)
    layer(x)
    kernels, autograd = both_ways(layer, x, inverse)
    for ours, theirs in zip(kernels, autograd, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [mlp, convolutions])
def test_the_exact_first_term_changes_the_variance_and_not_the_mean(make):
    torch.manual_seed(0)
    layer = gnn.InvertibleResidual(make(), "series", terms=12).eval()
    x = torch.randn((6, 3) if make is mlp else (6, 2, 3, 3), dtype=F64)
    truth = exact(layer, x)
    spread = {}
    with torch.no_grad():
        for first_term in ("exact", "probe"):
            layer.set_log_det("series", terms=12, probes=2000, first_term=first_term)
            torch.testing.assert_close(layer(x)[1], truth, rtol=0, atol=0.02)
            layer.set_log_det("series", terms=12, first_term=first_term)
            spread[first_term] = torch.stack([layer(x)[1] for _ in range(100)]).var(0).mean()
    assert spread["exact"] < spread["probe"] / 4


def test_a_network_is_traced_once_for_all_steps_of_training():
    """What spectral norm remembers between steps is no change of the network."""
    layer = gnn.InvertibleResidual(mlp(), "series", terms=2)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    x = torch.randn(4, 3, dtype=F64)
    layer(x)[1].sum().backward()
    steps = networks.traced(layer.net, x)
    for _ in range(3):
        optimizer.step()
        layer(x)[1].sum().backward()
        assert networks.traced(layer.net, x) is steps
    layer.net[2] = gnn.LipschitzLinear(16, 16).double()
    assert networks.traced(layer.net, x) is not steps


def test_an_estimate_by_autograd_alone_refuses_a_second_derivative_which_would_be_wrong():
    class Own(torch.nn.Module):
        def forward(self, x):
            return 0.3 * torch.sin(x)

    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    layer = gnn.InvertibleResidual(Own(), "series", terms=3)
    (score,) = torch.autograd.grad(gnn.InvertibleResidual(Own(), "exact")(x)[1].sum(), x, create_graph=True)
    expected = torch.log(1 + 0.3 * torch.cos(x)).sum()
    (by_hand,) = torch.autograd.grad(expected, x, create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(score.square().sum(), x), torch.autograd.grad(by_hand.square().sum(), x)
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated again by this path; estimator 'exact' can be"):
        torch.autograd.grad(layer(x)[1].sum(), x, create_graph=True)


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(3, 3), WithContext])
def test_says_where_there_is_no_exact_first_term(make):
    layer = gnn.InvertibleResidual(make().double(), "series", terms=2, first_term="exact")
    arguments = (torch.randn(2, 3, dtype=F64), torch.randn(2, 2, dtype=F64))[
        : 2 if isinstance(layer.net, WithContext) else 1
    ]
    with pytest.raises(ValueError, match="first_term 'exact' needs a network of three maps"):
        layer(*arguments)
