"""PixelCNN and GatedPixelCNN: what each pixel may see, exact likelihoods, cached sampling, in-painting, training on
either backend."""

import copy
import itertools
import json
import math

import pytest
import torch

import genkernels as gk
from genkernels import models
from tests.ops.causal_networks import mask

SMALL = {
    "plain": lambda **kw: models.PixelCNN(shape=(1, 5, 4), grey_levels=4, width=6, layers=2, **kw),
    "plain residual": lambda **kw: models.PixelCNN(
        shape=(1, 4, 5), grey_levels=3, width=6, layers=2, residual=True, dropout=0.5, **kw
    ),
    "plain colour": lambda **kw: models.PixelCNN(shape=(3, 3, 4), grey_levels=4, width=6, layers=2, **kw),
    "gated": lambda **kw: models.GatedPixelCNN(shape=(1, 5, 4), grey_levels=4, width=6, layers=2, dropout=0.5, **kw),
    "gated colour": lambda **kw: models.GatedPixelCNN(shape=(3, 4, 3), grey_levels=3, width=6, layers=2, **kw),
    "gated wide kernel": lambda **kw: models.GatedPixelCNN(
        shape=(1, 3, 6), grey_levels=4, width=4, layers=1, kernel_size=5, **kw
    ),
    "gated mixture": lambda **kw: models.GatedPixelCNN(
        shape=(1, 4, 5), grey_levels=8, width=4, layers=2, head="logistic_mixture", mixtures=2, **kw
    ),
    "gated colour mixture": lambda **kw: models.GatedPixelCNN(
        shape=(3, 4, 3), grey_levels=8, width=4, layers=2, head="logistic_mixture", mixtures=2, **kw
    ),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name, dtype=torch.float64, gain=2.0, **options):
    torch.manual_seed(0)
    return off_its_start(SMALL[name](**options).to(dtype), gain)


