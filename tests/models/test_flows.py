"""NICE, RealNVP and Glow: densities, sampling, presets, training on either backend."""

import copy
import json
import math
import pickle

import pytest
import torch

import genkernels as gk
from genkernels import models
from genkernels import nn as gnn
from tests.nn.flow_checks import Watch, brute_log_det, perturb

FLOWS = {name: cls for name, cls in models.MODELS.items() if issubclass(cls, models.FlowModel)}
LIKELIHOODS = {name: cls for name, cls in models.MODELS.items() if issubclass(cls, models.LikelihoodModel)}

SMALL = {
    "nice image": lambda **kw: models.NICE(shape=(1, 4, 4), grey_levels=17, layers=1, hidden=8, **kw),
    "nice points": lambda **kw: models.NICE(shape=(4,), couplings=3, layers=1, hidden=8, prior="normal", **kw),
    "realnvp image": lambda **kw: models.RealNVP(shape=(1, 4, 6), grey_levels=17, blocks=1, hidden=4, **kw),
    "realnvp colour": lambda **kw: models.RealNVP(shape=(3, 4, 4), scales=3, blocks=1, hidden=4, **kw),
    "realnvp one level": lambda **kw: models.RealNVP(shape=(2, 3, 3), scales=1, blocks=1, hidden=4, **kw),
    "realnvp points": lambda **kw: models.RealNVP(shape=(2,), couplings=4, hidden=8, **kw),
    "glow image": lambda **kw: models.Glow(shape=(1, 4, 4), grey_levels=17, scales=2, steps=2, hidden=4, **kw),
    "glow wide image": lambda **kw: models.Glow(shape=(1, 4, 12), scales=2, steps=1, hidden=4, logit=0.05, **kw),
    "glow colour": lambda **kw: models.Glow(shape=(3, 4, 4), scales=2, steps=2, hidden=4, **kw),
    "glow plain": lambda **kw: models.Glow(
        shape=(1, 4, 4), scales=1, steps=2, hidden=4, additive=True, lu=False, learned_prior=False, **kw
    ),
    "glow points": lambda **kw: models.Glow(shape=(4,), steps=3, hidden=8, **kw),
    "maf image": lambda **kw: models.MAF(
        shape=(1, 4, 4), grey_levels=17, transforms=2, hidden=20, logit=0.05, residual=True, **kw
    ),
    "maf points": lambda **kw: models.MAF(shape=(3,), transforms=3, hidden=8, order="random", **kw),
    "nsf image": lambda **kw: models.NSF(
        shape=(1, 3, 3), grey_levels=17, couplings=2, hidden=8, bins=3, logit=0.05, **kw
    ),
    "nsf points": lambda **kw: models.NSF(
        shape=(5,), couplings=4, hidden=8, bins=4, parametrization="zuko", hidden_layers=1, **kw
    ),
    "iaf image": lambda **kw: models.IAF(shape=(1, 3, 2), grey_levels=17, transforms=2, hidden=12, **kw),
    "iaf points": lambda **kw: models.IAF(shape=(2,), transforms=3, hidden=8, scale_map="tanh", **kw),
}


def make(name, **options):
    """A small model off its start, fp64, in evaluation mode, and data for it."""
    model = perturb(SMALL[name](**options), 0.1).double().eval()
    return model, data(model, 3)


def data(model, count):
    if model.dequantize is None:
        return torch.randn(count, *model.shape, dtype=model._like.dtype)
    return torch.randint(model.grey_levels, (count, *model.shape), dtype=torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the map and the density --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_inverse_inverts_and_the_log_determinant_is_right(name, backend):
    model, _ = make(name)
    x = torch.rand(2, *model.shape, dtype=torch.float64)
    with gk.use_backend(backend):
        latents, ldj = model(x)
        back, inverse_ldj = model.inverse(latents)
        truth = brute_log_det(lambda v: torch.cat([z.flatten(1) for z in model(v)[0]], 1), x)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_ldj, -ldj, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ldj, truth, rtol=0, atol=1e-8)
    assert [tuple(z.shape[1:]) for z in latents] == [tuple(shape) for shape in model.latent_shapes]
    assert sum(z[0].numel() for z in latents) == model.dim


@pytest.mark.parametrize("name", SMALL)
def test_data_come_back_exactly_from_their_latents(name):
    model, x = make(name)
    back = model.decode(model.encode(x, generator=seeded())[0])
    if model.dequantize is None:
        torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    else:
        assert torch.equal((back * (model.grey_levels - 1)).round().to(torch.uint8), x)
        assert torch.equal(back, x.double() / (model.grey_levels - 1))


def test_bits_per_dim_by_hand():
    """Glow 1×4×4: bits/dim from its definition, every term written out."""
    model, x = make("glow image")
    got = model.bits_per_dim(x, generator=seeded(5))
    u = torch.rand(x.shape, dtype=torch.float64, generator=seeded(5))
    v = (x + u) / 17
    (early, top), ldj = model(v)
    mean, log_scale = (t.view(1, -1, 1, 1) for t in model.prior.table.chunk(2, 1))
    log_density = torch.distributions.Normal(0, 1).log_prob(early).flatten(1).sum(1)
    log_density += torch.distributions.Normal(mean, log_scale.exp()).log_prob(top).flatten(1).sum(1) + ldj
    expected = (-log_density + 16 * math.log(17)) / (16 * math.log(2))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model.loss(x, generator=seeded(5)), expected.mean())


