"""Rules for layers with weights, activations, and layers that do nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.networks._registry import HINT, each, filled, function, is_number, layer, named, source, spatial
from genkernels.networks.activations import ACTIVATIONS
from genkernels.networks.convolutions import Convolution, Linear, TransposedConvolution
from genkernels.networks.steps import Activate, ChannelOffset, Source

# ------------------------------------------------------------------------------------------------- layers with weights


@layer("linear", nn.Linear)
def _linear_layer(b, m, input):
    return _linear(b, input, _tensors(b, m, (m.out_features, m.in_features)), m.out_features, m.in_features)


@function("linear", F.linear)
def _linear_function(b, input, weight, bias=None):
    sources, (outputs, inputs) = _given(b, weight, bias, 2)
    return _linear(b, input, sources, outputs, inputs)


def _linear(b, x, sources, outputs: int, inputs: int):
    shape = b.shape(x)
    if not shape or shape[-1] != inputs:
        b.refuse(f"takes {inputs} features along the last axis of a sample, got samples {list(shape)}{HINT}")
    return b.emit(Linear, [x], (*shape[:-1], outputs), sources)


@layer("conv", nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv_layer(b, m, input):
    if m.padding_mode not in ("zeros", "circular"):
        b.refuse(f"pads by {m.padding_mode!r}: only 'zeros' and 'circular' have a rule")
    weight = (m.out_channels, m.in_channels // m.groups, *m.kernel_size)
    circular = m.padding_mode == "circular"
    sources = _tensors(b, m, weight)
    return _conv(b, input, sources, weight, m.stride, m.padding, m.dilation, m.groups, circular)


@function("conv", F.conv1d, F.conv2d, F.conv3d)
def _conv_function(b, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    sources, shape = _given(b, weight, bias, None)
    return _conv(b, input, sources, shape, stride, padding, dilation, groups, circular=False)


def _conv(b, x, sources, weight, stride, padding, dilation, groups, circular):
    outputs, inputs, *kernel = weight
    size = spatial(b, x, len(kernel), inputs * groups)
    stride, dilation = each(stride, len(kernel)), each(dilation, len(kernel))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((n // 2, n - n // 2) for n in total)
    else:
        padding = tuple((p, p) for p in each(0 if padding == "valid" else padding, len(kernel)))
    if circular and any(max(pair) > n for pair, n in zip(padding, size, strict=True)):
        b.refuse(f"wraps around more than once: padding {list(padding)}, input {list(size)}")
    out = [
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, (before, after), d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    fields = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "circular": circular}
    return b.emit(Convolution, [x], filled(b, (outputs, *out)), sources, **fields)


@layer("conv_transpose", nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose_layer(b, m, input):
    weight = (m.in_channels, m.out_channels // m.groups, *m.kernel_size)
    size = spatial(b, input, len(m.kernel_size), m.in_channels)
    dims = len(size)
    stride, padding, dilation = each(m.stride, dims), each(m.padding, dims), each(m.dilation, dims)
    extra = each(m.output_padding, dims)
    out = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(size, stride, padding, dilation, m.kernel_size, extra, strict=True)
    ]
    fields = {"stride": stride, "padding": padding, "output_padding": extra, "dilation": dilation, "groups": m.groups}
    shape, sources = filled(b, (m.out_channels, *out)), _tensors(b, m, weight, outputs=m.out_channels)
    return b.emit(TransposedConvolution, [input], shape, sources, **fields)


def _tensors(b, m: nn.Module, weight: tuple[int, ...], outputs: int | None = None) -> tuple[Source, ...]:
    """The layer's own weight and bias, which must be of the sizes that the layer tells."""
    roles = {"weight": "weight"}
    places = (m._parameters, m._modules.get("parametrizations") or {}, m.__dict__)
    if any("bias" in place and place["bias"] is not None for place in places):
        roles["bias"] = "bias"
    for name, shape in (("weight", weight), ("bias", (outputs or weight[0],))):
        tensor = m._parameters.get(name)
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            b.refuse(f"has a {name} {list(tensor.shape)} where its attributes say {list(shape)}")
    return b.own(m, **roles)


def _given(b, weight, bias, axes: int | None) -> tuple[tuple[Source, ...], tuple[int, ...]]:
    """The weight and bias that a function is called with, and the weight's shape."""
    if not b.is_own(weight) or not (bias is None or b.is_own(bias)) or b.is_of_labels(weight) or b.is_of_labels(bias):
        b.refuse("needs a weight and a bias that are parameters or buffers as they are")
    shape, of_bias = b.own_shape(weight), None if bias is None else b.own_shape(bias)
    if axes not in (None, len(shape)) or of_bias not in (None, shape[:1]):
        b.refuse(f"has no rule for a weight {shape} and a bias {of_bias}")
    sources = [source(weight, "weight"), *([] if bias is None else [source(bias, "bias")])]
    return tuple(sources), shape


