"""Networks for the tests of `genkernels.networks`: every kind of step, in every way that it is written."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from genkernels.nn import BiasLeakyReLU, FilteredDownsample, FilteredUpsample, spectral_norm_


class LipSwish(nn.Module):
    genkernels_activation = ("lipswish", "steepness")

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor([0.5]))

    @property
    def steepness(self):
        return F.softplus(self.beta)

    def forward(self, x):
        return x * torch.sigmoid(x * self.steepness) / 1.1


class CLipSwish(LipSwish):
    genkernels_activation = ("clipswish", "steepness")

    def forward(self, x):
        return super().forward(torch.cat([x, -x], 1)) / 1.004


class Block(nn.Module):
    """A critic's block: ReLU at its input, optional average pooling, a shortcut."""

    def __init__(self, inputs, outputs, inplace=False, pool=True):
        super().__init__()
        self.relu = nn.ReLU(inplace)
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.pool = nn.AvgPool2d(2) if pool else nn.Identity()

    def forward(self, x):
        h = self.second(F.relu(self.first(self.relu(x))))
        return self.pool(h) + self.pool(self.shortcut(x))


class Critic(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 6, inplace), Block(6, 6, inplace, pool=False))
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        h = self.blocks(self.stem(x))
        return self.head(F.leaky_relu(h, 0.2).sum((2, 3))).squeeze(1)


class Functional(nn.Module):
    """The same things as functions, methods and operators, with parameters of the module's own."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 3, 3, 3) / 5), nn.Parameter(torch.randn(6) / 5)
        self.matrix, self.gain = nn.Parameter(torch.randn(5, 24) / 5), nn.Parameter(torch.randn(6, 1, 1))
        self.register_buffer("mean", torch.randn(3, 1, 1))
        self.scale = nn.ParameterList([nn.Parameter(torch.tensor(0.7))])

    def forward(self, x):
        n, c, height, width = x.shape
        assert c == 3 and x.dim() == 4 and height % 2 == 0
        x = (x - self.mean) / 0.5
        h = torch.conv2d(x, self.weight, self.bias, stride=2, padding=1)
        h = 1 - 2 * h * self.gain
        h += F.silu(h.clone()).contiguous()
        h = F.max_pool2d(torch.tanh(h), 2) - F.avg_pool2d(h, 2).mul(0.5)
        h = torch.cat([h, -h], dim=1).view(n, 2, 6, -1).mean(1, keepdim=True)
        h = F.linear(h.reshape(x.size(0), -1).unsqueeze(1), self.matrix) * self.scale[0]
        return torch.sub(F.softplus(h.squeeze(1), beta=2), h[:, :] if False else h.flatten(1).sigmoid(), alpha=0.3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(x)) + x


def calls(function, **layers):
    """A module that calls a function of itself and its input."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.constant = torch.ones(4)
            self.tanh = nn.Tanh()
            for name, layer in layers.items():
                setattr(self, name, layer)

        def forward(self, x):
            return function(self, x)

    return Net()


def conv(dims, *args, **kwargs):
    return getattr(nn, f"Conv{dims}d")(*args, **kwargs)


def transposed(dims, *args, **kwargs):
    return getattr(nn, f"ConvTranspose{dims}d")(*args, **kwargs)


def sequence(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def mlp(activation):
    return nn.Sequential(nn.Linear(4, 7), activation(), nn.Linear(7, 7), activation(), nn.Linear(7, 3))


def block_313(activation, **kwargs):
    first, middle, last = nn.Conv2d(3, 8, 3, padding=1, **kwargs), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 3, padding=1)
    return nn.Sequential(first, activation(), middle, activation(), last)


def dense_block():
    """An i-DenseNet's: CLipSwish doubles the channels."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), CLipSwish(), nn.Conv2d(8, 3, 1), nn.Flatten(), nn.ELU(0.7))


def normed(wrap):
    net = block_313(nn.ELU)
    for index in (0, 2, 4):
        wrap(net[index])
    return net


def filtered():
    """Layers of StyleGAN's critic: what a convolution without bias gives goes on to a bias, a leaky ReLU and a gain."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), BiasLeakyReLU(3), FilteredDownsample(), BiasLeakyReLU(3, 0.1, 0.7)
    )
    for layer in net[1::2]:
        nn.init.normal_(layer.bias)
    return net


