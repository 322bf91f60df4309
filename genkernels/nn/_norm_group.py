"""Weights that `genkernels.nn.spectral_norm_` normalises together: what is made for a step, and how long it holds."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.networks import operator_norm
from genkernels.nn import _scaled_norm
from genkernels.nn._seen import fake, wrapped
from genkernels.ops._autocast import kept_out
from genkernels.ops.spectral_norm import NORMALISE, VECTORS

if TYPE_CHECKING:
    from genkernels.nn.spectral_norm import SpectralNorm

#: Products with a weight that a search for its norm may take where nothing is known of it.
PRODUCTS = 60
#: How far below the norm the estimate of u and v may lie in evaluation before it is replaced, where no tolerance is
#: asked for: one iteration a step lags behind by less.
LAG = 0.02

#: What a kept weight can serve as.
INFERENCE, PLAIN, GRAPH = 0, 1, 2


class Kept(NamedTuple):
    """A normalised weight with the u, v and sigma that it has, and what it was made of: tensors and their versions."""

    normal: Tensor
    found: tuple[Tensor, Tensor, Tensor, int]  #: u, v, the norms of all that were made with it, and its place there
    grade: int
    training: bool
    tensors: tuple[Tensor, Tensor, Tensor]
    versions: tuple[int, int, int]
    once: bool  #: its graph is autograd's own, which is gone after one backward pass: each pass has one

    def fits(self, member: SpectralNorm, weight: Tensor) -> bool:
        return self.grade >= _wanted(weight) and _as_it_was(self, member, weight)


class Vectors(NamedTuple):
    """u, v and sigma of a weight that is not written until somebody asks for it, and what they were made of."""

    found: _scaled_norm.Found
    grade: int
    training: bool
    tensors: tuple[Tensor, Tensor, Tensor]
    versions: tuple[int, int, int]

    def fits(self, member: SpectralNorm, weight: Tensor) -> bool:
        return self.grade >= min(PLAIN, _wanted(weight)) and _as_it_was(self, member, weight)


def _as_it_was(made: Kept | Vectors, member: SpectralNorm, weight: Tensor) -> bool:
    """Whether nothing has changed of what something was made of."""
    w, u, v = made.tensors
    if w is not weight or made.versions != (w._version, u._version, v._version):
        return False
    held = member._buffers
    return u is held["_u"] and v is held["_v"] and made.training == member.training


class Group:
    """Weights that are normalised together: by one call a step for all that changed."""

    genkernels_remembers = True  #: see `genkernels.networks._state`

    def __init__(self, members: list[SpectralNorm]):
        self.members = members
        self._kept: dict[SpectralNorm, Kept] = {}
        self._found: dict[SpectralNorm, Vectors] = {}
        #: Whose normalised weight was asked for since the last update: the next one writes it in the same call.
        self._asked: set[SpectralNorm] = set()

    def __deepcopy__(self, memo: dict) -> Group:
        group = memo[id(self)] = Group([])
        group.members += [copy.deepcopy(member, memo) for member in self.members]
        return group

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_kept": {}, "_found": {}, "_asked": set()}

    def forget(self, member: SpectralNorm) -> None:
        self._kept.pop(member, None)
        self._found.pop(member, None)

    def scales(self, member: SpectralNorm, weight: Tensor) -> bool:
        """Whether a weight may stay unwritten."""
        return _large(member, weight) and _can_keep(weight) and member in self.members and not _by_reference(weight)

    def known(self, member: SpectralNorm, weight: Tensor) -> Vectors | None:
        """u, v and sigma of a weight that `scales`, where nothing has changed since they were found."""
        found = self._found.get(member)
        return found if found is not None and found.fits(member, weight) and not _by_reference(weight) else None

    def found(self, member: SpectralNorm, weight: Tensor) -> Vectors:
        """Those of a weight that `scales` and of which nothing is known."""
        self._renew(member, weight, writes=False)
        return self._found[member]

    def normalised(self, member: SpectralNorm, weight: Tensor) -> Tensor:
        """What the layer of `member` multiplies by."""
        self._ask(member)
        kept = self._kept.get(member)
        known = kept is not None
        if not known or not kept.fits(member, weight) or looked_on():
            kept = None  # nothing holds what is about to be replaced
            if not member._v.numel():
                raise ValueError(
                    "spectral_norm_: a convolution must know the size of its input, which its first pass gives, got "
                    "none yet: call the layer once"
                )
            # under transforms no vector is written either; a replica of `DataParallel` is in no group, and soon gone
            if not _can_keep(weight) or not (known or member in self.members):
                return _call([(member, weight, member._u, member._v)], 0).weights[0]
            kept = self._fitting(member, weight)
        if kept.grade < GRAPH:
            return kept.normal
        if _wanted(weight) < GRAPH:
            return kept.normal.detach()
        if kept.once:
            return _call([(member, weight, *_vectors(member, weight))], 0).weights[0]
        return kept.normal

    def held(self, member: SpectralNorm, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same with its u, v and sigma ``[1]``, without a graph, for a compiled pass, which may write over them."""
        weight = member.as_original(weight)
        if _can_keep(weight):
            self._ask(member)
            kept = self._fitting(member, weight)
            u, v, sigma, place = kept.found
            return tuple(t.detach().clone() for t in (kept.normal, u, v, sigma[place : place + 1]))
        out = _call([(member, weight, member._u, member._v)], 0)
        return out.weights[0], member._u.clone(), member._v.clone(), out.sigma

    def _ask(self, member: SpectralNorm) -> None:
        if member.routed and member.training:  # the others are always written
            self._asked.add(member)

    def _fitting(self, member: SpectralNorm, weight: Tensor) -> Kept:
        kept = self._kept.get(member)
        if kept is None or not kept.fits(member, weight):
            kept = None
            found = self._found.get(member)
            if found is not None and found.fits(member, weight) and self.scales(member, weight):
                self._kept.pop(member, None)
                out = found.found.apply(weight)
                self._keep(member, weight, out, (found.found.u, found.found.v, found.found.sigma, 0))
            else:
                self._renew(member, weight)
            kept = self._kept[member]
        return kept

    def _keep(self, member: SpectralNorm, weight: Tensor, out: Tensor, found: tuple, once: bool = False) -> None:
        self._kept[member] = Kept(out, found, _wanted(weight), *_made_of(member, weight), once)

    def _renew(self, asking: SpectralNorm, its_weight: Tensor, writes: bool = True) -> None:
        """Normalises every weight that is not what was kept; of large ones that nobody asked for in the last step, the
        one `asking` among them unless it `writes`, it finds u, v and sigma alone."""
        buckets: dict[tuple, list] = {}
        large: set[SpectralNorm] = set()
        for member in self.members:
            weight = its_weight if member is asking else member.original() if member.leads() else None
            if weight is None or not member._buffers["_v"].numel() or not _can_keep(weight):
                continue
            scales = _large(member, weight) and not _by_reference(weight)
            made = (self._found if scales else self._kept).get(member)
            if member is asking or made is None or not made.fits(member, weight):
                updates = member.training and not member._updated_for.holds(weight)
                iterations = member.settings.iterations if updates else 0
                written = not scales or (member is asking and writes) or member in self._asked
                alike = weight.dtype, weight.device, member.settings, iterations, written
                buckets.setdefault(alike, []).append((member, weight, *_vectors(member, weight)))
                if scales:
                    large.add(member)
        made = None
        for (*_, iterations, written), jobs in buckets.items():
            for member, *_ in jobs:
                self.forget(member)  # what nobody else holds makes room for what replaces it
                if iterations:
                    self._asked.discard(member)
            self._make(jobs, iterations, written, large)

    def _make(self, jobs: list[tuple], iterations: int, written: bool, large: set[SpectralNorm]) -> None:
        once = _by_reference(jobs[0][1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and written and not once):
            out = (_call if written else _find)(jobs, iterations)
        held = [(m._buffers["_u"], m._buffers["_v"]) for m, *_ in jobs]
        if iterations:
            with torch.no_grad():
                torch._foreach_copy_([u for u, _ in held] + [v for _, v in held], [*out.u, *out.v])
        sigma, norms = out.sigma.detach(), []
        for i, (member, weight, *_) in enumerate(jobs):
            if iterations:
                member._updated_for.note(weight)
            if written:
                self._keep(member, weight, out.weights[i], (out.u[i], out.v[i], sigma, i), once)
            if member in large:
                norms = norms or sigma.tolist()
                known = out.u[i], out.v[i], sigma[i : i + 1], norms[i], member._plan, member.settings
                grade = min(PLAIN, _wanted(weight))
                self._found[member] = Vectors(_scaled_norm.Found.of(*known), grade, *_made_of(member, weight))


def _made_of(member: SpectralNorm, weight: Tensor) -> tuple:
    u, v = member._buffers["_u"], member._buffers["_v"]
    return member.training, (weight, u, v), (weight._version, u._version, v._version)


@torch.no_grad()
def _find(jobs: list[tuple], iterations: int) -> ops.SpectralNorm:
    """As `_call` does, without the normalised weights."""
    members, weights, u, v = zip(*jobs, strict=True)
    with kept_out(weights[0]):
        out = VECTORS(weights, u, v, [n for member in members for n in member._plan], iterations)
    count = len(jobs)
    return ops.SpectralNorm([], out[:count], out[count : 2 * count], out[-1])


def _call(jobs: list[tuple], iterations: int) -> ops.SpectralNorm:
    members, weights, u, v = zip(*jobs, strict=True)
    settings = members[0].settings
    geometries = [member.geometry for member in members]
    scaled = {"coefficient": settings.coefficient, "at_most": settings.at_most}
    return ops.spectral_norm(weights, u, v, geometries, iterations=iterations, **scaled)


def looked_on() -> bool:
    """Whether anything but autograd looks on, for which what is kept may be nothing."""
    watched = torch._C._len_torch_dispatch_stack() or torch._guards.TracingContext.try_get() is not None
    return bool(watched) or ops.transforms_active()


def _large(member: SpectralNorm, weight: Tensor) -> bool:
    if not (member.routed and member.training and weight.numel() >= _scaled_norm.LARGE):
        return False
    wide = weight.dtype in (torch.float32, torch.float64)
    return wide and type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"


def _can_keep(weight: Tensor) -> bool:
    transformed = ops.transforms_active() or wrapped(weight)
    return not (transformed or weight.is_inference() or weight.is_meta or fake(weight))


def _wanted(weight: Tensor) -> int:
    """The least that a kept weight must serve as now."""
    if torch.is_inference_mode_enabled():
        return INFERENCE
    return GRAPH if weight.requires_grad and torch.is_grad_enabled() else PLAIN


def _by_reference(weight: Tensor) -> bool:
    return NORMALISE.runs_reference([weight])


def _vectors(member: SpectralNorm, weight: Tensor) -> tuple[Tensor, Tensor]:
    """u and v to begin from: in training those that are held, in evaluation those of the norm."""
    if not member.training:
        return _settled(member, weight)
    if member._alien:
        member.write(*searched(member, weight))
        member._alien = False
    return member._buffers["_u"], member._buffers["_v"]


@torch.no_grad()
def searched(member: SpectralNorm, weight: Tensor) -> tuple[Tensor, Tensor]:
    """u and v by a search that ends where the norm is known."""
    tolerance = member.settings.tolerance or 1e-3
    found = operator_norm.lanczos(
        weight.detach(), member.geometry, member._u, member._v, tolerance=tolerance, products=PRODUCTS
    )
    return found[1].to(weight.dtype), found[2].to(weight.dtype)


@torch.no_grad()
def _settled(member: SpectralNorm, weight: Tensor) -> tuple[Tensor, Tensor]:
    """u and v for evaluation, which writes neither."""
    found = searched(member, weight)
    if member.settings.tolerance is not None or member._alien:
        return found
    held = member._u, member._v
    norms = [_call([(member, weight.detach(), *pair)], 0).sigma for pair in (found, held)]
    unit = all(bool((t.double().norm() - 1).abs() < 1e-2) for t in held)
    return held if unit and bool(norms[1] >= (1 - LAG) * norms[0]) else found
