"""Autoregressive sampling: schema, checks, fake, backend choice. The definition is in
`genkernels.reference.autoregressive_sampling`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genkernels._options import Head
from genkernels._plan import state_size
from genkernels.ops import _checks as checks
from genkernels.ops._autocast import work_dtype
from genkernels.ops._autoregressive_checks import NAME, check_arguments
from genkernels.ops._gradients import Refused
from genkernels.ops._operator import FEATURES, KERNEL, NOT_TRIED, RAISES, Operator, transforms_active
from genkernels.reference import autoregressive_sampling as reference
from genkernels.reference._stages import Stage, flatten

HEADS = Head.words()

_NO_GRADIENT = f"{NAME}: drawn integers cannot be differentiated; call it under torch.no_grad() and outside torch.func"


def autoregressive_sampling(
    stages: Sequence[Stage],
    noise: Tensor,
    *,
    levels: int,
    head: str = "categorical",
    image: Tensor | None = None,
    known: Tensor | None = None,
    temperature: float = 1.0,
    progress: Callable[[int, int], object] | None = None,
    rows_per_call: int | None = None,
) -> Tensor:
    r"""Draws images from a causal network in one native call: every stage's activations are kept, a pixel costs one
    column of each.

    .. math:: x_{i,c} \sim p(x_{i,c} \mid x_{<i},\, x_{i,<c})

    Equivalent to (categorical head, one data channel)::

        for i in range(height):
            for j in range(width):
                logits = network(2 * image / (levels - 1) - 1)[:, :, i, j]
                below = (logits / temperature).softmax(1).cumsum(1)
                drawn = (below[:, :-1] <= noise[:, :, i, j]).sum(1)
                image[:, 0, i, j] = torch.where(known[:, 0, i, j], image[:, 0, i, j], drawn)

    Args:
        stages: the network, see `Stage`; fp64, fp32, or bf16 and fp16, which are computed in fp32. Channel o of n
            belongs to data channel ``o // (n / C)``; for ``gate`` this is counted within each half. Vertical stages
            belong to none.
        noise: uniform in [0, 1), ``[N, C, H, W]`` (categorical) or ``[N, 1 + C, H, W]`` (logistic mixture, C = 1 or 3);
            the same noise gives the same image. It is converted to the network's dtype.
        levels: values of a data channel; the network sees level i as ``2 * i / (levels - 1) - 1``.
        head: what the last plane holds. ``categorical``: ``[N, C * levels, H, W]`` logits, levels of channel 0 first;
            channel c is
            drawn once the channels before it are. ``logistic_mixture``: ``[N, 3K, H, W]`` (C = 1) K logits, K means, K
                log-scales;
            ``[N, 10K, H, W]`` (C = 3) K logits, then for each channel K means, K log-scales, K coefficients.
        image: integers ``[N, C, H, W]``, the values of known pixels; the others are ignored. Not written to.
        known: bool, broadcastable to ``[N, C, H, W]``: True where a pixel keeps the value it has in `image`.
        temperature: divides logits and multiplies the logistic noise; 0 takes the likeliest category, and the mean of
            the likeliest component. Below 2^-126 it counts as 0, above 2^127 as that.
        progress: called ``progress(rows done, rows in all)`` after each block of rows.
        rows_per_call: rows of such a block; all of them by default. Ctrl-C ends a call between two blocks.

    Returns:
        int64 ``[N, C, H, W]``.

    Raises:
        ValueError: a shape, a plane, an option or a value is wrong; that dead taps are 0 and that known pixels lie in 0
            … levels − 1 is
            looked at on the CPU only. TypeError: a dtype is. RuntimeError: asked for a gradient. BackendUnavailable: a
                forced backend cannot run.

    Source: van den Oord et al., "Pixel Recurrent Neural Networks" and "Conditional Image Generation with PixelCNN
    Decoders", 2016; Salimans et al., "PixelCNN++", 2017; Ramachandran et al., "Fast Generation for Convolutional
    Autoregressive Models", 2017.
    """
    if transforms_active():
        raise RuntimeError(_NO_GRADIENT)
    head_code = checks.option(NAME, "head", head, HEADS)
    temperature = checks.temperature(NAME, temperature)
    stages = check_arguments(stages, noise, levels, head, image, known, rows_per_call)
    if torch.is_grad_enabled() and any(t.requires_grad for s in stages for t in (noise, *s.tensors())):
        raise RuntimeError(_NO_GRADIENT)
    batch, planes, height, width = noise.shape
    channels = planes if head == "categorical" else planes - 1
    shape = (batch, channels, height, width)
    dtype = work_dtype(next(t for stage in stages for t in stage.tensors()))
    drawn = noise.new_zeros(shape, dtype=torch.int64)
    if known is not None:
        known = known.expand(shape).contiguous()
        drawn = torch.where(known, image.long(), drawn)
    if drawn.numel() == 0:
        return drawn
    tensors, plan = flatten(stages, channels, width)
    tensors = [t.detach().to(dtype).contiguous() for t in tensors]
    noise = checks.uniform(noise.detach(), dtype).contiguous()
    fixed = (noise, known, tensors, plan, head_code, levels, temperature)
    plain = SAMPLING.runs_reference(drawn, None, *fixed, 0, height)
    run = reference.autoregressive_sampling if plain else SAMPLING.run
    state = noise.new_zeros((batch, 0 if plain else state_size(plan)))
    step = rows_per_call or height
    for begin in range(0, height, step):
        end = min(begin + step, height)
        run(drawn, state, *fixed, begin, end)
        if progress is not None:
            progress(end, height)
    return drawn


# --- registration -------------------------------------------------------------------------------------------------


def _fake(image, state, noise, known, tensors, plan, head, levels, temperature, begin, end):
    return None


OPERATOR = Operator(
    NAME,
    functions=(autoregressive_sampling,),
    types=(Stage,),
    kernels={"cpu": "", "triton": "", "cuda": ""},
    composability=dict.fromkeys(FEATURES, RAISES)
    | dict.fromkeys(("compile", "autocast", "deterministic"), KERNEL)
    | {"CUDA graph capture": NOT_TRIED},
    # neither has been timed on a GPU; by count they are level, and the CUDA kernel has the shorter way to its launch
    prefers="cuda",
)

SAMPLING = OPERATOR.define(
    f"{NAME}(Tensor(a!) image, Tensor(b!) state, Tensor noise, Tensor? known, Tensor[] tensors, int[] plan, int head, "
    "int levels, float temperature, int begin, int end) -> ()",
    reference.autoregressive_sampling,
    _fake,
    gradient=Refused(_NO_GRADIENT),
)
