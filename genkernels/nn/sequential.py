"""FlowSequential: layers one after the other, log-determinants summed; optionally without stored activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.backends import current_backend
from genkernels.nn._log_det import work_dtype, zero_log_det
from genkernels.nn.folding import Folded, FoldedPair
from genkernels.nn.reversible import run_reversible


class FlowSequential(nn.Sequential):
    """Chains flow layers: ``z, ldj = flow(x, context)`` and ``x, ldj = flow.inverse(z, context)``.

    An `ActNorm` directly before an `InvertibleConv1x1` is folded with it into one product, forward and inverse, on
    every backend but ``reference`` and once the ActNorm is initialised; parameters and state dict are those of the
    layers.

    Args:
        *layers: modules with ``layer(x, context) -> (z, ldj)`` and ``layer.inverse(z, context) -> (x, ldj)``.
        reversible: keep only the last output for backward and rebuild each layer's input by its inverse: memory does
            not grow with depth, a step costs one more pass. Layers must be deterministic (no active dropout) and may
            offer ``reverse_backward`` (see `AffineCoupling.reverse_backward`); otherwise they are inverted and run
            again. The context is a tensor or None. Not twice differentiable.

    Shapes:
        x, z: as the layers have it, ``[N, ...]``. ldj: ``[N]``, nats, fp32 or wider.

    Raises:
        TypeError: a layer has no inverse.

    Source: the reversible backward: Gomez et al., "The reversible residual network", 2017.
    """

    def __init__(self, *layers, reversible: bool = False):
        super().__init__(*layers)
        self.reversible = reversible
        for name, layer in self.named_children():
            if not callable(getattr(layer, "inverse", None)):
                raise TypeError(
                    f"FlowSequential: every layer must have an inverse, got {type(layer).__name__} at position {name}"
                )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.reversible and torch.is_grad_enabled():
            return run_reversible(self, self._steps, x, context)
        return _run(self._steps(), x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        steps = self._steps()
        folded = Folded([s for s in steps if isinstance(s, FoldedPair)], inverse=True)
        return _chain(reversed(steps), folded, z, context)

    def extra_repr(self) -> str:
        return "reversible=True" if self.reversible else ""

    def _steps(self) -> list:
        """The layers as they are to run now, pairs folded."""
        layers = list(self)
        if current_backend() == "reference":
            return layers
        steps: list = []
        for layer in layers:
            if steps and FoldedPair.fits(steps[-1], layer):
                steps[-1] = FoldedPair(steps[-1], layer)
            else:
                steps.append(layer)
        return steps


def _run(steps: list, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    folded = Folded([s for s in steps if isinstance(s, FoldedPair)], inverse=False)
    return _chain(steps, folded, x, context)


def _chain(steps, folded: Folded, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = work_dtype(x)
    log_dets: list[Tensor] = []
    first = x
    for step in steps:
        if isinstance(step, FoldedPair):
            x = folded.apply(step, x)
            continue
        x, log_det = step.inverse(x, context) if folded.inverse else step(x, context)
        log_dets.append(log_det)
    if not log_dets:
        total = zero_log_det(first)
    else:
        # one sum over all layers, not an addition a layer
        total = log_dets[0] if len(log_dets) == 1 else torch.stack(log_dets).sum(0)
    if folded.pairs:
        total = total + folded.log_det(dtype)
    return x, total
