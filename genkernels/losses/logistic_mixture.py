"""The discretised logistic mixture of PixelCNN++ as a loss and as a sampler."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from genkernels import ops


def discretized_logistic_mixture_nll(params: Tensor, x: Tensor, levels: int = 256) -> Tensor:
    """Negative log-likelihood of images under the mixtures that a network gave for their pixels (PixelCNN++).

    Equivalent to ``genkernels.ops.logistic_mixture_nll(params, x, levels=levels)``, and, on the CPU, outside of
    ``torch.compile`` and of functorch's transforms, a check that x lies in [−1, 1] and a warning where it is off the
    levels. Elsewhere a value beyond counts as the end.

    Args:
        params: ``[N, 3*K, H, W]`` for one channel, ``[N, 10*K, H, W]`` for three; layout as in
            `genkernels.ops.logistic_mixture_nll`.
        x: ``[N, C, H, W]``, at the levels ``2 * i / (levels - 1) - 1`` in [−1, 1].
        levels: 2 to 65,536.

    Returns:
        ``[N]``, nats an image, fp32 (fp64 for fp64 params). Bits a dimension: ``nll / (C * H * W * log(2))``.

    Raises:
        ValueError: a shape, an option or, on the CPU, a value of x is wrong. TypeError: a dtype is.

    Source: Salimans et al., "PixelCNN++", 2017.
    """
    nll = ops.logistic_mixture_nll(params, x, levels=levels)
    if x.device.type == "cpu" and x.numel() and not (torch.compiler.is_compiling() or ops.transforms_active()):
        low, high = (float(bound) for bound in x.detach().aminmax())
        if low < -1 or high > 1:  # both false for NaN, which gives a loss of NaN
            raise ValueError(
                f"discretized_logistic_mixture_nll: x must lie in [-1, 1], at 2 * i / (levels - 1) - 1 for level i, "
                f"got values from {low:g} to {high:g}"
            )
        index = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) + 1) * ((levels - 1) / 2)
        if (index - index.round()).abs().amax() > max(1e-3, levels * torch.finfo(x.dtype).eps):
            warnings.warn(
                "discretized_logistic_mixture_nll: some values of x are off the levels 2 * i / (levels - 1) - 1, "
                f"levels={levels}: images in [0, 1] are 2 * x - 1",
                stacklevel=2,
            )
    return nll


def sample_logistic_mixture(
    params: Tensor,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    levels: int = 256,
    channels: int | None = None,
) -> Tensor:
    """Images drawn from the mixtures that a network gave for their pixels.

    Equivalent to::

        noise = torch.rand(N, 1 + channels, H, W, generator=generator)
        2 * genkernels.ops.logistic_mixture_sample(params, noise, levels=levels, temperature=temperature) / (levels - 1)
        - 1

    Args:
        params: ``[N, 3*K, H, W]`` for one channel, ``[N, 10*K, H, W]`` for three.
        generator: of the noise; torch's default where it is None. temperature: divides the logits, multiplies the
            logistic noise.
        levels: 2 to 65,536.
        channels: 1 or 3; needed where the number of parameters is a multiple of 30, which either has.

    Returns:
        ``[N, C, H, W]`` in [−1, 1], at levels, fp32 (fp64 for fp64 params), NaN at pixels whose params hold one. It
        carries no graph.

    Raises:
        ValueError: a shape or an option is wrong, or channels cannot be told. TypeError: a dtype is.

    Source: Salimans et al., "PixelCNN++", 2017.
    """
    name = "sample_logistic_mixture"
    if not isinstance(params, Tensor) or not params.is_floating_point() or params.dim() < 2:
        found = f"{params.dtype} {list(params.shape)}" if isinstance(params, Tensor) else type(params).__name__
        raise TypeError(f"{name}: params must be a floating-point tensor [N, 3*K or 10*K, ...], got {found}")
    fitting = [c for c, group in ((1, 3), (3, 10)) if params.shape[1] and params.shape[1] % group == 0]
    if channels is None and len(fitting) != 1:
        reason = "both fit: pass channels=1 or channels=3" if fitting else "neither fits"
        raise ValueError(
            f"{name}: params must have 3*K (one channel) or 10*K (three) in dimension 1, got {params.shape[1]}: "
            f"{reason}"
        )
    if channels not in (None, 1, 3):
        raise ValueError(f"{name}: channels must be 1 or 3, got {channels!r}")
    count = fitting[0] if channels is None else channels
    work = torch.promote_types(params.dtype, torch.float32)
    shape = (params.shape[0], 1 + count, *params.shape[2:])
    device = params.device if generator is None else generator.device
    noise = torch.rand(shape, generator=generator, device=device, dtype=work).to(params.device)
    index = ops.logistic_mixture_sample(params, noise, levels=levels, temperature=temperature)
    drawn = 2 * index.to(work) / (levels - 1) - 1
    return drawn.masked_fill(params.detach().isnan().any(1, keepdim=True), torch.nan)  # an integer holds none