def off_its_start(model, gain=2.0):
    """In evaluation mode, its weights such that every layer matters; dead taps are not 0."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def images(model, count, seed=1):
    return torch.randint(model.grey_levels, (count, *model.shape), dtype=torch.uint8, generator=seeded(seed))


# --- who sees whom ------------------------------------------------------------------------------------------------


def dependence(model, training):
    """``[H, W, groups, H, W, C]`` bool: does anything of group c at a pixel depend on a value of the image?"""
    model.train(training)
    channels, height, width = model.shape
    groups = model.data_channels
    x = torch.randn(1, *model.shape, dtype=torch.float64, generator=seeded(3)).requires_grad_()
    torch.manual_seed(0)
    y = torch.zeros(1, dtype=torch.long) if model.num_classes else None
    params = model(x, y).unflatten(1, (groups, -1))[0]
    seen = torch.zeros(height, width, groups, height, width, channels, dtype=torch.bool)
    for i, j, g in itertools.product(range(height), range(width), range(groups)):
        each = [torch.autograd.grad(p, x, retain_graph=True)[0][0] for p in params[g, :, i, j]]
        seen[i, j, g] = (torch.stack(each) != 0).any(0).permute(1, 2, 0)
    return seen


def earlier(model):
    """The same shape: True where a value comes before the pixel (and, between channels, before the group)."""
    channels, height, width = model.shape
    groups = model.data_channels
    place = torch.arange(height * width).view(height, width)
    at, of = place.view(height, width, 1, 1, 1, 1), place.view(1, 1, 1, height, width, 1)
    group = torch.arange(groups).view(1, 1, groups, 1, 1, 1)
    channel = torch.arange(channels).view(1, 1, 1, 1, 1, channels)
    within = (channel < group) if groups > 1 else torch.zeros_like(channel < group)
    return (of < at) | ((of == at) & within)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", SMALL)
def test_no_parameter_depends_on_its_own_or_a_later_value(name, classes, training):
    seen = dependence(make(name, num_classes=classes), training)
    assert not (seen & ~earlier(make(name))).any()
    assert seen.any()


def awake(gated):
    """No unit of its one ReLU sleeps: what is not seen then is a matter of masks."""
    with torch.no_grad():
        gated.hidden.bias.fill_(10.0)
    return gated


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("gated")])
def test_the_gated_model_has_no_blind_spot(name, classes):
    model = awake(make(name, num_classes=classes))
    assert torch.equal(dependence(model, False), earlier(model)), "every earlier value is seen"


def test_no_blind_spot_within_the_reach_of_an_image_that_is_larger():
    """9×15 pixels, two layers: the vertical stack reaches 3 + 1 + 1 rows up and as far to either side, the horizontal
    one 5 to the left."""
    torch.manual_seed(0)
    model = awake(off_its_start(models.GatedPixelCNN(shape=(1, 9, 15), grey_levels=2, width=4, layers=2).double()))
    x = torch.randn(1, 1, 9, 15, dtype=torch.float64).requires_grad_()
    params = model(x)[0]
    for i, j in ((8, 7), (4, 0), (8, 14), (2, 7)):
        each = [torch.autograd.grad(p, x, retain_graph=True)[0][0, 0] for p in params[:, i, j]]
        rows, columns = torch.arange(9).view(9, 1) - i, torch.arange(15) - j
        above = (rows < 0) & (rows >= -5) & (columns.abs() <= 5)
        beside = (rows == 0) & (columns < 0) & (columns >= -5)
        seen = (torch.stack(each) != 0).any(0)
        assert seen[above | beside].all() and not seen[~earlier(model)[i, j, 0, :, :, 0]].any()


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("plain")])
def test_the_plain_model_sees_all_that_its_taps_reach(name):
    """A 7×7 mask of type A, 3×3 ones and a 1×1 one of type B, followed tap by tap: nothing more, nothing less."""
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # no ReLU sleeps, no two paths cancel
    channels, width = model.shape[0], 6
    masks = [
        mask(width, (7, 7), "A", channels, source=channels),
        *[mask(width, (3, 3), "B", channels)] * 2,
        mask(channels * model.grey_levels, (1, 1), "B", channels, source=width),
    ]

    def reach(x):
        for k, taps in enumerate(masks):
            below = x
            x = torch.nn.functional.conv2d(x, taps, padding=taps.shape[2] // 2)
            if model.residual and 0 < k < len(masks) - 1:
                x = x + below
        return x

    x = torch.rand(1, *model.shape, dtype=torch.float64)
    found, expected = (
        torch.autograd.functional.jacobian(f, x)[0].unflatten(0, (model.data_channels, -1))[:, :, :, :, 0] != 0
        for f in (model, reach)
    )
    assert torch.equal(found, expected) and found.any()


def test_the_plain_stack_has_one():
    """From the third row on, three columns to the right and more are seen only along a slope of one: the wedge is
    missed."""
    torch.manual_seed(0)
    model = models.PixelCNN(shape=(1, 3, 9), grey_levels=2, width=8, layers=2).double()
    seen = dependence(model, False)
    assert (earlier(model) & ~seen).any()
    gated = models.GatedPixelCNN(shape=(1, 3, 9), grey_levels=2, width=8, layers=2).double()
    assert (dependence(gated, False) & ~seen & earlier(model)).any(), "the gated model sees some of it"


def test_dead_taps_get_no_gradient_and_play_no_part():
    for name in SMALL:
        model = make(name)
        model.loss(images(model, 3)).backward()
        masked = [m for m in model.modules() if isinstance(m, gk.nn.MaskedConv2d)]
        assert masked
        for layer in masked:
            assert (layer.weight.grad[~layer.mask] == 0).all()
            assert (layer.weight.grad[layer.mask] != 0).any()


# --- likelihood ---------------------------------------------------------------------------------------------------

TINY = {
    "plain": {"cls": models.PixelCNN, "shape": (1, 2, 2), "grey_levels": 3, "width": 4, "layers": 1},
    "plain colour": {"cls": models.PixelCNN, "shape": (3, 1, 2), "grey_levels": 2, "width": 6, "layers": 1},
    "gated": {"cls": models.GatedPixelCNN, "shape": (1, 2, 2), "grey_levels": 3, "width": 4, "layers": 1},
    "gated colour": {"cls": models.GatedPixelCNN, "shape": (3, 2, 1), "grey_levels": 2, "width": 6, "layers": 1},
    "gated mixture": {
        "cls": models.GatedPixelCNN,
        "shape": (1, 2, 2),
        "grey_levels": 3,
        "width": 4,
        "layers": 1,
        "head": "logistic_mixture",
        "mixtures": 2,
    },
    "colour mixture": {
        "cls": models.GatedPixelCNN,
        "shape": (3, 1, 2),
        "grey_levels": 2,
        "width": 4,
        "layers": 1,
        "head": "logistic_mixture",
        "mixtures": 3,
    },
}


def tiny(name):
    settings = dict(TINY[name])
    torch.manual_seed(1)
    model = settings.pop("cls")(**settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    every = torch.tensor(list(itertools.product(range(model.grey_levels), repeat=model.dim)), dtype=torch.uint8)
    return model, every.view(-1, *model.shape)


@pytest.mark.parametrize("name", TINY)
def test_probabilities_of_all_images_add_up_to_one(name):
    model, every = tiny(name)
    with torch.no_grad():
        mass = model.log_prob(every).exp()
    assert abs(mass.sum() - 1) < 1e-9 and mass.max() > 1.5 / len(every)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", TINY)
def test_frequencies_of_samples_are_those_probabilities(name, backend):
    model, every = tiny(name)
    count = 40_000 if backend == "auto" else 10_000
    with torch.no_grad(), gk.use_backend(backend):
        mass = model.log_prob(every).exp()
        drawn = model.sample(count, generator=seeded(2))
    index = (drawn * (model.grey_levels - 1)).round().long().flatten(1)
    codes = (index * model.grey_levels ** torch.arange(model.dim - 1, -1, -1)).sum(1)
    frequency = torch.bincount(codes, minlength=len(every)) / count
    error = (mass * (1 - mass) / count).sqrt()
    assert ((frequency - mass).abs() < 5 * error + 2 / count).all()


def test_bits_per_dim_by_hand():
    model = make("plain colour")
    x = images(model, 3)
    params = model(2 * x.double() / 3 - 1)
    total = torch.zeros(3, dtype=torch.float64)
    for n, c, i, j in itertools.product(range(3), range(3), range(3), range(4)):
        four = params[n, 4 * c : 4 * c + 4, i, j]
        total[n] += four[int(x[n, c, i, j])] - four.logsumexp(0)
    torch.testing.assert_close(model.log_prob(x), total)
    torch.testing.assert_close(model.bits_per_dim(x), total / (-36 * math.log(2)))
    torch.testing.assert_close(model.loss(x), (total / (-36 * math.log(2))).mean())
    torch.testing.assert_close(model.log_prob(x.double() / 3), total)


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("name", SMALL)
def test_cached_samples_are_the_naive_ones(name, count, classes):
    model = make(name, torch.float32, num_classes=classes)
    y = torch.arange(count) % 3 if classes else None
    drawn = model.sample(count, temperature=0.9, generator=seeded(7), y=y)
    with gk.use_backend("reference"):
        naive = model.sample(count, temperature=0.9, generator=seeded(7), y=y)
    assert torch.equal(drawn, naive)
    assert len(drawn.unique()) > 1
    assert torch.equal((drawn * (model.grey_levels - 1)).round() / (model.grey_levels - 1), drawn)


def drawn_one_by_one(model, noise, temperature=1.0, y=None, x=None, known=None):
    """Level indices by whole passes of `model.forward`, one a value, and draws written out here: no stages, no
    cache."""
    channels, height, width = model.shape
    top = model.grey_levels - 1
    known = torch.zeros(channels, height, width, dtype=torch.bool) if known is None else known.expand(model.shape)
    x = torch.zeros(len(noise), *model.shape, dtype=torch.int64) if x is None else x.long()
    x = torch.where(known, x, 0)
    for i, j, c in itertools.product(range(height), range(width), range(channels)):
        if known[c, i, j]:
            continue
        with torch.no_grad():
            params = model((2 * x / top - 1).to(noise.dtype), y)[:, :, i, j]
        for n, row in enumerate(params.double()):
            u, its = noise[n, :, i, j].double(), (2 * x[n, :, i, j] / top - 1).double()
            if model.head == "categorical":
                x[n, c, i, j] = inverted(row[c * model.grey_levels : (c + 1) * model.grey_levels], u[c], temperature)
                continue
            count = len(row) // (3 if channels == 1 else 10)
            k = inverted(row[:count], u[0], temperature)
            mean, log_scale, *coefficients = row[count:].view(channels, -1, count)[c, :, k]
            if c == 1:
                mean = mean + row[count:].view(channels, -1, count)[0, 2, k].tanh() * its[0]
            if c == 2:
                before = row[count:].view(channels, -1, count)[1, 2, k]
                mean = mean + before.tanh() * its[0] + coefficients[0].tanh() * its[1]
            value = float(mean + log_scale.clamp(min=-7).exp() * temperature * u[1 + c].logit())
            x[n, c, i, j] = math.floor((min(max(value, -1.0), 1.0) + 1) * top / 2 + 0.5)
    return x


def inverted(logits, u, temperature):
    """The category in which u falls; at temperature 0 the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    return int((u >= (logits / temperature).softmax(0).cumsum(0)[:-1]).sum())


