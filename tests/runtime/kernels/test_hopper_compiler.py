"""Which of several NVRTC libraries is taken; no library is needed for this."""

from __future__ import annotations

from pathlib import Path

import pytest

from zqfp_convert.runtime.kernels.hopper.compiler import by_fitness

TWELVE = Path("nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
THIRTEEN = Path("nvidia/cu13/lib/libnvrtc.so.13")


@pytest.mark.parametrize(
    ("cuda", "first"), [("12.8", TWELVE), ("13.0", THIRTEEN), (None, THIRTEEN), ("11.8", THIRTEEN)]
)
def test_that_of_pytorch_goes_first(cuda: str | None, first: Path) -> None:
    for found in ([TWELVE, THIRTEEN], [THIRTEEN, TWELVE]):
        assert by_fitness(found, cuda)[0] == first
        assert sorted(by_fitness(found, cuda)) == sorted(found)
