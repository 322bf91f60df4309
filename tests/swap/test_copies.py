"""Masked convolutions as PixelCNNs are written: each class here says the same in other words, or something else."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genkernels.nn import MaskedConv2d
from genkernels.swap import swap_
from tests.swap.checks import DTYPES, check_swap, draw


def masked(cls, hidden=True, **options):
    conv = cls(2, 4, 3, padding=1, **options)
    conv.mask.flatten(2)[:, :, 4 + (not hidden) :] = 0
    return conv


class Multiplies(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, input):
        """Of an image."""
        return F.conv2d(
            input, self.mask * self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Overwrites(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, image):
        self.weight.data *= self.mask
        return super(Overwrites, self).forward(image)  # noqa: UP008 - as it is mostly written


class Doubles(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x):
        return 2 * F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding, self.dilation)


class Wrapped(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.abs(), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("cls", [Multiplies, Overwrites])
def test_classes_that_are_known_by_what_they_say(cls, hidden, dtype):
    x = draw(3, 2, 5, 4, dtype=dtype)

    def run(model):
        with torch.no_grad():
            value = model(x)
        return {"value": value, "learning": model(x), "weight": model.weight.clone()}

    report = check_swap(lambda: masked(cls, hidden), run, dtype, swapped=1)
    assert report.entries[0].was == cls.__name__
    model = masked(cls, hidden).to(dtype)
    swap_(model)
    read = pickle.loads(pickle.dumps(model))
    assert type(read) is type(model) and isinstance(read, cls) and torch.equal(read(x), model(x))


def test_classes_that_say_something_else():
    other = masked(Multiplies)
    other.mask[0, 0, 0, 0] = 0
    models = masked(Doubles), masked(Wrapped), other, masked(Multiplies, padding_mode="circular")
    with pytest.warns(UserWarning, match="each of them has its reason"):
        reasons = [entry.reason for entry in swap_(nn.ModuleList(models)).entries]
    assert [reason.split()[-1] for reason in reasons] == ["convolved", "nn.Conv2d", "here", "here"]
    with pytest.warns(UserWarning, match="there is none of torch"):
        assert not swap_(MaskedConv2d("A", 2, 4, 3)).entries
