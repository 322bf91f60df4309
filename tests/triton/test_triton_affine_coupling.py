"""The Triton kernels of affine_coupling against the reference and its fp64 oracle."""

import itertools
import os

import pytest
import torch

from genkernels.reference import affine_coupling as reference
from genkernels.triton import affine_coupling as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

MAPS = {"exp": 0, "sigmoid": 1, "tanh": 2, "additive": 3}
SPLITS = {"channel": 0, "checkerboard": 1}
LAYOUTS = {"halves": 0, "interleaved": 1}
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32-bf16": (torch.float32, torch.bfloat16),
}
# several samples a tile; odd sizes, where a unit is one number; one sample a tile of 8-number units
SHAPES = [(3, 4, 2, 4), (5, 6, 3, 7), (2, 2, 16, 24)]

inf, nan = float("inf"), float("nan")


def inputs(shape, scale_map, split, dtypes=DTYPES["fp32"], device="cpu", spread=1.0):
    """`(x, params, grad_output, grad_ldj)`."""
    dtype, params_dtype = dtypes
    moved = shape[1] if split == SPLITS["checkerboard"] else shape[1] // 2
    params_shape = (shape[0], moved if scale_map == MAPS["additive"] else 2 * moved, *shape[2:])
    wide = torch.promote_types(dtype, torch.float32)
    x, g = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
    params = (spread * torch.randn(params_shape, dtype=torch.float64)).to(device, params_dtype)
    return x, params, g, torch.randn(shape[0], dtype=torch.float64).to(device, wide)


def everything(module, x, params, g, g_ldj, codes, inverse):
    """All outputs of the three operators, by name; "reverse" reads x as if it were an output."""
    out = dict(zip(("output", "ldj"), module.affine_coupling(x, params, *codes, inverse), strict=True))
    grads = module.affine_coupling_backward(g, g_ldj, x, params, *codes, inverse)
    out |= zip(("grad_input", "grad_params"), grads, strict=True)
    if not inverse:
        rebuilt = module.affine_coupling_reverse(g, g_ldj, x, params, *codes)
        out |= zip(("reverse_input", "reverse_grad_input", "reverse_grad_params"), rebuilt, strict=True)
    return out


def widened(*tensors):
    return [t if t is None else t.double() for t in tensors]


def oracle(x, params, g, g_ldj, codes, inverse):
    return everything(reference, *widened(x, params, g, g_ldj), codes, inverse)


def assert_close_to_oracle(ours, theirs, exact, what):
    """Error against fp64 at most twice the reference's, or two roundings of the largest number: on so few numbers the
    reference is sometimes exact by luck. `test_error_is_that_of_the_reference` leaves luck out."""
    for name, true in exact.items():
        a, b = ours[name], theirs[name]
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), (name, what)
        assert a.is_contiguous(), (name, what)
        error, allowed = ((t.double() - true).abs().max().item() for t in (a, b))
        size = true.abs().max().item()
        if name == "ldj":  # the sums on the way to it are as large as a random walk's
            size = max(size, (exact["output"][0].numel()) ** 0.5)
        assert error <= max(2 * allowed, 2 * torch.finfo(a.dtype).eps * size), (name, what, error, allowed, size)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale_map", MAPS)
