r"""ActNorm: a scale and a bias for each channel, set from the first batch (Kingma & Dhariwal, "Glow", 2018).

.. math:: z = (x + b)\,e^{a},\qquad \mathrm{ldj} = H W \sum_c a_c
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genkernels.networks._outside import outside
from genkernels.networks._plain import renew_weights
from genkernels.nn._log_det import per_sample, work_dtype
from genkernels.nn._seen import Seen, enclosing_ddp, unwrapped, wrapped
from genkernels.nn._values import check_channels


class ActNorm(nn.Module):
    r"""Per-channel affine map whose first training batch comes out with mean 0 and variance 1.

    Equivalent to::

        z = (x + bias.view(1, -1, 1, 1)) * log_scale.exp().view(1, -1, 1, 1)
        ldj = x[0, 0].numel() * log_scale.sum()

    The first forward in training mode sets ``bias`` and ``log_scale`` from its batch. Until then they are zero, so that
    a forward in evaluation mode, and the inverse, are the identity. A channel without variance keeps scale 1, and
    non-finite data leave a channel as it was; a batch none of whose channels varies (zeros to try the shapes, a single
    point) is no start: it is told in a warning and the next batch is looked at. A pass without data (fake tensors, the
    device "meta") starts nothing.

    Several processes: inside `DistributedDataParallel` the batches of all its ranks count as one. Anywhere else a layer
    starts from its own process's batch, waits for nobody, and says so in a warning; ``initialize(x, group=...)`` names
    the ranks that are to share a start.

    The flag ``initialized`` travels with the state dict, and counts however it was written: loaded, copied in place,
    broadcast, averaged. It is read where its tensor has changed, so no later pass waits for the device. A state dict
    without it (of another library) whose bias or log-scale is not zero counts as started.

    Args:
        channels: size of dimension 1 of the input.

    Shapes:
        x, z: ``[N, channels]`` or ``[N, channels, *spatial]``. ldj: ``[N]``, nats, fp32 or wider.

    Raises:
        RuntimeError: the start would fall into a transform of ``torch.func``, into a replica of ``nn.DataParallel``,
            on weights that FSDP has in hand or on parametrised ones, where what it sets would be lost.

    Source: Kingma & Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._ready, self._seen = False, Seen()
        self.ranks: tuple[dist.ProcessGroup | None] | None = None  # those that share a start, while a model runs one

    @property
    def ready(self) -> bool:
        """Whether the data-dependent start has happened: what ``initialized`` holds, read only where it has changed."""
        flag = self.initialized
        if torch.compiler.is_compiling():  # a guard of the compiled code, which is left once, to look
            return self._ready or (not torch.compiler.is_exporting() and outside(_look, self))
        if not (self._ready and self._seen.holds(flag)):
            self._look(flag)
        return self._ready

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check(x)
        if self.training and not self.ready and not torch.compiler.is_exporting():
            self.initialize(x, _own_group() if self.ranks is None else self.ranks[0])
        bias, log_scale = self._broadcast(x)
        return (x + bias) * log_scale.exp(), per_sample(self.log_scale.sum(), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check(z)
        renew_weights(self)
        bias, log_scale = self._broadcast(z)
        return z * (-log_scale).exp() - bias, per_sample(-self.log_scale.sum(), z)

    @torch.no_grad()
    def initialize(self, x: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Sets bias and scale so that this batch comes out with mean 0 and variance 1, whatever they were before.

        Args:
            x: a batch; an empty one changes nothing, one without variance neither, but for a warning.
            group: ranks that call this together, and whose batches count as one; None: this process alone.
        """
        self.check(x)
        if not torch.compiler.is_compiling() and self._shadow(x):
            return
        axes = [0, *range(2, x.dim())]
        work = x.detach().to(work_dtype(x))
        shared = group is not None and dist.get_world_size(group) > 1
        if x.numel() == 0 and not shared:
            return
        count = x.numel() // self.channels
        if shared:
            total = torch.cat([work.sum(axes), work.new_full((1,), count)])
            dist.all_reduce(total, group=group)
            mean, count = total[:-1] / total[-1], total[-1]
        else:
            mean = work.mean(axes)
        squares = (work - mean.view(-1, *[1] * (x.dim() - 2))).square().sum(axes)
        if shared:
            dist.all_reduce(squares, group=group)
        std = (squares / count).sqrt()
        # below this a channel's spread is rounding noise of its mean, and 1/std would blow the noise up
        varies = torch.isfinite(mean) & torch.isfinite(std) & (std > 1e-6 * (1 + mean.abs()))
        if not varies.any():
            warnings.warn(
                f"ActNorm: no channel of this batch {list(x.shape)} varies, so it does not count as the data-dependent "
                "start: the next batch is looked at",
                stacklevel=2,
            )
            return
        finite = torch.isfinite(mean) & torch.isfinite(std)
        self.bias.copy_(torch.where(finite, -mean, self.bias))
        self.log_scale.copy_(torch.where(varies, -std.log(), torch.where(finite, 0, self.log_scale)))
        self.initialized.fill_(True)
        self._ready = True
        if not torch.compiler.is_compiling():
            self._seen.note(self.initialized)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to before the start: the identity, until the next batch in training mode."""
        for tensor in (self.bias, self.log_scale, self.initialized):
            tensor.zero_()

    def check(self, x: Tensor) -> None:
        check_channels("ActNorm", x, self.channels)

    def extra_repr(self) -> str:
        return str(self.channels)

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x.dim() - 2))
        return self.bias.view(shape).to(x.dtype), self.log_scale.view(shape).to(x.dtype)

    def _look(self, flag: Tensor) -> None:
        value = unwrapped(flag)
        if value is None:  # a pass without data
            return
        if bool(value.any()) != bool(value.all()):
            raise RuntimeError("ActNorm: of several models run as one either all or none must have started")
        self._ready = bool(value.all())
        self._seen.note(flag)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}initialized" not in state_dict and {f"{prefix}bias", f"{prefix}log_scale"} <= state_dict.keys():
            self.initialized.copy_(self.bias.any() | self.log_scale.any())
        self._look(self.initialized)  # a compiled pass need not

    def _shadow(self, x: Tensor) -> bool:
        """Whether this pass has no data, so that it can start nothing.

        Raises:
            RuntimeError: it has, but what the start sets would be lost.
        """
        if x.is_meta or self.bias.is_meta or torch._guards.detect_fake_mode((x, self.bias)) is not None:
            return True
        why = None
        if any(wrapped(t) for t in (x, self.bias, self.log_scale, self.initialized)):
            why = "inside a transform of torch.func"
        elif getattr(self, "_is_replica", False):
            why = "in a replica of nn.DataParallel"
        elif getattr(self, "_is_fsdp_managed_module", False):
            why = "under FSDP"
        elif not {"bias", "log_scale"} <= self._parameters.keys():
            why = "while its bias or log_scale is parametrised"
        if why is not None:
            raise RuntimeError(
                f"ActNorm: the data-dependent start cannot happen {why}: run one batch in training mode, or "
                "initialize(x), before that"
            )
        return False


def _look(layer: ActNorm) -> bool:
    return layer.ready


def _own_group() -> dist.ProcessGroup | None:
    """The ranks whose batches count as one: those of the `DistributedDataParallel` whose pass this is."""
    within = enclosing_ddp()
    if within is not None:
        return within.process_group
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            "ActNorm: started from this process's batch alone, outside DistributedDataParallel: where other ranks hold "
            "the same flow, initialize(x, group=...) on all of them starts it from all their batches",
            stacklevel=3,
        )
    return None
