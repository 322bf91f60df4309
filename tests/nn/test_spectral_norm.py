"""spectral_norm_ as a layer's user sees it: against torch's, against the dense operator, and through whatever happens
to weights in a training run."""

import copy
import gc
import io
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import genkernels as gk
from genkernels import nn as gnn
from genkernels.networks import operator_norm
from genkernels.nn.spectral_norm import parts_below
from genkernels.reference import spectral_norm as reference


def critic(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3, padding=1),
        torch.nn.LeakyReLU(0.1),
        torch.nn.Conv2d(6, 5, 4, stride=2, padding=1),
        torch.nn.LeakyReLU(0.1),
        torch.nn.ConvTranspose2d(5, 4, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 6 * 6, 3),
    ).to(dtype)


def batch(seed=1, n=3, dtype=torch.float64):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layers(module):
    return [m for m in module.modules() if parametrize.is_parametrized(m, "weight")]


def true_norm(layer, size=None):
    """The largest singular value of the weight that a layer multiplies by: as a matrix, or as a convolution."""
    (part,) = layer.parametrizations.weight
    weight = layer.weight.detach().double()
    if part.geometry.kind == gk.ops.MATRIX:
        return torch.linalg.svdvals(reference.as_matrix(weight, part.geometry.axis))[0].item()
    v, u = part._v, part._u
    eye = torch.eye(v.numel(), dtype=torch.float64)
    columns = [reference.apply(weight, part.geometry, e.view(v.shape), u.shape).flatten() for e in eye]
    return torch.linalg.svdvals(torch.stack(columns, 1))[0].item()


def steps(model, count, optimizer=None, forwards=1):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for step in range(count):
        optimizer.zero_grad()
        loss = sum(model(batch(10 * step + i)).square().mean() for i in range(forwards))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- against torch ------------------------------------------------------------------------------------------------


def test_trains_as_with_torchs_parametrization():
    ours, theirs = gnn.spectral_norm_(critic()), critic()
    for layer in list(theirs):
        if hasattr(layer, "weight"):
            parametrizations.spectral_norm(layer)
    theirs.load_state_dict(ours.state_dict())
    # the first pass after loading is an update in both
    ours.load_state_dict(theirs.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (ours, theirs)]
    torch.testing.assert_close(steps(ours, 6, optimizers[0]), steps(theirs, 6, optimizers[1]))
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(ours.eval()(batch()), theirs.eval()(batch()))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=lambda options: next(iter(options)))
def test_each_step_reads_the_weights_that_the_optimiser_left(options):
    """torch's fused optimisers change weights without a word: what was kept of them before would stay."""
    ours, theirs = gnn.spectral_norm_(critic()), critic()
    for layer in [m for m in theirs if hasattr(m, "weight")]:
        parametrizations.spectral_norm(layer)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    found = [steps(m, 4, torch.optim.Adam(m.parameters(), 0.01, **options)) for m in (ours, theirs)]
    torch.testing.assert_close(*found)
    assert abs(found[0][-1] - found[0][0]) > 1e-3


@pytest.mark.parametrize("older", [False, True])
def test_loads_both_of_torchs_formats_and_goes_on_from_them(older):
    theirs = critic()
    wrap = torch.nn.utils.spectral_norm if older else parametrizations.spectral_norm
    for layer in list(theirs):
        if hasattr(layer, "weight"):
            wrap(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(theirs, 3)
        for _ in range(40):
            theirs(batch())  # its older form starts anywhere: u and v have to find their weights first
    ours = gnn.spectral_norm_(critic(seed=5))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(batch()), theirs.eval()(batch()))
    torch.testing.assert_close(steps(ours.train(), 3), steps(theirs.train(), 3))


def test_is_taken_off_and_leaves_the_normalised_weight():
    model = gnn.spectral_norm_(critic()).eval()
    expected = model(batch())
    for layer in layers(model):
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(batch()), expected)
    assert set(model.state_dict()) == set(critic().state_dict())


# --- one update a step --------------------------------------------------------------------------------------------


