"""MaskedConv2d: a Conv2d to its state dict, and a stack of them is autoregressive."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import genkernels as gk
from genkernels.nn import masked_conv as masked_conv_layer


def test_is_a_conv2d_and_loads_its_state_dict():
    plain = nn.Conv2d(3, 6, 3, padding=1)
    layer = gk.nn.MaskedConv2d("B", 3, 6, 3, data_channels=3)
    assert isinstance(layer, nn.Conv2d) and set(layer.state_dict()) == {"weight", "bias"}
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 5, 4)
    plain.weight.data *= layer.mask
    torch.testing.assert_close(layer(x), plain(x))
    assert torch.equal(layer.masked_weight(), plain.weight)
    assert layer.mask.dtype == torch.bool and layer.mask.shape == layer.weight.shape


def test_dead_taps_stay_out_of_the_gradient_after_loading_and_after_a_step():
    layer = gk.nn.MaskedConv2d("A", 2, 4, 5, activation="relu")
    layer.load_state_dict(nn.Conv2d(2, 4, 5).state_dict())
    dead = ~layer.mask
    before = layer.weight.detach().clone()
    assert (before[dead] != 0).all()
    layer(torch.randn(2, 2, 6, 6)).square().sum().backward()
    assert (layer.weight.grad[dead] == 0).all() and (layer.weight.grad[layer.mask] != 0).any()
    torch.optim.Adam(layer.parameters()).step()
    assert torch.equal(layer.weight[dead], before[dead])
    (grad,) = torch.autograd.grad(layer.masked_weight().square().sum(), layer.weight)
    assert (grad[dead] == 0).all()


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("mask_type,data_channels,activation", [("A", 3, "gate"), ("B", 3, "none"), ("B", 1, "gate")])
def test_steps_with_decay_and_momentum_let_no_dead_tap_in(mask_type, data_channels, activation, optimizer):
    """Decay moves what dead taps hold; it still plays no part, and its gradient stays exactly 0."""
    layer = gk.nn.MaskedConv2d(mask_type, 3, 6, 3, data_channels, activation=activation).double()
    layer.load_state_dict(nn.Conv2d(3, 6, 3).double().state_dict())
    steps = {
        "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    }[optimizer](layer.parameters())
    x, dead = torch.randn(2, 3, 4, 5, dtype=torch.float64), ~layer.mask
    for _ in range(3):
        steps.zero_grad()
        layer(x).square().sum().backward()
        assert (layer.weight.grad[dead] == 0).all() and (layer.weight.grad[~dead] != 0).all()
        steps.step()
    assert (layer.weight[dead] != 0).all()
    y = layer(x)
    with torch.no_grad():
        layer.weight[dead] = float("nan")
    assert torch.equal(layer(x), y)


def test_condition_residual_and_gate_are_what_they_say():
    layer = gk.nn.MaskedConv2d("B", 4, 8, 3, activation="gate").double()
    x, condition, residual = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 3, 5), (2, 8), (2, 4, 3, 5)))
    pre = nn.functional.conv2d(x, layer.weight * layer.mask, layer.bias, padding=1) + condition[:, :, None, None]
    a, b = pre.chunk(2, 1)
    torch.testing.assert_close(layer(x, condition, residual), a.tanh() * b.sigmoid() + residual)


def later_inputs(channels, height, width, data_channels):
    """[C, H, W, C, H, W]: whether an input comes at or after an output's place in the order of pixels, then of
    channels."""
    block = torch.arange(channels) * data_channels // channels
    place = torch.arange(height * width).view(1, height, width) * data_channels + block.view(-1, 1, 1)
    return place.flatten() >= place.flatten()[:, None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("height,width", [(4, 6), (5, 3), (1, 7), (7, 1)])
@pytest.mark.parametrize("data_channels,gated", [(1, False), (1, True), (3, False), (3, True)])
def test_a_stack_is_autoregressive(data_channels, gated, height, width, training):
    """A, then B, B: in fp64 no output moves with its own input or a later one, and the first one sees nothing."""
    torch.manual_seed(0)
    activation, wide = ("gate", 12) if gated else ("relu", 6)
    c = {"data_channels": data_channels}
    stack = nn.Sequential(
        gk.nn.MaskedConv2d("A", 3, wide, 5, **c, activation=activation),
        gk.nn.MaskedConv2d("B", 6, wide, 3, **c, activation=activation),
        gk.nn.MaskedConv2d("B", 6, 3, 1, **c),
    )
    stack = stack.double().train(training)
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(stack, x).reshape(3 * height * width, -1)
    later = later_inputs(3, height, width, data_channels)
    assert (jacobian[later] == 0).all()
    assert (jacobian[~later] != 0).any() or height * width * data_channels == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("region,kernel", [("raster", 3), ("vertical", (3, 5)), ("horizontal", (1, 5))])
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_one_layer_does_not_see_what_comes_later(mask_type, region, kernel, training):
    layer = gk.nn.MaskedConv2d(mask_type, 2, 4, kernel, region=region, activation="gate").double().train(training)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    condition = torch.randn(1, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda a: layer(a, condition), x)[0, :, :, :, 0]
    for h in range(3):
        for w in range(4):
            seen = torch.zeros(3, 4, dtype=torch.bool)
            if region == "vertical":
                seen[: h if mask_type == "A" else h + 1] = True
            else:
                seen.view(-1)[: h * 4 + w + (mask_type == "B")] = True
            assert (jacobian[:, h, w][:, :, ~seen] == 0).all()


def test_repr_names_the_options():
    shown = repr(gk.nn.MaskedConv2d("A", 3, 6, (1, 3), 3, region="horizontal", activation="gate", bias=False))
    for part in (
        "MaskedConv2d('A', 3, 6",
        "kernel_size=(1, 3)",
        "bias=False",
        "data_channels=3",
        "region='horizontal'",
        "activation='gate'",
    ):
        assert part in shown


@pytest.mark.parametrize(
    "arguments,options,sentence",
    [
        (("C", 3, 6, 3), {}, "mask_type must be one of A, B, got 'C'"),
        (("A", 3, 6, 4), {}, "the kernel's height and width must be odd, got 4×4"),
        (("A", 3, 6, 0), {}, "kernel_size must be an integer of at least 1, got 0"),
        (("A", 3, 6, 3.0), {}, "kernel_size must be an integer of at least 1, got 3.0"),
        (("A", 3, 6, (3, -3)), {}, "kernel_size must be an integer of at least 1, got -3"),
        (("A", 3, 6, (3, 3, 3)), {}, "kernel_size must be one number or (kh, kw), got (3, 3, 3)"),
        (("A", 3, 6, (3, 2)), {}, "the kernel's height and width must be odd, got 3×2"),
        (("A", 4, 6, 3, 3), {}, "data_channels must divide the input channels, got 3 and 4 input channels"),
        (("A", 3, 7, 3, 3), {}, "data_channels must divide the output channels, got 3 and 7 output channels"),
        (
            ("A", 3, 9, 3, 3),
            {"activation": "gate"},
            "data_channels must divide half of the output channels, got 3 and 9",
        ),
        (("A", 3, 6, 3), {"stride": 2}, "stride must be 1, for every pixel has an output, got 2"),
        (("A", 3, 6, 3), {"dilation": (2, 2)}, "dilation must be 1"),
        (("A", 3, 6, 3), {"region": "diagonal"}, "region must be one of raster, vertical, horizontal, got 'diagonal'"),
        (("A", 3, 6, 3), {"activation": "elu"}, "activation must be one of none, relu, gate, got 'elu'"),
        (("A", 3, 6, 1), {}, "a raster mask of type A must leave a live tap, got a 1×1 kernel with data_channels 1"),
        (("A", 3, 6, -1), {}, "kernel_size must be an integer of at least 1, got -1"),
        (("A", 3, 6, 3.0), {}, "kernel_size must be an integer of at least 1, got 3.0"),
        (("A", 3, 6, (3,)), {}, "kernel_size must be one number or (kh, kw), got (3,)"),
        (("A", 3.0, 6, 3), {}, "in_channels must be an integer of at least 1, got 3.0"),
        (("A", 3, "6", 3), {}, "out_channels must be an integer of at least 1, got '6'"),
    ],
)
def test_refusals_are_one_sentence(arguments, options, sentence):
    with pytest.raises(ValueError) as caught:
        gk.nn.MaskedConv2d(*arguments, **options)
    text = str(caught.value)
    assert text.startswith("MaskedConv2d: ") and sentence in text and "\n" not in text


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_made_without_storage_gets_its_mask_with_its_weights(assign):
    layer = gk.nn.MaskedConv2d("A", 3, 6, 3, 3)
    with torch.device("meta"):
        empty = gk.nn.MaskedConv2d("A", 3, 6, 3, 3)
    if not assign:
        empty = empty.to_empty(device="cpu")
        empty.mask.fill_(True)  # as anything may stand in fresh memory
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(empty.mask, layer.mask) and torch.equal(empty.masked_weight(), layer.masked_weight())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("activation", "condition", "residual"),
    [("none", None, False), ("relu", 2, True), ("relu", 4, False), ("gate", 2, False), ("gate", None, True)],
)
def test_bf16_by_torch_itself(monkeypatch, autocast, activation, condition, residual):
    """Where a CPU has matrix units for bf16: within the error that the reference has in bf16, gradients too."""
    monkeypatch.setattr(masked_conv_layer, "BF16_UNITS", True)
    layer = gk.nn.MaskedConv2d("B", 4, 8, 3, activation=activation)
    leaving = 4 if activation == "gate" else 8
    shapes = {None: None, 2: (3, 8), 4: (3, 8, 5, 6)}[condition], (3, leaving, 5, 6) if residual else None
    tensors = [torch.randn(3, 4, 5, 6), *(None if shape is None else torch.randn(shape) for shape in shapes)]

    def run(backend, dtype, autocasting):
        twin = copy.deepcopy(layer).to(dtype)
        inputs = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
        with gk.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocasting):
            out = twin(*inputs)
        assert out.dtype == (torch.bfloat16 if autocasting else dtype)
        leaves = [t for t in inputs if t is not None] + list(twin.parameters())
        return [out, *torch.autograd.grad((out.double() ** 2).sum(), leaves)]

    truth = run("reference", torch.float64, False)
    found, own = (run(b, torch.float32 if autocast else torch.bfloat16, autocast) for b in ("auto", "reference"))
    for value, base, exact in zip(found, own, truth, strict=True):
        error, allowed = (float((t.detach().double() - exact.detach()).norm()) for t in (value, base))
        assert error <= 2 * allowed + 1e-3 * float(exact.detach().norm())
    dead = ~layer.mask
    assert dead.any() and not found[-2][dead].any()


def test_bf16_by_torch_itself_says_what_is_wrong_as_the_operator_does(monkeypatch):
    monkeypatch.setattr(masked_conv_layer, "BF16_UNITS", True)
    layer = gk.nn.MaskedConv2d("B", 4, 8, 3).bfloat16()
    x = torch.randn(2, 4, 5, 5).bfloat16()
    with pytest.raises(ValueError, match="residual must be"):
        layer(x, None, torch.zeros(2, 1, 5, 5).bfloat16())
    with pytest.raises(ValueError, match="condition must be"):
        layer(x, torch.zeros(2, 1).bfloat16())
    with pytest.raises(TypeError, match="must have the dtype of x"):
        layer(x.float())


def test_the_mask_outlives_storage_that_is_made_empty():
    expected = gk.nn.MaskedConv2d("A", 4, 8, 3, 2, region="horizontal")
    for _ in range(3):  # empty storage holds what was there before
        rubbish = [torch.full((288,), True) for _ in range(50)]
        del rubbish
        layer = nn.utils.skip_init(gk.nn.MaskedConv2d, "A", 4, 8, 3, 2, region="horizontal")
        assert torch.equal(layer.mask, expected.mask)
        assert torch.equal(copy.deepcopy(expected).to_empty(device="cpu").mask, expected.mask)


def test_a_pruned_layer_moves():
    layer = gk.nn.MaskedConv2d("A", 1, 2, 3)
    prune.random_unstructured(layer, "weight", 0.5)
    layer.double()
    assert layer(torch.zeros(1, 1, 4, 4, dtype=torch.float64)).dtype == torch.float64
