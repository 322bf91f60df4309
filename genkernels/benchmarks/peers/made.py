"""The peers' masked autoregressive flows, with the very weights of the case.

- **nflows** ``MaskedAffineAutoregressiveTransform``, feed-forward blocks: k hidden layers are ``num_blocks = k - 1``. Its scale is
  softplus(s) + 0.001; ``_elementwise_forward`` and ``_elementwise_inverse`` are overridden by the same lines with sigmoid(s + 2), so that
  all compute one function.
- **normflows** ``MaskedAffineAutoregressive`` has no ReLU after its first layer: another function, left out.

nflows keeps hidden units unsorted and gives s and t of a feature side by side: our rows and columns are permuted into its own while
the inputs are arranged, outside the clock. The module's parameters are replaced by the ready tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genkernels.benchmarks.peers import Adapter

PEERS = ("nflows",)


def unsupported(peer: str, case) -> str:
    return "" if len(set(case.shape[2:])) == 1 else "has hidden layers of one size only"


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform

    class Sigmoid(MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs, autoregressive_params):
            s, shift = self._unconstrained_scale_and_shift(autoregressive_params)
            return torch.sigmoid(s + 2) * inputs + shift, F.logsigmoid(s + 2).sum(1)

        def _elementwise_inverse(self, inputs, autoregressive_params):
            s, shift = self._unconstrained_scale_and_shift(autoregressive_params)
            return (inputs - shift) / torch.sigmoid(s + 2), -F.logsigmoid(s + 2).sum(1)

    _, features, *hidden = shape
    layer = Sigmoid(features, hidden[0], num_blocks=len(hidden) - 1, use_residual_blocks=False)
    net = layer.autoregressive_net
    linears = [net.initial_layer, *(block.linear for block in net.blocks), net.final_layer]
    for linear in linears:  # plain attributes, so that ready tensors (and their gradients) can stand in
        for name in ("weight", "bias"):
            delattr(linear, name)

    # where our sorted unit or feature-wise output stands in nflows'
    ours_of = [torch.argsort(torch.argsort(linear.degrees, stable=True)) for linear in linears[:-1]]
    ours_of.append(torch.arange(2 * features).view(2, features).t().reshape(-1))
    columns = [torch.arange(features), *ours_of[:-1]]

    def op(x, *both):
        for linear, weight, bias in zip(linears, both[: len(linears)], both[len(linears) :], strict=True):
            linear.weight, linear.bias = weight, bias
        return layer.inverse(x) if direction == "inverse" else layer(x)

    def arrange(x, *both):
        weights, biases = both[: len(linears)], both[len(linears) :]
        return (
            x,
            *(w[rows][:, cols] for w, rows, cols in zip(weights, ours_of, columns, strict=True)),
            *(b[rows] for b, rows in zip(biases, ours_of, strict=True)),
        )

    return Adapter(op, arrange)
