"""Every flow layer: the inverse inverts, the log-determinant is that of the Jacobian, shapes and dtypes are as
promised."""

import pytest
import torch

import genkernels as gk
from genkernels import nn as gnn
from genkernels.models.flows.nets import ConvNet
from tests.nn.flow_checks import Net, brute_log_det, glow_steps, perturb

LAYERS = {
    "actnorm features": (lambda: gnn.ActNorm(5), (5,)),
    "actnorm sequence": (lambda: gnn.ActNorm(3), (3, 7)),
    "actnorm image": (lambda: gnn.ActNorm(3), (3, 2, 5)),
    "conv features": (lambda: gnn.InvertibleConv1x1(6), (6,)),
    "conv image": (lambda: gnn.InvertibleConv1x1(4), (4, 3, 2)),
    "conv larger image": (lambda: gnn.InvertibleConv1x1(3), (3, 4, 4)),
    "conv one channel": (lambda: gnn.InvertibleConv1x1(1), (1, 3, 3)),
    "conv dense": (lambda: gnn.InvertibleConv1x1(4, lu=False), (4, 3, 2)),
    "squeeze": (lambda: gnn.Squeeze(), (2, 4, 6)),
    "squeeze by 3": (lambda: gnn.Squeeze(3), (1, 3, 6)),
    "even odd": (lambda: gnn.EvenOdd(), (8,)),
    "coupling features": (lambda: gnn.AffineCoupling(Net(3, 6)), (6,)),
    "coupling image": (lambda: gnn.AffineCoupling(Net(2, 4), scale_map="sigmoid", flip=True), (4, 3, 3)),
    "coupling interleaved": (lambda: gnn.AffineCoupling(Net(2, 4), scale_map="tanh", layout="interleaved"), (4, 2, 3)),
    "coupling additive": (lambda: gnn.AffineCoupling(Net(2, 2), additive=True), (4, 2, 3)),
    "checkerboard": (lambda: gnn.AffineCoupling(Net(2, 4), "checkerboard", "sigmoid"), (2, 3, 5)),
    "checkerboard flip": (lambda: gnn.AffineCoupling(Net(1, 2), "checkerboard", "exp", flip=True), (1, 5, 4)),
    "splines": (lambda: gnn.SplineCoupling(Net(3, 2 * 11), bound=2.0), (5,)),
    "splines flip": (lambda: gnn.SplineCoupling(Net(2, 3 * 8), "zuko", flip=True), (5,)),
    "splines image": (lambda: gnn.SplineCoupling(Net(2, 2 * 12), "circular", bound=3.0), (4, 2, 3)),
    "sequential": (lambda: gnn.FlowSequential(gnn.Squeeze(), *glow_steps(4, 2)), (1, 4, 4)),
    "sequential features": (lambda: gnn.FlowSequential(*glow_steps(4, 3)), (4,)),
    "sequential reversible": (lambda: gnn.FlowSequential(*glow_steps(4, 2), reversible=True), (4, 2, 2)),
    "nothing": (lambda: gnn.FlowSequential(), (3, 2, 2)),
}


def make(name, training=False):
    build, shape = LAYERS[name]
    layer = perturb(build().double()).train(training)
    return layer, torch.randn(2, *shape, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_inverts(name):
    layer, x = make(name)
    z, ldj = layer(x)
    back, inverse_ldj = layer.inverse(z)
    assert z.is_contiguous() and back.is_contiguous()
    assert ldj.shape == inverse_ldj.shape == (2,)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse_ldj, -ldj, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_log_determinant_is_that_of_the_jacobian(name):
    layer, x = make(name)
    torch.testing.assert_close(layer(x)[1], brute_log_det(lambda v: layer(v)[0], x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "sequential reversible"])
def test_gradients_of_both_directions(name):
    layer, x = make(name)
    x.requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    z = layer(x)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(layer.inverse, (z,))


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name):
    layer, x = make(name, training=True)
    z, ldj = layer(x[:0])
    back, _ = layer.inverse(z)
    assert back.shape == x[:0].shape and ldj.shape == (0,)
    assert not any(module.ready for module in layer.modules() if isinstance(module, gnn.ActNorm))


