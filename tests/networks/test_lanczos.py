import math

import pytest
import torch
from torch import nn

from genkernels.networks.operator_norm import lanczos
from genkernels.reference.spectral_norm import CONVOLUTION, MATRIX, Geometry, apply, apply_transpose
from tests.networks.layers import SAME, norm2d


def warm(weight, g, v_shape, u_shape):
    """The leading triplet's u and v, from a long run."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    u, v = torch.zeros(u_shape, dtype=dtype), torch.randn(v_shape, dtype=dtype)
    return lanczos(weight, g, u, v, tolerance=1e-6, products=301)[1:3]


def residual_of(weight, g, found):
    return float(torch.linalg.vector_norm(apply_transpose(weight, g, found.u, found.v.shape) - found.sigma * found.v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_follows_a_drifting_weight(dtype):
    weight, size = torch.randn(8, 8, 3, 3, dtype=dtype), (8, 8)
    u, v = warm(weight, SAME, (8, *size), (8, *size))
    for _ in range(6):
        weight = weight + 1e-3 * torch.randn_like(weight)
        found = lanczos(weight, SAME, u, v)
        norm = norm2d(weight.double(), size)
        assert 1 - 1e-3 <= float(found.sigma) / norm <= 1 + 1e-6
        assert found.used <= 25 and found.residual <= 1e-3 * found.sigma
        assert float(found.residual) == pytest.approx(residual_of(weight, SAME, found), abs=1e-5 * norm)
        u, v = found.u, found.v
        assert u.dtype == v.dtype == dtype and float(v.norm()) == pytest.approx(1) == float(u.norm())
        assert float((u * apply(weight, SAME, v, u.shape)).sum()) == pytest.approx(float(found.sigma), rel=1e-5)


def test_it_spends_what_it_must_and_reports_what_is_left():
    weight = torch.randn(200, 300, dtype=torch.float64)
    norm, last = float(torch.linalg.matrix_norm(weight, 2)), 0.0
    for products in (3, 9, 25, 101):
        found = lanczos(weight, Geometry(MATRIX), torch.zeros(200), torch.randn(300), products=products)
        assert found.used <= products and last < float(found.sigma) <= norm * (1 + 1e-12)
        assert float(found.residual) == pytest.approx(residual_of(weight, Geometry(MATRIX), cast(found)), abs=1e-5)
        last = float(found.sigma)
    assert last > (1 - 1e-3) * norm


def cast(found):
    return found._replace(u=found.u.double(), v=found.v.double())


def test_a_settled_triplet_costs_two_products():
    weight = torch.randn(20, 30)
    u, v = warm(weight, Geometry(MATRIX), (30,), (20,))
    assert lanczos(weight, Geometry(MATRIX), u, v).used == 2


@pytest.mark.parametrize("shape", [(40, 5), (5, 40), (3, 3), (1, 6), (6, 1), (1, 1)])
def test_spaces_smaller_than_the_number_of_steps(shape):
    weight = torch.randn(*shape)
    u, v = torch.zeros(shape[0]), torch.randn(shape[1])
    found = lanczos(weight, Geometry(MATRIX), u, v, tolerance=0.0, products=61)
    assert float(found.sigma) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-5)
    assert found.used < 61 and found.residual <= 1e-4 * found.sigma


def test_a_matrix_of_rank_one():
    a, b = torch.randn(30), torch.randn(20)
    found = lanczos(torch.outer(a, b), Geometry(MATRIX), torch.zeros(30), torch.randn(20), tolerance=0.0)
    assert float(found.sigma) == pytest.approx(float(a.norm() * b.norm()), rel=1e-5) and found.used <= 8
    assert abs(float(found.v @ b)) == pytest.approx(float(b.norm()), rel=1e-5)


def test_a_singular_value_that_repeats():
    q = torch.linalg.qr(torch.randn(30, 30)).Q
    found = lanczos(3 * q, Geometry(MATRIX), torch.zeros(30), torch.randn(30), tolerance=0.0)
    assert float(found.sigma) == pytest.approx(3, rel=1e-5) and found.used <= 8
    values = torch.tensor([2.0] * 10 + [1.0] * 20)
    found = lanczos(q * values, Geometry(MATRIX), torch.zeros(30), torch.randn(30), tolerance=0.0)
    assert float(found.sigma) == pytest.approx(2, rel=1e-5) and found.used <= 12


def test_a_cold_start_leaves_a_space_without_the_leading_vector():
    diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    found = lanczos(diagonal, Geometry(MATRIX), torch.zeros(3), torch.eye(3)[1])
    assert float(found.sigma) == pytest.approx(3, rel=1e-5)
    weight = torch.cat([torch.randn(4, 4, 3, 3), 3 * torch.randn(4, 4, 3, 3)])
    g, v = SAME._replace(groups=2), torch.randn(8, 6, 6)
    v[4:] = 0  # within the first group
    found = lanczos(weight, g, torch.zeros(8, 6, 6), v, products=61)
    assert float(found.sigma) == pytest.approx(norm2d(weight, (6, 6), g), rel=1e-3)
    for start in (torch.zeros(3), torch.full((3,), math.nan), torch.full((3,), math.inf)):
        assert float(lanczos(diagonal, Geometry(MATRIX), start, start).sigma) == pytest.approx(3, rel=1e-5)


def test_weights_without_a_direction_leave_u_and_v():
    u, v = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    weight = torch.zeros(2, 2, 3, 3)
    found = lanczos(weight, SAME, u, v)
    assert found.sigma == 0 and found.residual == 0 and found.used == 0 and found.u is u and found.v is v
    for bad in (math.nan, math.inf):
        weight[1, 0, 2, 2] = bad
        found = lanczos(weight, SAME, u, v)
        assert found.sigma.isnan() and found.residual.isnan() and found.u is u and found.v is v
    unseen = torch.tensor([[[1.0, 0.0, 1.0]]])  # an input of one element meets the tap of 0 only
    u, v = torch.randn(1, 1), torch.randn(1, 1)
    found = lanczos(unseen, Geometry(CONVOLUTION, padding=(0, 0, 1)), u, v)
    assert found.sigma == 0 and found.u is u and found.v is v


def test_halves_are_computed_in_fp32():
    weight = torch.randn(8, 8, 3, 3).bfloat16()
    u, v = torch.zeros(8, 7, 7).bfloat16(), torch.randn(8, 7, 7).bfloat16()
    found = lanczos(weight, SAME, u, v, products=101)
    assert found.sigma.dtype == torch.float32 and found.u.dtype == found.v.dtype == torch.bfloat16
    assert float(found.sigma) == pytest.approx(norm2d(weight.float(), (7, 7)), rel=1e-3)


def test_autocast_changes_nothing():
    weight, u, v = torch.randn(8, 8, 3, 3), torch.zeros(8, 7, 7), torch.randn(8, 7, 7)
    plain = lanczos(weight, SAME, u, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lanczos(weight, SAME, u, v).sigma, plain.sigma)


def test_no_graph_and_the_same_bits():
    weight, u, v = nn.Parameter(torch.randn(6, 9)), torch.randn(6), torch.randn(9)
    before = torch.get_rng_state()
    first, second = (lanczos(weight, Geometry(MATRIX), u, v) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.sigma.requires_grad and not first.v.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def test_what_lanczos_refuses():
    weight, u, v = torch.randn(4, 2, 3, 3), torch.randn(4, 5, 5), torch.randn(2, 5, 5)
    with pytest.raises(ValueError, match=r"lanczos: v must be \[C, \*size\] = \[2, …, …\], got \[4, 5, 5\]"):
        lanczos(weight, SAME, u, u)
    with pytest.raises(ValueError, match=r"lanczos: u must be \[M\] = \[4\], got \[5\]"):
        lanczos(torch.randn(4, 5), Geometry(MATRIX), torch.randn(5), torch.randn(5))
    with pytest.raises(ValueError, match="lanczos: products must be an integer of at least 3, got 2"):
        lanczos(weight, SAME, u, v, products=2)
    with pytest.raises(TypeError, match="lanczos: weight must be"):
        lanczos(weight.int(), SAME, u, v)
