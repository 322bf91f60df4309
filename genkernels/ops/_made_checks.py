"""Every condition on the arguments of `genkernels.ops.made`, one sentence each: what must hold, what came."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels._options import ScaleMap, Spline
from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._spline_checks import check_bins, check_options
from genkernels.ops.affine_coupling import scale_constant_of
from genkernels.reference.rational_quadratic_spline import bins_of

NAME = "made"
SCALE_MAPS = tuple(word for word in ScaleMap.words() if word != "additive")
METHODS = ("blocked", "jacobi", "sequential")


def _integers(label: str, t: Tensor, shape: list[int], meaning: str, of: str, lead: Tensor) -> None:
    checks.tensor(NAME, label, t, (torch.int64,))
    checks.shape(NAME, label, t, shape, meaning)
    checks.same_device(NAME, {of: lead, label: t})


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All conditions of `masked_linear`; x, weight and bias in the dtype that autocast wants."""
    checks.tensors(NAME, {"x": x, "weight": weight, "bias": bias}, optional=("bias",))
    x, weight, bias = autocast.lowered(x, weight, bias)
    checks.same_dtype(NAME, {"x": x, "weight": weight, "bias": bias})
    if weight.dim() != 2:
        raise ValueError(f"{NAME}: weight must be [out, in], got {list(weight.shape)}")
    outputs, inputs = weight.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"{NAME}: x must be [..., in] with in = {inputs}, got {list(x.shape)}")
    if bias is not None:
        checks.shape(NAME, "bias", bias, [outputs], "[out]")
    _integers("in_degrees", in_degrees, [inputs], "[in]", "x", x)
    _integers("out_degrees", out_degrees, [outputs], "[out]", "x", x)
    return x, weight, bias


def affine(scale_map, scale_constant) -> tuple[int, float]:
    """The scale map's code and its constant."""
    checks.option(NAME, "scale_map", scale_map, SCALE_MAPS)
    code = ScaleMap[scale_map.upper()]
    return int(code), scale_constant_of(NAME, code, scale_constant)


def splines(z, weights, parametrization, bound, logit_scale, floor) -> tuple[int, tuple[int, float, float, float]]:
    """P, the parameters of a feature, and the splines' options as the torch operator takes them."""
    codes = check_options(NAME, parametrization, bound, logit_scale, floor)
    outputs = 0
    if isinstance(z, Tensor) and z.dim() == 2 and z.shape[1] and weights and isinstance(weights[-1], Tensor):
        rows = weights[-1].shape[0] if weights[-1].dim() == 2 else 0
        outputs, rest = divmod(rows, z.shape[1])
        if rest or bins_of(outputs, codes[0]) < 1:
            kind = "3K" if codes[0] == Spline.CIRCULAR else "3K - 1"
            raise ValueError(
                f"{NAME}: weights[{len(weights) - 1}] must be [P*D, H] with P = {kind} and D = {z.shape[1]}, got "
                f"{list(weights[-1].shape)}"
            )
        check_bins(NAME, outputs, codes[0], codes[3])
    return outputs, codes


def _fits(z, weights, biases, order, counts, context, residual, params) -> bool:
    """Whether all holds and nothing is to be converted, without a word: the sentences of a small network's checks would
    take longer than its kernel."""
    if not isinstance(z, Tensor) or z.dim() != 2 or not len(weights) == len(biases) >= 2:
        return False
    dtype, device, (batch, features) = z.dtype, z.device, z.shape
    inputs, first, last = features, None, len(weights) - 1
    if dtype not in checks.FLOATS or features < 1 or (residual and (last < 3 or last % 2 == 0)):
        return False
    for i in range(last + 1):
        w, b = weights[i], biases[i]
        if not (isinstance(w, Tensor) and isinstance(b, Tensor) and w.dim() == 2):
            return False
        outputs = w.shape[0]
        if w.shape[1] != inputs or b.dim() != 1 or b.shape[0] != outputs:
            return False
        if w.dtype != dtype or b.dtype != dtype or w.device != device or b.device != device:
            return False
        first = outputs if first is None else first
        if i == last and outputs != params * features or residual and i < last and outputs != first:
            return False
        inputs = outputs
    for plan, shape in ((order, (features,)), (counts, (last, features + 1))):
        if not isinstance(plan, Tensor) or plan.dtype != torch.int64 or plan.device != device or plan.shape != shape:
            return False
    return context is None or (
        isinstance(context, Tensor)
        and context.dtype == dtype
        and context.device == device
        and context.shape == (batch, first)
    )


