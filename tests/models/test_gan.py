"""Adversarial models: whose gradients a step makes, its terms, that weights stay bounded, samples, estimates."""

import math

import pytest
import torch
from torch import nn

from genkernels import data, losses, models
from genkernels.models.gan import backbones
from tests.models.gans import EVERY, NAMES, batch, gradients, near, parts, tiny

ALONE = [name for name in NAMES if name != "bigan"]  # their critics see x alone


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), EVERY)
@pytest.mark.parametrize("classes", [None, 3])
def test_a_step_makes_gradients_for_its_own_player_alone(name, kind, classes):
    model, (x, y) = tiny(name, kind, num_classes=classes).train(), batch(kind)
    for player, other in (("critic", "generator"), ("generator", "critic")):
        model.zero_grad()
        terms = model.losses(player, x, y, 0)
        terms["loss"].backward()
        assert all(gradients(parts(model, player))) and not any(gradients(parts(model, other)))
        assert all(p.requires_grad for p in model.parameters())
        assert all(term.dim() == 0 and term.isfinite() for term in terms.values())
        assert not any(term.requires_grad for key, term in terms.items() if key != "loss")


@pytest.mark.parametrize("name", NAMES)
def test_the_critic_moves_in_every_step_and_the_generator_in_every_so_many(name):
    players = tiny(name, n_critic=4).players()
    assert list(players) == ["critic", "generator"]
    assert (players["critic"].every, players["generator"].every) == (1, 4)
    assert not players["critic"].averaged and players["generator"].averaged


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_a_step_is_a_function_of_the_seed(name, kind):
    values = []
    for seed in (5, 5, 6):
        model, (x, y) = tiny(name, kind).train(), batch(kind)
        torch.manual_seed(seed)
        values.append([model.losses(player, x, y, 0)["loss"].item() for player in ("critic", "generator")])
    assert values[0] == values[1] != values[2]


