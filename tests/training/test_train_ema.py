import pytest
import torch
from torch import nn

from genkernels.training import EMA


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model.double()


def drift(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model[1].running_mean.add_(1.0)
        model[1].num_batches_tracked.add_(1)


def test_the_average_follows_its_formula():
    model = net()
    ema = EMA(model, 0.7)
    expected = None
    for t in range(40):
        drift(model)
        ema.update(model)
        now = {k: v.clone() for k, v in model.named_parameters()}
        d = min(0.7, t / (t + 9))
        expected = now if expected is None else {k: d * expected[k] + (1 - d) * now[k] for k in now}
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name], value, rtol=1e-12, atol=1e-12)
    assert torch.equal(ema.average["1.running_mean"], model[1].running_mean)  # statistics are averages already
    assert ema.average["1.num_batches_tracked"].item() == 40


def test_the_first_update_is_a_copy_and_shares_no_memory():
    model = net()
    ema = EMA(model, 0.999)
    drift(model)
    ema.update(model)
    for name, value in model.state_dict().items():
        assert torch.equal(ema.average[name], value) and ema.average[name].data_ptr() != value.data_ptr()


def test_applied_puts_the_trained_weights_back_bit_for_bit():
    model = net()
    ema = EMA(model, 0.9)
    for _ in range(5):
        drift(model)
        ema.update(model)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model):
        assert all(torch.equal(v, ema.average[k]) for k, v in model.state_dict().items())
        raise RuntimeError("inside")
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_before_the_first_update_there_is_nothing_to_apply():
    model = net()
    ema = EMA(model, 0.9)
    drift(model)
    now = model[0].weight.clone()
    ema.copy_to(model)
    assert torch.equal(model[0].weight, now)


def test_tied_weights_are_averaged_under_each_name():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    ema = EMA(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            model["a"].weight.add_(1.0)
        ema.update(model)
    assert torch.equal(ema.average["a.weight"], ema.average["b.weight"])
    assert not torch.equal(ema.average["a.weight"], model["a"].weight)


def test_state_comes_back_and_a_foreign_one_is_refused():
    model = net()
    ema = EMA(model, 0.9)
    drift(model)
    ema.update(model)
    other = EMA(net(), 0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1 and torch.equal(other.average["0.weight"], ema.average["0.weight"])
    with pytest.raises(ValueError, match="must have this model's tensors"):
        EMA(nn.Linear(3, 4), 0.9).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        EMA(model, 1.0)
