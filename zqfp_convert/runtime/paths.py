"""Which way a quantized linear multiplies: what its device can do, and what the user asks for."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from zqfp_convert.errors import OptionError
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels import hopper, portable
from zqfp_convert.runtime.kernels.hopper import layout as hopper_layout
from zqfp_convert.runtime.kernels.portable import layout as portable_layout

Path = Literal["fused", "expanded", "reference"]
Wanted = Literal["auto", "fused", "expanded", "reference"]
Kernels = Literal["hopper", "portable", "torch", "none"]

PATH_VARIABLE = "ZQFP_PATH"
HOPPER = (9, 0)  # compute capability; the machine code is for no other


def kernels_for(
    device: torch.device,
    kind: Kind,
    group_size: int,
    columns: int,
    rank: int,
) -> Kernels:
    """What multiplies a layer on a device.

    Returns:
        hopper: CUDA C++ for compute capability 9.0, compiled by NVRTC.
        portable: Triton, for every GPU with FP8.
        torch: the expanded path in plain torch, where neither can be had or neither takes the
            layer.
        none: the reference path only.
    """
    if kind == "free":
        return "none"
    if not expanded.available(device):
        if device.type == "cuda":
            _warn_without_fp8(torch.cuda.get_device_name(device))
        return "none"
    if device.type != "cuda":
        return "torch"
    capability = torch.cuda.get_device_capability(device)
    if (
        capability == HOPPER
        and hopper_layout.supports(group_size, columns)
        and rank <= hopper_layout.MOST_RANKS
        and hopper.available()
    ):
        return "hopper"
    if (
        portable_layout.supports(group_size, columns)
        and rank <= portable_layout.MOST_RANKS
        and portable.available()
    ):
        return "portable"
    return "torch"


@cache
def _warn_without_fp8(name: str) -> None:
    warnings.warn(
        f"{name} has no FP8 tensor cores (compute capability 8.9 or higher): quantized linears "
        "take the reference path, which dequantizes the weight at each call",
        stacklevel=2,
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def forced() -> str | None:
    """`ZQFP_PATH`, or None; read at each call, under torch.compile when a call is compiled."""
    return os.environ.get(PATH_VARIABLE) or None


def wanted(kernels: Kernels, x: Tensor, layer: str) -> Wanted:
    """The way for an input, or `auto`: the kernels choose between fused and expanded.

    Args:
        kernels: from `kernels_for`.
        x: the input.
        layer: what its scales are, for errors.

    Raises:
        OptionError: `ZQFP_PATH` names no path, or one that cannot be taken.
    """
    path = forced()
    fast = kernels != "none" and x.dtype in (torch.bfloat16, torch.float16)
    if path is None:
        if not fast:
            return "reference"
        return "expanded" if kernels == "torch" else "auto"
    if path == "reference":
        return "reference"
    if path == "expanded" and fast:
        return "expanded"
    if path == "fused" and fast and kernels != "torch":
        return "fused"
    raise _impossible(path, f"{layer}, {x.dtype} on {x.device}")


def _impossible(path: str, found: str) -> OptionError:
    needed = "a GPU with FP8 (compute capability 8.9), bfloat16 or float16 activations, "
    if path == "expanded":
        needed += "scales m1 or m2"
    elif path == "fused":
        needed += "NVRTC or Triton, scales m1 or m2 in groups of a multiple of 32 or of a row, "
        needed += f"rank {portable_layout.MOST_RANKS} at most"
    else:
        found, needed = "no such path", "fused, expanded or reference"
    return OptionError(
        f"{PATH_VARIABLE}={path}", found, needed=needed, do=f"Unset {PATH_VARIABLE}."
    )
