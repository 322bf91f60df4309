"""The launches of masked_conv. Values are held in tests/ops/test_masked_conv.py."""

from genkernels.triton import masked_conv as kernels


def test_the_gradient_of_the_weight_is_split_by_shape_alone():
    assert kernels._splits(4, 1, 32) == (1, 1)
    for pixels, programs in ((784 * 256, 5), (1 << 33, 100), (1025, 1)):
        splits, steps = kernels._splits(pixels, programs, 64)
        assert splits * steps * 64 >= pixels > (splits - 1) * steps * 64 and splits <= max(1, -(-1024 // programs))
