"""Every operator in plain PyTorch, any dtype and device: the definition that kernels are held against."""

from genkernels.reference.affine_coupling import (
    affine_coupling,
    affine_coupling_backward,
    affine_coupling_reverse,
)

__all__ = ["affine_coupling", "affine_coupling_backward", "affine_coupling_reverse"]
