"""HybridFlow: its loss is its two terms, λ weighs them, and both sides are what flow and classifier give by hand."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

from genkernels import models, training
from genkernels._words import UsageError
from genkernels.cli import main
from genkernels.data import load
from genkernels.networks import log_det_series

SMALL = {
    "realnvp": {"blocks": 0, "hidden": 4, "logit": 0.01},
    "glow": {"scales": 2, "steps": 1, "hidden": 4},
    "residualflow": {"scales": 2, "blocks": 1, "hidden": 8, "logit": 0.01},
    "maf": {"transforms": 1, "hidden": 16},
}


def make(flow, **options):
    torch.manual_seed(0)
    sizes = {"shape": (1, 8, 8), "grey_levels": 17, "num_classes": 10, **SMALL[flow], **options}
    return models.HybridFlow(flow=flow, **sizes)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    x, y = load("digits").train.tensors
    return x[:40], y[:40]


@pytest.fixture(params=SMALL)
def started(request, digits):
    """A small one, its ActNorms set, in evaluation mode."""
    model = make(request.param)
    model.loss(*digits)
    return model.eval()


@pytest.mark.parametrize("weight", [0, "1/D", 0.3, 1])
def test_the_loss_is_its_two_terms(started, digits, weight):
    x, y = digits
    model = models.HybridFlow(**{**started.hparams, "weight": weight})
    model.load_state_dict(started.state_dict())
    model.eval()
    scale = 1 / 64 if weight == "1/D" else weight
    log_prob, entropy = model.log_prob(x, generator=seeded()), -model.log_prob_y(x, y, seeded())
    wanted = entropy.mean() - scale * log_prob.mean()
    torch.testing.assert_close(model.loss(x, y, seeded()), wanted)
    torch.manual_seed(3)
    terms = model.losses("model", x, y, 0)
    assert set(terms) == {"loss", "cross_entropy", *(["bits_per_dim"] if weight else [])}
    if weight:
        by_terms = terms["cross_entropy"] + scale * 64 * math.log(2) * terms["bits_per_dim"]
        torch.testing.assert_close(terms["loss"], by_terms)
        torch.testing.assert_close(model.loss(x, generator=seeded()), -scale * log_prob.mean())
    else:
        assert torch.equal(terms["loss"], terms["cross_entropy"])
        with pytest.raises(ValueError, match="y must be given, got None"):
            model.loss(x)


def test_p_of_x_is_the_flows_own_and_p_of_y_that_of_a_linear_layer(started, digits):
    x, y = digits
    for own, flows in ((started.log_prob, started.flow.log_prob), (started.bits_per_dim, started.flow.bits_per_dim)):
        assert torch.equal(own(x, generator=seeded()), flows(x, generator=seeded()))
    assert torch.equal(started.log_prob(x, y, seeded()), started.log_prob(x, generator=seeded()))
    latents, _ = started.flow.encode(x, generator=seeded())
    z = torch.cat([latent.flatten(1) for latent in latents], 1)
    assert z.shape == (40, 64)
    logits = z @ started.classifier.weight.T + started.classifier.bias
    torch.testing.assert_close(started.logits(x, seeded()), logits)
    assert torch.equal(started.classify(x, seeded()), logits.argmax(1))
    by_hand = logits.log_softmax(1)[torch.arange(40), y]
    torch.testing.assert_close(started.log_prob_y(x, y, seeded()), by_hand, rtol=1e-4, atol=1e-5)


def test_with_weight_0_nothing_of_the_density_is_trained_or_computed(digits, monkeypatch):
    x, y = digits
    for flow in SMALL:
        model = make(flow, weight=0, **({"learned_prior": True} if flow == "glow" else {}))
        model.loss(x, y)
        with monkeypatch.context() as patch:
            patch.setattr(log_det_series, "log_det_series", lambda *_, **__: pytest.fail("a series was summed"))
            loss = model.losses("model", x, y, 0)["loss"]
        parameters = dict(model.named_parameters())
        found = dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True))
        assert all(g is None for name, g in found.items() if "prior" in name), flow
        assert found["classifier.weight"].abs().max() > 0
        classifier = F.cross_entropy(model.eval().logits(x, seeded()), y)
        torch.testing.assert_close(model.loss(x, y, seeded()), classifier)


def test_gradients_of_weights_are_linear_in_lambda(digits):
    """g(λ) = g(0) + λ (g(1) − g(0)): λ weighs p(x), and p(x) alone."""
    x, y = digits
    start = make("glow")
    start.loss(x, y)
    gradients = []
    for weight in (0, "1/D", 1):
        model = make("glow", weight=weight)
        model.load_state_dict(start.state_dict())
        model = model.double().eval()
        loss = model.loss(x, y, seeded())
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
    none, some, whole = gradients
    torch.testing.assert_close(some, none + (whole - none) / 64, rtol=1e-6, atol=1e-9)
    assert (whole - none).abs().max() > 0.1


def test_accuracy_and_bits_per_dim_by_hand(started, digits):
    x, y = digits
    torch.manual_seed(5)
    found = started.evaluate([(x[:30], y[:30]), (x[30:], y[30:])])
    assert list(found) == ["loss", "bits_per_dim", "cross_entropy", "accuracy"]
    assert all(estimate.examples == 40 for estimate in found.values())
    torch.manual_seed(5)
    right = bits = 0.0
    for part in (slice(30), slice(30, 40)):
        with torch.no_grad():
            log_prob, logits = started._passed(x[part], None)
        right += float((logits.argmax(1) == y[part]).sum())
        bits -= float(log_prob.sum()) / (64 * math.log(2))
    assert found["accuracy"].value == pytest.approx(100 * right / 40)
    assert found["bits_per_dim"].value == pytest.approx(bits / 40, rel=1e-5)
    accuracy = right / 40
    assert found["accuracy"].standard_error == pytest.approx(100 * math.sqrt(accuracy * (1 - accuracy) / 40))
    assert found["accuracy"].better_than(found["accuracy"].value - 1) and found["accuracy"].unit == "%"
    made = found["cross_entropy"].value + found["bits_per_dim"].value * math.log(2)
    assert found["loss"].value == pytest.approx(made, rel=1e-5)


def test_points_are_judged_in_nats():
    torch.manual_seed(0)
    x, y = load("moons").train.tensors
    model = models.HybridFlow.from_preset("points", steps=2, hidden=8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = model.losses("model", x[:256], y[:256], 0)
    for step in range(60):
        terms = model.losses("model", x[:256], y[:256], step)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert set(terms) == {"loss", "nats", "cross_entropy"} and terms["loss"] < first["loss"] - 0.3
    found = model.evaluate([(x[:256], y[:256])])
    assert found["accuracy"].value > 80 and found["nats"].unit == "nats"
    assert model.weight == 0.5 and model.sample(5).shape == (5, 2)


def test_a_trained_state_goes_round(digits):
    x, y = digits
    for preset in ("digits", "digits-realnvp", "digits-residualflow"):
        small = {"blocks": 1} if preset != "digits" else {"steps": 1}
        model = models.HybridFlow.from_preset(preset, hidden=8, weight=0.25, **small)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(3):
            optimizer.zero_grad()
            model.losses("model", x, y, step)["loss"].backward()
            optimizer.step()
        model.eval()
        twin = models.build("hybridflow", **json.loads(json.dumps(model.hparams))).eval()
        twin.load_state_dict(model.state_dict())
        assert twin.hparams == model.hparams and twin.weight == 0.25
        for other in (twin, copy.deepcopy(model)):
            assert torch.equal(other.log_prob(x, generator=seeded()), model.log_prob(x, generator=seeded()))
            assert torch.equal(other.logits(x, seeded()), model.logits(x, seeded()))
            assert torch.equal(other.sample(2, generator=seeded()), model.sample(2, generator=seeded()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flow": "glwo"}, "flow must be one of .*, got 'glwo'; did you mean glow"),
        ({"flow": "pixelcnn"}, "flow must be one of .*, got 'pixelcnn'"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": None}, "num_classes must be an integer, got None"),
        ({"weight": -0.1}, "weight must be a number of at least 0, or '1/D', got -0.1"),
        ({"weight": "1/N"}, "weight must be a number of at least 0, or '1/D', got '1/N'"),
        ({"weight": math.nan}, "weight must be a number"),
        ({"weight": True}, "weight must be a number"),
        ({"stepps": 2}, "glow has no argument 'stepps'; did you mean steps"),
        ({"class_features": 2}, "glow has no argument 'class_features'"),
    ],
)
def test_mistakes_give_one_sentence(options, words):
    with pytest.raises(ValueError, match=f"HybridFlow: {words}") as caught:
        models.HybridFlow(**{"shape": (4,), "num_classes": 3, **options})
    assert "\n" not in str(caught.value)


def test_labels_are_checked_and_samples_take_none(digits):
    x, y = digits
    model = make("glow")
    with pytest.raises(ValueError, match=r"HybridFlow: y must lie in 0\.\.9"):
        model.loss(x, y + 1)
    with pytest.raises(ValueError, match=r"HybridFlow: x must be \[N, 1, 8, 8\]"):
        model.loss(x[:, :, :4], y)
    with pytest.raises(ValueError, match="samples are of p.x., which knows no class, got 3"):
        model.sample(2, y=3)
    with pytest.raises(UsageError, match="HybridFlow draws from p.x., of which no class can be chosen"):
        training.sample(model, 2, label=3)
    assert training.sample(model, 3).shape == (3, 1, 8, 8)


def test_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("lightning")
    run = str(tmp_path / "run")
    sizes = ["--set", "hidden=4", "--set", "steps=1", "--set", "weight=1/D"]
    argv = ["train", "hybridflow", "--data", "digits", "--out", run, *sizes, "--max-steps", "4", "--samples", "4"]
    assert main([*argv, "--quiet", "--accelerator", "cpu"]) == 0
    rows = (tmp_path / "run" / "losses.csv").read_text().splitlines()
    assert rows[0].split(",")[-2:] == ["bits_per_dim", "cross_entropy"] and len(rows) == 5
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["metric"] == "loss" and metrics["hparams"]["num_classes"] == 10
    assert metrics["held_out"]["accuracy"]["examples"] == 360
    capsys.readouterr()
    assert main(["eval", run, "--checkpoint", "last"]) == 0
    told = capsys.readouterr().out
    for name in ("accuracy", "bits_per_dim"):
        assert f"{name} {metrics['held_out'][name]['value']:.4f}" in told
    assert main(["sample", run, "--n", "2", "--out", str(tmp_path / "s.png")]) == 0
    assert main(["sample", run, "--n", "2", "--label", "3", "--out", str(tmp_path / "t.png")]) == 2
    assert "no class can be chosen" in capsys.readouterr().err
