"""The option ``--seed`` of figures that draw their own weights and points."""

from __future__ import annotations

from genkernels._words import UsageError


def add_seed(parser, what: str) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"of {what} (default: 0)")


def checked_seed(seed: int) -> int:
    """`seed`, where torch's generators take it.

    Raises:
        UsageError: it has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"--seed must be an integer of 64 bits, got {seed}")
    return seed
