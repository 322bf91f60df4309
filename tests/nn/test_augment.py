"""Augmentation: each change is the one that is named, an image at a time, differentiable, and follows its generator;
the adaptive probability follows the critic's signs."""

import copy

import pytest
import torch

import genkernels as gk
from genkernels.nn import augment as module
from tests.processes import two_ranks

OFF = {"colour": False, "translation": 0, "cutout": 0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def augment(p=1.0, **on):
    return gk.nn.Augment(p, **{**OFF, **on})


def drawn(monkeypatch, *rows):
    """Lets the next draw be these rows: five coins, then seven values."""
    monkeypatch.setattr(module, "uniform", lambda *_: torch.tensor(rows, dtype=torch.float32))


HEADS, TAILS = 0.0, 0.999


# --- what is done -------------------------------------------------------------------------------------------------


def test_colours_one_after_the_other(monkeypatch):
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    drawn(
        monkeypatch, [HEADS] * 3 + [TAILS] * 2 + [0.9, 0.3, 0.25, 0, 0, 0, 0], [HEADS] * 5 + [0.5, 0.5, 0.5, 0, 0, 0, 0]
    )
    y = augment(colour=True)(x)
    expected = x[0] + 0.4
    expected = expected.mean(0) + 0.6 * (expected - expected.mean(0))
    expected = expected.mean() + 0.75 * (expected - expected.mean())
    torch.testing.assert_close(y[0], expected, rtol=1e-6, atol=1e-7)  # the draws are fp32
    torch.testing.assert_close(y[1], x[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("coins", "same"), [([HEADS, TAILS, TAILS], 0.45), ([TAILS, HEADS, TAILS], 0), ([TAILS] * 3, 0)]
)
def test_each_coin_has_its_change(monkeypatch, coins, same):
    x = torch.rand(1, 1, 3, 3)
    drawn(monkeypatch, [*coins, TAILS, TAILS, 0.95, 0.1, 0.1, 0, 0, 0, 0])
    y = augment(0.5, colour=True)(x)
    torch.testing.assert_close(y, x + same)  # a grey image has no saturation


@pytest.mark.parametrize(("values", "rows", "columns"), [((0, 0.5), -2, 0), ((0.999, 0.999), 2, 1), ((0.5, 0), 0, -1)])
def test_translation(monkeypatch, values, rows, columns):
    x = torch.arange(1.0, 65).view(1, 2, 8, 4)
    drawn(monkeypatch, [HEADS] * 5 + [0, 0, 0, *values, 0, 0])
    y = augment(translation=0.25)(x)
    expected = torch.zeros(1, 2, 8, 4)
    for i in range(8):
        for j in range(4):
            if 0 <= i - rows < 8 and 0 <= j - columns < 4:
                expected[:, :, i, j] = x[:, :, i - rows, j - columns]
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("values", "rows", "columns"), [((0, 0), (0, 2), (0, 2)), ((0.5, 0.5), (2, 6), (1, 4))])
def test_cutout(monkeypatch, values, rows, columns):
    x = torch.rand(1, 2, 8, 5) + 1
    drawn(monkeypatch, [HEADS] * 5 + [0] * 5 + [*values])
    y = augment(cutout=0.5, value_range=(1.0, 2.0))(x)  # sides 4 and 3 (2.5, rounded up)
    expected = x.clone()
    expected[:, :, rows[0] : rows[1], columns[0] : columns[1]] = 1.5
    assert torch.equal(y, expected)


def test_the_largest_draw_stays_within():
    top = torch.tensor([1 - 2.0**-24])
    for count in range(1, 1000):
        assert 0 <= module._whole(top, count).item() == count - 1


def test_the_same_pictures_in_either_range():
    x = torch.rand(16, 3, 8, 8, dtype=torch.float64)
    unit = gk.nn.Augment(value_range=(0.0, 1.0))(x, seeded())
    torch.testing.assert_close(gk.nn.Augment()(2 * x - 1, seeded()), 2 * unit - 1, rtol=0, atol=1e-12)


def test_shares_of_many_images():
    x = torch.rand(4000, 1, 8, 8) + 1
    changed = (augment(0.3, translation=0.125)(x, seeded()) != x).flatten(1).any(1).double().mean()
    assert changed == pytest.approx(0.3 * 8 / 9, abs=0.03), "one shift in nine is none"
    cut = (augment(0.3, cutout=0.5)(x, seeded()) == 0).flatten(1).any(1).double().mean()
    assert cut == pytest.approx(0.3, abs=0.03)
    means = augment(colour=True)(x, seeded()).mean((1, 2, 3)) - x.mean((1, 2, 3))
    assert means.min() > -0.5001 and means.max() < 0.5001 and means.std() == pytest.approx(12**-0.5, abs=0.02)


# --- how it behaves -----------------------------------------------------------------------------------------------


def test_without_probability_in_evaluation_or_switched_off_it_is_the_identity():
    x = torch.randn(5, 3, 6, 7)
    for layer in (gk.nn.Augment(0.0), gk.nn.Augment(1.0).eval(), augment(), gk.nn.AdaptiveAugment()):
        assert torch.equal(layer(x), x)


def test_the_generator_decides_and_switches_do_not_shift_its_draws():
    x = torch.rand(6, 3, 8, 8)
    layer = gk.nn.Augment()
    assert torch.equal(layer(x, seeded(1)), layer(x, seeded(1)))
    assert not torch.equal(layer(x, seeded(1)), layer(x, seeded(2)))
    moved, both = augment(translation=0.25)(x, seeded(1)), augment(translation=0.25, colour=True)(x, seeded(1))
    assert torch.equal(moved == 0, both == 0), "the same places with colours as without"
    first = layer(x, seeded(3))[:0]
    assert first.shape == (0, 3, 8, 8) and layer(x[:0]).shape == (0, 3, 8, 8)
    torch.manual_seed(5)
    by_default = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), by_default)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (4, 5)])