def test_every_combination_agrees_with_the_reference(device, poisoned, scale_map, split, layout, dtypes):
    code = MAPS[scale_map], SPLITS[split], LAYOUTS[layout]
    shapes = SHAPES
    if not INTERPRETED:  # a GPU compiles each kernel for each shape: one of them, each time another
        shapes = [SHAPES[(sum(code) + list(DTYPES).index(dtypes)) % len(SHAPES)]]
    for shape, flip, inverse in itertools.product(shapes, (False, True), (False, True)):
        given = inputs(shape, *code[:2], DTYPES[dtypes], device)
        before = [t.clone() for t in given]
        ours = everything(kernels, *given, (*code, flip), inverse)
        theirs = everything(reference, *given, (*code, flip), inverse)
        if dtypes == "fp64":  # itself the oracle: the kernels' functions are good to a unit, as torch's are
            for name, a in ours.items():
                torch.testing.assert_close(a, theirs[name], rtol=1e-13, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_close_to_oracle(ours, theirs, oracle(*given, (*code, flip), inverse), (shape, flip, inverse))
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh"])
def test_error_is_that_of_the_reference(device, scale_map, inverse, spread):
    """At most twice, in the maximum over 65,536 numbers and in the mean square, for fp32."""
    codes = (MAPS[scale_map], 0, 0, False)
    given = inputs((16, 8, 32, 32), codes[0], 0, device=device, spread=spread)
    exact = oracle(*given, codes, inverse)
    theirs = everything(reference, *given, codes, inverse)
    for name, ours in everything(kernels, *given, codes, inverse).items():
        mine, its = ours.double() - exact[name], theirs[name].double() - exact[name]
        assert mine.norm() <= 2 * its.norm(), name
        if name != "ldj":  # of which there are 16: their maximum is chance
            assert mine.abs().max() <= 2 * its.abs().max(), name


@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "fp32-bf16"])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh"])
def test_half_inputs_lose_nothing_but_the_last_rounding(device, scale_map, dtypes):
    codes = (MAPS[scale_map], 0, 0, False)
    given = inputs((8, 8, 16, 16), codes[0], 0, DTYPES[dtypes], device)
    exact = oracle(*given, codes, False)
    theirs = everything(reference, *given, codes, False)
    for name, ours in everything(kernels, *given, codes, False).items():
        mine, its = ours.double() - exact[name], theirs[name].double() - exact[name]
        limit = 2 if ours.dtype == torch.float32 else 1.01
        if INTERPRETED and ours.dtype == torch.bfloat16:
            limit = 2.5  # the interpreter cuts bf16 off where a GPU rounds to nearest
        assert mine.norm() <= limit * its.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("shape", [(1, 2), (2051, 2), (7, 10), (33, 64), (4, 6, 1), (2, 4, 5, 3, 2)])
def test_points_signals_and_volumes(device, poisoned, shape, scale_map, layout):
    codes = (MAPS[scale_map], 0, LAYOUTS[layout], True)
    for inverse in (False, True):
        given = inputs(shape, codes[0], 0, device=device)
        args = (*given, codes, inverse)
        assert_close_to_oracle(everything(kernels, *args), everything(reference, *args), oracle(*args), shape)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(3, 2, 67, 71), (2, 8, 40, 36), (1, 4, 40, 64)])
def test_a_sample_larger_than_a_tile(device, poisoned, shape, split):
    for layout, inverse in itertools.product(LAYOUTS.values(), (False, True)):
        codes = (MAPS["sigmoid"], SPLITS[split], layout, False)
        given = inputs(shape, *codes[:2], device=device)
        blocks = kernels._plan_of(given[0], given[1], *codes).sizes[-1]
        assert blocks > 1, "the shape no longer takes several tiles"
        args = (*given, codes, inverse)
        exact = oracle(*args)
        ours = everything(kernels, *args)
        assert_close_to_oracle(ours, everything(reference, *args), exact, shape)
        # the log-determinant's own size is some hundreds: its error is that of adding in fp32
        assert (ours["ldj"] - exact["ldj"]).abs().max() <= 2.0**-22 * exact["ldj"].abs().max()
    codes = (MAPS["additive"], SPLITS[split], 0, False)
    given = inputs(shape, *codes[:2], device=device)
    assert torch.equal(kernels.affine_coupling(*given[:2], *codes, False)[1].cpu(), torch.zeros(shape[0]))


def test_small_samples_take_one_launch_and_large_ones_two(device):
    def blocks(*shape):
        return kernels._plan(shape, 4, 4, 0, 0, 0, False).sizes[-1]

    assert [blocks(64, 12, 16, 16), blocks(64, 24, 8, 8), blocks(4096, 2), blocks(8, 8, 32, 32)] == [1, 1, 1, 1]
    assert blocks(64, 48, 32, 32) == 24


