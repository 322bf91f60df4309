"""A critic's step with R1 and R2: against double backward, its parts, and whom its gradients reach."""

import pytest
import torch
from torch import nn

import genkernels as gk
from genkernels.benchmarks import critics
from genkernels.benchmarks.measure import Inputs, Work
from genkernels.losses import critic_step, gradient_penalty
from genkernels.networks import _outside
from tests.losses import definitions
from tests.losses.definitions import LOSSES, apart, critic, draw, gradients
from tests.networks import nets

close = torch.testing.assert_close
PENALTIES = [(0.3, 0.7), (2.0, 0.0), (0.0, 2.0)]


def batches(sample, dtype=torch.float64, n=4):
    return draw(n, sample, dtype).requires_grad_(), draw(n, sample, dtype, seed=1).requires_grad_()


@pytest.mark.parametrize("name", definitions.NETWORKS)
def test_agrees_with_double_backward_for_every_kind_of_layer_and_loss(name):
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        net, sample = critic(name, dtype)
        for n, (loss, (r1, r2)) in zip((1, 3, 3, 3, 1), zip(LOSSES, PENALTIES * 2, strict=False), strict=True):
            real, fake = batches(sample, dtype, n)
            found, way = critic_step(net, real, fake, loss=loss, r1=r1, r2=r2, explain=True)
            assert "passes, the loss among them" in way
            expected = definitions.step(net, real, fake, loss, r1, r2)
            assert apart([found], [expected]) < bound
            assert apart(gradients(found, net, real, fake), gradients(expected, net, real, fake)) < bound


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["critic", "mlp SiLU"])
def test_every_loss_with_every_penalty(name, loss):
    net, sample = critic(name)
    for n in (1, 3):
        real, fake = batches(sample, n=n)
        for r1, r2 in [*PENALTIES, (0.0, 0.0)]:
            expected = definitions.step(net, real, fake, loss, r1, r2)
            theirs = gradients(expected, net, real, fake)
            for called in (net, lambda x: net(x)):
                found = critic_step(called, real, fake, loss=loss, r1=r1, r2=r2)
                close(found, expected, rtol=1e-12, atol=0)
                assert apart(gradients(found, net, real, fake), theirs) < 1e-10


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("r1", [0.0, 0.5])
@pytest.mark.parametrize("loss", ["wasserstein", "relativistic"])
def test_what_cancels_between_real_and_fake_is_zero_to_the_bit(loss, r1, together, monkeypatch):
    """A bias's gradient, where every unit is active, is a sum of differences. Left at 1e-9 by the order of a sum, it
    would move that bias by a whole step of Adam's."""
    if not together:
        monkeypatch.setattr("genkernels.networks.gradient_penalty.TOGETHER", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 24), nn.LeakyReLU(0.2), nn.Linear(24, 24), nn.LeakyReLU(0.2), nn.Linear(24, 1))
    biases = [layer.bias for layer in net[::2]]
    with torch.no_grad():
        for bias in biases:
            bias += 9.0
    for n in (1, 7, 100):
        real, fake = batches((3,), torch.float32, n)
        value = critic_step(net, real, fake, loss=loss, r1=r1, r2=r1)
        for bias, gradient in zip(biases, torch.autograd.grad(value, biases), strict=True):
            assert not gradient.count_nonzero(), (n, len(bias))


@pytest.mark.parametrize("name", ["critic", "mlp Tanh", "maximum"])
def test_the_parts_add_up(name):
    net, sample = critic(name)
    real, fake = batches(sample)
    for r1, r2 in [*PENALTIES, (0.0, 0.0)]:
        for called in (net, lambda x: net(x)):
            parts, _ = critic_step(called, real, fake, loss="hinge", r1=r1, r2=r2, terms=True, explain=True)
            assert list(parts) == ["loss", "critic", "r1", "r2", "real_score", "fake_score"]
            assert parts["loss"].requires_grad and not any(parts[k].requires_grad for k in parts if k != "loss")
            close(parts["loss"].detach(), parts["critic"] + parts["r1"] + parts["r2"])
            close(parts["critic"], definitions.step(net, real, fake, "hinge", 0, 0).detach())
            close(parts["r1"], r1 / 2 * definitions.slopes(net, real)[1].square().sum(1).mean().detach())
            close(parts["r2"], r2 / 2 * definitions.slopes(net, fake)[1].square().sum(1).mean().detach())
            close(parts["real_score"], net(real).mean().detach())
            close(parts["fake_score"], net(fake).mean().detach())


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_no_gradient_reaches_the_generator(r1):
    net, sample = critic("mlp SiLU")
    generator = nn.Linear(2, 4).double()
    for called in (net, lambda x: net(x)):
        critic_step(called, draw(4, sample), generator(draw(4, (2,))), r1=r1, r2=r1).backward()
    assert all(p.grad is None for p in generator.parameters())
    assert all(p.grad is not None for p in net.parameters())


