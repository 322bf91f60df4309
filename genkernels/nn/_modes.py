"""Training and evaluation mode, module by module, and modules that ask for no gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a block; each module gets back the mode that it had.

    Parts of a model in training mode that are in evaluation mode are frozen on purpose: they stay so while it trains.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not (training and model.training):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:  # a module before its parts, and not the flag alone: some act on the change
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:  # a part of two modules may have been taken along by the second
            module.training = mode


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What is computed within the block asks for no gradient of the module's parameters, its inputs may."""
    asking = [p for p in module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def call_frozen(module: nn.Module, *inputs) -> Any:
    """``module(*inputs)`` within `frozen`."""
    # a compiler follows no change of what asks for gradients, and has parameters that are no leaves
    if torch.compiler.is_compiling() or not all(p.is_leaf for p in module.parameters()):
        constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, constants, inputs)
    with frozen(module):
        return module(*inputs)
