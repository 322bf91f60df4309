"""MADE: a network whose outputs for a feature see only the features before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.networks._outside import outside
from genkernels.networks._plain import plain
from genkernels.nn._buffers import Derived, renew
from genkernels.nn._seen import Seen, unwrapped
from genkernels.nn.masked_linear import MaskedLinear
from genkernels.ops import checks
from genkernels.reference.made import plan


class MADE(Derived, nn.Module):
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
            It is part of the state dict, and what follows from it follows it however it is written: loaded, copied in
            place, handed in by ``functional_call``. Inside ``torch.compile`` one that is random or given breaks the
            graph to look at it; a natural or reversed one is looked at outside of it alone, and where it is loaded.
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
        fixed = order is None or (isinstance(order, str) and order != "random")
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
        self._seen, self._fixed, self._followed = Seen(), fixed, order

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_tensor("MADE: x", x)
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"MADE: x must be [N, {self.features}], got {list(x.shape)}")
        self.follow()
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
            check_tensor("MADE: context", context)
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

    def follow(self) -> None:
        """Brings what follows from ``order`` up to date, where that has changed since the last look."""
        if torch.compiler.is_compiling():
            if not self._fixed:
                outside(MADE.follow, self)  # a compiled pass cannot tell whether a buffer has changed
            return
        if self._seen.holds(self.order):
            return
        order = unwrapped(self.order)
        if order is None:  # a pass without data
            return
        if order.dim() > 1 and (order != order[..., :1, :]).any():
            raise RuntimeError("MADE: several networks run as one must have the same order")
        order = _order(order.reshape(-1, self.features)[0], self.features, None)
        first = _masked(self.layers[0])
        held = None if first is None else unwrapped(first.in_degrees)
        followed = torch.argsort(self._followed) + 1 if held is None else held.cpu()
        if (followed != torch.argsort(order) + 1).any():
            self._renew(order)
        self._seen.note(self.order)

    def as_written(self) -> bool:
        """Whether the network is what its weights say, so that a solve may read them and go past its layers."""
        return plain(self, MADE) and all(plain(layer, MaskedLinear) for layer in self.layers)

    def _renew(self, order: Tensor) -> None:
        for i, (layer, into, out) in enumerate(zip(self.layers, *self._degrees(order), strict=True)):
            if (masked := _masked(layer)) is not None:
                masked.set_degrees(into, out)
            elif not torch.equal(order, self._followed):
                raise RuntimeError(
                    f"MADE: its order has changed, and layer {i}, a {type(layer).__name__}, holds no MaskedLinear that "
                    "could follow"
                )
        self._followed = order
        self._derive()

    def _derive(self) -> None:
        renew(self, "counts", plan(self._degrees(self._followed)[0])[1], self.order.device)

    def _degrees(self, order: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The degrees of what each layer reads and of what it makes, on the CPU as `order` is."""
        hidden = [_hidden_degrees(n, self.features, self.context_features > 0) for n in self.hidden_features]
        degrees = [torch.argsort(order) + 1, *hidden]
        return degrees, [*degrees[1:], degrees[0].repeat(self.params_per_feature)]

    def extra_repr(self) -> str:
        return f"residual={self.residual}, params_per_feature={self.params_per_feature}"

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        saved = state_dict.get(f"{prefix}order")
        if saved is not None and saved.shape == self.order.shape:
            _order(saved, self.features, None)  # a damaged one raises here
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.order.is_meta:
            self._renew(_order(self.order, self.features, None))


def _masked(layer: nn.Module) -> MaskedLinear | None:
    """The masked layer itself, which a wrapper may hold; None where another stands in its place."""
    return next((module for module in layer.modules() if isinstance(module, MaskedLinear)), None)


def check_tensor(label: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} must be a torch.Tensor, got {type(value).__name__}")


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
        permutation = torch.as_tensor(order, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"MADE: order must be a permutation of 0 to {features - 1}, got {order!r}") from None
    if permutation.dtype.is_floating_point or not torch.equal(
        permutation.sort().values.to(torch.int64), torch.arange(features, device="cpu")
    ):
        raise ValueError(f"MADE: order must be a permutation of 0 to {features - 1}, got {permutation.tolist()}")
    return permutation.to(torch.int64, copy=True)
