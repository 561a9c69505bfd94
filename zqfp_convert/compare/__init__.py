"""Compares number formats, scales and solvers on a model by simulated quantization in memory.

What it simulates is not written anywhere: these are the tables of the papers, for any model.
"""