def test_a_flow_that_leaves_data_uniform_costs_log2_levels():
    """log_prob is in units of one grey level: a uniform density on [0, 1) gives log2(levels) bits, here within the
    prior's part."""
    model = models.NICE(shape=(1, 2, 2), grey_levels=16, couplings=0).double().eval()
    x = data(model, 5)
    z = (x.double() + torch.rand(x.shape, dtype=torch.float64, generator=seeded(1))) / 16
    prior = (-z - 2 * torch.log1p(torch.exp(-z))).flatten(1).sum(1)
    torch.testing.assert_close(model.log_prob(x, generator=seeded(1)), prior - 4 * math.log(16))


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow", "maf", "iaf", "nsf"])
def test_density_of_points_integrates_to_one(name):
    few = {"couplings": 2} if name == "nsf" else {}
    model = perturb(models.MODELS[name].from_preset("points", hidden=16, **few), 0.03).double().eval()
    side = torch.linspace(-20, 20, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = model.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(mass - 1) < 1e-4


@pytest.mark.parametrize("cls", [models.Glow, models.NICE, models.MAF, models.IAF])
def test_frequencies_of_samples_are_the_masses_that_log_prob_gives(cls):
    """Two grey levels, four pixels: sixteen images. The mean of exp(log_prob) over the noise is an image's
    probability."""
    options = {"scales": 1, "steps": 2} if cls is models.Glow else {} if cls is models.NICE else {"logit": 0.05}
    model = perturb(cls(shape=(1, 2, 2), grey_levels=2, hidden=4, **options), 0.1)
    model = model.double().eval()
    draws, samples = 4000, 200_000
    bits = torch.arange(16).view(-1, 1).bitwise_right_shift(torch.arange(4)).bitwise_and(1).to(torch.uint8)
    with torch.no_grad():
        images = bits.view(16, 1, 2, 2).repeat(draws, 1, 1, 1)
        density = model.log_prob(images, generator=seeded(1)).exp().view(draws, 16)
        z = model.prior.sample((samples, *model.latent_shapes[0]), 1.0, seeded(2), None, model._like)
        x, _ = model.inverse((z,))  # before rounding, which moves what lies outside of [0, 1) to the edge
    inside = ((x >= 0) & (x < 1)).flatten(1).all(1)
    cell = ((x[inside] * 2).floor().flatten(1) * 2 ** torch.arange(4)).sum(1).long()
    frequency = torch.bincount(cell, minlength=16) / samples
    mass = density.mean(0)
    error = (density.var(0) / draws + mass / samples).sqrt()
    assert mass.min() > 20 / samples
    assert ((frequency - mass).abs() < 5 * error).all()


def test_floats_and_indices_are_the_same_images():
    model, x = make("glow image")
    as_float = x.float() / 16
    assert torch.equal(model.log_prob(x, generator=seeded()), model.log_prob(as_float, generator=seeded()))


@pytest.mark.parametrize("name", SMALL)
def test_empty_batch(name):
    model, x = make(name)
    model.train()
    x = x[:0]
    log_prob = model.log_prob(x)
    assert log_prob.shape == (0,)
    log_prob.sum().backward()
    assert model.sample(0).shape == (0, *model.shape)
    assert model.bits_per_dim(x).shape == (0,)


def test_nan_data_give_nan_for_their_own_sample_alone():
    model, _ = make("glow image")
    x = torch.rand(3, 1, 4, 4)
    clean = model.log_prob(x, generator=seeded())
    x[1, 0, 2, 2] = float("nan")
    dirty = model.log_prob(x, generator=seeded())
    assert dirty[1].isnan() and torch.equal(dirty[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("parametrization", ["nflows", "zuko"])
def test_a_spline_flow_starts_as_the_identity(parametrization):
    model = models.NSF(shape=(5,), couplings=4, hidden=8, parametrization=parametrization).double().train()
    x = 3 + 2 * torch.randn(64, 5, dtype=torch.float64)
    model.loss(x)  # the ActNorm sets itself
    (z,), ldj = model.eval()(x)
    standard, scaled = next(m for m in model.modules() if isinstance(m, gnn.ActNorm))(x)
    torch.testing.assert_close(z.sort(1).values, standard.sort(1).values, rtol=1e-5, atol=1e-5)  # but for their order
    torch.testing.assert_close(ldj, scaled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shape": (1,)}, r"NSF: shape must have at least 2 features, one half of which passes, got \(1,\)"),
        ({"parametrization": "circular"}, "NSF: parametrization must be one of nflows, zuko, got 'circular'"),
        ({"bins": 0}, "NSF: bins and hidden_layers must be at least 1, got 0 and 2"),
        ({"bound": 0.0}, "SplineCoupling: bound must be a finite number above 0, got 0.0"),
    ],
)
def test_what_a_spline_flow_refuses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.NSF(**{"shape": (4,), **options})


AUTOREGRESSIVE = [models.MAF, models.IAF]
TURNS = {
    "alternate": [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]],
    "natural": [[0, 1, 2, 3, 4, 5]] * 3,
    "reversed": [[5, 4, 3, 2, 1, 0]] * 3,
    "random": None,
}


def masked_flow(cls, order, train, **options):
    """Over 2×3 pixels of 5 levels and 3 classes, its ActNorms set from data."""
    torch.manual_seed(0)
    model = cls(shape=(1, 2, 3), grey_levels=5, hidden=20, logit=0.1, order=order, num_classes=3, **options)
    model = perturb(model, 0.1).double().train(train)
    with torch.no_grad():
        for made in (m.made for m in model.modules() if isinstance(m, gnn.AutoregressiveTransform)):
            for layer in made.layers[:-1]:
                layer.bias.add_(2)  # no ReLU sleeps
    model.initialize(data(model, 40), torch.arange(40) % 3)
    return model


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("order", TURNS)
@pytest.mark.parametrize("cls", AUTOREGRESSIVE)
def test_each_transform_sees_the_features_before_in_its_order_and_the_class(cls, order, train):
    """By the Jacobian of a model of one transform from pixels to latents and back, and of each transform of a model of
    three."""
    y = torch.tensor([2])

    def check(function, made):
        jacobian = torch.autograd.functional.jacobian(function, torch.rand(1, 6, dtype=torch.float64) * 0.8 + 0.1)
        sorted_j = jacobian[0, :, 0][made.order][:, made.order]
        assert torch.equal(sorted_j != 0, torch.ones(6, 6).tril().bool())

    whole = masked_flow(cls, order, train, transforms=1)
    (layer,) = (m for m in whole.modules() if isinstance(m, gnn.AutoregressiveTransform))
    check(lambda v: whole(v.view(1, 1, 2, 3), y)[0][0], layer.made)
    check(lambda v: whole.inverse((v,), y)[0].flatten(1), layer.made)
    model = masked_flow(cls, order, train, transforms=3)
    layers = [m for m in model.modules() if isinstance(m, gnn.AutoregressiveTransform)]
    orders = [m.made.order.tolist() for m in layers]
    if TURNS[order]:
        assert orders == TURNS[order]
    else:
        assert len({tuple(o) for o in orders}) == 3, "another in each transform"
    context = model.classes(y).detach()
    for layer in layers:
        assert (
            torch.autograd.functional.jacobian(lambda c, m=layer.made: m(torch.zeros(1, 6).double(), c), context)
            .any(-1)
            .all()
        )
        for way in (layer.forward, layer.inverse):
            check(lambda v, way=way: way(v, context)[0], layer.made)


@pytest.mark.parametrize("cls", AUTOREGRESSIVE)
def test_the_side_that_takes_one_pass_is_data_to_noise_for_maf_and_noise_to_data_for_iaf(cls):
    """Parameters are read off the data in a MAF, off the noise in an IAF."""
    layer = next(
        m
        for m in masked_flow(cls, "natural", False, transforms=1).modules()
        if isinstance(m, gnn.AutoregressiveTransform)
    )
    given, context = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    result, ldj = layer(given, context) if cls is models.MAF else layer.inverse(given, context)
    s, t = layer.made(given, context).chunk(2, 1)
    torch.testing.assert_close(result, given * s.tanh().exp() + t)
    torch.testing.assert_close(ldj, s.tanh().sum(1))


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_samples_come_from_the_generator_alone(name):
    model, _ = make(name)
    state = torch.get_rng_state()
    first = model.sample(5, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.sample(5, generator=seeded(3)), first)
    assert not torch.equal(model.sample(5, generator=seeded(4)), first)
    assert first.shape == (5, *model.shape) and not first.requires_grad
    if model.dequantize is not None:
        index = first * (model.grey_levels - 1)
        assert torch.equal(index.round() / (model.grey_levels - 1), first) and 0 <= first.min() <= first.max() <= 1


def test_sampling_leaves_the_model_as_it_is():
    model = models.Glow.from_preset("digits")
    assert model.training
    state = copy.deepcopy(model.state_dict())
    model.sample(3)  # before it has seen data
    assert model.training and torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_temperature_scales_the_latents():
    model, _ = make("nice points")
    assert torch.equal(model.sample(4, 0.0)[0], model.sample(4, 0.0)[3])
    latents, _ = model(model.sample(6, 1.0, seeded(1)))
    mean = model.prior._location_scale(latents[-1], None)[0] if model.prior.table is not None else 0
    cold, _ = model(model.sample(6, 0.5, seeded(1)))
    torch.testing.assert_close(cold[-1] - mean, 0.5 * (latents[-1] - mean), rtol=1e-9, atol=1e-9)


def test_temperature_is_exact_where_the_determinant_is_constant():
    """NICE on points, normal prior: samples at T follow p(x)^(1/T²)/Z, whose log-ratio of densities is 1/T² times that
    of p."""
    model, _ = make("nice points")
    x = model.sample(50, 0.6, seeded(2))
    cold, ldj = model(x)
    log_cold = torch.distributions.Normal(0, 0.6).log_prob(cold[-1]).sum(1) + ldj
    difference = log_cold - model.log_prob(x) / 0.6**2
    torch.testing.assert_close(difference, difference[:1].expand(50))


# --- classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, {"reversible": r})
            for name in ("nice image", "realnvp image", "glow image", "glow points")
            for r in (False, True)
        ),
        *((name, {}) for name in ("maf image", "maf points", "iaf image", "iaf points")),
    ],
)
def test_class_conditional(name, options):
    model, x = make(name, num_classes=3, **options)
    model.train()
    y = torch.tensor([0, 2, 2])
    assert not torch.allclose(model.log_prob(x, y, seeded()), model.log_prob(x, (y + 1) % 3, seeded()))
    model.loss(x, y).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.classes.weight.grad[[0, 2]].abs().sum(1).min() > 0 and model.classes.weight.grad[1].abs().sum() == 0
    one = model.sample(4, generator=seeded(), y=1)
    assert torch.equal(one, model.sample(4, generator=seeded(), y=torch.ones(4, dtype=torch.int64)))
    assert torch.equal(model.sample(4, generator=seeded()), model.sample(4, generator=seeded()))
    assert model.sample(0).shape == (0, *model.shape)
    for wrong in (None, torch.tensor([0, 1]), torch.rand(3)):
        with pytest.raises(ValueError, match=r"y must be integers \[N\] = \[3\], one class of 3 each, got"):
            model.log_prob(x, wrong)
    with pytest.raises(ValueError, match=r"y must lie in 0\.\.2, got values from 0 to 3"):
        model.log_prob(x, torch.tensor([0, 1, 3]))


