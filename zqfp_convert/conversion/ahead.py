"""Reads what is needed next while the last is computed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint.shards import Shards


def read_ahead(
    shards: Shards, groups: Sequence[list[str]], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The named tensors of each group, on a device; those of the next are being read meanwhile."""
    if not groups:
        return
    # As many threads as here: how a sum is split up among them decides over its last bits.
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, "read", torch.set_num_threads, (threads,)) as pool:
        if device.type == "cuda":
            read = partial(_to_gpu, shards, device)
        else:
            read = partial(shards.read, device=device)
        reading = pool.submit(read, groups[0])
        for following in [*groups[1:], None]:
            found = reading.result()
            if following is not None:
                reading = pool.submit(read, following)
            yield found


def _to_gpu(shards: Shards, device: torch.device, names: list[str]) -> dict[str, Tensor]:
    """On a stream of its own, as copies on the usual one wait for what it still has to compute."""
    cuda: Any = torch.cuda
    stream = cuda.Stream(device)
    with torch.no_grad(), torch.cuda.stream(stream):
        tensors = shards.read(names, device)
    stream.synchronize()
    for tensor in tensors.values():
        tensor.record_stream(torch.cuda.default_stream(device))
    return tensors
