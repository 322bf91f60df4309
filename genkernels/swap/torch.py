"""torch's own spectral norm, of both kinds: every layer of a model in one call of the operator.

torch normalises a layer at each access of its weight, in training with a power iteration each. The same happens here,
access by access; but the first access of a pass computes the next step of *all* layers that share its settings, and
the others find theirs. A step is written into u and v when its layer asks for it, not before: a layer that a pass
leaves out stays where it was. What is found is taken only if weight, u and v are those that it was computed from.

In evaluation torch's own way is taken on a CPU: without a power iteration three of its operations a layer are all there
is, and the operator is 0.5 to 0.95 times as fast for layers of 8 to 1024 units and for convolutions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as Hook

from genkernels import ops
from genkernels.nn._seen import wrapped
from genkernels.ops import MATRIX, Geometry
from genkernels.ops import _autocast as autocast
from genkernels.ops.spectral_norm import BACKWARD, NORMALISE
from genkernels.ops.spectral_norm import _sigma as sigma_of
from genkernels.reference.spectral_norm import as_plan, spectral_norm_backward
from genkernels.swap._rules import Becomes, Library

#: torch divides a vector by this where it is shorter.
EPS = 1e-6
EXACT = (torch.float32, torch.float64)
#: A weight of more numbers is normalised by itself on a CPU, when it is asked for: it is then in the cache when it is
#: used, and its memory is that of the one before (6 layers of 512×512, evaluation: 0.7 to 1.1 times as fast together).
LARGE = 1 << 16
#: Fewer layers, of no more than `LARGE` numbers together, are left alone on a CPU: a call of the operator costs more
#: than it saves (a training step of 1 to 4 layers of 8 and 64 units: 0.76 to 0.99 times as fast; of 5: 1.01).
FEW = 5


class _Slot:
    """One normalised weight: where its parts are."""

    def __init__(self, owner, part):
        self.owner, self.part = owner, part

    def leader(self) -> Tensor | None:
        """Its weight, None where that is not known before it is asked for."""
        return None if self.owner is None else self.owner.original

    def vectors(self) -> tuple[Tensor, Tensor]:
        buffers = self.part._buffers
        return buffers["_u"], buffers["_v"]

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def by_weight(self, grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: float) -> Tensor | None:
        return None if self.part.dim else _by_weight(grad, weight, u, v, sigma)

    @property
    def training(self) -> bool:
        return self.part.training

    @property
    def geometry(self) -> Geometry:
        return Geometry(MATRIX, self.part.dim)


class _HookSlot(_Slot):
    """`torch.nn.utils.spectral_norm`: its iteration goes v first, then u, which is that of the transposed matrix."""

    def leader(self) -> Tensor | None:
        return getattr(self.owner, f"{self.part.name}_orig", None)  # none: its norm was taken off

    def vectors(self) -> tuple[Tensor, Tensor]:
        buffers, name = self.owner._buffers, self.part.name
        return buffers[f"{name}_v"], buffers[f"{name}_u"]

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def by_weight(self, grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: float) -> Tensor | None:
        return _by_weight(grad, weight, v, u, sigma)

    @property
    def training(self) -> bool:
        return self.owner.training

    @property
    def geometry(self) -> Geometry:
        return Geometry(MATRIX, 1)


class _Found(NamedTuple):
    """The next step of one layer, and what it was computed from."""

    normal: Tensor
    u: Tensor
    v: Tensor
    sigma: Tensor
    iterations: int
    inference: bool
    given: tuple[Tensor, Tensor, Tensor]
    versions: tuple[int, int, int]

    def fits(self, weight: Tensor, u: Tensor, v: Tensor, iterations: int) -> bool:
        old, one, two = self.given
        if old is not weight or one is not u or two is not v or self.iterations != iterations:
            return False
        if weight.is_inference() or u.is_inference() or v.is_inference():
            return False
        now = weight._version, u._version, v._version
        return self.versions == now and self.inference == torch.is_inference_mode_enabled()


class _Group:
    """The layers of one model, and the next step of those that have not asked for it yet."""

    def __init__(self, slots: list[_Slot]):
        self.slots = slots
        self.found: dict[_Slot, _Found] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"slots": self.slots, "found": {}}

    def normalised(self, slot: _Slot, weight: Tensor, iterations: int) -> Tensor:
        found = self.found.pop(slot, None)
        u, v = slot.vectors()
        if found is None or not found.fits(weight, u, v, iterations):
            found = self._prepare(slot, weight, iterations)
        if iterations:
            torch._foreach_copy_([u, v], [found.u, found.v])
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return found.normal
        return _Normalised.apply(weight, found.normal, found.u, found.v, found.sigma, slot)

    def _prepare(self, asking: _Slot, its_weight: Tensor, iterations: int) -> _Found:
        """The next step of a layer; those of all others that will take as many iterations and have none yet are kept.
        A thread gives what it has found for its layer to no other."""
        jobs = [(asking, its_weight, *asking.vectors())]
        dtype, device = its_weight.dtype, its_weight.device
        for slot in () if _is_large(its_weight) else self.slots:
            weight = slot.leader()
            if slot is asking or weight is None or _iterations(slot) != iterations:
                continue
            u, v = slot.vectors()
            if weight.dtype != dtype or weight.device != device or weight.is_inference() or _is_large(weight):
                continue
            held = self.found.get(slot)
            if held is None or not held.fits(weight, u, v, iterations):
                jobs.append((slot, weight, u, v))
        slots, weights, us, vs = (list(each) for each in zip(*jobs, strict=True))
        with torch.no_grad():
            matrices = [slot.as_matrix(weight) for slot, weight in zip(slots, weights, strict=True)]
            normals, news, norms = _step(matrices, us, vs, [slot.geometry for slot in slots], iterations)
        inference = torch.is_inference_mode_enabled()
        steps = []
        for weight, u, v, normal, new, sigma in zip(weights, us, vs, normals, news, norms, strict=True):
            normal = normal if normal.shape == weight.shape else normal.view_as(weight)
            versions = _version(weight), _version(u), _version(v)
            steps.append(_Found(normal, *new, sigma, iterations, inference, (weight, u, v), versions))
        self.found.update(zip(slots[1:], steps[1:], strict=True))
        return steps[0]


def _step(matrices: list[Tensor], us: list[Tensor], vs: list[Tensor], geometries: list[Geometry], iterations: int):
    """Normalised weights, pairs of new vectors, and norms."""
    first, count = matrices[0], len(matrices)
    if autocast.active(first) or any(t.dtype != first.dtype for t in (*us, *vs)):
        normals, us, vs, sigma = ops.spectral_norm(matrices, us, vs, geometries, iterations=iterations)
    else:  # what its checks look at is as torch has it
        out = NORMALISE(matrices, us, vs, as_plan(geometries), iterations, 1.0, False)
        normals, us, vs, sigma = out[:count], out[count : 2 * count], out[2 * count : -1], out[-1]
    news = list(zip(us, vs, strict=True))
    if not iterations:  # they may be the buffers themselves, which change while a graph holds them
        news = [(u.clone(), v.clone()) for u, v in news]
    return normals, news, sigma.split(1)


class _Normalised(torch.autograd.Function):
    """A weight by its norm, both known: layers are normalised together, their gradients are each layer's own, for the
    passes that they belong to end at different times."""

    @staticmethod
    def forward(ctx, weight, normal, u, v, sigma, slot):
        ctx.save_for_backward(weight, u, v, sigma)  # all that a checkpoint is to find anew
        ctx.slot = slot
        return normal

    @staticmethod
    def backward(ctx, grad):
        weight, u, v, sigma = ctx.saved_tensors
        slot, recorded = ctx.slot, torch.is_grad_enabled()
        if sigma.is_cpu and not recorded and not ops.transforms_active():
            by_weight = slot.by_weight(grad, weight, u, v, sigma.item())
            if by_weight is not None:
                return by_weight, None, None, None, None, None
        matrix, plan = slot.as_matrix(weight), as_plan([slot.geometry])
        if recorded and weight.requires_grad:
            sigma = sigma_of([matrix], [u], [v], plan)
        run = spectral_norm_backward if ops.transforms_active() else BACKWARD.dense
        (found,) = run([slot.as_matrix(grad)], None, [matrix], [u], [v], sigma, plan, 1.0, False)
        return found.view_as(weight), None, None, None, None, None


def _by_weight(grad: Tensor, weight: Tensor, left: Tensor, right: Tensor, sigma: float) -> Tensor | None:
    """The gradient on a CPU by two calls of PyTorch, which for one layer cost less than one of the operator, where
    ``sigma = left^T W right``: ``(G - <G, W> / sigma * left right^T) / sigma``. None for a weight of zeros."""
    if not 0 < sigma < math.inf or weight.dtype not in EXACT:
        return None
    inner = torch.dot(grad.reshape(-1), weight.reshape(-1)).item()
    matrix = torch.addr(grad.flatten(1), left, right, beta=1 / sigma, alpha=-inner / sigma**2)
    return matrix.view(weight.shape)


def _is_large(weight: Tensor) -> bool:
    return weight.is_cpu and weight.numel() > LARGE


def _iterations(slot: _Slot) -> int:
    return slot.part.n_power_iterations if slot.training else 0


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _outside(weight: Tensor, iterations: int) -> bool:
    """Whether torch's own way is taken: where it is faster, and where transforms and the compiler see through it."""
    if weight.is_cpu and not iterations:
        return True
    seen_through = torch.compiler.is_compiling() or torch.jit.is_tracing() or ops.transforms_active()
    return seen_through or wrapped(weight) or weight.is_meta


