"""Every condition on the arguments of `genkernels.ops.made`, one sentence each: what must hold, what came."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.ops._operator import autocasting, choose

NAME = "made"
SCALE_MAPS = ("exp", "sigmoid", "tanh")
METHODS = ("blocked", "jacobi", "sequential")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest of all, fp32 at least."""
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast a linear layer takes autocast's dtype, unless something is fp64."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocasting(first):
        return tensors
    if any(isinstance(t, Tensor) and t.dtype not in _FLOATS[1:] for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def _floats(labelled: dict[str, Tensor | None], mixed: bool) -> None:
    (first, lead), *_ = labelled.items()
    for label, t in labelled.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{NAME}: {label} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in _FLOATS:
            raise TypeError(f"{NAME}: {label} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        if t.device != lead.device:
            raise ValueError(f"{NAME}: {first} and {label} must be on one device, got {lead.device} and {t.device}")
        if t.dtype != lead.dtype and not mixed:
            raise TypeError(f"{NAME}: {label} must have the dtype of {first}, {lead.dtype}, got {t.dtype}")


def _integers(label: str, t: Tensor, shape: list[int], meaning: str, lead: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{NAME}: {label} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype != torch.int64:
        raise TypeError(f"{NAME}: {label} must be int64, got {t.dtype}")
    _shape(label, t, shape, meaning)
    if t.device != lead.device:
        raise ValueError(f"{NAME}: {label} must be on the inputs' device, {lead.device}, got {t.device}")


def _shape(label: str, t: Tensor, shape: list[int], meaning: str) -> None:
    if list(t.shape) != shape:
        raise ValueError(f"{NAME}: {label} must be {meaning} = {shape}, got {list(t.shape)}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor) -> None:
    _floats({"x": x, "weight": weight, "bias": bias}, mixed=False)
    if weight.dim() != 2:
        raise ValueError(f"{NAME}: weight must be [out, in], got {list(weight.shape)}")
    out, into = weight.shape
    if x.dim() < 1 or x.shape[-1] != into:
        raise ValueError(f"{NAME}: x must be [..., in] with in = {into}, got {list(x.shape)}")
    if bias is not None:
        _shape("bias", bias, [out], "[out]")
    _integers("in_degrees", in_degrees, [into], "[in]", x)
    _integers("out_degrees", out_degrees, [out], "[out]", x)


def inverse(z, weights, biases, order, counts, context, residual, scale_map, method) -> int:
    """All conditions of `made_inverse`; the scale map's code."""
    code = choose(NAME, "scale_map", scale_map, SCALE_MAPS)
    choose(NAME, "method", method, METHODS)
    layers = {f"weights[{i}]": w for i, w in enumerate(weights)} | {f"biases[{i}]": b for i, b in enumerate(biases)}
    if not isinstance(z, Tensor):
        raise TypeError(f"{NAME}: z must be a torch.Tensor, got {type(z).__name__}")
    if missing := [label for label, t in layers.items() if t is None]:
        raise TypeError(f"{NAME}: {missing[0]} must be a torch.Tensor, got None")
    _floats({"z": z, "context": context, **layers}, mixed=autocasting(z))
    if z.dim() != 2 or z.shape[1] < 1:
        raise ValueError(f"{NAME}: z must be [N, D] with D at least 1, got {list(z.shape)}")
    if len(weights) < 2 or len(weights) != len(biases):
        raise ValueError(
            f"{NAME}: weights and biases must be two lists of one length, at least 2, got {len(weights)} and "
            f"{len(biases)}"
        )
    if residual and (len(weights) < 4 or len(weights) % 2):
        raise ValueError(
            f"{NAME}: a residual network must have an odd number of hidden layers, at least 3, got {len(weights) - 1}"
        )
    into = features = z.shape[1]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        out = 2 * features if i == len(weights) - 1 else w.shape[0]
        if residual and 0 < i < len(weights) - 1:
            out = weights[0].shape[0]
        _shape(f"weights[{i}]", w, [out, into], "[out, in]")
        _shape(f"biases[{i}]", b, [out], "[out]")
        into = out
    _integers("order", order, [features], "[D]", z)
    _integers("counts", counts, [len(weights) - 1, features + 1], "[layers - 1, D + 1]", z)
    if context is not None:
        _shape("context", context, [z.shape[0], weights[0].shape[0]], "[N, H]")
    return code


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
