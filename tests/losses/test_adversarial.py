"""Losses of critics and generators: values by their definitions, at their ends, and what is refused."""

import math

import pytest
import torch

from genkernels.losses import critic_loss, generator_loss
from tests.losses.definitions import LOSSES, draw

close = torch.testing.assert_close
GENERATOR = {
    "logistic": lambda f: -torch.log(torch.sigmoid(f)).mean(),
    "saturating": lambda f: torch.log(1 - torch.sigmoid(f)).mean(),
    "hinge": lambda f: -f.mean(),
    "wasserstein": lambda f: -f.mean(),
    "least_squares": lambda f: 0.5 * ((f - 1) ** 2).mean(),
}
SHAPES = [(6,), (6, 1), (6, 1, 1, 1)]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_critic_s_loss_is_its_definition_whatever_the_scores_shape(kind):
    r, f = draw(6, ()), draw(6, (), seed=1)
    expected = LOSSES[kind](r, f)
    for real in SHAPES:
        for fake in SHAPES:
            close(critic_loss(r.view(real), f.view(fake), kind), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", GENERATOR)
def test_a_generator_s_loss_is_its_definition(kind):
    f = draw(6, ())
    for shape in SHAPES:
        close(generator_loss(f.view(shape), kind), GENERATOR[kind](f), rtol=1e-13, atol=0)


def test_relativistic_losses_are_of_pairs():
    r, f = draw(6, ()), draw(6, (), seed=1)
    close(generator_loss(f, "relativistic", r.view(6, 1)), LOSSES["relativistic"](f, r), rtol=1e-14, atol=0)
    assert not torch.allclose(critic_loss(r, f, "relativistic"), critic_loss(r, f.flip(0), "relativistic"))


@pytest.mark.parametrize("kind", LOSSES)
def test_each_patch_counts_as_a_sample(kind):
    r, f = draw(3, (1, 4, 5)), draw(3, (1, 4, 5), seed=1)
    close(critic_loss(r, f, kind), LOSSES[kind](r.flatten(), f.flatten()), rtol=1e-14, atol=0)
    given = {"real_scores": r} if kind == "relativistic" else {}
    flat = {"real_scores": r.flatten()} if given else {}
    close(generator_loss(f, kind, **given), generator_loss(f.flatten(), kind, **flat), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_at_minus_40_the_generator_s_gradient_is_minus_one_where_it_does_not_saturate(dtype):
    f = torch.full((1,), -40.0, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(generator_loss(f), f)
    assert abs(gradient.item() + 1) < 1e-6
    (gradient,) = torch.autograd.grad(generator_loss(f, "saturating"), f)
    assert 0 > gradient.item() > -1e-16


@pytest.mark.parametrize("kind", [*LOSSES, "saturating"])
@pytest.mark.parametrize("size", [200.0, -200.0])
def test_far_out_values_and_gradients_are_finite(kind, size):
    f = torch.full((4,), size, requires_grad=True)
    r = torch.full((4,), -size, requires_grad=True)
    losses = [] if kind == "saturating" else [critic_loss(r, f, kind)]
    losses += [generator_loss(f, kind, r if kind == "relativistic" else None)]
    for loss in losses:
        assert loss.isfinite()
        gradients = torch.autograd.grad(loss, [r, f], materialize_grads=True)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_at_zero_a_critic_s_loss_is_two_log_two():
    close(critic_loss(torch.zeros(5), torch.zeros(5)).item(), 2 * math.log(2))


def test_halves_are_summed_in_fp32_and_nan_stays():
    r, f = draw(5, (), torch.bfloat16), draw(5, (), torch.bfloat16, seed=1)
    found = critic_loss(r, f)
    assert found.dtype == torch.float32
    close(found, critic_loss(r.float(), f.float()))
    r[2] = torch.nan
    assert all(critic_loss(r, f, kind).isnan() for kind in LOSSES)
    assert not critic_loss(r[:2], f[:2]).isnan()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: critic_loss(s(4), s(4), "log"), "critic_loss: kind must be one of logistic, hinge"),
        (lambda s: critic_loss(s(4), s(4), "saturating"), "critic_loss: kind must be one of logistic, hinge"),
        (lambda s: generator_loss(s(4), "log"), "generator_loss: kind must be one of .* saturating, got 'log'"),
        (lambda s: critic_loss(s(4, 2), s(4)), r"real_scores must be \[N\], .* patch map .*, got \[4, 2\]"),
        (lambda s: critic_loss(s(4), s(4, 3, 1, 1)), r"fake_scores must be .*, got \[4, 3, 1, 1\]"),
        (lambda s: generator_loss(s([])), r"fake_scores must be .*, got \[\]"),
        (lambda s: generator_loss(s(0, 1)), r"fake_scores must hold one score or more, got \[0, 1\]"),
        (lambda s: critic_loss(s(4), s(3), "relativistic"), r"as many real as fake, got \[4\] and \[3\]"),
        (
            lambda s: critic_loss(s(4, 1, 2, 2), s(16), "relativistic"),
            r"as many real as fake, got \[4, 1, 2, 2\] and \[16\]",
        ),
        (lambda s: generator_loss(s(4), "relativistic"), "real_scores must be given for kind 'relativistic'"),
    ],
)
def test_one_sentence_says_what_must_hold(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros)
    with pytest.raises(TypeError, match="real_scores must be .*, got torch.int64"):
        critic_loss(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
