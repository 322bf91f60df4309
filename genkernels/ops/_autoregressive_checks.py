"""Every condition on the arguments of `genkernels.ops.autoregressive_sampling`, one sentence each: what must hold, what
came."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.ops import _checks as checks
from genkernels.reference._stages import ACTIVATIONS, Stage, plane_channels

NAME = "autoregressive_sampling"


def check_arguments(stages, noise, levels, head, image, known, rows_per_call) -> list[Stage]:
    """Every condition on the arguments; the stages as a list."""
    checks.tensor(NAME, "noise", noise)
    checks.integer(NAME, "levels", levels, 2, checks.MOST_LEVELS if head == "logistic_mixture" else None)
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
    if rows_per_call is not None:
        checks.integer(NAME, "rows_per_call", rows_per_call, 1)
    channels = noise.shape[1] - (head == "logistic_mixture")
    stages = list(stages)
    _check_stages(stages, noise, channels, channels if head == "categorical" else 1)
    _check_head(plane_channels(stages, channels)[-1], head, channels, levels)
    _check_known(image, known, [noise.shape[0], channels, *noise.shape[2:]], levels, noise)
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
        for label, tensor in _labelled(stage):
            checks.tensor(at, label, tensor)
            if tensor.dtype != (dtype := dtype or tensor.dtype):
                raise TypeError(f"{at}: all tensors of the stages must have one dtype, got {dtype} and {tensor.dtype}")
            checks.same_device(at, {"noise": noise, label: tensor})
        known_channels.append(_check_stage(at, k, stage, known_channels, vertical, groups, noise))
        vertical.append(stage.vertical)
    if dtype is None:
        raise ValueError(f"{NAME}: stages must hold a weight")


def _labelled(stage: Stage) -> list[tuple[str, Tensor]]:
    """The stage's tensors, as sentences call them."""
    labelled = [(f"weight of plane {plane}", weight) for plane, weight in stage.inputs]
    return labelled + [(name, t) for name in ("bias", "condition") if (t := getattr(stage, name)) is not None]


def _check_stage(at, k, stage, channels, vertical, groups, noise) -> int:
    """The channels of the plane that the stage makes."""
    checks.option(at, "activation", stage.activation, ACTIVATIONS)
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
    if stage.bias is not None:
        checks.shape(at, "bias", stage.bias, [width], "[out]")
    batch, _, *size = noise.shape
    if stage.condition is not None and list(stage.condition.shape) not in ([batch, width], [batch, width, *size]):
        raise ValueError(
            f"{at}: condition must be [N, out] = {[batch, width]} or [N, out, H, W] = {[batch, width, *size]}, "
            f"got {list(stage.condition.shape)}"
        )
    gate = stage.activation == "gate"
    if gate and width % 2:
        raise ValueError(f"{at}: gate must have an even number of channels, got {width}")
    leaving = width // 2 if gate else width  # channels after the activation
    if stage.residual is not None and channels[stage.residual] != leaving:
        raise ValueError(
            f"{at}: residual plane {stage.residual} must have {leaving} channels, got {channels[stage.residual]}"
        )
    if groups > 1 and not stage.vertical:
        if leaving % groups:
            raise ValueError(f"{at}: its {leaving} channels must divide into {groups} groups, one a data channel")
        if gate and any(not vertical[plane] for plane in stage.added):
            raise ValueError(f"{at}: with {groups} data channels, planes added before a gate must be vertical")
    if noise.device.type == "cpu" and not torch.compiler.is_compiling():
        for plane, weight in stage.inputs:
            _check_taps(at, stage, plane, vertical[plane], weight, groups)
    return leaving


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
    late = torch.ones_like(blocks).triu(reach + 1)
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


def _check_known(image, known, shape, levels, noise) -> None:
    if (image is None) != (known is None):
        present, absent = ("known", "image") if image is None else ("image", "known")
        raise ValueError(f"{NAME}: image and known must be given together, got {present} without {absent}")
    if known is None:
        return
    checks.tensor(NAME, "image", image, checks.INTEGERS, kind="integers, the level indices")
    checks.tensor(NAME, "known", known, (torch.bool,), kind="bool, True where a pixel keeps its value")
    checks.same_device(NAME, {"noise": noise, "image": image, "known": known})
    checks.shape(NAME, "image", image, shape, "[N, C, H, W]")
    sizes = [1] * (4 - known.dim()) + list(known.shape)
    if known.dim() > 4 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(f"{NAME}: known must be broadcastable to [N, C, H, W] = {shape}, got {list(known.shape)}")
    if noise.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = known & ((image < 0) | (image.long() >= levels))
        if outside.any():
            wrong = image[outside.expand(shape)][0].item()
            raise ValueError(f"{NAME}: known pixels must lie in 0 to levels - 1 = {levels - 1}, got {wrong}")