def biased():
    net = nn.Sequential(nn.Linear(4, 5), BiasLeakyReLU(5, 0.0, 1.5), nn.Linear(5, 3), BiasLeakyReLU(3))
    nn.init.normal_(net[1].bias)
    return net


ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "SiLU": nn.SiLU,
    "ELU": lambda: nn.ELU(0.6),
    "Softplus": lambda: nn.Softplus(1.7),
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU("tanh"),
    "LipSwish": LipSwish,
}

#: name: (network, shape of a sample)
NETWORKS = {
    f"mlp {name}": (lambda activation=activation: mlp(activation), (4,)) for name, activation in ACTIVATIONS.items()
}
NETWORKS |= {
    "one layer": (lambda: nn.Linear(4, 3), (4,)),
    "one activation": (nn.Tanh, (5,)),
    "linear over positions": (sequence(lambda: nn.Linear(4, 6), nn.Tanh, lambda: nn.Linear(6, 2)), (3, 4)),
    "3-1-3": (lambda: block_313(LipSwish), (3, 6, 5)),
    "3-1-3 circular": (lambda: block_313(nn.ELU, padding_mode="circular"), (3, 6, 5)),
    "residual": (Residual, (4,)),
    "critic": (Critic, (3, 8, 8)),
    "functional": (Functional, (3, 8, 8)),
    "dense": (dense_block, (3, 5, 4)),
    "spectral norm": (lambda: normed(parametrizations.spectral_norm).eval(), (3, 5, 4)),
    "batched spectral norm": (lambda: spectral_norm_(block_313(nn.ELU)).eval(), (3, 5, 4)),
    "weight norm": (lambda: normed(parametrizations.weight_norm), (3, 5, 4)),
    "strides": (sequence(lambda: conv(2, 4, 6, (3, 2), stride=(2, 3), padding=(1, 0)), nn.SiLU), (4, 8, 9)),
    "groups, dilation": (sequence(lambda: conv(2, 4, 8, 3, groups=2, dilation=2, padding=3), nn.SiLU), (4, 7, 6)),
    "same": (sequence(lambda: conv(2, 3, 4, (4, 3), padding="same", dilation=(1, 2)), nn.SiLU), (3, 6, 7)),
    "circular same": (
        sequence(lambda: conv(2, 3, 4, (4, 3), padding="same", padding_mode="circular"), nn.SiLU),
        (3, 6, 7),
    ),
    "circular strides": (
        sequence(lambda: conv(2, 3, 4, 3, stride=2, padding=(2, 1), padding_mode="circular"), nn.SiLU),
        (3, 6, 7),
    ),
    "conv1d": (sequence(lambda: conv(1, 3, 4, 3, stride=2, padding="valid", bias=False), nn.Tanh), (3, 10)),
    "conv3d": (sequence(lambda: conv(3, 2, 3, 2, stride=(1, 2, 1), padding=1), nn.Tanh), (2, 3, 4, 3)),
    "transposed": (
        sequence(lambda: transposed(2, 4, 6, (3, 4), stride=(2, 3), padding=1, output_padding=(1, 0)), nn.SiLU),
        (4, 4, 3),
    ),
    "transposed, more": (
        sequence(lambda: transposed(2, 4, 6, 2, groups=2, dilation=3, padding=1, output_padding=2), nn.SiLU),
        (4, 4, 3),
    ),
    "transposed1d": (sequence(lambda: transposed(1, 3, 2, 4, stride=2, bias=False), nn.SiLU), (3, 5)),
    "transposed3d": (sequence(lambda: transposed(3, 2, 3, 2, stride=2), nn.SiLU), (2, 2, 3, 2)),
    "average": (sequence(nn.Tanh, lambda: nn.AvgPool2d(3, 2, 1)), (2, 7, 6)),
    "average, unpadded": (
        sequence(nn.Tanh, lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
        (2, 6, 5),
    ),
    "average, divisor": (sequence(nn.Tanh, lambda: nn.AvgPool2d((2, 3), divisor_override=5)), (2, 6, 6)),
    "average1d": (sequence(nn.Tanh, lambda: nn.AvgPool1d(3, 2, 1)), (2, 7)),
    "average3d": (sequence(nn.Tanh, lambda: nn.AvgPool3d(2)), (2, 4, 2, 4)),
    "adaptive": (sequence(nn.Tanh, lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(3, 2)), (3, 5, 4)),
    "adaptive, more": (sequence(nn.Tanh, lambda: nn.AdaptiveAvgPool2d((None, 2))), (3, 5, 4)),
    "adaptive1d": (sequence(nn.Tanh, lambda: nn.AdaptiveAvgPool1d(2)), (3, 6)),
    "maximum": (sequence(lambda: conv(2, 2, 3, 1), lambda: nn.MaxPool2d(3, 2, 1), nn.Tanh), (2, 7, 6)),
    "maximum, more": (
        sequence(lambda: conv(2, 2, 3, 1), lambda: nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True), nn.Tanh),
        (2, 7, 6),
    ),
    "maximum1d": (sequence(nn.Tanh, lambda: nn.MaxPool1d(2)), (2, 6)),
    "maximum3d": (sequence(nn.Tanh, lambda: nn.MaxPool3d(2)), (2, 4, 2, 2)),
    "nearest": (sequence(nn.Tanh, lambda: nn.Upsample(scale_factor=2)), (2, 3, 4)),
    "nearest, odd": (sequence(nn.Tanh, lambda: nn.Upsample(scale_factor=(1.7, 0.6))), (2, 5, 6)),
    "nearest, size": (sequence(nn.Tanh, lambda: nn.UpsamplingNearest2d((7, 3))), (2, 3, 4)),
    "nearest1d": (sequence(nn.Tanh, lambda: nn.Upsample(7)), (2, 3)),
    "nearest3d": (sequence(nn.Tanh, lambda: nn.Upsample(scale_factor=2)), (2, 2, 2, 1)),
    "bilinear": (sequence(nn.Tanh, lambda: nn.Upsample(scale_factor=1.5, mode="bilinear")), (2, 5, 4)),
    "bilinear, size": (sequence(nn.Tanh, lambda: nn.UpsamplingBilinear2d(scale_factor=2)), (2, 3, 4)),
    "bilinear, recomputed": (
        sequence(
            nn.Tanh,
            lambda: nn.Upsample(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True, align_corners=False),
        ),
        (2, 3, 4),
    ),
    "linear1d": (sequence(nn.Tanh, lambda: nn.Upsample(scale_factor=2, mode="linear", align_corners=True)), (2, 3)),
    "trilinear": (sequence(nn.Tanh, lambda: nn.Upsample(5, mode="trilinear")), (2, 3, 2, 4)),
    "filtered up": (sequence(nn.Tanh, FilteredUpsample), (2, 3, 4)),
    "filtered up, more": (sequence(lambda: FilteredUpsample(3, (1, 2, 4, 1)), nn.Tanh), (2, 3, 2)),
    "filtered down": (sequence(nn.Tanh, FilteredDownsample), (2, 6, 4)),
    "filtered down, odd": (sequence(lambda: FilteredDownsample(2, (1, 2, 3)), nn.Tanh), (2, 5, 7)),
    "filtered in place": (filtered, (2, 6, 4)),
    "bias, gain": (biased, (4,)),
    "unflatten": (
        sequence(lambda: nn.Linear(4, 12), lambda: nn.Unflatten(1, (3, 2, -1)), lambda: conv(2, 3, 2, 1), nn.Flatten),
        (4,),
    ),
    "dropout": (lambda: mlp(lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.5))).eval(), (4,)),
    "dropout of 0": (lambda: mlp(lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.0))), (4,)),
    "nothing": (nn.Identity, (3,)),
}


def build(name, seed=0):
    """The network in fp64, its weights drawn by the seed, and the shape of a sample."""
    make, sample = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double(), sample


def at_random(name, batch=3):
    """A network and a batch of inputs, in fp64."""
    net, sample = build(name)
    return net, torch.randn(batch, *sample, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def like(x, *lead, seed=2):
    """Vectors, as many as `lead` says, for each entry of a batch."""
    return torch.randn(*lead, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
