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

_GAMMA = 0x9E3779B97F4A7C15


def hash64(key: bytes) -> int:
    """The first 64 bits of BLAKE2b, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from names and numbers: different parts give unrelated streams."""
    return hash64("/".join(map(str, parts)).encode()) >> 1


def hashes(keys: Iterable[bytes]) -> np.ndarray:
    """`hash64` of each key, uint64."""
    return np.fromiter((hash64(key) for key in keys), dtype=np.uint64)


def hashes_of_rows(x: np.ndarray) -> np.ndarray:
    """A hash of each row's bytes, uint64, much faster than `hashes` and not for a split: the sum of its words, each
    mixed with its place."""
    rows = np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8))) if rows.shape[1] % 8 else rows
    words = rows.view("<u8")  # [N, words]
    step = max(1, 2**17 // words.shape[1])  # what the caches hold
    parts = [splitmix64(words[first : first + step]).sum(1) for first in range(0, len(words), step)]
    return np.concatenate(parts).astype(np.uint64)


def splitmix64(start: np.ndarray | int, length: int | None = None) -> np.ndarray:
    """The first `length` numbers of SplitMix64 from `start`, uint64; number i needs start and i only. Of an array
    ``[N, length]`` each number has a start of its own."""
    start = np.asarray(start, dtype=np.uint64)
    # Arrays of uint64 wrap modulo 2^64, as the sequence wants.
    z = np.arange(1, (length or start.shape[-1]) + 1, dtype=np.uint64) * np.uint64(_GAMMA) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_order(keys: Iterable[bytes]) -> np.ndarray:
    """Indices in the order of the keys' hashes: a fixed shuffle, so that the first n are a fair sample."""
    return np.argsort(hashes(keys), kind="stable")


def held_out(spec: str, keys: Iterable[bytes], what: str, fraction: float = HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """Split by key; both parts come in hash order and neither is empty.

    Args:
        spec: for the error.
        keys: one for each example; those with equal keys go to one side together.
        what: what the keys are, in the plural, for the error.
        fraction: share held out, in expectation.

    Returns:
        Indices of the training and of the held-out part, int64, disjoint, together all.

    Raises:
        DataError: fewer than two different keys.
    """
    found = hashes(keys)
    different = len(np.unique(found))
    if different < 2:
        raise DataError(f"{spec}: a held-out part needs at least two different {what}, got {different}")
    # Where the threshold leaves one side empty, the extreme hash (with its equals) goes there.
    threshold = np.clip(np.uint64(int(fraction * 2**64)), np.unique(found)[1], found.max())
    order = np.argsort(found, kind="stable")
    is_test = found[order] < threshold
    return order[~is_test], order[is_test]
