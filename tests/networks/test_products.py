"""Values of a network's steps and products with its Jacobian, against autograd in fp64."""

import pytest
import torch
from torch import nn

from genkernels import networks
from genkernels.networks import linearize, pullback, pushforward, trace, traced
from tests.networks import nets
from tests.networks.nets import at_random, like

close = torch.testing.assert_close


@pytest.mark.parametrize("name", nets.NETWORKS)
def test_values_and_products_are_autograd_s(name):
    net, x = at_random(name)
    steps = trace(net, x)
    with torch.no_grad():
        at = linearize(steps, x)
    x.requires_grad_()
    y = net(x)
    close(at.values[-1], y.detach(), rtol=1e-13, atol=1e-14)
    assert [tuple(value.shape) for value in at.values] == [(len(x), *step.shape) for step in steps]
    w, t = like(y, 2), like(x, 2, seed=3)
    wanted = torch.stack([torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in w])
    with torch.no_grad():
        pulled, pushed = pullback(steps, at, w), pushforward(steps, at, t)
        close(pulled, wanted, rtol=1e-11, atol=1e-12)
        close(pullback(steps, at, w[0]), wanted[0], rtol=1e-11, atol=1e-12)
        close(pushforward(steps, at, t[1]), pushed[1], rtol=1e-12, atol=1e-13)
        close((w * pushed).sum(), (pulled * t).sum(), rtol=1e-11, atol=1e-12)
        every = pullback(steps, at, w, every=True), pushforward(steps, at, t, every=True)
    for found in every:
        assert [tuple(part.shape) for part in found] == [(2, len(x), *step.shape) for step in steps]
    close(every[0][0], pulled)
    close(every[1][-1], pushed)


