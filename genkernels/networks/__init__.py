"""A network as data: the list of its steps, and passes over them in another order than a forward pass takes.

An operator sees tensors. Some hot paths of generative models are algorithms over a whole network: a critic's gradient
penalty, the inverse of x + g(x), the series of log det(I + J). They need its layers, their weights and the activations
between them. Written once for each kind of network, such an algorithm is copied per model; written against
``nn.Module`` alone, it can only call forward and let autograd retrace what it knows already. Here it is written once
over the steps::

    steps = traced(critic, x)
    at = linearize(steps, x)
    gradient = pullback(steps, at, torch.ones_like(at.values[-1]))

`trace` turns a module into steps by ``torch.fx``, `traced` does so once a module. There is one list of the layers that
they take, for all algorithms; what a network holds beyond it is refused in one sentence that names the layer
(`Untraceable`), and the caller falls back to autograd, which gives the same values. Layers of `genkernels.nn` are
never imported here: what must be known of one, the layer tells.
"""

from genkernels.networks.activations import ACTIVATIONS
from genkernels.networks.gradient_penalty import Penalised, penalised
from genkernels.networks.native import NativeBlock, native_block
from genkernels.networks.passes import Linearization, curvatures, forward, linearize, parameters, pullback, pushforward
from genkernels.networks.properties import Link, chain, couples_samples, is_piecewise_linear
from genkernels.networks.steps import Source, Step
from genkernels.networks.trace import SUPPORTED, Untraceable, trace, traced

__all__ = [
    "ACTIVATIONS",
    "SUPPORTED",
    "Linearization",
    "Link",
    "NativeBlock",
    "Penalised",
    "Source",
    "Step",
    "Untraceable",
    "chain",
    "couples_samples",
    "curvatures",
    "forward",
    "is_piecewise_linear",
    "linearize",
    "native_block",
    "parameters",
    "penalised",
    "pullback",
    "pushforward",
    "trace",
    "traced",
]