def test_the_terms_of_wgan_gp_are_those_of_its_paper():
    model, (x, y) = tiny("wgangp", penalty=7.0).double().train(), batch(n=5)
    torch.manual_seed(3)
    terms = model.losses("critic", x.double(), y, 0)
    torch.manual_seed(3)
    with torch.no_grad():
        fake = model.generator(torch.randn(5, 3, dtype=torch.float64))
    u = torch.rand(5, 1, dtype=torch.float64)
    between = (u * x + (1 - u) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    loss = model.critic(fake).mean() - model.critic(x.double()).mean() + 7 * penalty
    assert near(terms["penalty"], penalty, 1e-9)
    assert near(terms["loss"], loss, 1e-9)
    wanted = torch.autograd.grad(loss, list(model.critic.parameters()), allow_unused=True)
    terms["loss"].backward()
    for parameter, gradient in zip(model.critic.parameters(), wanted, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_lazy_penalty_is_taken_in_one_of_so_many_steps():
    model, (x, y) = tiny("wgangp", every=3).train(), batch()
    found = [model.losses("critic", x, y, step)["penalty"].item() for step in range(4)]
    assert found[1] == found[2] == 0 and found[0] > 0 and found[3] > 0


def test_the_terms_of_r3gan_are_those_of_its_paper():
    model, (x, y) = tiny("r3gan", gamma=0.3).double().train(), batch(n=5)
    torch.manual_seed(3)
    terms = model.losses("critic", x.double(), y, 0)
    torch.manual_seed(3)
    fake = model.generator(torch.randn(5, 3, dtype=torch.float64)).detach()
    slopes, scores = [], []
    for points in (x.double(), fake):
        points = points.clone().requires_grad_()
        scores.append(model.critic(points).squeeze(1))
        (slope,) = torch.autograd.grad(scores[-1].sum(), points)
        slopes.append(slope.square().sum(1).mean())
    loss = nn.functional.softplus(scores[1] - scores[0]).mean() + 0.15 * sum(slopes)
    assert near(terms["loss"], loss, 1e-9) and {"r1", "r2"} < set(terms)
    torch.manual_seed(3)
    moved = model.losses("generator", x.double(), y, 0)["loss"]
    assert near(moved, nn.functional.softplus(scores[0] - scores[1]).mean(), 1e-9)


@pytest.mark.parametrize("loss", ["logistic", "saturating"])
def test_both_losses_of_the_original(loss):
    """The critic minimises the same; the generator's gradients have one sign and another size."""
    model, (x, y) = tiny("gan", loss=loss).train(), batch()
    torch.manual_seed(3)
    critic = model.losses("critic", x, y, 0)
    torch.manual_seed(3)
    with torch.no_grad():
        fake = model.critic(model.generator(torch.randn(6, 3)))
    assert near(critic["loss"], losses.critic_loss(model.critic(x), fake), 1e-5)
    assert "r1" not in critic and "r2" not in critic
    torch.manual_seed(3)
    moved = model.losses("generator", x, y, 0)["loss"]
    assert near(moved, losses.generator_loss(fake, kind=loss), 1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_examples_and_samples_reach_the_critic_augmented(name):
    model, (x, y) = tiny(name, "images", augment=1.0).train(), batch("images")
    assert model.augment.p == 1 and model.augment is not None and "augment.p" in model.state_dict()
    seen = []
    hook = model.critic.trunk.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    torch.manual_seed(3)
    model.losses("generator", x, y, 0)["loss"].backward()
    torch.manual_seed(3)
    fake = model.generator(torch.randn(6, 4)).detach()
    torch.testing.assert_close(seen[0], model.augment(fake))
    assert not torch.allclose(seen[0], fake) and all(gradients(model.generator))
    hook.remove()
    assert model.losses("critic", x, y, 0)["loss"].isfinite()


@pytest.mark.parametrize("name", ["gan", "sngan"])
def test_an_adaptive_probability_follows_the_critic_and_is_kept(name):
    model, (x, y) = tiny(name, "images", adaptive=True, augment=0.3).train(), batch("images")
    model.augment.images = 100
    for bias, moved in ((100.0, 0.3 + 0.24), (-100.0, 0.3)):
        with torch.no_grad():
            model.critic.score.bias.fill_(bias)
        for step in range(4):
            model.losses("critic", x, y, step)
        assert model.augment.p.item() == pytest.approx(moved)
    twin = tiny(name, "images", adaptive=True)
    twin.load_state_dict(model.state_dict())
    assert twin.augment.p == model.augment.p


# --- bounds of critics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("player", ["critic", "generator"])
def test_weights_of_wgan_are_clipped_whenever_its_critic_is_used(player):
    model, (x, y) = tiny("wgan", clip=0.02).train(), batch()
    with torch.no_grad():
        for parameter in model.critic.parameters():
            parameter.mul_(10)
    model.losses(player, x, y, 0)
    assert max(p.abs().max().item() for p in model.critic.parameters()) == pytest.approx(0.02)


@pytest.mark.parametrize("kind", ["points", "images"])
def test_the_layers_of_sngan_have_norm_one_after_training(kind):
    model = tiny("sngan", kind, num_classes=3).train()
    optimizer = torch.optim.Adam(model.critic.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        model.losses("critic", *batch(kind, seed=step), step)["loss"].backward()
        optimizer.step()
    model.eval()
    weights = [layer.weight for layer in model.critic.modules() if hasattr(layer, "parametrizations")]
    assert len(weights) == sum(isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding) for m in model.critic.modules())
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_no_critic_couples_the_samples_of_a_batch(name, kind):
    model = tiny(name, kind)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.critic.modules())
    if name in ALONE:
        x = model._scaled(batch(kind)[0])
        torch.testing.assert_close(model.critic(x)[2:3], model.critic(x[2:3]))


@pytest.mark.parametrize("kind", ["points", "images"])
@pytest.mark.parametrize("name", ALONE)
def test_critics_take_the_short_way_to_a_penalty(name, kind):
    model = tiny(name, kind)
    real = model._scaled(batch(kind)[0])
    short = "four passes: every step is piecewise linear"
    assert losses.gradient_penalty(model.critic, real, real.flip(0), explain=True)[1] == short
    sentence = losses.critic_step(model.critic, real, real.flip(0), loss="relativistic", r1=1.0, r2=1.0, explain=True)[
        1
    ]
    assert sentence.startswith("four passes, the loss among them")


# --- samples and judgement ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_samples(name, kind):
    model = tiny(name, kind, num_classes=3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seeded = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    x, same, other = (model.sample(5, generator=g) for g in seeded)
    assert x.shape == (5, *model.shape) and not x.requires_grad and model.training
    assert torch.equal(x, same) and not torch.equal(x, other)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if kind == "images":
        assert 0 <= x.min() and x.max() <= 1
    assert model.sample(0).shape == (0, *model.shape)
    cold = model.sample(4, temperature=0.0, y=1)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold))
    assert not torch.equal(cold[0], model.sample(1, temperature=0.0, y=2)[0])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_and_floats_are_the_same_examples(name):
    model, (x, y) = tiny(name, "images").train(), batch("images")
    found = []
    for images in (x, x.float() / 16):
        torch.manual_seed(2)
        found.append(model.losses("generator" if name == "bigan" else "critic", images, y, 0)["loss"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    scaled = model._scaled(x)
    assert (scaled.min(), scaled.max()) == (-1, 1)
    torch.testing.assert_close(model._shown(scaled), x.float() / 16)


@pytest.mark.parametrize("name", NAMES)
def test_estimates(name):
    model = tiny(name)
    bundle = data.load("eight_gaussians")
    found = model.evaluate([bundle.take("test", 200)], projections=32)
    assert next(iter(found)) == "sliced_wasserstein" and found["sliced_wasserstein"].value > 0
    assert found["modes"].unit == "of 8" and found["modes"].examples == 200 and not found["modes"].lower_is_better
    assert "modes" not in model.evaluate([data.load("moons").take("test", 200)])
    assert math.isnan(model.evaluate([])["sliced_wasserstein"].value)


def test_a_generator_of_the_examples_themselves_is_near():
    """Its distance is that of two sets of examples, and it finds all modes."""
    bundle = data.load("eight_gaussians")
    x, y = bundle.take("test", 5000)
    model = tiny("gan")
    others = bundle.take("train", 5000)[0]
    model.generator.forward = lambda z, y: others[: len(z)]
    found = model.evaluate([(x, y)])
    assert found["modes"].value == 8 and found["in_a_mode"].value > 98
    assert found["sliced_wasserstein"].value < 0.05
    model.generator.forward = lambda z, y: others[: len(z)][others[: len(z), 0] > 0.5].repeat(4, 1)[: len(z)]
    found = model.evaluate([(x[:1000], y[:1000])])
    assert found["modes"].value == 3 and found["sliced_wasserstein"].value > 0.5


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 5, 7), (1, 8, 12), (1, 1, 1)])
@pytest.mark.parametrize("name", ["gan", "sngan", "r3gan"])
def test_images_of_any_size(name, shape):
    model = tiny(name, "images", shape=shape, grey_levels=None)
    x = torch.randn(2, *shape)
    assert model.sample(2).shape == x.shape and model.critic(x).shape == (2, 1)
    terms = model.train().losses("critic", x, torch.zeros(2), 0)
    assert terms["loss"].isfinite()


