"""Triton kernels, one op per file with its launcher."""