def vectors(model):
    return [t.clone() for part in parts_below(model) for t in (part._u, part._v)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_all_passes_of_a_step_share_one_update():
    model = gnn.spectral_norm_(critic())
    model(batch(0))
    first = vectors(model)
    model(batch(1)).sum().backward()
    with torch.no_grad():
        model(batch(2))
    assert same(vectors(model), first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model(batch(1))
    assert not same(vectors(model), first)


def test_updates_all_layers_in_one_call(monkeypatch):
    model = gnn.spectral_norm_(critic())
    calls = []
    plain = gk.ops.spectral_norm
    monkeypatch.setattr(gk.ops, "spectral_norm", lambda *a, **k: (calls.append(len(a[0])), plain(*a, **k))[1])
    with torch.no_grad():
        model(batch())
        model(batch(2))
    assert calls == [4]


def test_weights_of_the_last_step_are_gone_before_new_ones_are_made(monkeypatch):
    model = gnn.spectral_norm_(critic())
    old, alive = [], []
    plain = gk.ops.spectral_norm

    def call(*arguments, **options):
        alive.append(sum(weight() is not None for weight in old))
        out = plain(*arguments, **options)
        old[:] = map(weakref.ref, out.weights)
        return out

    monkeypatch.setattr(gk.ops, "spectral_norm", call)
    steps(model, 3)
    assert alive == [0, 0, 0] and len(old) == 4


@pytest.mark.parametrize("first, then", [("reference", "auto"), ("auto", "reference")])
def test_passes_of_one_step_on_two_backends_have_their_gradients(first, then):
    model, other = (gnn.spectral_norm_(critic()) for _ in range(2))
    for backends, net in (((first, then), model), (("auto", "auto"), other)):
        for backend in backends:
            with gk.use_backend(backend):
                net(batch()).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("how", ["together", "one after the other", "micro-batches", "checkpoint", "reentrant"])
def test_gradients_of_several_passes_add_up(how, backend):
    with gk.use_backend(backend):
        model = gnn.spectral_norm_(critic())
        passes = [batch(i) for i in range(2)]
        weights = [layer.parametrizations.weight for layer in layers(model)]
        with torch.no_grad():
            model(passes[0])
        normal = [
            w.original
            * reference.factors(
                (part._u * reference.apply(w.original, part.geometry, part._v, part._u.shape)).sum(), 1.0, False
            )
            for w, part in zip(weights, parts_below(model), strict=True)
        ]
        plain = critic()
        mine = dict(zip((f"{i}.weight" for i in (0, 2, 4, 6)), normal, strict=True))
        biases = {k: p for k, p in model.named_parameters() if k.endswith("bias")}
        losses = [torch.func.functional_call(plain, mine | biases, x).square().sum() for x in passes]
        expected = torch.autograd.grad(sum(losses), [w.original for w in weights])

        model.zero_grad()
        if how == "together":
            sum(model(x).square().sum() for x in passes).backward()
        elif how == "one after the other":
            found = [model(x).square().sum() for x in passes]
            for loss in found:
                loss.backward()
        elif how == "micro-batches":
            for x in passes:
                model(x).square().sum().backward()
        else:
            reentrant = how == "reentrant"
            for x in passes:
                x = x.clone().requires_grad_()
                checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        for w, grad in zip(weights, expected, strict=True):
            torch.testing.assert_close(w.original.grad, grad)


def test_a_penalty_of_second_order_goes_through():
    model = gnn.spectral_norm_(critic())
    x = batch().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.square().sum().backward()
    found = [layer.parametrizations.weight.original.grad.clone() for layer in layers(model)]
    with gk.use_backend("reference"):
        model.zero_grad()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        g.square().sum().backward()
    for layer, grad in zip(layers(model), found, strict=True):
        torch.testing.assert_close(grad, layer.parametrizations.weight.original.grad)
        assert grad.abs().sum() > 0


def test_frozen_weights_get_no_gradient_and_free_ones_again():
    model = gnn.spectral_norm_(critic())
    x = batch().requires_grad_()
    model(x)  # with a graph to the weights
    model.requires_grad_(False)
    (by_x,) = torch.autograd.grad(model(x).sum(), x)
    assert by_x.abs().sum() > 0
    model(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- evaluation ---------------------------------------------------------------------------------------------------


def bounded(model, rtol=1e-3):
    for layer in layers(model):
        assert true_norm(layer) == pytest.approx(1, rel=rtol)


def test_evaluation_before_any_training_bounds_at_once_and_never_changes():
    model = gnn.spectral_norm_(critic()).eval()
    held = vectors(model)
    first = model(batch())
    bounded(model, 2e-2)
    for _ in range(100):
        assert torch.equal(model(batch()), first)
    assert same(vectors(model), held)


def test_modes_of_gradient_give_the_same_numbers():
    model = gnn.spectral_norm_(critic()).eval()
    with torch.inference_mode():
        inside = model(batch())
    with torch.no_grad():
        without = model(batch())
    x = batch().requires_grad_()
    model.requires_grad_(False)
    model(x).sum().backward()  # what was made in inference mode is no part of a graph
    assert torch.equal(inside, without) and torch.equal(model(batch()), without)


def average(model):
    copy_of = copy.deepcopy(model)
    steps(model, 3)
    with torch.no_grad():
        for a, b in zip(copy_of.state_dict().values(), model.state_dict().values(), strict=True):
            a.lerp_(b, 0.5)  # u and v as well: they are then no unit vectors
    return copy_of


def copied_in_place(model):
    other = critic(seed=9)
    with torch.no_grad():
        for layer, source in zip(layers(model), (other[0], other[2], other[4], other[6]), strict=True):
            layer.parametrizations.weight.original.copy_(3 * source.weight)
    return model


def reset(model):
    torch.manual_seed(17)
    for layer in layers(model):
        with torch.no_grad():
            torch.nn.init.normal_(layer.parametrizations.weight.original, 1.0, 2.0)
    return model


def assigned(model):
    state = {name: value.clone() for name, value in gnn.spectral_norm_(critic(seed=4)).state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def weights_alone(model):
    state = gnn.spectral_norm_(critic(seed=4)).state_dict()
    model.load_state_dict({k: v for k, v in state.items() if not k.endswith(("_u", "_v"))}, strict=False)
    return model


def converted(model):
    return model.float().double()


CHANGES = [average, copied_in_place, reset, assigned, weights_alone, converted]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_weights_that_changed_have_the_right_norm_in_evaluation(change):
    model = gnn.spectral_norm_(critic())
    steps(model, 2)
    model.eval()(batch())
    model = change(model.train())
    bounded(model.eval(), 2.1e-2)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_and_within_some_steps_in_training(change):
    model = change(gnn.spectral_norm_(critic(), n_power_iterations=8))
    steps(model, 12, torch.optim.SGD(model.parameters(), 1e-4))
    model(batch())
    bounded(model, 2e-2)


def test_a_weight_of_zeros_stays_finite_and_recovers():
    model = gnn.spectral_norm_(critic())
    with torch.no_grad():
        model[0].parametrizations.weight.original.zero_()
    losses = steps(model, 4)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(p.isfinite().all() for p in model.parameters())
    assert model[0].parametrizations.weight.original.abs().sum() > 0
    bounded(model.eval(), 2.1e-2)


def test_one_that_was_zero_when_it_was_normalised_recovers_too():
    layer = torch.nn.Linear(4, 3).double()
    torch.nn.init.zeros_(layer.weight)
    gnn.spectral_norm_(layer)
    assert not layer.weight.any()
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    assert true_norm(layer.eval()) == pytest.approx(1, rel=2.1e-2)


# --- a run that goes on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [False, True])
def test_a_resumed_run_goes_on_as_it_would_have(between):
    """Also where the checkpoint falls between an update and the optimiser's step, as in a GAN's loop."""
    model = gnn.spectral_norm_(critic())
    steps(model, 3)
    if between:
        model(batch(99))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = gnn.spectral_norm_(critic(seed=8))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert steps(other, 3) == steps(model, 3)


def test_evaluation_between_steps_changes_nothing():
    runs = []
    for evaluates in (False, True):
        model = gnn.spectral_norm_(critic())
        losses = steps(model, 2)
        if evaluates:
            model.eval()(batch())
            model.train()
        runs.append(losses + steps(model, 3))
    assert runs[0] == runs[1]


def test_a_replica_of_data_parallel_reads_the_vectors_and_leaves_nothing_behind():
    model = gnn.spectral_norm_(torch.nn.Linear(5, 4).double())
    expected = model(torch.eye(5).double())
    (part,) = parts_below(model)
    before, kept = vectors(model), len(part.group._kept)
    replica = part._replicate_for_data_parallel()
    torch.testing.assert_close(replica(model.parametrizations.weight.original).T + model.bias, expected)
    assert same(vectors(model), before) and len(part.group._kept) == kept


def test_copies_are_on_their_own():
    model = gnn.spectral_norm_(critic())
    steps(model, 1)
    other = copy.deepcopy(model)
    before = [v.clone() for v in model.state_dict().values()]
    steps(other, 2)
    assert same(before, list(model.state_dict().values()))
    part = copy.deepcopy(model[0])
    part(batch())
    assert same(before, list(model.state_dict().values()))


# --- convolutions as they are -------------------------------------------------------------------------------------


def test_true_convolutions_are_bounded_at_their_size():
    model = gnn.spectral_norm_(critic(), operator="convolution", coefficient=0.9, tolerance=1e-4)
    with pytest.raises(ValueError, match="must know the size of its input"):
        _ = model[0].weight
    model(batch())
    for layer in layers(model):
        assert true_norm(layer) == pytest.approx(0.9, rel=1e-3)
    steps(model, 4)
    model.eval()(batch())
    for layer in layers(model):
        assert true_norm(layer) == pytest.approx(0.9, rel=1e-3)


def test_another_size_of_input_starts_anew_and_says_so():
    layer = gnn.LipschitzConv2d(2, 3, 3, padding=1, tolerance=1e-4).double()
    layer(batch())
    with pytest.warns(UserWarning, match=r"\[8, 8\] so far, got \[5, 6\]: its power iteration starts anew"):
        layer(batch()[..., :5, :6])
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(30)
    layer.eval()(batch()[..., :5, :6])
    assert true_norm(layer) == pytest.approx(0.97, rel=1e-3)


def test_a_convolution_that_is_told_its_size_can_be_averaged_before_its_first_pass():
    layer = gnn.LipschitzConv2d(2, 3, 3, padding=1, input_size=(8, 8)).double()
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    steps(layer, 2)
    average.update_parameters(layer)
    steps(layer, 2)
    average.update_parameters(layer)
    average.eval()(batch())
    assert true_norm(average.module) <= 0.97 * (1 + 1e-3)
    with pytest.raises(ValueError, match=r"LipschitzConv2d: input_size must have 2 numbers, or channels .* got \[8\]"):
        gnn.LipschitzConv2d(2, 3, 3, input_size=[8])


def test_a_loaded_convolution_knows_its_size():
    one, other = (gnn.LipschitzConv2d(2, 3, 3, padding=1).double() for _ in range(2))
    one(batch())
    other.load_state_dict(one.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(other.eval()(batch()), one.eval()(batch()))
    torchs = torch.nn.Conv2d(2, 3, 3, padding=1).double()
    parametrizations.spectral_norm(torchs)
    other.load_state_dict(torchs.state_dict())  # the vectors of a matrix: of no use here
    other.eval()(batch())
    assert true_norm(other) <= 0.97 * (1 + 1e-3)


def test_lipschitz_layers_leave_small_weights_alone():
    linear = gnn.LipschitzLinear(5, 4).double()
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(1e-3)
    assert torch.equal(linear.eval().weight, linear.parametrizations.weight.original)
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(1e6)
    assert true_norm(linear) == pytest.approx(0.97, rel=1e-3)


def test_activations_have_a_lipschitz_constant_of_one():
    x = torch.linspace(-40, 40, 20001, dtype=torch.float64)
    for beta in (-3.0, 0.5, 4.0):
        single, both = gnn.LipSwish(dtype=torch.float64), gnn.CLipSwish(dtype=torch.float64)
        for layer in (single, both):
            torch.nn.init.constant_(layer.beta, beta)
        slope = torch.func.vmap(torch.func.grad(lambda t, layer=single: layer(t).sum()))(x)
        assert 0.98 < slope.abs().max() <= 1
        by_both = torch.func.vmap(torch.func.jacrev(lambda t, layer=both: layer(t.view(1, 1)).view(2)))(x)
        assert 0.98 < by_both.norm(dim=1).max() <= 1
        assert both(torch.ones(2, 3, 5).double()).shape == (2, 6, 5)


def test_certify_has_the_norm_between_its_ends():
    torch.manual_seed(3)
    for layer, size in (
        (torch.nn.Linear(7, 5), None),
        (torch.nn.Conv2d(4, 6, 3, padding=1), (9, 8)),
        (torch.nn.Conv2d(4, 6, 3, padding=1), (4, 9, 8)),
        (torch.nn.Conv1d(3, 4, 4, stride=2, padding="valid"), (12,)),
        (torch.nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), (5, 5)),
        (gnn.LipschitzConv2d(4, 6, 3, padding=1, coefficient=0.5), (9, 8)),
        (gnn.spectral_norm_(torch.nn.Conv2d(4, 6, 3, padding=1)), (9, 8)),
        (gnn.LipschitzLinear(40, 30, coefficient=0.9), None),
    ):
        layer = layer.double()
        low, high = gnn.certify(layer, size)
        weight = layer.eval().weight
        g = operator_norm.geometry_of(layer)
        spatial = size[len(size) - len(layer.kernel_size) :] if size else ()
        v, u = operator_norm.sizes_of(layer, spatial, weight)
        columns = [
            reference.apply(weight, g, e.view(v), u).flatten() for e in torch.eye(torch.Size(v).numel()).double()
        ]
        exact = torch.linalg.svdvals(torch.stack(columns, 1))[0].item()
        assert low <= exact <= high <= 1.15 * exact
        assert low == pytest.approx(exact, rel=1e-3)


def test_certify_refuses_in_one_sentence():
    for kind, sentence, layer, size in (
        (TypeError, "layer must be a Linear or a convolution, got ReLU", torch.nn.ReLU(), None),
        (
            ValueError,
            "input_size must be the size of the convolution's input, got None",
            torch.nn.Conv2d(1, 1, 3),
            None,
        ),
        (ValueError, r"must have 2 numbers, or channels before them, got \[8\]", torch.nn.Conv2d(1, 1, 3), [8]),
        (ValueError, "must be a list of integers, got 8", torch.nn.Conv2d(1, 1, 3), 8),
    ):
        with pytest.raises(kind, match=sentence):
            gnn.certify(layer, size)


# --- company ------------------------------------------------------------------------------------------------------


def test_half_models_autocast_and_functional_calls():
    model = gnn.spectral_norm_(critic(dtype=torch.float32))
    expected = model.eval()(batch(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(batch(dtype=torch.float32))
    assert inside.dtype == torch.bfloat16
    torch.testing.assert_close(inside.float(), expected, rtol=0.05, atol=0.05)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(model, state, batch(dtype=torch.float32)), expected)
    stacked = torch.func.vmap(lambda x: model(x[None])[0])(batch(dtype=torch.float32))
    torch.testing.assert_close(stacked, expected)
    half = model.bfloat16()
    torch.testing.assert_close(half(batch(dtype=torch.bfloat16)).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("operator", ["matrix", "convolution"])
def test_compiled_it_trains_to_the_same_losses(operator):
    """In one graph, with one update a step for two passes, and in evaluation afterwards."""
    torch._dynamo.reset()
    plain, compiled = (gnn.spectral_norm_(critic(), operator=operator) for _ in range(2))
    plain(batch()), compiled(batch())  # which tells convolutions their sizes
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    losses = []
    optimizer = torch.optim.SGD(compiled.parameters(), 0.05)
    for step in range(3):
        optimizer.zero_grad()
        loss = sum(run(batch(10 * step + i)).square().mean() for i in range(2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(losses, steps(plain, 3, forwards=2))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, msg=name)
    torch.testing.assert_close(
        torch.compile(compiled.eval(), fullgraph=True, backend="aot_eager")(batch(7)), plain.eval()(batch(7))
    )


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler here")
def test_compiled_weights_are_known_however_they_lie_in_memory():
    """Inductor gives parameters of four dimensions another layout, and their views other versions."""
    torch._dynamo.reset()
    x = batch(dtype=torch.float32)
    ways = (
        lambda w: w,
        lambda w: w.contiguous(memory_format=torch.channels_last),
        lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda w: w.new_zeros(1000)[100 : 100 + w.numel()].view(w.shape).copy_(w),
    )

    def network():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(*size, 3, padding=1) for size in ((2, 8), (8, 8), (8, 8), (8, 2))]
        for layer, way in zip(layers, ways, strict=True):
            layer.weight = torch.nn.Parameter(way(layer.weight.detach()))
        return gnn.spectral_norm_(torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.Tanh()))))

    plain, compiled = network(), network()
    losses = []
    for net, run in ((plain, plain), (compiled, torch.compile(compiled, fullgraph=True))):
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = sum(run(k * x).square().mean() for k in (1, 2))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-5, atol=0)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)


def test_compiled_copies_have_vectors_of_their_own():
    """One code serves them: which layer it normalises for is an input, not a part of it."""
    torch._dynamo.reset()
    first = gnn.spectral_norm_(critic())
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].parametrizations.weight.original.mul_(2).add_(0.1)
    expected = copy.deepcopy(second)(batch())
    before = {name: value.clone() for name, value in first.state_dict().items()}
    run = torch.compile(lambda net, x: net(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(second, batch()), expected)
    torch.testing.assert_close(first.state_dict(), before)
    torch.testing.assert_close(run(first, batch()), copy.deepcopy(first)(batch()))


def test_a_compiled_pass_does_not_outlive_its_layers():
    net = gnn.spectral_norm_(torch.nn.Linear(2, 2))
    (part,) = net.parametrizations.weight
    arguments = net.weight.detach(), part._number, [2, 2], [2, 1], [2], [2], part._plan, 1.0, False
    torch.ops.genkernels.spectral_norm_held(*arguments)
    del net, part
    gc.collect()
    with pytest.raises(RuntimeError, match="must run beside the layers it was compiled for, got none"):
        torch.ops.genkernels.spectral_norm_held(*arguments)


def test_an_embedding_and_layers_of_ours():
    embedding = gnn.spectral_norm_(torch.nn.Embedding(6, 4).double())
    assert true_norm(embedding.eval()) == pytest.approx(1, rel=2.1e-2)
    masked = gnn.spectral_norm_(gnn.MaskedConv2d("B", 2, 4, 3).double())
    assert masked(batch()).shape == (3, 4, 8, 8)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_sentence():
    for kind, sentence, module, options in (
        (TypeError, "module must be a torch.nn.Module, got Tensor", torch.ones(2), {}),
        (ValueError, "must be or hold a Linear or a convolution, got Tanh without any", torch.nn.Tanh(), {}),
        (ValueError, "n_power_iterations must be an integer of at least 1, got 0", critic(), {"n_power_iterations": 0}),
        (ValueError, "operator must be one of matrix, convolution, got 'svd'", critic(), {"operator": "svd"}),
        (ValueError, "coefficient must be a positive number, got -1", critic(), {"coefficient": -1}),
        (ValueError, "tolerance must be a positive number, got nan", critic(), {"tolerance": float("nan")}),
        (ValueError, "0 must not be normalised twice", gnn.spectral_norm_(critic()), {}),
        (ValueError, "Linear must not be normalised twice", torch.nn.utils.spectral_norm(torch.nn.Linear(2, 2)), {}),
        (ValueError, "a lazy layer: call it once", torch.nn.LazyLinear(3), {}),
    ):
        with pytest.raises(kind, match=sentence):
            gnn.spectral_norm_(module, **options)
    reflect = torch.nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="reflect"):
        gnn.spectral_norm_(reflect, operator="convolution")
    assert not parametrize.is_parametrized(reflect)


def test_two_processes_keep_one_critic(tmp_path):
    root = Path(gk.__file__).parents[1]
    files = [tmp_path / f"result {rank}" for rank in range(2)]
    command = [sys.executable, "-m", "tests.nn.spectral_norm_rank"]
    ranks = [
        subprocess.Popen([*command, str(rank), tmp_path / "store", file], cwd=root, stderr=subprocess.PIPE)
        for rank, file in enumerate(files)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (torch.load(file, weights_only=True) for file in files)
    for (name, a), b in zip(first.items(), second.values(), strict=True):
        assert torch.equal(a, b), name
