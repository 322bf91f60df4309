"""FlowSequential: layers one after the other, log-determinants summed; optionally without stored activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.backends import current_backend
from genkernels.nn._log_det import work_dtype, zero_log_det
from genkernels.nn.additive_run import AdditiveRun
from genkernels.nn.folding import Folded, FoldedPair
from genkernels.nn.joined_actnorms import JoinedActNorms
from genkernels.nn.reversible import run_reversible


class FlowSequential(nn.Sequential):
    """Chains flow layers: ``z, ldj = flow(x, context)`` and ``x, ldj = flow.inverse(z, context)``.

    On every backend but ``reference`` layers are joined where that gives the same numbers with less work: an `ActNorm`
    directly before an `InvertibleConv1x1` is folded with it into one product, the other ActNorms share their
    exponentials and sums, and neighbouring additive couplings run on the two halves of x. Parameters and state dict are
    those of the layers; a layer with hooks, or an ActNorm yet to be initialised, runs by itself.

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
            return run_reversible(self, lambda: self._steps(runs=False), x, context)
        return _chain(self._steps(), x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _chain(self._steps(), z, context, inverse=True)

    def extra_repr(self) -> str:
        return "reversible=True" if self.reversible else ""

    def _steps(self, runs: bool = True) -> list:
        """The layers as they are to run now, pairs folded and, with `runs`, neighbouring additive couplings joined."""
        backend = current_backend()
        if backend == "reference":
            return list(self)
        runs = runs and backend == "auto"  # a forced backend runs its own kernels
        steps: list = []
        for layer in self:
            if steps and FoldedPair.fits(steps[-1], layer):
                steps[-1] = FoldedPair(steps[-1], layer)
            elif runs and AdditiveRun.takes(layer):
                earlier = steps.pop().layers if steps and isinstance(steps[-1], AdditiveRun) else ()
                steps.append(AdditiveRun(*earlier, layer))
            else:
                steps.append(layer)
        return steps


def _chain(steps: list, x: Tensor, context: Tensor | None, inverse: bool = False) -> tuple[Tensor, Tensor]:
    folded = Folded([step for step in steps if isinstance(step, FoldedPair)], inverse)
    joined = JoinedActNorms(_joinable(steps), inverse)
    dtype = work_dtype(x)
    log_dets: list[Tensor] = []
    first = x
    for step in reversed(steps) if inverse else steps:
        if isinstance(step, FoldedPair):
            x = folded.apply(step, x)
        elif step in joined:
            x = joined.apply(step, x)
        else:
            x, log_det = step.inverse(x, context) if inverse else step(x, context)
            log_dets.append(log_det)
    if not log_dets:
        total = zero_log_det(first)
    else:
        # one sum over all layers, not an addition a layer
        total = log_dets[0] if len(log_dets) == 1 else torch.stack(log_dets).sum(0)
    for shared in (folded, joined):
        if shared:
            total = total + shared.log_det(dtype)
    return x, total


def _joinable(steps: list) -> list:
    """The ActNorms that had better run together; one alone gains nothing.

    None inside ``torch.compile``, which fuses them by itself, and whose Inductor (torch 2.13, CPU) gave the first
    ActNorm of a flow on points a wrong gradient where they were joined.
    """
    if current_backend() == "reference" or torch.compiler.is_compiling():
        return []
    norms = [step for step in steps if JoinedActNorms.takes(step)]
    return norms if len(norms) > 1 else []
