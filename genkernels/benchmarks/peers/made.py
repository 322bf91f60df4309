"""The peers' masked autoregressive flows, with the very weights of the case.

- **nflows** ``MaskedAffineAutoregressiveTransform``, feed-forward blocks: k hidden layers are ``num_blocks = k - 1``.
  Its scale is softplus(s) + 0.001; ``_elementwise_forward`` and ``_elementwise_inverse`` are overridden by the same
  lines with sigmoid(s + 2), so that all compute one function.
- **zuko** ``MaskedAutoregressiveTransform``, as ``zuko.flows.MAF`` has it, with a univariate transform of scale
  sigmoid(s + 2) instead of its own. Its inverse gives no log-determinant on the way: ``inv.call_and_ladj`` runs one
  pass more. Of splines all is its own, as ``zuko.flows.NSF`` has it.
- **normflows** ``MaskedAffineAutoregressive`` has no ReLU after its first layer: another function, left out.

Both keep hidden units unsorted and give the parameters of a feature side by side: our rows and columns are permuted
into their own while the inputs are arranged, outside the clock. The modules' parameters are replaced by the ready
tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genkernels.benchmarks.peers import Adapter

PEERS = ("nflows", "zuko")


def unsupported(peer: str, case) -> str:
    return "has hidden layers of one size only" if peer == "nflows" and len(set(case.shape[2:])) > 1 else ""


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    _, features, *hidden = shape
    inverse = direction == "inverse"
    if peer == "nflows":
        run, linears, degrees, places = _nflows(features, hidden, inverse)
    else:
        run, linears, degrees, places = _zuko(features, hidden, inverse, settings)
    for linear in linears:  # plain attributes, so that ready tensors (and their gradients) can stand in
        for name in ("weight", "bias"):
            delattr(linear, name)

    # where our sorted unit or output, one parameter of all features after the other, stands in the peer's layers
    ours_of = [torch.argsort(torch.argsort(d, stable=True)) for d in degrees]
    ours_of.append((features * torch.tensor(places) + torch.arange(features)[:, None]).flatten())
    columns = [torch.arange(features), *ours_of[:-1]]

    def op(x, *both):
        for linear, weight, bias in zip(linears, both[: len(linears)], both[len(linears) :], strict=True):
            linear.weight, linear.bias = weight, bias
        return run(x)

    def arrange(x, *both):
        weights, biases = both[: len(linears)], both[len(linears) :]
        return (
            x,
            *(w[rows][:, cols] for w, rows, cols in zip(weights, ours_of, columns, strict=True)),
            *(b[rows] for b, rows in zip(biases, ours_of, strict=True)),
        )

    return Adapter(op, arrange)


def _nflows(features: int, hidden: list[int], inverse: bool):
    """The call, its linear layers, the degrees of the hidden ones' units, and which of our parameters (s, t) it has
    first, second, …."""
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform

    class Sigmoid(MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs, autoregressive_params):
            s, shift = self._unconstrained_scale_and_shift(autoregressive_params)
            return torch.sigmoid(s + 2) * inputs + shift, F.logsigmoid(s + 2).sum(1)

        def _elementwise_inverse(self, inputs, autoregressive_params):
            s, shift = self._unconstrained_scale_and_shift(autoregressive_params)
            return (inputs - shift) / torch.sigmoid(s + 2), -F.logsigmoid(s + 2).sum(1)

    layer = Sigmoid(features, hidden[0], num_blocks=len(hidden) - 1, use_residual_blocks=False)
    net = layer.autoregressive_net
    linears = [net.initial_layer, *(block.linear for block in net.blocks), net.final_layer]
    return layer.inverse if inverse else layer, linears, [linear.degrees for linear in linears[:-1]], (0, 1)


def _zuko(features: int, hidden: list[int], inverse: bool, settings: dict):
    from functools import partial

    from zuko.flows.autoregressive import MaskedAutoregressiveTransform
    from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

    class Sigmoid(MonotonicAffineTransform):
        def __init__(self, shift, scale):
            super(MonotonicAffineTransform, self).__init__()
            self.shift, self.scale, self.log_scale = shift, torch.sigmoid(scale + 2), F.logsigmoid(scale + 2)

    if bins := settings.get("autoregressive"):
        options = {
            "univariate": partial(MonotonicRQSTransform, bound=settings["bound"]),
            "shapes": [(bins,), (bins,), (bins - 1,)],
        }
    else:
        options = {"univariate": Sigmoid}
    layer = MaskedAutoregressiveTransform(features, hidden_features=hidden, **options)
    linears = list(layer.hyper)[::2]
    # a unit's degree: the number of features that it may see
    degrees = [torch.arange(width) % (features - 1) for width in hidden]

    def run(x):
        transform = layer()
        return (transform.inv if inverse else transform).call_and_ladj(x)

    return run, linears, degrees, range(3 * bins - 1) if bins else (1, 0)