def test_the_sizes_of_the_papers():
    with torch.device("meta"):
        sngan, r3gan = (models.MODELS[name].from_preset("cifar10") for name in ("sngan", "r3gan"))
    up = [m for m in sngan.generator.modules() if isinstance(m, backbones.UpBlock)]
    down = [m for m in sngan.critic.modules() if isinstance(m, backbones.CriticBlock)]
    pooled = [any(isinstance(layer, nn.AvgPool2d) for layer in block.residual) for block in down]
    assert len(up) == 3 and pooled == [True, True, False, False]
    assert up[0].residual[3].weight.shape == (256, 256, 3, 3) and down[1].residual[1].weight.shape == (128, 128, 3, 3)
    convolutions = [m for m in r3gan.critic.modules() if isinstance(m, nn.Conv2d) and m.groups == 96]
    assert len(convolutions) == 8 and convolutions[0].in_channels == 1536
    for kind in (models.WGANGP, models.SNGAN):
        assert kind.presets["cifar10"].training["betas"] == (0.0, 0.9) and kind.from_preset("ring2d").n_critic == 5


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_a_size_for_cifar10(name):
    with torch.device("meta"):
        model = models.MODELS[name].from_preset("cifar10")
    assert model.shape == (3, 32, 32) and model.grey_levels == 256
    x = torch.empty(2, 3, 32, 32, device="meta")
    codes = [model.generator.to("meta").encoder(x)] if name == "bigan" else []
    assert all(code.shape == (2, 64) for code in codes) and model.critic(x, *codes).shape == (2, 1)


