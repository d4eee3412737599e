"""Kernels for GPUs. Not yet measured: tested in Triton's interpreter only (docs/fp8.md)."""