def test_gradients_of_first_and_second_order(channels, size):
    x = torch.rand(2, channels, *size, dtype=torch.float64, requires_grad=True)
    layer = gk.nn.Augment()
    assert torch.autograd.gradcheck(lambda x: layer(x, seeded()), (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x, seeded()).square(), (x,))


def test_layouts_and_dtypes():
    x = torch.rand(4, 3, 6, 6)
    layer = gk.nn.Augment()
    expected = layer(x, seeded())
    for like in (x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0], x.flip(3).flip(3)):
        torch.testing.assert_close(layer(like, seeded()), expected, rtol=0, atol=1e-6)
    half = layer(x.bfloat16(), seeded())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.03)
    whole = layer.double()(x.double(), seeded())
    torch.testing.assert_close(whole.float(), expected, rtol=0, atol=1e-6)


def test_one_image_in_a_thousand_is_no_other_ones_matter():
    x = torch.rand(5, 3, 8, 8)
    x[2] = float("nan")
    y = gk.nn.Augment(cutout=0)(x, seeded())
    assert y[2].isnan().any() and not y[[0, 1, 3, 4]].isnan().any()


def test_it_compiles_and_exports_no_state_but_p():
    layer = gk.nn.Augment(0.25)
    assert list(layer.state_dict()) == ["p"]
    other = gk.nn.Augment()
    other.load_state_dict(layer.state_dict())
    assert other.p == 0.25
    x = torch.rand(4, 3, 8, 8)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(compiled, expected)


def test_compiled_it_moves_p_in_double_precision_too():
    """torch (2.13) drops what a compiled pass writes to a single float64."""
    torch._dynamo.reset()
    layers = [gk.nn.AdaptiveAugment(target=0.6, images=1000, every=1, most=0.1).double() for _ in range(2)]
    layers[0].update(torch.ones(10))
    torch.compile(layers[1].update, backend="aot_eager", fullgraph=True)(torch.ones(10))
    assert layers[1].p == layers[0].p > 0


# --- the adaptive probability -------------------------------------------------------------------------------------


def test_p_rises_while_the_critic_knows_the_real_images_and_falls_when_not():
    layer = gk.nn.AdaptiveAugment(target=0.6, images=1000, every=2, most=0.1)
    sure, unsure = torch.full((10,), 3.0), torch.tensor([1.0] * 7 + [-1.0] * 3)
    assert layer.update(sure) == 1 and layer.p == 0, "not yet due"
    assert layer.update(unsure).item() == pytest.approx(0.4)
    torch.testing.assert_close(layer.p, torch.tensor(0.02))  # r of both batches is 0.7; 20 images of 1000
    for _ in range(20):
        layer.update(sure)
    torch.testing.assert_close(layer.p, torch.tensor(0.1))  # the most
    for _ in range(4):
        layer.update(unsure)
    torch.testing.assert_close(layer.p, torch.tensor(0.06))
    for _ in range(20):
        layer.update(-sure)
    assert layer.p == 0


