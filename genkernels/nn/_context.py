"""The context of a flow: one row a sample."""

from __future__ import annotations

from torch import Tensor


def check_context(x: Tensor, context) -> None:
    """A single row, or a scalar, would broadcast and serve all samples.

    Raises:
        ValueError: it has not N rows.
    """
    if isinstance(context, Tensor) and (context.dim() < 1 or context.shape[0] != x.shape[0]):
        raise ValueError(
            f"the context of a flow must have a row for each of the N = {x.shape[0]} samples, got {list(context.shape)}"
        )
