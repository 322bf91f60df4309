"""`swap_` itself, on modules of torch and of a library made up for it."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as by_hook
from torch.utils.checkpoint import checkpoint

import genkernels as gk
from genkernels.swap import _rules, _walk, swap_
from tests.swap.checks import check_swap


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return 2 * self.weight * x


class Faster(Double):
    def forward(self, x):
        self._gk_calls = getattr(self, "_gk_calls", 0) + 1
        return self.weight * x + self.weight * x


class Triple(Double):
    def forward(self, x):
        return 3 * self.weight * x


@pytest.fixture
def toys(monkeypatch):
    """A library with one class, `Double`."""
    library = _rules.Library("tests", ("1.0",), {Double: lambda thing: _rules.Becomes(Faster, "a note")})
    monkeypatch.setitem(sys.modules, "genkernels.swap.toys", types.SimpleNamespace(LIBRARY=library))
    monkeypatch.setitem(_walk.FILES, "tests", "toys")
    monkeypatch.setattr(Faster, "__module__", "genkernels.swap.toys")
    monkeypatch.setattr(_walk.metadata, "version", lambda name: "1.0")


def test_a_model_is_swapped_reported_and_given_back(toys):
    shared = Double()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(Double(), nn.ReLU()), "c": shared, "d": Triple()})
    x, kept = torch.randn(3, 2), list(model.parameters())
    optimizer = torch.optim.SGD(kept, 0.1)
    report = swap_(model)
    assert [(entry.name, bool(entry.became)) for entry in report.entries] == [
        ("a, c", True),
        ("b.0", True),
        ("d", False),
    ]
    assert report.entries[2].reason == "a subclass of Double, which changes forward"
    assert isinstance(model["a"], Double) and type(model["b"][0]) is Faster
    assert all(p is q for p, q in zip(model.parameters(), kept, strict=True))
    model["a"](x).sum().backward()
    optimizer.step()
    text = str(report)
    assert text.startswith("2 of 3 modules swapped") and "a note" in text and "stays" in text
    trained = model["a"].weight.detach().clone()
    report.undo()
    assert type(model["a"]) is Double and "_gk_calls" not in vars(model["a"])
    assert torch.equal(model["a"].weight, trained) and not torch.equal(trained, torch.ones(2))
    report.undo()  # has nothing left to do


def test_what_stays_and_why(toys, monkeypatch):
    def reason(thing, **options):
        model = nn.ModuleList([thing, Double()])
        (entry,) = [e for e in swap_(model, **options).entries if e.name == "0"]
        return entry.reason if not entry.became else None

    replaced, half, two = Double(), Double().half(), Double()
    replaced.forward = lambda x: x
    two.register_buffer("far", torch.zeros(2, device="meta"))
    assert reason(replaced) == "forward of this one was replaced"
    assert reason(half).startswith("held in torch.float16")
    assert reason(half, dtype=torch.float16) is None
    assert reason(two) == "on several devices: cpu, meta"
    done = nn.ModuleList([Double()])
    swap_(done)
    with pytest.warns(UserWarning, match="no module of this ModuleList was swapped: each of them has its reason"):
        assert swap_(done).entries[0].reason == "swapped already"
    monkeypatch.setattr(_walk.metadata, "version", lambda name: "2.0")
    with pytest.warns(UserWarning):
        report = swap_(nn.ModuleList([Double()]))
    assert "tests 2.0 is installed; its swaps were held against 1.0." in str(report) and not report.swapped


def test_what_is_refused(toys):
    with pytest.warns(UserWarning, match="no module of this Linear was swapped: there is none of torch, nflows"):
        assert not swap_(nn.Linear(2, 2)).entries
    for wrong, sentence in (
        (3, "model must be a torch.nn.Module, got int"),
        (torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "got a scripted one: swap the model that"),
        (torch.compile(nn.Linear(2, 2)), "got a compiled one: swap first, compile then"),
    ):
        with pytest.raises(TypeError, match=sentence):
            swap_(wrong)
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype, got 'half'"):
        swap_(nn.Linear(2, 2), dtype="half")
    model = nn.ModuleList([Double(), Double()])
    report = swap_(model)
    model[0].__class__ = Triple
    with pytest.raises(RuntimeError, match="must still be the Faster that it became, got Triple"):
        report.undo()
    assert type(model[1]) is Faster


def test_what_is_compiled_in_a_model_stays(toys):
    whole, in_place = torch.compile(Double(), backend="eager"), Double()
    in_place.compile(backend="eager")
    report = swap_(nn.ModuleList([whole, in_place, Double()]))
    assert [entry.reason for entry in report.entries] == [_walk.COMPILED, _walk.COMPILED, "a note"]


def test_nothing_is_imported_that_the_model_does_not_use():
    code = (
        "import sys, warnings, torch, genkernels as gk; warnings.simplefilter('ignore');"
        "gk.swap_(torch.nn.Linear(2, 2));"
        "print([n for n in ('nflows', 'normflows', 'zuko', 'FrEIA') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- torch's spectral norm -------------------------------------------------------------------------------------------


def critic(norm):
    return lambda: nn.Sequential(
        norm(nn.Conv2d(2, 5, 3)), nn.LeakyReLU(0.1), norm(nn.Conv2d(5, 4, 3, stride=2), n_power_iterations=2),
        nn.Flatten(), norm(nn.Linear(16, 3)), nn.Tanh(), nn.Linear(3, 1),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, by_hook], ids=["parametrization", "hook"])
def test_spectral_norm_is_torchs(norm, dtype):
    """Two passes a step, as of real and fake batches, each with its own power iteration; u and v alike after them."""
    generator = torch.Generator().manual_seed(3)
    real, fake = (torch.randn(3, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))

    def run(model):
        found = {"real": model(real), "fake": model(fake)}
        return found | {name: b + 0 * found["real"].sum() for name, b in model.named_buffers()}

    check_swap(critic(norm), run, dtype, swapped=3, copies=norm is not by_hook)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, by_hook], ids=["parametrization", "hook"])
def test_a_layer_that_a_pass_leaves_out_stays_where_it_was(norm):
    torch.manual_seed(0)
    theirs = nn.ModuleList([norm(nn.Linear(4, 4)) for _ in range(3)]).double()
    ours = copy.deepcopy(theirs)
    swap_(ours)
    x, optimizers = torch.randn(2, 4).double(), [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs)]
    for used in ((0, 1), (2,), (2, 0), (1, 1, 2)):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(sum(model[i](x).square().sum() for i in used))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses)
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)


def test_spectral_norms_that_stay():
    model = nn.ModuleList([norm(nn.ConvTranspose2d(2, 3, 3)) for norm in (by_hook, parametrizations.spectral_norm)])
    report = gk.swap_(model)
    assert [entry.became != "" for entry in report.entries] == [False, True]
    assert report.entries[0].reason.startswith("of a transposed convolution")


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, by_hook], ids=["parametrization", "hook"])
def test_spectral_norm_stays_torchs_where_that_is_faster(norm, monkeypatch):
    """In models of few small layers, and in evaluation."""
    monkeypatch.setattr(sys.modules["genkernels.swap.torch"], "FEW", 5)
    for widths, reason in (([8] * 4, "of fewer than 5 small layers"), ([8] * 5, ""), ([300], "")):
        model = nn.Sequential(*(norm(nn.Linear(width, width)) for width in widths))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if reason else "error")
            entries = swap_(model).entries
        assert all(entry.reason.startswith(reason) and bool(entry.became) != bool(reason) for entry in entries)
    theirs = copy.deepcopy(model)
    monkeypatch.setattr(sys.modules["genkernels.swap.torch"], "_step", None)
    x = torch.randn(2, 300)
    assert torch.equal(model.eval()(x), theirs.eval()(x))
    with pytest.raises(TypeError):
        model.train()(x)


def test_spectral_norm_by_the_reference_and_in_inference():
    torch.manual_seed(0)
    theirs = critic(parametrizations.spectral_norm)()
    ours, x = copy.deepcopy(theirs), torch.randn(3, 2, 8, 8)
    swap_(ours)
    for context in (torch.no_grad(), torch.inference_mode(), gk.use_backend("reference")):
        with context:
            torch.testing.assert_close(ours(x), theirs(x))
            torch.testing.assert_close(ours(x), theirs(x))
    (ours(x).sum() + ours(x).sum()).backward()
    (theirs(x).sum() + theirs(x).sum()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, by_hook], ids=["parametrization", "hook"])
def test_spectral_norm_under_gradient_checkpointing(norm, reentrant):
    """The pass that is run again takes another power iteration, by which torch differentiates; all of it is the new."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    theirs = critic(norm)().double()
    ours = copy.deepcopy(theirs)
    swap_(ours)
    for model in (ours, theirs):
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, by_hook], ids=["parametrization", "hook"])
def test_spectral_norm_of_large_layers_and_its_second_gradient(norm, monkeypatch):
    """A gradient penalty, whose graph goes through the gradients of the weights' norms."""
    monkeypatch.setattr(sys.modules["genkernels.swap.torch"], "LARGE", 50)
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def run(model):
        given = x.clone().requires_grad_()
        value = model(given)
        (slope,) = torch.autograd.grad(value.sum(), given, create_graph=True)
        weights = [p for p in model.parameters() if p.dim() > 1]
        slopes = torch.autograd.grad(value.square().sum(), weights, create_graph=True)
        return {"value": value, "slope": slope} | {f"slope {i}": s for i, s in enumerate(slopes)}

    check_swap(critic(norm), run, torch.float64, swapped=3, copies=False)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, by_hook], ids=["parametrization", "hook"])
