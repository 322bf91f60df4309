"""rational_quadratic_spline on every implementation that runs here, against its definition in fp64, the paper's formula
number by number, and other libraries' values."""

import bisect
import functools
import importlib.util
import math
import subprocess
import sys

import pytest
import torch

from genkernels import ops
from genkernels._options import Spline
from genkernels.reference import rational_quadratic_spline as reference
from tests.checks import assert_as_accurate, bits, draw, off_address, opcheck_backward, strided
from tests.implementations import interpreted_few, slow_few

F64, F32, BF16, F16 = DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = list(Spline.words())
WAYS = {False: ops.rational_quadratic_spline, True: ops.rational_quadratic_spline_inverse}

# x's shape, K: points, numbers by themselves, odd sizes, more numbers than a block, rows longer than one, many bins
SIZES = [((70, 2), 8), ((9,), 5), ((5, 3, 7), 3), ((40, 16), 8), ((3, 1100), 4), ((4, 5), 1), ((6, 3), 2), ((3, 5), 64)]
FEW = [(SIZES[0], F32), (SIZES[2], F64), (SIZES[2], BF16), (SIZES[5], F32), (SIZES[7], F32)]
FEWEST = [(SIZES[2], F32), (SIZES[2], F64), (SIZES[6], BF16)]
uninterpreted = pytest.mark.implementations(when=lambda i, **given: not i.is_interpreted)


def numbers_of(kind, bins):
    return 3 * bins - (kind != "circular")


def inputs(kind, shape, bins, dtype=F64, device="cpu", seed=1, reach=3.0):
    """Numbers within [−5, 5] and some without."""
    x, params = draw(shape, (*shape, numbers_of(kind, bins)), seed=seed)
    return [t.to(device, dtype) for t in (reach * x, params)]


