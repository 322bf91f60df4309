"""One line makes a model faster that was built with another library: its layers then compute by these operators.

You have this, write that. nflows::

    import torch
    from nflows import distributions, flows, transforms

    maf = transforms.MaskedAffineAutoregressiveTransform(features=8, hidden_features=32)
    flow = flows.Flow(maf, distributions.StandardNormal([8]))

    import genkernels as gk

    report = gk.swap_(flow)           # in place; print(report) says what became of each module
    x = flow.sample(16)               # one solve, where it was one pass a feature
    loss = -flow.log_prob(x).mean()
    report.undo()                     # the same weights, by nflows again

zuko, without a change of the code around it::

    import zuko

    flow = zuko.flows.MAF(features=8, transforms=2)
    gk.swap_(flow)
    x = flow().sample((16,))

normflows::

    import normflows as nf

    blocks = [nf.flows.AffineCouplingBlock(nf.nets.MLP([4, 32, 8])) for _ in range(4)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(8), blocks)
    gk.swap_(flow)
    loss = flow.forward_kld(x)

FrEIA::

    from FrEIA import framework, modules

    flow = framework.SequenceINN(8)
    flow.append(modules.GLOWCouplingBlock, subnet_constructor=lambda i, o: torch.nn.Linear(i, o))
    gk.swap_(flow)
    z, log_det = flow(x)

torch's spectral norm, by either of its functions::

    from torch.nn.utils.parametrizations import spectral_norm

    critic = torch.nn.Sequential(spectral_norm(torch.nn.Linear(8, 32)), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    gk.swap_(critic)
    score = critic(x)

Residual flows of normflows and FrEIA, whose series become one call, with the draws that they had::

    net = nf.nets.LipschitzMLP([8, 32, 32, 8], 0.9)
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(8), [nf.flows.Residual(net)])
    gk.swap_(flow)
    loss = flow.forward_kld(x)

    block = modules.IResNetLayer([(8,)], internal_size=32)
    gk.swap_(block)
    (z,), log_det = block([x])

pytorch-generative, where a sample of black and white pixels is one call and no pass a pixel, with the draws that it
had::

    from pytorch_generative import models

    model = models.GatedPixelCNN(n_gated=2, gated_channels=8)
    gk.swap_(model)
    score = model(torch.zeros(1, 1, 8, 8))
    images = model.sample(16)

pythae::

    from pythae.models.normalizing_flows import PixelCNN, PixelCNNConfig

    model = PixelCNN(PixelCNNConfig(input_dim=(1, 8, 8), n_embeddings=16, n_layers=2))
    gk.swap_(model)
    loss = model({"data": torch.zeros(4, 1, 8, 8)}).loss

What is swapped:

==================  ==================================================================================================
nflows              ``AffineCouplingTransform``, ``AdditiveCouplingTransform``, ``MaskedAffineAutoregressiveTransform``,
                    ``OneByOneConvolution``, ``Flow`` (its ``sample`` keeps no graph); with linear tails
                    ``PiecewiseRationalQuadraticCouplingTransform``, ``PiecewiseRationalQuadraticCDF`` and
                    ``MaskedPiecewiseRationalQuadraticAutoregressiveTransform``
normflows           ``AffineCouplingBlock``, ``MaskedAffineFlow``, ``MaskedAffineAutoregressive``, ``Planar``,
                    ``Radial``, ``Residual`` of its Lipschitz networks; what is within
                    ``CoupledRationalQuadraticSpline``, ``AutoregressiveRationalQuadraticSpline`` and both
                    ``Circular`` ones
zuko                ``MaskedAutoregressiveTransform`` and ``GeneralCouplingTransform`` of affine maps and of
                    ``MonotonicRQSTransform``: ``MAF``, ``NICE``, ``NSF``
FrEIA               ``GLOWCouplingBlock``, ``IResNetLayer``; on a GPU ``RNVPCouplingBlock`` and ``AllInOneBlock`` too
pytorch-generative  ``sample`` of ``PixelCNN`` and ``GatedPixelCNN``, of black and white pixels, in one call;
                    ``CausalConv2d`` where it does not learn
pythae              ``MaskedConv2d`` of its ``PixelCNN``
torch               both kinds of ``spectral_norm``
your own            a subclass of ``torch.nn.Conv2d`` with a buffer ``mask``, whose ``forward`` says, in its source,
                    that the weight times the mask is convolved
==================  ==================================================================================================

The inverse of an autoregressive transform, affine or by splines, is a triangular solve where its network is one for it;
else it keeps its passes, one a feature, each of them by the operator, and the report says why.

``genkernels swap MODULE:FUNCTION`` prints the report for a model of your own, and how much faster a training step and a
call that draws samples become.
"""

from genkernels.swap._report import Entry, Report
from genkernels.swap._walk import swap_

__all__ = ["swap_", "Report", "Entry"]
