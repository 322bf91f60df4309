"""Importance-weighted bounds and their estimators, against models whose likelihood and whose gradients are known."""

import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from genkernels._words import UsageError
from genkernels.losses import Estimator, ImportanceEstimate, gaussian_kl, importance_estimate, importance_loss
from tests.losses.latent_models import LinearGaussian, Switches

F64 = torch.float64
close = torch.testing.assert_close
GAUSSIAN = ("iwae", "dreg", "stl", "miwae:3", "piwae:2", "ciwae:0.3")


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def by_definition(net, x, noise, estimator):
    """Bound and gradients of the loss by weights written down, each parameter's by autograd."""
    name, _, setting = estimator.partition(":")
    k = noise.shape[1]

    def log_weights(stopped):
        net.given = [noise]
        return net.weigher(x)(net.encode(x), k, None, stopped)[0]

    log_w = log_weights(False)
    w = log_w.softmax(1).detach()
    bound = log_w.logsumexp(1) - math.log(k)
    a = b = w
    if name == "dreg":
        b = w.square()
    if name in ("miwae", "piwae"):
        groups = log_w.unflatten(1, (int(setting), -1))
        b = (groups.softmax(2) / int(setting)).flatten(1).detach()
        if name == "miwae":
            a, bound = b, (groups.logsumexp(2) - math.log(k // int(setting))).mean(1)
    if name == "ciwae":
        beta = float(setting)
        a = b = beta / k + (1 - beta) * w
        bound = beta * log_w.mean(1) + (1 - beta) * bound
    for_q = log_weights(name in ("dreg", "stl"))
    by_p = torch.autograd.grad(-(a * log_w).sum(1).mean(), list(net.decoder.parameters()))
    by_q = torch.autograd.grad(-(b * for_q).sum(1).mean(), list(net.encoder.parameters()))
    return bound.detach(), [*by_q, *by_p]


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("estimator", GAUSSIAN)
@pytest.mark.parametrize("chunk", [None, 6, 4, 1])
def test_the_gradient_is_the_weighted_sum_that_defines_it(estimator, chunk):
    net, x = LinearGaussian(), draw(4, 5)
    found = importance_loss(net.encode(x), net.weigher(x), k=6, chunk=chunk, estimator=estimator, seed=1)
    noise = torch.cat(net.drawn, 1)
    ours = gradients(net, found.loss)
    bound, expected = by_definition(net, x, noise, estimator)
    close(found.bound.detach(), bound, rtol=1e-12, atol=0)
    close(found.loss.detach(), -bound.mean())
    close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "piwae:2"])
def test_any_weighing_of_the_examples_goes_through_both_passes(estimator):
    net, x, weight = LinearGaussian(), draw(4, 5), draw(4, seed=3)
    found = importance_loss(net.encode(x), net.weigher(x), k=6, chunk=4, estimator=estimator, seed=1)
    noise = torch.cat(net.drawn, 1)
    ours = gradients(net, -(weight * found.bound).sum())
    each = [by_definition(net, x[i : i + 1], noise[i : i + 1], estimator)[1] for i in range(4)]
    close(ours, [sum(w * g for w, g in zip(weight, some, strict=True)) for some in zip(*each, strict=True)])


def test_one_sample_is_the_elbo_and_its_estimators_agree():
    net, x = LinearGaussian(), draw(4, 5)
    found = {}
    for estimator in ("iwae", "miwae:1", "ciwae:1.0", "dreg", "stl"):
        bound = importance_loss(net.encode(x), net.weigher(x), k=1, estimator=estimator, seed=1)
        net.given = net.drawn[-1:]
        (log_w,) = net.weigher(x)(net.encode(x), 1, None, False)[0].T
        assert torch.equal(bound.bound, log_w)  # to the last bit
        found[estimator] = gradients(net, bound.loss)
    close(found["iwae"], found["miwae:1"])
    close(found["iwae"], found["ciwae:1.0"])
    close(found["dreg"], found["stl"])


