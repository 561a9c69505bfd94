"""Triton kernels for every GPU with FP8 tensor cores: quantize, multiply, expand.

Importing this package does not import Triton; importing its kernel modules (`quantize`,
`multiply`, `expand`) does. Ask `available` first.
"""

from zqfp_convert.numerics.kernels import available as available