def stream(model, count, seed):
    """The noise that a sampler takes from a generator in this state."""
    channels, height, width = model.shape
    extra = model.head == "logistic_mixture"
    return torch.rand(count, channels + extra, height, width, dtype=model._like.dtype, generator=seeded(seed))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("count,temperature", [(1, 1.0), (16, 0.6), (2, 0.0)])
@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", SMALL)
def test_samples_are_those_of_whole_passes_of_forward(name, classes, count, temperature):
    """What `forward` and `stages` each say of the network, the cached sampler and the draws, all at once."""
    model = make(name, num_classes=classes)
    y = torch.arange(count) % 3 if classes else None
    given = {"temperature": temperature, "generator": seeded(3), "y": y}
    expected = drawn_one_by_one(model, stream(model, count, 3), temperature, y)
    top = model.grey_levels - 1
    assert torch.equal((model.sample(count, **given) * top).round().long(), expected)

    known = torch.rand(model.shape, generator=seeded(4)) < 0.4
    if not known.any() or known.all():
        return
    x = images(model, count)
    expected = drawn_one_by_one(model, stream(model, count, 3), temperature, y, x, known)
    assert torch.equal(model.inpaint(x, known, **{**given, "generator": seeded(3)}).long(), expected)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size,classes", [((8, 8), None), ((7, 9), 10)])
