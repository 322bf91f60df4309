"""Other libraries' models, at the sizes and from the weights of ours, for whole training steps.

- **normflows** Glow: its `GlowBlock` for each of our steps, chained as in its own examples with `Squeeze`, and a
  `DiagGaussian` for each scale. Its coupling is ``(z₂ − t)·σ(s)`` where ours is ``z₂·σ(s) + t``, and its splits have no
  prior that looks at what is kept: where both start, with zero-initialised last layers, these are one function.
- **nflows** MAF: `ActNorm` and `MaskedAffineAutoregressiveTransform`, every second one on reversed features; its scale,
  softplus, is overridden by ours, exp(tanh s), as in `genkernels.benchmarks.peers.made`.

What comes before the flow, dequantisation and logit, is ours on either side: it is plain PyTorch. Parameters mean
slightly other things, so later losses part; a peer is held against the reference in its **first** loss, by the rule of
`genkernels.benchmarks.training_step`. Under autocast they round log-determinants to bf16: peers run in fp32 alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.backends import use_backend
from genkernels.benchmarks.measure import Inputs, Work
from genkernels.benchmarks.training_step import Move, StepCase, Trainer, fault_of, trained
from genkernels.nn import ActNorm, AffineCoupling, AutoregressiveTransform, InvertibleConv1x1, Logit

_OFFERED = {
    ("glow", "digits"): ("normflows",),
    ("glow", "photos32"): ("normflows",),
    ("maf", "digits"): ("nflows",),
    ("maf", "points"): ("nflows",),
    ("maf", "photos32"): ("nflows",),
}
PEERS = ("nflows", "normflows")


def offered(case: StepCase) -> tuple[str, ...]:
    """The peers that have this model."""
    return _OFFERED.get((case.model, case.preset), ())


def unsupported(peer: str, case: StepCase) -> str:
    return "" if case.dtype == torch.float32 else "rounds log-determinants to bf16 under autocast"


def open_step(peer: str, problem: dict) -> tuple[str, Work | None]:
    """What is wrong with the peer's first loss, empty where nothing is, and its steps ready to be timed."""
    settings, batches = problem["settings"], problem["batches"]
    dtype = getattr(torch, settings["dtype"])
    device = batches[0].device
    with use_backend("reference"):
        ours = StepCase(settings["model"], settings["preset"], dtype).make()
        ours.load_state_dict(problem["state"])
        theirs = {"normflows": _NormflowsGlow, "nflows": _NflowsMAF}[peer](ours).to(device).train()
        trainer = Trainer([Move(theirs, trained(theirs))], dtype, device)
        losses = trainer.run(batches[:1])
    fault = fault_of(losses, problem["truth"][:1], problem["own_error"])
    return fault, None if fault else Work(trainer.step, [Inputs((batches[-1],))], "step")


class _Before(nn.Module):
    """Our dequantisation and logit: ``(x, log-determinant)``, and the loss from a log-density."""

    def __init__(self, ours):
        super().__init__()
        self.steps = [step for step in (ours.dequantize,) if step is not None]
        self.steps += [layer for layer in ours.flows[0] if isinstance(layer, Logit)]
        self.nats = ours.dim * torch.tensor(2.0).log().item() if len(ours.shape) == 3 else 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        total = 0.0
        for step in self.steps:
            x, log_det = step(x)
            total = total + log_det
        return x, total

    def loss(self, log_density: Tensor) -> Tensor:
        return -log_density.mean() / self.nats


class _NormflowsGlow(nn.Module):
    def __init__(self, ours):
        super().__init__()
        import normflows

        self.before = _Before(ours)
        levels = []
        for flow in ours.flows:
            norms, mixes, couplings = ([m for m in flow if isinstance(m, k)] for k in _GLOW)
            blocks = []
            for norm, mix, coupling in zip(norms, mixes, couplings, strict=True):
                block = normflows.flows.GlowBlock(norm.channels, coupling.net.second.out_channels)
                _copy_glow(norm, mix, coupling, *block.flows)
                blocks.append(block)
            # noise → data is their forward, so that the last layer of data → noise comes first
            levels.append(nn.ModuleList([*reversed(blocks), normflows.flows.Squeeze()]))
        bases = [normflows.distributions.DiagGaussian(shape) for shape in ours.latent_shapes]
        merges = [normflows.flows.Merge() for _ in ours.splits]
        # theirs lists the scale of the top latents first
        self.flow = normflows.MultiscaleFlow(bases[::-1], levels[::-1], merges, class_cond=False)

    def forward(self, x: Tensor) -> Tensor:
        x, log_det = self.before(x)
        return self.before.loss(self.flow.log_prob(x, None) + log_det)


