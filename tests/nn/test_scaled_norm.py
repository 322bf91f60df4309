"""Layers whose normalised weight is not written, against the same layers where it is."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import genkernels as gk
from genkernels import backends
from genkernels import nn as gnn
from genkernels.nn import _norm_group, _scaled_norm
from genkernels.nn._scaled_norm import Found, Product, _Convolution, _Linear
from genkernels.nn.spectral_norm import Settings, parts_below
from tests.checks import assert_as_accurate

pytestmark = pytest.mark.skipif(backends.why_missing("cpu") is not None, reason="the CPU library is not built")

# (layer, shape of its input): outputs that are few beside the weights
LAYERS = {
    "linear": (lambda: nn.Linear(30, 20), (2, 30)),
    "linear of one": (lambda: nn.Linear(30, 20, bias=False), (30,)),
    "linear of sequences": (lambda: nn.Linear(40, 20), (2, 3, 40)),
    "linear of many": (lambda: nn.Linear(40, 20), (11, 40)),
    "linear of many sequences": (lambda: nn.Linear(60, 20), (3, 4, 60)),
    "1d": (lambda: nn.Conv1d(12, 8, 5, stride=2, padding=1), (2, 12, 9)),
    "2d": (lambda: nn.Conv2d(12, 10, 3, padding=1), (1, 12, 3, 4)),
    "without bias": (lambda: nn.Conv2d(12, 10, 4, stride=2, padding=1, bias=False), (2, 12, 6, 4)),
    "groups": (lambda: nn.Conv2d(16, 20, 3, groups=2, dilation=(1, 2)), (1, 16, 4, 6)),
    "same": (lambda: nn.Conv2d(12, 10, (2, 3), padding="same"), (1, 12, 3, 4)),
    "valid": (lambda: nn.Conv2d(12, 10, 3, padding="valid"), (2, 12, 4, 5)),
    "circular": (lambda: nn.Conv2d(12, 10, 3, padding=(1, 2), padding_mode="circular"), (1, 12, 3, 3)),
    "reflect": (lambda: nn.Conv2d(12, 10, 3, padding=1, padding_mode="reflect"), (2, 12, 3, 3)),
    "3d": (lambda: nn.Conv3d(8, 6, (2, 3, 3), padding=(0, 1, 1)), (1, 8, 3, 3, 4)),
}
RULES = {
    "divided": {},
    "to another norm": {"coefficient": 2.5},
    "above": {"at_most": True, "coefficient": 0.7},
    "below": {"at_most": True, "coefficient": 90.0},
}


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(_scaled_norm, "LARGE", 100)


@pytest.fixture
def taken(monkeypatch):
    """The layers that did without their normalised weight, in order."""
    layers, plain = [], _scaled_norm.forward
    monkeypatch.setattr(
        _scaled_norm, "forward", lambda layer, *arguments: (layers.append(layer), plain(layer, *arguments))[1]
    )
    return layers


def both(make, dtype=torch.float64, iterations=2, **options):
    """The layers twice, with the same vectors: as they are, and with every weight written."""
    torch.manual_seed(1)
    module = make().to(dtype)
    other = copy.deepcopy(module)
    gnn.spectral_norm_(module, iterations, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_scaled_norm, "LARGE", 1 << 60)
        gnn.spectral_norm_(other, iterations, **options)
    assert not any(part.routed for part in parts_below(other))
    return module, other


def values(module, *passes, retain=0):
    """Outputs, gradients by inputs and by parameters: of several passes, one backward."""
    module.zero_grad()
    passes = [x.clone().requires_grad_() for x in passes]
    outputs = [module(x) for x in passes]
    loss = sum((y * torch.linspace(-1, 2, y.numel()).to(y).view_as(y)).sum() for y in outputs)
    for _ in range(retain):
        loss.backward(retain_graph=True)
    loss.backward()
    return [t.detach().clone() for t in (*outputs, *(x.grad for x in passes), *(p.grad for p in module.parameters()))]


def assert_same(found, expected, **tolerances):
    tolerances = tolerances or {"rtol": 1e-12, "atol": 1e-12}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def critic():
    """Of small batches two layers do without their weight, of large ones none; the others are always written."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=2, padding=1),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 8),
        nn.Linear(8, 1),  # too small
    )


