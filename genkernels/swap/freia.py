"""FrEIA: the coupling blocks with two halves, the all-in-one block, and the residual block."""

from __future__ import annotations

import torch
from FrEIA import modules
from FrEIA.modules.coupling_layers import _BaseCouplingBlock
from torch import Tensor

from genkernels import ops
from genkernels._options import Layout, ScaleMap, Split
from genkernels.networks import native_block
from genkernels.swap._coupling import Coupling, pays
from genkernels.swap._rules import ACTNORM, Becomes, Library, left_alone, stays

#: What FrEIA takes for 2 / π.
TWO_OVER_PI = 0.636


#: Why blocks stay that were measured not to win, forward and backward, vectors and images: `AllInOneBlock` 0.87 to 0.95
#: times as fast, `RNVPCouplingBlock` 0.84 to 0.99 times.
ON_CPU = "on a CPU it is no faster: what is left is PyTorch's own"


def _on_cpu(block) -> bool:
    return all(p.device.type == "cpu" for p in block.parameters())


def _clamp(block) -> Coupling | None:
    """The scale map of ``clamp · f_clamp(s)``, None where it is none."""
    clamp, function = block.clamp, block.f_clamp
    if isinstance(clamp, bool) or not isinstance(clamp, int | float) or not 0 < clamp < float("inf"):
        return None
    if function is torch.tanh:
        return Coupling(ScaleMap.TANH, float(clamp), Layout.HALVES)
    probe = torch.tensor([-3.0, -0.4, 0.0, 1.7, 25.0])
    built_in = getattr(function, "__qualname__", "").startswith(f"{_BaseCouplingBlock.__name__}.__init__")
    if built_in and torch.equal(function(probe), TWO_OVER_PI * torch.atan(probe)):
        return Coupling(ScaleMap.ATAN, TWO_OVER_PI * float(clamp), Layout.HALVES)
    return None


def _keep_clamp(block) -> bool:
    """Whether a block's clamping is a scale map, which it keeps until the clamping changes."""
    found = _clamp(block)
    if found is not None:
        block._gk_map = block.clamp, block.f_clamp, found
    return found is not None


class _TwoSided:
    """Both halves transformed, one after the other, each by what a network makes of the other half."""

    def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006 - as FrEIA has it
        if left_alone(self) or (self._gk_map[:2] != (self.clamp, self.f_clamp) and not _keep_clamp(self)):
            return super().forward(x, c, rev, jac)
        run = self._gk_fused if pays(x[0]) else self._gk_plain
        return run(x[0], c, rev, self._gk_map[2])

    def _gk_fused(self, whole: Tensor, c, rev: bool, coupling: Coupling) -> tuple[tuple[Tensor], Tensor]:
        total = None
        for first in (False, True) if rev else (True, False):  # whether the first half is the one that is transformed
            one, two = torch.split(whole, [self.split_len1, self.split_len2], dim=1)
            moving, seen = (one, two) if first else (two, one)
            params = self._gk_params(torch.cat([seen, *c], 1) if self.conditional else seen, first)
            if self.split_len1 == self.split_len2:
                whole, log_det = coupling(whole, params, Split.CHANNEL, first, rev)
            else:
                moved, log_det = coupling(moving, params, Split.NONE, False, rev)
                whole = torch.cat((moved, two) if first else (one, moved), 1)
            total = log_det if total is None else total + log_det
        return (whole,), total

    def _gk_plain(self, whole: Tensor, c, rev: bool, coupling: Coupling) -> tuple[tuple[Tensor], Tensor]:
        halves = list(torch.split(whole, [self.split_len1, self.split_len2], dim=1))
        log_dets = []
        for at in (1, 0) if rev else (0, 1):
            seen = halves[1 - at]
            params = self._gk_params(torch.cat([seen, *c], 1) if self.conditional else seen, at == 0)
            halves[at], log_det = coupling.plainly(halves[at], params, rev)
            log_dets.append(log_det)
        return (torch.cat(halves, 1),), log_dets[0] + log_dets[1]