def test_several_scores_a_sample_are_differentiated_twice():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 3)).double()
    real, fake = batches((1, 7, 8))
    found, way = critic_step(net, real, fake, r1=0.5, explain=True)
    assert way == "double backward: the critic gives several scores a sample"
    (r, g), (f, _) = definitions.slopes(net, real), definitions.slopes(net, fake)
    r, f = net(real).flatten(), net(fake).flatten()
    expected = LOSSES["logistic"](r, f) + 0.25 * g.square().sum(1).mean()
    assert apart(gradients(found, net), gradients(expected, net)) < 1e-10


def test_with_labels():
    of_class = nn.Embedding(3, 4).double()
    y = torch.tensor([0, 2, 1, 1])
    real, fake = batches((4,))

    def labelled(x, y):
        return (of_class(y) * x.square()).sum(1)

    found, way = critic_step(labelled, real, fake, r1=1.0, y=y, explain=True)
    assert way == "double backward: the critic is no nn.Module"
    expected = definitions.step(lambda x: labelled(x, y), real, fake, "logistic", 1.0, 0)
    assert apart(gradients(found, of_class), gradients(expected, of_class)) < 1e-10


@pytest.mark.parametrize("name", ["mlp ReLU", "mlp SiLU", "critic"])
def test_in_bf16_it_is_as_accurate_as_double_backward(name):
    net, sample = critic(name, torch.float32)
    real, fake = batches(sample, torch.float32, 16)
    exact = gradients(definitions.step(net.double(), real.double(), fake.double(), "logistic", 1.0, 1.0), net)
    net.float()

    def error(called):
        with torch.autocast("cpu", torch.bfloat16):
            found = critic_step(called, real, fake, r1=1.0, r2=1.0)
        assert found.dtype == torch.float32
        return apart(gradients(found, net), exact)

    assert 0 < error(net) <= 2 * error(lambda x: net(x))


@pytest.mark.parametrize("wrap", [gk.nn.spectral_norm_, lambda net: net])
def test_a_step_of_an_optimiser_after_another(wrap):
    """Ten steps with and without double backward end at the same weights."""
    ends = []
    for backend in ("auto", "reference"):
        net, sample = critic("critic", torch.float32)
        net = wrap(net)
        optimiser = torch.optim.Adam(net.parameters(), 1e-3)
        losses = []
        for step in range(10):
            real, fake = draw(4, sample, torch.float32, 2 * step), draw(4, sample, torch.float32, 2 * step + 1)
            optimiser.zero_grad()
            with gk.use_backend(backend):
                loss = critic_step(net, real, fake, loss="relativistic", r1=0.1, r2=0.1)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        ends.append(torch.tensor(losses))
    close(*ends, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "normalised", "backend"),
    [
        ("mlp ReLU", False, "auto"),
        ("mlp SiLU", True, "auto"),
        ("critic", True, "auto"),
        ("mlp SiLU", False, "reference"),
        ("mlp ReLU", True, "reference"),
    ],
)
def test_inside_a_compiled_step_it_is_right_in_one_graph(name, normalised, backend):
    torch._dynamo.reset()
    net, sample = critic(name)
    if normalised:
        gk.nn.spectral_norm_(net)
    real, fake = draw(4, sample), draw(4, sample, seed=1)

    def loss(real, fake):
        return 2 * critic_step(net, real + 1, fake, r1=1.0, r2=1.0)

    with gk.use_backend(backend):
        expected = gradients(loss(real, fake), net)
        found = gradients(torch.compile(loss, backend="aot_eager", fullgraph=True)(real, fake), net)
    assert apart(found, expected) < 1e-12


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_compilers_that_ask_nothing_of_modules_break_the_graph(r1, monkeypatch):
    monkeypatch.setattr(_outside, "ASKS_OF_MODULES", False)
    torch._dynamo.reset()
    net, sample = critic("mlp ReLU")
    real, fake = draw(4, sample), draw(4, sample, seed=1)

    def loss(real, fake):
        return 2 * critic_step(net, real + 1, fake, r1=r1)

    found = gradients(torch.compile(loss, backend="aot_eager", fullgraph=not r1)(real, fake), net)
    assert apart(found, gradients(loss(real, fake), net)) < 1e-12


