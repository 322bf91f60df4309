"""A layer has one meaning: what goes past its call (blocked inverse, cached sampler, dense products, folding, the
reversible rule) gives what the call gives, whatever hangs on the layer or stands in its place."""

import copy
import math
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

import genkernels as gk
from genkernels import nn as gnn
from genkernels.models.flows.nets import ConvNet, ResidualNet
from tests.nn.flow_checks import perturb


class LoRA(nn.Module):
    """Stands in a layer's place and shows its weight, as libraries for adapters do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x) + 0.3 * torch.tanh(self.layer(x))


class Louder(gnn.MaskedLinear):
    def forward(self, x):
        return 1.5 * super().forward(x)


def double(module, inputs, output):
    return 2 * output


def louder(layer):
    return setattr(layer, "__class__", Louder)


CHANGES = {
    "forward hook": lambda made: made.layers[1].register_forward_hook(double),
    "pre-hook": lambda made: made.layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "hook on the network": lambda made: made.register_forward_hook(double),
    "a forward of its own": lambda made: setattr(
        made.layers[0], "forward", lambda x: 2 * gnn.MaskedLinear.forward(made.layers[0], x)
    ),
    "subclass": lambda made: louder(made.layers[1]),
    "wrapper": lambda made: made.layers.__setitem__(0, LoRA(made.layers[0])),
    "weight norm": lambda made: nn.utils.weight_norm(made.layers[1]),
    "parametrised": lambda made: parametrizations.weight_norm(made.layers[1]),
    "pruned": lambda made: prune.random_unstructured(made.layers[1], "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["blocked", "jacobi", "sequential"])
def test_a_masked_flow_is_inverted_with_what_hangs_on_its_network(change, method):
    transform = perturb(gnn.AutoregressiveTransform(gnn.MADE(5, 16), "tanh", method).double())
    plainly = copy.deepcopy(transform)
    CHANGES[change](transform.made)
    if change in ("weight norm", "parametrised", "pruned"):
        with torch.no_grad():  # an optimiser's step, which a hook's weight has not seen yet
            for parameter in transform.made.layers[1].parameters():
                parameter.mul_(1.5)
        z = torch.randn(7, 5, dtype=torch.float64)
        torch.testing.assert_close(transform(transform.inverse(z)[0])[0], z, rtol=1e-9, atol=1e-9)
    x = torch.randn(7, 5, dtype=torch.float64)
    z, ldj = transform(x)
    back, ldj_back = transform.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ldj_back, -ldj, rtol=1e-9, atol=1e-9)
    assert (plainly(x)[0] - z).abs().max() > 1e-3, "the change shows"


def test_gradients_of_the_inverse_by_calls():
    transform = perturb(gnn.AutoregressiveTransform(gnn.MADE(3, 8), "tanh").double())
    transform.made.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.2)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transform.inverse, (z,))


def test_a_guess_that_overflows_multiplies_nothing():
    """The log-scale of the second feature is 120·x₁ − 120: before x₁ is known it is read off x₁ = 0."""
    found = []
    for hook in (False, True):
        transform = gnn.AutoregressiveTransform(gnn.MADE(2, (1,)))
        first, last = transform.made.layers
        with torch.no_grad():
            for tensor, values in (
                (first.weight, [[1, 0]]),
                (first.bias, [0]),
                (last.weight, [[0], [120], [0], [0]]),
                (last.bias, [0, -120, 0, 0.5]),
            ):
                tensor.copy_(torch.tensor(values))
        if hook:
            first.register_forward_hook(lambda module, inputs, output: None)
        z = torch.tensor([[1.0, 0.25], [0.9921875, 2.0]], requires_grad=True)
        x, ldj = transform.inverse(z)
        loss = x.sin().sum() + ldj.sum()
        found.append([x, ldj, *torch.autograd.grad(loss, [z, *transform.parameters()])])
    for by_calls, solved in zip(*found, strict=True):
        assert by_calls.isfinite().all()
        torch.testing.assert_close(by_calls, solved)


# --- samplers ---------------------------------------------------------------------------------------------------------


def network(name):
    sizes = {"shape": (1, 3, 4), "grey_levels": 4, "width": 8, "layers": 1, "dropout": 0.3}
    model = perturb({"pixelcnn": gk.models.PixelCNN, "gated": gk.models.GatedPixelCNN}[name](**sizes), 0.5)
    return model, model.layers[0] if name == "pixelcnn" else model.blocks[1].vertical


def by_definition(model, n, seed):
    """Value by value from ``model(x)``, with the noise that `sample` draws."""
    model = copy.deepcopy(model).eval()
    noise = torch.rand(n, *model.shape, generator=torch.Generator().manual_seed(seed))
    x = torch.full((n, *model.shape), -1.0)
    with torch.no_grad():
        for i in range(model.shape[1]):
            for j in range(model.shape[2]):
                shares = model(x)[:, :, i, j].double().softmax(1).cumsum(1)[:, :-1]
                level = (shares <= noise[:, :, i, j]).sum(1)
                x[:, 0, i, j] = level * (2 / 3) - 1
    return ((x + 1) * 1.5).round() / 3


def weight_norm_from_elsewhere(layer):
    nn.utils.weight_norm(layer)
    state = layer.state_dict()
    layer.load_state_dict({name: 1.7 * value if name.endswith("_g") else value for name, value in state.items()})


ON_A_CONVOLUTION = {
    "nothing": lambda layer: None,
    "hook": lambda layer: layer.register_forward_hook(double),
    "weight norm, loaded": weight_norm_from_elsewhere,
    "parametrised": lambda layer: parametrizations.weight_norm(layer),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("change", ON_A_CONVOLUTION)
@pytest.mark.parametrize("name", ["pixelcnn", "gated"])
def test_samples_are_those_of_the_definition(name, change):
    model, layer = network(name)
    ON_A_CONVOLUTION[change](layer)
    drawn = model.sample(40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, by_definition(model, 40, 3))
    assert model.training and model.dropout.training


@pytest.mark.parametrize("at", ["link", "out", "last", "subclass"])
def test_samples_see_every_part(at):
    model, _ = network("gated")
    if at == "subclass":

        class Sharper(gk.models.GatedPixelCNN):
            def forward(self, x, y=None):
                return 3 * super().forward(x, y)

        model.__class__ = Sharper
    else:
        layer = model.last if at == "last" else getattr(model.blocks[1], at)
        layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    drawn = model.sample(40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, by_definition(model, 40, 3))
    known = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    known[..., :2, :] = True
    filled = model.inpaint(drawn, known, generator=torch.Generator().manual_seed(4))
    assert torch.equal(filled[..., :2, :], drawn[..., :2, :])


def test_a_global_hook_counts():
    model, _ = network("pixelcnn")
    plainly = model.sample(40, generator=torch.Generator().manual_seed(3))
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 3 * output if isinstance(module, gnn.MaskedConv2d) else None
    )
    try:
        drawn = model.sample(40, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(drawn, by_definition(model, 40, 3))
    finally:
        hook.remove()
    assert not torch.equal(drawn, plainly)


def test_dead_taps_start_as_nothing_and_stay_it():
    layer = parametrizations.weight_norm(gnn.MaskedConv2d("A", 4, 4, 3))
    dead = ~layer.mask
    weight = layer.weight.detach().clone()
    assert layer.parametrizations.weight.original1[dead].count_nonzero() == 0
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
        optimizer.step()
    assert layer.parametrizations.weight.original1[dead].count_nonzero() == 0
    assert not torch.equal(layer.weight, weight)


# --- coupling networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["hook", "weight norm", "wrapper"])
def test_a_density_does_not_depend_on_the_size_of_its_batch(change):
    """On small grids and large batches the network runs as dense products."""
    model = perturb(gk.models.Glow(shape=(1, 8, 8), scales=1, steps=1, hidden=32, grey_levels=None).eval(), 0.1)
    net = model.flows[0][3].net
    if change == "hook":
        net.second.register_forward_hook(double)
    elif change == "weight norm":
        weight_norm_from_elsewhere(net.second)
    else:
        net.second = LoRA(net.second)
    x = torch.randn(128, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(x)[:8], model.log_prob(x[:8]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [ConvNet, lambda *sizes: ResidualNet(*sizes, blocks=1)])
def test_a_wrapper_may_stand_for_a_network_s_first_layer(kind):
    net = perturb(kind(2, 4, 8))
    net.first = nn.Sequential(net.first)
    assert net(torch.randn(3, 2, 8, 8)).shape == (3, 4, 8, 8)


IN_PLACE = [nn.ReLU(True), nn.LeakyReLU(0.2, True), nn.ELU(inplace=True), nn.SiLU(True), nn.Hardtanh(inplace=True)]


@pytest.mark.parametrize("first", IN_PLACE, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("split", ["channel", "checkerboard"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("within", ["alone", "sequence", "reversible"])
def test_a_network_may_work_in_place(first, split, flip, within):
    inputs = 2 if split == "channel" else 4
    plain_net = nn.Sequential(copy.deepcopy(first), nn.Conv2d(inputs, 2 * inputs, 3, padding=1))
    plain_net[0].inplace = False
    net = nn.Sequential(first, plain_net[1])
    options = {"split": split, "flip": flip, "scale_map": "tanh"}
    layers = [gnn.AffineCoupling(n, **options).double() for n in (net, plain_net)]
    if within != "alone":
        layers = [gnn.FlowSequential(layer, layer, reversible=within == "reversible") for layer in layers]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    keep, results = x.clone(), []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        z, ldj = layer(leaf + 0)
        results.append([z, ldj, *torch.autograd.grad(z.sin().sum() + ldj.sum(), [leaf, *layer.parameters()])])
        z, _ = layer(x)
        before = z.detach().clone()
        torch.testing.assert_close(layer.inverse(z.detach())[0], keep, rtol=1e-9, atol=1e-9)
        assert torch.equal(x, keep) and torch.equal(z, before)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class ReluInPlace(nn.Module):
    """Nothing tells from outside that it works in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, x, context=None):
        if context is not None:
            context.add_(1)
            return self.linear(x)
        return self.linear(x.relu_())