class GLOWCouplingBlock(_TwoSided, modules.GLOWCouplingBlock):
    """`FrEIA.modules.GLOWCouplingBlock`."""

    def _gk_params(self, seen: Tensor, first: bool) -> Tensor:
        return self.subnet2(seen) if first else self.subnet1(seen)


class RNVPCouplingBlock(_TwoSided, modules.RNVPCouplingBlock):
    """`FrEIA.modules.RNVPCouplingBlock`: log-scale and shift by networks of their own."""

    def _gk_params(self, seen: Tensor, first: bool) -> Tensor:
        if first:
            return torch.cat([self.subnet_s2(seen), self.subnet_t2(seen)], 1)
        return torch.cat([self.subnet_s1(seen), self.subnet_t1(seen)], 1)


def _two_sided(to: type):
    def rule(thing) -> Becomes | str:
        if not _keep_clamp(thing):
            return "its clamping is neither FrEIA's arctangent nor the tanh"
        if not 0 < thing.split_len1 < thing.channels:
            return "a half of it is empty"
        if to is RNVPCouplingBlock and _on_cpu(thing):
            return ON_CPU
        return Becomes(to)

    return rule


class AllInOneBlock(modules.AllInOneBlock):
    """`FrEIA.modules.AllInOneBlock`: its affine coupling; permutation and global scale stay."""

    def _affine(self, x, a, rev=False):
        if left_alone(self):
            return super()._affine(x, a, rev)
        return Coupling(ScaleMap.TANH, float(self.clamp), Layout.HALVES)(x, a * 0.1, Split.NONE, False, rev)


def _all_in_one(thing) -> Becomes | str:
    if thing.GIN:
        return "as a GIN block it takes the mean off its log-scales"
    if isinstance(thing.clamp, bool) or not isinstance(thing.clamp, int | float) or not thing.clamp > 0:
        return "its clamping is no positive number"
    if not thing.splits[1]:
        return "a half of it is empty"
    if _on_cpu(thing):
        return ON_CPU
    return Becomes(AllInOneBlock)


#: Where the inverse of a residual block ends, of its input's largest number: beyond what FrEIA's 50 steps reach.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-13}


class IResNetLayer(modules.IResNetLayer):
    """`FrEIA.modules.IResNetLayer`: the same series with the same probes, all of them in one call; the inverse ends
    where it has been found. In reverse FrEIA takes the log-determinant at what is given, and so does this."""

    def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006 - as FrEIA has it
        block = None if left_alone(self) or not (rev or jac) or x[0].dtype not in CLOSE else self._gk_block(x[0])
        if block is None:
            return super().forward(x, c, rev, jac)
        given, log_det = x[0], None
        if jac:
            probes = torch.stack([torch.randn_like(given).sign() for _ in range(self.hutchinson_samples)])
            terms = [1.0] * self.jacobian_iterations
            value, log_det, _ = ops.log_det_series(given, *block, probes=probes, terms=terms)
            if not rev:
                return [given + value], log_det
            log_det = -log_det
        with torch.no_grad():
            found = ops.invertible_residual(given, *block, atol=0.0, rtol=CLOSE[given.dtype])
            if not found.converged.all():
                return super().forward(x, c, True, False)[0], log_det
        return [given - self.residual(found.x)], log_det

    def _gk_block(self, x: Tensor):
        return native_block(self.residual, x)[0] if x.shape[1:] == self.dims_in else None


def _residual(thing) -> Becomes | str:
    example = next(thing.parameters()).new_empty(1, *thing.dims_in)
    block, why = native_block(thing.residual, example)
    return why if block is None else Becomes(IResNetLayer, "its log-determinant has a gradient, which it has not there")


LIBRARY = Library(
    "FrEIA",
    ("0.2",),
    {
        modules.GLOWCouplingBlock: _two_sided(GLOWCouplingBlock),
        modules.RNVPCouplingBlock: _two_sided(RNVPCouplingBlock),
        modules.AllInOneBlock: _all_in_one,
        modules.NICECouplingBlock: stays("two additions: there is nothing to gain"),
        modules.GINCouplingBlock: stays("it takes the mean off its log-scales"),
        modules.ActNorm: stays(ACTNORM),
        modules.IResNetLayer: _residual,
    },
)
