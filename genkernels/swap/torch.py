"""torch's own spectral norm, of both kinds: every layer of a model in one call of the operator.

torch normalises a layer at each access of its weight, in training with a power iteration each. The same happens here,
access by access; but the first access of a pass computes the next step of *all* layers that share its settings, and
the others find theirs. A step is written into u and v when its layer asks for it, not before: a layer that a pass
leaves out stays where it was. What is found is taken only if weight, u and v are those that it was computed from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as Hook

from genkernels import ops
from genkernels.nn._seen import wrapped
from genkernels.ops import MATRIX, Geometry
from genkernels.ops.spectral_norm import BACKWARD
from genkernels.ops.spectral_norm import _sigma as sigma_of
from genkernels.reference.spectral_norm import as_plan, spectral_norm_backward
from genkernels.swap._rules import Becomes, Library

#: torch divides a vector by this where it is shorter.
EPS = 1e-6


class _Slot:
    """One normalised weight: where its parts are."""

    def __init__(self, owner, part):
        self.owner, self.part = owner, part

    def alone(self) -> bool:
        """Whether its weight is known before it is asked for."""
        return self.owner is not None

    def leader(self) -> Tensor:
        return self.owner.original

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.part._u, self.part._v

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    @property
    def training(self) -> bool:
        return self.part.training

    @property
    def geometry(self) -> Geometry:
        return Geometry(MATRIX, self.part.dim)


class _HookSlot(_Slot):
    """`torch.nn.utils.spectral_norm`: its iteration goes v first, then u, which is that of the transposed matrix."""

    def leader(self) -> Tensor:
        return getattr(self.owner, f"{self.part.name}_orig")

    def vectors(self) -> tuple[Tensor, Tensor]:
        return getattr(self.owner, f"{self.part.name}_v"), getattr(self.owner, f"{self.part.name}_u")

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @property
    def training(self) -> bool:
        return self.owner.training

    @property
    def geometry(self) -> Geometry:
        return Geometry(MATRIX, 1)


class _Found(NamedTuple):
    normal: Tensor
    u: Tensor
    v: Tensor
    sigma: Tensor
    mode: tuple
    tensors: tuple[Tensor, Tensor, Tensor]
    versions: tuple[int, int, int]


class _Group:
    """The layers of one model, and the next step of those that have not asked for it yet."""

    def __init__(self, slots: list[_Slot]):
        self.slots = slots
        self.found: dict[int, _Found] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"slots": self.slots, "found": {}}

    def normalised(self, slot: _Slot, weight: Tensor, iterations: int) -> Tensor:
        key = id(slot)
        found = self.found.pop(key, None)
        if found is None or not _fits(found, slot, weight, iterations):
            self._prepare(slot, weight, iterations)
            found = self.found.pop(key)
        if iterations:
            with torch.no_grad():
                for held, new in zip(slot.vectors(), (found.u, found.v), strict=True):
                    held.copy_(new)
        plan = as_plan([slot.geometry])
        return _Normalised.apply(slot.as_matrix(weight), found.normal, found.u, found.v, found.sigma, plan).view_as(
            weight
        )

    def _prepare(self, asking: _Slot, its_weight: Tensor, iterations: int) -> None:
        jobs = [(asking, its_weight)]
        for slot in self.slots:
            if slot is asking or not slot.alone() or _iterations(slot) != iterations:
                continue
            weight = slot.leader()
            if weight.dtype != its_weight.dtype or weight.device != its_weight.device or weight.is_inference():
                continue
            held = self.found.get(id(slot))
            if held is None or not _fits(held, slot, weight, iterations):
                jobs.append((slot, weight))
        vectors = [slot.vectors() for slot, _ in jobs]
        with torch.no_grad():
            out = ops.spectral_norm(
                [slot.as_matrix(weight) for slot, weight in jobs],
                [u.clone() for u, _ in vectors],
                [v.clone() for _, v in vectors],
                [slot.geometry for slot, _ in jobs],
                iterations=iterations,
            )
        for i, ((slot, weight), pair) in enumerate(zip(jobs, vectors, strict=True)):
            tensors = (weight, *pair)
            new = out.weights[i], out.u[i], out.v[i], out.sigma[i : i + 1]
            self.found[id(slot)] = _Found(*new, _mode(iterations), tensors, tuple(_version(t) for t in tensors))


class _Normalised(torch.autograd.Function):
    """A weight by its norm, both known: layers are normalised together, their gradients are each layer's own, for the
    passes that they belong to end at different times."""

    @staticmethod
    def forward(ctx, weight, normal, u, v, sigma, plan):
        ctx.save_for_backward(weight, u, v, sigma)
        ctx.plan = plan
        return normal

    @staticmethod
    def backward(ctx, grad):
        weight, u, v, sigma = ctx.saved_tensors
        if torch.is_grad_enabled() and weight.requires_grad:
            sigma = sigma_of([weight], [u], [v], ctx.plan)
        run = spectral_norm_backward if ops.transforms_active() else BACKWARD.dense
        (found,) = run([grad], None, [weight], [u], [v], sigma, ctx.plan, 1.0, False)
        return found, None, None, None, None, None


def _iterations(slot: _Slot) -> int:
    return slot.part.n_power_iterations if slot.training else 0


def _mode(iterations: int) -> tuple:
    return iterations, torch.is_inference_mode_enabled()


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _fits(found: _Found, slot: _Slot, weight: Tensor, iterations: int) -> bool:
    now = (weight, *slot.vectors())
    same = all(a is b and not a.is_inference() for a, b in zip(found.tensors, now, strict=True))
    return same and found.mode == _mode(iterations) and found.versions == tuple(map(_version, now))


def _outside(weight: Tensor) -> bool:
    """Whether torch's own way is taken: what it does can be seen through by transforms and by the compiler."""
    return torch.compiler.is_compiling() or ops.transforms_active() or wrapped(weight) or weight.is_meta


