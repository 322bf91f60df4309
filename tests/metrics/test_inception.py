"""FID and the Inception score: the formulas on a network of one's own, and torchmetrics' network by a stand-in."""

import math
import sys
import types

import pytest
import torch
from torch import nn

from genkernels._words import UsageError
from genkernels.metrics import fid, frechet_distance, inception_score


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Modules with the names of torchmetrics and torch-fidelity, and a file of weights: what was asked of them."""
    asked = types.SimpleNamespace(calls=[], batches=[], weights=tmp_path / "weights.pth")
    asked.weights.write_bytes(b"")

    class NoTrainInceptionV3(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            asked.calls.append((name, features_list, feature_extractor_weights_path))

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            asked.batches.append(x)
            return x.float().flatten(1)[:, ::5]

    names = ("torch_fidelity", "torchmetrics", "torchmetrics.image", "torchmetrics.image.fid")
    modules = {name: types.ModuleType(name) for name in names}
    modules["torchmetrics.image.fid"].NoTrainInceptionV3 = NoTrainInceptionV3
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_fid_is_the_frechet_distance_on_the_features_of_the_users_weights(stand_in):
    x, y = torch.rand(40, 3, 4, 4), torch.rand(50, 3, 4, 4) ** 2
    found = fid(x, y, stand_in.weights, batch_size=32)
    assert stand_in.calls == [("inception-v3-compat", ["2048"], str(stand_in.weights))]
    assert [len(batch) for batch in stand_in.batches] == [32, 8, 32, 18]
    features = [(of * 255).round().flatten(1)[:, ::5] for of in (x, y)]
    assert found == pytest.approx(frechet_distance(*features), rel=1e-12)
    assert fid(x, x, str(stand_in.weights)) == pytest.approx(0, abs=1e-9 * found)
    levels = [(of * 255).round().byte() for of in (x, y)]
    assert fid(*levels, stand_in.weights) == found, "bytes are taken as they are"


def test_grey_images_have_three_equal_channels(stand_in):
    fid(torch.rand(9, 1, 2, 2), torch.rand(9, 1, 2, 2), stand_in.weights)
    first = stand_in.batches[0]
    assert torch.equal(first[:, 0], first[:, 1]) and torch.equal(first[:, 0], first[:, 2])


def test_the_inception_score_by_hand():
    """Sure of one of C classes, each as often: C. Sure of one class always, or of none: 1."""
    sure = 1000.0 * torch.eye(4).repeat(5, 1)
    assert inception_score(sure, lambda x: x, 1) == pytest.approx((4, 0))
    assert inception_score(sure[:1].expand(8, 4), lambda x: x, 2) == pytest.approx((1, 0))
    assert inception_score(torch.zeros(8, 4), lambda x: x, 2) == pytest.approx((1, 0))
    halves = torch.cat([sure[:4], torch.zeros(4, 4)])
    assert inception_score(halves, lambda x: x, 2) == pytest.approx((2.5, 1.5))


def test_the_inception_score_against_its_formula(stand_in):
    x = torch.randn(23, 6, dtype=torch.float64)
    seen = []
    found = inception_score(x, lambda some: seen.append(len(some)) or some, 4, batch_size=10)
    assert seen == [10, 10, 3]
    scores = []
    for part in x.softmax(1).split([6, 6, 6, 5]):
        scores.append((part * (part / part.mean(0)).log()).sum(1).mean().exp())
    scores = torch.stack(scores)
    assert found == pytest.approx((scores.mean().item(), scores.std(unbiased=False).item()), rel=1e-12)
    inception_score(torch.rand(9, 3, 4, 4), stand_in.weights, 3)
    assert stand_in.calls == [("inception-v3-compat", ["logits_unbiased"], str(stand_in.weights))]


def test_what_is_not_finite_gives_nan(stand_in):
    x = torch.rand(9, 3, 4, 4)
    bad = x.clone()
    bad[4, 0, 0, 0] = math.nan
    assert math.isnan(fid(x, bad, stand_in.weights)) and not stand_in.batches
    assert all(map(math.isnan, inception_score(bad, stand_in.weights, 3)))
    assert math.isnan(inception_score(x, lambda some: some.flatten(1) * math.nan, 3).mean)


@pytest.mark.parametrize("missing", ["torchmetrics", "torch_fidelity"])
@pytest.mark.parametrize("call", [lambda x, w: fid(x, x, w), lambda x, w: inception_score(x, w, 2)])
def test_a_missing_package_is_named_with_what_installs_it(stand_in, monkeypatch, missing, call):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not there
    name = missing.replace("_", "-")
    words = f"this needs {name}, which cannot be imported here .*: pip install 'torchmetrics\\[image\\]'$"
    with pytest.raises(UsageError, match=words):
        call(torch.rand(4, 3, 2, 2), stand_in.weights)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, w: fid(x, x, "nowhere.pth"), UsageError, "fid: weights must be the file .*'nowhere.pth': no such"),
        (lambda x, w: fid(2 * x - 1, x, w), ValueError, r"fid: images must be floats in \[0, 1\] or bytes, got values"),
        (lambda x, w: fid(x.long(), x.long(), w), TypeError, "fid: images must be floats .* or bytes, got torch.int64"),
        (lambda x, w: fid(x[:, :2], x[:, :2], w), ValueError, r"fid: images must be \[N, 1 or 3, H, W\]"),
        (lambda x, w: fid(x[:1], x, w), ValueError, "fid: real must be .* at least 2 examples"),
        (lambda x, w: fid(x, x.byte(), w), TypeError, "fid: real and fake must be on one scale"),
        (lambda x, w: inception_score(x, w, 9), ValueError, "inception_score: x must be .* at least 9 examples"),
        (lambda x, w: inception_score(x, w, 0), ValueError, "inception_score: splits must be an integer"),
        (lambda x, w: inception_score(x, lambda some: some, 2), ValueError, "inception_score: network must give a row"),
        (lambda x, w: inception_score(x, torch.argmax, 2), ValueError, r"inception_score: network must .*got \[\]"),
    ],
)
def test_refusals(stand_in, call, error, words):
    with pytest.raises(error, match=f"^{words}"):
        call(torch.rand(4, 3, 2, 2), stand_in.weights)
