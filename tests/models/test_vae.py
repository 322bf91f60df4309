"""Variational models: bounds where the likelihood is known, posteriors, the terms of a step, likelihoods, estimates."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian

import genkernels as gk
from genkernels import models
from genkernels.models.vae.likelihoods import LIKELIHOODS, likelihood
from genkernels.models.vae.posteriors import POSTERIORS, posterior
from tests.models.vaes import EVERY, FLOWS, NAMES, linear_gaussian, set_to_the_posterior, tiny


def batch(data: str = "points", n: int = 6, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    if data == "points":
        return torch.randn(n, 2, generator=g), y
    return torch.randint(17, (n, 1, 8, 8), generator=g).to(torch.uint8), y


# --- bounds where ln p(x) is known --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 7])
def test_with_the_true_posterior_every_draw_gives_the_likelihood(k):
    model = linear_gaussian()
    set_to_the_posterior(model)
    x = model.decoder.sample(20)
    torch.testing.assert_close(model.log_bound(x, importance=k), model.decoder.log_prob(x), rtol=0, atol=1e-10)


def test_the_elbo_is_below_the_likelihood_and_reaches_it_at_the_optimum():
    model = linear_gaussian()
    x = model.decoder.sample(64)
    truth = model.decoder.log_prob(x)
    for optimal in (False, True):
        if optimal:
            set_to_the_posterior(model)
        with torch.no_grad():
            draws = model.log_bound(x.repeat(400, 1), importance=1).view(400, 64)
        error = draws.mean(1).std() / 20
        gap = (truth - draws.mean(0)).mean()
        assert abs(gap) < 4 * error if optimal else gap > 1


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_bound_of_any_posterior_is_below_the_likelihood(name):
    model = linear_gaussian(posterior=name, orthogonal=False)
    x = model.decoder.sample(8)
    with torch.no_grad():
        model.posterior.head.weight.mul_(0.3)
        looser, tighter = (model.log_bound(x.repeat(300, 1), importance=k).view(300, 8) for k in (1, 10))
        truth = model.decoder.log_prob(x)
    for draws in (looser, tighter):
        assert (draws.mean(0) < truth + 4 * draws.std(0) / math.sqrt(300)).all()
    assert looser.mean() < tighter.mean() < truth.mean()


@pytest.mark.parametrize("name", POSTERIORS)
def test_five_thousand_draws_give_the_likelihood(name):
    model = linear_gaussian(posterior=name, flows=2)
    set_to_the_posterior(model)
    with torch.no_grad():
        model.posterior.head.bias[:3].add_(0.3)  # and a little beside it
        model.posterior.head.bias[3:].add_(0.5 if name == "iaf" else 0.2)  # whose scales begin at sigmoid(2)
    x = model.decoder.sample(40)
    found = model.evaluate([(x, torch.zeros(40))], importance=5000, chunk=1000)
    truth = -model.decoder.log_prob(x).mean().item()
    assert abs(found["nats"].value - truth) < 0.01
    assert found["nats"].examples == 40 and found["effective_draws"].unit == "of 5000"
    assert 100 < found["effective_draws"].value < 5000 and 0.02 < found["largest_weight"].value < 20


def test_the_bound_grows_with_the_number_of_draws():
    model = linear_gaussian(orthogonal=False)
    x = model.decoder.sample(400)
    with torch.no_grad():
        bounds = [model.log_bound(x, importance=k) for k in (1, 2, 5, 20, 100)]
    for fewer, more in zip(bounds, bounds[1:], strict=False):
        difference = more - fewer
        assert difference.mean() > -2 * difference.std() / 20
    assert bounds[-1].mean() > bounds[0].mean() + 1


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_the_likelihood_of_a_linear_model(name):
    model = linear_gaussian(name, **({"estimator": "dreg"} if name == "iwae" else {}))
    x, optimizer = model.decoder.sample(2000), torch.optim.Adam(model.posterior.parameters())
    torch.manual_seed(0)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        model.losses("model", x[torch.randint(2000, (64,))], None, step)["loss"].backward()
        optimizer.step()
    truth = -model.decoder.log_prob(x).mean().item()
    found = model.evaluate([(x, None)])["nats"].value
    assert truth - 0.05 < found < truth + 0.05


# --- posteriors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_density_of_a_draw_is_that_of_the_noise_over_the_jacobian(name):
    torch.manual_seed(1)
    q = posterior("VAE", name, 4, 3, 3, 8).double()
    h, noise = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    parameters = q(h)
    z, surprise = q.draw(parameters, noise, prior=False)
    assert z.shape == (2, 5, 3) and surprise.shape == (2, 5)
    for n, k in ((0, 0), (1, 4)):
        row = tuple(p[n : n + 1] for p in parameters)
        slope = jacobian(lambda e, row=row: q.draw(row, e.view(1, 1, 3))[0].view(3), noise[n, k])
        log_q = torch.distributions.Normal(0, 1).log_prob(noise[n, k]).sum() - slope.double().slogdet()[1]
        torch.testing.assert_close(surprise[n, k], -log_q, rtol=0, atol=1e-10)
    prior = torch.distributions.Normal(0, 1).log_prob(z).sum(2)
    torch.testing.assert_close(q.draw(parameters, noise)[1], prior + surprise)


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_stopped_density_has_the_gradient_through_the_draw_alone(name):
    torch.manual_seed(1)
    q = posterior("VAE", name, 4, 3, 2, 8).double()
    h, noise = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    z, ratio = q.draw(q(h), noise)
    stopped_z, stopped = q.draw(q(h), noise, stopped=True)
    torch.testing.assert_close(stopped, ratio)
    assert torch.equal(stopped_z, z)

    # the slope of the ratio by z, which the noise alone decides: that by the noise over the draw's Jacobian
    parameters, slopes = tuple(p.detach() for p in q(h)), torch.zeros_like(z)
    for n in range(2):
        row = tuple(p[n : n + 1] for p in parameters)
        for k in range(5):
            by_z, by_ratio = jacobian(
                lambda e, row=row: tuple(v.flatten() for v in q.draw(row, e.view(1, 1, 3))), noise[n, k]
            )
            slopes[n, k] = torch.linalg.solve(by_z.T, by_ratio[0])
    own = [p for p in q.parameters() if p.requires_grad]
    wanted = torch.autograd.grad((slopes * z).sum(), own, retain_graph=True)
    found = torch.autograd.grad(stopped.sum(), own)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found[1], torch.autograd.grad(ratio.sum(), own)[1])  # there is a part to leave out


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("kind", NAMES)
def test_no_flows_are_the_plain_model(name, kind):
    plain, x = tiny(kind).train(), batch()[0]
    none = tiny(kind, posterior=name, flows=0).train()
    for model in (plain, none):
        torch.manual_seed(2)
        model.losses("model", x, None, 0)["loss"].backward()
    assert list(plain.state_dict()) == list(none.state_dict())
    for a, b in zip(plain.parameters(), none.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ["planar", "radial"])
def test_elementary_flows_begin_near_the_identity(name):
    torch.manual_seed(0)
    q = posterior("VAE", name, 64, 4, 6, 8)
    parameters, noise = q(torch.randn(32, 64)), torch.randn(32, 10, 4)
    plain = POSTERIORS["gaussian"].draw(q, parameters[:2], noise)[0]
    moved = (q.draw(parameters, noise)[0] - plain).norm(dim=2)
    assert moved.mean() < 0.3 * plain.norm(dim=2).mean()


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), EVERY)
@pytest.mark.parametrize("data", ["points", "images", "mlp"])
def test_a_step_has_finite_terms_and_a_gradient_everywhere(name, kind, data):
    model, (x, y) = tiny(name, data, posterior=kind, num_classes=3).train(), batch(data)
    terms = model.losses("model", x, y, 0)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {"loss", "bound", "kl", "reconstruction"} <= set(terms)
    assert all(term.dim() == 0 and term.isfinite() for term in terms.values())
    assert not any(term.requires_grad for key, term in terms.items() if key != "loss")


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "stl", "miwae:2", "piwae:2", "ciwae:0.5"])
@pytest.mark.parametrize("kind", POSTERIORS)
def test_every_estimator_with_every_posterior_that_it_can_have(estimator, kind):
    options = {"posterior": kind, "estimator": estimator, "chunk": 2}
    if (kind, estimator) == ("iaf", "piwae:2"):
        with pytest.raises(ValueError, match=f"^IWAE: estimator {estimator} needs a posterior .*, got {kind}"):
            tiny("iwae", **options)
        return
    model, (x, y) = tiny("iwae", **options).train(), batch()
    terms = model.losses("model", x, y, 0)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert terms["loss"].item() == pytest.approx(-terms["bound"].item())
    assert 1 <= terms["effective_draws"] <= 4 and 25 <= terms["largest_weight"] <= 100
    with torch.no_grad():  # the same draws, and no second pass
        torch.manual_seed(0)
        value = model.losses("model", x, y, 0)["bound"]
        torch.manual_seed(0)
        assert torch.equal(model.losses("model", x, y, 0)["bound"], value)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_dreg_has_the_gradient_of_iwae_in_the_mean(kind):
    model = linear_gaussian("iwae", posterior=kind, flows=1, importance=3).float()
    x = model.decoder.sample(1).repeat(1000, 1)
    own = [p for name, p in model.posterior.named_parameters() if name.endswith("bias")]
    means, errors = [], []
    for model.estimator in ("iwae", "dreg"):
        rows = []
        for _ in range(12):
            grads = torch.autograd.grad(model.losses("model", x, None, 0)["loss"], own)
            rows.append(torch.cat([g.flatten() for g in grads]).double())
        means.append(torch.stack(rows).mean(0))
        errors.append(torch.stack(rows).std(0) / 12**0.5)
    assert ((means[0] - means[1]).abs() <= 5 * (errors[0] ** 2 + errors[1] ** 2).sqrt() + 1e-6).all()
    assert means[0].norm() > 5 * errors[0].norm()


def test_the_terms_of_the_vae_are_those_of_its_paper():
    model, x = tiny("vae").double().train(), batch()[0].double()
    torch.manual_seed(3)
    terms = model.losses("model", x, None, 0)
    torch.manual_seed(3)
    mean, log_scale = model.posterior.head(model.encoder.trunk(x)).chunk(2, 1)
    z = mean + log_scale.exp() * torch.randn(6, 1, 2, dtype=torch.float64).squeeze(1)
    m, s = model.decoder(z).chunk(2, 1)
    kl = 0.5 * (mean**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(1).mean()
    reconstruction = -torch.distributions.Normal(m, s.exp()).log_prob(x).sum(1).mean()
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["reconstruction"], reconstruction)
    torch.testing.assert_close(terms["loss"], kl + reconstruction)
    torch.testing.assert_close(terms["bound"], -kl - reconstruction)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_one_draw_of_iwae_is_the_vae(kind):
    x, found = batch()[0], []
    for name, options in (("vae", {}), ("iwae", {"importance": 1})):
        model = tiny(name, posterior=kind, **options).train()
        torch.manual_seed(2)
        terms = model.losses("model", x, None, 0)
        terms["loss"].backward()
        found.append([terms["loss"].detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_an_estimator_of_one_draw_is_taken_too():
    """stl leaves the score out, which the divergence in closed form has not."""
    model = linear_gaussian("iwae", importance=1, estimator="stl")
    set_to_the_posterior(model)
    x = model.decoder.sample(50)
    terms = model.losses("model", x, None, 0)
    terms["loss"].backward()
    # at the true posterior every log-weight is ln p(x), whose slope by z is 0
    assert all(p.grad.abs().max() < 1e-10 for p in model.posterior.parameters())
    assert model.decoder.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gaussian", "iaf"])
def test_warm_up_and_free_bits(kind):
    x = batch()[0]

    def terms(step, **options):
        model = tiny("vae", posterior=kind, **options)
        torch.manual_seed(3)
        return {key: float(value.detach()) for key, value in model.losses("model", x, None, step).items()}

    plain, warm = terms(0), [terms(step, kl_warmup=4) for step in range(6)]
    for step, found in enumerate(warm):
        weight = min(1.0, (step + 1) / 4)
        assert found["loss"] == pytest.approx(plain["reconstruction"] + weight * plain["kl"], rel=1e-5)
        assert found["bound"] == plain["bound"]  # the bound itself knows of no warm-up
    free = terms(0, free_bits=50.0)
    assert free["loss"] == pytest.approx(plain["reconstruction"] + 100, rel=1e-5)  # of two latents
    assert free["kl"] == plain["kl"]
    assert terms(0, free_bits=1e-9)["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_free_bits_are_each_latents_own():
    """One latent's divergence is paid beyond its bits although the other's stays below."""
    model, x = tiny("vae", free_bits=1.0), batch()[0]
    with torch.no_grad():
        model.posterior.head.weight.zero_()
        model.posterior.head.bias.copy_(torch.tensor([3.0, 0.1, 0.0, 0.0]))
    terms = model.losses("model", x, None, 0)
    paid = (terms["loss"] - terms["reconstruction"]).item()
    assert paid == pytest.approx(4.5 + 1.0, rel=1e-5) and terms["kl"].item() == pytest.approx(4.505, rel=1e-5)


# --- likelihoods --------------------------------------------------------------------------------------------------


def test_images_are_binarised_anew_with_their_grey_levels_as_probabilities():
    rated = likelihood("VAE", "bernoulli", (1, 2, 2), 5)
    x = torch.tensor([[[[0, 1], [3, 4]]]], dtype=torch.uint8)
    drawn = torch.cat([rated.target(x) for _ in range(4000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), x[0] / 4, rtol=0, atol=0.03)
    assert torch.equal(drawn.mean(0)[0, 0, 0], torch.tensor(0.0)) and drawn[:, 0, 1, 1].all()
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(rated.target(x, g[0]), rated.target(x, g[1]))
    same = likelihood("VAE", "bernoulli", (1, 2, 2), 2).target((x > 2).to(torch.uint8))
    assert torch.equal(same, (x > 2).float())


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_likelihood_sums_to_one_and_has_the_mean_that_it_says(name, channels):
    """Of one pixel, over all that it can be; by many draws."""
    torch.manual_seed(0)
    levels = 3
    rated = likelihood("VAE", name, (channels, 1, 1), levels)
    outputs = 0.5 * torch.randn(1, rated.outputs, 1, 1, dtype=torch.float64) - 0.2
    if name == "gaussian":
        assert rated.unit == "bits/dim"
        values = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        first = likelihood("VAE", name, (1, 1, 1), levels)
        log_prob = first.log_prob(
            outputs[:, [0, channels]].expand(4001, 1, 2, 1, 1).flatten(0, 0), values.view(-1, 1, 1, 1)
        )
        total = torch.trapezoid(log_prob.exp().squeeze(1), (values + 1) * levels / 2)
    else:
        grid = torch.cartesian_prod(*[torch.arange(2 if name == "bernoulli" else levels)] * channels)
        grid = grid.view(-1, channels, 1, 1)
        target = grid.double() if name == "bernoulli" else rated.target(grid.to(torch.uint8)).double()
        total = rated.log_prob(outputs.expand(len(grid), -1, 1, 1).unsqueeze(1), target).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)
    if name == "bernoulli":
        drawn = rated.draw(outputs.expand(20_000, -1, 1, 1), torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn.mean(0), rated.mean(outputs)[0], rtol=0, atol=0.02)


def test_the_mean_of_a_logistic_is_where_its_draws_are():
    """A narrow one's, which the ends do not cut."""
    rated = likelihood("VAE", "logistic", (3, 1, 1), 256)
    outputs = torch.tensor([0.0, 0.3, -5, 0.7, -0.2, -5, -0.4, 0.1, -5, 0.9]).view(1, 10, 1, 1)
    drawn = rated.draw(outputs.expand(2000, -1, 1, 1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), rated.mean(outputs)[0], rtol=0, atol=2e-3)
    assert drawn.min() >= 0 and drawn.max() <= 1


