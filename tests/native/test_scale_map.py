"""csrc/common/scale_map.h against scipy and mpmath: the one header that g++ and nvcc both compile."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from scipy import special

from genkernels import backends
from tests.native.native_build import binding

np.seterr(all="ignore")
F32, F64 = np.float32, np.float64
PARTS = ("log_scale", "scale", "slope")
MAPS = ("exp", "sigmoid", "tanh")
SPECIAL = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-40,
    -1e-40,
    1.17549435e-38,
    88.0,
    -88.0,
    88.72,
    -87.4,
    89.0,
    -89.0,
    103.0,
    -103.97,
    104.0,
    -104.0,
    200.0,
    -200.0,
    1e4,
    -1e4,
    3e38,
    -3e38,
    0.625,
    -0.625,
    -2.0,
    -1.9999999,
]


def variants() -> list[str]:
    """The build for this processor, and the one without its extensions: no fused multiply-add, other roundings."""
    best = backends.cpu_variant()
    return ["plain", best] if best in ("avx512", "avx2") else ["plain"]


@pytest.fixture(params=variants())
def module(request):
    return binding(request.param)


def grid(dtype) -> np.ndarray:
    """Dense where the maps bend, every binade from the denormals to the largest number, both signs, and the odd
    values."""
    binades = np.ldexp(np.linspace(1, 2, 37)[None, :-1], np.arange(-149, 128)[:, None]).ravel()
    values = np.concatenate([np.linspace(-12, 12, 200_001), np.linspace(-110, 95, 200_003), binades, -binades, SPECIAL])
    return values.astype(dtype)


def exact(name: str, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log scale, scale and slope of fp32 numbers, in fp64.

    sigmoid's argument s + 2 is rounded to fp32 first: the map is a function of that number, in the reference too, and
    at u = 80 the rounding of u alone moves e^−u by 32 units in the last place.
    """
    if name == "exp":
        wide = s.astype(F64)
        return wide, np.exp(wide), np.ones_like(wide)
    if name == "sigmoid":
        u = (s + F32(2)).astype(F64)
        return special.log_expit(u), special.expit(u), special.expit(-u)
    wide = s.astype(F64)
    return np.tanh(wide), np.exp(np.tanh(wide)), 1 / np.cosh(np.minimum(np.abs(wide), 300)) ** 2