def rows_of_one(net, x, rows, offset=0.3):
    """An encoder's outputs for one x, near its posterior but not at it, as leaves: each row's gradient by itself."""
    mean, log_scale = net.be_exact(x)
    return (
        (mean + offset).expand(rows, -1).clone().requires_grad_(),
        (log_scale + offset).expand(rows, -1).clone().requires_grad_(),
    )


def row_gradients(net, x, k, estimator, rows, seed):
    """The gradient by mean and log-scale, of so many repetitions, ``[rows, 2]``."""
    leaves = rows_of_one(net, x, rows)
    found = importance_loss(leaves, net.weigher(x.expand(rows, -1)), k=k, estimator=estimator, seed=seed)
    return torch.cat(torch.autograd.grad(found.bound.sum(), leaves), 1)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_dreg_has_the_mean_of_iwae_and_sticking_the_landing_has_not(k):
    net, x, rows = LinearGaussian(data=2, latent=1), draw(1, 2), 40000
    by = {name: row_gradients(net, x, k, name, rows, seed) for seed, name in enumerate(("iwae", "dreg", "stl"))}
    mean = {name: g.mean(0) for name, g in by.items()}
    error = {name: g.std(0) / rows**0.5 for name, g in by.items()}

    def apart(one, other):
        return ((mean[one] - mean[other]).abs() / (error[one].square() + error[other].square()).sqrt()).max()

    assert apart("iwae", "dreg") < 3
    assert (apart("iwae", "stl") > 5) == (k > 1)


def test_signal_to_noise_falls_for_iwae_and_rises_for_dreg():
    """As k^(−½) and k^(+½): Rainforth et al., 2018; Tucker et al., 2019. The signal is the mean of dreg in both, which
    has that of iwae (as tested above) and hardly any noise."""
    net, x, rows = LinearGaussian(data=2, latent=1), draw(1, 2), 4000
    ks, ratios = [8, 32, 128, 512], {"iwae": [], "dreg": []}
    for k in ks:
        by = {name: row_gradients(net, x, k, name, rows, k) for name in ratios}
        signal = by["dreg"].mean(0).abs()
        for name, g in by.items():
            ratios[name].append((signal / g.std(0)).log().mean())
    at = torch.tensor(ks, dtype=F64).log()
    for name, slope in (("iwae", -0.5), ("dreg", 0.5)):
        y = torch.stack(ratios[name])
        found = ((at - at.mean()) * (y - y.mean())).sum() / (at - at.mean()).square().sum()
        assert abs(found - slope) < 0.1, f"{name}: {found:.3f}"


def test_vimco_is_unbiased_for_discrete_latents():
    net, x, k, rows = Switches(), draw(1, 3), 3, 40000
    logits = torch.tensor([[0.4, -0.7]], dtype=F64, requires_grad=True)
    # the expected bound, by enumeration
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=F64)
    log_q = Bernoulli(logits=logits).log_prob(states).sum(1)
    log_w = net.log_joint(x, states) - log_q
    chosen = torch.tensor(list(itertools.product(range(4), repeat=k)))
    expected = (log_q[chosen].sum(1).exp() * (log_w[chosen].logsumexp(1) - math.log(k))).sum()
    by_q, by_p = torch.autograd.grad(expected, [logits, net.decoder.bias])

    for chunk in (None, 2):
        many = logits.detach().expand(rows, -1).clone().requires_grad_()
        found = importance_loss(many, net.weigher(x), k=k, chunk=chunk, estimator="vimco", seed=5)
        g, of_bias = torch.autograd.grad(found.bound.sum(), [many, net.decoder.bias])
        assert ((g.mean(0) - by_q[0]).abs() < 4 * g.std(0) / rows**0.5).all()
        close(of_bias / rows, by_p, rtol=0.1, atol=0.01)
        assert abs(found.bound.mean() - expected) < 4 * found.bound.std() / rows**0.5


# --------------------------------------------------------------------------------------------------------- what it says


