"""The ends of a flow: dequantisation, logit, split and prior."""

import math
import warnings

import pytest
import torch

import genkernels as gk
from genkernels import nn as gnn
from tests.nn.flow_checks import brute_log_det, perturb


def test_every_level_comes_back():
    for levels in (2, 17, 256):
        layer = gnn.Dequantize(levels)
        index = torch.arange(levels, dtype=torch.uint8).repeat(50).view(-1, 1)
        z, ldj = layer(index)
        assert 0 <= z.min() and z.max() <= 1
        back, inverse_ldj = layer.inverse(z)
        assert torch.equal((back * (levels - 1)).round().to(torch.uint8), index)
        torch.testing.assert_close(ldj, torch.full((len(index),), -math.log(levels)))
        assert torch.equal(ldj, -inverse_ldj)
        as_float = index.float() / (levels - 1)
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        assert torch.equal(layer(index, generator=generators[0])[0], layer(as_float, generator=generators[1])[0])


def test_dequantisation_noise_is_uniform_and_repeats():
    layer = gnn.Dequantize(4)
    index = torch.full((1, 100_000), 2, dtype=torch.uint8)
    z, _ = layer(index, generator=torch.Generator().manual_seed(1))
    assert torch.equal(z, layer(index, generator=torch.Generator().manual_seed(1))[0])
    u = z * 4 - 2
    assert abs(u.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 100_000**0.5
    counts = torch.histc(u, 10, 0, 1)
    assert ((counts - 10_000).abs() < 5 * (10_000 * 0.9) ** 0.5).all()


def test_dequantisation_follows_the_module():
    layer = gnn.Dequantize(256).double()
    assert layer(torch.zeros(2, 3, dtype=torch.uint8))[0].dtype == torch.float64
    assert not layer.state_dict()


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "uint8 level indices or floats in .*, got torch.int64"),
        (torch.full((2, 3), 17, dtype=torch.uint8), ValueError, "level indices 0..16, got values from 17 to 17"),
        (torch.tensor([[0.0, 1.5]]), ValueError, "floats in .* got values from 0.0 to 1.5"),
        (torch.tensor([[-0.1, 1.0]]), ValueError, "got values from -0.1"),
    ],
)
def test_data_out_of_range(x, kind, words):
    with pytest.raises(kind, match=words):
        gnn.Dequantize(17)(x)


def test_levels_must_make_sense():
    for levels in (1, 0, 2.5, 2**17):
        with pytest.raises(ValueError, match="levels must be an integer from 2 to 65536"):
            gnn.Dequantize(levels)


def test_nan_pixels_stay_visible():
    z, _ = gnn.Dequantize(17)(torch.tensor([[0.5, float("nan")]]))
    assert torch.isfinite(z[0, 0]) and z[0, 1].isnan()


@pytest.mark.parametrize("shape", [(), (3,), (3, 8, 8)])
def test_a_picture_without_its_batch_is_refused(shape):
    with pytest.raises(ValueError, match=r"Dequantize: x must be \[N, D\] or \[N, C, H, W\], got"):
        gnn.Dequantize(17)(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"Dequantize: x must be \[N, D\] or \[N, C, H, W\], got"):
        gnn.Dequantize(17).inverse(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("levels", [17, 256])
def test_floats_off_the_grid_are_told(dtype, levels):
    index = torch.arange(levels, dtype=torch.uint8).view(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gnn.Dequantize(levels)((index.double() / (levels - 1)).to(dtype))
    with pytest.warns(UserWarning, match=f"not on the grid k/{levels - 1} and were rounded to their nearest level"):
        gnn.Dequantize(levels)(index.float() / levels)


def test_a_gradient_that_rounding_makes_0_is_refused():
    layer = gnn.Dequantize(17)
    x = torch.rand(2, 3).mul(16).round().div(16).requires_grad_()
    with pytest.raises(RuntimeError, match="x is rounded to grey levels, whose gradient is 0"):
        layer(x)
    with torch.no_grad():
        z, _ = layer(x)
    with pytest.raises(RuntimeError, match="does not require grad"):
        layer.inverse(z.requires_grad_())[0].sum().backward()


HALVES = [(torch.bfloat16, 17), (torch.bfloat16, 32), (torch.float16, 256)]


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float32, 17), (torch.float32, 256), *HALVES])
def test_every_value_stays_in_its_level(dtype, levels):
    """Also where the sum of an index and its noise rounds up, which fp32 does once in 100,000 pixels."""
    layer = gnn.Dequantize(levels).to(dtype)
    index = torch.arange(levels, dtype=torch.uint8).repeat(4000).view(-1, 1)
    z, _ = layer(index)
    assert z.dtype == dtype and z.max() < 1
    assert torch.equal((layer.inverse(z)[0] * (levels - 1)).round().to(torch.uint8), index)
    noise = (z.double() * levels - index.double()).view(-1, levels)
    assert abs(noise.mean() - 0.5) < 0.02 and noise.std(0).min() > 0.25  # of U[0, 1): 0.289


@pytest.mark.parametrize(("dtype", "levels"), [(torch.bfloat16, 256), (torch.bfloat16, 33), (torch.float16, 1024)])
def test_a_half_type_too_coarse_for_the_noise_is_refused(dtype, levels):
    with pytest.raises(ValueError, match=f"has less than 8 values within a level of {levels}, too few for uniform"):
        gnn.Dequantize(levels).to(dtype)(torch.zeros(2, 3, dtype=torch.uint8))