def test_labels_play_no_part_without_classes():
    model, x = make("glow image")
    assert torch.equal(model.log_prob(x, torch.tensor([7, 8, 9]), seeded()), model.log_prob(x, None, seeded()))


# --- training -----------------------------------------------------------------------------------------------------


def train(model, batches, backend="auto", rate=1e-3):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator, losses = seeded(7), []
    with gk.use_backend(backend):
        for x in batches:
            optimizer.zero_grad()
            loss = model.loss(x, generator=generator)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def smooth_images(count, shape, levels):
    """Images with structure: a random smooth wave, some noise."""
    _, height, width = shape
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    phase = 6.3 * torch.rand(count, shape[0], 1, 1)
    wave = 0.5 + 0.4 * torch.sin(rows * 0.7 + columns * 0.4 + phase) + 0.05 * torch.randn(count, *shape)
    return (wave.clamp(0, 1) * (levels - 1)).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (lambda: models.Glow(shape=(1, 8, 8), grey_levels=17, scales=2, steps=4, hidden=16), 30),
        (lambda: models.RealNVP(shape=(1, 8, 8), grey_levels=17, blocks=1, hidden=8), 8),
        (lambda: models.NICE.from_preset("digits"), 30),
        (lambda: models.MAF(shape=(1, 8, 8), grey_levels=17, transforms=3, hidden=70, residual=True, logit=0.01), 30),
        (lambda: models.IAF(shape=(1, 8, 8), grey_levels=17, transforms=2, hidden=70, logit=0.01), 12),
    ],
)
def test_training_is_the_same_on_the_fused_and_on_the_reference_path(build, steps):
    """Every loss within 1e-4 relative, and the final weights."""
    batches = smooth_images(64 * steps, (1, 8, 8), 17).split(64)
    found = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        model = build()
        losses = train(model, batches, backend)
        found.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (fused, weights), (reference, reference_weights) = found
    assert fused[-1] < fused[0]
    for mine, theirs in zip(fused, reference, strict=True):
        assert abs(mine - theirs) <= 1e-4 * abs(theirs)
    assert (weights - reference_weights).norm() <= 1e-3 * reference_weights.norm()


