import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from genkernels.training.average import Average, applied


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


def weights(average) -> dict:
    return average.module.state_dict()


def test_the_average_follows_its_formula():
    model = net()
    average = Average(model, 0.7)
    expected = None
    for t in range(40):
        drift(model)
        average.update_parameters(model)
        now = {k: v.clone() for k, v in model.named_parameters()}
        d = min(0.7, t / (t + 9))
        expected = now if expected is None else {k: d * expected[k] + (1 - d) * now[k] for k in now}
    for name, value in expected.items():
        torch.testing.assert_close(weights(average)[name], value, rtol=1e-12, atol=1e-12)
    assert torch.equal(weights(average)["1.running_mean"], model[1].running_mean)  # statistics are averages already
    assert weights(average)["1.num_batches_tracked"].item() == 40


def test_the_first_update_is_a_copy_and_shares_no_memory():
    model = net()
    average = Average(model, 0.999)
    drift(model)
    average.update_parameters(model)
    for name, value in model.state_dict().items():
        assert torch.equal(weights(average)[name], value) and weights(average)[name].data_ptr() != value.data_ptr()


def test_the_count_is_no_tensor_that_a_device_would_be_waited_for():
    model = net()
    average = Average(model, 0.9)
    assert isinstance(AveragedModel(model).n_averaged, torch.Tensor), "torch changed: is the count of our own needed?"
    for count in (1, 2):
        average.update_parameters(model)
        assert average.n_averaged == count and isinstance(average.n_averaged, int)
    assert dict(average.named_buffers()).keys() == {f"module.{name}" for name, _ in model.named_buffers()}


def test_applied_puts_the_trained_weights_back_bit_for_bit():
    model = net()
    average = Average(model, 0.9)
    for _ in range(5):
        drift(model)
        average.update_parameters(model)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), applied([(model, average), (nn.Linear(1, 1), None)]):
        assert all(torch.equal(v, weights(average)[k]) for k, v in model.state_dict().items())
        assert not torch.equal(model[0].weight, trained["0.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_before_the_first_update_there_is_nothing_to_apply():
    model = net()
    average = Average(model, 0.9)
    drift(model)
    now = model[0].weight.clone()
    average.copy_to(model)
    assert torch.equal(model[0].weight, now)
    with applied([(model, average)]):
        assert torch.equal(model[0].weight, now)


def test_tied_weights_are_averaged_under_each_name():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    average = Average(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            model["a"].weight.add_(1.0)
        average.update_parameters(model)
    assert torch.equal(weights(average)["a.weight"], weights(average)["b.weight"])
    assert not torch.equal(weights(average)["a.weight"], model["a"].weight)


def test_integers_are_copied_and_each_type_is_averaged_in_its_own():
    model = net()
    model[0].half()
    model.register_parameter("count", nn.Parameter(torch.tensor([0]), requires_grad=False))
    average = Average(model, 0.5)
    for _ in range(3):
        with torch.no_grad():
            model.count.add_(1)
            model[0].weight.fill_(float(model.count))
        average.update_parameters(model)
    assert average.module.count.item() == 3 and average.module[0].weight.dtype == torch.float16
    expected = (1 * 0.1 + 2 * 0.9) * 2 / 11 + 3 * 9 / 11
    assert average.module[0].weight.float().mean().item() == pytest.approx(expected, rel=2e-3)


def test_state_comes_back_and_a_foreign_one_is_refused():
    model = net()
    average = Average(model, 0.9)
    drift(model)
    average.update_parameters(model)
    other = Average(net(), 0.9)
    other.load(average.to_dict())
    assert other.n_averaged == 1 and torch.equal(weights(other)["0.weight"], weights(average)["0.weight"])
    drift(model)
    average.update_parameters(model)
    other.update_parameters(model)
    assert other.n_averaged == 2 and torch.equal(weights(other)["0.weight"], weights(average)["0.weight"])
    with pytest.raises(ValueError, match="must have this model's tensors"):
        Average(nn.Linear(3, 4), 0.9).load(average.to_dict())
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        Average(model, 1.0)