@pytest.mark.parametrize("cls", [models.PixelCNN, models.GatedPixelCNN])
def test_samples_of_digits_in_fp32_are_those_of_whole_passes(cls, size, classes):
    torch.manual_seed(0)
    model = off_its_start(cls.from_preset("digits", shape=(1, *size), num_classes=classes), 1.5)
    for count in (1, 16):
        y = torch.arange(count) % 10 if classes else None
        drawn = (model.sample(count, generator=seeded(5), y=y) * 16).round().long()
        assert torch.equal(drawn, drawn_one_by_one(model, stream(model, count, 5), 1.0, y))
        assert len(drawn.unique()) > 4


@pytest.mark.parametrize("name", ["plain residual", "gated colour", "gated colour mixture"])
def test_inpainting_keeps_what_is_known_and_draws_the_rest_from_its_conditional(name):
    model = make(name)
    x = images(model, 4)
    known = torch.zeros(model.shape[1:], dtype=torch.bool)
    known[: model.shape[1] // 2] = True
    drawn = model.inpaint(x, known, generator=seeded(5))
    assert drawn.dtype == torch.uint8 and torch.equal(drawn[..., known], x[..., known])
    assert not torch.equal(drawn, x)
    other = x.clone()
    other[..., ~known] = 0
    assert torch.equal(model.inpaint(other, known, generator=seeded(5)), drawn), "unknown values play no part"
    with gk.use_backend("reference"):
        assert torch.equal(model.inpaint(x, known, generator=seeded(5)), drawn)
    floats = torch.rand(4, *model.shape)  # off the levels: kept bit for bit all the same
    assert torch.equal(model.inpaint(floats, known)[..., known], floats[..., known])
    assert torch.equal(model.inpaint(x, torch.ones((), dtype=torch.bool)), x)
    free = model.inpaint(x, torch.zeros((), dtype=torch.bool), generator=seeded(6))
    sample = model.sample(4, generator=seeded(6))
    assert torch.equal(free, (sample * (model.grey_levels - 1)).round().to(torch.uint8))


def test_inpainting_follows_the_conditional_distribution():
    """2×2 pixels of 3 levels, the top row known: the frequencies of the bottom row are its conditional
    probabilities."""
    model, every = tiny("gated")
    top = torch.tensor([2, 0], dtype=torch.uint8)
    given = every[(every[:, 0, 0] == top).all(1)]
    with torch.no_grad():
        mass = model.log_prob(given).softmax(0)
    known = torch.tensor([[True, True], [False, False]])
    drawn = model.inpaint(given[:1].expand(20_000, 1, 2, 2), known, generator=seeded())
    codes = (drawn[:, 0, 1].long() * torch.tensor([3, 1])).sum(1)
    frequency = torch.bincount(codes, minlength=9) / 20_000
    assert ((frequency - mass).abs() < 5 * (mass * (1 - mass) / 20_000).sqrt() + 1e-4).all()


def test_temperature_zero_takes_the_mode_and_progress_is_told_each_row():
    model = make("gated")
    seen = []
    a = model.sample(2, temperature=0, generator=seeded(1), progress=lambda done, rows: seen.append((done, rows)))
    assert torch.equal(a[0], a[1]) and torch.equal(a, model.sample(2, temperature=0, generator=seeded(9)))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_sampling_leaves_no_graph_and_the_mode_alone():
    model = make("plain").train()
    assert not model.sample(1).requires_grad and model.training
    assert model.sample(0).shape == (0, 1, 5, 4)


def test_classes_matter_and_are_checked():
    model = make("gated", num_classes=3)
    x = images(model, 2)
    a, b = (model.log_prob(x, torch.full((2,), k)) for k in (0, 1))
    assert not torch.allclose(a, b)
    with pytest.raises(ValueError, match=r"y must be integers \[N\] = \[2\]"):
        model.log_prob(x)
    with pytest.raises(ValueError, match=r"y must lie in 0\.\.2"):
        model.sample(2, y=3)


# --- training, records --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain residual", "gated", "gated colour mixture"])
def test_thirty_steps_are_the_same_on_either_backend(name):
    losses = {}
    for backend in ("auto", "reference"):
        with gk.use_backend(backend):
            model = make(name, torch.float32, gain=1.0).train()
            model.dropout.p = 0.0
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            losses[backend] = []
            for _ in range(30):
                loss = model.loss(images(model, 8))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.item())
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-4)
    assert losses["auto"][-1] < losses["auto"][0]


