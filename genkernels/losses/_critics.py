"""What losses of a critic itself ask of it: the pair of batches, its scores, and their gradient by autograd."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from genkernels.backends import current_backend
from genkernels.losses.adversarial import as_scores, check_score_shape
from genkernels.networks import Penalised, Untraceable, couples_samples, parameters, traced
from genkernels.networks.gradient_penalty import why_not
from genkernels.networks.steps import Reshape, Step
from genkernels.ops import _autocast as autocast
from genkernels.ops import checks, transforms_active

Critic = Callable[..., Tensor]
OUTPUT = "the critic's output"
#: Functions of autograd that change no score.
SHAPES_ONLY = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy", "Permute", "T")


def checked_pair(who: str, real: Tensor, fake: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both batches, which must be of one shape, dtype and device and hold a sample, while no transform is at work.
    Under autocast, where a generator gives a half type, both come in the wider type of theirs."""
    checks.tensors(who, {"real": real, "fake": fake})
    if autocast.active(real):
        dtype = autocast.widest(real, fake)
        real, fake = real.to(dtype), fake.to(dtype)
    checks.same_dtype(who, {"real": real, "fake": fake})
    if real.shape != fake.shape or real.dim() == 0 or not len(real):
        raise ValueError(
            f"{who}: real and fake must be of one shape [N, ...], N of at least 1, got {list(real.shape)} and "
            f"{list(fake.shape)}"
        )
    if transforms_active():
        raise RuntimeError(
            f"{who}: differentiates by itself and cannot run inside torch.func's transforms or forward-mode autograd"
        )
    if isinstance(y, Tensor) and (y.dim() == 0 or len(y) != len(real)):
        raise ValueError(f"{who}: y must hold a label for each of the {len(real)} samples, got {list(y.shape)}")
    if torch.compiler.is_compiling():
        return real, fake
    return tuple(x.clone() if x.is_inference() else x for x in (real, fake))  # such tensors take no gradient


@contextlib.contextmanager
def beyond_inference() -> Iterator[None]:
    """Inference mode records nothing, not even where it is told to: what differentiates by itself runs outside of it,
    with no gradient of its own."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def check_weight(who: str, label: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{who}: {label} must be a finite number, 0 or more, got {value!r}")


@contextlib.contextmanager
def bare(critic: Critic) -> Iterator[Critic]:
    """The critic as it was before ``torch.compile``, which gives the same values and cannot be differentiated twice;
    `DistributedDataParallel` of a compiled one wraps what was compiled meanwhile."""
    critic = getattr(critic, "_orig_mod", critic)
    compiled = critic.module if isinstance(critic, DistributedDataParallel) else None
    if not hasattr(compiled, "_orig_mod"):
        yield critic
        return
    critic.module = compiled._orig_mod
    try:
        yield critic
    finally:
        critic.module = compiled


def within(critic: Critic, x: Tensor, run: Callable[[], Penalised]) -> Penalised:
    """What `run` finds, as a forward pass of `DistributedDataParallel` where the critic is one: its hooks wait for a
    backward pass only after it."""
    if not isinstance(critic, DistributedDataParallel):
        return run()
    module, found = critic.module, []

    def forward(_) -> Tensor:
        found.append(run())
        return found[0].total

    module.forward = forward  # no layer that has one of its own has come so far
    try:
        total = critic(x)
    finally:
        del module.forward
    return found[0]._replace(total=total)


class Network(NamedTuple):
    """A critic's steps, and their weights, read where there is a penalty."""

    steps: tuple[Step, ...]
    weights: tuple[dict, ...] = ()


