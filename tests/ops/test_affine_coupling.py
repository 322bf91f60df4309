"""affine_coupling on every implementation that runs here, against its definition in fp64."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkernels as gk
from genkernels import backends, ops
from genkernels._options import SCALE_CONSTANTS, ScaleMap
from genkernels.ops.affine_coupling import SCALE_MAPS as SCALE_MAPS_ALL
from tests.checks import behind, beside_forbidden_memory, bits, off_address, opcheck_backward, pairwise, strided
from tests.implementations import few, interpreted_few, reference_of, slow_few
from tests.ops.coupling import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    OPTIONS,
    OTHERS,
    SCALE_MAPS,
    SPLITS,
    Case,
    Inputs,
    check_values,
    draw,
    run_all,
)

reference = reference_of("affine_coupling")
inf, nan = float("inf"), float("nan")

#: Shapes that meet every path: one element a sample, wide and odd runs, rows that no run fits, whole and odd tiles,
#: several chunks a sample, several samples a tile, no spatial dimension, one pixel, more dimensions.
IMAGES = [(2, 6, 5, 7), (2, 6, 3, 5), (3, 4, 32, 33), (1, 72, 32, 31), (5, 8, 1, 1)]
SHAPES = {
    "channel": [(5, 2), (3, 8), (2, 6, 5), (3, 4, 2, 2), (2, 10, 3, 4), (2, 12, 24, 16), (1, 2, 51, 61)]
    + [*IMAGES, (37, 2), (2, 4, 3, 2, 5), (3, 2, 1100)],
    "checkerboard": [(1, 1, 1, 1), (2, 1, 4, 4), (3, 2, 6, 4), (2, 3, 5, 7), (2, 2, 1, 9), (2, 4, 9, 1)]
    + [(2, 1, 28, 28), (2, 5, 20, 24), *IMAGES],
}
#: Of those, where a call is slow: several samples a tile; odd sizes; one sample a tile of wide runs.
INTERPRETED = [(3, 4, 2, 4), (5, 6, 3, 7), (2, 2, 16, 24)]
EMULATED = {split: [s for s in shapes if s not in IMAGES[2:4]] for split, shapes in SHAPES.items()}

# bf16 needs no large tensors, nor each address, where a call is slow
fp32_if_slow = pytest.mark.implementations(when=lambda i, dtypes, **_: not i.is_slow or dtypes == (F32, F32))
compiled = pytest.mark.implementations(reference=False)
triton = pytest.mark.implementations(only=("triton", "triton interpreted"))
quick = pytest.mark.implementations(slow=False)
by_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))


def sample(device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    generator = torch.Generator().manual_seed(1)
    x, params = (torch.randn(3, 4, 2, 3, generator=generator, dtype=F64).to(device, dtype) for _ in range(2))
    return lambda a, b: ops.affine_coupling(a, b, scale_map="sigmoid"), (x, params)


SAMPLES = {"affine_coupling": sample}


# --- values ---------------------------------------------------------------------------------------------------------


MET_BY_HALVES = pairwise(SCALE_MAPS, SPLITS, (False, True))
MET = pairwise(SCALE_MAPS, SPLITS, LAYOUTS, (False, True), DTYPES, INTERPRETED)
IS_MET = few(MET, "scale_map", "split", "layout", "flip", "dtypes")


@compiled
@pytest.mark.implementations(
    when=lambda i, **given: i.device == "cuda" or (given["dtypes"] == (F32, F32) and not i.is_slow) or IS_MET(**given)
)
@pytest.mark.every_build("scale_map", "split", "layout", "flip", "dtypes", rows=MET)
@by_dtypes
@pytest.mark.parametrize("scale_map,split,layout,flip", OPTIONS)
def test_agrees_with_the_definition(implementation, poisoned_memory, scale_map, split, layout, flip, dtypes):
    turn = OPTIONS.index((scale_map, split, layout, flip)) + DTYPES.index(dtypes)
    interpreted = behind(MET, scale_map, split, layout, flip, dtypes)
    for shape in implementation.some(SHAPES[split], turn, interpreted=interpreted, emulated=EMULATED[split]):
        spread = 1.5 if implementation.name == "cpu" else 1.0
        check_values(implementation, Case(shape, split, scale_map, layout, flip, dtypes, spread))


CONSTANTS = [name for name in SCALE_MAPS_ALL if ScaleMap[name.upper()] in SCALE_CONSTANTS]
MET_OTHERS = pairwise(OTHERS, [(F32, F32), (F64, F64), (BF16, BF16)], [(3, 5, 3, 7), (37, 3), (2, 3, 24, 24)])


@compiled
@pytest.mark.implementations(when=lambda i, row: not i.is_slow or row in range(0, len(MET_OTHERS), 2))
@pytest.mark.every_build("row", rows=[(row,) for row in range(len(MET_OTHERS))])
@pytest.mark.parametrize("row", range(len(MET_OTHERS)))
def test_the_maps_and_layouts_of_other_libraries(implementation, poisoned_memory, row):
    """Without a split too, at odd numbers of channels, and with the shift first."""
    (scale_map, split, layout, flip), dtypes, shape = MET_OTHERS[row]
    if split in ("channel", "alternate"):
        shape = (shape[0], 4, *shape[2:])
    if split == "checkerboard":
        shape = (*shape, 1, 1)[:4]
    check_values(implementation, Case(shape, split, scale_map, layout, flip, dtypes))


@pytest.mark.parametrize("scale_map,split,layout,flip", [*OTHERS[:5], OTHERS[8]], ids=str)
def test_gradients_of_the_maps_of_other_libraries(implementation, device, scale_map, split, layout, flip):
    """Of both orders, and of a constant that is not the default."""
    case = Case((2, 4, 3) if not implementation.is_slow else (1, 2), split, scale_map, layout, flip, (F64, F64))
    options = case.options | ({"scale_constant": 0.7} if scale_map in CONSTANTS else {})
    leaves = [t.requires_grad_() for t in list(draw(case, device))[:2]]
    for function in (ops.affine_coupling, ops.affine_coupling_inverse):
        assert torch.autograd.gradcheck(lambda x, p, f=function: f(x, p, **options), leaves, fast_mode=True)
        if not implementation.is_slow:
            assert torch.autograd.gradgradcheck(lambda x, p, f=function: f(x, p, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("scale_map", SCALE_MAPS_ALL)
def test_the_constant_of_a_scale_map(implementation, device, scale_map):
    """σ as torch writes it, for another constant than the default; a map without one refuses it."""
    if scale_map == "additive":
        return
    s = torch.linspace(-7, 25, 48, dtype=F64, device=device).unsqueeze(0)
    x, params, c = torch.ones_like(s), torch.cat([torch.zeros_like(s), s], 1), 0.3
    options = {"scale_map": scale_map, "split": "none", "layout": "shift_halves"}
    if scale_map not in CONSTANTS:
        with pytest.raises(ValueError, match=f"scale map {scale_map} has no constant, got scale_constant=0.3"):
            ops.affine_coupling(x, params, scale_constant=c, **options)
        return
    sigma = {
        "tanh": lambda: torch.exp(c * torch.tanh(s)),
        "sigmoid_floor": lambda: torch.sigmoid(s + 2) + c,
        "softplus_floor": lambda: torch.nn.functional.softplus(s) + c,
        "atan": lambda: torch.exp(c * torch.atan(s)),
        "soft_clip": lambda: torch.exp(s / (1 + abs(s / c))),
    }[scale_map]()
    z, ldj = ops.affine_coupling(x, params, scale_constant=c, **options)
    torch.testing.assert_close(z, sigma, rtol=1e-14, atol=0)
    torch.testing.assert_close(ldj, sigma.log().sum(1), rtol=1e-13, atol=0)
    back, minus = ops.affine_coupling_inverse(z, params, scale_constant=c, **options)
    torch.testing.assert_close(back, x, rtol=1e-13, atol=0)
    torch.testing.assert_close(minus, -ldj, rtol=1e-13, atol=0)
    for wrong in (0.0, -1.0, float("inf"), True, "1"):
        with pytest.raises(ValueError, match="scale_constant must be a positive number, got"):
            ops.affine_coupling(x, params, scale_constant=wrong, **options)


@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_points_signals_and_volumes(implementation, poisoned_memory, scale_map, layout):
    shapes = [(1, 2), (2051, 2), (7, 10), (33, 64), (4, 6, 1), (2, 4, 5, 3, 2)]
    for shape in implementation.some(shapes, SCALE_MAPS.index(scale_map) + 3 * LAYOUTS.index(layout)):
        check_values(implementation, Case(shape, "channel", scale_map, layout, True))


#: Samples of Triton's that take several tiles (tests/triton/test_affine_coupling.py sees to that), and larger ones.
LARGE = [(3, 2, 67, 71), (2, 8, 40, 36), (1, 4, 40, 64)]
LARGER = [(16, 48, 32, 32), (3, 12, 129, 67), (2, 6, 256, 256), (4096, 64), (1, 2, 999_999)]


@fp32_if_slow
@compiled
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_large_samples(implementation, poisoned_memory, split, dtypes):
    shapes = LARGE if implementation.device == "cpu" else LARGE + LARGER
    every = itertools.product(shapes, LAYOUTS)
    if implementation.is_interpreted:
        every = [(shape, layout) for shape, layout, met_by in pairwise(LARGE, LAYOUTS, SPLITS) if met_by == split]
    for shape, layout in every:
        if split == "checkerboard" and len(shape) != 4:
            continue
        case = Case(shape, split, "sigmoid", layout, dtypes=dtypes)
        found = check_values(implementation, case)
        # the log-determinant's own size is some hundreds and more: its error is that of adding in fp32
        exact = reference.affine_coupling(*map(torch.Tensor.double, list(draw(case))[:2]), *case.codes, False)[1]
        assert (found["forward ldj"].cpu() - exact).abs().max() <= 2.0**-22 * exact.abs().max()
    for shape in LARGE:
        case = Case(shape, split, "additive", dtypes=dtypes)
        x, params, *_ = draw(case, implementation.device)
        ldj = implementation.functions.affine_coupling(x, params, *case.codes, False)[1]
        assert torch.equal(ldj.cpu(), torch.zeros(shape[0]))


@pytest.mark.implementations(only=("cpu", "triton", "cuda", "cuda emulated"))
@pytest.mark.parametrize("shape", [(70_000, 2), (66_001, 6), (1 << 20, 4)], ids=str)
def test_many_samples(implementation, poisoned_memory, shape):
    """More samples than a grid's second dimension holds; the emulated kernels deal them out 256 and fewer to a
    block."""
    if implementation.device == "cpu":
        shape = (min(shape[0], 70_000), shape[1])
    check_values(implementation, Case(shape, layout="interleaved" if shape[1] == 6 else "halves"))


@triton
@pytest.mark.implementations(
    when=lambda i, scale_map, spread: not i.is_interpreted or (spread > 1) == (scale_map == "tanh")
)
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh"])
def test_error_is_that_of_the_reference(functions, device, scale_map, spread):
    """At most twice, in the maximum over 65,536 numbers and in the mean square, for fp32: no luck is allowed for."""
    case = Case((16, 8, 32, 32), scale_map=scale_map, spread=spread)
    inputs = draw(case, device)
    exact, theirs = run_all(reference, case, inputs.wide()), run_all(reference, case, inputs.map(torch.Tensor.cpu))
    for name, ours in run_all(functions, case, inputs).items():
        mine, its = ours.cpu().double() - exact[name], theirs[name].double() - exact[name]
        assert mine.norm() <= 2 * its.norm(), name
        if not name.endswith("ldj"):  # of which there are 16: their maximum is chance
            assert mine.abs().max() <= 2 * its.abs().max(), name


@triton
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (F32, BF16)], ids=str)
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh"])
def test_half_inputs_lose_nothing_but_the_last_rounding(implementation, functions, device, scale_map, dtypes):
    case = Case((8, 8, 16, 16), scale_map=scale_map, dtypes=dtypes)
    inputs = draw(case, device)
    exact, theirs = run_all(reference, case, inputs.wide()), run_all(reference, case, inputs.map(torch.Tensor.cpu))
    for name, ours in run_all(functions, case, inputs).items():
        mine, its = ours.cpu().double() - exact[name], theirs[name].double() - exact[name]
        limit = 2 if ours.dtype == F32 else 1.01
        if implementation.name == "triton interpreted" and ours.dtype == BF16:
            limit = 2.5  # the interpreter cuts bf16 off where a GPU rounds to nearest
        assert mine.norm() <= limit * its.norm(), name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_inverse_undoes_forward(implementation, device, scale_map, split):
    x, params, *_ = draw(Case((3, 4, 8, 6), split, scale_map, spread=1.5), device)
    z, ldj = ops.affine_coupling(x, params, scale_map=scale_map, split=split)
    back, ldj_back = ops.affine_coupling_inverse(z, params, scale_map=scale_map, split=split)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ldj_back, -ldj)


@compiled
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_reverse_rebuilds_what_the_inverse_gives(functions, device, scale_map, dtypes):
    case = Case((2, 3, 4, 6), "checkerboard", scale_map, "interleaved", True, dtypes)
    z, params, g, g_ldj = draw(case, device)
    rebuilt = functions.affine_coupling_reverse(g, g_ldj, z, params, *case.codes)[0]
    assert torch.equal(rebuilt, functions.affine_coupling(z, params, *case.codes, True)[0])


@quick
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_log_det_is_that_of_the_jacobian(implementation, device, scale_map, split):
    x, params, *_ = draw(Case((1, 4, 3, 4), split, scale_map, dtypes=(F64, F64), spread=1.5), device)
    jacobian = torch.autograd.functional.jacobian(
        lambda a: ops.affine_coupling(a, params, scale_map=scale_map, split=split)[0], x
    )
    exact = torch.linalg.slogdet(jacobian.reshape(48, 48)).logabsdet
    ldj = ops.affine_coupling(x, params, scale_map=scale_map, split=split)[1]
    torch.testing.assert_close(ldj[0], exact, atol=1e-8, rtol=0)


# --- gradients ------------------------------------------------------------------------------------------------------


FUNCTIONS = [ops.affine_coupling, ops.affine_coupling_inverse]
MET_BY_DERIVATIVES = pairwise(SCALE_MAPS, SPLITS, LAYOUTS, (False, True), FUNCTIONS)
HAS_DERIVATIVES_MET = few(MET_BY_DERIVATIVES, "scale_map", "split", "layout", "flip")


@quick
@pytest.mark.implementations(when=lambda i, **given: i.backend != "reference" or HAS_DERIVATIVES_MET(**given))
@pytest.mark.parametrize("scale_map,split,layout,flip", OPTIONS)
def test_gradients(implementation, device, scale_map, split, layout, flip):
    """And those to second order, by the definition's own graph, of each pair of options."""
    case = Case((2, 4, 3, 2), split, scale_map, layout, flip, (F64, F64))
    x, params, *_ = draw(case, device)
    x.requires_grad_(), params.requires_grad_()
    for function in FUNCTIONS:

        def call(a, b, function=function):
            return function(a, b, **case.options)

        assert torch.autograd.gradcheck(call, (x, params))
        if function in behind(MET_BY_DERIVATIVES, scale_map, split, layout, flip):
            assert torch.autograd.gradgradcheck(call, (x, params))


