"""Every operator in plain PyTorch, any dtype and device: the definition that kernels are held against."""