def test_reversible_training_is_the_same():
    batches = smooth_images(64 * 8, (1, 8, 8), 17).split(64)
    found = []
    for reversible in (False, True):
        torch.manual_seed(0)
        model = models.Glow(shape=(1, 8, 8), grey_levels=17, scales=2, steps=4, hidden=8, reversible=reversible)
        found.append(train(model, batches))
    for mine, theirs in zip(*found, strict=True):
        assert abs(mine - theirs) <= 1e-4 * abs(theirs)


def test_deep_glow_inverts_after_training():
    """x to z to x within 1e-5 in fp32 through 32 steps, as trained for a little while."""
    model = models.Glow(shape=(1, 8, 8), grey_levels=17, scales=1, steps=32, hidden=8)
    train(model, smooth_images(64 * 6, (1, 8, 8), 17).split(64))
    x = torch.rand(16, 1, 8, 8)
    for backend in ("auto", "reference"):
        with gk.use_backend(backend), torch.no_grad():
            back, _ = model.inverse(model(x)[0])
        assert (back - x).abs().max() <= 1e-5


@pytest.mark.parametrize("points", [False, True])
def test_first_step_has_no_gradient_of_mere_noise(points):
    """The ActNorms start from a pass of their own; from the batch itself, every bias would have a gradient of rounding
    noise."""
    if points:
        model = models.Glow(shape=(4,), steps=4, hidden=8)
        model.loss(torch.randn(64, 4)).backward()
    else:
        model = models.Glow(shape=(1, 8, 8), grey_levels=17, scales=2, steps=4, hidden=8)
        model.loss(smooth_images(64, (1, 8, 8), 17)).backward()
    for layer in model.modules():
        if isinstance(layer, gnn.ActNorm):
            assert layer.ready and layer.bias.grad.abs().max() > 1e-5


