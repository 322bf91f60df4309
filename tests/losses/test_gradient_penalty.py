"""The gradient penalty as a loss: its value where it is known, its points, its ways, and what is refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import genkernels as gk
from genkernels.losses import gradient_penalty
from tests.losses import definitions
from tests.losses.definitions import apart, critic, draw, gradients
from tests.networks import nets

close = torch.testing.assert_close
FOUR = "four passes: every step is piecewise linear"


def mlp(activation=nn.ReLU, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = [(4, 16), (16, 16)]
        layers = [layer for size in sizes for layer in (nn.Linear(*size), activation())]
        return nn.Sequential(*layers, nn.Linear(16, 1)).to(dtype)


@pytest.mark.parametrize("name", definitions.NETWORKS)
def test_agrees_with_double_backward_for_every_kind_of_layer(name):
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        net, sample = critic(name, dtype)
        for n in (1, 4):
            x = draw(n, sample, dtype).requires_grad_()
            found, way = gradient_penalty(net, x, x, explain=True)
            assert "passes" in way
            expected = definitions.penalty(net, x)
            assert apart([found], [expected]) < bound
            # of x: where the net bends; both x are one
            assert apart(gradients(found, net, x), gradients(expected, net, x)) < bound


@pytest.mark.parametrize("sample", [(6,), (2, 3), (1, 2, 3), (2, 1, 1, 3)])
@pytest.mark.parametrize("n", [1, 2, 64])
def test_a_linear_critic_of_slope_g_has_the_penalty_of_g(n, sample):
    g = draw(1, (6,), seed=4)[0]
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        net[1].weight.copy_(g)
    real, fake = draw(n, sample), draw(n, sample, seed=1)
    for target, one_sided in ((1.0, False), (0.0, False), (0.3, True), (40.0, True), (40.0, False)):
        beyond = g.norm() - target
        expected = (beyond.clamp(min=0) if one_sided else beyond).square()
        for called in (net, lambda x: net(x)):
            found = gradient_penalty(called, real, fake, target=target, one_sided=one_sided)
            close(found, expected, rtol=1e-13, atol=0)


def test_points_lie_on_the_segments_of_their_pairs_by_one_even_weight_a_sample():
    seen, n = [], 4000
    real, fake = draw(n, (2, 3)), draw(n, (2, 3), seed=1)

    def seeing(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    generator = torch.Generator().manual_seed(5)
    gradient_penalty(seeing, real, fake, generator=generator)
    weights = (seen[0] - fake) / (real - fake)
    u = weights.flatten(1).median(1).values
    close(seen[0], fake + u.view(n, 1, 1) * (real - fake), rtol=1e-6, atol=1e-9)
    assert 0 <= u.min() and u.max() <= 1
    counts = torch.histc(u, 8, 0, 1)
    assert (counts - n / 8).abs().max() < 5 * (n / 8) ** 0.5
    gradient_penalty(seeing, real, fake, generator=generator.manual_seed(5))
    assert torch.equal(*seen)
    gradient_penalty(seeing, real, fake)
    assert not torch.equal(seen[1], seen[2])


def test_options_agree_with_their_definitions():
    net, x = mlp(), draw(8, (4,))
    for target, one_sided in ((0.05, True), (0.1, False), (0.0, True)):
        expected = definitions.penalty(net, x.clone().requires_grad_(), target, one_sided)
        theirs = gradients(expected, net)
        for called in (net, lambda x: net(x)):
            found = gradient_penalty(called, x, x, target=target, one_sided=one_sided)
            close(found, expected, rtol=1e-12, atol=1e-15)
            assert apart(gradients(found, net), theirs) < 1e-10


def test_lazily_it_is_taken_every_so_often_as_many_times():
    net, x = mlp(), draw(8, (4,))
    once = gradient_penalty(net, x, x)
    for step in range(9):
        found, way = gradient_penalty(net, x, x, every=4, step=step, explain=True)
        close(found, 4 * once if step % 4 == 0 else torch.zeros_like(once))
        assert way == (FOUR if step % 4 == 0 else f"none in step {step}: it is taken every 4 steps")


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_where_the_slope_is_zero_the_gradient_is_finite(activation):
    net, x = mlp(activation), draw(3, (4,))
    with torch.no_grad():
        net[-1].weight.zero_()
    for called in (net, lambda x: net(x)):
        found = gradient_penalty(called, x, x)
        close(found.item(), 1.0)
        assert all(gradient.isfinite().all() for gradient in gradients(found, net))


def test_gradients_reach_both_batches_where_they_ask():
    net, u = mlp(nn.Tanh), 0.37
    real, fake = draw(5, (4,)).requires_grad_(), draw(5, (4,), seed=1).requires_grad_()
    generator = torch.Generator()
    for called in (net, lambda x: net(x)):
        found = gradient_penalty(called, real, fake, generator=generator.manual_seed(2))
        u = torch.rand(5, 1, dtype=torch.float64, generator=generator.manual_seed(2))
        expected = definitions.penalty(net, fake + u * (real - fake))
        assert apart(gradients(found, net, real, fake), gradients(expected, net, real, fake)) < 1e-10


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.of_class = mlp(nn.Tanh), nn.Embedding(3, 4).double()

    def forward(self, x, y):
        return self.net(x) + (self.of_class(y) * x).sum(1, keepdim=True)


class Deviation(nn.Module):
    """Minibatch statistics: what is known of the batch stands beside each sample."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1).double()

    def forward(self, x):
        return self.net(x * (x - x.mean(0)))