@compiled
@quick
@pytest.mark.parametrize("scale_map,split,inverse", pairwise(SCALE_MAPS, ["channel", "checkerboard"], [False, True]))
def test_opcheck(implementation, device, scale_map, split, inverse):
    case = Case((2, 4, 3, 2), split, scale_map, flip=split == "checkerboard")
    x, params, grad_z, grad_ldj = draw(case, device)
    both = [t.clone().requires_grad_() for t in (x, params)]
    torch.library.opcheck(torch.ops.genkernels.affine_coupling.default, (*both, *case.codes, inverse))
    grads = [t.clone().requires_grad_() for t in (grad_z, grad_ldj)]
    backward = torch.ops.genkernels.affine_coupling_backward.default
    opcheck_backward(backward, (*grads, *both, *case.codes, inverse))
    if inverse:  # which it is the gradient of
        reverse = torch.ops.genkernels.affine_coupling_reverse.default
        torch.library.opcheck(reverse, (grad_z, grad_ldj, x, params, *case.codes))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("split", ["channel", "alternate", "none"])
def test_additive_couplings_keep_nothing_and_copy_no_gradient(implementation, device, split, inverse):
    kept = []
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    shift = torch.randn(3, 4 if split == "none" else 2, 5, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        way = ops.affine_coupling_inverse if inverse else ops.affine_coupling
        z, _ = way(x, shift, scale_map="additive", split=split)
    grad = torch.randn_like(z)
    by_x, by_shift = torch.autograd.grad(z, (x, shift), grad)
    assert not kept and torch.equal(by_x, grad)
    if implementation.name != "reference":  # there autograd puts the halves' gradients together
        same = [grad, by_x] if inverse else [grad, by_x, by_shift]
        assert len({t.untyped_storage().data_ptr() for t in same}) == 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("split", ["channel", "alternate", "none"])
def test_gradients_of_leaves_of_an_additive_coupling_share_no_memory(implementation, device, split, batch):
    """Though they are views of one gradient: clipping one in place must not change the other."""
    for reduce in (torch.sum, lambda z: z.square().sum()):
        x = torch.randn(batch, 4, 5, device=device, requires_grad=True)
        shift = torch.randn(batch, 4 if split == "none" else 2, 5, device=device, requires_grad=True)
        z, _ = ops.affine_coupling(x, shift, scale_map="additive", split=split)
        z.retain_grad()
        reduce(z).backward()
        before = shift.grad.clone(), z.grad.clone()
        x.grad.mul_(2)
        assert torch.equal(shift.grad, before[0]) and torch.equal(z.grad, before[1])
        shift.grad.mul_(3)
        assert torch.equal(z.grad, before[1])


@pytest.mark.parametrize("which", ["z", "ldj"])
def test_a_missing_gradient_counts_as_zero(implementation, device, which):
    x, params, *_ = draw(Case((2, 4, 3, 3), scale_map="sigmoid", dtypes=(F64, F64), spread=1.5), device)
    x.requires_grad_(), params.requires_grad_()

    def grads():
        z, ldj = ops.affine_coupling(x, params, scale_map="sigmoid")
        output = (z if which == "z" else ldj).sum()
        return torch.autograd.grad(output, (x, params), allow_unused=True, materialize_grads=True)

    ours = grads()
    with gk.use_backend("reference"):
        exact = grads()
    torch.testing.assert_close(ours, exact)


TWO_SHAPES = [(2, 4, 6, 8), (3, 2, 5, 3)]
MET_BY_NONE = pairwise(SCALE_MAPS, SPLITS, [F32, BF16, F64], TWO_SHAPES)


@pytest.mark.implementations(when=interpreted_few(MET_BY_NONE, "scale_map", "split", "dtype"))
@compiled
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_none_among_the_gradients_is_a_zero(
    implementation, functions, device, poisoned_memory, scale_map, split, dtype
):
    """Not a read of anything."""
    for shape in behind(MET_BY_NONE, scale_map, split, dtype) if implementation.is_interpreted else TWO_SHAPES:
        case = Case(shape, split, scale_map, dtypes=(dtype, dtype))
        x, params, grad, grad_ldj = draw(case, device)
        for g, g_ldj in ((None, grad_ldj), (grad, None), (None, None)):
            full = torch.zeros_like(grad) if g is None else g, torch.zeros_like(grad_ldj) if g_ldj is None else g_ldj
            pairs = []
            for inverse in (False, True):
                last = (x, params, *case.codes, inverse)
                pairs += zip(
                    functions.affine_coupling_backward(g, g_ldj, *last),
                    functions.affine_coupling_backward(*full, *last),
                    strict=True,
                )
            pairs += zip(
                functions.affine_coupling_reverse(g, g_ldj, x, params, *case.codes),
                functions.affine_coupling_reverse(*full, x, params, *case.codes),
                strict=True,
            )
            for ours, expected in pairs:
                assert torch.equal(ours, expected), f"{case}: {g is None=} {g_ldj is None=}"


def alone(case, inputs, inverse):
    """The gradients where the log-determinant alone is used, by the definition's autograd."""
    leaves = [t.detach().cpu().requires_grad_() for t in (inputs.x, inputs.params)]
    ldj = reference.affine_coupling(*leaves, *case.codes, inverse)[1]
    if not ldj.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    return torch.autograd.grad(ldj, leaves, inputs.grad_ldj.cpu(), allow_unused=True, materialize_grads=True)


#: Several samples a tile, several tiles a sample.
UNUSED = [(3, 2, 3, 5), (1, 2, 16, 72)]
MET_UNUSED = pairwise(SPLITS, SCALE_MAPS, LAYOUTS, [(F32, F32), (F32, BF16), (F64, F64)], UNUSED)


@pytest.mark.implementations(when=interpreted_few(MET_UNUSED, "split", "scale_map", "layout", "dtypes"))
@pytest.mark.parametrize("layout,flip", [("halves", False), ("interleaved", True)])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F64, F64)], ids=str)
def test_an_output_that_is_not_used_multiplies_nothing(
    implementation, functions, device, split, scale_map, layout, flip, dtypes
):
    """Neither infinite outputs nor infinite scales, which would make NaN of a zero, reach the log-determinant's
    gradients."""
    for shape in behind(MET_UNUSED, split, scale_map, layout, dtypes) if implementation.is_interpreted else UNUSED:
        case = Case(shape, split, scale_map, layout, flip, dtypes)
        inputs = draw(case, device)
        far = 800.0 if dtypes[0] == F64 else 95.0
        inputs.params.view(-1)[::3] = far
        inputs.params.view(-1)[1::3] = -far
        inputs.x.view(-1)[::4] = inf
        for inverse in (False, True):
            last = (inputs.x, inputs.params, *case.codes, inverse)
            found = functions.affine_coupling_backward(None, inputs.grad_ldj, *last)
            for ours, exact in zip(found, alone(case, inputs, inverse), strict=True):
                torch.testing.assert_close(ours.cpu(), exact, msg=lambda m, c=case: f"{c}: {m}")
        last = (inputs.x, inputs.params, *case.codes)
        rebuilt, *found = functions.affine_coupling_reverse(None, inputs.grad_ldj, *last)
        back = functions.affine_coupling(*last, True)[0]
        torch.testing.assert_close(rebuilt, back, rtol=0, atol=0, equal_nan=True)
        for ours, exact in zip(found, alone(case, inputs, False), strict=True):
            torch.testing.assert_close(ours.cpu(), exact, msg=lambda m, c=case: f"reverse {c}: {m}")


