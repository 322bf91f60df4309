"""What a network becomes as steps: weights that are read when they are used, writing in place, chains."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from genkernels import networks
from genkernels.networks import linearize, pullback, trace
from tests.networks import nets
from tests.networks.nets import at_random, like

close = torch.testing.assert_close


def test_weights_are_read_when_they_are_used():
    net, x = at_random("mlp Tanh")
    steps = trace(net, x)
    assert steps[1].sources[0].owner is net[0]
    with torch.no_grad():
        net[0].weight.mul_(2)
    close(networks.forward(steps, x)[-1], net(x))
    net[2].weight = nn.Parameter(torch.randn(7, 7, dtype=torch.float64))
    close(networks.forward(steps, x)[-1], net(x))
    parametrizations.weight_norm(net[4])
    close(networks.forward(steps, x)[-1], net(x))
    moved = {name: 2 * p for name, p in net.named_parameters()}
    with torch.nn.utils.stateless._reparametrize_module(net, moved):
        inside = networks.forward(steps, x)[-1]
    close(inside, torch.func.functional_call(net, moved, x))


def test_spectral_norm_iterates_once_for_all_that_is_done_with_its_weights():
    net, x = at_random("mlp Tanh")
    parametrizations.spectral_norm(net[0])
    twin = copy.deepcopy(net)
    steps = trace(net, x)
    close(net[0].parametrizations.weight[0]._u, twin[0].parametrizations.weight[0]._u, rtol=0, atol=0)
    at = linearize(steps, x)
    pullback(steps, at, like(at.values[-1]))
    close(at.values[-1], twin(x))
    close(net[0].parametrizations.weight[0]._u, twin[0].parametrizations.weight[0]._u, rtol=0, atol=0)


def test_a_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.same = self.layer

        def forward(self, x):
            return self.same(torch.tanh(self.layer(x))) + x

    net, x = Twice(), torch.randn(2, 4)
    steps = trace(net, x)
    assert [step.path for step in steps] == ["", "layer", "", "layer", ""]
    weights = networks.parameters(steps)
    assert weights[1]["weight"] is weights[3]["weight"]
    close(networks.forward(steps, x)[-1], net(x))


def test_steps_that_nothing_needs_are_left_out():
    class Spare(nn.Module):
        def forward(self, x):
            torch.tanh(x)
            return torch.sigmoid(x) + x

    assert [step.kind for step in trace(Spare(), torch.zeros(1, 2))] == ["input", "activation", "add"]


def typed(net, x):
    if not isinstance(x, torch.Tensor) or isinstance(x, (list, nn.Parameter)) or not torch.is_tensor(x):
        raise TypeError(f"wrong: {x}")
    n, *rest = x.shape
    if (
        rest != [4]
        or x.ndim != 2
        or x.size(-1) != 4
        or len(x.shape) != x.dim()
        or not isinstance(net.weight, nn.Parameter)
    ):
        raise ValueError(f"wrong: {x.shape}")
    return F.linear(x.view(n, 2, 2).reshape((x.size(0), -1)), net.weight) / math.sqrt(x.size(1))


def test_a_forward_may_check_what_it_gets():
    net, x = nets.calls(typed), torch.randn(3, 4)
    close(networks.forward(trace(net, x), x)[-1], net(x))


@pytest.mark.parametrize(
    "mode",
    [FakeTensorMode, torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), lambda: torch.autocast("cpu")],
)
def test_the_mode_in_which_a_network_is_traced_does_not_matter(mode):
    net, x = nets.build("functional")[0], torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    with mode():
        steps = trace(net, torch.zeros(2, 3, 8, 8))
    assert [step.label for step in steps] == [step.label for step in trace(net, x)]
    found = torch.func.vmap(lambda x: networks.forward(trace(net, x), x)[-1])(x[None])
    close(found[0], net(x))


def test_whether_a_network_is_piecewise_linear():
    told = {name: networks.is_piecewise_linear(trace(*at_random(name))) for name in nets.NETWORKS}
    assert {name for name, yes in told.items() if yes} == {
        "mlp ReLU",
        "mlp LeakyReLU",
        "one layer",
        "critic",
        "filtered in place",
        "bias, gain",
        "unflatten",
        "nothing",
    }


def test_chains():
    links, reason = networks.chain(trace(*at_random("mlp Softplus")))
    assert reason == "" and [(link.map.path, link.activation and link.activation.path) for link in links] == [
        ("0", "1"), ("2", "3"), ("4", None)
    ]  # fmt: skip
    links, reason = networks.chain(trace(*at_random("3-1-3")))
    assert reason == "" and [link.map.kind for link in links] == ["conv"] * 3
    first = nn.Sequential(nets.CLipSwish(), nn.Linear(8, 3), nn.Dropout(), nets.LipSwish(), nn.Linear(3, 4)).eval()
    links, reason = networks.chain(trace(first, torch.zeros(1, 4)))
    assert [(link.map is None, link.mirrored, link.activation is None) for link in links] == [
        (True, True, False), (False, False, False), (False, False, True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("critic", "layer 'blocks.0.pool' (AvgPool2d) is a step of kind 'avg_pool'"),
        ("residual", "'add' in the network (Residual) reads more than the step before it"),
        ("dense", "layer '3' (Flatten) is a step of kind 'reshape'"),
        ("linear over positions", "layer '0' (Linear) acts on samples of 2 axes"),
        ("one activation", "there is no linear layer or convolution"),
        ("unflatten", "layer '1' (Unflatten) is a step of kind 'reshape'"),
    ],
)
def test_what_is_no_chain(name, reason):
    assert networks.chain(trace(*at_random(name))) == (None, reason)


def test_what_else_is_no_chain():
    def reason(*layers):
        return networks.chain(trace(nn.Sequential(*layers), torch.zeros(1, 4)))[1]

    assert reason(nn.Linear(4, 4), nn.Tanh(), nn.Tanh()) == "layer '2' (Tanh) follows an activation"
    mixed = nn.Linear(4, 4), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 1)
    assert reason(*mixed) == "layer '1' (Unflatten) is a step of kind 'reshape'"


def test_the_table_of_what_is_supported():
    text = str(networks.SUPPORTED)
    kinds = {row.kind for row in networks.SUPPORTED}
    for name in nets.NETWORKS:
        assert {step.kind for step in trace(*at_random(name))} <= kinds | {"input", "mirror"}
    for word in ("ConvTranspose3d", "AdaptiveAvgPool2d", "interpolate", "add_", "Flatten", "clipswish"):
        assert word in text
    assert text.startswith("linear: Linear, linear\n    functions: the weight")


# --- in place --------------------------------------------------------------------------------------------------------


class Shortcut(nn.Module):
    """A residual block whose body begins with an activation in place: the shortcut reads what that leaves behind."""

    def __init__(self, change):
        super().__init__()
        self.stem, self.conv, self.change = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1), change

    def forward(self, x):
        h = self.stem(x)
        return self.conv(self.change(h)) + h


def add_in_place(h):
    h += 1
    return h


@pytest.mark.parametrize(
    "change",
    [
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.3, inplace=True),
        nn.ELU(inplace=True),
        lambda h: F.relu(h, inplace=True),
        torch.relu_,
        lambda h: h.relu_(),
        lambda h: h.mul_(2).sub_(0.5),
        add_in_place,
    ],
)
def test_a_shortcut_reads_what_an_activation_in_place_has_left(change):
    net, x = Shortcut(change).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    steps = trace(net, x)
    at = linearize(steps, x)
    close(at.values[-1], net(x))
    leaf = x.clone().requires_grad_()
    w = like(at.values[-1])
    close(pullback(steps, at, w), torch.autograd.grad(net(leaf), leaf, w)[0])


def test_a_critic_in_place_is_the_one_that_it_computes():
    net, x = nets.Critic(inplace=True).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    twin = nets.Critic().double()
    twin.load_state_dict(net.state_dict())
    found = networks.forward(trace(net, x), x)[-1]
    close(found, net(x))
    assert not torch.allclose(found, twin(x))


def test_sums_in_place():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            kept = h
            h += self.b(x)
            return kept * 2 + h

    net, x = Body(), torch.randn(3, 4)
    close(networks.forward(trace(net, x), x)[-1], net(x))


AFTER_A_VIEW = {
    "flatten": lambda h: (h.flatten(1), h),
    "view": lambda h: (h, h.view(h.shape[0], -1)),
    "identity": lambda h: (nn.Identity.forward(None, h).contiguous(), h),
}


@pytest.mark.parametrize("case", AFTER_A_VIEW)
def test_memory_that_may_be_shared_is_refused(case):
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x):
            changed, other = AFTER_A_VIEW[case](self.a(x))
            return self.relu(changed) + other

    with pytest.raises(networks.Untraceable, match=r"may read what layer 'relu' \(ReLU\) has changed in place"):
        trace(Body(), torch.zeros(2, 4))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
        nn.Sequential(nn.Identity(), nn.Flatten(), nn.ELU(inplace=True)),
    ],
)
def test_the_network_s_input_is_not_written_over(net):
    with pytest.raises(networks.Untraceable, match=r"\((ReLU|ELU)\) changes the network's input in place$"):
        trace(net, torch.zeros(2, 4))