def test_training_never_waits_for_the_device(monkeypatch):
    """The look at the data's range is for the CPU alone; nothing else in a step or a sample reads a tensor's value."""
    monkeypatch.setattr("genkernels.nn._values.readable", lambda x: False)
    for options in ({}, {"reversible": True}):
        model = models.Glow(shape=(1, 4, 4), grey_levels=17, scales=2, steps=2, hidden=4, **options)
        x = smooth_images(4, (1, 4, 4), 17)
        model.loss(x)  # the start reads whether there is something to start from
        with Watch() as watch:
            for _ in range(2):
                model.loss(x).backward()
            model.sample(2)
        assert watch.calls and not watch.reads()


@pytest.mark.parametrize("name", ["glow image", "realnvp image", "nice points"])
def test_under_autocast(name):
    model, x = make(name)
    model = model.float()
    x = x if model.dequantize is not None else x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = model.log_prob(x, generator=seeded())
    assert log_prob.dtype == torch.float32
    exact = model.log_prob(x, generator=seeded())
    assert (log_prob - exact).abs().max() <= 0.05 * exact.abs().max()
    log_prob.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- construction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("preset", ["digits", "photos32", "points"])
def test_presets(name, preset):
    model = models.MODELS[name].from_preset(preset)
    assert model.shape == {"digits": (1, 8, 8), "photos32": (3, 32, 32), "points": (2,)}[preset]
    assert model.grey_levels == {"digits": 17, "photos32": 256, "points": None}[preset]
    x = data(model, 2)
    assert torch.isfinite(model.log_prob(x)).all()
    assert model.sample(2).shape == (2, *model.shape)


def test_preset_of_the_papers_has_their_sizes():
    """On the meta device: sizes without memory."""
    sizes = {"shape": (3, 32, 32), "scales": 3, "steps": 32, "hidden": 512}
    assert models.Glow.presets["cifar10"] == models.Preset(sizes, {"batch_size": 512})
    assert all("cifar10" in cls.presets for cls in LIKELIHOODS.values())
    assert models.Glow.from_preset("cifar10", steps=1, hidden=4).hparams["steps"] == 1


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_model_is_rebuilt_from_its_hparams(name):
    model = models.MODELS[name].from_preset("digits", num_classes=10)
    x, y = smooth_images(8, (1, 8, 8), 17), torch.arange(8)
    model.loss(x, y)
    model.eval()
    twin = models.build(name, **json.loads(json.dumps(model.hparams))).eval()
    twin.load_state_dict(model.state_dict())
    assert twin.hparams == model.hparams
    for other in (twin, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x, y, seeded()), model.log_prob(x, y, seeded()))


