"""Who is held out: decided by a hash of the example itself, never by its place or by a seed.

An example with the key k is held out when h(k) < fraction, with h the first 64 bits of BLAKE2b read as a
number in [0, 1). So the same key is on the same side in every run, whatever the seed, and stays there when
others are added (unless there are so few that one side would be empty); equal keys are never on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from genkernels.data.spec import DataError

HELD_OUT = 0.1


def hash64(key: bytes) -> int:
    """The first 64 bits of BLAKE2b, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from names and numbers: different parts give unrelated streams."""
    return hash64("/".join(map(str, parts)).encode()) >> 1


def hashes(keys: Iterable[bytes]) -> np.ndarray:
    """`hash64` of each key, uint64."""
    return np.fromiter((hash64(key) for key in keys), dtype=np.uint64)


def hash_order(keys: Iterable[bytes]) -> np.ndarray:
    """Indices in the order of the keys' hashes: a fixed shuffle, so that the first n are a fair sample."""
    return np.argsort(hashes(keys), kind="stable")


def held_out(
    spec: str, keys: Iterable[bytes] | np.ndarray, what: str, fraction: float = HELD_OUT
) -> tuple[np.ndarray, np.ndarray]:
    """Split by key; both parts come in hash order and neither is empty.

    Args:
        spec: for the error.
        keys: one for each example, or their `hashes`; those with equal keys go to one side together.
        what: what the keys are, in the plural, for the error.
        fraction: share held out, in expectation.

    Returns:
        Indices of the training and of the held-out part, int64, disjoint, together all.

    Raises:
        DataError: fewer than two different keys.
    """
    found = keys if isinstance(keys, np.ndarray) else hashes(keys)
    different = len(np.unique(found))
    if different < 2:
        raise DataError(f"{spec}: a held-out part needs at least two different {what}, got {different}")
    # Where the threshold leaves one side empty, the extreme hash (with its equals) goes there.
    threshold = np.clip(np.uint64(int(fraction * 2**64)), np.unique(found)[1], found.max())
    order = np.argsort(found, kind="stable")
    is_test = found[order] < threshold
    return order[~is_test], order[is_test]
