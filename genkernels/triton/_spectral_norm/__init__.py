"""Kernels and tables of `genkernels.triton.spectral_norm`, which has the maths."""
