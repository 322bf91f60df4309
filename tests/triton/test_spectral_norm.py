"""What the Triton launchers of spectral_norm refuse."""

import pytest
import torch

from genkernels.ops import Geometry
from genkernels.reference.spectral_norm import as_plan
from genkernels.triton._spectral_norm import tables


def test_refuses_more_places_of_a_vector_than_32_bits_tell_apart():
    tall = torch.empty(2**30 + 1, 1, device="meta")
    u, v = torch.empty(2**30 + 1, device="meta"), torch.empty(1, device="meta")
    sentence = "spectral_norm: the Triton kernels take at most 2.30 numbers of u and v, got 1073741825"
    with pytest.raises(ValueError, match=sentence):
        tables._row(tall, u, v, as_plan([Geometry()]), 0, 0)
