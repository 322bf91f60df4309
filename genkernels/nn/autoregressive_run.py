"""Autoregressive affine transforms one after the other, with the ActNorms in front of them, as one call of a kernel.

By themselves the layers of a small network take less time than getting from one to the next: Python, the dispatcher,
a node of the graph each. The numbers are those of the layers but for rounding.
"""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor

from genkernels.networks._plain import plain
from genkernels.nn.actnorm import ActNorm
from genkernels.nn.autoregressive import AutoregressiveTransform, one_call_pays
from genkernels.nn.joined_actnorms import JoinedActNorms
from genkernels.ops.made import made_chain


class AutoregressiveRun:
    """Neighbouring transforms, run as one layer. Holds references, no parameters of its own.

    Args:
        transforms: at least one. norms: none, or one in front of each, or one more, behind the last.
    """

    def __init__(self, transforms: list[AutoregressiveTransform], norms: list[ActNorm]):
        self.transforms, self.norms = transforms, norms

    @staticmethod
    def joined(steps: list, x: Tensor) -> list:
        """`steps` with every stretch that is faster in one call as a run, for the direction of one pass; x: what comes
        to the first of them, perhaps not yet ``[N, D]``."""
        if not any(isinstance(step, AutoregressiveTransform) for step in steps):
            return steps
        if not one_call_pays(x):
            return steps
        found, at = [], 0
        while at < len(steps):
            transforms, norms, end = _stretch(steps, at, x.dtype)
            run = end - at > 1
            found.append(AutoregressiveRun(transforms, norms) if run else steps[at])
            at = end if run else at + 1
        return found

    def __call__(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first = self.transforms[0]
        dtype = first.made.layers[0].weight.dtype
        if x.dim() != 2 or x.shape[1] != first.made.features or x.dtype != dtype:
            return self._layer_by_layer(x, context)
        each = [transform.network_of(x, context) for transform in self.transforms]
        return made_chain(
            x.contiguous(),
            [added.to(dtype).contiguous() for *_, added in each if added is not None],
            [w.contiguous() for weights, *_ in each for w in weights],
            [b.contiguous() for _, biases, *_ in each for b in biases],
            [t.contiguous() for norm in self.norms for t in (norm.bias, norm.log_scale)],
            [order for _, _, order, *_ in each],
            [counts for *_, counts, _ in each],
            first.made.residual,
            *first.codes,
        )

    def _layer_by_layer(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where x is not what was expected of it: the layers say what is wrong."""
        log_dets = []
        for pair in zip_longest(self.norms, self.transforms):
            for layer in pair:
                if layer is not None:
                    x, log_det = layer(x, context)
                    log_dets.append(log_det)
        return x, torch.stack(log_dets).sum(0)


def _stretch(steps: list, at: int, dtype: torch.dtype) -> tuple[list[AutoregressiveTransform], list[ActNorm], int]:
    """The transforms and the ActNorms that a run from a step on holds, and where it ends."""
    transforms: list[AutoregressiveTransform] = []
    norms: list[ActNorm] = []
    normed = _norm(steps[at], dtype)
    while at < len(steps):
        transform = at + normed
        if (normed and not _norm(steps[at], dtype)) or transform >= len(steps):
            break
        if not _fits(steps[transform], dtype, transforms, steps[at] if normed else None):
            break
        if normed:
            norms.append(steps[at])
        transforms.append(steps[transform])
        at = transform + 1
    if transforms and normed and at < len(steps) and _norm(steps[at], dtype):
        if steps[at].channels == transforms[0].made.features:
            norms.append(steps[at])
            at += 1
    return transforms, norms, at


def _norm(step, dtype: torch.dtype) -> bool:
    return JoinedActNorms.takes(step) and all(
        t.dtype == dtype and t.device.type == "cpu" and t.shape == (step.channels,) for t in (step.bias, step.log_scale)
    )


def _fits(step, dtype: torch.dtype, others: list[AutoregressiveTransform], norm: ActNorm | None) -> bool:
    if not (isinstance(step, AutoregressiveTransform) and plain(step, AutoregressiveTransform)):
        return False
    if not step.takes_one_call(dtype) or (norm is not None and norm.channels != step.made.features):
        return False
    return not others or step.alike(others[0])