def test_the_density_of_grey_levels_is_of_levels_of_width_one():
    rated = likelihood("VAE", "gaussian", (1, 2, 2), 4)
    outputs = torch.zeros(1, 1, 2, 2, 2)
    target = rated.target(torch.tensor([[[[0, 1], [2, 3]]]], dtype=torch.uint8))
    wanted = torch.distributions.Normal(0, 1).log_prob(target).sum() + 4 * math.log(2 / 4)
    torch.testing.assert_close(rated.log_prob(outputs, target).squeeze(), wanted)
    level = rated.mean(torch.tensor([-0.75, 0.75]).view(1, 1, 1, 2).repeat(1, 2, 1, 1)).flatten()[:2]
    torch.testing.assert_close(level, torch.tensor([0.0, 1.0]))


def test_what_bits_and_nats_are_of():
    digits = {"shape": (1, 8, 8), "grey_levels": 17}
    x, y = batch("images")
    for name, measure in (("bernoulli", "nats"), ("gaussian", "bits_per_dim"), ("logistic", "bits_per_dim")):
        model = models.VAE(**digits, likelihood=name, latent=2, width=4)
        found = model.evaluate([(x, y)])
        assert next(iter(found)) == measure and found[measure].lower_is_better
        scale = 64 * math.log(2) if measure == "bits_per_dim" else 1
        whole = found["kl"].value + found["reconstruction"].value
        assert found[measure].value * scale == pytest.approx(whole, rel=1e-5)
    assert math.isnan(models.VAE(shape=(2,)).evaluate([])["nats"].value)
    assert models.VAE(shape=(2,)).measure == "nats"
    assert models.VAE(shape=(1, 4, 4), grey_levels=None).measure == "nats"
    assert models.VAE(shape=(2, 4, 4)).likelihood.kind == "gaussian"  # no logistic of two channels


