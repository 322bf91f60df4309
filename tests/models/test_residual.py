"""ResidualFlow: bounds that hold after training and loading, inverses of its own samples, estimators that agree."""

import math
import re

import pytest
import torch

from genkernels import data, models, training

STEPS = 20


@pytest.fixture(scope="module", params=["digits", "points"])
def trained(request):
    """A small one after some steps at a large step size, and held-out data."""
    torch.manual_seed(0)
    name, options = request.param, {"hidden": 16, "blocks": 2}
    model = models.ResidualFlow.from_preset(name, **options)
    bundle = data.load("digits" if name == "digits" else "checkerboard")
    x, test = bundle.train.tensors[0], bundle.test.tensors[0][:64]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss(x[step * 64 : step * 64 + 64])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[1]
    return model, test


def test_every_block_is_certified_after_training_and_after_loading(trained):
    model, test = trained
    other = models.build("residualflow", **model.hparams)
    other.load_state_dict(model.state_dict())
    for flow in (model.eval(), other.eval()):
        for block in flow.residual_blocks():
            bound, ends = flow.lipschitz_bound(block)
            assert bound < 1 and all(low <= high for low, high in ends)
            # the bounds are in force, and none is idle: each layer's own is the coefficient, or below it
            assert all(high <= model.hparams["coefficient"] * 1.005 for _, high in ends)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(*(m.log_prob(test, generator=g) for m, g in zip((model, other), seeds, strict=True)))


def test_a_run_trains_the_weights_that_it_evaluates():
    pytest.importorskip("lightning")
    torch.manual_seed(0)
    model = models.ResidualFlow.from_preset("digits", hidden=16, blocks=1)
    bundle = data.load("digits")
    config = training.TrainConfig(max_steps=40, lr=5e-3, ema=0.0, eval_every=0)
    result = training.fit(model, bundle, config, quiet=True)
    x = bundle.train.tensors[0][:512]
    with torch.no_grad():
        again = model.train().loss(x)
    last = sum(result.losses[-5:]) / 5
    assert last < result.losses[2] - 0.2
    assert abs(again - last) < 0.1 and abs(result.held_out["bits_per_dim"].value - last) < 0.15


@torch.no_grad()
def test_inverts_its_own_samples(trained):
    model, _ = trained
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(50, *model.latent_shapes[0], generator=generator)
    x, _ = model.eval().inverse((z,))
    (again,), _ = model(x)
    assert (again - z).abs().max() <= 1e-4
    assert torch.isfinite(model.sample(20, generator=generator)).all()


@torch.no_grad()
def test_estimators_agree(trained):
    model, test = trained
    model.eval()
    values = []
    for how in ({"log_det": "series", "terms": 20}, {"log_det": "unbiased", "terms": 6}, {"log_det": "exact"}):
        model.set_log_det(**how, **({"probes": 20} if how["log_det"] != "exact" else {}))
        torch.manual_seed(3)
        x = test[:16]
        values.append(model.log_prob(x, generator=torch.Generator().manual_seed(4)).mean() / (model.dim * math.log(2)))
    model.set_log_det(model.hparams.get("log_det", "unbiased"))
    assert max(values) - min(values) <= 0.02


def test_its_report_says_how_it_was_inverted_and_what_holds(trained):
    model, test = trained
    inverse, *blocks = model.eval().report(test, torch.zeros(len(test), dtype=torch.int64))
    assert float(re.search(r"largest residual ([\d.e-]+)$", inverse)[1]) <= 1e-5
    assert len(blocks) == len(model.residual_blocks())
    for line in blocks:
        assert float(re.search(r"constant at most ([\d.]+);", line)[1]) < 1
    assert not any(m._forward_hooks for m in model.modules())


def test_classes_and_bad_sizes():
    model = models.ResidualFlow.from_preset("digits", num_classes=3, blocks=1, hidden=8)
    x, y = torch.randint(17, (4, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    seed = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    one, other = model.log_prob(x, y, seed()), model.log_prob(x, (y + 1) % 3, seed())
    assert not torch.equal(one, other) and model.sample(3, y=1).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="height and width must be multiples of 4 for scales=3, got 6x8"):
        models.ResidualFlow(shape=(1, 6, 8), scales=3)
    with pytest.raises(ValueError, match="coefficient of each layer of net must be below 1"):
        models.ResidualFlow(shape=(2,), blocks=1, hidden=4, coefficient=1.2)