def test_gradients_where_neither_output_is_used_are_zero_whatever_the_parameters(functions, device):
    case = Case((2, 4, 3, 3), scale_map="tanh")
    z, *_ = draw(case, device)
    params = torch.full_like(z, nan)
    for found in (
        functions.affine_coupling_backward(None, None, z, params, *case.codes, False),
        functions.affine_coupling_reverse(None, None, z, params, *case.codes)[1:],
    ):
        assert all(torch.equal(t, torch.zeros_like(t)) for t in found)


@quick
@pytest.mark.parametrize("inverse", [False, True])
def test_the_log_determinant_alone_where_the_output_overflows(implementation, device, inverse):
    """To the second order, through the public functions."""
    s = torch.tensor([[-100.0 if inverse else 100.0, 0.5, -1.0, 2.0]], device=device).requires_grad_()
    x = torch.ones(1, 8, device=device, requires_grad=True)
    function = ops.affine_coupling_inverse if inverse else ops.affine_coupling
    z, ldj = function(x, torch.cat([s.square() * s.sign(), torch.zeros_like(s)], 1))
    assert z[0, 4].isinf()
    first, by_x = torch.autograd.grad(ldj.sum(), (s, x), create_graph=True, allow_unused=True, materialize_grads=True)
    (second,) = torch.autograd.grad(first.sum(), s)
    sign = -1 if inverse else 1
    torch.testing.assert_close(first.detach(), sign * 2 * s.detach().abs())
    torch.testing.assert_close(second, sign * 2 * s.detach().sign())
    assert torch.equal(by_x, torch.zeros_like(x))