def test_a_network_that_works_in_place_unannounced_is_told_or_given_a_copy():
    coupling, x = gnn.AffineCoupling(ReluInPlace()), torch.randn(8, 4)
    with pytest.raises(RuntimeError, match="its network changed what it was given in place"):
        coupling(x.clone())
    with pytest.raises(RuntimeError, match="its network changed what it was given in place"):
        coupling(x.clone(), torch.zeros(8, 1))
    with torch.inference_mode():
        keep = x.clone()
        z, _ = coupling(y := keep.clone())
        assert torch.equal(y, keep)
        torch.testing.assert_close(coupling.inverse(z)[0], keep)
    compiled, keep = torch.compile(coupling, backend="eager"), x.clone()
    with torch.no_grad():
        compiled(x)
    assert torch.equal(x, keep)


# --- reversible flows -------------------------------------------------------------------------------------------------


def hidden(layer):
    return gnn.AffineCoupling(nn.Sequential(nn.Linear(2, 8), layer, nn.Linear(8, 4)), scale_map="tanh")


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return self.draw(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 8, 2, dropout=0.5)

    def forward(self, x):
        return self.gru(x)[0]


@pytest.mark.parametrize(
    "layer",
    [
        Noisy(lambda x: nn.functional.dropout(x, 0.5)),
        Noisy(lambda x: x * (torch.rand(len(x), 1) < 0.5)),
        nn.RReLU(),
        Recurrent(),
    ],
    ids=["functional dropout", "drop path", "rrelu", "gru"],
)
def test_what_draws_is_refused_in_a_reversible_flow(layer):
    flow, x = gnn.FlowSequential(hidden(layer), reversible=True), torch.randn(16, 4)
    with pytest.raises(RuntimeError, match="same result when run again, but one of them drew random numbers"):
        flow(x)
    flow.reversible = False
    flow(x)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(8), nn.utils.spectral_norm(nn.Linear(8, 8)), parametrizations.spectral_norm(nn.Linear(8, 8))],
    ids=["batch norm", "spectral norm by hook", "spectral norm"],
)
def test_what_changes_its_own_state_is_refused_in_a_reversible_flow(layer):
    flow, x = gnn.FlowSequential(hidden(layer), reversible=True), torch.randn(16, 4)
    with pytest.raises(RuntimeError, match="same result when run again, but this pass changed the buffer 0.net.1"):
        flow(x)
    flow.eval()
    z, ldj = flow(x)
    (z.sum() + ldj.sum()).backward()


