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

It is the same line for each library. Each has a page of its own in docs/, with what its models become, what stays and
why, the state dict, the way back, and what was measured.

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

What is common to all. A module's class alone changes: parameters, buffers, the keys of the state dict, hooks and
references to it are what they were. Models are swapped before they are compiled; within ``torch.compile`` and
``torch.jit.trace``, and in replicas of ``nn.DataParallel``, modules take their library's own way. Copies
(``copy.deepcopy``, ``pickle``, averages of weights) are swapped like the model they were made of. Under autocast, and
in a half dtype that a model was given after the swap, kernels compute in fp32 and round once, so that results differ by
the library's own roundings. A part whose place a hook, a parametrization or another class has taken is called as it
ever was.

``genkernels swap MODULE:FUNCTION`` prints the report for a model of your own, and how much faster a training step and a
call that draws samples become.
"""

from genkernels.swap._report import Entry, Report
from genkernels.swap._walk import swap_

__all__ = ["swap_", "Report", "Entry"]
