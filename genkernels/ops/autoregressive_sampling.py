"""Autoregressive sampling: schema, checks, fake, backend choice. The definition is in
`genkernels.reference.autoregressive_sampling`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genkernels import reference
from genkernels._plan import state_size
from genkernels.ops._operator import (
    Operator,
    choose,
    define,
    refuse_gradient_in_place,
    register,
    runs_reference,
    temperature_of,
    transforms_active,
)
from genkernels.reference._stages import ACTIVATIONS, Stage, flatten, plane_channels

NAME = "autoregressive_sampling"
HEADS = ("categorical", "logistic_mixture")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
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
    head_code = choose(NAME, "head", head, HEADS)
    temperature = temperature_of(NAME, temperature)
    stages = _check(stages, noise, levels, head, image, known, rows_per_call)
    if torch.is_grad_enabled() and any(t.requires_grad for s in stages for t in (noise, *s.tensors())):
        raise RuntimeError(_NO_GRADIENT)
    batch, planes, height, width = noise.shape
    channels = planes if head == "categorical" else planes - 1
    shape = (batch, channels, height, width)
    dtype = torch.promote_types(stages[0].tensors()[0].dtype, torch.float32)
    drawn = noise.new_zeros(shape, dtype=torch.int64)
    if known is not None:
        known = known.expand(shape).contiguous()
        drawn = torch.where(known, image.long(), drawn)
    if drawn.numel() == 0:
        return drawn
    tensors, plan = flatten(stages, channels, width)
    tensors = [t.detach().to(dtype).contiguous() for t in tensors]
    noise = noise.detach().to(dtype).contiguous()
    plain = runs_reference(OPERATOR, noise)
    run = reference.autoregressive_sampling if plain else torch.ops.genkernels.autoregressive_sampling
    state = noise.new_zeros((batch, 0 if plain else state_size(plan)))
    step = rows_per_call or height
    for begin in range(0, height, step):
        end = min(begin + step, height)
        run(drawn, state, noise, known, tensors, plan, head_code, levels, temperature, begin, end)
        if progress is not None:
            progress(end, height)
    return drawn


# --- checks -------------------------------------------------------------------------------------------------------


def _check(stages, noise, levels, head, image, known, rows_per_call) -> list[Stage]:
    """Every condition on the arguments; the stages as a list."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"{NAME}: noise must be a torch.Tensor, got {type(noise).__name__}")
    if noise.dtype not in _FLOATS:
        raise TypeError(f"{NAME}: noise must be float64, float32, bfloat16 or float16, got {noise.dtype}")
    if not isinstance(levels, int) or isinstance(levels, bool) or levels < 2:
        raise ValueError(f"{NAME}: levels must be an integer of at least 2, got {levels!r}")
    if noise.dim() != 4:
        raise ValueError(
            f"{NAME}: noise must be [N, C, H, W] or, for logistic_mixture, [N, 1 + C, H, W], got {list(noise.shape)}"
        )
    if head == "logistic_mixture" and noise.shape[1] not in (2, 4):
        raise ValueError(
            f"{NAME}: noise must be [N, 1 + C, H, W] with C = 1 or 3 for logistic_mixture, got {list(noise.shape)}"
        )
    if head == "categorical" and noise.shape[1] < 1:
        raise ValueError(f"{NAME}: noise must be [N, C, H, W] with at least one data channel, got {list(noise.shape)}")
    if rows_per_call is not None and (not isinstance(rows_per_call, int) or rows_per_call < 1):
        raise ValueError(f"{NAME}: rows_per_call must be an integer of at least 1, got {rows_per_call!r}")
    channels = noise.shape[1] - (head == "logistic_mixture")
    stages = list(stages)
    _check_stages(stages, noise, channels, channels if head == "categorical" else 1)
    _check_head(plane_channels(stages, channels)[-1], head, channels, levels)
    _check_known(image, known, [noise.shape[0], channels, *noise.shape[2:]], levels, noise.device)
    return stages