# --- values and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_is_the_layer_with_its_weight_written(name, rule, taken):
    make, shape = LAYERS[name]
    ours, written = both(make, **RULES[rule])
    assert_same(values(ours, draw(*shape)), values(written, draw(*shape)))
    assert taken == [ours]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["linear", "2d", "without bias", "circular"])
def test_in_fp32_it_is_as_accurate_as_the_reference(name, rule, taken):
    make, shape = LAYERS[name]
    ours, written = both(make, **RULES[rule])
    exact = values(written, draw(*shape))
    for module in (ours, written):
        module.load_state_dict(both(make, **RULES[rule])[0].state_dict())
        module.float()
    ours_fp32 = values(ours, draw(*shape, dtype=torch.float32))
    with gk.use_backend("reference"):
        reference = values(written, draw(*shape, dtype=torch.float32))
    for i, (a, b, c) in enumerate(zip(ours_fp32, reference, exact, strict=True)):
        assert_as_accurate(f"{i} of {name}, {rule}", a, b, c, beside=4)
    assert taken == [ours]


def test_frozen_weights_and_inputs_without_gradient():
    ours, written = both(lambda: nn.Linear(30, 20))
    x = draw(2, 30)
    for module in (ours, written):
        module(x).sum().backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in written.parameters()])
    found = []
    for module in (ours, written):
        module.requires_grad_(False)
        found.append(torch.autograd.grad(module(x.requires_grad_()).square().sum(), x)[0])
    assert_same(found[:1], found[1:])
    for trained in ("bias", "parametrizations.weight.original"):
        for module in (ours, written):
            module.zero_grad()
            for parameter_name, parameter in module.named_parameters():
                parameter.requires_grad_(parameter_name == trained)
            module(x.detach()).square().sum().backward()
        assert_same([ours.get_parameter(trained).grad], [written.get_parameter(trained).grad])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("product", "x", "weight"),
    [
        (None, (6, 4), (3, 4)),
        (None, (10, 4), (3, 4)),
        (Product((2, 1), (1, 0), (1, 2), 2), (2, 4, 4, 4), (4, 2, 2, 2)),
        (Product((1,), (1,), (1,), 1), (1, 3, 4), (2, 3, 3)),
    ],
    ids=["linear of few", "linear of many", "2d", "1d"],
)
def test_gradients_of_first_and_second_order(product, x, weight, rule):
    settings = Settings(1, RULES[rule].get("coefficient", 1.0), RULES[rule].get("at_most", False), None)
    u, v = (nn.functional.normalize(draw(n, seed=n), dim=0) for n in (weight[0], torch.Size(weight[1:]).numel()))
    w = draw(*weight, seed=4) + 3 * torch.outer(u, v).view(weight)  # its norm is far from 0

    def layer(x, w, b):
        sigma = (u @ w.detach().flatten(1) @ v).view(1)
        found = Found.of(u, v, sigma, sigma.item(), gk.reference.spectral_norm.as_plan([gk.ops.Geometry()]), settings)
        return _Convolution.apply(x, w, b, found, product) if product else _Linear.apply(x, w, b, found)

    leaves = [t.requires_grad_() for t in (draw(*x, seed=3), w, draw(weight[0], seed=5))]
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves, fast_mode=bool(product))
    assert torch.autograd.gradcheck(layer, leaves, check_batched_grad=True)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [(draw(2, 31), "shapes cannot be multiplied"), (draw(2, 30, dtype=torch.float32), "must have the same dtype")],
)
def test_torch_says_what_a_linear_layer_cannot_take(x, sentence, taken):
    ours, _ = both(lambda: nn.Linear(30, 20))
    with pytest.raises(RuntimeError, match=sentence):
        ours(x)
    assert not taken


