"""The launches of log_det_series and invertible_residual, against the definitions in fp64. Accuracy in each type is
held in tests/ops."""

import pytest
import torch

from genkernels._options import Nonlinearity
from genkernels.reference import _block as block_reference
from genkernels.reference import invertible_residual as inverse_reference
from genkernels.reference import log_det_series as series_reference
from genkernels.triton import _block
from genkernels.triton import invertible_residual as inverse
from genkernels.triton import log_det_series as series
from tests.ops import blocks

WORDS = list(Nonlinearity.words())
#: A network, its activation, probes, terms, whether the first is exact, samples.
SERIES = [
    ("mlp", "lipswish", 1, 3, True, 3),
    ("mlp", "clipswish", 3, 2, True, 17),
    ("mlp", "elu", 1, 0, False, 1),
    ("two maps", "clipswish", None, 0, False, 3),
    ("mlp of each", "silu", 1, 2, False, 3),
    ("deep", "tanh", 3, 5, False, 2),
    ("deep", "leaky_relu", 1, 1, False, 2),
    ("wide", "clipswish", 1, 2, True, 2),
    ("3-1-3", "clipswish", 3, 2, True, 3),
    ("3-1-3", "silu", 1, 3, True, 1),
    ("3-3", "relu", 1, 4, False, 2),
    ("3-3", "elu", 3, 1, False, 2),
    ("1-1-1", "tanh", 1, 2, True, 2),
    ("3-1-3 of 2x2", "lipswish", None, 0, False, 3),
    ("3-1-3 of 2x2", "clipswish", 1, 1, True, 3),
    ("1-3-1 of one row", "leaky_relu", 1, 2, False, 2),
]


def close(name, ours, exact, tolerance=1e-11):
    assert (ours.dtype, ours.shape) == (exact.dtype, exact.shape), name
    assert ours.is_contiguous(), name
    error, size = (t.abs().max().item() if t.numel() else 0.0 for t in (ours.cpu() - exact, exact))
    assert error <= tolerance * (size + 1e-30), f"{name}: {error:.2e} of {size:.2e}"


def drawn(name, activation, samples, probes, exact, device):
    """The network's tensors with the trace's map, and the probes."""
    x, weights, biases, parameters = blocks.block(name, activation, samples)
    number = WORDS.index(activation)
    trace = block_reference.trace_map(block_reference.Block(weights, biases, parameters, number)) if exact else None
    generator = torch.Generator().manual_seed(5)
    v = None if probes is None else torch.randn(probes, *x.shape, generator=generator, dtype=x.dtype)
    return [x, weights, biases, parameters, trace, v], number


def moved(values, device):
    def one(value):
        return [one(v) for v in value] if isinstance(value, list) else value if value is None else value.to(device)

    return [one(value) for value in values]


@pytest.mark.parametrize(("name", "activation", "probes", "count", "exact", "samples"), SERIES)
def test_series_and_its_gradient(device, name, activation, probes, count, exact, samples):
    terms = [1.0, 2.0, 0.5, 1.0, 3.0][:count]
    net, number = drawn(name, activation, samples, probes, exact, device)
    exactly = series_reference.log_det_series(*net, terms, number)
    ours = series.log_det_series(*moved(net, device), terms, number)
    for label, a, b in zip(("value", "log_det", "sums", "shrink"), ours, exactly, strict=True):
        close(label, a, b)
    x, sums = net[0], exactly[2]
    grads = torch.randn_like(x), torch.randn(samples, dtype=x.dtype)
    for given in (grads, (grads[0], None), (None, grads[1])) if count == 2 else (grads,):
        arguments = [*given, *net, sums]
        rest = (terms[0] if terms else 0.0, number)
        exactly = series_reference.log_det_series_backward(*arguments, *rest)
        ours = series.log_det_series_backward(*moved(arguments, device), *rest)
        for i, (a, b) in enumerate(zip(ours, exactly, strict=True)):
            close(f"gradient {i}", a, b)


