"""Where pytorch-generative and pythae are not installed: modules with the names of their PixelCNNs, which compute the
same, written for these tests. What is told by the libraries' sources is told by these."""

from __future__ import annotations

import abc
import types

import torch
import torch.nn.functional as F
from torch import nn


class CausalConv2d(nn.Conv2d):
    def __init__(self, mask_center, *args, **kwargs):
        super().__init__(*args, **kwargs)
        live = torch.zeros_like(self.weight)
        height, width = self.kernel_size
        live.flatten(2)[:, :, : height // 2 * width + width // 2 + (not mask_center)] = 1
        self.register_buffer("mask", live)

    def forward(self, x):
        self.weight.data.mul_(self.mask)
        return super().forward(x)


class GatedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self._activation_fn = torch.tanh

    def forward(self, x):
        value, gate = x.tensor_split(2, 1)
        return self._activation_fn(value) * gate.sigmoid()


def _default_sample_fn(logits):
    return torch.distributions.Bernoulli(logits=logits).sample()


class AutoregressiveModel(abc.ABC, nn.Module):
    def __init__(self, sample_fn=None):
        super().__init__()
        self._sample_fn = sample_fn or _default_sample_fn

    def __call__(self, x):
        self._shape = x.shape[1:]
        return super().__call__(x)

    def _get_conditioned_on(self, n_samples, conditioned_on):
        return -torch.ones(n_samples, *self._shape) if conditioned_on is None else conditioned_on.clone()

    @torch.no_grad()
    def sample(self, n_samples=None, conditioned_on=None):
        image = self._get_conditioned_on(n_samples, conditioned_on)
        for i in range(image.shape[2]):
            for j in range(image.shape[3]):
                drawn = self._sample_fn(self.forward(image)[..., i, j]).view(image.shape[:2])
                image[..., i, j] = torch.where(image[..., i, j] < 0, drawn, image[..., i, j])
        return image


class CausalResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        half = width // 2
        masked = CausalConv2d(False, half, half, 3, padding=1)
        layers = nn.ReLU(), nn.Conv2d(width, half, 1), nn.ReLU(), masked, nn.ReLU(), nn.Conv2d(half, width, 1)
        self._net = nn.Sequential(*layers)

    def forward(self, x):
        return x + self._net(x)


def _head(width, head_channels, out_channels):
    layers = nn.ReLU(), nn.Conv2d(width, head_channels, 1), nn.ReLU(), nn.Conv2d(head_channels, out_channels, 1)
    return nn.Sequential(*layers)


class PixelCNN(AutoregressiveModel):
    def __init__(
        self, in_channels=1, out_channels=1, n_residual=2, residual_channels=4, head_channels=5, sample_fn=None
    ):
        super().__init__(sample_fn)
        width = 2 * residual_channels
        self._input = CausalConv2d(True, in_channels, width, 7, padding=3)
        self._causal_layers = nn.ModuleList(CausalResidualBlock(width) for _ in range(n_residual))
        self._head = _head(width, head_channels, out_channels)

    def forward(self, x):
        x = self._input(x)
        for layer in self._causal_layers:
            x = x + layer(x)
        return self._head(x)


class GatedPixelCNNLayer(nn.Module):
    def __init__(self, in_channels, width, kernel_size, mask_center):
        super().__init__()
        half = self._padding = kernel_size // 2
        self._mask_center, self._activation = mask_center, GatedActivation()
        self._vstack_1xN = nn.Conv2d(in_channels, width, (1, kernel_size), padding=(0, half))
        self._vstack_Nx1 = nn.Conv2d(width, 2 * width, (half + 1, 1), padding=(half + 1, 0))
        self._vstack_1x1 = nn.Conv2d(in_channels, 2 * width, 1)
        self._link = nn.Conv2d(2 * width, 2 * width, 1)
        self._hstack_1xN = nn.Conv2d(in_channels, 2 * width, (1, half + 1), padding=(0, half + mask_center))
        self._hstack_residual, self._hstack_skip = (nn.Conv2d(width, width, 1) for _ in range(2))

    def forward(self, v, h):
        above = self._vstack_Nx1(self._vstack_1xN(v))[:, :, : v.shape[2]]
        gated = self._activation(self._link(above) + self._hstack_1xN(h)[..., : h.shape[3]])
        beside = self._hstack_residual(gated)
        v = self._activation(above + self._vstack_1x1(v))
        return v, beside if self._mask_center else beside + h, self._hstack_skip(gated)


class GatedPixelCNN(AutoregressiveModel):
    def __init__(self, in_channels=1, out_channels=1, n_gated=2, gated_channels=4, head_channels=5, sample_fn=None):
        super().__init__(sample_fn)
        self._input = GatedPixelCNNLayer(in_channels, gated_channels, 7, True)
        layers = (GatedPixelCNNLayer(gated_channels, gated_channels, 3, False) for _ in range(n_gated))
        self._gated_layers = nn.ModuleList(layers)
        self._head = _head(gated_channels, head_channels, out_channels)

    def forward(self, x):
        v, h, skips = self._input(x, x)
        for layer in self._gated_layers:
            v, h, skip = layer(v, h)
            skips = skips + skip
        return self._head(skips)


class PixelSNAIL(AutoregressiveModel):
    pass


class MaskedConv2d(nn.Conv2d):
    """pythae's."""

    def __init__(self, mask_type, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        live = torch.zeros_like(self.weight)
        live.flatten(2)[:, :, : kernel_size * kernel_size // 2 + (mask_type == "B")] = 1
        self.register_buffer("mask", live)

    def forward(self, input):
        return F.conv2d(input, self.weight * self.mask, self.bias, self.stride, self.padding, self.dilation)


def packages() -> dict[str, types.ModuleType]:
    """Both libraries, by the names of their modules."""
    mine = {name: value for name, value in globals().items() if not name.startswith("__")}
    found = {}
    for path in (
        "pytorch_generative.models.base",
        "pytorch_generative.models.autoregressive.pixel_cnn",
        "pytorch_generative.models.autoregressive.gated_pixel_cnn",
        "pytorch_generative.models.autoregressive.pixel_snail",
        "pytorch_generative.nn.convolution",
        "pythae.models.normalizing_flows.pixelcnn.pixelcnn_model",
        "pythae.models.normalizing_flows.pixelcnn.utils",
    ):
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in found:
                found[name] = types.ModuleType(name)
                if depth > 1:
                    setattr(found[".".join(parts[: depth - 1])], parts[depth - 1], found[name])
        vars(found[path]).update(mine)
    return found
