"""The masked linear layer of a MADE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels import ops
from genkernels.backends import current_backend
from genkernels.nn._buffers import Derived, renew
from genkernels.ops import checks
from genkernels.reference.made import degree_mask, masked_weight

#: Up to so many weights one dense product, the dead ones set to 0, is faster on a CPU than the kernel that leaves them
#: out. Measured on one core, forward and backward at batch 64: 64×64 70 µs against 116 µs, 128×128 125 against 152,
#: 256×256 326 against 323, 512×512 1,303 against 830. Of bf16 PyTorch's own product is as fast or faster at all sizes,
#: with units for it and without: two cores that have none, 3072 inputs, 1024 outputs, 8 rows 5.2 ms against 11.3, 32
#: rows 6.6 against 14.8, 100 rows 9.3 against 9.1, 512 rows 28 against 23; 1024 and 6144, 512 rows 62 against 111.
DENSE_WEIGHTS = 256 * 256


class MaskedLinear(Derived, nn.Linear):
    r"""A `torch.nn.Linear` in which an output sees the inputs of degree up to its own and no others.

    Dead weights never act and get a gradient of exactly 0; they start as 0. Parameters and state dict are those of the
    plain layer.

    Equivalent to::

        F.linear(x, weight * mask, bias)      # mask: out_degrees[:, None] >= in_degrees, or > with strict

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`.
        in_degrees: `in_features` integers ≥ 0, out_degrees: `out_features` of them. Features have degrees 1, 2, …;
            degree 0 means that nothing is seen (but what is added later, such as a context).
        strict: an output sees lower degrees only: the last layer of a MADE.

    Shapes:
        x ``[..., in]`` → ``[..., out]``.

    Raises:
        ValueError: degrees do not fit, or an output that should see a feature has no live input: of degree ≥ 1 (≥ 2
            with strict, since the first feature's outputs rightly see nothing).

    Source: Germain et al., "MADE: Masked autoencoder for distribution estimation", 2015.
    """

    in_degrees: Tensor
    out_degrees: Tensor
    dead: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        in_degrees: Sequence[int] | Tensor,
        out_degrees: Sequence[int] | Tensor,
        strict: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        checks.integer("MaskedLinear", "in_features", in_features, 1)
        checks.integer("MaskedLinear", "out_features", out_features, 1)
        into = _degrees("in_degrees", in_degrees, in_features)
        out = _degrees("out_degrees", out_degrees, out_features)
        seen = degree_mask(into, out, strict).any(1)
        should = out >= (2 if strict else 1)
        if (should & ~seen).any():
            unit = int((should & ~seen).nonzero()[0])
            raise ValueError(
                f"MaskedLinear: an output of degree {int(out[unit])} must have an input of degree "
                f"{'below' if strict else 'at most'} that, got in_degrees from {int(into.min())} (output {unit} "
                "has no live input)"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.strict = bool(strict)
        self._degrees = into, out  # on the CPU, whatever becomes of the buffers
        # not part of the state dict: it stays that of a plain Linear
        self.register_buffer("in_degrees", into.to(self.weight.device), persistent=False)
        self.register_buffer("out_degrees", out.to(self.weight.device), persistent=False)
        self.register_buffer("dead", ~self.mask, persistent=False)
        with torch.no_grad():
            self.weight.copy_(self.masked_weight())

    @property
    def mask(self) -> Tensor:
        """``[out, in]`` bool, True where a weight is live."""
        return degree_mask(self.in_degrees, self.out_degrees, self.strict)

    def masked_weight(self) -> Tensor:
        """The weight with dead entries exactly 0."""
        return masked_weight(self.weight, self.in_degrees, self.out_degrees, self.strict)

    def set_degrees(self, in_degrees: Tensor, out_degrees: Tensor) -> None:
        """Gives the layer other degrees, and the mask that follows from them."""
        self._degrees = in_degrees.cpu(), out_degrees.cpu()
        self._derive()

    def _derive(self) -> None:
        into, out = self._degrees
        for name, value in (("in_degrees", into), ("out_degrees", out), ("dead", ~degree_mask(into, out, self.strict))):
            renew(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        if (dtype := self._dense_dtype(x)) is not None:
            return F.linear(x, self.weight.to(dtype).masked_fill(self.dead, 0), self.bias)
        return ops.masked_linear(x, self.weight, self.bias, self.in_degrees, self.out_degrees, strict=self.strict)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, strict={self.strict}"

    def _dense_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype of the dense product where that is the fastest way, else None: the operator then picks a kernel."""
        if current_backend() != "auto" or not isinstance(x, Tensor) or x.device.type != "cpu":
            return None
        dtype = self.weight.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = None if torch.float64 in (x.dtype, dtype) else torch.get_autocast_dtype("cpu")
        elif x.dtype != dtype:
            dtype = None
        if dtype is None or x.dim() < 1 or x.shape[-1] != self.in_features:
            return None  # unusual, or wrong: the operator says so in a sentence
        if dtype == torch.float16:
            return None
        return dtype if dtype == torch.bfloat16 or self.weight.numel() <= DENSE_WEIGHTS else None


def _degrees(name: str, values, count: int) -> Tensor:
    try:
        degrees = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"MaskedLinear: {name} must be {count} integers, 0 or more, got {values!r}") from None
    whole_numbers = not degrees.dtype.is_floating_point and degrees.dtype != torch.bool
    if not whole_numbers or list(degrees.shape) != [count] or int(degrees.min()) < 0:
        raise ValueError(
            f"MaskedLinear: {name} must be {count} integers, 0 or more, got "
            f"{str(degrees.dtype).removeprefix('torch.')} "
            f"{list(degrees.shape)}" + (f" down to {degrees.min().item()}" if degrees.numel() else "")
        )
    return degrees.to(torch.int64, copy=True)
