"""affine_coupling on every backend that runs here, against its definition in fp64."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkernels as gk
from genkernels import backends, ops
from genkernels.ops.affine_coupling import LAYOUTS, SCALE_MAPS, SPLITS
from genkernels.reference import affine_coupling as reference
from genkernels.reference.affine_coupling import transformed_pixels

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
# whole and odd tiles, several chunks a sample, several samples a tile, no spatial dimension, one pixel, more dimensions
SHAPES = [(2, 6, 3, 5), (3, 4, 32, 33), (37, 2), (1, 72, 32, 31), (5, 8, 1, 1), (2, 4, 3, 2, 5), (3, 2, 1100)]
OPTIONS = list(itertools.product(SCALE_MAPS, SPLITS, LAYOUTS, (False, True)))


def codes(scale_map, split, layout):
    return SCALE_MAPS.index(scale_map), SPLITS.index(split), LAYOUTS.index(layout)


def params_shape(shape, scale_map, split):
    moved = shape[1] if split == "checkerboard" else shape[1] // 2
    return (shape[0], moved * (1 if scale_map == "additive" else 2), *shape[2:])


def make(shape, scale_map, split, dtypes=(torch.float64, torch.float64), device="cpu", spread=1.5):
    x = (torch.randn(shape) * spread).to(dtypes[0])
    params = (torch.randn(params_shape(shape, scale_map, split)) * spread).to(dtypes[1])
    return x.to(device), params.to(device)


def everything(functions, x, params, grad_z, grad_ldj, at, flip):
    """All that the operator computes: forward, inverse, both backwards, reverse; `functions` is a module of torch
    operators."""
    out = {}
    for inverse in (False, True):
        tag = "inverse" if inverse else "forward"
        z, ldj = functions.affine_coupling(x, params, *at, flip, inverse)
        grads = functions.affine_coupling_backward(grad_z, grad_ldj, x, params, *at, flip, inverse)
        out |= {f"{tag} z": z, f"{tag} ldj": ldj, f"{tag} grad_x": grads[0], f"{tag} grad_params": grads[1]}
    names = ("reverse x", "reverse grad_x", "reverse grad_params")
    return out | dict(
        zip(names, functions.affine_coupling_reverse(grad_z, grad_ldj, x, params, *at, flip), strict=True)
    )


def operators(backend):
    """torch's operators under a backend; the reference is no operator's kernel where the C++ library is loaded."""
    return reference if backend == "reference" else torch.ops.genkernels


def assert_as_accurate(name, ours, same_dtype, exact, scale):
    """Our error against fp64 is at most twice that of the same-dtype reference, or two units in the last place of
    `scale`.

    In fp64 both sides round, and neither is the exact one: four units.
    """
    units = 4 if ours.dtype == torch.float64 else 2
    assert ours.dtype == same_dtype.dtype and ours.shape == same_dtype.shape, name
    error = (ours.double() - exact).abs()
    allowed = 2 * (same_dtype.double() - exact).abs().amax() + units * torch.finfo(ours.dtype).eps * scale
    assert not ours.isnan().any(), f"{name}: NaN"
    assert (error <= allowed).all(), f"{name}: error {error.max():.3e} beyond {allowed.min():.3e}"


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("scale_map,split,layout,flip", OPTIONS)
def test_agrees_with_the_definition(backend, device, poisoned_memory, scale_map, split, layout, flip, dtypes):
    at = codes(scale_map, split, layout)
    shapes = [shape for shape in SHAPES if split == "channel" or len(shape) == 4]
    if backend == "triton":  # which compiles five kernels a shape: one of them, each time another
        turn = OPTIONS.index((scale_map, split, layout, flip)) + DTYPES.index(dtypes)
        shapes = [shapes[turn % len(shapes)]]
    for shape in shapes:
        x, params = make(shape, scale_map, split, dtypes, device)
        work = torch.promote_types(dtypes[0], torch.float32)
        grad_z, grad_ldj = torch.randn_like(x), torch.randn(shape[0], dtype=work, device=device)
        ours = everything(operators(backend), x, params, grad_z, grad_ldj, at, flip)
        same = everything(reference, x, params, grad_z, grad_ldj, at, flip)
        exact = everything(reference, *(t.double() for t in (x, params, grad_z, grad_ldj)), at, flip)
        for name, value in ours.items():
            # a sum's error is measured by the magnitudes summed, not by what is left after they cancel
            scale = params.double().abs().sum() / shape[0] if name.endswith("ldj") else exact[name].abs().amax()
            assert_as_accurate(f"{name} {shape}", value, same[name], exact[name], scale)
            assert value.is_contiguous()


@pytest.mark.parametrize("scale_map,split,layout,flip", OPTIONS)
def test_gradients_to_second_order(backend, device, scale_map, split, layout, flip):
    x, params = make((2, 4, 3, 2), scale_map, split, device=device, spread=1.0)
    x.requires_grad_(), params.requires_grad_()
    options = {"scale_map": scale_map, "split": split, "layout": layout, "flip": flip}
    for function in (ops.affine_coupling, ops.affine_coupling_inverse):

        def call(a, b, function=function):
            return function(a, b, **options)

        assert torch.autograd.gradcheck(call, (x, params))
        assert torch.autograd.gradgradcheck(call, (x, params))


@pytest.mark.parametrize("split,flip", [("channel", False), ("checkerboard", True)])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_opcheck(compiled_backend, device, scale_map, split, flip):
    at = codes(scale_map, split, "halves")
    x, params = make((2, 4, 3, 2), scale_map, split, (torch.float32, torch.float32), device)
    grad_z, grad_ldj = torch.randn_like(x), torch.randn(2, device=device)
    for inverse in (False, True):
        both = [t.clone().requires_grad_() for t in (x, params)]
        torch.library.opcheck(torch.ops.genkernels.affine_coupling.default, (*both, *at, flip, inverse))
        torch.library.opcheck(
            torch.ops.genkernels.affine_coupling_backward.default,
            (grad_z.clone().requires_grad_(), grad_ldj.clone().requires_grad_(), *both, *at, flip, inverse),
        )
    torch.library.opcheck(
        torch.ops.genkernels.affine_coupling_reverse.default, (grad_z, grad_ldj, x, params, *at, flip)
    )


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_inverse_undoes_forward(backend, device, scale_map, split):
    x, params = make((3, 4, 8, 6), scale_map, split, (torch.float32, torch.float32), device)
    z, ldj = ops.affine_coupling(x, params, scale_map=scale_map, split=split)
    back, ldj_back = ops.affine_coupling_inverse(z, params, scale_map=scale_map, split=split)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ldj_back, -ldj)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_log_det_is_that_of_the_jacobian(backend, device, scale_map, split):
    x, params = make((1, 4, 3, 4), scale_map, split, device=device)
    jacobian = torch.autograd.functional.jacobian(
        lambda a: ops.affine_coupling(a, params, scale_map=scale_map, split=split)[0], x
    )
    exact = torch.linalg.slogdet(jacobian.reshape(48, 48)).logabsdet
    ldj = ops.affine_coupling(x, params, scale_map=scale_map, split=split)[1]
    torch.testing.assert_close(ldj[0], exact, atol=1e-8, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("split", SPLITS)
def test_non_finite_values_stay_in_their_half(backend, device, split, bad):
    at = codes("exp", split, "halves")
    x, params = make((2, 4, 4, 4), "exp", split, (torch.float32, torch.float32), device)
    grad_z, grad_ldj = torch.randn_like(x), torch.randn(2, device=device)
    clean = everything(operators(backend), x, params, grad_z, grad_ldj, at, False)
    kept = torch.zeros_like(x, dtype=torch.bool)
    if split == "channel":
        kept[:, :2] = True
    else:
        kept[:] = ~transformed_pixels(4, 4, False, x.device)
    dirty = everything(operators(backend), x.masked_fill(kept, bad), params, grad_z, grad_ldj, at, False)
    for name, value in dirty.items():
        if name in ("forward z", "inverse z", "reverse x"):
            torch.testing.assert_close(value[kept], torch.full_like(value[kept], bad), equal_nan=True, rtol=0, atol=0)
            torch.testing.assert_close(value[~kept], clean[name][~kept], rtol=0, atol=0)
        else:
            torch.testing.assert_close(value, clean[name], rtol=0, atol=0)


@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh"])
def test_extreme_parameters_are_what_the_definition_makes_of_them(backend, device, scale_map):
    s = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan")]
    )
    params = torch.stack([s, torch.zeros_like(s)], dim=1).to(device)
    x = torch.ones(len(s), 2, device=device)
    z, ldj = ops.affine_coupling(x, params, scale_map=scale_map)
    z_ref, ldj_ref = reference.affine_coupling(x, params, SCALE_MAPS.index(scale_map))
    # Triton's exponential is 0 where the true one is no normal number
    close = {"rtol": 3e-7, "atol": 2.0**-126 if backend == "triton" else 1e-44}
    torch.testing.assert_close(z, z_ref, equal_nan=True, **close)
    torch.testing.assert_close(ldj, ldj_ref, equal_nan=True, **close)


def test_gradient_at_pass_through_pixels_of_the_parameters_is_exactly_zero(backend, device):
    x, params = make((2, 3, 5, 4), "tanh", "checkerboard", (torch.float32, torch.float32), device)
    params.requires_grad_()
    z, ldj = ops.affine_coupling(x, params, scale_map="tanh", split="checkerboard")
    (grad,) = torch.autograd.grad(z.square().sum() + ldj.sum(), params)
    transformed = torch.tensor([[(h + w) % 2 == 1 for w in range(4)] for h in range(5)], device=device)
    assert (grad[..., ~transformed] == 0).all()
    assert (grad[..., transformed] != 0).all()


@pytest.mark.parametrize("which", ["z", "ldj"])
def test_a_missing_gradient_counts_as_zero(backend, device, which):
    x, params = make((2, 4, 3, 3), "sigmoid", "channel", device=device)
    x.requires_grad_(), params.requires_grad_()

    def grads():
        z, ldj = ops.affine_coupling(x, params, scale_map="sigmoid")
        return torch.autograd.grad(
            (z if which == "z" else ldj).sum(), (x, params), allow_unused=True, materialize_grads=True
        )

    ours = grads()
    with gk.use_backend("reference"):
        exact = grads()
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 2)])
def test_empty_tensors(backend, device, shape):
    x, params = (t.requires_grad_() for t in make(shape, "exp", "channel", device=device))
    for function in (ops.affine_coupling, ops.affine_coupling_inverse):
        z, ldj = function(x, params)
        assert z.shape == x.shape and ldj.shape == (shape[0],) and (ldj == 0).all()
        grad_x, grad_params = torch.autograd.grad(z.sum() + ldj.sum(), (x, params))
        assert grad_x.shape == x.shape and grad_params.shape == params.shape


def test_an_input_at_an_odd_address_gives_the_same_and_is_left_alone(backend, device):
    """The input is a view into storage with guards on both sides."""
    x, params = make((3, 6, 5, 7), "tanh", "channel", (torch.float32, torch.float32), device)
    store = torch.full((x.numel() + 9,), 12345.0, device=device)
    view = store[5 : 5 + x.numel()].view(x.shape)
    view.copy_(x)
    before = store.clone()
    z, ldj = ops.affine_coupling(view, params, scale_map="tanh")
    z_plain, ldj_plain = ops.affine_coupling(x, params, scale_map="tanh")
    assert torch.equal(store, before)
    assert torch.equal(z, z_plain) and torch.equal(ldj, ldj_plain)
    assert z.data_ptr() != view.data_ptr()


def strided(draw_offset, draw_steps, values):
    """The same values in a storage with gaps: a view with an offset and a step on the last dimension."""
    *lead, last = values.shape
    store = torch.full((*lead, draw_offset + last * draw_steps), float("nan"), dtype=values.dtype)
    view = store[..., draw_offset::draw_steps][..., :last]
    view.copy_(values)
    return view


@settings(max_examples=60, deadline=None)
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
def test_any_shape_stride_offset_and_dtype(n, half, h, w, offset, step, transpose, option, dtypes, seed):
    scale_map, split, layout, flip = option
    torch.manual_seed(seed)
    x, params = make((n, 2 * half, h, w), scale_map, split, dtypes)
    options = {"scale_map": scale_map, "split": split, "layout": layout, "flip": flip}
    with gk.use_backend("reference"):
        expected = ops.affine_coupling(x, params, **options)
    odd_x, odd_params = (strided(offset, step, t) for t in (x, params))
    if transpose:
        odd_x = x.transpose(2, 3).contiguous().transpose(2, 3)
    z, ldj = ops.affine_coupling(odd_x, odd_params, **options)
    eps = torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(z, expected[0], rtol=4 * eps, atol=8 * eps)
    summed = float(params.double().abs().sum()) / max(n, 1)
    torch.testing.assert_close(ldj, expected[1], rtol=0, atol=2 * torch.finfo(ldj.dtype).eps * (summed + 1))


@pytest.mark.parametrize("split", SPLITS)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(compiled_backend, device, split):
    x, params = make((3, 48, 33, 32), "sigmoid", split, (torch.float32, torch.float32), device)
    grad_z, grad_ldj = torch.randn_like(x), torch.randn(3, device=device)
    threads = torch.get_num_threads()
    at = codes("sigmoid", split, "halves")
    try:
        runs = []
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            runs.append(everything(torch.ops.genkernels, x, params, grad_z, grad_ldj, at, False))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


def test_expanded_gradients_and_inputs_are_left_alone(backend, device):
    x, params = make((2, 4, 3, 3), "exp", "channel", device=device)
    x.requires_grad_(), params.requires_grad_()
    z, ldj = ops.affine_coupling(x, params)
    before = x.detach().clone(), params.detach().clone()
    expanded = torch.ones((), dtype=z.dtype, device=device).expand_as(z)
    torch.autograd.backward((z, ldj), (expanded, torch.ones((), dtype=ldj.dtype, device=device).expand_as(ldj)))
    dense = torch.ops.genkernels.affine_coupling_backward(
        expanded.contiguous(), torch.ones_like(ldj), x.detach(), params.detach(), 0, 0, 0, False, False
    )
    torch.testing.assert_close(x.grad, dense[0])
    torch.testing.assert_close(params.grad, dense[1])
    assert torch.equal(x.detach(), before[0]) and torch.equal(params.detach(), before[1])


def test_reverse_refuses_to_be_differentiated():
    if backends.why_missing("cpu"):
        pytest.skip("needs the compiled CPU library")
    x, params = make((2, 4, 3, 3), "exp", "channel")
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
            "split must be one of channel, checkerboard, got 'row'",
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
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error) as caught:
        call(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3))
    text = str(caught.value)
    assert text.startswith("affine_coupling: ") and sentence in text and "\n" not in text


@pytest.mark.skipif(backends.cpu_variant() != "avx512", reason="the AVX2 build is the one in use already, or none is")
def test_the_avx2_build_agrees_too():
    """The same tests on the other build of the library, which this processor would not choose by itself."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    chosen = "from genkernels import backends; print(backends.cpu_variant(), backends.why_missing('cpu'))"
    shown = subprocess.run([sys.executable, "-c", chosen], env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == "avx2 None", shown.stdout + shown.stderr
    tests = ["test_agrees_with_the_definition", "test_extreme_parameters", "test_bitwise"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", f"cpu and ({' or '.join(tests)})", "-p", "no:cacheprovider"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