@pytest.mark.parametrize("name", ["average3d", "linear1d", "mlp Tanh"])
def test_under_autocast_cotangents_have_the_dtypes_of_the_values(name):
    net, x = at_random(name)
    size = net(x)[0].numel()
    net, x = nn.Sequential(net, nn.Flatten(), nn.Linear(size, 2)).float(), x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        steps, y = trace(net, x), net(x)
        w = like(y)
        at = linearize(steps, x)
        found = pullback(steps, at, w, every=True)
        assert [part.dtype for part in found] == [value.dtype for value in at.values]
    close(found[0], torch.autograd.grad(y, x, w)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", nets.NETWORKS)
def test_products_can_be_differentiated(name):
    """Gradients of |Jᵀw|² by input and weights, and by w, are those of a double backward."""
    net, x = at_random(name)
    x.requires_grad_()
    y = net(x)
    w = like(y).requires_grad_()
    leaves = [x, w, *net.parameters()]
    wanted = torch.autograd.grad(y, x, w, create_graph=True)[0].square().sum()
    wanted = torch.autograd.grad(wanted, leaves, allow_unused=True)
    steps = trace(net, x)
    found = pullback(steps, linearize(steps, x), w).square().sum()
    for ours, theirs in zip(torch.autograd.grad(found, leaves, allow_unused=True), wanted, strict=True):
        if ours is None or theirs is None:  # where the one has no graph the other may have one of zeros
            assert not any(grad.any() for grad in (ours, theirs) if grad is not None)
        else:
            close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", nets.NETWORKS)
def test_gradients_of_a_pushforward(name):
    """Gradients of ⟨w, J t⟩ by the weights are those of ⟨Jᵀ w, t⟩."""
    net, x = at_random(name)
    steps = trace(net, x)
    at = linearize(steps, x)
    w, t = like(at.values[-1]), like(x)
    parameters = list(net.parameters())
    if not parameters:
        return
    pushed = torch.autograd.grad((pushforward(steps, at, t) * w).sum(), parameters, allow_unused=True)
    pulled = torch.autograd.grad((pullback(steps, linearize(steps, x), w) * t).sum(), parameters, allow_unused=True)
    for ours, theirs in zip(pushed, pulled, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", nets.NETWORKS)
def test_an_empty_batch(name):
    net, sample = nets.build(name)
    x = torch.empty(0, *sample, dtype=torch.float64)
    steps = trace(net, x)
    assert [step.shape for step in steps] == [step.shape for step in trace(net, torch.empty(3, *sample))]
    at = linearize(steps, x)
    assert at.values[-1].shape == (0, *steps[-1].shape)
    assert pullback(steps, at, like(at.values[-1], 2)).shape == (2, 0, *sample)
    assert pushforward(steps, at, like(x)).shape == (0, *steps[-1].shape)


def test_what_vectors_must_be():
    net, x = at_random("mlp Tanh")
    steps = trace(net, x)
    at = linearize(steps, x)
    with pytest.raises(ValueError, match=r"^forward: x must be \[N, 4\], got \[4\]$"):
        networks.forward(steps, x[0])
    with pytest.raises(ValueError, match=r"^forward: x must be \[N, 4\], got \[3, 5\]$"):
        networks.forward(steps, torch.randn(3, 5))
    wanted = r"^pullback: cotangent must be \[3, 3\] or \[probes, 3, 3\], got "
    for shape in ([3], [2, 3], [3, 4], [2, 2, 3, 3], [3, 2, 3]):
        with pytest.raises(ValueError, match=wanted):
            pullback(steps, at, torch.randn(shape))
    with pytest.raises(ValueError, match=r"^pushforward: tangent must be \[3, 4\] or \[probes, 3, 4\], got \[3, 3\]$"):
        pushforward(steps, at, torch.randn(3, 3))


@pytest.mark.parametrize("name", nets.NETWORKS)
def test_under_vmap(name):
    net, x = at_random(name)
    steps = trace(net, x)
    w = like(networks.forward(steps, x)[-1])

    def one(x, w):
        return pullback(steps, linearize(steps, x[None]), w[None])[0]

    close(torch.func.vmap(one)(x, w), pullback(steps, linearize(steps, x), w), rtol=1e-11, atol=1e-12)


class Products(nn.Module):
    """Jᵀ w of a network, as an algorithm over its steps is written."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, w):
        steps = traced(self.net, x)
        return pullback(steps, linearize(steps, x), w)


def test_within_functional_call_and_a_compiled_function():
    net, x = at_random("3-1-3 circular")
    w, products = like(x), Products(net)
    wanted = products(x, w)
    members = {name: torch.stack([p, 2 * p]) for name, p in products.named_parameters()}
    call = torch.func.vmap(lambda member: torch.func.functional_call(products, member, (x, w)))
    with torch.no_grad():
        net.train()
        found = call(members)
        for p in net.parameters():
            p.mul_(2)
    close(found[0], wanted)
    close(found[1], products(x, w))
    close(torch.compile(products, backend="eager")(x, w), found[1])


# --- activations -----------------------------------------------------------------------------------------------------

PARAMETERS = {"gain": 1.4, "negative_slope": 0.2, "alpha": 0.7, "beta": 1.3, "threshold": 20.0}


@pytest.mark.parametrize("name", networks.ACTIVATIONS)
def test_slopes_and_curvatures_are_derivatives(name):
    activation = networks.ACTIVATIONS[name]
    numbers = [PARAMETERS[parameter] for parameter in activation.parameters]
    x = torch.cat([torch.linspace(-6, 6, 101), torch.tensor([-40.0, -20.0, 20.0, 40.0])]).double().requires_grad_()
    y = activation.value(x, *numbers)
    slope = activation.slope(x, *numbers)
    curvature = activation.curvature(x, *numbers)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    close(slope, first, rtol=1e-12, atol=1e-14)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), x)
        close(curvature, second, rtol=1e-11, atol=1e-13)
    if slope.requires_grad:
        close(curvature, torch.autograd.grad(slope.sum(), x)[0], rtol=1e-11, atol=1e-13)
    assert activation.piecewise_linear == (not curvature.any())


@pytest.mark.parametrize("name", [name for name, each in networks.ACTIVATIONS.items() if each.scaled])
def test_vectors_times_slopes_and_curvatures(name):
    activation = networks.ACTIVATIONS[name]
    numbers = [PARAMETERS[parameter] for parameter in activation.parameters]
    x = torch.linspace(-6, 6, 102, dtype=torch.float64)
    point = activation.value(x, *numbers) if activation.by_value else x
    vectors = like(x)
    expected = vectors * activation.slope(x, *numbers)
    close(activation.scaled(vectors, point, *numbers, grad_input=torch.empty_like(x)), expected)
    expected = vectors * activation.curvature(x, *numbers)
    if activation.bent:
        close(activation.bent(vectors.clone(), point, *numbers), expected)
    own = vectors.clone()
    assert activation.scaled(own, point, *numbers, grad_input=own) is own
    close(own, vectors * activation.slope(x, *numbers))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", networks.ACTIVATIONS)
def test_far_out_they_are_what_they_tend_to(name, dtype):
    activation = networks.ACTIVATIONS[name]
    numbers = [PARAMETERS[parameter] for parameter in activation.parameters]
    x = torch.tensor([-1e30, -1e15, -1e4, -300.0, 300.0, 1e4, 1e15, 1e30], dtype=dtype).requires_grad_()
    slope, curvature = activation.slope(x, *numbers), activation.curvature(x, *numbers)
    ends = {"relu": (0, 1), "leaky_relu": (0.2, 1), "gained_leaky_relu": (0.28, 1.4), "tanh": (0, 0), "sigmoid": (0, 0)}
    low, high = ends.get(name, (0, 1))
    high = high / {"lipswish": 1.1, "clipswish": 1.1 * 1.004}.get(name, 1)
    close(slope, torch.tensor([low] * 4 + [high] * 4, dtype=dtype))
    close(curvature, torch.zeros_like(x))
    for derivative in (slope, curvature):
        if derivative.requires_grad:
            assert torch.autograd.grad(derivative.sum(), x, retain_graph=True)[0].isfinite().all()


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "softplus"])
def test_in_the_tails_they_keep_their_digits(name):
    activation = networks.ACTIVATIONS[name]
    numbers = [PARAMETERS[parameter] for parameter in activation.parameters]
    x = torch.tensor([-30.0, -15.0] + ([15.0, 30.0] if name in ("tanh", "sigmoid") else []))
    for function in (activation.slope, activation.curvature):
        close(function(x, *numbers).double(), function(x.double(), *numbers), rtol=1e-5, atol=0)


def test_curvatures_of_a_network():
    net, x = at_random("mlp LipSwish")
    steps = trace(net, x)
    at = linearize(steps, x)
    found = networks.curvatures(steps, at)
    for step, curvature, slope in zip(steps, found, at.slopes, strict=True):
        assert (curvature is None) == (step.kind != "activation")
        if curvature is not None:
            before = at.values[step.reads[0]]
            close(curvature, torch.autograd.grad(slope.sum(), before, retain_graph=True)[0])
