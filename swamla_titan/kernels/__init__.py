"""Kernels, each beside the plain PyTorch that it is tested against."""