def test_at_the_target_it_stays_and_every_patch_counts_but_images_are_images():
    layer = gk.nn.AdaptiveAugment(target=0.5, images=100, every=1, p=0.3)
    layer.update(torch.tensor([[1.0], [1.0], [1.0], [-1.0]]))
    torch.testing.assert_close(layer.p, torch.tensor(0.3))
    patches = torch.ones(4, 1, 2, 2)
    patches[:, :, 0, 0] = 0.0  # knows not: r = ¾
    assert layer.update(patches) == 0.75
    torch.testing.assert_close(layer.p, torch.tensor(0.34))


def test_a_state_goes_on_where_it_was():
    def run(layer, batches):
        return [layer.update(scores).item() for scores in batches]

    batches = [torch.randn(7, generator=seeded(i)) + 1 for i in range(9)]
    unbroken = gk.nn.AdaptiveAugment(0.3, images=100, every=4)
    run(unbroken, batches)
    first = gk.nn.AdaptiveAugment(0.3, images=100, every=4)
    run(first, batches[:5])
    resumed = gk.nn.AdaptiveAugment(0.3, images=100, every=4)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    run(resumed, batches[5:])
    assert all(torch.equal(value, unbroken.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert unbroken.p > 0 and unbroken.counted[2] == 1


def test_two_processes_have_one_probability():
    assert two_ranks("tests.nn.augment_rank") == {"alone": "", "within DistributedDataParallel": ""}


def test_nan_is_forgotten_and_no_graph_is_kept():
    layer = gk.nn.AdaptiveAugment(images=100, every=1, p=0.2)
    assert layer.update(torch.tensor([float("nan"), 1.0])).isnan()
    torch.testing.assert_close(layer.p, torch.tensor(0.2))
    r = layer.update(torch.ones(10, requires_grad=True) * 2)
    assert not r.requires_grad and not layer.p.requires_grad
    torch.testing.assert_close(layer.p, torch.tensor(0.3))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gk.nn.Augment(1.5), ValueError, "Augment: p must be a number from 0 to 1, got 1.5"),
        (lambda: gk.nn.Augment(translation=-1), ValueError, "Augment: translation must be a number from 0 to 1"),
        (lambda: gk.nn.Augment(cutout=True), ValueError, "Augment: cutout must be a number from 0 to 1, got True"),
        (lambda: gk.nn.Augment(value_range=(1, 0)), ValueError, "Augment: value_range must be two numbers that rise"),
        (lambda: gk.nn.Augment(value_range=1.0), ValueError, "Augment: value_range must be two numbers that rise, got"),
        (lambda: gk.nn.Augment(value_range=(0, 1, 2)), ValueError, "Augment: value_range must be two numbers"),
        (
            lambda: gk.nn.Augment()(torch.rand(3, 8, 8)),
            ValueError,
            r"Augment: x must be \[N, C, H, W\], got \[3, 8, 8\]",
        ),
        (lambda: gk.nn.Augment()(torch.zeros(3, 1, 8, 8).byte()), TypeError, "Augment: x must be float64, .*uint8"),
        (lambda: gk.nn.AdaptiveAugment(2), ValueError, "AdaptiveAugment: target must be a number from -1 to 1, got 2"),
        (lambda: gk.nn.AdaptiveAugment(every=0), ValueError, "AdaptiveAugment: every must be an integer of at least 1"),
        (lambda: gk.nn.AdaptiveAugment(most=2), ValueError, "AdaptiveAugment: most must be a number from 0 to 1"),
        (lambda: gk.nn.AdaptiveAugment(p=-1), ValueError, "AdaptiveAugment: p must be a number from 0 to 1"),
        (lambda: gk.nn.AdaptiveAugment(p=0.9), ValueError, "AdaptiveAugment: p must be at most 0.8, .*, got 0.9"),
        (lambda: gk.nn.AdaptiveAugment().update(torch.zeros(0)), ValueError, "AdaptiveAugment: real_scores must be"),
        (
            lambda: gk.nn.AdaptiveAugment().half().update(torch.ones(3)),
            TypeError,
            "AdaptiveAugment: the module must be",
        ),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=f"^{words}"):
        call()
