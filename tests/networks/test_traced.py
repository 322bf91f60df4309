"""A module is traced once, and again when it has changed; tracing leaves nothing behind."""

import copy
import gc
import pickle
import threading
import weakref
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from genkernels import networks
from genkernels.networks import trace, traced
from tests.networks import nets
from tests.networks.nets import at_random, calls

close = torch.testing.assert_close


def test_a_module_is_traced_once_for_each_shape():
    net, x = nets.Critic(), torch.zeros(2, 3, 8, 8)
    steps = traced(net, x)
    assert traced(net, torch.zeros(5, 3, 8, 8)) is steps
    assert traced(net, torch.zeros(2, 3, 16, 16)) is not steps
    assert traced(net, x) is steps
    with torch.no_grad():
        net.head.weight.add_(1)
    net.double().float()
    assert traced(net, x) is steps
    close(networks.forward(steps, torch.ones_like(x))[-1], net(torch.ones_like(x)))


def replace_layer(net):
    net[2] = nn.Linear(7, 7)


def free_then_replace(net):
    del net[1]
    gc.collect()
    net.insert(1, nn.Sigmoid())


CHANGES = {
    "another layer": replace_layer,
    "another activation": free_then_replace,
    "a layer more": lambda net: net.append(nn.Tanh()),
    "a slope": lambda net: setattr(net[1], "negative_slope", 0.9),
    "in place": lambda net: setattr(net[1], "inplace", True),
    "a bias less": lambda net: setattr(net[0], "bias", None),
    "a parametrisation": lambda net: parametrizations.weight_norm(net[0]),
    "another class": lambda net: setattr(net[3], "__class__", nn.Tanh),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_traced_again(change):
    x = torch.randn(3, 4)
    net = nets.mlp(lambda: nn.LeakyReLU(0.1))
    steps = traced(net, x)
    CHANGES[change](net)
    again = traced(net, x)
    assert again is not steps and traced(net, x) is again
    close(networks.forward(again, x)[-1], net(x))


REFUSED = {
    "a hook": (lambda net: net[1].register_forward_hook(lambda *_: None).remove, "has hooks"),
    "training": (lambda net: (net.train(), net.eval)[1], "draws random numbers"),
    "a forward": (
        lambda net: (setattr(net[0], "forward", torch.tanh), lambda: delattr(net[0], "forward"))[1],
        "a forward of its own",
    ),
    "a hook for all": (
        lambda net: nn.modules.module.register_module_forward_pre_hook(lambda *_: None).remove,
        "has hooks",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_refused_for_a_while(change):
    make, text = REFUSED[change]
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).eval(), torch.zeros(1, 4)
    for _ in range(2):
        steps = traced(net, x)
        undo = make(net)
        try:
            for _ in range(2):
                with pytest.raises(networks.Untraceable, match=text):
                    traced(net, x)
        finally:
            undo()
        assert [step.path for step in traced(net, x)] == [step.path for step in steps]


class Configured(nn.Module):
    """Its forward depends on plain attributes, near and far."""

    def __init__(self):
        super().__init__()
        self.body, self.order = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Tanh()}), ["a", "b"]
        self.config = type("Config", (), {})()
        self.config.options = {"skip": True, "deeper": [{"and": {"deeper": [{"still": 1}]}}]}
        self.config.sizes, self.config.steps = np.array([2, 2]), deque([1])
        self.unregistered = [nn.Identity()]
        self.unregistered[0].factor = 2
        self.activation = torch.tanh

    def forward(self, x):
        h = x
        for name in self.order:
            h = self.body[name](h)
        h = self.unregistered[0].factor * h / float(sum(self.config.sizes) + sum(self.config.steps))
        return self.activation(h + x if self.config.options["skip"] else h)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.order.append("a"),
        lambda net: net.config.options.update(skip=False),
        lambda net: net.config.sizes.__setitem__(0, 3),
        lambda net: net.config.steps.append(2),
        lambda net: setattr(net.unregistered[0], "factor", 7),
        lambda net: setattr(net, "activation", torch.sigmoid),
        lambda net: setattr(net, "activation", lambda x: x + 1),
        lambda net: net.body.update({"b": nn.ReLU()}),
    ],
)
def test_attributes_that_a_forward_reads(change):
    net, x = Configured(), torch.randn(3, 4)
    close(networks.forward(traced(net, x), x)[-1], net(x))
    change(net)
    close(networks.forward(traced(net, x), x)[-1], net(x))
    steps = traced(net, x)
    assert traced(net, x) is steps