@pytest.mark.parametrize("name", SMALL)
def test_a_model_is_rebuilt_from_its_record(name):
    model = make(name)
    key = next(k for k, cls in models.MODELS.items() if cls is type(model))
    again = models.build(key, **json.loads(json.dumps(model.hparams))).double().eval()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    x = images(model, 2)
    assert torch.equal(again.log_prob(x), model.log_prob(x))


@pytest.mark.parametrize("cls", [models.PixelCNN, models.GatedPixelCNN])
@pytest.mark.parametrize("preset", ["digits", "photos32", "cifar10"])
def test_presets_build(cls, preset):
    with torch.device("meta"):
        model = cls.from_preset(preset)
    assert model.shape[1:] == ((8, 8) if preset == "digits" else (32, 32))


ONE = (1, 28, 28)  # of one channel


@pytest.mark.parametrize(
    ("action", "kind", "sentence"),
    [
        (lambda: models.PixelCNN(shape=(4,)), ValueError, r"PixelCNN: shape must be \(C, H, W\), .* got \(4,\)"),
        (
            lambda: models.PixelCNN(shape=(3, 28, 28), width=64),
            ValueError,
            "width must be a positive multiple of the 3 channels, got 64",
        ),
        (lambda: models.PixelCNN(shape=ONE, layers=-1), ValueError, "layers must be at least 0, got -1"),
        (lambda: models.GatedPixelCNN(shape=ONE, layers=-1), ValueError, "layers must be at least 0, got -1"),
        (lambda: models.PixelCNN(shape=ONE, num_classes=-1), ValueError, "num_classes must be at least 0, got -1"),
        (
            lambda: models.PixelCNN(shape=(0, 8, 8)),
            ValueError,
            r"shape must be .* integers of at least 1, got \(0, 8, 8\)",
        ),
        (
            lambda: models.PixelCNN(shape=ONE, grey_levels=1),
            ValueError,
            "grey_levels must be an integer from 2 to 65536, got 1",
        ),
        (
            lambda: models.GatedPixelCNN(shape=ONE, head="softmax"),
            ValueError,
            "head must be one of categorical, logistic_mixture",
        ),
        (
            lambda: models.GatedPixelCNN(shape=(2, 8, 8), head="logistic_mixture"),
            ValueError,
            "needs 1 or 3 channels, got 2",
        ),
        (
            lambda: models.GatedPixelCNN(shape=ONE, head="logistic_mixture", mixtures=0),
            ValueError,
            "mixtures must be at least 1",
        ),
        (lambda: models.GatedPixelCNN(shape=ONE, kernel_size=4), ValueError, "odd"),
        (lambda: make("plain").log_prob(torch.zeros(2, 1, 4, 4)), ValueError, r"x must be \[N, 1, 5, 4\]"),
        (lambda: make("plain").log_prob(torch.zeros(2, 1, 5, 4).long()), TypeError, "uint8 level indices or floats"),
        (
            lambda: make("plain").log_prob(torch.full((2, 1, 5, 4), 4, dtype=torch.uint8)),
            ValueError,
            r"level indices 0\.\.3",
        ),
        (lambda: make("plain").log_prob(torch.full((2, 1, 5, 4), math.nan)), ValueError, r"floats in \[0, 1\]"),
        (lambda: make("plain").sample(-1), ValueError, "n must be an integer of at least 0"),
        (lambda: make("plain").sample(1, temperature=-1), ValueError, "temperature must be at least 0"),
        (
            lambda: make("plain").inpaint(torch.zeros(2, 1, 5, 4), torch.ones(5, 4)),
            TypeError,
            "known must be a bool tensor",
        ),
        (
            lambda: make("plain").inpaint(torch.zeros(2, 1, 5, 4), torch.ones(4, 5).bool()),
            ValueError,
            "broadcastable to x's shape",
        ),
        (lambda: models.PixelCNN.from_preset("digit"), ValueError, "did you mean digits"),
        (lambda: models.PixelCNN(shape=9), ValueError, r"PixelCNN: shape must be \(C, H, W\), .* got 9"),
        (lambda: models.PixelCNN(shape=ONE, width="x"), ValueError, "PixelCNN: width must be an integer, got 'x'"),
        (lambda: models.PixelCNN(shape=ONE, layers=-1), ValueError, "PixelCNN: layers must be at least 0, got -1"),
        (
            lambda: models.PixelCNN(shape=ONE, grey_levels=2.5),
            ValueError,
            "PixelCNN: grey_levels must be an integer, got 2.5",
        ),
        (
            lambda: models.PixelCNN(shape=ONE, residual="no"),
            ValueError,
            "PixelCNN: residual must be True or False, got 'no'",
        ),
        (
            lambda: models.GatedPixelCNN(shape=ONE, mixtures=1.5),
            ValueError,
            "GatedPixelCNN: mixtures must be an integer, got 1.5",
        ),
        (
            lambda: models.GatedPixelCNN(shape=ONE, kernel_size=(3, 5)),
            ValueError,
            r"kernel_size must be an integer, got \(3, 5\)",
        ),
        (
            lambda: models.GatedPixelCNN(shape=ONE, dropout="x"),
            ValueError,
            "GatedPixelCNN: dropout must be a finite number, got 'x'",
        ),
        (
            lambda: make("plain").sample(1, temperature=None),
            ValueError,
            "temperature must be at least 0 and finite, got None",
        ),
        (lambda: make("plain").sample(1, generator=0), TypeError, "generator must be a torch.Generator or None, got 0"),
        (lambda: make("plain").log_prob([[0.0]]), TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(action, kind, sentence):
    with pytest.raises(kind, match=sentence) as caught:
        action()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_model_tells_all_levels_apart(dtype):
    model = models.GatedPixelCNN(
        shape=(1, 2, 2), grey_levels=4096, width=4, layers=0, head="logistic_mixture", mixtures=1
    ).to(dtype)
    with torch.no_grad():
        model.last.weight.zero_()  # every pixel: one sharp logistic around 7/8
        model.last.bias.copy_(torch.tensor([0.0, 0.875, -7.0]))
    x = torch.arange(3832, 3848).div(4095).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    right = model.float().log_prob(x)
    assert right.unique().numel() == 16
    torch.testing.assert_close(model.to(dtype).log_prob(x), right)


def test_an_empty_batch_has_an_empty_likelihood():
    for name in SMALL:
        model = make(name)
        assert model.log_prob(images(model, 0)).shape == (0,)
        assert model.inpaint(images(model, 0), torch.tensor(True)).shape == model.sample(0).shape == (0, *model.shape)


# --- what looks like a picture and is none ----------------------------------------------------------------------------


def test_a_mask_of_three_dimensions_is_not_guessed_at():
    model = models.PixelCNN(shape=(3, 4, 4), grey_levels=4, width=6, layers=1)
    x, known = torch.zeros(3, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.bool)
    known[0] = True
    with pytest.raises(
        ValueError, match="may be meant for 3 pictures or for their channels, got .*: known.:, None. or"
    ):
        model.inpaint(x, known)
    assert torch.equal(model.inpaint(x, known[:, None], generator=seeded())[0], x[0])
    assert torch.equal(model.inpaint(x, known[None], generator=seeded())[:, 0], x[:, 0])
    assert torch.equal(model.inpaint(x[:2], known, generator=seeded())[:, 0], x[:2, 0])


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["plain", "gated mixture"])
def test_weights_that_are_not_finite_draw_nothing(name, value, hook):
    """A level cannot be NaN, and drawn from NaN it is black; dead taps may hold anything."""
    model = make(name, num_classes=3)
    if hook:
        model.last.register_forward_hook(lambda module, inputs, output: None)
    else:
        first = next(layer for layer in model.modules() if isinstance(layer, gk.nn.MaskedConv2d))
        with torch.no_grad():
            first.weight[~first.mask] = value
    assert torch.isfinite(model.sample(2)).all()
    with torch.no_grad():
        model.last.bias[0] = value
    assert model.sample(2).isnan().all()
    known = torch.zeros(1, *model.shape[1:], dtype=torch.bool)
    known[:, 0] = True
    x = images(model, 2)
    assert torch.equal(model.inpaint(x.double() / (model.grey_levels - 1), known).isnan(), ~known.expand(x.shape))
    with pytest.raises(ValueError, match="every weight must be finite, got one that is not"):
        model.inpaint(x, known)