class Doubled(gnn.AffineCoupling):
    """Right both ways; the rule that it inherits is not its own."""

    def forward(self, x, context=None):
        z, ldj = super().forward(x, context)
        return 2 * z, ldj + z[0].numel() * math.log(2)

    def inverse(self, z, context=None):
        x, ldj = super().inverse(z / 2, context)
        return x, ldj - z[0].numel() * math.log(2)


@pytest.mark.parametrize("kind", ["subclass", "observer", "hook", "own forward"])
def test_a_layer_s_own_rule_serves_what_it_was_written_for(kind):
    layer = (Doubled if kind == "subclass" else gnn.AffineCoupling)(nn.Linear(2, 4).double(), scale_map="tanh")
    if kind == "observer":
        layer.register_forward_hook(lambda module, inputs, output: None)
    elif kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))
    elif kind == "own forward":
        layer.forward = lambda x, context=None: gnn.AffineCoupling.forward(layer, x, context)
    x, gradients = torch.randn(64, 4, dtype=torch.float64), []
    for reversible in (False, True):
        z, ldj = gnn.FlowSequential(layer, reversible=reversible)(x)
        loss = z.square().sum() / 2 - ldj.sum()
        if kind == "hook" and reversible:
            with pytest.raises(RuntimeError, match="a hook of AffineCoupling changes what its inverse undoes"):
                loss.backward()
            return
        gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_a_buffer_changed_before_backward_is_noticed():
    flow = gnn.FlowSequential(hidden(nn.BatchNorm1d(8)), reversible=True).eval()
    z, ldj = flow(torch.randn(16, 4))
    flow[0].net[1].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="a parameter or buffer was changed in place"):
        (z.sum() + ldj.sum()).backward()


