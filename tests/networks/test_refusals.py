"""What cannot become steps is refused in one sentence that names the layer and says why."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from genkernels import networks
from genkernels import nn as gnn
from genkernels.networks import trace
from tests.networks import nets
from tests.networks.nets import calls


def changed(register):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    register(net)
    return net


def swallow(self, x):
    try:
        return torch.softmax(x, 1)
    except ValueError:
        return x


def without_grad(self, x):
    with torch.no_grad():
        h = torch.tanh(x)
    return h + x


def in_bf16(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.tanh(x)


def remember(self, x):
    self.features = torch.tanh(x)
    return self.features


class Reversed(torch.autograd.Function):
    """Whose derivative is not that of what it computes."""

    @staticmethod
    def forward(ctx, x):
        return -x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Dense(nn.Linear):
    pass


class Quieter(nets.LipSwish):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Unknown(nn.Module):
    genkernels_activation = ("swish",)

    def forward(self, x):
        return x * torch.sigmoid(x)


class Wider(gnn.BiasLeakyReLU):
    def forward(self, x):
        return super().forward(2 * x)


class Pair(nn.Module):
    def forward(self, x, y):
        return x + y


NO_RULE = "is none of Linear, Conv1d, …: it has no rule"
HOOKS = "has hooks or a forward of its own, which its weights do not tell"
COUPLES = "couples the samples of a batch: it normalises by their statistics"
OWN_MODES = "runs under no_grad, inference mode or autocast of its own"
linear = nn.Linear(4, 4)

#: network, the layer in the message, the reason
LAYERS = [
    (lambda: nn.Sequential(linear, nn.Sequential(nn.LayerNorm(4))), "layer '1.0' (LayerNorm)", NO_RULE),
    (lambda: nn.LayerNorm(4), "the network (LayerNorm)", NO_RULE),
    (lambda: nn.Sequential(linear, nn.Softmax(1)), "layer '1' (Softmax)", NO_RULE),
    (lambda: nn.Sequential(linear, nn.BatchNorm1d(4)), "layer '1' (BatchNorm1d)", COUPLES),
    (lambda: nn.Sequential(linear, nn.BatchNorm1d(4)).eval(), "layer '1' (BatchNorm1d)", NO_RULE),
    (lambda: nn.Dropout(0.5), "the network (Dropout)", "draws random numbers: p must be 0 in training, got 0.5"),
    (lambda: nn.Sequential(Louder(4, 4)), "layer '0' (Louder)", "is a subclass of Linear: it may do something else"),
    (lambda: nn.Sequential(Dense(4, 4)), "layer '0' (Dense)", "is a subclass of Linear: it may do something else"),
    (Quieter, "'softplus' in the network (Quieter)", "is called with something that is no value of the network"),
    (Unknown, "the network (Unknown)", "says that it is 'swish' of 0 parameters, which is none of ACTIVATIONS"),
    (lambda: changed(lambda net: net[0].register_forward_hook(print)), "layer '0' (Linear)", HOOKS),
    (lambda: changed(lambda net: net[1].register_full_backward_hook(print)), "layer '1' (ReLU)", HOOKS),
    (lambda: changed(lambda net: net.register_forward_pre_hook(print)), "the network (Sequential)", HOOKS),
    (lambda: changed(lambda net: nn.utils.weight_norm(net[0])), "layer '0' (Linear)", HOOKS),
    (lambda: changed(lambda net: prune.random_unstructured(net[0], "weight", 0.5)), "layer '0' (Linear)", HOOKS),
    (lambda: changed(lambda net: setattr(net[0], "forward", torch.tanh)), "layer '0' (Linear)", HOOKS),
    (lambda: torch.jit.script(linear), "the network (RecursiveScriptModule)", HOOKS),
    (
        lambda: gnn.BiasLeakyReLU(4, clamp=2.0),
        "the network (BiasLeakyReLU)",
        "clamps its output: clamp must be None, got 2",
    ),
    (lambda: gnn.BiasLeakyReLU(3), "the network (BiasLeakyReLU)", "takes samples of 3 channels, got [4]"),
    (lambda: gnn.FilteredUpsample(), "the network (FilteredUpsample)", "takes samples of channels and 2 spatial axes"),
    (lambda: Wider(4), "the network (Wider)", "is a subclass of BiasLeakyReLU: it may do something else"),
    (Pair, "the network (Pair)", "takes several inputs (x, y): it must take one"),
    (
        lambda: nn.Linear(5, 4),
        "the network (Linear)",
        "takes 5 features along the last axis of a sample, got samples [4]",
    ),
    (lambda: nn.Conv1d(4, 4, 1), "the network (Conv1d)", "takes samples of 4 channels and 1 spatial axes, got [4]"),
]

#: what forward does with itself and x, the function in the message, the reason
FUNCTIONS = [
    (lambda s, x: (x, x), "", "must give one tensor that depends on its input, got a tuple"),
    (lambda s, x: s.weight, "", "must give one tensor that depends on its input, got a parameter or buffer"),
    (lambda s, x: None, "", "must give one tensor that depends on its input, got a NoneType"),
    (lambda s, x: x if x.sum() > 0 else -x, "sum", "couples the samples of a batch: it takes them all together"),
    (lambda s, x: x if (x > 0) else -x, "gt", "has no rule"),
    (lambda s, x: x if x.requires_grad else -x, "", "reads .requires_grad of a value"),
    (lambda s, x: x if x else -x, "bool", "branches on the values that pass through it"),
    (lambda s, x: sum(row for row in x), "unbind", "has no rule"),
    (lambda s, x: x.item(), "item", "has no rule"),
    (lambda s, x: x if x.is_cuda else -x, "", "reads .is_cuda of a value"),
    (lambda s, x: x / x.shape[0], "div", "computes with the batch's size"),
    (lambda s, x: x / len(x), "len", "computes with the batch's size"),
    (lambda s, x: x if x.shape[0] > 1 else -x, "", "computes with the batch's size"),
    (lambda s, x: x - x.mean(0), "mean", "couples the samples of a batch: it works along their axis"),
    (lambda s, x: torch.cat([x, x]), "cat", "couples the samples of a batch: it works along their axis"),
    (lambda s, x: x.flatten(), "flatten", "couples the samples of a batch: it works along their axis"),
    (lambda s, x: x.view(2, 4), "view", "must keep the batch as its first axis: x.shape[0] or -1"),
    (lambda s, x: x.view(-1, 2), "view", "makes samples [2] of 4 elements"),
    (lambda s, x: x.squeeze(), "squeeze", "drops the batch's axis too where there is one sample: name the axis"),
    (lambda s, x: torch.softmax(x, 1), "softmax", "has no rule"),
    (lambda s, x: x[:, :2], "getitem", "has no rule"),
    (lambda s, x: x**2, "pow", "has no rule"),
    (lambda s, x: torch.add(x, 1, out=x), "add", "has no rule with these arguments: "),
    (lambda s, x: x * torch.tanh(x), "mul", "multiplies or divides by a value of the network: that is not linear"),
    (lambda s, x: 1 / x, "rdiv", "has no rule"),
    (
        lambda s, x: x * s.constant,
        "mul",
        "computes with something that is neither a number nor a parameter nor a buffer",
    ),
    (lambda s, x: x + torch.randn(4), "", "computes 'randn' of tensors that are no values of the network"),
    (lambda s, x: x + torch.randn_like(x), "randn_like", "has no rule"),
    (lambda s, x: x * random.random(), "", "draws random numbers in its forward, or another thread meanwhile"),
    (lambda s, x: F.linear(x, s.weight * 2), "mul", "is called with something that is no value of the network"),
    (
        lambda s, x: F.linear(x, s.constant),
        "linear",
        "needs a weight and a bias that are parameters or buffers as they",
    ),
    (lambda s, x: x * s.weight, "mul", "combines samples [4] with a tensor [4, 4], which does not broadcast over them"),
    (lambda s, x: x + x.sum(1, keepdim=True), "add", "adds samples of two shapes, [4] and [1]"),
    (lambda s, x: s.weight.add_(x), "add_", "changes a parameter or buffer in place"),
    (lambda s, x: x.to(x.dtype), "", "reads .dtype of a value"),
    (lambda s, x: F.dropout(x), "dropout", "draws random numbers: p must be 0 in training, got 0.5"),
    (lambda s, x: nn.Tanh()(x), "", "calls a Tanh that is not registered in the network"),
    (
        lambda s, x: networks.forward(networks.traced(s.tanh, x), x)[-1],
        "",
        "cannot be traced: TypeError: trace: example must",
    ),
    (lambda s, x: torch.func.functional_call(s.tanh, {}, (x,)) @ s.weight, "matmul", "has no rule"),
    (lambda s, x: s.missing, "", "cannot be traced: AttributeError: 'Net' object has no attribute 'missing'"),
    (swallow, "softmax", "has no rule"),
    (lambda s, x: Reversed.apply(x), "neg", OWN_MODES),
    (without_grad, "tanh", OWN_MODES),
    (in_bf16, "tanh", OWN_MODES),
    (remember, "", "changes attributes of its modules in its forward"),
]

PICTURES = [
    (
        lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        "pads by 'reflect': only 'zeros' and 'circular' have",
    ),
    (lambda: nn.Conv2d(3, 3, 9), "gives nothing: its output would be [3, -2, -2]"),
    (lambda: nn.Conv2d(3, 3, 17, padding=8, padding_mode="circular"), "wraps around more than once: padding"),
    (lambda: nn.Conv2d(2, 3, 1), "takes samples of 2 channels and 2 spatial axes, got [3, 6, 6] (the first axis"),
    (lambda: nn.MaxPool2d(2, return_indices=True), "gives indices beside its maxima"),
    (lambda: nn.AdaptiveAvgPool2d(4), "pools [6, 6] to [4, 4]: only windows of one size have a rule"),
    (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), "resizes by 'bicubic': that has no rule"),
    (lambda: nn.AdaptiveMaxPool2d(1), NO_RULE),
    (lambda: nn.InstanceNorm2d(3), NO_RULE),
    (lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), COUPLES),
]


def sentence(net, x):
    before = copy.copy(net.__dict__)
    with pytest.raises(networks.Untraceable) as refused:
        trace(net, x)
    assert net.__dict__ == before
    assert "\n" not in str(refused.value)
    assert refused.value.couples_samples == ("couples" in str(refused.value))
    return refused.value


@pytest.mark.parametrize(("make", "layer", "reason"), LAYERS)
def test_layers(make, layer, reason):
    said = sentence(make(), torch.zeros(2, 4))
    assert str(said).startswith(f"trace: {layer} {reason}")
    again = pickle.loads(pickle.dumps(said))
    assert (type(again), str(again), again.couples_samples) == (type(said), str(said), said.couples_samples)


@pytest.mark.parametrize(("function", "name", "reason"), FUNCTIONS)
def test_functions(function, name, reason):
    where = f"{name!r} in the network (Net)" if name else "the network (Net)"
    assert str(sentence(calls(function), torch.zeros(2, 4))).startswith(f"trace: {where} {reason}")


@pytest.mark.parametrize(("make", "reason"), PICTURES)
def test_layers_of_pictures(make, reason):
    net = make()
    said = sentence(nn.Sequential(net), torch.zeros(2, 3, 6, 6))
    assert str(said).startswith(f"trace: layer '0' ({type(net).__name__}) {reason}")


def test_a_function_with_a_gradient_of_its_own_is_refused_without_gradients_too():
    with torch.no_grad():
        assert OWN_MODES in str(sentence(calls(lambda s, x: Reversed.apply(x)), torch.zeros(2, 4)))


@pytest.mark.parametrize("other", [lambda s: s.weight, lambda s: s.constant])
def test_a_layer_that_is_called_with_other_tensors(other):
    net = calls(lambda s, x: torch.func.functional_call(s.layer, {"weight": other(s)}, x), layer=nn.Linear(4, 4))
    said = sentence(net, torch.zeros(2, 4))
    assert str(said) == "trace: layer 'layer' (Linear) is called with other tensors than its own"


def test_methods_that_were_replaced(monkeypatch):
    net, x = nn.Conv1d(4, 4, 1), torch.zeros(2, 4, 3)
    net._conv_forward = lambda *arguments: arguments[0]
    assert str(sentence(net, x)) == "trace: the network (Conv1d) has a method of its own, '_conv_forward'"
    monkeypatch.setattr(nn.Conv1d, "forward", lambda self, x: -x)
    assert str(sentence(nn.Conv1d(4, 4, 1), x)).endswith("(Conv1d) has another forward than its class came with")


def test_a_tensor_that_two_modules_share():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return F.linear(x, self.b.weight)

    assert "reads a tensor 'weight' that belongs to no module or to several" in str(sentence(Tied(), torch.zeros(1, 4)))


@pytest.mark.parametrize("name", ["features", "buffer", "list"])
def test_what_a_forward_has_kept_is_taken_back(name):
    def keep(net, x):
        if name == "list":
            net.order.append(torch.tanh(x))
        else:
            setattr(net, name, torch.tanh(x))
        return x

    net = calls(keep)
    net.register_buffer("buffer", torch.zeros(4))
    net.order = []
    assert "changes attributes of its modules in its forward" in str(sentence(net, torch.zeros(2, 4)))
    assert net.buffer.shape == (4,) and not hasattr(net, "features")


def test_samples_without_a_batch_are_told():
    with pytest.raises(networks.Untraceable, match=r"got \[8, 8\] \(the first axis of the example is the batch\)$"):
        trace(nn.Conv2d(3, 4, 3), torch.zeros(3, 8, 8))
    with pytest.raises(networks.Untraceable, match=r"got samples \[\] \(the first axis of the example is the batch\)$"):
        trace(nn.Linear(4, 4), torch.zeros(4))
    with pytest.raises(TypeError, match=r"^trace: example must be a tensor \[N, \*input\], got shape \[\]$"):
        trace(nn.Linear(4, 4), torch.tensor(0.0))
    with pytest.raises(TypeError, match=r"^trace: module must be an nn.Module, got builtin_function_or_method$"):
        trace(torch.relu, torch.zeros(2, 4))


def test_a_hook_for_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "has hooks" in str(sentence(nn.Linear(4, 4), torch.zeros(1, 4)))
    finally:
        handle.remove()
    trace(nn.Linear(4, 4), torch.zeros(1, 4))


def test_a_weight_that_is_not_what_its_layer_says():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.randn(5, 4))
    assert "has a weight [5, 4] where its attributes say [4, 4]" in str(sentence(layer, torch.zeros(1, 4)))


def test_which_modules_couple_samples():
    assert networks.couples_samples(nets.Critic()) == ""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert networks.couples_samples(net).startswith("layer '1' (BatchNorm1d) couples the samples of a batch")
    assert networks.couples_samples(net.eval()) == ""