@pytest.mark.parametrize("scale_map,inverse", [("exp", False), ("sigmoid", True), ("additive", False)])
def test_the_log_determinant_gives_nothing_to_what_it_does_not_depend_on(implementation, device, scale_map, inverse):
    """Not a zero, which an infinite slope before the operator would make NaN."""
    function = ops.affine_coupling_inverse if inverse else ops.affine_coupling
    far, near = (torch.zeros(1, 4, device=device, requires_grad=True) for _ in range(2))
    params = near.sqrt()[:, :2] if scale_map == "additive" else near + 1
    z, ldj = function(far.sqrt(), params, scale_map=scale_map)
    loss = ldj.sum() + torch.zeros((), device=device, requires_grad=True)
    by_far, by_near = torch.autograd.grad(loss, (far, near), allow_unused=True)
    assert by_far is None and (by_near is None if scale_map == "additive" else by_near.isfinite().all())


def test_expanded_gradients_and_inputs_are_left_alone(implementation, functions, device):
    case = Case((2, 4, 3, 3), dtypes=(F64, F64), spread=1.5)
    x, params, *_ = draw(case, device)
    x.requires_grad_(), params.requires_grad_()
    z, ldj = ops.affine_coupling(x, params)
    before = x.detach().clone(), params.detach().clone()
    expanded = torch.ones((), dtype=z.dtype, device=device).expand_as(z)
    torch.autograd.backward((z, ldj), (expanded, torch.ones((), dtype=ldj.dtype, device=device).expand_as(ldj)))
    dense = functions.affine_coupling_backward(
        expanded.contiguous(), torch.ones_like(ldj), x.detach(), params.detach(), *case.codes, False
    )
    torch.testing.assert_close(x.grad, dense[0])
    torch.testing.assert_close(params.grad, dense[1])
    assert torch.equal(x.detach(), before[0]) and torch.equal(params.detach(), before[1])


