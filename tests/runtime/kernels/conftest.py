"""Triton's kernels on a GPU with FP8, or else on the CPU in Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import pytest
import torch

from zqfp_convert.runtime import expanded

INTERPRETED = not (torch.cuda.is_available() and expanded.available(torch.device("cuda")))


def interpret() -> None:
    """Make Triton interpret, also where something has imported it already."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    if type(tl.sum).__name__ != "InterpretedFunction":
        # Triton decides for its own functions as it is imported, and transformers did that early.
        importlib.reload(sys.modules["triton.language.standard"])
        importlib.reload(tl)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_too(tensor: type, scope: interpreter._LangPatchScope) -> None:
        # numpy from 2.4 on makes no int of an array `[1]`, as Triton 3.6 does for a range
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_too


if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_portable_*.py"]
elif INTERPRETED:
    interpret()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def summing() -> float:
    """How far a sum may be off, relative to the sum of magnitudes; H100's keep about 14 bits."""
    return 2e-6 if INTERPRETED else 2e-3
