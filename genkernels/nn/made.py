"""Masked linear layers, the network MADE made of them, and the flows MAF and IAF on top."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels import ops
from genkernels.nn._buffers import renew
from genkernels.ops import checks
from genkernels.ops.made import METHODS, SCALE_MAPS
from genkernels.reference.affine_coupling import log_scale
from genkernels.reference.made import degree_mask, masked_weight, plan


class MaskedLinear(nn.Linear):
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
        # not part of the state dict: it stays that of a plain Linear
        self.register_buffer("in_degrees", into.to(self.weight.device), persistent=False)
        self.register_buffer("out_degrees", out.to(self.weight.device), persistent=False)
        with torch.no_grad():
            self.weight.copy_(self.masked_weight())

    @property
    def mask(self) -> Tensor:
        """``[out, in]`` bool, True where a weight is live."""
        return degree_mask(self.in_degrees, self.out_degrees, self.strict)

    def masked_weight(self) -> Tensor:
        """The weight with dead entries exactly 0."""
        return masked_weight(self.weight, self.in_degrees, self.out_degrees, self.strict)

    def forward(self, x: Tensor) -> Tensor:
        return ops.masked_linear(x, self.weight, self.bias, self.in_degrees, self.out_degrees, strict=self.strict)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, strict={self.strict}"


class MADE(nn.Module):
    r"""A network whose outputs for a feature see only the features before it in an order.

    Hidden units are sorted by degree, so that each masked weight is block lower-triangular. Degrees go round 1 … D − 1
    (0 … D − 1 with a context, so that the first feature sees it too); a layer of fewer units spreads its degrees evenly
    over that range, and an output then sees the features up to the largest degree below its own.

    Equivalent to (natural order, one hidden layer)::

        h = torch.relu(masked_linear(x, w0, b0, range(1, D + 1), hidden_degrees) + context_layer(context))
        params = masked_linear(h, w1, b1, hidden_degrees, [1, …, D] * params_per_feature, strict=True)

    Args:
        features: D ≥ 1.
        hidden_features: units of each hidden layer; one number H stands for ``(H, H)``, with `residual` for ``(H, H,
            H)``.
        params_per_feature: P outputs a feature.
        residual: hidden layers after the first come in pairs, blocks :math:`v +
            W_b\,\mathrm{relu}(W_a\,\mathrm{relu}(v))`; an odd number of equal layers, at least 3.
        order: ``natural`` (default), ``reversed``, ``random``, or a permutation of 0 … D − 1, the feature generated at
            each step.
            It is part of the state dict: a loaded network takes over the saved order.
        context_features: size of a context that every output may see; it enters the first hidden layer, unmasked.
        generator: for the random order.

    Shapes:
        x ``[N, D]``, context ``[N, context_features]`` → ``[N, P * D]``: the first parameter of all features in data
        order, then the second, ….

    Raises:
        ValueError: a size, the order or the presence of a context is wrong.

    Source: Germain et al., "MADE", 2015; residual blocks as in Nash & Durkan, "Autoregressive energy machines", 2019.
    """

    order: Tensor
    counts: Tensor

    def __init__(
        self,
        features: int,
        hidden_features: int | Sequence[int],
        params_per_feature: int = 2,
        residual: bool = False,
        order: str | Sequence[int] | Tensor | None = None,
        context_features: int = 0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if isinstance(hidden_features, str) or not isinstance(hidden_features, Sequence):
            hidden_features = (hidden_features,) * (3 if residual else 2)
        for name, value, least in (
            ("features", features, 1),
            ("params_per_feature", params_per_feature, 1),
            ("context_features", context_features, 0),
        ):
            checks.integer("MADE", name, value, least)
        sizes = tuple(hidden_features)
        if not all(isinstance(h, int) and not isinstance(h, bool) for h in sizes):
            raise ValueError(f"MADE: hidden_features must be one integer or several, got {list(sizes)}")
        least = 2 if context_features and features > 1 else 1
        if not sizes or min(sizes) < least:
            why = " (one sees the context alone, one the first feature)" if least == 2 else ""
            raise ValueError(f"MADE: every hidden layer must have at least {least} units{why}, got {list(sizes)}")
        if residual and (len(sizes) < 3 or len(sizes) % 2 == 0 or len(set(sizes)) > 1):
            raise ValueError(
                f"MADE: residual blocks need an odd number of equal hidden layers, at least 3, got {list(sizes)}"
            )
        self.features, self.hidden_features, self.params_per_feature = features, sizes, params_per_feature
        self.residual, self.context_features = bool(residual), context_features
        order = _order(order, features, generator)
        degrees, ends = self._degrees(order)
        self.layers = nn.ModuleList(
            MaskedLinear(len(into), len(out), into, out, strict=out is ends[-1])
            for into, out in zip(degrees, ends, strict=True)
        )
        self.context_layer = nn.Linear(context_features, sizes[0], bias=False) if context_features else None
        device = self.layers[0].weight.device
        self.register_buffer("order", order.to(device))
        self.register_buffer("counts", plan(degrees)[1].to(device), persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_tensor("MADE: x", x)
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"MADE: x must be [N, {self.features}], got {list(x.shape)}")
        *hidden, last = self.layers
        v = hidden[0](x)
        if (added := self.context_values(context, x.shape[0])) is not None:
            v = v + added
        if self.residual:
            for first, second in zip(hidden[1::2], hidden[2::2], strict=True):
                v = v + second(F.relu(first(F.relu(v))))
            return last(v)
        v = F.relu(v)
        for layer in hidden[1:]:
            v = F.relu(layer(v))
        return last(v)

    def context_values(self, context: Tensor | None, batch: int) -> Tensor | None:
        """What the context adds to the first hidden layer, ``[N, H]``, or None where the network takes no context."""
        if context is not None:
            _check_tensor("MADE: context", context)
        if self.context_layer is None:
            if context is not None:
                raise ValueError(f"MADE: built without context_features, got a context {list(context.shape)}")
            return None
        if context is None:
            raise ValueError(f"MADE: a context [N, {self.context_features}] is needed, got None")
        if list(context.shape) != [batch, self.context_features]:
            raise ValueError(
                f"MADE: context must be [N, {self.context_features}] with N = {batch}, got {list(context.shape)}"
            )
        return self.context_layer(context)

    def _degrees(self, order: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The degrees of what each layer reads and of what it makes, on the device of `order`."""
        hidden = [_hidden_degrees(n, self.features, self.context_features > 0) for n in self.hidden_features]
        degrees = [torch.argsort(order) + 1, *(d.to(order.device) for d in hidden)]
        return degrees, [*degrees[1:], degrees[0].repeat(self.params_per_feature)]

    def extra_repr(self) -> str:
        return f"residual={self.residual}, params_per_feature={self.params_per_feature}"

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        saved = state_dict.get(f"{prefix}order")
        if saved is not None and saved.shape == self.order.shape:
            _order(saved, self.features, None)  # a damaged one raises here
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.order.is_meta:
            return
        degrees, ends = self._degrees(self.order)
        for layer, into, out in zip(self.layers, degrees, ends, strict=True):
            renew(layer, "in_degrees", into)
            renew(layer, "out_degrees", out)
        renew(self, "counts", plan(degrees)[1])