def _check_stages(stages: list[Stage], noise: Tensor, channels: int, groups: int) -> None:
    if not stages:
        raise ValueError(f"{NAME}: stages must hold at least one Stage, got none")
    known_channels = [channels]
    vertical = [False]
    dtype = None
    for k, stage in enumerate(stages):
        if not isinstance(stage, Stage):
            raise TypeError(f"{NAME}: stages must be a sequence of Stage, got {type(stage).__name__} at {k}")
        at = f"{NAME}: stage {k}"
        for tensor in stage.tensors():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{at}: weights, bias and condition must be torch.Tensor, got {type(tensor).__name__}")
            if tensor.dtype not in _FLOATS:
                raise TypeError(
                    f"{at}: weights, bias and condition must be float64, float32, bfloat16 or float16, got "
                    f"{tensor.dtype}"
                )
            if tensor.dtype != (dtype := dtype or tensor.dtype):
                raise TypeError(f"{at}: all tensors of the stages must have one dtype, got {dtype} and {tensor.dtype}")
            if tensor.device != noise.device:
                raise ValueError(
                    f"{at}: the stages and noise must be on one device, got {tensor.device} and {noise.device}"
                )
        known_channels.append(_check_stage(at, k, stage, known_channels, vertical, groups, noise))
        vertical.append(stage.vertical)
    if dtype is None:
        raise ValueError(f"{NAME}: stages must hold a weight")


def _check_stage(at, k, stage, channels, vertical, groups, noise) -> int:
    """The channels of the plane that the stage makes."""
    if stage.activation not in ACTIVATIONS:
        raise ValueError(f"{at}: activation must be one of {', '.join(ACTIVATIONS)}, got {stage.activation!r}")
    if not stage.inputs and not stage.added:
        raise ValueError(f"{at}: must read a plane, by inputs or by added, got neither")
    others = [*stage.added, *([] if stage.residual is None else [stage.residual])]
    for plane in [*(index for index, _ in stage.inputs), *others]:
        if not isinstance(plane, int) or not 0 <= plane <= k:
            raise ValueError(f"{at}: planes that it reads must be 0 to {k}, got {plane!r}")
    for plane in others:
        if plane == 0:
            raise ValueError(f"{at}: plane 0 must not be added or a residual, a pixel would see itself")
        if stage.vertical and not vertical[plane]:
            raise ValueError(f"{at}: a vertical stage must add vertical planes only, plane {plane} is not vertical")
    width = stage.width(channels)
    for plane, weight in stage.inputs:
        shape = list(weight.shape)
        if len(shape) != 4 or shape[0] != width or shape[1] != channels[plane]:
            raise ValueError(
                f"{at}: weight of plane {plane} must be [out, in, kh, kw] = [{width}, {channels[plane]}, kh, "
                f"kw], got {shape}"
            )
        if shape[2] % 2 == 0 or shape[3] % 2 == 0:
            raise ValueError(f"{at}: weight of plane {plane} must have odd kh and kw, got {shape}")
    for plane in stage.added:
        if channels[plane] != width:
            raise ValueError(f"{at}: added plane {plane} must have {width} channels, got {channels[plane]}")
    if stage.bias is not None and list(stage.bias.shape) != [width]:
        raise ValueError(f"{at}: bias must be [out] = [{width}], got {list(stage.bias.shape)}")
    batch, _, *size = noise.shape
    if stage.condition is not None and list(stage.condition.shape) not in ([batch, width], [batch, width, *size]):
        raise ValueError(
            f"{at}: condition must be [N, out] = {[batch, width]} or [N, out, H, W] = {[batch, width, *size]}, "
            f"got {list(stage.condition.shape)}"
        )
    gate = stage.activation == "gate"
    if gate and width % 2:
        raise ValueError(f"{at}: gate must have an even number of channels, got {width}")
    made = width // 2 if gate else width
    if stage.residual is not None and channels[stage.residual] != made:
        raise ValueError(
            f"{at}: residual plane {stage.residual} must have {made} channels, got {channels[stage.residual]}"
        )
    if groups > 1 and not stage.vertical:
        if made % groups:
            raise ValueError(f"{at}: its {made} channels must divide into {groups} groups, one a data channel")
        if gate and any(not vertical[plane] for plane in stage.added):
            raise ValueError(f"{at}: with {groups} data channels, planes added before a gate must be vertical")
    if noise.device.type == "cpu" and not torch.compiler.is_compiling():
        for plane, weight in stage.inputs:
            _check_taps(at, stage, plane, vertical[plane], weight, groups)
    return made


