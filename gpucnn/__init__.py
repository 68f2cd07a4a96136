"""Convolutional networks on NVIDIA GPUs in kernels you can read, and the same program on NumPy."""

__version__ = "0.1.0"
