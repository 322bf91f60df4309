"""Filtered changes of resolution, and the activation beside them: what they are, what they keep, what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from genkernels import nn as gnn

F64 = torch.float64


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 2, 1)], ids=str)
def test_sizes_and_flat_images(factor, taps):
    x = torch.full((2, 3, 13 * factor, 14 * factor), 0.75, dtype=F64)
    up, down = gnn.FilteredUpsample(factor, taps).double()(x), gnn.FilteredDownsample(factor, taps).double()(x)
    assert up.shape == (2, 3, 13 * factor**2, 14 * factor**2) and down.shape == (2, 3, 13, 14)
    images = [down]
    if factor < 3 and sum(taps[::2]) == sum(taps[1::2]):  # each of two phases has half of the filter
        images.append(up)
    for image in images:
        inner = image[..., 2 * factor : -2 * factor, 2 * factor : -2 * factor]
        torch.testing.assert_close(inner, torch.full_like(inner, 0.75))


def test_up_sampling_is_bilinear_for_the_usual_filter():
    """1, 3, 3, 1 has the weights ¾ and ¼ of bilinear interpolation between the centres of pixels."""
    x = torch.randn(2, 3, 6, 5, dtype=F64)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(gnn.FilteredUpsample().double()(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


def test_down_sampling_is_the_transpose_of_up_sampling():
    x, y = torch.randn(1, 2, 8, 6, dtype=F64), torch.randn(1, 2, 4, 3, dtype=F64)
    up, down = gnn.FilteredUpsample().double()(y), gnn.FilteredDownsample().double()(x)
    torch.testing.assert_close((up * x).sum(), 4 * (down * y).sum())


def test_a_critic_of_them_has_its_gradient_penalty():
    torch.manual_seed(0)
    critic = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, bias=False),
        gnn.BiasLeakyReLU(4),
        gnn.FilteredDownsample(),
        torch.nn.Flatten(),
    ).double()
    x = torch.randn(3, 1, 4, 4, dtype=F64, requires_grad=True)
    torch.nn.init.normal_(critic[1].bias)

    def by(function):
        gradient = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), list(critic.parameters()))

    def plain(x):
        a = F.conv2d(x, critic[0].weight, padding=1) + critic[1].bias.view(-1, 1, 1)
        taps = critic[2].taps
        kernel = torch.outer(taps, taps).expand(4, 1, 4, 4)
        return F.conv2d(2**0.5 * F.leaky_relu(a, 0.2), kernel, stride=2, padding=1, groups=4).flatten(1)

    torch.testing.assert_close(critic(x), plain(x))
    torch.testing.assert_close(by(critic), by(plain))


def test_what_they_keep():
    assert not gnn.FilteredUpsample().state_dict()
    assert list(gnn.BiasLeakyReLU(3).state_dict()) == ["bias"]
    assert repr(gnn.BiasLeakyReLU(3)) == "BiasLeakyReLU(3, negative_slope=0.2, gain=1.414, clamp=None)"
    assert repr(gnn.FilteredDownsample()) == "FilteredDownsample(factor=2, taps=4)"


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: gnn.FilteredUpsample(0), "FilteredUpsample: factor must be an integer of at least 1, got 0"),
        (
            lambda: gnn.FilteredDownsample(4, (1, 1)),
            r"FilteredDownsample: taps must be at least 4 numbers .* got \(1, 1\)",
        ),
        (lambda: gnn.FilteredUpsample(2, (1, -1)), r"FilteredUpsample: taps must .* whose sum is not 0, got \(1, -1\)"),
        (lambda: gnn.BiasLeakyReLU(0), "BiasLeakyReLU: channels must be an integer of at least 1, got 0"),
    ],
)
def test_bad_options_get_one_sentence(build, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        build()