def test_a_norm_that_is_taken_off_and_layers_that_share_a_weight(norm):
    def make():  # torch takes a parametrization off all copies of a module at once
        torch.manual_seed(0)
        layers = [norm(nn.Linear(4, 4)) for _ in range(3)]
        if norm is by_hook:
            layers[2].weight_orig = layers[0].weight_orig
        else:
            layers[2].parametrizations.weight.original = layers[0].parametrizations.weight.original
        return nn.Sequential(*layers, layers[1], nn.Linear(4, 4)).double()

    ours, theirs, x = make(), make(), torch.randn(5, 4).double()
    swap_(ours)
    for taken in (False, True):
        for model in (ours, theirs):
            if taken and norm is by_hook:
                nn.utils.remove_spectral_norm(model[1])
            elif taken:
                nn.utils.parametrize.remove_parametrizations(model[1], "weight")
            model.zero_grad()
            model(x).square().sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


def test_a_swapped_critic_in_many_threads():
    torch.manual_seed(0)
    theirs, x = critic(parametrizations.spectral_norm)().eval(), torch.randn(3, 2, 8, 8)
    ours = copy.deepcopy(theirs)
    swap_(ours)
    expected = theirs(x)

    def run(_):
        with torch.no_grad():
            return [ours(x) for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(run, range(4)):
            torch.testing.assert_close(found, [expected] * 20)


def test_a_swapped_model_is_traced_as_it_was():
    from tests.swap.test_copies import Multiplies, masked

    conv, x = masked(Multiplies), torch.randn(2, 2, 5, 4)
    expected = conv(x)
    swap_(conv)
    torch.testing.assert_close(torch.jit.trace(conv, (x,))(x), expected)