# ---------------------------------------------------------------------------------------------------------- activations


def _activation(b, x, name, sources=(), in_place=False):
    return b.emit(Activate, [x], b.shape(x), sources, in_place=in_place, name=name)


@layer("activation", nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.ELU, nn.Softplus, nn.Tanh, nn.Sigmoid)
def _activation_layer(b, m, input):
    name = "leaky_relu" if isinstance(m, nn.LeakyReLU) else type(m).__name__.lower()
    sources = b.own(m, **{parameter: parameter for parameter in ACTIVATIONS[name].parameters})
    return _activation(b, input, name, sources, getattr(m, "inplace", False))


@named("activation", "bias_leaky_relu")
def _bias_leaky_relu(b, m, input):
    """A layer with a ``bias`` a channel, or none, and the operator's options."""
    shape = b.shape(input)
    if m.clamp is not None:
        b.refuse(f"clamps its output: clamp must be None, got {m.clamp}")
    bias = m._parameters.get("bias")
    if bias is not None or "bias" not in m._parameters:  # which a parametrisation computes
        if bias is not None and tuple(bias.shape) != shape[:1]:
            b.refuse(f"takes samples of {bias.shape[0]} channels, got {list(shape)}{HINT}")
        input = b.emit(ChannelOffset, [input], shape, b.own(m, offset="bias"))
    sources = b.own(m, negative_slope="negative_slope", gain="gain")
    return _activation(b, input, "gained_leaky_relu", sources)


@layer("activation", nn.GELU)
def _gelu_layer(b, m, input):
    return _activation(b, input, "gelu_tanh" if m.approximate == "tanh" else "gelu")


@function("activation", F.gelu)
def _gelu(b, input, *, approximate="none"):
    return _activation(b, input, "gelu_tanh" if approximate == "tanh" else "gelu")


@function("activation", F.relu, torch.relu, Tensor.relu)
def _relu(b, input, inplace=False):
    return _activation(b, input, "relu", (), inplace)


@function("activation", F.silu)
def _silu(b, input, inplace=False):
    return _activation(b, input, "silu", (), inplace)


@function("activation", F.leaky_relu)
def _leaky_relu(b, input, negative_slope=0.01, inplace=False):
    return _activation(b, input, "leaky_relu", _numbers(b, negative_slope=negative_slope), inplace)


@function("activation", F.elu)
def _elu(b, input, alpha=1.0, inplace=False):
    return _activation(b, input, "elu", _numbers(b, alpha=alpha), inplace)


@function("activation", F.softplus)
def _softplus(b, input, beta=1.0, threshold=20.0):
    return _activation(b, input, "softplus", _numbers(b, beta=beta, threshold=threshold))


@function("activation", torch.tanh, Tensor.tanh)
def _tanh(b, input):
    return _activation(b, input, "tanh")


@function("activation", torch.sigmoid, Tensor.sigmoid)
def _sigmoid(b, input):
    return _activation(b, input, "sigmoid")


@function("activation", torch.relu_, Tensor.relu_)
def _relu_in_place(b, input):
    return _activation(b, input, "relu", (), True)


def _numbers(b, **numbers) -> tuple[Source, ...]:
    for name, value in numbers.items():
        if not is_number(value):
            b.refuse(f"has no rule for a {name} that is no number")
    return tuple(Source(name, constant=value) for name, value in numbers.items())


# -------------------------------------------------------------------------------------------------------------- labels


@layer("embedding", nn.Embedding)
def _embedding(b, m, input):
    if not b.is_labels(input):
        b.refuse("embeds something else than the labels")
    if m.max_norm is not None:
        b.refuse("changes its weight in a call: max_norm must be None")
    return b.of_labels(m, (m.embedding_dim,))


# ------------------------------------------------------------------------------------------------------------- identity


@layer("identity", nn.Identity)
def _identity(b, m, input):
    return b.alias(input)


@layer("identity", nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _dropout_layer(b, m, input):
    return _dropout(b, input, m.p, m.training)


@function("identity", F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def _dropout_function(b, input, p=0.5, training=True, inplace=False):
    return _dropout(b, input, p, training)


def _dropout(b, x, p, training):
    if training and p > 0:
        b.refuse(f"draws random numbers: p must be 0 in training, got {p}")
    return b.alias(x)


@function("identity", Tensor.contiguous)
def _contiguous(b, input, memory_format=None):
    return b.alias(input)


@function("identity", Tensor.clone, torch.clone)
def _clone(b, input, memory_format=None):
    return b.alias(input, shares_memory=False)
