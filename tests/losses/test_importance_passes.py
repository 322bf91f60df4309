"""The two passes of an importance-weighted bound as training code meets them: memory, hooks, dropout, autocast, loss
scales, graphs of others, and one sentence for what cannot be."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genkernels import models, ops
from genkernels.losses import importance_estimate, importance_loss
from tests.losses.latent_models import LinearGaussian
from tests.losses.test_importance_bound import draw, gradients

F64 = torch.float64
close = torch.testing.assert_close


def loss_of(net, x, **options):
    return importance_loss(net.encode(x), net.weigher(x), **{"k": 6, "chunk": 4, "seed": 1, **options})


def same_in_one_graph(net, x, **options):
    """The same noise in a single graph: its loss."""
    net.given, net.drawn = [torch.cat(net.drawn[:2], 1)], []
    return loss_of(net, x, **{"chunk": None, **options}).loss


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are alive of those that were made within, and the most that they were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.known:
                    self._born(storage)
        return result

    def _born(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def peak(k, chunk, estimator, net, x):
    net.zero_grad()
    with Memory() as memory:
        loss = importance_loss(net.encode(x), net.weigher(x), k=k, chunk=chunk, estimator=estimator).loss
        loss.backward()
    net.drawn.clear()
    return memory.peak


class Deep(LinearGaussian):
    """With a decoder whose activations weigh more than its parameters, as those of pictures do."""

    def __init__(self):
        super().__init__(data=8, latent=4, dtype=torch.float32)
        self.decoder = nn.Sequential(nn.Linear(4, 512), *[nn.Tanh() for _ in range(12)], nn.Linear(512, 8))

    def weigher(self, x):
        inner = super().weigher(x)

        def log_weight(*arguments):
            result = inner(*arguments)
            self.drawn.clear()
            return result

        return log_weight


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "piwae:5"])
def test_memory_is_flat_in_k(estimator):
    net, x = Deep(), draw(16, 8, dtype=torch.float32)
    one = peak(1, 1, "iwae", net, x)
    assert peak(50, 1, estimator, net, x) < 1.05 * one
    assert peak(50, None, estimator, net, x) > 10 * one  # which the measure does see
    if estimator == "dreg":
        assert peak(1000, 20, estimator, net, x) < 1.05 * peak(20, None, "iwae", net, x)


@pytest.mark.parametrize(
    ("preset", "sizes", "batch", "k", "chunk"),
    [("mnist", {"grey_levels": 256}, 20, 50, 10), ("digits", {}, 64, 50, 5), ("photos32", {}, 16, 5, 1)],
)
def test_a_training_step_takes_the_memory_of_one_draw(preset, sizes, batch, k, chunk):
    """Backward and Adam with it, of the presets at their batches: a few draws a chunk, so that calls are worth it."""

    def step_s_peak(**draws):
        model = models.IWAE.from_preset(preset, **sizes, **draws)
        x = torch.randint(17, (batch, *model.shape), dtype=torch.uint8)
        optimizer = torch.optim.Adam(model.parameters())

        def step():
            optimizer.zero_grad()
            model.losses("model", x, None, 0)["loss"].backward()
            optimizer.step()

        step()
        with Memory() as memory:
            step()
        return memory.peak

    assert step_s_peak(importance=k, chunk=chunk) < 1.05 * step_s_peak(importance=1)


def test_hooks_see_the_whole_gradient_once():
    net, x = LinearGaussian(), draw(4, 5)
    plain = gradients(net, loss_of(net, x).loss)
    seen = []
    for p in net.parameters():
        p.register_hook(lambda g: seen.append(g) or 3 * g)
    hooked = gradients(net, loss_of(net, x).loss)
    assert len(seen) == 4
    close(hooked, [3 * g for g in plain])


def test_backward_twice_runs_the_second_pass_twice():
    net, x = LinearGaussian(), draw(4, 5)
    loss = loss_of(net, x).loss
    once = gradients_kept(net, loss)
    close(gradients_kept(net, loss), once)


def gradients_kept(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)


def test_parameters_changed_in_between_are_noticed():
    net, x = LinearGaussian(), draw(4, 5)
    loss = loss_of(net, x).loss
    with torch.no_grad():
        net.decoder.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_parameters_and_modules_get_nothing():
    net, x = LinearGaussian(), draw(4, 5)
    expected = gradients(net, loss_of(net, x).loss)
    net.encoder.requires_grad_(False)
    net.zero_grad()
    loss_of(net, x).loss.backward()
    assert net.encoder.weight.grad is None
    close(net.decoder.weight.grad, expected[2])
    net.decoder.requires_grad_(False)
    assert not loss_of(net, x).loss.requires_grad


def test_layers_that_draw_do_so_alike_in_both_passes():
    net, x = LinearGaussian(), draw(4, 5)
    net.decoder = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 5)).double()
    masks = []
    net.decoder[1].register_forward_hook(lambda module, given, result: masks.append(result == 0))
    before = torch.get_rng_state()
    loss_of(net, x, chunk=2).loss.backward()
    assert torch.equal(before, torch.get_rng_state())
    first, second, third, third_again, second_again = [*masks[:3], *masks[1::-1]] if len(masks) < 5 else masks
    assert len(masks) == 5 and torch.equal(second, third_again) and torch.equal(first, second_again)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_in_inference_mode_and_without_gradients_there_are_values_alone():
    net, x = LinearGaussian(), draw(4, 5)
    expected = loss_of(net, x).loss.detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = loss_of(net, x), importance_estimate(net.encode(x), net.weigher(x), k=6, chunk=4, seed=1)
        close(found[0].loss, expected)
        close(-found[1].mean, expected)
        assert not found[0].loss.requires_grad


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "piwae:2"])
def test_autocast_is_the_same_in_both_passes_and_leaves_its_cache_alone(estimator):
    net, x = LinearGaussian(dtype=torch.float32), draw(4, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(net, x, estimator=estimator).loss
        again = net.decoder(draw(2, 3, dtype=torch.float32)).sum()
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(again, net.decoder.weight)[0].abs().sum() > 0  # cast anew, with a graph
    ours = gradients(net, loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(net, same_in_one_graph(net, x, estimator=estimator))
    close(ours, expected, rtol=0.05, atol=0.05)
    plain = gradients(net, loss_of(net, x, estimator=estimator).loss)
    assert any(not torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_loss_scale_reaches_the_chunks_before_anything_is_rounded():
    """In fp16 a gradient of 1e-8 is none: it must be scaled where it begins, not when it is handed out."""
    net = nn.Linear(3, 2).half()
    x = draw(4, 2, dtype=torch.float16)
    parameters = [p.requires_grad_() for p in draw(2, 4, 3, dtype=torch.float16)]

    def log_weight(given, size, generator, stopped):
        noise = torch.randn(4, size, 3, generator=generator).half()
        z, ratio = ops.gaussian_reparameterize(noise, *given, stopped=stopped)
        return 1e-6 * Normal(net(z), 1.0, validate_args=False).log_prob(x[:, None]).sum(2) + ratio.half(), (z, ratio)

    def found(scale):
        loss = importance_loss(parameters, log_weight, k=64, chunk=16, seed=1).loss
        return torch.autograd.grad(scale * loss, net.weight)[0].float() / scale

    exact = found(2.0**14)
    assert not found(1.0).any() and exact.all()
    close(found(2.0**15), exact, rtol=2e-2, atol=0)


def test_a_compiled_caller_breaks_its_graph_here():
    net, x = LinearGaussian(), draw(4, 5)

    def step(x):
        return loss_of(net, 2 * x).loss

    torch._dynamo.reset()
    close(gradients(net, torch.compile(step, backend="eager")(x)), gradients(net, step(x)))


def test_a_generator_and_a_seed_repeat():
    net, x = LinearGaussian(), draw(4, 5)

    def found(**options):
        return loss_of(net, x, **{"seed": None, **options}).loss

    made = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(found(generator=made[0]), found(generator=made[1]))
    assert not torch.equal(found(generator=made[0]), found(generator=torch.Generator().manual_seed(3)))  # moved on
    assert torch.equal(found(seed=4), found(seed=4)) and not torch.equal(found(seed=4), found(seed=5))
    torch.manual_seed(0)
    one = found()
    other = found()
    torch.manual_seed(0)
    assert torch.equal(one, found()) and not torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------------- refusals


def hierarchical(x):
    """q(z₂|z₁): the second density depends on the first latent."""

    def log_weight(parameters, size, generator, stopped):
        mean, log_scale = parameters
        draws = torch.randn(2, len(mean), size, mean.shape[1], generator=generator, dtype=mean.dtype)
        z1, ratio = ops.gaussian_reparameterize(draws[0], mean, log_scale, stopped=stopped)
        z2 = z1.tanh() + draws[1]
        q2 = Normal(z1.detach().tanh() if stopped else z1.tanh(), 1.0).log_prob(z2).sum(2)
        return ratio - q2 + Normal(z2.sum(2, keepdim=True), 1.0).log_prob(x[:, None]).sum(2), (z1, ratio, z2)

    return log_weight


def past_the_latents(net, x):
    inner = net.weigher(x)

    def log_weight(parameters, *others):
        log_w, latents = inner(parameters, *others)
        return log_w, latents[:1]

    return log_weight


def with_own_graph(net, x):
    inner, hidden = net.weigher(x), 2 * net.decoder.bias

    def log_weight(*arguments):
        log_w, latents = inner(*arguments)
        return log_w + hidden.sum(), latents

    return log_weight


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"k": 0}, ValueError, "k must be an integer of at least 1, got 0"),
        ({"k": 2.5}, ValueError, "k must be an integer of at least 1, got 2.5"),
        ({"chunk": 7}, ValueError, r"chunk \(of k = 6 samples\) must be an integer from 1 to 6, got 7"),
        ({"chunk": 0}, ValueError, r"chunk \(of k = 6 samples\) must be an integer from 1 to 6, got 0"),
        ({"estimator": "miwae:4"}, ValueError, "k must be a multiple of the 4 groups of miwae:4, got 6"),
        ({"estimator": "vimco", "k": 1, "chunk": None}, ValueError, "k must be at least 2 for vimco"),
        ({"estimator": "vimco"}, ValueError, "vimco is for discrete latents, got latents that have a gradient"),
        ({"generator": 3, "seed": None}, TypeError, "generator must be a torch.Generator, got int"),
        ({"generator": torch.Generator()}, ValueError, "either generator or seed must be given, got both"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_options_get_one_sentence(options, error, sentence):
    net, x = LinearGaussian(), draw(4, 5)
    with pytest.raises(error, match=f"^importance_loss: {sentence}"):
        loss_of(net, x, **options)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(
    ("weigher", "sentence"),
    [
        (hierarchical, "dreg must have latents of which none is made from another, .* Bauer & Mnih, 2021"),
        (lambda x: past_the_latents(LinearGaussian(), x), "dreg must meet `parameters` through the latents alone, got"),
    ],
)
def test_dreg_refuses_what_it_is_wrong_for(weigher, sentence, chunk):
    net, x = LinearGaussian(), draw(4, 5)
    for estimator in ("iwae", "stl"):
        importance_loss(net.encode(x), weigher(x), k=6, chunk=chunk, estimator=estimator).loss.backward()
    with pytest.raises(ValueError, match=f"^importance_loss: {sentence}"):
        importance_loss(net.encode(x), weigher(x), k=6, chunk=chunk, estimator="dreg")


def test_a_tensor_with_a_graph_of_its_own_is_refused_in_chunks():
    net, x = LinearGaussian(), draw(4, 5)
    gradients(net, importance_loss(net.encode(x), with_own_graph(net, x), k=6).loss)
    with pytest.raises(
        RuntimeError, match="importance_loss: log_weight must get what has a graph through `parameters`"
    ):
        importance_loss(net.encode(x), with_own_graph(net, x), k=6, chunk=2)


def test_a_parameter_that_only_some_chunks_reach_is_noticed():
    net, x = LinearGaussian(), draw(4, 5)
    inner, extra, calls = net.weigher(x), nn.Parameter(torch.zeros((), dtype=F64)), []

    def log_weight(*arguments):
        calls.append(0)
        log_w, latents = inner(*arguments)
        return log_w + extra if len(calls) % 3 else log_w, latents

    loss = importance_loss(net.encode(x), log_weight, k=6, chunk=2).loss
    with pytest.raises(RuntimeError, match="importance_loss: log_weight must reach the same parameters in every chunk"):
        loss.backward()


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        (torch.zeros(4, 6), TypeError, r"log_weight must return \(log_w, latents\), got Tensor"),
        ((torch.zeros(4), None), ValueError, r"log_weight must give floats \[N, 6\] for 6 samples, got .* \[4\]"),
        ((torch.zeros(4, 6).long(), None), ValueError, "log_weight must give floats .*, got torch.int64"),
        (
            (torch.zeros(4, 6), torch.zeros(4, 3)),
            ValueError,
            r"latents must be tensors \[N, 6, \.\.\.\] = \[4, 6\], got",
        ),
        ((torch.zeros(4, 6), "z"), ValueError, r"latents must be tensors .*, got str"),
    ],
)
def test_what_log_weight_returns_is_looked_at(given, error, sentence):
    with pytest.raises(error, match=f"^importance_loss: {sentence}"):
        importance_loss(torch.zeros(4, 3), lambda *arguments: given, k=6)


def test_what_cannot_be_says_so():
    net, x = LinearGaussian(), draw(4, 5)
    with pytest.raises(TypeError, match="importance_loss: parameters must be a tensor or several, .*, got none"):
        importance_loss((), net.weigher(x), k=2)
    with pytest.raises(
        RuntimeError, match="importance_loss: a gradient found in chunks cannot be differentiated again"
    ):
        torch.autograd.grad(loss_of(net, x).loss, net.decoder.weight, create_graph=True)
    (first,) = torch.autograd.grad(loss_of(net, x, chunk=None).loss, net.decoder.bias, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), net.decoder.weight)[0].isfinite().all()
    with pytest.raises(RuntimeError, match="importance_loss: draws from seeds of its own and cannot run inside"):
        torch.func.grad(lambda x: loss_of(net, x).loss)(x)
    with pytest.raises(ValueError, match="importance_estimate: k must be an integer of at least 1, got 0"):
        importance_estimate(net.encode(x), net.weigher(x), k=0)
    assert math.isnan(importance_estimate(net.encode(x[:1]), net.weigher(x[:1]), k=2).standard_error)