@pytest.mark.parametrize("lu", [False, True])
def test_an_inverse_sees_the_weights_that_the_next_pass_would(lu):
    """Weight norm and pruning by hooks compute the weight before ``forward``, and ``inverse`` is none."""
    flow = gnn.FlowSequential(gnn.InvertibleConv1x1(4, lu=lu))
    name = "factors" if lu else "weight"
    nn.utils.weight_norm(flow[0], name)
    with torch.no_grad():
        getattr(flow[0], f"{name}_g").mul_(1.3)
    x_of_stale = flow.inverse(z := torch.randn(2, 4))[0]
    torch.testing.assert_close(flow(x_of_stale)[0], z, rtol=1e-4, atol=1e-4)


# --- what the first list missed ---------------------------------------------------------------------------------------


def test_an_inverse_of_its_own_is_asked():
    layers, calls = [gnn.ActNorm(4), gnn.InvertibleConv1x1(4), gnn.ActNorm(4), gnn.ActNorm(4)], []
    for layer in layers:
        layer.inverse = lambda z, context=None, old=layer.inverse: (calls.append(1), old(z, context))[1]
    gnn.FlowSequential(*layers).eval().inverse(torch.randn(2, 4))
    assert len(calls) == 4


@pytest.mark.parametrize("hang", [nn.utils.weight_norm, prune.identity])
def test_a_prior_sees_its_weights_as_a_pass_would(hang):
    """A prior has no ``forward``: what a hook before it would compute is computed where the table is read."""
    prior, z = perturb(gnn.Prior(2, learned=True)), torch.randn(5, 2)
    hang(prior, "table")
    with torch.no_grad():
        getattr(prior, "table_g" if hang is nn.utils.weight_norm else "table_orig").mul_(2)
    expected = gnn.Prior(2, learned=True)
    with torch.no_grad():
        expected.table.copy_(2 * perturb(gnn.Prior(2, learned=True)).table)
    torch.testing.assert_close(prior.log_prob(z), expected.log_prob(z))
    for _ in range(2):
        prior.log_prob(z).sum().backward()


@pytest.mark.parametrize("how", ["inference", "compiled", "vmap", "jvp"])
@pytest.mark.parametrize("net", ["announced later", "unannounced", "function"])
def test_what_cannot_be_watched_is_given_a_copy(net, how):
    """Tensors in inference mode and inside transforms have no versions that would tell a change in place."""
    linear = nn.Linear(2, 4)
    if net == "announced later":
        coupling = gnn.AffineCoupling(nn.Sequential(nn.ReLU(), linear))
        coupling.net[0].inplace = True
    else:
        coupling = gnn.AffineCoupling(
            gnn.AffineCoupling(ReluInPlace()).net if net == "unannounced" else lambda x: linear(x.relu_())
        )
    plainly = copy.deepcopy(coupling)
    plainly.net = nn.Sequential(nn.ReLU(), linear if net != "unannounced" else coupling.net.linear)
    x = torch.randn(8, 4)
    keep = x.clone()
    with torch.no_grad():
        expected = plainly(x)[0]
        if how == "inference":
            with torch.inference_mode():
                x = keep.clone()
                z = coupling(x)[0]
        elif how == "compiled":
            torch._dynamo.reset()
            z = torch.compile(coupling, backend="eager")(x)[0]
        elif how == "vmap":
            z = torch.func.vmap(lambda row: coupling(row[None])[0][0])(x)
        else:
            z = torch.func.jvp(lambda x: coupling(x)[0], (x,), (torch.ones_like(x),))[0]
    assert torch.equal(x, keep)
    torch.testing.assert_close(z, expected)


def test_another_thread_s_random_numbers_are_none_of_a_reversible_flow_s():
    flow, stop = gnn.FlowSequential(hidden(nn.Tanh()), reversible=True), threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(3)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(30):
            flow(torch.zeros(16, 4))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("reversible", [False, True])
def test_shapes_alone(reversible):
    flow = gnn.FlowSequential(gnn.ActNorm(4), gnn.InvertibleConv1x1(4), hidden(nn.Tanh()), reversible=reversible)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert flow(torch.zeros(2, 4))[1].shape == (2,)
    assert flow.to("meta")(torch.zeros(2, 4, device="meta"))[1].shape == (2,)


def test_a_sample_by_calls_is_of_the_whole_network():
    """In training mode too, whatever kind of dropout a wrapper brings."""
    model, layer = network("pixelcnn")
    model.layers[0] = nn.Sequential(layer, nn.Dropout(0.9))
    model.layers[0].forward = lambda x, condition, residual: model.layers[0][1](layer(x, condition, residual))
    drawn = model.sample(40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, by_definition(model.eval(), 40, 3))
