"""The small classifier of digits: it can read, is the same for the same seed, and tells good samples from bad ones."""

import importlib

import pytest
import torch

from genkernels import data, metrics

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    bundle = data.load("digits")
    return bundle.train.tensors, bundle.test.tensors


@pytest.fixture(scope="module")
def network():
    return metrics.digit_features()


def test_it_reads_digits_that_it_has_not_seen(network, digits):
    x, y = digits[1]
    logits, features = network.logits(x), network(x)
    assert logits.shape == (360, 10) and (logits.argmax(1) == y).double().mean() > 0.94
    assert features.shape == (360, 64) and not features.requires_grad
    assert torch.equal(features, network(x / 16)), "indices and shades mean the same"
    assert network(x[:0]).shape == (0, 64)
    assert (features.std(0) > 0.1).all(), "each unit says something"


@pytest.mark.parametrize("seed", [-1, "0", True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match="^digit_features: seed must be an integer of at least 0"):
        metrics.digit_features(seed)


def test_the_same_seed_gives_the_same_network_and_a_copy_each_time(network):
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    network.half()
    other = metrics.digit_features()
    network.float()
    assert other.head.weight.dtype == torch.float32, "what is done to one is not done to the next"


def test_it_is_trained_anew_the_same_whatever_surrounds_it(monkeypatch):
    module = importlib.import_module("genkernels.metrics.digit_features")
    monkeypatch.setattr(module, "EPOCHS", 1)
    state = torch.get_rng_state()
    plain = module._trained.__wrapped__(7)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        surrounded = module._trained.__wrapped__(7)
    assert torch.equal(torch.get_rng_state(), state)
    for mine, theirs in zip(plain.parameters(), surrounded.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(plain.head.weight, module._trained.__wrapped__(8).head.weight)


def test_distances_on_its_features_rank_samples(network, digits):
    x, held_out = digits[0][0] / 16, digits[1][0] / 16
    noisy = (held_out + 0.3 * torch.randn(held_out.shape)).clamp(0, 1)
    real, near, far = (metrics.frechet_distance(x, y, network) for y in (held_out, noisy, torch.rand_like(held_out)))
    assert 10 * metrics.frechet_distance(x, x, network) < real < near / 2 < far / 4
    real, far = (metrics.precision_recall(network(x), network(y)) for y in (held_out, torch.rand_like(held_out)))
    assert min(real) > 0.8 and max(far) < 0.2
    real, far = (metrics.inception_score(y, network.logits, 1).mean for y in (held_out, torch.rand_like(held_out)))
    assert real > 8 and real > far + 1


def test_gradients_pass_through_to_images(network, digits):
    x = (digits[1][0][:4] / 16).requires_grad_()
    network(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"x must be \[N, 1, 8, 8\], got \[3, 8, 8\]"),
        (torch.zeros(3, 1, 28, 28), ValueError, r"x must be \[N, 1, 8, 8\], got \[3, 1, 28, 28\]"),
        (torch.zeros(3, 1, 8, 8).long(), TypeError, "x must be uint8 level indices or floats in"),
        (torch.full((3, 1, 8, 8), -0.5), ValueError, r"x must be .*floats in \[0, 1\], got torch.float32 from -0.5 to"),
        (torch.full((3, 1, 8, 8), 17).byte(), ValueError, "x must be .*up to 16 or .*, got torch.uint8 from 17 to 17"),
    ],
)
def test_refusals(network, x, error, words):
    with pytest.raises(error, match=f"^digit_features: {words}"):
        network(x)