def test_a_penalty_of_second_order_goes_through(taken):
    ours, written = both(critic)
    found = []
    for module in (ours, written):
        x = draw(2, 3, 8, 8).requires_grad_()
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    assert len(found[0]) > 3 and len(taken) == 2
    assert_same(*found)


def test_the_traced_penalty_knows_the_layer_for_what_it_is():
    module, _ = both(lambda: nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10), nn.Linear(10, 1)))
    module(draw(4, 30))
    found = gk.testing.check_penalty(module, draw(4, 30))
    assert "four passes" in found.way and found.difference < 1e-12


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_of_zeros_or_without_a_norm(value):
    ours, written = both(lambda: nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 15)))
    for module in (ours, written):
        with torch.no_grad():
            weight = module[0].parametrizations.weight.original
            weight.zero_() if value == 0 else weight[3, 5].fill_(value)
    before = [t.clone() for t in ours[0].parametrizations.weight[0].buffers()]
    found, expected = (values(module, draw(1, 30)) for module in (ours, written))
    assert_same(before, list(ours[0].parametrizations.weight[0].buffers()), rtol=0, atol=0)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    if value == 0:
        assert_same(found, expected)
        assert ours[0].parametrizations.weight.original.grad.any()


# --- passes of a step ---------------------------------------------------------------------------------------------


def test_small_and_large_batches_of_one_step(taken):
    ours, written = both(critic)
    passes = [draw(n, 3, 8, 8, seed=n) for n in (2, 40, 3, 40)]
    found = values(ours, *passes)
    assert taken == [ours[2], ours[5]] * 2
    assert_same(found, values(written, *passes))


@pytest.mark.parametrize("how", ["one after the other", "accumulated", "checkpoint", "reentrant", "kept graph"])
def test_backward_passes_add_up(how):
    modules = both(critic)
    grads = []
    for module in modules:
        passes = [draw(2, 3, 8, 8, seed=i).requires_grad_() for i in range(2)]
        if how == "one after the other":
            losses = [module(x).square().sum() for x in passes]
            for loss in losses:
                loss.backward()
        elif how == "accumulated":
            for x in passes:
                module(x).square().sum().backward()
        elif how == "kept graph":
            loss = sum(module(x).square().sum() for x in passes)
            loss.backward(retain_graph=True)
            loss.backward()
        else:
            for x in passes:
                checkpoint(module, x, use_reentrant=how == "reentrant").square().sum().backward()
        grads.append([p.grad for p in module.parameters()] + [x.grad for x in passes])
    assert_same(*grads)


def test_a_write_between_forward_and_backward_is_noticed():
    (ours, _) = both(lambda: nn.Linear(30, 20))
    loss = ours(draw(2, 30)).sum()
    with torch.no_grad():
        ours.parametrizations.weight.original.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_update_a_step_that_writes_no_weight_until_somebody_asks(monkeypatch):
    """And whoever asks has the numbers that the update would have written."""
    ours, written = both(lambda: nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 16)))
    calls = []
    for name in ("_call", "_find"):
        plain = getattr(_norm_group, name)
        record = lambda jobs, iterations, name=name, plain=plain: (  # noqa: E731
            calls.append((name, len(jobs), iterations)),
            plain(jobs, iterations),
        )[1]
        monkeypatch.setattr(_norm_group, name, record)

    def touched(net):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.01)
        return net

    x = draw(1, 30)
    ours(x), ours(x), ours(2 * x)
    assert calls == [("_find", 2, 2)]
    written(x)
    assert torch.equal(ours[1].weight, written[1].weight) and ours[1].weight is ours[1].weight
    calls.clear()
    touched(ours)(x), touched(written)(x)
    assert calls[:2] == [("_call", 1, 2), ("_find", 1, 2)] or calls[:2] == [("_find", 1, 2), ("_call", 1, 2)]
    assert torch.equal(ours[0].weight, written[0].weight) and torch.equal(ours[1].weight, written[1].weight)
    assert len(calls) == 3  # `written`'s


