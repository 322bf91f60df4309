"""The peers' affine couplings, their network replaced by a stub that returns the ready parameters.

Each keeps its own parameter layout (the inputs are re-arranged before the clock starts) and its own code path:

- **nflows** ``AffineCouplingTransform``: shifts first, σ = sigmoid(s + 2) + 0.001. Its ``_scale_and_shift`` is
  overridden by the same line without the 0.001, so that all compute one function. ``AdditiveCouplingTransform`` as it
  is.
- **normflows** ``AffineCouplingBlock``: shifts and scales interleaved. ``scale_map="exp"`` and ``"sigmoid_inv"`` in the
  direction
  that it calls forward are our forward. Its checkerboard also alternates over channels: another function.
- **FrEIA** ``AffineCouplingOneSided``: scales first, exp(clamp · f(s)) with clamp 1: f = tanh, or the identity for
  ``exp``.
"""

from __future__ import annotations

import torch

from genkernels.benchmarks.peers import Adapter

PEERS = ("nflows", "normflows", "FrEIA")
_SCALE_MAPS = {"nflows": ("sigmoid", "additive"), "normflows": ("exp", "sigmoid", "additive"), "FrEIA": ("exp", "tanh")}


def unsupported(peer: str, case) -> str:
    settings = case.settings
    if settings["split"] != "channel":
        return f"has no {settings['split']} split of this kind"
    if settings["scale_map"] not in _SCALE_MAPS[peer]:
        return f"has no {settings['scale_map']} scale map"
    if case.direction == "reverse":
        return "has no reverse"
    if settings["layout"] == "interleaved" and peer != "normflows":
        return "has no interleaved layout"
    return ""


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    inverse = direction == "inverse"
    return {"nflows": _nflows, "normflows": _normflows, "FrEIA": _freia}[peer](settings, inverse, shape)


class _Ready(torch.nn.Module):
    """Stands where the peer expects its network, and returns the tensor that it was handed."""

    def __init__(self):
        super().__init__()
        self.params: torch.Tensor | None = None

    def forward(self, *ignored) -> torch.Tensor:
        return self.params


def _scale_shift(params, settings):
    if settings["layout"] == "interleaved":
        return params[:, 0::2], params[:, 1::2]
    return params.chunk(2, dim=1)


def _nflows(settings, inverse, shape) -> Adapter:
    from nflows.transforms import AdditiveCouplingTransform, AffineCouplingTransform

    class Sigmoid(AffineCouplingTransform):
        def _scale_and_shift(self, transform_params):
            unconstrained_scale = transform_params[:, self.num_transform_features :, ...]
            shift = transform_params[:, : self.num_transform_features, ...]
            return torch.sigmoid(unconstrained_scale + 2), shift

    additive = settings["scale_map"] == "additive"
    half = shape[1] // 2
    net = _Ready()
    layer = (AdditiveCouplingTransform if additive else Sigmoid)([0] * half + [1] * half, lambda *sizes: net)

    def op(x, params):
        net.params = params
        return layer.inverse(x) if inverse else layer(x)

    def arrange(x, params):
        s, t = (None, params) if additive else _scale_shift(params, settings)
        return x, params if additive else torch.cat([t, s], dim=1)

    return Adapter(op, arrange)


def _normflows(settings, inverse, shape) -> Adapter:
    from normflows.flows import AffineCouplingBlock

    additive = settings["scale_map"] == "additive"
    net = _Ready()
    layer = AffineCouplingBlock(
        net, scale=not additive, scale_map={"sigmoid": "sigmoid_inv"}.get(settings["scale_map"], "exp")
    )

    def op(x, params):
        net.params = params
        return layer.inverse(x) if inverse else layer(x)

    def arrange(x, params):
        if additive:
            return x, params
        s, t = _scale_shift(params, settings)
        return x, torch.stack([t, s], dim=2).flatten(1, 2)

    return Adapter(op, arrange)


def _freia(settings, inverse, shape) -> Adapter:
    from FrEIA.modules import AffineCouplingOneSided

    net = _Ready()
    squash = torch.tanh if settings["scale_map"] == "tanh" else (lambda s: s)
    layer = AffineCouplingOneSided(
        [tuple(shape[1:])], subnet_constructor=lambda *sizes: net, clamp=1.0, clamp_activation=squash
    )

    def op(x, params):
        net.params = params
        (z,), ldj = layer((x,), rev=inverse)
        return z, ldj

    return Adapter(op, lambda x, params: (x, torch.cat(_scale_shift(params, settings), dim=1)))
