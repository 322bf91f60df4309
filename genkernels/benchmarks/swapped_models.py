"""The models of ``genkernels bench swap``: one or more of each library, as its users build them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: What a factory gives: a model, ``loss(model)`` of one training step, and where it has one ``sample(model)``.
Made = tuple[nn.Module, Callable[[nn.Module], Tensor], Callable[[nn.Module], Any] | None]


def _nll(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: -model.log_prob(x).mean()


def nflows_realnvp() -> Made:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    def net(into, out):
        return ResidualNet(into, out, hidden_features=64, num_blocks=2)

    couplings = [transforms.AffineCouplingTransform([(i + layer) % 2 for i in range(32)], net) for layer in range(8)]
    model = flows.Flow(transforms.CompositeTransform(couplings), distributions.StandardNormal([32]))
    return model, _nll(torch.randn(512, 32)), lambda m: m.sample(512)


def nflows_maf() -> Made:
    from nflows import distributions, flows, transforms

    layers = []
    for _ in range(2):
        layers += [transforms.MaskedAffineAutoregressiveTransform(64, 512), transforms.ReversePermutation(64)]
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([64]))
    return model, _nll(torch.randn(100, 64)), lambda m: m.sample(100)


def nflows_nsf() -> Made:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    def net(into, out):
        return ResidualNet(into, out, hidden_features=64, num_blocks=2)

    def coupling(layer):
        mask = [(i + layer) % 2 for i in range(32)]
        return transforms.PiecewiseRationalQuadraticCouplingTransform(mask, net, 8, tails="linear", tail_bound=3.0)

    couplings = transforms.CompositeTransform([coupling(layer) for layer in range(4)])
    model = flows.Flow(couplings, distributions.StandardNormal([32]))
    return model, _nll(torch.randn(512, 32)), lambda m: m.sample(512)


def nflows_autoregressive_nsf() -> Made:
    from nflows import distributions, flows, transforms

    made = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    layers = []
    for _ in range(2):
        layers += [made(8, 64, num_bins=8, tails="linear", tail_bound=3.0), transforms.ReversePermutation(8)]
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([8]))
    return model, _nll(torch.randn(512, 8)), lambda m: m.sample(512)


def zuko_maf() -> Made:
    import zuko

    model = zuko.flows.MAF(64, transforms=2, hidden_features=(512, 512))
    x = torch.randn(100, 64)
    return model, lambda m: -m().log_prob(x).mean(), lambda m: m().sample((100,))


def zuko_nice() -> Made:
    import zuko

    model = zuko.flows.NICE(32, transforms=8, hidden_features=(64, 64))
    x = torch.randn(512, 32)
    return model, lambda m: -m().log_prob(x).mean(), lambda m: m().sample((512,))


def zuko_nsf() -> Made:
    import zuko

    model = zuko.flows.NSF(8, transforms=3, hidden_features=(64, 64))
    x = torch.randn(512, 8)
    return model, lambda m: -m().log_prob(x).mean(), lambda m: m().sample((512,))


def normflows_glow() -> Made:
    import normflows as nf

    blocks = [nf.flows.GlowBlock(12, 32, init_zeros=False) for _ in range(4)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian((12, 16, 16)), blocks)
    x = torch.randn(16, 12, 16, 16)
    return model, lambda m: m.forward_kld(x), lambda m: m.sample(16)


def normflows_realnvp() -> Made:
    import normflows as nf

    layers = []
    for _ in range(8):
        layers += [nf.flows.AffineCouplingBlock(nf.nets.MLP([16, 64, 64, 32])), nf.flows.Permute(32, mode="swap")]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(32), layers)
    x = torch.randn(512, 32)
    return model, lambda m: m.forward_kld(x), lambda m: m.sample(512)


def normflows_nsf() -> Made:
    import normflows as nf

    layers = [nf.flows.CoupledRationalQuadraticSpline(32, 2, 64, reverse_mask=bool(layer % 2)) for layer in range(4)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(32), layers)
    x = torch.randn(512, 32)
    return model, lambda m: m.forward_kld(x), lambda m: m.sample(512)


def freia_glow() -> Made:
    from FrEIA import framework, modules

    def net(into, out):
        return nn.Sequential(nn.Linear(into, 64), nn.ReLU(), nn.Linear(64, out))

    model = framework.SequenceINN(32)
    for _ in range(8):
        model.append(modules.GLOWCouplingBlock, subnet_constructor=net)
    return _freia(model)


def _freia(model: nn.Module) -> Made:
    x = torch.randn(512, 32)

    def loss(m):
        z, log_det = m(x)
        return (0.5 * z.square().sum(1) - log_det).mean()

    return model, loss, lambda m: m(x, rev=True)


def freia_iresnet() -> Made:
    from FrEIA import framework, modules

    model = framework.SequenceINN(8)
    for _ in range(2):
        model.append(modules.IResNetLayer, internal_size=64, n_internal_layers=2)
    _contract(model)
    x = torch.randn(256, 8)

    @torch.enable_grad()  # FrEIA differentiates in each of its log-determinants
    def through(m, rev):
        return m(x.clone(), rev=rev)

    def loss(m):
        z, log_det = through(m, False)
        return (0.5 * z.square().sum(1) - log_det).mean()

    return model, loss, lambda m: through(m, True)


def _contract(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= 0.8 / torch.linalg.matrix_norm(layer.weight, 2)


def normflows_residual() -> Made:
    import normflows as nf

    nets = [nf.nets.LipschitzMLP([8, 64, 64, 64, 8], 0.9, init_zeros=False) for _ in range(2)]
    blocks = [nf.flows.Residual(net, reduce_memory=True) for net in nets]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(8), blocks)
    nf.utils.update_lipschitz(model, 50)
    x = torch.randn(256, 8)
    return model, lambda m: m.forward_kld(x), lambda m: m.sample(256)


def normflows_masked() -> Made:
    import normflows as nf

    layers = []
    for layer in range(8):
        mask = torch.tensor([float((i + layer) % 2) for i in range(32)])
        layers.append(nf.flows.MaskedAffineFlow(mask, *(nf.nets.MLP([32, 64, 32]) for _ in range(2))))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(32), layers)
    x = torch.randn(512, 32)
    return model, lambda m: m.forward_kld(x), lambda m: m.sample(512)


def pixel_cnn() -> Made:
    from pytorch_generative import models

    return _binary_images(models.PixelCNN(n_residual=15, residual_channels=16))


def gated_pixel_cnn() -> Made:
    from pytorch_generative import models

    return _binary_images(models.GatedPixelCNN(n_gated=6, gated_channels=32))


def _binary_images(model: nn.Module) -> Made:
    x = (torch.rand(4, 1, 16, 16) < 0.5).float()
    model(x)  # which tells it the size

    def loss(m):
        return nn.functional.binary_cross_entropy_with_logits(m(x), x)

    return model, loss, lambda m: m.sample(4)


def pythae_pixel_cnn() -> Made:
    from pythae.models.normalizing_flows import PixelCNN, PixelCNNConfig

    model = PixelCNN(PixelCNNConfig(input_dim=(1, 16, 16), n_embeddings=64, n_layers=6))
    x = torch.randint(64, (16, 1, 16, 16)).float()
    return model, lambda m: m({"data": x}).loss, None


def torch_critic() -> Made:
    from torch.nn.utils.parametrizations import spectral_norm

    layers, widths = [], (3, 32, 64, 64, 128, 128, 256)
    for i, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [spectral_norm(nn.Conv2d(into, out, 3, 1 + i % 2, 1)), nn.LeakyReLU(0.1)]
    model = nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(256 * 16, 1)))
    real, fake = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    return model, lambda m: (m(fake) - m(real)).mean(), None


CASES: dict[str, Callable[[], Made]] = {
    "nflows RealNVP": nflows_realnvp,
    "nflows MAF": nflows_maf,
    "nflows NSF": nflows_nsf,
    "nflows NSF, autoregressive": nflows_autoregressive_nsf,
    "zuko MAF": zuko_maf,
    "zuko NICE": zuko_nice,
    "zuko NSF": zuko_nsf,
    "normflows RealNVP": normflows_realnvp,
    "normflows NSF": normflows_nsf,
    "normflows Glow": normflows_glow,
    "normflows masked RealNVP": normflows_masked,
    "normflows residual flow": normflows_residual,
    "FrEIA GLOWCouplingBlock": freia_glow,
    "FrEIA i-ResNet": freia_iresnet,
    "pytorch-generative PixelCNN": pixel_cnn,
    "pytorch-generative GatedPixelCNN": gated_pixel_cnn,
    "pythae PixelCNN": pythae_pixel_cnn,
    "torch SN-GAN critic": torch_critic,
}