def with_gradients_in_training(net, x):
    with torch.set_grad_enabled(net.training):
        return torch.tanh(x)


@pytest.mark.parametrize("first", [True, False])
def test_it_does_not_matter_under_which_mode_a_module_was_traced_first(first):
    net, x = calls(with_gradients_in_training), torch.zeros(1, 4)
    for mode in (first, not first):
        with torch.set_grad_enabled(mode):
            assert len(traced(net.train(), x)) == 2
            with pytest.raises(networks.Untraceable, match="no_grad"):
                traced(net.eval(), x)


def test_both_modes_of_training_are_kept():
    net, x = nets.Critic(), torch.zeros(1, 3, 8, 8)
    training, evaluation = traced(net.train(), x), traced(net.eval(), x)
    assert traced(net.train(), x) is training and traced(net.eval(), x) is evaluation


def test_a_compiled_module_is_traced_as_it_is_written():
    net, x = nets.Critic(), torch.zeros(1, 3, 8, 8)
    steps = trace(net, x)
    net.compile(backend="eager")
    net.stem.compile(backend="eager")
    assert [step.label for step in trace(net, x)] == [step.label for step in steps]


def test_what_was_traced_leaves_no_trace():
    net, x = nets.Critic(), torch.randn(2, 3, 8, 8)
    before = [dict(module.__dict__) for module in net.modules()]
    untouched = pickle.dumps(net)
    steps = traced(net, x)
    assert [dict(module.__dict__) for module in net.modules()] == before
    assert pickle.dumps(net) == untouched
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.head.bias.add_(1)
    close(networks.forward(traced(twin, x), x)[-1], networks.forward(steps, x)[-1] + 1)
    assert [type(step) for step in copy.deepcopy(trace(net, x))] == [type(step) for step in steps]


@pytest.mark.parametrize("make", [nets.Critic, nets.Functional, lambda: nn.Linear(3, 3)])
def test_the_cache_keeps_no_module_alive(make):
    net = make()
    x = torch.zeros(2, 3, 8, 8) if not isinstance(net, nn.Linear) else torch.zeros(2, 3)
    steps, gone = traced(net, x), weakref.ref(net)
    networks.forward(steps, x)
    del net
    gc.collect()
    assert gone() is None
    with pytest.raises(ReferenceError, match="^traced: the module of these steps, which held .* is gone$"):
        networks.forward(steps, x)
    networks.forward(trace(make(), x), x)  # whose steps keep it


def test_threads_trace_and_run_at_once():
    """fx replaces the call of every module while it traces: other threads must not notice."""
    failures = []
    net, x = nets.Critic(), torch.randn(1, 3, 8, 8)
    wanted, stop = net(x), threading.Event()

    def run():
        while not stop.is_set():
            if not torch.equal(net(x), wanted):
                failures.append("another value")

    def retrace():
        for _ in range(5):
            own = nets.Critic()
            if len(trace(own, x)) != len(traced(net, x)):
                failures.append("other steps")

    def guarded(function):
        try:
            function()
        except Exception as error:
            failures.append(repr(error))

    runners = [threading.Thread(target=guarded, args=(run,)) for _ in range(2)]
    tracers = [threading.Thread(target=guarded, args=(retrace,)) for _ in range(3)]
    for thread in runners + tracers:
        thread.start()
    for thread in tracers:
        thread.join()
    stop.set()
    for thread in runners:
        thread.join()
    assert not failures


def test_parametrisations_that_are_cached():
    net, x = at_random("spectral norm")
    with parametrize.cached():
        steps = traced(net, x)
        weights = networks.parameters(steps)
        assert weights[1]["weight"] is net[0].weight
