"""A packed checkpoint's layers as dense float64 matrices, decoded here from the bytes.

It shares no code with the package: what the package computes is held to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
CODES = torch.cat([E2M1, -E2M1])


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's shards."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def manifest(folder: Path) -> dict[str, dict[str, object]]:
    """The manifest of a packed checkpoint."""
    return json.loads((folder / "zqfp_manifest.json").read_text())


def quantization_config(folder: Path) -> dict[str, dict[str, object]]:
    """The `quantization_config` of a packed checkpoint."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def weight_of(
    tensors: dict[str, Tensor],
    name: str,
    columns: int,
    group_size: int,
    books: Sequence[Sequence[float]] = (E2M1.tolist(),),
) -> Tensor:
    """The dequantized weight of a layer without low-rank compensation, float64 `[N, K]`."""
    packed = tensors[name + ".weight_packed"]
    codes = torch.zeros(packed.shape[0], 2 * packed.shape[1], dtype=torch.int64)
    codes[:, 0::2] = packed.long() % 16
    codes[:, 1::2] = packed.long() // 16
    scale = tensors[name + ".weight_scale"].double()
    if tensors[name + ".weight_scale"].dtype == torch.uint8:
        scale = 2.0 ** (scale - 127)
    if name + ".weight_row_scale" in tensors:
        scale = scale * tensors[name + ".weight_row_scale"].double()[:, None]
    values = torch.tensor([[*book, *(-value for value in book)] for book in books]).double()
    choice = torch.zeros(scale.shape, dtype=torch.int64)
    if name + ".weight_codebook" in tensors:
        packed = tensors[name + ".weight_codebook"].long()
        for row in range(scale.shape[0]):
            choice[row] = packed[row // 8] // 2 ** (row % 8) % 2

    def spread(by_group: Tensor) -> Tensor:
        return by_group.repeat_interleave(group_size, 1)[:, :columns]

    return values[spread(choice), codes[:, :columns]] * spread(scale)


def lorc_of(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor] | None:
    """`diag(s) A` and `B` of a layer, float64, or None."""
    if name + ".lorc_A" not in tensors:
        return None
    A = tensors[name + ".lorc_A"].to(torch.float32).double()
    if name + ".lorc_scale" in tensors:
        A = A * tensors[name + ".lorc_scale"].double()[:, None]
    return A, tensors[name + ".lorc_B"].to(torch.float32).double()


def seen(x: Tensor) -> Tensor:
    """The activations that a quantized linear sees: E4M3 with a scale for each token, float32."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(2.0**-100) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class Dense(nn.Module):
    """A quantized layer as a dense one, in the dtype of its weight."""

    def __init__(
        self, weight: Tensor, lorc: tuple[Tensor, Tensor] | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.weight, self.lorc, self.bias = weight, lorc, bias

    def forward(self, x: Tensor) -> Tensor:
        inputs = seen(x).to(self.weight.dtype)
        y = inputs @ self.weight.T
        if self.lorc is not None:
            y = y + (inputs @ self.lorc[0].T) @ self.lorc[1].T
        return y if self.bias is None else y + self.bias


def dense(
    folder: Path, tensors: dict[str, Tensor], name: str, dtype: torch.dtype = torch.float64
) -> Dense:
    """The layer of that name on disk."""
    columns = manifest(folder)["layers"][name]["shape"][1]
    size = quantization_config(folder)["weights"]["group_size"]
    books = quantization_config(folder)["weights"].get("codebooks", [E2M1.tolist()])
    weight = weight_of(tensors, name, columns, columns if size == "row" else size, books)
    lorc = lorc_of(tensors, name)
    bias = tensors.get(name + ".bias")
    return Dense(
        weight.to(dtype),
        None if lorc is None else (lorc[0].to(dtype), lorc[1].to(dtype)),
        None if bias is None else bias.to(dtype),
    )
