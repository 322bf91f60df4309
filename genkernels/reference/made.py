r"""Masked linear layers and the inverse of an autoregressive transform, affine or by splines, in plain PyTorch: the
definition, the oracle, the fallback.

Degrees say who may see whom. Feature :math:`k` in the chosen order has degree k = 1 … D; a hidden unit of degree m
depends on features of degree ≤ m, an output of degree d on features of degree < d alone (Germain et al., "MADE", 2015):

.. math:: y = (W \odot M)\,x + b,\qquad M_{ji} = [\,d_j \ge d_i\,]\ \text{(hidden)},\quad [\,d_j > d_i\,]\
    \text{(output, strict)}

An autoregressive transform has :math:`z_i = f(x_i;\,p_i)` with an increasing f whose P parameters :math:`p_i` are made
from the features before i: an affine map, :math:`z_i = x_i\,\sigma(s_i) + t_i` (Kingma et al., "IAF", 2016;
Papamakarios et al., "MAF", 2017), or a rational-quadratic spline (Durkan et al., "Neural spline flows", 2019). Its
inverse by definition is D passes, each of which settles one more feature. Kernels solve it as a blocked nonlinear
triangular system instead: every hidden unit is computed once, when the last feature that it sees has become known.

Gradient of the inverse, by the implicit function theorem, with :math:`\ell = \sum\log f'` and the gradients
:math:`g_x` by x and :math:`g_\ell` by the log-determinant −ℓ: λ solves :math:`J^\top\lambda + g_\ell\,\nabla_x \ell =
g_x` (:math:`J = \partial z / \partial x`, triangular, so by back substitution from the last feature); the gradient of z
is λ, that of any parameter θ is :math:`-(\lambda^\top \partial z/\partial\theta + g_\ell\,\partial
\ell/\partial\theta)`: one vector-Jacobian product.

A network is its layers' weights ``[out, in]`` and biases, the last giving the first parameter of all features in data
order, then the second, … (affine: s, then t; a spline: K width logits, K height logits, the slopes).
Hidden units are sorted by degree. ``order [D]``: the feature of each step. ``counts [layers - 1, D + 1]``: how many
units of a hidden layer have degree ≤ k, that is, are known once k features are. With ``residual``, the layers after the
first come in pairs :math:`v \leftarrow v + W_b\,\mathrm{relu}(W_a\,\mathrm{relu}(v) + b_a) + b_b`, and the last layer
reads v itself. ``context [N, H]`` is added to the first hidden layer's pre-activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels._options import ScaleMap
from genkernels.reference._made_maps import Affine, Elementwise, Splines
from genkernels.reference.affine_coupling import log_scale, log_scale_slope

# ------------------------------------------------------------------------------------------------------ masked linear


def degree_mask(in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Tensor:
    """``[out, in]`` bool: where an output may see an input."""
    out, into = out_degrees.unsqueeze(1), in_degrees.unsqueeze(0)
    return out > into if strict else out >= into


def masked_weight(weight: Tensor, in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Tensor:
    """`weight` with dead entries exactly 0, whatever stood there."""
    return torch.where(degree_mask(in_degrees, out_degrees, strict), weight, torch.zeros_like(weight))


def masked_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> Tensor:
    """``input [N, in]`` → ``[N, out]`` by the live weights."""
    return F.linear(input, masked_weight(weight, in_degrees, out_degrees, strict), bias)


def masked_linear_grad_input(
    grad_output: Tensor, weight: Tensor, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> Tensor:
    return grad_output @ masked_weight(weight, in_degrees, out_degrees, strict)


def masked_linear_grad_weight(
    grad_output: Tensor, input: Tensor, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> Tensor:
    return masked_weight(grad_output.mT @ input, in_degrees, out_degrees, strict)


# --------------------------------------------------------------------------------------------- the network, the degrees


def plan(degrees: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(order [D], counts [L - 1, D + 1])`` from the features' degrees (a permutation of 1 … D) and the hidden
    layers', sorted."""
    features = degrees[0].numel()
    steps = torch.arange(features + 1, device=degrees[0].device)
    counts = [torch.searchsorted(d.contiguous(), steps, right=True) for d in degrees[1:]]
    return torch.argsort(degrees[0]), torch.stack(counts) if counts else steps.new_empty((0, features + 1))


