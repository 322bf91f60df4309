"""csrc/common/logistic_mixture.h against mpmath, and draw.h: the one header that g++ and nvcc both compile."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from genkernels import backends
from tests.native.native_build import binding

np.seterr(all="ignore")
F32, F64 = np.float32, np.float64


def variants() -> list[str]:
    """The build for this processor, and the one without its extensions: no fused multiply-add, other roundings."""
    best = backends.cpu_variant()
    return ["plain", best] if best in ("avx512", "avx2") else ["plain"]


@pytest.fixture(params=variants())
def module(request):
    return binding(request.param)


def call(module, name, dtype, *arguments):
    return getattr(module, f"{name}_{np.dtype(dtype).name}")(*arguments)


def cases(levels, dtype, count=400):
    """Means around the level, within its bin, at its edges and up to 1,200 scales away (beyond, sigmoids differ in no
    digit computed); every log-scale from the clamp on; ends and inner levels."""
    rng = np.random.default_rng(levels)
    i = rng.integers(0, levels, count)
    i[: count // 4] = np.where(rng.random(count // 4) < 0.5, 0, levels - 1)
    spread = rng.choice([0.3, 0.5, 3.0, 100.0], count)
    log_scale = rng.uniform(-7, 10, count)
    log_scale[::7] = -7
    away = np.where(spread == 0.5, 0.5, rng.random(count) * spread)
    mean = i + rng.choice([-1, 1], count) * np.minimum(away, 600 * (levels - 1) * np.exp(log_scale))
    return i.astype(dtype), mean.astype(dtype), log_scale.astype(dtype)


def exact(i, mean, log_scale, levels):
    """log P and its two derivatives by the definition, in mpmath's digits."""
    sigmoid = lambda t: 1 / (1 + mpmath.exp(-t))  # noqa: E731
    width = 2 * mpmath.exp(-mpmath.mpf(log_scale)) / (levels - 1)
    a, b = ((mpmath.mpf(i) + d - mpmath.mpf(mean)) * width for d in (mpmath.mpf(0.5), -mpmath.mpf(0.5)))
    sa, sb = (mpmath.mpf(1) if i == levels - 1 else sigmoid(a)), (mpmath.mpf(0) if i == 0 else sigmoid(b))
    p, da, db = sa - sb, sa * (1 - sa), sb * (1 - sb)
    return mpmath.log(p), -width * (da - db) / p, -(a * da - b * db) / p


@pytest.mark.parametrize("levels", [2, 3, 17, 256, 65536])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_log_probability_and_its_derivatives(dtype, levels):
    """Of every build, against digits that take their time once."""
    i, mean, log_scale = cases(levels, dtype)
    builds = {v: call(binding(v), "level", dtype, i, mean, log_scale, levels) for v in variants()}
    eps = float(np.finfo(dtype).eps)
    with mpmath.workdps(600):  # 1,200 scales away a sigmoid differs from 1 in the 521st digit
        for t in range(len(i)):
            log_p, by_mean, by_log_scale = exact(float(i[t]), float(mean[t]), float(log_scale[t]), levels)
            width = float(2 * mpmath.exp(-mpmath.mpf(float(log_scale[t]))) / (levels - 1))
            edge = (abs(float(i[t] - mean[t])) + 0.5) * width
            # relative to the terms that a sum is made of: log w and the edges
            value = abs(float(log_scale[t])) + np.log(levels) + edge + 1
            names = ("log P", "by mean", "by log-scale", "log P alone")
            true = (log_p, by_mean, by_log_scale, log_p)
            scales = (value, width, edge + 1, value)
            for build, found in builds.items():
                for name, ours, exactly, scale in zip(names, found, true, scales, strict=True):
                    assert ours.dtype == dtype
                    error = abs(float(mpmath.mpf(float(ours[t])) - exactly))
                    where = (build, name, i[t], mean[t], log_scale[t], error / (eps * scale))
                    assert error <= 6 * eps * scale, where


def units(found, true):
    return np.abs(found.astype(F64) - true) / np.spacing(np.abs(true).astype(found.dtype)).astype(F64)


