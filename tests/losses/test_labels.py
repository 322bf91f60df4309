"""Critics with labels: those that multiply features by an embedding, or add one, take the short ways."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import genkernels as gk
from genkernels.losses import critic_step, gradient_penalty
from genkernels.models.gan.backbones import Critic, conv_critic
from genkernels.networks import gradient_penalty as passes
from tests.losses import definitions
from tests.losses.definitions import LOSSES, apart, draw, gradients

Y = torch.tensor([2, 0, 2, 1])


def projection(activation=nn.LeakyReLU):
    """The projection discriminator of a small convolutional network, on images of 2×4×4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 3, 3, padding=1), activation(), nn.AvgPool2d(2), nn.Flatten()
        return Critic(nn.Sequential(*conv), 12, 3).double()


class Early(nn.Module):
    """Labels scale and shift a hidden layer, and each class has a score of its own; the last one is left out."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.last = nn.Linear(32, 5), nn.Linear(5, 1)
            self.scale, self.shift, self.own = (nn.Embedding(3, n, padding_idx=1) for n in (5, 5, 1))
        self.double()

    def forward(self, x, y):
        h = self.first(x.flatten(1)) * self.scale(y) + self.shift(y)
        return self.last(F.leaky_relu(h, 0.2)) - 2 * torch.relu(h).sum(1, keepdim=True) + self.own(y)


def spectral(wrap):
    net = projection()
    net.classes = wrap(net.classes)
    net.trunk(draw(1, (2, 4, 4)))
    return net.eval()


CRITICS = {
    "projection": projection,
    "smooth": lambda: projection(nn.SiLU),
    "early": Early,
    "spectral norm": lambda: spectral(parametrizations.spectral_norm),
    "our spectral norm": lambda: spectral(gk.nn.spectral_norm_),
}


def labelled(net):
    return lambda x: net(x, Y[: len(x)])


@pytest.mark.parametrize("together", [0, passes.TOGETHER])
@pytest.mark.parametrize("name", CRITICS)
def test_gradients_are_those_of_double_backward(name, together, monkeypatch):
    monkeypatch.setattr(passes, "TOGETHER", together)
    net, passes_taken = CRITICS[name](), "six" if name == "smooth" else "four"
    real, fake = draw(4, (2, 4, 4)).requires_grad_(), draw(4, (2, 4, 4), seed=1).requires_grad_()
    found, way = gradient_penalty(net, real, real, y=Y, explain=True)
    expected = definitions.penalty(labelled(net), real)
    assert way.startswith(f"{passes_taken} passes") and apart([found], [expected]) < 1e-12
    assert apart(gradients(found, net, real), gradients(expected, net, real)) < 1e-10
    for loss, (r1, r2) in zip(LOSSES, ((0.3, 0.7), (2.0, 0.0), (0.0, 2.0), (0.5, 0.5), (0.0, 0.0)), strict=True):
        found, way = critic_step(net, real, fake, loss=loss, r1=r1, r2=r2, y=Y, explain=True)
        expected = definitions.step(labelled(net), real, fake, loss, r1, r2)
        assert way.startswith(f"{passes_taken} passes, the loss" if r1 or r2 else "one backward")
        assert apart([found], [expected]) < 1e-12
        assert apart(gradients(found, net, real, fake), gradients(expected, net, real, fake)) < 1e-10


def test_each_batch_has_its_own_labels():
    """What was traced is kept, what was read for other labels is not."""
    net, x = projection(), draw(4, (2, 4, 4)).requires_grad_()
    for y in (Y, Y.flip(0), torch.zeros(4, dtype=torch.int32)):
        expected = definitions.penalty(lambda x, y=y: net(x, y), x)
        assert apart([gradient_penalty(net, x, x, y=y)], [expected]) < 1e-12


def test_the_models_critics_of_classes_take_the_short_way():
    net = Critic(*conv_critic((1, 8, 8), 4), num_classes=3)
    x = torch.randn(4, 1, 8, 8)
    assert critic_step(net, x, x, r1=1.0, y=Y, explain=True)[1].startswith("four passes")


class Otherwise(Early):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, x, y):
        return super().forward(x, self.end(self, y))


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda m, y: y.long(), "'long' in the network (Otherwise) computes with the labels"),
        (lambda m, y: F.one_hot(y, 3).argmax(1), "'one_hot' in the network (Otherwise) computes with the labels"),
    ],
)
def test_others_are_differentiated_twice_and_say_why(end, reason):
    net, x = Otherwise(end), draw(4, (2, 4, 4)).requires_grad_()
    found, way = gradient_penalty(net, x, x, y=Y, explain=True)
    assert way.startswith(f"double backward: {reason}")
    assert apart([found], [definitions.penalty(labelled(net), x)]) < 1e-12


class Classes(nn.Module):
    """Scores from a function of features, and of an embedding."""

    def __init__(self, function, **options):
        super().__init__()
        self.net, self.classes, self.function = (
            nn.Linear(32, 3).double(),
            nn.Embedding(3, 3, **options).double(),
            function,
        )

    def forward(self, x, y):
        return self.function(self.net(x.flatten(1)), self.classes(y)).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [
        (torch.mul, {"max_norm": 1.0}, "layer 'classes' (Embedding) changes its weight in a call: max_norm must be"),
        (lambda h, e: torch.cat([h, e], 1), {}, "'cat' in the network (Classes) takes what the labels give, which may"),
        (lambda h, e: h * e.tanh(), {}, "'tanh' in the network (Classes) takes what the labels give"),
        (lambda h, e: F.linear(h, e), {}, "'linear' in the network (Classes) needs a weight and a bias"),
        (
            lambda h, e: h.unsqueeze(2) * e,
            {},
            "'mul' in the network (Classes) combines samples [3, 1] with an embedding",
        ),
        (lambda h, e: e, {}, "'sum' in the network (Classes) takes what the labels give"),
    ],
)
def test_what_an_embedding_may_not_do_is_named(function, options, reason):
    with pytest.raises(gk.networks.Untraceable) as refusal:
        gk.networks.traced(Classes(function, **options), draw(4, (2, 4, 4)), labelled=True)
    assert str(refusal.value).startswith(f"trace: {reason}"), refusal.value


def test_an_embedding_of_something_else_has_no_rule():
    with pytest.raises(gk.networks.Untraceable, match="layer '0' .Embedding. embeds something else than the labels"):
        gk.networks.trace(nn.Sequential(nn.Embedding(3, 2)), torch.zeros(4, dtype=torch.int64))
