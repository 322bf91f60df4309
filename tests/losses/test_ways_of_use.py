"""The penalties as training code calls them: at the end of networks as people write them, in inference mode, under
autocast, in a step without a penalty."""

import functools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import genkernels as gk
from genkernels.losses import critic_step, gradient_penalty
from tests.losses.definitions import draw

close = torch.testing.assert_close


class Net(nn.Module):
    """Scores of vectors of four numbers, the last layer's output as `end` gives it."""

    def __init__(self, end=lambda scores: scores, middle=lambda h: h):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.end, self.middle = end, middle
        self.double()

    def forward(self, x):
        return self.end(self.last(self.middle(torch.relu(self.first(x)))))


BATCH = draw(4, (4,), torch.float64)


@pytest.mark.parametrize("end", [torch.flatten, lambda s: s.flatten(0), lambda s: s.view(-1), lambda s: s.squeeze(1)])
def test_scores_of_one_axis_take_the_short_way(end, recwarn):
    found, way = gradient_penalty(Net(end), BATCH, BATCH, explain=True)
    close(found, gradient_penalty(Net(), BATCH, BATCH))
    assert way.startswith("four passes") and not recwarn.list


@pytest.mark.parametrize("spread", [lambda h: h.std(0), lambda h: torch.var(h, 0), lambda h: h.std()])
def test_statistics_over_the_batch_are_warned_of(spread):
    net = Net(middle=lambda h: h + spread(h))
    with pytest.warns(UserWarning, match=r"gradient_penalty: '(std|var)' in the network \(Net\) couples the samples"):
        gradient_penalty(net, BATCH, BATCH)


def test_of_each_sample_by_itself_they_are_not(recwarn):
    _, way = gradient_penalty(Net(middle=lambda h: h + h.std(1, keepdim=True)), BATCH, BATCH, explain=True)
    assert way.startswith("double backward: 'std' in the network (Net) has no rule") and not recwarn.list


@pytest.mark.parametrize("middle", [lambda h: h, lambda h: h * h.square().mean(1, keepdim=True).rsqrt()])
def test_in_inference_mode_there_are_values_alone(middle):
    net, other = Net(middle=middle), draw(4, (4,), torch.float64)
    step = critic_step(net, BATCH, other, r1=2.0, r2=3.0)
    penalty = gradient_penalty(net, BATCH, BATCH)
    with torch.inference_mode():
        within = critic_step(net, BATCH, other, r1=2.0, r2=3.0), gradient_penalty(net, BATCH, BATCH)
        made = BATCH + 0
    close(within, (step, penalty))
    assert not any(value.requires_grad for value in within)
    behind = critic_step(net, made, other, r1=2.0, r2=3.0)
    close(behind, step)
    behind.backward()
    assert net.first.weight.grad.abs().sum() > 0


def test_a_generator_under_autocast_meets_data_of_full_precision():
    net = Net().float()
    real, fake = BATCH.float(), draw(4, (4,), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = critic_step(net, real, fake, r1=1.0), gradient_penalty(net, real, fake)
        expected = critic_step(net, real, fake.float(), r1=1.0)
    close(found[0], expected)
    assert all(value.dtype == torch.float32 for value in found)
    with pytest.raises(TypeError, match="critic_step: fake must have the dtype of real, torch.float32, got torch.bf"):
        critic_step(net, real, fake)


def test_a_step_without_the_lazy_penalty_may_call_backward():
    net = Net()
    penalty = gradient_penalty(net, BATCH, BATCH, every=4, step=2)
    penalty.backward()
    assert penalty == 0 and net.first.weight.grad is None
    with torch.no_grad():
        assert not gradient_penalty(net, BATCH, BATCH, every=4, step=2).requires_grad


def test_what_a_critic_draws_it_draws_twice_alike():
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 1)).double()
    before = torch.get_rng_state()
    assert gk.testing.check_penalty(net, BATCH).difference < 1e-12
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"y": torch.zeros(1, dtype=torch.int64)}, ValueError, "y must hold a label for each of the 4 samples, got"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_one_sentence_says_what_must_hold(given, error, sentence):
    with pytest.raises(error, match=f"gradient_penalty: {sentence}"):
        gradient_penalty(lambda x, y=None: x.sum(1), BATCH, BATCH, **given)


@pytest.mark.parametrize("middle", [lambda h: h, lambda h: torch.nn.functional.leaky_relu(h - 9, 0.1), torch.sigmoid])
@pytest.mark.parametrize("called", [lambda net: net, lambda net: lambda x: net(x)])
def test_one_nan_among_the_inputs_shows(called, middle):
    """Activations that are piecewise linear have finite slopes at NaN, where the critic has none."""
    net, broken = Net(middle=middle), BATCH.clone()
    broken[1, 2] = torch.nan
    for real, fake in ((broken, BATCH), (BATCH, broken)):
        found = gradient_penalty(called(net), real, fake)
        found.backward()
        assert found.isnan() and net.first.weight.grad.isnan().any()
        parts = critic_step(called(net), real, fake, r1=1.0, r2=1.0, terms=True)
        assert parts["loss"].isnan() and parts["r1" if real is broken else "r2"].isnan()


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_small_batches_go_through_the_critic_as_one(r1):
    """But for one whose samples may depend on one another, and where the reference is asked for."""
    calls, other = [], draw(4, (4,), torch.float64)
    net, counting = Net(), Net(middle=lambda h: (calls.append(h.shape[0]), h)[1])
    found = critic_step(counting, BATCH, other, r1=r1)
    close(found, critic_step(lambda x: net(x), BATCH, other, r1=r1))
    assert [n for n in calls if isinstance(n, int)] == ([] if r1 else [8])
    del calls[:]
    with gk.use_backend("reference"):
        close(critic_step(counting, BATCH, other, r1=r1), found)
    assert [n for n in calls if isinstance(n, int)] == [4, 4]
    if not r1:
        coupled = Net(middle=lambda h: h - h.mean(0))
        close(critic_step(coupled, BATCH, other), critic_step(lambda x: coupled(x), BATCH, other))


class Counted(TorchDispatchMode):
    """How many of torch's operators run, which is what the step of a small critic costs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", [gradient_penalty, critic_step, functools.partial(critic_step, r1=1.0, r2=1.0)])
def test_a_small_critic_costs_two_thirds_of_the_reference_s_operators_at_most(loss):
    counts = []
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(4, 4), nn.LeakyReLU(0.2))), nn.Linear(4, 1))
    for backend in ("auto", "reference"):
        with gk.use_backend(backend), Counted() as counted:
            loss(net, BATCH.float(), BATCH.float() + 1).backward()
        counts.append(counted.count)
    assert 0 < counts[0] <= counts[1] * 2 / 3


def test_a_compiled_critic_is_called_as_it_is_where_nothing_is_differentiated_twice():
    compiled, net = [], Net()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    other = draw(4, (4,), torch.float64)
    critic = torch.compile(net, backend=backend)
    for weights in ({"r1": 1.0}, {}):
        assert not compiled
        close(critic_step(critic, BATCH, other, **weights), critic_step(net, BATCH, other, **weights))
    assert compiled