_GLOW = (ActNorm, InvertibleConv1x1, AffineCoupling)


@torch.no_grad()
def _copy_glow(norm, mix, coupling, their_coupling, their_mix, their_norm) -> None:
    """Our weights of one step into a `GlowBlock`."""
    shape = their_norm.s.shape
    their_norm.s.copy_(-norm.log_scale.view(shape))
    their_norm.t.copy_(-norm.bias.view(shape))
    their_norm.data_dep_init_done = torch.tensor(1.0)
    factors = mix.factors
    their_mix.P.copy_(mix.permutation)
    their_mix.sign_S.copy_(mix.sign)
    their_mix.L.copy_(factors)
    their_mix.U.copy_(factors)
    their_mix.log_S.copy_(factors.diagonal())
    convolutions = [m for m in their_coupling.modules() if isinstance(m, nn.Conv2d)]
    for convolution, own in zip(convolutions, (coupling.net.first, coupling.net.second), strict=False):
        convolution.load_state_dict(own.state_dict())


class _NflowsMAF(nn.Module):
    def __init__(self, ours):
        super().__init__()
        from nflows.transforms import CompositeTransform, ReversePermutation
        from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
        from nflows.transforms.normalization import ActNorm as TheirNorm

        class Tanh(MaskedAffineAutoregressiveTransform):
            def _elementwise_forward(self, inputs, autoregressive_params):
                s, shift = self._unconstrained_scale_and_shift(autoregressive_params)
                log_scale = torch.tanh(s)
                return torch.exp(log_scale) * inputs + shift, log_scale.sum(1)

        self.before = _Before(ours)
        steps: list[nn.Module] = []
        for layer in ours.flows[0]:
            if isinstance(layer, ActNorm):
                norm = TheirNorm(ours.dim)
                with torch.no_grad():
                    norm.log_scale.copy_(layer.log_scale)
                    norm.shift.copy_(layer.bias * layer.log_scale.exp())
                norm.initialized.fill_(True)
                steps.append(norm)
            elif isinstance(layer, AutoregressiveTransform):
                made = layer.made
                hidden = made.hidden_features
                transform = Tanh(ours.dim, hidden[0], num_blocks=len(hidden) - 1, use_residual_blocks=False)
                backwards = bool(made.order[0] != 0)
                _copy_made(made, transform.autoregressive_net, backwards)
                turn = [ReversePermutation(ours.dim)] if backwards else []
                steps += [*turn, transform, *turn]
        self.flow = CompositeTransform(steps)

    def forward(self, x: Tensor) -> Tensor:
        x, log_det = self.before(x)
        z, their_log_det = self.flow(x.flatten(1))
        normal = -0.5 * (z.square() + torch.tensor(2 * torch.pi).log()).sum(1)
        return self.before.loss(normal + their_log_det + log_det)


@torch.no_grad()
def _copy_made(made, net, backwards: bool) -> None:
    """Our weights into theirs: hidden units are not sorted by degree, a feature's two parameters lie side by side."""
    linears = [net.initial_layer, *(block.linear for block in net.blocks), net.final_layer]
    places = [torch.argsort(torch.argsort(linear.degrees, stable=True)) for linear in linears[:-1]]
    features = torch.arange(made.features)
    features = features.flip(0) if backwards else features
    rows = [*places, torch.stack([features, made.features + features], dim=1).flatten()]
    columns = [features, *places]
    for linear, own, row, column in zip(linears, made.layers, rows, columns, strict=True):
        linear.weight.copy_(own.weight[row][:, column])
        linear.bias.copy_(own.bias[row])
