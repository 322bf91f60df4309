"""AVADE: the bound by change of variables against brute force, five variants, two players."""

from __future__ import annotations

import math

import pytest
import torch

import genkernels as gk
from genkernels.models.vae.avade import VARIANTS
from genkernels.training import TrainConfig, fit
from tests.models.gans import small

TINY = {"shape": (1, 2, 4), "grey_levels": 17, "latent": 1, "width": 4, "steps": 2, "hidden": 4}


def restless(variant: str, **more) -> gk.models.Model:
    torch.manual_seed(0)
    model = gk.models.AVADE(**{**TINY, "variant": variant, **more}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    return model


@pytest.mark.parametrize("variant", ["v-ade", "av-ade", "vae"])
def test_the_bound_is_that_of_the_density_by_brute_force(variant):
    """D = 8, one latent: p(x) by quadrature over z, the density of x given z by the whole Jacobian of f."""
    model = restless(variant)
    x = torch.randint(17, (2, 1, 2, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    target, _ = model._prepared(x, None, torch.Generator().manual_seed(2))
    target = target.double()
    grid = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    flow = model.likelihood.flow

    def features(pixels):
        return pixels if flow is None else flow(pixels.view(1, 1, 2, 4))[0].flatten()

    with torch.no_grad():
        mean, log_scale = model.decoder(grid[:, None], None).chunk(2, 1)
    exact = []
    for each in target:
        jacobian = torch.autograd.functional.jacobian(features, each.flatten()).view(8, 8)
        with torch.no_grad():
            y = features(each.flatten()).flatten()
        normal = torch.distributions.Normal(mean.flatten(1), log_scale.clamp(min=-7).exp().flatten(1))
        given = normal.log_prob(y).sum(1) + torch.linalg.slogdet(jacobian)[1] + 8 * math.log(2 / 17)
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(grid)
        exact.append(torch.logsumexp(given + prior, 0) + math.log(float(grid[1] - grid[0])))
    exact = torch.stack(exact)
    with torch.no_grad():
        many = model._terms_of(target, None, 20_000, 5_000, torch.Generator().manual_seed(3)).bound
        one = torch.stack(
            [model._terms_of(target, None, 1, None, torch.Generator().manual_seed(i)).bound for i in range(200)]
        )
    torch.testing.assert_close(many, exact, rtol=0, atol=0.02)
    error = one.std(0) / math.sqrt(200)
    assert (one.mean(0) < exact + 3 * error).all()


def test_a_sample_s_features_are_what_the_decoder_gave():
    model = restless("av-ade")
    outputs = model.decoder(torch.randn(5, 1, dtype=torch.float64), None)
    noise = torch.randn(5, 1, 2, 4, dtype=torch.float64)
    mean, log_scale = outputs.chunk(2, 1)
    features, _ = model.likelihood.flow(model.likelihood.images(outputs, noise))
    torch.testing.assert_close(features, mean + log_scale.clamp(min=-7).exp() * noise, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_trains_what_it_has(variant):
    likelihood, adversary, flow = VARIANTS[variant]
    model = restless(variant)
    x = torch.randint(17, (4, 1, 2, 4)).to(torch.uint8)
    players = model.players()
    assert list(players) == (["critic", "model"] if adversary else ["model"])
    assert (model.likelihood.flow is not None) == flow
    for name, player in players.items():
        terms = model.losses(name, x, torch.zeros(4), 0)
        terms["loss"].backward()
        own = set(player.module.parameters())
        for parameter in model.parameters():
            assert (parameter.grad is not None) == (parameter in own), name
            parameter.grad = None
        if name == "model":
            assert set(terms) == {"loss"} | ({"bound", "kl", "reconstruction"} if likelihood else set()) | (
                {"quality"} if adversary else set()
            )
    found = model.evaluate([(x, torch.zeros(4))])
    assert list(found)[0] == ("bits_per_dim" if likelihood else "sliced_wasserstein")
    assert bool(model.pictures(x, torch.zeros(4))) == likelihood


@pytest.mark.parametrize("variant", ["av-ade", "gan"])
def test_classes_reach_encoder_decoder_and_critic(variant):
    model = restless(variant, num_classes=3)
    x, y = torch.randint(17, (4, 1, 2, 4)).to(torch.uint8), torch.tensor([0, 1, 2, 1])
    for name, player in model.players().items():
        model.losses(name, x, y, 0)["loss"].backward()
        assert all(p.grad is not None for p in player.module.parameters())
    one, other = (model.sample(3, y=k, generator=torch.Generator().manual_seed(0)) for k in (0, 1))
    assert not torch.equal(one, other)
    assert math.isfinite(model.evaluate([(x, y)])["sliced_wasserstein"].value)


def test_without_its_critic_a_loss_is_the_bound():
    model = restless("v-ade")
    x = torch.randint(17, (4, 1, 2, 4)).to(torch.uint8)
    torch.manual_seed(5)
    terms = model.losses("model", x, torch.zeros(4), 0)
    torch.testing.assert_close(terms["loss"], terms["bound"] / (-8 * math.log(2)))
    torch.testing.assert_close(terms["bound"], -terms["kl"] - terms["reconstruction"])


def tiny_run(variant: str, seed: int = 0) -> gk.models.Model:
    torch.manual_seed(seed)
    sizes = {"shape": (1, 8, 8), "grey_levels": 17, "latent": 2, "width": 4, "steps": 1, "hidden": 4}
    return gk.models.AVADE(**sizes, variant=variant)


@pytest.mark.parametrize("variant", ["v-ade", "av-ade", "av-gde"])
def test_training_on_the_kernels_is_that_on_the_reference(variant, tmp_path):
    pytest.importorskip("lightning")
    settings = TrainConfig(max_steps=30, batch_size=8, eval_every=0, accelerator="cpu", lr=1e-3, ema=0.0)
    bundle, found = small("digits", 60, 20), []
    for backend in ("reference", "auto"):
        with gk.use_backend(backend):
            found.append(fit(tiny_run(variant), bundle, settings, quiet=True).history)
    for name, values in found[0].items():
        assert found[1][name] == pytest.approx(values, rel=1e-3), name


def test_a_run_that_goes_on_reaches_the_same_losses(tmp_path):
    pytest.importorskip("lightning")
    bundle = small("digits", 60, 20)
    settings = TrainConfig(max_steps=10, batch_size=8, ema=0.9, checkpoint_every=3, eval_every=0, accelerator="cpu")
    whole = fit(tiny_run("av-ade"), bundle, settings, out=tmp_path / "whole", quiet=True)
    fit(tiny_run("av-ade"), bundle, settings.changed(max_steps=6), out=tmp_path / "cut", quiet=True)
    again = fit(tiny_run("av-ade", seed=1), bundle, settings, out=tmp_path / "cut", resume=True, quiet=True)
    assert again.history == whole.history and repr(again.held_out) == repr(whole.held_out)
    assert {"critic/loss", "model/loss", "model/bound", "model/kl", "model/quality"} <= set(whole.history)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"variant": "avade"}, "variant must be one of vae, gan, v-ade, av-gde, av-ade, got 'avade'"),
        ({"shape": (1, 3, 4)}, "shape must be (C, H, W), H and W even, got (1, 3, 4)"),
        ({"quality": -1.0}, "quality must be at least 0, got -1.0"),
        ({"r1": math.inf}, "r1 must be a finite number, got inf"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(change, words):
    with pytest.raises(ValueError) as error:
        gk.models.AVADE(**{**TINY, **change})
    assert f"AVADE: {words}" in str(error.value)