GLOW = SMALL["glow image"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: models.Glow.from_preset("digit"),
            ValueError,
            r"preset must be one of digits, .* got 'digit'; did you mean digits\?",
        ),
        (lambda: models.build("glw"), ValueError, r"unknown model 'glw'; did you mean glow\?"),
        (lambda: models.Glow(), TypeError, "missing 1 required keyword-only argument: 'shape'"),
        (
            lambda: models.Glow(shape=(2,), image_shape=(1, 8, 8)),
            TypeError,
            "unexpected keyword argument 'image_shape'",
        ),
        (
            lambda: models.Glow(shape=(8, 8)),
            ValueError,
            r"Glow: shape must be \(C, H, W\) or \(D,\), integers of at least 1, got \(8, 8\)",
        ),
        (lambda: models.Glow(shape=(1, 8, 12), scales=3), ValueError, r"multiples of 8 for scales=3, got 8x12"),
        (lambda: models.RealNVP(shape=(1, 7, 8)), ValueError, r"multiples of 2 for scales=2, got 7x8"),
        (lambda: models.RealNVP(shape=(1, 8, 8), scales=0), ValueError, "RealNVP: scales must be at least 1, got 0"),
        (lambda: models.Glow(shape=(1, 8, 8), scales=0), ValueError, "Glow: scales must be at least 1, got 0"),
        (
            lambda: models.Glow(shape=(2,), grey_levels=17),
            ValueError,
            "Glow: grey_levels must be None for points, which have none, got 17",
        ),
        (lambda: models.Glow(shape=(3,)), ValueError, r"shape must be even for the channel split, got \(3,\)"),
        (lambda: models.RealNVP(shape=(3,)), ValueError, r"shape must be even for the channel split, got \(3,\)"),
        (lambda: models.NICE(shape=(3,)), ValueError, "must be even for the channel split, got 3"),
        (lambda: models.NICE(shape=(1, 3, 3)), ValueError, "must be even for the channel split, got 9"),
        (
            lambda: models.Glow(shape=(1, 4, 4), scales=1, grey_levels=1),
            ValueError,
            "Glow: grey_levels must be an integer from 2 to 65536, got 1",
        ),
        (lambda: GLOW().log_prob(torch.zeros(2, 1, 4, 5)), ValueError, r"x must be \[N, 1, 4, 4\], got \[2, 1, 4, 5\]"),
        (lambda: GLOW().log_prob(torch.zeros(1, 4, 4)), ValueError, r"x must be \[N, 1, 4, 4\], got \[1, 4, 4\]"),
        (
            lambda: GLOW().log_prob(torch.zeros(2, 1, 4, 4, dtype=torch.int64)),
            TypeError,
            "must be uint8 .* got torch.int64",
        ),
        (
            lambda: GLOW().log_prob(torch.full((2, 1, 4, 4), 17, dtype=torch.uint8)),
            ValueError,
            r"indices 0\.\.16, got .* 17",
        ),
        (
            lambda: models.IAF(shape=(3,), order="backwards"),
            ValueError,
            "IAF: order must be one of alternate, natural, reversed, random",
        ),
        (
            lambda: SMALL["glow points"]().log_prob(torch.zeros(2, 4, dtype=torch.uint8)),
            TypeError,
            "must be floating point",
        ),
        (lambda: GLOW().sample(-1), ValueError, "n must be an integer of at least 0, got -1"),
        (lambda: GLOW().sample(2.0), ValueError, "n must be an integer of at least 0, got 2.0"),
        (lambda: GLOW().sample(1, temperature=-0.1), ValueError, "temperature must be at least 0 and finite, got -0.1"),
        (
            lambda: GLOW().sample(1, temperature=float("nan")),
            ValueError,
            "temperature must be at least 0 and finite, got nan",
        ),
        (lambda: GLOW().sample(1, temperature="1"), ValueError, "temperature must be at least 0 and finite, got '1'"),
        (lambda: GLOW().sample(1, generator=7), TypeError, "generator must be a torch.Generator or None, got 7"),
        (lambda: GLOW().log_prob([[0.0]]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: models.MAF(shape=5), ValueError, r"MAF: shape must be \(C, H, W\) or \(D,\), .* got 5"),
        (
            lambda: models.MAF(shape=(1, 2.5, 2)),
            ValueError,
            r"MAF: shape must be \(C, H, W\) or \(D,\), .* got \(1, 2.5, 2\)",
        ),
        (lambda: models.MAF(shape=(2.5,)), ValueError, r"MAF: shape must be .* integers of at least 1, got \(2.5,\)"),
        (lambda: models.MAF(shape=(2,), hidden=2.5), ValueError, "MAF: hidden must be an integer, got 2.5"),
        (lambda: models.IAF(shape=(2,), transforms="x"), ValueError, "IAF: transforms must be an integer, got 'x'"),
        (lambda: models.IAF(shape=(2,), hidden_layers=-1), ValueError, "IAF: hidden_layers must be at least 0, got -1"),
        (lambda: models.MAF(shape=(2,), residual="no"), ValueError, "MAF: residual must be True or False, got 'no'"),
        (lambda: models.MAF(shape=(2,), num_classes=-1), ValueError, "MAF: num_classes must be at least 0, got -1"),
        (lambda: models.MAF(shape=(2,), logit=math.nan), ValueError, "MAF: logit must be a finite number, got nan"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(call, kind, words):
    with pytest.raises(kind, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_continuous_images():
    model = models.Glow(shape=(1, 4, 4), scales=1, steps=1, hidden=4, grey_levels=None)
    x = torch.randn(3, 1, 4, 4)
    assert model.log_prob(x).shape == (3,) and model.sample(2).shape == (2, 1, 4, 4)
    with pytest.raises(TypeError, match="data being continuous"):
        model.log_prob(x.to(torch.uint8))


# --- the start of the ActNorms ----------------------------------------------------------------------------------------


def test_few_examples_are_a_start_even_where_one_alone_is_drawn():
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    for seed in range(8):  # half of the draws with replacement are of one point
        model = models.Glow(shape=(2,), steps=2, hidden=4)
        model.initialize(x, generator=torch.Generator().manual_seed(seed))
        assert all(layer.ready for layer in model.modules() if isinstance(layer, gnn.ActNorm))


@pytest.mark.parametrize("train", [True, False])
def test_a_dry_run_is_no_start_and_initialize_sets_it_anew(train):
    fresh = gk.models.Glow(shape=(3, 8, 8), scales=2, steps=2, hidden=16)
    x = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    dry, again = copy.deepcopy(fresh), copy.deepcopy(fresh)
    for zeros in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), x[:1]):
        with pytest.warns(UserWarning, match="Glow: a batch .* does not count as the data-dependent start"):
            assert torch.isfinite(dry.log_prob(zeros)).all()
    assert not any(m.ready or m.bias.any() for m in dry.modules() if isinstance(m, gnn.ActNorm))
    again.log_prob(torch.randint(2, (64, 3, 8, 8), dtype=torch.uint8))  # other data: a start, and the wrong one
    found = []
    for model in (fresh, dry.train(train), again.train(train)):
        model.initialize(x, generator=seeded())
        found.append(model.eval().log_prob(x, generator=seeded()))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert -found[0].mean() / (192 * math.log(2)) < 9
    for wrong in (x[:1], torch.zeros_like(x), x[:0]):
        with pytest.raises(ValueError, match="the start needs at least two different examples, all finite"):
            fresh.initialize(wrong)


def test_points_that_are_not_finite_are_no_start():
    model = gk.models.MAF(shape=(4,), transforms=1, hidden=8)
    x = torch.randn(64, 4)
    with pytest.warns(UserWarning, match="does not count as the data-dependent start"):
        model.log_prob(torch.full((8, 4), float("nan")))
    model.loss(x)
    assert all(m.ready for m in model.modules() if isinstance(m, gnn.ActNorm))
    assert model.loss(x) < 8


def test_an_exchanged_actnorm_starts_with_the_others():
    model = gk.models.MAF(shape=(4,), transforms=1, hidden=8)
    x = torch.randn(256, 4) * 3 + 5
    model.loss(x)
    layers = [i for i, m in enumerate(model.flows[0]) if isinstance(m, gnn.ActNorm)]
    kept = model.flows[0][layers[1]].bias.clone()
    model.flows[0][layers[0]] = gnn.ActNorm(4)
    model.loss(x)
    first = model.flows[0][layers[0]]
    assert first.ready and (first.bias + 5).abs().max() < 2 and first.bias.grad is None
    assert torch.equal(model.flows[0][layers[1]].bias, kept)


def test_an_average_made_before_the_start_keeps_its_weights():
    model = gk.models.MAF(shape=(4,), transforms=2, hidden=16)
    average = torch.optim.swa_utils.AveragedModel(model)
    model.loss(torch.randn(64, 4) * 5 + 3)
    average.update_parameters(model)
    before = copy.deepcopy(average.module.state_dict())
    average.module.log_prob(torch.randn(8, 4) - 100)
    assert all(torch.equal(value, before[name]) for name, value in average.module.state_dict().items())


@pytest.mark.parametrize("cls", AUTOREGRESSIVE)
def test_an_order_copied_in_place_is_followed(cls):
    torch.manual_seed(0)
    source, target = (perturb(cls(shape=(6,), transforms=2, hidden=32, order="random"), 0.2).eval() for _ in range(2))
    x = torch.randn(5, 6)
    skeleton = copy.deepcopy(target)
    torch.testing.assert_close(
        torch.func.functional_call(skeleton, source.state_dict(), (x,)), source(x), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(skeleton(x), target(x))
    target.log_prob(x)
    with torch.no_grad():
        for name, value in target.state_dict().items():
            value.copy_(source.state_dict()[name])
    torch.testing.assert_close(target.log_prob(x), source.log_prob(x))
    torch.testing.assert_close(target.decode(target(x)[0]), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_network_follows_its_order_too(compiled_first):
    torch._dynamo.reset()
    source, target = (perturb(gnn.MADE(6, 16, order="random"), 0.2) for _ in range(2))
    x, run = torch.randn(5, 6), torch.compile(target, backend="eager")
    if compiled_first:
        run(x)
    with torch.no_grad():
        for name, value in target.state_dict().items():
            value.copy_(source.state_dict()[name])
    torch.testing.assert_close(run(x), source(x))


# --- gradients that rounding makes 0 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["realnvp image", "glow image", "nice image", "maf image", "iaf image"])
def test_a_gradient_for_an_image_is_refused_and_the_way_to_it_told(name):
    model, x = make(name)
    x = (x.double() / (model.grey_levels - 1)).to(model._like.dtype).requires_grad_()
    with pytest.raises(RuntimeError, match=r"x is rounded to grey levels, whose gradient is 0, .*: model\(x\) takes"):
        model.log_prob(x)
    latents, ldj = model((x.detach() * 0.9 + 0.05).requires_grad_())
    assert all(z.requires_grad for z in latents)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.decode(latents).sum().backward()
    latents = tuple(z.detach().requires_grad_() for z in latents)
    with pytest.raises(RuntimeError, match=r"decode rounds to grey levels, .*: inverse\(latents\) gives the image"):
        model.decode(latents)
    image, _ = model.inverse(latents)
    assert any(
        g is not None and g.abs().max() > 0 for g in torch.autograd.grad(image.sum(), latents, allow_unused=True)
    )
    with torch.no_grad():
        model.decode(latents)


def test_a_logit_that_cannot_be_used_is_refused_and_none_is_recorded():
    model = models.RealNVP(shape=(1, 8, 8), blocks=1, hidden=8, grey_levels=None)
    assert model.hparams["logit"] == 0 and not any(isinstance(m, gnn.Logit) for m in model.modules())
    assert models.RealNVP(shape=(1, 8, 8), blocks=1, hidden=8).hparams["logit"] == 0.05
    with pytest.raises(ValueError, match="RealNVP: logit must be 0 for data without grey levels, .*, got 0.1"):
        models.RealNVP(shape=(1, 8, 8), grey_levels=None, logit=0.1)
    assert models.RealNVP(shape=(2,)).hparams["logit"] == 0


# --- what a model is given --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [None, [0] * 64, torch.zeros(3, dtype=torch.long), 1, torch.full((64,), 9)])
def test_a_start_with_wrong_labels_leaves_the_model_as_it_was(y):
    model, x = models.MAF(shape=(4,), transforms=1, hidden=8, num_classes=3), torch.randn(64, 4)
    model.initialize(x, torch.zeros(64, dtype=torch.long))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="MAF: y must"):
        model.initialize(x + 1, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    models.MAF(shape=(4,), transforms=1, hidden=8).initialize(x, y)  # without classes labels play no part


@pytest.mark.parametrize("name", FLOWS)
def test_classes_have_features(name):
    with pytest.raises(ValueError, match="class_features must be at least 1 where there are classes, got 0"):
        models.build(name, shape=(4,), num_classes=3, class_features=0)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("shape", [(1, 8, 4), (1, 8, 16), (32,), (4, 8)])
def test_a_flow_takes_its_shape_and_no_other(name, shape):
    """A convolutional flow would run on images of any size, and a flattening one on any arrangement of its values."""
    model = models.build(name, shape=(1, 4, 8), **({"scales": 1} if name in ("glow", "realnvp") else {})).eval()
    with pytest.raises(ValueError, match=r"x must be \[N, 1, 4, 8\], got"):
        model(torch.rand(2, *shape))


@pytest.mark.parametrize("name", ["glow", "maf", "pixelcnn"])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_of_each_sample(name, num_classes):
    """``torch.func``: what is checked for free elsewhere is not looked at inside a transform."""
    options = {"grey_levels": None, "logit": 0.0} if name == "maf" else {"grey_levels": 17}
    model = models.MODELS[name].from_preset("digits", num_classes=num_classes, **options).double()
    x, y = smooth_images(4, (1, 8, 8), 17).double() / 16, torch.tensor([0, 2, 1, 1])
    model.loss(x, y)
    model.eval()
    model = torch.nn.ModuleDict({"model": model})
    model.forward = lambda x, y: model["model"].loss(x, y, seeded())
    parameters = dict(model.named_parameters())

    def loss(parameters, x, y):
        return torch.func.functional_call(model, parameters, (x[None], y[None]))

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="same")(parameters, x, y)
    found = torch.stack([torch.cat([g[i].flatten() for g in each.values()]) for i in range(4)])
    for i in range(4):
        one = torch.autograd.grad(loss(parameters, x[i], y[i]), list(parameters.values()), allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(one, parameters.values(), strict=True)]
        torch.testing.assert_close(found[i], torch.cat([g.flatten() for g in zeros]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_weights_assigned_to_a_model_without_storage(name):
    source = models.MODELS[name].from_preset("digits").eval()
    with torch.device("meta"):
        model = models.MODELS[name].from_preset("digits").eval()
    model.load_state_dict(source.state_dict(), assign=True)
    x = smooth_images(2, (1, 8, 8), 17)
    assert torch.equal(model.log_prob(x, generator=seeded()), source.log_prob(x, generator=seeded()))
    assert torch.equal(model.sample(2, generator=seeded()), source.sample(2, generator=seeded()))


def test_an_evaluation_by_hand_is_one():
    """In evaluation mode: no dropout, and held-out data start no ActNorm."""
    batches = [(torch.randn(8, 4) + 50, torch.zeros(8))]
    model = models.MAF(shape=(4,), transforms=1, hidden=8)
    model.flows[0][1].made.eval()
    found = model.evaluate(batches)["nats"]
    assert not any(layer.ready for layer in model.modules() if isinstance(layer, gnn.ActNorm))
    assert model.training and not model.flows[0][1].made.training
    assert found == model.eval().evaluate(batches)["nats"]
    pixels = models.PixelCNN(shape=(1, 4, 4), grey_levels=4, width=8, layers=1, dropout=0.5)
    batches = [(torch.randint(4, (8, 1, 4, 4), dtype=torch.uint8), torch.zeros(8))]
    assert pixels.evaluate(batches) == pixels.evaluate(batches)


def test_estimates():
    nan, of = math.nan, models.Estimate.of
    for values in (torch.ones(5, 2), torch.ones(5, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"Estimate: the values of a must be \[N\], one an example, got \["):
            of("a", "", values)
    values = 1e9 + torch.randn(1000, dtype=torch.float64)
    whole = of("a", "", values)
    assert whole.standard_error == pytest.approx(float(values.std(unbiased=False)) / 1000**0.5, rel=1e-6)
    pooled = models.Estimate.pooled([of("a", "", values[:300]), of("a", "", values[:0]), of("a", "", values[300:])])
    assert (pooled.value, pooled.standard_error) == pytest.approx((whole.value, whole.standard_error), rel=1e-6)
    without = models.Estimate.pooled([models.Estimate("a", "", value, nan, 5) for value in (1.0, 2.0)])
    assert without.value == 1.5 and math.isnan(without.standard_error) and str(without) == "1.5000"
    assert math.isnan(of("a", "", torch.empty(0)).value)