def sample(kind, inverse, device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    return functools.partial(WAYS[inverse], parametrization=kind), tuple(inputs(kind, (3, 2), 3, dtype, device))


SAMPLES = {
    "rational_quadratic_spline": functools.partial(sample, "nflows", False),
    "rational_quadratic_spline_inverse": functools.partial(sample, "zuko", True),
}


def knots_of(params, kind, bound=5.0, scale=1.0, floor=1e-3):
    """Knots along x and y and their slopes, of the raw numbers of one spline: lists of K + 1."""
    bins = (len(params) + 1) // 3
    logits = [[scale * u for u in params[at : at + bins]] for at in (0, bins)]
    raw = list(params[2 * bins :])
    if kind == "zuko":
        clip = math.log(floor)
        logits = [[u / (1 + abs(2 * u / clip)) for u in part] for part in logits]
        slopes = [math.exp(v / (1 + abs(v / clip))) for v in raw]
    else:
        slopes = [floor + math.log1p(math.exp(-abs(v))) + max(v, 0) for v in raw]
    slopes = [*slopes, slopes[0]] if kind == "circular" else [1.0, *slopes, 1.0]
    knots = []
    for part in logits:
        exps = [math.exp(u) for u in part]
        least = 0.0 if kind == "zuko" else floor
        shares = [least + (1 - bins * least) * e / math.fsum(exps) for e in exps]
        knots.append([bound * (2 * math.fsum(shares[:k]) - 1) for k in range(bins)] + [bound])
    return *knots, slopes


def plain(x, params, kind, bound=5.0, **options):
    """y and log dy/dx of one number, as the paper has them (its equations 4 and 5)."""
    if abs(x) > bound:
        return x, 0.0
    xs, ys, slopes = knots_of(params, kind, bound, **options)
    k = min(bisect.bisect_right(xs, x) - 1, len(xs) - 2)
    s, xi = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k]), (x - xs[k]) / (xs[k + 1] - xs[k])
    around, d0, d1 = xi * (1 - xi), slopes[k], slopes[k + 1]
    below = s + (d1 + d0 - 2 * s) * around
    y = ys[k] + (ys[k + 1] - ys[k]) * (s * xi**2 + d0 * around) / below
    return y, math.log(s**2 * (d1 * xi**2 + 2 * s * around + d0 * (1 - xi) ** 2) / below**2)


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, ldj = function(*leaves)
    weights = 1 + torch.arange(ldj.numel(), device=ldj.device)
    return torch.autograd.grad((out.double() ** 2).sum() + (ldj.double() * weights).sum(), leaves)


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.every_build
@pytest.mark.implementations(when=slow_few([*FEW, *FEWEST], "size", "dtype"))
@pytest.mark.implementations(when=interpreted_few(FEWEST, "size", "dtype"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_the_reference(functions, device, poisoned_memory, kind, size, dtype):
    x, params = inputs(kind, *size, dtype, device)
    grads = draw(size[0], size[0][:1], device=device, seed=2)
    grads = grads[0].to(dtype), grads[1].to(torch.promote_types(dtype, F32))
    options = (KINDS.index(kind), 5.0, 0.7, 1e-3)
    for inverse in (False, True):
        calls = [("rational_quadratic_spline", (x, params, *options, inverse))]
        for given in (grads, (None, grads[1]), (grads[0], None)):
            calls.append(("rational_quadratic_spline_backward", (*given, x, params, *options, inverse)))
        for name, arguments in calls:
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
            ours = getattr(functions, name)(*arguments)
            same, exact = (getattr(reference, name)(*given) for given in (arguments, wide))
            for results in zip(ours, same, exact, strict=True):
                # knots lie apart by a unit of the bound, and more by as much as a bin is narrow
                largest = max(5.0, results[2].abs().max().item())
                units = {F64: 4096, F32: 256 if "backward" in name else 32}.get(results[0].dtype, 2)
                assert_as_accurate(name, *results, beside=units, size=largest)


@uninterpreted
@pytest.mark.parametrize("bins", [1, 2, 5, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_papers_formula(implementation, device, kind, bins):
    x, params = inputs(kind, (7, 3), bins, device=device)
    options = {"bound": 3.0, "floor": 2e-3} | ({} if bins == 2 else {"logit_scale": 0.5})
    found, ldj = ops.rational_quadratic_spline(x, params, parametrization=kind, **options)
    named = {"scale" if k == "logit_scale" else k: v for k, v in options.items()}
    flat = zip(x.flatten().tolist(), params.flatten(0, 1).tolist(), strict=True)
    expected = torch.tensor([plain(*pair, kind, **named) for pair in flat], dtype=F64).view(7, 3, 2)
    torch.testing.assert_close(found.cpu(), expected[..., 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ldj.cpu(), expected[..., 1].sum(1), rtol=1e-11, atol=1e-11)
    assert (x.abs() > 3).any() and (x.abs() < 3).any()


PEERS = """
import importlib.util, sys, torch
names, file = sys.argv[1].split(","), sys.argv[2]
given, out = torch.load(file), {}
for name in names:
    for case, (x, params, bins) in given[name].items():
        w, h, d = params.split([bins, bins, params.shape[-1] - 2 * bins], -1)
        for inverse in (False, True):
            if name == "zuko":
                from zuko.transforms import MonotonicRQSTransform
                spline = MonotonicRQSTransform(w, h, d)
                y, ladj = (spline.inv if inverse else spline).call_and_ladj(x)
            else:
                if name == "nflows":
                    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline
                else:
                    from normflows.utils.splines import unconstrained_rational_quadratic_spline
                tails = {"nflows": "linear", "normflows": "circular"}[name]
                spline = unconstrained_rational_quadratic_spline
                y, ladj = spline(x, w, h, d, inverse=inverse, tails=tails, tail_bound=5.0)
            out[name, case, inverse] = y, ladj.sum(1)
torch.save(out, file)
"""


def test_values_are_those_of_the_libraries(tmp_path):
    """In a process of their own: importing zuko changes torch. fp32 is held to theirs by where both are in fp64."""
    kinds = {"nflows": "nflows", "zuko": "zuko", "normflows": "circular"}
    names = [name for name in kinds if importlib.util.find_spec(name)]
    if not names:
        pytest.skip("nflows, zuko and normflows are not installed")
    given = {
        name: {
            (bins, dtype): (*inputs(kinds[name], (50, 3), bins, dtype), bins) for bins in (2, 8) for dtype in (F64, F32)
        }
        for name in names
    }
    file = tmp_path / "given.pt"
    torch.save(given, file)
    subprocess.run([sys.executable, "-c", PEERS, ",".join(names), str(file)], check=True, timeout=120)
    for (name, case, inverse), theirs in torch.load(file).items():
        x, params, _ = given[name][case]
        ours = WAYS[inverse](x, params, parametrization=kinds[name])
        exact = WAYS[inverse](x.double(), params.double(), parametrization=kinds[name])
        for mine, other, true in zip(ours, theirs, exact, strict=True):
            if case[1] == F64:
                torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
            else:
                assert (mine - true).abs().max() <= 3 * (other - true).abs().max() + 2e-6, (name, case, inverse)


# -------------------------------------------------------------------------------------------------------------- inverse


@uninterpreted
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("kind", KINDS)
def test_inverse_undoes_it_on_knots_at_the_ends_and_without(implementation, device, kind, dtype):
    for bins in (1, 2, 64):
        _, params = inputs(kind, (1, 1), bins, dtype)
        xs, ys, _ = knots_of(params.flatten().tolist(), kind)
        places = [*xs, *(math.nextafter(b, 0) for b in (-5.0, 5.0)), -7.5, 9.0, 5.0001, *(b * 0.37 for b in ys)]
        x = torch.tensor(places, dtype=dtype, device=device)[:, None]
        params = params.to(device).expand(len(places), 1, -1)
        y, ldj = ops.rational_quadratic_spline(x, params, parametrization=kind)
        eps = torch.finfo(dtype).eps
        exact = torch.tensor([plain(v, params[0, 0].tolist(), kind) for v in x.flatten().tolist()], dtype=F64)
        steep = exact[:, 1].abs().exp().to(device)  # what a rounded place costs
        assert ((y.double() - exact[:, :1].to(device)).abs().squeeze(1) <= 64 * eps * steep).all()
        assert torch.equal(y[x.abs() > 5], x[x.abs() > 5]) and not ldj[(x.abs() > 5).squeeze(1)].any()
        assert (y[x.abs() <= 5].abs() <= 5).all()
        if kind != "circular" and bins > 1:  # slopes at the ends are 1
            assert ldj[[0, len(xs) - 1]].abs().max() < 2e4 * eps
        back, negative = ops.rational_quadratic_spline_inverse(y, params, parametrization=kind)
        assert ((back - x).abs().squeeze(1).double() <= 64 * eps * steep).all()
        torch.testing.assert_close(negative, -ldj, rtol=0, atol=3e5 * eps)


@pytest.mark.implementations(slow=False)
@pytest.mark.parametrize("bound", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_loses_what_rounding_y_loses(implementation, device, kind, bound):
    """In fp32: the exact inverse of the exact y, which is rounded in between, is as near as any can come to x."""
    for spread in (0.3, 1.0, 2.0):
        x, params = draw((20_000, 4), (20_000, 4, numbers_of(kind, 8)), seed=4)
        x, params = bound * (2 * (x - x.floor()) - 1), spread * params
        x, params = (t.to(device, F32) for t in (x, params))
        options = {"parametrization": kind, "bound": bound}

        def lost(dtype, x=x, params=params, options=options):
            y = WAYS[False](x.to(dtype), params.to(dtype), **options)[0].to(F32)
            back = WAYS[True](y.to(dtype), params.to(dtype), **options)[0].to(F32)
            return (back.double() - x.double()).abs().flatten()

        ours, least = lost(F32), lost(F64)
        assert ours.quantile(0.99) <= 1.2 * least.quantile(0.99), spread
        assert spread > 0.3 or ours.max() <= max(1e-6, 1.5 * least.max()), spread


@uninterpreted
@pytest.mark.parametrize("dtype", [F64, F32])
def test_slopes_from_a_millionth_to_a_million(implementation, device, dtype):
    """Where b changes its sign within a bin, and a bin is all but flat in its middle, everything is finite."""
    raw = torch.tensor([-40.0, 1e6, -40.0, -40.0, 1e6, 1e6, 0.5], dtype=dtype, device=device)
    logits = torch.tensor([0.0, 14, 0, 3, 0, 13, 0, 0, 14, 0, 14, 0, 0, 0, 13, 0], dtype=dtype, device=device)
    x = torch.linspace(-5, 5, 401, dtype=dtype, device=device)[:, None]
    params = torch.cat([logits, raw]).expand(401, 1, 23)
    for way in WAYS.values():
        call = functools.partial(way, floor=1e-6)
        out, ldj = call(x, params)
        assert out.isfinite().all() and ldj.isfinite().all() and ldj.abs().max() > 5
        assert (out.diff(dim=0) >= -1e-5 * (dtype == F32)).all()
        assert all(g.isfinite().all() for g in gradients(call, (x, params)))
    if dtype == F64:
        y, ldj = ops.rational_quadratic_spline(
            ops.rational_quadratic_spline_inverse(x, params, floor=1e-6)[0], params, floor=1e-6
        )
        assert ((y - x).abs().squeeze(1) <= 1e-12 * (1 + ldj.exp())).all()


@uninterpreted
@pytest.mark.parametrize("kind", KINDS)
def test_an_angle_comes_back_to_where_it_began(implementation, device, kind):
    """The two ends have one slope, circular or 1; and the log-determinant is the logarithm of the derivative."""
    _, params = inputs(kind, (1, 1), 6, device=device)
    x = torch.tensor([[-5.0], [5.0], [0.3], [-2.2]], dtype=F64, device=device).requires_grad_()
    y, ldj = ops.rational_quadratic_spline(x, params.expand(4, 1, -1), parametrization=kind)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.log().squeeze(1), ldj, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[:2], x[:2], rtol=1e-14, atol=0)
    torch.testing.assert_close(slope[0], slope[1], rtol=1e-10, atol=0)
    assert (abs(ldj[0].item()) > 0.1) == (kind == "circular")


# ------------------------------------------------------------------------------------------------------------- the ends


@uninterpreted
@pytest.mark.parametrize("inverse", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_number(implementation, device, kind, inverse):
    x, params = inputs(kind, (40, 3), 4, F32, device)
    call = functools.partial(WAYS[inverse], parametrization=kind)
    clean = call(x, params)
    x[7, 2], x[9, 0] = float("nan"), float("-inf")
    params[11, 1, 2] = float("nan")
    x[11, 1] = 0.5
    leaves = [t.requires_grad_() for t in (x, params)]
    out, ldj = call(*leaves)
    bad = torch.zeros(40, 3, dtype=torch.bool, device=device)
    bad[7, 2] = bad[11, 1] = True
    assert torch.equal(out.isnan(), bad) and torch.equal(ldj.isnan(), bad.any(1))
    assert out[9, 0].item() == float("-inf")
    same = ~bad.any(1)
    same[9] = False
    assert torch.equal(out[same], clean[0][same]) and torch.equal(ldj[same], clean[1][same])
    by_x, by_params = torch.autograd.grad(out.sum() + ldj.sum(), leaves)
    assert torch.equal(by_x.isnan(), bad) and torch.equal(by_params.isnan().any(-1), bad)
    assert by_x[9, 0].item() == 1 and not by_params[9, 0].any()


@uninterpreted
@pytest.mark.parametrize("inverse", WAYS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_nothing_gives_nothing(implementation, device, shape, inverse):
    leaves = [t.requires_grad_() for t in inputs("nflows", shape, 3, F32, device)]
    out, ldj = WAYS[inverse](*leaves)
    assert out.shape == shape and ldj.shape == shape[:1] and not ldj.any()
    found = torch.autograd.grad(out.sum() + ldj.sum(), leaves)
    assert all(g.shape == t.shape for g, t in zip(found, leaves, strict=True))


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.implementations(slow=False)
@pytest.mark.parametrize("inverse", WAYS)
@pytest.mark.parametrize(("kind", "bins"), [("nflows", 3), ("zuko", 2), ("circular", 3), ("circular", 1)])
def test_gradients_to_second_order(implementation, device, kind, bins, inverse):
    tensors = [t.requires_grad_() for t in inputs(kind, (2, 2), bins, device=device, reach=2.5)]
    call = functools.partial(WAYS[inverse], parametrization=kind, logit_scale=0.6)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.implementations(reference=False, slow=False)
@pytest.mark.parametrize("inverse", WAYS)
def test_torch_finds_nothing_amiss(functions, device, inverse):
    tensors = [t.requires_grad_() for t in inputs("nflows", (3, 2), 3, device=device)]
    options = (0, 5.0, 1.0, 1e-3, inverse)
    torch.library.opcheck(functions.rational_quadratic_spline, (*tensors, *options))
    grads = draw((3, 2), (3,), device=device)
    opcheck_backward(functions.rational_quadratic_spline_backward, (*grads, *tensors, *options))


# --------------------------------------------------------------------------------------------------------------- memory


@uninterpreted
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inverse", WAYS)
def test_any_stride_gives_the_same_and_inputs_are_left_alone(implementation, device, inverse, dtype):
    tensors = inputs("nflows", (3, 6, 5), 4, dtype, device)
    expected = [*WAYS[inverse](*tensors), *gradients(WAYS[inverse], tensors)]
    for change in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: off_address(t, 1),
        lambda t: strided(t, 3, 2),
    ):
        given = [change(t) for t in tensors]
        before = [t.clone() for t in given]
        found = [*WAYS[inverse](*given), *gradients(WAYS[inverse], given)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.threads
@pytest.mark.implementations(reference=False, slow=False)
@pytest.mark.parametrize("shape", [(2500, 16), (3, 20011)])
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(functions, device, shape):
    tensors = inputs("nflows", shape, 4, F32, device)
    grads = draw(shape, shape[:1], dtype=F32, device=device)
    options = (0, 5.0, 1.0, 1e-3, False)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            backward = functions.rational_quadratic_spline_backward(*grads, *tensors, *options)
            return *functions.rational_quadratic_spline(*tensors, *options), *backward
        finally:
            torch.set_num_threads(before)

    first = [bits(t) for t in run(1)]
    for threads in (1, 2, 3):
        assert all(torch.equal(a, bits(b)) for a, b in zip(first, run(threads), strict=True))


@uninterpreted
def test_under_autocast_the_wider_dtype_is_taken(implementation, device):
    x, params = inputs("nflows", (3, 2), 3, F32, device)
    with torch.autocast(device, dtype=BF16):
        y, ldj = ops.rational_quadratic_spline(x, params.to(BF16))
    expected = ops.rational_quadratic_spline(x, params.to(BF16).float())
    assert torch.equal(y, expected[0]) and torch.equal(ldj, expected[1])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x, p: WAYS[False](x, p[0]), ValueError, r"params must be \[N, ..., P\] = \[4, 3, P\], got \[3, 8\]"),
        (lambda x, p: WAYS[True](x[0, 0], p), ValueError, r"spline: y must be \[N, ...\], got \[\]"),
        (
            lambda x, p: WAYS[False](x, p[..., :7]),
            ValueError,
            "P = 3K - 1 numbers for each of x, nflows, with K at least",
        ),
        (lambda x, p: WAYS[True](x, p, parametrization="circular"), ValueError, "P = 3K numbers .* circular, .* got 8"),
        (
            lambda x, p: WAYS[False](x, p, parametrization="linear"),
            ValueError,
            "one of nflows, zuko, circular, got 'lin",
        ),
        (lambda x, p: WAYS[False](x, p, bound=0), ValueError, "bound must be a finite number above 0, got 0"),
        (lambda x, p: WAYS[False](x, p, logit_scale=float("nan")), ValueError, "logit_scale must be a finite number"),
        (lambda x, p: WAYS[False](x, p, floor=0.4), ValueError, "floor must be below 1/K = 1/3, .* got 0.4"),
        (lambda x, p: WAYS[False](x, p, floor=1, parametrization="zuko"), ValueError, "floor must be below 1, got 1"),
        (lambda x, p: WAYS[False](x, p.float()), TypeError, "params must have the dtype of x, torch.float64, got"),
        (lambda x, p: WAYS[True](x.long(), p), TypeError, "y must be float64, .* got torch.int64"),
        (lambda x, p: WAYS[False](x, p.to("meta")), ValueError, "x and params must be on one device, got cpu and meta"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(*inputs("nflows", (4, 3), 3))
