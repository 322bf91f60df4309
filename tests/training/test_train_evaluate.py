import math

import pytest
import torch
from tiny import Pairs, images, model_for, points

from genkernels._words import UsageError
from genkernels.training.evaluate import combine, evaluate
from genkernels.training.sampling import sample


class Known(torch.nn.Module):
    """Bits/dim of an example is its first pixel: every mean is known."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def bits_per_dim(self, x, y=None):
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append((len(x), y))
        return x.flatten(1)[:, 0].float()

    def log_prob(self, x, y=None):
        return -2 * x[:, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_the_last_partial_batch_counts_by_its_size(batch_size):
    values = torch.arange(10).to(torch.uint8)
    data = Pairs(values.view(10, 1, 1, 1))
    model = Known().train()
    result = evaluate(model, data, levels=256, batch_size=batch_size)
    assert result.value == 4.5 and result.examples == 10 and result.metric == "bits_per_dim"
    assert result.standard_error == pytest.approx(values.double().std(correction=0).item() / math.sqrt(10), rel=1e-12)
    assert sum(n for n, _ in model.seen) == 10
    assert model.training, "the mode is put back"


def test_points_are_measured_in_nats():
    data = Pairs(torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]]))
    result = evaluate(Known(), data, levels=None, batch_size=2)
    assert (result.metric, result.unit, result.value) == ("nats", "nats", 6.0)


def test_processes_together_see_every_example_once():
    data = Pairs(torch.arange(11).to(torch.uint8).view(11, 1, 1, 1))
    parts = []
    for rank in range(3):
        evaluate(
            Known(), data, levels=256, batch_size=2, rank=rank, world_size=3, reduce=lambda s: parts.append(s) or s
        )
    together = combine("bits_per_dim", torch.stack(parts).sum(0))
    assert together.examples == 11 and together.value == 5.0


def test_the_noise_is_a_function_of_the_seed_and_nothing_else():
    bundle = images()
    model = model_for(bundle)
    torch.manual_seed(1)
    first = evaluate(model, bundle.test, levels=5, batch_size=4, seed=3)
    here = torch.get_rng_state()
    torch.manual_seed(2)
    assert evaluate(model, bundle.test, levels=5, batch_size=4, seed=3) == first
    assert evaluate(model, bundle.test, levels=5, batch_size=4, seed=4) != first
    torch.manual_seed(1)
    assert torch.equal(here, torch.get_rng_state()), "evaluation moved the global generator"


def test_labels_are_given_only_where_asked_for():
    data = Pairs(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.tensor([2, 0, 1]))
    model = Known()
    evaluate(model, data, levels=2)
    evaluate(model, data, levels=2, class_conditional=True)
    assert model.seen[0][1] is None and model.seen[1][1].tolist() == [2, 0, 1]


def test_nan_is_reported_and_an_empty_set_is_refused():
    bad = Pairs(torch.tensor([[1.0, 0.0], [math.nan, 0.0]]))
    assert math.isnan(evaluate(Known(), bad, levels=None).value)
    with pytest.raises(ValueError, match="at least 1 example"):
        evaluate(Known(), Pairs(torch.zeros(0, 2)), levels=None)


def test_mixed_precision_around_it_does_not_reach_the_numbers():
    bundle = images()
    model = model_for(bundle)
    exact, drawn = evaluate(model, bundle.test, levels=5), sample(model, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(model, bundle.test, levels=5) == exact
        assert torch.equal(sample(model, 4, seed=1), drawn)


def test_evaluation_can_be_broken_off():
    model = Known()
    data = Pairs(torch.zeros(10, 1, 1, 1, dtype=torch.uint8))
    assert evaluate(model, data, levels=2, batch_size=2, stop=lambda: len(model.seen) == 3) is None
    assert len(model.seen) == 3


def test_samples_are_a_function_of_the_seed_and_memory_does_not_grow():
    bundle = points()
    model = model_for(bundle).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = sample(model, 10, seed=1, batch_size=4)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert a.shape == (10, 2) and torch.equal(a, sample(model, 10, seed=1, batch_size=4))
    assert not torch.equal(a, sample(model, 10, seed=2, batch_size=4))
    assert not a.requires_grad


def test_labels_of_samples():
    bundle = images()
    model = model_for(bundle, num_classes=3)
    with torch.no_grad():
        model.classes.weight.copy_(torch.arange(3.0).view(3, 1).expand(3, 16) / 3)
        for p in model.net.parameters():
            p.zero_()
        cold = sample(model, 6, temperature=0.0, num_classes=3)
    assert cold[:3].flatten(1).mean(1).tolist() == cold[3:].flatten(1).mean(1).tolist(), "each class in turn"
    assert len(set(cold[:3].flatten(1).mean(1).tolist())) == 3
    assert torch.equal(sample(model, 2, temperature=0.0, label=1, num_classes=3)[0], cold[1])
    with pytest.raises(UsageError, match="0 to 2, got 3"):
        sample(model, 2, label=3, num_classes=3)
    with pytest.raises(UsageError, match="no classes to choose from"):
        sample(model, 2, label=0)
