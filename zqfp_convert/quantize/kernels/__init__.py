"""Triton kernels of the solvers. Ask `numerics.kernels.take` before importing a module of them."""