def _check_taps(at: str, stage: Stage, plane: int, plane_is_vertical: bool, weight: Tensor, groups: int) -> None:
    """That no weight looks at what is not drawn yet."""
    weight = weight.detach()
    kh, kw = weight.shape[2:]
    y, x = kh // 2, kw // 2
    in_order = weight.flatten(2)  # taps in raster order
    if stage.vertical:
        first = y + plane_is_vertical
        if in_order[:, :, first * kw :].any():
            rows = (
                "below its own" if plane_is_vertical else "from its own on, plane " + str(plane) + " not being vertical"
            )
            raise ValueError(f"{at}: weight of plane {plane} must be 0 at rows {rows}, for a vertical stage")
        return
    if kh * kw > 1 and in_order[:, :, y * kw + x + 1 :].any():
        raise ValueError(f"{at}: weight of plane {plane} must be 0 at taps after the centre")
    if plane_is_vertical:
        return
    centre = weight[:, :, y, x]
    if groups == 1:
        if plane == 0 and centre.any():
            raise ValueError(f"{at}: weight of plane 0 must be 0 at the centre, a pixel would see itself")
        return
    if not centre.numel():
        return
    halves = 2 if stage.activation == "gate" else 1
    blocks = centre.unflatten(0, (halves, groups, -1)).unflatten(3, (groups, -1))
    blocks = blocks.abs().sum(dim=(0, 2, 4)) != 0  # [group of the output, group of the input]
    reach = 0 if plane else -1
    late = torch.ones(groups, groups, dtype=torch.bool).triu(reach + 1)
    if (blocks & late).any():
        before = "before" if plane == 0 else "up to"
        raise ValueError(
            f"{at}: weight of plane {plane} must be 0 at the centre but for channel groups {before} the output's own"
        )


def _check_head(width: int, head: str, channels: int, levels: int) -> None:
    if head == "categorical":
        if width != channels * levels:
            raise ValueError(
                f"{NAME}: the last plane must have C * levels = {channels} * {levels} = {channels * levels} "
                f"channels, got {width}"
            )
        return
    each = 3 if channels == 1 else 10
    if width % each or width == 0:
        raise ValueError(
            f"{NAME}: the last plane must have {each} * K channels for {channels} data channel(s), got {width}"
        )


def _check_known(image, known, shape, levels, device) -> None:
    if (image is None) != (known is None):
        missing, given = ("image", "known") if image is None else ("known", "image")
        raise ValueError(f"{NAME}: image and known must be given together, got {given} without {missing}")
    if known is None:
        return
    for label, tensor in (("image", image), ("known", known)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {label} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{NAME}: {label} and noise must be on one device, got {tensor.device} and {device}")
    if known.dtype != torch.bool:
        raise TypeError(f"{NAME}: known must be bool, True where a pixel keeps its value, got {known.dtype}")
    if image.dtype not in _INTEGERS:
        raise TypeError(f"{NAME}: image must hold integers, the level indices, got {image.dtype}")
    if list(image.shape) != shape:
        raise ValueError(f"{NAME}: image must be [N, C, H, W] = {shape}, got {list(image.shape)}")
    wide = [1] * (4 - known.dim()) + list(known.shape)
    if known.dim() > 4 or any(have not in (1, want) for have, want in zip(wide, shape, strict=True)):
        raise ValueError(f"{NAME}: known must be broadcastable to [N, C, H, W] = {shape}, got {list(known.shape)}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        outside = known & ((image < 0) | (image.long() >= levels))
        if outside.any():
            wrong = image[outside.expand(shape)][0].item()
            raise ValueError(f"{NAME}: known pixels must lie in 0 to levels - 1 = {levels - 1}, got {wrong}")


# --- registration -------------------------------------------------------------------------------------------------


def _fake(image, state, noise, known, tensors, plan, head, levels, temperature, begin, end):
    return None


OPERATOR = register(
    Operator(
        name=NAME,
        functions=(autoregressive_sampling,),
        types=(Stage,),
        backends={"cpu": "", "triton": "", "cuda": ""},
        composability={
            "backward": "raises",
            "double backward": "raises",
            "forward mode": "raises",
            "vmap": "raises",
            "compile": "kernel",
            "autocast": "kernel",
            "deterministic": "kernel",
        },
        # neither has been timed on a GPU; by count they are level, and the CUDA kernel has the shorter way to its
        # launch
        prefers_cuda=lambda *tensors: True,
    )
)

define(
    OPERATOR,
    f"{NAME}(Tensor(a!) image, Tensor(b!) state, Tensor noise, Tensor? known, Tensor[] tensors, int[] plan, int "
    "head, int levels, "
    "float temperature, int begin, int end) -> ()",
    reference=reference.autoregressive_sampling,
    fake=_fake,
    not_differentiable=_NO_GRADIENT,
)
refuse_gradient_in_place(NAME, _NO_GRADIENT)
