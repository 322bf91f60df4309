"""Masked convolution: schema, checks, fake, gradients, backend choice. The maths is in
`genkernels.reference.masked_conv`."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels._options import Activation
from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula
from genkernels.ops._operator import Operator
from genkernels.reference import masked_conv as reference
from genkernels.reference.masked_conv import ACTIVATIONS, MASK_TYPES, REGIONS, keeps_pre

NAME = "masked_conv"


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    data_channels: int = 1,
    region: str = "raster",
    condition: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    r"""A 2-D convolution that sees only what comes before each pixel, with bias, condition, activation and residual, in
    one pass.

    .. math:: y = \mathrm{act}\big(x * (w \odot m) + b + c\big) + r

    Taps that the mask m kills add nothing and are given no gradient: theirs is exactly 0. Kernels leave them out, but
    for some at the centre with several
    data channels, whose weight is taken as 0: a NaN or an infinity that only they see may show.

    Equivalent to (``mask_type="B"``, ``data_channels=1``, 3×3, ``activation="relu"``)::

        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
        y = F.conv2d(x, weight * mask, bias, padding=1) + condition
        y = torch.relu(y) + residual

    Args:
        x: ``[N, Cin, H, W]``, fp64, fp32, bf16 or fp16. Outside the image it counts as 0.
        weight: ``[Cout, Cin, kh, kw]``, kh and kw odd. bias: ``[Cout]`` or None.
        mask_type: ``A``: the pixel itself is hidden (of `data_channels` blocks: the output's own block and later ones);
            ``B``: it is seen (up to the output's own block).
        data_channels: number C of equal blocks of channels, in order; it divides Cin and Cout (gate: Cout/2).
        region: ``raster``: rows above, and to the left in the row; ``vertical``: rows above (B: and the row itself),
            all columns;
            ``horizontal``: to the left in the row alone.
        condition: ``[N, Cout]`` or ``[N, Cout, H, W]``, added before the activation, or None.
        residual: ``[N, Cout', H, W]``, added after the activation, or None.
        activation: ``none``, ``relu``, or ``gate``: tanh(a)·sigmoid(b), a and b the first and second half of the
            channels.

    All tensors have one dtype and device; under autocast they take its dtype, as a convolution does. Sums are in fp32
    (fp64 for fp64).

    Returns:
        ``[N, Cout', H, W]`` like `x`, contiguous; Cout' = Cout, for the gate Cout/2.

    Raises:
        ValueError: a shape or an option is wrong, or no tap is live. TypeError: a dtype is. BackendUnavailable: a
            forced backend
        cannot run.

    Source: van den Oord et al., "Pixel recurrent neural networks", 2016; "Conditional image generation with PixelCNN
    decoders", 2016.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "condition": condition, "residual": residual}
    checks.tensors(NAME, tensors, optional=("bias", "condition", "residual"))
    x, weight, bias, condition, residual = autocast.lowered(x, weight, bias, condition, residual)
    checks.same_dtype(NAME, {"x": x, "weight": weight, "bias": bias, "condition": condition, "residual": residual})
    codes = _check_shapes(x, weight, bias, condition, residual, (mask_type, data_channels, region, activation))
    arguments = (x, weight, bias, condition, residual)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    return CONV(*arguments, *codes, keep)[0]


# ------------------------------------------------------------------------------------------------------------- checks


def check_options(
    who: str, mask_type: str, data_channels: int, region: str, activation: str, channels: tuple[int, int], kernel: tuple
) -> tuple[int, int, int, int]:
    """The conditions that the layer has too; the option codes. `channels` is (out, in)."""
    codes = (
        checks.option(who, "mask_type", mask_type, MASK_TYPES),
        checks.integer(who, "data_channels", data_channels, 1),
        checks.option(who, "region", region, REGIONS),
        checks.option(who, "activation", activation, ACTIVATIONS),
    )
    height, width = kernel
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"{who}: the kernel's height and width must be odd, got {height}×{width}")
    parts, what = (2, "half of the output channels") if activation == "gate" else (1, "the output channels")
    if channels[0] < parts or channels[0] % (parts * data_channels):
        raise ValueError(
            f"{who}: data_channels must divide {what}, got {data_channels} and {channels[0]} output channels"
        )
    if channels[1] < 1 or channels[1] % data_channels:
        raise ValueError(
            f"{who}: data_channels must divide the input channels, got {data_channels} and {channels[1]} input channels"
        )
    if mask_type == "A":
        above, before = height > 1, width > 1 or data_channels > 1  # in the column, in the row
        if not {"raster": above or before, "vertical": above, "horizontal": before}[region]:
            raise ValueError(
                f"{who}: a {region} mask of type A must leave a live tap, got a {height}×{width} kernel with "
                f"data_channels {data_channels}"
            )
    return codes


def _check_shapes(x, weight, bias, condition, residual, options) -> tuple[int, int, int, int]:
    """Every condition on shapes and options; the option codes."""
    if x.dim() != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{NAME}: x must be [N, Cin, H, W] with H, W ≥ 1, got {list(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{NAME}: weight must be [Cout, Cin, kh, kw] with Cin = {x.shape[1]}, got {list(weight.shape)}"
        )
    outputs, inputs, *kernel = weight.shape
    codes = check_options(NAME, *options, (outputs, inputs), tuple(kernel))
    batch, _, height, width = x.shape
    if bias is not None:
        checks.shape(NAME, "bias", bias, [outputs], "[Cout]")
    if condition is not None and list(condition.shape) not in ([batch, outputs], [batch, outputs, height, width]):
        raise ValueError(
            f"{NAME}: condition must be [N, Cout] = [{batch}, {outputs}] or [N, Cout, H, W] = "
            f"[{batch}, {outputs}, {height}, {width}], got {list(condition.shape)}"
        )
    if residual is not None:
        leaving = outputs // 2 if codes[-1] == Activation.GATE else outputs
        checks.shape(NAME, "residual", residual, [batch, leaving, height, width], "[N, Cout', H, W]")
    return codes


# ---------------------------------------------------------------------------------------------------- fakes, gradients


def _fake(x, weight, bias, condition, residual, mask_type, data_channels, region, activation, keep):
    outputs = weight.shape[0] // 2 if activation == Activation.GATE else weight.shape[0]
    wants_pre = keep and keeps_pre(activation, residual is not None)
    pre = (x.shape[0], weight.shape[0], *x.shape[2:]) if wants_pre else (0,)
    return x.new_empty((x.shape[0], outputs, *x.shape[2:])), x.new_empty(pre)


def _fake_backward(
    grad_output,
    grad_pre,
    state,
    x,
    weight,
    mask_type,
    data_channels,
    region,
    activation,
    condition_rank,
    want_x,
    want_weight,
    want_bias,
    want_condition,
):
    outputs = weight.shape[0]
    condition = (x.shape[0], outputs, *x.shape[2:]) if condition_rank == 4 else (x.shape[0], outputs)
    shapes = ((want_x, x.shape), (want_weight, weight.shape), (want_bias, (outputs,)), (want_condition, condition))
    return tuple(x.new_empty(shape if wanted else (0,)) for wanted, shape in shapes)


def _setup_context(ctx, inputs, output):
    x, weight, _, condition, residual, *ctx.codes, keep = inputs
    result, pre = output
    activation = ctx.codes[-1]
    state = None
    if activation != Activation.NONE:
        state = pre if keeps_pre(activation, residual is not None) else result
    ctx.has_state = keep or state is not pre
    ctx.condition_rank = 0 if condition is None else condition.dim()
    ctx.save_for_backward(x, weight, state)


def _backward(ctx, grad_output, grad_pre):
    options = (None,) * 5
    if not ctx.has_state:
        raise RuntimeError(f"{NAME}: a gradient needs the pre-activation, which keep=False threw away")
    wanted = list(ctx.needs_input_grad[:4])
    # the condition's gradient is the output's own: an operator may not return its input
    passes = wanted[3] and ctx.condition_rank == 4 and ctx.codes[-1] == Activation.NONE
    asked = [*wanted[:3], wanted[3] and not passes]
    grads: list[Tensor | None] = [None] * 4
    if any(asked):
        x, weight, state = ctx.saved_tensors
        results = BACKWARD.dense(grad_output, grad_pre, state, x, weight, *ctx.codes, ctx.condition_rank, *asked)
        grads = [g if wants else None for g, wants in zip(results, asked, strict=True)]
    if passes:
        grads[3] = grad_output
    return *grads, grad_output if ctx.needs_input_grad[4] else None, *options


# --------------------------------------------------------------------------------------------------------- registration

OPERATOR = Operator(
    NAME,
    functions=(masked_conv,),
    kernels={
        "cpu": "",
        "triton": "",
        "cuda": "the Triton kernel serves GPUs: an implicit matrix product, which Triton compiles to the tensor cores' "
        "own instructions; CUDA C++ would repeat it",
    },
)

_OPTIONS = "int mask_type, int data_channels, int region, int activation"
CONV = OPERATOR.define(
    f"masked_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? condition, Tensor? residual, {_OPTIONS}, bool keep) "
    "-> (Tensor, Tensor)",
    reference.masked_conv,
    _fake,
    gradient=Formula(_setup_context, _backward),
)
BACKWARD = OPERATOR.define(
    f"masked_conv_backward(Tensor? grad_output, Tensor? grad_pre, Tensor? state, Tensor x, Tensor weight, {_OPTIONS}, "
    "int condition_rank, bool want_x, bool want_weight, bool want_bias, bool want_condition) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.masked_conv_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
