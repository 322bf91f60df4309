import math
from types import SimpleNamespace

import pytest
import torch

from genkernels._words import UsageError
from genkernels.models import Estimate, Model
from genkernels.training import evaluate
from genkernels.training.judge import report
from genkernels.training.sampling import sample
from tests.training.tiny import Pairs, images, model_for, points


class Known(Model):
    """The value of an example is its first pixel: every mean is known."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.p = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.num_classes = [], None

    def evaluate(self, batches, scale: float = 1.0):
        values = []
        for x, y in batches:
            assert not self.training and not torch.is_grad_enabled()
            self.seen.append((len(x), y))
            values.append(scale * x.flatten(1)[:, 0].float())
        both = torch.cat(values) if values else torch.empty(0)
        return {"first": Estimate.of("first", "grey", both), "twice": Estimate.of("twice", "", 2 * both, False)}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_the_last_partial_batch_counts_by_its_size(batch_size):
    values = torch.arange(10).to(torch.uint8)
    data = Pairs(values.view(10, 1, 1, 1))
    model = Known().train()
    result = evaluate(model, data, batch_size=batch_size)["first"]
    assert result.value == 4.5 and result.examples == 10 and result.name == "first"
    assert result.standard_error == pytest.approx(values.double().std(correction=0).item() / math.sqrt(10), rel=1e-12)
    assert sum(n for n, _ in model.seen) == 10
    assert model.training, "the mode is put back"


def test_estimates_are_the_model_s_own_and_take_its_options():
    data = Pairs(torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]]))
    result = evaluate(Known(), data, batch_size=2, options={"scale": -2.0})
    assert list(result) == ["first", "twice"] and result["first"].value == -6.0 and result["twice"].value == -12.0
    assert not result["twice"].lower_is_better and result["first"].better_than(-5.0)
    assert str(result["first"]).startswith("-6.0000 ± 2.") and str(result["first"]).endswith(" grey")
    assert str(Estimate("distance", "", 1.25, math.nan, 3)) == "1.2500"
    bundle = points()
    assert list(evaluate(model_for(bundle), bundle.test)) == ["nats"]
    bundle = images()
    assert evaluate(model_for(bundle), bundle.test)["bits_per_dim"].unit == "bits/dim"


def test_a_model_that_gives_no_estimate_is_named():
    class Silent(Known):
        def evaluate(self, batches):
            return {}

    with pytest.raises(ValueError, match="Silent.evaluate must give at least 1 estimate, got none"):
        evaluate(Silent(), Pairs(torch.zeros(3, 2)))


@pytest.mark.parametrize("world_size", [3, 7])
def test_processes_together_see_every_example_once(world_size):
    data = Pairs(torch.arange(11).to(torch.uint8).view(11, 1, 1, 1))
    alone = evaluate(Known(), data, batch_size=2)

    def found(rank, gather) -> tuple[dict, int]:
        model = Known()
        fabric = SimpleNamespace(global_rank=rank, world_size=world_size, all_gather=gather)
        return evaluate(model, data, batch_size=2, fabric=fabric), sum(n for n, _ in model.seen)

    parts, seen = [], 0
    for rank in range(world_size):  # the seventh has no batch at all
        seen += found(rank, lambda s: parts.append(s) or s[None])[1]
    everyone = torch.stack(parts)
    pooled = [found(rank, lambda s: everyone)[0] for rank in range(world_size)]
    assert seen == 11 and all(theirs == pooled[0] for theirs in pooled), "all processes must decide alike"
    assert pooled[0]["first"].examples == 11 and pooled[0]["first"].value == 5.0 and pooled[0]["twice"].value == 10.0
    assert pooled[0]["first"].standard_error == pytest.approx(alone["first"].standard_error, rel=1e-12)


def test_the_noise_is_a_function_of_the_seed_and_nothing_else():
    bundle = images()
    model = model_for(bundle)
    torch.manual_seed(1)
    first = evaluate(model, bundle.test, batch_size=4, seed=3)
    here = torch.get_rng_state()
    torch.manual_seed(2)
    assert evaluate(model, bundle.test, batch_size=4, seed=3) == first
    assert evaluate(model, bundle.test, batch_size=4, seed=4) != first
    torch.manual_seed(1)
    assert torch.equal(here, torch.get_rng_state()), "evaluation moved the global generator"


def test_labels_are_always_given():
    model = Known()
    evaluate(model, Pairs(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.tensor([2, 0, 1])))
    assert model.seen[0][1].tolist() == [2, 0, 1]


def test_nan_is_reported_and_an_empty_set_is_refused():
    bad = Pairs(torch.tensor([[1.0, 0.0], [math.nan, 0.0]]))
    assert math.isnan(evaluate(Known(), bad)["first"].value)
    with pytest.raises(ValueError, match="at least 1 example"):
        evaluate(Known(), Pairs(torch.zeros(0, 2)))


def test_mixed_precision_around_it_does_not_reach_the_numbers():
    bundle = images()
    model = model_for(bundle)
    exact, drawn = evaluate(model, bundle.test), sample(model, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(model, bundle.test) == exact
        assert torch.equal(sample(model, 4, seed=1), drawn)


def test_evaluation_can_be_broken_off():
    model = Known()
    data = Pairs(torch.zeros(10, 1, 1, 1, dtype=torch.uint8))
    assert evaluate(model, data, batch_size=2, stop=lambda: len(model.seen) == 3) is None
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
        cold = sample(model, 6, temperature=0.0)
    assert cold[:3].flatten(1).mean(1).tolist() == cold[3:].flatten(1).mean(1).tolist(), "each class in turn"
    assert len(set(cold[:3].flatten(1).mean(1).tolist())) == 3
    assert torch.equal(sample(model, 2, temperature=0.0, label=1)[0], cold[1])
    with pytest.raises(UsageError, match="0 to 2, got 3"):
        sample(model, 2, label=3)
    with pytest.raises(UsageError, match="no classes to choose from"):
        sample(model_for(bundle), 2, label=0)


@pytest.mark.parametrize("classes", [None, 3])
def test_no_samples_have_the_shape_of_samples_and_fewer_cannot_be(classes):
    bundle = images()
    model = model_for(bundle, num_classes=classes)
    assert sample(model, 0).shape == (0, *bundle.form.shape)
    with pytest.raises(ValueError, match="sample: n must be an integer of at least 0, got -1"):
        sample(model, -1)
    with pytest.raises(ValueError, match="sample: batch_size must be an integer of at least 1, got 0"):
        sample(model, 2, batch_size=0)


@pytest.mark.parametrize("batch_size", [0, -3, 2.0])
def test_batches_of_nothing_are_no_evaluation(batch_size):
    bundle = images()
    for function in (evaluate, report):
        with pytest.raises(ValueError, match=f"{function.__name__}: batch_size must be an integer of at least 1, got"):
            function(model_for(bundle), bundle.test, batch_size=batch_size)