@pytest.mark.parametrize("name", LAYERS)
def test_reference_backend_gives_the_same(name):
    layer, x = make(name)
    z, ldj = layer(x)
    with gk.use_backend("reference"):
        z_ref, ldj_ref = layer(x)
        back, _ = layer.inverse(z_ref)
    torch.testing.assert_close(z, z_ref, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ldj, ldj_ref, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_strided_input_gives_the_same(name):
    layer, x = make(name)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided), layer(x), rtol=0, atol=1e-14)
    z = layer(x)[0]
    strided = torch.stack([z, -z], dim=-1)[..., 0]
    torch.testing.assert_close(layer.inverse(strided), layer.inverse(z), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["actnorm image", "conv image", "squeeze", "checkerboard", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_z_is_that_of_x_and_log_determinants_stay_wide(name, dtype):
    layer, x = make(name)
    layer = layer.to(dtype)
    z, ldj = layer(x.to(dtype))
    back, _ = layer.inverse(z)
    assert z.dtype == back.dtype == dtype and ldj.dtype == torch.float32


def test_convolution_runs_in_the_dtype_of_x_under_autocast():
    layer = gnn.InvertibleConv1x1(8)
    pair = gnn.FlowSequential(gnn.ActNorm(8), layer).eval()
    x = torch.randn(4, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, folded = layer(x)[0], pair(x)[0]
    assert inside.dtype == folded.dtype == torch.float32
    assert torch.equal(inside, layer(x)[0])
    assert torch.equal(folded, pair(x)[0])


def test_convolution_starts_as_a_rotation():
    for lu in (True, False):
        weight = gnn.InvertibleConv1x1(7, lu=lu).matrix()
        torch.testing.assert_close(weight @ weight.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-6)


def test_convolution_keeps_its_triangles_when_trained():
    """L is unit lower, U upper triangular with fixed signs, whatever the parameter holds: det W never reaches 0."""
    layer = gnn.InvertibleConv1x1(6)
    before = torch.linalg.det(layer.matrix()).sign()
    with torch.no_grad():
        layer.factors.add_(torch.randn(6, 6))
    sign, log_det = torch.linalg.slogdet(layer.matrix())
    assert sign == before
    torch.testing.assert_close(layer(torch.zeros(1, 6))[1][0].double(), log_det, rtol=1e-5, atol=1e-5)


def test_ill_conditioned_convolution_inverts_in_fp32():
    """The small matrices are fp64: a condition number of 1e3 costs the data its share of digits and nothing on top."""
    layer = gnn.InvertibleConv1x1(8)
    with torch.no_grad():
        layer.factors.diagonal().copy_(torch.linspace(-3.5, 3.5, 8))
    x = torch.randn(64, 8, 4, 4)
    back, _ = layer.inverse(layer(x)[0])
    condition = torch.linalg.cond(layer.matrix()).item()
    assert condition > 1e3
    assert (back - x).abs().max() < 4 * condition * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("split", ["channel", "checkerboard"])
def test_what_is_transformed_never_reaches_the_network(split):
    """A NaN in the transformed half stays where it is; the other values are those of a clean input."""
    net = ConvNet(2, 4, 8) if split == "channel" else ConvNet(4, 8, 8)  # mixes neighbouring pixels
    layer = gnn.AffineCoupling(perturb(net), split)
    x = torch.randn(2, 4, 3, 3)
    if split == "channel":
        hidden = torch.zeros(4, 3, 3, dtype=torch.bool)
        hidden[2:] = True
    else:
        hidden = ((torch.arange(3)[:, None] + torch.arange(3)) % 2 == 1).expand(4, 3, 3)
    clean, _ = layer(x)
    poisoned, _ = layer(x.masked_fill(hidden, float("nan")))
    assert torch.equal(poisoned[:, ~hidden], clean[:, ~hidden])
    lone = hidden.clone()
    lone[:, 0] = False
    poisoned, _ = layer(x.masked_fill(lone, float("nan")))
    assert torch.equal(poisoned[:, ~lone], clean[:, ~lone]) and clean.isfinite().all()
    changed, _ = layer(torch.where(hidden, x + 1, x))
    assert torch.equal(changed[:, ~hidden], clean[:, ~hidden])


def test_no_layer_keeps_a_mask():
    layer = gnn.AffineCoupling(Net(2, 4), "checkerboard")
    layer(torch.randn(1, 2, 4, 4))
    assert not list(layer.buffers())


def test_context_reaches_the_networks():
    flow = gnn.FlowSequential(*glow_steps(4, 2, context=3)).double().eval()
    perturb(flow)
    x, context = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    z, ldj = flow(x, context)
    assert not torch.allclose(z, flow(x, context + 1)[0])
    torch.testing.assert_close(flow.inverse(z, context)[0], x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ldj[:1], brute_log_det(lambda v: flow(v, context[:1])[0], x[:1]), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: gnn.ActNorm(3)(torch.zeros(2, 4, 2, 2)),
            ValueError,
            r"ActNorm: x must be \[N, 3, \.\.\.\], got \[2, 4, 2, 2\]",
        ),
        (lambda: gnn.ActNorm(3).inverse(torch.zeros(3)), ValueError, r"must be \[N, 3"),
        (lambda: gnn.InvertibleConv1x1(3)(torch.zeros(2, 4)), ValueError, r"must be \[N, 3"),
        (lambda: gnn.Squeeze()(torch.zeros(1, 1, 3, 4)), ValueError, r"multiples of 2, got \[1, 1, 3, 4\]"),
        (lambda: gnn.Squeeze().inverse(torch.zeros(1, 3, 2, 2)), ValueError, r"multiple of 4"),
        (lambda: gnn.EvenOdd()(torch.zeros(1, 3)), ValueError, r"D even, got \[1, 3\]"),
        (
            lambda: gnn.AffineCoupling(Net(1, 2), split="half"),
            ValueError,
            r"split must be one of channel, checkerboard, got 'half'",
        ),
        (lambda: gnn.AffineCoupling(Net(1, 2), scale_map="log"), ValueError, r"scale_map must be one of exp"),
        (lambda: gnn.AffineCoupling(Net(1, 3))(torch.zeros(2, 3)), ValueError, r"even number of channels"),
        (lambda: gnn.AffineCoupling(Net(2, 4), "checkerboard")(torch.zeros(2, 2)), ValueError, r"\[N, C, H, W\]"),
        (
            lambda: gnn.AffineCoupling(Net(2, 3))(torch.zeros(2, 4, 3, 3)),
            ValueError,
            r"params must be .* = \[2, 4, 3, 3\]",
        ),
        (lambda: gnn.SplineCoupling(Net(1, 2), "linear"), ValueError, r"parametrization must be one of nflows, zuko"),
        (lambda: gnn.SplineCoupling(Net(1, 2))(torch.zeros(2, 1)), ValueError, r"at least 2 channels, got \[2, 1\]"),
        (
            lambda: gnn.SplineCoupling(Net(2, 11))(torch.zeros(3, 4)),
            ValueError,
            r"SplineCoupling: its network must give \[N, moved\*P, \.\.\.\] = \[3, 2\*P\], got \[3, 11\]",
        ),
        (lambda: gnn.SplineCoupling(Net(1, 7))(torch.zeros(2, 2)), ValueError, r"P = 3K - 1 numbers .* got 7"),
        (lambda: gnn.Split(3), ValueError, r"channels must be even, got 3"),
        (lambda: gnn.Split(4)(torch.zeros(1, 6, 2, 2)), ValueError, r"must be \[N, 4"),
        (lambda: gnn.FlowSequential(gnn.ActNorm(2), torch.nn.ReLU()), TypeError, r"inverse, got ReLU at position 1"),
        (lambda: gnn.Logit(0.7), ValueError, r"between 0 and 0.5, got 0.7"),
        (lambda: gnn.Prior(2, "cauchy"), ValueError, r"kind must be one of normal, logistic"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(call, kind, words):
    with pytest.raises(kind, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