def test_the_way_and_what_forced_it_is_told():
    x, y = draw(5, (4,)), torch.tensor([0, 1, 2, 0, 1])
    normed = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    net = mlp()
    for called, given, way in (
        (net, {}, FOUR),
        (mlp(nn.ELU), {}, "six passes: layer '1' (ELU) has a second derivative"),
        (normed, {}, "double backward: layer '1' (LayerNorm) is none of Linear, Conv1d, …: it has no rule"),
        (lambda x: net(x), {}, "double backward: the critic is no nn.Module"),
        (Labelled(), {"y": y}, "six passes: layer 'net.1' (Tanh) has a second derivative"),
        (
            nn.Sequential(nn.Linear(4, 4), nets.LipSwish(), nn.Linear(4, 1)).double(),
            {},
            "double backward: layer '1' (LipSwish) learns its beta",
        ),
    ):
        found, told = gradient_penalty(called, x, x, explain=True, **given)
        assert told == way
        at = x.clone().requires_grad_()
        expected = definitions.penalty(called if not given else lambda x, called=called: called(x, y), at)
        module = called if isinstance(called, nn.Module) else net
        close(found, expected)
        assert apart(gradients(found, module), gradients(expected, module)) < 1e-10
    with gk.use_backend("reference"):
        assert gradient_penalty(net, x, x, explain=True)[1] == "double backward: the backend is 'reference'"


def test_critics_that_couple_samples_are_warned_of_once():
    x = draw(6, (4,))
    batched = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).double()
    for net, layer in ((batched, r"layer '1' \(BatchNorm1d\)"), (Deviation(), r"'mean' in the network \(Deviation\)")):
        with pytest.warns(UserWarning, match=f"gradient_penalty: {layer} .*no gradient of its own") as caught:
            found, way = gradient_penalty(net, x, x, explain=True)
        assert len(caught) == 1 and caught[0].filename == __file__ and way.startswith("double backward: ")
        expected = definitions.penalty(net, x.clone().requires_grad_())
        assert apart(gradients(found, net), gradients(expected, net)) < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_penalty(batched.eval(), x, x)


@pytest.mark.parametrize("name", ["mlp ReLU", "mlp SiLU", "critic", "nearest, odd", "average3d"])
def test_in_bf16_it_is_as_accurate_as_double_backward(name):
    net, sample = critic(name, torch.float32)
    x = draw(16, sample, torch.float32).requires_grad_()
    exact = gradients(definitions.penalty(net.double(), x.double()), net)
    net.float()

    def error(called):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradient_penalty(called, x, x)
        assert found.dtype == torch.float32
        return apart(gradients(found, net), exact)

    assert 0 < error(net) <= 2 * error(lambda x: net(x))


def test_under_autocast_later_passes_keep_their_gradients():
    net, x = mlp(dtype=torch.float32), draw(5, (4,), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total = gradient_penalty(net, x, x) + net(x).mean()
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net[-1].parameters())


@pytest.mark.parametrize("name", ["mlp ReLU", "mlp SiLU"])
def test_the_loss_s_scale_changes_nothing_but_the_gradient_s(name):
    net, sample = critic(name, torch.float32)
    x = draw(5, sample, torch.float32)
    penalties, found = [], []
    for scale in (1, 2**10, 2**16):
        penalties.append(gradient_penalty(net, x, x))
        found.append([gradient / scale for gradient in gradients(penalties[-1] * scale, net)])
    for other, of_other in zip(penalties[1:], found[1:], strict=True):
        assert torch.equal(other, penalties[0])
        for a, b in zip(of_other, found[0], strict=True):
            assert torch.equal(a, b)


def test_inside_a_compiled_step_it_is_right():
    torch._dynamo.reset()
    net, x = mlp(), draw(5, (4,))

    def loss(x):
        return 10 * gradient_penalty(net, 2 * x, 2 * x) + net(x).mean()

    expected = gradients(loss(x), net)
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
    assert apart(gradients(found, net), expected) < 1e-12
    compiled = torch.compile(net, backend="aot_eager")
    assert gradient_penalty(compiled, x, x, explain=True)[1] == FOUR