# --- judgement, samples, pictures ---------------------------------------------------------------------------------


def test_held_out_images_are_binarised_once_and_for_all():
    model, (x, y) = tiny("vae", "images", likelihood="bernoulli"), batch("images", 32)
    seen = []
    target = model.likelihood.target
    model.likelihood.target = lambda x, generator=None: seen.append(target(x, generator)) or seen[-1]
    for seed, options in ((0, {}), (1, {"importance": 5})):
        torch.manual_seed(seed)
        model.evaluate([(x[:20], y[:20]), (x[20:], y[20:])], **options)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(target(x), target(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", ["points", "images"])
def test_samples_and_reconstructions(name, data):
    model, (x, y) = tiny(name, data, num_classes=3), batch(data)
    first, again = (model.sample(5, generator=torch.Generator().manual_seed(1), y=2) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (5, *model.shape) and not first.requires_grad
    assert model.sample(0).shape == (0, *model.shape)
    still = model.sample(4, temperature=0.0, y=1, mean=True)
    assert torch.equal(still[0], still[1])
    assert not torch.equal(model.sample(2, temperature=0.0, y=1, mean=False)[0], still[0])
    pictures = model.pictures(x, y, torch.Generator().manual_seed(1))
    if data == "points":
        assert pictures == {}
        return
    assert first.min() >= 0 and first.max() <= 1
    assert pictures["reconstructions"].shape == (6, 1, 8, 16)
    torch.testing.assert_close(pictures["reconstructions"][..., :8], x / 16)
    assert model.report(x, y) == [f"{model.report(x, y)[0].split()[0]} of 3 latents are active, on 6 examples"]


def test_chunks_change_nothing_but_memory():
    model, x = tiny("vae", "images"), batch("images")[0]
    noise, bounds = torch.randn(6, 7, 3), []
    for chunk in (None, 1, 3, 7):
        parts = iter(noise.split(chunk or 7, 1))
        model._noise = lambda count, draws, generator, parts=parts: next(parts)
        with torch.no_grad():
            bounds.append(model.log_bound(x, importance=7, chunk=chunk))
    for found in bounds[1:]:
        torch.testing.assert_close(found, bounds[0], rtol=1e-5, atol=1e-4)


# --- what is refused ----------------------------------------------------------------------------------------------

IMAGE = {"shape": (1, 8, 8), "grey_levels": 17}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: models.IWAE(shape=(2,), importance=0), "IWAE: importance.* must be an integer of at least 1, got 0"),
        (lambda: models.IWAE(shape=(2,), importance=3, chunk=4), "IWAE: chunk must be .* 1 to importance, 3, got 4"),
        (lambda: models.VAE(shape=(2,)).evaluate([batch()], importance=0), "VAE: importance.* at least 1, got 0"),
        (
            lambda: models.VAE(shape=(2,)).evaluate([batch()], importance=3, chunk=4),
            "VAE: chunk must be .* 1 to importance, 3, got 4",
        ),
        (
            lambda: models.VAE(shape=(2,), posterior="plannar"),
            "VAE: posterior must be one of gaussian, planar, radial, iaf, got 'plannar'; did you mean planar",
        ),
        (lambda: models.VAE(shape=(2,), likelihood="gausian"), "got 'gausian'; did you mean gaussian"),
        (lambda: models.VAE(shape=(2,), network="mpl"), "VAE: network must be one of mlp, conv, got 'mpl'"),
        (lambda: models.VAE(shape=(2,), network="conv"), "VAE: network conv needs images, got points"),
        (
            lambda: models.VAE(shape=(2,), likelihood="bernoulli"),
            r"VAE: likelihood bernoulli needs images, .*, got points of shape \(2,\)",
        ),
        (lambda: models.VAE(shape=(2,), likelihood="logistic"), "VAE: likelihood logistic needs images with grey"),
        (
            lambda: models.VAE(shape=(2, 4, 4), likelihood="logistic"),
            r"VAE: likelihood logistic needs images of 1 or 3 channels, got shape \(2, 4, 4\)",
        ),
        (
            lambda: models.VAE(**IMAGE).loss(torch.full((2, 1, 8, 8), 17, dtype=torch.uint8)),
            "VAE: x must hold level indices 0..16, got values from 17 to 17",
        ),
        (
            lambda: models.VAE(**IMAGE, likelihood="bernoulli").loss(torch.full((2, 1, 8, 8), 1.5)),
            r"VAE: x must hold floats in \[0, 1\], got values from 1.5 to 1.5",
        ),
        (
            lambda: models.VAE(shape=(1, 8, 8), grey_levels=None, likelihood="bernoulli").loss(-torch.ones(2, 1, 8, 8)),
            r"VAE: likelihood bernoulli needs pixels in \[0, 1\], got values from -1 to -1",
        ),
        (lambda: models.VAE(shape=(2,), latent=0), "VAE: latent must be at least 1, got 0"),
        (lambda: models.VAE(shape=(2,), free_bits=-1.0), "VAE: free_bits must be at least 0, got -1.0"),
        (
            lambda: models.IWAE(shape=(2,), posterior="iaf", importance=4, estimator="piwae:2"),
            "IWAE: estimator piwae:2 needs a posterior whose parameters all come from the encoder, .*, got iaf",
        ),
    ],
)
def test_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_what_is_no_number_stays_none():
    for name in LIKELIHOODS:
        model, x = tiny("vae", "images", likelihood=name), torch.full((2, 1, 8, 8), 0.5)
        x[1, 0, 3, 3] = float("nan")
        bound = model.log_bound(x)
        assert bound[0].isfinite() and bound[1].isnan()


