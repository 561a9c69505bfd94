"""Kernels that multiply packed weights: for Hopper, and for every GPU with FP8."""