def test_float32_functions(module):
    x = np.ldexp(np.linspace(1, 2, 1001)[None, :-1], np.arange(-126, 120)[:, None]).ravel().astype(F32)
    assert units(call(module, "functions", F32, x)[0], np.log(x.astype(F64))).max() <= 2
    x = np.linspace(-86.9, 80, 300_001).astype(F32)
    assert units(call(module, "functions", F32, x)[1], np.exp(x.astype(F64))).max() <= 2
    assert (call(module, "functions", F32, np.linspace(-1e30, -87, 999).astype(F32))[1] <= 2e-38).all()
    x = np.concatenate([np.linspace(-100, 100, 200_001), np.logspace(-30, 0, 999), [0.0]]).astype(F32)
    _, _, tanh, sech2 = call(module, "functions", F32, x)
    wide = x.astype(F64)
    assert np.abs(tanh - np.tanh(wide)).max() <= 2e-7
    true = 1 / np.cosh(wide) ** 2
    assert (np.abs(sech2 - true) <= 5e-7 * true + 7e-38).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_nan_comes_through(module, dtype):
    """In every argument, at the ends and between; its neighbours in the vector stay clean."""
    for which in range(3):
        for index in (0, 5, 16):
            given = [np.full(37, v, dtype) for v in (index, 4.2, -2.0)]
            given[which][::3] = np.nan
            bad = np.arange(37) % 3 == 0
            for value in call(module, "level", dtype, *given, 17):
                assert (np.isnan(value) == bad).all(), (which, index)
    for value in call(module, "functions", dtype, np.where(np.arange(37) % 3 == 0, np.nan, 0.5).astype(dtype)):
        assert (np.isnan(value) == (np.arange(37) % 3 == 0)).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_any_width_is_finite(module, dtype):
    """From bins of a thousand scales, where exponentials underflow, to scales beyond the largest number's logarithm."""
    log_scale = np.repeat(np.array([-7, -6.5, -3, 0, 30, 80, 1e4], dtype), 5)
    mean = np.tile(np.array([1, 1.4999, 1.5, -3e5, 3e5], dtype), 7)
    for index in (0, 1, 2):
        for value in call(module, "level", dtype, np.full(35, index, dtype), mean, log_scale, 3):
            assert np.isfinite(value).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_logit(dtype):
    """Two units in the last place of the larger of its two logarithms; exactly 0 at a half."""
    edge = 2.0**-24 if dtype == F32 else 2.0**-53
    rng = np.random.default_rng(0)
    near = np.concatenate(
        [np.logspace(np.log10(edge), -0.3, 3000), rng.random(6000), 0.5 + np.linspace(-1e-3, 1e-3, 1001)]
    )
    u = np.clip(np.concatenate([near, 1 - near, [0.5, edge, 1 - edge]]), edge, 1 - edge).astype(dtype)
    if dtype == F32:
        u = np.concatenate([u, (np.arange(1, 2**24, 37) * edge).astype(F32)])  # the grid of uniform draws
    if dtype == F32:
        a, b = np.log(u.astype(F64)), np.log1p(-u.astype(F64))
        larger = np.maximum(np.abs(a), np.abs(b))
    else:
        with mpmath.workdps(40):
            logs = [(mpmath.log(mpmath.mpf(x)), mpmath.log(1 - mpmath.mpf(x))) for x in u.tolist()]
        larger = np.array([float(max(abs(a), abs(b))) for a, b in logs])
    for variant in variants():
        module = binding(variant)
        found = call(module, "logit", dtype, u)
        assert found.dtype == dtype and (found[u == 0.5] == 0).all()
        if dtype == F32:
            error = np.abs(found - (a - b))
        else:
            with mpmath.workdps(40):
                error = np.array(
                    [float(abs(mpmath.mpf(f) - (a - b))) for f, (a, b) in zip(found.tolist(), logs, strict=True)]
                )
        assert (error <= 2 * np.spacing(larger.astype(dtype)).astype(F64)).all(), variant
        assert np.isnan(call(module, "logit", dtype, np.full(37, np.nan, dtype))).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_draws_are_the_definitions_integers(module, dtype, temperature):
    """All of them, of a vectorised loop and one by one, with noise at and beyond the edges, odd scales and NaN."""
    torch = pytest.importorskip("torch")
    from genkernels.reference import _draw

    rng = np.random.default_rng(1)
    count = 300_000
    mean, log_scale = rng.normal(size=count) * 0.7, rng.normal(size=count) * 2 - 3
    u = rng.integers(0, 2**24, count) / 2**24
    u[::11], u[1::97], u[2::97], u[3::97] = rng.random(len(u[::11])) ** 8, 0, 0.5, 1 - 2.0**-24
    log_scale[::89], log_scale[1::89], log_scale[2::89] = -100, 200, -7
    mean[::101], log_scale[1::101], u[2::101] = np.nan, np.nan, np.nan
    mean, log_scale, u = (v.astype(dtype) for v in (mean, log_scale, u))
    params = torch.from_numpy(np.stack([np.zeros_like(mean), mean, log_scale], -1))
    noise = torch.from_numpy(np.stack([np.full_like(u, 0.5), u], -1))
    for levels in (2, 256, 65536):
        loop, alone = call(module, "draw", dtype, mean, log_scale, u, temperature, levels)
        expected = _draw.logistic_mixture(params, noise, levels, temperature)[:, 0].numpy()
        assert (np.nan_to_num(loop) == alone).all()
        wrong = (alone != expected).sum()
        # where the functions differ in their last place a value within some 1e-7 levels/2 of a boundary may cross it:
        # none of 256 levels here
        assert wrong <= 4e-9 * levels * count * (dtype == F32), (levels, wrong)
        assert (np.abs(alone - expected) <= 1).all()