def steps(module, sizes, optimizer=None, looks=False):
    optimizer = optimizer or torch.optim.SGD(module.parameters(), 0.05)
    dtype, losses = module[0].bias.dtype, []
    for step, size in enumerate(sizes):
        optimizer.zero_grad()
        if looks:
            with torch.no_grad() if step % 2 else contextlib.nullcontext():
                assert module[2].weight.isfinite().all()
        loss = sum(module(draw(n, 3, 8, 8, seed=10 * step + n, dtype=dtype)).square().mean() for n in size)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


SIZES = [(1,), (40, 2), (2, 40), (2, 2)]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_trains_to_the_same_losses(options, taken):
    modules = both(critic, iterations=1)
    found = [steps(m, SIZES, torch.optim.Adam(m.parameters(), 0.01, **options)) for m in modules]
    torch.testing.assert_close(*found)
    assert taken and abs(found[0][-1] - found[0][0]) > 1e-3


def test_what_was_looked_at_changes_no_bit():
    one, other = (both(critic, torch.float32)[0] for _ in range(2))
    assert steps(one, SIZES) == steps(other, SIZES, looks=True)
    assert_same(one.state_dict().values(), other.state_dict().values(), rtol=0, atol=0)


@pytest.mark.parametrize("between", [(), (1,), (40,), (2, 40)])
def test_a_resumed_run_goes_on_bit_for_bit(between):
    module, _ = both(critic, torch.float32)
    steps(module, SIZES)
    for n in between:  # the checkpoint falls between an update and the optimiser's step
        module(draw(n, 3, 8, 8, seed=7, dtype=torch.float32))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other, _ = both(critic, torch.float32)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert steps(other, SIZES) == steps(module, SIZES)
    assert_same(other.state_dict().values(), module.state_dict().values(), rtol=0, atol=0)


def test_with_and_without_gradients_and_in_inference_mode_the_same_bits():
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        (module, _) = both(critic, torch.float32)
        with mode():
            first = module(draw(2, 3, 8, 8, dtype=torch.float32))
        found.append(first.detach().clone())
        module(draw(2, 3, 8, 8, dtype=torch.float32)).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_vectors_of_inference_mode_serve_no_graph():
    """torch keeps nothing for a gradient of the gradient that was made there."""
    ours, written = both(critic)
    found = []
    for module in (ours, written):
        with torch.inference_mode():
            module(draw(2, 3, 8, 8))
        x = draw(2, 3, 8, 8).requires_grad_()
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    assert_same(*found)


def test_copies_and_averages_are_on_their_own(taken):
    ours, written = both(critic)
    x = draw(2, 3, 8, 8)
    for module in (ours, written):
        module(x)
    copies = [copy.deepcopy(module) for module in (ours, written)]
    for module in (ours, written):
        steps(module, [(2,), (2,)])
    taken.clear()
    assert_same(values(copies[0], x), values(copies[1], x))
    assert taken == [copies[0][2], copies[0][5]]
    averages = [torch.optim.swa_utils.AveragedModel(module, use_buffers=True) for module in (ours, written)]
    for average, module in zip(averages, (ours, written), strict=True):
        steps(module, [(1,)])
        average.update_parameters(module)
    torch.testing.assert_close(averages[0].eval()(x), averages[1].eval()(x))


def test_it_is_taken_off_with_the_normalised_weight(taken):
    ours, written = both(critic)
    x = draw(2, 3, 8, 8)
    for module in (ours, written):
        module(x)
        for i in (2, 5):
            parametrize.remove_parametrizations(module[i], "weight")
            assert type(module[i]) in (nn.Conv2d, nn.Linear)
    taken.clear()
    assert_same(values(ours, x), values(written, x))
    assert not taken


# --- when ---------------------------------------------------------------------------------------------------------


