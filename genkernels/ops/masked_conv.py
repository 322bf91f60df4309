"""Masked convolution: schema, checks, fake, gradients, backend choice. The maths is in
`genkernels.reference.masked_conv`."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels import reference
from genkernels.ops._operator import (
    DIFFERENTIABLE,
    Operator,
    autocasting,
    choose,
    define,
    differentiate,
    differentiate_reference,
    register,
    runs_reference,
)
from genkernels.reference.masked_conv import ACTIVATIONS, GATE, MASK_TYPES, NONE, REGIONS, keeps_pre

NAME = "masked_conv"

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    codes = _check(x, weight, bias, condition, residual, mask_type, data_channels, region, activation)
    tensors = _autocast(x, weight, bias, condition, residual)
    if runs_reference(OPERATOR, x):
        return reference.masked_conv(*tensors, *codes)[0]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return torch.ops.genkernels.masked_conv(*(_dense(t) for t in tensors), *codes, keep)[0]


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As torch's autocast treats a convolution: the lower dtype, but fp64 stays where all are fp64."""
    if not autocasting(tensors[0]):
        return tensors
    given = [t for t in tensors if t is not None]
    if all(t.dtype == torch.float64 for t in given):
        return tensors
    lower = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(None if t is None else t.to(lower) for t in tensors)


def check_options(
    who: str, mask_type: str, data_channels: int, region: str, activation: str, channels: tuple[int, int], kernel: tuple
) -> tuple[int, int, int, int]:
    """The conditions that the layer has too; the option codes. `channels` is (out, in)."""
    codes = (
        choose(who, "mask_type", mask_type, MASK_TYPES),
        data_channels,
        choose(who, "region", region, REGIONS),
        choose(who, "activation", activation, ACTIVATIONS),
    )
    height, width = kernel
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"{who}: the kernel's height and width must be odd, got {height}×{width}")
    if not isinstance(data_channels, int) or data_channels < 1:
        raise ValueError(f"{who}: data_channels must be a whole number from 1 on, got {data_channels!r}")
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
        above, left = height > 1, width > 1 or data_channels > 1
        if not {"raster": above or left, "vertical": above, "horizontal": left}[region]:
            raise ValueError(
                f"{who}: a {region} mask of type A must leave a live tap, got a {height}×{width} kernel with "
                f"data_channels {data_channels}"
            )
    return codes


def _check(x, weight, bias, condition, residual, mask_type, data_channels, region, activation) -> tuple[int, ...]:
    """Every condition on shapes, dtypes, devices and options; the option codes."""
    given = {"x": x, "weight": weight, "bias": bias, "condition": condition, "residual": residual}
    mixed = None
    for label, tensor in given.items():
        if tensor is None and label not in ("x", "weight"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {label} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{NAME}: {label} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{NAME}: x and {label} must be on one device, got {x.device} and {tensor.device}")
        if tensor.dtype != x.dtype:
            mixed = label
    if mixed and not autocasting(x):
        raise TypeError(f"{NAME}: {mixed} must have x's dtype, got x {x.dtype} and {mixed} {given[mixed].dtype}")
    if x.dim() != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{NAME}: x must be [N, Cin, H, W] with H, W ≥ 1, got {list(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{NAME}: weight must be [Cout, Cin, kh, kw] with Cin = {x.shape[1]}, got {list(weight.shape)}"
        )
    outputs, inputs, *kernel = weight.shape
    codes = check_options(NAME, mask_type, data_channels, region, activation, (outputs, inputs), tuple(kernel))
    batch, _, height, width = x.shape
    if bias is not None and list(bias.shape) != [outputs]:
        raise ValueError(f"{NAME}: bias must be [Cout] = [{outputs}], got {list(bias.shape)}")
    if condition is not None and list(condition.shape) not in ([batch, outputs], [batch, outputs, height, width]):
        raise ValueError(
            f"{NAME}: condition must be [N, Cout] = [{batch}, {outputs}] or [N, Cout, H, W] = "
            f"[{batch}, {outputs}, {height}, {width}], got {list(condition.shape)}"
        )
    left = outputs // 2 if activation == "gate" else outputs
    if residual is not None and list(residual.shape) != [batch, left, height, width]:
        raise ValueError(
            f"{NAME}: residual must be [N, Cout', H, W] = [{batch}, {left}, {height}, {width}], got "
            f"{list(residual.shape)}"
        )
    return codes


def _fake(x, weight, bias, condition, residual, mask_type, data_channels, region, activation, keep):
    outputs = weight.shape[0] // 2 if activation == GATE else weight.shape[0]
    kept = keep and keeps_pre(activation, residual is not None)
    pre = (x.shape[0], weight.shape[0], *x.shape[2:]) if kept else (0,)
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
    if activation != NONE:
        state = pre if keeps_pre(activation, residual is not None) else result
    ctx.kept = keep or state is not pre
    ctx.condition_rank = 0 if condition is None else condition.dim()
    ctx.save_for_backward(x, weight, state)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_pre):
    options = (None,) * 5
    if grad_output is None and grad_pre is None:
        return None, None, None, None, None, *options
    if not ctx.kept:
        raise RuntimeError(f"{NAME}: a gradient needs the pre-activation, which keep=False threw away")
    wanted = list(ctx.needs_input_grad[:4])
    # the condition's gradient is the output's own: an operator may not return its input
    passes = wanted[3] and ctx.condition_rank == 4 and ctx.codes[-1] == NONE
    asked = [*wanted[:3], wanted[3] and not passes]
    grads: list[Tensor | None] = [None] * 4
    if any(asked):
        x, weight, state = ctx.saved_tensors
        found = torch.ops.genkernels.masked_conv_backward(
            _dense(grad_output), _dense(grad_pre), state, x, weight, *ctx.codes, ctx.condition_rank, *asked
        )
        grads = [g if wants else None for g, wants in zip(found, asked, strict=True)]
    if passes:
        grads[3] = grad_output
    return *grads, grad_output if ctx.needs_input_grad[4] else None, *options


OPERATOR = register(
    Operator(
        name=NAME,
        functions=(masked_conv,),
        backends={
            "cpu": "",
            "triton": "",
            "cuda": "the Triton kernel serves GPUs: an implicit matrix product, which Triton compiles to the "
            "tensor cores' own "
            "instructions; CUDA C++ would repeat it",
        },
        composability=DIFFERENTIABLE,
    )
)

_OPTIONS = "int mask_type, int data_channels, int region, int activation"
define(
    OPERATOR,
    f"masked_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? condition, Tensor? residual, {_OPTIONS}, bool keep) "
    "-> (Tensor, Tensor)",
    reference=reference.masked_conv,
    fake=_fake,
)
define(
    OPERATOR,
    f"masked_conv_backward(Tensor? grad_output, Tensor? grad_pre, Tensor? state, Tensor x, Tensor weight, {_OPTIONS}, "
    "int condition_rank, bool want_x, bool want_weight, bool want_bias, bool want_condition) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.masked_conv_backward,
    fake=_fake_backward,
)
differentiate("masked_conv", _setup_context, _backward)
differentiate_reference("masked_conv_backward", reference.masked_conv_backward)