# --- presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_preset_of_the_papers_network(name):
    kind = models.MODELS[name]
    with torch.device("meta"):
        model = kind.from_preset("mnist")
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    assert sorted(sizes) == sorted([(784, 200), (200, 200), (200, 100), (50, 200), (200, 200), (200, 784)])
    assert model.likelihood.kind == "bernoulli" and model.latent == 50
    assert kind.presets["mnist"].training["batch_size"] == 20
    assert gk.models.VAE.presets.keys() == {"points", "digits", "photos32", "mnist"}


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_binary_data_begin_at_their_mean(network):
    """The decoder of a run's start has at its bias the mean of what was seen, pixel by pixel or channel by channel."""
    sizes = {"shape": (1, 8, 8), "grey_levels": 17, "width": 8, "latent": 2}
    model = gk.models.VAE(**sizes, likelihood="bernoulli", network=network)
    x = torch.randint(17, (400, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x[:, :, :, 0] = 0
    model.begin(x, torch.zeros(400))
    (bias,) = [m.bias for m in model.decoder.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1:]
    mean = x.double().mean(0) / 16
    mean = mean if network == "mlp" else mean.mean((1, 2))
    torch.testing.assert_close(bias.sigmoid().double().flatten(), mean.flatten(), rtol=0, atol=3e-3)
    assert bias.isfinite().all()  # where a pixel is always black


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("name, channels", [("logistic", 3), ("logistic", 1), ("gaussian", 2)])
def test_images_begin_at_the_mean_and_the_spread_of_each_channel(name, channels, network):
    """So that the latents need not stand in for them: with the weights at 0 the bias alone says how the data lie."""
    sizes = {"shape": (channels, 8, 8), "grey_levels": 256, "width": 4, "latent": 2}
    model = gk.models.VAE(**sizes, likelihood=name, network=network)
    rng = torch.Generator().manual_seed(0)
    centre = torch.tensor([80.0, 130.0, 200.0])[:channels].view(-1, 1, 1)
    x = (centre + 20 * torch.randn(400, channels, 8, 8, generator=rng)).round().clamp(0, 255).to(torch.uint8)
    x[:, 0] = 80  # a channel that never changes
    model.begin(x, torch.zeros(400))
    with torch.no_grad():
        last = [m for m in model.decoder.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1]
        last.weight.zero_()
        outputs = model.decoder(torch.zeros(1, 2), None)
    torch.testing.assert_close(model.likelihood.mean(outputs).mean((0, 2, 3)), x.double().mean((0, 2, 3)).float() / 255)
    drawn = model.likelihood.draw(outputs.expand(400, *outputs.shape[1:]).contiguous(), rng)
    deviation = drawn.std((0, 2, 3)) * 255
    torch.testing.assert_close(deviation[1:], torch.full((channels - 1,), 20.0), rtol=0.06, atol=0)
    assert deviation[0] < 3 and last.bias.isfinite().all()


def test_points_begin_as_they_are():
    model = gk.models.VAE.from_preset("points")
    before = [p.clone() for p in model.parameters()]
    model.begin(torch.randn(9, 2), torch.zeros(9))
    assert all(map(torch.equal, before, model.parameters()))