def test_it_is_taken_where_bytes_are_saved_and_nowhere_else(taken, monkeypatch):
    monkeypatch.setattr(_scaled_norm, "LARGE", 1 << 19)
    layer = gnn.spectral_norm_(nn.Linear(1024, 512))
    convolution = gnn.spectral_norm_(nn.Conv2d(256, 256, 4, stride=2, padding=1, bias=False))
    small = gnn.spectral_norm_(nn.Linear(1024, 511))
    for module, shape, expected in (
        (layer, (2, 1024), True),
        (layer, (341, 1024), True),  # 512 · 341 outputs are a third of the weights
        (layer, (342, 1024), False),
        (layer, (11, 31, 1024), True),
        (layer, (0, 1024), False),
        (convolution, (2, 256, 16, 16), True),
        (convolution, (22, 256, 16, 16), False),
        (convolution, (256, 16, 16), False),
        (small, (2, 1024), False),
    ):
        taken.clear()
        with torch.no_grad():
            module(torch.randn(shape))
        assert taken == [module] * expected, shape


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Named(nn.Linear):
    pass


def test_in_what_company_it_is_taken(taken):
    def runs(module, context=None, x=None):
        taken.clear()
        with context or contextlib.nullcontext():
            module(draw(1, 30) if x is None else x)
        return bool(taken)

    layer = gnn.spectral_norm_(nn.Linear(30, 20).double())
    assert runs(layer) and runs(layer, torch.no_grad())
    assert runs(gnn.spectral_norm_(Named(30, 20).double()))
    assert not runs(layer, gk.use_backend("reference"))
    assert not runs(layer, FlopCounterMode(display=False))
    assert not runs(layer.eval()) and runs(layer.train())
    taken.clear()
    torch.func.vmap(layer)(draw(1, 30))
    torch.func.grad(lambda x: layer(x).sum())(draw(1, 30))
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(draw(1, 30), draw(1, 30)))
    assert not taken
    single = gnn.spectral_norm_(nn.Linear(30, 20))
    assert runs(single, x=draw(1, 30, dtype=torch.float32))
    assert not runs(single, torch.autocast("cpu", dtype=torch.bfloat16), draw(1, 30, dtype=torch.float32))
    assert not runs(single.bfloat16(), x=draw(1, 30, dtype=torch.bfloat16))
    assert not runs(gnn.spectral_norm_(Halved(30, 20).double()))
    assert not runs(gnn.spectral_norm_(nn.ConvTranspose1d(12, 8, 5).double()), x=draw(1, 12, 2))
    assert not runs(gnn.spectral_norm_(nn.Conv1d(12, 8, 5).double(), operator="convolution"), x=draw(1, 12, 5))
    with pytest.raises(RuntimeError):  # torch's own sentence
        runs(layer, x=draw(1, 30, dtype=torch.float32))
    mixed = gnn.spectral_norm_(nn.Linear(30, 20).double())
    mixed.bias = nn.Parameter(mixed.bias.float())
    with pytest.raises(RuntimeError):
        runs(mixed)
    assert not taken and runs(layer)
    seen = []
    layer.parametrizations.weight.register_forward_hook(lambda *_: seen.append(1))
    assert not runs(layer) and seen
    further = gnn.spectral_norm_(nn.Linear(30, 20).double())
    parametrize.register_parametrization(further, "weight", nn.Tanh(), unsafe=True)
    assert not runs(further)


def test_hooks_of_the_layer_run(taken):
    layer, seen = gnn.spectral_norm_(nn.Linear(30, 20).double()), []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda m, i, y: (seen.append("after"), 2 * y)[1])
    layer.register_full_backward_hook(lambda *_: seen.append("back"))
    y = layer(draw(1, 30).requires_grad_())
    y.sum().backward()
    assert seen == ["before", "after", "back"] and taken == [layer]


def test_a_compiled_pass_reads_the_written_weights(taken):
    torch._dynamo.reset()
    ours, written = both(critic, iterations=1)
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = draw(2, 3, 8, 8)
    assert_same(values(run, x), values(written, x))
    assert not taken
