"""FlowSequential: layers one after the other, log-determinants summed; optionally without stored activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.backends import current_backend
from genkernels.nn._context import check_context
from genkernels.nn._log_det import check_log_det, work_dtype, zero_log_det
from genkernels.nn.actnorm import ActNorm
from genkernels.nn.additive_run import AdditiveRun
from genkernels.nn.autoregressive_run import AutoregressiveRun
from genkernels.nn.folding import Folded, FoldedPair
from genkernels.nn.joined_actnorms import JoinedActNorms
from genkernels.nn.reversible import run_reversible


class FlowSequential(nn.Sequential):
    """Chains flow layers: ``z, ldj = flow(x, context)`` and ``x, ldj = flow.inverse(z, context)``.

    On every backend but ``reference`` layers are joined where that gives the same numbers with less work: an `ActNorm`
    directly before an `InvertibleConv1x1` is folded with it into one product, the other ActNorms share their
    exponentials and sums, neighbouring additive couplings run on the two halves of x, and neighbouring autoregressive
    affine transforms with their ActNorms are one call of a kernel. Parameters and state dict are
    those of the layers; a layer with hooks, or an ActNorm yet to be initialised, runs by itself.

    Args:
        *layers: modules with ``layer(x, context) -> (z, ldj)`` and ``layer.inverse(z, context) -> (x, ldj)``.
        reversible: keep only the last output for backward and rebuild each layer's input by its inverse: memory does
            not grow with depth, a step costs one more pass. Layers must be deterministic (no active dropout, no running
            statistics) and may offer ``reverse_backward`` (see `AffineCoupling.reverse_backward`); otherwise they are
            inverted and run again. The context is a tensor or None. Not twice differentiable.

    Shapes:
        x, z: as the layers have it, ``[N, ...]``. ldj: ``[N]``, nats, fp32 or wider.

    Raises:
        TypeError: a layer has no inverse. ValueError: a layer's log-determinant is not ``[N]``, or the context has not
            N rows.
        RuntimeError: with `reversible`, a layer draws random numbers or changes its own state (batch normalisation in
            training), so that running it again would give something else; in backward, x came back from the layers'
            inverses more than 1 % wrong (20 % in half types), and its gradients would be as wrong. A GPU is not waited
            for: there they are NaN then.

    Source: the reversible backward: Gomez et al., "The reversible residual network", 2017.
    """

    def __init__(self, *layers, reversible: bool = False):
        super().__init__(*layers)
        self.reversible = reversible
        for name, layer in self.named_children():
            _check_layer(layer, name)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            self._begin(x, context)
        if self.reversible and torch.is_grad_enabled() and not x.is_meta:
            return run_reversible(self, lambda: self._steps(runs=False), x, context)
        steps = self._steps()
        return _chain(AutoregressiveRun.joined(steps, x) if current_backend() == "auto" else steps, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _chain(self._steps(), z, context, inverse=True)

    def extra_repr(self) -> str:
        return "reversible=True" if self.reversible else ""

    # a list of layers, as `torch.nn.Sequential` is one; what leaves it is a flow as well

    def __getitem__(self, index):
        part = super().__getitem__(index)
        if isinstance(index, slice):
            part.reversible = self.reversible
        return part

    def __add__(self, other) -> FlowSequential:
        if not isinstance(other, nn.Sequential):
            return NotImplemented
        reversible = self.reversible and getattr(other, "reversible", True)
        return FlowSequential(*self, *other, reversible=reversible)

    def __mul__(self, times: int) -> FlowSequential:
        if not isinstance(times, int):
            return NotImplemented
        if times < 1:
            raise ValueError(f"FlowSequential: it can be repeated at least once, got {times} times")
        return FlowSequential(*list(self) * times, reversible=self.reversible)

    __rmul__ = __mul__

    def __setitem__(self, index: int, layer: nn.Module) -> None:
        _check_layer(layer, index)
        super().__setitem__(index, layer)

    def insert(self, index: int, layer: nn.Module) -> FlowSequential:
        _check_layer(layer, index)
        return super().insert(index, layer)

    def append(self, layer: nn.Module) -> FlowSequential:
        _check_layer(layer, len(self))
        return super().append(layer)

    def _begin(self, x: Tensor, context: Tensor | None) -> None:
        """Lets ActNorms start on a pass of its own, so that the first batch runs through the same steps as every other
        (``torch.utils.checkpoint`` compares the two) and random layers draw what they would have drawn."""
        if torch.compiler.is_compiling() or all(layer.ready for layer in self if isinstance(layer, ActNorm)):
            return
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            _chain(list(self), x, context)

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


def _check_layer(layer, position) -> None:
    if not callable(getattr(layer, "inverse", None)):
        raise TypeError(
            f"FlowSequential: every layer must have an inverse, got {type(layer).__name__} at position {position}"
        )


def _chain(steps: list, x: Tensor, context: Tensor | None, inverse: bool = False) -> tuple[Tensor, Tensor]:
    check_context(x, context)
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
            check_log_det(step, log_det, x)
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