def test_partial_sums_of_many_tiles(device):
    """More tiles than the second kernel's tile is wide."""
    partial = torch.randn(3, 1300, dtype=torch.float64).to(device, torch.float32)
    ldj = torch.full((3,), nan, device=device)
    tile = kernels._sum_tile(1300)
    assert tile["COLS"] < 1300
    kernels._sum_kernel[(-(-3 // tile["ROWS"]),)](partial, ldj, 3, 1300, **tile, num_warps=4, enable_fp_fusion=True)
    torch.testing.assert_close(ldj.double(), partial.double().sum(1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale_map", MAPS)
def test_empty_batch_and_empty_image(device, scale_map, split):
    codes = (MAPS[scale_map], SPLITS[split], 0, False)
    for shape in [(0, 4, 2, 2), (3, 4, 0, 2), (3, 0, 2, 2)]:
        x, params, g, g_ldj = inputs(shape, *codes[:2], device=device)
        output, ldj = kernels.affine_coupling(x, params, *codes, False)
        assert output.shape == x.shape and torch.equal(ldj, torch.zeros(shape[0], device=device))
        grads = kernels.affine_coupling_backward(g, g_ldj, x, params, *codes, False)
        assert [t.shape for t in grads] == [x.shape, params.shape]
        rebuilt = kernels.affine_coupling_reverse(g, g_ldj, x, params, *codes)
        assert [t.shape for t in rebuilt] == [x.shape, x.shape, params.shape]


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale_map", MAPS)
def test_a_missing_gradient_counts_as_zero(device, poisoned, scale_map, split, dtypes):
    codes = (MAPS[scale_map], SPLITS[split], 0, False)
    x, params, g, g_ldj = inputs((3, 4, 2, 6), *codes[:2], DTYPES[dtypes], device)
    for gradients in [(None, g_ldj), (g, None), (None, None)]:
        zeros = [
            torch.zeros_like(t) if given is None else given for given, t in zip(gradients, (g, g_ldj), strict=True)
        ]
        for inverse in (False, True):
            ours = kernels.affine_coupling_backward(*gradients, x, params, *codes, inverse)
            theirs = kernels.affine_coupling_backward(*zeros, x, params, *codes, inverse)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        ours = kernels.affine_coupling_reverse(*gradients, x, params, *codes)
        theirs = kernels.affine_coupling_reverse(*zeros, x, params, *codes)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def bits(t):
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


@pytest.mark.parametrize("dtypes", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_the_pass_through_half_is_copied_to_the_bit_and_reaches_nothing(device, poisoned, split, flip, dtypes):
    codes = (MAPS["tanh"], SPLITS[split], LAYOUTS["interleaved"], flip)
    x, params, g, g_ldj = inputs((2, 4, 3, 4), *codes[:2], DTYPES[dtypes], device)
    if split == "channel":
        passes = torch.zeros(4, 3, 4, dtype=torch.bool)
        passes[slice(2, 4) if flip else slice(0, 2)] = True
        ignored = None
    else:
        even = (torch.arange(3)[:, None] + torch.arange(4)) % 2 == 0
        passes = (even != flip).expand(4, 3, 4)
        ignored = (even != flip).expand(8, 3, 4).to(device)
    passes = passes.to(device)

    def spoil(t, where):
        odd = torch.tensor([nan, inf, -inf, -0.0], device=device, dtype=t.dtype)
        odd[0:1] = bits(odd[0:1]).add(3).view(t.dtype)  # a NaN with a payload
        return torch.where(where, odd.repeat(t.numel() // 4).view_as(t), t)

    spoiled = spoil(x, passes), params if ignored is None else spoil(params, ignored), spoil(g, passes), g_ldj
    for inverse in (False, True):
        clean = everything(kernels, x, params, g, g_ldj, codes, inverse)
        dirty = everything(kernels, *spoiled, codes, inverse)
        for name, t in dirty.items():
            source = {"output": 0, "grad_input": 2, "reverse_input": 0, "reverse_grad_input": 2}.get(name)
            if source is None:
                assert torch.equal(bits(t), bits(clean[name])), name
            else:
                assert torch.equal(bits(t)[:, passes], bits(spoiled[source])[:, passes]), name
                assert torch.equal(bits(t)[:, ~passes], bits(clean[name])[:, ~passes]), name
        if ignored is not None:
            assert (dirty["grad_params"][:, ignored] == 0).all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_and_non_finite_parameters(device, scale_map, inverse, dtype):
    """Infinite, NaN and finite where the reference is."""
    s = [0.0, -0.0, 1e-30, 60.0, -60.0, 87.0, -86.0, 100.0, -100.0, -300.0, 1e4, -1e4, inf, -inf, nan, 5.0]
    params = torch.tensor([[v, 0.5] for v in s], dtype=dtype, device=device)
    x = torch.tensor([[0.25, 2.0]] * len(s), dtype=dtype, device=device)
    codes = (MAPS[scale_map], 0, 0, False)
    g, g_ldj = torch.ones_like(x), torch.ones(len(s), dtype=dtype, device=device)
    ours = everything(kernels, x, params, g, g_ldj, codes, inverse)
    theirs = everything(reference, x, params, g, g_ldj, codes, inverse)
    for name, t in ours.items():
        if name == "reverse_grad_params":
            continue  # there x σ is z - t, finite and right, where the reference multiplies (z - t) / σ by σ: 0 * inf
        finite = theirs[name].isfinite()
        assert torch.equal(t.isnan(), theirs[name].isnan()), name
        assert torch.equal(t.isinf(), theirs[name].isinf()), name
        # a few units in the last place of 1: the reference's tanh slope, 1 - tanh^2, is off by that much
        atol = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            t[finite], theirs[name][finite], rtol=3e-5, atol=atol, msg=lambda m, n=name: f"{n} {m}"
        )


def test_sigmoid_log_scale_stays_finite_where_the_logarithm_of_sigmoid_does_not(device):
    params = torch.tensor([[-200.0, 0.0]], device=device)
    ldj = kernels.affine_coupling(torch.ones(1, 2, device=device), params, MAPS["sigmoid"], 0, 0, False, False)[1]
    assert ldj.item() == -198.0


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (2, 4, 4, 8), (1, 4, 40, 64)])
def test_nothing_outside_the_tensors_is_read_or_written(device, monkeypatch, shape, split):
    """NaN lies around every input, a sentinel around every output."""
    guard, sentinel = 64, 12345.0
    owners = []

    def fenced(t, fill, copy=True):
        owner = torch.full((t.numel() + 2 * guard,), fill, dtype=t.dtype, device=t.device)
        view = owner[guard : guard + t.numel()].view(t.shape)
        view.copy_(t) if copy else view.fill_(nan)
        return owner, view

    def allocate(t):
        owner, view = fenced(t, sentinel, copy=False)
        owners.append(owner)
        return view

    plain = torch.Tensor.new_empty
    monkeypatch.setattr(kernels, "_empty_like", allocate)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: allocate(plain(*a, **k)))
    for layout, flip, inverse in itertools.product(LAYOUTS.values(), (False, True), (False, True)):
        codes = (MAPS["exp"], SPLITS[split], layout, flip)
        given = inputs(shape, *codes[:2], device=device)
        around = [fenced(t, nan)[1] for t in given]
        got = everything(kernels, *around, codes, inverse)
        for t in got.values():
            assert t.isfinite().all()
    assert len(owners) >= 8 * 4
    for owner in owners:
        assert (owner[:guard] == sentinel).all() and (owner[-guard:] == sentinel).all()


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_inputs_that_begin_off_a_16_byte_boundary(device, offset):
    codes = (MAPS["tanh"], 0, 0, False)
    given = inputs((2, 4, 4, 4), *codes[:2], device=device)

    def shifted(t):
        return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)

    for name, t in everything(kernels, *map(shifted, given), codes, False).items():
        assert torch.equal(t, everything(kernels, *given, codes, False)[name]), name


@pytest.mark.parametrize("shape", [(4, 4, 6, 6), (2, 4, 40, 64)])
def test_repeated_runs_agree_to_the_bit(device, shape):
    for scale_map, split in ((MAPS["exp"], 0), (MAPS["sigmoid"], 1)):
        codes = (scale_map, split, 0, False)
        given = inputs(shape, scale_map, split, device=device)
        first, second = (everything(kernels, *given, codes, False) for _ in range(2))
        assert all(torch.equal(bits(t), bits(second[name])) for name, t in first.items())


def test_a_sample_does_not_depend_on_its_batch(device):
    codes = (MAPS["tanh"], 0, 0, False)
    x, params, g, g_ldj = inputs((5, 4, 4, 4), *codes[:2], device=device)
    whole = everything(kernels, x, params, g, g_ldj, codes, False)
    alone = everything(kernels, x[3:4], params[3:4], g[3:4], g_ldj[3:4], codes, False)
    assert all(torch.equal(t, whole[name][3:4]) for name, t in alone.items())


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp32-bf16"])
@pytest.mark.parametrize("scale_map", MAPS)
def test_reverse_rebuilds_what_the_inverse_gives(device, scale_map, dtypes):
    codes = (MAPS[scale_map], 1, 1, True)
    z, params, g, g_ldj = inputs((2, 3, 4, 6), *codes[:2], DTYPES[dtypes], device)
    rebuilt = kernels.affine_coupling_reverse(g, g_ldj, z, params, *codes)[0]
    assert torch.equal(rebuilt, kernels.affine_coupling(z, params, *codes, True)[0])