class SpectralNorm(parametrizations._SpectralNorm):
    """`torch.nn.utils.parametrizations.spectral_norm`, batched."""

    def forward(self, weight: Tensor) -> Tensor:
        slot, iterations = self._gk_slot, self.n_power_iterations if self.training else 0
        if slot.part is not self or _outside(weight, iterations):  # a replica of nn.DataParallel is in no group
            return super().forward(weight)
        return self._gk_group.normalised(slot, weight, iterations)


class SpectralNormHook(Hook):
    """`torch.nn.utils.spectral_norm`, batched."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        slot, iterations = self._gk_slot, self.n_power_iterations if do_power_iteration else 0
        weight = getattr(module, f"{self.name}_orig")
        if slot.owner is not module or _outside(weight, iterations):
            return super().compute_weight(module, do_power_iteration)
        return self._gk_group.normalised(slot, weight, iterations)


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


def _slots(model: nn.Module, objects: list) -> list[tuple[Any, _Slot]]:
    """Each of the objects that stands in the model, with where its parts are."""
    wanted = {id(thing) for thing in objects}
    found = []
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            found += [(part, _Slot(module if i == 0 else None, part)) for i, part in enumerate(module)]
        found += [(hook, _HookSlot(module, hook)) for hook in _hooks(module).values()]
    return [(thing, slot) for thing, slot in found if id(thing) in wanted]


def _few(model: nn.Module, objects: list) -> str:
    vectors = [slot.vectors() for _, slot in _slots(model, objects)]
    if len(vectors) >= FEW or not all(u.is_cpu for u, _ in vectors):
        return ""
    small = sum(u.numel() * v.numel() for u, v in vectors) <= LARGE
    return f"of fewer than {FEW} small layers, for which on a CPU one call of all costs more than it saves" * small


def _join(model: nn.Module, objects: list) -> None:
    slots = _slots(model, objects)
    group = _Group([slot for _, slot in slots])
    for thing, slot in slots:
        thing._gk_slot, thing._gk_group = slot, group


LIBRARY = Library("torch", (), {parametrizations._SpectralNorm: _parametrization, Hook: _hook}, _hooks, _few, _join)
