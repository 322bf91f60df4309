import math

import pytest
import torch
from torch import nn

from genkernels.networks import _cyclic, _norm_bounds, operator_norm
from genkernels.networks._geometry import usual_output
from genkernels.networks.operator_norm import bracket, geometry_of, sizes_of, upper_bound
from genkernels.reference.spectral_norm import (
    CIRCULAR,
    CONVOLUTION,
    MATRIX,
    Geometry,
    _behind,
    apply,
    apply_transpose,
    outer,
)
from tests.networks.layers import SAME, convolutions, kind_of, matrix_of, norm2d, norm_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.fixture(params=["written out", "cyclic", "cyclic with few frequencies"])
def way(request, monkeypatch):
    """All ways to bound a convolution, for the small ones of these tests too."""
    if request.param != "written out":
        monkeypatch.setattr(_norm_bounds, "DENSE_WORK", 0)
    if "few" in request.param:
        monkeypatch.setattr(_cyclic, "POINTS_PER_DEGREE", 3)
    return request.param


# ------------------------------------------------------------------------------------------------- maps and geometries


def test_the_maps_are_those_of_the_layers_and_their_gradients():
    kinds, unread = set(), 0
    for layer, size in convolutions(150):
        g, (v_shape, u_shape) = geometry_of(layer), sizes_of(layer, size)
        x = torch.randn(v_shape, dtype=torch.float64, requires_grad=True)
        u = torch.randn(u_shape, dtype=torch.float64)
        y = layer(x[None])[0]
        by_x, by_weight = torch.autograd.grad((y * u).sum(), (x, layer.weight))
        w, v = layer.weight.detach(), x.detach()
        torch.testing.assert_close(apply(w, g, v, u_shape), y.detach(), msg=str(layer))
        torch.testing.assert_close(apply_transpose(w, g, u, v_shape), by_x, msg=str(layer))
        torch.testing.assert_close(outer(w, g, u, v), by_weight, msg=str(layer))
        kinds.add(kind_of(layer))
        inner, outputs = (u_shape, v_shape) if g.transposed else (v_shape, u_shape)
        unread += min(_behind(w, g, inner[1:], outputs[1:])) < 0
    assert len(kinds) == 6 and unread > 10  # the last inputs


def test_outputs_that_see_padding_alone():
    layer = nn.Conv1d(1, 1, 1, stride=5, padding=2, bias=False)
    g, w, x, u = geometry_of(layer), layer.weight.detach(), torch.ones(1, 1), torch.ones(1, 1)
    assert sizes_of(layer, (1,)) == ((1, 1), (1, 1)) and layer(x[None]).item() == 0
    assert apply(w, g, x, (1, 1)).item() == apply_transpose(w, g, u, (1, 1)).item() == outer(w, g, u, x).item() == 0
    assert [float(end) for end in bracket(w, g, (1,), (1,))] == [0, 0]


