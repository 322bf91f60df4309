"""BiGAN: one objective moves generator and encoder, and codes bring back what they are of."""

import pytest
import torch
from torch.nn.functional import softplus

from genkernels.training import TrainConfig, evaluate, fit
from tests.models.gans import batch, near, small, tiny


def scores(model, x):
    """Of pairs (x, E(x)) and (G(z), z), under the seed of a step."""
    torch.manual_seed(4)
    z = torch.randn(len(x), 3, dtype=x.dtype)
    code, fake = model.generator.encoder(x), model.generator(z)
    return model.critic(x, code).squeeze(1), model.critic(fake, z).squeeze(1)


def test_both_sides_minimise_one_objective_of_pairs():
    model, (x, y) = tiny("bigan").double().train(), batch()
    x = x.double()
    real, fake = scores(model, x)
    for player, sign in (("critic", 1), ("generator", -1)):
        torch.manual_seed(4)
        loss = model.losses(player, x, y, 0)["loss"]
        assert near(loss, (softplus(-sign * real) + softplus(sign * fake)).mean(), 1e-9)
    loss.backward()
    for half in (model.generator.decoder, model.generator.encoder):
        assert all(p.grad.abs().sum() > 0 for p in half.parameters())


def test_codes_and_reconstructions():
    model, (x, y) = tiny("bigan", "images", num_classes=3).train(), batch("images")
    codes = model.encode(x)
    assert codes.shape == (6, 4) and not codes.requires_grad and model.training
    back = model.reconstruct(x, y)
    assert back.shape == x.shape and 0 <= back.min() and back.max() <= 1
    assert model.encode(x[:0]).shape == (0, 4)
    sheet = model.pictures(x, y)["reconstructions"]
    assert torch.equal(sheet[..., :8], x / 16) and torch.equal(sheet[..., 8:], back)
    found = model.evaluate([(x[:4], y[:4]), (x[4:], y[4:])])
    wanted = (back - x / 16).square().mean()
    assert list(found) == ["sliced_wasserstein", "reconstruction"]
    assert found["reconstruction"].value == pytest.approx(wanted.item(), rel=1e-5)
    assert tiny("bigan").pictures(*batch()) == {}


def test_the_reconstruction_error_falls_by_half():
    bundle, model = small("eight_gaussians", 20_000, 1000), tiny("bigan", width=32, depth=2, latent=2)
    settings = {"batch_size": 128, "accelerator": "cpu", "eval_every": 0, "clip": 0.0, "warmup": 0, "ema": 0.98}
    before = evaluate(model, bundle.test)["reconstruction"].value
    result = fit(model, bundle, TrainConfig(max_steps=600, lr=2e-3, betas=(0.5, 0.999), **settings), quiet=True)
    assert result.held_out["reconstruction"].value < before / 2
