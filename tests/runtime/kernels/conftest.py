"""Triton's kernels on a GPU with FP8, or else on the CPU in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from zqfp_convert.runtime.kernels import portable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not portable.available():  # none, or one older than 3.6
    collect_ignore_glob = ["test_portable_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def summing() -> float:
    """How far a sum may be off, relative to the sum of magnitudes; H100's keep about 14 bits."""
    return 2e-6 if INTERPRETED else 2e-3