def ulps(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|found − truth| in units of the last place of the truth; 0 where both are the same infinity."""
    rounded = truth.astype(found.dtype)
    finite = np.isfinite(rounded)
    distance = np.abs(found.astype(F64) - truth) / np.spacing(np.abs(np.where(finite, rounded, 1))).astype(F64)
    return np.where(finite, distance, np.where(found == rounded, 0, np.inf))


@pytest.mark.parametrize("way", ["vectorize", "loop"])
@pytest.mark.parametrize("name", MAPS)
def test_float32(module, name, way):
    s = grid(F32)
    truth = exact(name, s)
    if way == "loop":
        found = getattr(module, f"{name}_float32_loop")(s)
    else:
        found = [getattr(module, f"{name}_float32_{part}")(s) for part in PARTS]
    for part, value, wanted in zip(PARTS, found, truth, strict=True):
        assert value.dtype == F32
        off = ulps(value, wanted)
        worst = off.argmax()
        limit = 4 if part != "slope" else 5
        assert off[worst] <= limit, (
            f"{name} {part} at s = {s[worst]!r}: {value[worst]!r}, true {wanted[worst]!r}, {off[worst]:.1f} ulp"
        )


def exact_mpmath(name: str, s: float) -> tuple:
    s = mpmath.mpf(s)
    if name == "exp":
        return s, mpmath.exp(s), mpmath.mpf(1)
    if name == "sigmoid":
        e = mpmath.exp(-s)  # s is the rounded s + 2
        return -mpmath.log1p(e), 1 / (1 + e), e / (1 + e)
    return mpmath.tanh(s), mpmath.exp(mpmath.tanh(s)), mpmath.sech(s) ** 2


@pytest.mark.parametrize("name", MAPS)
def test_float64(module, name):
    rng = np.random.default_rng(0)
    tiny = [0.0, -0.0, 5e-324, -5e-324]
    s = np.concatenate([np.linspace(-9, 9, 401), rng.uniform(-700, 700, 400), rng.normal(size=200) * 1e-8, tiny])
    argument = s + 2 if name == "sigmoid" else s
    with mpmath.workdps(60):
        truths = [exact_mpmath(name, float(a)) for a in argument]
        for i, part in enumerate(PARTS):
            found = getattr(module, f"{name}_float64_{part}")(s)
            assert found.dtype == F64
            for at, value, truth in zip(s, found, (t[i] for t in truths), strict=True):
                off = abs(mpmath.mpf(float(value)) - truth) / float(np.spacing(abs(float(truth))))
                assert off <= 4, (
                    f"{name} {part} at {at!r}: {value!r}, true {mpmath.nstr(truth, 20)}, {float(off):.1f} ulp"
                )


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("way", ["vectorize", "loop"])
def test_infinities_and_nan(module, dtype, way):
    """The limits of each map, exactly; NaN gives NaN wherever the function depends on its argument."""
    inf = np.inf
    limits = {
        ("exp", inf): (inf, inf, 1),
        ("exp", -inf): (-inf, 0, 1),
        ("sigmoid", inf): (0, 1, 0),
        ("sigmoid", -inf): (-inf, 0, 1),
        ("tanh", inf): (1, np.exp(1.0), 0),
        ("tanh", -inf): (-1, np.exp(-1.0), 0),
    }
    # a lane's neighbours in a vector must not matter: each odd value stands among ordinary ones, at every place
    for (name, s), wanted in limits.items():
        for values in (np.full(37, s), np.where(np.arange(37) % 5 == 0, s, 0.5)):
            for part, value, limit in zip(PARTS, call(module, name, dtype, way, values), wanted, strict=True):
                at = values == s
                if np.isfinite(limit) and limit not in (0, 1, -1):
                    np.testing.assert_array_almost_equal_nulp(value[at], np.full(at.sum(), limit, dtype), 2)
                else:
                    assert (value[at] == limit).all(), f"{name} {part}({s}) = {value[at]}"
    for name in MAPS:
        values = np.where(np.arange(37) % 3 == 0, np.nan, 0.5)
        for part, value in zip(PARTS, call(module, name, dtype, way, values), strict=True):
            if (name, part) != ("exp", "slope"):  # constant
                assert (np.isnan(value) == np.isnan(values)).all(), f"{name} {part}(nan) = {value}"


def call(module, name, dtype, way, values):
    values = values.astype(dtype)
    if way == "loop":
        return getattr(module, f"{name}_{np.dtype(dtype).name}_loop")(values)
    return [getattr(module, f"{name}_{np.dtype(dtype).name}_{part}")(values) for part in PARTS]


#: The maps of other libraries as mpmath writes log σ, from s and c.
OTHERS = {
    "sigmoid_floor": lambda s, c: mpmath.log(1 / (1 + mpmath.exp(-(s + 2))) + c),
    "softplus_floor": lambda s, c: mpmath.log((mpmath.log1p(mpmath.exp(s)) if s <= 20 else s) + c),
    "sigmoid_inverse": lambda s, c: mpmath.log1p(mpmath.exp(-(s + 2))),
    "atan": lambda s, c: c * mpmath.atan(s),
    "soft_clip": lambda s, c: s / (1 + abs(s) / c),
    "tanh": lambda s, c: c * mpmath.tanh(s),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", OTHERS)
def test_the_maps_of_other_libraries(module, name, dtype):
    """log σ and σ to the rounding of what they are made of, the slope by mpmath's derivative."""
    c = float(dtype(0.3))
    s = np.concatenate([np.linspace(-30.5, 29.5, 61), [2.5e-3, 0.4, 0.42, 0.66, -0.5, 2.41, 2.42, -1e4, 1e4]]).astype(
        dtype
    )
    found = getattr(module, f"{name}_{np.dtype(dtype).name}_loop")(s, c)
    unit = np.finfo(dtype).eps
    with mpmath.workdps(40):
        for i, value in enumerate(map(mpmath.mpf, s.astype(F64))):
            log_scale = OTHERS[name](value, c)
            slope = mpmath.diff(lambda x: OTHERS[name](x, c), value) if value != 0 else None
            # the argument s + 2 is rounded before it is used, and a logarithm near 0 keeps no more than σ has
            size = max(abs(log_scale), 1 if "floor" in name else abs(value) if "inverse" in name else 0)
            assert abs(mpmath.mpf(float(found[0][i])) - log_scale) <= 6 * unit * size, (name, value)
            if abs(log_scale) < 80:
                scale = mpmath.exp(log_scale)
                near = 6 + 2 * (abs(value) if "inverse" in name else 0)
                assert abs(mpmath.mpf(float(found[1][i])) - scale) <= near * unit * scale, (name, value)
            if slope is not None:
                near = 8 + 2 * min(abs(value), 30)
                assert abs(mpmath.mpf(float(found[2][i])) - slope) <= near * unit * abs(slope) + 1e-12, (name, value)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_ends_of_the_maps_of_other_libraries(module, dtype):
    """Infinities where the definition has them, and NaN."""
    ends = {
        "sigmoid_floor": (np.log(dtype(1e-3)), np.log1p(dtype(1e-3))),
        "softplus_floor": (np.log(dtype(1e-3)), np.inf),
        "sigmoid_inverse": (np.inf, 0),
        "atan": (-np.pi / 2 * 1e-3, np.pi / 2 * 1e-3),
    }
    for name, limits in ends.items():
        for s, limit in zip((-np.inf, np.inf), limits, strict=True):
            log_scale = getattr(module, f"{name}_{np.dtype(dtype).name}_loop")(np.full(19, s, dtype), 1e-3)[0]
            np.testing.assert_allclose(log_scale, limit, rtol=1e-6, atol=np.finfo(dtype).eps)
        assert np.isnan(getattr(module, f"{name}_{np.dtype(dtype).name}_loop")(np.full(19, np.nan, dtype), 1e-3)).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_additive_is_the_identity(module, dtype):
    s = np.array([0, 1, -5, np.inf, np.nan], dtype)
    for part, wanted in zip(PARTS, (0, 1, 0), strict=True):
        assert (getattr(module, f"additive_{np.dtype(dtype).name}_{part}")(s) == wanted).all()


def test_signs_of_zero(module):
    """log σ of exp and tanh are odd functions: −0 stays −0."""
    zeros = np.array([0.0, -0.0], F32)
    for name in ("exp", "tanh"):
        assert np.signbit(getattr(module, f"{name}_float32_log_scale")(zeros)).tolist() == [False, True]