def test_with_the_posterior_itself_every_sample_says_ln_p():
    net, x = LinearGaussian(latent=1), draw(4, 5)
    found = importance_loss(net.be_exact(x), net.weigher(x), k=7, chunk=3)
    close(found.bound.detach(), net.log_prob(x).detach())
    close(found.effective_sample_size, torch.full((4,), 7.0, dtype=F64))
    close(found.largest_weight, torch.full((4,), 1 / 7, dtype=F64))


def test_the_estimate_of_many_samples_is_ln_p_within_its_error():
    net, x = LinearGaussian(data=4, latent=2), draw(30, 4)
    with torch.no_grad():
        net.encoder.weight.mul_(0.3), net.encoder.bias.zero_()
        exact = net.log_prob(x)
    small, large = (importance_estimate(net.encode(x), net.weigher(x), k=k, seed=2) for k in (10, 5000))
    assert large.bound.dtype == F64 and not large.bound.requires_grad
    assert (large.bound - exact).abs().max() < 0.25 < (small.bound - exact).abs().max()
    assert (large.bound - exact).mean().abs() < 4 * (large.bound - exact).std() / 30**0.5
    assert (large.effective_sample_size > small.effective_sample_size).all()
    assert (large.largest_weight < small.largest_weight).all()
    close(large.standard_error, large.bound.std() / 30**0.5)
    halves = [importance_estimate(net.encode(p), net.weigher(p), k=50, chunk=20, seed=2) for p in x.split(15)]
    joined = ImportanceEstimate.joined(halves)
    close(joined.mean, torch.cat([h.bound for h in halves]).mean())


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["fp32", "fp64"])
def test_five_thousand_in_chunks_are_those_of_one_shot(dtype):
    net, x = LinearGaussian(dtype=dtype), draw(3, 5, dtype=dtype)
    found = importance_estimate(net.encode(x), net.weigher(x), k=5000, chunk=300, seed=1)
    noise = torch.cat(net.drawn, 1)
    assert len(net.drawn) == 17 and noise.shape == (3, 5000, 3)
    net.drawn, net.given = [], [noise]
    with torch.no_grad():
        once = importance_loss(net.encode(x), net.weigher(x), k=5000)
        loss = importance_loss(net.encode(x), net.weigher(x), k=5000, chunk=300, seed=1)
    for part in ("bound", "effective_sample_size", "largest_weight"):
        close(getattr(found, part), getattr(once, part).double(), rtol=1e-5, atol=1e-5)
        close(getattr(loss, part), getattr(once, part), rtol=1e-5, atol=1e-5)


def test_half_inputs_stay_within_a_thousandth():
    """The log-weights as bf16 gives them, and all behind them in fp32."""
    log_w = draw(4, 5000) - 300
    rounded = log_w.bfloat16()
    found = importance_loss(log_w, lambda *a: (rounded, None), k=5000)
    close(found.bound.double(), rounded.double().logsumexp(1) - math.log(5000), rtol=0, atol=1e-3)


def test_rows_keep_to_themselves():
    net, x = LinearGaussian(), draw(3, 5)
    plain = net.weigher(x)

    def spoilt(value):
        def log_weight(parameters, *others):
            log_w, latents = plain(parameters, *others)
            at = torch.zeros_like(log_w)
            at[1, 0] = value
            return log_w + at, latents

        return log_weight

    leaves = [p.detach().requires_grad_() for p in net.encode(x)]
    results = {}
    for value in (0.0, -1e4, -math.inf, math.nan):
        found = importance_loss(leaves, spoilt(value), k=4, chunk=2, seed=1)
        results[value] = found.bound.detach(), torch.autograd.grad(found.bound.sum(), leaves)
    bound, grads = results.pop(0.0)
    for value, (other, others) in results.items():
        assert torch.equal(bound[::2], other[::2])
        assert all(torch.equal(g[::2], h[::2]) for g, h in zip(grads, others, strict=True))
        assert bool(other[1].isnan()) == (value != value)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "miwae:2", "vimco", "piwae:2"])
