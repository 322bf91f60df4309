"""`digits`: 1,797 scanned handwritten digits, 8×8 pixels of 17 grey levels, shipped inside scikit-learn.

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI): each
pixel counts the ink in a 4×4 block of a 32×32 bitmap, hence 0 to 16. No two scans are equal.
"""

from __future__ import annotations

import numpy as np
import torch

from genkernels.data.bundle import DataBundle, TensorPairs, make_bundle
from genkernels.data.spec import require
from genkernels.data.split import hash64

GREY_LEVELS = 17
TEST = 360


def load(spec: str) -> DataBundle:
    """1,437 scans to train on and 360 held out, the same ones always, classes in proportion."""
    scans = require(spec, "sklearn.datasets", "scikit-learn").load_digits()
    x = torch.from_numpy(scans.images.astype(np.uint8)).unsqueeze(1)  # [1797, 1, 8, 8]
    y = torch.from_numpy(scans.target.astype(np.int64))
    train, test = stratified(x.numpy(), y.numpy(), TEST)
    parts = [TensorPairs(x[rows], y[rows]) for rows in (train, test)]
    what = f"scanned digits 8x8, {GREY_LEVELS} grey levels"
    return make_bundle(spec, what, parts, (1, 8, 8), grey_levels=GREY_LEVELS, classes=[str(i) for i in range(10)])


def stratified(x: np.ndarray, y: np.ndarray, test: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out `test` rows, each class in proportion to within one row, by the hash of the pixels.

    Within its class every row gets a rank by hash; the rows with the lowest relative ranks are held out,
    which takes the same share of every class without rounding each one by itself.

    Returns:
        Indices of the training and of the held-out rows, each in the rows' own order.
    """
    hashes = np.array([hash64(row.tobytes()) for row in x], dtype=np.uint64)
    relative = np.empty(len(x))
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        ranked = rows[np.argsort(hashes[rows], kind="stable")]
        relative[ranked] = (np.arange(len(rows)) + 0.5) / len(rows)
    order = np.lexsort((y, relative))
    return np.sort(order[test:]), np.sort(order[:test])