def test_a_compiled_step_notices_a_changed_critic():
    """What was compiled with the steps of the critic is not called for others."""
    torch._dynamo.reset()
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LeakyReLU(0.1), torch.nn.Linear(8, 1)).double()
    real, fake = draw(4, (4,)), draw(4, (4,), seed=1)

    def loss(real, fake):
        return critic_step(net, real, fake, r1=1.0)

    run = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for change in (
        lambda: None,
        lambda: setattr(net[1], "negative_slope", 0.5),
        lambda: net.__setitem__(1, torch.nn.SiLU()),
        lambda: net.__setitem__(0, torch.nn.Linear(4, 8).double()),
    ):
        change()
        assert apart(gradients(run(real, fake), net), gradients(loss(real, fake), net)) < 1e-12


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"loss": "log"}, "loss must be one of logistic, hinge, wasserstein, relativistic, least_squares, got 'log'"),
        ({"r1": -1.0}, "r1 must be a finite number, 0 or more, got -1.0"),
        ({"r2": "1"}, "r2 must be a finite number, 0 or more, got '1'"),
        ({"fake": torch.zeros(3, 4).double()}, r"real and fake must be of one shape .*, got \[4, 4\] and \[3, 4\]"),
    ],
)
def test_one_sentence_says_what_must_hold(given, sentence):
    net, sample = critic("mlp ReLU")
    real, fake = batches(sample)
    with pytest.raises(ValueError, match=f"critic_step: {sentence}"):
        critic_step(net, real, **{"fake": fake, **given})


def test_a_sigmoid_at_the_end_is_refused_without_a_penalty_too():
    net, sample = critic("mlp ReLU")
    with pytest.raises(ValueError, match="critic_step: the critic must give a score without bounds"):
        critic_step(nn.Sequential(net, nn.Sigmoid()), *batches(sample))


class Dcgan(nn.Module):
    """A critic as tutorials have it: batches are normalised, and probabilities are made a vector."""

    def __init__(self, norm):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(4, 8), norm(8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Sigmoid()).double()

    def forward(self, x):
        return self.main(x).view(-1, 1).squeeze(1)


@pytest.mark.filterwarnings("ignore:.*couples the samples")
@pytest.mark.parametrize("weights", [{}, {"r1": 1.0}, {"r1": 1.0, "r2": 1.0}])
def test_a_sigmoid_is_found_where_layers_have_no_rule(weights):
    functions = (lambda x: torch.sigmoid(x.sum(1)), lambda x: x.sum(1, keepdim=True).sigmoid().to(torch.float32))
    for net in (Dcgan(nn.BatchNorm1d), Dcgan(nn.LayerNorm), *functions):
        with pytest.raises(ValueError, match="critic_step: the critic must give a score without bounds"):
            critic_step(net, *batches((4,)), **weights)
        with pytest.raises(ValueError, match="gradient_penalty: the critic must give a score without bounds"):
            gradient_penalty(net, *batches((4,)))


def test_what_is_no_critic_is_refused():
    for loss in (critic_step, gradient_penalty):
        with pytest.raises(TypeError, match=f"{loss.__name__}: critic must be a torch.nn.Module or a function, got"):
            loss(None, *batches((4,)))


def test_scores_of_every_shape_give_the_same_step():
    net, sample = critic("mlp ReLU")
    real, fake = batches(sample)
    shaped = [
        net,
        nn.Sequential(net, nn.Unflatten(1, (1, 1, 1))),
        nets.calls(lambda m, x: m.net(x).squeeze(1), net=net),
    ]
    for loss in LOSSES:
        found = [critic_step(each, real, fake, loss=loss, r1=1.0, r2=0.5, explain=True) for each in shaped]
        assert all(way.startswith("four passes") for _, way in found)
        for value, _ in found:
            close(value, found[0][0], rtol=1e-14, atol=0)
            assert (
                apart(gradients(value, net), gradients(definitions.step(net, real, fake, loss, 1.0, 0.5), net)) < 1e-10
            )


@pytest.mark.parametrize("case", [critics.penalty_case, critics.step_case])
def test_memory_is_at_most_three_fifths_of_double_backward_s(case):
    case = case("small", critics.convolutional(32), 16, 32)
    inputs = [Inputs(tuple(case.inputs(torch.Generator().manual_seed(0)).values()))]
    works = [Work(op, inputs, case.direction) for op in (case.op, case.reference)]
    for work in works:
        work.once()
    ours, theirs = (work.peak_bytes() for work in works)
    assert 0 < ours <= 0.6 * theirs