class SpectralNorm(parametrizations._SpectralNorm):
    """`torch.nn.utils.parametrizations.spectral_norm`, batched."""

    def forward(self, weight: Tensor) -> Tensor:
        slot = self._gk_slot
        if slot.part is not self or _outside(weight):  # a replica of nn.DataParallel is in no group
            return super().forward(weight)
        return self._gk_group.normalised(slot, weight, self.n_power_iterations if self.training else 0)


class SpectralNormHook(Hook):
    """`torch.nn.utils.spectral_norm`, batched."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        slot = self._gk_slot
        weight = getattr(module, f"{self.name}_orig")
        if slot.owner is not module or _outside(weight):
            return super().compute_weight(module, do_power_iteration)
        return self._gk_group.normalised(slot, weight, self.n_power_iterations if do_power_iteration else 0)


def _parametrization(part) -> Becomes | str:
    if not hasattr(part, "_u"):
        return "of a vector, which has no matrix norm"
    return "its eps is too large to be left out" if part.eps > EPS else Becomes(SpectralNorm, BATCHED)


def _hook(part) -> Becomes | str:
    if part.dim != 0:
        return "of a transposed convolution by torch.nn.utils.spectral_norm; that of parametrizations would be swapped"
    return "its eps is too large to be left out" if part.eps > EPS else Becomes(SpectralNormHook, BATCHED)


BATCHED = "all layers in one call; a weight of zeros comes out as zeros, where torch gives NaN"


def _hooks(module: nn.Module) -> dict[str, Any]:
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Hook)]
    return {f"spectral_norm of {hook.name}": hook for hook in hooks}


def _join(model: nn.Module, objects: list) -> None:
    swapped = {id(thing) for thing in objects}
    slots = []
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for i, part in enumerate(module):
                if id(part) in swapped:
                    part._gk_slot = _Slot(module if i == 0 else None, part)
                    slots.append(part._gk_slot)
        for hook in _hooks(module).values():
            if id(hook) in swapped:
                hook._gk_slot = _HookSlot(module, hook)
                slots.append(hook._gk_slot)
    group = _Group(slots)
    for slot in slots:
        slot.part._gk_group = group


LIBRARY = Library("torch", (), {parametrizations._SpectralNorm: _parametrization, Hook: _hook}, _hooks, _join)