def test_a_row_of_nothing_has_no_gradient(estimator):
    logits = draw(3, 2).requires_grad_()

    def log_weight(parameters, size, generator, stopped):
        log_w = parameters[0].sum(1, keepdim=True) * torch.rand(3, size, generator=generator, dtype=F64)
        return log_w.masked_fill(torch.tensor([[False], [True], [False]]), -math.inf), None

    found = importance_loss(logits, log_weight, k=4, chunk=3, estimator=estimator, seed=1)
    (grad,) = torch.autograd.grad(found.bound.sum(), logits)
    assert found.bound[1] == -math.inf and found.effective_sample_size[1] == 0 and found.largest_weight[1] == 0
    assert not grad[1].any() and grad[::2].isfinite().all() and grad[::2].any()


# ------------------------------------------------------------------------------------------------------- words, and KL


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("iwea", "estimator must be one of iwae, .*, got 'iwea'; did you mean iwae"),
        ("drag:3", "estimator must be one of .*, got 'drag'; did you mean dreg"),
        ("miwae", "estimator miwae must say the number of groups, as in 'miwae:5', got none"),
        ("miwae:0", "estimator miwae: the number of groups must be an integer of at least 1, got 0"),
        ("miwae:x", "estimator miwae must have a number behind its colon, got 'x'"),
        ("piwae:1.5", "estimator piwae must have a number behind its colon, got '1.5'"),
        ("ciwae", "estimator ciwae must say the share of the ELBO, as in 'ciwae:0.5', got none"),
        ("ciwae:2", "estimator ciwae: the share of the ELBO must be from 0 to 1, got 2.0"),
        ("dreg:2", "estimator dreg takes no setting, got 2"),
        (5, "estimator must be a word, as 'iwae' or 'miwae:5', got int"),
    ],
)
def test_an_estimator_is_a_word_that_is_looked_at(word, sentence):
    with pytest.raises(UsageError, match=sentence):
        Estimator.parse(word)


def test_an_estimator_says_its_word():
    for word in ("iwae", "dreg", "stl", "miwae:5", "piwae:2", "ciwae:0.25", "vimco"):
        assert str(Estimator.parse(word)) == word and Estimator.parse(Estimator.parse(word)) == Estimator.parse(word)


@pytest.mark.parametrize("reduce", [True, False])
def test_the_gaussian_kl_is_torchs(reduce):
    mean, log_scale, other, other_scale = (draw(4, 3, 2, seed=i).requires_grad_() for i in range(4))
    for prior in ((), (other, other_scale), (None, other_scale), (other, None)):
        at, scale = (torch.zeros(()) if len(prior) <= i or prior[i] is None else prior[i] for i in range(2))
        expected = kl_divergence(Normal(mean, log_scale.exp()), Normal(at, scale.exp()))
        found = gaussian_kl(mean, log_scale, *prior, reduce=reduce)
        close(found, expected.flatten(1).sum(1) if reduce else expected)
    near = gaussian_kl(torch.zeros(1, 4), torch.full((1, 4), 1e-3), reduce=False)
    close(near, torch.full((1, 4), (math.expm1(2e-3) - 2e-3) / 2), rtol=1e-3, atol=0)
    assert gaussian_kl(mean.bfloat16(), log_scale.bfloat16()).dtype == torch.float32
    assert gaussian_kl(mean, log_scale, other[:1], other_scale[:1, :1]).shape == (4,)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: gaussian_kl(m, m[:1]), r"log_scale must be \[N, \.\.\.\] = \[2, 3\], got \[1, 3\]"),
        (lambda m: gaussian_kl(m, m, m[:, :2]), r"prior_mean must expand to mean's \[2, 3\], got \[2, 2\]"),
        (lambda m: gaussian_kl(m, m, None, m.expand(2, 2, 3)), r"prior_log_scale must expand to mean's \[2, 3\], got"),
        (lambda m: gaussian_kl(m.sum(), m), r"mean must be \[N, \.\.\.\], got \[\]"),
    ],
)
def test_a_kl_of_wrong_shapes_gets_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=f"gaussian_kl: {sentence}"):
        call(draw(2, 3))