def degrees_of(order: Tensor, counts: Tensor, hidden: Sequence[int]) -> list[Tensor]:
    """The degrees of features and of hidden units: `plan` undone."""
    units = [torch.arange(n, device=order.device) for n in hidden]
    return [
        torch.argsort(order) + 1,
        *(torch.searchsorted(c.contiguous(), u, right=True) for c, u in zip(counts, units, strict=True)),
    ]


class _Network:
    """The masked layers of a MADE, their units and their backward signals, written out."""

    def __init__(self, weights, biases, context, order, counts, residual):
        self.degrees = degrees_of(order, counts, [w.shape[0] for w in weights[:-1]])
        outputs = torch.cat([self.degrees[0]] * (weights[-1].shape[0] // max(order.numel(), 1)))
        ends = [*self.degrees[1:], outputs]
        self.masks = [
            degree_mask(into, out, strict=layer == len(weights) - 1)
            for layer, (into, out) in enumerate(zip(self.degrees, ends, strict=True))
        ]
        self.weights = [torch.where(m, w, torch.zeros_like(w)) for m, w in zip(self.masks, weights, strict=True)]
        self.biases, self.context, self.residual = biases, context, residual

    def units(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``(values, inputs)`` of each layer: pre-activations, the last being the parameters, and what the layer
        reads."""
        values, inputs = [], []
        u, last = x, len(self.weights) - 1
        for layer, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs.append(u)
            v = F.linear(u, w, b)
            if layer == 0 and self.context is not None:
                v = v + self.context
            if self._joins(layer):
                v = v + values[layer - 2]
            values.append(v)
            u = v if self.residual and layer == last - 1 else F.relu(v)
        return values, inputs

    def params(self, x: Tensor) -> Tensor:
        """``[N, P, D]``, the P parameters of each feature."""
        return self.units(x)[0][-1].unflatten(1, (-1, self.degrees[0].numel()))

    def signals(self, grad_params: Tensor, values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The gradient by every layer's pre-activations, and by x."""
        last = len(self.weights) - 1
        signals: list[Tensor] = [grad_params] * (last + 1)
        for layer in range(last - 1, -1, -1):
            g = signals[layer + 1] @ self.weights[layer + 1]
            if not (self.residual and layer == last - 1):
                g = torch.where(values[layer] <= 0, torch.zeros_like(g), g)
            if layer + 2 < last and self._joins(layer + 2):
                g = g + signals[layer + 2]
            signals[layer] = g
        return signals, signals[0] @ self.weights[0]

    def _joins(self, layer: int) -> bool:
        """Whether the values of two layers below are added: at the end of each residual block."""
        return self.residual and layer >= 2 and layer % 2 == 0 and layer < len(self.weights) - 1


# --------------------------------------------------------------------------------------------------------- the inverse


def forward(
    elementwise: Elementwise,
    x: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor,
    counts: Tensor,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(z, ldj)``, in one pass of the network."""
    z, ell = elementwise.forward(x, _Network(weights, biases, context, order, counts, residual).params(x))
    return z, ell.sum(1)


def inverse(
    elementwise: Elementwise,
    z: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor,
    counts: Tensor,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(x, ldj)`` of the inverse by D sequential passes."""
    network = _Network(weights, biases, context, order, counts, residual)
    x, ell = torch.zeros_like(z), torch.zeros_like(z)
    for step in range(1, z.shape[1] + 1):
        now, column = network.degrees[0] == step, order[step - 1 : step]
        # of this feature alone: a guess at another may overflow, and meet a gradient of 0
        found, more = elementwise.inverse(z.index_select(1, column), network.params(x).index_select(2, column))
        x, ell = torch.where(now, found, x), torch.where(now, more, ell)
    return x, ell.sum(1)


def inverse_backward(
    elementwise: Elementwise,
    grad_x: Tensor | None,
    grad_ldj: Tensor | None,
    x: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor,
    counts: Tensor,
    residual: bool = False,
) -> list[Tensor]:
    """Gradients ``[z, context (of its shape even where it is None), weight and bias of each layer]`` from the solution
    x.

    Back substitution: D passes of the transposed network, from the last feature to the first. The last one's x is seen
    by nothing, and may be infinite.
    """
    network = _Network(weights, biases, context, order, counts, residual)
    features = x.shape[1]
    by_ldj = x.new_zeros((x.shape[0], 1)) if grad_ldj is None else grad_ldj.unsqueeze(1)
    values, inputs = network.units(x.masked_fill(network.degrees[0] == features, 0))
    params = values[-1].unflatten(1, (-1, features))
    solution, cotangents = torch.zeros_like(x), torch.zeros_like(params)
    for step in range(features, 0, -1):
        now, column = network.degrees[0] == step, order[step - 1 : step]
        given = None if grad_x is None else grad_x.index_select(1, column)
        if step < features:
            seen = network.signals(cotangents.flatten(1), values)[1].index_select(1, column)
            given = -seen if given is None else given - seen
        found, signal = elementwise.backward(given, by_ldj, x.index_select(1, column), params.index_select(2, column))
        solution, cotangents = torch.where(now, found, solution), torch.where(now, signal, cotangents)
    by_layer = network.signals(cotangents.flatten(1), values)[0]
    grads = [solution, -by_layer[0]]
    for g, u, mask in zip(by_layer, inputs, network.masks, strict=True):
        product = g.mT @ u
        grads += [-torch.where(mask, product, torch.zeros_like(product)), -g.sum(0)]
    return grads


def inverse_by_sweeps(
    elementwise: Elementwise,
    z: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor,
    counts: Tensor,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """`inverse` by sweeps that renew all features at once: k sweeps settle the first k, so D are exact.

    Stops once a sweep changes nothing: looked at after each sweep on a CPU, after every 16th on a GPU, where looking
    means waiting.
    """
    network = _Network(weights, biases, context, order, counts, residual)
    x, ell = torch.zeros_like(z), torch.zeros_like(z)
    look = 1 if z.device.type == "cpu" else 16
    for sweep in range(1, z.shape[1] + 1):
        before, (after, ell) = x, elementwise.inverse(z, network.params(x))
        # an infinity would reach earlier features, 0 times it being NaN: what is settled stays, a guess that overflowed
        # is none
        step = network.degrees[0] - sweep
        x = torch.where(step < 0, before, torch.where((step == 0) | after.isfinite(), after, 0))
        if sweep % look == 0 and torch.equal(before, after):
            break
    return x, ell.sum(1)


# ------------------------------------------------------------------------------------- the torch operators' arguments


def made_forward(
    x,
    contexts,
    weights,
    biases,
    norms,
    orders,
    counts,
    residual=False,
    scale_map=ScaleMap.EXP,
    constant=1.0,
    keep=False,
):
    """``(z, ldj, kept)`` of affine maps one after the other, ActNorms between them.

    contexts, weights, biases, orders, counts: each transform's, one after the other. norms: bias and log-scale of the
    ActNorm in front of each, and of one behind all if there is one more; or none. With `keep`, kept ``[rows, stride]``
    is what the gradient reads (`kept_by`), else ``[0, 0]``.
    """
    affine, kept = Affine(scale_map, constant), []
    ldj = x.new_zeros(x.shape[0])
    for k, network in enumerate(_networks(contexts, weights, biases, orders, counts, residual)):
        x, ldj = _normed(norms, k, x, ldj)
        values, inputs = network.units(x)
        if keep:
            kept.append(kept_by(x, values, inputs, orders[k], residual))
        x, ell = affine.forward(x, values[-1].unflatten(1, (-1, x.shape[1])))
        ldj = ldj + ell.sum(1)
    return *_normed(norms, len(orders), x, ldj), torch.cat(kept) if keep else x.new_empty((0, 0))


def _networks(contexts, weights, biases, orders, counts, residual) -> list[_Network]:
    layers = len(weights) // len(orders)
    return [
        _Network(
            weights[k * layers : (k + 1) * layers],
            biases[k * layers : (k + 1) * layers],
            contexts[k] if contexts else None,
            orders[k],
            counts[k],
            residual,
        )
        for k in range(len(orders))
    ]


def _normed(norms, k: int, x: Tensor, ldj: Tensor) -> tuple[Tensor, Tensor]:
    if len(norms) <= 2 * k:
        return x, ldj
    bias, log_scale = norms[2 * k : 2 * k + 2]
    return (x + bias) * torch.exp(log_scale), ldj + log_scale.sum()


def kept_by(x: Tensor, values: list[Tensor], inputs: list[Tensor], order: Tensor, residual: bool) -> Tensor:
    """``[rows, stride]``, the samples side by side, zeros beyond them: x in the order of the steps, the hidden units
    after their ReLU, or before it where a residual block adds to them, then the P parameters of the feature of each
    step."""
    raw = [residual and layer % 2 == 0 for layer in range(len(values) - 1)]
    units = [v if before else u for v, u, before in zip(values, inputs[1:], raw, strict=False)]
    params = values[-1].unflatten(1, (-1, order.numel())).index_select(2, order).movedim(1, 2).flatten(1)
    samples = params.shape[0]
    return F.pad(torch.cat([x.index_select(1, order), *units, params], 1).mT, (0, stride_of_samples(samples) - samples))


def stride_of_samples(samples: int) -> int:
    """Whole vectors, and no multiple of 128, which would put all rows into the same few cache sets."""
    stride = -(-samples // 16) * 16
    return stride + 16 if stride % 128 == 0 else stride


def made_forward_backward(
    grad_z,
    grad_ldj,
    x,
    kept,
    contexts,
    weights,
    biases,
    norms,
    orders,
    counts,
    residual,
    scale_map,
    constant,
    by_layers,
):
    """Gradients ``[x, contexts, norms]`` and, with `by_layers`, those of each layer's weight and bias, from x alone:
    kept is what a kernel need not compute again."""
    affine, networks = Affine(scale_map, constant), _networks(contexts, weights, biases, orders, counts, residual)
    ldj = x.new_zeros(x.shape[0])
    by_ldj = ldj if grad_ldj is None else grad_ldj
    seen = []
    for k, network in enumerate(networks):
        x, _ = _normed(norms, k, x, ldj)
        values, inputs = network.units(x)
        seen.append((x, values, inputs))
        x, _ = affine.forward(x, values[-1].unflatten(1, (-1, x.shape[1])))
    by_norms, by_contexts, by_each = [], [], []
    given = grad_z
    for k in range(len(networks), -1, -1):
        if k < len(networks):
            network, (x, values, inputs) = networks[k], seen[k]
            s, _ = values[-1].unflatten(1, (-1, x.shape[1])).unbind(1)
            by_log, by_x, by_t = by_ldj.unsqueeze(1).expand_as(s), torch.zeros_like(x), torch.zeros_like(x)
            if given is not None:  # x may be infinite, and multiplies nothing otherwise
                by_x, by_t = given * torch.exp(log_scale(s, *affine)), given
                by_log = by_x * x + by_log
            by_layer, more = network.signals(torch.cat([by_log * log_scale_slope(s, *affine), by_t], 1), values)
            given = by_x + more
            by_contexts = [by_layer[0], *by_contexts] if contexts else []
            mine = []
            for g, u, mask in zip(by_layer, inputs, network.masks, strict=True):
                product = g.mT @ u
                mine += [torch.where(mask, product, torch.zeros_like(product)), g.sum(0)]
            by_each = mine + by_each
        if len(norms) > 2 * k:
            bias, log_factor = norms[2 * k : 2 * k + 2]
            given = torch.zeros_like(x) if given is None else given
            after = (x + bias) * torch.exp(log_factor) if k == len(networks) else x
            by_factor = (given * after).sum(0) + by_ldj.sum()
            given = given * torch.exp(log_factor)
            by_norms = [given.sum(0), by_factor, *by_norms]
    return [given, *by_contexts, *by_norms, *(by_each if by_layers else [])]


def made_inverse(z, context, weights, biases, order, counts, residual, scale_map, constant):
    """`inverse` of affine maps."""
    return inverse(Affine(scale_map, constant), z, context, weights, biases, order, counts, residual)


def made_inverse_backward(grad_x, grad_ldj, x, context, weights, biases, order, counts, residual, scale_map, constant):
    """`inverse_backward` of affine maps."""
    network = context, weights, biases, order, counts, residual
    return inverse_backward(Affine(scale_map, constant), grad_x, grad_ldj, x, *network)


def made_spline_inverse(
    z, context, weights, biases, order, counts, residual, parametrization, bound, logit_scale, floor
):
    """`inverse` of splines."""
    splines = Splines(parametrization, bound, logit_scale, floor)
    return inverse(splines, z, context, weights, biases, order, counts, residual)


def made_spline_inverse_backward(
    grad_x, grad_ldj, x, context, weights, biases, order, counts, residual, parametrization, bound, logit_scale, floor
):
    """`inverse_backward` of splines."""
    network = context, weights, biases, order, counts, residual
    return inverse_backward(Splines(parametrization, bound, logit_scale, floor), grad_x, grad_ldj, x, *network)
