"""What a model's weights take up, what one token reads of them, and how fast memory can be read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.pytorch_utils import Conv1D

from zqfp_convert.model.device import free_memory
from zqfp_convert.runtime.linear import QuantizedLinear

WEIGHTS, ROWS, LORC = "weights", "row factors", "low-rank factors"
EMBEDDING, HEAD, OTHERS, CACHE = "embedding rows", "head", "norms and biases", "KV cache"
KINDS = (WEIGHTS, ROWS, LORC, EMBEDDING, HEAD, OTHERS, CACHE)

# Buffers of a quantized linear, as on disk and as its kernels have them.
PARTS = {
    "weight_packed": WEIGHTS,
    "weight_scale": WEIGHTS,
    "weight_codebook": WEIGHTS,
    "chunks": WEIGHTS,
    "weights": WEIGHTS,
    "shifts": WEIGHTS,
    "weight_row_scale": ROWS,
    "row_factor": ROWS,
    "lorc_A": LORC,
    "lorc_B": LORC,
    "lorc_scale": LORC,
    "inner_factor": LORC,
    "inner_scale": LORC,
    "outer": LORC,
    "bias": OTHERS,
    "input_offset": OTHERS,
}
LARGEST_READ = {"cuda": 4 << 30, "cpu": 1 << 28}  # bytes
READS = 7


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those that are shared counted once."""
    held: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        held[tensor.data_ptr()] = max(held.get(tensor.data_ptr(), 0), tensor.nbytes)
    return sum(held.values())


def read_for_a_token(model: PreTrainedModel, cache: StaticCache) -> dict[str, int]:
    """Bytes that have to be read to decode one token, by kind.

    All weights once, but of an embedding one row; of the cache all that it has room for, since a
    static cache is read whole.
    """
    counts = dict.fromkeys(KINDS, 0)
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for kind, size in _quantized(module):
                counts[kind] += size
            continue
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if module is head:
                kind = HEAD
            elif isinstance(module, nn.Embedding):
                counts[EMBEDDING] += parameter[0].nbytes
                continue
            else:
                linear = isinstance(module, (nn.Linear, Conv1D)) and name == "weight"
                kind = WEIGHTS if linear else OTHERS
            counts[kind] += parameter.nbytes
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            counts[CACHE] += 0 if tensor is None else tensor.nbytes
    return counts


def _quantized(layer: QuantizedLinear) -> Iterator[tuple[str, int]]:
    """What the fused product reads of a layer: what its kernels have, else what is on disk."""
    buffers: dict[str, Tensor] = dict(layer.named_buffers(recurse=False))
    if layer.arranged is not None:
        buffers = dict(layer.arranged.named_buffers(recurse=False))
        if "outer" in buffers:
            buffers.pop("lorc_B", None)  # kept for the expanded path
    for name, tensor in buffers.items():
        if name in PARTS:
            yield PARTS[name], tensor.nbytes


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a sum over a tensor too large for any cache, the median of several."""
    most = LARGEST_READ[device.type]
    free = free_memory(device)
    size = most if free is None else min(most, free // 4)
    values = torch.empty(max(1, size // 4), device=device).uniform_()
    values.sum()
    seconds = []
    for _ in range(READS):
        if device.type == "cuda":
            begin, end = _event(), _event()
            begin.record()
            values.sum()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            values.sum()
            seconds.append(time.perf_counter() - began)
    rate: float = values.nbytes / median(seconds)
    return rate


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