def test_a_transposed_circular_convolution_is_the_transpose():
    for layer, size in convolutions(40, seed=1):
        g, (v_shape, u_shape) = geometry_of(layer), sizes_of(layer, size)
        other = g._replace(transposed=not g.transposed)
        u, v = torch.randn(u_shape, dtype=torch.float64), torch.randn(v_shape, dtype=torch.float64)
        w = layer.weight.detach()
        torch.testing.assert_close(apply(w, other, u, v_shape), apply_transpose(w, g, u, v_shape))
        torch.testing.assert_close(outer(w, other, v, u), outer(w, g, u, v))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_maps_of_a_matrix(axis):
    w = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    g = Geometry(MATRIX, axis)
    u, v = torch.randn(w.shape[axis], dtype=torch.float64), torch.randn(60 // w.shape[axis], dtype=torch.float64)
    (u * apply(w, g, v, u.shape)).sum().backward()
    torch.testing.assert_close(outer(w.detach(), g, u, v), w.grad)
    torch.testing.assert_close(apply_transpose(w, g, u, v.shape), w.movedim(axis, 0).flatten(1).t() @ u)


def test_a_linear_layer():
    layer = nn.Linear(5, 3)
    assert geometry_of(layer) == Geometry(MATRIX) and sizes_of(layer) == ((5,), (3,))


# ------------------------------------------------------------------------------------------------------------ brackets


def test_brackets_hold_the_norm(way):
    kinds = set()
    for layer, size in convolutions(100, seed=2):
        g, (_, u_shape), norm = geometry_of(layer), sizes_of(layer, size), norm_of(layer, size)
        low, high = bracket(layer.weight, g, size, u_shape[1:])
        assert low <= norm * (1 + 1e-14) and norm <= high * (1 + 1e-14), (layer, size)
        assert low >= 0.99 * norm, (layer, size)
        if way == "written out":
            assert high <= norm * (1 + 1e-9), (layer, size)
        kinds.add(kind_of(layer))
    assert len(kinds) == 6


def test_without_an_output_size_the_bound_holds_for_any_padding_behind(way):
    for layer, size in convolutions(60, seed=3):
        g, norm = geometry_of(layer), norm_of(layer, size)
        if min(usual_output(layer.weight, g, size)) < 1:
            continue  # as much padding behind as before is too little
        low, high = bracket(layer.weight, g, size)
        assert low <= high and norm <= high * (1 + 1e-14), (layer, size)


@pytest.mark.parametrize(
    "size, channels, most",
    [
        ((8, 8), (1, 1), 1.1),
        ((8, 8), (6, 6), 1.1),
        ((11, 9), (3, 8), 1.05),
        ((11, 9), (8, 3), 1.05),
        ((16, 16), (1, 1), 1.03),
        ((16, 16), (4, 4), 1.03),
    ],
)
def test_the_bound_is_tight_for_random_kernels_padded_by_zeros(size, channels, most, monkeypatch):
    monkeypatch.setattr(_norm_bounds, "DENSE_WORK", 0)
    for seed in range(3):
        weight = torch.randn(*channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for w in (weight, weight.abs()):  # the norms of the latter are reached at frequency 0
            assert 1 - 1e-12 <= float(upper_bound(w, SAME, size)) / norm2d(w, size) <= most


@pytest.mark.parametrize("stride, kernel, transposed", [(2, 3, False), (2, 4, False), (2, 4, True), (3, 3, True)])
def test_the_bound_is_tight_for_strides(stride, kernel, transposed, monkeypatch):
    monkeypatch.setattr(_norm_bounds, "DENSE_WORK", 0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    for _ in range(3):
        layer = kind(4, 6, kernel, stride, 1, bias=False, dtype=torch.float64)
        size = (6, 6) if transposed else (16, 16)
        (_, u_shape), norm = sizes_of(layer, size), norm_of(layer, size)
        assert norm <= float(upper_bound(layer.weight, geometry_of(layer), size, u_shape[1:])) <= 1.1 * norm


@pytest.mark.parametrize("stride, size", [(1, (8, 8)), (1, (5, 9)), (2, (8, 6)), (3, (9, 6))])
def test_circular_padding_is_exact_where_the_stride_divides_the_size(stride, size, monkeypatch):
    monkeypatch.setattr(_norm_bounds, "DENSE_WORK", 0)
    layer = nn.Conv2d(3, 4, 3, stride, 1, padding_mode="circular", bias=False, dtype=torch.float64)
    norm, (_, u_shape) = norm_of(layer, size), sizes_of(layer, size)
    high = float(upper_bound(layer.weight, geometry_of(layer), size, u_shape[1:]))
    assert 1 - 1e-12 <= high / norm <= 1 + _norm_bounds.TOLERANCE


def test_a_kernel_of_one_tap_has_the_norm_of_its_matrix(monkeypatch):
    monkeypatch.setattr(_norm_bounds, "DENSE_WORK", 0)
    weight = torch.randn(5, 7, 1, 1, dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(weight[..., 0, 0], 2))
    assert norm <= float(upper_bound(weight, Geometry(CONVOLUTION), (64, 64))) <= norm * 1.0006


def test_a_kernel_whose_other_taps_only_see_zeros(monkeypatch):
    monkeypatch.setattr(_norm_bounds, "DENSE_WORK", 0)
    weight = torch.randn(5, 7, 3, 3, dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(weight[..., 1, 1], 2))
    assert norm <= float(upper_bound(weight, SAME, (1, 1), (1, 1))) <= norm * 1.0006
    dead = Geometry(CONVOLUTION, padding=(1, 1, 3))
    assert float(upper_bound(torch.ones(1, 1, 2), dead, (1,), (2,))) == 0


def test_long_axes_cost_no_more_and_lose_little():
    weight = torch.randn(4, 4, 9, dtype=torch.float64)
    g = Geometry(CONVOLUTION, padding=(0, 0, 4))
    long, longer = (float(upper_bound(weight, g, (n,))) for n in (10_000, 1_000_000))
    low, high = bracket(weight, g, (10_000,))
    assert long == longer == float(high) and high <= 1.02 * low


def test_what_would_take_much_work_takes_fewer_frequencies_in_one_place_and_fewer_products(monkeypatch):
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    monkeypatch.setattr(_norm_bounds, "DENSE_WORK", 0)
    monkeypatch.setattr(_norm_bounds, "BATCH", 1)  # of 16 Gram matrices each
    largest, lanczos, places, products = _norm_bounds._largest_eigenvalue, operator_norm.lanczos, [], []

    def look(grams, enough):
        batches = [(batch.data_ptr(), len(batch)) for batch in grams]
        places.append(({at for at, _ in batches}, sum(n for _, n in batches)))
        return largest(grams, enough)

    def search(*arguments, **options):
        products.append(options["products"])
        return lanczos(*arguments, **options)

    monkeypatch.setattr(_norm_bounds, "_largest_eigenvalue", look)
    monkeypatch.setattr(operator_norm, "lanczos", search)
    monkeypatch.setattr(_norm_bounds, "FURTHER_WORK", 0)  # a single cyclic convolution
    small = bracket(weight, SAME, (64, 64))
    monkeypatch.setattr(_norm_bounds, "MUCH_WORK", 0)
    monkeypatch.setattr(operator_norm, "PRODUCT_WORK", 0)
    large = bracket(weight, SAME, (64, 64))
    (at, many), (_, few) = places
    assert len(at) == 1 and many == 34 * 17 and few == 24 * 12
    assert products == [80, 40]
    assert small.low <= small.high <= 1.01 * small.low
    assert large.low <= small.high and small.low <= large.high <= 1.02 * small.high


def test_groups_have_the_largest_of_their_norms(monkeypatch):
    monkeypatch.setattr(_norm_bounds, "DENSE_WORK", 0)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    each = [float(upper_bound(part, SAME, (9, 9))) for part in weight.chunk(3)]
    together = float(upper_bound(weight, SAME._replace(groups=3), (9, 9)))
    assert together == pytest.approx(max(each), rel=_norm_bounds.TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 7), (300, 40), (2, 3, 4)])
def test_a_matrix_has_its_own_norm(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(weight.flatten(1), 2))
    low, high = bracket(weight, Geometry(MATRIX))
    assert low <= norm <= high * (1 + 1e-14) and high <= norm * (1 + 1e-9) and low >= 0.995 * norm


def test_matrices_too_large_for_their_eigenvalues(monkeypatch):
    monkeypatch.setattr(_norm_bounds, "EXACT", 8)
    for shape in ((60, 90), (90, 60)):
        weight = torch.randn(*shape, dtype=torch.float64)
        norm = float(torch.linalg.matrix_norm(weight, 2))
        assert norm <= float(upper_bound(weight, Geometry(MATRIX))) <= norm * 1.0006


@pytest.mark.parametrize("dtype, scale", [(torch.float64, 1e200), (torch.float64, 1e-200), (torch.bfloat16, 1e30)])
def test_brackets_of_extreme_scales(way, dtype, scale):
    weight = (torch.randn(3, 3, 3, 3) * 8).round().to(dtype)
    plain, scaled = (bracket(w, SAME, (8, 8)) for w in (weight, weight * scale))
    factor = float((weight * scale).abs().max().double() / weight.abs().max().double())
    for one, other in zip(plain, scaled, strict=True):
        assert other.dtype == torch.float64 and float(other) == pytest.approx(float(one) * factor, rel=1e-2)
    assert 0 < scaled.low <= scaled.high


def test_brackets_of_zeros_and_of_what_is_not_finite(way):
    for weight, g, size in ((torch.zeros(2, 2, 3, 3), SAME, (4, 4)), (torch.zeros(2, 3), Geometry(MATRIX), ())):
        assert [float(end) for end in bracket(weight, g, size)] == [0, 0]
        weight.view(-1)[1] = math.inf
        assert all(math.isnan(end) for end in bracket(weight, g, size))


def test_a_second_call_gives_the_same_bits_and_no_generator_moves():
    weight = torch.randn(8, 4, 3, 3)
    before = torch.get_rng_state()
    first = bracket(weight, SAME, (12, 12))
    torch.rand(7)
    torch.set_rng_state(before)
    second = bracket(weight, SAME, (12, 12))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_bounds_refuse():
    weight, matrix = torch.randn(4, 4, 3, 3), torch.randn(4, 5)
    for call in (upper_bound, bracket):
        for size in ((8,), (8, 8, 8), (8, 0), (8, -1), (8, 8.0), 8, ()):
            with pytest.raises(ValueError, match="size must be 2 integers of at least 1, the input's without channels"):
                call(weight, SAME, size)
        with pytest.raises(ValueError, match=r"size must be \(\), a matrix having none, got \(8,\)"):
            call(matrix, Geometry(MATRIX), (8,))
        with pytest.raises(ValueError, match=r"the kernel must fit into the padded input, got kernel \[3, 3\]"):
            call(weight, Geometry(CONVOLUTION), (8, 2))
        with pytest.raises(ValueError, match="the kernel must fit into the padded input"):
            call(weight, Geometry(CONVOLUTION, transposed=True, padding=(0, 2, 2)), (1, 1))
        with pytest.raises(ValueError, match="circular padding must be at most the input's size, got padding"):
            call(weight, Geometry(CIRCULAR, padding=(0, 3, 3)), (2, 8))
        with pytest.raises(ValueError, match="out must be 2 integers of at least 1, the output's without channels"):
            call(weight, SAME, (8, 8), (8,))
        with pytest.raises(ValueError, match="out must be no more than circular padding by one turn gives"):
            call(weight, Geometry(CIRCULAR, padding=(0, 1, 1)), (4, 4), (9, 4))
        with pytest.raises(TypeError, match="weight must be float64, float32, bfloat16 or float16, got torch.int64"):
            call(weight.long(), SAME, (8, 8))
        with pytest.raises(ValueError, match="a convolution must have 3 to 5 axes, got shape"):
            call(matrix, SAME, (8, 8))
        with pytest.raises(ValueError, match="a matrix must have 2 axes or more, got shape"):
            call(matrix[0], Geometry(MATRIX), ())
        with pytest.raises(ValueError, match="first axis must be a multiple of the 3 groups, got 4"):
            call(weight, SAME._replace(groups=3), (8, 8))


def test_what_layers_refuse():
    with pytest.raises(TypeError, match="layer must be a Linear, a Conv1d to Conv3d or .*, got BatchNorm2d"):
        geometry_of(nn.BatchNorm2d(3))
    for mode in ("reflect", "replicate"):
        with pytest.raises(ValueError, match=f"padding_mode must be zeros or circular, got '{mode}'"):
            geometry_of(nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode))
        assert geometry_of(nn.Conv2d(3, 3, 3, padding_mode=mode)) == Geometry(CONVOLUTION)  # nothing is padded
    with pytest.raises(ValueError, match="sizes_of: size must be 1 integer of at least 1"):
        sizes_of(nn.Conv1d(3, 3, 3), (8, 8))


def test_a_matrix_of_a_layer_is_what_the_layer_does():
    layer = nn.Conv1d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(matrix_of(layer, (6,)) @ x.flatten(), layer(x[None]).flatten().detach())