def test_a_block_of_r3gan_begins_as_the_identity():
    model = tiny("r3gan", "images")
    blocks = [m for m in model.modules() if type(m).__name__ == "Block"]
    x = torch.randn(2, 4, 4, 4)
    assert len(blocks) == 4 and all(torch.equal(block(x), x) for block in blocks)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        *[(name, {"n_critic": 0}, "n_critic must be at least 1, got 0") for name in NAMES],
        ("gan", {"latent": 0}, "GAN: latent must be at least 1, got 0"),
        ("gan", {"width": 0}, "GAN: width must be at least 1, got 0"),
        ("gan", {"class_features": 0}, "GAN: class_features must be at least 1, got 0"),
        ("r3gan", {"blocks": 0}, "R3GAN: blocks must be at least 1, got 0"),
        ("sngan", {"depth": 0}, "SNGAN: depth must be at least 1, got 0"),
        ("sngan", {"critic_width": 0}, "SNGAN: critic_width must be at least 1, got 0"),
        ("gan", {"loss": "saturatin"}, r"GAN: loss must be one of logistic, saturating, got 'saturatin'; did you mean"),
        ("gan", {"r1": -1.0}, "GAN: r1 must be at least 0, got -1.0"),
        ("wgan", {"clip": 0.0}, "WGAN: clip must be above 0, got 0.0"),
        ("wgangp", {"penalty": -1.0}, "WGANGP: penalty must be at least 0, got -1.0"),
        ("wgangp", {"every": 0}, "WGANGP: every must be at least 1, got 0"),
        ("gan", {"augment": 0.5}, "GAN: augment must be 0 for points, which are no images, got 0.5"),
        ("gan", {"shape": (1, 8, 8), "augment": 1.5}, "Augment: p must be .* from 0 to 1, got 1.5"),
        ("r3gan", {"gamma": -0.5}, "R3GAN: gamma must be at least 0, got -0.5"),
        ("r3gan", {"shape": (1, 8, 8), "cardinality": 3}, "cardinality must divide the 32 channels .* got 3"),
    ],
)
def test_refused_in_one_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(name, **options)


def test_examples_that_are_none_are_refused():
    model, (x, y) = tiny("gan", "images", num_classes=3), batch("images")
    with pytest.raises(ValueError, match=r"GAN: x must be \[N, 1, 8, 8\], got \[6, 1, 8\]"):
        model.losses("critic", x[..., 0], y, 0)
    with pytest.raises(ValueError, match="GAN: x must hold level indices 0..16"):
        model.losses("critic", x + 10, y, 0)
    with pytest.raises(ValueError, match="GAN: y must lie in 0..2"):
        model.losses("critic", x, y + 1, 0)
    with pytest.raises(ValueError, match="n must be an integer of at least 0, got -1"):
        model.sample(-1)