def network_of(
    who: str, critic: Critic, x: Tensor, y: Tensor | None, penalised: bool = True
) -> tuple[Network | None, str]:
    """The critic as a network, or what `DistributedDataParallel` wraps where it is one, and "", or None and the reason
    why `genkernels.networks.gradient_penalty` does not take it.

    Refuses a critic that ends in a sigmoid, and warns of one that couples the samples of a batch if it is `penalised`.
    """
    if not callable(critic):
        raise TypeError(f"{who}: critic must be a torch.nn.Module or a function, got {type(critic).__name__}")
    if not isinstance(critic, nn.Module):
        return None, "the critic is no nn.Module"
    critic = critic.module if isinstance(critic, DistributedDataParallel) else critic
    refuse_sigmoid(who, last_layer(critic))
    try:
        steps = traced(critic, x, labelled=y is not None)
    except Untraceable as refusal:
        steps, reason, coupled = None, str(refusal).removeprefix("trace: "), refusal.couples_samples
    if steps is None:
        if layer := couples_samples(critic):
            reason, coupled = layer, True
        if coupled and penalised:
            _warn_coupled(who, reason)
        return None, reason
    refuse_sigmoid(who, next(step for step in reversed(steps) if not isinstance(step, Reshape)))
    check_score_shape(who, OUTPUT, (len(x), *steps[-1].shape))
    if current_backend() == "reference":
        return None, "the backend is 'reference'"
    if any(source.of_labels for step in steps for source in step.sources) and not _are_indices(y):
        return None, "the critic takes labels that are no tensor of indices [N]"
    if not penalised:
        return Network(steps), ""
    try:
        weights = parameters(steps, y)
    except ValueError as refusal:  # a normalised convolution that its first call will tell the size of its input
        return None, str(refusal)
    reason = why_not(steps, weights)
    return (None, reason) if reason else (Network(steps, weights), "")


def gives_one_score(network: Network) -> bool:
    return network.steps[-1].shape[1:] in ((), (1, 1))


def _are_indices(y) -> bool:
    return isinstance(y, Tensor) and y.dim() == 1 and y.dtype in (torch.int64, torch.int32)


def last_layer(critic: nn.Module) -> nn.Module:
    while isinstance(critic, nn.Sequential) and len(critic):
        critic = critic[-1]
    return critic


def last_function(scores: Tensor) -> str:
    """Which function autograd saw the scores come from, by its name there, changes of shape aside; "" of a constant."""
    function = scores.grad_fn
    while function is not None:
        name = function.name().partition("Backward")[0]
        if name not in SHAPES_ONLY:
            return name
        function = function.next_functions[0][0]
    return ""


def refuse_sigmoid(who: str, last: nn.Module | Step | str) -> None:
    if isinstance(last, nn.Sigmoid) or getattr(last, "name", last) in ("sigmoid", "Sigmoid"):
        raise ValueError(
            f"{who}: the critic must give a score without bounds, got one that ends in a sigmoid: leave it out, as the "
            "losses take it"
        )


def _warn_coupled(who: str, reason: str) -> None:
    warnings.warn(
        f"{who}: {reason}: a sample has no gradient of its own then, and the penalty holds for the batch alone; a "
        "normalisation of each sample by itself, or spectral norm, has none of this",
        stacklevel=6,
    )


def scores_of(who: str, critic: Critic, x: Tensor, y: Tensor | None) -> Tensor:
    """``[N, patches]``, as the critic gives them for x (and labels y)."""
    given = critic(x) if y is None else critic(x, y)
    scores = as_scores(who, OUTPUT, given)
    if not torch.compiler.is_compiling():
        refuse_sigmoid(who, last_function(given))  # of critics that are no networks of steps, or no modules
    if len(scores) != len(x):
        raise ValueError(
            f"{who}: the critic must give a score for each of the {len(x)} samples, got {len(scores)} scores"
        )
    return scores


def gradient_of(who: str, scores: Tensor, x: Tensor, record: bool) -> Tensor:
    """The gradient of each sample's score, the mean over its patches, by x."""
    if not scores.requires_grad:
        raise ValueError(f"{who}: the critic's output must depend on its input, and autograd see how, got a constant")
    # a score that is NaN has the slope NaN: derivatives of activations would hide it
    seed = torch.where(scores.isnan(), scores.detach(), 1 / scores.shape[1])
    (gradient,) = torch.autograd.grad(scores, x, seed, create_graph=record, retain_graph=True, materialize_grads=True)
    return gradient


def as_point(x: Tensor) -> Tensor:
    """x, or what stands for it, with a gradient to ask for."""
    return x if x.requires_grad else x.detach().requires_grad_()
