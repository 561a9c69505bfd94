"""Reads what is needed next while the last is computed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint.shards import Shards
from zqfp_convert.conversion.host import give_back
from zqfp_convert.parallel import lacking


def read_ahead(
    shards: Shards, groups: Sequence[list[str]], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The named tensors of each group, on a device; those of the next are being read meanwhile.

    Where memory does not suffice for that, they are read when they are asked for.
    """
    if not groups:
        return
    cuda: Any = torch.cuda
    # One stream for all: memory that was taken on a stream is taken again on the same one alone.
    stream = cuda.Stream(device) if device.type == "cuda" else None
    # As many threads as here: how a sum is split up among them decides over its last bits.
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, "read", torch.set_num_threads, (threads,)) as pool:
        read = partial(_read, shards, device, stream)
        reading = pool.submit(read, groups[0])
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            found: dict[str, Tensor] | None = None
            with suppress(torch.OutOfMemoryError):
                found = reading.result()
            if found is None:
                del reading
                give_back(device)
                found = pool.submit(read, group).result()
            if stream is not None:
                for tensor in found.values():
                    tensor.record_stream(cuda.current_stream(device))
            if following is not None:
                reading = pool.submit(read, following)
            yield found


def _read(shards: Shards, device: torch.device, stream: Any, names: list[str]) -> dict[str, Tensor]:
    """On a stream of its own, as copies on the usual one wait for what it still has to compute."""
    with lacking():
        if stream is None:
            return shards.read(names, device)
        with torch.no_grad(), torch.cuda.stream(stream):
            tensors = shards.read(names, device)
        stream.synchronize()
        return tensors
