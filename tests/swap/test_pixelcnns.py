"""PixelCNNs of pytorch-generative and pythae, swapped and not."""

from __future__ import annotations

import copy
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genkernels.reference._stages import network_output
from genkernels.swap import _source, _walk, swap_
from tests.swap import pixelcnns
from tests.swap.checks import DTYPES, check_swap, draw

LIBRARIES = "pytorch_generative", "pythae"
KINDS = "PixelCNN", "GatedPixelCNN"


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """The libraries themselves, or what stands in for those that are missing."""
    with pytest.MonkeyPatch.context() as patch:
        for library in LIBRARIES:
            if importlib.util.find_spec(library) is not None:
                continue
            for name, module in pixelcnns.packages().items():
                if name.partition(".")[0] == library:
                    patch.setitem(sys.modules, name, module)
            for cls in vars(pixelcnns).values():
                ours = "pythae" if cls is pixelcnns.MaskedConv2d else "pytorch_generative"
                if isinstance(cls, type) and cls.__module__ == pixelcnns.__name__ and ours == library:
                    patch.setattr(cls, "__module__", f"{library}.{cls.__name__}")
            patch.delitem(sys.modules, f"genkernels.swap.{library}", raising=False)
            swaps = importlib.import_module(f"genkernels.swap.{library}")
            if library == "pytorch_generative":
                functions = {*swaps._BASE, *swaps._PIXEL_CNN, *swaps._GATED}
                patch.setattr(swaps, "KNOWN", {f.__qualname__: _source.digest(f) for f in functions})
            else:
                patch.setattr(_walk, "metadata", SimpleNamespace(version={"pythae": "0.1.2"}.get))
        yield
    for library in LIBRARIES:
        if library not in sys.modules:
            sys.modules.pop(f"genkernels.swap.{library}", None)


def swaps():
    return sys.modules["genkernels.swap.pytorch_generative"]


def model_of(kind, dtype=torch.float32, **options):
    from pytorch_generative.models import autoregressive

    module = {"PixelCNN": autoregressive.pixel_cnn, "GatedPixelCNN": autoregressive.gated_pixel_cnn}[kind]
    sizes = {"n_residual": 2, "residual_channels": 4} if kind == "PixelCNN" else {"n_gated": 2, "gated_channels": 4}
    torch.manual_seed(0)
    model = getattr(module, kind)(head_channels=5, **sizes, **options).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    model(torch.zeros(1, options.get("in_channels", 1), 7, 6, dtype=dtype))
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_draws_are_those_of_pixel_after_pixel(kind, dtype):
    theirs = model_of(kind, dtype)
    ours = copy.deepcopy(theirs)
    report = swap_(ours)
    empty = -torch.ones(6, 1, 7, 6, dtype=dtype)
    partly = empty.clone()
    partly[:, :, :3] = (draw(6, 1, 3, 6, dtype=dtype) > 0).to(dtype)
    partly[::2, :, 5, 2:4] = 1
    for given in (empty, partly):
        kept = given.clone()
        found = []
        for model in (theirs, ours):
            torch.manual_seed(3)
            found.append((model.sample(conditioned_on=given), torch.rand(2)))
        assert torch.equal(found[0][0], found[1][0]) and found[1][0].dtype == dtype
        assert torch.equal(found[0][1], found[1][1]) and torch.equal(given, kept)
        assert 0.1 < found[1][0].mean() < 0.9
    image = found[0][0]
    with torch.no_grad():
        logits = network_output(ours._gk_told(image), 2 * image - 1)
        torch.testing.assert_close(logits, theirs(image))
    report.undo()
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_that_are_drawn_pixel_after_pixel(kind, monkeypatch):
    from genkernels import ops

    def refuse(*args, **kwargs):
        raise AssertionError("by the operator")

    reasons = {
        "its sample_fn is the caller's own": {"sample_fn": torch.sigmoid},
        "its pixels have several channels, which are drawn at once": {"in_channels": 2, "out_channels": 2},
    }
    for reason, options in reasons.items():
        model = nn.ModuleList([model_of(kind, **options), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))])
        assert swap_(model).entries[0].reason == reason
    ours = model_of(kind)
    swap_(ours)
    assert ours.sample(2).shape == (2, 1, 7, 6)
    monkeypatch.setattr(ops, "autoregressive_sampling", refuse)
    grey, broken = torch.full((1, 1, 7, 6), 0.5), copy.deepcopy(ours)
    assert torch.equal(ours.sample(conditioned_on=grey), grey)
    broken._head[1].bias.data[0] = torch.nan
    with pytest.raises((ValueError, RuntimeError)):  # zuko switches off that distributions look at their arguments
        broken.sample(1)
    calls = []
    ours._head[0].register_forward_hook(lambda *_: calls.append(1))
    ours.sample(1)
    assert len(calls) == 42


def test_a_class_that_says_something_else(monkeypatch):
    known = swaps().KNOWN
    monkeypatch.setattr(swaps(), "KNOWN", known | {"CausalConv2d.forward": "another"})
    with pytest.warns(UserWarning, match="no module of this PixelCNN was swapped"):
        report = swap_(model_of("PixelCNN"))
    assert {e.reason for e in report.entries} == {
        "CausalConv2d.forward is not that of pytorch-generative's commit d1f0a5c"
    }

    def alike():
        """A docstring, and"""
        return (1 + 1)  # a comment  # fmt: skip

    first = _source.digest(alike)

    def alike():
        return 1 + 1

    second = _source.digest(alike)

    def alike():
        return 1 + 2

    assert first == second != _source.digest(alike) and _source.digest(len) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [True, False])
def test_causal_convolution(hidden, dtype):
    from pytorch_generative.nn import convolution

    x = draw(2, 3, 6, 5, dtype=dtype)

    def run(model):
        with torch.no_grad():
            value = model(x)
        return {"value": value, "learning": model(x), "weight": model.weight.clone()}

    make = lambda: convolution.CausalConv2d(hidden, 3, 4, 5, padding=2)  # noqa: E731
    check_swap(make, run, dtype, swapped=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["A", "B"])
def test_masked_convolution_of_pythae(kind, dtype):
    from pythae.models.normalizing_flows.pixelcnn.utils import MaskedConv2d

    x = draw(2, 3, 6, 5, dtype=dtype)
    check_swap(lambda: MaskedConv2d(kind, 3, 4, 5, 1, 2), lambda m: {"y": m(x), "one": m(x[0])}, dtype, swapped=1)


def test_masks_that_are_no_operators():
    from pythae.models.normalizing_flows.pixelcnn.utils import MaskedConv2d

    model = nn.ModuleList(
        [MaskedConv2d("B", 2, 4, 3, 1, 1), MaskedConv2d("B", 2, 4, 3), MaskedConv2d("B", 2, 4, 3, 2, 1)]
    )
    theirs, x = copy.deepcopy(model), torch.randn(2, 2, 5, 5)
    assert [bool(e.became) for e in swap_(model).entries] == [True, False, False]
    for m in (model, theirs):
        m[0](x)
        m[0].mask[0, 0, 2, 2] = 1  # a mask of another kind, from now on
    torch.testing.assert_close(model[0](x), theirs[0](x))