def test_logit():
    layer = gnn.Logit(0.05)
    x = torch.rand(3, 4, 2, dtype=torch.float64)
    z, ldj = layer(x)
    torch.testing.assert_close(z, torch.logit(0.05 + 0.9 * x))
    torch.testing.assert_close(layer.inverse(z)[0], x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.inverse(z)[1], -ldj)
    torch.testing.assert_close(ldj, brute_log_det(lambda v: layer(v)[0], x), rtol=0, atol=1e-10)
    assert torch.isfinite(layer(torch.tensor([[0.0, 1.0]]))[0]).all()


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_split(learned, backend):
    layer = perturb(gnn.Split(4, learned).double())
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    with gk.use_backend(backend):
        kept, latent, ldj = layer(x)
        back, inverse_ldj = layer.inverse(kept, latent)
    assert kept.shape == latent.shape == (2, 2, 3, 2)
    assert torch.equal(kept, x[:, :2])
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_ldj, -ldj)
    expected = brute_log_det(lambda v: torch.cat(layer(v)[:2], 1), x)
    torch.testing.assert_close(ldj, expected, rtol=0, atol=1e-10)
    if learned:
        log_scale, mean = layer.net(kept).chunk(2, 1)
        dist = torch.distributions.Normal(mean, log_scale.exp())
        density = torch.distributions.Normal(0, 1).log_prob(latent).flatten(1).sum(1) + ldj
        torch.testing.assert_close(density, dist.log_prob(x[:, 2:]).flatten(1).sum(1))


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
@pytest.mark.parametrize("classes", [None, 5])
def test_normal_prior_is_the_normal_density(shape, classes):
    prior = perturb(gnn.Prior(3, learned=True, num_classes=classes).double())
    z = torch.randn(4, *shape, dtype=torch.float64)
    y = torch.tensor([0, 4, 2, 4]) if classes else None
    rows = prior.table[y] if classes else prior.table.expand(4, 6)
    mean, log_scale = (t.reshape(4, 3, *[1] * (len(shape) - 1)) for t in rows.chunk(2, 1))
    expected = torch.distributions.Normal(mean, log_scale.exp()).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(prior.log_prob(z, y), expected)


def test_logistic_prior_is_the_logistic_density():
    z = torch.linspace(-60, 60, 7, dtype=torch.float64).view(-1, 1)
    expected = -z - 2 * torch.log1p(torch.exp(-z))
    torch.testing.assert_close(gnn.Prior(1, "logistic").log_prob(z), expected[:, 0])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (5, 1), (3, 5)])
def test_a_prior_takes_its_channels_and_no_others(learned, shape):
    prior = gnn.Prior(3, learned=learned)
    for run in (lambda: prior.log_prob(torch.zeros(shape)), lambda: prior.sample(shape)):
        with pytest.raises(ValueError, match=r"must be \[N, 3, ...\], got"):
            run()


@pytest.mark.parametrize(
    "y", [None, torch.tensor([1]), torch.tensor(1), torch.zeros(4, dtype=torch.long), torch.ones(5)]
)
def test_a_prior_wants_a_label_for_each_row(y):
    prior = gnn.Prior(3, num_classes=4)
    for run in (lambda: prior.log_prob(torch.zeros(5, 3), y), lambda: prior.sample((5, 3), y=y)):
        with pytest.raises(ValueError, match=r"y must be integers \[N\] = \[5\], one class each, got"):
            run()


@pytest.mark.parametrize(("kind", "std"), [("normal", 1.0), ("logistic", math.pi / 3**0.5)])
def test_temperature_multiplies_the_standard_deviation(kind, std):
    prior = perturb(gnn.Prior(2, kind, learned=True))
    mean, log_scale = prior.table[0].chunk(2)
    for temperature in (0.0, 0.5, 1.0):
        generator = torch.Generator().manual_seed(0)
        z = prior.sample((200_000, 2), temperature, generator).detach()
        torch.testing.assert_close(z.mean(0), mean.detach(), rtol=0, atol=0.02)
        torch.testing.assert_close(z.std(0), temperature * std * log_scale.exp().detach(), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("shapes", [[(5, 4), (5, 4)], [(5, 3), (5, 1)], [(5, 2), (1, 2)], [(5,), (5,)]])
def test_the_halves_of_a_split_are_counted(learned, shapes):
    with pytest.raises(ValueError, match=r"Split: kept and latent must both be \[N, 2, ...\], got \[5"):
        gnn.Split(4, learned).inverse(
            *(torch.zeros(*shape, 2, 2)[(...,) + (0,) * 2 * (len(shape) == 1)] for shape in shapes)
        )


def test_a_tangent_that_rounding_makes_0_is_refused():
    model, x = (
        gk.models.Glow(shape=(1, 4, 4), grey_levels=17, scales=1, steps=1, hidden=4).eval(),
        torch.zeros(2, 1, 4, 4),
    )
    pixels = gk.models.PixelCNN(shape=(1, 4, 4), grey_levels=17, width=4, layers=1)
    z = torch.randn(2, 4, 2, 2)
    for run, at in ((model.log_prob, x), (pixels.log_prob, x), (lambda z: model.decode((z,)), z)):
        with pytest.raises(RuntimeError, match="grey levels, whose gradient is 0, and it asks for one"):
            torch.func.jvp(run, (at,), (at,))
    for run in (model, lambda x: pixels(x)):
        torch.func.jvp(run, (x,), (x,))
    weight = model.flows[0][1].bias.detach()
    _, tangent = torch.func.jvp(
        lambda w: torch.func.functional_call(Density(model), {"model.flows.0.1.bias": w}, (x,)),
        (weight,),
        (weight + 1,),
    )
    assert tangent.abs().min() > 0


class Density(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments):
        return self.model.log_prob(*arguments)
