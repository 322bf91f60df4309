"""What layers ask of a tensor before they read it."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from genkernels.nn import _seen


@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
def test_a_plain_tensor_is_asked_no_more_than_its_class(monkeypatch, kind):
    """`detect_fake_mode` in every call of a layer cost SN-GAN's critic 0.1 ms a step."""
    monkeypatch.setattr(torch._guards, "detect_fake_mode", lambda _: pytest.fail("asked"))
    tensor = torch.zeros(3)
    assert not _seen.fake(tensor if kind is torch.Tensor else nn.Parameter(tensor))


def test_a_fake_tensor_is_known_with_and_without_its_mode():
    plain, mode = torch.zeros(3), FakeTensorMode()
    fake = mode.from_tensor(plain)
    assert _seen.fake(fake) and _seen.fake(nn.Parameter(fake))
    with mode:
        assert _seen.fake(plain) and _seen.fake(fake)
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        assert _seen.fake(plain)
    assert not _seen.fake(plain)
