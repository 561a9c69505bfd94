"""The rotation against its definition: Kronecker powers of J / 2 - I on the diagonal."""

from __future__ import annotations

import pytest
import torch

from zqfp_convert.numerics import hadamard


def naive(width: int) -> torch.Tensor:
    four = torch.full((4, 4), 0.5, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
    block = torch.ones(1, 1, dtype=torch.float64)
    while width % (4 * len(block)) == 0:
        block = torch.kron(four, block)
    return torch.block_diag(*[block] * (width // len(block)))


@pytest.mark.parametrize("width", [1, 4, 6, 12, 48, 64, 256, 320])
def test_it_is_the_matrix(width: int) -> None:
    Q = naive(width)
    eye = torch.eye(width, dtype=torch.float64)
    assert torch.equal(hadamard.rotate(eye), Q)
    assert torch.equal(Q @ Q, eye)
    assert torch.equal(Q, Q.t())
    assert torch.equal(Q.sum(1), torch.ones(width, dtype=torch.float64))
    values = torch.randn(3, width, 5, generator=torch.Generator().manual_seed(width))
    want = torch.einsum("awb,wv->avb", values.double(), Q)
    torch.testing.assert_close(hadamard.rotate(values, 1).double(), want, rtol=1e-5, atol=1e-6)
    assert hadamard.rotate(values.bfloat16(), 1).dtype == torch.float32


def test_blocks() -> None:
    widths = (1, 2, 4, 64, 128, 768, 2048, 3584, 4096)
    assert [hadamard.block_of(width) for width in widths] == [1, 1, 4, 64, 64, 256, 1024, 256, 4096]


def test_it_passes_through_norms() -> None:
    x = 3 * torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    for norm in (torch.nn.functional.layer_norm, torch.nn.functional.rms_norm):
        turned = norm(hadamard.rotate(x), (64,))
        torch.testing.assert_close(turned, hadamard.rotate(norm(x, (64,))))