class AutoregressiveTransform(nn.Module):
    r"""Masked autoregressive flow (MAF): data → noise in one pass, the inverse as a blocked triangular solve.

    .. math:: z_i = x_i\,\sigma(s_i) + t_i,\qquad (s, t)_i = \mathrm{MADE}(x_{<i}),\qquad \mathrm{ldj} =
        \sum\log\sigma(s)

    Equivalent to (``scale_map="exp"``)::

        s, t = made(x, context).chunk(2, 1)
        z, ldj = x * s.exp() + t, s.sum(1)

    Args:
        made: a `MADE` of two parameters a feature: log-scales, then shifts.
        scale_map: ``exp``: σ = exp(s); ``sigmoid``: σ = sigmoid(s + 2); ``tanh``: σ = exp(tanh(s)).
        method: how to invert: ``blocked`` (about the price of one pass), ``jacobi`` (sweeps until nothing changes, at
            most D) or ``sequential`` (D passes, the definition). Gradients are the same: of the implicit function.

    Shapes:
        x, z ``[N, D]``; ldj ``[N]``, nats, fp32 or wider.

    Raises:
        ValueError: an option is unknown, or the network does not give two parameters a feature.

    Source: Papamakarios et al., "Masked autoregressive flow for density estimation", 2017.
    """

    def __init__(self, made: MADE, scale_map: str = "exp", method: str = "blocked"):
        super().__init__()
        name = type(self).__name__
        for label, value, options in (("scale_map", scale_map, SCALE_MAPS), ("method", method, METHODS)):
            if value not in options:
                raise ValueError(f"{name}: {label} must be one of {', '.join(options)}, got {value!r}")
        if not isinstance(made, MADE) or made.params_per_feature != 2:
            got = f"{made.params_per_feature}" if isinstance(made, MADE) else type(made).__name__
            raise ValueError(f"{name}: made must be a MADE with params_per_feature=2, got {got}")
        self.made, self.scale_map, self.method = made, scale_map, method

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._parallel(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(z, context)

    def extra_repr(self) -> str:
        return f"scale_map={self.scale_map!r}, method={self.method!r}"

    def _parallel(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The direction in which every feature's parameters are known at once."""
        params = self.made(x, context)
        params = params.to(torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32))
        s, t = params.chunk(2, dim=1)
        ell = log_scale(s, SCALE_MAPS.index(self.scale_map))
        return (x * torch.exp(ell) + t).to(x.dtype), ell.sum(1)

    def _solve(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        made = self.made
        _check_tensor(f"{type(self).__name__}: the input", z)
        if z.dim() != 2 or z.shape[1] != made.features:
            raise ValueError(f"{type(self).__name__}: the input must be [N, {made.features}], got {list(z.shape)}")
        return ops.made_inverse(
            z,
            [layer.weight for layer in made.layers],
            [layer.bias for layer in made.layers],
            made.order,
            made.counts,
            context=made.context_values(context, z.shape[0]),
            residual=made.residual,
            scale_map=self.scale_map,
            method=self.method,
        )


class InverseAutoregressiveTransform(AutoregressiveTransform):
    r"""Inverse autoregressive flow (IAF): noise → data in one pass; data → noise is the triangular solve.

    Its ``forward`` is `AutoregressiveTransform.inverse` and its ``inverse`` that one's ``forward``.

    Equivalent to::

        maf = AutoregressiveTransform(made, scale_map)
        z, ldj = maf.inverse(x, context)          # forward
        x, ldj = maf(z, context)                  # inverse

    Args:
        made, scale_map, method: as for `AutoregressiveTransform`.

    Shapes:
        x, z ``[N, D]``; ldj ``[N]``, nats, fp32 or wider.

    Raises:
        ValueError: as for `AutoregressiveTransform`.

    Source: Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._parallel(z, context)


# ------------------------------------------------------------------------------------------------------------ degrees


def _check_tensor(label: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} must be a torch.Tensor, got {type(value).__name__}")


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


def _hidden_degrees(units: int, features: int, context: bool) -> Tensor:
    """Sorted degrees of a hidden layer: each of the range equally often, or spread over it, 1 always among them."""
    low = 0 if context or features == 1 else 1
    span = features - low  # degrees low … D − 1
    if units >= span or features == 1:
        return (torch.arange(units, device="cpu") % span + low).sort().values
    spread = torch.linspace(1, features - 1, units - (low == 0), device="cpu").round().to(torch.int64)
    return torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), spread]) if low == 0 else spread


def _order(order, features: int, generator: torch.Generator | None) -> Tensor:
    if order is None or (isinstance(order, str) and order == "natural"):
        return torch.arange(features, device="cpu")
    if isinstance(order, str):
        if order == "reversed":
            return torch.arange(features - 1, -1, -1, device="cpu")
        if order == "random":
            return torch.randperm(features, generator=generator, device="cpu")
        raise ValueError(
            f"MADE: order must be natural, reversed, random or a permutation of 0 to {features - 1}, got {order!r}"
        )
    try:
        given = torch.as_tensor(order, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"MADE: order must be a permutation of 0 to {features - 1}, got {order!r}") from None
    if given.dtype.is_floating_point or not torch.equal(
        given.sort().values.to(torch.int64), torch.arange(features, device="cpu")
    ):
        raise ValueError(f"MADE: order must be a permutation of 0 to {features - 1}, got {given.tolist()}")
    return given.to(torch.int64, copy=True)