def test_inside_a_compiled_step_it_may_be_left_out():
    torch._dynamo.reset()
    net, x = mlp(), draw(5, (4,))

    def loss(x, step):
        return gradient_penalty(net, x, 2 * x, every=2, step=step)

    run = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for step in range(4):
        torch.manual_seed(step)
        found = run(x, step)
        torch.manual_seed(step)
        expected = loss(x, step)
        torch.testing.assert_close(found, expected)
        if step % 2:
            found.backward()
            assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)
        else:
            assert apart(gradients(found, net), gradients(expected, net)) < 1e-12


def test_inside_transforms_it_is_refused():
    net, x = mlp(), draw(5, (4,))
    with pytest.raises(RuntimeError, match="gradient_penalty: differentiates by itself and cannot run inside torch.f"):
        torch.func.grad(lambda x: gradient_penalty(net, x, x))(x)


@pytest.mark.parametrize(
    ("net", "shapes", "given", "sentence"),
    [
        (mlp(), [(4, 4), (3, 4)], {}, r"real and fake must be of one shape .*, got \[4, 4\] and \[3, 4\]"),
        (mlp(), [(4, 4), (4, 5)], {}, r"real and fake must be of one shape"),
        (mlp(), [(0, 4), (0, 4)], {}, r"N of at least 1, got \[0, 4\]"),
        (
            nn.Sequential(mlp(), nn.Sigmoid()),
            [(4, 4)] * 2,
            {},
            "must give a score without bounds, got one that ends in",
        ),
        (nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.Sigmoid())), [(4, 4)] * 2, {}, "a score without bounds"),
        (nets.calls(lambda self, x: torch.sigmoid(x.sum(1))), [(4, 4)] * 2, {}, "a score without bounds"),
        (nn.Linear(4, 3).double(), [(4, 4)] * 2, {}, r"the critic's output must be \[N\], .*, got \[4, 3\]"),
        (lambda x: x.view(2, 8)[:, :1], [(4, 4)] * 2, {}, "a score for each of the 4 samples, got 2 scores"),
        (lambda x: torch.ones(len(x)), [(4, 4)] * 2, {}, "must depend on its input"),
        (mlp(), [(4, 4)] * 2, {"target": -1.0}, "target must be a finite number, 0 or more, got -1.0"),
        (mlp(), [(4, 4)] * 2, {"target": True}, "target must be a finite number, 0 or more, got True"),
        (mlp(), [(4, 4)] * 2, {"one_sided": "no"}, "one_sided must be True or False, got 'no'"),
        (mlp(), [(4, 4)] * 2, {"every": 0}, "every must be an integer of at least 1, got 0"),
        (mlp(), [(4, 4)] * 2, {"step": -1}, "step must be an integer of at least 0, got -1"),
    ],
)
def test_one_sentence_says_what_must_hold(net, shapes, given, sentence):
    with pytest.raises(ValueError, match=f"gradient_penalty: .*{sentence}"):
        gradient_penalty(net, *(torch.randn(shape, dtype=torch.float64) for shape in shapes), **given)


def test_dtypes_are_checked():
    with pytest.raises(TypeError, match="gradient_penalty: real must be .*, got torch.uint8"):
        gradient_penalty(mlp(), torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 4))
    with pytest.raises(TypeError, match="gradient_penalty: fake must have the dtype of real"):
        gradient_penalty(mlp(), torch.zeros(3, 4), torch.zeros(3, 4).double())


def test_one_update_of_a_spectral_norm_a_step():
    net = gk.nn.spectral_norm_(mlp(nn.LeakyReLU))
    x = draw(6, (4,)).requires_grad_()
    net(x)  # makes the update
    found, way = gradient_penalty(net, x, x, explain=True)
    expected = definitions.penalty(net, x)
    assert way == FOUR
    assert apart(gradients(found, net), gradients(expected, net)) < 1e-10


def test_a_layer_that_its_first_call_tells_the_size_of_its_input():
    net = nn.Sequential(gk.nn.LipschitzConv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 1))
    x = draw(3, (2, 4, 4), torch.float32)
    for way in ("double backward: spectral_norm_: a convolution must know the size of its input", FOUR):
        assert gradient_penalty(net, x, x, explain=True)[1].startswith(way)


def test_no_gradient_is_recorded_where_none_is_wanted():
    net, x = mlp(), draw(6, (4,))
    for called in (net, lambda x: net(x)):
        with torch.no_grad():
            found = gradient_penalty(called, x, x)
        assert not found.requires_grad
        close(found, definitions.penalty(net, x.clone().requires_grad_()).detach())


def test_patch_maps_count_by_their_mean():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 3)).double()
    x = draw(4, (1, 7, 8)).requires_grad_()
    for called in (net, lambda x: F.pad(net(x), (0, 0))):
        found = gradient_penalty(called, x, x)
        assert apart(gradients(found, net), gradients(definitions.penalty(net, x), net)) < 1e-10