def test_gradient_at_pass_through_pixels_of_the_parameters_is_exactly_zero(implementation, device):
    x, params, *_ = draw(Case((2, 3, 5, 4), "checkerboard", "tanh", spread=1.5), device)
    params.requires_grad_()
    z, ldj = ops.affine_coupling(x, params, scale_map="tanh", split="checkerboard")
    (grad,) = torch.autograd.grad(z.square().sum() + ldj.sum(), params)
    transformed = torch.tensor([[(h + w) % 2 == 1 for w in range(4)] for h in range(5)], device=device)
    assert (grad[..., ~transformed] == 0).all()
    assert (grad[..., transformed] != 0).all()


# --- non-finite and extreme values ----------------------------------------------------------------------------------


@pytest.mark.implementations(when=slow_few(MET_BY_HALVES, "scale_map", "split", "flip"))
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("flip", [False, True])
def test_the_pass_through_half_is_copied_to_the_bit_and_reaches_nothing(
    implementation, functions, device, poisoned_memory, scale_map, split, flip
):
    """NaN, its payload, infinities and -0 pass; neither the other half nor a sum ever sees them or their
    parameters."""

    def as_bits(t):
        if implementation.name.startswith(("triton", "cuda")):
            return bits(t)
        # torch's own conversion between types, by which a CPU computes in 16 bits, drops a payload, and the definition
        # of the checkerboard, x * 1 + 0, the sign of a zero
        t = t.cpu().masked_fill(t.cpu().isnan(), 12345.0)
        return t if implementation.name == "reference" else bits(t)

    turn = SCALE_MAPS.index(scale_map) + 4 * SPLITS.index(split) + flip
    pairs = list(itertools.product([(2, 4, 6, 8), (3, 2, 5, 3), (2, 4, 3, 4)], DTYPES, ["halves", "interleaved"]))
    for shape, dtypes, layout in implementation.some(pairs, turn, interpreted=pairs[turn::18], emulated=pairs[::2]):
        case = Case(shape, split, scale_map, layout, flip, dtypes)
        clean, dirty, moved = draw(case, device), draw(case, device), case.moved()
        for t in (dirty.x, dirty.grad):
            odd = torch.tensor([nan, inf, -inf, -0.0, nan], dtype=t.dtype)
            odd[4:] = bits(odd[4:]).add(3).view(t.dtype)
            junk = odd.repeat(moved.numel() // 5 + 1)[: moved.numel()].view(case.shape)
            t.copy_(torch.where(moved, t.cpu(), junk))
        pixels = None
        if split == "checkerboard":
            pixels = moved[:1, :1].expand(case.params_shape)  # of params; the others are ignored
            dirty.params.copy_(torch.where(pixels, dirty.params.cpu(), nan))
        expected = run_all(functions, case, clean)
        for name, value in run_all(functions, case, dirty).items():
            where = f"{case}: {name}"
            ours, theirs = as_bits(value), as_bits(expected[name])
            if name.endswith("ldj"):
                assert torch.equal(ours, theirs), where
            elif name.endswith("grad_params"):
                assert torch.equal(ours, theirs), where
                if pixels is not None:
                    assert (ours[~pixels] == 0).all(), f"{where} is not +0 at pass-through pixels"
            else:
                source = dirty.grad if "grad" in name else dirty.x
                assert torch.equal(ours[moved], theirs[moved]), where
                assert torch.equal(ours[~moved], as_bits(source)[~moved]), f"{where} does not pass bit for bit"


@pytest.mark.implementations(only=("cpu", "triton", "cuda", "cuda emulated"))
@pytest.mark.every_build
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_extremes_are_not_finite_where_the_definition_is_not(functions, device, scale_map, split, dtype):
    """NaN and infinities appear where the reference has them and nowhere else.

    Where the reference in this dtype and the one in fp64 disagree (an intermediate value that underflows or overflows
    in the narrow one), either will do.
    """
    values = [nan, inf, -inf, 0.0, -0.0, 1e-40, -1e-40, 88.0, -88.0, 104.0, -104.0, 3e4, -3e4]
    if scale_map == "tanh" and dtype == F64:
        # the reference's slope 1 − tanh² is 0 there, where the true one is 4·e^−176 and the product with inf is inf
        values = [v for v in values if abs(v) not in (88.0, 104.0)]
    pairs = torch.tensor(list(itertools.product(values, repeat=2)), dtype=F64)
    count = len(pairs)
    shape = (1, 2, count) if split == "channel" else (1, 1, 1, 2 * count)
    case = Case(shape, split, scale_map, dtypes=(dtype, dtype))
    x, params = torch.ones(shape, dtype=F64), torch.zeros(case.params_shape, dtype=F64)
    if split == "channel":
        params[0, 0], x[0, 1] = pairs.T
    else:  # the transformed pixels of the only row
        params[0, 0, 0, 1::2], x[0, 0, 0, 1::2] = pairs.T
    ldj = torch.ones(1, dtype=torch.promote_types(dtype, F32))
    inputs = Inputs(x.to(dtype), params.to(dtype), torch.ones(shape, dtype=dtype), ldj)
    same, exact = run_all(reference, case, inputs), run_all(reference, case, inputs.wide())
    for name, value in run_all(functions, case, inputs.map(lambda t: t.to(device))).items():
        if "ldj" in name:
            continue  # one sum over all pairs: NaN
        value, narrow, wide = value.cpu(), same[name], exact[name].to(value.dtype)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            wrong = (kind(value) != kind(narrow)) & (kind(value) != kind(wide))
            if wrong.any():
                at = tuple(wrong.nonzero()[0].tolist())
                got, a, b = (t[at].item() for t in (value, narrow, wide))
                raise AssertionError(f"{case}: {name} at {at} is {got}, reference {a}, in fp64 {b}")


@compiled
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh"])
def test_extreme_parameters_are_what_the_definition_makes_of_them(
    implementation, functions, device, scale_map, inverse, dtype
):
    s = [0.0, -0.0, 1e-30, -1e-30, 5.0, 60.0, -60.0, 87.0, -86.0, 88.0, -88.0, 100.0, -100.0, 104.0, -104.0, -300.0]
    s += [1e4, -1e4, inf, -inf, nan]
    case = Case((len(s), 2), scale_map=scale_map, dtypes=(dtype, dtype))
    params = torch.tensor([[v, 0.5] for v in s], dtype=dtype)
    x = torch.tensor([[0.25, 2.0]] * len(s), dtype=dtype)
    inputs = Inputs(x, params, torch.ones_like(x), torch.ones(len(s), dtype=dtype))
    theirs = run_all(reference, case, inputs)
    for name, ours in run_all(functions, case, inputs.map(lambda t: t.to(device))).items():
        if name == "reverse grad_params" or name.startswith("forward" if inverse else "inverse"):
            continue  # there x σ is z - t, finite and right, where the reference multiplies (z - t) / σ by σ: 0 * inf
        ours, finite = ours.cpu(), theirs[name].isfinite()
        # between the two an exponential may overflow or not, underflow or not
        assert torch.equal(ours.isnan(), theirs[name].isnan()), name
        assert torch.equal(ours.isinf(), theirs[name].isinf()), name
        if name in ("forward z", "forward ldj"):
            # Triton's exponential is 0 where the true one is no normal number
            close = {"rtol": 3e-7, "atol": 2.0**-126 if "triton" in implementation.name else 1e-44}
        else:  # some units in the last place of 1: the reference's tanh slope, 1 - tanh^2, is off by that much
            close = {"rtol": 3e-5, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(ours[finite], theirs[name][finite], **close, msg=lambda m, n=name: f"{n}: {m}")


def test_sigmoid_log_scale_stays_finite_where_the_logarithm_of_sigmoid_does_not(implementation, device):
    params = torch.tensor([[-200.0, 0.0]], device=device)
    ldj = ops.affine_coupling(torch.ones(1, 2, device=device), params, scale_map="sigmoid")[1]
    assert ldj.item() == -198.0


# --- memory: addresses, strides, empty tensors ------------------------------------------------------------------------


@pytest.mark.implementations(when=lambda i, dtypes, **_: "inter" not in i.name or dtypes == (F32, F32))
@compiled
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("split", SPLITS)
@by_dtypes
def test_misaligned_inputs(implementation, poisoned_memory, offset, split, dtypes):
    layouts = LAYOUTS if not implementation.is_slow else [LAYOUTS[offset % 2]]
    for layout in layouts:
        case = Case(
            (2, 4, 12, 16) if not implementation.is_slow else (2, 4, 4, 8), split, "tanh", layout, dtypes=dtypes
        )
        found = check_values(implementation, case, offset)
        if not implementation.name.startswith("cuda"):  # which add up in another order where accesses are narrow
            plain = run_all(implementation.functions, case, draw(case, implementation.device))
            assert all(torch.equal(value, plain[name]) for name, value in found.items())


@compiled
@by_dtypes
def test_one_misaligned_input(implementation, poisoned_memory, dtypes):
    """Each input in turn an element off, all others aligned."""
    for which in range(3):
        place = lambda i, t, which=which: off_address(t, 1) if i == which else t  # noqa: E731
        check_values(implementation, Case((2, 4, 4, 8), dtypes=dtypes), place=place)


@pytest.mark.implementations(only=("cpu", "triton interpreted", "cuda emulated"))
@pytest.mark.parametrize("after", [False, True])
@by_dtypes
def test_no_access_outside_the_inputs(implementation, dtypes, after):
    """An access outside ends the process; on a GPU compute-sanitizer looks (tools/sanitize.py)."""
    turn = 2 * DTYPES.index(dtypes) + after
    for split in implementation.some(SPLITS, interpreted=[SPLITS[(turn // 2 + after) % 2]]):
        shapes = implementation.some(SHAPES[split], interpreted=INTERPRETED, emulated=EMULATED[split])
        every = pairwise(shapes, ["exp", "additive"], LAYOUTS, (False, True))
        for options in implementation.some(every, interpreted=[every[turn % len(every)]]):
            shape, scale_map, layout, flip = options
            case = Case(shape, split, scale_map, layout, flip, dtypes)
            check_values(implementation, case, place=lambda i, t: beside_forbidden_memory(t, after))


@compiled
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("split", SPLITS)
def test_empty_tensors_of_the_operators(functions, device, poisoned_memory, split, scale_map):
    """No samples, or samples without elements: empty outputs, and a log-determinant of zero for each sample."""
    for shape in [(0, 4), (0, 2, 3, 3), (3, 0), (3, 4, 0), (3, 2, 0, 5), (3, 0, 2, 2), (3, 4, 0, 2)]:
        if split == "checkerboard" and len(shape) != 4:
            continue
        for dtype in (F32, BF16, F64):
            case = Case(shape, split, scale_map, dtypes=(dtype, dtype))
            inputs = draw(case, device)
            expected = run_all(reference, case, inputs.map(torch.Tensor.cpu))
            for name, value in run_all(functions, case, inputs).items():
                assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), f"{case}: {name}"
                assert torch.equal(value.cpu(), expected[name]), f"{case}: {name}"
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 2)])
def test_empty_tensors(implementation, device, shape):
    x, params, *_ = draw(Case(shape, dtypes=(F64, F64)), device)
    x.requires_grad_(), params.requires_grad_()
    for function in (ops.affine_coupling, ops.affine_coupling_inverse):
        z, ldj = function(x, params)
        assert z.shape == x.shape and ldj.shape == (shape[0],) and (ldj == 0).all()
        grad_x, grad_params = torch.autograd.grad(z.sum() + ldj.sum(), (x, params))
        assert grad_x.shape == x.shape and grad_params.shape == params.shape


def test_an_input_at_an_odd_address_gives_the_same_and_is_left_alone(implementation, device):
    """The input is a view into storage with guards on both sides."""
    x, params, *_ = draw(Case((3, 6, 5, 7), scale_map="tanh", spread=1.5), device)
    store = torch.full((x.numel() + 9,), 12345.0, device=device)
    view = store[5 : 5 + x.numel()].view(x.shape).copy_(x)
    before = store.clone()
    z, ldj = ops.affine_coupling(view, params, scale_map="tanh")
    z_plain, ldj_plain = ops.affine_coupling(x, params, scale_map="tanh")
    assert torch.equal(store, before)
    assert torch.equal(z, z_plain) and torch.equal(ldj, ldj_plain)
    assert z.data_ptr() != view.data_ptr()


@compiled
def test_any_stride(implementation, device):
    """Transposed and sliced inputs, an expanded incoming gradient: the values of their dense copies, bit for bit."""
    room = torch.randn(6, 5, 4, 20).to(device)
    x = room.transpose(1, 2)[:, :, :, ::2]  # [6, 4, 5, 10]
    params = torch.randn(6, 10, 5, 4).to(device).permute(0, 3, 2, 1)
    results = []
    for leaves in ((x, params), (x.contiguous(), params.contiguous())):
        leaves = [t.detach().requires_grad_() for t in leaves]
        z, ldj = ops.affine_coupling(*leaves, scale_map="tanh")
        (z.sum() + ldj.sum()).backward()
        results.append([z, ldj, *(t.grad for t in leaves)])
    for odd, dense in zip(*results, strict=True):
        assert torch.equal(odd, dense)


@st.composite
def any_case(draw):
    split = draw(st.sampled_from(SPLITS))
    batch, channels = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if split == "channel":
        shape = (batch, 2 * channels, *draw(st.lists(st.integers(1, 40), max_size=2)))
    else:
        shape = (batch, channels, draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    scale_map, layout = draw(st.sampled_from(SCALE_MAPS)), draw(st.sampled_from(LAYOUTS))
    return Case(shape, split, scale_map, layout, draw(st.booleans()), draw(st.sampled_from(DTYPES)))


@pytest.mark.implementations(only=("cpu", "cuda emulated"))
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=any_case(), offset=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_any_shape_option_and_address(implementation, poisoned_memory, case, offset, seed):
    check_values(implementation, case, offset, seed)


@pytest.mark.implementations(only=("cpu",))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 5),
    half=st.integers(1, 5),
    h=st.integers(1, 9),
    w=st.integers(1, 40),
    offset=st.integers(0, 3),
    step=st.integers(1, 3),
    transpose=st.booleans(),
    option=st.sampled_from(OPTIONS),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape_stride_offset_and_dtype(
    implementation, n, half, h, w, offset, step, transpose, option, dtypes, seed
):
    scale_map, split, layout, flip = option
    case = Case((n, 2 * half, h, w), split, scale_map, layout, flip, dtypes, 1.5)
    x, params, *_ = draw(case, seed=seed)
    with gk.use_backend("reference"):
        expected = ops.affine_coupling(x, params, **case.options)
    odd_x, odd_params = (strided(t, offset, step) for t in (x, params))
    if transpose:
        odd_x = x.transpose(2, 3).contiguous().transpose(2, 3)
    z, ldj = ops.affine_coupling(odd_x, odd_params, **case.options)
    eps = torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(z, expected[0], rtol=4 * eps, atol=8 * eps)
    summed = float(params.double().abs().sum()) / max(n, 1)
    torch.testing.assert_close(ldj, expected[1], rtol=0, atol=2 * torch.finfo(ldj.dtype).eps * (summed + 1))


# --- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.threads
@quick  # where the others run, one thread goes through a launch in its order
@compiled
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("split,scale_map", [("channel", "sigmoid"), ("checkerboard", "sigmoid"), ("channel", "exp")])
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(
    implementation, functions, device, split, scale_map, dtype
):
    shape = (3, 48, 33, 32) if implementation.name == "cpu" else (32, 12, 64, 64)
    case = Case(shape, split, scale_map, dtypes=(dtype, dtype), spread=1.5)
    inputs, threads = draw(case, device), torch.get_num_threads()
    counts = (1, 2, 2, 5) if implementation.name == "cpu" else (threads,) * 10
    runs = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            runs.append(run_all(functions, case, inputs))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(bits(run[name]), bits(value)) for name, value in runs[0].items())


@compiled
def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch(implementation, functions, device):
    case = Case((5, 4, 4, 4), scale_map="tanh")
    inputs = draw(case, device)
    together = run_all(functions, case, inputs)
    alone = run_all(functions, Case((1, 4, 4, 4), scale_map="tanh"), inputs.map(lambda t: t[3:4].clone()))
    assert all(torch.equal(value, together[name][3:4]) for name, value in alone.items())
    if not implementation.name.startswith("cuda"):
        return  # how samples share a tile is not promised
    for shape in ((3, 12, 24, 16), (130, 6), (5, 4, 3, 3)):
        case = Case(shape)
        x, params, *_ = draw(case, device)
        _, together = functions.affine_coupling(x, params, *case.codes, False)
        for n in range(shape[0]):
            _, alone = functions.affine_coupling(x[n : n + 1].clone(), params[n : n + 1].clone(), *case.codes, False)
            assert torch.equal(bits(alone)[0], bits(together)[n]), f"{case}: sample {n}"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_autocast_pairs_fp32_inputs_with_half_params(implementation, device):
    case = Case((4, 8, 6, 6), dtypes=(F32, BF16))
    x, params, *_ = draw(case, device)
    with torch.autocast(device, dtype=BF16):
        z, ldj = ops.affine_coupling(x, params)
    assert z.dtype == F32 and ldj.dtype == F32
    truth, _ = reference.affine_coupling(x.cpu().double(), params.cpu().double(), *case.codes, False)
    torch.testing.assert_close(z.cpu().double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.implementations(only=("cuda", "cuda emulated"))
def test_the_compiled_operators_refuse_unknown_codes_and_wrong_pairs_of_dtypes(functions, device):
    x = torch.zeros(2, 4, device=device)
    with pytest.raises(RuntimeError, match="scale_map must be 0 to 8, got 9"):
        functions.affine_coupling(x, x, 9, 1.0, 0, 0, False, False)
    with pytest.raises(RuntimeError, match="params must have x's dtype"):
        functions.affine_coupling(x.bfloat16(), x, 0, 1.0, 0, 0, False, False)


@pytest.mark.implementations(only=("cpu", "cuda", "cuda emulated"))
def test_the_compiled_operators_read_no_other_dtype_or_order(functions, device):
    case = Case((2, 4, 3, 3))
    x, params, grad, grad_ldj = draw(case, device)
    last = (*case.codes, False)
    for call in (
        lambda: functions.affine_coupling(x.mT, params, *last),
        lambda: functions.affine_coupling_backward(grad.double(), grad_ldj, x, params, *last),
        lambda: functions.affine_coupling_backward(grad, grad_ldj.bfloat16(), x, params, *last),
        lambda: functions.affine_coupling_reverse(grad, grad_ldj[:1].expand(2), x, params, *case.codes),
    ):
        with pytest.raises(RuntimeError, match="a kernel must be given contiguous float32 here"):
            call()


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
def test_reverse_takes_gradients_of_any_dtype(implementation, device, dtype):
    case = Case((2, 4, 3, 3), "checkerboard", "tanh")
    z, params, grad_z, grad_ldj = draw(case, device)
    grad_z, grad_ldj = grad_z.to(dtype), grad_ldj.to(dtype)
    expected = ops.affine_coupling_reverse(grad_z.float(), grad_ldj.float(), z, params, **case.options)
    for grads in ((grad_z, grad_ldj), (grad_z.float(), grad_ldj), (grad_z, grad_ldj.float())):
        for ours, theirs in zip(ops.affine_coupling_reverse(*grads, z, params, **case.options), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_reverse_refuses_to_be_differentiated():
    if backends.why_missing("cpu"):
        pytest.skip("needs the compiled CPU library")
    x, params, *_ = draw(Case((2, 4, 3, 3), dtypes=(F64, F64)))
    out = ops.affine_coupling_reverse(torch.ones_like(x), None, x.requires_grad_(), params)
    with pytest.raises(RuntimeError, match="reversible=False"):
        out[0].sum().backward()


@pytest.mark.parametrize(
    "call,error,sentence",
    [
        (
            lambda x, p: ops.affine_coupling(x[:, :3], p),
            ValueError,
            "even number of channels for the channel split, got [2, 3, 3, 3]",
        ),
        (lambda x, p: ops.affine_coupling(x, p[:, :3]), ValueError, "params must be [N, 2*C, ...] = [2, 4, 3, 3]"),
        (
            lambda x, p: ops.affine_coupling(x, p, scale_map="additive"),
            ValueError,
            "params must be [N, C, ...] = [2, 2, 3, 3]",
        ),
        (lambda x, p: ops.affine_coupling(x, p, split="checkerboard"), ValueError, "[N, 2*C, ...] = [2, 8, 3, 3]"),
        (lambda x, p: ops.affine_coupling(x[..., 0], p, split="checkerboard"), ValueError, "x must be [N, C, H, W]"),
        (lambda x, p: ops.affine_coupling(x[:, 0, 0, 0], p), ValueError, "x must be [N, C, ...], got [2]"),
        (
            lambda x, p: ops.affine_coupling(x.long(), p),
            TypeError,
            "x must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
        (lambda x, p: ops.affine_coupling(x, p.double()), TypeError, "params must have x's dtype"),
        (lambda x, p: ops.affine_coupling([1.0], p), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda x, p: ops.affine_coupling(x, p, scale_map="expp"),
            ValueError,
            "scale_map must be one of exp, sigmoid, tanh, additive",
        ),
        (
            lambda x, p: ops.affine_coupling(x, p, split="row"),
            ValueError,
            "split must be one of channel, checkerboard, none, alternate, got 'row'",
        ),
        (
            lambda x, p: ops.affine_coupling(x, p, layout="half"),
            ValueError,
            "layout must be one of halves, interleaved",
        ),
        (
            lambda x, p: ops.affine_coupling(x, p.to("meta")),
            ValueError,
            "x and params must be on one device, got cpu and meta",
        ),
        (
            lambda x, p: ops.affine_coupling_reverse(x[:1], None, x, p),
            ValueError,
            "grad_z must be [N, C, ...] = [2, 4, 3, 3]",
        ),
        (lambda x, p: ops.affine_coupling_reverse(x, x, x, p), ValueError, "grad_ldj must be [N] = [2]"),
        (
            lambda x, p: ops.affine_coupling_reverse(x, x[:, 0, 0, 0].to("meta"), x, p),
            ValueError,
            "z and grad_ldj must be on one device, got cpu and meta",
        ),
        (
            lambda x, p: ops.affine_coupling_reverse(x.long(), None, x, p),
            TypeError,
            "grad_z must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error) as caught:
        call(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3))
    text = str(caught.value)
    assert text.startswith("affine_coupling: ") and sentence in text and "\n" not in text