@pytest.mark.parametrize("name", ["mlp", "3-1-3"])
@pytest.mark.parametrize("probes", [None, 2])
def test_no_samples(device, name, probes):
    if probes is None and name == "3-1-3":
        name = "3-1-3 of 2x2"
    net, number = drawn(name, "elu", 0, probes, probes is not None, device)
    terms = [1.0] if probes else []
    value, log_det, sums, shrink = series.log_det_series(*moved(net, device), terms, number)
    lead = net[0].shape[1:].numel() if probes is None else probes
    assert (value.shape, sums.shape) == (net[0].shape, (lead, *net[0].shape))
    assert (log_det.shape, shrink.shape) == ((0,), (lead, 0))
    given = moved([value, log_det, *net, sums], device)
    for grad, like in zip(
        series.log_det_series_backward(*given, 1.0, number),
        (net[0], *net[1], *net[2], net[3], *([] if net[4] is None else [net[4]])),
        strict=True,
    ):
        assert grad.shape == like.shape and not grad.count_nonzero()
    found = inverse.invertible_residual(value, None, *moved(net[1:4], device), 0.0, 1e-6, 9, 5, number)
    assert [t.shape for t in found] == [value.shape, (0,), (0,), (0,)]
    assert [t.dtype for t in found[1:]] == [torch.float64, torch.int64, torch.bool]


@pytest.mark.parametrize(
    ("name", "activation", "depth", "most", "start", "rtol"),
    [
        ("mlp", "lipswish", 5, 200, False, 0.0),
        ("mlp", "tanh", 0, 200, True, 1e-9),
        ("deep", "elu", 1, 200, False, 0.0),
        ("two maps", "relu", 3, 4, False, 0.0),
        ("3-1-3 of 2x2", "clipswish", 5, 200, False, 0.0),
        ("3-3", "lipswish", 2, 200, True, 1e-9),
        ("3-1-3", "silu", 5, 3, False, 0.0),
    ],
)
def test_inverse_and_its_gradient(device, name, activation, depth, most, start, rtol):
    """The same iterations as the definition's."""
    y, *net = blocks.block(name, activation, 3)
    net.append(WORDS.index(activation))
    y[1] = 4 * y[1]  # each sample has iterations of its own
    begin = torch.randn_like(y) if start else None
    options = (rtol, 1e-10, most, depth)
    exact = inverse_reference.invertible_residual(y, begin, *net[:3], *options, net[3])
    ours = inverse.invertible_residual(*moved([y, begin, *net[:3]], device), *options, net[3])
    close("x", ours[0], exact[0], 1e-8)
    assert torch.equal(ours[2].cpu(), exact[2]) and torch.equal(ours[3].cpu(), exact[3])
    torch.testing.assert_close(ours[1].cpu(), exact[1], rtol=1e-3, atol=1e-12)
    if most < 100:
        return
    grad = torch.randn_like(y)
    exactly = inverse_reference.invertible_residual_backward(grad, exact[0], *net[:3], *options, net[3])
    given = moved([grad, exact[0], *net[:3]], device)
    for i, (a, b) in enumerate(
        zip(inverse.invertible_residual_backward(*given, *options, net[3]), exactly, strict=True)
    ):
        close(f"gradient {i}", a, b, 1e-7)


@pytest.mark.parametrize(("name", "spoilt"), [("mlp", float("nan")), ("mlp", float("inf")), ("3-3", float("nan"))])
def test_a_spoilt_sample_ends_at_once_and_alone(device, name, spoilt):
    y, *net = blocks.block(name, "lipswish", 3)
    clean = moved([y, None, *net], device)
    y = y.clone()
    y[1].view(-1)[0] = spoilt
    options = (0.0, 1e-10, 200, 5, WORDS.index("lipswish"))
    ours, others = (inverse.invertible_residual(*given, *options) for given in (moved([y, None, *net], device), clean))
    assert ours[2][1] == 1 and ours[1][1].isnan() and not ours[3][1]
    for a, b in zip(ours, others, strict=True):
        assert torch.equal(a[::2], b[::2])


def test_tiles_of_a_class_of_pixels_hold_each_pixel_once():
    """In fp64 on the CPU: the classes' tiles add up to the rows."""
    x, *net = blocks.block("3-1-3", "elu", 3)
    network = _block.Network(x, *net, WORDS.index("elu"))
    assert sum(_block.class_tile_count(network, 9, 1)) == network.rows == 60


def test_parts_of_a_sum_are_cut_by_shape_alone():
    assert _block.splits(4, 1, 32) == (1, 1)
    for rows, programs in ((784 * 256, 5), (1 << 33, 100), (1025, 1)):
        parts, steps = _block.splits(rows, programs, 32)
        assert parts * steps * 32 >= rows > (parts - 1) * steps * 32


@pytest.mark.parametrize("name", ["mlp", "3-1-3"])
def test_the_same_bits_each_time(device, name):
    net, number = drawn(name, "lipswish", 5, 1, True, device)
    net = moved(net, device)

    def run():
        value, log_det, sums, shrink = series.log_det_series(*net, [1.0, 1.0], number)
        return [value, log_det, *series.log_det_series_backward(value, log_det, *net, sums, 1.0, number)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