def network(label, z, weights, biases, order, counts, context, residual, params) -> None:
    """All conditions of an autoregressive transform but for the maps' own; label: of its input z; params: those of a
    feature."""
    if _fits(z, weights, biases, order, counts, context, residual, params):
        return
    layers = {f"weights[{i}]": w for i, w in enumerate(weights)} | {f"biases[{i}]": b for i, b in enumerate(biases)}
    tensors = {label: z, "context": context, **layers}
    checks.tensors(NAME, tensors, optional=("context",))
    if not autocast.active(z):
        checks.same_dtype(NAME, tensors)
    if z.dim() != 2 or z.shape[1] < 1:
        raise ValueError(f"{NAME}: {label} must be [N, D] with D at least 1, got {list(z.shape)}")
    if len(weights) < 2 or len(weights) != len(biases):
        raise ValueError(
            f"{NAME}: weights and biases must be two lists of one length, at least 2, got {len(weights)} and "
            f"{len(biases)}"
        )
    if residual and (len(weights) < 4 or len(weights) % 2):
        raise ValueError(
            f"{NAME}: a residual network must have an odd number of hidden layers, at least 3, got {len(weights) - 1}"
        )
    inputs = features = z.shape[1]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        outputs = params * features if i == len(weights) - 1 else w.shape[0]
        if residual and 0 < i < len(weights) - 1:
            outputs = weights[0].shape[0]
        checks.shape(NAME, f"weights[{i}]", w, [outputs, inputs], "[out, in]")
        checks.shape(NAME, f"biases[{i}]", b, [outputs], "[out]")
        inputs = outputs
    _integers("order", order, [features], "[D]", label, z)
    _integers("counts", counts, [len(weights) - 1, features + 1], "[layers - 1, D + 1]", label, z)
    if context is not None:
        checks.shape(NAME, "context", context, [z.shape[0], weights[0].shape[0]], "[N, H]")


def inverse(z, weights, biases, order, counts, context, residual, params, method) -> None:
    """All conditions of `made_inverse` and `made_spline_inverse` but for the maps' own."""
    checks.option(NAME, "method", method, METHODS)
    network("z", z, weights, biases, order, counts, context, residual, params)


def plan_values(order: Tensor, counts: Tensor, sizes: list[int], residual: bool) -> None:
    """What a kernel checks of the values of `order` and `counts` before it addresses memory by them, for the plain
    passes, which would invert another network without a word. Looked at on the CPU only."""
    if order.device.type != "cpu" or torch.compiler.is_compiling():
        return
    features = order.numel()
    if sorted(order.tolist()) != list(range(features)):
        raise ValueError(f"{NAME}: order must be a permutation of 0 to {features - 1}, got {order.tolist()}")
    rows = counts.tolist()
    for layer, (row, units) in enumerate(zip(rows, sizes, strict=True)):
        if row[0] < 0 or row != sorted(row) or row[-1] != units:
            raise ValueError(
                f"{NAME}: counts must ascend from 0 or more to the number of units in each hidden layer, they do "
                f"not in layer {layer}"
            )
        if residual and layer >= 2 and layer % 2 == 0 and any(a > b for a, b in zip(row, rows[layer - 2], strict=True)):
            raise ValueError(
                f"{NAME}: a residual block must not add a unit to one of a lower degree, it does in layer {layer}"
            )
